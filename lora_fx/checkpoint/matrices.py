"""The matrices of a model, including those of other versions and parts of weights, and their locations.

A matrix has a name, and blocks of the model's parameters that hold its values. The experts of a stack are
matrices. So are the tensors of a checkpoint that transformers puts together on loading, and the parts of a
fused weight. The same change of weights can thus be written for either form of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_fx.converted_files import ConvertedGroup, FormerNames, is_converted
from lora_fx.formats import quantization_of
from lora_fx.ir import Site
from lora_fx.passes.graph import is_conv1d
from lora_fx.passes.parameters import base_parameters, whole_shape

__all__ = ["Block", "Matrices", "Matrix"]


_Traced: TypeAlias = "list[tuple[int | None, list[tuple[Any, ...]]]]"
"""The matrices of a tensor: the index in a stack, and the fields of the blocks."""


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A part of a matrix, and a part of a parameter that holds the same values.

    Attributes:
        parameter: FQN of the parameter.
        expert: Index of the matrix in a stack; None for a parameter that is a matrix.
        rows, columns: Indices into the matrix.
        first, last: Indices into the last two dimensions of the parameter.
        flipped: True if the parameter has the transposed values: ``rows`` belong to ``last``.
    """

    parameter: str
    expert: int | None
    rows: Tensor
    columns: Tensor
    first: Tensor
    last: Tensor
    flipped: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of a model.

    Attributes:
        name: Its name: the FQN of a parameter, or a name that the matrix has elsewhere.
        shape: Its shape. A kernel or a vector has its own shape and no blocks.
        blocks: The parts of parameters that hold the matrix.
        whole: FQN of the parameter that has these values, in this order; empty if there is none.
        origin: Where the name comes from: "model", "transformers" or "parts".
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    whole: str = ""
    origin: str = "model"


