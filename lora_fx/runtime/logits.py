"""Logits that never exist all at once: what a head gives in a training call, until a loss takes it.

With ``rewrite(..., loss="chunked")`` the graph of the head calls a :class:`Head`
(:mod:`lora_fx.passes.optimize.chunk_loss`). In a training call of the model it computes nothing, and gives
:class:`Logits`: a tensor that knows its shape and how it would be computed. What a model does with logits on
the way to a loss is written down on them: views, slices, casts, a soft cap, a scale. A cross entropy takes a
few rows at a time through the head and all of that, and their gradient with it
(:mod:`lora_fx.runtime.chunked`).

Everything else that is done with them in the call computes them, all at once, as without the option: it is
right, and saves nothing. When the model's forward ends, logits that no loss was computed of are computed.
Others are gone: what the output holds in their place is :class:`Gone`, which raises a
:class:`lora_fx.errors.LogitsError` when it is read.
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
from lora_fx.runtime import chunked
from lora_fx.runtime.chunked import REMEDY, ROWS, Given, Job, Read, Step, loss_of, running
from lora_fx.runtime.masks import transformed
from lora_fx.runtime.recompute import Subgraph, autocast_of
from lora_fx.torch_private import pytree

__all__ = ["Gone", "Head", "Logits", "head_of", "scoped"]

_local = threading.local()


# --- the call of the model --------------------------------------------------------------------------------


def scoped(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a rewritten model whose heads compute nothing while it trains.

    Args:
        forward: As a function of the module.
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


# Dynamo leaves its trace for the call, so that the error is what it is.
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
    """A call of the model: the logits that its heads have given.

    Attributes:
        groups: Those of each call of a head.
        checkpoint: What computes the whole call again in the backward; None for nothing.
    """

    def __init__(self) -> None:
        self.groups: list[_Group] = []
        self.checkpoint = chunked.checkpoint_here()

    @property
    def is_whole(self) -> bool:
        """Whether no part of the call is computed again by itself, without the call around it, just now."""
        return chunked.checkpoint_here() is self.checkpoint

    def close(self, out: Any) -> Any:
        """Ends the call.

        Args:
            out: What the forward returns.

        Returns:
            The same with no :class:`Logits` in it.
        """
        for group in self.groups:
            group.close()
        return _settled(out, set()) if self.groups else out


def _settled(value: Any, seen: set[int]) -> Any:
    """A value with tensors, or what says that there are none, in place of logits.

    Mappings and records are changed as they are: an output of transformers is one.

    Args:
        value: Any.
        seen: The identities of what is looked at: a record may hold itself.
    """
    if isinstance(value, Logits):
        return value._settled()
    if id(value) in seen:
        return value
    seen = {*seen, id(value)}
    if isinstance(value, list | tuple):
        found = [_settled(one, seen) for one in value]
        if all(new is old for new, old in zip(found, value, strict=True)):
            return value
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
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
    """The last operation of a model with its branches, as a function of rows; :func:`head_of` makes it.

    Attributes:
        outputs: How many values it gives for a row.
        draws: Whether a branch drops something at random.
    """

    def __init__(self, name: str, graph: fx.Graph, outputs: int, draws: bool) -> None:
        super().__init__(name, graph, f"<head {name}>")
        self.outputs, self.draws = outputs, draws

    def __reduce__(self) -> tuple[Any, ...]:
        return _thawed, (self.__name__, self.frozen, self.outputs, self.draws)

    def __call__(self, x: Tensor, *leaves: Any) -> Tensor:
        """The logits, which are computed later in a training call of the model.

        Args:
            x: [..., in].
            leaves: What the graph reads besides: weights, factors, settings.

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
        places = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])
        return group.logits(_Form(places, places.dim(), (), group.dtype), None)


def _fits(x: Tensor, leaves: Sequence[Any]) -> bool:
    """Whether rows can be computed apart: of plain tensors, of which some require a gradient."""
    tensors = [one for one in leaves if isinstance(one, Tensor)]
    return (
        all(_is_plain(one) for one in (x, *tensors))
        and x.dim() > 1
        and x.numel() > 0
        and any(one.requires_grad for one in (x, *tensors))
    )


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and not value.is_nested
        and not value.is_meta
        and not value.is_inference()
    )


