"""Preparation of a model and an example call for tracing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from lora_fx.errors import ExportError, some
from lora_fx.export.adapter_bank import (
    BankModel,
    check_bank_sites,
    prove_rows,
    row_editor,
    stacked,
)
from lora_fx.export.adapter_file import values_of_model
from lora_fx.export.adapter_manifest import SUFFIXES, Manifest, cast_to, fill_tokens
from lora_fx.export.arguments import Arguments, Cases, FlatModel, cast_floating
from lora_fx.export.copy import (
    DTYPES,
    Casts,
    StandIn,
    dtype_name,
    exportable_twin,
    pack_quantized,
    unwrapped,
)
from lora_fx.export.factor_model import (
    FactorModel,
    Swappable,
    base_of,
    calls_of,
    origin_metadata,
    replace_calls,
    swappable,
    with_adapter,
)
from lora_fx.export.mixtures import mark_mixtures
from lora_fx.export.report import BankSize
from lora_fx.export.tasks import Part, find_task
from lora_fx.export.trace import widen_batch
from lora_fx.ir import AdapterRecord, PlannedSite, Region, record_of
from lora_fx.kinds import kinds
from lora_fx.passes.capture import State
from lora_fx.passes.graph import graphs_of, install, share_copy, target_of
from lora_fx.passes.plan import foreign_factors
from lora_fx.runtime import base_parameter
from lora_fx.runtime.modules import AdapterFactors

if TYPE_CHECKING:
    from lora_fx.passes.merge import Keep, MergeReport


__all__ = [
    "DEFAULT_RANK",
    "Prepared",
    "over_quantized",
    "prepare",
    "prepare_bank",
    "prepare_swappable",
]


# Adapters that stay separate branches in a file, as constants.
#
# This keeps a quantized weight quantized, because a merge would make it dense. The branches are those of the
# model's own graphs. A value that needs the dense weight, such as the gain ``m / ‖W + s·BA‖``, is computed
# here once instead of in every run.

_MAGNITUDE, _GAIN = "lora_magnitude_vector", SUFFIXES["gain"]


def over_quantized(model: nn.Module) -> bool:
    """Return True if an active adapter of a model is at a quantized weight that a merge would make dense."""
    record = record_of(model)
    if record is None:
        return False
    active = (record.adapters[name] for name in record.active)
    return any(
        row.site.quantized is not None and row.deploy is None
        for adapter in active
        for row in adapter.sites
    )


@torch.no_grad()
def _fix_gains(model: nn.Module) -> None:
    """Compute the values that only depend on weights, such as DoRA's gain, and make them constants.

    The constants get the names ``layer.lora_gain.NAME``, in fp32.

    Args:
        model: Copy of a rewritten model. Its graphs are replaced.
    """
    install(list(_fixed(model)))


def _constants() -> list[object]:
    return [function for kind in kinds() for function in kind.constants]


def _fixed(model: nn.Module) -> Iterator[Region]:
    edited: dict[int, fx.Graph] = {}
    graphs, constants = graphs_of(model), _constants()
    holding = {key for key, graph in graphs.items() if calls_of(graph, constants)}
    for key, graph in graphs.items():
        if key not in holding:
            continue
        module = model.get_submodule(key)
        for node in calls_of(graph, constants):
            path, _, adapter = _target(node).rpartition(".")
            _factors(module, path).add(adapter, _value(module, node))
        if id(graph) not in edited:
            edited[id(graph)] = replace_calls(graph, constants, _constant)
        # No fallback, because the module's own forward would leave the adapter out.
        yield Region(key, module, edited[id(graph)], fallback=False)


def _factors(module: nn.Module, path: str) -> AdapterFactors:
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner)
    if name not in holder._modules:
        holder.add_module(name, AdapterFactors())
    factors = holder.get_submodule(name)
    assert isinstance(factors, AdapterFactors)
    return factors


def _constant(graph: fx.Graph, gain: fx.Node) -> fx.Node:
    return graph.get_attr(_target(gain))


def _target(node: fx.Node) -> str:
    """Return the FQN of the constant for a gain, next to the magnitude that the gain is computed from."""
    magnitude = node.args[0]
    assert isinstance(magnitude, fx.Node)
    return str(magnitude.target).replace(_MAGNITUDE, _GAIN)


def _value(module: nn.Module, node: Any) -> Any:
    """Evaluate a node that depends only on parameters."""
    if not isinstance(node, fx.Node):
        return node
    args = [_value(module, argument) for argument in node.args]
    if node.op == "get_attr":
        owner, _, leaf = str(node.target).rpartition(".")
        return base_parameter(module.get_submodule(owner), leaf)
    assert target_of(node) is not None, node.format_node()
    return target_of(node)(
        *args, **{key: _value(module, argument) for key, argument in node.kwargs.items()}
    )


_log = logging.getLogger("lora_fx")


@dataclass(frozen=True)
class Prepared:
    """Model and call to trace, and the model that the file is compared with.

    Attributes:
        model: The model in eval mode, with tensors as arguments and results.
        arguments: The call that is traced.
        outputs: Names of the outputs, in order.
        dtype: Storage dtype of most weights: "fp32", "fp16", "bf16", or torch's name.
        origin: Metadata entries about the base model and the adapters that are merged into it.
        dynamic_shapes: Dynamic axes by input name, if a task sets them, else None.
        name: Name of the part in the file; "" for the file that a session opens.
        cases: The calls on which the file is compared, None to draw them by axis.
        metadata: Metadata entries of the task.
        base: The model that the file computes without an adapter.
        manifest: The adapter inputs; None for a model whose adapters are merged.
        adapters: Functions by adapter name, each of which returns a model with that adapter active.
        source: The rewritten model that has the adapters.
        merged: The merge of the adapters; None without a merge.
    """

    model: FlatModel
    arguments: Arguments
    outputs: tuple[str, ...]
    dtype: str
    origin: Mapping[str, str]
    base: FlatModel
    manifest: Manifest | None = None
    adapters: Mapping[str, Callable[[], FlatModel]] = field(default_factory=dict)
    source: nn.Module | None = None
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None
    name: str = ""
    cases: Cases | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    merged: MergeReport | None = None

    def with_companion(self, name: str, file: str) -> Prepared:
        """Return a copy whose metadata says that ``file`` holds the part ``name``."""
        return dataclasses.replace(self, metadata={**self.metadata, f"lora_fx.{name}": file})

    def requiring(self) -> Prepared:
        """Return a copy whose file has no inputs with a default."""
        assert self.manifest is not None
        return dataclasses.replace(self, manifest=self.manifest.require())

    def defaults(self) -> dict[str, Tensor]:
        """Return the values that the file stores for its adapter inputs: of no adapter, or of a bank.

        Raises:
            CheckpointError, ExportError: As ``values_of_model``.
        """
        manifest = self.manifest
        if manifest is None or (manifest.required and manifest.bank is None):
            return {}
        if manifest.bank is None:
            return {**manifest.no_adapter(), **self.base_values()}
        adapters = [
            fill_tokens(manifest, cast_to(manifest, values_of_model(self.source, name)))
            for name in manifest.bank.adapters
            if self.source is not None
        ]
        return stacked(manifest, adapters, self.base_values())

    def base_values(self) -> dict[str, Tensor]:
        """Return the base's values of the parameters of the manifest, by name."""
        return self.model.base_values() if isinstance(self.model, FactorModel) else {}

    def fixed(self, example_inputs: object, rank: int | None) -> Prepared:
        """Return a copy for a runtime that takes one rank, or has no dynamic axes.

        Args:
            example_inputs: The caller's example, to undo the widening of a batch of one; None to keep it.
            rank: The rank of all factors; None for a model without adapter inputs.
        """
        if isinstance(self.model, FactorModel):
            self.model.rank = rank
        if example_inputs is None:
            return self
        own = Arguments.of(self.model.model, example_inputs).tensors
        pairs = zip(self.arguments.tensors, own, strict=True)
        tensors = [tensor[: len(like)] if like.ndim else tensor for tensor, like in pairs]
        return dataclasses.replace(self, arguments=self.arguments.replace(tensors))

    def to_trace(self, keep: Keep) -> Prepared:
        """Return a copy with a model that torch.export and torch.onnx can trace.

        Args:
            keep: Called with each new tensor, see ``Scratch.keep``.

        Raises:
            ExportError: No operator can represent the values of a quantized weight.
        """
        model = self.model.model
        gains = any(calls_of(graph, _constants()) for graph in graphs_of(model).values())
        if not gains and not any(isinstance(module, StandIn) for module in model.modules()):
            return self
        twin = share_copy(model)
        # Before packing, because gains need the weights in the format of their libraries.
        _fix_gains(twin)
        pack_quantized(twin, DTYPES.get(self.dtype, torch.float32), keep)
        mark_mixtures(twin)
        return dataclasses.replace(self, model=self.model.over(twin))


