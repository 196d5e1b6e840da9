"""Fold adapters into the weights and return a model of the user's own class: ``W' = W + s · B A``.

If the initialization of an adapter has replaced W by W₀, ``W' = W + (W₀ - W) + s · B A``.

Each weight is accumulated in fp64, slice by slice, and rounded once. The result has new parameters for
folded or trained ones. It shares all others and freezes them, because an optimizer would write into the
user's own model. A tied weight is untied first. If the caller passes a model to fold into, its weights are
overwritten, unless something else uses their memory.

A quantized weight is made dense, layer by layer, adapted or not; or it is stored in its format again.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import MergeError
from lora_fx.formats import (
    WHOLE_WEIGHTS,
    formats,
    quantization_of,
)
from lora_fx.ir import (
    Layout,
    PlannedSite,
    Quantization,
    Record,
    join,
    record_of,
    require_record,
)
from lora_fx.kinds import kind_of
from lora_fx.passes.graph import (
    exchange,
    is_region,
    is_unit,
    memory_of,
    original_class,
    shard_again,
    units_of,
)
from lora_fx.passes.merge.compensated import NEAREST, Rounding
from lora_fx.passes.merge.dense import (
    Keep,
    cast_model,
    check_dtype,
    dtype_of_all,
    forget_loader,
    keep_all,
    layouts_of,
    make_dense,
    make_savable,
    quantized_weights,
    stripped,
    values_of,
)
from lora_fx.passes.merge.fold import (
    Fold,
    TokenFold,
    Workspace,
    check_mergeable,
    check_stored,
    is_finite,
    merged_biases,
    tied_tokens,
    token_weights,
)
from lora_fx.passes.merge.forms import (
    become_layers,
    check_deployed,
    deployed_site,
    requantized_site,
    rounded_site,
    rounded_weight,
)
from lora_fx.passes.merge.origins import find_origins, note_origins, values_by_name
from lora_fx.passes.merge.placing import (
    copy_shared,
    freeze_shared,
    place_biases,
    place_merged,
    place_trained,
    set_parameter,
    trained,
    trained_buffers,
    unshared,
    untie_config,
)
from lora_fx.passes.merge.rounding import MergedSite, MergeReport
from lora_fx.passes.parameters import (
    check_intact,
    distributed_as,
    factors_of,
    gathered,
    is_sharded,
    persistent_buffers,
    reshard,
    weight_at,
    whole_shape,
)
from lora_fx.progress import Progress, show_progress
from lora_fx.runtime.modules import called_by_all, check_equal

__all__ = [
    "Changes",
    "MergeReport",
    "Storage",
    "changes_of",
    "chosen",
    "merge",
    "rows_of_report",
    "warn_of_loss",
]

_log = logging.getLogger("lora_fx")

_LOSS = 0.1
"""The share of the adapters' change that a merge may lose without a warning."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """The way in which a merge stores its result.

    Attributes:
        dtype: The dtype of everything in the result; by default each weight's own. If a quantized base
            becomes dense, all parameters have the dtype of :func:`dtype_of_all`.
        cast_to: The dtype to which the caller casts the result. Merged weights have it already, so that they
            are rounded once.
        requantize: True to store merged weights that were quantized in the same format again. By default all
            quantized weights become dense. If adapters were trained for a format, their weights are stored in
            it anyway, and the other quantized weights stay quantized.
        own: True to give the result separate storage for everything, and ``requires_grad`` of the original.
            By default unfolded parameters are shared and frozen.
        keep: Called with each merged weight that is a new tensor, returns a tensor of the same values to use
            instead, see :class:`Keep`. A caller that is short of memory can store it elsewhere.
    """

    dtype: torch.dtype | None = None
    cast_to: torch.dtype | None = None
    requantize: bool = False
    own: bool = False
    keep: Keep = keep_all


_AS_BEFORE: Final = Storage()


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The weights of one merge: their values before the merge, and the way in which each is stored.

    Nothing is written yet.

    Attributes:
        model: The rewritten model.
        result: The model whose weights the changes are added to.
        folds: The changes of each weight, by FQN.
        full: The parameters that are trained in full, by FQN.
        targets: The sites that were trained for a storage, each with its adapter, by weight.
        over: The weights of the result to overwrite.
        lasting: Tensors that stay as they are, by FQN. A weight that is merged from such a tensor can be
            merged again.
        layouts: The layouts that quantized weights had before they were quantized, by FQN.
        stored: The quantized weights of the result, by FQN.
        requantize: True to store quantized weights in their formats again.
        dense: The dtype of all parameters of a result that becomes dense, or that the user asked for; None
            for the dtype of each.
        storage: The way in which the user wants the result to be stored.
    """

    model: nn.Module
    result: nn.Module
    folds: Mapping[str, Fold | TokenFold]
    full: Mapping[str, nn.Parameter]
    targets: Mapping[str, tuple[PlannedSite, str]]
    over: frozenset[str]
    lasting: Mapping[str, torch.Tensor]
    layouts: Mapping[str, Layout]
    stored: Mapping[str, Quantization]
    requantize: bool
    dense: torch.dtype | None
    storage: Storage

    @property
    def common(self) -> torch.dtype | None:
        """The common dtype of all merged weights and biases; None if each has its own."""
        return self.storage.cast_to or self.dense

    def dtype(self, weight: str) -> torch.dtype | None:
        """Return the dtype of a merged weight; None for the dtype that the weight had before."""
        if self.common is not None:
            return self.common
        return self.stored[weight].dtype if weight in self.stored else None

    def before(self, weight: str) -> torch.Tensor:
        """Return a weight before the merge."""
        values = values_of(self.result, weight, self.layouts, self.dtype(weight))
        return _unadapted(values, weight, self.full)

    def as_trained(self, weight: str) -> tuple[torch.Tensor, MergedSite] | None:
        """Return a merged weight in the storage format that it was trained for, and its row in the report.

        Return None if the weight was not trained for a storage.
        """
        if weight not in self.targets:
            return None
        return deployed_site(self.model, *self.targets[weight], self.dtype(weight))