class Matrices:
    """All matrices of a model, by name."""

    def __init__(self, model: nn.Module) -> None:
        """Read the shapes of the parameters. Matrices are computed on request."""
        self.model = model
        self.parameters = {name: _shape(value) for name, value in base_parameters(model).items()}
        self._former = FormerNames(model) if is_converted(model) else None
        self._converted: dict[object, list[_Traced]] = {}
        self._by_group: dict[ConvertedGroup, dict[str, Matrix]] = {}

    def renamed(self, name: str) -> str:
        """Convert a name from an earlier version of the model. Any other name is returned unchanged."""
        return name if self._former is None else self._former.renamed(name)

    def at(self, name: str, expert: int | None = None) -> Matrix | None:
        """Return the matrix with this name, or None if the model has none.

        Args:
            name: FQN of a parameter, or a name of a tensor in checkpoints.
            expert: Index of the matrix in a stack; None if the parameter is no stack.
        """
        if name in self.parameters:
            return _of_parameter(name, self.parameters[name], expert)
        group = None if self._former is None else self._former.groups.get(name)
        if group is None:
            return None
        return self._of_group(group).get(_numbered(name, expert))

    def orientation(self, parameter: str) -> bool:
        """Return True if PEFT reads the last two dimensions of a parameter as [in, out]."""
        owner, _, _ = parameter.rpartition(".")
        module = self.model.get_submodule(owner)
        if len(self.parameters.get(parameter, ())) == 3:
            return bool(getattr(module, "is_transposed", False))
        return is_conv1d(module)

    def all(self, sites: Iterable[Site] = ()) -> Iterator[Matrix]:
        """Yield all matrices of the model: parameters, experts of stacks, converted tensors, and parts.

        Args:
            sites: Operations of the model, whose parts become matrices.
        """
        converted: set[str] = set()
        if self._former is not None:
            for group in dict.fromkeys(self._former.groups.values()):
                converted.update(group.names)
                yield from self._of_group(group).values()
        for name, shape in self.parameters.items():
            if len(shape) == 3 and name not in converted:
                owner, _, leaf = name.rpartition(".")
                for expert in range(shape[0]):
                    matrix = _of_parameter(name, shape, expert)
                    yield dataclasses.replace(matrix, name=f"{owner}.{expert}.{leaf}")
            else:
                yield _of_parameter(name, shape, None)
        for site in sites:
            yield from _parts(site)

    def inside(self, parameter: str, sites: Iterable[Site] = ()) -> list[Matrix]:
        """Return the smaller matrices that a parameter consists of; none if it is a single matrix.

        Args:
            parameter: FQN of the parameter.
            sites: Operations of the model, whose parts are matrices.
        """
        group = next(
            (
                g
                for g in (self._former.groups.values() if self._former else ())
                if parameter in g.names
            ),
            None,
        )
        if group is not None:
            return [
                matrix
                for matrix in self._of_group(group).values()
                if {block.parameter for block in matrix.blocks} == {parameter}
            ]
        return [matrix for site in sites if site.weight == parameter for matrix in _parts(site)]

    def _of_group(self, group: ConvertedGroup) -> Mapping[str, Matrix]:
        """Return the matrices of the tensors that transformers converts a group of parameters to, by name."""
        if group in self._by_group:
            return self._by_group[group]
        names = group.shapes(self.parameters)
        key = group.key(self.parameters)
        if key not in self._converted:
            self._converted[key] = _trace_conversion(group, self.parameters, names)
        matrices = {}
        for (name, shape), traced in zip(names.items(), self._converted[key], strict=True):
            for expert, parts in traced:
                blocks = tuple(Block(group.names[index], *fields) for index, *fields in parts)
                if blocks:
                    own = _numbered(name, expert)
                    matrices[own] = Matrix(own, shape[-2:], blocks, origin="transformers")
        self._by_group[group] = matrices
        return matrices


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a weight, or of its values if it is quantized."""
    stored = quantization_of(parameter)
    if stored is None:
        return tuple(whole_shape(parameter))
    return stored.shape if stored.stacked is None else (stored.stacked, *stored.shape)


def _numbered(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name}[{expert}]"


def _of_parameter(name: str, shape: tuple[int, ...], expert: int | None) -> Matrix:
    """Return a parameter, or one expert in a stack of matrices, as a :class:`Matrix`."""
    if len(shape) == 2 or (len(shape) == 3 and expert is not None):
        first, last = (torch.arange(size) for size in shape[-2:])
        block = Block(name, expert, first, last, first, last)
        whole = name if expert is None else ""
        return Matrix(_numbered(name, expert), shape[-2:], (block,), whole)
    return Matrix(name, shape, (), name)


def _parts(site: Site) -> Iterator[Matrix]:
    """Yield a matrix for each part of a fused weight, such as the q of a qkv."""
    if site.layout != "out_in" or len(site.weight_shape) != 2:
        return
    columns = torch.arange(site.weight_shape[1])
    for name, (start, stop) in site.parts:
        block = Block(
            site.weight,
            None,
            torch.arange(stop - start),
            columns,
            torch.arange(start, stop),
            columns,
        )
        shape = (stop - start, site.weight_shape[1])
        yield Matrix(f"{site.name}.{name}", shape, (block,), origin="parts")


# --- where the values of a conversion come from ---------------------------------------------------
# A conversion of transformers moves values and computes nothing. So it is run on the indices of the values,
# one dimension of the parameters at a time. In each matrix that comes out, an index depends on the row alone,
# or on the column alone.


def _trace_conversion(
    group: ConvertedGroup,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, tuple[int, ...]],
) -> list[_Traced]:
    """Find out which values of parameters each result of a conversion consists of.

    The conversion is run on tensors of indices, so that its results show where each value comes from.

    Args:
        group: The conversion.
        shapes: The shapes of the parameters.
        parts: The shapes of the tensors that the conversion computes.

    Returns:
        The matrices of each such tensor, with their blocks.
    """
    lines: dict[str, list[list[_Line | None]]] = {name: [] for name in parts}
    for axis in (None, -3, -2, -1):
        values = {
            name: _indices_along(shapes[name], axis, number)
            for number, name in enumerate(group.names)
        }
        for name, grid in group.parts(values).items():
            matrices = grid if grid.dim() == 3 else grid[None] if grid.dim() == 2 else ()
            lines[name].append([_line(matrix) for matrix in matrices])
    return [
        [
            (expert if len(shape) == 3 else None, _blocks(indices, shape[-2:]))
            for expert, indices in enumerate(zip(*lines[name], strict=True))
        ]
        for name, shape in parts.items()
    ]


def _indices_along(shape: tuple[int, ...], axis: int | None, number: int) -> Tensor:
    """Return a tensor that holds for each value its index along a dimension, with 16 bits if they suffice.

    The index is -1 if there is no such dimension. If ``axis`` is None, each value is ``number``.
    """
    dtype = torch.int16 if max(shape) < 2**15 else torch.int32
    if axis is None or -axis > len(shape):
        value = number if axis is None else -1
        return torch.full((1,) * len(shape), value, dtype=dtype).expand(shape)
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return torch.arange(shape[axis], dtype=dtype).view(sizes).expand(shape)


_Line: TypeAlias = "tuple[int, Tensor]"
"""The dimension of a matrix along which its entries vary, and the entries along it."""


def _line(grid: Tensor) -> _Line | None:
    """Return the dimension along which the entries of a matrix vary, and the entries along it.

    The dimension is 0 if all entries are equal. The result is None if the entries vary along both.
    """
    for axis in (0, 1):
        along = grid.select(1 - axis, 0)
        if bool((grid == along.unsqueeze(1 - axis)).all()):
            return axis, along.long()
    return None


def _varies(line: _Line) -> bool:
    return bool((line[1] != line[1][0]).any())


def _spread(line: _Line, dimension: int, size: int) -> Tensor:
    """Return ``size`` entries of a matrix along a dimension, from the result of :func:`_line`.

    If the entries vary along the other dimension, the first entry is repeated.
    """
    axis, along = line
    return along if axis == dimension and len(along) == size else along[:1].expand(size)


def _blocks(lines: Sequence[_Line | None], shape: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """Return the blocks of a matrix as tuples: index of the parameter, then other fields of a Block.

    Args:
        lines: Results of :func:`_line` for the index of the parameter that each value comes from, and for its
            three indices there. -1 stands for no expert.
        shape: The shape of the matrix.
    """
    known = [line for line in lines if line is not None]
    if len(known) < len(lines):
        return []
    *origins, first, last = known
    axes = {line[0] for line in origins if _varies(line)}
    flipped = (_varies(first) and first[0] == 1) or (_varies(last) and last[0] == 0)
    at = (1, 0) if flipped else (0, 1)
    turned = any(
        _varies(line) and line[0] != axis for line, axis in zip((first, last), at, strict=True)
    )
    if len(axes) > 1 or turned:
        return []
    # Rows, or columns, that come from the same matrix are a block.
    axis = axes.pop() if axes else 0
    pairs = [_spread(line, axis, shape[axis]).tolist() for line in origins]
    by_row = list(zip(*pairs, strict=True))
    ends = [_spread(line, side, shape[side]) for line, side in zip((first, last), at, strict=True)]
    result = []
    for number, expert in dict.fromkeys(by_row):
        own = [torch.arange(size) for size in shape]
        own[axis] = torch.tensor([i for i, pair in enumerate(by_row) if pair == (number, expert)])
        indices = [end[own[side]] for end, side in zip(ends, at, strict=True)]
        result.append((number, expert if expert >= 0 else None, *own, *indices, flipped))
    return result
