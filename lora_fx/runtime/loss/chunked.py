"""A loss of the output of a head, computed a few rows at a time.

A vocabulary is much wider than the input of a head, so that logits, their softmax and their gradient are the
largest tensors of a training step. :class:`Job` takes a chunk of rows through the head, the model's
operations on logits (:mod:`lora_fx.runtime.loss.logits`) and the loss, and runs the backward of the chunk at
once. It keeps only the gradients of the head's input and of the trained weights and factors.

``torch.nn.functional.linear_cross_entropy`` does not suffice. It takes a single dense weight, but a head has
adapters, casts, caps and scales. It also computes the gradient of a frozen weight.
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
    "LARGEST_CHUNK",
    "REMEDY",
    "ROWS",
    "Given",
    "Job",
    "Read",
    "Step",
    "checkpoint_here",
    "drawing",
    "exact_dtype",
    "generators",
    "is_running",
    "kept_here",
    "loss_of",
    "running",
]

CHUNK = 2**21
"""Elements of a chunk of logits: 8 MiB in fp32. A larger input of the head raises it to the input's size."""

LARGEST_CHUNK = 2**27
"""Most elements of a chunk: 512 MiB in fp32, about a thousand rows of a large vocabulary."""

REMEDY = "rewrite with loss='whole'"
"""The remedy in error messages about losses in chunks."""

_local = threading.local()


def is_running() -> bool:
    """Return True while the graph of a head runs, whose reads of the adapted weight are correct.

    The graph contains the branches of the weight, so that :mod:`lora_fx.runtime.watch` skips these reads.
    """
    return getattr(_local, "running", 0) > 0


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Make :func:`is_running` return True inside of the block."""
    _local.running = getattr(_local, "running", 0) + 1
    try:
        yield
    finally:
        _local.running -= 1


class Step(NamedTuple):
    """An operation on rows of logits.

    Attributes:
        function: The function that computes it.
        args, kwargs: The arguments. :data:`ROWS` stands for the rows, and a :class:`Given` for a tensor
            with a gradient.
        autocast: Returns a context that restores the autocast state of the original call.
    """

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]

    def __call__(self, rows: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Return the result for some rows [n, outputs]."""
        args = [
            rows if arg is ROWS else operands[arg.position] if isinstance(arg, Given) else arg
            for arg in self.args
        ]
        with self.autocast():
            return self.function(*args, **self.kwargs)


