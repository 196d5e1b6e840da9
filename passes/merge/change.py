"""The changes of weights and biases that a merge adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from lora_fx.errors import MergeError
from lora_fx.ir import PlannedSite
from lora_fx.kinds import kind_of
from lora_fx.passes.merge.rounding import Term, rounded, slices_of, sum_exactly, two_products
from lora_fx.passes.parameters import factors_of, gathered
from lora_fx.passes.patterns import EmbeddingPattern, LinearPattern, pattern_of

__all__ = [
    "add_change",
    "delta_weight",
    "exact_terms",
    "merged_biases",
    "sliced_factors",
    "sums_over_rank",
    "wide_factors",
]

# Patterns may replace what ΔW is: these are the plain products.
_PRODUCTS = (LinearPattern.delta, EmbeddingPattern.delta)
_OURS = "lora_fx.passes.patterns."


def delta_weight(
    model: nn.Module, row: PlannedSite, adapter: str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``s · B A`` of one site, in the weight's layout and in ``dtype``: all of ΔW of an additive kind.

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
    a, b = _pair(model, row, adapter, device, dtype)
    return a, b * row.scale


def _pair(
    model: nn.Module,
    row: PlannedSite,
    adapter: str,
    device: torch.device | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as the site's own: those of a head that is tied to an embedding are transposed."""
    pair = factors_of(model, row, adapter).pair
    a, b = (gathered(factor).to(device, dtype) for factor in pair)
    return (a.T, b.T) if row.tied else (a, b)


def sums_over_rank(row: PlannedSite) -> bool:
    """Whether each element of ΔW is a sum over the rank: a registered pattern may say anything."""
    return type(pattern_of(row.site)).delta.__module__.startswith(_OURS)


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
        None if numbers are too large for that, or ΔW is what a registered pattern says.
    """
    if not sums_over_rank(row):
        return None
    a, b = _pair(model, row, adapter, device, torch.float64)
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
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    values: Mapping[str, torch.Tensor],
    base: torch.Tensor,
    slices: _Slices | None = None,
) -> None:
    """Adds ``ΔW``: ``s·BA``, or what the kind makes of ``W + s·BA``, less W.

    Args:
        total: A part of the weight, in the dtype in which it is computed.
        row: The site.
        pair: A and ``s · B`` for that part; None without factors.
        values: The slots of the kind for that part.
        base: What the unadapted weight has there, for a kind that makes another of it.
        slices: Of A and ``s · B`` for that part, where ``W + s·BA`` is to be rounded once.
    """
    pattern, site, kind = pattern_of(row.site), row.site, kind_of(row)
    if not kind.transforms:
        assert pair is not None
        a, b = pair
        if type(pattern).delta in _PRODUCTS:
            # In place: the memory of a product that is new each time takes longer than the product.
            transposed = type(pattern).delta is EmbeddingPattern.delta or site.layout != "out_in"
            (total.mT if transposed else total).addmm_(b, a)
            return
        total.add_(pattern.delta(site, a, b).reshape(total.shape))
        return
    turned = base.clone()
    if pair is not None and slices is None:
        turned += pattern.delta(site, *pair).reshape(total.shape)
    elif slices is not None:
        shape = turned.shape
        sum_exactly(turned, lambda: (Term(values) for values in exact_terms(row, slices, shape)))
    turned = kind.transformed(turned, site, values)
    # Written over the weight itself, it loses nothing to a difference.
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
        rows: Sites and adapters; those whose kind changes no bias are passed over.
        trained: What adapters train in full, by FQN: these values count there, not those of ``result``.
        dtype: Of the biases; their own by default.

    Raises:
        MergeError: If a site has no bias that could take it.
    """
    terms: dict[str, list[Term]] = {}
    for row, adapter in rows:
        site, kind = row.site, kind_of(row)
        slots = factors_of(model, row, adapter).slots
        if not slots:
            continue
        source, start, stop = _own_bias(result, row, trained)
        device = next(iter(slots.values())).device if source is None else source.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        part = source[start:stop].to(wide) if source is not None and source.dim() == 1 else None
        values = {name: gathered(one).flatten().to(device, wide) for name, one in slots.items()}
        made = kind.bias_terms(part, values, row.scale)
        if not made:
            continue
        if site.bias is None:
            what = next((one for one in kind.slots(site) if one.scaled), kind.slots(site)[0]).what
            raise MergeError(
                f"{row.name}: adapter {adapter!r} has {what} ({kind.field or kind.name}), and the operation "
                "has none that could take it. Give it one (zeros) before the rewrite, or keep the adapter "
                "unmerged"
            )
        assert source is not None
        if part is None or len(part) < stop - start:
            raise MergeError(
                f"{row.name}: its bias {site.bias} is {list(source.shape)}, and that of B is "
                f"[{site.out_features}]: what they are together is no bias of that shape"
            )
        terms.setdefault(site.bias, [Term(source.to(wide, copy=True))]).extend(
            Term(term, start=start)
            for vector, factor in made
            for term in two_products(vector, factor)
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


def _own_bias(
    result: nn.Module, row: PlannedSite, trained: Mapping[str, nn.Parameter]
) -> tuple[torch.Tensor | None, int, int]:
    """The bias of the operation, if it has one that is a parameter, and where the site's is in it."""
    site = row.site
    start, stop = site.rows or (0, site.out_features)
    if site.bias is None:
        return None, start, stop
    found = trained[site.bias] if site.bias in trained else result.get_parameter(site.bias)
    return gathered(found), start, stop
