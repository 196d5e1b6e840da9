"""Parameters with separate values for each row of a batch: heads, norms and biases that adapters replace.

A :class:`RowParameter` takes the place of a parameter in a module. It holds the values of all adapters as a
bank (:mod:`lora_fx.runtime.rows.banked`), and the slot of each row. When any code calls a function of PyTorch
with such a parameter, the *form* of that function runs instead. It computes with the values of each row.
Functions without a form raise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.rows import banked
from lora_fx.runtime.rows.samples import SampleSlots, slots_for
from lora_fx.torch_private import pytree

__all__ = ["ComputedParameter", "RowParameter"]


class ComputedParameter(Tensor):
    """Tensor without memory that replaces a parameter of a module. Its forms run in place of functions.

    Attributes:
        fqn: FQN of the parameter.
    """

    fqn: str

    def looked_up(self, x: Tensor) -> Tensor:
        """Return the row of each index, [..., width], for indices ``x``, [...]."""
        raise NotImplementedError

    def multiplied(self, x: Tensor, bias: Tensor | None, turned: bool) -> Any:
        """Return the product with activations, with the transposed parameter if ``turned``.

        NotImplemented stands for a product that the parameter does not have.
        """
        raise NotImplementedError

    def transposed(self) -> ComputedParameter:
        """Return the transposed parameter."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the form of a function.

        Raises:
            ConfigError: If the function has no form, or the form does not support the arguments.
        """
        kwargs = dict(kwargs or {})
        if "input" in kwargs:  # the first argument of functions
            args = (kwargs.pop("input"), *args)
        if func in _FACTS:
            with torch_private.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        form = _FORMS.get(func)
        result = NotImplemented if form is None else form(*args, **kwargs)
        if result is NotImplemented:
            _refuse(_parameter_among(args, kwargs), f"{getattr(func, '__name__', func)}()")
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Raise, because operators below the functions of PyTorch have no forms.

        Raises:
            ConfigError: Always.
        """
        _refuse(_parameter_among(args, kwargs), str(func))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Return a description, without values."""
        return f"{type(self).__name__}({self.fqn}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _parameter_among(args: Any, kwargs: Any) -> ComputedParameter:
    leaves = pytree.tree_leaves((args, kwargs))
    return next(value for value in leaves if isinstance(value, ComputedParameter))


def _refuse(parameter: ComputedParameter, function: str) -> NoReturn:
    raise ConfigError(f"{parameter.fqn} has no values for each row in {function}, which reads it")


class RowParameter(ComputedParameter):
    """Parameter with separate values for each row of a batch. It has the shape and dtype of the original.

    Attributes:
        bank: The values of all adapters, [slots, *shape].
        slots: The slot of each row, [rows], or one slot for all rows, [1]. Or the adapter of each sample of
            the running call, from which the slots of the rows are computed.
    """

    bank: Tensor
    slots: Tensor | SampleSlots

    @staticmethod
    def __new__(cls, fqn: str, bank: Tensor, slots: Tensor | SampleSlots) -> RowParameter:
        """Create a parameter."""
        parameter: RowParameter = torch_private.make_wrapper_subclass(
            cls, bank.shape[1:], dtype=bank.dtype, device=bank.device
        )
        parameter.fqn, parameter.bank, parameter.slots = fqn, bank, slots
        return parameter

    def looked_up(self, x: Tensor) -> Tensor:
        """Return the row of each index, from the table of its adapter."""
        slots = slots_for(self.slots, x, self.fqn)
        return banked.banked_embedding(x, self.bank, slots, self.fqn)

    def multiplied(self, x: Tensor, bias: Tensor | None, turned: bool) -> Any:
        """Return the product of each row with the matrix of its adapter."""
        if self.dim() != 2:
            return NotImplemented
        slots = slots_for(self.slots, x, self.fqn)
        return banked.banked_linear(x, self.bank, slots, bias, self.fqn, turned=turned)

    def transposed(self) -> RowParameter:
        """Return the transposed parameter."""
        return RowParameter(self.fqn, self.bank.mT, self.slots)

    def spread(self, like: Tensor, *, channels: bool = False) -> Tensor:
        """Return the vector of each row in a shape that broadcasts to an activation.

        Args:
            like: The activation, [rows, ..., size], or [rows, size, ...] for channels.
            channels: True if the parameter has a number for each channel.
        """
        slots = slots_for(self.slots, like, self.fqn)
        vector = banked.banked_vector(self.bank, slots, like, channels)
        return banked.spread_channels(vector, like) if channels else vector


_Value: TypeAlias = Tensor | None


def _split(value: _Value) -> tuple[RowParameter | None, _Value]:
    """Return ``(value, None)`` for a :class:`RowParameter`, and ``(None, value)`` for any other value."""
    return (value, None) if isinstance(value, RowParameter) else (None, value)


def _of_activations(form: Callable[..., Any]) -> Callable[..., Any]:
    """Return a form whose first argument has to be an activation. A parameter has no form there."""

    @functools.wraps(form)
    def checked(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented if isinstance(x, ComputedParameter) else form(x, *args, **kwargs)

    return checked


@_of_activations
def _linear(x: Tensor, weight: Tensor, bias: _Value = None) -> Any:
    own, shared = _split(bias)
    if isinstance(shared, ComputedParameter):
        return NotImplemented
    if isinstance(weight, ComputedParameter):
        result = weight.multiplied(x, shared, turned=True)
    else:
        result = F.linear(x, weight, shared)
    return result if own is None or result is NotImplemented else result + own.spread(result)


@_of_activations
def _matmul(x: Tensor, other: Tensor) -> Any:
    if not isinstance(other, ComputedParameter):
        return NotImplemented
    return other.multiplied(x, None, turned=False)


def _addmm(x: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(mat1, RowParameter) or (beta, alpha) != (1, 1):
        return NotImplemented
    result = _matmul(mat1, mat2) if isinstance(mat2, RowParameter) else torch.mm(mat1, mat2)
    return result + (x.spread(result) if isinstance(x, RowParameter) else x)


def _embedding(
    x: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Any:
    if not isinstance(weight, ComputedParameter) or max_norm is not None:
        return NotImplemented
    return weight.looked_up(x)


def _scaled(result: Tensor, weight: _Value, bias: _Value, *, channels: bool = False) -> Tensor:
    """Multiply a normalized activation by its weight and add its bias."""
    for value, function in ((weight, torch.mul), (bias, torch.add)):
        if isinstance(value, RowParameter):
            result = function(result, value.spread(result, channels=channels))
        elif value is not None:
            vector = banked.spread_channels(value, result) if channels else value
            result = function(result, vector)
    return result


@_of_activations
def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: _Value = None,
    bias: _Value = None,
    eps: float = 1e-5,
) -> Any:
    if len(normalized_shape) != 1:
        return NotImplemented
    return _scaled(F.layer_norm(x, normalized_shape, None, None, eps), weight, bias)


@_of_activations
def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: _Value = None, eps: float | None = None
) -> Any:
    if len(normalized_shape) != 1:
        return NotImplemented
    return _scaled(F.rms_norm(x, normalized_shape, None, eps), weight, None)


@_of_activations
def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: _Value = None,
    bias: _Value = None,
    eps: float = 1e-5,
) -> Tensor:
    return _scaled(F.group_norm(x, num_groups, None, None, eps), weight, bias, channels=True)


@_of_activations
def _batch_norm(
    x: Tensor,
    running_mean: _Value,
    running_var: _Value,
    weight: _Value = None,
    bias: _Value = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    statistics = running_mean, running_var
    if any(isinstance(value, RowParameter) for value in statistics):
        if training:  # the statistics are those of the whole batch
            return NotImplemented
        assert running_mean is not None
        assert running_var is not None
        centered = _scaled(x, None, -running_mean, channels=True)
        result = _scaled(centered, (running_var + eps).rsqrt(), None, channels=True)
    else:
        result = F.batch_norm(x, *statistics, None, None, training, momentum, eps)
    return _scaled(result, weight, bias, channels=True)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return the form of a convolution with a kernel, or a bias, for each row."""

    @_of_activations
    def form(
        x: Tensor,
        weight: Tensor,
        bias: _Value = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if isinstance(weight, ComputedParameter):
            if groups != 1 or not isinstance(weight, RowParameter):
                return NotImplemented
            geometry = stride, padding, dilation
            slots = slots_for(weight.slots, x, weight.fqn)
            result = banked.banked_conv(x, weight.bank, slots, *geometry, weight=weight.fqn)
        else:
            result = function(x, weight, None, stride, padding, dilation, groups)
        return _scaled(result, None, bias, channels=True)

    return form


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return the form of an elementwise function. Without an activation, it computes a new bank."""

    def form(*args: Any, **kwargs: Any) -> Any:
        args = (*args, *(kwargs.pop(name) for name in ("other",) if name in kwargs))
        if any(isinstance(value, Tensor) for value in kwargs.values()):
            return NotImplemented
        rows = [value for value in args if isinstance(value, RowParameter)]
        if not rows:
            return NotImplemented
        activations = [
            value
            for value in args
            if isinstance(value, Tensor) and not isinstance(value, ComputedParameter)
        ]
        if not activations:
            alike = all(value.bank.shape == rows[0].bank.shape for value in rows)
            if not alike:
                return NotImplemented
            banks = [value.bank if isinstance(value, RowParameter) else value for value in args]
            return RowParameter(rows[0].fqn, function(*banks, **kwargs), rows[0].slots)
        like = max(activations, key=Tensor.dim)
        if like.dim() < 2 or any(value.dim() != 1 for value in rows):
            return NotImplemented
        spread = [
            value.spread(like) if isinstance(value, RowParameter) else value for value in args
        ]
        return function(*spread, **kwargs)

    return form


def _of_bank(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return the form of a function that has the same result for each adapter, such as a cast."""

    def form(own: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(own, RowParameter):
            return NotImplemented
        return RowParameter(own.fqn, function(own.bank, *args, **kwargs), own.slots)

    return form


def _turned(own: Any, *axes: int) -> Any:
    if own.dim() != 2 or (axes and {axis % 2 for axis in axes} != {0, 1}):
        return NotImplemented
    return own.transposed()


def _permuted(own: Any, *axes: Any) -> Any:
    order = axes[0] if len(axes) == 1 else axes
    return _turned(own) if [axis % 2 for axis in order] == [1, 0] else NotImplemented


def _functions(*names: str) -> list[Any]:
    """Return the functions of these names in torch, and as methods of tensors."""
    homes = (torch, torch.Tensor, F)
    return [getattr(home, name) for home in homes for name in names if hasattr(home, name)]


_ARITHMETIC = (
    "mul",
    "add",
    "sub",
    "div",
    "multiply",
    "true_divide",
    "mul_",
    "add_",
    "sub_",
    "div_",
)
_OPERATORS = tuple(
    f"__{side}{name}__" for name in ("mul", "add", "sub", "truediv") for side in ("", "r", "i")
)
_CASTS = ("to", "float", "double", "half", "bfloat16", "contiguous", "detach", "clone")

_FORMS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_functions("linear"), _linear),
    **dict.fromkeys(_functions("matmul", "mm", "__matmul__"), _matmul),
    **dict.fromkeys(_functions("addmm"), _addmm),
    **dict.fromkeys([F.embedding, torch.embedding], _embedding),
    **dict.fromkeys([F.layer_norm], _layer_norm),
    **dict.fromkeys([F.rms_norm], _rms_norm),
    **dict.fromkeys([F.group_norm], _group_norm),
    **dict.fromkeys([F.batch_norm], _batch_norm),
    **{
        function: _convolution(function)
        for dims in (1, 2, 3)
        for function in _functions(f"conv{dims}d")
    },
    **{
        function: _elementwise(function)
        for function in _functions(*_ARITHMETIC, *_OPERATORS, "neg", "exp", "rsqrt")
    },
    **{function: _of_bank(function) for function in _functions(*_CASTS)},
    **dict.fromkeys(_functions("permute"), _permuted),
    **dict.fromkeys(
        [
            *_functions("t", "transpose", "swapaxes"),
            torch.Tensor.T.__get__,  # type: ignore[attr-defined]
            torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
        ],
        _turned,
    ),
}
"""The form of each function that may take a :class:`RowParameter`."""

_PROPERTIES = [
    *("shape", "dtype", "device", "layout", "requires_grad", "ndim", "is_leaf", "grad_fn"),
    *("is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_cpu"),
]
_FACTS = frozenset(
    (
        *_functions("size", "dim", "numel", "is_floating_point", "is_complex", "element_size"),
        torch.Tensor.__len__,
        *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
    )
)
"""Functions and attributes that read no values. They run as they are."""
