"""FP8 with a scale for each block, as transformers loads it: DeepSeek-V3, Qwen3-FP8 and others.

``FP8Linear`` has codes of float8_e4m3fn and ``weight_scale_inv``, one scale for 128 × 128 values, as fp32 or
as a power of two. A layer without blocks has one scale.

The kernels of transformers also round activations to FP8, and run on GPUs only. Here, the product is computed
with the values of the weight, as in the dequantized model that ``from_pretrained`` loads on a CPU.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lora_fx.formats.base import DEQUANTIZE_LINEAR, LibraryLayers, quantization_of
from lora_fx.formats.grids import CodeGrid, Grid, float8_levels
from lora_fx.formats.packed import (
    PackedFormat,
    PackedLayers,
    PackedTensor,
    Parts,
    dtype_of_plain,
)
from lora_fx.formats.stacks import become_experts, dense_twins, stack_parts
from lora_fx.formats.weights import quantized_linear
from lora_fx.ir import NoOperator, OnnxWeight, Quantization

__all__ = ["FP8BlockTensor", "FineGrainedFP8Format"]

fx.wrap("quantized_linear")

_MODULE: Final = "transformers.integrations.finegrained_fp8"
_CODES: Final = torch.float8_e4m3fn


class FP8BlockTensor(PackedTensor):
    """A weight of ``FP8Linear``. Its option is the block, (rows, columns), or None for a single scale."""


def _linear(self: Any, input: Tensor) -> Any:  # noqa: A002  as the library names it
    return quantized_linear(input, self.weight, self.bias)


class _Layers(PackedLayers):
    """``FP8Linear``, ``FP8GroupedLinear``, ``FP8Experts`` and ``FP8Embedding``."""

    module = _MODULE
    attributes = (
        "activation_scheme",
        "block_size",
        "has_bias",
        "_deepgemm_disabled",
        "_hf_quantized_needs_local_tp",
    )

    def _is_linear(self, cls: type[nn.Module]) -> bool:
        return cls is getattr(sys.modules.get(_MODULE), "FP8Linear", None)

    def forward(self, cls: type[nn.Module]) -> Callable[..., Any] | None:
        """See :class:`LibraryLayers`."""
        return _linear if self._is_linear(cls) else None

    def setup(self, layer: nn.Module) -> tuple[Any, ...]:
        """See :class:`LibraryLayers`."""
        return quantization_of(layer._parameters["weight"]), layer._parameters.get("bias") is None

    def plain(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        """See :class:`LibraryLayers`."""
        return nn.Linear if self._is_linear(cls) else None

    def parts(self, layer: nn.Module) -> Parts | None:
        """See :class:`PackedLayers`."""
        weight, names = layer._parameters.get("weight"), ("weight", "weight_scale_inv")
        if not self._is_linear(type(layer)) or weight is None or weight.dtype != _CODES:
            return None
        tensors = {name: layer._parameters[name] for name in (*names, "activation_scale")}
        block: Any = layer.block_size
        options = None if block is None else tuple(block)
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return Parts(present, weight.shape, options)

    def adopt(self, model: nn.Module) -> None:
        """See :class:`PackedLayers`. ``FP8Experts`` become the experts of the dense model, with stacks."""
        super().adopt(model)
        for layer, plain in dense_twins(model, self._is_experts):
            dtype = dtype_of_plain(model)
            stacks = {name: self._stack(layer, name, dtype) for name in plain._parameters}
            if None not in stacks.values():
                become_experts(layer, plain, stacks)

    def _is_experts(self, layer: nn.Module) -> bool:
        return type(layer) is getattr(sys.modules.get(_MODULE), "FP8Experts", None)

    def _stack(self, layer: nn.Module, name: str, dtype: torch.dtype) -> nn.Parameter | None:
        """Return the weight of all experts of a layer, or None if it is not in FP8."""
        codes, scales = (layer._parameters.get(f"{name}{end}") for end in ("", "_scale_inv"))
        if codes is None or scales is None or codes.dtype != _CODES:
            return None
        _, rows, columns = codes.shape
        block: Any = layer.block_size or (rows, columns)
        if scales.shape[1] != -(-rows // block[0]):  # gate and up have separate scales
            block = (rows // scales.shape[1], block[1])
        elif name.startswith("gate_up") and block[0] < rows and rows // 2 % block[0]:
            return None  # the last block of the gate is smaller than the others
        tensors = {name: codes.detach(), f"{name}_scale_inv": scales.detach()}
        parts = Parts(tensors, codes.shape, tuple(block))
        return stack_parts(FP8BlockTensor, ("weight", "weight_scale_inv"), parts, dtype)

    def quantizers(self) -> dict[str, type]:
        """See :class:`LibraryLayers`."""
        from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

        class Quantizer(FineGrainedFP8HfQuantizer):  # type: ignore[misc]
            """Quantizer that keeps FP8 on any device."""

            def validate_environment(self, *_: Any, **__: Any) -> None:
                pass

            def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
                self.__class__ = FineGrainedFP8HfQuantizer  # which can be pickled
                return self._process_model_after_weight_loading(model, **options)

        return {"fp8": Quantizer}

    def objection(self, layer: nn.Module, named: str) -> str | None:
        """See :class:`LibraryLayers`."""
        if self._is_linear(type(layer)):
            return None
        return (
            f"it is stored in FP8 ({named}), of which only FP8Linear and experts of transformers in whole "
            "blocks of FP8 can have an adapter: load the model with FineGrainedFP8Config(dequantize=True)"
        )


def _codes_and_scales(weight: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return the codes padded to whole blocks, a scale in fp32 for each block, and the size of a block."""
    codes, scales = weight.parts["weight"], weight.parts["weight_scale_inv"].float()
    block = weight.options or tuple(codes.shape)
    scales = scales.reshape(-(-codes.shape[0] // block[0]), -(-codes.shape[1] // block[1]))
    return _in_blocks(codes, block), scales, block


def _in_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """Pad a matrix with zeros to a multiple of the block."""
    rows, columns = (-size % of for size, of in zip(matrix.shape, block, strict=True))
    if not rows and not columns:
        return matrix
    bits = {1: torch.uint8}.get(matrix.element_size(), matrix.dtype)  # FP8 cannot be padded
    return F.pad(matrix.view(bits), (0, columns, 0, rows)).view(matrix.dtype)


class FineGrainedFP8Format(PackedFormat):
    """The format of ``FP8Linear``."""

    library = "transformers"
    title = "FP8 with block scales"
    tensor = FP8BlockTensor
    layers: ClassVar[LibraryLayers] = _Layers()

    def describe(self, weight: Any) -> Quantization:
        """See :class:`WeightFormat`."""
        block = weight.options[1] if weight.options else math.prod(weight.shape)
        return self.describe_as(weight, "fp8", 8, block)

    def decode(self, weight: Any) -> Tensor:
        """See :class:`PackedFormat`."""
        codes, scales, _ = _codes_and_scales(weight)
        decoder = sys.modules[_MODULE].Fp8Dequantize(None)
        values: Tensor = decoder.convert({"weight": codes, "weight_scale_inv": scales})["weight"]
        return values[: weight.shape[0], : weight.shape[1]]

    def requantize(self, values: Tensor, weight: Any) -> nn.Parameter:
        """See :class:`WeightFormat`. A block keeps its scale if its values are in the range of the scale."""
        library: Any = sys.modules["transformers"]
        old, (_, scales, block) = weight.parts["weight_scale_inv"], _codes_and_scales(weight)
        config = library.FineGrainedFP8Config(
            weight_block_size=block,
            scale_fmt="float" if old.dtype.itemsize > 1 else "ue8m0",
        )
        encoder = sys.modules[_MODULE].Fp8Quantize(
            types.SimpleNamespace(quantization_config=config)
        )
        values = _in_blocks(values.float(), block)
        parts = encoder.convert({"weight": values})
        shape = (scales.shape[0], block[0], scales.shape[1], block[1])
        largest = values.abs().reshape(shape).amax((1, 3))
        # Values in half precision may be a little outside of the range, and get the largest code.
        fits = largest <= scales * torch.finfo(_CODES).max * (1 + 1 / 32)
        on_old = (values.reshape(shape) / scales[:, None, :, None]).to(_CODES).view(torch.uint8)
        on_new = parts["weight"].view(torch.uint8).reshape(shape)
        codes = torch.where(fits[:, None, :, None], on_old, on_new).reshape(values.shape)
        codes = codes[: weight.shape[0], : weight.shape[1]].contiguous()
        new = torch.where(fits, scales, parts["weight_scale_inv"].float().reshape(scales.shape))
        parameter: nn.Parameter = weight.with_parts(
            {
                "weight": codes.view(_CODES),
                "weight_scale_inv": new.to(old.dtype).reshape(old.shape),
            }
        )
        return parameter

    def grid(self, weight: Any) -> Grid:
        """See :class:`WeightFormat`."""
        _, scales, (rows, columns) = _codes_and_scales(weight)
        return CodeGrid.of_blocks(float8_levels(_CODES), scales, weight.shape, columns, rows=rows)

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """Return the codes as rows that share a scale: the ONNX operator has no two-dimensional blocks."""
        codes, scales, (rows, columns) = _codes_and_scales(weight)
        out_features, in_features = stored.shape
        line = math.gcd(columns, in_features)
        scales = scales.repeat_interleave(rows, 0)[:out_features]
        scales = scales.repeat_interleave(columns // line, 1)[:, : in_features // line]
        lines = codes[:out_features, :in_features].reshape(-1, line)
        return OnnxWeight(DEQUANTIZE_LINEAR, lines, scales.flatten(), None, line)
