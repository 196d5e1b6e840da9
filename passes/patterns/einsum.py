"""Pattern of ``torch.einsum`` of an activation with a parameter, such as ``bsi,oi->bso``.

The letters of the parameter are of three kinds: summed (in x and not in the output), kept (in the output
and not in x) and shared (in both). With summed and kept letters, the einsum is a linear operation from the
summed to the kept dimensions, ``y = Σᵢ x[… i …] W[o, i]``. Shared letters are dimensions of experts, and each
expert has a matrix. The branch is two einsums with a new letter r. The first is ``Σᵢ x[… i …] A[r, i]``, with
r at the position of o in the output. The second is ``Σᵣ … B[o, r]``. Several kept letters become one
dimension of B, in their order in the weight. Several summed letters become one dimension of A.
"""

from __future__ import annotations

import dataclasses
import math
import string
from typing import Any

import torch
from torch import fx

from lora_fx.ir import BranchBuilder, Factors, Match, Region, Role, Site
from lora_fx.passes.graph import target_of, unknown_arguments
from lora_fx.passes.patterns.experts import ExpertsPattern
from lora_fx.passes.patterns.linear import LinearPattern
from lora_fx.passes.patterns.sites import make_site, not_floating, reject, unknown, with_call
from lora_fx.passes.patterns.weights import WeightView, constant_of, weight_of

__all__ = ["EinsumPattern", "rows_of_einsum"]

_EINSUM = (torch.einsum, torch.functional.einsum, torch.ops.aten.einsum.default)
_NAMES = "equation operands second"  # aten takes the operands in a list
_MATRIX, _EXPERTS = LinearPattern(), ExpertsPattern()


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Einsum of two operands, one of them a parameter.

    Attributes:
        x: The activation.
        view: The view of the parameter.
        terms: The letters of the activation, of the parameter and of the output.
    """

    x: fx.Node
    view: WeightView
    terms: tuple[str, str, str]

    @property
    def letters(self) -> tuple[str, str, str] | None:
        """Return the parameter's shared, kept and summed letters, or None if the einsum is no product."""
        x, weight, out = self.terms
        shared = "".join(letter for letter in weight if letter in x and letter in out)
        kept = "".join(letter for letter in weight if letter not in x and letter in out)
        summed = "".join(letter for letter in weight if letter in x and letter not in out)
        once = all(x.count(i) == 1 for i in summed) and all(out.count(o) == 1 for o in kept)
        known = len(set(weight)) == len(weight) == len(shared + kept + summed)
        return (shared, kept, summed) if once and known and kept and summed else None


