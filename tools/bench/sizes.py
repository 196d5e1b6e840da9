"""How much of the benchmark is run."""

from __future__ import annotations

import enum

__all__ = ["Size"]


class Size(enum.StrEnum):
    """What a section measures: all of it, what takes seconds, or as little as a test needs.

    The shapes of a smaller size are not those of the page: its figures are for looking at the tool.
    """

    FULL = "full"
    QUICK = "quick"
    TINY = "tiny"
