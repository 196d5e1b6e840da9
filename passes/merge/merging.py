"""Fold adapters into the weights and return a model of the user's own class: ``W' = W + s · B A``.

If the initialization of an adapter has replaced W by W₀, ``W' = W + (W₀ - W) + s · B A``.

Each weight is accumulated in fp64, slice by slice, and rounded once. The result has new parameters for
folded or trained ones. It shares all others and freezes them, because an optimizer would write into the
user's own model. A tied weight is untied first. If the caller passes a model to fold into, its weights are
overwritten, unless something else uses their memory.

A quantized weight is made dense, layer by layer, adapted or not; or it is stored in its format again.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import MergeError, QuantizationError
from lora_fx.formats import (
    WHOLE_WEIGHTS,
    DtypeGrid,
    dense,
    deployment_options,
    follow_state,
    format_of,
    formats,
    held,
    quantization_of,
    requantized,
)
from lora_fx.ir import PlannedSite, Quantization, Record, join, record_of, require_record
from lora_fx.kinds import kind_of
from lora_fx.passes.graph import (
    exchange,
    is_lazy,
    is_partitioned,
    is_region,
    is_unit,
    memory_of,
    original_class,
    partitioned_twin,
    shard_again,
    storage_of,
    units_of,
)
from lora_fx.passes.merge.compensated import NEAREST, Rounding
from lora_fx.passes.merge.dense import (
    cast_model,
    check_dtype,
    dtype_of_all,
    forget_loader,
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
    check_stored,
    is_finite,
    merged_biases,
    tied_tokens,
    token_weights,
)
from lora_fx.passes.merge.origins import find_origins, note_origins, values_by_name
from lora_fx.passes.merge.rounding import MergedSite, MergeReport
from lora_fx.passes.merge.survival import Slice, Survival, measure_survival
from lora_fx.passes.parameters import (
    changed_buffers,
    check_intact,
    distributed_as,
    factors_of,
    gathered,
    is_sharded,
    own_value,
    parameter_of,
    persistent_buffers,
    reshard,
    trained_by_hand,
    weight_at,
    whole_shape,
)
from lora_fx.progress import Progress, show_progress
from lora_fx.runtime import called_by_all, check_equal, deployed

__all__ = [
    "SAMPLED",
    "Changes",
    "MergeReport",
    "changes_of",
    "chosen",
    "copy_shared",
    "deployed_site",
    "freeze_shared",
    "measured",
    "merge",
    "place_biases",
    "place_merged",
    "place_trained",
    "requantized_site",
    "rounded_weight",
    "rows_of_report",
    "trained",
    "unshared",
    "untie_config",
    "warn_of_loss",
]

_log = logging.getLogger("lora_fx")

SAMPLED = 1 << 16
"""Entries of a weight whose change is measured, unless all are to be measured."""
_LOSS = 0.1
"""The share of the adapters' change that a merge may lose without a warning."""

# --- storing merged weights -----------------------------------------------------------------------
# Store merged and trained parameters in a model of the base class.
#
# A merged weight may be quantized again: the error is measured.


def unshared(model: nn.Module) -> frozenset[str]:
    """Return the FQNs of the parameters that can be overwritten, because nothing else uses their memory.

    Left out are parameters with several names or of another type, and those that share storage with other
    tensors. Such tensors may be in the adapted model that was made from this one, or in a ``state_dict``.
    """
    counts = _places(model)
    single_use = torch_private.storage_users(torch.empty(1))
    return frozenset(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if counts[id(parameter)] == 1
        and type(parameter) is nn.Parameter
        and parameter.layout is torch.strided
        and parameter.is_contiguous()
        and not parameter.is_inference()
        and not (parameter.device.type == "cpu" and parameter.untyped_storage().is_shared())
        and torch_private.storage_users(parameter) == single_use
    )