def prepare_swappable(
    model: nn.Module,
    example_inputs: object,
    dtype: str | None,
    keep: Keep,
    task: str | None = None,
) -> tuple[Prepared, ...]:
    """Prepare files whose adapters are inputs, as :func:`prepare` does.

    Raises:
        ExportError: As :func:`prepare`, and if an adapter trains something that has no factors.
        NoMatchError: A plain model has no linear operation.
    """
    model = unwrapped(model)
    casts = Casts(keep)  # shared, because all copies have the same weights
    # A plain model is made exportable first, because the rewrite captures its code.
    fit = model if record_of(model) else exportable_twin(model, None, casts, to_rewrite=True)
    swap_copy = swappable(fit)
    bases = _prepared(base_of(model), example_inputs, dtype, casts, task)
    twin = exportable_twin(swap_copy.model, dtype, casts)
    return tuple(_with_inputs(base, model, swap_copy, twin, dtype, casts) for base in bases)


def prepare_bank(
    model: nn.Module,
    example_inputs: object,
    dtype: str | None,
    keep: Keep,
    task: str | None = None,
    *,
    capacity: int | None = None,
    rank: int | None = None,
) -> tuple[Prepared, ...]:
    """Prepare files in which each row of a batch has its own adapter, as :func:`prepare` does.

    Args:
        model: A plain or a rewritten model. It is not changed.
        example_inputs: A tuple (args), a dict (kwargs) or a tensor.
        dtype: "fp32", "fp16", "bf16", or None to keep the model's dtypes.
        keep: Called with each new weight, see ``Scratch.keep``.
        task: The task of the export, None to export the model as it is called.
        capacity: Largest number of adapters; None for the number in the model, and at least 8.
        rank: The highest rank of an adapter; None for the highest in the model, and 16 for a model without
            adapters.

    Raises:
        ExportError: As :func:`prepare_swappable`. Also if the kind of a site takes one adapter at a time, if
            rows may depend on each other, or if the model's own adapters do not fit.
        NoMatchError: A plain model has no linear operation.
    """
    model = unwrapped(model)
    record = record_of(model)
    names = tuple(record.adapters) if record else ()
    ranks = {
        (name, row.name): rank
        for name in names
        for row, rank in (_written_ranks(record.adapters[name]) if record else ())
    }
    size = BankSize(
        names,
        max(_CAPACITY, len(names)) if capacity is None else capacity,
        max(ranks.values(), default=DEFAULT_RANK) if rank is None else rank,
    )
    _check_size(size, ranks)
    casts = Casts(keep)
    fit = model if record else exportable_twin(model, None, casts, to_rewrite=True)
    single = swappable(fit)
    check_bank_sites(single.rows)
    batched = swappable(fit, row_editor)
    bases = _prepared(base_of(model), example_inputs, dtype, casts, task)
    twins = [exportable_twin(swap_copy.model, dtype, casts) for swap_copy in (single, batched)]
    prepared = []
    for base in bases:
        alone = _with_inputs(base, model, single, twins[0], dtype, casts)
        assert isinstance(alone.model, FactorModel)
        flat = BankModel(batched, twins[1], base.arguments, base.model.call, size, alone.model)
        flat.eval()
        prove_rows(flat)
        prepared.append(dataclasses.replace(alone, model=flat, manifest=flat.manifest))
    return tuple(prepared)