class Read(NamedTuple):
    """Tensors that a later computation reads, with their version counters.

    Nothing may write into these tensors until then.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, values: Any) -> Read:
        """Record all plain tensors in some values."""
        tensors = tuple(
            tensor
            for tensor in pytree.tree_leaves(values)
            if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_inference()
        )
        return cls(tensors, tuple(torch_private.version_counter(tensor) for tensor in tensors))

    @property
    def changed(self) -> bool:
        """Return True if any of the tensors was written into after it was recorded."""
        return any(
            torch_private.version_counter(tensor) != old
            for tensor, old in zip(self.tensors, self.versions, strict=True)
        )


class Given(NamedTuple):
    """The index of a tensor among the inputs of a loss that require a gradient."""

    position: int


ROWS: Any = object()
"""Placeholder for the rows in the arguments of a step."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A cross entropy or NLL loss that is computed in chunks, from rows of the head's input.

    Attributes:
        steps: The operations on the rows, the head first.
        indices: Indices of the rows, [n].
        target: The class of each row, [n].
        shape: The shape of the targets, and of a loss that is not reduced.
        function: ``cross_entropy`` or ``nll_loss``.
        reduction: "none", "mean" or "sum".
        options: The other arguments of the function.
        autocast: Returns a context that restores the autocast state of the call of the loss.
        length: The number of rows of a chunk.
        again: True to recompute the rows in the backward. Else their gradient is computed with the loss.
        draws: True if the head has dropout.
        read: The tensors that the whole computation reads, if it reads them again in the backward.
    """

    steps: tuple[Step, ...]
    indices: Tensor
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
        """Yield the ranges of rows that are computed together."""
        # Without rows there is one empty chunk, because the mean of no losses is NaN.
        for start in range(0, max(1, len(self.indices)), self.length):
            yield slice(start, start + self.length)

    def of_rows(self, rows: Tensor, chunk: slice, operands: Sequence[Tensor]) -> Tensor:
        """Run all steps on some rows of the head's input, and return the loss of each row, or their sum."""
        value = rows
        with running():
            for step in self.steps:
                value = step(value, operands)
        reduction = "none" if self.reduction == "none" else "sum"
        with self.autocast():
            return self.function(value, self.target[chunk], reduction=reduction, **self.options)

    def count(self) -> Tensor | None:
        """Return the divisor of a mean; None for other reductions.

        It is the number of rows whose target is not ignored, or the sum of the class weights of these rows.
        """
        if self.reduction != "mean":
            return None
        counted = self.target != self.options["ignore_index"]
        weight: Tensor | None = self.options["weight"]
        return counted.sum() if weight is None else weight[self.target[counted]].sum()

    def value(self, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Compute the loss without gradients."""
        flat = x.reshape(-1, x.shape[-1])
        losses = [
            self.of_rows(flat[self.indices[chunk]], chunk, operands) for chunk in self.chunks()
        ]
        if self.reduction == "none":
            return torch.cat(losses).view(self.shape)
        return self._total(losses)

    def _total(self, losses: Sequence[Tensor]) -> Tensor:
        count, dtype = self.count(), losses[0].dtype
        total = torch.stack([*losses]).to(exact_dtype(dtype)).sum()
        return (total if count is None else total / count.to(total.dtype)).to(dtype)

    def gradients(
        self,
        x: Tensor,
        operands: Sequence[Tensor],
        wanted: Sequence[bool],
        grad: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss, and the gradients of its inputs.

        Args:
            x: The head's input, [..., in].
            operands: The other inputs that require a gradient.
            wanted: For x and each of ``operands``, True if its gradient is needed now.
            grad: The gradient of the loss. None means 1.
        """
        flat = x.detach().reshape(-1, x.shape[-1])
        tensors = [
            tensor.detach().requires_grad_(on)
            for tensor, on in zip(operands, wanted[1:], strict=True)
        ]
        sums = [
            torch.zeros_like(tensor, dtype=exact_dtype(tensor.dtype)) if on else None
            for tensor, on in zip((flat, *operands), wanted, strict=True)
        ]
        count = self.count()
        losses = [
            self._add_gradients(sums, flat, tensors, chunk, grad, count) for chunk in self.chunks()
        ]
        sources = (flat, *operands)
        results = [
            None if total is None else total.to(tensor.dtype).view(tensor.shape)
            for total, tensor in zip(sums, sources, strict=True)
        ]
        if results[0] is not None:
            results[0] = results[0].view(x.shape)
        value = (
            torch.cat(losses).view(self.shape) if self.reduction == "none" else self._total(losses)
        )
        return value, results

    def _add_gradients(
        self,
        sums: Sequence[Tensor | None],
        flat: Tensor,
        tensors: Sequence[Tensor],
        chunk: slice,
        grad: Tensor | None,
        count: Tensor | None,
    ) -> Tensor:
        """Add the gradients of one chunk to the sums, and return its loss. Keep no tensors of the chunk.

        Args:
            sums: The sums for x and for each of ``tensors``; None for those that need no gradient.
            flat: The head's input, [rows, in].
            tensors: The other inputs, which require a gradient if it is needed.
            chunk: The chunk.
            grad: The gradient of the loss.
            count: The divisor of the loss.
        """
        index = self.indices[chunk]
        rows = flat[index].requires_grad_(sums[0] is not None)
        with torch.enable_grad(), kept_here():
            loss = self.of_rows(rows, chunk, tensors)
            inputs = [tensor for tensor in (rows, *tensors) if tensor.requires_grad]
            start = self._start(loss, chunk, grad, count)
            grads = iter(torch.autograd.grad(loss, inputs, start, allow_unused=True))
        for position, total in enumerate(sums):
            if total is not None and (part := next(grads)) is not None:
                if position:
                    total += part
                else:
                    total.index_add_(0, index, part.to(total.dtype))
        return loss.detach()

    def _start(
        self, loss: Tensor, chunk: slice, grad: Tensor | None, count: Tensor | None
    ) -> Tensor:
        """Return the gradient of the whole loss with respect to the loss of a chunk, to start a backward."""
        if self.reduction == "none":
            assert grad is not None
            return grad.reshape(-1)[chunk]
        start = torch.ones_like(loss, dtype=exact_dtype(loss.dtype)) if grad is None else grad
        start = start if count is None else start / count.to(start.dtype)
        return start.to(loss.dtype)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients of chunks and tiles are summed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextlib.contextmanager
def kept_here() -> Iterator[None]:
    """Hide the saved tensors of a chunk from the model's hooks (checkpoints, offloading)."""
    if torch_private.saved_tensor_hooks() is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda kept: kept):
        yield


