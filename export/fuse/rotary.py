"""Rotary embeddings: ``x · cos + rotate_half(x) · sin``, over all or the first channels of a head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_fx.export.fuse.graph import (
    CONTRIB,
    Builder,
    Size,
    array_of,
    axis_size,
    joined,
    made_by,
    names_of,
    rank,
    scalar,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Rotary", "Tables", "find_rotary", "flat_heads"]


@dataclass(frozen=True)
class _Wave:
    """A cosine or sine of angles, [batch, sequence, half the channels], times a number."""

    angles: ir.Value
    factor: float
    dtype: ir.DataType | None


@dataclass(frozen=True)
class Rotary:
    """Values of one rotary embedding in a graph.

    Attributes:
        x: The value to rotate, [batch, heads, sequence, width].
        cosine: Cosine of the angles.
        sine: Sine of the angles.
        turned: Number of rotated channels of a head: all, or the first ones.
    """

    x: ir.Value
    cosine: _Wave
    sine: _Wave
    turned: int


def find_rotary(value: ir.Value) -> Rotary | None:
    """Read a value as the output [batch, heads, sequence, width] of a rotary embedding, or return None."""
    whole = _whole(value)
    if whole is not None:
        return whole
    halves = joined(value, 3)
    if halves is None:
        return None
    first, second = halves.inputs
    rotary = None if first is None else _whole(first)
    if rotary is None:
        return None
    source, bounds = _part(rotary.x)
    other, upper_bounds = _part(second)
    if source is None or source is not other or bounds != (0, rotary.turned):
        return None
    if upper_bounds != (rotary.turned, axis_size(source, -1)):
        return None
    return Rotary(source, rotary.cosine, rotary.sine, rotary.turned)


def _whole(value: ir.Value) -> Rotary | None:
    added = made_by(value, "Add")
    if added is None or rank(value) != 4:
        return None
    for left, right in (added.inputs, tuple(reversed(added.inputs))):
        plain, turned = made_by(left, "Mul"), made_by(right, "Mul")
        if plain is None or turned is None:
            continue
        for x, cosine in (plain.inputs, tuple(reversed(plain.inputs))):
            for half, sine in (turned.inputs, tuple(reversed(turned.inputs))):
                width = axis_size(x, -1)
                if x is None or not isinstance(width, int) or not _is_turned(half, x, width):
                    continue
                waves = _wave(cosine, "Cos", x), _wave(sine, "Sin", x)
                if waves[0] is None or waves[1] is None:
                    continue
                if waves[0].angles is waves[1].angles:
                    return Rotary(x, waves[0], waves[1], width)
    return None


def _is_turned(value: ir.Value | None, x: ir.Value, width: int) -> bool:
    """Return True if a value is ``rotate_half(x)``: ``concat(-x[..., d/2:], x[..., :d/2])``."""
    halves = joined(value, 3)
    if halves is None:
        return False
    negated = made_by(halves.inputs[0], "Neg")
    if negated is None:
        return False
    upper, lower = _part(negated.inputs[0]), _part(halves.inputs[1])
    half = width // 2
    return upper == (x, (half, width)) and lower == (x, (0, half))


def _part(value: ir.Value | None) -> tuple[ir.Value | None, tuple[int, Size | None]]:
    """Read a value as a slice of the last axis. Return the source and the bounds, or None and (0, 0)."""
    node = made_by(value, "Slice")
    nothing = (None, (0, 0))
    if node is None or len(node.inputs) < 4 or node.inputs[0] is None:
        return nothing
    start, end, axis = (scalar(bound) for bound in node.inputs[1:4])
    step = scalar(node.inputs[4]) if len(node.inputs) > 4 else 1
    count, width = rank(node.inputs[0]), axis_size(node.inputs[0], -1)
    if start is None or end is None or axis is None or step != 1 or count is None:
        return nothing
    if axis not in (-1, count - 1) or not isinstance(width, int):
        return nothing
    first, last, _ = slice(int(start), int(end)).indices(width)
    return node.inputs[0], (first, last)


def _wave(value: ir.Value | None, operator: str, x: ir.Value) -> _Wave | None:
    """Read a value as ``unsqueeze(cos(concat(angles, angles)), 1)``, or return None.

    Constant factors and casts may be in between. ``operator`` is "Cos" or "Sin".
    """
    factor, dtype = 1.0, None if value is None else value.dtype
    spread = False
    while (node := made_by(value, "Unsqueeze", "Cast", "Mul", operator)) is not None:
        if node.op_type == operator:
            break
        value = node.inputs[0]
        if node.op_type == "Unsqueeze":
            axes = array_of(node.inputs[1])
            if spread or axes is None or axes.reshape(-1).tolist() != [1] or rank(value) != 3:
                return None
            spread = True
        elif node.op_type == "Mul":
            sides = [scalar(operand) for operand in node.inputs]
            numbers = [number for number in sides if number is not None]
            if len(numbers) != 1:
                return None
            factor *= numbers[0]
            value = node.inputs[0] if sides[0] is None else node.inputs[1]
    if node is None or not spread:
        return None
    joined = made_by(node.inputs[0], "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.inputs[0] is not joined.inputs[1]:
        return None
    angles = joined.inputs[0]
    if angles is None or joined.attributes.get_int("axis", 0) not in (-1, 2) or rank(angles) != 3:
        return None
    same = names_of(angles)[:2] == (axis_size(x, 0), axis_size(x, 2))
    return _Wave(angles, factor, dtype) if same else None


_TABLE_VALUES = 2**20
"""Largest size of a constant cosine or sine table, in numbers: 4 MiB in fp32."""


class Tables:
    """Cosine and sine tables for ``RotaryEmbedding``, and the row of each token in them.

    The tables are constants if angles are positions times constant frequencies, and the number of positions
    is small. Otherwise they have a row for each token of the call, computed in the file as the model does
    it. This works with frequencies of any kind.

    Args:
        model: Changed in place.
        limit: Number of positions of the model, or None if it has no limit.
    """

    def __init__(self, model: ir.Model, limit: int | None) -> None:
        self._model = model
        self._limit = limit
        self._tables: dict[tuple[object, ...], ir.Value] = {}
        self._rows: dict[int, ir.Value] = {}

    def turn(self, builder: Builder, rotary: Rotary, x: ir.Value, heads: int) -> ir.Value:
        """Insert a ``RotaryEmbedding`` and return its output.

        Args:
            builder: Builder for the new nodes.
            rotary: The rotary embedding to compute.
            x: The value to rotate, as [batch, sequence, heads · width].
            heads: Number of heads.
        """
        cosine = self._table(builder, "Cos", rotary.cosine, x)
        sine = self._table(builder, "Sin", rotary.sine, x)
        width = axis_size(rotary.x, -1)
        attributes = {"num_heads": heads, "interleaved": 0}
        if rotary.turned != width:
            attributes["rotary_embedding_dim"] = rotary.turned
        return builder.op(
            "RotaryEmbedding",
            [x, self._positions(builder, rotary.cosine.angles), cosine, sine],
            attributes,
            like=x,
            shape=x.shape,
            domain=CONTRIB,
        )

    def _constant(self, angles: ir.Value) -> tuple[ir.Value, np.ndarray[Any, Any]] | None:
        """Return positions and frequencies whose products are the angles. None if a table is not small."""
        factors = _frequencies(angles)
        if factors is None or self._limit is None or self._limit * factors[1].size > _TABLE_VALUES:
            return None
        return factors

    def _table(self, builder: Builder, operator: str, wave: _Wave, x: ir.Value) -> ir.Value:
        key = id(wave.angles), operator, wave.factor, x.dtype
        if key not in self._tables:
            factors = self._constant(wave.angles)
            self._tables[key] = (
                self._computed(builder, operator, wave, x)
                if factors is None
                else self._known(builder, operator, wave, factors[1], x)
            )
        return self._tables[key]

    def _computed(self, builder: Builder, operator: str, wave: _Wave, x: ir.Value) -> ir.Value:
        angles = wave.angles
        half = axis_size(angles, -1)
        assert isinstance(half, int)
        table = builder.op("Reshape", [angles, builder.ints([-1, half])], like=angles)
        table = builder.op(operator, [table], like=angles)
        if wave.factor != 1.0:
            table = builder.op("Mul", [table, builder.number(wave.factor, angles)], like=angles)
        if angles.dtype != x.dtype:
            assert x.dtype is not None
            table = builder.op("Cast", [table], {"to": int(x.dtype)}, like=x)
        return table

    def _known(
        self,
        builder: Builder,
        operator: str,
        wave: _Wave,
        frequencies: np.ndarray[Any, Any],
        x: ir.Value,
    ) -> ir.Value:
        assert self._limit is not None
        assert x.dtype is not None
        limit, dtype, factor = self._limit, x.dtype, np.float32(wave.factor)
        apply = np.cos if operator == "Cos" else np.sin

        def values() -> np.ndarray[Any, Any]:
            angles = np.arange(limit, dtype=np.float32)[:, None] * frequencies
            table: np.ndarray[Any, Any] = (apply(angles) * factor).astype(dtype.numpy())
            return table

        name = f"rotary.{operator.lower()}.{len(self._tables)}"
        return builder.later(name, values, [limit, frequencies.size], dtype)

    def _positions(self, builder: Builder, angles: ir.Value) -> ir.Value:
        """Return the row of each token in the tables, [batch, sequence]."""
        if id(angles) not in self._rows:
            factors = self._constant(angles)
            if factors is None:
                tokens = builder.op("Shape", [angles], {"start": 0, "end": 2})
                count = builder.op("ReduceProd", [tokens], {"keepdims": 0})
                rows = builder.op("Range", [builder.ints(0), count, builder.ints(1)])
                self._rows[id(angles)] = builder.op("Reshape", [rows, tokens])
            else:
                # Older versions of the operator read beyond the table. A Gather raises an error instead.
                all_positions = builder.later(
                    f"rotary.positions.{len(self._rows)}",
                    partial(np.arange, self._limit),
                    [self._limit or 0],
                    factors[0].dtype,
                )
                self._rows[id(angles)] = builder.op(
                    "Gather", [all_positions, factors[0]], like=factors[0]
                )
        return self._rows[id(angles)]


def _frequencies(angles: ir.Value) -> tuple[ir.Value, np.ndarray[Any, Any]] | None:
    """Read angles as ``float(positions)[:, :, None] · frequencies`` with constant frequencies."""
    product = made_by(angles, "Mul")
    if product is None or angles.dtype is None or angles.dtype.name != "FLOAT":
        return None
    for left, right in (product.inputs, tuple(reversed(product.inputs))):
        array = array_of(right)
        if array is None or array.size != axis_size(angles, -1) or array.shape[-1] != array.size:
            continue
        positions = _positions_of(left)
        if positions is not None:
            return positions, array.reshape(-1)
    return None


def _positions_of(value: ir.Value | None) -> ir.Value | None:
    """Return the int64 value [batch, sequence] behind casts and an ``Unsqueeze`` that adds a last axis."""
    expanded = False
    while (node := made_by(value, "Unsqueeze", "Cast")) is not None:
        value = node.inputs[0]
        if node.op_type == "Unsqueeze":
            axes = array_of(node.inputs[1])
            if expanded or axes is None or axes.reshape(-1).tolist() not in ([2], [-1]):
                return None
            expanded = True
    is_int64 = value is not None and value.dtype is not None and value.dtype.name == "INT64"
    return value if expanded and is_int64 and rank(value) == 2 else None


def flat_heads(builder: Builder, value: ir.Value) -> ir.Value:
    """Reshape [batch, heads, sequence, width] to [batch, sequence, heads · width]."""
    batch, heads, sequence, width = names_of(value)
    assert isinstance(heads, int)
    assert isinstance(width, int)
    turned = made_by(value, "Transpose")
    if turned is not None and list(turned.attributes.get_ints("perm", ())) == [0, 2, 1, 3]:
        apart = turned.inputs[0]
        assert apart is not None
    else:  # a norm of each head lies in between
        apart = builder.op("Transpose", [value], {"perm": [0, 2, 1, 3]}, like=value)
    joined = batch, sequence, heads * width
    source = made_by(apart, "Reshape")
    if source is not None and source.inputs[0] is not None and names_of(source.inputs[0]) == joined:
        return source.inputs[0]
    return builder.op(
        "Reshape", [apart, builder.ints([0, 0, heads * width])], like=apart, shape=joined
    )
