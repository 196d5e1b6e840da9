"""What is written on one node of a graph, and what hovering over it shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from lora_fx.formats.weights import quantization_of
from lora_fx.ir.values import META_KEY, Region, Role, Tag
from lora_fx.passes.graph.lazy import elements
from lora_fx.tools.draw.picture import Kind, elide, times
from lora_fx.tools.draw.structure import target_name

__all__ = [
    "adapters_of",
    "dtype_name",
    "measured",
    "node_caption",
    "node_facts",
    "node_kind",
    "node_name",
    "size_name",
    "tag_of",
]

_KINDS = {
    Role.BASE: Kind.BASE,
    Role.DROPOUT: Kind.DROPOUT,
    Role.DOWN: Kind.DOWN,
    Role.UP: Kind.UP,
    Role.SCALE: Kind.SCALE,
    Role.ADD: Kind.ADD,
}
_OPS = {
    "placeholder": Kind.INPUT,
    "output": Kind.OUTPUT,
    "get_attr": Kind.WEIGHT,
    "call_module": Kind.LEAF,
}


def tag_of(node: fx.Node) -> Tag | None:
    """The node's tag, if it has one."""
    tag = node.meta.get(META_KEY)
    return tag if isinstance(tag, Tag) else None


def adapters_of(graph: fx.Graph) -> list[tuple[str, str]]:
    """The adapters of a graph as pairs of weight and adapter name, each once."""
    tags = (tag_of(node) for node in graph.nodes)
    return list(dict.fromkeys((t.weight, t.adapter) for t in tags if t is not None and t.adapter))


def measured(region: Region, weight: str, adapter: str) -> tuple[int | None, float | None]:
    """Rank and scale of an adapter as the graph has them."""
    rank: int | None = None
    scale: float | None = None
    for node in region.graph.nodes:
        tag = tag_of(node)
        if tag is None or (tag.weight, tag.adapter) != (weight, adapter):
            continue
        if rank is None and tag.role in (Role.FACTOR, Role.DOWN):
            rank = _first_size(region, (node, *node.all_input_nodes))
        if scale is None and tag.role in (Role.SCALE, Role.FUSED):
            scale = next((a for a in node.args if isinstance(a, int | float)), None)
    return rank, scale


def dtype_name(tensor: torch.Tensor) -> str:
    """``float32``, or the format of a quantised weight: ``nf4``."""
    stored = quantization_of(tensor)
    return str(tensor.dtype).removeprefix("torch.") if stored is None else stored.scheme


def size_name(tensor: torch.Tensor) -> str:
    """``128×64``: of the values, for a quantised weight."""
    stored = quantization_of(tensor)
    return times(tuple(tensor.shape) if stored is None else stored.shape)


def node_kind(node: fx.Node) -> Kind:
    """What the node is drawn as."""
    tag = tag_of(node)
    if tag is not None:
        return _KINDS.get(tag.role, Kind.ADAPTER)
    return _OPS.get(node.op, Kind.OP)


def node_name(node: fx.Node) -> str:
    """The first line: what it does, in a word or two."""
    if node.op in ("placeholder", "output"):
        return str(node.target)
    name = target_name(node.target)
    if node.op == "get_attr":
        return name
    # aten.linear.default, but linear and not torch.nn.functional.linear
    atoms = name.split(".")
    return ".".join(atoms[:2]) if isinstance(node.target, torch._ops.OpOverload) else atoms[-1]


def node_caption(node: fx.Node, tensors: Mapping[str, torch.Tensor]) -> str:
    """The second line: the weight and its shape, or the constant that matters."""
    tag = tag_of(node)
    caption = ""
    if tag is not None and tag.role in (Role.SCALE, Role.FUSED):
        caption = next((f"× {a:g}" for a in node.args if isinstance(a, int | float)), "")
        if dropout := node.kwargs.get("dropout"):
            caption += f" · p {dropout:g}"
    elif tag is not None and tag.role is Role.DROPOUT:
        constants = (*node.args[1:], *node.kwargs.values())
        p = next((a for a in constants if isinstance(a, float)), None)
        caption = "" if p is None else f"p {p:g}"
    elif tensors:
        name, tensor = next(iter(tensors.items()))
        short = "" if tag is not None else f"{elide(name, 18)} "
        caption = short + size_name(tensor)
    if tag is not None and tag.adapter not in ("", "default"):
        caption = f"{caption} · {tag.adapter}" if caption else tag.adapter
    return caption


def node_facts(node: fx.Node, tensors: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, str]]:
    """The node's part of what hovering shows: the call and the weights that it reads."""
    yield "op", node.op
    if node.op not in ("placeholder", "output"):
        yield "target", target_name(node.target)
    if node.op in ("call_function", "call_method"):
        constants = [f"{key}={value}" for key, value in node.kwargs.items()]
        arguments = ", ".join([*map(str, node.args), *constants])
        yield "call", elide(f"{node_name(node)}({arguments})", 160)
    for name, tensor in tensors.items():
        trains = "trainable" if tensor.requires_grad else "frozen"
        size = f"{size_name(tensor)} {dtype_name(tensor)}"
        yield name, f"{size}, {elements(tensor):,} {trains}"
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        yield "gives", times(tuple(value.shape))


def _first_size(region: Region, nodes: Iterable[fx.Node]) -> int | None:
    tensors = (region.tensor(node) for node in nodes)
    return next((int(t.shape[0]) for t in tensors if t is not None and t.dim() > 0), None)