class EinsumPattern:
    """Pattern of an einsum of an activation and a parameter, with the factors of a matrix or of experts."""

    name = "einsum"

    def match(self, node: fx.Node, region: Region) -> Match:
        """Match a node; see :class:`lora_fx.ir.site.Pattern`."""
        seen = _see(node, region)
        if not isinstance(seen, _Seen):
            return seen
        parameter = region.parameter(seen.view.source)
        assert parameter is not None
        if refused := not_floating(region, node, seen.view.source):
            return refused
        if seen.letters is None or len(seen.view.shape) != len(seen.terms[1]):
            return reject(
                region,
                node,
                seen.view.source,
                f"einsum {'{},{}->{}'.format(*seen.terms)!r} does not take its weight for a matrix from "
                "summed to kept dimensions",
            )
        shared, kept, summed = seen.letters
        sizes = _sizes(seen)
        # `_see` has put the letters into the order of storage, also for a transposed parameter.
        stored = seen.terms[1]
        out_in = stored != shared + summed + kept
        # Permute dimensions of the weight first if letters of the same kind are not adjacent.
        order = tuple(map(stored.index, shared + kept + summed)) if out_in else None
        if order == tuple(range(len(stored))):
            order = None
        if order is not None and seen.view.viewed:
            reason = (
                f"einsum {stored!r} permutes a view of its weight: store the weight in that shape"
            )
            return reject(region, node, seen.view.source, reason)
        count, *matrix = (math.prod(sizes[i] for i in group) for group in (shared, kept, summed))
        shape = (*((count,) if shared else ()), *(matrix if out_in else matrix[::-1]))
        viewed = seen.view.viewed or order is not None or shape != tuple(parameter.shape)
        view = dataclasses.replace(seen.view, shape=shape, viewed=viewed, order=order)
        site = make_site(
            region,
            pattern=self.name,
            family="linear",
            weight=view,
            bias=None,
            x=seen.x,
            output=node,
            sizes=(matrix[1], matrix[0]),
            layout="out_in" if out_in else "in_out",
        )
        out_sizes = tuple(sizes[letter] for letter in kept)
        site = with_call(site, axes=_axes(kept, seen.terms[2]), sizes=out_sizes)
        return dataclasses.replace(site, experts=count if shared else None)

    def factors(self, site: Site, rank: int) -> Factors:
        """Return the shapes of A [r, in] and B [out, r], or [E, r, in] and [E, out, r]."""
        return _algebra(site).factors(site, rank)

    def delta(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``B A``, transposed for a weight that is stored [in, out]."""
        return _algebra(site).delta(site, a, b)

    def flops(self, site: Site, rank: int) -> int:
        """Return ``2 r (in + out)``."""
        return _algebra(site).flops(site, rank)

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Write two einsums, through a letter that the equation does not use."""
        seen = _see(node, region)
        assert isinstance(seen, _Seen)
        assert seen.letters is not None
        shared, kept, summed = seen.letters
        sizes = _sizes(seen)
        x, _, out = seen.terms
        rank = next(letter for letter in string.ascii_letters if letter not in "".join(seen.terms))
        between = "".join(rank if o == kept[0] else "" if o in kept else o for o in out)
        a = _unflattened(build, build.a, -1, [sizes[letter] for letter in summed])
        a = _unflattened(build, a, 0, [sizes[letter] for letter in shared])
        down = build.call(
            Role.DOWN,
            torch.einsum,
            f"{x},{shared}{rank}{summed}->{between}",
            build.dropped(seen.x),
            a,
        )
        b = _unflattened(build, build.b, -2, [sizes[letter] for letter in kept])
        b = _unflattened(build, b, 0, [sizes[letter] for letter in shared])
        return build.call(Role.UP, torch.einsum, f"{between},{shared}{kept}{rank}->{out}", down, b)


def _algebra(site: Site) -> LinearPattern | ExpertsPattern:
    return _EXPERTS if site.experts else _MATRIX


def _sizes(seen: _Seen) -> dict[str, int]:
    return dict(zip(seen.terms[1], seen.view.shape, strict=False))


def _axes(kept: str, out: str) -> tuple[int, ...]:
    """Return the axes of the kept letters in the output, counted from the end.

    Return () if an ellipsis follows a kept letter.
    """
    behind = out.rpartition("...")[2]
    if not set(kept) <= set(behind):
        return ()
    return tuple(behind.index(letter) - len(behind) for letter in kept)


def _unflattened(build: BranchBuilder, factor: fx.Node, axis: int, sizes: list[int]) -> fx.Node:
    if len(sizes) < 2:
        return factor
    return build.call(Role.FACTOR, torch.unflatten, factor, axis, sizes)


def _see(node: fx.Node, region: Region) -> _Seen | Match:
    if target_of(node) not in _EINSUM or not node.args or not isinstance(node.args[0], str):
        return None
    operands: list[Any] = list(node.args[1:])
    if operands and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    inputs, arrow, out = node.args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(operands) != 2 or len(terms) != 2:
        return None
    if unknown_arguments(node, _NAMES):
        return unknown(region, node, _NAMES)
    if not arrow:
        out = _implicit(terms)
    for x, weight in ((0, 1), (1, 0)):
        view = weight_of(operands[weight], region)
        activation = operands[x]
        if view is None or view.rows is not None or view.indexed:
            continue
        if constant_of(activation, region) is not None:
            continue
        letters = terms[weight]
        if view.transposed and len(letters) > 1:
            letters = letters[:-2] + letters[-1] + letters[-2]
        return _Seen(activation, view, (terms[x], letters, out))
    return None


def rows_of_einsum(node: fx.Node, region: Region) -> tuple[int, int, int] | str | None:
    """Return the axis of an einsum's rows: the first axis of the activation that the weight does not have.

    Returns:
        The axis in the activation, the axis in the output, and the least number of dimensions that the
        activation has. If there is no such axis, the equation. None for any other operation.
    """
    seen = _see(node, region)
    if not isinstance(seen, _Seen):
        return None
    x, weight, out = (_letters(term) for term in seen.terms)
    for axis, letter in enumerate(x):
        if letter in weight or (x.count(letter), out.count(letter)) != (1, 1):
            continue
        out_axis = out.index(letter)
        if _MANY not in x[:axis] and _MANY not in out[:out_axis]:
            return axis, out_axis, len(x)
    return "{},{}->{}".format(*seen.terms)


_MANY = "..."


def _letters(term: str) -> list[str]:
    """Return the letters of a term, with its ellipsis as one item."""
    before, many, behind = term.partition(_MANY)
    return [*before, *([many] if many else []), *behind]


def _implicit(terms: list[str]) -> str:
    """Return the output term of an einsum without an arrow: letters that occur once, sorted."""
    text = "".join(terms)
    ellipsis = "..." if "..." in text else ""
    once = {letter for letter in text if letter.isalpha() and text.count(letter) == 1}
    return ellipsis + "".join(sorted(once))
