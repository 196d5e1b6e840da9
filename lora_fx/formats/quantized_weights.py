"""How the weights of bitsandbytes and torchao are stored, and which values they stand for.

By class of what a parameter holds. Neither library is imported: whoever has such a weight has done so.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["DESCRIBED", "VALUES", "Quantization", "bitsandbytes", "held", "row_scales"]


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """How a weight is stored.

    Attributes:
        scheme: ``nf4``, ``fp4``, ``int8`` or ``int4``.
        bits: Bits of one value, without the scales.
        library: Whose format it is: ``bitsandbytes`` or ``torchao``.
        shape: Rows and columns of the matrix, [out, in].
        dtype: What its values are when they are needed.
        block_size: Values that share a scale, along a row (for bitsandbytes' 4 bits, along the flattened
            matrix); None for one scale a row.
        double: Whether the scales are quantised, too (arXiv:2305.14314, section 3).
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


# --- bitsandbytes ------------------------------------------------------------------------------------


def bitsandbytes() -> Any:
    """The library, which has been imported."""
    return sys.modules["bitsandbytes"]


def _describe_four_bits(weight: Any) -> Quantization | None:
    state = weight.quant_state
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    shape = (int(state.shape[0]), int(state.shape[1]))
    scheme, double = str(state.quant_type), bool(state.nested)
    return Quantization(scheme, 4, "bitsandbytes", shape, state.dtype, int(state.blocksize), double)


def _describe_eight_bits(weight: Any) -> Quantization | None:
    if weight.dtype != torch.int8 or weight.dim() != 2 or row_scales(weight) is None:
        return None
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    return Quantization("int8", 8, "bitsandbytes", shape, torch.float32)


def _four_bit_values(weight: Any, dtype: torch.dtype) -> Tensor:
    # As the kernel has them for inputs of that type: in fp32 they are not rounded to the weight's own first.
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32 if dtype == torch.float64 else dtype
    found: Tensor = bitsandbytes().functional.dequantize_4bit(weight.data, state)
    return found


def _eight_bit_values(weight: Any, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values: Tensor = weight.data.to(wide) * (row_scales(weight).to(wide) / 127).unsqueeze(1)
    return values


def row_scales(weight: Any) -> Any:
    """The largest magnitude in each row of an 8-bit weight of bitsandbytes, [out]; None if there is none."""
    # The layer's own forward takes them away from the weight: a copy has them in one more place.
    return weight.SCB if weight.SCB is not None else getattr(weight, "row_scales", None)


# --- torchao -----------------------------------------------------------------------------------------


def _describe_int8(weight: Any) -> Quantization | None:
    # With quantised activations the product is no product with this matrix.
    if weight.dim() != 2 or weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        return None
    return _torchao("int8", 8, weight, weight.block_size[-1])


def _describe_intx(weight: Any) -> Quantization | None:
    bits = {"torch.int4": 4, "torch.int8": 8}.get(str(weight.target_dtype))
    if bits is None or weight.dim() != 2 or weight.activation_quantization is not None:
        return None
    return _torchao(f"int{bits}", bits, weight, weight.block_size[-1])


def _describe_int4(weight: Any) -> Quantization | None:
    if weight.dim() != 2 or weight.act_pre_scale is not None:
        return None
    return _torchao("int4", 4, weight, weight.block_size[-1])


def _describe_nf4(weight: Any) -> Quantization | None:
    if weight.dim() != 2:
        return None
    return dataclasses.replace(_torchao("nf4", 4, weight, weight.block_size), double=True)


def _torchao(scheme: str, bits: int, weight: Any, block: int) -> Quantization:
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    size = None if block == shape[1] and scheme != "nf4" else int(block)
    return Quantization(scheme, bits, "torchao", shape, weight.dtype, size)


def _dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    found: Tensor = weight.dequantize()
    return found


def _int8_values(weight: Any, dtype: torch.dtype) -> Tensor:
    # Its scales are fp32 whatever it stands for, and it knows nothing wider.
    found: Tensor = weight.dequantize(torch.float32 if dtype == torch.float64 else dtype)
    return found


def _nf4_values(weight: Any, dtype: torch.dtype) -> Tensor:
    found: Tensor = weight.get_original_weight()
    return found


DESCRIBED: Final[Mapping[str, Callable[[Any], Quantization | None]]] = {
    "Params4bit": _describe_four_bits,
    "Int8Params": _describe_eight_bits,
    "Int8Tensor": _describe_int8,
    "IntxUnpackedToInt8Tensor": _describe_intx,
    "Int4Tensor": _describe_int4,
    "NF4Tensor": _describe_nf4,
}
"""What a weight is, by its class; None where that is not known here."""

VALUES: Final[Mapping[str, Callable[[Any, torch.dtype], Tensor]]] = {
    "Params4bit": _four_bit_values,
    "Int8Params": _eight_bit_values,
    "Int8Tensor": _int8_values,
    "IntxUnpackedToInt8Tensor": _dequantized,
    "Int4Tensor": _dequantized,
    "NF4Tensor": _nf4_values,
}
"""Its values, [out, in], given the dtype that they are wanted in, by the same."""


def held(weight: Any) -> Any:
    """What a parameter holds: parameters of bitsandbytes are classes of their own, others wrap a tensor.

    An export has a module in the place of a parameter, whose ``held`` it is.
    """
    weight = getattr(weight, "held", weight)
    named = type(weight).__name__
    return (
        weight if named in DESCRIBED or not isinstance(weight, torch.nn.Parameter) else weight.data
    )
