"""How a quantized weight is stored: a value that sites and plans carry."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["Quantization"]


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """How a weight is stored.

    Attributes:
        scheme: Name of the format, as ``nf4`` or ``int8``.
        bits: Bits of one value, without the scales.
        library: Whose format it is: that of :class:`lora_fx.formats.WeightFormat`.
        shape: Rows and columns of the matrix, [out, in].
        dtype: What its values are when they are needed.
        block_size: Values that share a scale, along a row or along the flattened matrix; None for one
            scale a row.
        double: Whether the scales are quantized, too (arXiv:2305.14314, section 3).
    """

    scheme: str
    bits: int
    library: str
    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int | None = None
    double: bool = False

    def __str__(self) -> str:
        blocks = "a row" if self.block_size is None else f"blocks of {self.block_size}"
        return f"{self.scheme} ({self.library}, {blocks}{', double' if self.double else ''})"
