"""Banks of adapters, out of which each row of a batch has its own: the model, and those of an open file."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

from lora_fx import torch_private
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
from lora_fx.export.adapter_store import AdapterChoice, AdapterStore, HeldAdapter
from lora_fx.export.arguments import Arguments, Extra, named_outputs
from lora_fx.export.factor_model import FactorModel, Swappable
from lora_fx.export.ort import Bound
from lora_fx.export.report import BankSize
from lora_fx.extras import load_optional
from lora_fx.ir import META_KEY, PlannedSite, Region, Role, Tag, join, tag_of
from lora_fx.passes.graph import copy_graph, erase_dead, target_of
from lora_fx.passes.parameters import factor_names
from lora_fx.runtime import Follower, banked, follow, ops, unfollow

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "AdapterBank",
    "BankModel",
    "check_bank_sites",
    "check_ranks",
    "make_bank_overridable",
    "prove_rows",
    "put",
    "row_editor",
    "stacked",
]

# --- the model of a bank --------------------------------------------------------------------------


_SLOTS = "lora_slots"
"""Name of the buffer beside the factors of a site that says which slot each row has."""

_aten = torch.ops.aten
_LINEAR = (F.linear,)
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
    tag = tag_of(node)
    return tag if tag is not None and tag.adapter else None


class _Work:
    """One graph that is being edited."""

    def __init__(self, graph: fx.Graph, fqn: str, vectors: Collection[str]) -> None:
        self._graph, self._fqn, self._vectors = graph, fqn, vectors
        self._holders: dict[str, str] = {}
        self._slots: dict[str, fx.Node] = {}
        for node in graph.nodes:
            tag = _tag(node)
            if tag is not None and tag.role is Role.FACTOR and node.op == "get_attr":
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
            tag = tag_of(before)
            if tag is not None and tag.role is Role.BASE and tag.weight == wanted:
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
        torch_private.assert_true(same)
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


# --- the adapters of a file that is open ----------------------------------------------------------


@dataclass(eq=False)
class AdapterBank(AdapterStore):
    """Adapters by name, in one stack for each factor. Threads may use, load and unload them at once.

    A stack is never written after it was handed out: an adapter that is loaded or unloaded makes new ones,
    and runs that have begun end with what they have. Until then the stacks of the file are used.

    Args:
        path: The file, whose adapters are in the bank from the start.
    """

    path: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        bank = self.manifest.bank
        assert bank is not None
        self._size = bank
        self._names = {name: slot for slot, name in enumerate(bank.adapters, start=1)}
        self._banks: Mapping[str, Tensor] | None = None
        self._bound = Bound()
        self._ranks: dict[str, Mapping[str, int]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they were loaded."""
        with self._lock:
            return tuple(self._names)

    def load(self, name: str, values: Mapping[str, Tensor], what: str) -> None:
        """Put an adapter into the bank. It replaces one of the same name.

        Raises:
            CheckpointError: The values are no adapter of the file, or do not fit into its bank. What was
                there still is.
            ConfigError: The bank is full.
        """
        check_values(self.manifest, values, what)
        check_ranks(self.manifest, values, what, self.max_rank)
        with self._lock:
            others = {key: slot for key, slot in self._names.items() if key != name}
            if len(others) >= self._size.capacity:
                raise ConfigError(
                    f"the bank of {self.file} is full, it has {some(list(map(repr, others)))}: unload one "
                    f"(unload_adapter), or export the model again with max_adapters above "
                    f"{self._size.capacity}"
                )
            free = next(n for n in range(1, len(others) + 2) if n not in others.values())
            self._write(free, values, {**others, name: free})
            self._ranks[name] = ranks_of(self.manifest, values)

    def unload(self, name: str) -> None:
        """Take an adapter out of the bank. A run that uses it ends with it.

        Raises:
            ConfigError: There is no such adapter.
        """
        with self._lock:
            slot = self._slot(name)
            others = {key: one for key, one in self._names.items() if key != name}
            self._write(slot, {}, others)
            self._ranks.pop(name, None)

    def chosen(self, choice: AdapterChoice | HeldAdapter) -> HeldAdapter:
        """The adapters to run with. What is held is returned as it is, also after others were loaded.

        Args:
            choice: A name or None for all rows, or a list with one for each row.

        Raises:
            ConfigError: There is no such adapter, or it is a weighted sum.
        """
        if isinstance(choice, HeldAdapter):
            return choice
        if isinstance(choice, Mapping):
            raise ConfigError(
                f"{self.file} has a bank, whose adapters run by name: add {some(list(map(repr, choice)))} up "
                "in the model (add_weighted_adapter) and load the sum"
            )
        several = isinstance(choice, Sequence) and not isinstance(choice, str)
        rows = list(choice) if several and choice is not None else [choice]
        if not rows:
            raise ConfigError("adapter is an empty list: give a name, or None, for each row")
        with self._lock:
            ids = torch.tensor([self._slot(one) - 1 for one in rows])
            bound = self._bound
        fed = self._placed({SLOTS_INPUT: ids})
        return HeldAdapter({}, bound, {}, len(rows) if several else None, fed)

    def _slot(self, name: object) -> int:
        if name is None:
            return 0
        if not isinstance(name, str) or name not in self._names:
            has = ", ".join(map(repr, self._names)) or "none"
            raise ConfigError(
                f"there is no adapter {name!r}: the bank of {self.file} has {has}; load_adapter(name, file) "
                "adds one"
            )
        return self._names[name]

    def _write(self, slot: int, values: Mapping[str, Tensor], names: dict[str, int]) -> None:
        """Make new stacks with something else in a slot."""
        count = 1 + max(names.values(), default=0)
        before = self._file_banks() if self._banks is None else self._banks
        banks = {}
        for one in self.manifest.inputs.values():
            old = before[one.name]
            new = torch.full((count, *old.shape[1:]), one.neutral, dtype=old.dtype)
            kept = min(count, len(old))
            new[:kept] = old[:kept]
            if slot < count:
                put(new[slot], one, values.get(one.name))
            banks[one.name] = new
        self._bound = Bound(self._placed(banks))
        self._banks, self._names = banks, names

    def _file_banks(self) -> dict[str, Tensor]:
        """The stacks in the file, which ONNX Runtime does not give out.

        Raises:
            ExportError: onnx is not installed, or the file is gone.
        """
        assert self.path is not None
        purpose = f"reading the adapters in {self.file}"
        for package in ("onnx", "onnx_ir"):
            load_optional(package, purpose, "lora-fx[onnx]", error=ExportError)
        import onnx
        from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

        try:
            proto = onnx.load(str(self.path), load_external_data=False)
            wanted = self.manifest.inputs
            found = {}
            for tensor in proto.graph.initializer:
                if tensor.name in wanted:
                    if uses_external_data(tensor):
                        load_external_data_for_tensor(tensor, str(self.path.parent))
                    found[tensor.name] = _read(tensor)
        except Exception as error:
            raise ExportError(
                f"{self.path} cannot be read again: were its files moved or changed while the session was "
                f"open? {error}"
            ) from error
        lost = [name for name in wanted if name not in found]
        if lost:
            raise CheckpointError(
                f"{self.file} lacks {some(lost)}: a tool took them for constants. Export the model again"
            )
        return found


def _read(tensor: Any) -> Tensor:
    import onnx_ir as ir

    value = ir.from_proto(tensor)
    if value.dtype == ir.DataType.BFLOAT16:
        return torch.frombuffer(bytearray(value.tobytes()), dtype=torch.bfloat16).view(
            *value.shape.numpy()
        )
    return torch.from_numpy(value.numpy().copy())
