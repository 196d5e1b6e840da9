"""Weights of torchao: tensor subclasses, which any code can use like dense tensors.

====== =========================== ==========================
format scales                      source
====== =========================== ==========================
int8   one for each row            ``Int8WeightOnlyConfig``
int4   one for 32 values of a row  ``IntxWeightOnlyConfig``
====== =========================== ==========================

``int4`` stores values of four bits in a byte each. torchao packs two into a byte only for kernels of CUDA
that round activations to bfloat16, and PEFT refuses those tensors. Use ``nf4`` of bitsandbytes to save
memory. Tensors from other sources can be read, too: with zero points, NF4, and packed four bits.

The library is imported when a weight is stored; a model that has such a weight has imported it already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lora_fx.errors import QuantizationError
from lora_fx.formats.base import (
    BLOCKS,
    LibraryLayers,
    Storage,
    WeightFormat,
    dense_layers,
    import_library,
    is_loadable,
    pack_integers,
)
from lora_fx.formats.grids import CodeGrid, Grid, integer_levels
from lora_fx.ir import NoOperator, OnnxWeight, Quantization, Site

__all__ = ["TorchaoFormat", "TorchaoName"]

TorchaoName: TypeAlias = Literal["nf4", "int8", "int4"]
"""Names of its formats."""


# --- classes of weights ------------------------------------------------------------------------------


_ACTIVATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "Int8Tensor": ("act_quant_kwargs", "act_pre_scale"),
    "IntxUnpackedToInt8Tensor": ("activation_quantization",),
    "Int4Tensor": ("act_pre_scale",),
    "NF4Tensor": (),
}
"""Attributes, by class, that are set if activations are quantized, too. Such weights are not supported."""


def _scheme(weight: Any) -> str | None:
    """Return the name of a weight's format, such as ``int4``; None if the format is not supported."""
    kind = type(weight).__name__
    if kind == "IntxUnpackedToInt8Tensor":
        return {"torch.int4": "int4", "torch.int8": "int8"}.get(str(weight.target_dtype))
    return {"Int8Tensor": "int8", "Int4Tensor": "int4"}.get(kind, "nf4")


# --- requantization in the same format, by the library's own arithmetic, in the dtype of the old weight ---
# A block keeps its scale if its values are in the range of the scale. A new scale would be a little smaller
# or larger each time, because the codes are not symmetric.


def _scales_and_zeros(
    values: Tensor, old: Any, new: Any, codes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return a scale and a zero point for each block: the old ones if the new values are in their range.

    Args:
        values: The new values, [out, in].
        old: The old weight.
        new: The weight that the library makes of the new values.
        codes: The smallest and the largest code.
    """
    rows, columns = old.block_size
    blocks: Tensor = values.float()
    blocks = blocks.reshape(-1, rows, blocks.shape[1] // columns, columns)
    zeros = torch.zeros_like(new.zero_point) if old.zero_point is None else old.zero_point
    low, high = (limit / old.scale + zeros for limit in (blocks.amin((1, 3)), blocks.amax((1, 3))))
    fits = (low >= codes[0] - 0.5) & (high <= codes[1] + 0.5)
    scales = torch.where(fits, old.scale, new.scale.to(old.scale.dtype))
    return scales, torch.where(fits, zeros, new.zero_point)


def _requantize_int8(values: Tensor, old: Any) -> nn.Parameter:
    values, make = values.to(old.dtype), type(old).from_hp
    granularity = _granularity(tuple(old.block_size), tuple(old.shape))
    options = {"mapping_type": _mapping(old.zero_point), "reduce_range": old.reduce_range}
    codes = (-64, 63) if old.reduce_range else (-128, 127)
    scale, zeros = _scales_and_zeros(values, old, make(values, granularity, **options), codes)
    tensor = make(values, granularity, scale=scale, zero_point=zeros, **options)
    return nn.Parameter(tensor, requires_grad=False)


def _requantize_intx(values: Tensor, old: Any) -> nn.Parameter:
    values, make = values.to(old.dtype), type(old).from_hp
    form = (tuple(old.block_size), old.target_dtype)
    bits = 4 if _scheme(old) == "int4" else 8
    new = make(values, *form, mapping_type=_mapping(old.zero_point))
    scale, zeros = _scales_and_zeros(values, old, new, (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    options = {"custom_scale": scale, "custom_zero_point": zeros}
    tensor = make(values, *form, intx_choose_qparams_algorithm=None, **options)
    return nn.Parameter(tensor, requires_grad=False)


def _requantize_int4(values: Tensor, old: Any) -> nn.Parameter:
    tensor = type(old).from_hp(values.to(old.dtype), list(old.block_size))
    return nn.Parameter(tensor, requires_grad=False)


def _requantize_nf4(values: Tensor, old: Any) -> nn.Parameter:
    tensor = type(old).from_tensor(
        values.to(old.dtype).contiguous(), old.block_size, old.scaler_block_size
    )
    return nn.Parameter(tensor, requires_grad=False)


def _granularity(block: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    kinds = sys.modules["torchao"].quantization
    if block == shape:
        return kinds.PerTensor()
    return kinds.PerRow() if block[-1] == shape[-1] else kinds.PerGroup(block[-1])


def _mapping(zero_point: Tensor | None) -> Any:
    """Return the mapping type of a weight, which is not stored: asymmetric if a zero point is not zero."""
    kinds = sys.modules["torchao"].quantization.MappingType
    symmetric = zero_point is None or not zero_point.any()
    return kinds.SYMMETRIC if symmetric else kinds.ASYMMETRIC


_REQUANTIZED: Final[Mapping[str, Callable[[Tensor, Any], nn.Parameter]]] = {
    "Int8Tensor": _requantize_int8,
    "IntxUnpackedToInt8Tensor": _requantize_intx,
    "Int4Tensor": _requantize_int4,
    "NF4Tensor": _requantize_nf4,
}


def _config(how: Storage) -> Any:
    """Return the library's configuration of a format."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if how.block_size is None:
        return Int8WeightOnlyConfig()
    groups = PerGroup(how.block_size)
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)  # type: ignore[attr-defined]