def _fold_all(
    weights: _Weights, *, rounding: Rounding, measure: bool, progress: Progress
) -> tuple[dict[str, torch.Tensor], dict[str, MergedSite]]:
    """Fold the changes into all weights. Everything that can fail runs before a weight is overwritten.

    Args:
        weights: The weights.
        rounding: The way in which weights are rounded.
        measure: True to compare every merged element with fp64.
        progress: Called with (done, total, site name) before each weight.

    Returns:
        The merged weights that are new tensors, and the row of each weight in the report, both by FQN.

    Raises:
        MergeError: If a merged weight overflows; nothing has been written then.
    """
    folds, over = weights.folds, weights.over - weights.full.keys()
    # All processes need the same order to gather parts together; the order of a set may differ.
    for weight, change in folds.items():
        if weight in over:
            change.check(weights.before(weight))
    merged: dict[str, torch.Tensor] = {}
    sites: dict[str, MergedSite] = {}

    def fold(weight: str) -> None:
        if (trained_weight := weights.as_trained(weight)) is not None:
            merged[weight], sites[weight] = trained_weight
            return
        change, base = folds[weight], weights.before(weight)
        # If processes hold parts, each of them gathers only one whole weight at a time.
        old = gathered(base, weight)
        if weights.requantize and weight in weights.stored and isinstance(change, Fold):
            packed = weights.result.get_parameter(weight)
            merged[weight], sites[weight] = requantized_site(change, old, packed, rounding)
            return
        dtype = weights.dtype(weight) or old.dtype
        new, sites[weight] = rounded_site(
            change, old, dtype, rounding, measure=measure, in_place=weight in over
        )
        if weight in over:
            return

        def again() -> torch.Tensor:
            return rounded_weight(change, old, dtype, rounding)

        lasting = weights.lasting.get(weight)
        stays = lasting is not None and memory_of(old) == memory_of(lasting)
        merged[weight] = distributed_as(weights.storage.keep(new, again if stays else None), base)

    # A stable sort: weights that may still fail come first.
    with show_progress(progress, "weight") as tell:
        for done, weight in enumerate(sorted(folds, key=lambda name: name in over)):
            tell(done, len(folds), folds[weight].name)
            fold(weight)
    return merged, sites