def _places(model: nn.Module) -> Counter[int]:
    """Count the modules' references to each parameter, by its identity."""
    return Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def place_merged(
    result: nn.Module,
    merged: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
    over: Collection[str] = (),
) -> tuple[str, ...]:
    """Store the merged weights, and return the names of weights that are not tied any more.

    Args:
        result: The model to store them in.
        merged: New tensors, by FQN.
        tied: Weights that are the same parameter as another one, by FQN.
        over: Parameters to overwrite.
    """
    counts = _places(result)
    tied_counts = Counter(id(result.get_parameter(name)) for name in (*tied, *set(tied.values())))
    untied = tuple(
        name
        for name in merged
        if counts[identity := id(result.get_parameter(name))] > max(1, tied_counts[identity])
    )
    for name, weight in merged.items():
        if name not in tied:
            _set_parameter(result, name, weight, over)
    for name, to in tied.items():
        owner, _, key = name.rpartition(".")
        result.get_submodule(owner)._parameters[key] = result.get_parameter(to)
    if untied:
        _log.warning("tied weights were untied by the merge: %s", ", ".join(untied))
    return untied


def place_biases(
    result: nn.Module, biases: Mapping[str, torch.Tensor], over: Collection[str] = ()
) -> None:
    """Store the merged biases. Other biases that shared a parameter with them keep it."""
    for name, bias in biases.items():
        _set_parameter(result, name, distributed_as(bias, result.get_parameter(name)), over)


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor, over: Collection[str]) -> None:
    """Overwrite a parameter, or replace it by a new one if others share it."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = module._parameters[key]
    assert old is not None
    # A scripted module was copied with its memory, and its parameters cannot be replaced.
    if name in over or isinstance(module, torch.jit.ScriptModule):
        old.detach().copy_(value)
        return
    # A value that is quantized, or partitioned, is already a parameter of its library.
    if isinstance(value, nn.Parameter) and is_partitioned(value):
        value.requires_grad_(old.requires_grad)
    elif not isinstance(value, nn.Parameter) or quantization_of(value) is None:
        value = nn.Parameter(value, old.requires_grad)
    module._parameters[key] = value
    _renew_layer(module)


def trained(
    model: nn.Module, record: Record, names: Sequence[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters trained besides the factors, under each of their names: by adapters, and by hand."""
    for name in names:
        adapter = record.adapters[name]
        weights = {row.site.weight for row in adapter.sites}
        for fqn in adapter.own:
            if fqn not in weights:
                yield fqn, own_value(model, name, fqn)
    yield from trained_by_hand(model, record).items()


def place_trained(
    model: nn.Module,
    result: nn.Module,
    record: Record,
    names: Sequence[str],
    over: Collection[str] = (),
) -> None:
    """Copy the parameters that were trained besides the factors: training of the model may continue."""
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in trained(model, record, names):
        if id(parameter) not in copies:
            value, old = parameter.detach(), _parameter(result, name)
            if is_partitioned(parameter):
                value = distributed_as(gathered(parameter, name).to(old.device, old.dtype), old)
            elif name not in over:
                value = value.to(old.device, old.dtype, copy=True)
            _set_parameter(result, name, value, over)
            copies[id(parameter)] = _parameter(result, name)
        owner, _, key = name.rpartition(".")
        module = result.get_submodule(owner)
        if not isinstance(module, torch.jit.ScriptModule):
            module._parameters[key] = copies[id(parameter)]
    buffers = dict(result.named_buffers())
    for name, buffer in changed_buffers(model, record):
        if name in buffers:
            buffers[name].copy_(buffer)


def freeze_shared(result: nn.Module, model: nn.Module, record: Record) -> tuple[str, ...]:
    """Freeze the parameters that a merged model shares with the adapted one, and return their names.

    An optimizer writes in place: it would train the user's own model.

    Args:
        result: The merged model.
        model: The rewritten model.
        record: Its record.
    """
    shared = tuple(_shared(result, model, record))
    for name in shared:
        _parameter(result, name).requires_grad_(False)
    _log.info("merge: %d parameter(s) shared with the rewritten model, and frozen", len(shared))
    return shared


def copy_shared(result: nn.Module, model: nn.Module, record: Record) -> nn.Module:
    """Give a merged model separate storage for all shared parameters; tied weights stay tied.

    Args:
        result: The merged model; it is changed.
        model: The rewritten model.
        record: Its record.

    Returns:
        The merged model, or a copy of it if something is quantized, because its scales are shared, too.
    """
    if any(quantization_of(parameter) is not None for parameter in result.parameters()):
        return copy.deepcopy(result)
    shared = {id(_parameter(result, name)) for name in _shared(result, model, record)}
    copies: dict[tuple[object, ...], nn.Parameter] = {}
    for module in result.modules():
        for key, old in module._parameters.items():
            if old is None or id(old) not in shared:
                continue
            memory = memory_of(old)
            if memory not in copies:
                copies[memory] = _own_copy(old)
            module._parameters[key] = copies[memory]
    return result


