"""Blocks of a model whose forward runs again in the backward pass, so that only their inputs are kept.

This is PyTorch's activation checkpointing without reentrant autograd (arXiv:1604.06174), with the inputs of
the blocks on the host (:mod:`lora_fx.runtime.memory.offload`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_fx.runtime.kernels import transformed
from lora_fx.runtime.memory.offload import on_host
from lora_fx.runtime.memory.replay import Replay
from lora_fx.torch_private import pytree

__all__ = ["recomputed", "recomputing_in"]

_Contexts = Callable[[], contextlib.AbstractContextManager[Any]]

_around: ContextVar[_Contexts] = ContextVar("lora_fx_blocks", default=contextlib.nullcontext)


@contextlib.contextmanager
def recomputing_in(context: _Contexts) -> Iterator[None]:
    """Make the backward run blocks again inside of ``context``, while this context manager is active.

    The modes of the forward, which ``context`` restores, have ended when the backward runs.
    """
    token = _around.set(context)
    try:
        yield
    finally:
        _around.reset(token)


def recomputed(forward: Callable[..., Any], blocks: int) -> Callable[..., Any]:
    """Wrap the forward of a block so that the backward recomputes it, in training with gradients.

    An empty cache of keys and values, which models of transformers create by default, is left out. A call
    with any other object that the block might change, such as a filled cache, is not recomputed.

    Args:
        forward: The forward of a block.
        blocks: The number of blocks of the model.
    """

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()) or transformed():
            return forward(self, *args, **kwargs)
        inputs = _without_cache(args, kwargs)
        leaves, spec = pytree.tree_flatten(inputs, is_leaf=_is_leaf)
        if not all(isinstance(leaf, _PLAIN) for leaf in leaves):
            return forward(self, *args, **kwargs)
        tensors = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        # Tensors are passed as arguments, so that PyTorch detects writes into them before the backward.
        def call(*values: Tensor) -> Any:
            for index, value in zip(tensors, values, strict=True):
                # An expanded view has no recipe (kernels/recompute.py). Inputs on the host would lose theirs.
                leaves[index] = value.expand_as(value) if value.requires_grad else value
            positional, keywords = pytree.tree_unflatten(leaves, spec)
            leaves[:] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return forward(self, *positional, **keywords)

        return _checkpointed(self, call, [leaves[index] for index in tensors], blocks)

    return run


def _checkpointed(
    module: nn.Module, call: Callable[..., Any], tensors: Sequence[Tensor], blocks: int
) -> Any:
    if torch.compiler.is_compiling():
        return checkpoint(call, *tensors, use_reentrant=False)
    contexts = (contextlib.nullcontext(), Replay(module, _around.get()))
    with on_host(tensors, blocks):
        return checkpoint(call, *tensors, use_reentrant=False, context_fn=lambda: contexts)


_PLAIN = (Tensor, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice)
_CONTAINERS = (tuple, list, dict)


def _is_leaf(value: Any) -> bool:
    return type(value) not in _CONTAINERS


def _without_cache(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Replace each empty cache of keys and values among the arguments by None.

    If a keyword argument was such a cache, and ``use_cache`` was passed, ``use_cache`` becomes False.
    """

    def emptied(value: Any) -> Any:
        length = getattr(value, "get_seq_length", None)
        return (
            None if length is not None and not isinstance(value, _PLAIN) and not length() else value
        )

    named = {name: emptied(value) for name, value in kwargs.items()}
    if "use_cache" in named and any(named[name] is not value for name, value in kwargs.items()):
        named["use_cache"] = False
    return tuple(map(emptied, args)), named
