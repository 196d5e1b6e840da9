"""MXFP4 experts, as gpt-oss stores them: values of four bits, with an exponent for each 32 values of a row.

The format is that of OCP Microscaling Formats (MX) 1.0: a byte of ``blocks`` has two values of E2M1, and a
byte of ``scales`` is the exponent of a power of two, with bias 127. transformers runs it by kernels for
inference only, or dequantizes it. :func:`lora_fx.keep_quantized` loads it into the dense model's own layer
of experts, as a stack.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_fx.errors import QuantizationError
from lora_fx.extras import load_optional
from lora_fx.formats.base import DEQUANTIZE_LINEAR, LibraryLayers
from lora_fx.formats.grids import FP4_SIZES, CodeGrid, Grid, fp4_levels
from lora_fx.formats.packed import PackedFormat, PackedTensor, Parts
from lora_fx.formats.stacks import follow_stacks, stack_parts
from lora_fx.ir import OnnxWeight, Quantization

__all__ = ["MXFP4Format", "MXFP4Tensor", "stacked_experts"]

_MODULE: Final = "transformers.integrations.mxfp4"
_BLOCK: Final = 32
_KEYS: Final = ("blocks", "scales")


def _library() -> Any:
    return load_optional(_MODULE, "a weight of gpt-oss", "lora-fx[hf]", error=QuantizationError)


class MXFP4Tensor(PackedTensor):
    """A matrix [out, in] of ``blocks`` [out, in / 32, 16] and ``scales`` [out, in / 32], both uint8."""


class _Layers(LibraryLayers):
    """The experts of gpt-oss, loaded into the dense model's own layers."""

    def quantizers(self) -> dict[str, type]:
        """See :class:`LibraryLayers`."""
        return {"mxfp4": _quantizer()}


@functools.cache
def _quantizer() -> type:
    """Return a quantizer of transformers that loads MXFP4 into the model's own experts, on any device."""
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

    class Stack(_library().Mxfp4Dequantize):  # type: ignore[misc]
        """Operation of transformers' loader that stacks blocks and scales instead of dequantizing them."""

        def convert(
            self, input_dict: Any, model: Any = None, full_layer_name: str = "", **_: Any
        ) -> Any:
            owner, name = full_layer_name.rsplit(".", 1)
            dense = getattr(model.get_submodule(owner), name)
            blocks, scales = (input_dict[f"{name}_{key}"] for key in _KEYS)
            if isinstance(blocks, list):
                blocks, scales = blocks[0], scales[0]
            return {full_layer_name: stacked_experts(name, blocks, scales, dense)}

    class Quantizer(Mxfp4HfQuantizer):  # type: ignore[misc]
        """Quantizer that leaves the layers of the model as they are."""

        def validate_environment(self, *_: Any, **__: Any) -> None:
            pass

        def _process_model_before_weight_loading(self, *_: Any, **__: Any) -> None:
            pass

        def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
            follow_stacks(model)
            # State dicts have the names of the file already, so saving must not convert stacks.
            conversions = vars(model).get("_weight_conversions", ())
            kept = [conversion for conversion in conversions if not _makes_stacks(conversion)]
            vars(model)["_weight_conversions"] = kept

        def get_load_operations(self) -> dict[str, type]:
            return {"deserialize": Stack}

        @property
        def is_trainable(self) -> bool:
            return True

        def __reduce__(self) -> Any:
            return _new_quantizer, (), self.__dict__

    return Quantizer


def _new_quantizer() -> Any:
    return object.__new__(_quantizer())


def _makes_stacks(conversion: Any) -> bool:
    return any(
        isinstance(operation, _library().Mxfp4Dequantize)
        for operation in getattr(conversion, "operations", ())
    )


