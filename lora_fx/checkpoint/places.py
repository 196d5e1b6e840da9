"""Places: the matrices that a model has, had in other versions, or applies in parts, and where they are.

A place is a matrix with a name, and blocks of the model's parameters that hold its values. The experts of a
stack are places, and so are the tensors of a checkpoint that transformers puts together on loading, and
the parts of a fused weight. The same delta of weights can thus be written for either form of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.converted_files import ConvertedGroup, FormerNames, is_converted
from lora_fx.formats import quantization_of
from lora_fx.ir import Site
from lora_fx.passes.graph import is_conv1d
from lora_fx.passes.parameters import base_parameters, whole_shape

__all__ = ["Block", "Place", "Places"]


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
class Place:
    """A matrix of a model.

    Attributes:
        name: Its name: the FQN of a parameter, or a name that the matrix has elsewhere.
        shape: Its shape. A place of a kernel or a vector has its shape, and no blocks.
        blocks: The parts of parameters that hold it.
        whole: FQN of the parameter that has these values, in this order; empty if there is none.
        origin: Where the name comes from: "model", "transformers" or "parts".
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    whole: str = ""
    origin: str = "model"


class Places:
    """All matrices of a model, by name."""

    def __init__(self, model: nn.Module) -> None:
        """List the parameters. Nothing is computed before it is asked for."""
        self.model = model
        self.parameters = {name: _shape(value) for name, value in base_parameters(model).items()}
        self._former = FormerNames(model) if is_converted(model) else None
        self._converted: dict[object, list[tuple[Any, ...]]] = {}

    def renamed(self, name: str) -> str:
        """Return the name in this model of a matrix with a name of an earlier version; else the same name."""
        return name if self._former is None else self._former.renamed(name)

    def at(self, name: str, expert: int | None = None) -> Place | None:
        """Return the place of a name, or None.

        Args:
            name: FQN of a parameter, or a name of a tensor in checkpoints.
            expert: The matrix of a stack.
        """
        if name in self.parameters:
            return _own(name, self.parameters[name], expert)
        group = None if self._former is None else self._former.groups.get(name)
        if group is None:
            return None
        return next(
            (place for place in self._of(group) if place.name == _numbered(name, expert)), None
        )

    def orientation(self, parameter: str) -> bool:
        """Return True if the last two dimensions of a parameter are [in, out] for PEFT."""
        owner, _, _ = parameter.rpartition(".")
        module = self.model.get_submodule(owner)
        if len(self.parameters.get(parameter, ())) == 3:
            return bool(getattr(module, "is_transposed", False))
        return is_conv1d(module)

    def all(self, sites: Iterable[Site] = ()) -> Iterator[Place]:
        """Yield the places.

        Args:
            sites: Operations of the model, whose parts become places.
        """
        made: set[str] = set()
        if self._former is not None:
            for group in dict.fromkeys(self._former.groups.values()):
                made.update(group.names)
                yield from self._of(group)
        for name, shape in self.parameters.items():
            if len(shape) == 3 and name not in made:
                owner, _, leaf = name.rpartition(".")
                for expert in range(shape[0]):
                    place = _own(name, shape, expert)
                    yield dataclasses.replace(place, name=f"{owner}.{expert}.{leaf}")
            else:
                yield _own(name, shape, None)
        for site in sites:
            yield from _parts(site)

    def inside(self, parameter: str, sites: Iterable[Site] = ()) -> list[Place]:
        """Return the smaller places that a parameter consists of; none if it is a single matrix.

        Args:
            parameter: Its FQN.
            sites: Operations of the model, whose parts are places.
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
                place
                for place in self._of(group)
                if {block.parameter for block in place.blocks} == {parameter}
            ]
        return [place for site in sites if site.weight == parameter for place in _parts(site)]

    def _of(self, group: ConvertedGroup) -> list[Place]:
        """Return the matrices of the tensors that transformers makes of some parameters."""
        names = group.shapes(self.parameters)
        key = group.key(self.parameters)
        if key not in self._converted:
            self._converted[key] = [
                _traced(grids) for grids in _grids(group, self.parameters, tuple(names))
            ]
        places = []
        for (name, shape), traced in zip(names.items(), self._converted[key], strict=True):
            for expert, parts in traced:
                blocks = tuple(Block(group.names[index], *rest) for index, *rest in parts)
                if blocks:
                    places.append(
                        Place(_numbered(name, expert), shape[-2:], blocks, origin="transformers")
                    )
        return places


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a weight, or of its values if it is quantized."""
    stored = quantization_of(parameter)
    if stored is None:
        return tuple(whole_shape(parameter))
    return stored.shape if stored.stacked is None else (stored.stacked, *stored.shape)


