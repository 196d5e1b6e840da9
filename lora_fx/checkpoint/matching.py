"""Matching of the names of one model with those of another, by their words, numbers and shapes.

Names that differ only in numbers are a family (``layers.*.attn.q_proj``). A family is matched as a whole:
each of its numbers has to exist in the other family with the same shape. If several families fit, the one
with the most words in common is taken, provided that no other has as many, in either direction. A family
scores higher if its name begins differently in the same way as names that are already matched, such as
``model.`` instead of ``transformer.``.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from lora_fx.errors import some

__all__ = ["Matched", "Named", "match_names"]

_LEAST: Final = 0.6
"""Minimum share of common words. Below it, two families match only if no other family has the shapes."""

_SAME_RULE: Final = 1.5
"""Bonus, in words, if the beginnings of two names differ in the same way as in names already matched."""


_SHORT: Final = 0.75
"""Weight of two words of which one is the beginning of the other, such as q and query."""


@dataclasses.dataclass(frozen=True, slots=True)
class Named:
    """A matrix to match, with the properties that another matrix needs to fit.

    Attributes:
        name: The name; an index of a stack follows in brackets.
        shape: The shape of the matrix.
        kind: "embedding" or "linear"; empty if it may be either.
        turned: True if the shape may be [in, out] as well as [out, in].
    """

    name: str
    shape: tuple[int, ...]
    kind: str = ""
    turned: bool = False

    def is_like(self, other: Named) -> bool:
        """Return True if another matrix has a shape and a kind that this matrix may have."""
        shapes = (self.shape, self.shape[::-1]) if self.turned else (self.shape,)
        return other.shape in shapes and self.kind in ("", other.kind)


@dataclasses.dataclass(frozen=True, slots=True)
class Matched:
    """The result of a match.

    Attributes:
        names: The new name and the share of common words, by the old name.
        problems: The reason why another name is not matched, by the old name.
    """

    names: Mapping[str, tuple[str, float]]
    problems: Mapping[str, str]


_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)|(?<=\[)\d+(?=\]$)")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|\*")


@dataclasses.dataclass(eq=False)
class _Family:
    """Names that differ only in numbers.

    Attributes:
        pattern: The name with ``*`` for numbers.
        members: Each member by its numbers.
    """

    pattern: str
    members: dict[tuple[str, ...], Named]

    def rule(self, other: _Family) -> tuple[str, str]:
        """Return the different beginnings of two names, such as ``model`` and ``transformer``.

        The beginnings are left after equal parts at the ends of both names are removed.
        """
        mine, theirs = (
            family.pattern.removesuffix(".weight").split(".") for family in (self, other)
        )
        while mine and theirs and mine[-1] == theirs[-1]:
            mine, theirs = mine[:-1], theirs[:-1]
        return ".".join(mine), ".".join(theirs)

    def words(self, skipped: int = 0) -> list[str]:
        """Return the words of the name, without its first ``skipped`` parts."""
        tail = ".".join(self.pattern.removesuffix(".weight").split(".")[skipped:])
        return [word.lower() for word in _WORD.findall(tail)]

    def takes(self, other: _Family) -> bool:
        """Return True if each member of another family has a fitting member with equal numbers here."""
        return all(
            numbers in self.members and member.is_like(self.members[numbers])
            for numbers, member in other.members.items()
        )


def match_names(old: Iterable[Named], new: Iterable[Named]) -> Matched:
    """Match names with those of another model.

    Args:
        old: The names to match.
        new: The names of the other model that are free.
    """
    olds, news = _families(old), _families(new)
    pairs: dict[_Family, tuple[_Family, float]] = {}
    candidates = {family: [other for other in news if other.takes(family)] for family in olds}
    rules: set[tuple[str, str]] = set()
    skipped = _common_beginning([family.pattern.split(".")[:-1] for family in olds])
    while True:
        settled = _settle(candidates, rules, skipped)
        for family, other, score in settled:
            pairs[family] = (other, score)
            rules.add(family.rule(other))
            del candidates[family]
        for choices in candidates.values():
            choices[:] = [
                other for other in choices if all(other is not pair[0] for pair in pairs.values())
            ]
        if not settled:
            break
    names = {
        member.name: (other.members[numbers].name, score)
        for family, (other, score) in pairs.items()
        for numbers, member in family.members.items()
    }
    problems = {
        member.name: _problem(family, choices, skipped)
        for family, choices in candidates.items()
        for member in family.members.values()
    }
    return Matched(names, problems)


def _families(names: Iterable[Named]) -> list[_Family]:
    families: dict[str, _Family] = {}
    for member in names:
        pattern = _NUMBER.sub("*", member.name)
        family = families.setdefault(pattern, _Family(pattern, {}))
        family.members.setdefault(tuple(_NUMBER.findall(member.name)), member)
    return list(families.values())


def _settle(
    candidates: Mapping[_Family, Sequence[_Family]],
    rules: Collection[tuple[str, str]],
    skipped: int,
) -> list[tuple[_Family, _Family, float]]:
    """Return the pairs of families that are each other's best match, with their share of common words."""
    scores: dict[_Family, dict[_Family, float]] = defaultdict(dict)
    back: dict[_Family, dict[_Family, float]] = defaultdict(dict)
    shares: dict[tuple[_Family, _Family], float] = {}
    for family, choices in candidates.items():
        for other in choices:
            share = _alike(family, other, skipped)
            shares[family, other] = share
            # Count common words instead of their share, so that a longer name does not score lower. If all
            # words are the same, the score is higher.
            size = len(family.words()) + len(other.words())
            common = _common(family.words(), other.words()) * size / 2
            value = common + _SAME_RULE * (family.rule(other) in rules) + (share == 1.0)
            scores[family][other] = back[other][family] = value
    settled = []
    for family, own in scores.items():
        best = _only_best(own)
        if best is None or _only_best(back[best]) is not family:
            continue
        alone = len(own) == 1 and len(back[best]) == 1
        if alone or shares[family, best] >= _LEAST:
            settled.append((family, best, shares[family, best]))
    return settled