def _own_copy(parameter: nn.Parameter) -> nn.Parameter:
    if is_partitioned(parameter):
        twin = partitioned_twin(parameter, own=True)
        twin.requires_grad_(parameter.requires_grad)
        return twin
    clone = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    clone.__dict__.update(parameter.__dict__)
    return clone


def _shared(result: nn.Module, model: nn.Module, record: Record) -> Iterator[str]:
    """Yield the FQNs of a merged model's parameters whose memory the adapted one, or its base, shares."""
    seen = {storage_of(tensor) for tensor in (*model.parameters(), *record.originals.values())}
    for name, parameter in result.named_parameters():
        if storage_of(parameter) in seen or _has_no_storage(parameter):
            yield name


def _has_no_storage(parameter: nn.Parameter) -> bool:
    """Return True for a sparse parameter: its parts may be shared, which cannot be detected."""
    return not is_lazy(parameter) and parameter.layout is not torch.strided


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    parameter = parameter_of(model, name)
    assert parameter is not None
    return parameter


def untie_config(model: nn.Module) -> None:
    """Set in the configuration of a transformers model that its embeddings are not tied any more.

    Otherwise saving and loading would tie them again and lose one of the two.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    ends = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    weights = [getattr(end, "weight", None) for end in ends]
    if None not in ends and weights[0] is not weights[1]:
        config.tie_word_embeddings = False


def requantized_site(
    change: Fold, old: torch.Tensor, weight: nn.Parameter, rounding: Rounding = NEAREST
) -> tuple[nn.Parameter, MergedSite]:
    """Return the merged weight in the old weight's format, with a single matrix in fp64 in between.

    Args:
        change: The changes to fold in.
        old: The values of the weight, in the layout of its site.
        weight: The quantized weight.
        rounding: The way in which it is rounded.

    Returns:
        The new parameter, and its row in the report.

    Raises:
        MergeError: If the format cannot hold the merged weight.
    """
    exact = change.exact(old)
    site = change.rows[0][0].site
    whole = Slice(site.axis, 0, site.applied(old).double(), site.applied(exact))
    values = exact.T if site.turned else exact
    how = "nearest"
    try:
        parameter = requantized(values, weight)
        grid = known.grid(held(parameter)) if (known := format_of(parameter)) else None
        feedback = None if grid is None else rounding.round(exact, grid, change.sites)
        if known is not None and feedback is not None:
            parameter = known.fill(feedback.T if site.turned else feedback, held(parameter))
            how = rounding.name
    except QuantizationError as error:
        raise MergeError(
            f"{change.name}: the merged weight cannot be quantized as it was: {error}. "
            "Merge without requantize=True: the result is dense then"
        ) from error
    after = dense(parameter, torch.float64)
    rounding_loss = _relative(after - values, values)
    merged = after.T if site.turned else after
    survival = measure_survival((whole,), merged, change.sites, rounding.moments)
    survival = dataclasses.replace(survival, max_ulp=math.nan)
    return parameter, _row(change, survival, rounding_loss, how)


def measured(
    change: Fold | TokenFold,
    slices: Iterable[Slice],
    merged: torch.Tensor,
    *,
    exhaustive: bool,
    rounding: Rounding = NEAREST,
    nearest: bool = True,
) -> MergedSite:
    """Return the row of a merged weight in the report.

    Args:
        change: Its changes.
        slices: Parts of the weight before, from ``change.slices``.
        merged: The weight after.
        exhaustive: True if the parts are the whole weight.
        rounding: The way in which weights are rounded.
        nearest: True if this one was rounded to nearest.
    """
    survival = measure_survival(slices, merged, change.sites, rounding.moments)
    if not exhaustive or not nearest:
        survival = dataclasses.replace(survival, max_ulp=math.nan)
    return _row(change, survival, rounding="nearest" if nearest else rounding.name)


def _row(
    change: Fold | TokenFold,
    survival: Survival,
    requantization_error: float = math.nan,
    rounding: str = "nearest",
) -> MergedSite:
    return MergedSite(
        change.name,
        change.adapters,
        survival.max_ulp,
        survival.relative_change,
        requantization_error,
        survival.kept,
        survival.moved,
        survival.output_error,
        survival.change,
        rounding,
    )


@torch.no_grad()
def deployed_site(
    model: nn.Module, row: PlannedSite, adapter: str, dtype: torch.dtype | None
) -> tuple[torch.Tensor, MergedSite]:
    """Return a merged weight as it was trained to be stored, and its row in the report.

    It is computed by the function that the forward calls, from the same tensors.

    Args:
        model: The rewritten model.
        row: The site.
        adapter: The adapter.
        dtype: The dtype of a dense result; by default that of the weight.

    Raises:
        MergeError: If the storage cannot hold the weight.
    """
    assert row.deploy is not None
    weight = weight_at(model, row.site.weight)
    if quantization_of(weight) is None:
        weight = gathered(weight, row.site.weight)
    turned = row.site.layout == "in_out" and not row.site.turned
    matrix = weight.T if turned else weight
    a, b = (gathered(factor) for factor in factors_of(model, row, adapter).pair)
    stored = deployed.deployed_weight(matrix, a, b, row.scale, row.deploy)
    before = dense(matrix, torch.float64)
    exact = deployed.adapted_weight(before, a, b, row.scale)
    values = dense(stored, torch.float64)
    if not torch.isfinite(values).all():
        raise MergeError(
            f"{row.name}: {row.deploy.format} cannot hold the merged weight: not all of its values are finite"
        )
    change, loss = _relative(exact - before, before), _relative(values - exact, exact)
    if row.deploy.dtype is not None:
        stored = stored.to(dtype or weight.dtype)
        stored = (stored.T if turned else stored).contiguous()
    return stored, MergedSite(
        row.name, (adapter,), math.nan, change, loss, deployed=row.deploy.format
    )


def _become_layers(result: nn.Module, targets: Iterable[PlannedSite]) -> None:
    """Turn layers whose weight was dense in the base, and is stored in a format now, into those of a library.

    Args:
        result: The merged model.
        targets: The sites that were trained for a storage.
    """
    rows = [row for row in targets if row.deploy and not (row.deploy.dtype or row.deploy.as_base)]
    if not rows:
        return
    before = quantized_weights(result).keys() - {row.site.weight for row in rows}
    for row in rows:
        assert row.deploy is not None
        owner, options = result.get_submodule(row.site.owner), deployment_options(row.deploy)
        options.made_by.layers.become(owner, options)
        follow_state(owner, row.site.parameter, layer=True)
    stored = quantization_of(result.get_parameter(rows[0].site.weight))
    assert stored is not None
    if not before:
        sites = [row.site for row in rows]
        options.made_by.layers.describe_model(result, options, sites, stored.dtype)


def _check_deployed(
    targets: Iterable[PlannedSite], into: nn.Module | None, dtype: torch.dtype | None
) -> None:
    """Raise for arguments of a merge that change the model that was trained.

    Raises:
        MergeError: If weights were trained for a storage, and ``into`` or ``dtype`` exclude it.
    """
    for target in filter(None, (row.deploy for row in targets)):
        if into is not None:
            raise MergeError(
                f"into has other weights than those that were trained for {target.format}: leave it out, "
                "since the merge gives the model that was trained"
            )
        if dtype is None:
            continue
        if target.dtype is None or torch.promote_types(dtype, target.dtype) != dtype:
            raise MergeError(
                f"dtype={dtype}: the weights were trained for {target.format}, and would be rounded again: "
                "leave it out, since the merge stores them in that form"
            )


def _renew_layer(layer: nn.Module) -> None:
    """Make a library's layer use the scales of its new weight."""
    known = format_of(layer._parameters.get("weight"))
    if known is not None:
        known.layers.renew(layer)


