"""A model in which each row of a batch has its own adapter, out of a bank: as torch.export sees it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

from lora_fx.errors import CheckpointError, ConfigError, ExportError, some
from lora_fx.export.adapter_manifest import (
    ROWS_AXIS,
    SLOTS_AXIS,
    SLOTS_INPUT,
    AdapterInput,
    Manifest,
    check_values,
    ranks_of,
)
from lora_fx.export.arguments import Arguments, Extra, named_outputs
from lora_fx.export.factor_model import FactorModel, Swappable
from lora_fx.export.report import BankSize
from lora_fx.ir import META_KEY, PlannedSite, Region, Role, Tag, join
from lora_fx.passes.graph import copy_graph, erase_dead, target_of
from lora_fx.passes.parameters import factor_names
from lora_fx.runtime import Follower, banked, follow, ops, unfollow

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "BankModel",
    "check_bank_sites",
    "check_ranks",
    "make_bank_overridable",
    "prove_rows",
    "put",
    "row_editor",
    "stacked",
]


_SLOTS = "lora_slots"
"""Name of the buffer beside the factors of a site that says which slot each row has."""

_aten = torch.ops.aten
_LINEAR = (F.linear, torch._C._nn.linear)
_CONVOLUTIONS = (
    *(F.conv1d, F.conv2d, F.conv3d),
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
)


def check_bank_sites(rows: Sequence[PlannedSite]) -> None:
    """Refuse sites at which rows cannot have factors of their own.

    Raises:
        ExportError: With the sites, and what to do.
    """
    why: dict[str, list[str]] = {}
    for row in rows:
        for reason in _objections(row):
            why.setdefault(reason, []).append(row.name)
    if why:
        found = "; ".join(f"{some(names)}: {reason}" for reason, names in why.items())
        raise ExportError(
            f"no bank of adapters can be at {found}. Leave them out of target_modules, or export with "
            "adapters='inputs', which runs one adapter for the whole batch"
        )


def _objections(row: PlannedSite) -> Iterator[str]:
    if row.site.experts:
        yield "the rows of experts are tokens sorted by expert, not rows of the batch"
    elif row.site.family == "conv" and (row.site.groups > 1 or row.site.layout == "in_out"):
        yield "a convolution with groups, or a transposed one, has no form with a kernel for each row"
    elif any(call.pattern == "einsum" for call in row.site.calls):
        yield "an einsum, in which any letter may be the batch"
    elif any(call.left for call in row.site.calls):
        yield "the weight is on the left of its product, so that the rows are features"


def check_ranks(
    manifest: Manifest, values: Mapping[str, Tensor], what: str, max_rank: int | None = None
) -> None:
    """Refuse an adapter whose rank is above that of the bank.

    Args:
        manifest: What the file takes.
        values: The adapter, by the names of the inputs.
        what: What it is, for the message.
        max_rank: The highest rank that a session takes, if that is lower.

    Raises:
        CheckpointError: With the places, and what to do.
    """
    bank = manifest.bank
    assert bank is not None
    ranks = ranks_of(manifest, values)
    if max_rank is not None and max_rank < bank.rank:
        check_values(manifest, values, what, max_rank)
    high = {site: rank for site, rank in ranks.items() if rank > bank.rank}
    if high:
        most = max(high.values())
        places = some([f"{site} has rank {rank}" for site, rank in high.items()])
        raise CheckpointError(
            f"{what} does not fit the bank, which has rank {bank.rank}: {places}. Export the model again "
            f"with max_rank={most} or more"
        )


def stacked(manifest: Manifest, adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The banks of some adapters, by the names of the inputs, [slots, ...].

    Args:
        manifest: What the file takes.
        adapters: Values by name; what an adapter does not have changes nothing.

    Returns:
        Slot 0 changes nothing; the others follow in order. Factors are filled up with zeros.
    """
    bank = manifest.bank
    assert bank is not None
    found = {}
    for one in manifest.inputs.values():
        shape = (1 + len(adapters), *one.sized(bank.rank))
        whole = torch.full(shape, one.neutral, dtype=getattr(torch, one.dtype))
        for slot, values in enumerate(adapters, start=1):
            if one.name in values:
                put(whole[slot], one, values[one.name])
        found[one.name] = whole
    return found


def put(slot: Tensor, one: AdapterInput, value: Tensor | None) -> None:
    """Write an adapter's value, or what changes nothing, into its slot of a bank."""
    slot.fill_(one.neutral)
    if value is not None:
        axis = one.rank_axis
        part = slot if axis is None else slot.narrow(axis, 0, value.shape[axis])
        part.copy_(value)


# --- the graphs ---------------------------------------------------------------------------------------


