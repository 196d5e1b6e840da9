"""LoftQ (Li et al. 2023, arXiv:2310.08659): the base is quantised, and the factors start as what that loses.

In turns, ``Q = quantised(W - B A)`` and ``B A`` = the leading singular triples of ``W - Q``. The base
becomes Q, in the weight's own dtype: it has the values of a quantised weight, not the size. The factors are
not divided by the scale (PEFT's are not, either: choose alpha = r).

Four and two bits are normal floats in blocks of 64 (Dettmers et al. 2023, arXiv:2305.14314, appendix E;
for two bits the LoftQ authors'), eight bits whole numbers scaled row by row. They are computed here, on
any device; PEFT hands them to bitsandbytes, which wants an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F

from lora_fx.ir.values import PlannedSite
from lora_fx.passes.parameters.matrices import as_matrices, part_of, replaced, wide

__all__ = ["levels", "loftq", "quantised"]

_BLOCK: Final = 64
_TAIL: Final = (
    0.9677083  # Where the outermost level lies, as a quantile of the normal distribution.
)


def loftq(
    row: PlannedSite, weight: torch.Tensor, bits: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A [n, r, in], B [n, out, r], and the changed weight.

    Args:
        row: The site.
        weight: Its whole weight; what is not the site's stays as it is.
        bits: 2, 4 or 8.
        iterations: How often both steps are done.
    """
    site = row.site
    exact = wide(part_of(site, weight.detach())).clone()
    matrices = as_matrices(site, exact)
    kept = exact
    for _ in range(iterations):
        values = quantised(kept, bits)
        u, s, vh = torch.linalg.svd(matrices - as_matrices(site, values), full_matrices=False)
        root = s[:, : row.rank].sqrt()
        a, b = root[:, :, None] * vh[:, : row.rank], u[:, :, : row.rank] * root[:, None, :]
        product = b @ a if site.layout == "out_in" else (b @ a).mT
        kept = exact - product.reshape(exact.shape)
    return a, b, replaced(site, weight, values)


def quantised(values: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of a weight, as it is stored, after it was quantised; same shape and dtype."""
    quantise: Callable[[torch.Tensor], torch.Tensor] = (
        _whole_numbers if bits == 8 else lambda one: _normal_floats(one, bits)
    )
    return quantise(values.contiguous())


def _normal_floats(values: torch.Tensor, bits: int) -> torch.Tensor:
    flat = values.flatten()
    blocks = F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    table = levels(bits).to(values)
    middles = (table[1:] + table[:-1]) / 2
    index = torch.bucketize(blocks / largest.clamp_min(torch.finfo(values.dtype).tiny), middles)
    return (table[index] * largest).flatten()[: len(flat)].view(values.shape)


def _whole_numbers(values: torch.Tensor) -> torch.Tensor:
    # bitsandbytes reads the weight in half precision: with it, so that both have the same rows.
    halves = values.to(torch.float16).to(values.dtype)
    largest = halves.abs().amax(-1, keepdim=True)
    steps = torch.round(halves * (127 / largest.clamp_min(torch.finfo(values.dtype).tiny)))
    return steps * (largest / 127)


def levels(bits: int) -> torch.Tensor:
    """The 2ᵇ levels of a normal float between -1 and 1, in order: quantiles of a normal distribution.

    There is one more above zero than below, and zero itself is a level.
    """
    half = 2 ** (bits - 1)
    above = torch.linspace(_TAIL, 0.5, half + 1, dtype=torch.float64)[:-1]
    below = torch.linspace(_TAIL, 0.5, half, dtype=torch.float64)[:-1]
    zero = torch.zeros(1, dtype=torch.float64)
    found = torch.cat([torch.special.ndtri(above), zero, -torch.special.ndtri(below)])
    return found.sort().values / found.max()