def _relative(difference: torch.Tensor, to: torch.Tensor) -> float:
    """Return the Frobenius norm of a difference, relative to that of another tensor."""
    tiny = torch.finfo(torch.float64).tiny
    return float(difference.norm() / to.norm().clamp_min(tiny))


# --- the merge ------------------------------------------------------------------------------------


def _fold_all(
    changes: Mapping[str, Fold | TokenFold],
    old_of: Callable[[str], torch.Tensor],
    *,
    over: Collection[str],
    dtypes: Mapping[str, torch.dtype],
    formats: Mapping[str, nn.Parameter],
    rounding: Rounding,
    as_trained: Callable[[str], tuple[torch.Tensor, MergedSite] | None],
    measure: bool,
    progress: Progress,
    keep: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, MergedSite]]:
    """Fold weights. Everything that can fail is done before the first weight is overwritten.

    Args:
        changes: The changes of each weight, by FQN.
        old_of: Returns a weight before the merge.
        over: The weights to overwrite.
        dtypes: The dtypes of the merged weights; by default the old weight's.
        formats: The quantized weights in whose formats merged ones are stored again.
        rounding: The way in which weights are rounded.
        as_trained: Returns a weight as it was trained to be stored, with its row; None for any other.
        measure: True to compare every merged element with fp64.
        progress: Called with (done, total, site name) before each weight.
        keep: Called with each new tensor, returns the tensor to use instead.

    Returns:
        The merged weights that are new tensors, and the row of each weight in the report, both by FQN.

    Raises:
        MergeError: If a merged weight overflows; nothing has been written then.
    """
    # All processes need the same order to gather parts together; the order of a set may differ.
    for weight, change in changes.items():
        if weight in over:
            change.check(old_of(weight))
    merged: dict[str, torch.Tensor] = {}
    sites: dict[str, MergedSite] = {}

    def fold(weight: str) -> None:
        if (trained_weight := as_trained(weight)) is not None:
            merged[weight], sites[weight] = trained_weight
            return
        change, stored = changes[weight], old_of(weight)
        # If processes hold parts, each of them gathers only one whole weight at a time.
        old = gathered(stored, weight)
        if weight in formats and isinstance(change, Fold):
            merged[weight], sites[weight] = requantized_site(change, old, formats[weight], rounding)
            return
        dtype = dtypes.get(weight) or old.dtype
        slices: Iterable[Slice] = change.slices(old, dtype, None if measure else SAMPLED)
        result = rounded_weight(change, old, dtype, rounding)
        if weight in over:
            slices, new = tuple(slices), old  # what is overwritten cannot be compared later
            change.fold_into(new) if result is None else new.copy_(result)
        else:
            new = keep(change.folded(old, dtype) if result is None else result)
            merged[weight] = distributed_as(new, stored)
        sites[weight] = measured(
            change,
            slices,
            new,
            exhaustive=measure,
            rounding=rounding,
            nearest=result is None,
        )

    # A stable sort: weights that may still fail come first.
    with show_progress(progress, "weight") as tell:
        for done, weight in enumerate(sorted(changes, key=lambda name: name in over)):
            tell(done, len(changes), changes[weight].name)
            fold(weight)
    return merged, sites