def _numbered(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name}[{expert}]"


def _own(name: str, shape: tuple[int, ...], expert: int | None) -> Place:
    """Return the place of a parameter, or of one matrix in a stack."""
    if len(shape) == 2 or (len(shape) == 3 and expert is not None):
        first, last = (torch.arange(size) for size in shape[-2:])
        block = Block(name, expert, first, last, first, last)
        whole = name if expert is None else ""
        return Place(_numbered(name, expert), shape[-2:], (block,), whole)
    return Place(name, shape, (), name)


def _parts(site: Site) -> Iterator[Place]:
    """Yield the parts of a weight whose outputs are divided."""
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
        yield Place(f"{site.name}.{name}", shape, (block,), origin="parts")


# --- where the values of a conversion come from ---------------------------------------------------
# A conversion of transformers moves values and computes nothing. So it is run on the indices of the
# values. Each index is constant along all dimensions but one, so that it takes no memory.


def _grids(
    group: ConvertedGroup, shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield, for each tensor, the index of the parameter and the three indices in it of each value."""
    converted = []
    for axis in (None, -3, -2, -1):
        values = {
            name: _along(shapes[name], axis, number) for number, name in enumerate(group.names)
        }
        converted.append(group.parts(values))
    for name in names:
        yield tuple(parts[name] for parts in converted)


def _along(shape: tuple[int, ...], axis: int | None, number: int) -> Tensor:
    if axis is None or -axis > len(shape):
        return torch.full((1,) * len(shape), number if axis is None else -1).expand(shape)
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return torch.arange(shape[axis], dtype=torch.int32).view(sizes).expand(shape)


def _traced(grids: tuple[Tensor, ...]) -> list[tuple[int | None, list[tuple[Any, ...]]]]:
    """Return the matrices of a tensor, each with its blocks; no blocks if they are no submatrices."""
    if grids[0].dim() == 3:
        return [
            (expert, _blocks([grid[expert] for grid in grids])) for expert in range(len(grids[0]))
        ]
    if grids[0].dim() != 2:
        return [(None, [])]
    return [(None, _blocks(grids))]


def _blocks(grids: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Return the blocks that a matrix consists of: index of the parameter, and the fields of a Block."""
    if not grids[0].numel():
        return []
    # The matrix that each row, or each column, comes from: its parameter, and its index in a stack.
    down = list(zip(*(grid[:, 0].tolist() for grid in grids[:2]), strict=True))
    right = list(zip(*(grid[0].tolist() for grid in grids[:2]), strict=True))
    if len(set(down)) > 1 and len(set(right)) > 1:
        return []
    axis = 0 if len(set(down)) > 1 else 1
    origins = right if axis else down
    result = []
    for matrix in dict.fromkeys(origins):
        chosen = torch.tensor([index for index, other in enumerate(origins) if other == matrix])
        first, last = grids[2:]
        if len(chosen) < len(origins):
            first, last = first.index_select(axis, chosen), last.index_select(axis, chosen)
        own = [torch.arange(size) for size in grids[0].shape]
        own[axis] = chosen
        flipped = bool((first[0] != first[0, 0]).any() or (last[:, 0] != last[0, 0]).any())
        if flipped:
            first, last = first.T, last.T
        down_first, along_last = first[:, 0].clone(), last[0].clone()
        straight = (first == down_first[:, None]).all() and (last == along_last).all()
        if not straight:
            return []
        number, expert = matrix
        result.append(
            (number, expert if expert >= 0 else None, *own, down_first, along_last, flipped)
        )
    return result
