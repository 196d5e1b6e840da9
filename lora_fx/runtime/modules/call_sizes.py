"""Sizes at which each form of call was checked. Code may behave differently at other sizes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

__all__ = ["Sizes"]

_EACH = 4  # so many sizes of a form are checked one by one
_REMEMBERED = 1000  # so many sizes that passed by their ranges are kept


class Sizes:
    """Forms of calls that were checked, with the sizes of each check.

    The first few sizes of a form are all checked. Later sizes are checked only if they are in a new range.
    Ranges are the powers of two, which code likes to compare with, and the numbers between two of them. A
    text that grows is then checked a few times, and not at each token.

    Attributes:
        known: Pairs of a form and sizes that need no check.
        forms: Number of sizes that were checked, by form.
    """

    __slots__ = ("_ranges", "_remembered", "forms", "known")

    def __init__(self) -> None:
        self.known: set[tuple[Hashable, Hashable]] = set()
        self.forms: dict[Hashable, int] = {}
        self._ranges: set[tuple[Hashable, tuple[object, ...]]] = set()
        self._remembered = 0

    def add(self, form: Hashable, sizes: tuple[Hashable, ...]) -> None:
        """Add a form with the sizes at which it was checked."""
        if (form, sizes) not in self.known:
            self.known.add((form, sizes))
            self.forms[form] = self.forms.get(form, 0) + 1
        self._ranges.add((form, _ranges(sizes)))

    def knows(self, form: Hashable, sizes: tuple[Hashable, ...]) -> bool:
        """Return True if a call of this form and these sizes needs no check."""
        if (form, sizes) in self.known:
            return True
        if self.forms.get(form, 0) < _EACH or (form, _ranges(sizes)) not in self._ranges:
            return False
        if self._remembered < _REMEMBERED:
            self._remembered += 1
            self.known.add((form, sizes))
        return True

    def __bool__(self) -> bool:
        return bool(self.known)


def _ranges(sizes: Iterable[object]) -> tuple[object, ...]:
    """Return the number of the range of each size. Other values stay."""
    return tuple(
        2 * size.bit_length() + (size & (size - 1) == 0)
        if isinstance(size, int)
        else _ranges(size)
        if isinstance(size, tuple)
        else size
        for size in sizes
    )
