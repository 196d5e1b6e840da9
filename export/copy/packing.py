"""What is traced in the place of a quantised weight: arrays, and one operator over them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Container
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.copy.quantized_weight import DENSE_INSTEAD, HeldWeight, StandIn
from lora_fx.export.report import StoredFormat
from lora_fx.formats import dense

__all__ = [
    "Operator",
    "Packed",
    "PackedWeight",
    "pack_quantized",
    "packed",
    "stored_formats",
]


Operator = Literal["MatMulBnb4", "MatMulNBits", "DequantizeLinear"]

_BLOCKS = (128, 64, 32, 16)  # those that every provider has a kernel for


@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix [out, in] as an operator reads it.

    Attributes:
        operator: Which one.
        codes: uint8, two a byte, for 4 bits; int8 [rows, block] for DequantizeLinear.
        scales: fp32, one a block.
        zeros: Zero points as the operator has them; None where all are in the middle.
        block: Values that share a scale.
    """

    operator: Operator
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: int

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        every = (self.codes, self.scales, self.zeros)
        return sum(one.nbytes for one in every if one is not None)


@torch.no_grad()
def packed(weight: HeldWeight) -> Packed:
    """Puts a weight in the form of an operator.

    Raises:
        ExportError: There is none that has its values, or its scales are not finite.
    """
    held: Any = weight.held
    if not _blocks_in_order(weight):
        raise ExportError(
            f"'{weight.where}' has rows of {weight.stored.shape[1]} values in blocks of "
            f"{weight.stored.block_size}, whose scales bitsandbytes mixes up on this device: what PyTorch "
            f"computes here is not what is stored. Quantise it with a block size that divides the rows, or "
            f"move the model to CUDA"
        )
    try:
        found = _PACKED[type(held).__name__](held)
    except (KeyError, _Unfit) as error:
        raise ExportError(
            f"'{weight.where}' is stored as {weight.stored}, which no operator of ONNX Runtime has to the "
            f"last digit: {_REASONS[weight.stored.scheme]}; {DENSE_INSTEAD}"
        ) from error
    if not bool(found.scales.isfinite().all()):
        raise ExportError(
            f"'{weight.where}' has scales that are not finite: it was quantised from a broken model"
        )
    return found


class _Unfit(Exception):  # it never leaves this module
    """No operator has these values."""


_REASONS = {
    "nf4": "torchao rounds the table of NF4 to four digits, and MatMulBnb4 has that of bitsandbytes",
    "int4": "its zero points are no whole numbers",
    "int8": "its zero points are no whole numbers",
}


def _four_bits(weight: Any) -> Packed:
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    codes = weight.detach().as_subclass(torch.Tensor).contiguous().view(torch.uint8).flatten()
    return Packed("MatMulBnb4", codes, scales.float().flatten(), None, int(state.blocksize))


def _blocks_in_order(weight: HeldWeight) -> bool:
    """Whether values are made as they are stored: kernels of the CPU begin a block with each row."""
    stored = weight.stored
    held: Any = weight.held
    state = getattr(held, "quant_state", None)
    if state is None or stored.shape[1] % int(state.blocksize) == 0:
        return True
    flat = copy.copy(held)
    flat.quant_state = copy.copy(state)
    flat.quant_state.shape = torch.Size((1, stored.shape[0] * stored.shape[1]))
    return torch.equal(dense(flat).flatten(), dense(held).flatten())


def _int8_rows(weight: Any) -> Packed:
    """LLM.int8(): the largest of a row is 127."""
    scales = weight.SCB if weight.SCB is not None else weight.row_scales
    codes = weight.detach().as_subclass(torch.Tensor)
    return Packed("DequantizeLinear", codes, scales.float().flatten() / 127, None, codes.shape[1])


def _int8(weight: Any) -> Packed:
    return _whole_numbers(weight, 8)


def _intx(weight: Any) -> Packed:
    return _whole_numbers(weight, 4 if str(weight.target_dtype) == "torch.int4" else 8)


def _whole_numbers(weight: Any, bits: int) -> Packed:
    """``(code - zero) · scale`` in blocks along rows."""
    codes, (rows, columns) = weight.qdata, weight.qdata.shape
    block = int(weight.block_size[-1])
    scales = _spread(weight.scale, rows).float()
    zeros = None if weight.zero_point is None else _spread(weight.zero_point, rows)
    if zeros is not None and not bool((zeros == zeros.round()).all()):
        raise _Unfit
    size = next((size for size in _BLOCKS if block % size == 0), None)
    if bits == 4 and size is None and block == columns:
        size = _BLOCKS[-1]  # one scale a row: the last block need not be full
    if bits == 4 and size is not None:
        return _blocks_of_four_bits(codes, scales, zeros, size)
    if zeros is not None:
        zeros = zeros.to(torch.int8).flatten() if bool(zeros.any()) else None
    return Packed("DequantizeLinear", codes.reshape(-1, block), scales.flatten(), zeros, block)


