"""Where the grammar's choices come from: a seed, hypothesis, or a list to repeat; and how a list shrinks.

Every choice is an index into a list of options, the simplest first. So a program is a list of small
numbers, and smaller numbers are a smaller program.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from tests.fuzz.features import FEATURES

__all__ = ["Alone", "Choices", "Drawn", "Repeated", "Seeded", "shrunk"]

T = TypeVar("T")


class Choices:
    """Makes choices and remembers them.

    Attributes:
        log: The choices that were made, in order.
        features: Names of the features that were chosen, ``group/name``.
        off: Features that are never chosen.
    """

    def __init__(self, off: frozenset[str] = frozenset()) -> None:
        self.log: list[int] = []
        self.features: list[str] = []
        self.off = off

    def index(self, size: int) -> int:
        """A number below ``size``."""
        raise NotImplementedError

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        if len(options) == 1:
            return options[0]
        chosen = self.index(len(options))
        self.log.append(chosen)
        return options[chosen]

    def chance(self, one_in: int) -> bool:
        """Whether something rare happens; it does not in the simplest program."""
        return self.pick([False] * (one_in - 1) + [True])

    def count(self, least: int, most: int) -> int:
        """How many."""
        return self.pick(range(least, most + 1))

    def feature(self, group: str, names: Sequence[str]) -> str:
        """One of the names whose feature ``group/name`` is on."""
        for name in names:
            if f"{group}/{name}" not in FEATURES:
                raise KeyError(f"{group}/{name} is not in the table of features")
        chosen = self.pick([name for name in names if f"{group}/{name}" not in self.off])
        self.features.append(f"{group}/{chosen}")
        return chosen

    def has(self, feature: str, one_in: int) -> bool:
        """Whether a feature that is on is used, one time in so many."""
        if feature not in FEATURES:
            raise KeyError(f"{feature} is not in the table of features")
        if feature in self.off or not self.chance(one_in):
            return False
        self.features.append(feature)
        return True

    def may(self, feature: str) -> bool:
        """Whether a feature is on; it is used then."""
        if feature not in FEATURES:
            raise KeyError(f"{feature} is not in the table of features")
        if feature not in self.off:
            self.features.append(feature)
        return feature not in self.off


class Seeded(Choices):
    """Choices by a pseudo-random generator."""

    def __init__(self, seed: str, off: frozenset[str] = frozenset()) -> None:
        super().__init__(off)
        self._random = random.Random(seed)

    def index(self, size: int) -> int:
        return self._random.randrange(size)


class Alone(Seeded):
    """A program with one feature and, else, the simplest ones; what is no feature comes from the seed."""

    def __init__(self, wanted: str, seed: str, extra: frozenset[str] = frozenset()) -> None:
        super().__init__(seed)
        self._wanted, self._extra = wanted, extra
        group = wanted.partition("/")[0]
        self._move = {"use": "read", "change": "read", "argument": "", "decorator": ""}.get(
            group, group
        )

    def feature(self, group: str, names: Sequence[str]) -> str:
        chosen = next((name for name in names if f"{group}/{name}" == self._wanted), names[0])
        if group == "move" and self._move in names and f"move/{self._move}" not in self.features:
            chosen = self._move
        self.features.append(f"{group}/{chosen}")
        return chosen

    def has(self, feature: str, one_in: int) -> bool:
        group = self._wanted.partition("/")[0]
        if feature in (self._wanted, f"move/{group}") or feature in self._extra:
            self.features.append(feature)
            return True
        return False


class Repeated(Choices):
    """Choices out of a list; where it ends, or does not fit, the simplest."""

    def __init__(self, given: Sequence[int], off: frozenset[str] = frozenset()) -> None:
        super().__init__(off)
        self._given = iter(given)

    def index(self, size: int) -> int:
        chosen = next(self._given, 0)
        return chosen if chosen < size else 0


class Draw(Protocol):
    """What hypothesis hands to a composite strategy."""

    def __call__(self, strategy: Any) -> Any: ...


class Drawn(Choices):
    """Choices by hypothesis, which shrinks them."""

    def __init__(self, draw: Draw, off: frozenset[str] = frozenset()) -> None:
        super().__init__(off)
        self._draw = draw

    def index(self, size: int) -> int:
        from hypothesis import strategies

        return int(self._draw(strategies.integers(0, size - 1)))


def shrunk(
    log: Sequence[int], still: Callable[[Sequence[int]], Sequence[int] | None], tries: int = 600
) -> list[int]:
    """The smallest list that can be found by leaving out and lowering choices.

    Args:
        log: The choices of a program that fails.
        still: Gives the choices that a program really made if it fails in the same way, else None.
        tries: How many programs may be run.
    """
    best = list(log)
    improved = True
    while improved and tries > 0:
        improved = False
        for candidate in _smaller(best):
            if tries <= 0:
                break
            tries -= 1
            found = still(candidate)
            if found is not None and _order(found) < _order(best):
                best, improved = list(found), True
                break
    return best


def _order(log: Sequence[int]) -> tuple[int, int, Sequence[int]]:
    return len(log), sum(log), log


def _smaller(log: list[int]) -> Iterator[list[int]]:
    halves = [len(log) >> shift for shift in range(1, 6) if len(log) >> shift > 12]
    for width in (*halves, *range(12, 0, -1)):
        for start in range(0, len(log) - width + 1, max(width // 4, 1)):
            yield log[:start] + log[start + width :]
    for place, value in enumerate(log):
        if value:
            yield [*log[:place], 0, *log[place + 1 :]]
    for place, value in enumerate(log):
        if value > 1:
            yield [*log[:place], value - 1, *log[place + 1 :]]
