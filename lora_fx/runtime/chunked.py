"""A loss of the output of a head, computed a few rows at a time.

A vocabulary is much wider than what a head reads, so that logits, their softmax and their gradient are the
largest tensors of a training step. :class:`Job` takes a chunk of rows through the head, through what the
model does with logits (:mod:`lora_fx.runtime.logits`) and into the loss, and goes back at once: what is kept
is the gradient of what the head reads, and those of weights and factors that are trained.

``torch.nn.functional.linear_cross_entropy`` does not serve: it takes one dense weight, where a head has
adapters, casts, caps and scales, and it computes the gradient of a frozen weight, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import checkpoint

from lora_fx import torch_private
from lora_fx.errors import LogitsError, LoraFxError
from lora_fx.torch_private import pytree

__all__ = [
    "CHUNK",
    "REMEDY",
    "ROWS",
    "Given",
    "Job",
    "Read",
    "Step",
    "checkpoint_here",
    "is_running",
    "kept_here",
    "loss_of",
    "running",
]

CHUNK = 2**21
"""Elements of a chunk of logits, where the head's input has no more: 8 MiB in fp32."""

REMEDY = "rewrite without loss='chunked'"
"""What to do where chunks are in the way."""

_local = threading.local()


def is_running() -> bool:
    """Whether the graph of a head runs: it holds the branches of its weight, whatever runs it."""
    return getattr(_local, "running", 0) > 0


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Says so of what runs inside."""
    _local.running = getattr(_local, "running", 0) + 1
    try:
        yield
    finally:
        _local.running -= 1


class Step(NamedTuple):
    """An operation on rows of logits.

    Attributes:
        function: What computes it.
        args, kwargs: Of it; the rows are where :data:`ROWS` is, and tensors with a gradient where a
            :class:`Given` is.
        autocast: Puts autocast to what it was.
    """

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]

    def __call__(self, rows: Tensor, given: Sequence[Tensor]) -> Tensor:
        """The result for some rows [n, outputs]."""
        own = [
            rows if one is ROWS else given[one.place] if isinstance(one, Given) else one
            for one in self.args
        ]
        with self.autocast():
            return self.function(*own, **self.kwargs)


class Read(NamedTuple):
    """Tensors that are read later, with their versions: nothing may write into them until then."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, values: Any) -> Read:
        """All plain tensors in some values."""
        found = tuple(
            one
            for one in pytree.tree_leaves(values)
            if type(one) in (Tensor, torch.nn.Parameter) and not one.is_inference()
        )
        return cls(found, tuple(torch_private.version_counter(one) for one in found))

    @property
    def changed(self) -> bool:
        """Whether one was written into."""
        return any(
            torch_private.version_counter(one) != old
            for one, old in zip(self.tensors, self.versions, strict=True)
        )


class Given(NamedTuple):
    """The place of a tensor among those that a loss is given."""

    place: int


