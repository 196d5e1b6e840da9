"""Lazy logits: a loss computes them a few rows at a time, so that they never exist all at once.

With ``rewrite(..., loss="chunked")`` the graph of the head calls a :class:`Head`
(:mod:`lora_fx.passes.optimize.chunk_loss`). In a training call of the model the head computes nothing. It
returns :class:`Logits`, a tensor that knows its shape and how to compute itself. It records the operations of
the model between head and loss: views, slices, casts, a soft cap, a scale. A cross entropy then takes a few
rows at a time through the head and these operations, and computes their gradient at once
(:mod:`lora_fx.runtime.loss.chunked`).

Any other operation of the call computes all logits, as without the option: the result is right, and no memory
is saved. When the model's forward ends, logits that no loss has used are computed. In place of the other
logits, the output holds a :class:`Gone`, which raises a :class:`lora_fx.errors.LogitsError` when it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lora_fx import torch_private
from lora_fx.errors import LogitsError, LoraFxError
from lora_fx.ir import thaw
from lora_fx.runtime.kernels import Subgraph, autocast_of, transformed
from lora_fx.runtime.loss import chunked
from lora_fx.runtime.loss.chunked import REMEDY, ROWS, Given, Job, Read, Step, loss_of, running
from lora_fx.runtime.loss.lazy import LazyHistory, name_of, reads_metadata
from lora_fx.torch_private import pytree

__all__ = ["Gone", "Head", "Logits", "head_of", "scoped"]

_local = threading.local()


# --- the call of the model --------------------------------------------------------------------------------


def scoped(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of a rewritten model so that heads return lazy logits in training.

    Args:
        forward: The unbound forward, which takes the module first.
    """

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            with _inside(None):
                return forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            _refuse_compiling()
        if transformed():
            raise LoraFxError(
                f"loss='chunked' keeps no graph of its loss, which torch.func, forward-mode derivatives and "
                f"torch.jit.trace need: {REMEDY} for them, or call the model in eval mode"
            )
        scope = _Scope()
        with _inside(scope):
            out = forward(self, *args, **kwargs)
        return scope.close(out)

    return run


def _refuse_compiling() -> NoReturn:
    raise LoraFxError(f"torch.compile cannot see into loss='chunked': {REMEDY} to compile a model")


# Dynamo graph-breaks at this call, so that the user sees our error and not its own.
torch_private.make_uncompilable(
    _refuse_compiling,
    f"torch.compile cannot see into loss='chunked' of lora_fx: {REMEDY} to compile a model",
)


@contextlib.contextmanager
def _inside(scope: _Scope | None) -> Iterator[None]:
    outer = getattr(_local, "scope", None)
    _local.scope = scope
    try:
        yield
    finally:
        _local.scope = outer


class _Scope:
    """One call of the model, with the logits that its heads have returned.

    Attributes:
        groups: The logits of each call of a head.
        checkpoint: The checkpoint that recomputes the whole call in the backward, or None.
    """

    def __init__(self) -> None:
        self.groups: list[_Group] = []
        self.checkpoint = chunked.checkpoint_here()

    @property
    def is_whole(self) -> bool:
        """Return True unless a checkpoint is active that recomputes only a part of the call."""
        return chunked.checkpoint_here() is self.checkpoint

    def close(self, out: Any) -> Any:
        """End a call of the model. Compute logits that no loss has used, and drop the inputs of the heads.

        Args:
            out: The output of the forward.

        Returns:
            The output without any :class:`Logits` in it.
        """
        for group in self.groups:
            group.close()
        return _settled(out, set()) if self.groups else out


def _settled(value: Any, seen: set[int]) -> Any:
    """Return a value with its logits replaced by computed tensors or by :class:`Gone`.

    Mappings and dataclasses are changed in place, such as the outputs of transformers.

    Args:
        value: Any value, nested or not.
        seen: Ids of the enclosing containers, because a container may hold itself.
    """
    if isinstance(value, Logits):
        return value._settled()
    if id(value) in seen:
        return value
    seen = {*seen, id(value)}
    if isinstance(value, list | tuple):
        items = [_settled(item, seen) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MutableMapping):
        for key, old in list(value.items()):
            if (new := _settled(old, seen)) is not old:
                value[key] = new
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            old = getattr(value, field.name, None)
            if (new := _settled(old, seen)) is not old:
                object.__setattr__(value, field.name, new)
    return value


