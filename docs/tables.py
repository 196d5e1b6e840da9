"""Shared helper of scale.py and fusions.py: writes a generated table into its page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

__all__ = ["show_or_write"]


def show_or_write(text: str, page: Path, marker: str) -> None:
    """Print a table, or with ``--write`` put it between the comments ``marker`` and ``end`` of a page."""
    if "--write" not in sys.argv:
        sys.stdout.write(text + "\n")
        return
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.DOTALL)
    before = page.read_text(encoding="utf-8")
    new, count = pattern.subn(lambda match: f"{match[1]}{text}\n{match[2]}", before)
    if count != 1:
        raise SystemExit(f"{page.name} has no place for the table")
    page.write_text(new, encoding="utf-8")
