"""Which sizes a form of call was looked at with: code may do something else at others."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

__all__ = ["Sizes"]

_EACH = 4  # sizes of a form that are looked at one by one
_REMEMBERED = 1000  # of those that were let through by their ranges


class Sizes:
    """Forms of calls, with the sizes that each was looked at with.

    The first few sizes of a form are all looked at. Later ones only where one of them is in another range
    than before: powers of two, which code likes to compare with, and the numbers between two of them. A text
    that grows is then looked at a few times, and not at each token.

    Attributes:
        known: Forms with the sizes that are known, as pairs: what is in here needs no other question.
        forms: How many sizes of each were looked at.
    """

    __slots__ = ("_ranges", "_remembered", "forms", "known")

    def __init__(self) -> None:
        self.known: set[tuple[Hashable, Hashable]] = set()
        self.forms: dict[Hashable, int] = {}
        self._ranges: set[tuple[Hashable, tuple[object, ...]]] = set()
        self._remembered = 0

    def add(self, form: Hashable, sizes: tuple[Hashable, ...]) -> None:
        """Notes that a call was looked at."""
        if (form, sizes) not in self.known:
            self.known.add((form, sizes))
            self.forms[form] = self.forms.get(form, 0) + 1
        self._ranges.add((form, _ranges(sizes)))

    def knows(self, form: Hashable, sizes: tuple[Hashable, ...]) -> bool:
        """Whether a call need not be looked at."""
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
    """A number for the range of each size."""
    return tuple(
        2 * one.bit_length() + (one & (one - 1) == 0)
        if isinstance(one, int)
        else _ranges(one)
        if isinstance(one, tuple)
        else one
        for one in sizes
    )
