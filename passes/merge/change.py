"""What an adapter changes a weight and a bias by: what a merge adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from lora_fx.errors import MergeError
from lora_fx.ir import PlannedSite, Site
from lora_fx.passes.merge.rounding import Term, rounded, slices_of, sum_exactly, two_products
from lora_fx.passes.parameters import factors_of
from lora_fx.passes.patterns import EmbeddingPattern, LinearPattern, pattern_of

__all__ = [
    "add_change",
    "delta_weight",
    "exact_terms",
    "merged_biases",
    "sliced_factors",
    "wide_factors",
]

# Patterns may replace what ΔW is: these are the plain products.
_PRODUCTS = (LinearPattern.delta, EmbeddingPattern.delta)
# Those of lora_fx add up as many products as the rank is.
_OURS = "lora_fx.passes.patterns."


def delta_weight(
    model: nn.Module, row: PlannedSite, adapter: str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``s · B A`` of one site, in the weight's layout and in ``dtype``: all of ΔW but for DoRA.

    Args:
        model: The rewritten model.
        row: The site.
        adapter: The adapter's name.
        dtype: In which it is computed.
    """
    a, b = wide_factors(model, row, adapter, dtype)
    return pattern_of(row.site).delta(row.site, a, b)


def wide_factors(
    model: nn.Module,
    row: PlannedSite,
    adapter: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and ``s · B`` in another dtype: B has far fewer elements to scale than the product has.

    Args:
        model: The rewritten model.
        row: The site.
        adapter: The adapter's name.
        dtype: In which they are wanted.
        device: Where; where they are by default.
    """
    factors = factors_of(model, row, adapter)
    a, b = (factor.detach().to(device, dtype) for factor in factors.pair)
    if row.tied:
        a, b = a.T, b.T
    return a, b * row.scale


_Slices = tuple[list[torch.Tensor], list[torch.Tensor]]


def sliced_factors(
    model: nn.Module, row: PlannedSite, adapter: str, device: torch.device
) -> _Slices | None:
    """A and ``s · B`` in fp64, as slices whose products are exact.

    Args:
        model: The rewritten model.
        row: The site.
        adapter: The adapter's name.
        device: Where they are wanted.

    Returns:
        None if numbers are too large for that, or ΔW is what somebody's own pattern says.
    """
    if not type(pattern_of(row.site)).delta.__module__.startswith(_OURS):
        return None
    a, b = (f.detach().to(device, torch.float64) for f in factors_of(model, row, adapter).pair)
    if row.tied:
        a, b = a.T, b.T
    down, up = slices_of(a, row.rank), list[torch.Tensor]()
    for part in two_products(b, row.scale):
        slices = slices_of(part, row.rank)
        if down is None or slices is None:
            return None
        up += slices
    return None if down is None else (down, up)


def exact_terms(row: PlannedSite, slices: _Slices, shape: torch.Size) -> Iterator[torch.Tensor]:
    """``s·BA`` as tensors whose sum it is.

    Args:
        row: The site.
        slices: Of A and ``s · B``, for some part of the weight.
        shape: Of that part.
    """
    pattern = pattern_of(row.site)
    for a in slices[0]:
        for b in slices[1]:
            yield pattern.delta(row.site, a, b).reshape(shape)


def add_change(
    total: torch.Tensor,
    row: PlannedSite,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    slices: _Slices | None = None,
) -> None:
    """Adds ``ΔW``: ``s·BA``, or with DoRA ``g ∘ (W + s·BA) - W``, ``g = m / ‖W + s·BA‖``.

    Args:
        total: A part of the weight, in the dtype in which it is computed.
        row: The site.
        a: A for that part.
        b: ``s · B`` for that part.
        magnitude: m of DoRA for that part.
        base: What the unadapted weight has there, which DoRA needs.
        slices: Of A and ``s · B`` for that part, where ``W + s·BA`` is to be rounded once.
    """
    pattern, site = pattern_of(row.site), row.site
    if magnitude is None and type(pattern).delta in _PRODUCTS:
        # In place: the memory of a product that is new each time takes longer than the product.
        transposed = type(pattern).delta is EmbeddingPattern.delta or site.layout != "out_in"
        (total.mT if transposed else total).addmm_(b, a)
        return
    if magnitude is None:
        total.add_(pattern.delta(site, a, b).reshape(total.shape))
        return
    assert base is not None
    turned = base.clone()
    if slices is None:
        turned += pattern.delta(site, a, b).reshape(total.shape)
    else:
        shape = turned.shape
        sum_exactly(turned, lambda: (Term(values) for values in exact_terms(row, slices, shape)))
    norm = _norm(turned, site)
    # As in the forward: weights that are all zero have no direction, and stay.
    gain = torch.where(norm > 0, magnitude / torch.where(norm > 0, norm, 1), 1)
    turned = turned * _along(gain, turned, site)
    # What is in the place of the weight loses nothing to a difference.
    if total.data_ptr() == base.data_ptr():
        total.copy_(turned)
    else:
        total.add_(turned - base)


def merged_biases(
    model: nn.Module,
    result: nn.Module,
    rows: Iterable[tuple[PlannedSite, str]],
    trained: Mapping[str, nn.Parameter],
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """The biases with ``s`` times those of B in them, by FQN; nothing is changed.

    Args:
        model: The rewritten model.
        result: The model that is merged into.
        rows: Sites and adapters; those without a bias on B are passed over.
        trained: What adapters train in full, by FQN: these values count there, not those of ``result``.
        dtype: Of the biases; their own by default.

    Raises:
        MergeError: If a site has no bias that could take it.
    """
    terms: dict[str, list[Term]] = {}
    for row, adapter in rows:
        extra, site = factors_of(model, row, adapter).bias, row.site
        if extra is None:
            continue
        if site.bias is None:
            raise MergeError(
                f"{row.name}: adapter {adapter!r} has a bias on B (lora_bias), and the operation has none "
                "that could take it. Give it one (zeros) before the rewrite, or keep the adapter unmerged"
            )
        source = trained.get(site.bias, result.get_parameter(site.bias)).detach()
        start, stop = site.rows or (0, site.out_features)
        if source.dim() != 1 or len(source) < stop:
            raise MergeError(
                f"{row.name}: its bias {site.bias} is {list(source.shape)}, and that of B is "
                f"[{site.out_features}]: what they are together is no bias of that shape"
            )
        wide = torch.float32 if source.device.type == "mps" else torch.float64
        terms.setdefault(site.bias, [Term(source.to(wide, copy=True))]).extend(
            Term(values, start=start)
            for values in two_products(extra.detach().to(source.device, wide), row.scale)
        )
    merged = {}
    for name, (first, *rest) in terms.items():
        if first.values.dtype is torch.float64:
            sum_exactly(first.values, lambda rest=rest: iter(rest))  # type: ignore[misc]
        else:
            for term in rest:
                term.within(first.values).add_(term.values)
        merged[name] = rounded(first.values, dtype or result.get_parameter(name).dtype)
    return merged


def _norm(weight: torch.Tensor, site: Site) -> torch.Tensor:
    """By output feature, [out]."""
    norm: torch.Tensor
    if site.layout == "out_in":
        norm = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    else:
        kernels = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
        grouped = torch.unflatten(kernels, 0, (site.groups, -1))
        norm = torch.linalg.vector_norm(grouped, dim=(1, 3)).flatten()
    return norm


def _along(gain: torch.Tensor, weight: torch.Tensor, site: Site) -> torch.Tensor:
    """The gain in the shape in which it meets the weight."""
    rest = [1] * (weight.dim() - 2)
    if site.layout == "out_in":
        return gain.reshape(-1, 1, *rest)
    each = gain.reshape(site.groups, 1, -1, *rest)
    return each.expand(-1, weight.shape[0] // site.groups, *each.shape[2:]).flatten(0, 1)