_CAPACITY, DEFAULT_RANK = 8, 16


def _written_ranks(adapter: AdapterRecord) -> Iterator[tuple[PlannedSite, int]]:
    """Yield the sites of an adapter with their ranks in a file.

    If an initialization has changed the weight, the factors for the original weight have twice the rank.
    """
    for row in adapter.sites:
        yield row, row.rank * (2 if row.site.weight in adapter.own else 1)


def _check_size(size: BankSize, ranks: Mapping[tuple[str, str], int]) -> None:
    for name, value in (("max_adapters", size.capacity), ("max_rank", size.rank)):
        if type(value) is not int or value < 1:
            raise ExportError(f"{name}={value!r}: give a whole number of at least 1")
    if len(size.adapters) > size.capacity:
        raise ExportError(
            f"the model has {len(size.adapters)} adapters ({some([repr(name) for name in size.adapters])}), "
            f"and max_adapters={size.capacity}: give {len(size.adapters)} or more, or delete some"
        )
    high = [
        f"{name!r} has rank {r} at {site}" for (name, site), r in ranks.items() if r > size.rank
    ]
    if high:
        raise ExportError(
            f"adapter {some(high)}, above max_rank={size.rank} of the bank: give "
            f"max_rank={max(ranks.values())}, or leave it out"
        )


