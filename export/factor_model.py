"""Model that takes its factors as arguments: the adapter inputs of a file, as torch.export sees them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from lora_fx.adapters import base_capture, run_with
from lora_fx.config import LoraConfig
from lora_fx.errors import ExportError, NoMatchError
from lora_fx.export.adapter_manifest import (
    AdapterInput,
    Manifest,
    ParameterInput,
    SiteInputs,
    TokenInputs,
)
from lora_fx.export.arguments import Arguments, Extra, FlatModel, named_outputs
from lora_fx.export.copy import DTYPES, dtype_name
from lora_fx.ir import (
    ActiveAdapters,
    AdapterRecord,
    Capture,
    Plan,
    PlannedSite,
    PlannedTokens,
    Record,
    Region,
    join,
    record_of,
    require_record,
)
from lora_fx.kinds import kind_of, kind_with, kinds, stores_product, union_of
from lora_fx.passes.effective import arm
from lora_fx.passes.graph import (
    copy_graph,
    edit_graphs,
    erase_dead,
    install,
    original_class,
    share_copy,
    target_of,
)
from lora_fx.passes.merge import Keep, Storage, merge, stripped
from lora_fx.passes.parameters import drop_factors, factor_names, replaceable
from lora_fx.passes.patterns import pattern_of
from lora_fx.passes.pipeline import (
    RewriteOptions,
    add_adapter_parameters,
    branch_passes,
    regions_to_install,
    rewrite_model,
    run_passes,
)
from lora_fx.runtime.rows import PatchedWeight, RowParameter

__all__ = [
    "FactorModel",
    "Swappable",
    "base_of",
    "calls_of",
    "check_swappable",
    "flip",
    "origin_metadata",
    "random_factors",
    "replace_calls",
    "replaced_parameters",
    "site_inputs",
    "swappable",
    "trained_parameters",
    "trained_tokens",
    "with_adapter",
]


_NAME = "base_model_name_or_path"


def origin_metadata(model: nn.Module, adapters: str = "merged") -> dict[str, str]:
    """Return metadata entries about a model, without anything about the machine.

    Args:
        model: Any model, rewritten or not.
        adapters: Location of the active adapters: "merged" into weights, or "inline" in the graph.

    Returns:
        ``lora_fx.base``: the class, and the name in its configuration if there is one, as JSON.
        ``lora_fx.merged`` or ``lora_fx.inline``, for a rewritten model: configurations of the active
        adapters by name, as JSON, without fields that have their default value.
    """
    kind = original_class(model)
    base = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    if name := _loaded_from(model):
        base["name"] = name
    entries = {"lora_fx.base": json.dumps(base)}
    record = record_of(model)
    if record is not None:
        active = {name: _changed(record.adapters[name].config) for name in record.active}
        entries[f"lora_fx.{adapters}"] = json.dumps(active)
    return entries


def _base_name(model: nn.Module) -> str:
    """Return class and name for people to read: ``LlamaForCausalLM (meta-llama/Llama-3.2-1B)``."""
    kind, name = original_class(model).__name__, _loaded_from(model)
    return f"{kind} ({name})" if name else kind


def _loaded_from(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    name = (
        getattr(config, "name_or_path", None)
        or getattr(config, "_name_or_path", None)
        or vars(model).get("name_or_path")
    )
    return _public(name) if isinstance(name, str) and name else ""


def _changed(config: LoraConfig) -> dict[str, object]:
    values, defaults = config.to_dict(), LoraConfig().to_dict()
    always = ("r", "lora_alpha", "target_modules")
    kept = {
        key: value for key, value in values.items() if key in always or value != defaults.get(key)
    }
    if isinstance(name := kept.get(_NAME), str):
        kept[_NAME] = _public(name)
    return kept


def _public(name: str) -> str:
    """Return the name of a model, reduced to the last component if it is a path to a folder."""
    path = PureWindowsPath(name) if "\\" in name else PurePosixPath(name)
    return path.name if path.is_absolute() or name[0] in ".~" else name


_ADAPTER = "inputs"
"""Name of the only adapter in the model of a :class:`Swappable`."""


@dataclasses.dataclass(frozen=True)
class Swappable:
    """Copy of a model over the same weights, with one adapter whose factors become inputs of a file.

    Attributes:
        model: The copy. Its graphs have the canonical form, with scale 1 and without dropout.
        rows: The sites of the adapter.
        record: The record of the copy. It is not attached to the copy.
        parameters: FQNs of the base's parameters for which an adapter has its own values.
        tokens: Embeddings for which an adapter has trained rows, and heads that share their weights.
    """

    model: nn.Module
    rows: tuple[PlannedSite, ...]
    record: Record
    parameters: tuple[str, ...]
    tokens: tuple[PlannedTokens, ...]


def swappable(
    model: nn.Module,
    editor: Callable[[nn.Module, Sequence[PlannedSite]], Callable[[Region], fx.Graph | None]]
    | None = None,
) -> Swappable:
    """Return a copy of a model with one adapter whose factors are inputs.

    Args:
        model: A plain or a rewritten model. It is not changed.
        editor: Takes the copy and its sites, and returns a function that edits each graph at the end.

    Raises:
        ExportError: An adapter trains something that has no factors.
        NoMatchError: A plain model has no operation to adapt. The message says what to do.
        CaptureError: As :func:`lora_fx.rewrite`, for a plain model.
    """
    record = record_of(model)
    if record is None:
        model = _rewritten(model)
        record = require_record(model)
    for name, adapter in record.adapters.items():
        check_swappable(name, adapter)
    rows, parameters, tokens = _union(record), trained_parameters(record), trained_tokens(record)
    if not rows and not parameters and not tokens:
        raise ExportError("no adapter of the model is at an operation: there is nothing to swap")
    twin = share_copy(model)
    run_with(twin, dataclasses.replace(record, chosen=ActiveAdapters(), blocks=()), rebuild=True)
    for name in record.adapters:
        drop_factors(twin, name)
    bare = dataclasses.replace(require_record(twin), adapters={}, chosen=None, optimize=False)
    capture = base_capture(twin, bare)
    plan = Plan(rows, (), (), (), LoraConfig(), capture.frontend)
    capture = dataclasses.replace(capture, plan=plan)
    bare = add_adapter_parameters(capture, bare, _ADAPTER)
    capture = run_passes(capture, branch_passes(bare.adapters, optimize=False))
    capture = edit_graphs(capture, _gains_as_inputs).capture
    if editor is not None:
        capture = edit_graphs(capture, editor(twin, rows)).capture
    install(regions_to_install(capture, rows))
    _check_without_graphs(capture, rows, in_rows=editor is not None)
    if editor is None:
        # Code without a graph reads patched weights, to which the inputs of one adapter are applied.
        twin.__dict__["_lora_fx"] = dataclasses.replace(bare, active=(_ADAPTER,))
        arm(twin)
    # The copy is no longer a rewritten model, so nobody can switch its adapters.
    del twin.__dict__["_lora_fx"]
    return Swappable(twin, rows, bare, parameters, tokens)


def _check_without_graphs(capture: Capture, rows: Sequence[PlannedSite], *, in_rows: bool) -> None:
    """Raise if the factors of a site cannot become inputs because its module has no graph.

    Args:
        capture: The model.
        rows: Its sites.
        in_rows: True if each row of a batch has its own adapter.

    Raises:
        ExportError: The message has the site and the reason why its module has no graph.
    """
    for row in rows:
        reasons = [capture.regions[call.region].not_run for call in row.site.calls]
        reason = next(filter(None, reasons), "")
        if reason and (in_rows or any(kind_of(row).slots(row.site))):
            feature = "one adapter for each row" if in_rows else f"the kind {row.kind!r}"
            raise ExportError(
                f"{row.name} runs without a graph ({reason}), and {feature} needs one: export with "
                "adapters='merge', or name it in exclude_modules of the rewrite"
            )


def _rewritten(model: nn.Module) -> nn.Module:
    try:
        return rewrite_model(model, LoraConfig(), options=RewriteOptions(optimize=False))
    except NoMatchError as error:
        reason = str(error).split("\n", 1)[-1].strip()
        raise NoMatchError(
            "the model has no adapters, and the file then takes some at every linear operation but "
            f"the head, of which there is none ({reason}): rewrite the model first, with what to adapt in "
            "target_modules, or export it with adapters='merge'"
        ) from error


def base_of(model: nn.Module) -> nn.Module:
    """Return the model without adapters: a copy that shares its weights, or a plain model itself."""
    record = record_of(model)
    return model if record is None else stripped(model, record)


def with_adapter(model: nn.Module, name: str) -> nn.Module:
    """Return a copy of a rewritten model that shares its weights, with one adapter active."""
    twin = share_copy(model)
    record = require_record(twin)
    run_with(
        twin, dataclasses.replace(record, chosen=ActiveAdapters((name,)), blocks=()), rebuild=True
    )
    return twin


def check_swappable(name: str, adapter: AdapterRecord) -> None:
    """Raise unless an adapter only adds low-rank products and replaces parameters, which a file can take.

    Raises:
        ExportError: The message lists everything else that the adapter does.
    """
    more = list(dict.fromkeys(_more(adapter)))
    if more:
        raise ExportError(
            f"the adapter {name!r} cannot be an input of a file: {'; '.join(more)}. Only factors and "
            "parameters can be swapped: merge it into a file of its own, with export_onnx(..., "
            "adapters='merge')"
        )


def _more(adapter: AdapterRecord) -> Iterator[str]:
    start = adapter.config.init_lora_weights
    if start == "loftq":
        yield "its base was quantized for it (init_lora_weights='loftq')"
    for row in adapter.sites:
        kind = kind_of(row)
        if not stores_product(kind) or not all(slot.role for slot in kind.slots(row.site)):
            yield f"{row.name} has the kind {kind.name!r}, which no file takes as inputs"
    yield from (
        f"{name} is computed from parameters (parametrizations), of which a file holds the result alone"
        for name in replaced_parameters(adapter)
        if ".parametrizations." in f".{name}."
    )
    if not adapter.initialized:
        yield f"it waits for data (init_lora_weights={start!r}): lora_fx.initialize gives it some"


def trained_parameters(record: Record) -> tuple[str, ...]:
    """Return the FQNs of the base's parameters for which any adapter has its own values, each once.

    These are parameters of saved modules, biases, and parameters whose values came with a folder. A weight
    that an initialization changed is not included: its adapter is written with factors for the original
    weight.
    """
    every = (name for adapter in record.adapters.values() for name in replaced_parameters(adapter))
    return tuple(dict.fromkeys(every))


def replaced_parameters(adapter: AdapterRecord) -> Iterator[str]:
    """Yield the FQNs of the base's parameters for which an adapter has its own values, in their order."""
    inside = tuple(f"{name}." for name in adapter.saved_modules)
    started = {row.site.weight for row in adapter.sites} - {*adapter.given, *adapter.saved_modules}
    for name in adapter.own:
        if name not in started or name.startswith(inside):
            yield name