def row_editor(
    model: nn.Module, rows: Sequence[PlannedSite]
) -> Callable[[Region], fx.Graph | None]:
    """What makes branches take stacks of factors, and read the slots of the rows.

    Args:
        model: A copy with one adapter. It gets a buffer with slots beside the factors of every site.
        rows: Where the adapter is.
    """
    for row in rows:
        device = model.get_parameter(row.site.weight).device
        slots = torch.zeros(1, dtype=torch.long, device=device)
        model.get_submodule(row.site.holder).register_buffer(_SLOTS, slots, persistent=False)
    vectors = frozenset(name for row in rows for name in factor_names(row).slots)

    def edit(region: Region) -> fx.Graph | None:
        if not any(_tag(node) for node in region.graph.nodes):
            return None
        graph = copy_graph(region.graph)
        work = _Work(graph, region.fqn, vectors)
        for node in list(graph.nodes):
            if _tag(node) is not None:
                work.edit(node)
        erase_dead(graph)
        graph.lint()
        return graph

    return edit


def _tag(node: fx.Node) -> Tag | None:
    """What a node of a branch does; None for any other."""
    tag = node.meta.get(META_KEY)
    return tag if isinstance(tag, Tag) and tag.adapter else None


class _Work:
    """One graph that is being edited."""

    def __init__(self, graph: fx.Graph, fqn: str, vectors: Collection[str]) -> None:
        self._graph, self._fqn, self._vectors = graph, fqn, vectors
        self._holders: dict[str, str] = {}
        self._slots: dict[str, fx.Node] = {}
        for node in graph.nodes:
            tag = node.meta.get(META_KEY)
            if _tag(node) and tag.role is Role.FACTOR and node.op == "get_attr":
                holder = str(node.target).rpartition(".")[0].rpartition(".")[0]
                self._holders.setdefault(tag.weight, holder)

    def edit(self, node: fx.Node) -> None:
        """Replace a node of a branch, if it reads a factor or a vector of one adapter."""
        tag = _tag(node)
        assert tag is not None
        target = target_of(node)
        if tag.role in (Role.DOWN, Role.UP) and any(target is one for one in _LINEAR):
            x, factor, *bias = node.args
            self._replace(node, banked.banked_linear, x, factor, self._read_slots(node), *bias)
        elif tag.role is Role.DOWN and any(target is one for one in _CONVOLUTIONS):
            x, kernel, _, *geometry = node.args
            taken = (x, kernel, self._read_slots(node), *geometry[:3])
            self._replace(node, banked.banked_conv, *taken)
        elif tag.role is Role.UP and any(target is one for one in _CONVOLUTIONS):
            taken = (*node.args[:2], self._read_slots(node), node.args[2])
            self._replace(node, banked.banked_pointwise, *taken)
        elif target is ops.spread and self._has_channels(node):
            self._replace(node, banked.spread_channels, *node.args[:2], named=False)
        elif tag.role is Role.DOWN and target is F.embedding:
            x, table = node.args[:2]
            assert isinstance(table, fx.Node)
            self._replace(node, banked.banked_embedding, x, table.args[0], self._read_slots(node))
        elif tag.role is Role.DOWN and target is torch.t:
            pass  # of an embedding: the stack is read as it is
        elif node.op == "get_attr" and self._is_vector(node):
            self._spread(node)
        elif tag.role in (Role.DOWN, Role.UP) and target is not operator.add:
            place = join(self._fqn, tag.weight)
            raise ExportError(
                f"no bank of adapters can be at {place}: its branch has "
                f"{getattr(target, '__name__', target)}, which has no form with factors for each row. Leave "
                "it out of target_modules, or export with adapters='inputs'"
            )

    def _is_vector(self, node: fx.Node) -> bool:
        """Whether a node reads a slot of the kind: a bias or a gain."""
        return str(node.target).rpartition(".")[0].rpartition(".")[2] in self._vectors

    def _spread(self, node: fx.Node) -> None:
        """Read a stack of vectors as those of the rows."""
        base = self._base_of(node)
        with self._graph.inserting_after(node):
            made = self._graph.call_function(banked.banked_vector)
        slots = self._read_slots(node)
        node.replace_all_uses_with(made)
        made.args = (node, slots, base, self._has_channels(node))
        made.meta[META_KEY] = node.meta[META_KEY]

    def _has_channels(self, node: fx.Node) -> bool:
        """Whether a node belongs to a convolution, whose outputs have their features second."""
        target = target_of(self._base_of(node))
        return any(target is one for one in _CONVOLUTIONS)

    def _base_of(self, node: fx.Node) -> fx.Node:
        """The nearest operation before a node to which it belongs."""
        wanted = node.meta[META_KEY].weight
        before = node.prev
        while before.op != "root":
            tag = before.meta.get(META_KEY)
            if isinstance(tag, Tag) and tag.role is Role.BASE and tag.weight == wanted:
                return before
            before = before.prev
        raise AssertionError(node.format_node())

    def _read_slots(self, node: fx.Node) -> fx.Node:
        """The slots beside the factors of a branch, read where they are first used."""
        tag = node.meta[META_KEY]
        if tag.weight not in self._slots:
            base = self._base_of(node)
            with self._graph.inserting_after(base):
                made = self._graph.get_attr(join(self._holders[tag.weight], _SLOTS))
            made.meta[META_KEY] = Tag(tag.weight, Role.ROWS, tag.adapter)
            self._slots[tag.weight] = made
        return self._slots[tag.weight]

    def _replace(
        self, node: fx.Node, function: Callable[..., Tensor], *args: Any, named: bool = True
    ) -> None:
        tag = node.meta[META_KEY]
        more = {"weight": tag.weight} if named else {}
        with self._graph.inserting_before(node):
            made = self._graph.call_function(function, tuple(args), more)
        made.meta[META_KEY] = tag
        node.replace_all_uses_with(made)
        self._graph.erase_node(node)


