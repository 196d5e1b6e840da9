"""Table of the samples of each adapter, and functions that select their rows in an activation.

Threads and asyncio tasks may share a model. A ``with`` block keeps the samples in a context variable, so they
apply to the thread or task that is in the block. A call runs in one thread from start to end. Its state is in
a thread-local object, which a compiler can read, too. Hooks open and close a call
(:mod:`lora_fx.runtime.rows.sample_calls`).
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.modules import AdapterModule, Sizes
from lora_fx.runtime.rows.row_tracking import Follower

__all__ = [
    "COLUMNS",
    "IDS",
    "Assigned",
    "CallState",
    "Layout",
    "SampleRows",
    "SampleSlots",
    "add_rows",
    "check_rows_followed",
    "ends_selected",
    "follow",
    "followed",
    "in_backward",
    "like_rows",
    "places_of_samples",
    "put_rows",
    "rows_added",
    "rows_of",
    "rows_of_tokens",
    "rows_selected",
    "select_rows",
    "slots_for",
    "unfollow",
    "unfollowed",
    "unseen",
]

_T = TypeVar("_T")


class CallState(enum.Enum):
    """State of the running call of a thread: the relation between rows and samples.

    Attributes:
        CLOSED: No call is running.
        TRUSTED: A call is running, and every row is a sample.
        FOLDED: A call is running, and a sample may have several consecutive rows.
        FOLLOWED: A call is running, and a :class:`Follower` finds out which of the two it is.
    """

    CLOSED = enum.auto()
    TRUSTED = enum.auto()
    FOLDED = enum.auto()
    FOLLOWED = enum.auto()


COLUMNS = -1
"""Axis of the samples for a weight that is the left operand of its product. Samples are the columns of a
matrix, or the batch dimension before the two matrix dimensions."""


class _Following(threading.local):
    """Followers of the running calls of this thread, the innermost last."""

    def __init__(self) -> None:
        self.followers: list[Follower] = []


_following = _Following()

IDS = "adapter_ids"
"""Name of the call argument that gives each sample its adapter."""


class Assigned(NamedTuple):
    """Assignment of the samples of a batch to adapters.

    Attributes:
        samples: Number of samples in the batch; 0 while it is unknown.
        repeats: How many times in a row the batch may repeat each sample.
        indices: Indices of the samples of each adapter that has any.
    """

    samples: int = 0
    repeats: int = 1
    indices: Mapping[str, Sequence[int]] = {}


class Layout(NamedTuple):
    """Layout of the adapters' rows in a matrix, [rows, features].

    Attributes:
        adapters: Indices of the adapters that have rows, among those of the site, in the order of their rows.
        sizes: Number of rows of each piece that :meth:`cut` splits the matrix into.
        pieces: Indices of the pieces that belong to adapters. The remaining pieces have no adapter.
        order: Indices of the rows that :meth:`taken` gathers; None if it keeps the matrix as it is.
    """

    adapters: Sequence[int]
    sizes: Sequence[int]
    pieces: Sequence[int]
    order: Tensor | None

    def taken(self, matrix: Tensor) -> Tensor:
        """Gather the rows of a matrix so that those of each adapter are contiguous."""
        return matrix if self.order is None else matrix.index_select(0, self.order)

    def cut(self, taken: Tensor) -> list[Tensor]:
        """Return the rows of each adapter, as views of the output of :meth:`taken`."""
        cuts = taken.split_with_sizes(self.sizes)
        return [cuts[piece] for piece in self.pieces]

    def indices(self, count: int, rows: Tensor) -> list[Tensor | None]:
        """Return the row indices of each of ``count`` adapters; None for an adapter without rows.

        Args:
            count: Number of adapters of the site.
            rows: Indices of all rows of the matrix.
        """
        row_indices: list[Tensor | None] = [None] * count
        for index, own in zip(self.adapters, self.cut(self.taken(rows)), strict=True):
            row_indices[index] = own
        return row_indices


class _ThreadState:
    """State of one thread for one model: the samples of its calls, and the running call.

    Attributes:
        assigned: The samples of each adapter.
        samples, repeats: The same fields of ``assigned``.
        alike: True if all samples have the same adapter. Then the order of the rows does not matter.
        rows: Indices of each adapter's samples, [n], by its name.
        layouts: Cache of :meth:`SampleRows.lay_out` and :meth:`SampleRows.slots` for these samples.
        shared: True if several asyncio tasks of this thread are inside blocks. The thread then has no samples
            between calls.
        state: State of the running call.
        opened_by: Name of the module whose call is running, "" for the model; None if there is no call.
        depth: Nesting depth of the calls of that module.
        follower, form, sizes, failing: Follower of the call, form and sizes of the call, and the exception
            that was being handled when the call began. They are set only while a call is followed.
        call: Entry hook of the call. It ends a call that neither returned nor raised.
    """

    def __init__(self) -> None:
        self.assigned = Assigned()
        self.samples, self.repeats, self.alike = 0, 1, True
        self.rows: dict[str, Tensor] = {}
        self.layouts: dict[Any, Any] = {}
        self.shared = False
        self.state = CallState.CLOSED
        self.opened_by: str | None = None
        self.depth = 0
        self.follower: Follower | None = None
        self.form: object = None
        self.sizes: tuple[int, ...] = ()
        self.failing: BaseException | None = None
        self.call: Any = None


class _Threads(threading.local):
    """Thread-local holder of a :class:`_ThreadState`.

    Writes go to the inner object, because Dynamo drops writes to a thread-local object itself.
    """

    def __init__(self) -> None:
        self.running = _ThreadState()


_blocks: ContextVar[Mapping[_Threads, Assigned]] = ContextVar("lora_fx_samples")
"""Samples that the enclosing ``with`` blocks have assigned, by the table of each model."""


class SampleRows(AdapterModule):
    """Table of the samples of each adapter. All sites of a model share one table.

    Each adapter has an empty buffer, which is on the device where its sample indices are needed.

    Attributes:
        threads: The state of each thread.
        inherited: The samples outside of all ``with`` blocks. A copy of the table starts with the samples
            that applied when it was copied.
        proofs: Forms of followed calls in which each row is a sample.
        folded: Forms and sizes of calls with several rows per sample.
    """

    def __init__(self, adapters: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.threads = _Threads()
        self.inherited = Assigned()
        self.proofs = Sizes()
        self.folded: set[object] = set()
        for name in adapters:
            empty = torch.empty(0, dtype=torch.long, device=device)
            self.register_buffer(name, empty, persistent=False)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute. The name of an adapter gives the indices of its samples in this call, [n]."""
        value = super().__getattr__(name)
        if name in self._buffers:
            rows = self.thread.rows
            return rows[name].to(value.device) if name in rows else value
        return value

    @property
    def thread(self) -> _ThreadState:
        """The state of the running thread."""
        return self.threads.running

    @property
    def samples(self) -> int:
        """Number of samples in the batch; 0 while it is unknown."""
        return self.thread.samples

    @property
    def repeats(self) -> int:
        """Number of times in a row that the batch may repeat each sample."""
        return self.thread.repeats

    @property
    def state(self) -> CallState:
        """State of the running call."""
        return self.thread.state

    @property
    def assigned(self) -> Assigned:
        """Samples of each adapter in the running call."""
        return self.thread.assigned

    def assign(self, ids: Sequence[str | None], repeats: int = 1, *, shared: bool = False) -> None:
        """Set the adapter of each sample for the calls of this thread or task.

        Args:
            ids: Adapter name of each sample, or None for the base. Empty if the samples are unknown.
            repeats: How many times in a row the batch may repeat each sample.
            shared: True if another asyncio task of this thread is inside a block of this model.
        """
        if self.thread.call is not None:
            self.thread.call.abandon()
        numbers = places_of_samples(ids)
        assigned = Assigned(len(ids), repeats, numbers) if len(ids) else Assigned()
        self.inherited = Assigned()
        blocks = {**_blocks.get({}), self.threads: assigned}
        if not assigned.samples:
            del blocks[self.threads]
        _blocks.set(blocks)
        self.thread.shared = shared
        self.settle()

    def settle(self) -> None:
        """Drop the samples that a call or a backward set in this thread.

        Restore the samples that the enclosing ``with`` blocks have assigned.
        """
        self.reassign(Assigned() if self.thread.shared else self.of_blocks())

    def of_blocks(self) -> Assigned:
        """Return the samples that the enclosing ``with`` blocks have assigned."""
        return _blocks.get({}).get(self.threads, self.inherited)

    def reassign(self, assigned: Assigned) -> None:
        """Set the samples that sites read in this thread."""
        thread = self.thread
        if assigned == thread.assigned:
            return
        samples, repeats, numbers = assigned
        thread.assigned, thread.layouts = assigned, {}
        thread.samples, thread.repeats = samples, repeats
        thread.alike = not numbers or any(len(own) == samples for own in numbers.values())
        thread.rows = {
            name: torch.tensor(numbers.get(name, ()), dtype=torch.long).to(marker.device)
            for name, marker in self._buffers.items()
            if marker is not None
        }

    def lay_out(self, x: Tensor, adapters: tuple[str, ...]) -> Layout:
        """Return the layout of the adapters' rows in the input of a site.

        Args:
            x: [samples, ..., in]. Samples may be repeated, or have several consecutive rows.
            adapters: The adapters of the site.

        Raises:
            ConfigError: If the first dimension is not that of the samples.
        """
        _check(x, self)
        each = (x.numel() // x.shape[-1] if x.shape[-1] else 0) // self.samples
        key = adapters, each, x.device
        layouts = self.thread.layouts
        if key not in layouts:
            layouts[key] = self._laid_out(adapters, each, x.device)
        layout: Layout = layouts[key]
        return layout

    def slots(self, x: Tensor, adapters: tuple[str, ...]) -> Tensor:
        """Return the number of each sample's adapter among ``adapters``, [samples].

        Numbers start at 1. A sample without one of these adapters has 0.

        Args:
            x: [samples, ...]. Samples may be repeated, or have several consecutive rows.
            adapters: Names of adapters.

        Raises:
            ConfigError: If the first dimension is not that of the samples.
        """
        _check(x, self)
        key = "slots", adapters, x.device
        layouts = self.thread.layouts
        if key not in layouts:
            slots = torch.zeros(self.samples, dtype=torch.long)
            for number, name in enumerate(adapters, start=1):
                slots[list(self.assigned.indices.get(name, ()))] = number
            layouts[key] = slots.to(x.device)
        numbers: Tensor = layouts[key]
        return numbers

    def _laid_out(self, adapters: tuple[str, ...], each: int, device: torch.device) -> Layout:
        """Return the layout for samples with ``each`` rows."""
        known = [
            (self.assigned.indices.get(name, ()), index) for index, name in enumerate(adapters)
        ]
        known = sorted(pair for pair in known if pair[0])
        indices = [index for _, index in known]
        if any(own[-1] - own[0] + 1 != len(own) for own, _ in known):
            samples = torch.tensor([sample for own, _ in known for sample in own])
            sizes = [len(own) * each for own, _ in known]
            order = _of_samples(samples, each).to(device)
            return Layout(indices, sizes, range(len(sizes)), order)
        sizes, pieces, end = [], [], 0
        for own, _ in known:
            # The samples between two runs have none of these adapters.
            sizes += [(own[0] - end) * each, len(own) * each]
            pieces.append(len(sizes) - 1)
            end = own[-1] + 1
        return Layout(indices, [*sizes, (self.samples - end) * each], pieces, None)

    def __getstate__(self) -> dict[str, Any]:
        """Drop the calls and their proofs: a copy is in no call, and may become a different model."""
        state = {**self.__dict__, "proofs": Sizes(), "folded": set(), "inherited": self.of_blocks()}
        del state["threads"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without a call, with the samples that applied where the table was copied."""
        super().__setstate__({**state, "threads": _Threads()})  # type: ignore[no-untyped-call]
        self.settle()


def places_of_samples(ids: Sequence[str | None]) -> dict[str, list[int]]:
    """Return the indices of the samples of each adapter."""
    numbers: dict[str, list[int]] = {}
    for index, name in enumerate(ids):
        if name is not None:
            numbers.setdefault(name, []).append(index)
    return numbers


def follow(follower: Follower) -> None:
    """Make a follower the innermost of this thread, so that sites report to it."""
    _following.followers.append(follower)


def unfollow() -> None:
    """Remove the innermost follower of this thread."""
    _following.followers.pop()


@dataclass(frozen=True)
class SampleSlots:
    """Adapters of the samples of the running call, as slots of a bank.

    Attributes:
        table: The samples of each adapter.
        adapters: The adapters of slots 1, 2, and so on. Slot 0 is the base.
    """

    table: SampleRows
    adapters: tuple[str, ...]


def slots_for(slots: Tensor | SampleSlots, x: Tensor, weight: str) -> Tensor:
    """Return the slot of each row of an activation, [rows].

    Args:
        slots: The slots, or the adapters of the samples.
        x: The activation, [rows, ...].
        weight: Name of the weight that is chosen by the slots, for messages.

    Raises:
        ConfigError: If the rows are not those of the samples, in their order.
    """
    check_rows_followed(x, weight)
    return slots if isinstance(slots, Tensor) else slots.table.slots(x, slots.adapters)


def check_rows_followed(x: Tensor, weight: str) -> None:
    """Check the input of a branch, if a follower is watching the running call.

    Args:
        x: Input of the branch.
        weight: Name of the adapted weight in its module.

    Raises:
        ConfigError: If the first axis of ``x`` does not have the samples in their order.
    """
    if _following.followers:
        _following.followers[-1].check_site(x, weight)


def select_rows(
    x: Tensor, table: SampleRows, adapter: str, weight: str = "", axis: int = 0, least: int = 0
) -> Tensor:
    """Return the part of an activation that belongs to the samples of an adapter.

    Args:
        x: [samples, ...]; [samples * repeats, ...] with repeated samples; or [samples * t, ...] with t
            consecutive rows per sample.
        table: The table of the samples.
        adapter: Name of the adapter.
        weight: Name of the adapted weight in its module.
        axis: The axis of the samples, or :data:`COLUMNS`.
        least: Least number of dimensions of an activation that has an axis of samples.

    Returns:
        [n, ...], [n * repeats, ...] or [n * t, ...], for an adapter with n samples.

    Raises:
        ConfigError: If the axis is not the axis of the samples.
    """
    x, axis = _samples_first(x, axis, least, weight)
    if table.state is CallState.FOLLOWED:
        _following.followers[-1].check_site(x, weight)
    selected = x.index_select(0, _expanded(x, table, adapter))
    return selected.movedim(0, axis) if axis else selected


def add_rows(
    total: Tensor, table: SampleRows, adapter: str, delta: Tensor, weight: str = "", axis: int = 0
) -> Tensor:
    """Add ``delta`` to the rows whose samples use an adapter, in place.

    Args:
        total: [samples, ...], repeated or with several rows, see :func:`select_rows`.
        table: The table of the samples.
        adapter: Name of the adapter.
        delta: The summand, in the shape that :func:`select_rows` returns for ``total``.
        weight: Name of the adapted weight in its module.
        axis: The axis of the samples, see :func:`select_rows`.
    """
    return _written(Tensor.index_add_, total, table, adapter, delta, weight, axis)


def put_rows(
    total: Tensor, table: SampleRows, adapter: str, values: Tensor, weight: str = "", axis: int = 0
) -> Tensor:
    """Replace the rows of some samples by ``values``, in place. Arguments are those of :func:`add_rows`."""
    return _written(Tensor.index_copy_, total, table, adapter, values, weight, axis)


def _written(
    write: Callable[..., Tensor],
    total: Tensor,
    table: SampleRows,
    adapter: str,
    values: Tensor,
    weight: str,
    axis: int,
) -> Tensor:
    led, axis = _samples_first(total, axis, 0, weight)
    values = values.movedim(axis, 0) if axis else values
    # Under autocast, a lookup is not cast, and the branch on it is.
    result = write(led, 0, _expanded(led, table, adapter), values.to(led.dtype))
    followed(result, table, weight)
    return result.movedim(0, axis) if axis else result


def _samples_first(x: Tensor, axis: int, least: int, weight: str) -> tuple[Tensor, int]:
    """Move the axis of the samples to the front. Return the view, and the former position of the axis.

    Raise if the activation has no axis of samples.
    """
    if x.dim() < least:
        raise ConfigError(
            f"{weight}: an activation of shape {tuple(x.shape)} has no dimension of samples, only those that "
            "the weight is multiplied with: choose one adapter for the whole batch"
        )
    if axis == COLUMNS:
        axis = 1 if x.dim() == 2 else 0
    return (x.movedim(axis, 0) if axis else x), axis


def rows_of(x: Tensor, table: SampleRows, adapter: str) -> Tensor:
    """Return the row indices of an adapter in an activation that is flattened to [rows, features].

    Args:
        x: The activation, see :func:`select_rows`.
        table: The table of the samples.
        adapter: Name of the adapter.

    Raises:
        ConfigError: If the first axis is not that of the samples.
    """
    _check(x, table)
    samples: Tensor = getattr(table, adapter)
    return _of_samples(samples, (x.numel() // x.shape[-1]) // table.samples)


def rows_of_tokens(
    tokens: Tensor, table: SampleRows, adapter: str, hidden: Tensor, weight: str = ""
) -> Tensor:
    """Return the rows of an expert input that belong to an adapter. A row has the sample of its token.

    Args:
        tokens: Token index of each row, [n].
        table: The table of the samples.
        adapter: Name of the adapter.
        hidden: The tokens, [T, d]. Those of a sample are consecutive.
        weight: Name of the adapted weight in its module.

    Returns:
        Row indices in ascending order.

    Raises:
        ConfigError: If the tokens are not those of the samples.
    """
    if table.state is CallState.FOLLOWED:
        _following.followers[-1].check_site(hidden, weight)
    _check(hidden, table)
    each = hidden.shape[0] // table.samples
    return unseen(_rows_of_tokens, tokens, each, getattr(table, adapter))


def _rows_of_tokens(tokens: Tensor, each: int, rows: Tensor) -> Tensor:
    return torch.isin(tokens // each, rows).nonzero().flatten()


def rows_selected(x: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of an expert input."""
    return x.index_select(0, rows)


def ends_selected(ends: Tensor, rows: Tensor) -> Tensor:
    """Return the end offset of each expert among the selected rows, [E].

    Args:
        ends: End offset of each expert among all rows, [E].
        rows: Indices of the selected rows, ascending.
    """
    return torch.searchsorted(rows, ends, out_int32=True)


def rows_added(total: Tensor, rows: Tensor, delta: Tensor) -> Tensor:
    """Add to some rows of an expert output, in place."""
    return total.index_add_(0, rows, delta)


def unseen(function: Callable[..., _T], *arguments: Any) -> _T:
    """Run a function with the follower of the running call paused, if there is one.

    Routing orders the rows of experts by values, and scatters the outputs back. A follower cannot track such
    rows. The code of the experts computes the sample of each row from the routing.
    """
    if not _following.followers:
        return function(*arguments)
    with unfollowed():
        return function(*arguments)


def like_rows(result: Tensor, x: Tensor) -> Tensor:
    """Tell the follower of the running call that the rows of ``result`` have the samples of ``x``."""
    if _following.followers:
        _following.followers[-1].copy_rows(result, x)
    return result


@contextlib.contextmanager
def unfollowed() -> Iterator[None]:
    """Pause the follower of the running call inside of the block, if there is a follower."""
    follower = _following.followers[-1] if _following.followers else None
    if follower is not None:
        follower.paused = True
    try:
        yield
    finally:
        if follower is not None:
            follower.paused = False


def followed(result: Tensor, table: SampleRows, weight: str) -> Tensor:
    """Return the output of a site, and tell the follower that its rows are those of the samples."""
    if table.state is CallState.FOLLOWED:
        _following.followers[-1].presume(result, weight)
    return result


def _expanded(x: Tensor, table: SampleRows, adapter: str) -> Tensor:
    _check(x, table)
    rows: Tensor = getattr(table, adapter)
    return rows if x.shape[0] == table.samples else _of_samples(rows, x.shape[0] // table.samples)


def _of_samples(samples: Tensor, each: int) -> Tensor:
    """Return the row indices of some samples that have ``each`` consecutive rows."""
    inner = torch.arange(each, device=samples.device)
    return (samples[:, None] * each + inner).flatten()


def _check(x: Tensor, table: SampleRows) -> None:
    """Raise if it is unknown which rows of an activation belong to which sample."""
    samples, repeats, state = table.samples, table.repeats, table.state
    if not samples:
        raise ConfigError(
            "the model is prepared for an adapter of its own for each sample (per_sample=True), and this "
            "call does not say which sample has which: call the model inside `with "
            "lora_fx.adapter_ids(model, ids):`, where ids has one name for each sample of the batch, or None "
            "for the base, in the thread that is in the block; "
            "lora_fx.set_adapter(model, name) chooses one adapter for all samples"
        )
    if state is CallState.CLOSED and not in_backward():
        raise ConfigError(
            "a part of the model was called by itself, so that it is unknown which rows of its input are "
            "whose: inside adapter_ids call the model, or one of the modules that it consists of"
        )
    if x.dim() and x.shape[0] == samples:
        return
    known = x.dim() and (state is not CallState.TRUSTED or x.shape[0] == samples * repeats)
    if not known or x.shape[0] % samples:
        raise ConfigError(
            f"an activation of shape {tuple(x.shape)} does not begin with the {samples} samples of "
            "adapter_ids: give one adapter for each sample of this batch, or repeats=, where generate() "
            "repeats each sample (num_beams, num_return_sequences). A model whose batch is not its first "
            "dimension takes one adapter at a time"
        )


def in_backward() -> bool:
    """Return True in a backward, where a checkpoint recomputes a part of a call that was checked before."""
    if torch.compiler.is_compiling():
        return False
    return torch_private.in_backward()
