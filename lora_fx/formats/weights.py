"""Functions on quantized weights of any format: values, products, state dicts and pickles.

:func:`dense` returns the values of a weight. :func:`quantized_linear` computes ``x Wᵀ + b`` with the kernels
of the weight's library, and recomputes the values in the backward instead of saving them. Both call the
methods of the weight's format (:mod:`lora_fx.formats.base`).

A tensor subclass carries its scales. It loads only a weight of the same format from a state dict; anything
else is an error. A format that stores the scales outside the weight has hooks that save and load them.

No library is imported here, because a model with such a weight has imported its library already.
"""

from __future__ import annotations

import abc
import copyreg
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from lora_fx import torch_private
from lora_fx.errors import QuantizationError
from lora_fx.formats.base import WeightFormat, format_of, formats, held, quantization_of
from lora_fx.ir import Quantization

__all__ = [
    "REMEDY",
    "WHOLE_WEIGHTS",
    "CheckStorage",
    "FormatHook",
    "KeptWeight",
    "LoadHook",
    "SaveHook",
    "StateHooks",
    "dense",
    "follow_state",
    "is_format_hook",
    "pickle_by_class",
    "quantized_linear",
    "requantized",
]


def dense(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the values of a quantized weight, [out, in]; any other weight unchanged, in its own shape.

    Args:
        weight: A parameter, or its tensor.
        dtype: The dtype of the result; the weight's own by default.
    """
    quantization = quantization_of(weight)
    if quantization is None:
        return weight if dtype is None else weight.to(dtype)
    target = dtype or quantization.dtype
    # Compute the values in the precision of the kernel, then round them to the dtype of the result.
    return _known(weight).values(held(weight), target).to(target)


@dataclasses.dataclass(frozen=True, slots=True)
class KeptWeight:
    """A quantized weight whose values the backward recomputes.

    It keeps the weight itself, because ``save_for_backward`` would pass it to hooks that lose its scales. It
    therefore also checks version counters, as autograd does for saved tensors.

    Attributes:
        weight: A parameter, or its tensor.
        versions: The version counters of the weight and its inner tensors; none under a compiler, which
            checks saved tensors itself.
    """

    weight: Tensor
    versions: tuple[int, ...]

    @classmethod
    def of(cls, weight: Tensor) -> KeptWeight:
        """Return a weight with its current version counters."""
        return cls(weight, () if torch.compiler.is_compiling() else tuple(_versions(weight)))

    def values(self, dtype: torch.dtype) -> Tensor:
        """Dequantize the weight to [out, in], for the backward.

        Raises:
            QuantizationError: If the weight was written into since the forward.
        """
        self.check()
        return dense(self.weight, dtype)

    def check(self) -> None:
        """Raise if the weight was written into since the forward.

        Raises:
            QuantizationError: With the class and the shape of the weight.
        """
        checked = self.versions and not torch.compiler.is_compiling()
        if checked and tuple(_versions(self.weight)) != self.versions:
            raise QuantizationError(
                f"a {type(self.weight).__name__} of shape {tuple(self.weight.shape)} was written into "
                "between forward and backward, which reads it again: write into weights before the forward, "
                "or after the backward"
            )


def _versions(tensor: Any) -> Iterator[int]:
    """Yield the version counters of a tensor and of its inner tensors."""
    if not isinstance(tensor, Tensor) or tensor.is_inference():
        return
    yield torch_private.version_counter(tensor)
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    for name in () if flatten is None else flatten(tensor)[0]:
        yield from _versions(getattr(tensor, name))


def requantized(values: Tensor, weight: nn.Parameter) -> nn.Parameter:
    """Quantize new values as ``weight`` is quantized, and return a frozen parameter.

    A merge replaces the weight by it. The scales are computed from the new values, unless the format keeps
    scales whose range the values fit.

    Args:
        values: [out, in].
        weight: A quantized parameter of that shape; it is not changed.

    Raises:
        QuantizationError: If the format cannot hold the values, or its library cannot make the weight here.
    """
    quantization = quantization_of(weight)
    if quantization is None:
        raise QuantizationError(f"a {type(weight).__name__} is no quantized weight that is known")
    try:
        parameter = _known(weight).requantize(values, held(weight))
    except Exception as error:  # libraries raise anything if a kernel is missing
        raise QuantizationError(
            f"{quantization.library} cannot make {quantization} here ({type(error).__name__}: {error})"
        ) from error
    if not torch.isfinite(dense(parameter)).all():
        raise QuantizationError(
            f"{quantization} cannot hold them: not all of them are finite there"
        )
    return parameter


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    threshold: float = 0.0,
    training: bool = False,
    layout: str = "out_in",
) -> Tensor:
    """Compute ``x Wᵀ + b`` by the kernel of the weight's library; differentiable in x and b.

    Under the transforms of ``torch.func`` it multiplies with the dequantized values instead.

    Args:
        x: [..., in].
        weight: A quantized matrix [out, in].
        bias: [out].
        compute_dtype: The dtype of the product, for 4 bits (``bnb_4bit_compute_dtype`` of bitsandbytes); by
            default that of x. A product in fp64 uses the dequantized values.
        threshold: The threshold of LLM.int8() (arXiv:2208.07339): features of x with larger elements are
            multiplied in half precision.
        training: True if the model trains. LLM.int8() depends on it: on the CPU it then dequantizes.
        layout: The layout of the weight before it was quantized, which a merge restores.

    Returns:
        [..., out], in the dtype of x.
    """
    stood_for: Any = weight
    if not isinstance(stood_for, Tensor):  # a module of an export, which overrides this function
        output: Tensor = handle_torch_function(quantized_linear, (weight,), x, weight, bias)
        return output
    inputs = x if compute_dtype is None else x.to(compute_dtype)
    bias = None if bias is None else bias.to(inputs.dtype)
    if torch_private.in_functorch():
        # The kernels do not support transforms.
        return F.linear(inputs, dense(weight, inputs.dtype), bias).to(x.dtype)
    kernel = _known(weight).product(
        x, weight, bias, compute_dtype=compute_dtype, threshold=threshold, training=training
    )
    if kernel is not None:
        return kernel
    product: Tensor = _Product.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
    return product if compute_dtype is None else product.to(x.dtype)


class _Product(torch.autograd.Function):
    """The product with a quantized weight. As a single autograd node it does not save the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.with_bias = KeptWeight.of(weight), bias is not None
        direct = _known(weight).multiplies(held(weight), x.dtype)
        out = F.linear(x, weight if direct else dense(weight, x.dtype), bias)
        # Some kernels return a view that was made without gradients: a branch could not be added to it
        # in place.
        detached_view: Tensor = torch_private.UNSAFE_VIEW(out, out.shape)
        return detached_view

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        to_x = grad @ ctx.weight.values(grad.dtype) if ctx.needs_input_grad[0] else None
        with_bias = ctx.with_bias and ctx.needs_input_grad[2]
        return to_x, None, grad.flatten(0, -2).sum(0) if with_bias else None


def _known(weight: object) -> WeightFormat:
    weight_format = format_of(weight)
    if weight_format is None:
        raise QuantizationError(
            f"a quantized weight has become a {type(weight).__name__} of {getattr(weight, 'dtype', None)} "
            f"without scales. If FSDP2 shards it, {WHOLE_WEIGHTS}; else load it as it was stored"
        )
    return weight_format


WHOLE_WEIGHTS: Final = (
    "leave quantized weights whole: fully_shard(..., "
    "ignored_params=lora_fx.quantized_parameters(model)), for each unit"
)

REMEDY: Final = (
    "quantize the model that the state dict is of with lora_fx.quantize, or load it before this one is "
    "quantized"
)


class FormatHook:
    """A hook of a module for a quantized parameter. A merge that makes the parameter dense removes the hook.

    Attributes:
        parameter: The name of the parameter.
    """

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter


class SaveHook(FormatHook, abc.ABC):
    """A hook that writes the scales of a weight into a state dict."""

    @abc.abstractmethod
    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> None:
        """Write the scales, after the module has written its own entries."""


class LoadHook(FormatHook, abc.ABC):
    """A hook that reads the scales of a weight, or refuses a state dict without them."""

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Read the scales before the module reads its own entries; the last argument is a list of errors."""
        name = f"{prefix}{self.parameter}"
        if name in state:
            self.load(module._parameters.get(self.parameter), name, state, arguments[-1])

    def load(self, weight: Any, name: str, state: dict[str, Any], errors: list[str]) -> None:
        """Read the scales of a weight from a state dict.

        Args:
            weight: The weight.
            name: Its name in the state dict.
            state: The state dict. The entries that were read are removed.
            errors: The list to append error messages to.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, slots=True)
