"""Blocks of a model whose forward runs again in the backward pass, so that only their input is kept.

This is PyTorch's activation checkpointing without reentrant autograd (arXiv:1604.06174), with the inputs of
the blocks on the host (:mod:`lora_fx.runtime.offload`). Layers of transformers call
:func:`recompute_block` themselves, and leave out their cache. Other blocks get it around their forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_fx import torch_private
from lora_fx.runtime.masks import transformed
from lora_fx.runtime.offload import on_host
from lora_fx.runtime.recompute import lazy_copy
from lora_fx.torch_private import pytree

__all__ = ["members_of_block", "recompute_block", "recomputed", "recomputing_in"]

_Contexts = Callable[[], contextlib.AbstractContextManager[Any]]

_around: ContextVar[_Contexts] = ContextVar("lora_fx_blocks", default=contextlib.nullcontext)


@contextlib.contextmanager
def recomputing_in(context: _Contexts) -> Iterator[None]:
    """Run blocks again inside of a context. Modes of the forward are not active in the backward."""
    token = _around.set(context)
    try:
        yield
    finally:
        _around.reset(token)


def recompute_block(function: Callable[..., Any], *args: Any) -> Any:
    """Call a block, and keep only its arguments for the backward, which calls it again.

    Args:
        function: The block's forward. Layers of transformers pass a ``functools.partial`` of their module.
        args: Its arguments. Tensors are kept on the host if the device has its own memory.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False)
    contexts = functools.partial(_contexts, _module_of(function), _around.get())
    with on_host(args):
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that runs again in the backward, in training with gradients.

    A call that gets an object which the block might change, such as a cache, runs as it is.
    """

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        again = self.training and torch.is_grad_enabled() and not transformed()
        if not again or not all(map(_is_plain, pytree.tree_leaves((args, kwargs)))):
            return forward(self, *args, **kwargs)
        return recompute_block(functools.partial(forward, self, **kwargs), *args)

    return run


def members_of_block(cls: type[nn.Module]) -> dict[str, Any]:
    """Return the members that make a layer of transformers recompute itself; empty for other classes."""
    if not any(base.__name__ == "GradientCheckpointingLayer" for base in cls.__mro__):
        return {}
    return {"gradient_checkpointing": True, _FUNCTION: _Function()}


_FUNCTION = "_gradient_checkpointing_func"


class _Function:
    """Attribute with the function that recomputes a layer of transformers.

    ``gradient_checkpointing_enable`` sets it, too. The layers go on moving their inputs to the host, and what
    was set comes into force after a merge.
    """

    def __get__(self, layer: nn.Module | None, owner: type) -> Any:
        return recompute_block

    def __set__(self, layer: nn.Module, value: Any) -> None:
        layer.__dict__[_FUNCTION] = value


_PLAIN = (Tensor, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN)


def _module_of(function: Callable[..., Any]) -> nn.Module | None:
    owner = function.args[0] if isinstance(function, functools.partial) and function.args else None
    return owner if isinstance(owner, nn.Module) else None


def _contexts(module: nn.Module | None, around: _Contexts) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _Again(module, around)


class _Again:
    """Context of a block that runs again, without a second update of its buffers (statistics of batch norms).

    A graph that is kept for two backwards enters it twice.
    """

    def __init__(self, module: nn.Module | None, around: _Contexts) -> None:
        self._buffers = [] if module is None else [*module.buffers()]
        self._around = around
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(self._around())
        copies = [(buffer, lazy_copy(buffer), _state(buffer)) for buffer in self._buffers]
        self._stack.callback(_restore, copies)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _restore(copies: Sequence[tuple[Tensor, Tensor, tuple[int, int]]]) -> None:
    with torch.no_grad():
        for buffer, copy, state in copies:
            if _state(buffer) != state:
                buffer.copy_(copy)


def _state(buffer: Tensor) -> tuple[int, int]:
    """Return what changes with a write. The kernels of batch norms do not bump the version counter."""
    return torch_private.version_counter(buffer), torch_private.data_address(buffer)
