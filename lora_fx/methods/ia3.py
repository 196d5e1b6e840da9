"""IA³ (Liu et al. 2022, arXiv:2205.05638): a factor for each output or input, in PEFT and LyCORIS."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange
from lora_fx.passes.graph import is_conv1d

__all__ = ["METHODS", "Ia3", "LycorisIa3"]


class Ia3(Method):
    """Factors of the outputs and the bias, or of the inputs in feed-forward modules."""

    name = "IA³"
    does = "factors of outputs or inputs"
    peft_type = "IA3"
    roles = ("ia3_l",)

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight, and of the bias if outputs are scaled."""
        factors = layer.take("ia3_l")
        on_inputs = _is_feedforward(layer, factors)
        if len(layer.shape) == 2:
            out, inputs = layer.features
            layer.take("ia3_l", *((1, inputs) if on_inputs else (out, 1)))
        else:
            count = layer.shape[1] * layer.groups if on_inputs else layer.shape[0]
            layer.take("ia3_l", 1, count, *[1] * (len(layer.shape) - 2))
        yield _scaled(layer, factors, on_inputs)
        if not on_inputs and layer.module._parameters.get("bias") is not None:
            yield layer.change(lambda bias: bias * factors.flatten().to(bias), leaf="bias")


def _is_feedforward(layer: Layer, factors: Tensor) -> bool:
    """Return True if the factors scale the inputs of a layer.

    The configuration lists such modules, as names or a pattern.
    """
    named = layer.config.get("feedforward_modules")
    if isinstance(named, str):
        return bool(re.fullmatch(named, layer.written))
    if named is not None:
        return any(layer.written.endswith(name) for name in named)
    if len(layer.shape) == 2 and factors.dim() == 2 and factors.shape[0] != factors.shape[1]:
        return factors.shape[0] == 1
    raise layer.error(
        "adapter_config.json does not say whether its inputs or its outputs are scaled "
        "(feedforward_modules): save the adapter again"
    )


def _scaled(layer: Layer, factors: Tensor, on_inputs: bool) -> ParameterChange:
    """Return the change that multiplies the weight by factors of its inputs or outputs."""
    kernel = [1] * (len(layer.shape) - 2)
    groups, transposed = layer.groups, is_conv1d(layer.module)

    def adapted(weight: Tensor) -> Tensor:
        scales = factors.flatten().to(weight)
        if on_inputs == transposed:
            return weight * scales.reshape(-1, 1, *kernel)
        # A group of outputs reads its own inputs.
        by_group = scales.reshape(groups, 1, -1, *kernel)
        rows = weight.reshape(groups, -1, *weight.shape[1:]) * by_group
        return rows.reshape(weight.shape)

    return layer.change(adapted)


class LycorisIa3(Method):
    """LyCORIS's form: ``1 + w`` for each output or input. The bias is not scaled."""

    name = "IA³"
    does = "factors of outputs or inputs"
    in_files = True
    roles = ("on_input", "weight")

    def is_file_layer(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return True if the layer has ``on_input``: ``weight`` alone does not identify the method."""
        return "on_input" in tensors

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        mark = layer.tensors["on_input"]
        if mark.numel() != 1:
            raise layer.error(f"{layer.keys['on_input']} is {list(mark.shape)}, not one number")
        on_inputs = bool(mark.item())
        factors = layer.take("weight")
        count = layer.shape[1] * layer.groups if on_inputs else layer.shape[0]
        if factors.numel() != count:
            raise layer.misfit(
                f"{layer.keys['weight']} is {list(factors.shape)}, and it scales {count} "
                f"{'inputs' if on_inputs else 'outputs'}"
            )
        yield _scaled(layer, 1 + factors.double(), on_inputs)


METHODS = (Ia3(), LycorisIa3())
