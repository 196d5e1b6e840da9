"""Weights of compressed-tensors, in which llm-compressor writes checkpoints: packed integers, FP8, NVFP4.

The library adds its tensors to an ``nn.Linear`` (``weight_packed``, ``weight_scale`` and others), and a
``quantization_scheme`` that says how to read them. On the first call of a model it would decompress all
weights; in a copy that lora_fx makes, they stay compressed, and the layer is an ``nn.Linear`` again.

A scheme may round activations, too. The library does so without a gradient. Here, the product is computed
with the values of the weight only, as in the model that ``CompressedTensorsConfig(dequantize=True)`` loads.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn

from lora_fx.errors import QuantizationError
from lora_fx.extras import load_optional
from lora_fx.formats.base import DEQUANTIZE_LINEAR, LibraryLayers, pack_integers
from lora_fx.formats.grids import (
    CodeGrid,
    Grid,
    float8_levels,
    fp4_levels,
    integer_levels,
)
from lora_fx.formats.packed import PackedFormat, PackedLayers, PackedTensor, Parts
from lora_fx.ir import NoOperator, OnnxWeight, Quantization
from lora_fx.torch_private import forward_pre_hooks

__all__ = ["CompressedTensor", "CompressedTensorsFormat", "options_of", "pack_zero_points"]


class CompressedTensor(PackedTensor):
    """A compressed weight. Its options are a :class:`_Scheme`."""


class _Scheme(NamedTuple):
    """The storage of a weight.

    Attributes:
        name: The type of the values, such as ``int4``.
        bits: Bits of a value.
        block: Values of a row that share a scale; None for all values of a row.
        rows: Rows that share a scale.
        compressor: The name of the library's compressor.
        scheme: The library's scheme, as JSON.
    """

    name: str
    bits: int
    block: int | None
    rows: int
    compressor: str
    scheme: str


def _library(name: str) -> Any:
    """Import a module of compressed-tensors by name. A process that unpickles a model may not have it yet."""
    return load_optional(
        f"compressed_tensors.{name}",
        "a weight of compressed-tensors",
        "lora-fx[quant]",
        error=QuantizationError,
    )


@functools.cache
def _scheme_of(text: str) -> Any:
    return _library("quantization").QuantizationScheme.model_validate_json(text)


def _compressor(options: _Scheme) -> Any:
    return _library("compressors").BaseCompressor.get_value_from_registry(options.compressor)


def _text(choice: Any) -> str:
    """Return the text of a setting, which schemes of the library store as an enum member or as text."""
    return str(getattr(choice, "value", choice))


def options_of(scheme: Any, layer: nn.Linear) -> _Scheme | None:
    """Return the storage of a layer's weight; None if the strategy of its scheme is not known."""
    weights, shape = scheme.weights, (layer.out_features, layer.in_features)
    strategy = _text(weights.strategy)
    forms = {
        "tensor": (math.prod(shape), shape[0]),
        "channel": (None, 1),
        "group": (weights.group_size, 1),
        "tensor_group": (weights.group_size, 1),
        "block": ((weights.block_structure or (1, 1))[1], (weights.block_structure or (1, 1))[0]),
    }
    if strategy not in forms:
        return None
    kind = "int" if _text(weights.type) == "int" else "fp"
    compressor = scheme.format or _library("compressors.format").infer_module_format(
        type(layer), scheme
    )
    return _Scheme(
        f"{kind}{weights.num_bits}",
        weights.num_bits,
        *forms[strategy],
        _text(compressor),
        scheme.model_dump_json(),
    )


_HOOK: Final = "ct_decompress_hook"
"""The hook with which the library decompresses a model, and the attribute that has its handle."""


