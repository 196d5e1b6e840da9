"""HQQ (half-quadratic quantization): the layers of the library hqq, and weights that it quantizes.

A layer has codes of 1 to 8 bits (``W_q``). The matrix is reshaped, and the values of a row (axis 1) or of a
column (axis 0) share a scale: they are a group. The zero points are no integers. Scales and zero points have
the dtype of the product, in which the library computes ``(code - zero) · scale``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lora_fx.errors import QuantizationError
from lora_fx.extras import load_optional
from lora_fx.formats.base import (
    LibraryLayers,
    Storage,
    import_library,
    multiply_values,
    pack_integers,
)
from lora_fx.formats.grids import CodeGrid, Grid, integer_levels
from lora_fx.formats.packed import PackedFormat, PackedLayers, PackedTensor, Parts
from lora_fx.ir import (
    NoOperator,
    OnnxBuilder,
    OnnxOperator,
    OnnxProduct,
    OnnxWeight,
    Quantization,
)

__all__ = ["HqqFormat", "HqqName", "HqqTensor", "Settings"]

HqqName: TypeAlias = Literal["hqq4", "hqq8", "hqq3", "hqq2"]
"""Names of its formats."""

_MODULE: Final = "hqq.core.quantize"
_CODES_IN_A_BYTE: Final = {4: 2, 2: 4}


@functools.cache
def _library() -> Any:
    return load_optional(_MODULE, "a weight of HQQ", "lora-fx[hqq]", error=QuantizationError)


class HqqTensor(PackedTensor):
    """A weight of ``HQQLinear``. Its options are :class:`Settings`."""


class Settings(NamedTuple):
    """The settings with which a weight was quantized, by the library's names.

    Attributes:
        nbits: Bits of a code; 1.58 for three values.
        group_size: Values that share a scale.
        axis: 1 if a group is a row of [values / group_size, group_size], 0 if a group is a column of
            [group_size, values / group_size].
        channel_wise: False if all values share a scale.
        optimize: True if the zero points were optimized.
        round_zero: True if the zero points were rounded to integers before they were optimized.
    """

    nbits: float
    group_size: int
    axis: int
    channel_wise: bool = True
    optimize: bool = True
    round_zero: bool = False

    @property
    def packing(self) -> str:
        """The library's name for the order of the codes in ``W_q``."""
        packing: str = _library().Quantizer.bit_to_packing[self.nbits]
        return packing

    def grouped(self, values: Tensor) -> Tensor:
        """Reshape a matrix so that each group is a row (axis 1) or a column (axis 0)."""
        if not self.channel_wise:
            return values
        return values.reshape((-1, self.group_size) if self.axis else (self.group_size, -1))

    def encode(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes of grouped values."""
        return (groups / scale + zero).round().clamp(0, round(2**self.nbits - 1))

    def error(self, groups: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the squared error of each group, in the shape of the scales."""
        error = ((codes.to(scale.dtype) - zero) * scale - groups).square()
        axes = (self.axis,) if self.channel_wise else (0, 1)
        return error.sum(axes, keepdim=self.channel_wise)


class _Layers(PackedLayers):
    """``HQQLinear``, and the layers of kernels that replace it."""

    module = _MODULE

    def owns(self, cls: type[nn.Module]) -> bool:
        """See :class:`LibraryLayers`."""
        return super().owns(cls) or cls.__module__.startswith("hqq.backends.")

    def objection(self, layer: nn.Module, named: str) -> str | None:
        """See :class:`LibraryLayers`."""
        if super().owns(type(layer)):
            return f"{named} has codes that are not packed: quantize the model with bitpack=True"
        return f"a kernel of HQQ has repacked it ({named}): rewrite the model before you patch it"

    def parts(self, layer: nn.Module) -> Parts | None:
        """See :class:`PackedLayers`."""
        of: Any = layer
        if type(layer).__name__ != "HQQLinear" or not super().owns(type(layer)):
            return None
        if not of.ready or not of.meta["packing"]:
            return None
        meta, codes = of.meta, of.W_q.detach()
        if meta["view_as_float"]:
            codes = codes.view(meta["unpack_view_dtype"])
        how = (of.quant_config or {}).get("weight_quant_params", {})
        options = {name: how[name] for name in Settings._field_defaults if name in how}
        settings = Settings(meta["nbits"], meta["group_size"], meta["axis"], **options)
        scale, zero = (_plain(meta, name, codes.device) for name in ("scale", "zero"))
        tensors = {"W_q": codes, "scale": scale, "zero": zero}
        return Parts(tensors, tuple(meta["shape"]), settings, scale.dtype)


def _plain(meta: Mapping[str, Any], name: str, device: torch.device) -> Tensor:
    """Return the scales or the zero points of a layer as an ordinary tensor on a device.

    An older version of the library may have quantized and offloaded them. The library optimizes zero points
    in inference mode. Nothing can be written into such tensors, so they are copied.
    """
    quantized = meta[f"quant_{name}"]
    if "zero_scale" in meta:
        tensor: Tensor = meta["zero_scale"][("zero", "scale").index(name)]
    else:
        tensor = meta[f"{name}_q" if quantized else name]
    if quantized:
        tensor = _library().Quantizer.dequantize(tensor.to(device), meta[f"meta_{name}"])
    return tensor.clone() if tensor.is_inference() else tensor.to(device)


def _subtract_and_scale(build: OnnxBuilder, product: OnnxProduct) -> Any:
    codes, scales, zeros = product.arrays
    values = build.op("Sub", [build.op("CastLike", [codes, scales]), zeros])
    values = build.op("Mul", [values, scales])
    shape = build.ints([product.rows, product.columns])
    return multiply_values(build, product, build.op("Reshape", [values, shape]))


_SUB_MUL: Final = OnnxOperator("Sub, Mul", _subtract_and_scale, dequantizes=True)
"""``(code - zero) · scale`` for groups of any shape, and zero points that are no integers of 8 bits."""


class HqqFormat(PackedFormat):
    """The format of hqq."""

    library = "hqq"
    title = "HQQ"
    names = ("hqq4", "hqq8", "hqq3", "hqq2")
    blocks = (64, 16, 32, 128, 256)
    tensor = HqqTensor
    layers: ClassVar[LibraryLayers] = _Layers()
    operators = (_SUB_MUL,)

    def describe(self, weight: Any) -> Quantization:
        """See :class:`WeightFormat`."""
        bits = math.ceil(weight.options.nbits)
        return self.describe_as(weight, f"hqq{bits}", bits, weight.options.group_size)

    def decode(self, weight: Any) -> Tensor:
        """See :class:`PackedFormat`."""
        settings: Settings = weight.options
        meta = {**settings._asdict(), **weight.parts, "packing": settings.packing}
        meta |= {"shape": weight.shape, "view_as_float": False}
        values: Tensor = _library().Quantizer.dequantize(
            weight.W_q, {**meta, "compute_dtype": weight.scale.dtype}
        )
        return values

    def saved_settings(self, weight: Any) -> Mapping[str, Tensor]:
        """See :class:`PackedFormat`."""
        library, packing = _library(), weight.options.packing
        settings = {
            **weight.options._asdict(),
            "shape": torch.Size(weight.shape),
            "packing": packing,
            "unpack_view_dtype": library.Quantizer.unpack_view_dtype[packing],
            "compute_dtype": weight.scale.dtype,
            **dict.fromkeys(("view_as_float", "quant_scale", "quant_zero", "offload_meta"), False),
            **dict.fromkeys(("encoded_state_dict", "stores_quant_config"), True),
        }
        return {name: library.encode_safetensor_type(value) for name, value in settings.items()}

    # --- new weights ---

    def load(self, name: str) -> Any:
        """See :class:`WeightFormat`."""
        return import_library(_MODULE, name, "lora-fx[hqq]")

    def objection(self, how: Storage, shape: Sequence[int], dtype: torch.dtype) -> str | None:
        """See :class:`WeightFormat`. HQQ packs codes of several groups into a byte."""
        assert how.block_size is not None
        together = _CODES_IN_A_BYTE.get(int(how.format[3:]), 1)
        groups = math.prod(shape) // how.block_size
        if groups % together:
            return f"HQQ stores {together} groups together, and it has {groups}: use hqq8"
        return super().objection(how, shape, dtype)

    def pack(self, values: Tensor, how: Storage) -> nn.Parameter:
        """See :class:`WeightFormat`. The settings are those of ``BaseQuantizeConfig``."""
        assert how.block_size is not None
        bits = int(how.format[3:])
        settings = Settings(bits, how.block_size, 1, round_zero=bits == 4)
        return _quantized(values, settings, values.dtype)

    def requantize(self, values: Tensor, weight: Any) -> nn.Parameter:
        """See :class:`WeightFormat`. A group keeps scale and zero point unless new ones reduce its error."""
        settings: Settings = weight.options
        again: Any = _quantized(values.float(), settings, weight.scale.dtype)
        groups = settings.grouped(values)
        old_grid, new_grid = ((tensor.scale, tensor.zero) for tensor in (weight, again))
        # Keep the codes of unchanged values. In bf16 the values of 8-bit codes are rounded by up to half a
        # step, so that the nearest code may be another one.
        same = groups == settings.grouped(self.decode(weight))
        codes = torch.where(same, _codes(weight), settings.encode(groups, *old_grid))
        new_codes = settings.encode(groups, *new_grid)
        old_error = settings.error(groups, codes, *old_grid)
        keep = old_error <= settings.error(groups, new_codes, *new_grid)
        scale, zero = (
            torch.where(keep, old, new) for old, new in zip(old_grid, new_grid, strict=True)
        )
        pack = _library().Quantizer.pack[settings.packing]
        tensors = {"W_q": pack(torch.where(keep, codes, new_codes)), "scale": scale, "zero": zero}
        parameter: nn.Parameter = weight.with_parts(tensors)
        return parameter

    def grid(self, weight: Any) -> Grid | None:
        """See :class:`WeightFormat`. None if the groups are not parts of a row."""
        settings: Settings = weight.options
        if settings.axis != 1 or not settings.channel_wise:
            return None
        levels = integer_levels(math.ceil(settings.nbits), signed=False)
        scales, zeros = (part.reshape(weight.shape[0], -1) for part in (weight.scale, weight.zero))
        return CodeGrid.of_blocks(levels, scales, weight.shape, settings.group_size, zeros)

    # --- export ---

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """See :class:`WeightFormat`."""
        settings: Settings = weight.options
        codes, (rows, columns) = _codes(weight), stored.shape
        group, scale, zero = settings.group_size, weight.scale, weight.zero
        if settings.axis == 1 and settings.channel_wise and columns % group == 0:
            lines, scales, zeros = (part.reshape(rows, -1) for part in (codes, scale, zero))
            packed = pack_integers(lines, scales, zeros, group, stored.bits)
            if isinstance(packed, OnnxWeight):
                return packed
        return OnnxWeight(_SUB_MUL, codes, scale, zero, group)


def _codes(weight: Any) -> Tensor:
    """Return the codes of a weight as uint8, in the shape in which groups are rows or columns."""
    settings: Settings = weight.options
    codes: Tensor = _library().Quantizer.unpack[settings.packing](weight.W_q)
    rows = settings.grouped(torch.empty(weight.shape, device="meta")).shape[0]
    return codes[:rows]  # 3 bits are stored in whole words of ten codes


def _quantized(values: Tensor, settings: Settings, dtype: torch.dtype) -> nn.Parameter:
    """Return a frozen parameter with these values, quantized as an ``HQQLinear`` of a dtype does."""
    how = settings._asdict()
    if values.is_meta:  # the optimizer compares errors, which have no values there
        how["optimize"] = False
    codes, meta = _library().Quantizer.quantize(values, **how, device=str(values.device))
    # See _plain: zero points may be tensors of inference mode.
    scale, zero = (meta[name].to(dtype).clone() for name in ("scale", "zero"))
    tensors = {"W_q": codes, "scale": scale, "zero": zero}
    weight = HqqTensor(Parts(tensors, values.shape, settings), dtype)
    return nn.Parameter(weight, requires_grad=False)