# --- the head ---------------------------------------------------------------------------------------------


class Head(Subgraph):
    """Callable that computes the logits of hidden states, with the LoRA branches of the head.

    Rows are independent, so that chunks of them can be computed. :func:`head_of` creates it.

    Attributes:
        outputs: The number of classes, which is the width of the logits.
        draws: True if a branch has dropout.
    """

    def __init__(self, name: str, graph: fx.Graph, outputs: int, draws: bool) -> None:
        super().__init__(name, graph, f"<head {name}>")
        self.outputs, self.draws = outputs, draws

    def __reduce__(self) -> tuple[Any, ...]:
        return _thawed, (self.__name__, self.frozen, self.outputs, self.draws)

    def __call__(self, x: Tensor, *leaves: Any) -> Tensor:
        """Return the logits, which are lazy in a training call of the model.

        Args:
            x: [..., in].
            leaves: The other inputs of the graph: weights, factors, settings.

        Returns:
            [..., outputs].
        """
        if torch.compiler.is_compiling():
            return self.run(None, x, *leaves)
        scope = getattr(_local, "scope", None)
        later = torch.is_grad_enabled() and _fits(x, leaves)
        if scope is None or not scope.is_whole or not later:
            with running():
                return self.run(None, x, *leaves)
        group = _Group(self, x, leaves, scope)
        scope.groups.append(group)
        rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])
        return group.logits(_Form(rows, rows.dim(), (), group.dtype), None)


def _fits(x: Tensor, leaves: Sequence[Any]) -> bool:
    """Return True if rows can be computed in chunks: all tensors are plain, and some require a gradient."""
    tensors = [tensor for tensor in leaves if isinstance(tensor, Tensor)]
    return (
        all(_is_plain(tensor) for tensor in (x, *tensors))
        and x.dim() > 1
        and x.numel() > 0
        and any(tensor.requires_grad for tensor in (x, *tensors))
    )


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and not value.is_nested
        and not value.is_inference()
    )


_heads: weakref.WeakValueDictionary[Any, Head] = weakref.WeakValueDictionary()


def head_of(name: str, graph: fx.Graph, outputs: int, draws: bool) -> Head:
    """Return the head of a graph. Equal graphs share one object.

    Args:
        name: Name of the function in generated code.
        graph: A graph that computes rows of logits. Its first placeholder is the head's input. It must not be
            edited afterwards.
        outputs: The number of classes.
        draws: True if a branch has dropout.
    """
    key = (name, Subgraph.key(graph), outputs, draws)
    head = _heads.get(key)
    return head if head is not None else _heads.setdefault(key, Head(name, graph, outputs, draws))


def _thawed(name: str, frozen: Any, outputs: int, draws: bool) -> Head:
    return head_of(name, thaw(frozen), outputs, draws)