def trained_tokens(record: Record) -> tuple[PlannedTokens, ...]:
    """Return the embeddings with trained rows of any adapter, each once, with the highest number of rows."""
    highest: dict[str, PlannedTokens] = {}
    for row in (row for adapter in record.adapters.values() for row in adapter.tokens):
        previous = highest.get(row.name, row)
        highest[row.name] = max(previous, row, key=lambda tokens: len(tokens.indices))
    return tuple(highest.values())


def _union(record: Record) -> tuple[PlannedSite, ...]:
    """Return the sites of all adapters, each once, with the union of the kinds at the site."""
    sites: dict[str, PlannedSite] = {}
    for row in (row for adapter in record.adapters.values() for row in adapter.sites):
        previous = sites.get(row.name, row)
        sites[row.name] = dataclasses.replace(
            row,
            rank=row.site.groups,
            alpha=1.0,
            scale=1.0,
            dropout=0.0,
            # A tied head gets its own inputs for the embedding's factors.
            tied="",
            kind=union_of((previous.kind, row.kind), row.site),
        )
    return tuple(sites.values())


def _gains_as_inputs(region: Region) -> fx.Graph | None:
    """Return a graph with gains as inputs, without the calls that compute gains from magnitudes.

    Return None for a graph without gains.
    """
    handed = [function for kind in kinds() for function in kind.handed]
    if not calls_of(region.graph, handed):
        return None
    return replace_calls(region.graph, handed, lambda _, node: node.args[0])


