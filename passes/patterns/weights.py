"""How the nodes of a graph read a weight: as it is, or through operations that only look at it otherwise.

What is passed over: casts and copies, transposes, views as another shape, rows that are cut out, and one
expert, or one for each token, of a weight that holds a matrix for each expert.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lora_fx import torch_private
from lora_fx.ir import Region
from lora_fx.passes.graph import arguments, known_arguments, may_write, target_of

__all__ = [
    "SPLIT",
    "WeightView",
    "constant_of",
    "part_lengths",
    "path_to_weight",
    "splits",
    "weight_of",
]

_aten = torch.ops.aten
# What cuts a tensor into a number of parts; the other splits say how long each is.
_CHUNKS: tuple[Any, ...] = (torch.chunk, torch.Tensor.chunk, _aten.chunk.default)

SPLIT = "input|self|tensor size|split_size_or_sections|split_size|split_sizes|chunks dim=0"
"""The arguments of all of these, as :func:`lora_fx.passes.graph.nodes.arguments` takes them."""

_SPLITS: tuple[Any, ...] = (
    *_CHUNKS,
    torch.split,
    torch.Tensor.split,
    _aten.split.Tensor,
    _aten.split.sizes,
    _aten.split_with_sizes.default,
)


@dataclasses.dataclass(frozen=True)
class WeightView:
    """How a node reads a parameter.

    Attributes:
        source: The ``get_attr`` node of the parameter.
        shape: As which shape it is read, before rows are cut and matrices transposed.
        viewed: Whether that is another shape than the parameter's own.
        order: How its dimensions are permuted before it is read so; None for not at all.
        transposed: Whether the last two dimensions are swapped.
        rows: Which of its rows (start, stop); None for all.
        indexed: Whether ``index`` says which of the matrices along the first of three dimensions.
        index: A number, or the node of a tensor of numbers.
        cast: Whether it is read in another dtype.
    """

    source: fx.Node
    shape: tuple[int, ...]
    viewed: bool = False
    order: tuple[int, ...] | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None
    indexed: bool = False
    index: Any = None
    cast: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is the parameter itself, apart from a cast."""
        return dataclasses.replace(self, cast=False) == WeightView(self.source, self.shape)

    @property
    def dim(self) -> int | None:
        """The number of dimensions; None where the number of indices decides it."""
        if not self.indexed:
            return len(self.shape)
        return len(self.shape) - 1 if isinstance(self.index, int) else None


def weight_of(node: object, region: Region) -> WeightView | None:
    """The parameter that a node reads, and how; None if it computes with it, or there is none."""
    if not isinstance(node, fx.Node):
        return None
    parameter = region.parameter(node)
    if parameter is not None:
        return WeightView(node, tuple(parameter.shape))
    target = target_of(node)
    if target is None:
        return None
    first = arguments(node, "input|self")["input"]
    if target is operator.getitem and isinstance(first, fx.Node) and splits(first):
        return _split(first, node.args[1], region)
    step = _STEPS.get(target)
    if step is None:
        return None
    inner = weight_of(first, region)
    if inner is None or (step in (_same, _cast) and _is_written(node)):
        return None
    return step(node, inner)


def _is_written(copy: fx.Node) -> bool:
    """Return True if code may write into a copy of a weight, which is another weight then."""
    return any(
        _is_written(user) if target_of(user) in _STEPS or splits(user) else may_write(user)
        for user in copy.users
        if user.all_input_nodes and user.all_input_nodes[0] is copy
    )


def path_to_weight(value: fx.Node, region: Region) -> tuple[fx.Node, ...]:
    """Return the nodes from a view of a weight to the one that reads it; none for any other value."""
    view = weight_of(value, region)
    if view is None:
        return ()
    path = [value]
    while path[-1] is not view.source:
        below = arguments(path[-1], "input|self")["input"]
        assert isinstance(below, fx.Node)
        path.append(below)
    return tuple(path)


def splits(node: fx.Node) -> bool:
    """Whether a node only cuts its operand into parts, for others to take one each."""
    return target_of(node) in _SPLITS