def warn_of_loss(report: MergeReport) -> None:
    """Warn if more than a tenth of what the adapters changed is lost."""
    if not report.kept < 1 - _LOSS:
        return
    repaired = any(site.rounding == "compensated" for site in report.sites)
    _log.warning(
        "merge: rounding leaves %.0f %% of what the adapters changed (%.0f %% of the entries moved). "
        "merge(dtype=torch.float32) keeps all of it, and so does an adapter that is served without a merge "
        "(lora_fx.save_adapter). %srewrite(..., deploy=...) trains with the stored values. "
        "return_report=True tells what each weight has lost",
        100 * report.kept,
        100 * report.moved,
        ""
        if repaired
        else "merge(rounding='compensated', inputs=batches) keeps more of the outputs. ",
    )


def _check_stored(model: nn.Module, weights: Collection[str], *, requantize: bool) -> None:
    """Raise if one of the weights to merge cannot be folded into.

    Such a weight is computed before each call, or is on the meta device until a hook loads it. Raise also if
    FSDP2 has sharded the bytes of a packed weight. With ``requantize``, raise for any sharded quantized
    weight, because no format can join the parts.
    """
    for fqn, module in model.named_modules():
        if any(known.layers.scales_hook(module) is not None for known in formats()):
            raise MergeError(
                f"{join(fqn, 'weight')} is packed, and FSDP2 has sharded its bytes: save the adapter on "
                "every rank (lora_fx.save_adapter), load it onto a model that is not sharded, and merge it; "
                f"or {WHOLE_WEIGHTS}"
            )
    for name, parameter in model.named_parameters() if requantize else ():
        if (
            is_sharded(parameter)
            and quantization_of(torch_private.local_tensor(parameter)) is not None
        ):
            raise MergeError(
                f"{name} is quantized, and cut into parts that several processes hold: so it is not "
                "quantized again. Leave out requantize=True, or save the adapter on every rank "
                "(lora_fx.save_adapter), load it onto a model that is not sharded, and merge that"
            )
    for name in weights:
        check_stored(model, name)
        if weight_at(model, name).is_meta:
            raise MergeError(
                f"{name} is on the meta device, so that there are no values to merge: if accelerate has "
                "offloaded the model, take its hooks off first (accelerate.hooks.remove_hook_from_submodules)"
            )