_heads: weakref.WeakValueDictionary[Any, Head] = weakref.WeakValueDictionary()


def head_of(name: str, graph: fx.Graph, outputs: int, draws: bool) -> Head:
    """The head of a graph: one object for equal ones.

    Args:
        name: What code that calls it shows.
        graph: Of its rows; the first placeholder is what it reads. It must not be edited afterwards.
        outputs: As for :class:`Head`, as the last one.
        draws: Whether a branch drops something at random.
    """
    key = (name, Subgraph.key(graph), outputs, draws)
    found = _heads.get(key)
    return found if found is not None else _heads.setdefault(key, Head(name, graph, outputs, draws))


def _thawed(name: str, frozen: Any, outputs: int, draws: bool) -> Head:
    return head_of(name, thaw(frozen), outputs, draws)


# --- logits -----------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """What logits are.

    Attributes:
        places: Which row of the head's input each row is: their shape without the classes.
        axis: Where the classes are.
        steps: What is computed of each row, after the head.
        dtype: Of the numbers.
        read: What the steps read besides.
    """

    places: Tensor
    axis: int
    steps: tuple[Step, ...]
    dtype: torch.dtype
    read: tuple[Read, ...] = ()


class _Group:
    """The logits of one call of a head, and what was made of them."""

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
        """A tensor that stands for them."""
        shape = list(form.places.shape)
        shape.insert(form.axis, self.head.outputs)
        anchor = next(one for one in (self.x, *self.leaves) if _wants(one))
        found: Logits = _Unmade.apply(
            anchor, functools.partial(Logits, shape, form.dtype, self.device)
        )  # type: ignore[no-untyped-call]
        found._group, found._form, found._made_by, found._whole = self, form, made_by, None
        self.wholes.append(weakref.ref(found))
        return found

    def take(self, *others: Read) -> None:
        """Says that they are about to be computed.

        Args:
            others: What else is read then.

        Raises:
            LogitsError: If they cannot be, or would be others than those of which a loss was computed.
        """
        if self.gone:
            raise LogitsError(_words(self.head.__name__))
        if any(one.changed for one in (self.read, *others)):
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
        """Whether what is done with them can be written down."""
        return not self.closed and self.scope.is_whole

    def make(self) -> None:
        """Computes all of them that are still held, in the order in which they were made."""
        left = [found for one in self.wholes if (found := one()) is not None]
        left = [one for one in left if one._whole is None]
        self.take(*(one._made_by.read for one in left if one._made_by is not None))
        # A checkpoint that begins after the head would look for what the head has kept.
        kept = contextlib.nullcontext() if self.scope.is_whole else chunked.kept_here()
        with kept:
            for one in left:
                one._make()

    def close(self) -> None:
        """Ends the call of the model."""
        left = [found for one in self.wholes if (found := one()) is not None]
        if not self.taken and left:
            self.make()
        self.closed = True
        self.gone = any(one._whole is None for one in left)
        self.leaves = ()
        del self.x


def _wants(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _MadeBy(NamedTuple):
    """The operation that has given logits, as it was called."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    read: Read
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]