def _with_inputs(
    base: Prepared,
    model: nn.Module,
    swap_copy: Swappable,
    twin: nn.Module,
    dtype: str | None,
    casts: Casts,
) -> Prepared:
    call = base.model.call
    flat = FactorModel(swap_copy, twin, base.arguments, call).eval()
    record = record_of(model)

    def active(name: str) -> FlatModel:
        adapted = exportable_twin(with_adapter(model, name), dtype, casts)
        return FlatModel(adapted, base.arguments, call).eval()

    return dataclasses.replace(
        base,
        model=flat,
        manifest=flat.manifest,
        adapters={name: partial(active, name) for name in (record.adapters if record else ())},
        source=model,
    )


def prepare(
    model: nn.Module,
    example_inputs: object,
    dtype: str | None,
    keep: Keep,
    task: str | None = None,
    *,
    merged: bool = True,
) -> tuple[Prepared, ...]:
    """Merge, copy and cast a model, and run it once.

    Args:
        model: Any module. It is not changed.
        example_inputs: A tuple (args), a dict (kwargs) or a tensor.
        dtype: "fp32", "fp16", "bf16", or None to keep the model's dtypes.
        keep: Called with each new weight, see ``Scratch.keep``.
        task: The task of the export, None to export the model as it is called.
        merged: True to merge; else the branches of the active adapters stay in the graph.

    Returns:
        An entry for each file. The last entry is for the file that a session opens.

    Raises:
        ExportError: The model cannot be copied, does not run on the inputs, or does not do the task.
    """
    model = unwrapped(model)
    casts = Casts(keep)
    target = None if dtype is None else DTYPES[dtype]
    whole, report = _merged(model, keep, target) if merged else (model, None)
    origin = origin_metadata(model, "merged" if merged else "inline")
    return tuple(
        dataclasses.replace(prepared, origin=origin, merged=report)
        for prepared in _prepared(whole, example_inputs, dtype, casts, task)
    )


def _prepared(
    model: nn.Module, example_inputs: object, dtype: str | None, casts: Casts, task: str | None
) -> tuple[Prepared, ...]:
    """Prepare the files of a model as it is, without merging."""
    twin, origin = exportable_twin(model, dtype, casts), origin_metadata(model)
    arguments = Arguments.of(twin, example_inputs)
    if dtype is not None:
        arguments = arguments.replace(cast_floating(arguments.tensors, DTYPES[dtype]))
    if task is not None:
        parts = find_task(task)(twin, _by_name(arguments))
        return tuple(_of_part(twin, part, origin) for part in parts)
    for name, value in arguments.baked.items():
        _log.info("argument '%s' is no tensor: its value %s is fixed in the file", name, value)
    flat, arguments, outputs = _first_run(FlatModel(twin, arguments))
    return (Prepared(flat, arguments, tuple(outputs), dtype_name(twin), origin, flat),)