def merge(
    model: nn.Module,
    *,
    adapter_names: Sequence[str] | str | None = None,
    into: nn.Module | None = None,
    storage: Storage = _AS_BEFORE,
    rounding: Rounding = NEAREST,
    measure: bool = False,
    progress: Progress = False,
) -> tuple[nn.Module, MergeReport]:
    """Fold adapters into the weights.

    Args:
        model: A rewritten model; it is not changed.
        adapter_names: The adapters; by default the active ones.
        into: Fold into this model instead of a copy of the base: a model of the original class. Its weights
            are overwritten slice by slice. A weight that shares its memory, as those of the model before the
            rewrite do, gets a new parameter. Over a quantized base it is a dense model, and the change is
            added to its weights.
        storage: The way in which the result is stored.
        rounding: The way in which weights are rounded.
        measure: True to compare every merged element with fp64. Otherwise the share of the change
            that is kept comes from a sample of each weight.
        progress: Called before each weight, as in :func:`lora_fx.merge`.

    Returns:
        The merged model, and the report.

    Raises:
        CaptureError: If a layer that has an adapter was deleted or replaced.
        MergeError: If the model has no adapters, an adapter does not exist, ``into`` does not fit, or
            arguments exclude each other. Also if a format cannot hold a merged weight, or a factor or a
            result is not finite, or ``into`` has an earlier merge that cannot be taken back. ``into`` is then
            unchanged, or has the weights from before the earlier merge. An interruption, or an error that
            ``progress`` raises, may leave some of its weights merged.
    """
    record, names = _check_arguments(model, adapter_names, into, storage)
    units = units_of(model)
    folds, tied = _folds(model, record, names)
    targets = _targets(folds)
    trained_for = [row for row, _ in targets.values()]
    check_deployed(trained_for, into, storage.dtype)
    for_format = any(row.deploy and row.deploy.dtype is None for row in trained_for)
    requantize = storage.requantize or for_format
    _check_stored(model, folds, requantize=requantize)
    base = stripped(model, record)
    result = base if into is None else into
    full = dict(trained(model, record, names))
    buffers = trained_buffers(model, record, names)
    whole = {*full, *buffers}
    written = {*folds, *whole, *(row.site.bias for row, _ in _rows_of(folds) if row.site.bias)}
    origins, before = _take_back(result, base, written, whole)
    weights = _Weights(
        model,
        result,
        folds,
        full,
        targets,
        over=frozenset() if into is None else _written_over(into, full),
        lasting=dict(before) if into is None else {},
        layouts=layouts_of(record.base.matches.sites),
        stored=_quantized_before(result, requantize=storage.requantize and not for_format),
        requantize=requantize,
        dense=storage.dtype or (None if requantize else dtype_of_all(result)),
        storage=storage,
    )
    biases = merged_biases(model, result, _rows_of(folds), full, weights.common)
    # Folding is the last step that can fail, and it fails before its first write. So `into` changes
    # completely or not at all.
    merged, sites = _fold_all(weights, rounding=rounding, measure=measure, progress=progress)
    place_trained(result, full, buffers, weights.over)
    place_biases(result, biases, weights.over)
    still_tied = _still_tied(tied, folds, full)
    untied = place_merged(result, merged, still_tied, weights.over)
    become_layers(result, trained_for)
    _make_dense_or_cast_rest(weights)
    # Lists, objects and functions of the model may refer to weights, too.
    exchange(result, before)
    shared = freeze_shared(result, model, record) if into is None and not storage.own else ()
    if storage.own:
        result = copy_shared(result, model, record)
        exchange(result, before)
    if not requantize:  # a quantized model cannot be `into` in a later merge
        note_origins(result, origins, written)
    shard_again(result, units)
    left_out = tuple(name for name in record.adapters if name not in names)
    rows = rows_of_report(folds, still_tied, sites)
    report = MergeReport(rows, untied, shared=shared, left_out=left_out)
    warn_of_loss(report)
    return result, report


def _check_arguments(
    model: nn.Module,
    adapter_names: Sequence[str] | str | None,
    into: nn.Module | None,
    storage: Storage,
) -> tuple[Record, tuple[str, ...]]:
    """Check the arguments of a merge. Return the model's record, and the names of the adapters to merge."""
    record = require_record(model, MergeError)
    check_intact(model, record)
    _check_processes(model)
    names = chosen(record, adapter_names)
    _check_storage(into, storage)
    if into is not None:
        _check_fits(model, into, record, names)
    return record, names


def _take_back(
    result: nn.Module, base: nn.Module, written: Collection[str], whole: Collection[str]
) -> tuple[dict[str, str], list[tuple[str, nn.Parameter]]]:
    """Undo an earlier merge into a model, so that the next merge begins with the weights before it.

    Args:
        result: The model.
        base: The base of the adapters, which may be ``result``.
        written: FQNs of the weights that the merge will write.
        whole: FQNs of the weights that the merge will replace as a whole.

    Returns:
        Fingerprints of the weights before the first merge, by name, and the named parameters that the model
        had until now.
    """
    sources = {} if result is base else values_by_name(base)
    restored, origins = find_origins(result, sources, written, whole)
    before = list(result.named_parameters(remove_duplicate=False))
    _restore(result, restored)
    return origins, before


