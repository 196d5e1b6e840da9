"""Decides, for each call with an adapter for each sample, whether it is known which rows are whose.

A call of a form that has not been seen is followed (:mod:`lora_fx.runtime.row_tracking`) while it runs, and
refused where a site reads rows that are not those of the samples. Calls of the same form run as they are
then.

Threads and asyncio tasks may share a model. A ``with`` block keeps the samples in a context variable, so that
they hold for the thread or task that is in the block. A call runs in one thread from its beginning to its
end, and has its state in a thread-local object, which a compiler can read as well.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.masks import transformed
from lora_fx.runtime.ops import AdapterModule, tensors_in
from lora_fx.runtime.row_tracking import Follower

__all__ = [
    "CLOSED",
    "COLUMNS",
    "FOLDED",
    "FOLLOWED",
    "IDS",
    "TRUSTED",
    "Layout",
    "SampleRows",
    "Sizes",
    "add_rows",
    "check_rows_followed",
    "ends_selected",
    "follow",
    "followed",
    "ignore_ids",
    "in_backward",
    "like_rows",
    "put_rows",
    "refuse_ids",
    "rows_added",
    "rows_of",
    "rows_of_tokens",
    "rows_selected",
    "select_rows",
    "unfollow",
    "unfollowed",
    "unseen",
    "unwatch_calls",
    "watch_calls",
]

_T = TypeVar("_T")

CLOSED, TRUSTED, FOLDED, FOLLOWED = range(4)
"""What is known of the call that is running: there is none; one whose sites have the samples as their rows;
one with several rows for each sample, too; one that is followed to find out."""

COLUMNS = -1
"""The axis of the samples where a weight is on the left of its product: they are the columns of a matrix, or
lie before both dimensions of a product."""


class _Following(threading.local):
    """The followers of the calls that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.followers: list[Follower] = []


_following = _Following()

IDS = "adapter_ids"
"""The argument of a call by which each sample of it is given an adapter."""


class _Assigned(NamedTuple):
    """Which samples of a batch each adapter has.

    Attributes:
        samples: Number of samples in the batch; 0 while that is not known.
        repeats: How many times in a row the batch may have each sample.
        places: For each adapter that has some, the numbers of its samples.
    """

    samples: int = 0
    repeats: int = 1
    places: Mapping[str, Sequence[int]] = {}


class Layout(NamedTuple):
    """Where the rows of each adapter are in a matrix, [rows, features].

    Attributes:
        places: The adapters that have some, by their places among those of the site, in the order of the
            rows.
        sizes: Into how many rows each what :meth:`taken` gives is cut.
        pieces: Which of these cuts are those of the adapters; the others have none.
        order: Which rows :meth:`taken` takes; None if it takes all, in their order.
    """

    places: Sequence[int]
    sizes: Sequence[int]
    pieces: Sequence[int]
    order: Tensor | None

    def taken(self, matrix: Tensor) -> Tensor:
        """The rows of a matrix so that those of each adapter lie together."""
        return matrix if self.order is None else matrix.index_select(0, self.order)

    def cut(self, taken: Tensor) -> list[Tensor]:
        """The rows of each adapter, as views of what was taken."""
        cuts = taken.split_with_sizes(self.sizes)
        return [cuts[piece] for piece in self.pieces]

    def indices(self, count: int, rows: Tensor) -> list[Tensor | None]:
        """The rows of each of ``count`` adapters; None for one that has none.

        Args:
            count: How many adapters the site has.
            rows: The numbers of all rows of the matrix.
        """
        found: list[Tensor | None] = [None] * count
        for place, own in zip(self.places, self.cut(self.taken(rows)), strict=True):
            found[place] = own
        return found