class StateHooks:
    """The hooks of a parameter whose scales are stored outside it.

    Attributes:
        load: Reads the scales.
        save: Writes the scales; None if the layer itself writes them.
    """

    load: LoadHook
    save: SaveHook | None = None


def follow_state(module: nn.Module, parameter: str, *, layer: bool) -> None:
    """Register the hooks by which a module saves and loads a quantized parameter.

    Args:
        module: The module of the parameter.
        parameter: Its name in the module.
        layer: True if the module has become a layer of the format's library.
    """
    weight_format = format_of(module._parameters[parameter])
    assert weight_format is not None
    hooks = weight_format.state_hooks(parameter, layer=layer) or StateHooks(CheckStorage(parameter))
    if hooks.save is not None:
        module.register_state_dict_post_hook(hooks.save)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(hooks.load)  # type: ignore[no-untyped-call]


class CheckStorage(LoadHook):
    """A hook that refuses a state dict in which a weight is stored in another format."""

    def load(self, weight: Any, name: str, state: dict[str, Any], errors: list[str]) -> None:
        """See :class:`LoadHook`."""
        current = quantization_of(weight)
        if current is None:
            return
        loaded = quantization_of(state[name])
        if loaded is not None and _format(loaded) == _format(current):
            return
        text = "has its values there" if loaded is None else f"as {loaded} in the state dict"
        errors.append(f"{name} is stored as {current} here and {text}: {REMEDY}")
        # Load the present weight, which changes nothing, so that no second error reports a missing key.
        state[name] = weight


def _format(quantization: Quantization) -> tuple[Any, ...]:
    return quantization.library, quantization.scheme, quantization.block_size


def is_format_hook(hook: Any) -> bool:
    """Return True if a hook serves a quantized weight: a library's hook or a :class:`FormatHook`.

    A merge to a dense weight removes such hooks.
    """
    hook = getattr(hook, "hook", hook)  # torch wraps some
    return isinstance(hook, FormatHook) or any(
        weight_format.layers.owns_hook(hook) for weight_format in formats()
    )


def pickle_by_class(cls: type[nn.Parameter]) -> None:
    """Make pickle keep the class and the attributes of all parameters of a class.

    Args:
        cls: A subclass of ``nn.Parameter`` whose attributes are its state.
    """
    copyreg.pickle(cls, torch_private.reduce_parameter)
