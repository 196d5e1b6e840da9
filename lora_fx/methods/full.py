"""Differences of whole parameters, in files of LyCORIS and ComfyUI: weights, biases and norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from lora_fx.ir import join
from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "Full", "Norm"]


class Full(Method):
    """Differences of a weight or a bias, ``diff`` and ``diff_b``, or a whole weight, ``set_weight``."""

    name = "full differences"
    does = "differences of whole weights"
    in_files = True
    roles = ("diff", "diff_b", "set_weight")

    def whole(self, layer: Layer) -> Mapping[str, Tensor]:
        """Return the weight of the file with which ComfyUI replaces the model's weight."""
        if "set_weight" not in layer.tensors:
            return {}
        if "diff" in layer.tensors:
            raise layer.error("the file has a weight for it and a difference of its weight")
        return {join(layer.name, "weight"): layer.take("set_weight", *layer.shape)}

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the changes of the parameters."""
        yield from _additions(layer, self.roles[:2])


def _additions(layer: Layer, roles: tuple[str, ...]) -> Iterator[ParameterChange]:
    """Yield the changes of a weight and a bias that have these roles."""
    for role, leaf in zip(roles, ("weight", "bias"), strict=True):
        if role in layer.tensors:
            yield _addition(layer, role, leaf)


def _addition(layer: Layer, role: str, leaf: str) -> ParameterChange:
    """Return the change that adds a tensor to a parameter of its shape."""
    change = layer.change(lambda value: value + layer.tensors[role].to(value), leaf=leaf)
    layer.take(role, *layer.module.get_parameter(leaf).shape)
    return change


class Norm(Method):
    """Differences of the weight and the bias of a norm: ``w_norm`` and ``b_norm``."""

    name = "trained norms"
    does = "trained norms (LyCORIS)"
    in_files = True
    roles = ("w_norm", "b_norm")

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the changes of the parameters."""
        yield from _additions(layer, self.roles)


METHODS = (Full(), Norm())