class _ThreadState:
    """The samples of the calls that one thread makes of a model, and the state of the call that is running.

    Attributes:
        assigned: Which samples each adapter has.
        samples, repeats: Those of ``assigned``.
        alike: Whether all samples have the same adapter, so that it does not matter which row is whose.
        rows: The numbers of each adapter's samples, [n], by its name.
        layouts: Where they put the rows of matrices that sites have read.
        shared: Whether several tasks that take turns in this thread are inside blocks. Between calls the
            thread then has no samples.
        state: One of the constants above.
        opened_by: The name of the module whose call is running, "" for the model; None if there is no call.
        depth: How many calls of that module are inside each other.
        follower, form, sizes, failing: If the call is followed: its follower, its form and sizes, and the
            exception that was being handled when it began.
        call: The entry of the call, which ends it if neither a return nor an error has.
    """

    def __init__(self) -> None:
        self.assigned = _Assigned()
        self.samples, self.repeats, self.alike = 0, 1, True
        self.rows: dict[str, Tensor] = {}
        self.layouts: dict[Any, Layout] = {}
        self.shared = False
        self.state = CLOSED
        self.opened_by: str | None = None
        self.depth = 0
        self.follower: Follower | None = None
        self.form: object = None
        self.sizes: tuple[int, ...] = ()
        self.failing: BaseException | None = None
        self.call: Any = None


class _Threads(threading.local):
    """The state of the running thread.

    Writes go to an object in it: Dynamo leaves out those to a thread-local object itself.
    """

    def __init__(self) -> None:
        self.running = _ThreadState()


_blocks: ContextVar[Mapping[_Threads, _Assigned]] = ContextVar("lora_fx_samples")
"""The samples that the ``with`` blocks around the running code have assigned, for each model's table."""


