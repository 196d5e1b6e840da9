"""``torch.einsum`` of an activation with a matrix: ``bsi,oi->bso`` and whatever else people write.

With the matrix over the letters i (summed, in x and not in the output) and o (kept, in the output and not in
x) it is a linear operation along i, wherever i and o stand: ``y = Σᵢ x[… i …] W[o, i]``. The branch is two
einsums with a letter r of its own: ``Σᵢ x[… i …] A[r, i]``, which has r where the output has o, and then
``Σᵣ … B[o, r]``.
"""

from __future__ import annotations

import dataclasses
import string
from typing import Any

import torch
from torch import fx

from lora_fx.passes._fx import target_of
from lora_fx.passes._weights import constant_of, weight_of
from lora_fx.passes.patterns.linear import LinearPattern
from lora_fx.passes.patterns.sites import make_site, reject
from lora_fx.types import BranchBuilder, Match, Region, Role, Site

__all__ = ["EinsumPattern"]

_EINSUM = (torch.einsum, torch.functional.einsum, torch.ops.aten.einsum.default)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """An einsum of two operands, one of them a parameter.

    Attributes:
        x: The activation.
        weight: The ``get_attr`` node of the parameter.
        terms: The letters of the activation, of the matrix and of the output.
    """

    x: fx.Node
    weight: fx.Node
    terms: tuple[str, str, str]

    @property
    def letters(self) -> tuple[str, str] | None:
        """The kept and the summed letter of the matrix; None if it is no linear operation."""
        x, weight, out = self.terms
        if len(weight) != 2 or weight[0] == weight[1]:
            return None
        for kept, summed in ((weight[0], weight[1]), (weight[1], weight[0])):
            in_place = kept in out and kept not in x and summed in x and summed not in out
            if in_place and x.count(summed) == out.count(kept) == 1:
                return kept, summed
        return None


class EinsumPattern(LinearPattern):
    """An einsum with one parameter operand of two dimensions; the algebra is that of a product."""

    name = "einsum"

    def match(self, node: fx.Node, region: Region) -> Match:
        """See :class:`lora_fx.types.Pattern`."""
        seen = _see(node, region)
        if seen is None:
            return None
        parameter = region.parameter(seen.weight)
        assert parameter is not None
        if parameter.dim() != 2 or seen.letters is None:
            return reject(
                region,
                node,
                seen.weight,
                f"einsum {'{},{}->{}'.format(*seen.terms)!r} does not take its weight for a matrix from "
                "one summed to one kept dimension",
            )
        kept, _ = seen.letters
        out_in = seen.terms[1][0] == kept
        sizes = (parameter.shape[1], parameter.shape[0]) if out_in else tuple(parameter.shape)
        return make_site(
            region,
            pattern=self.name,
            family="linear",
            weight=seen.weight,
            bias=None,
            x=seen.x,
            output=node,
            sizes=(sizes[0], sizes[1]),
            layout="out_in" if out_in else "in_out",
        )

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Two einsums, through a letter that the equation does not use."""
        seen = _see(node, region)
        assert seen is not None
        assert seen.letters is not None
        kept, summed = seen.letters
        x, _, out = seen.terms
        rank = next(letter for letter in string.ascii_letters if letter not in "".join(seen.terms))
        between = out.replace(kept, rank)
        dropped = build.dropped(seen.x)
        down = build.call(
            Role.DOWN, torch.einsum, f"{x},{rank}{summed}->{between}", dropped, build.a
        )
        return build.call(Role.UP, torch.einsum, f"{between},{kept}{rank}->{out}", down, build.b)


def _see(node: fx.Node, region: Region) -> _Seen | None:
    if target_of(node) not in _EINSUM or not node.args or not isinstance(node.args[0], str):
        return None
    operands: list[Any] = list(node.args[1:])
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    inputs, arrow, out = node.args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(operands) != 2 or len(terms) != 2:
        return None
    if not arrow:
        out = _implicit(terms)
    for x, weight in ((0, 1), (1, 0)):
        found = weight_of(operands[weight], region)
        activation = operands[x]
        if found is None or found.rows is not None or constant_of(activation, region) is not None:
            continue
        letters = terms[weight][::-1] if found.transposed else terms[weight]
        return _Seen(activation, found.source, (terms[x], letters, out))
    return None


def _implicit(terms: list[str]) -> str:
    """The output that einsum means without an arrow: letters that occur once, in their order."""
    text = "".join(terms)
    ellipsis = "..." if "..." in text else ""
    once = {letter for letter in text if letter.isalpha() and text.count(letter) == 1}
    return ellipsis + "".join(sorted(once))
