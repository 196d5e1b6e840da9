"""What a file has in few bits, for its report."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StoredFormat", "size_text"]


@dataclass(frozen=True)
class StoredFormat:
    """Weights that a file has in few bits.

    Attributes:
        scheme: ``nf4``, ``fp4``, ``int8`` or ``int4``.
        operator: What reads them: "MatMulBnb4" or "MatMulNBits" of ONNX Runtime, or "DequantizeLinear".
        block_size: Values that share a scale; None for one scale a row.
        weights: How many matrices.
        values: How many values they have together.
        bytes: What they take, scales included.
    """

    scheme: str
    operator: str
    block_size: int | None
    weights: int
    values: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits a value takes, with its part of a scale."""
        return 8 * self.bytes / self.values

    @property
    def of_fp16(self) -> float:
        """Their size over that in fp16."""
        return self.bytes / (2 * self.values)

    def __str__(self) -> str:
        blocks = "a scale a row" if self.block_size is None else f"blocks of {self.block_size}"
        several = "s"[: self.weights > 1]
        return (
            f"{self.weights} weight{several} in {self.scheme}, {blocks}, for {self.operator}: "
            f"{size_text(self.bytes)}, {self.bits:.2f} bits a value, {self.of_fp16:.0%} of fp16"
        )


def size_text(size: int) -> str:
    """Bytes, for people."""
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"
