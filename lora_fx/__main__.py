"""``python -m lora_fx``: the command line."""

from __future__ import annotations

from lora_fx.tools.cli import main

if __name__ == "__main__":
    main()
