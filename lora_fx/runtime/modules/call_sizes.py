"""Record of the calls of a module that were checked, by their form and the sizes of their tensors.

A form has everything that matters about a call except sizes, such as the training mode and the classes of the
arguments. Sizes are recorded because code may behave differently at other sizes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

__all__ = ["Sizes"]

_EACH = 4  # number of sizes of a form that are all checked
_REMEMBERED = 1000  # most unchecked sizes to store in ``known`` because their range was checked


class Sizes:
    """Forms of calls that were checked, with the sizes of each check.

    The first few sizes of a form are all checked. Later sizes are checked only if they are in a new range.
    Each power of two is a range, because code often compares sizes with powers of two. So are the numbers
    between two powers. While generation makes a text longer, only a few of its sizes are checked.

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
    """Replace each size by the number of its range, also in nested tuples. Other values stay."""
    return tuple(
        2 * size.bit_length() + (size & (size - 1) == 0)
        if isinstance(size, int)
        else _ranges(size)
        if isinstance(size, tuple)
        else size
        for size in sizes
    )
