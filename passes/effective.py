"""Adapted weights of a rewritten model, for code that reads a weight without running a graph.

Such code gets the weight with its adapters applied (an effective weight), and products with it are computed
by the functions that graphs call. :func:`arm` sets this up.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError, MergeError
from lora_fx.ir import (
    Capture,
    Pass,
    PlannedSite,
    PlannedTokens,
    Record,
    Region,
    Site,
    join,
    record_of,
    relative,
)
from lora_fx.kinds import kind_of, refusal
from lora_fx.passes.graph import Code, generated
from lora_fx.passes.insert import ROWS, Insert, SelectRows
from lora_fx.passes.match import ask
from lora_fx.passes.optimize import Deploy, Fuse, FuseRows
from lora_fx.passes.parameters import (
    DROPOUT,
    KEPT,
    factor_names,
    module_at,
    parameter_of,
    rows_name,
    rows_of,
    wide,
)
from lora_fx.passes.patterns import pattern_of, site_name
from lora_fx.runtime import CHANGES, EffectiveWeight, base_parameter, effective_weight, watch
from lora_fx.runtime.kernels import deployed
from lora_fx.runtime.rows import (
    PatchedWeight,
    RowParameter,
    SampleRows,
    SampleSlots,
    unwatch_tokens,
    watch_tokens,
)
from lora_fx.torch_private import pytree

__all__ = ["arm"]


_log = logging.getLogger("lora_fx")


@dataclasses.dataclass(frozen=True)
class _Row:
    """One adapter at one weight: the site, and the names of the adapter's parameters.

    Attributes:
        planned: The site, or rows of an embedding that are trained.
        adapter: The name of the adapter.
        parameters: Names of the adapter's parameters, relative to the module that has the weight.
        dropout: Name of the adapter's dropout, relative to that module; empty if it has none.
    """

    planned: PlannedSite | PlannedTokens
    adapter: str
    parameters: tuple[str, ...]
    dropout: str = ""


@dataclasses.dataclass(frozen=True)
class _Adapted:
    """Changes of the active adapters to a weight: a :class:`lora_fx.runtime.effective.Adapted`.

    Attributes:
        name: FQN of the weight.
        rows: The adapters at the weight. Those that train rows of an embedding come last.
        record: The record of the model.
        products: Generated functions that compute products with the weight, by the form of the call.
    """

    name: str
    rows: tuple[_Row, ...]
    record: Record = dataclasses.field(repr=False, compare=False)
    products: dict[Any, Callable[..., Any] | None] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    def __reduce__(self) -> Any:
        """Reduce to all fields except ``products``, because a copy generates its own functions."""
        return type(self), (self.name, self.rows, self.record)

    def read(self, owner: nn.Module, base: torch.Tensor) -> torch.Tensor:
        """Return the weight with its adapters applied, from the current factors of its module."""
        names = (name for row in self.rows for name in row.parameters)
        factors = tuple(_held(owner, name) for name in names)
        return effective_weight(_Change(self, owner, factors), base)


@dataclasses.dataclass(frozen=True)
class _OwnBySample:
    """A parameter of the base whose value depends on the adapter of each sample in a batch.

    Attributes:
        name: FQN of the parameter.
        adapters: The adapters that samples can have.
        tokens: The adapters that have trained rows of the parameter, with the rows.
    """

    name: str
    adapters: tuple[str, ...]
    tokens: tuple[tuple[str, PlannedTokens], ...] = ()

    def read(self, owner: nn.Module, base: torch.Tensor) -> torch.Tensor:
        """Return a parameter with a value for each sample: its adapter's value, or else the base's."""
        leaf = self.name.rpartition(".")[2]
        table = owner.get_submodule(ROWS)
        assert isinstance(table, SampleRows)
        slots = SampleSlots(table, self.adapters)
        stored = owner._modules.get(KEPT + leaf)
        result = base
        if stored is not None:
            tensors = stored.named_parameters(recurse=False), stored.named_buffers(recurse=False)
            own = dict(itertools.chain(*tensors))
            values = (own.get(adapter, base) for adapter in self.adapters)
            bank = torch.stack([base, *(value.to(base.dtype) for value in values)])
            result = RowParameter(self.name, bank, slots)
        if self.tokens:
            tokens, rows = self._trained(owner, base)
            result = PatchedWeight(self.name, result, tokens, rows, slots)
        return torch_private.as_parameter(result)  # isinstance(layer.weight, nn.Parameter) holds

    def _trained(self, owner: nn.Module, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens and their trained rows for all adapters, [slots, n] and [slots, n, width].

        The token -1 pads the list of an adapter with fewer tokens.
        """
        trained = dict(self.tokens)
        count = max(len(planned.indices) for planned in trained.values())
        indices = [[-1] * count]
        rows = [base.new_zeros(count, base.shape[1])]
        for adapter in self.adapters:
            planned = trained.get(adapter)
            if planned is None:
                indices.append(indices[0])
                rows.append(rows[0])
                continue
            own = _held(owner, relative(rows_name(planned, adapter), planned.site.owner))
            missing = count - len(planned.indices)
            indices.append([*planned.indices, *[-1] * missing])
            rows.append(F.pad(own, (0, 0, 0, missing)).to(base.dtype))
        return torch.tensor(indices, device=base.device), torch.stack(rows)