class _Layers(PackedLayers):
    """``nn.Linear`` with tensors and attributes of the library."""

    def parts(self, layer: nn.Module) -> Parts | None:
        """See :class:`PackedLayers`."""
        scheme, status = (
            getattr(layer, f"quantization_{key}", None) for key in ("scheme", "status")
        )
        compressed = _text(status) == "compressed"
        if (
            not compressed
            or not isinstance(layer, nn.Linear)
            or scheme is None
            or not scheme.weights
        ):
            return None
        named = itertools.chain(layer._parameters.items(), layer._buffers.items())
        tensors = {name: value for name, value in named if value is not None and name != "bias"}
        options = options_of(scheme, layer)
        if options is None:
            return None
        return Parts(tensors, (layer.out_features, layer.in_features), options)

    def quantizers(self) -> dict[str, type]:
        """See :class:`LibraryLayers`."""
        from lora_fx.formats.compressed_experts import experts_quantizer

        return {"compressed-tensors": experts_quantizer()}

    def adopt(self, model: nn.Module) -> None:
        """See :class:`PackedLayers`. Also remove the library's hook, unless other weights still need it."""
        super().adopt(model)
        compressed = False
        for layer in model.modules():
            scripted = isinstance(layer, torch.jit.ScriptModule)
            if not scripted and isinstance(layer._parameters.get("weight"), CompressedTensor):
                for name in ("forward", "quantization_scheme", "quantization_status"):
                    layer.__dict__.pop(name, None)
            compressed = compressed or "quantization_scheme" in layer.__dict__
        for module in () if compressed else model.modules():
            if module.__dict__.pop(_HOOK, None) is not None:
                hooks = forward_pre_hooks(module)
                for key in [k for k, hook in hooks.items() if hook.__name__ == _HOOK]:
                    del hooks[key]


def pack_zero_points(model: nn.Module) -> None:
    """Change zero points on the meta device to their packed shape, before a checkpoint is loaded.

    The library (0.20) leaves them in the shape of unpacked zero points.
    """
    for layer in model.modules():
        zeros, packed = (
            layer._parameters.get(f"weight_{name}") for name in ("zero_point", "packed")
        )
        if zeros is None or packed is None or not zeros.is_meta or zeros.dtype == torch.int32:
            continue
        scheme: Any = layer.quantization_scheme
        shape = (math.ceil(zeros.shape[0] * scheme.weights.num_bits / 32), *zeros.shape[1:])
        empty = torch.empty(shape, dtype=torch.int32, device="meta")
        layer._parameters["weight_zero_point"] = nn.Parameter(empty, requires_grad=False)