def stacked_experts(name: str, blocks: Tensor, scales: Tensor, dense: Tensor) -> nn.Parameter:
    """Return the weight of all experts, [E, in, out].

    Args:
        name: The name of the parameter.
        blocks: uint8 [E, out, in / 32, 16].
        scales: uint8 [E, out, in / 32].
        dense: The dense parameter that the result replaces.
    """
    experts, out_features, groups = scales.shape
    shape = (experts, groups * _BLOCK, out_features)
    if shape != tuple(dense.shape) or blocks.shape != (*scales.shape, _BLOCK // 2):
        raise QuantizationError(
            f"{name} has blocks {list(blocks.shape)} and scales {list(scales.shape)}, which are no MXFP4 of "
            f"{list(dense.shape)}: the folder belongs to another model"
        )
    tensors = {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
    return stack_parts(MXFP4Tensor, _KEYS, Parts(tensors, shape, None), dense.dtype, turned=True)


class MXFP4Format(PackedFormat):
    """The format of gpt-oss."""

    library = "transformers"
    title = "MXFP4 of gpt-oss"
    tensor = MXFP4Tensor
    layers = _Layers()

    def describe(self, weight: Any) -> Quantization:
        """See :class:`WeightFormat`."""
        return self.describe_as(weight, "mxfp4", 4, _BLOCK)

    def decode(self, weight: Any) -> Tensor:
        """See :class:`PackedFormat`."""
        blocks, scales = (weight.parts[key].unsqueeze(0) for key in _KEYS)
        values: Tensor = _library().convert_moe_packed_tensors(blocks, scales, dtype=weight.dtype)
        return values[0].T

    def requantize(self, values: Tensor, weight: Any) -> nn.Parameter:
        """See :class:`WeightFormat`. A block keeps its exponent unless one that fits has less error."""
        rows = values.float().reshape(values.shape[0], -1, _BLOCK)
        old = weight.parts["scales"].int() - 127
        # MX 1.0, section 6.3: the exponent of the largest value, minus that of the largest code, 6. Values
        # whose code would be over 6 are cut off. With the next exponent, none are.
        smallest = torch.frexp(rows.abs().amax(-1)).exponent - 1 - 2
        exponents, codes, least = old, _codes(rows, old), _error(rows, old)
        for other in (smallest, smallest + 1):
            candidate = other.clamp(-127, 127)
            error = _error(rows, candidate)
            better = error < least
            exponents = torch.where(better, candidate, exponents)
            codes = torch.where(better.unsqueeze(-1), _codes(rows, candidate), codes)
            least = torch.minimum(error, least)
        blocks = codes[..., ::2] | (codes[..., 1::2] << 4)
        parts = {"blocks": blocks, "scales": (exponents + 127).to(torch.uint8)}
        parameter: nn.Parameter = weight.with_parts(parts)
        return parameter

    def grid(self, weight: Any) -> Grid:
        """See :class:`WeightFormat`."""
        levels = fp4_levels()
        exponents = weight.parts["scales"].int() - 127
        scales = torch.ldexp(torch.ones(exponents.shape, device=exponents.device), exponents)
        return CodeGrid.of_blocks(levels, scales, weight.shape, _BLOCK)

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight:
        """Return int8 codes that are twice the FP4 values: no operator of opsets 20 to 22 reads FP4."""
        blocks, scales = weight.parts["blocks"], weight.parts["scales"]
        signed = torch.tensor([*FP4_SIZES, *(-value for value in FP4_SIZES)]) * 2
        pairs = torch.stack([blocks & 15, blocks >> 4], -1).long()
        codes = signed.to(blocks.device, torch.int8)[pairs].reshape(-1, _BLOCK)
        halves = torch.full(scales.shape, 0.5, device=scales.device)
        steps = torch.ldexp(halves, scales.int() - 127)
        return OnnxWeight(DEQUANTIZE_LINEAR, codes, steps.flatten(), None, _BLOCK, fresh=True)


def _codes(rows: Tensor, exponents: Tensor) -> Tensor:
    """Return the codes of the nearest values of E2M1, ties to the even code; larger values become 6.

    Args:
        rows: The values, [rows, blocks, 32].
        exponents: The exponent of each block, to the base 2, [rows, blocks].
    """
    values = torch.ldexp(rows, -exponents.unsqueeze(-1))
    table = torch.tensor(FP4_SIZES, device=values.device)
    between = (table[1:] + table[:-1]) / 2
    sizes = values.abs().contiguous()
    low, high = (torch.bucketize(sizes, between, right=right) for right in (False, True))
    code = torch.where(low % 2 == 0, low, high)
    return (code | (values.signbit().long() << 3)).to(torch.uint8)


def _error(rows: Tensor, exponents: Tensor) -> Tensor:
    """Return the squared error of each block, [rows, blocks]; see :func:`_codes`."""
    codes = _codes(rows, exponents)
    table = torch.tensor(FP4_SIZES, device=rows.device)
    sizes = torch.ldexp(table[(codes & 7).long()], exponents.unsqueeze(-1))
    return (sizes - rows.abs()).square().sum(-1)
