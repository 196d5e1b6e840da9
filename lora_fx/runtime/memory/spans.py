"""Spans: parts of a layer's own forward that treat each token on its own, computed in tiles of tokens.

Many layers write their MLP out in their forward: ``fc2(activation(fc1(x)))``. A *span* goes from the module
that makes tokens wider to the module that makes them narrower. Between them are operations on each element.

The forward of the layer runs as it is. The first module returns a :class:`LazyTensor`. It has no memory, and
records the operations on it. The last module computes all of them in tiles (:func:`tiles.in_tiles`).

Any other reader gets the values of all tokens, as without tiles: the result is right, and no memory is saved.
Spans of a model are found in its graphs (:mod:`lora_fx.passes.plan.spans`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.kernels import autocast_of
from lora_fx.runtime.loss import ROWS, LazyHistory, drawing, generators, reads_metadata
from lora_fx.runtime.memory.tiles import called, draws, fits, in_tiles, is_silent
from lora_fx.runtime.rows import is_elementwise
from lora_fx.torch_private import pytree

__all__ = ["LazyTensor", "Source", "closed", "lazy_result", "opened", "spanned"]

_REMEDY = "rewrite with memory='balanced'"
_PAST = (
    "a tensor that is computed in tiles of tokens, past PyTorch's Python interface (functions of autograd "
    f"that are not PyTorch's own do so): {_REMEDY}"
)


class Source:
    """A call of the first module of a span.

    Attributes:
        x: The argument of the call, [..., tokens, in].
        module: The module.
        is_computed: True if the result of the call was computed.
        in_tiles: True if the result was computed in tiles.
    """

    def __init__(self, x: Tensor, module: nn.Module) -> None:
        self.x, self.module, self.is_computed, self.in_tiles = x, module, False, False
        self._version = torch_private.version_counter(x)
        self._generators: tuple[Tensor, ...] | None = None

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Return a context to compute the span in. In it, lora_dropout draws the same masks each time.

        Raises:
            ConfigError: If the argument was written into, or if tiles have drawn the masks.
        """
        if torch_private.version_counter(self.x) != self._version:
            raise ConfigError(
                "memory='least': the input of a layer's MLP was written into before the MLP was computed in "
                f"tiles: {_REMEDY}"
            )
        if self.in_tiles and self._generators is not None:
            raise ConfigError(
                f"memory='least': the output of a {type(self.module).__name__} was computed in tiles, and is "
                f"read once more, with other masks of lora_dropout then: {_REMEDY}"
            )
        if self.is_computed:
            return drawing(self._generators, self.x.device)
        self.is_computed = True
        self._generators = generators(self.x.device) if draws(self.module) else None
        return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """Recorded operation of a span. The tokens are passed when the operation runs.

    Attributes:
        function: The operation.
        args, kwargs: The arguments. A step stands for its result, and :data:`ROWS` for the tokens.
        autocast: Returns a context that restores the autocast state of the call.
    """

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]

    def run(self, rows: Tensor, known: dict[_Step, Tensor]) -> Tensor:
        """Return the result for some tokens.

        Args:
            rows: The tokens.
            known: Results of steps for the same tokens. New ones are added.
        """

        def value(leaf: Any) -> Any:
            if isinstance(leaf, _Step):
                return leaf.run(rows, known)
            return rows if leaf is ROWS else leaf

        if self not in known:
            args, kwargs = pytree.tree_map(value, (self.args, self.kwargs))
            with self.autocast():
                known[self] = self.function(*args, **kwargs)
        return known[self]


