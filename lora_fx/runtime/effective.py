"""The weight that knows its adapters: what code reads as ``layer.weight`` of an adapted layer.

An effective weight is a tensor without memory of its own, over the base's weight and the factors of the
active adapters. Its shape, dtype and device are those of the base's weight; an operation on it computes with
``W + s·BA``, and gradients reach the factors. So code that reads an adapted weight need not be found: a hook,
a helper, another module's forward, or the forward of the layer itself.

Graphs do not come here: they read the base's parameter from ``_parameters``, and run the fused product.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError, ConfigError
from lora_fx.torch_private import pytree

__all__ = [
    "CHANGES",
    "PRODUCTS",
    "Adapted",
    "Change",
    "EffectiveWeight",
    "assigned",
    "base_parameter",
    "effective_weight",
    "weight_property",
]

_NONE: Mapping[str, Any] = {}

CHANGES = "_lora_fx_changes"
"""Attribute of a module: what adapters change of its parameters, by the name of the parameter."""


class Change(Protocol):
    """What the active adapters change of one weight, with the factors that they have now.

    Attributes:
        name: FQN of the weight.
        factors: What the change is computed of, besides the weight.
        transposed: Whether it is the change of the transposed weight.
    """

    name: str
    factors: tuple[torch.Tensor, ...]
    transposed: bool

    def applied(self, weight: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the adapted weight, differentiable by the weight and the factors.

        Raises:
            CaptureError: If only a product with it has a meaning.
        """

    def note(self, place: str) -> None:
        """Take note of a place in the user's code that has the whole adapted weight computed."""

    def product(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Compute a product with the weight as a graph would; NotImplemented for what is no known product."""

    def turned(self) -> Change | None:
        """Return the change of the transposed weight; None if that is a view of the values."""


class Adapted(Protocol):
    """What the active adapters change of one weight, apart from a module."""

    def at(self, owner: nn.Module) -> Change:
        """Return the change with the factors that the module of the weight has."""


class EffectiveWeight(torch.Tensor):
    """A weight with its adapters, computed when an operation needs its values.

    Attributes:
        change: What adapters change.
        base: The base's weight.
    """

    change: Change
    base: torch.Tensor

    @staticmethod
    def __new__(cls, change: Change, base: torch.Tensor) -> EffectiveWeight:
        """Make a weight whose values are computed later."""
        form = base.mT if change.transposed else base
        made: EffectiveWeight = torch_private.make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), dtype=base.dtype, device=base.device
        )
        made.change, made.base = change, base
        return made

    @property
    def data(self) -> Any:
        """The same values, apart from autograd."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _refuse_write("data", self)

    @property
    def grad(self) -> Any:
        """The gradient of the base's weight, if that is trained, too."""
        return self.base.grad

    @grad.setter
    def grad(self, value: Any) -> None:
        self.base.grad = value

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """The node of autograd that gives the factors their gradients.

        Raises:
            ConfigError: If a module asks, which takes a parameter of its own.
        """
        if sys._getframe(1).f_code.co_name == "register_parameter":
            name = self.change.name
            raise ConfigError(
                f"{name} is computed from the base's weight and adapters, and no module can have it as a "
                f"parameter: clone() computes it, and model.get_parameter({name!r}) is the base's"
            )
        return torch.Tensor.grad_fn.__get__(self)  # type: ignore[union-attr]

    @property
    def requires_grad(self) -> bool:
        """Whether the base's weight or a factor is trained."""
        required: bool = torch.Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined]
        return required

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.base.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Train the base's weight, or freeze it; the factors stay as they are."""
        self.base.requires_grad_(requires_grad)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a product as a graph does, and everything else on the values."""
        kwargs = kwargs or {}
        if func in PRODUCTS:
            weight = next(one for one in (*args, *kwargs.values()) if type(one) is cls)
            result = weight.change.product(func, args, kwargs)
            if result is not NotImplemented:
                return result
        elif _turns(func, args) and (turned := args[0].change.turned()) is not None:
            with torch.set_grad_enabled(args[0].requires_grad):
                return _made(turned, args[0].base)
        elif func in _READ_OUT:
            return func(args[0].values().detach(), *args[1:], **kwargs)
        elif func in _MEMORY:
            _refuse_memory(func, args[0])
        with torch_private.without_torch_function():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation on the values."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return cls(args[0].change, args[0].base)  # also of .data
        _check_not_written(func, args, kwargs)
        parts = _parts(func, args, kwargs)
        if parts is not None:
            return parts
        args, kwargs = pytree.tree_map_only(cls, cls.values, (args, dict(kwargs)))
        return func(*args, **kwargs)

    def values(self) -> torch.Tensor:
        """Compute the adapted weight; its gradient is that of the effective one."""
        self.change.note(_place(sys._getframe(1)))
        with torch.no_grad():
            return self.change.applied(self.base, self.change.factors)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Return what it is; its values are not computed for that."""
        return f"EffectiveWeight({self.change.name}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _refuse_memory(func: Any, weight: EffectiveWeight) -> NoReturn:
    name = weight.change.name
    raise CaptureError(
        f"{name} is computed from the base's weight and adapters, and has no memory for {func.__name__}: "
        f"clone() computes it, and model.get_parameter({name!r}) is the base's"
    )


