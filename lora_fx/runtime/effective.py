"""Effective weights: the value of ``layer.weight`` of an adapted layer, with the adapters applied.

An effective weight is a wrapper tensor without memory, over the base weight and the factors of the active
adapters. It has the shape, dtype and device of the base weight. Operations on it compute with ``W + s·BA``,
and gradients reach the factors. So any code may read an adapted weight: a hook, a helper, the forward of
another module, or of the layer itself.

Graphs do not use effective weights. They read the base parameter from ``_parameters``, and run the fused
product.
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
from lora_fx.formats import StackedTensor
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
"""Attribute of a module: the :class:`Adapted` of each adapted parameter, by its name."""


class Change(Protocol):
    """Change of one weight by the active adapters, bound to their current factors."""

    @property
    def name(self) -> str:
        """FQN of the weight."""

    @property
    def factors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the change is computed from, in addition to the weight."""

    @property
    def transposed(self) -> bool:
        """True if this is the change of the transposed base weight."""

    def applied(self, weight: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the adapted weight, differentiable with respect to the weight and the factors.

        Raises:
            CaptureError: If the adapted weight exists only as part of a product.
        """

    def note(self, location: str) -> None:
        """Record a location in the user's code that needs the values of the whole adapted weight."""

    def product(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Compute base product plus branch, like a graph. Return NotImplemented for an unknown ``func``."""

    def turned(self) -> Change | None:
        """Return the change of the transposed weight, or None if a transpose has to use the values."""


class Adapted(Protocol):
    """Change of one weight by the active adapters, before it is bound to the factors of a module."""

    def read(self, owner: nn.Module, base: torch.Tensor) -> torch.Tensor:
        """Return the tensor for code that reads the weight.

        Args:
            owner: The module that owns the weight.
            base: The base weight.
        """


class EffectiveWeight(torch.Tensor):
    """Weight with its adapters, which is computed when an operation needs its values.

    Attributes:
        change: Change of the weight by the adapters.
        base: The base weight.
    """

    change: Change
    base: torch.Tensor

    @staticmethod
    def __new__(cls, change: Change, base: torch.Tensor) -> EffectiveWeight:
        """Create a weight whose values are computed later."""
        form = base.mT if change.transposed else base
        weight: EffectiveWeight = torch_private.make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), dtype=base.dtype, device=base.device
        )
        weight.change, weight.base = change, base
        return weight

    @property
    def data(self) -> Any:
        """The adapted weight, detached from autograd. Setting this attribute raises."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _refuse_write("data", self)

    @property
    def grad(self) -> Any:
        """Gradient of the base weight. It is None if only the factors are trained."""
        return self.base.grad

    @grad.setter
    def grad(self, value: Any) -> None:
        self.base.grad = value

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """Autograd node that passes gradients to the factors.

        Raises:
            ConfigError: If ``register_parameter`` reads it: no module can own an effective weight.
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
        """True if the base weight or a factor is trained."""
        required: bool = torch.Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined]
        return required

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.base.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Train or freeze the base weight. The factors are not affected."""
        self.base.requires_grad_(requires_grad)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a product as base product plus branch, like a graph. Run other functions on the values."""
        kwargs = kwargs or {}
        if func in PRODUCTS:
            weight = next(value for value in (*args, *kwargs.values()) if type(value) is cls)
            result = weight.change.product(func, args, kwargs)
            if result is not NotImplemented:
                return result
        elif _is_transpose(func, args) and (turned := args[0].change.turned()) is not None:
            with torch.set_grad_enabled(args[0].requires_grad):
                return _made(turned, args[0].base)
        elif func in _READ_OUT:
            return func(args[0].values().detach(), *args[1:], **kwargs)
        elif func in _MEMORY:
            _refuse_memory(func, args[0])
        with torch_private.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation on the values."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return cls(args[0].change, args[0].base)  # .data calls this, too
        _check_not_written(func, args, kwargs)
        parts = _parts(func, args, kwargs)
        if parts is not None:
            return parts
        args, kwargs = pytree.tree_map_only(cls, cls.values, (args, dict(kwargs)))
        return func(*args, **kwargs)

    def values(self) -> torch.Tensor:
        """Compute the adapted weight. The gradient of the result is that of the effective weight."""
        self.change.note(_place(sys._getframe(1)))
        with torch.no_grad():
            return self.change.applied(self.base, self.change.factors)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Return a description, without computing the values."""
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


def _refuse_write(func: Any, weight: EffectiveWeight) -> NoReturn:
    name = weight.change.name
    raise CaptureError(
        f"{func} writes into {name}, which is computed from the base's weight and adapters: write into the "
        f"base's, model.get_parameter({name!r}), or merge the adapters first"
    )


@dataclasses.dataclass(slots=True)
class _Part:
    """:class:`Change` of a view of an effective weight, outside of autograd.

    The view can be read like any tensor. Writing into it raises. A computed copy would accept the write and
    lose it.

    Attributes:
        whole: The effective weight.
        view: Function that computes the views from the values of the weight.
        index: Index of this view among the views.
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

    def note(self, location: str) -> None:
        """Do nothing, because the weight records the location."""

    def product(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return NotImplemented, so that products use the values."""
        return NotImplemented

    def turned(self) -> None:
        """Return None, so that a transpose uses the values."""


def _parts(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the views of an effective weight that an operator creates.

    Return None if the operator creates no views, or if autograd tracks them.
    """
    whole = args[0]
    if not isinstance(whole, EffectiveWeight) or torch.is_inference_mode_enabled():
        return None
    if whole.requires_grad and torch.is_grad_enabled():
        return None
    returns = torch_private.schema_of(func).returns
    if not any(
        output.alias_info is not None and not output.alias_info.is_write for output in returns
    ):
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
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "embedding", "embedding_bag"),
    *(f"conv{turned}{dims}d" for turned in ("", "_transpose") for dims in (1, 2, 3)),
]
PRODUCTS = frozenset(
    function
    for home in (torch, torch.Tensor, nn.functional)
    for name in (*_WAYS, "__matmul__", "__rmatmul__")
    if (function := getattr(home, name, None)) is not None
)
"""Functions that may be a product with a weight, and that patterns support."""

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


def _is_transpose(func: Any, args: Sequence[Any]) -> bool:
    """Return True if this call transposes a matrix, so that :meth:`Change.turned` can replace the values."""
    if func not in _TURNS and func not in _SWAPS:
        return False
    swapped = func in _TURNS or {axis % 2 for axis in args[1:] if isinstance(axis, int)} == {0, 1}
    return args[0].dim() == 2 and swapped


class _Make(torch.autograd.Function):
    """Autograd function of an effective weight, which passes gradients to the base and the factors."""

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
        # Higher derivatives need the graph of the saved tensors themselves.
        own = iter(
            torch.autograd.grad([result], leaves, gradients, create_graph=again, allow_unused=True)
        )
        return None, *(next(own) if want else None for want in wanted)


def effective_weight(change: Change, base: torch.Tensor) -> torch.Tensor:
    """Return a weight with its adapters.

    Args:
        change: Change of the weight by the adapters, with the factors of its module.
        base: The base weight.

    Returns:
        An :class:`EffectiveWeight`. The adapted weight is computed at once under a compiler, an export or a
        ``torch.func`` transform, or if the base weight is a tensor subclass.
    """
    factors = change.factors
    kinds = {_kind_of(tensor) for tensor in (base, *factors)}
    if len(kinds) > 1:
        return base  # a library is converting these tensors, and has not reached all of them
    if (
        torch.compiler.is_compiling()
        or kinds != {torch.Tensor}
        or torch_private.in_functorch_level()
        or torch_private.in_forward_ad()
        or torch_private.in_jit_trace()
    ):
        return change.applied(base, factors)
    with torch.enable_grad():  # a parameter requires gradients also if read under no_grad
        weight = _made(change, base)
    return torch_private.as_parameter(weight)  # isinstance(layer.weight, nn.Parameter) holds


def _kind_of(tensor: torch.Tensor) -> type:
    """Return the class of a tensor; :class:`torch.Tensor` for plain tensors, parameters and stacks.

    Different classes show that a library is converting the tensors of a layer.
    """
    plain = type(tensor) is nn.Parameter or isinstance(tensor, StackedTensor)
    return torch.Tensor if plain else type(tensor)


def _made(change: Change, base: torch.Tensor) -> torch.Tensor:
    """Create an effective weight. It requires a gradient if the base weight or a factor does."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (base, *change.factors)):
        weight: torch.Tensor = _Make.apply(change, base, *change.factors)  # type: ignore[no-untyped-call]
        return weight
    return EffectiveWeight(change, base)


_LIBRARIES = frozenset({"torch", "lora_fx"})


def _place(frame: FrameType | None) -> str:
    """Return the innermost line of code outside of PyTorch and lora-fx that runs an operation."""
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _LIBRARIES and not frame.f_code.co_filename.startswith("<lora_fx "):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "code of PyTorch"


def base_parameter(module: Any, name: str) -> Any:
    """Return a parameter without its adapters, or None if the module has no parameter of this name.

    If a library has put a view in the place of the parameter, return the view.
    """
    attributes = vars(module)
    base = _held(attributes, name) if name in attributes.get(CHANGES, _NONE) else None
    return getattr(module, name, None) if base is None else base


def _held(attributes: Mapping[str, Any], name: str) -> Any:
    """Return a base parameter from the ``vars`` of its module, or a view that a library has set over it."""
    view = attributes.get(name)
    base = attributes["_parameters"].get(name) if view is None else view
    base = attributes["_buffers"].get(name) if base is None else base
    if type(base) is EffectiveWeight:
        raise CaptureError(
            f"{base.change.name} was read with its adapters and given to a module that adds them (as by "
            f"functional_call): give it the base's, model.get_parameter({base.change.name!r})"
        )
    return base


_MOVERS = (
    "accelerate",
    "lora_fx",
    "torch.distributed",
    "torch.fx",
    "torch.nn.modules.module",
    "torch.nn.utils._named_member_accessor",
    "torch.nn.utils.parametr",  # parametrize, and parametrizations
    "torch.nn.utils.prune",
    "torch.nn.utils.spectral_norm",
    "torch.nn.utils.weight_norm",
    "torchao",
    "transformers.modeling_utils",
)
"""Packages whose code moves, replaces, wraps or describes parameters, without computing with them."""


def assigned(module: nn.Module, name: str, value: Any) -> Any:
    """Return the value to store when a parameter is assigned to an adapted attribute.

    Args:
        module: The module.
        name: The attribute.
        value: Its new value. For an effective weight, the base weight is stored, which ties the two.

    Raises:
        ConfigError: If the assignment is not in one of the packages that move parameters. The value may have
            been read from the attribute, and would then get the adapters twice.
    """
    change = module.__dict__.get(CHANGES, _NONE).get(name)
    if change is None or not isinstance(value, nn.Parameter):
        return value
    if isinstance(value, EffectiveWeight):
        return value.base
    if not _asked_by_mover():
        raise ConfigError(
            f"{change.name} has adapters, which are added to whatever is assigned: write the base's new "
            f"values into model.get_parameter({change.name!r}).data, or merge the adapters first"
        )
    return value


def _asked_by_mover() -> bool:
    """Return True if the code that reads or sets an adapted attribute moves parameters, as FSDP2 does."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__setattr__" and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).startswith(_MOVERS)


def weight_property(name: str) -> property:
    """Return a property for a module class that returns a parameter with its adapters.

    Args:
        name: Name of the parameter.
    """

    def get(self: nn.Module) -> Any:
        attributes = self.__dict__
        base = _held(attributes, name)
        if base is None:
            raise AttributeError(name)  # Python goes on with __getattr__
        change = attributes.get(CHANGES, _NONE).get(name)
        if change is None or (not torch.compiler.is_compiling() and _asked_by_mover()):
            return base
        if torch_private.in_fx_trace():
            raise CaptureError(
                f"torch.fx traces code that reads {name} of a {type(self).__name__} with adapters, which its "
                "graph would hold as a constant: trace what lora_fx.merge(model) gives, or rewrite the graph "
                "module of the original"
            )
        try:
            return change.read(self, base)
        except AttributeError as error:  # Python would treat it as a missing attribute
            raise RuntimeError(f"{name} of a {type(self).__name__}: {error}") from error

    def put(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        self.__dict__.pop(name, None)

    return property(get, put, delete)
