"""Whether a model writes into what its layers give."""

from __future__ import annotations

import operator

from torch import fx

from lora_fx.types import Capture

__all__ = ["writes_in_place"]

_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


def writes_in_place(capture: Capture) -> bool:
    """Whether something may write into the output of a layer, as ``nn.ReLU(inplace=True)`` does.

    Code that was not traced is seen by the attribute ``inplace`` of its modules alone.

    Args:
        capture: The model.
    """
    modules = capture.model.modules()
    if any(getattr(module, "inplace", False) is True for module in modules):
        return True
    graphs = (region.graph for region in capture.regions.values())
    return any(_writes(node) for graph in graphs for node in graph.nodes)


def _writes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if node.kwargs.get("inplace") is True:
        return True
    if node.target in _OPERATORS:
        return True
    name = getattr(node.target, "__name__", "")  # relu_; relu_.default of ATen
    return bool(name.split(".")[0].endswith("_") and not name.startswith("_"))
