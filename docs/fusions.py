"""Table of fusions for ``guides/export.md``, written from the list in ``export/fuse/``.

python docs/fusions.py            # print it
python docs/fusions.py --write    # into docs/guides/export.md
"""

from __future__ import annotations

from pathlib import Path

from tables import show_or_write

from lora_fx.export.fuse import fusion_table

PAGE = Path(__file__).with_name("guides") / "export.md"


if __name__ == "__main__":
    show_or_write(fusion_table(), PAGE, "fusions")