def _held(owner: nn.Module, name: str) -> torch.Tensor:
    """Return the current tensor of a factor by its name relative to ``owner``.

    It is the parameter, or a tensor with which a library has replaced the parameter.
    """
    holder, _, leaf = name.rpartition(".")
    factor: torch.Tensor = getattr(module_at(owner, holder), leaf)
    return factor


class _Change(NamedTuple):
    """Implementation of :class:`lora_fx.runtime.effective.Change`."""

    adapted: _Adapted
    owner: nn.Module
    factors: tuple[torch.Tensor, ...]
    transposed: bool = False

    @property
    def name(self) -> str:
        """Return the FQN of the weight."""
        return self.adapted.name

    def turned(self) -> _Change:
        """Return the change of the transposed weight."""
        return self._replace(transposed=not self.transposed)

    def applied(self, weight: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the weight with the changes of all sites, in its own shape and dtype."""
        self._check_weight_exists()
        first = self.adapted.rows[0].planned
        if isinstance(first, PlannedSite) and first.deploy is not None:
            result = _deployed(first, weight, factors)
            return result.mT if self.transposed else result
        site = self.adapted.rows[0].planned.site
        base = total = wide(site.applied(weight))
        pending = list(factors)
        for row in self.adapted.rows:
            values = [wide(pending.pop(0)) for _ in row.parameters]
            if isinstance(row.planned, PlannedSite):
                total = _with_rows(row.planned.site, total, _changed(row.planned, base, values))
            else:
                indices = torch.tensor(row.planned.indices, device=weight.device)
                stored = row.planned.site.stored(total).index_copy(0, indices, values[0])
                total = row.planned.site.applied(stored)
        result = site.stored(total).to(weight.dtype)
        return result.mT if self.transposed else result

    def product(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Compute a product with the weight by the functions that graphs call.

        A graph of this operation alone is matched, gets branches and is fused as any other graph, once for
        each form of the call.
        """
        if torch.compiler.is_compiling():
            return NotImplemented
        values, spec = pytree.tree_flatten((args, dict(kwargs)))
        indices = [index for index, value in enumerate(values) if isinstance(value, torch.Tensor)]
        weights = [index for index in indices if isinstance(values[index], EffectiveWeight)]
        if len(weights) != 1 or not self._is_current(values[weights[0]]):
            return NotImplemented
        constants = tuple(
            None if index in indices else repr(value) for index, value in enumerate(values)
        )
        key = (func, spec, constants, weights[0], self.transposed)
        known = self.adapted.products
        if key not in known:
            known[key] = _product_of(self, func, values, spec, weights[0])
        run = known[key]
        if run is None:
            return NotImplemented
        return run(self.owner, *(values[index] for index in indices if index != weights[0]))

    def _is_current(self, weight: EffectiveWeight) -> bool:
        """Return True unless the weight was detached, or the module's weight was replaced since."""
        if base_parameter(self.owner, self.name.rpartition(".")[2]) is not weight.base:
            return False
        wanted = any(factor.requires_grad for factor in self.factors)
        return weight.requires_grad or not (wanted and torch.is_grad_enabled())

    def _check_weight_exists(self) -> None:
        """Raise if the adapted weight does not exist as a single tensor.

        With dropout, or with an adapter for each sample, only products with the weight are defined.
        """
        for row in self.adapted.rows:
            kind = kind_of(row.planned) if isinstance(row.planned, PlannedSite) else None
            if kind is not None and kind.dynamic:
                raise CaptureError(
                    f"{self.name} is read by code that is no known product, and {refusal(kind)}"
                )
        if self.adapted.record.per_sample:
            raise CaptureError(
                f"{self.name} is read where each sample of a batch has its own adapter, and then only a "
                "product has a meaning: choose one adapter for the batch (lora_fx.set_adapter)"
            )
        for name in (row.dropout for row in self.adapted.rows if row.dropout):
            dropout: Any = module_at(self.owner, name)
            if dropout.training and dropout.p:
                raise CaptureError(
                    f"{self.name} is read by code that is no known product, and lora_dropout drops what is "
                    f"multiplied with it: set lora_dropout=0, or name {site_name(self.name)!r} in "
                    "exclude_modules"
                )

    def note(self, location: str) -> None:
        """Log that a line of code computes a whole adapted weight. Log each line of code once."""
        if watch.note_place(self.owner, self.name, location):
            _log.info(
                "%s is computed with its adapters as a whole at %s: right, and slower than a product",
                self.name,
                location,
            )


def _product_of(
    change: _Change, func: Any, values: list[Any], spec: Any, position: int
) -> Callable[..., Any] | None:
    """Return the function of a product with a weight, or None if no pattern matches it.

    Args:
        change: The change of the weight.
        func: The function of PyTorch.
        values: The arguments of the function, as a flat list.
        spec: The tree structure of the arguments.
        position: Index of the weight in ``values``.

    Returns:
        A function of the module and the other tensors.
    """
    adapted, owner = change.adapted, change.owner
    root = watch.root_of(owner)
    planned = [(row.planned, row.adapter) for row in adapted.rows]
    if root is None or not all(isinstance(row, PlannedSite) for row, _ in planned):
        return None
    fqn, _, leaf = adapted.name.rpartition(".")
    graph = fx.Graph()
    nodes = list(values)
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor) and index != position:
            nodes[index] = graph.placeholder(f"x{index}")
    weight = nodes[position] = graph.get_attr(leaf)
    if change.transposed:
        nodes[position] = graph.call_method("t", (weight,))
    args, named = pytree.tree_unflatten(nodes, spec)
    graph.output(graph.call_function(func, args, named))
    region = Region(fqn, owner, graph)
    site = next((seen for node in graph.nodes if isinstance(seen := ask(node, region), Site)), None)
    if site is None or site.weight != adapted.name:
        return None
    rows: dict[str, list[PlannedSite]] = defaultdict(list)
    for row, adapter in planned:
        assert isinstance(row, PlannedSite)
        if row.site.rows is not None or site.rows is not None or not row.site.is_like(site):
            return None
        moved = dataclasses.replace(row.site, calls=site.calls)
        rows[adapter].append(dataclasses.replace(row, site=moved))
    capture = Capture(root, {fqn: region}, "regions")
    for step in _branch_passes(adapted.record, rows):
        capture = step(capture).capture
    # Call ``func`` itself: if a library has replaced it, the replacement has already run and called ``func``.
    code = Code(capture.regions[fqn].graph, replaceable=False)
    function: Callable[..., Any] = generated(code.source, dict(code.namespace), "product")
    return function


