"""Modules that treat each token on its own, computed a tile of tokens at a time.

A gated MLP makes several tensors of tokens x intermediate size, and a norm makes several in fp32. A tile has
at most :data:`LONGEST` tokens, so these tensors stay small whatever the length of the sequence is. The
backward computes each tile again, and runs its backward at once. Only the input of the module is kept.

The input is saved before the first tile is computed. A block that is recomputed up to its last saved tensor
therefore does not compute the tiles of its last module: the tiles run twice in a step, not three times.

The modules are chosen in :mod:`lora_fx.passes.plan.savings`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_fx import torch_private
from lora_fx.runtime.kernels import TileMasks, autocast_of, transformed
from lora_fx.runtime.loss import drawing, exact_dtype, generators
from lora_fx.runtime.memory.replay import Replay
from lora_fx.runtime.modules import AdapterModule, AdapterState
from lora_fx.torch_private import pytree

__all__ = [
    "LONGEST",
    "SHORTEST",
    "called",
    "draws",
    "fits",
    "in_tiles",
    "is_silent",
    "length_of",
    "tiled",
]

SHORTEST, LONGEST = 256, 4096
"""Least and greatest number of tokens of a tile."""

_TILES = 16  # number of tiles of a sequence, if their length is within these limits
_PACKED = 1024  # least number of tokens with quantized weights, because each tile decodes them

_inside: ContextVar[bool] = ContextVar("lora_fx_inside_tile", default=False)


def length_of(tokens: int, module: nn.Module) -> int:
    """Return the number of tokens of a tile of a module."""
    packed = any(type(p.data) is not Tensor for p in module.parameters())
    return min(max(tokens // _TILES // 8 * 8, _PACKED if packed else SHORTEST), LONGEST)


def tiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of a module so that it runs in tiles, while gradients are enabled.

    Args:
        forward: Forward of a module that takes one tensor, [..., tokens, in]. It returns tensors of shape
            [..., tokens, out], or [tokens, out] with all tokens on one axis. Each token of the results
            depends on the same token of the argument only.
    """

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if torch.compiler.is_compiling() or len(values) != 1 or not fits(self, values[0]):
            return forward(self, *args, **kwargs)
        name = next(iter(kwargs), None)
        results = in_tiles(self, functools.partial(called, forward, self, name), values[0])
        return forward(self, *args, **kwargs) if results is None else results

    return run


def called(forward: Callable[..., Any], module: nn.Module, name: str | None, x: Tensor) -> Any:
    """Call a forward with one argument, by the keyword ``name``, or by position if ``name`` is None."""
    return forward(module, x) if name is None else forward(module, **{name: x})