# --- logits -----------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """The layout of lazy logits, and the operations that compute them from the head's output.

    Attributes:
        indices: Indices of the rows of the head's input, in the shape of the logits without the class axis.
        axis: The class axis.
        steps: The operations on each row after the head.
        dtype: The dtype of the logits.
        read: The other tensors that the steps read.
    """

    indices: Tensor
    axis: int
    steps: tuple[Step, ...]
    dtype: torch.dtype
    read: tuple[Read, ...] = ()


_UNMADE = (
    "logits that are computed in chunks went into a function of autograd that is not PyTorch's own (full "
    f"backward hooks of a module are one, too), and their gradient would be lost: {REMEDY}"
)


class _Group:
    """The logits of one call of a head, and the logits that were derived from them."""

    def __init__(self, head: Head, x: Tensor, leaves: tuple[Any, ...], scope: _Scope) -> None:
        self.head, self.x, self.leaves, self.scope = head, x, leaves, scope
        self.device, self.features = x.device, x.shape[-1]
        self.autocast = autocast_of(x.device.type)
        self.read = Read.of((x, *leaves))
        self.wholes: list[weakref.ref[Logits]] = []
        self.closed = self.gone = self.taken = self.chunked = False
        with torch.no_grad(), running():
            like = head.run(None, x.reshape(-1, self.features)[:0], *leaves)
        assert like.shape == (0, head.outputs)
        self.dtype = like.dtype

    def logits(self, form: _Form, made_by: _MadeBy | None) -> Logits:
        """Return lazy logits.

        Args:
            form: Their layout, and the operations that compute them.
            made_by: The operation that derived them from other logits; None for the head's own output.
        """
        shape = list(form.indices.shape)
        shape.insert(form.axis, self.head.outputs)
        anchor = next(tensor for tensor in (self.x, *self.leaves) if _wants(tensor))
        make = functools.partial(Logits, shape, form.dtype, self.device)
        logits: Logits = LazyHistory.apply(anchor, make, LogitsError(_UNMADE))  # type: ignore[no-untyped-call]
        logits._group, logits._form, logits._made_by, logits._whole = self, form, made_by, None
        self.wholes.append(weakref.ref(logits))
        return logits

    def take(self, *reads: Read) -> None:
        """Mark the logits as used. Call this before they are computed.

        Args:
            reads: The tensors that the computation reads besides the head's inputs.

        Raises:
            LogitsError: If the logits cannot be computed any more, or would differ from those of the loss.
        """
        if self.gone:
            raise LogitsError(_gone_message(self.head.__name__))
        if any(read.changed for read in (self.read, *reads)):
            raise LogitsError(
                f"what {self.head.__name__} or an operation on its logits reads was written into before its "
                f"loss was computed: {REMEDY}"
            )
        if self.taken and self.head.draws:
            raise LogitsError(
                f"a loss was computed of the logits of {self.head.__name__}, whose adapter has dropout, and "
                f"they are read once more, with other masks then: {REMEDY}, or set lora_dropout=0 there"
            )
        self.taken = True

    @property
    def is_open(self) -> bool:
        """Return True if operations on the logits can still be recorded."""
        return not self.closed and self.scope.is_whole

    def make(self) -> None:
        """Compute all logits that are still referenced, in the order of their creation."""
        left = [referent for ref in self.wholes if (referent := ref()) is not None]
        left = [logits for logits in left if logits._whole is None]
        self.take(*(logits._made_by.read for logits in left if logits._made_by is not None))
        # Else a checkpoint that begins after the head would expect the tensors that the head has saved.
        kept = contextlib.nullcontext() if self.scope.is_whole else chunked.kept_here()
        with kept:
            for logits in left:
                logits._make()

    def close(self) -> None:
        """Compute the logits if nothing has used them, and drop the head's inputs."""
        left = [referent for ref in self.wholes if (referent := ref()) is not None]
        if not self.taken and left:
            self.make()
        self.closed = True
        self.gone = any(logits._whole is None for logits in left)
        self.leaves, self.read = (), Read((), ())
        del self.x


