"""Starts that are drawn: they depend on the site's shape and on nothing else.

Hu et al. 2021 (arXiv:2106.09685): one factor random, the other zero. The distributions are PEFT's.
"""

from __future__ import annotations

import math

import torch

from lora_fx.ir.values import Factors, Site
from lora_fx.passes.parameters.matrices import as_factors, matrix_shape

__all__ = ["orthogonal", "plain"]


def plain(
    site: Site, shapes: Factors, start: bool | str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """True: A uniform, B zero. ``"gaussian"``: A normal. False: both random.

    An embedding has a lookup in A, which is the factor that is zero there.
    """
    a, b = shapes.a, shapes.b

    def uniform(shape: tuple[int, ...], fan_in: int) -> torch.Tensor:
        # Kaiming with a = sqrt(5): the bound is 1/sqrt(fan_in).
        bound = 1 / math.sqrt(fan_in)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def normal(shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    if site.family == "embedding":
        second = normal(b, 1.0)
        return (normal(a, 1.0) if start is False else torch.zeros(a)), second
    first = normal(a, 1 / shapes.rank) if start == "gaussian" else uniform(a, shapes.fan_in[0])
    return first, (uniform(b, shapes.fan_in[1]) if start is False else torch.zeros(b))


def orthogonal(
    site: Site, shapes: Factors, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors random and ``B A = 0``: what A maps to is orthogonal to what B reads.

    The rows of an orthogonal matrix [r, r] are dealt out to the two in turn. The scale of a tenth is
    PEFT's, which names https://datta0.github.io/posts/rethink-lora-init as its source. In half precision
    the product is zero up to rounding only.
    """
    count, out, inner = matrix_shape(site)
    rank = shapes.rank // site.groups

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(generator=generator)

    basis = torch.linalg.qr(normal(count, rank, rank)).Q
    a = (normal(count, inner, rank // 2) @ basis[:, 0::2]).mT / 10
    b = normal(count, rank // 2, out).mT @ basis[:, 1::2] / 10
    return as_factors(shapes, a, b)