def part_lengths(node: fx.Node, size: int) -> list[int]:
    """How long the parts are into which a split divides so many elements; none if that is not known."""
    how = arguments(node, SPLIT)["size"]
    if not all(isinstance(one, int) for one in (how if isinstance(how, list | tuple) else (how,))):
        return []
    function = torch.chunk if target_of(node) in _CHUNKS else torch.split
    try:
        return [len(part) for part in function(torch.empty(size, device="meta"), how)]
    except RuntimeError:
        return []


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


# --- one step each: what a node makes of the view that it is given, or None -----------------------------


def _cast(node: fx.Node, inner: WeightView) -> WeightView | None:
    given = (*node.args[1:], *node.kwargs.values())
    dtypes = [one for one in given if isinstance(one, torch.dtype)]
    # `type` may also be told the name or the class of a tensor.
    unsaid = target_of(node) is _T.type and not dtypes
    if unsaid or not all(dtype.is_floating_point for dtype in dtypes):
        return None
    return dataclasses.replace(inner, cast=True)


def _same(node: fx.Node, inner: WeightView) -> WeightView:
    return inner


def _getattr(node: fx.Node, inner: WeightView) -> WeightView | None:
    square = node.args[1] in ("T", "H") and inner.dim == 2
    return _permuted(node, inner) if square or node.args[1] in ("mT", "mH") else None


def _permuted(node: fx.Node, inner: WeightView) -> WeightView | None:
    """The last two dimensions swapped, or nothing: PyTorch itself says which goes where."""
    # With a tensor of indices the number of dimensions is not known: what holds for all of these does.
    several = (2, 3, 4) if inner.dim is None else (inner.dim,)
    orders = [(_order(node, dims), tuple(range(dims))) for dims in several]
    if all(order == before for order, before in orders):
        return inner
    swaps = all(order == (*before[:-2], *before[:-3:-1]) for order, before in orders)
    return _swapped(inner) if swaps else None


def _order(node: fx.Node, dims: int) -> tuple[int, ...] | None:
    """Where the dimensions of its result come from; None if an operation does more than permute."""
    shape = _shaped(node, tuple(range(dims)))
    return shape if shape is not None and sorted(shape) == list(range(dims)) else None


