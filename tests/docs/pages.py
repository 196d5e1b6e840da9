"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "ROOT", "Block", "blocks"]

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        language: What stands behind the three backticks.
        text: The code.
        line: The line of the page on which it begins, counted from 0.
        output: The block of plain text that follows it directly, if there is one.
    """

    language: str
    text: str
    line: int
    output: str | None


def blocks(page: str) -> Iterator[Block]:
    """Finds the blocks of a page."""
    found = list(re.finditer(r"^```(\w+)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE))
    for place, one in enumerate(found):
        output = None
        if place + 1 < len(found) and found[place + 1][1] == "text":
            between = page[one.end() : found[place + 1].start()]
            output = None if between.strip() else found[place + 1][2]
        yield Block(one[1], one[2], page[: one.start(2)].count("\n"), output)
