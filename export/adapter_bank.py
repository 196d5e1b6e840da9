"""Banks: stacks of adapters, from which each row of a batch chooses its own adapter.

The module has the model that is exported with a bank, and the store of adapters in a session of such a file.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    fill_tokens,
    ranks_of,
)
from lora_fx.export.adapter_store import AdapterChoice, AdapterStore, HeldAdapter
from lora_fx.export.arguments import Arguments, Extra, named_outputs
from lora_fx.export.factor_model import FactorModel, Swappable
from lora_fx.export.inspection import read_defaults
from lora_fx.export.ort import Bound
from lora_fx.export.report import BankSize
from lora_fx.ir import META_KEY, PlannedSite, Region, Role, Tag, is_base, join, tag_of
from lora_fx.passes.graph import copy_graph, erase_dead, target_of
from lora_fx.passes.parameters import factor_names
from lora_fx.runtime.kernels import branch
from lora_fx.runtime.rows import Follower, banked, follow, unfollow

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "AdapterBank",
    "BankModel",
    "check_bank_sites",
    "check_ranks",
    "constant_tensor",
    "make_bank_overridable",
    "prove_rows",
    "put",
    "row_editor",
    "stacked",
]

# --- the model of a bank --------------------------------------------------------------------------


_SLOTS = "lora_slots"
"""Name of the buffer, next to the factors of a site, with the slot of the adapter of each row."""

_aten = torch.ops.aten
_LINEAR = (F.linear,)
_CONVOLUTIONS = (
    *(F.conv1d, F.conv2d, F.conv3d),
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
)


def check_bank_sites(rows: Sequence[PlannedSite]) -> None:
    """Raise if the rows of a batch cannot each have their own factors at a site.

    Raises:
        ExportError: The message names the sites and what to do.
    """
    refused: dict[str, list[str]] = {}
    for row in rows:
        for reason in _objections(row):
            refused.setdefault(reason, []).append(row.name)
    if refused:
        reasons = "; ".join(f"{some(names)}: {reason}" for reason, names in refused.items())
        raise ExportError(
            f"no bank of adapters can be at {reasons}. Leave them out of target_modules, or export with "
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
    manifest: Manifest, values: Mapping[str, Tensor], description: str, max_rank: int | None = None
) -> None:
    """Raise if the rank of an adapter is above the rank of the bank.

    Args:
        manifest: The manifest of the file.
        values: The values of the adapter by input name.
        description: Description of the adapter for the message.
        max_rank: The highest rank that the session accepts, if it is lower.

    Raises:
        CheckpointError: The message names the sites and what to do.
    """
    bank = manifest.bank
    assert bank is not None
    ranks = ranks_of(manifest, values)
    if max_rank is not None and max_rank < bank.rank:
        check_values(manifest, values, description, max_rank)
    high = {site: rank for site, rank in ranks.items() if rank > bank.rank}
    if high:
        most = max(high.values())
        sites = some([f"{site} has rank {rank}" for site, rank in high.items()])
        raise CheckpointError(
            f"{description} does not fit the bank, which has rank {bank.rank}: {sites}. Export the model "
            f"again with max_rank={most} or more"
        )


def stacked(
    manifest: Manifest, adapters: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Stack the values of adapters into one bank for each adapter input, [slots, ...].

    Args:
        manifest: The manifest of the file.
        adapters: Values by input name. An input that an adapter lacks gets its neutral value.
        base: The base's values of the manifest's parameters, by name.

    Returns:
        The banks by input name. Slot 0 is the base; the adapters follow in order. Factors are padded with
        zeros to the bank's rank.
    """
    bank = manifest.bank
    assert bank is not None
    stacks = {}
    for entry in manifest.inputs.values():
        neutral = base[entry.name] if entry.name in base else entry.fill(bank.rank)
        whole = neutral.repeat(1 + len(adapters), *[1] * neutral.dim())
        for slot, values in enumerate(adapters, start=1):
            put(whole[slot], entry, values.get(entry.name), neutral)
        stacks[entry.name] = whole
    return stacks


