"""A new adapter of a model from several that it has.

Each site is combined by itself (:mod:`lora_fx.passes.merge.combining`); the new adapter is then added as one that is
loaded would be, and given these values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lora_fx.adapters.manage import adapter_names, delete_adapter, put_adapter
from lora_fx.adapters.settings import by_site, written_config
from lora_fx.adapters.weighted_sources import Part, Source, keeps_tied, parts_of, sources_of
from lora_fx.config.lora_config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir.record import AdapterRecord
from lora_fx.passes.merge.combination import Combination
from lora_fx.passes.merge.combining import Term, combine
from lora_fx.passes.merge.pruning import Election
from lora_fx.passes.parameters.compiled import inside
from lora_fx.passes.parameters.factors import factors_of
from lora_fx.passes.parameters.own import own_value
from lora_fx.runtime.ops import check_adapter_name

__all__ = ["add_weighted_adapter"]


@inside
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Election = "total",
) -> nn.Module:
    """Combines adapters into a new one, which is not active until :func:`lora_fx.set_adapter` makes it so.

    It covers every site that one of them has. A site that only some have is combined from those; a module
    that one of them trains in full (``modules_to_save``) is taken over as it is. One adapter alone is
    weighted, whatever the type. The new scale is 1, dropout and task type are those of the first adapter.

    Args:
        model: A rewritten model. It is changed.
        adapters: Names of its adapters.
        weights: One for each of them; negative ones take away.
        adapter_name: Name of the new one.
        combination_type: ``cat`` is exact, at the sum of the ranks, and ``svd`` the closest of a rank.
            ``linear`` adds the factors, which is quick and is not the sum. ``ties``, ``dare_linear``,
            ``dare_ties`` and ``magnitude_prune`` drop elements before; with ``_svd`` behind them they work
            on the change of the weight and not on the factors.
        svd_rank: For types with ``svd``: the rank, by default the largest of the adapters'.
        svd_clamp: For the same: the quantile at which elements of the new factors are clamped.
        svd_full_matrices: For the same: as ``torch.linalg.svd`` has it.
        svd_driver: For the same: as ``torch.linalg.svd`` has it; on CUDA only.
        density: For types that drop elements: which share is kept, in (0, 1].
        majority_sign_method: For types with ``ties``: ``total`` or ``frequency``.

    Returns:
        The model itself.

    Raises:
        ConfigError: If a name is unknown or taken, an argument cannot mean anything, several of the adapters
            train the same module in full, one cannot be combined (DoRA, biases, trained tokens, an
            initialisation that changed the base), or sites do not go together. The model is as it was then.
    """
    how = Combination(
        combination_type,
        svd_rank,
        svd_clamp,
        svd_full_matrices,
        svd_driver,
        density,
        majority_sign_method,
    )
    sources = sources_of(model, adapters, weights)
    check_adapter_name(adapter_name)
    if adapter_name in adapter_names(model):
        raise ConfigError(f"adapter_name: there is an adapter {adapter_name!r} already")
    how = how.among(len(sources))
    tied = keeps_tied(sources)
    values = {
        name: _combined(model, name, rows, how, max(_ranks(sources)))
        for name, rows in parts_of(sources, tied).items()
    }
    new = put_adapter(model, _config(model, sources, values, tied), adapter_name)
    try:
        _fill(model, adapter_name, new, values, sources)
    except BaseException:
        delete_adapter(model, adapter_name)
        raise
    return model


def _ranks(sources: Sequence[Source]) -> list[int]:
    return [row.rank for source in sources for row in source.record.sites] or [1]


def _combined(
    model: nn.Module, name: str, parts: Sequence[Part], how: Combination, largest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    site = parts[0][1].site
    terms = []
    for source, row in parts:
        a, b = (factor.detach() for factor in factors_of(model, row, source.name).pair)
        if a.is_meta:
            raise ConfigError(
                f"{name}: {source.name!r} is on the meta device; load its values first"
            )
        if row.tied:
            a, b = a.T, b.T
        terms.append(Term(a, b, row.scale, source.weight))
    # By default the rank is that of the adapter, and not of what it has here; as in PEFT.
    if how.by_product and how.svd_rank is None and largest % site.groups == 0:
        how = dataclasses.replace(how, svd_rank=largest)
    return combine(
        terms,
        how,
        groups=site.groups,
        experts=site.experts is not None,
        layout=site.layout,
        where=name,
    )


def _config(
    model: nn.Module,
    sources: Sequence[Source],
    values: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    tied: bool,
) -> LoraConfig:
    """The first adapter's configuration with the sites, ranks and modules of the new one."""
    first = sources[0].record.config
    rows = {row.name: row for source in sources for row in source.record.sites}
    new = []
    for name, (a, _) in values.items():
        rank = a.shape[0 if rows[name].site.experts is None else 1]
        new.append(dataclasses.replace(rows[name], rank=rank, alpha=float(rank), scale=1.0))
    named = {entry for one in sources for entry in one.record.config.target_parameters or ()}
    saved = dict.fromkeys(name for source in sources for name in source.record.saved_modules)
    config = dataclasses.replace(
        first,
        use_rslora=False,
        ensure_weight_tying=tied,
        target_parameters=tuple(named) or None,
    )
    record = AdapterRecord(config, tuple(new), tuple(saved))
    return dataclasses.replace(
        written_config(model, record, by_site(new)), inference_mode=first.inference_mode
    )


def _fill(
    model: nn.Module,
    adapter: str,
    record: AdapterRecord,
    values: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    sources: Sequence[Source],
) -> None:
    """Gives the new adapter its values."""
    rows = {row.name: row for row in record.sites if not row.tied}
    if rows.keys() != values.keys():
        lost = min(rows.keys() ^ values.keys())
        raise ConfigError(
            f"{lost}: what the adapters have there cannot be added to the model again"
        )
    with torch.no_grad():
        for name, row in rows.items():
            for factor, value in zip(
                factors_of(model, row, adapter).pair, values[name], strict=True
            ):
                factor.copy_(value)
        for source in sources:
            for own in source.record.own:
                own_value(model, adapter, own).copy_(own_value(model, source.name, own))