def _blocks_of_four_bits(codes: Tensor, scales: Tensor, zeros: Tensor | None, size: int) -> Packed:
    rows, columns = codes.shape
    blocks = -(-columns // size)
    # Codes from -8 to 7 are stored from 0 to 15; without zero points the middle is 8.
    stored = F.pad((codes + 8).to(torch.uint8), (0, blocks * size - columns), value=8)
    # A block of the library is several of the operator's, or a row that they do not fill.
    scales = scales.repeat_interleave(-(-blocks // scales.shape[1]), 1)
    if zeros is not None and bool(zeros.any()):
        zeros = zeros.repeat_interleave(-(-blocks // zeros.shape[1]), 1)
        zeros = _pairs(F.pad((zeros + 8).to(torch.uint8), (0, blocks % 2), value=8))
    else:
        zeros = None
    return Packed("MatMulNBits", _pairs(stored).view(rows, blocks, size // 2), scales, zeros, size)


def _pairs(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the lower half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _spread(value: Tensor, rows: int) -> Tensor:
    """What there is one of for each block, [rows, blocks]: a block may be several rows."""
    return value.repeat_interleave(rows // value.shape[0], 0)


_PACKED = {
    "Params4bit": _four_bits,
    "Int8Params": _int8_rows,
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
}


class PackedWeight(StandIn):
    """A quantised weight as ``weight.codes``, ``weight.scales`` and, where there are some, ``weight.zeros``.

    Args:
        weight: What it is made of.
        dtype: Of the model. Scales are in it where they lose nothing but digits, else in fp32.
        keep: Takes each tensor that is made anew, see ``Scratch.keep``.

    Attributes:
        operator: Of ONNX, which reads it.
        block: Values that share a scale there.
    """

    def __init__(
        self, weight: HeldWeight, dtype: torch.dtype, keep: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(weight.where, weight.stored, weight.dtype)
        found = packed(weight)
        self.operator, self.block = found.operator, found.block
        scales = found.scales
        # DequantizeLinear makes values that are rounded after it: its scales may have all digits.
        if found.operator != "DequantizeLinear" and _in_range(scales, dtype):
            scales = scales.to(dtype)
        # Two codes a byte are new where the library has one; others lie where they lay.
        codes = keep(found.codes) if found.operator == "MatMulNBits" else found.codes
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(keep(scales), requires_grad=False)
        zeros = None if found.zeros is None else nn.Parameter(found.zeros, requires_grad=False)
        self.register_parameter("zeros", zeros)

    def product(self, x: Tensor) -> Tensor:
        """See :class:`StandIn`: to be traced, not run."""
        exact = self.operator == "DequantizeLinear"
        product: Tensor = torch.ops.lora_fx.quantized_product(
            x if exact else x.to(self.scales.dtype),
            self.codes,
            self.scales,
            self.zeros,
            self.operator,
            *self.stored.shape,
            self.block,
            self.stored.scheme,
        )
        return product.to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return sum(parameter.nbytes for parameter in self.parameters())


def pack_quantized(twin: nn.Module, dtype: torch.dtype, keep: Callable[[Tensor], Tensor]) -> None:
    """Puts arrays in the place of quantised weights.

    Args:
        twin: A copy that is exported. It is changed.
        dtype: What most of its weights are in.
        keep: Takes each tensor that is made anew, see ``Scratch.keep``.

    Raises:
        ExportError: No operator has the values of a weight.
    """
    known: dict[int, PackedWeight] = {}
    for module in list(twin.modules()):
        for name, child in module._modules.items():
            if not isinstance(child, HeldWeight):
                continue
            if id(child) not in known:
                known[id(child)] = PackedWeight(child, dtype, keep)
            module._modules[name] = known[id(child)]


def stored_formats(model: nn.Module, names: Container[str]) -> tuple[StoredFormat, ...]:
    """What of :func:`pack_quantized` is in a file, one entry a form.

    Args:
        model: The model that was traced: a file may have a part of it.
        names: Those of the file's weights.
    """
    found: dict[tuple[str, str, int | None], StoredFormat] = {}
    seen: set[PackedWeight] = set()
    for name, one in model.named_modules(remove_duplicate=False):
        if not isinstance(one, PackedWeight) or one in seen or f"{name}.codes" not in names:
            continue
        seen.add(one)
        by_row = one.operator == "DequantizeLinear" and one.block == one.shape[1]
        key = (one.stored.scheme, one.operator, None if by_row else one.block)
        before = found.get(key, StoredFormat(*key, weights=0, values=0, bytes=0))
        found[key] = dataclasses.replace(
            before,
            weights=before.weights + 1,
            values=before.values + one.shape.numel(),
            bytes=before.bytes + one.nbytes,
        )
    return tuple(found.values())


def _in_range(scales: Tensor, dtype: torch.dtype) -> bool:
    """Whether scales keep the leading digits of a dtype: none is too small for them, none too large."""
    limits, sizes = torch.finfo(dtype), scales.abs()
    normal = (sizes == 0) | ((sizes >= limits.tiny) & (sizes <= limits.max))
    return bool(normal.all())


torch.library.define(
    "lora_fx::quantized_product",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, str operator, int rows, "
    "int columns, int block, str scheme) -> Tensor",
)


@torch.library.register_fake("lora_fx::quantized_product")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    operator: str,
    rows: int,
    columns: int,
    block: int,
    scheme: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))
