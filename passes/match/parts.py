"""Finds fused weights: one product whose output is cut into q, k and v, or into gate and up.

The whole stays one site. Its parts can be named instead (``qkv.q``), each with factors and a rank of its own;
a merge touches their rows only. How an output is divided is read off what is done with it: off the graphs of
the regions, and off what a trace had seen before it gave up on a module.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import fx

from lora_fx.ir import Capture, Matches, Pass, PassResult, Site, join, module_of
from lora_fx.passes.graph import arguments, target_of
from lora_fx.passes.patterns import SPLIT, part_lengths, part_names, splits

__all__ = ["MarkParts"]

_aten = torch.ops.aten
_T = torch.Tensor
_SHAPES = (
    *(_T.view, _T.reshape, torch.reshape, _T.unflatten, torch.unflatten),
    *(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default),
)
_NARROW = (torch.narrow, _T.narrow)
_UNBIND = (torch.unbind, _T.unbind, _aten.unbind.int)
_SELECT = (torch.select, _T.select, _aten.select.int)
_PERMUTE = (torch.permute, _T.permute, _aten.permute.default)
_TRANSPOSE = (torch.transpose, _T.transpose, _aten.transpose.int)
# The features are last. Counted from the front they are for [batch, sequence, features].
_LAST = (-1, 2)

_Rows = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class MarkParts(Pass):
    """The pass: marks the operations whose output is divided."""

    name: ClassVar[str] = "mark-parts"
    needs: ClassVar[str] = "matches"

    def __call__(self, capture: Capture) -> PassResult:
        """Mark them."""
        assert capture.matches is not None
        return PassResult.of(capture, matches=_find_parts(capture, capture.matches))


def _find_parts(capture: Capture, matches: Matches) -> Matches:
    """Marks the sites whose output is divided.

    Args:
        capture: The model.
        matches: Its linear operations.

    Returns:
        The same with ``Site.parts`` set.
    """
    callers = _callers(capture)

    def marked(site: Site) -> Site:
        if not site.divisible:
            return site
        seen = {_division(node, site.out_features) for node in _outputs(capture, site, callers)}
        seen.discard(())
        if len(seen) != 1:
            return site
        (ranges,) = seen
        names = part_names(site.weight, ranges)
        return dataclasses.replace(site, parts=tuple(zip(names, ranges, strict=True)))

    return dataclasses.replace(matches, sites=tuple(marked(site) for site in matches.sites))


def _callers(capture: Capture) -> dict[int, list[fx.Node]]:
    """By module: the nodes that call it, in graphs and in what was begun of one."""
    found: dict[int, list[fx.Node]] = defaultdict(list)
    graphs = {fqn: region.graph for fqn, region in capture.regions.items()}
    modules = dict(capture.model.named_modules(remove_duplicate=False))
    for fqn, graph in {**capture.begun, **graphs}.items():
        for node in graph.nodes:
            if node.op == "call_module":
                module = modules.get(join(module_of(fqn), str(node.target)))
                found[id(module)].append(node)
    return found


def _outputs(capture: Capture, site: Site, callers: dict[int, list[fx.Node]]) -> Iterator[fx.Node]:
    """The nodes whose value is the output of a site."""
    for call in site.calls:
        region = capture.regions[call.region]
        node = next(node for node in region.graph.nodes if node.name == call.output)
        yield node
        # Conv1D of GPT-2 puts another shape on it.
        final = next(iter(node.users), node)
        for last in (node, final):
            if any(user.op == "output" and user.args[0] is last for user in last.users):
                yield from callers.get(id(region.module), ())


def _division(node: fx.Node, size: int) -> tuple[_Rows, ...]:
    """How the last dimension of a value is divided among those that use it; () if it is not."""
    cuts: set[_Rows] = set()
    for user in node.users:
        cuts.update(_cuts(user, size))
    ordered = sorted(cuts)
    edges = [0, *(stop for _, stop in ordered)]
    whole = [start for start, _ in ordered] == edges[:-1] and edges[-1] == size
    return tuple(ordered) if whole and len(ordered) > 1 else ()


def _cuts(user: fx.Node, size: int) -> Iterator[_Rows]:
    target = target_of(user)
    if splits(user):
        if arguments(user, SPLIT)["dim"] in _LAST:
            yield from _between(part_lengths(user, size))
    elif target in _SHAPES:
        yield from _viewed(user, size)
    elif target is operator.getitem:
        index = user.args[1]
        if isinstance(index, tuple) and index[:-1] == (Ellipsis,):
            yield from _sliced(index[-1], size)
    elif target is _aten.slice.Tensor:
        named = arguments(user, "input|self dim=0 start=None end=None step=1")
        if named["dim"] in _LAST:
            yield from _sliced(slice(named["start"], named["end"], named["step"]), size)
    elif target in _NARROW:
        named = arguments(user, "input|self dim start length")
        start, length = named["start"], named["length"]
        if named["dim"] in _LAST and isinstance(start, int) and isinstance(length, int):
            yield start, start + length


def _between(lengths: Iterable[int]) -> Iterator[_Rows]:
    edges = [0, *itertools.accumulate(lengths)]
    return itertools.pairwise(edges)


def _sliced(index: Any, size: int) -> Iterator[_Rows]:
    if not isinstance(index, slice) or index.step not in (None, 1):
        return
    if not all(isinstance(bound, int | None) for bound in (index.start, index.stop)):
        return
    start, stop, _ = index.indices(size)
    if (start, stop) != (0, size):
        yield start, stop


def _viewed(user: fx.Node, size: int) -> Iterator[_Rows]:
    """``reshape(batch, length, 3, heads, -1)``, taken apart along the three: parts side by side.

    Heads before the three are another matter: then no part is a range of rows.
    """
    rest: tuple[Any, ...] = user.args[1:]
    before = 0
    if target_of(user) in (_T.unflatten, torch.unflatten):
        rest, before = (rest[1:], 2) if rest[0] in _LAST else ((), 0)
    sizes = list(rest[0]) if rest and isinstance(rest[0], list | tuple) else list(rest)
    for first, count in enumerate(sizes):
        if not isinstance(count, int) or count < 1:
            continue
        known = [s for s in sizes[first:] if isinstance(s, int) and s > 0]
        open_ones = len(sizes) - first - len(known)
        product = math.prod(known)
        if (product == size and not open_ones) or (size % product == 0 and open_ones == 1):
            if count > 1 and _taken_apart(user, before + first, before + len(sizes)):
                yield from _between([size // count] * count)
            return


def _taken_apart(node: fx.Node, axis: int, dims: int) -> bool:
    """Whether a value is indexed or unbound along an axis, perhaps after dimensions were permuted."""
    for user in node.users:
        target = target_of(user)
        rest: tuple[Any, ...] = user.args[1:]
        if target in _UNBIND or splits(user):
            names = "input dim=0" if target in _UNBIND else SPLIT
            if arguments(user, names)["dim"] in (axis, axis - dims):
                return True
        elif target is operator.getitem:
            index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
            if Ellipsis not in index and len(index) > axis and isinstance(index[axis], int):
                return True
        elif target in _SELECT:
            if rest[0] in (axis, axis - dims):
                return True
        elif target in _PERMUTE:
            order = rest[0] if isinstance(rest[0], list | tuple) else rest
            wanted = [d % dims for d in order if isinstance(d, int)]
            if axis in wanted and _taken_apart(user, wanted.index(axis), dims):
                return True
        elif target in _TRANSPOSE and all(isinstance(d, int) for d in rest):
            one, other = (d % dims for d in rest)
            moved = {one: other, other: one}.get(axis, axis)
            if _taken_apart(user, moved, dims):
                return True
    return False