def calls_of(graph: fx.Graph, targets: Sequence[object]) -> list[fx.Node]:
    """Return the nodes of a graph that call one of the functions ``targets``."""
    return [node for node in graph.nodes if any(target_of(node) is target for target in targets)]


def replace_calls(
    graph: fx.Graph, targets: Sequence[object], make: Callable[[fx.Graph, fx.Node], Any]
) -> fx.Graph:
    """Return a copy of a graph in which the result of ``make`` replaces each call of ``targets``."""
    graph = copy_graph(graph)
    for node in calls_of(graph, targets):
        with graph.inserting_before(node):
            node.replace_all_uses_with(make(graph, node))
    erase_dead(graph)
    graph.lint()
    return graph


class FactorModel(FlatModel):
    """Model that takes the tensors of a call, then all adapter inputs of its manifest.

    Args:
        prepared: Result of :func:`lora_fx.export.factor_model.swappable`.
        model: The model of ``prepared``, or a cast copy of it.
        arguments: The call.
        call: Function that calls the model.

    Attributes:
        manifest: The adapter inputs.
        adapter_inputs: The same inputs in order.
        rank: The rank of all factors in a trace; None if each site has its own rank, which stays dynamic.
    """

    def __init__(
        self,
        prepared: Swappable,
        model: nn.Module,
        arguments: Arguments,
        call: Callable[..., object] = nn.Module.__call__,
    ) -> None:
        super().__init__(model, arguments, call)
        self._made = prepared
        self.manifest = Manifest(
            _base_name(model),
            tuple(site_inputs(model, row) for row in prepared.rows),
            parameters=tuple(_parameter_input(model, name) for name in prepared.parameters),
            tokens=tuple(_token_inputs(model, row) for row in prepared.tokens if not row.tied),
        )
        self.adapter_inputs = tuple(self.manifest.inputs.values())
        self.device = next(model.parameters()).device
        self._factors = tuple(name for row in prepared.rows for name in _parameters(row))
        self.rank: int | None = None

    def named(self, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Return the outputs with their names.

        Args:
            tensors: Tensors of the call, followed by the adapter inputs.
        """
        own = len(self.arguments.tensors)
        args, kwargs = self.arguments.fill(tensors[:own])
        return named_outputs(self.call_with_factors(tensors[own:], self.call, *args, **kwargs))

    def call_with_factors(
        self, factors: Sequence[Tensor], call: Callable[..., object], *args: Any, **kwargs: Any
    ) -> Any:
        """Return ``call(model, *args, **kwargs)``, with ``factors`` as the values of the adapter.

        Args:
            factors: Values of the adapter inputs, in order.
            call: A function that calls the model.
            *args: Further arguments of ``call``.
            **kwargs: Keyword arguments of ``call``.
        """
        return self._called(self.parameters_of(factors), call, *args, **kwargs)

    def parameters_of(
        self, tensors: Sequence[Tensor], slots: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors that replace parameters of the model in a call, by name.

        Args:
            tensors: Values of the adapter inputs, in order.
            slots: The slot of each row, [rows], if the values are banks.
        """
        names = (entry.name for entry in self.adapter_inputs)
        values = dict(zip(names, tensors, strict=True))
        parameters: dict[str, Tensor] = {}
        entries = (entry for site in self.manifest.sites for entry in site.inputs())
        for fqn, entry in zip(self._factors, entries, strict=True):
            value = values[entry.name]
            parameters[fqn] = flip(entry, value) if slots is None else value
        for fqn in self._made.parameters:
            value = values[fqn]
            parameters[fqn] = value if slots is None else RowParameter(fqn, value, slots)
        for row, target in self._token_targets():
            fqn = row.site.weight
            indices, rows = (values[name] for name in target.names)
            base = parameters.get(fqn, self.model.get_parameter(fqn))
            parameters[fqn] = PatchedWeight(fqn, base, indices, rows, slots)
        return {f"model.{fqn}": value for fqn, value in parameters.items()}

    def _token_targets(self) -> Iterator[tuple[PlannedTokens, TokenInputs]]:
        """Yield each weight with trained rows and its inputs. A tied head has the inputs of its embedding."""
        targets = {target.name: target for target in self.manifest.tokens}
        for row in self._made.tokens:
            yield row, targets[row.tied or row.name]

    def _called(
        self, values: dict[str, Tensor], call: Callable[..., object], *args: Any, **kwargs: Any
    ) -> Any:
        # A tied parameter has two names, and an adapter may have its own values for only one of them.
        return torch.func.functional_call(
            _Called(self.model, call), values, args, kwargs, tie_weights=False
        )

    def base_values(self) -> dict[str, Tensor]:
        """Return the base's values of the manifest's parameters by name, as copies on the CPU.

        A deferred weight has no values in memory, so its values are computed for the copy.
        """
        return {
            name: replaceable(self.model, name).detach().clone().cpu()
            for name in self._made.parameters
        }

    @torch.no_grad()
    def merged(self, factors: Sequence[Tensor], keep: Keep) -> FlatModel:
        """Return a :class:`FlatModel` of the same call with an adapter merged into the weights.

        A file is compared with this model. So the model shares no code with the file: it has no branch, no
        graph and no low-rank product. The values of :meth:`loose_biases` are left out.

        Args:
            factors: The values, in the order of the inputs.
            keep: Called with each merged weight, see ``Scratch.keep``.

        Raises:
            MergeError: Something cannot be merged.
        """
        twin = share_copy(self.model)
        values = dict(zip((input_.name for input_ in self.adapter_inputs), factors, strict=True))
        for name in self._made.parameters:
            owner, _, leaf = name.rpartition(".")
            module = twin.get_submodule(owner)
            if leaf in module._buffers:
                module._buffers[leaf] = values[name]
            else:
                module._parameters[leaf] = nn.Parameter(values[name], requires_grad=False)
        for token_row, target in self._token_targets():
            owner, _, leaf = token_row.site.weight.rpartition(".")
            whole = twin.get_parameter(token_row.site.weight).detach().clone()
            tokens, rows = (values[name] for name in target.names)
            whole[tokens[tokens >= 0]] = rows[tokens >= 0]
            twin.get_submodule(owner)._parameters[leaf] = nn.Parameter(whole, False)
        for row, site in zip(self._made.rows, self.manifest.sites, strict=True):
            by_role: dict[str, Tensor] = {
                input_.role: flip(input_, values[input_.name]) for input_ in site.inputs()
            }
            weight = twin.get_parameter(row.site.weight)
            own = kind_of(row).from_inputs(row.site, weight, by_role)
            by_role = {
                input_.role: own.get(input_.role, by_role[input_.role]) for input_ in site.inputs()
            }
            for name, input_ in zip(_parameters(row), site.inputs(), strict=True):
                owner, _, leaf = name.rpartition(".")
                value = nn.Parameter(by_role[input_.role], requires_grad=False)
                twin.get_submodule(owner)._parameters[leaf] = value
        twin.__dict__["_lora_fx"] = self._foldable()
        dense, _ = merge(twin, adapter_names=_ADAPTER, storage=Storage(keep=keep))
        return FlatModel(dense, self.arguments, self.call).eval()

    def loose_biases(self) -> set[str]:
        """Return the names of bias inputs that cannot be merged: their operation has no bias parameter."""
        return {
            input_.name
            for row, site in zip(self._made.rows, self.manifest.sites, strict=True)
            for input_ in site.inputs()
            if input_.role == "bias" and row.site.bias is None
        }

    def _foldable(self) -> Record:
        """Return the record without the biases of :meth:`loose_biases`, so that it can be merged."""
        record = self._made.record
        adapter = record.adapters[_ADAPTER]
        rows = tuple(
            row if row.site.bias else dataclasses.replace(row, kind=_unbiased(row))
            for row in adapter.sites
        )
        return dataclasses.replace(
            record, adapters={_ADAPTER: dataclasses.replace(adapter, sites=rows)}
        )

    def over(self, model: nn.Module) -> FactorModel:
        """Return a :class:`FactorModel` of the same call around another copy of the model."""
        other = FactorModel(self._made, model, self.arguments, self.call).eval()
        other.rank = self.rank
        return other

    def extras(self) -> tuple[Extra, ...]:
        """Return the adapter inputs as extra arguments for torch.export, with examples and dynamic axes.

        Both factors of a site share one rank. Each site has its own rank, unless there is one for all.
        """
        extras = []
        if self.rank is not None:
            for site in self.manifest.targets:
                for input_ in site.inputs():
                    shape = input_.sized(-(-self.rank // site.groups) * site.groups)
                    dtype = getattr(torch, input_.dtype)
                    example = torch.zeros(shape, dtype=dtype, device=self.device)
                    fixed = dict.fromkeys(range(len(shape)), Dim.STATIC)
                    extras.append(Extra(input_.name, example, fixed, shape, None))
            return tuple(extras)
        for index, site in enumerate(self.manifest.targets):
            rank = f"lora_rank_{index}"
            dim = Dim(rank, min=1)
            for input_ in site.inputs():
                # A of a grouped convolution has the rank of all groups, B the rank of a single group.
                times = site.groups // input_.multiple
                dims: dict[int, object] = dict.fromkeys(range(len(input_.shape)), Dim.STATIC)
                if input_.rank_axis is not None:
                    dims[input_.rank_axis] = dim * times if times > 1 else dim
                label = f"{times}*{rank}" if times > 1 else rank
                labels = tuple(label if size is None else size for size in input_.shape)
                plain = input_.rank_axis if times == 1 else None
                shape, dtype = input_.sized(2 * site.groups), getattr(torch, input_.dtype)
                example = torch.zeros(shape, dtype=dtype, device=self.device)
                extras.append(Extra(input_.name, example, dims, labels, plain))
        return tuple(extras)


class _Called(nn.Module):
    """Module that calls a model through a function, because ``functional_call`` takes a module."""

    def __init__(self, model: nn.Module, call: Callable[..., object]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> object:
        return self.call(self.model, *args, **kwargs)


def flip(entry: AdapterInput, tensor: Tensor) -> Tensor:
    """Return a view that converts an adapter input to its parameter, or back.

    A file multiplies matrices as they are: A is [in, r] and B is [r, out]. Parameters are transposed. The
    factors of a convolution are the same in both.
    """
    matrix = entry.role in ("A", "B") and not entry.conv
    return tensor.mT if matrix else tensor


def random_factors(
    manifest: Manifest, rank: int, seed: int = 0, max_rank: int | None = None
) -> dict[str, Tensor]:
    """Return a random adapter, to check that a file computes the same as the model.

    Args:
        manifest: The adapter inputs of the file.
        rank: The lowest rank. Sites differ by up to 2, and grouped convolutions need a multiple of their
            groups. The rank of a bank is the upper limit.
        seed: Seed of the random numbers.
        max_rank: The highest rank that a file without a bank takes; None for any.

    Returns:
        Values by the names of the inputs. A keeps the magnitude of its input, and B scales it to a tenth. A
        matrix among the parameters keeps the magnitude, too, and a vector is close to 1. Sites that read one
        of the parameters have neutral values, because no adapter has both factors and the parameter.
    """
    draw = torch.Generator().manual_seed(seed)
    most = max_rank if manifest.bank is None else manifest.bank.rank
    values: dict[str, Tensor] = {}
    whole = [parameter.name for parameter in manifest.parameters if len(parameter.shape) > 1]
    for index, site in enumerate(manifest.sites):
        if any(name.startswith(f"{site.name}.") for name in whole):
            values |= {input_.name: input_.fill(site.least_rank) for input_ in site.inputs()}
            continue
        # Ranks differ between sites, which reveals ranks that were mixed up.
        ranked = site.groups * max(1, (rank + index % 3) // site.groups)
        ranked = ranked if most is None else min(ranked, max(most, site.groups))
        for input_ in site.inputs():
            shape = input_.sized(ranked)
            value = torch.randn(shape, generator=draw)
            if input_.role == "A" and site.family != "embedding":
                value /= (
                    max(1, value[..., 0].numel() if not input_.conv else value[0].numel()) ** 0.5
                )
            elif input_.role in ("B", "gain"):
                value *= 0.1 / ranked**0.5 if input_.role == "B" else 0.1
            assert input_.neutral is not None
            values[input_.name] = (input_.neutral + value).to(input_.torch_dtype)
    for target in manifest.tokens:
        tokens, rows = target.names
        values[tokens] = torch.randperm(target.vocabulary, generator=draw)[: target.shape[0]]
        values[rows] = torch.randn(target.shape, generator=draw).to(getattr(torch, target.dtype))
    for parameter in manifest.parameters:
        value = torch.randn(parameter.shape, generator=draw)
        if value.dim() < 2:
            value = 1 + 0.1 * value
        else:
            value /= max(1, value[0].numel()) ** 0.5
        values[parameter.name] = value.to(getattr(torch, parameter.dtype))
    return values


def site_inputs(model: nn.Module, row: PlannedSite) -> SiteInputs:
    """Return the inputs of a file for one site of a rewritten model."""
    site, conv = row.site, row.site.family == "conv"
    roles = {slot.role for slot in kind_of(row).slots(site)}
    shapes = pattern_of(site).factors(site, site.groups)
    a: tuple[int | None, ...] = (None, *shapes.a[1:]) if conv else (*shapes.a[:0:-1], None)
    b: tuple[int | None, ...] = (shapes.b[0], None, *shapes.b[2:]) if conv else (None, shapes.b[0])
    if shapes.stacked:
        a, b = (shapes.a[0], shapes.a[2], None), (shapes.b[0], None, shapes.b[1])
    if site.quantized is None:
        dtype = model.get_parameter(site.weight).dtype
    else:  # its values are in the dtype of the activations
        dtype = DTYPES.get(dtype_name(model), torch.float32)
    return SiteInputs(
        row.name,
        site.family,
        str(dtype).removeprefix("torch."),
        a,
        b,
        site.out_features,
        site.groups,
        bias="bias" in roles,
        gain="gain" in roles,
    )


def _parameter_input(model: nn.Module, name: str) -> ParameterInput:
    value = replaceable(model, name)
    return ParameterInput(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))


def _token_inputs(model: nn.Module, row: PlannedTokens) -> TokenInputs:
    dtype = str(model.get_parameter(row.site.weight).dtype).removeprefix("torch.")
    vocabulary, width = row.site.weight_shape
    return TokenInputs(row.name, dtype, (len(row.indices), width), vocabulary)


def _unbiased(row: PlannedSite) -> str:
    """Return the name of a site's kind with the bias on B left out."""
    slots = kind_of(row).slots(row.site)
    return kind_with([slot.name for slot in slots if slot.role != "bias"], row.site)


def _parameters(row: PlannedSite) -> list[str]:
    """Return the FQNs of the parameters of a site, in the order of its inputs."""
    return [join(row.site.holder, name, _ADAPTER) for name in factor_names(row).present]