def _make_dense_or_cast_rest(weights: _Weights) -> None:
    """Dequantize and cast the unchanged weights, if the user asked for a dense result or for a dtype."""
    result, keep = weights.result, weights.storage.keep
    untie_config(result)
    if weights.stored:
        make_savable(result)
        if weights.dense is not None:
            make_dense(result, weights.dense, weights.layouts, keep)
    else:
        forget_loader(result)
    if weights.dense is not None:
        cast_model(result, weights.dense, keep, buffers=weights.storage.dtype is not None)


def _restore(into: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Write into a model the values that its weights had before the first merge into it."""
    if not values:
        return
    over, buffers = unshared(into), dict(into.named_buffers(remove_duplicate=False))
    for name, value in values.items():
        if name in buffers:
            buffers[name].copy_(value)
        else:
            set_parameter(into, name, value if name in over else value.clone(), over)


def _check_processes(model: nn.Module) -> None:
    """Raise unless all processes merge the same adapters. Shard weights again that FSDP2 has gathered."""
    reshard(model)
    check_equal(model)
    called_by_all(model.parameters(), "a merge")


def _quantized_before(result: nn.Module, *, requantize: bool) -> Mapping[str, Quantization]:
    """Return the quantized weights of a model before the merge, by FQN.

    Raises:
        MergeError: If merged weights are to be quantized again, but the base is not quantized.
    """
    stored = quantized_weights(result)
    if requantize and not stored:
        raise MergeError(
            "requantize=True stores merged weights in the format that they had, and the base is not "
            "quantized: leave it out, and quantize the merged model (lora_fx.quantize)"
        )
    return stored


def _folds(
    model: nn.Module, record: Record, names: Sequence[str]
) -> tuple[dict[str, Fold | TokenFold], dict[str, str]]:
    """Return the changes of all weights by FQN: the changes of sites, then those of trained tokens.

    Also return the weights that stay tied, each with the weight that it is tied to.
    """
    tokens = token_weights(model, record, names)
    rows, tied = _sites_by_weight(model, record, names)
    workspace = Workspace()
    folds = {weight: Fold(model, record, sites, workspace) for weight, sites in rows.items()}
    kept = {weight: to for weight, to in tied.items() if _stay_tied(rows[weight], rows[to])}
    of_tokens = {weight: TokenFold(model, tuple(lines)) for weight, lines in tokens.items()}
    return {**folds, **of_tokens}, kept | tied_tokens(tokens)


@dataclasses.dataclass(frozen=True)
class Changes:
    """The result of :func:`changes_of`: the changes of all tensors, for a caller that stores them elsewhere.

    The keys of each mapping are FQNs.

    Attributes:
        folds: The changes of weights.
        trained: Parameters that are trained in full, under each of their names. A weight may be in both.
        biases: The merged biases.
        buffers: The persistent buffers that are not on the meta device. They came with an adapter, because
            training has changed them.
        tied: Weights that stay tied, each with the weight that it is tied to.
    """

    folds: Mapping[str, Fold | TokenFold]
    trained: Mapping[str, nn.Parameter]
    biases: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    tied: Mapping[str, str]


def changes_of(model: nn.Module, dtype: torch.dtype | None = None) -> Changes:
    """Return what the active adapters change in a model on the meta device.

    Args:
        model: A rewritten model. Its adapters have values, and so have the biases that adapters change.
        dtype: The dtype of the result; by default each tensor's own.

    Raises:
        MergeError: If adapters exclude each other, have no values, or have values that are not finite.
    """
    check_dtype(dtype)
    record = require_record(model, MergeError)
    names = chosen(record, None)
    folds, tied = _folds(model, record, names)
    full = dict(trained(model, record, names))
    biases = merged_biases(model, model, _rows_of(folds), full, dtype)
    buffers = {
        name: value for name, value in persistent_buffers(model).items() if not value.is_meta
    }
    return Changes(folds, full, biases, buffers, _still_tied(tied, folds, full))


def rows_of_report(
    folds: Mapping[str, Fold | TokenFold],
    tied: Mapping[str, str],
    rows: Mapping[str, MergedSite],
) -> tuple[MergedSite, ...]:
    """Return the rows of a merge report, with a row for each name of a tied weight.

    Weights that are still tied have the same numbers.

    Args:
        folds: The changes of each weight.
        tied: Weights that stay tied, each with the weight that it is tied to, by FQN.
        rows: The rows of the stored weights.
    """
    return tuple(
        dataclasses.replace(
            rows[tied.get(weight, weight)], name=fold.name, adapters=tuple(fold.adapters)
        )
        for weight, fold in folds.items()
    )


def _targets(folds: Mapping[str, Fold | TokenFold]) -> dict[str, tuple[PlannedSite, str]]:
    """Return by weight the site that was trained for a storage format, with the name of its adapter."""
    pairs = {name: fold.rows[0] for name, fold in folds.items() if isinstance(fold, Fold)}
    return {name: pair for name, pair in pairs.items() if pair[0].deploy}


def _rows_of(folds: Mapping[str, Fold | TokenFold]) -> Iterator[tuple[PlannedSite, str]]:
    """Yield the sites of all weights, each with the name of its adapter."""
    return itertools.chain(*(fold.rows for fold in folds.values() if isinstance(fold, Fold)))


def _still_tied(
    kept: Mapping[str, str],
    folds: Mapping[str, Fold | TokenFold],
    full: Mapping[str, nn.Parameter],
) -> dict[str, str]:
    """Return the weights that the merge leaves tied, each with the weight that it is tied to.

    If only one of two tied weights is trained in full, the pair is left out.
    """
    # If only one of two tied weights is trained in full, they are different weights.
    return {weight: to for weight, to in kept.items() if full.get(weight) is full.get(to)}


def chosen(record: Record, adapter_names: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the names of the adapters to merge; by default those of the active adapters.

    Raise if a name is unknown or occurs twice, or if the adapters exclude each other.
    """
    if isinstance(adapter_names, str):
        adapter_names = (adapter_names,)
    names = tuple(record.active if adapter_names is None else adapter_names)
    if adapter_names is None and record.adapters and not names:
        raise MergeError(
            "no adapter is active: lora_fx.set_adapter makes one so, or give adapter_names"
        )
    for name in names:
        if name not in record.adapters:
            raise MergeError(
                f"there is no adapter {name!r}: the model has "
                f"{', '.join(map(repr, record.adapters))}"
            )
    if len(set(names)) != len(names):
        raise MergeError(f"an adapter is named twice: {', '.join(map(repr, names))}")
    weights = {row.site.weight for name in names for row in record.adapters[name].sites}
    owned = (own for name in names for own in record.adapters[name].own)
    counts = Counter(own for own in owned if own not in weights)
    for fqn, count in counts.items():
        if count > 1:
            raise MergeError(
                f"several of the adapters have their own {fqn} (modules_to_save, bias): merge one"
            )
    return names


def _sites_by_weight(
    model: nn.Module, record: Record, names: Sequence[str]
) -> tuple[dict[str, tuple[tuple[PlannedSite, str], ...]], dict[str, str]]:
    """Return the sites of each weight, and the weights of heads that use the factors of an embedding.

    Each site comes with the name of its adapter, and each head with the weight of the embedding.
    """
    rows: dict[str, tuple[tuple[PlannedSite, str], ...]] = {}
    tied: dict[str, str] = {}
    for name in names:
        weights = {row.name: row.site.weight for row in record.adapters[name].sites}
        for row in record.adapters[name].sites:
            if row.tied:
                tied[row.site.weight] = weights[row.tied]
            rows[row.site.weight] = (*rows.get(row.site.weight, ()), (row, name))
            _check_finite(model, row, name)
            check_mergeable(model, row, name)
    return rows, tied


def _written_over(into: nn.Module, trained: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Return the names of the parameters of ``into`` that the merge may overwrite in place.

    A parameter that was trained in full under several names is replaced by a new one instead.
    """
    ends = Counter(map(id, trained.values()))
    return unshared(into) - {name for name, value in trained.items() if ends[id(value)] > 1}


def _check_not_units(into: nn.Module) -> None:
    """Refuse to write into a model that FSDP2 shards, because its parameters belong to FSDP2.

    Raises:
        MergeError: If FSDP2 shards the model.
    """
    if any(map(is_unit, into.modules())):
        raise MergeError(
            "into is sharded by FSDP (fully_shard): leave it out, since the merge of a sharded model gives "
            "one that is sharded in the same way; or merge into a model that is not"
        )


def _check_finite(model: nn.Module, row: PlannedSite, adapter: str) -> None:
    present = [gathered(factor, row.name) for factor in factors_of(model, row, adapter).present]
    if any(factor.is_meta for factor in present):
        raise MergeError(
            f"{row.name}: adapter {adapter!r} is on the meta device and has no values to merge: load them "
            "first, with load_state_dict(..., assign=True)"
        )
    if not all(map(is_finite, present)):
        raise MergeError(
            f"{row.name}: adapter {adapter!r} has factors that are not finite; nothing was merged"
        )


def _check_storage(into: nn.Module | None, storage: Storage) -> None:
    check_dtype(storage.dtype)
    if into is not None and storage.own:
        raise MergeError("into is a model of its own already: leave out own")
    if storage.requantize and (into is not None or storage.dtype is not None):
        other = "dtype" if into is None else "into"
        raise MergeError(f"requantize=True keeps the formats of the base: leave out {other}")
    if into is not None and storage.dtype is not None:
        raise MergeError("into keeps its dtype: leave out dtype, or cast that model before")
    if into is not None and (stored := quantized_weights(into)):
        raise MergeError(
            f"into has quantized weights ({next(iter(stored))}): give a dense model, or leave it out and "
            "merge with requantize=True"
        )


def _unadapted(base: torch.Tensor, name: str, trained: Mapping[str, nn.Parameter]) -> torch.Tensor:
    """Return the weight to add changes to: the base's, or the value that an adapter trained in full."""
    if name not in trained:
        return base
    return gathered(trained[name], name).to(base.device, base.dtype)


def _stay_tied(
    head: Sequence[tuple[PlannedSite, str]], table: Sequence[tuple[PlannedSite, str]]
) -> bool:
    """Return True if a head and an embedding are still tied after a merge, because they share all factors.

    They are not if a kind transforms the weight: a magnitude scales the columns of one and the rows of the
    other.
    """
    if any(kind_of(row).transforms for row, _ in (*head, *table)) or not all(
        row.tied for row, _ in head
    ):
        return False
    return {adapter for _, adapter in head} == {adapter for _, adapter in table}


def _check_fits(model: nn.Module, into: nn.Module, record: Record, names: Sequence[str]) -> None:
    if any(record_of(module) is not None or is_region(module) for module in into.modules()):
        raise MergeError("into is a rewritten model: give the model of the original class")
    if not isinstance(into, original_class(model)):
        raise MergeError(
            f"into is a {type(into).__name__}, the adapters belong to a "
            f"{original_class(model).__name__}"
        )
    shapes = {name: tuple(p.shape) for name, p in into.named_parameters(remove_duplicate=False)}
    wanted = {
        row.site.weight: row.site.weight_shape for n in names for row in record.adapters[n].places
    }
    wanted |= {n: tuple(whole_shape(p)) for n, p in trained(model, record, names)}
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            raise MergeError(f"into has no {name} of shape {shape}; found {shapes.get(name)}")
    _check_not_units(into)
