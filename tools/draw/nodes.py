"""What there is to say of nodes, weights and modules: names, kinds, ranks, hashes of what looks the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lora_fx.formats import quantization_of
from lora_fx.ir import META_KEY, Region, Role, Tag
from lora_fx.passes.graph import elements, original_class
from lora_fx.runtime import AdapterModule
from lora_fx.tools.draw.picture import Kind, elide, times

__all__ = [
    "Digests",
    "adapters_of",
    "children_of",
    "drawn_children",
    "dtype_name",
    "is_item",
    "measured",
    "node_caption",
    "node_facts",
    "node_kind",
    "node_name",
    "parameter_counts",
    "size_name",
    "source_of",
    "tag_of",
    "target_name",
]


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def target_name(target: Any) -> str:
    """A readable name for what a node calls, the same in every process."""
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None)
    if module.startswith("torch._ops") or name is None:
        return _ADDRESS.sub("", str(target))
    module = "torch.nn.functional" if module == "torch._C._nn" else module.strip("_")
    return f"{module}.{name}" if module else name


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Child modules by name, a module that stands under two names twice."""
    return ((name, child) for name, child in module._modules.items() if child is not None)


def drawn_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those child modules that are not there for an adapter's parameters."""
    return (pair for pair in children_of(module) if not isinstance(pair[1], AdapterModule))


class Digests:
    """Hashes that are equal where two modules look the same in a picture.

    A hash covers the class, ``extra_repr``, the shapes of the module's own tensors, the graph with
    its tags, and the same of all children. Ranks count (they are shapes) and so do scales and
    probabilities of dropout (constants of the graph and of modules); values of weights do not.

    Args:
        graphs: The graphs of the regions, by ``id`` of the module.
    """

    def __init__(self, graphs: Mapping[int, fx.Graph]) -> None:
        self._graphs = graphs
        self._known: dict[int, str] = {}

    def __call__(self, module: nn.Module) -> str:
        """The hash of ``module``."""
        known = self._known.get(id(module))
        if known is None:
            text = "\n".join(self._lines(module))
            known = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
            self._known[id(module)] = known
        return known

    def _lines(self, module: nn.Module) -> Iterator[str]:
        cls = original_class(module)
        yield f"{cls.__module__}.{cls.__qualname__}({_ADDRESS.sub('', module.extra_repr())})"
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{name!r} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"
        graph = self._graphs.get(id(module))
        for node in graph.nodes if graph is not None else ():
            call = f"{node.op} {node.name} {target_name(node.target)} {node.args} {node.kwargs}"
            yield f"{_ADDRESS.sub('', call)} {node.meta.get(META_KEY)}"
        for name, child in children_of(module):
            yield f"{name!r} {self(child)}"


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
    factors: dict[str, torch.Tensor] = {}
    scale: float | None = None
    for node in region.graph.nodes:
        tag = tag_of(node)
        if tag is None or (tag.weight, tag.adapter) != (weight, adapter):
            continue
        tensor = region.tensor(node) if tag.role is Role.FACTOR else None
        if tensor is not None:
            factors.setdefault(str(node.target), tensor)
        if scale is None and tag.role in (Role.SCALE, Role.FUSED):
            scale = _scale_in(node)
    return _common_rank([*factors.values()]), scale


def _common_rank(factors: Sequence[torch.Tensor]) -> int | None:
    """The size that A, ``[r, ...]``, and B, ``[out, r, ...]``, share; both have experts first, or neither."""
    if len(factors) < 2 or any(factor.dim() < 2 for factor in factors[:2]):
        return None
    a, b = factors[:2]
    stacked = a.dim() == 3 and b.dim() == 3 and a.shape[0] == b.shape[0] and b.shape[2] != 1
    return int(a.shape[1 if stacked else 0])


def _scale_in(node: fx.Node) -> float | None:
    """The number that scales a branch; of a product of several operations, a node takes its own."""
    if is_item(node):
        product, index = node.args
        scales = next((a for a in _arguments(product) if _are_numbers(a)), ())
        return float(scales[index]) if isinstance(index, int) and index < len(scales) else None
    several = next((a for a in node.args if _are_numbers(a)), None)
    if isinstance(several, list | tuple):
        return float(several[0])
    return next((float(a) for a in node.args if isinstance(a, int | float)), None)


def _arguments(node: Any) -> tuple[Any, ...]:
    return node.args if isinstance(node, fx.Node) else ()


def _are_numbers(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and bool(value)
    return is_list and all(isinstance(one, int | float) for one in value)


def is_item(node: fx.Node) -> bool:
    """Whether a node takes one of the outputs of a product of several operations."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def dtype_name(tensor: torch.Tensor) -> str:
    """``float32``, or the format of a quantized weight: ``nf4``."""
    stored = quantization_of(tensor)
    return str(tensor.dtype).removeprefix("torch.") if stored is None else stored.scheme


def size_name(tensor: torch.Tensor) -> str:
    """``128×64``: of the values, for a quantized weight."""
    stored = quantization_of(tensor)
    return times(tuple(tensor.shape) if stored is None else stored.shape)


def node_kind(node: fx.Node) -> Kind:
    """What the node is drawn as."""
    tag = tag_of(node)
    if tag is not None:
        # Roles that are drawn in a way of their own have the names of kinds.
        return next((kind for kind in Kind if kind.value == tag.role.value), Kind.ADAPTER)
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


def node_caption(node: fx.Node, tensors: Mapping[str, torch.Tensor], p: float | None = None) -> str:
    """The second line: the weight and its shape, or the number that matters.

    Args:
        node: The node.
        tensors: What it reads, by name.
        p: The probability of the dropout that it computes, as it is now; None for none.
    """
    tag = tag_of(node)
    caption = ""
    if tag is not None and tag.role in (Role.SCALE, Role.FUSED):
        scale = _scale_in(node)
        caption = "" if scale is None else f"× {scale:g}"
        if p is not None:
            caption += f" · p {p:g}"
    elif tag is not None and tag.role is Role.DROPOUT:
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
        yield "gives", f"{times(tuple(value.shape))} {dtype_name(value)}"
    trace = node.meta.get("stack_trace")
    if isinstance(trace, str) and (found := _LINE.findall(trace)):
        yield "source", f"{short_path(found[-1][0])}:{found[-1][1]}"


_LINE = re.compile(r'File "([^"]+)", line (\d+)')


def short_path(path: str) -> str:
    """A path below the folder of packages, or the name of any other file: the same on every machine."""
    path = path.replace("\\", "/")
    for folder in ("site-packages/", "dist-packages/"):
        if folder in path:
            return path.rpartition(folder)[2]
    return path.rpartition("/")[2]


def source_of(cls: type[nn.Module]) -> str:
    """File and line of a class's forward; empty where there is no Python code."""
    code = getattr(getattr(cls, "forward", None), "__code__", None)
    return "" if code is None else f"{short_path(code.co_filename)}:{code.co_firstlineno}"


def parameter_counts(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Trainable and frozen elements, those of a parameter that is met twice counted once."""
    unique = {id(p): p for p in parameters}.values()
    trainable = sum(elements(p) for p in unique if p.requires_grad)
    return trainable, sum(elements(p) for p in unique) - trainable
