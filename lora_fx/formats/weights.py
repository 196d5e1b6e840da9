"""Quantized weights as all others see them: values, products, state dicts and pickles.

What a weight is, its format says (:mod:`lora_fx.formats.base`). What the kernel of its library computes is
that library's business (the operation is opaque). Here are its values (:func:`dense`), and ``x Wᵀ + b``
(:func:`quantized_linear`), whose backward makes the values again and keeps none of them. A tensor subclass
has its scales with it and takes the values of its like only: anything else in a state dict is refused in
words. A format whose scales lie next to the weight has hooks of its own, which write and read them.

No library is imported here: a model that has such a weight has loaded its library.
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
    """The values of a quantized weight, [out, in]; any other weight as it is, in its own shape.

    Args:
        weight: A parameter, or what it holds.
        dtype: Of the result; the weight's own by default.
    """
    found = quantization_of(weight)
    if found is None:
        return weight if dtype is None else weight.to(dtype)
    wanted = dtype or found.dtype
    # As its kernel has them, and rounded to the type of the result after that.
    return _known(weight).values(held(weight), wanted).to(wanted)


@dataclasses.dataclass(frozen=True, slots=True)
class KeptWeight:
    """A quantized weight whose values a backward makes again.

    It is held as it is: ``save_for_backward`` would hand it to hooks that lose its scales. So what autograd
    does for a tensor is done here, too: it notes the versions.

    Attributes:
        weight: A parameter, or what it holds.
        versions: Of what it is made of; none where a compiler takes care of what it keeps.
    """

    weight: Tensor
    versions: tuple[int, ...]

    @classmethod
    def of(cls, weight: Tensor) -> KeptWeight:
        """A weight as it is now."""
        return cls(weight, () if torch.compiler.is_compiling() else tuple(_versions(weight)))

    def values(self, dtype: torch.dtype) -> Tensor:
        """The values, [out, in], in the backward.

        Raises:
            QuantizationError: If the weight was written into.
        """
        known = self.versions and not torch.compiler.is_compiling()
        if known and tuple(_versions(self.weight)) != self.versions:
            raise QuantizationError(
                f"a {type(self.weight).__name__} of shape {tuple(self.weight.shape)} was written into "
                "between forward and backward, which reads it again: write into weights before the forward, "
                "or after the backward"
            )
        return dense(self.weight, dtype)


def _versions(tensor: Any) -> Iterator[int]:
    """How often a tensor was written into, and those of which it is made."""
    if not isinstance(tensor, Tensor) or tensor.is_inference():
        return
    yield torch_private.version_counter(tensor)
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    for name in () if flatten is None else flatten(tensor)[0]:
        yield from _versions(getattr(tensor, name))


def requantized(values: Tensor, weight: nn.Parameter) -> nn.Parameter:
    """A frozen parameter that holds ``values`` as ``weight`` holds its own: what a merge puts in its place.

    Nothing of the old scales is kept: they are those of the new values.

    Args:
        values: [out, in].
        weight: A quantized parameter of that shape; it is not changed.

    Raises:
        QuantizationError: If the format cannot hold the values, or its library cannot make it here.
    """
    found = quantization_of(weight)
    if found is None:
        raise QuantizationError(f"a {type(weight).__name__} is no quantized weight that is known")
    try:
        made = _known(weight).requantize(values, held(weight))
    except Exception as error:  # whatever a library raises for what it has no kernel for
        raise QuantizationError(
            f"{found.library} cannot make {found} here ({type(error).__name__}: {error})"
        ) from error
    if not torch.isfinite(dense(made)).all():
        raise QuantizationError(f"{found} cannot hold them: not all of them are finite there")
    return made


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    threshold: float = 0.0,
    training: bool = False,
    layout: str = "out_in",
) -> Tensor:
    """``x Wᵀ + b`` by the kernel of the library that the weight is of; differentiable in x and b.

    Under the transforms of ``torch.func`` it is a product with the values of the weight.

    Args:
        x: [..., in].
        weight: A quantized [out, in].
        bias: [out].
        compute_dtype: In which the product is computed, for 4 bits (``bnb_4bit_compute_dtype`` of
            bitsandbytes); x's by default. In fp64 it is a product with the values.
        threshold: Of LLM.int8() (arXiv:2208.07339): features of x with larger elements are multiplied in half
            precision.
        training: Whether the model trains, which LLM.int8() asks: on the CPU it then dequantizes.
        layout: How the weight was stored before it was quantized: what a merge gives back.

    Returns:
        [..., out], in the dtype of x.
    """
    stood_for: Any = weight
    if not isinstance(stood_for, Tensor):  # a module of an export, which computes this by itself
        found: Tensor = handle_torch_function(quantized_linear, (weight,), x, weight, bias)
        return found
    given = x if compute_dtype is None else x.to(compute_dtype)
    bias = None if bias is None else bias.to(given.dtype)
    if torch_private.in_functorch():
        # The kernels know nothing of transforms.
        return F.linear(given, dense(weight, given.dtype), bias).to(x.dtype)
    kernel = _known(weight).product(
        x, weight, bias, compute_dtype=compute_dtype, threshold=threshold, training=training
    )
    if kernel is not None:
        return kernel
    made: Tensor = _Product.apply(given, weight, bias)  # type: ignore[no-untyped-call]
    return made if compute_dtype is None else made.to(x.dtype)


class _Product(torch.autograd.Function):
    """The product of a tensor subclass, or with values: opaque to autograd, which would keep the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.with_bias = KeptWeight.of(weight), bias is not None
        by_itself = _known(weight).multiplies(held(weight), x.dtype)
        out = F.linear(x, weight if by_itself else dense(weight, x.dtype), bias)
        # Some kernels return a view, into which a branch could not be added in place: it was made
        # without gradients.
        found: Tensor = torch_private.UNSAFE_VIEW(out, out.shape)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        to_x = grad @ ctx.weight.values(grad.dtype) if ctx.needs_input_grad[0] else None
        wanted = ctx.with_bias and ctx.needs_input_grad[2]
        return to_x, None, grad.flatten(0, -2).sum(0) if wanted else None