class SampleRows(AdapterModule):
    """Which samples of the batch each adapter has. All sites of a model share one.

    Each adapter has a buffer without elements, which is on the device where its rows are needed.

    Attributes:
        threads: The state of each thread.
        inherited: The samples outside of all blocks: of a copy, those that held where it was copied.
        proofs: The forms of call that were followed and have the samples as their rows.
        folded: Those with several rows for each sample, and the sizes of each.
    """

    def __init__(self, adapters: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.threads = _Threads()
        self.inherited = _Assigned()
        self.proofs = Sizes()
        self.folded: set[object] = set()
        for name in adapters:
            empty = torch.empty(0, dtype=torch.long, device=device)
            self.register_buffer(name, empty, persistent=False)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute: for the name of an adapter, the numbers of its samples in this call, [n]."""
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
        """Number of samples in the batch; 0 while that is not known."""
        return self.thread.samples

    @property
    def repeats(self) -> int:
        """The number of times that the batch may have each sample, one after the other."""
        return self.thread.repeats

    @property
    def state(self) -> int:
        """The state of the running call, one of the constants above."""
        return self.thread.state

    @property
    def assigned(self) -> _Assigned:
        """The samples of each adapter in the running call."""
        return self.thread.assigned

    def assign(self, ids: Sequence[str | None], repeats: int = 1, *, shared: bool = False) -> None:
        """Says which sample has which adapter in the calls of this thread or task.

        Args:
            ids: The name of each sample's adapter, or None; nothing at all if that is not known.
            repeats: How many times in a row the batch may have each sample.
            shared: Whether another task of this thread is inside a block of this model.
        """
        if self.thread.call is not None:
            self.thread.call.abandon()
        places = _places(ids)
        assigned = _Assigned(len(ids), repeats, places) if len(ids) else _Assigned()
        self.inherited = _Assigned()
        blocks = {**_blocks.get({}), self.threads: assigned}
        if not assigned.samples:
            del blocks[self.threads]
        _blocks.set(blocks)
        self.thread.shared = shared
        self.settle()

    def settle(self) -> None:
        """Ends what a call, or a backward, has assigned in this thread: what the blocks say holds again."""
        self.reassign(_Assigned() if self.thread.shared else self.of_blocks())

    def of_blocks(self) -> _Assigned:
        """Return the samples that the ``with`` blocks around the running code have assigned."""
        return _blocks.get({}).get(self.threads, self.inherited)

    def reassign(self, assigned: _Assigned) -> None:
        """Let the sites that run in this thread read other samples."""
        thread = self.thread
        if assigned == thread.assigned:
            return
        samples, repeats, places = assigned
        thread.assigned, thread.layouts = assigned, {}
        thread.samples, thread.repeats = samples, repeats
        thread.alike = not places or any(len(own) == samples for own in places.values())
        thread.rows = {
            name: torch.tensor(places.get(name, ()), dtype=torch.long).to(marker.device)
            for name, marker in self._buffers.items()
            if marker is not None
        }

    def lay_out(self, x: Tensor, adapters: tuple[str, ...]) -> Layout:
        """Where the rows of some adapters are in what a site reads.

        Args:
            x: [samples, ..., in], each sample repeated, or with the rows of a sample one after the other.
            adapters: The adapters of the site.

        Raises:
            ConfigError: If the first dimension is not that of the samples.
        """
        _check(x, self.samples, self.repeats, self.state)
        each = (x.numel() // x.shape[-1] if x.shape[-1] else 0) // self.samples
        key = adapters, each, x.device
        layouts = self.thread.layouts
        if key not in layouts:
            layouts[key] = self._laid_out(adapters, each, x.device)
        return layouts[key]

    def _laid_out(self, adapters: tuple[str, ...], each: int, device: torch.device) -> Layout:
        """The same for samples that have ``each`` rows."""
        known = [(self.assigned.places.get(name, ()), place) for place, name in enumerate(adapters)]
        known = sorted(one for one in known if one[0])
        places = [place for _, place in known]
        if any(own[-1] - own[0] + 1 != len(own) for own, _ in known):
            samples = torch.tensor([one for own, _ in known for one in own])
            sizes = [len(own) * each for own, _ in known]
            order = _of_samples(samples, each).to(device)
            return Layout(places, sizes, range(len(sizes)), order)
        sizes, pieces, end = [], [], 0
        for own, _ in known:
            # Before it, samples without one of these adapters.
            sizes += [(own[0] - end) * each, len(own) * each]
            pieces.append(len(sizes) - 1)
            end = own[-1] + 1
        return Layout(places, [*sizes, (self.samples - end) * each], pieces, None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no call, and may become another model: nothing is known of its calls."""
        state = {**self.__dict__, "proofs": Sizes(), "folded": set(), "inherited": self.of_blocks()}
        del state["threads"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without a call, with the samples that held where it was copied."""
        super().__setstate__({**state, "threads": _Threads()})  # type: ignore[no-untyped-call]
        self.settle()


def _places(ids: Sequence[str | None]) -> dict[str, list[int]]:
    """The numbers of each adapter's samples."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(ids):
        if name is not None:
            places.setdefault(name, []).append(place)
    return places


def follow(follower: Follower) -> None:
    """Lets a follower see what the sites of the running call read and add to."""
    _following.followers.append(follower)


def unfollow() -> None:
    """Ends what :func:`follow` began."""
    _following.followers.pop()


def check_rows_followed(x: Tensor, weight: str) -> None:
    """Lets the follower of the running call, if there is one, look at what a branch reads.

    Args:
        x: What it reads.
        weight: Name of the adapted weight in its module.

    Raises:
        ConfigError: If its first axis does not have the samples in their order.
    """
    if _following.followers:
        _following.followers[-1].check_site(x, weight)


def select_rows(
    x: Tensor,
    rows: Tensor,
    samples: int,
    repeats: int = 1,
    state: int = FOLDED,
    weight: str = "",
    axis: int = 0,
    least: int = 0,
) -> Tensor:
    """The part of an activation that belongs to some samples.

    Args:
        x: [samples, ...], each sample repeated, [samples * repeats, ...], or with the rows of a sample one
            after the other, [samples * t, ...].
        rows: Indices of samples, [n].
        samples: Number of samples in the batch.
        repeats: How many times in a row the batch may have each sample.
        state: What is known of the call.
        weight: Name of the adapted weight in its module.
        axis: Which axis has the samples, if it is not the first one; or :data:`COLUMNS`.
        least: How many dimensions x has if it has one of samples.

    Returns:
        [n, ...], [n * repeats, ...] or [n * t, ...].

    Raises:
        ConfigError: If that dimension is not that of the samples.
    """
    x, axis = _led_by(x, axis, least, weight)
    if state == FOLLOWED:
        _following.followers[-1].check_site(x, weight)
    found = x.index_select(0, _expanded(x, rows, samples, repeats, state))
    return found.movedim(0, axis) if axis else found


def add_rows(
    total: Tensor,
    rows: Tensor,
    delta: Tensor,
    samples: int,
    repeats: int = 1,
    state: int = FOLDED,
    weight: str = "",
    axis: int = 0,
    least: int = 0,
) -> Tensor:
    """Adds to the rows of some samples, in place.

    Args:
        total: [samples, ...], repeated or with several rows, as for :func:`select_rows`.
        rows: Indices of samples, [n].
        delta: What :func:`select_rows` would give of ``total``.
        samples: Number of samples in the batch.
        repeats: How many times in a row the batch may have each sample.
        state: What is known of the call.
        weight: Name of the adapted weight in its module.
        axis: As for :func:`select_rows`, as the next one.
        least: See there.
    """
    led, axis = _led_by(total, axis, least, weight)
    delta = delta.movedim(axis, 0) if axis else delta
    result = led.index_add_(0, _expanded(led, rows, samples, repeats, state), delta)
    if state == FOLLOWED:
        _following.followers[-1].presume(result, weight)
    return result.movedim(0, axis) if axis else result


def put_rows(
    total: Tensor,
    rows: Tensor,
    values: Tensor,
    samples: int,
    repeats: int = 1,
    state: int = FOLDED,
    weight: str = "",
    axis: int = 0,
    least: int = 0,
) -> Tensor:
    """Replaces the rows of some samples, in place; as :func:`add_rows`, with what they are to be."""
    led, axis = _led_by(total, axis, least, weight)
    values = values.movedim(axis, 0) if axis else values
    result = led.index_copy_(0, _expanded(led, rows, samples, repeats, state), values)
    if state == FOLLOWED:
        _following.followers[-1].presume(result, weight)
    return result.movedim(0, axis) if axis else result


def _led_by(x: Tensor, axis: int, least: int, weight: str) -> tuple[Tensor, int]:
    """A view whose first axis is that of the samples, and which axis that was."""
    if x.dim() < least:
        raise ConfigError(
            f"{weight}: an activation of shape {tuple(x.shape)} has no dimension of samples, only those that "
            "the weight is multiplied with: choose one adapter for the whole batch"
        )
    if axis == COLUMNS:
        axis = 1 if x.dim() == 2 else 0
    return (x.movedim(axis, 0) if axis else x), axis


def rows_of(x: Tensor, table: SampleRows, adapter: str) -> Tensor:
    """Which rows an adapter has in the matrix of an activation, [rows, features].

    Args:
        x: As for :func:`select_rows`.
        table: Says which samples it has.
        adapter: The adapter.

    Raises:
        ConfigError: As :func:`select_rows`.
    """
    _check(x, table.samples, table.repeats, table.state)
    samples: Tensor = getattr(table, adapter)
    return _of_samples(samples, (x.numel() // x.shape[-1]) // table.samples)


def rows_of_tokens(
    tokens: Tensor,
    hidden: Tensor,
    rows: Tensor,
    samples: int,
    repeats: int = 1,
    state: int = FOLDED,
    weight: str = "",
) -> Tensor:
    """Which rows of what experts read belong to some samples: a row is of the sample of its token.

    Args:
        tokens: The token of each row, [n].
        hidden: The tokens, [T, d], those of a sample one after the other.
        rows: Indices of samples.
        samples: As for :func:`select_rows`, as the next three.
        repeats: See there.
        state: See there.
        weight: See there.

    Returns:
        Indices of rows, in their order.

    Raises:
        ConfigError: If the tokens are not those of the samples.
    """
    if state == FOLLOWED:
        _following.followers[-1].check_site(hidden, weight)
    _check(hidden, samples, repeats, state)
    return unseen(_rows_of_tokens, tokens, hidden.shape[0] // samples, rows)


def _rows_of_tokens(tokens: Tensor, each: int, rows: Tensor) -> Tensor:
    return torch.isin(tokens // each, rows).nonzero().flatten()


def rows_selected(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of what experts read."""
    return x.index_select(0, rows)


def ends_selected(ends: Tensor, rows: Tensor) -> Tensor:
    """Where each expert's rows end among some rows, [E].

    Args:
        ends: Where they end among all, [E].
        rows: Indices of rows, in their order.
    """
    return torch.searchsorted(rows, ends, out_int32=True)


def rows_added(total: Tensor, rows: Tensor, delta: Tensor) -> Tensor:
    """Adds to some rows of what experts give, in place."""
    return total.index_add_(0, rows, delta)


def unseen(function: Callable[..., _T], *given: Any) -> _T:
    """Runs a function that the follower of the running call, if there is one, does not see.

    Experts are given the rows of tokens in an order that their values decide, and put what they make of them
    back. What they read has no samples for the follower, and says itself whose it is.
    """
    if not _following.followers:
        return function(*given)
    with unfollowed():
        return function(*given)


def like_rows(result: Tensor, x: Tensor) -> Tensor:
    """Tells the follower of the running call that the rows of a result are those of x."""
    if _following.followers:
        _following.followers[-1].copy_rows(result, x)
    return result


@contextlib.contextmanager
def unfollowed() -> Iterator[None]:
    """Lets operators run that the follower of the running call, if there is one, does not see."""
    follower = _following.followers[-1] if _following.followers else None
    if follower is not None:
        follower.paused = True
    try:
        yield
    finally:
        if follower is not None:
            follower.paused = False


def followed(result: Tensor, table: SampleRows, weight: str) -> Tensor:
    """What a site gives, whose rows are those of the samples: the follower of the call is told."""
    if table.state == FOLLOWED:
        _following.followers[-1].presume(result, weight)
    return result


def _expanded(x: Tensor, rows: Tensor, samples: int, repeats: int, state: int) -> Tensor:
    _check(x, samples, repeats, state)
    return rows if x.shape[0] == samples else _of_samples(rows, x.shape[0] // samples)


def _of_samples(samples: Tensor, each: int) -> Tensor:
    """The rows of some samples, each of which has so many, one after the other."""
    inner = torch.arange(each, device=samples.device)
    return (samples[:, None] * each + inner).flatten()


def _check(x: Tensor, samples: int, repeats: int, state: int) -> None:
    """Refuses an activation of which it is not known which rows are whose."""
    if not samples:
        raise ConfigError(
            "the model is prepared for an adapter of its own for each sample (per_sample=True), and this "
            "call does not say which sample has which: call the model inside `with "
            "lora_fx.adapter_ids(model, ids):`, where ids has one name for each sample of the batch, or None "
            "for the base, in the thread that is in the block; "
            "lora_fx.set_adapter(model, name) chooses one adapter for all samples"
        )
    if state == CLOSED and not in_backward():
        raise ConfigError(
            "a part of the model was called by itself, so that it is unknown which rows of its input are "
            "whose: inside adapter_ids call the model, or one of the modules that it consists of"
        )
    if x.dim() and x.shape[0] == samples:
        return
    known = x.dim() and (state != TRUSTED or x.shape[0] == samples * repeats)
    if not known or x.shape[0] % samples:
        raise ConfigError(
            f"an activation of shape {tuple(x.shape)} does not begin with the {samples} samples of "
            "adapter_ids: give one adapter for each sample of this batch, or repeats=, where generate() "
            "repeats each sample (num_beams, num_return_sequences). A model whose batch is not its first "
            "dimension takes one adapter at a time"
        )


def in_backward() -> bool:
    """Whether a checkpoint computes a part of a call again, whose rows were known when it ran first."""
    if torch.compiler.is_compiling():
        return False
    return torch_private.in_backward()


_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Its methods call parts of a model, the encoder for instance, with what the caller gave.
_GENERATION = "transformers.generation."


def watch_calls(model: nn.Module, table: SampleRows) -> None:
    """Looks at every call of a model, and of the modules that it consists of, from outside.

    Args:
        model: A model whose sites read ``table``.
        table: What says which sample has which adapter.
    """
    for name, module in _entered(model):
        entry = _Entry(name, model, table)
        if isinstance(module, torch.jit.ScriptModule):
            continue  # it has no adapter, and takes no such hook
        module.register_forward_pre_hook(entry, prepend=True, with_kwargs=True)
        module.register_forward_hook(_Exit(entry), with_kwargs=True, always_call=True)


def ignore_ids(model: nn.Module) -> None:
    """Lets calls of a model name adapters although it runs without any, until :func:`unwatch_calls`."""
    if _takes_ids(model):
        model.register_forward_pre_hook(_Ignored(), prepend=True, with_kwargs=True)


def _takes_ids(model: nn.Module) -> bool:
    """Whether calls of a model may say which adapters its samples have."""
    return IDS not in inspect.signature(model.forward).parameters


def refuse_ids(model: nn.Module) -> None:
    """Refuses adapters that a call has named, and that nothing has taken out of it: ``**kwargs`` hide them.

    Raises:
        ConfigError: If the model has no such argument of its own.
    """
    if _takes_ids(model):
        raise ConfigError(
            f"{IDS}: no call of this model can name the adapters of its samples: prepare it with "
            "lora_fx.set_adapter(model, names, per_sample=True) before, and call the model itself, not its "
            "forward; or call it inside `with lora_fx.adapter_ids(model, [...]):`"
        )


class _Ignored:
    """What takes the adapters out of a call of the base."""

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leaves the other arguments."""
        return args, {name: value for name, value in kwargs.items() if name != IDS}


def unwatch_calls(model: nn.Module) -> None:
    """Ends what :func:`watch_calls` or :func:`ignore_ids` began."""
    for module in model.modules():
        torch_private.remove_forward_hooks(module, _Entry, _Ignored, _Exit)


def _entered(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, and the modules that it calls itself: its children, and what containers hold."""
    seen = {id(model)}
    yield "", model
    waiting = [(name, child) for name, child in model.named_children()]
    while waiting:
        name, module = waiting.pop(0)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if isinstance(module, _CONTAINERS):
            waiting += [(f"{name}.{key}", child) for key, child in module.named_children()]


class _Entry:
    """What runs before a call."""

    def __init__(self, name: str, model: nn.Module, table: SampleRows) -> None:
        self.name, self.model, self.table = name, model, table
        # A model that has such an argument itself gets it.
        self.takes_ids = not name and _takes_ids(model)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Opens a call, if none is open, and takes out of it what it says of adapters."""
        if IDS not in kwargs or not self.takes_ids:
            self._open(module, args, kwargs, None)
            return None
        ids = _named(kwargs[IDS], self.table)
        if self.table.state != CLOSED:
            raise ConfigError(
                f"{IDS}: a call inside a call of the model has the adapters of that: leave it out"
            )
        kwargs = {name: value for name, value in kwargs.items() if name != IDS}
        self._open(module, args, kwargs, _Assigned(len(ids), 1, _places(ids)))
        if in_backward():
            # Of a checkpoint around the whole model, which opens no call.
            torch_private.after_backward(self.table.settle)
        return args, kwargs

    def _open(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        assigned: _Assigned | None,
    ) -> None:
        table, thread = self.table, self.table.thread
        if thread.opened_by == self.name:
            thread.depth += 1
            return
        if thread.state != CLOSED:
            return
        if torch.compiler.is_compiling():
            # What the thread has is what the blocks say: a compiler cannot read context variables.
            if not thread.samples:
                return
        else:
            if thread.call is not None:
                thread.call.abandon()
            if assigned is not None:
                table.reassign(assigned)
            elif not in_backward():
                table.reassign(table.of_blocks())
            if not thread.samples or in_backward():
                return
            thread.call = self
        thread.opened_by, thread.depth = self.name, 1
        try:
            self._begin(module, args, kwargs)
        except BaseException:
            if not torch.compiler.is_compiling():
                self.abandon()
            raise

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trust a call whose form is known, and follow any other one."""
        table, thread = self.table, self.table.thread
        if thread.alike:
            thread.state = FOLDED
            return
        sizes: list[int] = [thread.samples, thread.repeats]
        form = (self.name, module.training, _form((args, kwargs), table, sizes))
        if self.name and not torch.compiler.is_compiling():
            self._check_callers(module)
        if torch.compiler.is_compiling() or torch_private.in_jit_trace():
            # A question about sizes would be one compilation for each; and a trace is for one batch.
            known = form in table.proofs.forms
        else:
            known = table.proofs.knows(form, tuple(sizes))
        if known:
            thread.state = TRUSTED
            return
        if (form, *sizes) in table.folded:
            thread.state = FOLDED
            return
        self._follow(args, kwargs, form, tuple(sizes))

    def _follow(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], form: object, sizes: tuple[int, ...]
    ) -> None:
        tensors = list(tensors_in((args, kwargs)))
        why = _unseen(tensors)
        if why:
            raise ConfigError(
                f"adapter_ids: it is not known yet which axis of such a batch is that of the samples, "
                f"and {why}: call the model itself once before, with a batch of this form, inside adapter_ids"
            )
        thread = self.table.thread
        follower = Follower(self.model, thread.samples, thread.repeats)
        for tensor in tensors:
            follower.enter(tensor)
        thread.follower, thread.form, thread.sizes = follower, form, sizes
        thread.failing = sys.exc_info()[1]
        follow(follower)
        thread.state = FOLLOWED
        follower.__enter__()

    def abandon(self) -> None:
        """Ends a call that was never closed: what ended it was no error."""
        thread = self.table.thread
        follower, thread.follower = thread.follower, None
        thread.opened_by, thread.depth, thread.state, thread.call = None, 0, CLOSED, None
        self.table.settle()
        if follower is not None:
            unfollow()
            if torch_private.dispatch_mode() is follower:
                follower.__exit__(None, None, None)

    def close(self, results: Any) -> None:
        """Closes the call, and notes what was seen of it.

        Raises:
            ConfigError: If its results do not belong to the samples.
        """
        thread = self.table.thread
        if thread.opened_by != self.name:
            return
        thread.depth -= 1
        if thread.depth:
            return
        _remember(self.table, results)
        self._close(results)

    def _close(self, results: Any) -> None:
        table, thread = self.table, self.table.thread
        thread.opened_by, thread.state = None, CLOSED
        if torch.compiler.is_compiling():
            return
        follower, thread.follower = thread.follower, None
        thread.call = None
        table.settle()
        if follower is None:
            return
        follower.__exit__(None, None, None)
        unfollow()
        if sys.exc_info()[1] is not thread.failing:
            return
        follower.check_results(tensors_in(results))
        if follower.by_values:
            return
        if follower.folded:
            table.folded.add((thread.form, *thread.sizes))
        else:
            table.proofs.add(thread.form, thread.sizes)

    def _check_callers(self, module: nn.Module) -> None:
        """Refuses a call by another method of the model: what that did to the batch before was not seen."""
        inside: set[int] = set()
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if owner is not module and isinstance(owner, nn.Module):
                inside = inside or {id(one) for one in self.model.modules()}
                if id(owner) in inside and not str(frame.f_globals.get("__name__")).startswith(
                    _GENERATION
                ):
                    raise ConfigError(
                        f"adapter_ids: {type(owner).__name__}.{frame.f_code.co_name} calls {self.name!r} "
                        "by itself, and what it has done to the samples before was not seen: call the model, "
                        "or that module, or choose one adapter for the whole batch"
                    )
            frame = frame.f_back


class _Exit:
    """What runs behind a call, also behind one that has failed."""

    def __init__(self, entry: _Entry) -> None:
        self.entry = entry

    def __call__(self, _: nn.Module, __: Any, ___: Any, results: Any) -> None:
        """Closes it."""
        self.entry.close(results)


def _named(ids: Any, table: SampleRows) -> list[str | None]:
    """The adapters that a call names: by their names, or by their numbers among those that are active.

    Raises:
        ConfigError: If they are none of these, or a compiler would have to know them.
    """
    if torch.compiler.is_compiling():
        raise ConfigError(
            f"{IDS}: a compiler would compile each order of adapters: call the compiled model inside `with "
            "lora_fx.adapter_ids(model, [...]):`"
        )
    names = [*table._buffers]
    if isinstance(ids, Tensor):
        if ids.dim() != 1 or ids.is_floating_point():
            raise ConfigError(
                f"{IDS}: found a tensor of shape {tuple(ids.shape)} in {ids.dtype}; whole numbers "
                "[samples] are needed"
            )
        ids = ids.tolist()
    if isinstance(ids, str) or not isinstance(ids, list | tuple) or not ids:
        raise ConfigError(f"{IDS} needs one name or number for each sample, found {ids!r}")
    found: list[str | None] = []
    for one in ids:
        if isinstance(one, int) and not isinstance(one, bool) and -1 <= one < len(names):
            found.append(names[one] if one >= 0 else None)
        elif one is None or one in names:
            found.append(one)
        else:
            raise ConfigError(
                f"{IDS}: there is no adapter {one!r} in this model's batches: it has "
                f"{', '.join(map(repr, names))}, numbered from 0, and -1 or None for the base"
            )
    return found


def _remember(table: SampleRows, results: Any) -> None:
    """Lets the backward of a call have its samples again: a checkpoint computes parts of it there."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return
    hook = functools.partial(_replay, table, table.assigned)
    one: Any
    for one in tensors_in(results):
        if one.requires_grad and not one.is_leaf:
            one.register_hook(hook)


def _replay(table: SampleRows, assigned: _Assigned, _: Tensor) -> None:
    if table.assigned != assigned and in_backward():
        table.reassign(assigned)
        torch_private.after_backward(table.settle)


def _form(value: Any, table: SampleRows, sizes: list[int]) -> Any:
    """What of a call's arguments may decide which axis is that of the samples, but for how large they are.

    Args:
        value: The arguments, or one.
        table: Says how many samples there are: a size counts by whether it is theirs.
        sizes: Takes all sizes.
    """
    if isinstance(value, Tensor):
        sizes.extend(value.shape)
        whole = table.samples * table.repeats
        return tuple(
            "batch" if one == whole else "samples" if one == table.samples else min(one, 2)
            for one in value.shape
        )
    if isinstance(value, list | tuple):
        return (type(value), *[_form(one, table, sizes) for one in value])
    if isinstance(value, Mapping):
        return (type(value), *[(key, _form(one, table, sizes)) for key, one in value.items()])
    if isinstance(value, _SIMPLE):
        return (type(value), value)
    if hasattr(value, "__dataclass_fields__"):
        return (type(value), *[_form(one, table, sizes) for one in vars(value).values()])
    return type(value)


def _unseen(tensors: list[Tensor]) -> str:
    """Why a call cannot be followed, or nothing."""
    if torch.compiler.is_compiling():
        return "a compiler sees no values"
    if torch_private.in_jit_trace():
        return "torch.jit.trace sees one batch only"
    if torch_private.in_functorch_level():
        return "a transform of torch.func hides axes"
    if any(torch_private.is_fake(one) or one.is_meta for one in tensors):
        return "tensors without values have no samples"
    return ""


# --- sizes ----------------------------------------------------------------------------------------
# Which sizes a form of call was looked at with: code may do something else at others.


_EACH = 4  # sizes of a form that are looked at one by one
_REMEMBERED = 1000  # of those that were let through by their ranges


class Sizes:
    """Forms of calls, with the sizes that each was looked at with.

    The first few sizes of a form are all looked at. Later ones only where one of them is in another range
    than before: powers of two, which code likes to compare with, and the numbers between two of them. A text
    that grows is then looked at a few times, and not at each token.

    Attributes:
        known: Forms with the sizes that are known, as pairs: what is in here needs no other question.
        forms: How many sizes of each were looked at.
    """

    __slots__ = ("_ranges", "_remembered", "forms", "known")

    def __init__(self) -> None:
        self.known: set[tuple[Hashable, Hashable]] = set()
        self.forms: dict[Hashable, int] = {}
        self._ranges: set[tuple[Hashable, tuple[object, ...]]] = set()
        self._remembered = 0

    def add(self, form: Hashable, sizes: tuple[Hashable, ...]) -> None:
        """Notes that a call was looked at."""
        if (form, sizes) not in self.known:
            self.known.add((form, sizes))
            self.forms[form] = self.forms.get(form, 0) + 1
        self._ranges.add((form, _ranges(sizes)))

    def knows(self, form: Hashable, sizes: tuple[Hashable, ...]) -> bool:
        """Whether a call need not be looked at."""
        if (form, sizes) in self.known:
            return True
        if self.forms.get(form, 0) < _EACH or (form, _ranges(sizes)) not in self._ranges:
            return False
        if self._remembered < _REMEMBERED:
            self._remembered += 1
            self.known.add((form, sizes))
        return True

    def __bool__(self) -> bool:
        return bool(self.known)


def _ranges(sizes: Iterable[object]) -> tuple[object, ...]:
    """A number for the range of each size."""
    return tuple(
        2 * one.bit_length() + (one & (one - 1) == 0)
        if isinstance(one, int)
        else _ranges(one)
        if isinstance(one, tuple)
        else one
        for one in sizes
    )