def _branch_passes(record: Record, rows: Mapping[str, list[PlannedSite]]) -> Iterator[Pass]:
    """Yield the passes that insert the branches of adapters into the graph of a single operation."""
    yield from (Insert(tuple(planned), adapter) for adapter, planned in rows.items())
    if record.per_sample:
        yield FuseRows()
        yield SelectRows(frozenset())
        return
    if any(row.deploy for planned in rows.values() for row in planned):
        yield Deploy()
    if record.optimize:
        yield Fuse(record.memory)


def _changed(row: PlannedSite, base: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the change that a site's adapter makes to the rows of the weight that the site covers."""
    site, kind, names = row.site, kind_of(row), factor_names(row)
    values = dict(zip(names.present, tensors, strict=True))
    before = rows_of(site, base)
    change = torch.zeros_like(before)
    slots = kind.values(site, {name: values[name] for name in names.slots})
    if kind.low_rank:
        a, b = (values[name] for name in names.pair)
        try:
            a, b = (a.mT, b.mT) if row.tied else (a, b)
            a, b = kind.merged_factors(site, a, b, slots)
        except MergeError as error:
            raise CaptureError(
                f"{site.weight} is read by code that is no known product, and {error}"
            ) from error
        change = pattern_of(site).delta(site, a, b * row.scale).reshape(before.shape)
    if kind.transforms:
        change = kind.transformed(before + change, site, slots) - before
    return change


def _deployed(
    row: PlannedSite, weight: torch.Tensor, factors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return an adapted weight as it will be stored, in its own shape and dtype."""
    assert row.deploy is not None
    turned = row.site.layout == "in_out"
    matrix = weight.T if turned else weight
    values = deployed.straight_through(matrix, factors[0], factors[1], row.scale, row.deploy)
    return (values.T if turned else values).to(weight.dtype)


def _with_rows(site: Site, total: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Add a change to the rows of a weight that a site covers."""
    if site.rows is None:
        return total + change
    start, stop = site.rows
    size = total.shape[site.axis]
    before, after = (total.narrow(site.axis, *at) for at in ((0, start), (stop, size - stop)))
    return torch.cat((before, rows_of(site, total) + change, after), site.axis)


def arm(model: nn.Module) -> None:
    """Make ``layer.weight`` return the adapted weight in a rewritten model, and watch all other reads."""
    record = record_of(model)
    if record is not None:
        _place_changes(model, record)
        sites = (row for name in record.active for row in record.adapters[name].sites)
        if any(kind_of(row).reads_tokens for row in sites):
            watch_tokens(model)
        else:
            unwatch_tokens(model)
    watch.arm(model)


def _place_changes(model: nn.Module, record: Record) -> None:
    """Register the changes of the active adapters at the modules that own the weights."""
    weights: dict[str, list[_Row]] = defaultdict(list)
    for adapter in record.active:
        for planned in record.adapters[adapter].sites:
            weights[planned.site.weight].append(_row(planned, adapter))
    for adapter in record.placed:
        for tokens in record.adapters[adapter].tokens:
            name = relative(rows_name(tokens, adapter), tokens.site.owner)
            weights[tokens.site.weight].append(_Row(tokens, adapter, (name,)))
    for module in model.modules():
        module.__dict__.pop(CHANGES, None)
    for name, own in _own_by_sample(record).items():
        owner, _, leaf = name.rpartition(".")
        module_at(model, owner).__dict__.setdefault(CHANGES, {})[leaf] = own
    for weight, rows in weights.items():
        owner, _, leaf = weight.rpartition(".")
        # Only the layer's own forward reads the packed values of a quantized weight.
        opaque = any(row.planned.site.opaque for row in rows)
        if not opaque and parameter_of(model, weight) is not None:
            changes = module_at(model, owner).__dict__.setdefault(CHANGES, {})
            changes[leaf] = _Adapted(weight, tuple(rows), record)


def _own_by_sample(record: Record) -> dict[str, _OwnBySample]:
    """Return the parameters whose value depends on the adapter of each sample, by FQN."""
    tokens: dict[str, list[tuple[str, PlannedTokens]]] = {}
    for adapter in record.active if record.per_sample else ():
        for name in record.adapters[adapter].own:
            tokens.setdefault(name, [])
        for planned in record.adapters[adapter].tokens:
            tokens.setdefault(planned.site.weight, []).append((adapter, planned))
    return {name: _OwnBySample(name, record.active, tuple(own)) for name, own in tokens.items()}


def _row(planned: PlannedSite, adapter: str) -> _Row:
    holder = relative(planned.site.holder, planned.site.owner)
    names = tuple(join(holder, name, adapter) for name in factor_names(planned).present)
    return _Row(planned, adapter, names, join(holder, DROPOUT, adapter) if planned.dropout else "")
