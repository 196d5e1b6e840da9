"""Turns what ``torch.export`` bakes into a graph back into what the model does.

Export runs the model once: its mode, its device and its asserts are literals of the graph. Dropout
and batch norm become operations that read ``training`` of the module that they came from, device
literals read the device of a parameter, and metadata asserts go.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.errors import CaptureError
from lora_fx.passes.graph import arguments
from lora_fx.runtime import ops

__all__ = ["convert_masks", "unbake_devices", "unbake_modes"]


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


def _call_owner(node: fx.Node, model: nn.Module, name: Callable[[fx.Node], str]) -> bool:
    """Puts a call of a module into the place of its operations. Edits the graph.

    Args:
        node: One of the operations, from ``torch.export``, with ``val``.
        model: The model that the module is in.
        name: Tells the module in whose forward a node was recorded.

    Returns:
        Whether that could be done: False leaves the graph as it was.
    """
    owner = name(node)
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return False
    if not owner or any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return False
    required = [
        p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty
    ]
    inside = _call_of(node, lambda one: f"{name(one)}.".startswith(f"{owner}."))
    given = {i for n in inside for i in n.all_input_nodes if i not in inside and _tensor(i)}
    results = [n for n in inside if any(user not in inside for user in n.users)]
    if len(required) != 1 or len(given) != 1 or len(results) != 1:
        return False
    (x,), (result,) = given, results
    if _shape(x) != _shape(result):
        return False
    with node.graph.inserting_before(result):
        call = node.graph.call_module(owner, (x,))
    call.meta.update(result.meta)
    result.replace_all_uses_with(call)
    for one in reversed([n for n in node.graph.nodes if n in inside]):
        node.graph.erase_node(one)
    return True


def _call_of(node: fx.Node, owned: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The tensors that hang together with one: a module that is called twice has two such groups."""
    found, pending = {node}, [node]
    while pending:
        one = pending.pop()
        near = {n for n in (*one.all_input_nodes, *one.users) if n not in found}
        fresh = {n for n in near if n.op == "call_function" and owned(n) and _tensor(n)}
        found |= fresh
        pending.extend(fresh)
    return found


def _tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _shape(node: fx.Node) -> list[Any]:
    sizes = node.meta["val"].shape
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]


_aten = torch.ops.aten
_DROPOUTS: dict[Any, Callable[..., torch.Tensor]] = {
    _aten.dropout.default: F.dropout,
    _aten.dropout_.default: F.dropout,
    _aten.feature_dropout.default: torch.feature_dropout,
    _aten.alpha_dropout.default: F.alpha_dropout,
    _aten.feature_alpha_dropout.default: F.feature_alpha_dropout,
}
_BATCH_NORM = "input weight bias running_mean running_var training momentum eps"
_INSTANCE_NORM = "input weight bias running_mean running_var use_input_stats momentum eps"


def unbake_modes(graph: fx.Graph, model: nn.Module) -> None:
    """Makes ``train()`` and ``eval()`` mean what they always mean. Edits the graph.

    Args:
        graph: From ``torch.export`` of the model in training mode, with ``nn_module_stack``.
        model: The model; names in the graph are its own.

    Raises:
        CaptureError: If an operation draws random numbers in a way that cannot be tied to a mode.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        if node.target in _DROPOUTS:
            named = arguments(node, "input p train")
            if named["train"]:
                p = _setting(graph, node, model, "p", named["p"])
                args = (named["input"], p, _mode(graph, node, model))
                _replace(graph, node, _DROPOUTS[node.target], args)
        elif node.target is _aten.batch_norm.default:
            named = arguments(node, _BATCH_NORM)
            if named["training"] and named["running_mean"] is not None:
                _replace(graph, node, F.batch_norm, _norm(graph, node, model, named))
        elif node.target is _aten.instance_norm.default:
            named = arguments(node, _INSTANCE_NORM)
            if named["use_input_stats"] and named["running_mean"] is not None:
                _replace(graph, node, F.instance_norm, _norm(graph, node, model, named))
        elif node.target is _aten.scaled_dot_product_attention.default:
            _follow_attention_dropout(graph, node, model)
        elif _counts_batches(node):
            _replace(graph, node, ops.count_batch, (node.args[0], _mode(graph, node, model)))
        elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            _follow_draw(node, model)


def unbake_devices(graph: fx.Graph, reference: fx.Node, device: torch.device) -> None:
    """Makes literals of the model's device follow ``.to(device)``. Edits the graph.

    Args:
        graph: From ``torch.export``.
        reference: A ``get_attr`` node of one of the model's tensors, before every use.
        device: The device on which the model was captured.
    """
    follows: fx.Node | None = None
    for node in list(graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            continue
        literals = [
            a
            for a in (*node.args, *node.kwargs.values())
            if isinstance(a, torch.device) and a == device
        ]
        if not literals:
            continue
        if follows is None:
            with graph.inserting_after(reference):
                follows = graph.call_function(getattr, (reference, "device"))

        def swap(value: Any, new: fx.Node = follows) -> Any:
            return new if isinstance(value, torch.device) and value == device else value

        node.args = tuple(swap(a) for a in node.args)
        node.kwargs = {key: swap(a) for key, a in node.kwargs.items()}


def _norm(
    graph: fx.Graph, node: fx.Node, model: nn.Module, named: dict[str, Any]
) -> tuple[Any, ...]:
    return (
        named["input"],
        named["running_mean"],
        named["running_var"],
        named["weight"],
        named["bias"],
        _mode(graph, node, model),
        _setting(graph, node, model, "momentum", named["momentum"]),
        _setting(graph, node, model, "eps", named["eps"]),
    )


def _follow_attention_dropout(graph: fx.Graph, node: fx.Node, model: nn.Module) -> None:
    named = arguments(node, "query key value attn_mask dropout_p=0.0")
    if not named["dropout_p"]:
        return
    mode = _mode(graph, node, model)
    with graph.inserting_before(node):
        probability = graph.call_function(operator.mul, (mode, named["dropout_p"]))
    args = [named[name] for name in ("query", "key", "value", "attn_mask")]
    node.args = (*args, probability, *node.args[5:])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in named}


def _follow_draw(node: fx.Node, model: nn.Module) -> None:
    if not _call_owner(node, model, _owner):
        raise CaptureError(
            f"{_owner(node) or 'the model'} draws random numbers ({node.target}) and torch.export does "
            "not tell whether it does so in training only"
        )


def _counts_batches(node: fx.Node) -> bool:
    first = node.args[0] if node.args else None
    return (
        node.target is _aten.add_.Tensor
        and isinstance(first, fx.Node)
        and first.op == "get_attr"
        and str(first.target).endswith("num_batches_tracked")
    )


def _owner(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _mode(graph: fx.Graph, node: fx.Node, model: nn.Module) -> fx.Node:
    """A node that reads ``training`` of the module in whose forward ``node`` was recorded."""
    owner = _owner(node)
    try:
        model.get_submodule(owner)
    except AttributeError:
        owner = ""
    with graph.inserting_before(node):
        return graph.create_node("get_attr", f"{owner}.training" if owner else "training")


def _setting(graph: fx.Graph, node: fx.Node, model: nn.Module, name: str, value: Any) -> Any:
    """A number of the layer, read where the layer has it, so that setting it later counts."""
    owner = _owner(node)
    try:
        found = getattr(model.get_submodule(owner), name, None)
    except AttributeError:
        return value
    if not owner or type(found) is not type(value) or found != value:
        return value
    with graph.inserting_before(node):
        return graph.create_node("get_attr", f"{owner}.{name}")


def _replace(
    graph: fx.Graph, node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
