"""Converts an attention mask once for all layers that read it.

``scaled_dot_product_attention`` turns a boolean mask into numbers, in each call anew, and each call keeps its
own for the backward pass: as many tensors of tokens × tokens as there are layers. transformers leaves a mask
out where it is plainly causal, but not while it is exported. Numbers are taken as they are, and kept once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

__all__ = ["convert_masks"]

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def convert_masks(graph: fx.Graph) -> None:
    """Puts what attention would make of a boolean mask into the graph, where several calls share the mask.

    Args:
        graph: Of ``torch.export``, with the values in its metadata: a mask has the dtype of the queries.
    """
    calls: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        mask, dtype = _mask(node), _dtype(node.args[0])
        if isinstance(mask, fx.Node) and _dtype(mask) is torch.bool and dtype is not None:
            calls.setdefault((mask, dtype), []).append(node)
    for (mask, dtype), nodes in calls.items():
        if len(nodes) < 2:
            continue
        aten = torch.ops.aten
        with graph.inserting_after(mask):
            zeros = graph.call_function(aten.zeros_like.default, (mask,), {"dtype": dtype})
        with graph.inserting_after(zeros):
            hidden = graph.call_function(aten.logical_not.default, (mask,))
        with graph.inserting_after(hidden):
            numbers = graph.call_function(aten.masked_fill.Scalar, (zeros, hidden, -math.inf))
        for node in nodes:
            if "attn_mask" in node.kwargs:
                node.update_kwarg("attn_mask", numbers)
            else:
                node.update_arg(3, numbers)


def _mask(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def _dtype(value: Any) -> torch.dtype | None:
    """The dtype that a value had when it was exported."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found.dtype if isinstance(found, torch.Tensor) else None