class _Unmade(torch.autograd.Function):
    """The history of logits that were not computed. What sees it has taken them for a tensor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise LogitsError(
            "logits that are computed in chunks went into a function of autograd that is not PyTorch's own "
            "(full backward hooks of a module are one, too), and their gradient would be lost: "
            f"{REMEDY}"
        )


def _words(name: str) -> str:
    return (
        f"the logits of {name} were not kept: with loss='chunked' the loss of a training call is computed in "
        "chunks, and its output holds no logits. Call the model in eval mode or without labels to have them, "
        f"or {REMEDY}"
    )


class Logits(Tensor):
    """Logits that are not computed yet: a loss takes them in chunks, what else reads them gets all."""

    _group: _Group
    _form: _Form
    _made_by: _MadeBy | None
    _whole: Tensor | None

    @staticmethod
    def __new__(
        cls: type[Logits], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Logits:
        """A tensor without memory."""
        made: Logits = torch_private.make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return made

    def __init__(self, *_: Any) -> None:
        """It has no state before its group gives it one."""

    def __repr__(self) -> str:  # type: ignore[override]
        with torch_private.DisableTorchFunctionSubclass():
            return f"Logits({list(self.shape)}, {self.dtype})"

    def _settled(self) -> Any:
        if self._whole is not None:
            return self._whole
        with torch_private.DisableTorchFunctionSubclass():
            return Gone(self._group.head.__name__, tuple(self.shape))

    def _value(self) -> Tensor:
        """All of them."""
        if self._whole is None:
            self._group.make()
        assert self._whole is not None
        return self._whole

    def _make(self) -> None:
        group, how = self._group, self._made_by
        # As it was where they were made, whatever mode what reads them is in.
        with torch.inference_mode(False), torch.enable_grad():
            if how is None:
                with group.autocast(), running():
                    self._whole = group.head.run(None, group.x, *group.leaves)
            else:
                with how.autocast():
                    self._whole = how.function(*_whole(how.args), **_whole(how.kwargs))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Writes the operation down if it is one on the way to a loss; else computes it as it is."""
        kwargs = kwargs or {}
        if _asks(func) and not any(
            isinstance(one, Logits) and one._whole is not None for one in args
        ):
            with torch_private.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if torch.is_grad_enabled():
            found = _noted(func, args, kwargs)
            if found is not None:
                return found
        if _named(func) in _OF_GRADIENTS:
            _check_not_taken(args, kwargs)
        return func(*_whole(args), **_whole(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuses what comes past the above.

        Raises:
            LogitsError: Always.
        """
        raise LogitsError(
            f"{func} reads logits that are computed in chunks, past PyTorch's Python interface: {REMEDY}"
        )


def _whole(values: Any) -> Any:
    """The same with all logits computed."""
    return pytree.tree_map_only(Logits, lambda one: one._value(), values)


def _check_not_taken(*values: Any) -> None:
    """Refuses to give, or to change, the gradient of logits that a loss has read in chunks.

    Raises:
        LogitsError: If a loss has.
    """
    for one in pytree.tree_leaves(values):
        if isinstance(one, Logits) and one._group.chunked:
            raise LogitsError(
                f"the loss of {one._group.head.__name__} was computed in chunks: its logits have no gradient "
                f"to look at or to change. Ask for it before the loss is computed, or {REMEDY}"
            )


class Gone:
    """What an output holds in place of logits that were not kept. It raises when it is read.

    ``hasattr`` is false of everything that a tensor has, so that code which looks for tensors in an output
    passes it by.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._name, self._shape = name, shape

    def __repr__(self) -> str:
        return f"<logits of {self._name}, {list(self._shape)}, not kept: loss='chunked'>"

    def __getattr__(self, name: str) -> NoReturn:
        """Refuses to be read.

        Raises:
            LogitsError: Always.
        """
        if name.startswith("__") or name in ("_name", "_shape"):
            raise AttributeError(name)
        raise LogitsError(_words(self._name))


def _refuse(self: Gone, *_: Any, **__: Any) -> NoReturn:
    raise LogitsError(_words(self._name))


def _refuse_function(
    cls: type[Gone], func: Any, types: Any, args: Any = (), kwargs: Any = None
) -> NoReturn:
    leaves = pytree.tree_leaves((args, kwargs))
    raise LogitsError(_words(next(one._name for one in leaves if isinstance(one, Gone))))


Gone.__torch_function__ = classmethod(_refuse_function)  # type: ignore[attr-defined]
_TWO = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
for _name in (
    *("array", "bool", "contains", "float", "getitem", "int", "iter", "len", "setitem"),
    *("abs", "eq", "ge", "gt", "invert", "le", "lt", "ne", "neg", "index"),
    *_TWO,
    *(f"r{one}" for one in _TWO),
    *(f"i{one}" for one in _TWO),
):
    setattr(Gone, f"__{_name}__", _refuse)
Gone.__hash__ = object.__hash__  # type: ignore[method-assign]


# --- what is done with logits -----------------------------------------------------------------------------

_FACTS = {
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "names"),
    *("is_cpu", "is_cuda", "is_mps", "is_xpu", "is_meta", "is_nested", "is_quantized", "is_sparse"),
    *("itemsize", "nbytes", "output_nr", "retains_grad", "grad", "is_sparse_csr", "is_mkldnn"),
}
_ASKING = {
    *("size", "dim", "numel", "nelement", "ndimension", "element_size", "is_floating_point"),
    *("is_complex", "get_device", "len", "is_inference", "sym_size"),
}
_OF_GRADIENTS = {"register_hook", "retain_grad", "grad", "backward"}


def _asks(func: Any) -> bool:
    """Whether a function of a tensor tells what is known of logits that are not computed."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func.__self__, "__name__", "") in _FACTS
    return _named(func) in _ASKING


def _named(func: Any) -> str:
    """What a function is called: one word for a function, a method and an operator of ATen."""
    if isinstance(func, torch_private.OpOverload):
        return str(torch_private.schema_of(func).name.partition("::")[2])
    name = str(getattr(func, "__name__", ""))
    # What works in place ends with one underline.
    return name.strip("_") if name.startswith("__") else name


class _Operation(NamedTuple):
    """What is done with logits.

    Attributes:
        logits: Of what.
        function: It takes them first; for sums and products of elements, where they are in ``args``.
        name: What that is called.
        args, kwargs: What it is given besides them; for sums and products, with them.
    """

    logits: Logits
    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def form(self) -> _Form:
        """Of the logits."""
        return self.logits._form

    @property
    def classes(self) -> int:
        """How many there are."""
        return self.logits._group.head.outputs

    def shape(self, shape: Sequence[int]) -> Sequence[int]:
        """The shape of what it gives for a tensor of a shape; () if it takes none."""
        try:  # one that takes no memory
            given = torch.empty(()).expand(*shape)
            return tuple(self.function(given, *self.args, **self.kwargs).shape)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return ()

    def step(self, function: Any, *args: Any, **kwargs: Any) -> _Form | None:
        """The form with one more operation on each row; None if that gives no row."""
        form, device = self.form, self.logits.device
        step = Step(function, args, kwargs, autocast_of(device.type))
        like = torch.empty((0, self.classes), dtype=form.dtype, device=device)
        try:
            with torch.no_grad():
                found = step(like, ())
        except (RuntimeError, TypeError, ValueError):
            return None  # PyTorch says why when it is given all of them
        if found.shape != like.shape or not found.is_floating_point():
            return None
        read = (*form.read, Read.of(args))
        return form._replace(steps=(*form.steps, step), dtype=found.dtype, read=read)


def _noted(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives whose rows can be computed apart; None for any other."""
    for word in ("input", "self"):
        if word in kwargs and not args:
            args, kwargs = (kwargs[word],), {k: v for k, v in kwargs.items() if k != word}
    name = _named(func)
    note = _NOTED.get(name)
    where = [place for place, one in enumerate(args) if isinstance(one, Logits)]
    every = [one for one in pytree.tree_leaves((args, dict(kwargs))) if isinstance(one, Logits)]
    if note is None or len(where) != 1 or len(every) != 1 or (where[0] and note is not _computed):
        return None
    logits: Logits = args[where[0]]
    if logits._whole is not None or not logits._group.is_open:
        return None
    with torch_private.DisableTorchFunctionSubclass():
        rest = args if note is _computed else args[1:]
        found = note(_Operation(logits, func, name, rest, kwargs))
    if not isinstance(found, _Form):
        return found
    autocast = autocast_of(logits.device.type)
    made_by = _MadeBy(func, args, kwargs, Read.of((args, kwargs)), autocast)
    return logits if found is logits._form else logits._group.logits(found, made_by)


def _computed(one: _Operation) -> _Form | None:
    """A sum or a product of elements with what is the same for all rows."""
    if one.kwargs.keys() - {"alpha"} or not all(map(_is_number, one.kwargs.values())):
        return None
    own = [ROWS if given is one.logits else _for_rows(one, given) for given in one.args]
    return (
        None if any(given is None for given in own) else one.step(one.function, *own, **one.kwargs)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _for_rows(one: _Operation, operand: Any) -> Any:
    """An operand that is the same for all rows, as rows take it; None for any other."""
    if _is_number(operand):
        return operand
    if not _is_plain(operand) or operand.dim() > one.logits.dim():
        return None
    if operand.numel() == 1:
        return operand if operand.dim() < 2 else operand.reshape(1)
    last = one.form.axis == one.logits.dim() - 1
    fits = operand.shape[-1] == one.classes == operand.numel()
    return operand.reshape(-1) if last and fits else None


def _cast(one: _Operation) -> _Form | None:
    given = [*one.args, *one.kwargs.values()]
    dtype: Any = _CASTS.get(one.name)
    if dtype is None and len(given) == 1 and not one.kwargs.keys() - {"dtype", "device"}:
        dtype = given.pop()
    if given or dtype is None:
        return None
    if not isinstance(dtype, torch.dtype):
        # A device: where they are they stay.
        named = isinstance(dtype, torch.device | str | int)
        return one.form if named and torch.device(dtype) == one.logits.device else None
    same = dtype == one.form.dtype and one.name != "_to_copy"
    return one.form if same else one.step(Tensor.to, ROWS, dtype)


def _normalized(one: _Operation) -> _Form | None:
    words = ("dim", "half_to_float") if one.name == "_log_softmax" else ("dim", "dtype")
    named = {**dict(zip(words, one.args, strict=False)), **one.kwargs}
    named.pop("_stacklevel", None)
    dim, dtype = named.pop("dim", None), named.pop("dtype", None)
    dtype = torch.float32 if named.pop("half_to_float", False) else dtype
    if named or not isinstance(dim, int) or dim % one.logits.dim() != one.form.axis:
        return None
    return one.step(torch.log_softmax, ROWS, -1, dtype=dtype)


def _reshaped(one: _Operation) -> _Form | None:
    """Other axes for the rows; their order stays, so that classes do where the last axis has as many."""
    form, shape = one.form, one.shape(one.logits.shape)
    if form.axis != one.logits.dim() - 1 or any(
        isinstance(given, torch.dtype) for given in (*one.args, *one.kwargs.values())
    ):
        return None
    if not shape or shape[-1] != one.classes:
        return None
    return form._replace(places=form.places.reshape(shape[:-1]), axis=len(shape) - 1)


def _kept(one: _Operation) -> _Form:
    # Not the same logits: the copy may be written into.
    return one.form._replace()


def _permuted(one: _Operation) -> _Form | None:
    form = one.form
    # Sizes that say where each axis goes.
    order = [size - 1 for size in one.shape(range(1, one.logits.dim() + 1))]
    if not order:
        return None
    rest = [axis - (axis > form.axis) for axis in order if axis != form.axis]
    return form._replace(places=form.places.permute(rest), axis=order.index(form.axis))


def _picked(one: _Operation) -> _Form | None:
    """Rows by their place on an axis."""
    form = one.form
    if not one.args or not isinstance(one.args[0], int) or one.kwargs:
        return None
    axis = one.args[0] % one.logits.dim()
    if axis == form.axis:
        every = one.name == "slice" and _is_every(slice(*(*one.args[1:], None, None)[:3]), one)
        return form if every else None
    places = one.function(form.places, axis - (axis > form.axis), *one.args[1:])
    return form._replace(
        places=places, axis=form.axis - (form.axis > axis and one.name == "select")
    )


def _is_every(index: Any, one: _Operation) -> bool:
    """Whether an index takes all classes."""
    return isinstance(index, slice) and index.indices(one.classes) == (0, one.classes, 1)


def _indexed(one: _Operation) -> _Form | None:
    """Rows by an index that names no classes."""
    form = one.form
    if form.axis != one.logits.dim() - 1 or one.kwargs or len(one.args) != 1:
        return None
    index = one.args[0]
    given = list(index) if isinstance(index, tuple | list) else [index]
    if one.name == "index":  # of ATen: None stands for an axis
        given = [slice(None) if each is None else each for each in given]
    if not all(map(_picks_rows, given)) or (isinstance(index, list) and one.name != "index"):
        return None
    taken = sum(
        each.dim() if isinstance(each, Tensor) and each.dtype is torch.bool else 1
        for each in given
        if each is not None and each is not Ellipsis
    )
    after = any(each is Ellipsis for each in given) and given[-1] is not Ellipsis
    if (taken >= one.logits.dim() or after) and not _is_every(given.pop(), one):
        return None
    places = form.places[tuple(given)]
    return form._replace(places=places, axis=places.dim())


def _picks_rows(index: Any) -> bool:
    if isinstance(index, Tensor):
        return type(index) is Tensor and index.dtype in (torch.bool, torch.int64)
    return index is None or index is Ellipsis or type(index) in (int, slice)


# --- the loss ---------------------------------------------------------------------------------------------

_WORDS = {
    True: "target weight size_average ignore_index reduce reduction label_smoothing",
    False: "target weight reduction ignore_index label_smoothing",
}
"""The arguments of PyTorch's functions, and of the operators below them."""

_NUMBERED: Any = {0: "none", 1: "mean", 2: "sum"}
_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


def _loss(one: _Operation) -> Tensor | None:
    """A loss in chunks; None where it is computed of all logits: of probabilities, of other axes."""
    logits, form = one.logits, one.form
    words = _WORDS[one.function in (F.cross_entropy, F.nll_loss)].split()
    named: dict[str, Any] = {**dict(zip(words, one.args, strict=False)), **one.kwargs}
    target: Any = named.get("target")
    weight = named.get("weight")
    # The functions of torch._C give the loss of each row where they are not told.
    usual = "none" if isinstance(one.function, types.BuiltinFunctionType) else "mean"
    reduction = named.get("reduction", usual)
    reduction = _NUMBERED.get(reduction, reduction)
    old = named.get("size_average") is not None or named.get("reduce") is not None
    known = reduction in _NUMBERED.values() and not old and form.axis == min(1, logits.dim() - 1)
    if (
        not known
        or not _is_at(target, form.places.shape, logits)
        or target.dtype is not torch.int64
    ):
        return None
    if weight is not None and (weight.requires_grad or not _is_at(weight, (one.classes,), logits)):
        return None
    options: dict[str, Any] = {"weight": weight, "ignore_index": named.get("ignore_index", -100)}
    function: Any = F.nll_loss
    if one.name.startswith("cross_entropy"):
        function, options["label_smoothing"] = F.cross_entropy, named.get("label_smoothing", 0.0)
    return _in_chunks(logits, target, function, reduction, options)


def _is_at(value: Any, shape: Sequence[int], logits: Logits) -> bool:
    """Whether a value is a tensor of a shape where the logits are."""
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
"""What is done with logits on the way to a loss, by the name of the function."""


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
    given: list[Tensor] = []

    def placed(value: Any) -> Any:
        if not _wants(value):
            return value
        given.append(value)
        return Given(len(given) - 1)

    leaves = tuple(map(placed, group.leaves))
    head = Step(group.head.run, (None, ROWS, *leaves), {}, group.autocast)
    job = Job(
        steps=(head, *(one._replace(args=tuple(map(placed, one.args))) for one in form.steps)),
        places=form.places.reshape(-1),
        target=target.reshape(-1),
        shape=target.shape,
        function=function,
        reduction=reduction,
        options=options,
        autocast=autocast_of(logits.device.type),
        length=max(1, max(chunked.CHUNK, group.x.numel()) // group.head.outputs),
        # Gradients of half precision need the scale that they come with.
        again=reduction == "none" or torch.float16 in (group.x.dtype, group.dtype, form.dtype),
        draws=group.head.draws,
        read=(group.read, *form.read, Read.of((target, options))),
    )
    return loss_of(job, group.x, given)
