"""Live bytes during a training step, operation by operation, and the tensors at the peak.

:class:`Timeline` is a ledger that also records the history of each storage: its module, operator, kind and
phase. :func:`write_page` draws the history as a page.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.files import replacing
from lora_fx.ir import folded
from lora_fx.tools.cluster import Ledger, tensors_inside
from lora_fx.tools.draw import fill_page
from lora_fx.torch_private import pytree

__all__ = [
    "Allocation",
    "Kind",
    "Operation",
    "Row",
    "Timeline",
    "document_of",
    "name_of",
    "write_page",
]

_COLUMNS = 1500
"""Number of groups of neighboring operations. Of each group, a page shows the operation with most bytes."""

_AROUND = 50
"""Number of operations on each side of the peak that a page shows one by one."""

_ROWS = 60
_NO_NODE = 2**63  # nodes that accumulate gradients have a larger number than any other node


class Kind(StrEnum):
    """Purpose of a storage, in the order of the bands from the bottom."""

    WEIGHTS = "frozen weights"
    ADAPTERS = "adapters"
    OPTIMIZER = "optimizer state"
    GRADIENTS = "gradients"
    CONSTANTS = "inputs and constants"
    GATHERED = "gathered blocks"
    ACTIVATIONS = "kept activations"
    RECOMPUTED = "recomputed activations"
    TEMPORARIES = "temporaries"


@dataclass(eq=False)
class Allocation:
    """A storage that is allocated during a training step.

    Attributes:
        module: Name of the module that owns the parameter, or whose forward or backward allocated the
            storage. The name of the root is empty.
        operator: Operator that allocated the storage, such as ``aten.mm``; empty if it existed before.
        phase: ``"forward"``, ``"backward"`` or ``"optimizer"``; empty if the storage existed before.
        shape: Shape of the first tensor in the storage.
        dtype: Dtype of the first tensor in the storage.
        tensor: Name of a parameter, a gradient or a state; empty for other tensors.
        purpose: Kind of the storage, or None if it is unknown. It then counts as temporary.
        size: Current number of bytes; 0 once the storage is freed.
    """

    module: str
    operator: str
    phase: str
    shape: tuple[int, ...]
    dtype: str
    tensor: str = ""
    purpose: Kind | None = None
    size: int = 0

    @property
    def kind(self) -> Kind:
        """Return the purpose of the memory; temporary if it is not known."""
        return self.purpose or Kind.TEMPORARIES

    @property
    def label(self) -> str:
        """Return the name of the tensor, or the operator that computed it."""
        return self.tensor or self.operator


class Operation(NamedTuple):
    """An operation of the step.

    Attributes:
        operator: Name of the operator, such as ``aten.mm``.
        module: Name of the module whose forward or backward ran the operation.
        phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        live: Live bytes at the end of the operation.
    """

    operator: str
    module: str
    phase: str
    live: int


@dataclass(frozen=True)
class Row:
    """Equal tensors at the peak, such as those of equal layers.

    Attributes:
        module: The module, or several modules as ``layers.{0-31}.mlp``.
        tensor: Name of the tensor, or the operator that computed it.
        kind: The kind of the tensors.
        phase: Phase that allocated the tensors; empty if they existed before the step.
        shape: The shape of each tensor.
        dtype: The dtype of each tensor.
        size: Bytes of each tensor.
        count: Number of tensors.
    """

    module: str
    tensor: str
    kind: str
    phase: str
    shape: str
    dtype: str
    size: int
    count: int


class Timeline(Ledger):  # type: ignore[no-untyped-call]
    """Ledger that records the history of each storage in the last step.

    It is for models without real values, in one thread. It registers no hooks, because lora-fx runs a module
    with hooks differently.

    Attributes:
        operations: The operations of the step.
        parts: Names of the parts of the model: blocks, and modules outside of blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.parts: list[str] = []
        self._allocations: dict[int, Allocation] = {}
        self._before: list[tuple[Allocation, int]] = []
        self._changes: list[tuple[int, Allocation, int]] = []
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        # The module of the autograd nodes from each sequence number on, in ascending order.
        self._numbers: list[int] = []
        self._modules: list[str] = []
        self._phase = self._operator = self._module = ""
        self._arguments: Any = ()
        self._seen: Tensor | None = None
        self._parent: str | None = None
        self._recomputed: int | None = None
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Timeline:
        self._patches.enter_context(self._follow_calls())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    # --- recording ---

    @contextlib.contextmanager
    def _follow_calls(self) -> Iterator[None]:
        """Track which module runs, while the context is open.

        A global module hook would make lora-fx keep other activations.
        """
        call: Callable[..., Any] = nn.Module.__call__

        def followed_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = self._names.get(id(module))
            if name is None:
                return call(module, *args, **kwargs)
            self._stack.append(name)
            self._assign_nodes(name)
            try:
                return call(module, *args, **kwargs)
            finally:
                self._stack.pop()
                self._parent = name.rpartition(".")[0] if torch_private.in_backward() else None
                self._assign_nodes(self._running_module())

        nn.Module.__call__ = followed_call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]

    def _assign_nodes(self, module: str) -> None:
        """Record that autograd nodes which are created from now on belong to a module."""
        if not self._modules or self._modules[-1] != module:
            self._numbers.append(torch_private.next_node_number())
            self._modules.append(module)

    def _running_module(self) -> str:
        """Return the name of the module whose forward or backward runs."""
        if self._stack:
            return self._stack[-1]
        if self._parent is not None and self._is_recomputing():
            # Checkpoints may run the forward of a module without a call, and its children with calls.
            return self._parent
        number = torch_private.running_node_number()
        if number is None:
            return ""
        if number >= _NO_NODE:
            return self._module
        index = bisect.bisect_right(self._numbers, number) - 1
        return self._modules[index] if index >= 0 else ""

    def _is_recomputing(self) -> bool:
        """Return True while the backward recomputes a part of the forward."""
        return torch_private.in_backward() and (bool(self._stack) or torch.is_grad_enabled())

    def begin(self, phase: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin a phase: ``"forward"``, ``"backward"`` or ``"optimizer"``. A forward begins a new step."""
        self._refresh_sizes()
        self._phase = phase
        if phase == "forward":
            self._begin_step(model, optimizer)
        elif phase == "backward":
            self._assign(Kind.ACTIVATIONS)
        else:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    self._name(model, name, parameter.grad, Kind.GRADIENTS, "gradient of ")

    def _begin_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self.parts = list(_parts(model))
        names: dict[Tensor, str] = {}
        for name, parameter in model.named_parameters():
            names[parameter] = name
            kind = Kind.ADAPTERS if parameter.requires_grad else Kind.WEIGHTS
            self._name(model, name, parameter, kind)
        for name, buffer in model.named_buffers():
            self._name(model, name, buffer, Kind.WEIGHTS)
        for trained, state in optimizer.state.items():
            for field, value in state.items():
                if isinstance(value, Tensor):
                    self._name(model, names[trained], value, Kind.OPTIMIZER, f"{field} of ")
        self._assign(Kind.CONSTANTS)
        self.operations.clear()
        self._changes.clear()
        self._numbers.clear()
        self._modules.clear()
        self._before = [(entry, entry.size) for entry in self._allocations.values()]
        for entry, _ in self._before:
            entry.phase = ""

    def _assign(self, kind: Kind) -> None:
        """Assign a kind to all live storages that have no kind yet."""
        for entry in self._allocations.values():
            entry.purpose = entry.purpose or kind

    def _name(self, model: nn.Module, name: str, tensor: Tensor, kind: Kind, of: str = "") -> None:
        """Store a parameter's module, name and kind in the record of a tensor's storage.

        The tensor is the parameter itself, its gradient, or a state of the optimizer.
        """
        module, _, leaf = name.rpartition(".")
        # A module without a forward holds parameters for its parent.
        while module and type(model.get_submodule(module)).forward is nn.Module.forward:
            module, _, part = module.rpartition(".")
            leaf = f"{part}.{leaf}"
        for inside in tensors_inside(tensor):
            entry = self._allocations.get(_key(inside))
            if entry is not None:
                entry.module, entry.tensor, entry.purpose = module, of + leaf, kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._follow_recomputation()
        self._operator = f"{func.namespace}.{func.overloadpacket.__name__}"
        self._module = self._running_module()
        self._assign_nodes(self._module)
        self._arguments = (args, kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._arguments, self._seen = (), None
        if result is NotImplemented:
            return result
        for key in self._gathered:
            self._allocations[key].purpose = Kind.GATHERED
        last = self.operations[-1].live if self.operations else -1
        if self._live > last or _computes(func, result):
            entry = Operation(self._operator, self._module, self._phase, self._live)
            self.operations.append(entry)
        return result

    def _follow_recomputation(self) -> None:
        """Assign a kind to the storages that a recomputed part of the forward has left, once it has ended."""
        if self._is_recomputing():
            if self._recomputed is None:
                self._recomputed = len(self._changes)
        elif self._recomputed is not None:
            self._drop_freed()
            for _, entry, _ in self._changes[self._recomputed :]:
                if entry.size and entry.purpose is None:
                    entry.purpose = Kind.RECOMPUTED
            self._recomputed = self._parent = None

    def _record(self, tensor: Tensor) -> None:
        self._seen = tensor
        super()._record(tensor)

    def _set(self, key: int, size: int) -> None:
        super()._set(key, size)
        if key not in self._allocations:
            self._allocations[key] = self._allocation(self._seen)
        self._change(self._allocations[key], size)

    def _forget(self, key: int) -> None:
        super()._forget(key)
        if key in self._allocations:
            self._change(self._allocations.pop(key), 0)

    def _change(self, entry: Allocation, size: int) -> None:
        if size != entry.size:
            self._changes.append((len(self.operations), entry, size - entry.size))
            entry.size = size

    def _allocation(self, tensor: Any) -> Allocation:
        local = torch_private.local_tensor(tensor)
        shape, dtype = tuple(local.shape), str(local.dtype).removeprefix("torch.")
        if not self._phase:
            return Allocation("", "", "", shape, dtype)
        if any(tensor is leaf for leaf in pytree.tree_leaves(self._arguments)):
            # The tensor is an argument, so no operation has computed it.
            return Allocation(self._module, "", "", shape, dtype, purpose=Kind.CONSTANTS)
        return Allocation(self._module, self._operator, self._phase, shape, dtype)

    # --- results ---

    @property
    def peak_index(self) -> int:
        """Return the index of the first operation with the most live bytes."""
        return max(range(len(self.operations)), key=lambda index: self.operations[index].live)

    def columns(self, groups: int = _COLUMNS, around: int = _AROUND) -> list[int]:
        """Return the indices of some operations, in order.

        Args:
            groups: Number of groups of neighbors. From each group, the operation with the most live bytes
                is chosen.
            around: Number of operations on each side of the peak that are all chosen.
        """
        count, peak = len(self.operations), self.peak_index
        step = max(-(-count // groups), 1)
        first, last = max(peak - around, 0), min(peak + around + 1, count)
        columns = list(range(first, last))
        for low, high in ((0, first), (last, count)):
            for start in range(low, high, step):
                group = range(start, min(start + step, high))
                columns.append(max(group, key=lambda index: self.operations[index].live))
        return sorted(columns)

    def bands(
        self, group: Callable[[Allocation], str], columns: Sequence[int] | None = None
    ) -> dict[str, list[int]]:
        """Return the live bytes of groups of storages.

        Args:
            group: Function that returns the name of a storage's group.
            columns: Indices of operations, in order; None for all operations.

        Returns:
            Bytes at the end of each of these operations, by group.
        """
        columns = range(len(self.operations)) if columns is None else columns
        totals: Counter[str] = Counter()
        rows: dict[str, list[int]] = {}
        for position, changes in enumerate(self._changes_before(columns)):
            for entry, size in changes:
                totals[group(entry)] += size
            for name, total in totals.items():
                rows.setdefault(name, [0] * position).append(total)
        return rows

    def _changes_before(self, columns: Sequence[int]) -> Iterator[list[tuple[Allocation, int]]]:
        """Yield for each column the changes of storages since the preceding column, or since the start."""
        changes, position = list(self._before), 0
        for column in columns:
            while position < len(self._changes) and self._changes[position][0] <= column:
                changes.append(self._changes[position][1:])
                position += 1
            yield changes
            changes = []

    def part_of(self, entry: Allocation) -> str:
        """Return the name of the block, or of the module outside of blocks, to which a storage belongs."""
        name = entry.module
        while name and name not in self.parts:
            name = name.rpartition(".")[0]
        return name or entry.module

    def at_peak(self) -> list[tuple[Allocation, int]]:
        """Return the live storages at the peak and their bytes, the largest first."""
        sizes: Counter[Allocation] = Counter()
        for entry, size in next(self._changes_before([self.peak_index])):
            sizes[entry] += size
        return [(entry, size) for entry, size in sizes.most_common() if size]

    def largest(self, most: int) -> list[Row]:
        """Return the largest tensors at the peak. Equal tensors of numbered modules share a row."""
        entries = [
            (
                name_of(entry.module),
                entry.label,
                str(entry.kind),
                entry.phase,
                " x ".join(map(str, entry.shape)),
                entry.dtype,
                str(size),
            )
            for entry, size in self.at_peak()
        ]
        rows = []
        for row in folded(entries)[:most]:
            tensor, kind, phase, shape, dtype, size = row.cells
            rows.append(Row(row.name, tensor, kind, phase, shape, dtype, int(size), row.count))
        return rows


def name_of(module: str) -> str:
    """Return the name of a module as tables show it."""
    return module or "(root)"


def _parts(module: nn.Module, name: str = "") -> Iterator[str]:
    """Yield the names of a model's blocks (children of module lists) and of the modules outside of lists."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}".lstrip(".")
        if any(isinstance(inner, nn.ModuleList) for inner in child.modules()) and not (
            isinstance(module, nn.ModuleList)
        ):
            yield from _parts(child, full)
        else:
            yield full


def _computes(func: Any, result: Any) -> bool:
    """Return True if an operator returns or changes a tensor, unlike ``prim.device``."""
    tensors = (isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
    return any(tensors) or bool(torch_private.schema_of(func).is_mutable)


def _key(tensor: Tensor) -> int:
    return torch_private.storage_key(torch_private.local_tensor(tensor).untyped_storage())


# --- the page ---


def document_of(timeline: Timeline, facts: Mapping[str, str]) -> dict[str, Any]:
    """Return the data of a page.

    A band is a list of ``column, bytes, column, bytes, ...``. A value holds until the next column.

    Args:
        timeline: A recorded step.
        facts: Facts for the head of the page, by label.
    """
    columns = timeline.columns()
    operations = [timeline.operations[column] for column in columns]
    texts: dict[str, int] = {}

    def text(value: str) -> int:
        return texts.setdefault(value, len(texts))

    kinds = timeline.bands(lambda entry: str(entry.kind), columns)
    parts = timeline.bands(timeline.part_of, columns)
    order = {name: index for index, name in enumerate(timeline.parts)}
    phases = [operation.phase for operation in operations]
    return {
        "facts": list(facts.items()),
        "count": len(timeline.operations),
        "columns": columns,
        "operators": [text(operation.operator) for operation in operations],
        "modules": [text(name_of(operation.module)) for operation in operations],
        "phases": [[phase, phases.index(phase)] for phase in dict.fromkeys(phases)],
        "peak": columns.index(timeline.peak_index),
        "kinds": [
            [kind, _runs(kinds[kind])] for kind in map(str, Kind) if any(kinds.get(kind, ()))
        ],
        "parts": [
            [name_of(name), _runs(values)]
            for name, values in sorted(parts.items(), key=lambda item: order.get(item[0], -1))
            if any(values)
        ],
        "rows": [list(dataclasses.astuple(row)) for row in timeline.largest(_ROWS)],
        "texts": list(texts),
    }


def _runs(values: Sequence[int]) -> list[int]:
    runs: list[int] = []
    last = 0
    for column, value in enumerate(values):
        if value != last:
            runs += [column, value]
            last = value
    return runs


def write_page(timeline: Timeline, path: Path, title: str, facts: Mapping[str, str]) -> None:
    """Write a page with the live bytes of a step and the largest tensors at its peak.

    Args:
        timeline: A recorded step.
        path: HTML file. An existing file is replaced.
        title: Title of the page.
        facts: Facts for the head of the page, by label.
    """
    text = fill_page(
        "timeline.html",
        title,
        document_of(timeline, facts),
        style=["page.css", "timeline.css"],
        script=["theme.js", "timeline.js"],
    )
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
