"""What a module with a quantised weight computes, as operations that can be seen.

bitsandbytes has modules of its own, whose forward changes them as they run (they set attributes and repack
their weight): what is here stands for it, over the same weight and kernels. torchao keeps ``nn.Linear`` and
other code as they are, and their products with such a weight are taken out of autograd's sight. Neither
library is imported: a model that has such a layer has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from lora_fx.formats import quantization_of, quantized_linear
from lora_fx.ir import Region
from lora_fx.passes.graph import erase_unread, original_class
from lora_fx.passes.patterns import Product, product_of

__all__ = ["holds_quantised", "make_opaque", "setup_of", "written_out_of_bitsandbytes"]

fx.wrap("quantized_linear")


def written_out_of_bitsandbytes(
    module: nn.Module, cls: type[nn.Module]
) -> Callable[..., Any] | None:
    """What to trace in the place of a quantised layer's ``forward``; None if it is none of bitsandbytes'.

    Args:
        module: The layer.
        cls: Its own class.
    """
    forward = _FORWARDS.get(cls.__qualname__)
    # A subclass may have changed what it computes.
    found = getattr(sys.modules.get("bitsandbytes.nn.modules"), cls.__qualname__, None)
    if forward is None or found is not cls:
        return None
    return None if quantization_of(module._parameters.get("weight")) is None else forward


def holds_quantised(module: nn.Module) -> bool:
    """Whether a module below has a quantised weight: code that reads it past that module would be wrong."""
    below = (p for child in module.children() for p in child.parameters())
    return any(quantization_of(p) is not None for p in below)


def setup_of(module: nn.Module) -> tuple[Any, ...] | None:
    """All that the graph of a quantised layer of bitsandbytes depends on; None for any other module.

    The scales of its weight are attributes of the layer, and differ from one to the next.
    """
    if written_out_of_bitsandbytes(module, original_class(module)) is None:
        return None
    state, bias = getattr(module, "state", None), module._parameters.get("bias")
    compute = getattr(module, "compute_dtype", None)
    weight = quantization_of(module._parameters["weight"])
    return (weight, bias is None, compute, getattr(state, "threshold", None))


def _linear_4bit(self: Any, x: torch.Tensor) -> Any:
    return quantized_linear(x, self.weight, self.bias, self.compute_dtype)


def _linear_8bit(self: Any, x: torch.Tensor) -> Any:
    return quantized_linear(
        x, self.weight, self.bias, None, self.state.threshold, training=self.training
    )


_FORWARDS: Mapping[str, Callable[..., Any]] = {
    "Linear4bit": _linear_4bit,
    "LinearFP4": _linear_4bit,
    "LinearNF4": _linear_4bit,
    "Linear8bitLt": _linear_8bit,
}


def make_opaque(graph: fx.Graph, module: nn.Module) -> fx.Graph:
    """Puts :func:`quantized_linear` in the place of products with a tensor that holds few bits.

    What multiplies such a weight in another way (rows of it, its transpose) stays, and is refused by name.

    Args:
        graph: The module's; it is edited.
        module: The module.
    """
    if not any(quantization_of(p) for p in module.parameters()):
        return graph
    region = Region("", module, graph)
    for node in list(graph.nodes):
        seen = product_of(node, region)
        if not isinstance(seen, Product) or seen.left or seen.layout != "out_in":
            continue
        view = seen.view
        if quantization_of(region.parameter(view.source)) is None or view.rows or view.indexed:
            continue
        bias = region.parameter(seen.bias)
        if (
            (seen.bias is not None and (bias is None or bias.dim() != 1))
            or view.cast
            or view.viewed
        ):
            continue
        with graph.inserting_before(node):
            operands: Any = (seen.x, view.source, seen.bias)
            made = graph.call_function(quantized_linear, operands)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        erase_unread(graph, seen.operand)
    return graph