def put(slot: Tensor, entry: AdapterInput, value: Tensor | None, neutral: Tensor) -> None:
    """Write an adapter's ``value`` into a slot of a bank. The rest, or all without a value, is neutral."""
    slot.copy_(neutral)
    if value is not None:
        axis = entry.rank_axis
        part = slot if axis is None else slot.narrow(axis, 0, value.shape[axis])
        part.copy_(value)


# --- the graphs ---------------------------------------------------------------------------------------


def row_editor(
    model: nn.Module, rows: Sequence[PlannedSite]
) -> Callable[[Region], fx.Graph | None]:
    """Return a function that edits the graph of a region so that its branches read stacks of factors.

    An edited branch picks the factors of each row by the slot of the row. The function returns None for a
    region without branches.

    Args:
        model: A copy with one adapter. A buffer of slots is added next to the factors of each site.
        rows: The sites of the adapter.
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
    """Return the tag of a node of a branch, or None for any other node."""
    tag = tag_of(node)
    return tag if tag is not None and tag.adapter else None


class _Work:
    """Editor of one graph for :func:`row_editor`: makes its branches read the factors of each row."""

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
        """Make a node of a branch read the factor, bias or gain of each row's adapter."""
        tag = _tag(node)
        assert tag is not None
        target = target_of(node)
        if tag.role in (Role.DOWN, Role.UP) and any(target is operation for operation in _LINEAR):
            x, factor, *bias = node.args
            self._replace(node, banked.banked_linear, x, factor, self._read_slots(node), *bias)
        elif tag.role is Role.DOWN and any(target is operation for operation in _CONVOLUTIONS):
            x, kernel, _, *geometry = node.args
            taken = (x, kernel, self._read_slots(node), *geometry[:3])
            self._replace(node, banked.banked_conv, *taken)
        elif tag.role is Role.UP and any(target is operation for operation in _CONVOLUTIONS):
            taken = (*node.args[:2], self._read_slots(node), node.args[2])
            self._replace(node, banked.banked_pointwise, *taken)
        elif target is branch.spread and self._has_channels(node):
            self._replace(node, banked.spread_channels, *node.args[:2], named=False)
        elif tag.role is Role.DOWN and target is F.embedding:
            x, table = node.args[:2]
            assert isinstance(table, fx.Node)
            self._replace(node, banked.banked_embedding, x, table.args[0], self._read_slots(node))
        elif tag.role is Role.DOWN and target is torch.t:
            pass  # an embedding reads the stack without the transpose
        elif node.op == "get_attr" and self._is_vector(node):
            self._spread(node)
        elif tag.role in (Role.DOWN, Role.UP) and target is not operator.add:
            site = join(self._fqn, tag.weight)
            raise ExportError(
                f"no bank of adapters can be at {site}: its branch has "
                f"{getattr(target, '__name__', target)}, which has no form with factors for each row. Leave "
                "it out of target_modules, or export with adapters='inputs'"
            )

    def _is_vector(self, node: fx.Node) -> bool:
        """Return True if a node reads a vector that the kind of adapter adds: a bias or a gain."""
        return str(node.target).rpartition(".")[0].rpartition(".")[2] in self._vectors

    def _spread(self, node: fx.Node) -> None:
        """Replace the read of a bias or a gain by a read of each row's bias or gain from the stack."""
        base = self._base_of(node)
        with self._graph.inserting_after(node):
            rows = self._graph.call_function(banked.banked_vector)
        slots = self._read_slots(node)
        node.replace_all_uses_with(rows)
        rows.args = (node, slots, base, self._has_channels(node))
        rows.meta[META_KEY] = node.meta[META_KEY]

    def _has_channels(self, node: fx.Node) -> bool:
        """Return True if a node belongs to a convolution, which has channels on axis 1 of its output."""
        target = target_of(self._base_of(node))
        return any(target is operation for operation in _CONVOLUTIONS)

    def _base_of(self, node: fx.Node) -> fx.Node:
        """Return the base operation of a node's branch, the nearest one before the node."""
        wanted = node.meta[META_KEY].weight
        before = node.prev
        while before.op != "root":
            tag = tag_of(before)
            if tag is not None and tag.role is Role.BASE and tag.weight == wanted:
                return before
            before = before.prev
        raise AssertionError(node.format_node())

    def _read_slots(self, node: fx.Node) -> fx.Node:
        """Return the node that reads the slot of each row for a branch. The first call inserts the node."""
        tag = node.meta[META_KEY]
        if tag.weight not in self._slots:
            base = self._base_of(node)
            with self._graph.inserting_after(base):
                slots = self._graph.get_attr(join(self._holders[tag.weight], _SLOTS))
            slots.meta[META_KEY] = Tag(tag.weight, Role.ROWS, tag.adapter)
            self._slots[tag.weight] = slots
        return self._slots[tag.weight]

    def _replace(
        self, node: fx.Node, function: Callable[..., Tensor], *args: Any, named: bool = True
    ) -> None:
        tag = node.meta[META_KEY]
        keywords = {"weight": tag.weight} if named else {}
        with self._graph.inserting_before(node):
            replacement = self._graph.call_function(function, tuple(args), keywords)
        replacement.meta[META_KEY] = tag
        node.replace_all_uses_with(replacement)
        self._graph.erase_node(node)


