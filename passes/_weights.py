"""How the nodes of a graph read a weight: directly, transposed, or some of its rows."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from lora_fx.passes._fx import arguments, target_of
from lora_fx.types import Region

__all__ = ["WeightView", "constant_of", "splits", "weight_of"]

_aten = torch.ops.aten
_CHUNKS: tuple[Any, ...] = (torch.chunk, torch.Tensor.chunk, _aten.chunk.default)
_SPLITS: tuple[Any, ...] = (
    *_CHUNKS,
    torch.split,
    torch.Tensor.split,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
)
_TRANSPOSES: tuple[Any, ...] = (torch.t, torch.ops.aten.t.default)


class WeightView(NamedTuple):
    """How a node reads a parameter.

    Attributes:
        source: The ``get_attr`` node of the parameter.
        transposed: Whether its two dimensions are swapped.
        rows: Which of its rows (start, stop); None for all.
    """

    source: fx.Node
    transposed: bool
    rows: tuple[int, int] | None


def weight_of(node: object, region: Region) -> WeightView | None:
    """The parameter that a node reads directly, through transposes, or in rows; None if none."""
    transposed = False
    while isinstance(node, fx.Node):
        if region.parameter(node) is not None:
            return WeightView(node, transposed, None)
        part = _part(node, region)
        if part is not None:
            return WeightView(part[0], transposed, part[1])
        inner = _untransposed(node)
        if inner is None:
            return None
        node, transposed = inner, not transposed
    return None


def splits(node: fx.Node) -> bool:
    """Whether a node only cuts its operand into parts, for others to take one each."""
    return target_of(node) in _SPLITS


def _part(node: fx.Node, region: Region) -> tuple[fx.Node, tuple[int, int]] | None:
    """The parameter of which a node takes some rows, and which."""
    target, first = target_of(node), node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    rest: tuple[Any, ...] = node.args[1:]
    if target is operator.getitem and splits(first):
        source: Any = first.args[0]
        size, index = arguments(first, "input size dim=0"), rest[0]
        parameter = region.parameter(source)
        plain = isinstance(size["size"], int | list | tuple) and isinstance(index, int)
        if parameter is None or size["dim"] != 0 or not plain:
            return None
        chunks = target_of(first) in _CHUNKS
        cut = torch.chunk if chunks else torch.split
        sizes = [len(part) for part in cut(torch.empty(len(parameter)), size["size"])]
        index %= len(sizes)
        start = sum(sizes[:index])
        return source, (start, start + sizes[index])
    parameter = region.parameter(first)
    if parameter is None:
        return None
    if target is operator.getitem:
        return _rows(first, rest[0], len(parameter))
    if target is torch.ops.aten.slice.Tensor:
        named = arguments(node, "input dim=0 start=None end=None step=1")
        if named["dim"] == 0 and named["step"] == 1:
            return _rows(first, slice(named["start"], named["end"]), len(parameter))
    if target in (torch.narrow, torch.Tensor.narrow) and rest[0] == 0:
        return _rows(first, slice(rest[1], rest[1] + rest[2]), len(parameter))
    return None


def _rows(source: fx.Node, index: Any, size: int) -> tuple[fx.Node, tuple[int, int]] | None:
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    if not isinstance(index, slice) or index.step not in (None, 1):
        return None
    if not all(isinstance(bound, int | None) for bound in (index.start, index.stop)):
        return None
    start, stop, _ = index.indices(size)
    return (source, (start, stop)) if start < stop else None


def constant_of(node: object, region: Region) -> fx.Node | None:
    """A parameter under an expression that reads no input; None if it reads one, or none."""
    found: fx.Node | None = None
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if not isinstance(current, fx.Node) or current in seen:
            continue
        seen.add(current)
        if current.op in ("placeholder", "call_module"):
            return None
        if region.parameter(current) is not None:
            found = current
        pending.extend(current.all_input_nodes)
    return found


def _untransposed(node: fx.Node) -> fx.Node | None:
    """The operand of a node that swaps the two dimensions of a matrix, or None."""
    target = target_of(node)
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if target is getattr and node.args[1] in ("T", "mT"):
        return first
    if target in _TRANSPOSES or target is torch.Tensor.t:
        return first
    if target in (torch.transpose, torch.Tensor.transpose, torch.ops.aten.transpose.int):
        dims = {d % 2 for d in node.args[1:3] if isinstance(d, int)}
        return first if dims == {0, 1} else None
    if target in (torch.permute, torch.Tensor.permute, torch.ops.aten.permute.default):
        order = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        return first if tuple(d % 2 for d in order if isinstance(d, int)) == (1, 0) else None
    return None
