"""Views of weights in a graph: a parameter, read through operations that keep its values.

These operations are casts and copies, transposes, views as another shape, and ranges of rows. If a weight
has a matrix for each expert, they include the selection of one expert, or of one expert for each token.
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
# Functions that split by the number of parts. The other functions take the length of each part.
_CHUNKS: tuple[Any, ...] = (torch.chunk, torch.Tensor.chunk, _aten.chunk.default)

SPLIT = "input|self|tensor size|split_size_or_sections|split_size|split_sizes|chunks dim=0"
"""Parameters of the split functions, in the notation of :func:`lora_fx.passes.graph.nodes.arguments`."""

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
    """View of a parameter that a node reads.

    Attributes:
        source: The ``get_attr`` node of the parameter.
        shape: The shape of the view, before rows are cut and matrices transposed.
        viewed: True if ``shape`` is not the parameter's own shape.
        order: Permutation of the parameter's dimensions before the view; None for no permutation.
        transposed: True if the last two dimensions are swapped.
        rows: Range of rows (start, stop) that is read; None for all rows.
        indexed: True if ``index`` selects matrices along the first of three dimensions.
        index: The index of a matrix, or the node of a tensor of indices.
        cast: True if the parameter is read in another dtype.
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
        """Return True if the view is the whole parameter as it is stored, apart from a cast."""
        return dataclasses.replace(self, cast=False) == WeightView(self.source, self.shape)

    @property
    def dim(self) -> int | None:
        """Return the number of dimensions of the view, or None if the number depends on an index tensor."""
        if not self.indexed:
            return len(self.shape)
        return len(self.shape) - 1 if isinstance(self.index, int) else None


def weight_of(node: object, region: Region) -> WeightView | None:
    """Return the view of a parameter that a node computes, or None if the node computes anything else."""
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
    """Return True if code may write into a copy of a weight, so that it has other values than the weight."""
    return any(
        _is_written(user) if target_of(user) in _STEPS or splits(user) else may_write(user)
        for user in copy.users
        if user.all_input_nodes and user.all_input_nodes[0] is copy
    )


def path_to_weight(value: fx.Node, region: Region) -> tuple[fx.Node, ...]:
    """Return the nodes from a view of a weight to its ``get_attr`` node, or () for any other value."""
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
    """Return True if a node splits a tensor into parts."""
    return target_of(node) in _SPLITS


def part_lengths(node: fx.Node, size: int) -> list[int]:
    """Return the lengths of the parts of a split of `size` elements, or [] if they are not known."""
    how = arguments(node, SPLIT)["size"]
    if not all(
        isinstance(length, int) for length in (how if isinstance(how, list | tuple) else (how,))
    ):
        return []
    function = torch.chunk if target_of(node) in _CHUNKS else torch.split
    try:
        return [len(part) for part in function(torch.empty(size, device="meta"), how)]
    except RuntimeError:
        return []


def constant_of(node: object, region: Region) -> fx.Node | None:
    """Return a parameter that a node is computed from, or None if the node depends on inputs of the graph."""
    parameter: fx.Node | None = None
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if not isinstance(current, fx.Node) or current in seen:
            continue
        seen.add(current)
        if current.op in ("placeholder", "call_module"):
            return None
        if region.parameter(current) is not None:
            parameter = current
        pending.extend(current.all_input_nodes)
    return parameter


# --- one function for each kind of operation, which returns the view after the operation, or None --------


def _cast(node: fx.Node, inner: WeightView) -> WeightView | None:
    operands = (*node.args[1:], *node.kwargs.values())
    dtypes = [operand for operand in operands if isinstance(operand, torch.dtype)]
    # `type` also takes the name or the class of a tensor.
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
    """Return the view after a permutation that swaps the last two dimensions or none, else None.

    A meta tensor shows what the permutation does.
    """
    # With a tensor of indices the number of dimensions is unknown. The result must be the same for all three.
    dim_counts = (2, 3, 4) if inner.dim is None else (inner.dim,)
    orders = [(_order(node, dims), tuple(range(dims))) for dims in dim_counts]
    if all(order == before for order, before in orders):
        return inner
    swaps = all(order == (*before[:-2], *before[:-3:-1]) for order, before in orders)
    return _swapped(inner) if swaps else None


def _order(node: fx.Node, dims: int) -> tuple[int, ...] | None:
    """Return the permutation of dimensions that an operation does, or None if it is no permutation."""
    shape = _shaped(node, tuple(range(dims)))
    return shape if shape is not None and sorted(shape) == list(range(dims)) else None


def _shaped(node: fx.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the result shape of an operation on a shape, or None if PyTorch raises or the dtype changes."""
    if len(node.all_input_nodes) != 1:
        return None
    tensor = torch.empty(shape, device="meta")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: tensor)
    try:
        result = target_of(node)(*args, **kwargs)
    except (IndexError, RuntimeError, TypeError):
        return None
    same = isinstance(result, torch.Tensor) and result.dtype == tensor.dtype
    return tuple(result.shape) if same else None


def _swapped(inner: WeightView) -> WeightView | None:
    if inner.dim is not None and inner.dim < 2:
        return None
    return dataclasses.replace(inner, transposed=not inner.transposed)


def _reshape(node: fx.Node, inner: WeightView) -> WeightView | None:
    """Return the reshaped view of the parameter."""
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
        # Further indices must select everything, as in `w[1, :, :]`.
        further = index[1:]
        if not index or any(item is not Ellipsis and item != slice(None) for item in further):
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
    """Return True if ``dim`` is the first dimension of a weight, counted from the start or the end."""
    return isinstance(dim, int) and inner.dim is not None and dim in (0, -inner.dim)


def _indexed(inner: WeightView, index: object) -> WeightView | None:
    """Return the view of one matrix of a stack, or of the matrices that an index tensor selects."""
    if inner.dim != 3 or isinstance(index, bool) or not isinstance(index, int | fx.Node):
        return None
    if isinstance(index, int):
        index %= inner.shape[0]
    return dataclasses.replace(inner, indexed=True, index=index)


def _rows(inner: WeightView, start: Any, stop: Any) -> WeightView | None:
    """Return the view of a range of rows; None if the matrix is not read as it is stored."""
    if not inner.plain or inner.dim != 2:
        return None
    if not all(isinstance(bound, int | None) for bound in (start, stop)):
        return None
    first, last, _ = slice(start, stop).indices(inner.shape[0])
    return dataclasses.replace(inner, rows=(first, last)) if first < last else None


def _split(cut: fx.Node, index: Any, region: Region) -> WeightView | None:
    """Return the view of one part of a weight that is split."""
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