# --- the model ----------------------------------------------------------------------------------------


class BankModel(FactorModel):
    """Model for the export of a bank: takes the tensors of a call, then ids of adapters, then the stacks.

    Args:
        prepared: The result of :func:`lora_fx.export.factor_model.swappable` with a bank.
        model: The model of ``prepared``, or a copy in another dtype.
        arguments: The arguments of the call.
        call: The function that calls the model.
        bank: The size of the bank.
        single: The same model with one adapter at a time.

    Attributes:
        bank: The size of the bank.
        single: The same model with one adapter at a time.
    """

    def __init__(
        self,
        prepared: Swappable,
        model: nn.Module,
        arguments: Arguments,
        call: Callable[..., object],
        bank: BankSize,
        single: FactorModel,
    ) -> None:
        super().__init__(prepared, model, arguments, call)
        self.bank = bank
        self.manifest = dataclasses.replace(self.manifest, bank=bank)
        self.__dict__["single"] = single  # not a submodule of this module
        self._slots = tuple(join(row.site.holder, _SLOTS) for row in prepared.rows)

    single: FactorModel

    def named(self, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Return the outputs with their names.

        Args:
            tensors: The tensors of the call, the ids, [rows], and the banks in the order of the inputs.
        """
        own = len(self.arguments.tensors)
        args, kwargs = self.arguments.fill(tensors[:own])
        ids, banks = tensors[own], tensors[own + 1 :]
        same = ids.shape[0] == tensors[self.batched].shape[0]
        torch_private.assert_true(same)
        # Any negative id means no adapter. Without the clamp, some providers would count from the end or
        # read garbage.
        slots = ids.clamp(min=-1) + 1
        values = dict.fromkeys((f"model.{name}" for name in self._slots), slots)
        values |= self.parameters_of(banks, slots)
        return named_outputs(self._called(values, self.call, *args, **kwargs))

    @property
    def batched(self) -> int:
        """Index of the tensor whose first axis is the batch: the first tensor with axes."""
        return next(i for i, tensor in enumerate(self.arguments.tensors) if tensor.dim())

    def over(self, model: nn.Module) -> BankModel:
        """Return a :class:`BankModel` of the same call around another copy of the model."""
        bank_model = BankModel(self._made, model, self.arguments, self.call, self.bank, self.single)
        bank_model.eval()
        return bank_model

    def extras(self) -> tuple[Extra, ...]:
        """Return the ids and the banks as inputs for torch.export."""
        rows = self.arguments.tensors[self.batched].shape[0]
        ids = torch.full((rows,), -1, dtype=torch.long, device=self.device)
        extras = [Extra(SLOTS_INPUT, ids, {0: Dim.AUTO}, (ROWS_AXIS,), None)]
        slots = Dim(SLOTS_AXIS, min=1)
        for entry in self.adapter_inputs:
            shape = entry.sized(self.bank.rank)
            neutral = entry.neutral
            dims: dict[int, object] = {0: slots}
            dims |= {axis + 1: Dim.STATIC for axis in range(len(shape))}
            example = torch.full(
                (_SLOTS_IN_EXAMPLE, *shape),
                0.0 if neutral is None else neutral,
                dtype=entry.torch_dtype,
                device=self.device,
            )
            extras.append(Extra(entry.name, example, dims, (SLOTS_AXIS, *shape), 0))
        return tuple(extras)


_SLOTS_IN_EXAMPLE = 3


@torch.no_grad()
def prove_rows(model: BankModel) -> None:
    """Raise unless a run of the example shows that the rows of the batch stay independent.

    The example call runs with the same tracking of rows as a call inside :func:`lora_fx.adapter_ids`.

    Raises:
        ExportError: The message gives the reason and what to do.
    """
    tensors, name = model.arguments.tensors, type(model.model).__name__
    if SLOTS_INPUT in model.arguments.names:
        raise ExportError(
            f"{name} takes {SLOTS_INPUT!r} itself, which is what a bank of adapters is handed: export with "
            "adapters='inputs'"
        )
    instead = "Export with adapters='inputs', which runs one adapter for the whole batch"
    if not any(tensor.dim() for tensor in tensors):
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
        for tensor in (*tensors, extras[0]):
            follower.enter(tensor)
        follow(follower)
        try:
            with follower:
                outputs = model.named([*tensors, *extras])
        finally:
            unfollow()
        follower.check_results([value for _, value in outputs])
    except ConfigError as error:
        reason = str(error).partition(". adapter_ids needs")[0]
        raise ExportError(f"{name} takes no bank of adapters: {reason}. {instead}") from error
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
    model: ir.Model, manifest: Manifest, banks: Mapping[str, Tensor], batched: str
) -> None:
    """Store the adapters of the model in the file, as the values of the bank inputs.

    The values are defaults that a run may override, or constants if the manifest requires all inputs. The
    input of ids has no default.

    Args:
        model: Changed in place. Its inputs have the names of the manifest.
        manifest: The adapter inputs.
        banks: The stacks of :func:`stacked`, by input name.
        batched: Name of an input whose first axis is the batch.

    Raises:
        ExportError: The graph reads the number of ids in a way that cannot be replaced by the batch size.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    for name, value in banks.items():
        port = inputs[name]
        port.const_value = constant_tensor(name, value)
        model.graph.register_initializer(port)
    ids = inputs[SLOTS_INPUT]
    adapter_inputs = {inputs[name] for name in banks}
    _part_rows_from_batch(model, ids, inputs[batched], {ids, *adapter_inputs})
    if manifest.required:
        for value in adapter_inputs:
            model.graph.inputs.remove(value)


def constant_tensor(name: str, value: Tensor) -> ir.TensorProtocol:
    """Convert a tensor on the CPU to the value of an ONNX initializer."""
    import onnx_ir as ir

    if value.dtype == torch.bfloat16:
        raw = value.view(torch.uint16).numpy().view(ir.DataType.BFLOAT16.numpy())
        return ir.tensor(raw, dtype=ir.DataType.BFLOAT16, name=name)
    return ir.tensor(value, name=name)


def _part_rows_from_batch(
    model: ir.Model, rows: ir.Value, batched: ir.Value, adapter_inputs: set[ir.Value]
) -> None:
    """Allow the ids to have one element for the whole batch as well as one for each row.

    In the trace, the number of ids equals the size of the batch. Reads of the number of ids become reads of
    the batch size. The first axis of values computed from ids and banks alone gets another name, because
    ONNX Runtime shares memory between values whose axes have the same name.
    """
    import onnx_ir as ir

    known = set(adapter_inputs)
    from_ids = {rows}
    for node in model.graph:
        reads_ids = any(value in from_ids for value in node.inputs)
        if reads_ids and node.op_type in ("Shape", "Size"):
            _read_size(node, batched)
            continue
        constant = [value is None or value.const_value is not None for value in node.inputs]
        if not any(value in known for value in node.inputs) or not all(
            value in known or fixed for value, fixed in zip(node.inputs, constant, strict=True)
        ):
            continue
        known.update(node.outputs)
        if not reads_ids:
            continue
        from_ids.update(node.outputs)
        for output in node.outputs:
            if output.shape is not None and len(output.shape):
                output.shape = ir.Shape([ROWS_AXIS, *list(output.shape)[1:]])


def _read_size(node: ir.Node, batched: ir.Value) -> None:
    """Change a node that reads the number of ids to read the size of the batch.

    Raises:
        ExportError: The node reads other sizes too.
    """
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
    """Store of a session's adapters by name, for a file with a bank: one stack for each factor.

    Threads may use, load and unload adapters at once.
    A stack is never written after it was handed out. Loading or unloading an adapter creates new stacks,
    and runs that have begun finish with the old ones. Before the first change the file's stacks are used.

    Args:
        path: The file, whose adapters are in the bank from the start.
        fixed: True if the stacks are constants of the file, so that nothing can be loaded.
    """

    path: Path | None = None
    fixed: bool = False

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
        """Names of the adapters, in the order in which they were loaded."""
        with self._lock:
            return tuple(self._names)

    def load(self, name: str, values: Mapping[str, Tensor], description: str) -> None:
        """Put an adapter into the bank. It replaces an adapter of the same name.

        Raises:
            CheckpointError: The values do not match the inputs of the file, or do not fit into its bank. The
                bank is then unchanged.
            ConfigError: The bank is full, or its adapters are constants of the file.
        """
        self._check_open()
        values = fill_tokens(self.manifest, values)
        check_values(self.manifest, values, description)
        check_ranks(self.manifest, values, description, self.max_rank)
        with self._lock:
            slots = {key: slot for key, slot in self._names.items() if key != name}
            if len(slots) >= self._size.capacity:
                raise ConfigError(
                    f"the bank of {self.file} is full, it has {some(list(map(repr, slots)))}: unload one "
                    f"(unload_adapter), or export the model again with max_adapters above "
                    f"{self._size.capacity}"
                )
            free = next(n for n in range(1, len(slots) + 2) if n not in slots.values())
            self._write(free, values, {**slots, name: free})
            self._ranks[name] = ranks_of(self.manifest, values)

    def unload(self, name: str) -> None:
        """Remove an adapter from the bank. Runs that have begun with it finish with it.

        Raises:
            ConfigError: There is no such adapter, or it is a constant of the file.
        """
        self._check_open()
        with self._lock:
            slot = self._slot(name)
            remaining = {key: index for key, index in self._names.items() if key != name}
            self._write(slot, {}, remaining)
            self._ranks.pop(name, None)

    def chosen(self, choice: AdapterChoice | HeldAdapter) -> HeldAdapter:
        """Look up the adapters of a run by name. A :class:`HeldAdapter` is returned unchanged.

        Args:
            choice: A name or None for all rows, or a list with a name or None for each row.

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
            ids = torch.tensor([self._slot(name) - 1 for name in rows])
            bound = self._bound
        fed = self._placed({SLOTS_INPUT: ids})
        return HeldAdapter({}, bound, {}, len(rows) if several else None, fed)

    def _check_open(self) -> None:
        """Raise if no adapter can be loaded or unloaded, because the adapters are constants of the file."""
        if self.fixed:
            cause = (
                "it was exported with required_inputs=True"
                if self.manifest.required
                else "a tool took them for constants"
            )
            raise ConfigError(
                f"the adapters of {self.file} are constants ({cause}), which cannot be replaced: export the "
                "model again, with its adapters or without required_inputs"
            )

    def _slot(self, name: object) -> int:
        if is_base(name):
            return 0
        if not isinstance(name, str) or name not in self._names:
            has = ", ".join(map(repr, self._names)) or "none"
            raise ConfigError(
                f"there is no adapter {name!r}: the bank of {self.file} has {has}; load_adapter(name, file) "
                "adds one"
            )
        return self._names[name]

    def _write(self, slot: int, values: Mapping[str, Tensor], names: dict[str, int]) -> None:
        """Create new stacks with the values of an adapter in a slot."""
        count = 1 + max(names.values(), default=0)
        before = self._file_banks() if self._banks is None else self._banks
        banks = {}
        for entry in self.manifest.inputs.values():
            old = before[entry.name]
            neutral = old[0]
            new = neutral.repeat(count, *[1] * neutral.dim())
            shared = min(count, len(old))
            new[:shared] = old[:shared]
            if slot < count:
                put(new[slot], entry, values.get(entry.name), neutral)
            banks[entry.name] = new
        self._bound = Bound(self._placed(banks))
        self._banks, self._names = banks, names

    def _file_banks(self) -> dict[str, Tensor]:
        """Read the stacks from the file, because ONNX Runtime does not expose them."""
        assert self.path is not None
        return read_defaults(self.path, tuple(self.manifest.inputs))