class LazyTensor(Tensor):
    """Result for all tokens inside a span. The last module of the span computes it in tiles.

    Attributes:
        source: The call of the first module.
        step: The operation that computes the result.
        row: A tensor with the shape, dtype and device of the result for one token.
    """

    source: Source
    step: _Step
    row: Tensor
    _whole: Tensor | None = None

    @staticmethod
    def __new__(cls: type[LazyTensor], shape: Sequence[int], like: Tensor) -> LazyTensor:
        """Return a tensor without memory."""
        options = {"dtype": like.dtype, "device": like.device}
        wrapper: LazyTensor = torch_private.make_wrapper_subclass(cls, shape, **options)
        return wrapper

    def __init__(self, *_: Any) -> None:
        """Do nothing. :func:`_lazy` sets the state."""

    def __repr__(self) -> str:  # type: ignore[override]
        with torch_private.DisableTorchFunctionSubclass():
            return f"LazyTensor({list(self.shape)}, {self.dtype})"

    @property
    def waits(self) -> bool:
        """Return True as long as the values of all tokens have not been computed."""
        return self._whole is None

    def whole(self) -> Tensor:
        """Return the values of all tokens."""
        if self._whole is None:
            # The modes of the span, because the reader may be in inference mode or under no_grad.
            with self.source.computing(), torch.inference_mode(False), torch.enable_grad():
                self._whole = self.step.run(self.source.x, {})
        return self._whole

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Record an elementwise operation for later. Before any other operation, compute all tokens."""
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if all(isinstance(x, LazyTensor) and x.waits for x in tensors):
            if reads_metadata(func):
                with torch_private.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            result = _recorded(func, args, kwargs) if torch.is_grad_enabled() else None
            if result is not None:
                return result
        args, kwargs = pytree.tree_map_only(LazyTensor, LazyTensor.whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse operations that did not pass through ``__torch_function__``.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"memory='least': {func} reads {_PAST}")


def lazy_result(compute: Callable[[Tensor], Tensor], source: Source) -> LazyTensor | None:
    """Return a lazy result of the first module of a span, or None if the result is needed at once.

    Args:
        compute: Function of tokens that returns the result. It is called with zero tokens, to get the shape
            and dtype.
        source: The call of the module.
    """
    x = source.x
    axes = [1] * (x.dim() - 2)
    with torch.no_grad(), torch_private.disable_dispatch_modes():
        try:
            like = compute(x.detach().reshape(-1, x.shape[-1])[:0].reshape(*axes, 0, x.shape[-1]))
        except Exception:  # noqa: BLE001  some kernels need a token
            return None
        if type(like) is not Tensor or like.shape[:-1] != (*axes, 0):
            return None
        row = like.new_zeros(*axes, 1, like.shape[-1])
    return _lazy(source, _Step(compute, (ROWS,), {}, autocast_of(x.device.type)), row)


def _lazy(source: Source, step: _Step, row: Tensor) -> LazyTensor | None:
    tensors = (source.x, *source.module.parameters())
    anchor = next((tensor for tensor in tensors if tensor.requires_grad), None)
    if anchor is None:
        return None
    make = functools.partial(LazyTensor, (*source.x.shape[:-1], row.shape[-1]), row)
    error = ConfigError(f"memory='least': autograd reached {_PAST}")
    result: LazyTensor = LazyHistory.apply(anchor, make, error)  # type: ignore[no-untyped-call]
    result.source, result.step, result.row = source, step, row
    return result


class _MixingError(Exception):
    """Error for an operation that is not elementwise."""


class _Elementwise(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that raises for operations that are not elementwise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator.

        Raises:
            _MixingError: If the operator might mix elements, write into arguments, or draw random numbers.
        """
        if not is_elementwise(func):
            raise _MixingError
        return func(*args, **(kwargs or {}))


def _recorded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyTensor | None:
    """Return the result of an operation on each element, or None for any other."""
    operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, LazyTensor)]
    if len({operand.source for operand in operands}) != 1:
        return None
    source, row = operands[0].source, operands[0].row
    rows = pytree.tree_map_only(LazyTensor, lambda x: x.row, (args, kwargs))
    try:
        # One token shows the operators that run, and the form of the result.
        with torch.no_grad(), torch_private.disable_dispatch_modes(), _Elementwise():  # type: ignore[no-untyped-call]
            result = func(*rows[0], **rows[1])
    except (_MixingError, RuntimeError, TypeError, ValueError):
        return None  # PyTorch raises its own error on the values
    if result is row:
        return operands[0]  # such as dropout in eval mode
    if type(result) is not Tensor or (result.shape, result.device) != (row.shape, row.device):
        return None
    args, kwargs = pytree.tree_map_only(LazyTensor, lambda x: x.step, (args, kwargs))
    return _lazy(source, _Step(func, args, kwargs, autocast_of(row.device.type)), result)


# --- modules of a span ------------------------------------------------------------------------------------

_first: ContextVar[frozenset[int]] = ContextVar("lora_fx_first_of_spans", default=frozenset())
"""Ids of the first modules of the spans in the layer that is running."""


def spanned(forward: Callable[..., Any], spans: Sequence[Sequence[str]]) -> Callable[..., Any]:
    """Wrap the forward of a layer so that its spans run in tiles, while gradients are enabled.

    Args:
        forward: Forward of the layer.
        spans: Names of the modules of each span, the first module first.
    """

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        first = set()
        for names in spans:
            with contextlib.suppress(AttributeError):  # the user has taken a module out
                modules = [self.get_submodule(name) for name in names]
                if all(is_silent(module) and "forward" not in vars(module) for module in modules):
                    first.add(id(modules[0]))
        token = _first.set(frozenset(first))
        try:
            out = forward(self, *args, **kwargs)
        finally:
            _first.reset(token)
        return pytree.tree_map_only(LazyTensor, LazyTensor.whole, out)

    return run


def opened(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of the first module of a span so that it returns a :class:`LazyTensor`."""

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        result = None
        begins = not torch.compiler.is_compiling() and id(self) in _first.get()
        if begins and len(values) == 1 and fits(self, values[0]):
            compute = functools.partial(called, forward, self, next(iter(kwargs), None))
            result = lazy_result(compute, Source(values[0], self))
        return forward(self, *args, **kwargs) if result is None else result

    return run


def closed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of the last module of a span so that it computes the span in tiles."""

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if torch.compiler.is_compiling() or not any(type(value) is LazyTensor for value in values):
            return forward(self, *args, **kwargs)
        if len(values) == 1 and values[0].waits:
            source, step = values[0].source, values[0].step
            narrow = functools.partial(called, forward, self, next(iter(kwargs), None))
            module = nn.ModuleList([source.module, self])
            if fits(module, source.x) and not source.is_computed:
                with source.computing():
                    results = in_tiles(module, lambda rows: narrow(step.run(rows, {})), source.x)
                source.is_computed = source.in_tiles = results is not None
                if source.in_tiles:
                    return results
        args, kwargs = pytree.tree_map_only(LazyTensor, LazyTensor.whole, (args, kwargs))
        return forward(self, *args, **kwargs)

    return run