def _known(weight: object) -> WeightFormat:
    found = format_of(weight)
    assert found is not None
    return found


REMEDY: Final = (
    "quantize the model that the state dict is of with lora_fx.quantize, or load it before this one is "
    "quantized"
)


class FormatHook:
    """A hook of a module that is there for a quantized parameter: a merge that makes it dense takes it off.

    Attributes:
        parameter: Its name.
    """

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter


class SaveHook(FormatHook, abc.ABC):
    """Writes what lies beside a weight into a state dict."""

    @abc.abstractmethod
    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> None:
        """Called once the module has written its own."""


class LoadHook(FormatHook, abc.ABC):
    """Reads what lies beside a weight, or refuses a state dict that it cannot be read from."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Called before the module reads its own; the last argument is the list of errors."""
        name = f"{prefix}{self.parameter}"
        if name in state:
            self.load(module._parameters.get(self.parameter), name, state, rest[-1])

    def load(self, weight: Any, name: str, state: dict[str, Any], errors: list[str]) -> None:
        """Reads what a state dict has for a weight.

        Args:
            weight: The weight.
            name: Its name in the state dict.
            state: The state dict; what is taken out of it is read.
            errors: Takes what is wrong.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, slots=True)
class StateHooks:
    """What a format has for a parameter whose scales lie beside it.

    Attributes:
        load: Reads them.
        save: Writes them; None where the layer does.
    """

    load: LoadHook
    save: SaveHook | None = None


def follow_state(module: nn.Module, parameter: str, *, layer: bool) -> None:
    """Has a module write and read a quantized parameter, or refuse what it cannot read.

    Args:
        module: Whose parameter it is.
        parameter: Its name there.
        layer: Whether the module has become a layer of the format's library.
    """
    found = format_of(module._parameters[parameter])
    assert found is not None
    hooks = found.state_hooks(parameter, layer=layer) or StateHooks(_Check(parameter))
    if hooks.save is not None:
        module.register_state_dict_post_hook(hooks.save)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(hooks.load)  # type: ignore[no-untyped-call]


class _Check(LoadHook):
    """Looks at how a weight of a state dict is stored."""

    def load(self, weight: Any, name: str, state: dict[str, Any], errors: list[str]) -> None:
        """See :class:`LoadHook`."""
        own = quantization_of(weight)
        if own is None:
            return
        found = quantization_of(state[name])
        if found is not None and _format(found) == _format(own):
            return
        there = "has its values there" if found is None else f"as {found} in the state dict"
        errors.append(f"{name} is stored as {own} here and {there}: {REMEDY}")
        # So that nothing else is said of it: it is not missing, and copying it changes nothing.
        state[name] = weight


def _format(found: Quantization) -> tuple[Any, ...]:
    return found.library, found.scheme, found.block_size


def is_format_hook(hook: Any) -> bool:
    """Whether a hook of a module is there for a quantized weight: a library's, or one of those here."""
    hook = getattr(hook, "hook", hook)  # torch wraps some
    return isinstance(hook, FormatHook) or any(one.layers.owns_hook(hook) for one in formats())


def pickle_by_class(cls: type[nn.Parameter]) -> None:
    """Has all parameters of a class pickled as what they are.

    Args:
        cls: A subclass of ``nn.Parameter`` whose attributes are its state.
    """
    copyreg.pickle(cls, torch_private.reduce_parameter)