def rounded_weight(
    change: Fold | TokenFold, old: torch.Tensor, dtype: torch.dtype, rounding: Rounding
) -> torch.Tensor | None:
    """Return a merged weight that is not rounded to nearest; None if it is, because it loses nothing."""
    if rounding.name == "nearest" or isinstance(change, TokenFold) or dtype.itemsize > 2:
        return None
    values = rounding.round(change.exact(old, dtype), DtypeGrid(dtype), change.sites)
    if values is None:
        return None
    result = values.to(dtype)
    if not is_finite(result) and is_finite(old):
        raise MergeError(
            f"{change.name}: the merged weight overflows {dtype}; merge in a wider dtype"
        )
    return result


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
    """Raise for weights that are not stored: a hook computes them before each call, or loads them.

    Raise also for packed bytes in parts and, with ``requantize``, for any quantized weight in parts. No
    format can put parts together.
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
    dtype: torch.dtype | None = None,
    requantize: bool = False,
    own: bool = False,
    rounding: Rounding = NEAREST,
    cast_to: torch.dtype | None = None,
    measure: bool = False,
    progress: Progress = False,
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
) -> tuple[nn.Module, MergeReport]:
    """Fold adapters into the weights.

    Args:
        model: A rewritten model; it is not changed.
        adapter_names: The adapters; by default the active ones.
        into: Fold into this model instead of a copy of the base: a model of the original class. Its weights
            are overwritten slice by slice. A weight that shares its memory, as those of the model before the
            rewrite do, gets a new parameter. Over a quantized base it is a dense model, and the change is
            added to its weights.
        dtype: The dtype of everything in the result; by default each weight's own. Over a quantized base
            that becomes dense all parameters have :func:`dtype_of_all`.
        requantize: True to store merged weights that were quantized in the same format again. By default all
            quantized weights become dense. Weights that were trained for a format are stored in it anyway,
            and quantized ones stay so.
        own: True to give the result separate storage for everything, and ``requires_grad`` of the original.
            By default unfolded parameters are shared and frozen.
        rounding: The way in which weights are rounded.
        cast_to: The dtype to which the caller casts the result. Merged weights have it already, so that they
            are rounded once.
        measure: True to compare every merged element with fp64. Otherwise the share of the change
            that is kept comes from a sample of each weight.
        progress: Called before each weight, as in :func:`lora_fx.merge`.
        keep: Called with each merged weight that is a new tensor, returns a tensor of the same values to use
            instead. A caller that is short of memory can store it elsewhere.

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
    record = require_record(model, MergeError)
    check_intact(model, record)
    _check_processes(model)
    units = units_of(model)
    names = chosen(record, adapter_names)
    _check_storage(into, dtype, requantize, own)
    if into is not None:
        _check_fits(model, into, record, names)
    folds, tied = _folds(model, record, names)
    targets = _targets(folds)
    trained_for = [row for row, _ in targets.values()]
    _check_deployed(trained_for, into, dtype)
    for_format = any(row.deploy and row.deploy.dtype is None for row in trained_for)
    requantize = requantize or for_format
    _check_stored(model, folds, requantize=requantize)
    base = stripped(model, record)
    result = base if into is None else into
    full = dict(trained(model, record, names))
    whole = {*full, *(name for name, _ in changed_buffers(model, record))}
    written = {*folds, *whole}
    written |= {row.site.bias for row, _ in _rows_of(folds) if row.site.bias}
    sources = {} if into is None else values_by_name(base)
    restored, origins = find_origins(result, sources, written, whole)
    before = list(result.named_parameters(remove_duplicate=False))
    _restore(result, restored)
    stored = _quantized_before(result, requantize=requantize and not for_format)
    common = dtype or (None if requantize else dtype_of_all(result))
    biases = merged_biases(model, result, _rows_of(folds), full, cast_to or common)
    over = frozenset() if into is None else _written_over(into, full)
    layouts = layouts_of(record.base.matches.sites)
    dtypes = {name: quantization.dtype for name, quantization in stored.items()}
    for_folds = cast_to or common
    dtypes |= {} if for_folds is None else dict.fromkeys(folds, for_folds)
    # The last step that can fail, before its first write: `into` changes completely or not at all.
    merged, sites = _fold_all(
        folds,
        lambda weight: _unadapted(
            values_of(result, weight, layouts, dtypes.get(weight)), weight, full
        ),
        over=over - full.keys(),
        dtypes=dtypes,
        formats={name: result.get_parameter(name) for name in stored if requantize},
        rounding=rounding,
        as_trained=lambda weight: (
            deployed_site(model, *targets[weight], dtypes.get(weight))
            if weight in targets
            else None
        ),
        measure=measure,
        progress=progress,
        keep=keep,
    )
    place_trained(model, result, record, names, over)
    place_biases(result, biases, over)
    still_tied = _still_tied(tied, folds, full)
    untied = place_merged(result, merged, still_tied, over)
    _become_layers(result, trained_for)
    untie_config(result)
    if stored:
        make_savable(result)
        if common is not None:
            make_dense(result, common, layouts, keep)
    else:
        forget_loader(result)
    if common is not None:
        cast_model(result, common, keep, buffers=dtype is not None)
    # Lists, objects and functions of the model may refer to weights, too.
    exchange(result, before)
    shared = freeze_shared(result, model, record) if into is None and not own else ()
    if own:
        result = copy_shared(result, model, record)
        exchange(result, before)
    if not requantize:  # such a model is refused as `into`
        note_origins(result, origins, written)
    shard_again(result, units)
    report = MergeReport(rows_of_report(folds, still_tied, sites), untied, shared=shared)
    warn_of_loss(report)
    return result, report