class CompressedTensorsFormat(PackedFormat):
    """The format of compressed-tensors."""

    library = "compressed-tensors"
    title = "packed integers (W4A16), W8A8, FP8, MXFP8, MXFP4, NVFP4"
    tensor = CompressedTensor
    layers: ClassVar[LibraryLayers] = _Layers()

    def describe(self, weight: Any) -> Quantization:
        """See :class:`WeightFormat`."""
        options = weight.options
        return self.describe_as(weight, options.name, options.bits, options.block)

    def decode(self, weight: Any) -> Tensor:
        """See :class:`PackedFormat`."""
        parts, options = weight.parts, weight.options
        if "weight_shape" in parts:  # a compiler cannot read numbers from a tensor
            parts["weight_shape"] = weight.shape
        values: Tensor = _compressor(options).decompress(parts, _scheme_of(options.scheme))[
            "weight"
        ]
        return values

    def requantize(self, values: Tensor, weight: Any) -> nn.Parameter:
        """See :class:`WeightFormat`. Values that share a scale keep it if they are in its range."""
        options, old = weight.options, weight.parts
        scheme, library = _scheme_of(options.scheme), _library("quantization.utils")
        values, scale = values.float(), old["weight_scale"]
        scales, zeros = _scales_and_zeros(weight)
        factor = old.get("weight_global_scale")
        lowest, highest = _extremes(values, options)
        smallest, largest = library.calculate_range(scheme.weights, values.device)
        step = scales if factor is None else scales / factor
        # Values that the library has rounded to half precision may be a little outside of the range.
        slack = 0.5 if options.name.startswith("int") else largest / 32
        fits = lowest >= (smallest - zeros - slack) * step
        fits &= highest <= (largest - zeros + slack) * step
        if not bool(fits.all()):
            if factor is not None:  # all scales depend on it
                factor, fits = library.generate_gparam(*values.aminmax()), fits & False
            new, new_zeros = library.calculate_qparams(
                lowest, highest, scheme.weights, global_scale=factor
            )
            new, new_zeros = new.reshape(scales.shape), new_zeros.reshape(scales.shape)
            if scale.is_floating_point():  # codes belong to the scales as they are stored
                new = new.to(scale.dtype)
            scales = torch.where(fits, scales, new.float())
            zeros = torch.where(fits, zeros, new_zeros.float())
        parts = {"weight": values, "weight_scale": scales.reshape(scale.shape)}
        parts["weight_zero_point"] = zeros.to(torch.int8).reshape(scale.shape)
        if factor is not None:
            parts["weight_global_scale"] = factor
        tensors = {**old, **_compressor(options).compress(parts, scheme)}
        parameter: nn.Parameter = weight.with_parts(
            {name: tensors[name].to(old[name].dtype) for name in old}
        )
        return parameter

    def grid(self, weight: Any) -> Grid | None:
        """See :class:`WeightFormat`."""
        options, factor = weight.options, weight.parts.get("weight_global_scale")
        if options.name.startswith("int"):
            levels = integer_levels(options.bits)
        elif options.bits == 8:
            levels = float8_levels(torch.float8_e4m3fn)
        else:
            levels = fp4_levels()
        scales, zeros = _scales_and_zeros(weight)
        scales = scales if factor is None else scales / factor
        return CodeGrid.of_blocks(levels, scales, weight.shape, options.block, zeros, options.rows)

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """See :class:`WeightFormat`."""
        parts, options, (rows, columns) = weight.parts, weight.options, stored.shape
        scales, zeros = _scales_and_zeros(weight)
        line = columns // scales.shape[1]
        if options.compressor == "pack-quantized":
            unpack = _library("compressors.pack_quantized.helpers").unpack_from_int32
            codes = unpack(parts["weight_packed"], options.bits, stored.shape)
        elif options.compressor == "mxfp4-pack-quantized":
            unpack = _library("compressors.nvfp4.helpers").unpack_fp4_from_uint8
            # The values of FP4 are 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
            codes = (unpack(parts["weight_packed"], rows, columns) * 2).to(torch.int8)
            scales = scales / 2
        elif "weight" in parts and line * scales.shape[1] == columns:
            codes = parts["weight"]
        else:
            return NoOperator(
                f"is stored as {stored}, which the library rounds to half precision, and no operator of ONNX "
                "does"
            )
        if codes.dtype == torch.int8:
            return pack_integers(codes, scales, zeros, line, 4 if options.name == "int4" else 8)
        scales = scales.float().repeat_interleave(options.rows, 0)[:rows]
        return OnnxWeight(DEQUANTIZE_LINEAR, codes.reshape(-1, line), scales.flatten(), None, line)


def _scales_and_zeros(weight: Any) -> tuple[Tensor, Tensor]:
    """Return scales and zero points in fp32, in the shape [blocks of rows, blocks of columns]."""
    parts, options = weight.parts, weight.options
    scales, zeros = parts["weight_scale"], parts.get("weight_zero_point")
    if scales.dtype == torch.uint8:  # exponents of two
        scales = scales.view(torch.float8_e8m0fnu)
    scales = scales.float().reshape(-(-weight.shape[0] // options.rows), -1)
    if zeros is None:
        return scales, torch.zeros_like(scales)
    if options.compressor == "pack-quantized":
        unpack = _library("compressors.pack_quantized.helpers").unpack_from_int32
        shape = (weight.shape[0], scales.shape[1])
        zeros = unpack(zeros, options.bits, shape, packed_dim=0)
    return scales, zeros.float().reshape(scales.shape)


def _extremes(values: Tensor, options: _Scheme) -> tuple[Tensor, Tensor]:
    """Return the minimum and the maximum of each block of values that has one scale.

    Both results have the shape of the scales: [blocks of rows, blocks of columns].
    """
    rows, columns = values.shape
    block = min(options.block or columns, columns)
    padded = nn.functional.pad(values, (0, -columns % block, 0, -rows % options.rows))
    shape = (padded.shape[0] // options.rows, options.rows, padded.shape[1] // block, block)
    blocks = padded.reshape(shape)
    return blocks.amin((1, 3)), blocks.amax((1, 3))
