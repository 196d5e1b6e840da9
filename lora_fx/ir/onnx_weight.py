"""What a weight format tells an export, in words that need no ONNX: arrays, an operator, and its nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

__all__ = ["NoOperator", "OnnxBuilder", "OnnxOperator", "OnnxProduct", "OnnxWeight"]


class OnnxBuilder(Protocol):
    """Makes the nodes that stand for one product; its values are what an export has for values."""

    def op(
        self,
        name: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: Any = None,
    ) -> Any:
        """Make a node of ONNX.

        Args:
            name: Of its operator.
            inputs: Values.
            attributes: By name.
            like: A value whose dtype the output has.
        """

    def product(
        self,
        name: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        like: Any = None,
    ) -> Any:
        """Make the node that has the name of the operation: the one with the product."""

    def ints(self, numbers: Sequence[int]) -> Any:
        """Make a constant of whole numbers."""

    def rank(self, value: Any) -> int:
        """Number of dimensions."""

    def same_dtype(self, one: Any, other: Any) -> bool:
        """Whether two values have one dtype."""


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxProduct:
    """The product ``x Wᵀ`` that nodes are made for.

    Attributes:
        x: [..., in].
        arrays: Codes, scales and, where there are some, zero points: values of the file.
        rows: Of the matrix, [out, in].
        columns: Likewise.
        block: Values that share a scale.
        scheme: That of :class:`lora_fx.ir.Quantization`.
    """

    x: Any
    arrays: tuple[Any, ...]
    rows: int
    columns: int
    block: int
    scheme: str


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxOperator:
    """An operator that reads a weight of few bits.

    Attributes:
        name: What reports call it.
        nodes: Makes the nodes of a product, and gives their value.
        dequantizes: Whether it makes the values, which a product of its own reads: its scales keep all of
            their digits then, and a block may be a whole row.
    """

    name: str
    nodes: Callable[[OnnxBuilder, OnnxProduct], Any]
    dequantizes: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxWeight:
    """A matrix [out, in] as an operator reads it.

    Attributes:
        operator: Which one.
        codes: uint8 or int8, in the shape that the operator asks for.
        scales: fp32, one a block.
        zeros: Zero points as the operator has them; None where all are in the middle.
        block: Values that share a scale.
        fresh: Whether the codes are in memory of their own, and not in the weight's.
    """

    operator: OnnxOperator
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: int
    fresh: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class NoOperator:
    """Why a weight cannot be exported as it is stored.

    Attributes:
        reason: What is said after its name.
        remedy: What to do; None for the dense export, which is always possible.
    """

    reason: str
    remedy: str | None = None