def checkpoint_here() -> Any:
    """Return the hook of the checkpoint that will recompute the current code, or None.

    The hook identifies the checkpoint. A reentrant checkpoint has no hook, but it runs its forward without
    gradients.
    """
    hooks = torch_private.saved_tensor_hooks()
    hook = None if hooks is None else hooks[0]
    return hook if getattr(hook, "__module__", None) == checkpoint.__name__ else None


class _Loss(torch.autograd.Function):
    """A loss whose gradient is computed in chunks, together with the loss or in the backward."""

    @staticmethod
    def forward(ctx: Any, job: Job, x: Tensor, *operands: Tensor) -> Tensor:
        ctx.job = job
        if job.again:
            ctx.drawn = generators(x.device) if job.draws else None
            ctx.save_for_backward(x, *operands)
            return job.value(x, operands)
        loss, grads = job.gradients(x, operands, ctx.needs_input_grad[1:])
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
            if any(read.changed for read in ctx.job.read):
                raise LogitsError(
                    "what a loss in chunks was computed of was written into before its backward pass, which "
                    f"reads it once more: {REMEDY}"
                )
            x, *tensors = ctx.saved_tensors
            with drawing(ctx.drawn, x.device):
                results = ctx.job.gradients(x, tensors, ctx.needs_input_grad[1:], grads[0])[1]
        else:
            results = [None if grad is None else grad * grads[0] for grad in ctx.saved_tensors]
        return None, *results


def generators(device: torch.device) -> tuple[Tensor, ...]:
    """Return the states of the random generators that dropout draws from: CPU first, then the device."""
    if device.type == "cpu":
        return (torch.get_rng_state(),)
    module = getattr(torch, device.type)
    return torch.get_rng_state(), module.get_rng_state(device)


@contextlib.contextmanager
def drawing(states: tuple[Tensor, ...] | None, device: torch.device) -> Iterator[None]:
    """Set random generators to saved states inside of the block, and restore them after it."""
    if states is None:
        yield
        return
    devices = [device] if len(states) > 1 else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.set_rng_state(states[0])
        for state in states[1:]:
            getattr(torch, device.type).set_rng_state(state, device)
        yield


def loss_of(job: Job, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """Compute a loss in chunks, with autograd.

    Args:
        job: The loss and its steps.
        x: The head's input, [..., in].
        operands: The other inputs that require a gradient.

    Raises:
        LoraFxError: In a second backward pass.
        LogitsError: In a backward pass that recomputes rows, if one of the inputs was written into.
    """
    loss: Tensor = _Loss.apply(job, x, *operands)  # type: ignore[no-untyped-call]
    return loss