def _only_best(scores: Mapping[_Family, float]) -> _Family | None:
    """Return the family with the highest score; None if several families have this score."""
    most = max(scores.values())
    best = [family for family, score in scores.items() if score > most - 1e-6]
    return best[0] if len(best) == 1 else None


def _common_beginning(names: Sequence[list[str]]) -> int:
    """Return the number of parts at the beginning that are the same in all names."""
    first, last = min(names, default=[]), max(names, default=[])
    return next(
        (i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(last)),
    )


def _alike(family: _Family, other: _Family, skipped: int) -> float:
    """Return the share of words that the names of two families have in common.

    It is the larger share of two: with all words of the first name, and without its first ``skipped`` parts.
    """
    words = other.words()
    return max(_common(family.words(count), words) for count in (0, skipped))


def _common(left: Sequence[str], right: Sequence[str]) -> float:
    """Return the share of words that two names have in common. A word that is cut short counts less."""
    open_left, open_right = list(left), list(right)
    count = 0.0
    for same, weight in ((operator.eq, 1.0), (_is_short, _SHORT)):
        for word in list(open_left):
            partner = next((other for other in open_right if same(word, other)), None)
            if partner is not None:
                open_left.remove(word)
                open_right.remove(partner)
                count += weight
    return 2 * count / (len(left) + len(right)) if left or right else 1.0


def _is_short(word: str, other: str) -> bool:
    short, long = sorted((word, other), key=len)
    return short.isalpha() and long.startswith(short)


def _problem(family: _Family, choices: Sequence[_Family], skipped: int) -> str:
    shapes = {member.shape for member in family.members.values()}
    shape = " or ".join(str(list(shape)) for shape in sorted(shapes))
    if not choices:
        count = len(family.members)
        where = (
            f"for each of the {count} numbers of {family.pattern}"
            if "*" in family.pattern
            else "and a name without numbers, like this one"
        )
        return f"no operation that is not matched yet has the shape {shape} {where}"
    nearest = sorted(choices, key=lambda other: -_alike(family, other, skipped))
    return f"ambiguous, it may be {some([other.pattern for other in nearest], between=' or ')} ({shape})"