def _wants(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _MadeBy(NamedTuple):
    """Recorded call of the operation that derived logits from other logits, to run it on computed logits."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    read: Read
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]


def _gone_message(name: str) -> str:
    return (
        f"the logits of {name} were not kept: with loss='chunked' the loss of a training call is computed in "
        "chunks, and its output holds no logits. Call the model in eval mode or without labels to have them, "
        f"or {REMEDY}"
    )


class Logits(Tensor):
    """Logits that are not computed yet. A loss computes them in chunks, any other operation all at once."""

    _group: _Group
    _form: _Form
    _made_by: _MadeBy | None
    _whole: Tensor | None

    @staticmethod
    def __new__(
        cls: type[Logits], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Logits:
        """Return a tensor without memory."""
        wrapper: Logits = torch_private.make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device
        )
        return wrapper

    def __init__(self, *_: Any) -> None:
        """Do nothing. :meth:`_Group.logits` sets the state."""

    def __repr__(self) -> str:  # type: ignore[override]
        with torch_private.DisableTorchFunctionSubclass():
            return f"Logits({list(self.shape)}, {self.dtype})"

    def _settled(self) -> Any:
        if self._whole is not None:
            return self._whole
        with torch_private.DisableTorchFunctionSubclass():
            return Gone(self._group.head.__name__, tuple(self.shape))

    def _value(self) -> Tensor:
        """Return the computed logits. The first read computes them."""
        if self._whole is None:
            self._group.make()
        assert self._whole is not None
        return self._whole

    def _make(self) -> None:
        group, call = self._group, self._made_by
        # The modes of the call of the head, because the reader may be in inference mode or under no_grad.
        with torch.inference_mode(False), torch.enable_grad():
            if call is None:
                with group.autocast(), running():
                    self._whole = group.head.run(None, group.x, *group.leaves)
            else:
                with call.autocast():
                    self._whole = call.function(*_whole(call.args), **_whole(call.kwargs))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Record an operation that can be computed row by row. Run any other on the computed logits."""
        kwargs = kwargs or {}
        if reads_metadata(func) and not any(
            isinstance(arg, Logits) and arg._whole is not None for arg in args
        ):
            with torch_private.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if torch.is_grad_enabled():
            result = _recorded(func, args, kwargs)
            if result is not None:
                return result
        if name_of(func) in _OF_GRADIENTS:
            _check_not_taken(args, kwargs)
        return func(*_whole(args), **_whole(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse operations that did not pass through ``__torch_function__``.

        Raises:
            LogitsError: Always.
        """
        raise LogitsError(
            f"{func} reads logits that are computed in chunks, past PyTorch's Python interface: {REMEDY}"
        )


def _whole(values: Any) -> Any:
    """Return values with all logits computed."""
    return pytree.tree_map_only(Logits, lambda logits: logits._value(), values)


def _check_not_taken(*values: Any) -> None:
    """Raise if a value is logits whose loss was computed in chunks: they have no gradient to return.

    Raises:
        LogitsError: If any of the values are such logits.
    """
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Logits) and leaf._group.chunked:
            raise LogitsError(
                f"the loss of {leaf._group.head.__name__} was computed in chunks: its logits have no "
                f"gradient to look at or to change. Ask for it before the loss is computed, or {REMEDY}"
            )


class Gone:
    """A placeholder in the output for logits that were not kept. Reading the placeholder raises.

    ``hasattr`` returns False for all attributes of a tensor, so that code which looks for tensors in an
    output skips it.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._name, self._shape = name, shape

    def __repr__(self) -> str:
        return f"<logits of {self._name}, {list(self._shape)}, not kept: loss='chunked'>"

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse to be read.

        Raises:
            LogitsError: Always.
        """
        if name.startswith("__") or name in ("_name", "_shape"):
            raise AttributeError(name)
        raise LogitsError(_gone_message(self._name))


def _refuse(self: Gone, *_: Any, **__: Any) -> NoReturn:
    raise LogitsError(_gone_message(self._name))


def _refuse_function(
    cls: type[Gone], func: Any, types: Any, args: Any = (), kwargs: Any = None
) -> NoReturn:
    leaves = pytree.tree_leaves((args, kwargs))
    raise LogitsError(_gone_message(next(leaf._name for leaf in leaves if isinstance(leaf, Gone))))


Gone.__torch_function__ = classmethod(_refuse_function)  # type: ignore[attr-defined]
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
for _name in (
    *("array", "bool", "contains", "float", "getitem", "int", "iter", "len", "setitem"),
    *("abs", "eq", "ge", "gt", "invert", "le", "lt", "ne", "neg", "index"),
    *_BINARY,
    *(f"r{operator}" for operator in _BINARY),
    *(f"i{operator}" for operator in _BINARY),
):
    setattr(Gone, f"__{_name}__", _refuse)
Gone.__hash__ = object.__hash__  # type: ignore[method-assign]


# --- operations on logits ---------------------------------------------------------------------------------


_OF_GRADIENTS = {"register_hook", "retain_grad", "grad", "backward"}


class _Operation(NamedTuple):
    """A call of a function on logits.

    Attributes:
        logits: The logits.
        function: The function. It takes the logits first, or at any position if it is elementwise.
        name: The bare name of the function.
        args, kwargs: The other arguments. For elementwise functions, ``args`` includes the logits.
    """

    logits: Logits
    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def form(self) -> _Form:
        """Return the form of the logits."""
        return self.logits._form

    @property
    def classes(self) -> int:
        """Return the number of classes."""
        return self.logits._group.head.outputs

    def shape(self, shape: Sequence[int]) -> Sequence[int]:
        """Return the shape of the result for an input of this shape, or () if the function raises."""
        try:  # with a tensor that takes no memory
            probe = torch.empty(()).expand(*shape)
            return tuple(self.function(probe, *self.args, **self.kwargs).shape)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return ()

    def step(self, function: Any, *args: Any, **kwargs: Any) -> _Form | None:
        """Return the form with one more step, or None if the step does not map a row to a row."""
        form, device = self.form, self.logits.device
        step = Step(function, args, kwargs, autocast_of(device.type))
        like = torch.empty((0, self.classes), dtype=form.dtype, device=device)
        try:
            with torch.no_grad():
                result = step(like, ())
        except (RuntimeError, TypeError, ValueError):
            return None  # PyTorch raises its own error on the computed logits
        if result.shape != like.shape or not result.is_floating_point():
            return None
        read = (*form.read, Read.of(args))
        return form._replace(steps=(*form.steps, step), dtype=result.dtype, read=read)


def _recorded(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the result of an operation that can be computed row by row, or None for any other."""
    for word in ("input", "self"):
        if word in kwargs and not args:
            args, kwargs = (kwargs[word],), {k: v for k, v in kwargs.items() if k != word}
    name = name_of(func)
    note = _NOTED.get(name)
    positions = [position for position, value in enumerate(args) if isinstance(value, Logits)]
    lazy = [
        value for value in pytree.tree_leaves((args, dict(kwargs))) if isinstance(value, Logits)
    ]
    if (
        note is None
        or len(positions) != 1
        or len(lazy) != 1
        or (positions[0] and note is not _computed)
    ):
        return None
    logits: Logits = args[positions[0]]
    if logits._whole is not None or not logits._group.is_open:
        return None
    with torch_private.DisableTorchFunctionSubclass():
        operands = args if note is _computed else args[1:]
        result = note(_Operation(logits, func, name, operands, kwargs))
    if not isinstance(result, _Form):
        return result
    autocast = autocast_of(logits.device.type)
    made_by = _MadeBy(func, args, kwargs, Read.of((args, kwargs)), autocast)
    return logits if result is logits._form else logits._group.logits(result, made_by)


def _computed(call: _Operation) -> _Form | None:
    """Return the form after an elementwise operation, or None if a row does not suffice for its result.

    The other operand has to be the same for all rows.
    """
    if call.kwargs.keys() - {"alpha"} or not all(map(_is_number, call.kwargs.values())):
        return None
    operands = [
        ROWS if operand is call.logits else _for_rows(call, operand) for operand in call.args
    ]
    return (
        None
        if any(operand is None for operand in operands)
        else call.step(call.function, *operands, **call.kwargs)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _for_rows(call: _Operation, operand: Any) -> Any:
    """Return an operand that is the same for all rows, shaped for [n, classes]. Return None for any other."""
    if _is_number(operand):
        return operand
    if not _is_plain(operand) or operand.dim() > call.logits.dim():
        return None
    if operand.numel() == 1:
        return operand if operand.dim() < 2 else operand.reshape(1)
    last = call.form.axis == call.logits.dim() - 1
    fits = operand.shape[-1] == call.classes == operand.numel()
    return operand.reshape(-1) if last and fits else None


def _cast(call: _Operation) -> _Form | None:
    arguments = [*call.args, *call.kwargs.values()]
    dtype: Any = _CASTS.get(call.name)
    if dtype is None and len(arguments) == 1 and not call.kwargs.keys() - {"dtype", "device"}:
        dtype = arguments.pop()
    if arguments or dtype is None:
        return None
    if not isinstance(dtype, torch.dtype):
        # A device: only the one of the logits changes nothing.
        named = isinstance(dtype, torch.device | str | int)
        return call.form if named and torch.device(dtype) == call.logits.device else None
    same = dtype == call.form.dtype and call.name != "_to_copy"
    return call.form if same else call.step(Tensor.to, ROWS, dtype)


def _normalized(call: _Operation) -> _Form | None:
    words = ("dim", "half_to_float") if call.name == "_log_softmax" else ("dim", "dtype")
    named = {**dict(zip(words, call.args, strict=False)), **call.kwargs}
    named.pop("_stacklevel", None)
    dim, dtype = named.pop("dim", None), named.pop("dtype", None)
    dtype = torch.float32 if named.pop("half_to_float", False) else dtype
    if named or not isinstance(dim, int) or dim % call.logits.dim() != call.form.axis:
        return None
    return call.step(torch.log_softmax, ROWS, -1, dtype=dtype)


def _reshaped(call: _Operation) -> _Form | None:
    """Return the form after a reshape of the row axes, or None if the reshape changes the class axis.

    Reshapes keep the order of elements, so that the classes stay together if the last axis keeps its size.
    """
    form, shape = call.form, call.shape(call.logits.shape)
    if form.axis != call.logits.dim() - 1 or any(
        isinstance(argument, torch.dtype) for argument in (*call.args, *call.kwargs.values())
    ):
        return None
    if not shape or shape[-1] != call.classes:
        return None
    return form._replace(indices=form.indices.reshape(shape[:-1]), axis=len(shape) - 1)


def _kept(call: _Operation) -> _Form:
    # A new object, because the copy may be written into.
    return call.form._replace()


def _permuted(call: _Operation) -> _Form | None:
    form = call.form
    # Axis i has size i + 1, so that the resulting sizes are the order of the axes.
    order = [size - 1 for size in call.shape(range(1, call.logits.dim() + 1))]
    if not order:
        return None
    row_axes = [axis - (axis > form.axis) for axis in order if axis != form.axis]
    return form._replace(indices=form.indices.permute(row_axes), axis=order.index(form.axis))


def _picked(call: _Operation) -> _Form | None:
    """Return the form after ``select`` or a slice of rows on one axis, or None if it selects classes."""
    form = call.form
    if not call.args or not isinstance(call.args[0], int) or call.kwargs:
        return None
    axis = call.args[0] % call.logits.dim()
    if axis == form.axis:
        is_full = call.name == "slice" and _is_every(slice(*(*call.args[1:], None, None)[:3]), call)
        return form if is_full else None
    rows = call.function(form.indices, axis - (axis > form.axis), *call.args[1:])
    return form._replace(
        indices=rows, axis=form.axis - (form.axis > axis and call.name == "select")
    )


def _is_every(index: Any, call: _Operation) -> bool:
    """Return True if an index takes all classes."""
    return isinstance(index, slice) and index.indices(call.classes) == (0, call.classes, 1)


def _indexed(call: _Operation) -> _Form | None:
    """Return the form after indexing that selects rows, or None if the index selects classes."""
    form = call.form
    if form.axis != call.logits.dim() - 1 or call.kwargs or len(call.args) != 1:
        return None
    index = call.args[0]
    indices = list(index) if isinstance(index, tuple | list) else [index]
    if call.name == "index":  # of ATen: None means a full slice, and not a new axis
        indices = [slice(None) if each is None else each for each in indices]
    if not all(map(_picks_rows, indices)) or (isinstance(index, list) and call.name != "index"):
        return None
    taken = sum(
        each.dim() if isinstance(each, Tensor) and each.dtype is torch.bool else 1
        for each in indices
        if each is not None and each is not Ellipsis
    )
    after = any(each is Ellipsis for each in indices) and indices[-1] is not Ellipsis
    if (taken >= call.logits.dim() or after) and not _is_every(indices.pop(), call):
        return None
    rows = form.indices[tuple(indices)]
    return form._replace(indices=rows, axis=rows.dim())


def _picks_rows(index: Any) -> bool:
    if isinstance(index, Tensor):
        return type(index) is Tensor and index.dtype in (torch.bool, torch.int64)
    return index is None or index is Ellipsis or type(index) in (int, slice)


# --- the loss ---------------------------------------------------------------------------------------------

_WORDS = {
    True: "target weight size_average ignore_index reduce reduction label_smoothing",
    False: "target weight reduction ignore_index label_smoothing",
}
"""Argument names of the loss functions in ``torch.nn.functional``, and of the operators that they call."""

_NUMBERED: Any = {0: "none", 1: "mean", 2: "sum"}
_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


def _loss(call: _Operation) -> Tensor | None:
    """Return a loss that computes its logits in chunks, or None if the loss needs all logits at once.

    Class probabilities as targets, for example, need all logits.
    """
    logits, form = call.logits, call.form
    words = _WORDS[call.function in (F.cross_entropy, F.nll_loss)].split()
    named: dict[str, Any] = {**dict(zip(words, call.args, strict=False)), **call.kwargs}
    target: Any = named.get("target")
    weight = named.get("weight")
    # The functions of torch._C do not reduce by default.
    usual = "none" if isinstance(call.function, types.BuiltinFunctionType) else "mean"
    reduction = named.get("reduction", usual)
    reduction = _NUMBERED.get(reduction, reduction)
    old = named.get("size_average") is not None or named.get("reduce") is not None
    known = reduction in _NUMBERED.values() and not old and form.axis == min(1, logits.dim() - 1)
    if (
        not known
        or not _is_at(target, form.indices.shape, logits)
        or target.dtype is not torch.int64
    ):
        return None
    if weight is not None and (weight.requires_grad or not _is_at(weight, (call.classes,), logits)):
        return None
    options: dict[str, Any] = {"weight": weight, "ignore_index": named.get("ignore_index", -100)}
    function: Any = F.nll_loss
    if call.name.startswith("cross_entropy"):
        function, options["label_smoothing"] = F.cross_entropy, named.get("label_smoothing", 0.0)
    return _in_chunks(logits, target, function, reduction, options)


def _is_at(value: Any, shape: Sequence[int], logits: Logits) -> bool:
    """Return True if a value is a plain tensor of a shape on the device of the logits."""
    return _is_plain(value) and value.shape == tuple(shape) and value.device == logits.device


_RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
_PERMUTES = ("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims")
_ELEMENTS = ("mul", "div", "truediv", "true_divide", "add", "sub", "neg", "tanh")
_NOTED: dict[str, Callable[[_Operation], Any]] = {
    **dict.fromkeys(_ELEMENTS, _computed),
    **dict.fromkeys((*_CASTS, "to", "_to_copy"), _cast),
    **dict.fromkeys(("log_softmax", "_log_softmax"), _normalized),
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(("contiguous", "clone", "alias"), _kept),
    **dict.fromkeys(_PERMUTES, _permuted),
    **dict.fromkeys(("slice", "select", "narrow", "index_select"), _picked),
    **dict.fromkeys(("getitem", "index"), _indexed),
    **dict.fromkeys(("cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd"), _loss),
}
"""Handlers of the operations that are recorded on the way to a loss, by the bare name of the function."""


def _in_chunks(
    logits: Logits,
    target: Tensor,
    function: Callable[..., Tensor],
    reduction: str,
    options: Mapping[str, Any],
) -> Tensor:
    group, form = logits._group, logits._form
    group.take(*form.read)
    group.chunked = True
    tensors: list[Tensor] = []

    def placed(value: Any) -> Any:
        if not _wants(value):
            return value
        tensors.append(value)
        return Given(len(tensors) - 1)

    leaves = tuple(map(placed, group.leaves))
    head = Step(group.head.run, (None, ROWS, *leaves), {}, group.autocast)
    # The loss scale is known only in the backward, and gradients in fp16 need it.
    again = reduction == "none" or torch.float16 in (group.x.dtype, group.dtype, form.dtype)
    elements = min(max(chunked.CHUNK, group.x.numel()), chunked.LARGEST_CHUNK)
    job = Job(
        steps=(head, *(step._replace(args=tuple(map(placed, step.args))) for step in form.steps)),
        indices=form.indices.reshape(-1),
        target=target.reshape(-1),
        shape=target.shape,
        function=function,
        reduction=reduction,
        options=options,
        autocast=autocast_of(logits.device.type),
        length=max(1, elements // group.head.outputs),
        again=again,
        draws=group.head.draws,
        read=(group.read, *form.read, Read.of((target, options))) if again else (),
    )
    return loss_of(job, group.x, tensors)
