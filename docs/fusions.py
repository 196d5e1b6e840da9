"""Writes the table of fusions of ``guides/export.md`` from the list in ``export/fuse/``.

python docs/fusions.py            # print it
python docs/fusions.py --write    # into docs/guides/export.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lora_fx.export.fuse import fusion_table

PAGE = Path(__file__).with_name("guides") / "export.md"


def main() -> None:
    """Prints the table, or writes it into the page."""
    text = fusion_table()
    if "--write" not in sys.argv:
        sys.stdout.write(text + "\n")
        return
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- fusions -->\n).*?(<!-- end -->)", re.DOTALL)
    new, count = pattern.subn(lambda found: f"{found[1]}{text}\n{found[2]}", page)
    if count != 1:
        raise SystemExit(f"{PAGE.name} has no place for the table")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