def _by_name(arguments: Arguments) -> dict[str, Any]:
    constants = {key: arguments.kwargs[key] for key in arguments.baked if key in arguments.kwargs}
    return dict(zip(arguments.names, arguments.tensors, strict=True)) | constants


def _of_part(twin: nn.Module, part: Part, origin: Mapping[str, str]) -> Prepared:
    flat = FlatModel(twin, Arguments.of(twin, part.inputs), part.call)
    flat, arguments, outputs = _first_run(flat)
    return Prepared(
        flat,
        arguments,
        tuple(outputs),
        dtype_name(twin),
        origin,
        flat,
        dynamic_shapes=part.dynamic_shapes,
        name=part.name,
        cases=part.cases,
        metadata=part.metadata,
    )


def _merged(
    model: nn.Module, keep: Keep, dtype: torch.dtype | None
) -> tuple[nn.Module, MergeReport | None]:
    if "_lora_fx" not in vars(model):  # the record that a rewrite leaves on the root module
        if (name := next(foreign_factors(model), None)) is not None:
            _log.warning(
                "export: the adapters of another library in the model, such as that at %s, are not merged: "
                "they stay products of their own in the file. For PEFT, export what merge_and_unload() "
                "gives, or the base model with its adapter from lora_fx.load_adapter",
                name or "its root",
            )
        return model, None
    from lora_fx.passes.merge import Storage, merge

    merged, report = merge(model, storage=Storage(keep=keep, cast_to=dtype))
    _log.info("export: %s", report)
    return merged, report


def _first_run(flat: FlatModel) -> tuple[FlatModel, Arguments, list[str]]:
    """Run a model. Return it, the arguments of the run, and the names of its outputs.

    A batch of one sample is repeated first. If that run fails, the example is used as it is.
    """
    arguments = flat.eval().arguments
    failure: Exception | None = None
    for candidate in (widen_batch(arguments), arguments):
        try:
            return flat, candidate, _named(flat, candidate.tensors)
        except ExportError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a model raises; re-raised below
            failure = error
    shapes = ", ".join(
        f"{name} {list(tensor.shape)}"
        for name, tensor in zip(arguments.names, arguments.tensors, strict=True)
    )
    raise ExportError(
        f"{type(flat.model).__name__} does not run on the example inputs ({shapes}): {failure}"
    ) from failure


def _altered(tensor: Tensor) -> Tensor:
    """Return other values of the same shape and dtype, to see if a model remembers its last call."""
    return -tensor if tensor.is_floating_point() else tensor.flip([*range(tensor.dim())])


def _named(flat: FlatModel, tensors: Sequence[Tensor]) -> list[str]:
    """Return the names of the outputs from a run of the model. Run it again if the run changed its state.

    Raises:
        ExportError: The second call returns other values. A file cannot have such state.
    """
    before = State(flat.model)
    drawn = torch.get_rng_state()
    with torch.no_grad():
        first = flat.named(tensors)
    changed = before.changed()
    if changed is None:
        return [name for name, _ in first]
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        # The state may depend on the last inputs, so call with other inputs in between.
        with contextlib.suppress(Exception):
            flat.named([_altered(tensor) for tensor in tensors])
        torch.set_rng_state(drawn)
        second = flat.named(tensors)
    alike = all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for (_, a), (_, b) in zip(first, second, strict=True)
    )
    if not alike:
        raise ExportError(
            f"{type(flat.model).__name__}: {changed}, and its next call on the same inputs returns other "
            "values. A file has no such state: export a model that computes the same in each call"
        )
    return [name for name, _ in first]
