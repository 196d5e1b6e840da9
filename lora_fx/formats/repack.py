"""Other values in the format that a quantised weight has: what a merge puts in its place.

The result is a parameter of the same class, made by the library's own arithmetic from the values in fp32 (for
torchao, in the dtype that its tensor stands for). Nothing of the old scales is kept: they are those of the
new values.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import QuantizationError
from lora_fx.formats.weights import dense, held, quantization_of

__all__ = ["requantized"]


def requantized(values: Tensor, weight: nn.Parameter) -> nn.Parameter:
    """A frozen parameter that holds ``values`` as ``weight`` holds its own.

    Args:
        values: [out, in].
        weight: A quantised parameter of that shape; it is not changed.

    Raises:
        QuantizationError: If the format cannot hold the values, or its library cannot make it here.
    """
    found, old = quantization_of(weight), held(weight)
    if found is None:
        raise QuantizationError(f"a {type(weight).__name__} is no quantised weight that is known")
    try:
        made = _MADE[type(old).__name__](values, old)
    except Exception as error:  # whatever a library raises for what it has no kernel for
        raise QuantizationError(
            f"{found.library} cannot make {found} here ({type(error).__name__}: {error})"
        ) from error
    if not torch.isfinite(dense(made)).all():
        raise QuantizationError(f"{found} cannot hold them: not all of them are finite there")
    return made


def _four_bits(values: Tensor, old: Any) -> nn.Parameter:
    functional, state = sys.modules["bitsandbytes"].functional, old.quant_state
    data, made = functional.quantize_4bit(
        values.to(torch.float32).contiguous(),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=old.dtype,
    )
    made.dtype = state.dtype
    return _like(old, data, quant_state=made, bnb_quantized=True, module=None)


def _eight_bits(values: Tensor, old: Any) -> nn.Parameter:
    # The library rounds to half precision before it divides: here the values are rounded once.
    wide = values.to(torch.float32)
    largest = wide.abs().amax(1)
    steps = torch.round(wide * (127 / largest.clamp_min(torch.finfo(wide.dtype).tiny))[:, None])
    data = steps.to(torch.int8)
    return _like(old, data, CB=data, SCB=largest, row_scales=largest)


def _like(old: Any, data: Tensor, **attributes: Any) -> nn.Parameter:
    """A parameter of bitsandbytes, whose formats are attributes of it."""
    made: nn.Parameter = torch.Tensor._make_subclass(type(old), data, False)
    made.__dict__.update({name: copy.copy(value) for name, value in old.__dict__.items()})
    made.__dict__.update(attributes)
    return made


def _int8(values: Tensor, old: Any) -> nn.Parameter:
    made = type(old).from_hp(
        values.to(old.dtype),
        _granularity(tuple(old.block_size), tuple(old.shape)),
        mapping_type=_mapping(old.zero_point),
        reduce_range=old.reduce_range,
    )
    return nn.Parameter(made, requires_grad=False)


def _intx(values: Tensor, old: Any) -> nn.Parameter:
    values, sizes = values.to(old.dtype), tuple(old.block_size)
    made = type(old).from_hp(values, sizes, old.target_dtype, mapping_type=_mapping(old.zero_point))
    if made.scale.dtype != old.scale.dtype:
        made = type(old).from_hp(
            values,
            sizes,
            old.target_dtype,
            intx_choose_qparams_algorithm=None,
            custom_scale=made.scale.to(old.scale.dtype),
            custom_zero_point=made.zero_point,
        )
    return nn.Parameter(made, requires_grad=False)


def _int4(values: Tensor, old: Any) -> nn.Parameter:
    made = type(old).from_hp(values.to(old.dtype), list(old.block_size))
    return nn.Parameter(made, requires_grad=False)


def _nf4(values: Tensor, old: Any) -> nn.Parameter:
    made = type(old).from_tensor(
        values.to(old.dtype).contiguous(), old.block_size, old.scaler_block_size
    )
    return nn.Parameter(made, requires_grad=False)


def _granularity(block: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    kinds = sys.modules["torchao"].quantization
    if block == shape:
        return kinds.PerTensor()
    return kinds.PerRow() if block[-1] == shape[-1] else kinds.PerGroup(block[-1])


def _mapping(zero_point: Tensor | None) -> Any:
    """Whether zero is a level of its own is not written down: zero points other than 0 say that it is not."""
    kinds = sys.modules["torchao"].quantization.MappingType
    symmetric = zero_point is None or not zero_point.any()
    return kinds.SYMMETRIC if symmetric else kinds.ASYMMETRIC


_MADE: dict[str, Callable[[Tensor, Any], nn.Parameter]] = {
    "Params4bit": _four_bits,
    "Int8Params": _eight_bits,
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "NF4Tensor": _nf4,
}
