"""``python -m lora_fx``: the command line."""

from __future__ import annotations

if __name__ == "__main__":
    from lora_fx.tools.cli import main

    main()