def _check_not_written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    schema = torch_private.schema_of(func)
    if not schema.is_mutable:
        return
    named = [*zip(schema.arguments, args, strict=False)]
    named += [(known, kwargs[known.name]) for known in schema.arguments if known.name in kwargs]
    for argument, value in named:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, EffectiveWeight):
            _refuse_write(func, value)


def _refuse_write(what: Any, weight: EffectiveWeight) -> NoReturn:
    name = weight.change.name
    raise CaptureError(
        f"{what} writes into {name}, which is computed from the base's weight and adapters: write into the "
        f"base's, model.get_parameter({name!r}), or merge the adapters first"
    )


@dataclasses.dataclass(slots=True)
class _Part:
    """A view of an effective weight that autograd does not see: a :class:`Change` that changes it.

    It is read like any tensor; writing into it is refused, where a computed copy would take it and be lost.

    Attributes:
        whole: The weight.
        view: Makes the views from the values of the weight.
        index: Which of them.
        name: FQN of the weight.
    """

    whole: EffectiveWeight
    view: Callable[[torch.Tensor], Any]
    index: int
    name: str
    factors: tuple[torch.Tensor, ...] = ()
    transposed: bool = False

    def applied(self, weight: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the view of the adapted weight."""
        views: list[torch.Tensor] = pytree.tree_leaves(self.view(self.whole.values()))
        return views[self.index]

    def note(self, place: str) -> None:
        """Leave it to the weight to take note of the place."""

    def product(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Leave products to the values."""
        return NotImplemented

    def turned(self) -> None:
        """Leave a transpose to the values."""


def _parts(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the views of an effective weight that an operator makes; None where autograd follows them."""
    whole = args[0]
    if not isinstance(whole, EffectiveWeight) or torch.is_inference_mode_enabled():
        return None
    if whole.requires_grad and torch.is_grad_enabled():
        return None
    returns = torch_private.schema_of(func).returns
    if not any(one.alias_info is not None and not one.alias_info.is_write for one in returns):
        return None

    def view(weight: torch.Tensor) -> Any:
        return func(weight, *args[1:], **kwargs)

    forms, spec = pytree.tree_flatten(
        view(whole.base.mT if whole.change.transposed else whole.base)
    )
    parts = [
        EffectiveWeight(_Part(whole, view, index, whole.change.name), form)
        for index, form in enumerate(forms)
    ]
    return pytree.tree_unflatten(parts, spec)


_WAYS = [
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "embedding",
    "embedding_bag",
]
_WAYS += [f"conv{turned}{dims}d" for turned in ("", "_transpose") for dims in (1, 2, 3)]
PRODUCTS = frozenset(
    function
    for home in (torch, torch.Tensor, nn.functional)
    for name in (*_WAYS, "__matmul__", "__rmatmul__")
    if (function := getattr(home, name, None)) is not None
)
"""Functions that may be a product with a weight, for which there are patterns."""

_READ_OUT = frozenset(
    getattr(torch.Tensor, name)
    for name in ("__array__", "__deepcopy__", "__reduce_ex__", "numpy", "tolist")
)
_MEMORY = frozenset(
    getattr(torch.Tensor, name)
    for name in ("__dlpack__", "data_ptr", "share_memory_", "storage", "untyped_storage")
)

_TURNS = frozenset(
    (torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
)
_SWAPS = frozenset((torch.transpose, torch.Tensor.transpose))


def _turns(func: Any, args: Sequence[Any]) -> bool:
    """Say whether a function transposes a matrix."""
    if func not in _TURNS and func not in _SWAPS:
        return False
    swapped = func in _TURNS or {axis % 2 for axis in args[1:] if isinstance(axis, int)} == {0, 1}
    return args[0].dim() == 2 and swapped


class _Make(torch.autograd.Function):
    """Makes an effective weight whose gradient goes on to the weight and the factors."""

    @staticmethod
    def forward(ctx: Any, change: Change, base: torch.Tensor, *factors: torch.Tensor) -> Any:
        ctx.change = change
        ctx.save_for_backward(base, *factors)
        return EffectiveWeight(change, base)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        wanted, again = ctx.needs_input_grad[1:], torch.is_grad_enabled()
        inputs = ctx.saved_tensors
        if not again:
            pairs = zip(inputs, wanted, strict=True)
            inputs = [tensor.detach().requires_grad_(want) for tensor, want in pairs]
        with torch.enable_grad():
            result = ctx.change.applied(inputs[0], inputs[1:])
        leaves = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
        # For derivatives of a higher order it is computed from the tensors themselves.
        own = iter(
            torch.autograd.grad([result], leaves, gradients, create_graph=again, allow_unused=True)
        )
        return None, *(next(own) if want else None for want in wanted)


def effective_weight(adapted: Adapted, owner: nn.Module, base: torch.Tensor) -> torch.Tensor:
    """Return a weight with its adapters.

    Args:
        adapted: What adapters change of it.
        owner: The module that has the weight.
        base: The base's weight.

    Returns:
        An :class:`EffectiveWeight`. The expression itself, which is computed at once, where a compiler, an
        export or a transform of ``torch.func`` looks, or a subclass of tensors holds the base's weight.
    """
    change = adapted.at(owner)
    factors = change.factors
    kinds = {_kind_of(tensor) for tensor in (base, *factors)}
    if len(kinds) > 1:
        return base  # a library exchanges them one after the other
    if (
        torch.compiler.is_compiling()
        or kinds != {torch.Tensor}
        or torch_private.in_functorch_level()
        or torch_private.in_forward_ad()
        or torch_private.in_jit_trace()
    ):
        return change.applied(base, factors)
    with torch.enable_grad():  # as a parameter, which wants a gradient wherever it was read
        weight = _made(change, base)
    return torch_private.as_parameter(weight)  # isinstance(layer.weight, nn.Parameter) holds


def _kind_of(tensor: torch.Tensor) -> type:
    """Return the subclass of tensors that one is of."""
    return torch.Tensor if type(tensor) is nn.Parameter else type(tensor)


def _made(change: Change, base: torch.Tensor) -> torch.Tensor:
    """Make an effective weight, with a gradient if the weight or a factor wants one."""
    if torch.is_grad_enabled() and any(one.requires_grad for one in (base, *change.factors)):
        made: torch.Tensor = _Make.apply(change, base, *change.factors)  # type: ignore[no-untyped-call]
        return made
    return EffectiveWeight(change, base)


_LIBRARIES = frozenset({"torch", "lora_fx"})


def _place(frame: FrameType | None) -> str:
    """Say which line of code runs an operation, the innermost that is neither PyTorch's nor ours."""
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _LIBRARIES and not frame.f_code.co_filename.startswith("<lora_fx "):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "code of PyTorch"


def base_parameter(module: Any, name: str) -> Any:
    """Return a parameter without adapters, or what a library has put in its place; None if there is none."""
    held = vars(module)
    base = _held(held, name) if name in held.get(CHANGES, _NONE) else None
    return getattr(module, name, None) if base is None else base


def _held(held: Mapping[str, Any], name: str) -> Any:
    """Return what a module holds by a name: a view that a library has put before the parameter, or that."""
    view = held.get(name)
    base = held["_parameters"].get(name) if view is None else view
    if type(base) is EffectiveWeight:
        raise CaptureError(
            f"{base.change.name} was read with its adapters and given to a module that adds them (as by "
            f"functional_call): give it the base's, model.get_parameter({base.change.name!r})"
        )
    return base


_MOVERS = (
    *(
        "torch.distributed",
        "torch.fx",
        "torch.nn.modules.module",
        "torch.nn.utils._named_member_accessor",
    ),
    *("torch.nn.utils.parametr", "torch.nn.utils.prune", "torch.nn.utils.spectral_norm"),
    *(
        "torch.nn.utils.weight_norm",
        "accelerate",
        "lora_fx",
        "torchao",
        "transformers.modeling_utils",
    ),
)
"""Packages whose code moves, replaces, wraps or describes parameters, and computes nothing with them."""


def assigned(module: nn.Module, name: str, value: Any) -> Any:
    """Return what a module gets that is assigned a parameter in the place of an adapted one.

    Args:
        module: The module.
        name: The attribute.
        value: Its new value; of an effective weight the base's is taken, which ties the two.

    Raises:
        ConfigError: If it is not assigned by code that moves parameters: what was read there before had the
            adapters in it, and would get them twice.
    """
    if name not in module.__dict__.get(CHANGES, _NONE) or not isinstance(value, nn.Parameter):
        return value
    if isinstance(value, EffectiveWeight):
        return value.base
    if not _asked_by_mover():
        raise ConfigError(
            f"{name} of this {type(module).__name__} has adapters, which are added to whatever is assigned: "
            "write the base's new values into model.get_parameter(...).data, or merge the adapters first"
        )
    return value


def _asked_by_mover() -> bool:
    """Return True if code that moves parameters reads or sets an attribute, as FSDP2 and accelerate do."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__setattr__" and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).startswith(_MOVERS)


def weight_property(name: str) -> property:
    """Make the property of a class that gives a parameter with its adapters.

    Args:
        name: The parameter's name.
    """

    def get(self: nn.Module) -> Any:
        held = self.__dict__
        base = _held(held, name)
        if base is None:
            raise AttributeError(name)  # Python goes on with __getattr__
        change = held.get(CHANGES, _NONE).get(name)
        if change is None or (not torch.compiler.is_compiling() and _asked_by_mover()):
            return base
        if torch_private.in_fx_trace():
            raise CaptureError(
                f"torch.fx traces code that reads {name} of a {type(self).__name__} with adapters, which its "
                "graph would hold as a constant: trace what lora_fx.merge(model) gives, or rewrite the graph "
                "module of the original"
            )
        try:
            return effective_weight(change, self, base)
        except AttributeError as error:  # Python would take that for "there is no such attribute"
            raise RuntimeError(f"{name} of a {type(self).__name__}: {error}") from error

    def put(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        self.__dict__.pop(name, None)

    return property(get, put, delete)