def _restore(into: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give a model the values that its weights had before the first merge into it."""
    if not values:
        return
    over, buffers = unshared(into), dict(into.named_buffers(remove_duplicate=False))
    for name, value in values.items():
        if name in buffers:
            buffers[name].copy_(value)
        else:
            _set_parameter(into, name, value if name in over else value.clone(), over)


def _check_processes(model: nn.Module) -> None:
    """Check that all processes merge the same adapters together, and shard gathered weights again."""
    reshard(model)
    check_equal(model)
    called_by_all(model.parameters(), "a merge")


def _quantized_before(result: nn.Module, *, requantize: bool) -> Mapping[str, Quantization]:
    """Return the quantized weights of a model before the merge, by FQN.

    Raises:
        MergeError: Merged weights are to be quantized again, and the base is not quantized.
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
    """Return the changes of all weights by FQN: those of sites, then those of trained tokens.

    Also return the weights that use the factors or rows of another one, each with that other one.
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
    """Changes of a model by its adapters, by FQN, for a caller that stores the results elsewhere.

    Attributes:
        folds: The changes of weights.
        trained: Parameters that are trained in full, under each of their names. A weight may be in both.
        biases: The merged biases.
        buffers: The buffers that have values: training has changed them, and they came with an adapter.
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
        model: A rewritten model, whose adapters have values. So have the biases to which something is added.
        dtype: The dtype of the result; by default each tensor's own.

    Raises:
        MergeError: If adapters exclude each other, or have no values, or some that are not finite.
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
    """Return the rows of a report. Weights that are still tied have the same numbers.

    Args:
        folds: The changes of each weight.
        tied: Weights that are stored once with another one, by FQN.
        rows: The rows of the stored weights.
    """
    return tuple(
        dataclasses.replace(
            rows[tied.get(weight, weight)], name=fold.name, adapters=tuple(fold.adapters)
        )
        for weight, fold in folds.items()
    )


def _targets(folds: Mapping[str, Fold | TokenFold]) -> dict[str, tuple[PlannedSite, str]]:
    """Return the sites that were trained for a storage, each with its adapter, by weight."""
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
    """Return the weights that the merge leaves tied, each with the weight that it is tied to."""
    # If only one of two tied weights is trained in full, they are different weights.
    return {weight: to for weight, to in kept.items() if full.get(weight) is full.get(to)}


def chosen(record: Record, adapter_names: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the adapters that ``adapter_names`` selects."""
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
    """Return the changes of each weight, and the weights that use the factors of another one."""
    rows: dict[str, tuple[tuple[PlannedSite, str], ...]] = {}
    tied: dict[str, str] = {}
    for name in names:
        weights = {row.name: row.site.weight for row in record.adapters[name].sites}
        for row in record.adapters[name].sites:
            if row.tied:
                tied[row.site.weight] = weights[row.tied]
            rows[row.site.weight] = (*rows.get(row.site.weight, ()), (row, name))
            _check_finite(model, row, name)
    return rows, tied


def _written_over(into: nn.Module, trained: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Return the parameters of a model to overwrite. Those trained as one parameter are replaced instead."""
    ends = Counter(map(id, trained.values()))
    return unshared(into) - {name for name, value in trained.items() if ends[id(value)] > 1}


def _check_not_units(into: nn.Module) -> None:
    """Refuse to write into a model that FSDP2 shards: its parameters are the library's.

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


def _check_storage(
    into: nn.Module | None, dtype: torch.dtype | None, requantize: bool, own: bool
) -> None:
    check_dtype(dtype)
    if into is not None and own:
        raise MergeError("into is a model of its own already: leave out own")
    if requantize and (into is not None or dtype is not None):
        other = "dtype" if into is None else "into"
        raise MergeError(f"requantize=True keeps the formats of the base: leave out {other}")
    if into is not None and dtype is not None:
        raise MergeError("into keeps its dtype: leave out dtype, or cast that model before")
    if into is not None and (stored := quantized_weights(into)):
        raise MergeError(
            f"into has quantized weights ({next(iter(stored))}): give a dense model, or leave it out and "
            "merge with requantize=True"
        )


def _unadapted(base: torch.Tensor, name: str, trained: Mapping[str, nn.Parameter]) -> torch.Tensor:
    """Return the weight to fold into: the base's, or that of another adapter that trains it in full."""
    if name not in trained:
        return base
    return gathered(trained[name], name).to(base.device, base.dtype)


def _stay_tied(
    head: Sequence[tuple[PlannedSite, str]], table: Sequence[tuple[PlannedSite, str]]
) -> bool:
    """Return True if a head and an embedding have the same merged weight: both have the same factors.

    A magnitude scales the columns of one and the rows of the other.
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