# --- the model ----------------------------------------------------------------------------------------


class BankModel(FactorModel):
    """A flat model that takes ids of adapters and their stacks after the tensors of the call.

    Args:
        made: What :func:`lora_fx.export.factor_model.swappable` has made with a bank.
        model: It again, or a copy that was cast.
        arguments: The call.
        call: How the model is called.
        bank: How large the bank is.
        single: The same model with one adapter at a time.

    Attributes:
        bank: How large the bank is.
        single: The same model with one adapter at a time.
    """

    def __init__(
        self,
        made: Swappable,
        model: nn.Module,
        arguments: Arguments,
        call: Callable[..., object],
        bank: BankSize,
        single: FactorModel,
    ) -> None:
        super().__init__(made, model, arguments, call)
        self.bank = bank
        self.manifest = dataclasses.replace(self.manifest, bank=bank)
        self.__dict__["single"] = single  # no module of this one
        self._slots = tuple(join(row.site.holder, _SLOTS) for row in made.rows)

    single: FactorModel

    def named(self, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """The outputs with their names.

        Args:
            tensors: Those of the call, the ids, [rows], and the banks in the order of the inputs.
        """
        own = len(self.arguments.tensors)
        args, kwargs = self.arguments.fill(tensors[:own])
        ids, banks = tensors[own], tensors[own + 1 :]
        same = ids.shape[0] == tensors[self.batched].shape[0]
        torch._check(same)  # type: ignore[no-untyped-call]  # of torch
        # Whatever is negative means none. Other providers count from the end, or read anything.
        slots = ids.clamp(min=-1) + 1
        values = dict.fromkeys((f"model.{name}" for name in self._slots), slots)
        values |= {f"model.{name}": one for name, one in zip(self._places, banks, strict=True)}
        return named_outputs(self._called(values, self.call, *args, **kwargs))

    @property
    def batched(self) -> int:
        """Which tensor of the call has the batch first: the first one that has axes."""
        return next(i for i, one in enumerate(self.arguments.tensors) if one.dim())

    def over(self, model: nn.Module) -> BankModel:
        """The same call of another copy of its model."""
        made = BankModel(self._made, model, self.arguments, self.call, self.bank, self.single)
        made.eval()
        return made

    def extras(self) -> tuple[Extra, ...]:
        """The ids and the banks as torch.export sees them."""
        rows = self.arguments.tensors[self.batched].shape[0]
        ids = torch.full((rows,), -1, dtype=torch.long, device=self.device)
        found = [Extra(SLOTS_INPUT, ids, {0: Dim.AUTO}, (ROWS_AXIS,), None)]
        slots = Dim(SLOTS_AXIS, min=1)
        for one in self.adapter_inputs:
            shape = one.sized(self.bank.rank)
            dims: dict[int, object] = {0: slots}
            dims |= {axis + 1: Dim.STATIC for axis in range(len(shape))}
            example = torch.full(
                (_SLOTS_IN_EXAMPLE, *shape),
                one.neutral,
                dtype=getattr(torch, one.dtype),
                device=self.device,
            )
            found.append(Extra(one.name, example, dims, (SLOTS_AXIS, *shape), 0))
        return tuple(found)


_SLOTS_IN_EXAMPLE = 3


@torch.no_grad()
def prove_rows(model: BankModel) -> None:
    """Refuse a model of which it cannot be seen that each row of its batch stays by itself.

    The call of the example is followed, as inside :func:`lora_fx.adapter_ids`.

    Raises:
        ExportError: With the place, and what to do.
    """
    tensors, name = model.arguments.tensors, type(model.model).__name__
    if SLOTS_INPUT in model.arguments.names:
        raise ExportError(
            f"{name} takes {SLOTS_INPUT!r} itself, which is what a bank of adapters is handed: export with "
            "adapters='inputs'"
        )
    instead = "Export with adapters='inputs', which runs one adapter for the whole batch"
    if not any(one.dim() for one in tensors):
        raise ExportError(f"{name} takes no batch, so that no row can have its adapter. {instead}")
    rows = tensors[model.batched].shape[0]
    if rows < 2:
        raise ExportError(
            f"{name} runs on the example's batch of one only, so that it cannot be seen which rows are "
            f"whose: give example_inputs with two rows or more. {instead}"
        )
    extras = [extra.example for extra in model.extras()]
    follower = Follower(model.model, rows, 1)
    try:
        for one in (*tensors, extras[0]):
            follower.enter(one)
        follow(follower)
        try:
            with follower:
                outputs = model.named([*tensors, *extras])
        finally:
            unfollow()
        follower.check_results([value for _, value in outputs])
    except ConfigError as error:
        found = str(error).partition(". adapter_ids needs")[0]
        raise ExportError(f"{name} takes no bank of adapters: {found}. {instead}") from error
    if follower.by_values:
        raise ExportError(
            f"{name} takes no bank of adapters: values of the batch decide which rows are whose, so that "
            f"other values may be laid out otherwise. {instead}"
        )
    for output, value in outputs:
        if not value.dim() or value.shape[0] != rows or not follower.has_rows(value):
            raise ExportError(
                f"{name} takes no bank of adapters: its output {output!r} of shape {list(value.shape)} has "
                f"no row for each of the {rows} of the batch, of that one alone. {instead}"
            )


# --- the file -----------------------------------------------------------------------------------------


def make_bank_overridable(
    model: ir.Model, manifest: Manifest, adapters: Sequence[Mapping[str, Tensor]], batched: str
) -> None:
    """Give the ids and the banks defaults: no adapter for any row, and the adapters of the model.

    Args:
        model: Changed in place. Its inputs have the names of the manifest.
        manifest: The adapter inputs.
        adapters: Values by name, in the order of the manifest's bank.
        batched: Name of an input that has the batch first.

    Raises:
        ExportError: The graph reads the number of ids in a way that says nothing of the batch.
    """
    import onnx_ir as ir

    inputs = {value.name: value for value in model.graph.inputs}
    banks = stacked(manifest, adapters)
    defaults: dict[str, Any] = {SLOTS_INPUT: np.array([-1], np.int64)}
    for name, value in (*defaults.items(), *banks.items()):
        port = inputs[name]
        tensor = ir.tensor(value, dtype=port.dtype, name=name)
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            raw = value.contiguous().view(torch.uint16).numpy().view(ir.DataType.BFLOAT16.numpy())
            tensor = ir.tensor(raw, dtype=ir.DataType.BFLOAT16, name=name)
        port.const_value = tensor
        model.graph.register_initializer(port)
    _part_rows_from_batch(
        model, inputs[SLOTS_INPUT], inputs[batched], {inputs[name] for name in defaults | banks}
    )


def _part_rows_from_batch(
    model: ir.Model, rows: ir.Value, batched: ir.Value, given: set[ir.Value]
) -> None:
    """Let the ids have one element for the whole batch as well as one for each row.

    In the trace both axes have one size. Here the size of the batch is read from an input that has it, and
    what is computed of ids and banks alone has an axis of another name: ONNX Runtime takes memory of one
    value for another where their axes have one name.
    """
    import onnx_ir as ir

    known = set(given)
    of_ids = {rows}
    for node in model.graph:
        if not any(value in of_ids for value in node.inputs):
            continue
        if node.op_type in ("Shape", "Size"):
            _read_size(node, batched)
            continue
        fixed = [value is None or value.const_value is not None for value in node.inputs]
        if not all(value in known or one for value, one in zip(node.inputs, fixed, strict=True)):
            continue
        known.update(node.outputs)
        of_ids.update(node.outputs)
        for output in node.outputs:
            if output.shape is not None and len(output.shape):
                output.shape = ir.Shape([ROWS_AXIS, *list(output.shape)[1:]])


def _read_size(node: ir.Node, batched: ir.Value) -> None:
    """Have a node that reads the number of ids read that of the batch."""
    import onnx_ir as ir

    whole = node.inputs[0].shape if node.inputs[0] is not None else None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 2**31)
    if node.op_type != "Shape" or start != 0 or (end != 1 and (whole is None or len(whole) != 1)):
        raise ExportError(
            f"the graph reads the sizes of what is gathered for the rows ({node.op_type}), and not that of "
            "the batch: export with adapters='inputs', which runs one adapter for the whole batch"
        )
    node.replace_input_with(0, batched)
    node.attributes.add(ir.AttrInt64("start", 0))
    node.attributes.add(ir.AttrInt64("end", 1))