ROWS: Any = object()
"""Stands for the rows in the arguments of a step."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A loss of rows.

    Attributes:
        steps: What is computed of the rows of the head's input, the head first.
        places: Which rows, [n].
        target: The class of each, [n].
        shape: Of the targets, and of a loss that is not reduced.
        function: ``cross_entropy`` or ``nll_loss``.
        reduction: "none", "mean" or "sum".
        options: Of the function, the others.
        autocast: Puts autocast to what it was where the loss was called.
        length: Rows of a chunk.
        again: Whether rows are computed again in the backward. Else their gradient is computed with the loss.
        draws: Whether the head drops something at random.
        read: What all of it reads.
    """

    steps: tuple[Step, ...]
    places: Tensor
    target: Tensor
    shape: torch.Size
    function: Callable[..., Tensor]
    reduction: str
    options: Mapping[str, Any]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    length: int
    again: bool
    draws: bool
    read: tuple[Read, ...]

    def chunks(self) -> Iterator[slice]:
        """Which rows are computed together."""
        # No row is a chunk, too: the mean of no loss is not a number.
        for start in range(0, max(1, len(self.places)), self.length):
            yield slice(start, start + self.length)

    def of_rows(self, rows: Tensor, chunk: slice, given: Sequence[Tensor]) -> Tensor:
        """The loss of each row of a chunk, or their sum."""
        value = rows
        with running():
            for step in self.steps:
                value = step(value, given)
        reduction = "none" if self.reduction == "none" else "sum"
        with self.autocast():
            return self.function(value, self.target[chunk], reduction=reduction, **self.options)

    def count(self) -> Tensor | None:
        """What a mean divides by: how many rows count, or the sum of their weights."""
        if self.reduction != "mean":
            return None
        counted = self.target != self.options["ignore_index"]
        weight: Tensor | None = self.options["weight"]
        return counted.sum() if weight is None else weight[self.target[counted]].sum()

    def value(self, x: Tensor, given: Sequence[Tensor]) -> Tensor:
        """The loss alone."""
        flat = x.reshape(-1, x.shape[-1])
        found = [self.of_rows(flat[self.places[one]], one, given) for one in self.chunks()]
        if self.reduction == "none":
            return torch.cat(found).view(self.shape)
        return self._total(found)

    def _total(self, found: Sequence[Tensor]) -> Tensor:
        count, dtype = self.count(), found[0].dtype
        total = torch.stack([*found]).to(_exact(dtype)).sum()
        return (total if count is None else total / count.to(total.dtype)).to(dtype)

    def gradients(
        self,
        x: Tensor,
        given: Sequence[Tensor],
        wanted: Sequence[bool],
        grad: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and the gradients of what goes into it.

        Args:
            x: The head's input, [..., in].
            given: The other tensors that require a gradient.
            wanted: Whether x and they do now.
            grad: The gradient of the loss; None for 1.
        """
        flat = x.detach().reshape(-1, x.shape[-1])
        tensors = [
            one.detach().requires_grad_(on) for one, on in zip(given, wanted[1:], strict=True)
        ]
        sums = [
            torch.zeros_like(one, dtype=_exact(one.dtype)) if on else None
            for one, on in zip((flat, *given), wanted, strict=True)
        ]
        count, found = self.count(), []
        for chunk in self.chunks():
            places = self.places[chunk]
            rows = flat[places].requires_grad_(wanted[0])
            with torch.enable_grad(), kept_here():
                loss = self.of_rows(rows, chunk, tensors)
                inputs = [one for one in (rows, *tensors) if one.requires_grad]
                start = self._start(loss, chunk, grad, count)
                each = iter(torch.autograd.grad(loss, inputs, start, allow_unused=True))
            found.append(loss.detach())
            for place, total in enumerate(sums):
                if total is not None and (one := next(each)) is not None:
                    if place:
                        total += one
                    else:
                        total.index_add_(0, places, one.to(total.dtype))
            del loss, each, one
        own = (flat, *given)
        results = [
            None if total is None else total.to(one.dtype).view(one.shape)
            for total, one in zip(sums, own, strict=True)
        ]
        if results[0] is not None:
            results[0] = results[0].view(x.shape)
        value = (
            torch.cat(found).view(self.shape) if self.reduction == "none" else self._total(found)
        )
        return value, results

    def _start(
        self, loss: Tensor, chunk: slice, grad: Tensor | None, count: Tensor | None
    ) -> Tensor:
        """The gradient of the loss of a chunk."""
        if self.reduction == "none":
            assert grad is not None
            return grad.reshape(-1)[chunk]
        start = torch.ones_like(loss, dtype=_exact(loss.dtype)) if grad is None else grad
        start = start if count is None else start / count.to(start.dtype)
        return start.to(loss.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """In which chunks are added up."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextlib.contextmanager
def kept_here() -> Iterator[None]:
    """Keeps what a chunk keeps from hooks that are there for the model (checkpoints, offloading)."""
    if torch_private.saved_tensor_hooks() is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda kept: kept):
        yield


def checkpoint_here() -> Any:
    """What tells a checkpoint that computes again what runs now; None where there is none.

    A reentrant one has no gradients then.
    """
    hooks = torch_private.saved_tensor_hooks()
    found = None if hooks is None else hooks[0]
    return found if getattr(found, "__module__", None) == checkpoint.__name__ else None


class _Loss(torch.autograd.Function):
    """A loss whose gradient is there when it is, or is computed by chunks in the backward."""

    @staticmethod
    def forward(ctx: Any, job: Job, x: Tensor, *given: Tensor) -> Tensor:
        ctx.job = job
        if job.again:
            ctx.drawn = _generators(x.device) if job.draws else None
            ctx.save_for_backward(x, *given)
            return job.value(x, given)
        loss, grads = job.gradients(x, given, ctx.needs_input_grad[1:])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise LoraFxError(
                "a loss that was computed in chunks cannot be differentiated twice (create_graph=True): "
                f"{REMEDY}"
            )
        if ctx.job.again:
            if any(one.changed for one in ctx.job.read):
                raise LogitsError(
                    "what a loss in chunks was computed of was written into before its backward pass, which "
                    f"reads it once more: {REMEDY}"
                )
            x, *given = ctx.saved_tensors
            with _drawing(ctx.drawn, x.device):
                found = ctx.job.gradients(x, given, ctx.needs_input_grad[1:], grads[0])[1]
        else:
            found = [None if one is None else one * grads[0] for one in ctx.saved_tensors]
        return None, *found


def _generators(device: torch.device) -> tuple[Tensor, ...]:
    """The states of the generators that masks are drawn from."""
    if device.type == "cpu":
        return (torch.get_rng_state(),)
    module = getattr(torch, device.type)
    return torch.get_rng_state(), module.get_rng_state(device)


@contextlib.contextmanager
def _drawing(states: tuple[Tensor, ...] | None, device: torch.device) -> Iterator[None]:
    """Draws what was drawn from those states, and then goes on as if it had not."""
    if states is None:
        yield
        return
    devices = [device] if len(states) > 1 else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.set_rng_state(states[0])
        for state in states[1:]:
            getattr(torch, device.type).set_rng_state(state, device)
        yield


def loss_of(job: Job, x: Tensor, given: Sequence[Tensor]) -> Tensor:
    """The loss, with its gradient.

    Args:
        job: What is computed.
        x: The head's input, [..., in].
        given: The other tensors that require a gradient.

    Raises:
        LoraFxError: In a second backward pass.
        LogitsError: In a backward pass that computes rows again, if what it reads was written into.
    """
    loss: Tensor = _Loss.apply(job, x, *given)  # type: ignore[no-untyped-call]
    return loss