class _Layers(LibraryLayers):
    """Layers of torchao: ``nn.Linear`` with another ``extra_repr``."""

    def describe_model(
        self, model: nn.Module, how: Storage, sites: Sequence[Site], dtype: torch.dtype
    ) -> None:
        """Give a model of transformers a quantizer, with which ``save_pretrained`` writes the tensors.

        ``from_pretrained`` loads the quantized tensors if all of them are in layers.
        """
        library: Any = sys.modules.get("transformers")
        if library is None or not isinstance(model, library.PreTrainedModel):
            return
        from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

        config = library.TorchAoConfig(_config(how), modules_to_not_convert=dense_layers(model))
        if is_loadable(model, sites, nn.Linear, "torchao"):
            model.config.quantization_config = config
        model.__dict__["hf_quantizer"] = TorchAoHfQuantizer(config)

    def settle(self, layer: nn.Module) -> None:
        """Remove the ``extra_repr`` of a layer: it is bound to the original layer and cannot be pickled."""
        function = getattr(layer.__dict__.get("extra_repr"), "__func__", None)
        if str(getattr(getattr(function, "func", function), "__module__", "")).startswith(
            "torchao."
        ):
            del layer.__dict__["extra_repr"]


class TorchaoFormat(WeightFormat):
    """The format of ``Int8Tensor``, ``IntxUnpackedToInt8Tensor``, ``Int4Tensor`` and ``NF4Tensor``."""

    library = "torchao"
    title = "int8, int4, NF4"
    names = ("int8", "int4")
    classes = frozenset(_ACTIVATIONS)
    kernel_packages = frozenset({"torchao"})
    blocks: ClassVar[tuple[int, ...]] = (16, *BLOCKS)
    any_dtype = False
    layers: ClassVar[LibraryLayers] = _Layers()

    def owns(self, cls: type) -> bool:
        """See :class:`WeightFormat`."""
        return cls.__module__.startswith("torchao.")

    def describe(self, weight: Any) -> Quantization | None:
        """See :class:`WeightFormat`."""
        scheme, activations = _scheme(weight), _ACTIVATIONS[type(weight).__name__]
        if scheme is None or weight.dim() != 2:
            return None
        if any(getattr(weight, name) is not None for name in activations):
            return None
        shape, double = (int(weight.shape[0]), int(weight.shape[1])), scheme == "nf4"
        block = int(weight.block_size if double else weight.block_size[-1])
        size = None if block == shape[1] and not double else block
        bits = 8 if scheme == "int8" else 4
        return Quantization(scheme, bits, "torchao", shape, weight.dtype, size, double)

    def values(self, weight: Any, dtype: torch.dtype) -> Tensor:
        """See :class:`WeightFormat`."""
        dequantized: Tensor
        kind = type(weight).__name__
        if kind == "NF4Tensor":
            dequantized = weight.get_original_weight()
        elif kind == "Int8Tensor":
            # Its scales are fp32 for any dtype of the values, and it supports nothing wider.
            dequantized = weight.dequantize(torch.float32 if dtype == torch.float64 else dtype)
        else:
            dequantized = weight.dequantize()
        return dequantized

    def multiplies(self, weight: Any, dtype: torch.dtype) -> bool:
        """See :class:`WeightFormat`."""
        name = type(weight).__name__
        # torchao's own function for nf4 dequantizes, too, and breaks the graph under torch.compile.
        if name == "NF4Tensor":
            return False
        # ``model.half()`` does not convert its scales, and its product needs a single dtype.
        return name != "IntxUnpackedToInt8Tensor" or bool(weight.dtype == dtype)

    def storage(
        self,
        name: str,
        *,
        block_size: int | None,
        double: bool | None,
        compute_dtype: torch.dtype | None,
    ) -> Storage:
        """See :class:`WeightFormat`."""
        options: dict[str, object] = {"double": double, "compute_dtype": compute_dtype}
        if name == "int8":
            options["block_size"] = block_size
        for key, value in options.items():
            if value is not None:
                fits = "'nf4', 'fp4' and 'int4' take it" if key == "block_size" else "'nf4' does"
                raise QuantizationError(f"{key}={value} means nothing for {name!r}: {fits}")
        size = None if name == "int8" else 32 if block_size is None else block_size
        if size is not None and (size < 2 or size & (size - 1)):
            raise QuantizationError(f"block_size={size}: it has to be a power of two, as 32 or 128")
        return Storage(name, size, chosen=block_size is not None)

    def load(self, name: str) -> Any:
        """See :class:`WeightFormat`."""
        return import_library(self.library, name)

    def bytes(self, how: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """See :class:`WeightFormat`."""
        rows, columns = shape
        values, block = rows * columns, how.block_size
        if block is None:
            return values + rows * (4 + 1)
        return values + values // block * (
            dtype.itemsize + 1
        )  # scales have the dtype of the values

    def pack(self, values: Tensor, how: Storage) -> nn.Parameter:
        """See :class:`WeightFormat`."""
        self.load(how.format)
        from torchao.quantization import quantize_

        layer = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(values, requires_grad=False)
        quantize_(nn.ModuleList([layer]), _config(how))
        return nn.Parameter(layer.weight.data, requires_grad=False)

    def requantize(self, values: Tensor, weight: Any) -> nn.Parameter:
        """See :class:`WeightFormat`."""
        return _REQUANTIZED[type(weight).__name__](values, weight)

    def grid(self, weight: Any) -> Grid | None:
        """See :class:`WeightFormat`. None except for integer formats: only their scales can be kept."""
        name = type(weight).__name__
        if name not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            return None
        levels = integer_levels(4 if _scheme(weight) == "int4" else 8)
        if getattr(weight, "reduce_range", False):
            levels = integer_levels(7)
        rows, columns = weight.block_size
        shape = (weight.shape[0] // rows, weight.shape[1] // columns)
        zeros = None if weight.zero_point is None else weight.zero_point.reshape(shape)
        scales = weight.scale.reshape(shape)
        return CodeGrid.of_blocks(levels, scales, weight.shape, columns, zeros, rows)

    def widened(self, parameter: nn.Parameter) -> nn.Parameter:
        """See :class:`WeightFormat`."""
        tensor: Any = parameter.detach()
        kind = type(tensor)
        if kind.__name__ == "IntxUnpackedToInt8Tensor":
            return nn.Parameter(tensor.to(torch.float32), requires_grad=False)
        if kind.__name__ == "Int8Tensor":  # its scales are fp32 in any case
            wide = kind(
                tensor.qdata, tensor.scale, tensor.block_size, torch.float32, tensor.zero_point
            )
            return nn.Parameter(wide, requires_grad=False)
        return parameter

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """See :class:`WeightFormat`."""
        name = type(weight).__name__
        if name in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            block = int(weight.block_size[-1])
            return pack_integers(weight.qdata, weight.scale, weight.zero_point, block, stored.bits)
        reasons = {
            "NF4Tensor": "torchao rounds the table of NF4 to four digits, and MatMulBnb4 has that of "
            "bitsandbytes",
            "Int4Tensor": "its zero points are no integers",
        }
        return NoOperator(
            f"is stored as {stored}, which no operator of ONNX Runtime has to the last digit: {reasons[name]}"
        )