def in_tiles(module: nn.Module, compute: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Return the results for all tokens, computed in tiles, or None if that is not possible.

    Args:
        module: Module with everything that the results depend on.
        compute: Function that returns the results of some tokens.
        x: All tokens, which :func:`fits` has checked.
    """
    if not all(map(is_silent, _parts(module))) or _counts_tokens(module):
        return None
    parameters = [p for p in module.parameters() if p.requires_grad]
    hooked = any(getattr(p, torch_private.TENSOR_HOOKS) for p in parameters)
    if hooked or not (parameters or x.requires_grad):
        return None
    call = _Call(module, compute, parameters, x)
    kept: Any = _Kept.apply(x, *parameters[:1])  # type: ignore[no-untyped-call]
    try:
        results = _Tiles.apply(kept, kept.grad_fn, call, x, *parameters)  # type: ignore[no-untyped-call]
    except _UnfitError:
        return None
    return pytree.tree_unflatten(results, call.spec)


def fits(module: nn.Module, x: Any) -> bool:
    """Return True if a call with this argument may run in tiles now, and has more tokens than a tile."""
    if not torch.is_grad_enabled() or _inside.get() or torch_private.has_global_hooks():
        return False
    plain = type(x) is Tensor and x.layout is torch.strided and x.dim() >= 2
    if not plain or not x.is_floating_point() or transformed():
        return False
    tokens = x.shape[:-1].numel()
    longer: bool = tokens > length_of(tokens, module)
    return longer


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules inside of a module, but not those of adapters."""
    for part in module.children():
        if not isinstance(part, AdapterModule):
            yield part
            yield from _parts(part)


def is_silent(part: nn.Module) -> bool:
    """Return True if a module may run tile by tile: it has no active dropout, and no hooks that see tiles."""
    draws = part.training and getattr(part, "p", False) and "Dropout" in type(part).__name__
    return not (draws or any(getattr(part, name) for name in torch_private.MODULE_HOOKS))


def _counts_tokens(module: nn.Module) -> bool:
    """Return True if a module must not run in tiles, because its adapter has state.

    Training computes the state from all tokens of a call.
    """
    return any(isinstance(part, AdapterState) for part in module.modules())


def draws(module: nn.Module) -> bool:
    """Return True if an adapter in a module draws masks for its dropout."""
    parts = (part for part in module.modules() if isinstance(part, nn.Dropout))
    return any(part.training and part.p for part in parts)


class _UnfitError(Exception):
    """Error for a module that does not return one row for each token of a tile.

    Planning checks modules with an input of another size, so this may first show in a call.
    """


class _Call:
    """Call of a module, tile by tile.

    Attributes:
        module: The module.
        parameters: Its trained parameters.
        shape: Shape of the argument.
        length: Tokens of a tile.
        replay: Context that restores the state of the module in the forward.
        generators: States of the random generators before the first tile; None if nothing is drawn.
        spec: Structure of the result, once a tile is computed.
    """

    spec: Any = None

    def __init__(
        self,
        module: nn.Module,
        compute: Callable[[Tensor], Any],
        parameters: Sequence[nn.Parameter],
        x: Tensor,
    ) -> None:
        self.module, self.parameters, self.shape = module, parameters, x.shape
        self.length = length_of(x.shape[:-1].numel(), module)
        self._compute = compute
        self._autocast = autocast_of(x.device.type)
        self.generators = generators(x.device) if draws(module) else None
        self.replay = Replay(module)

    def run(self, rows: Tensor, tile: slice, masks: TileMasks) -> list[Tensor]:
        """Compute the results of a tile. The module gets as many axes as in the call without tiles."""
        x = rows.reshape(*[1] * (len(self.shape) - 2), *rows.shape)
        token = _inside.set(True)
        try:
            with self._autocast(), masks.tile(tile):
                result = self._compute(x)
        finally:
            _inside.reset(token)
        results, self.spec = pytree.tree_flatten(result)
        shapes = (x.shape[:-1], rows.shape[:1])
        if not all(isinstance(r, Tensor) and r.shape[:-1] in shapes for r in results):
            raise _UnfitError
        return results

    def whole(self, result: Tensor) -> Tensor:
        """Return an uninitialized result for all tokens, like the result of a tile."""
        apart = result.dim() == len(self.shape)
        return result.new_empty(*(self.shape[:-1] if apart else (self.tokens,)), result.shape[-1])

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.shape[:-1].numel()

    def tiles(self) -> Iterator[slice]:
        """Yield the tokens of each tile."""
        for start in range(0, self.tokens, self.length):
            yield slice(start, start + self.length)


class _Kept(torch.autograd.Function):
    """Autograd function that saves the input of the tiles before any tile is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Tiles(torch.autograd.Function):
    """Autograd function that computes a module in tiles, and computes each tile again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, node: Any, call: _Call, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.node, ctx.call = node, call
        rows, wholes, masks = x.reshape(-1, x.shape[-1]), None, TileMasks(call.tokens)
        for tile in call.tiles():
            results = call.run(rows[tile], tile, masks)
            wholes = wholes or [call.whole(result) for result in results]
            for whole, result in zip(wholes, results, strict=True):
                _rows(whole)[tile] = _rows(result)
        assert wholes is not None
        ctx.mark_non_differentiable(*(whole for whole in wholes if not whole.is_floating_point()))
        return tuple(wholes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        (x,) = ctx.node.saved_tensors
        wants = ctx.needs_input_grad[3]
        rows = x.detach().reshape(-1, x.shape[-1])
        of_x = torch.empty_like(rows) if wants else None
        sums = [torch.zeros_like(p, dtype=exact_dtype(p.dtype)) for p in call.parameters]
        masks = TileMasks(call.tokens)
        with call.replay, drawing(call.generators, x.device):
            for tile in call.tiles():
                part = rows[tile].requires_grad_(wants)
                with torch.enable_grad():
                    results = call.run(part, tile, masks)
                outs, starts = [], []
                for result, grad in zip(results, grads, strict=True):
                    if result.requires_grad:
                        outs.append(result)
                        starts.append(_rows(grad)[tile].view(result.shape))
                sources = [*((part,) if wants else ()), *call.parameters]
                gradients: list[Tensor | None] = [
                    *torch.autograd.grad(outs, sources, starts, allow_unused=True)
                ]
                if of_x is not None:
                    first = gradients.pop(0)
                    of_x[tile] = 0 if first is None else first
                for total, more in zip(sums, gradients, strict=True):
                    if more is not None:
                        total += more
        of_parameters = [total.to(p.dtype) for total, p in zip(sums, call.parameters, strict=True)]
        return None, None, None, None if of_x is None else of_x.view(x.shape), *of_parameters


def _rows(x: Tensor) -> Tensor:
    """Return a tensor with all tokens on the first axis, as a view if possible."""
    return x.reshape(-1, x.shape[-1])