def _shaped(node: fx.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that an operation makes of another; None if PyTorch refuses, or it makes none."""
    if len(node.all_input_nodes) != 1:
        return None
    tensor = torch.empty(shape, device="meta")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: tensor)
    try:
        found = target_of(node)(*args, **kwargs)
    except (IndexError, RuntimeError, TypeError):
        return None
    same = isinstance(found, torch.Tensor) and found.dtype == tensor.dtype
    return tuple(found.shape) if same else None


def _swapped(inner: WeightView) -> WeightView | None:
    if inner.dim is not None and inner.dim < 2:
        return None
    return dataclasses.replace(inner, transposed=not inner.transposed)


def _reshape(node: fx.Node, inner: WeightView) -> WeightView | None:
    """The shape that a view of the parameter has."""
    whole = dataclasses.replace(inner, cast=False, viewed=False)
    if whole != WeightView(inner.source, inner.shape):
        return None
    shape = _shaped(node, inner.shape)
    if shape is None or len(shape) < 2:
        return None
    return dataclasses.replace(inner, shape=shape, viewed=inner.viewed or shape != inner.shape)


def _getitem(node: fx.Node, inner: WeightView) -> WeightView | None:
    index = node.args[1]
    if isinstance(index, tuple):
        # What comes after the first takes everything in `w[1, :, :]`.
        rest = index[1:]
        if not index or any(one is not Ellipsis and one != slice(None) for one in rest):
            return None
        index = index[0]
    if isinstance(index, slice):
        if index.step not in (None, 1):
            return None
        return _rows(inner, index.start, index.stop)
    return _indexed(inner, index)


def _slice(node: fx.Node, inner: WeightView) -> WeightView | None:
    named = known_arguments(node, "input|self dim=0 start=None end=None step=1")
    if named is None or not _is_first(named["dim"], inner) or named["step"] != 1:
        return None
    return _rows(inner, named["start"], named["end"])


def _narrow(node: fx.Node, inner: WeightView) -> WeightView | None:
    named = known_arguments(node, "input|self dim start length")
    if named is None or not _is_first(named["dim"], inner):
        return None
    start, length = named["start"], named["length"]
    if not (isinstance(start, int) and isinstance(length, int)):
        return None
    start += inner.shape[0] if start < 0 else 0
    return _rows(inner, start, start + length)


def _select(node: fx.Node, inner: WeightView) -> WeightView | None:
    named = known_arguments(node, "input|self dim index")
    if named is None or not _is_first(named["dim"], inner):
        return None
    return _indexed(inner, named["index"])


def _gather(node: fx.Node, inner: WeightView) -> WeightView | None:
    indices = arguments(node, "input|self indices")["indices"]
    if not isinstance(indices, list | tuple) or len(indices) != 1:
        return None
    return _indexed(inner, indices[0])


def _is_first(dim: object, inner: WeightView) -> bool:
    """Whether a number means the first dimension of a weight."""
    return isinstance(dim, int) and inner.dim is not None and dim in (0, -inner.dim)


def _indexed(inner: WeightView, index: object) -> WeightView | None:
    """One matrix of several, or one for each of a tensor of indices."""
    if inner.dim != 3 or isinstance(index, bool) or not isinstance(index, int | fx.Node):
        return None
    if isinstance(index, int):
        index %= inner.shape[0]
    return dataclasses.replace(inner, indexed=True, index=index)


def _rows(inner: WeightView, start: Any, stop: Any) -> WeightView | None:
    """Rows of a matrix as it is stored."""
    if not inner.plain or inner.dim != 2:
        return None
    if not all(isinstance(bound, int | None) for bound in (start, stop)):
        return None
    first, last, _ = slice(start, stop).indices(inner.shape[0])
    return dataclasses.replace(inner, rows=(first, last)) if first < last else None


def _split(cut: fx.Node, index: Any, region: Region) -> WeightView | None:
    """One part of a weight that is cut into several."""
    named = known_arguments(cut, SPLIT)
    inner = None if named is None else weight_of(named["input"], region)
    if named is None or inner is None or not _is_first(named["dim"], inner):
        return None
    lengths = part_lengths(cut, inner.shape[0])
    if not isinstance(index, int) or not lengths:
        return None
    ends = [0, *itertools.accumulate(lengths)]
    index %= len(lengths)
    return _rows(inner, ends[index], ends[index + 1])


_Step = Callable[[fx.Node, WeightView], WeightView | None]
_T = torch.Tensor
_TARGETS: dict[_Step, tuple[Any, ...]] = {
    _cast: (
        *(_T.to, _T.type, _T.type_as, _T.float, _T.double, _T.half, _T.bfloat16),
        *(_aten.to.dtype, _aten.to.dtype_layout, _aten.to.other, torch_private.TO_COPY),
    ),
    _same: (
        *(_T.contiguous, _T.clone, torch.clone),
        *(_aten.contiguous.default, _aten.clone.default),
        _aten.alias.default,
    ),
    _getattr: (getattr,),
    _permuted: (
        *(torch.t, _T.t, torch.adjoint, _T.adjoint),
        *(torch.transpose, _T.transpose, torch.permute, _T.permute),
        *(torch.swapaxes, _T.swapaxes, torch.swapdims, _T.swapdims),
        *(torch.movedim, _T.movedim, torch.moveaxis, _T.moveaxis),
        *(_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.adjoint.default),
        *(_aten.numpy_T.default, _aten.mT.default, _aten.mH.default, _aten.matrix_H.default),
        *(_aten.swapaxes.default, _aten.swapdims.default, _aten.movedim.int),
        *(_aten.movedim.intlist, _aten.moveaxis.int, _aten.moveaxis.intlist),
    ),
    _reshape: (
        *(_T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten),
        *(_T.squeeze, torch.squeeze, _T.unflatten, torch.unflatten),
        *(_aten.view.default, torch_private.UNSAFE_VIEW, _aten.reshape.default),
        *(_aten.flatten.using_ints, _aten.squeeze.default, _aten.squeeze.dim),
        *(_aten.squeeze.dims, _aten.unflatten.int),
    ),
    _getitem: (operator.getitem,),
    _slice: (_aten.slice.Tensor,),
    _narrow: (torch.narrow, _T.narrow, _aten.narrow.default),
    _select: (
        *(torch.select, _T.select, _aten.select.int),
        *(torch.index_select, _T.index_select, _aten.index_select.default),
    ),
    _gather: (_aten.index.Tensor,),
}
_STEPS = {target: step for step, targets in _TARGETS.items() for target in targets}
