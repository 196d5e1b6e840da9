"""A site's weight as matrices [n, out, in], and factors of such matrices as the site's A and B.

A linear weight is one matrix, a weight of experts one for each expert. A convolution with g groups is g
matrices [out/g, in/g · kernel], of which each gets r/g of the rank: what its A and B compute is their
product (see :mod:`lora_fx.passes.patterns.conv`).
"""

from __future__ import annotations

import math

import torch

from lora_fx.ir import Factors, PlannedSite, Site
from lora_fx.passes.patterns import pattern_of

__all__ = ["as_factors", "as_matrices", "matrix_shape", "part_of", "replaced", "subtracted", "wide"]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype in which starts are computed: fp32, or fp64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def matrix_shape(site: Site) -> tuple[int, int, int]:
    """How many matrices a weight is, and their shape: (n, out, in)."""
    if site.family == "conv":
        kernel = math.prod(site.weight_shape[2:])
        groups = site.groups
        return groups, site.out_features // groups, site.in_features // groups * kernel
    return site.experts or 1, site.out_features, site.in_features


def part_of(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """What of a weight is the site's, as it is applied: a view where the weight can be viewed so."""
    return _rows_of(site, site.applied(weight))


def _rows_of(site: Site, applied: torch.Tensor) -> torch.Tensor:
    if site.rows is None:
        return applied
    return applied.narrow(site.axis, site.rows[0], site.rows[1] - site.rows[0])


def as_matrices(site: Site, part: torch.Tensor) -> torch.Tensor:
    """Brings :func:`part_of` a weight into the form [n, out, in]."""
    count, out, inner = matrix_shape(site)
    if site.family != "conv":
        return (part if site.layout == "out_in" else part.mT).reshape(count, out, inner)
    if site.layout == "out_in":
        return part.reshape(count, out, inner)
    # A transposed convolution stores [in, out/g, *k].
    apart = part.reshape(count, site.in_features // count, out, -1)
    return apart.transpose(1, 2).reshape(count, out, inner)


def as_factors(
    shapes: Factors, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The site's A and B of [n, r/g, in] and [n, out, r/g]."""
    return a.reshape(shapes.a).contiguous(), b.reshape(shapes.b).contiguous()


def subtracted(
    row: PlannedSite, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """``W - s · B A`` as a new tensor, rounded once; rows that are not the site's are as they were."""
    part = wide(part_of(row.site, weight.detach()))
    delta = pattern_of(row.site).delta(row.site, wide(a), wide(b))
    return replaced(row.site, weight, part - delta * row.scale)


def replaced(site: Site, weight: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A weight as a new tensor, with other values of what :func:`part_of` gives."""
    changed = site.applied(weight.detach()).clone(memory_format=torch.contiguous_format)
    _rows_of(site, changed).copy_(part)
    return site.stored(changed).contiguous()
