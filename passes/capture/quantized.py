"""What a module with a quantized weight computes, as operations that can be seen.

A library may have modules of its own, whose forward changes them as they run: what its format writes out
stands for it, over the same weight and kernels. ``nn.Linear`` and other code stay as they are, and their
products with such a weight are taken out of autograd's sight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from lora_fx.formats import format_of, formats, quantization_of, quantized_linear
from lora_fx.ir import Region
from lora_fx.passes.graph import erase_unread, original_class
from lora_fx.passes.patterns import Product, product_of

__all__ = ["holds_quantized", "make_opaque", "setup_of", "written_out_layer"]


def written_out_layer(module: nn.Module, cls: type[nn.Module]) -> Callable[..., Any] | None:
    """What to trace in the place of a quantized layer's ``forward``; None if it is no library's own.

    Args:
        module: The layer.
        cls: Its own class.
    """
    for known in formats():
        forward = known.layers.forward(cls)
        if forward is not None:
            return None if quantization_of(module._parameters.get("weight")) is None else forward
    return None


def holds_quantized(module: nn.Module) -> bool:
    """Whether a module below has a quantized weight: code that reads it past that module would be wrong."""
    below = (p for child in module.children() for p in child.parameters())
    return any(quantization_of(p) is not None for p in below)


def setup_of(module: nn.Module) -> tuple[Any, ...] | None:
    """All that the graph of a quantized layer of a library depends on; None for any other module."""
    if written_out_layer(module, original_class(module)) is None:
        return None
    known = format_of(module._parameters["weight"])
    return None if known is None else known.layers.setup(module)


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
