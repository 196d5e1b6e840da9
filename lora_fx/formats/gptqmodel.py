"""GPTQ and AWQ, as transformers loads them: the layers of gptqmodel.

A layer has codes of 2 to 8 bits (``qweight``). For each group of inputs and each output, it has a zero point
in as many bits (``qzeros``) and a scale in half precision. GPTQ packs codes along inputs, and ``g_idx`` has
the group of each input, in any order (act-order). AWQ packs codes along outputs. Its codes of 4 bits are in a
different order.

The library has a class for each kernel, and some kernels repack a layer in the first call. In a copy that
lora_fx makes, each layer is an ``nn.Linear``. Its values are computed here and equal the library's bit for
bit. GPTQ version 1 stores each zero point minus one. The library adds one on loading, so that a loaded model
is version 2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn

from lora_fx.formats.base import LibraryLayers, pack_integers
from lora_fx.formats.grids import CodeGrid, Grid, integer_levels
from lora_fx.formats.packed import PackedFormat, PackedLayers, PackedTensor, Parts
from lora_fx.ir import NoOperator, OnnxWeight, Quantization

__all__ = ["GPTQModelFormat", "GPTQModelTensor", "Packing", "pack_codes", "unpack_codes"]

_GPTQ: Final = frozenset(
    {
        "TorchLinear",
        "TorchAtenLinear",
        "TorchCpuAvx512Linear",
        "TorchFusedLinear",
        "TritonV2Linear",
    }
)
_AWQ: Final = frozenset(
    {
        "AwqTorchLinear",
        "AwqGEMMLinear",
        "AwqGEMMTritonLinear",
        "TorchAtenAwqLinear",
        "TorchCpuAvx512AwqLinear",
        "TorchFusedAwqLinear",
    }
)
_BACKEND: Final = "GPTQConfig(backend='torch') or AwqConfig(backend='torch_awq')"
"""Settings that select kernels that do not repack weights."""

_INTERLEAVED: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""The columns of eight codes of 4 bits in a word of AWQ, from the lowest bits to the highest."""


class GPTQModelTensor(PackedTensor):
    """A weight of gptqmodel. Its options are a :class:`Packing`."""


class Packing(NamedTuple):
    """The storage of a weight.

    Attributes:
        bits: Bits of a code.
        group: Inputs that share a scale.
        awq: True for AWQ, False for GPTQ.
    """

    bits: int
    group: int
    awq: bool


# --- words of 32 bits -----------------------------------------------------------------------------


def unpack_codes(words: Tensor, bits: int, count: int, *, interleaved: bool = False) -> Tensor:
    """Unpack integer codes from words of 32 bits. Each column of words is a stream of bits, the lowest first.

    Args:
        words: int32, [words, columns].
        bits: Bits of a code, at most 8.
        count: Codes in a column.
        interleaved: True for the order of AWQ in 4 bits.

    Returns:
        uint8, [count, columns].
    """
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=words.device)
    octets = (words.unsqueeze(1) >> shifts.unsqueeze(1)).to(torch.uint8).flatten(0, 1)
    if 8 % bits:  # a code may lie in two bytes
        start = torch.arange(count, device=words.device) * bits
        pairs = octets.to(torch.int16)
        pairs[:-1] |= pairs[1:] << 8
        codes = (pairs[start // 8] >> (start % 8).to(torch.int16).unsqueeze(1)).to(torch.uint8)
    else:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = (octets.unsqueeze(1) >> shifts.unsqueeze(1)).flatten(0, 1)
    if interleaved:
        columns = torch.tensor(_INTERLEAVED, device=words.device).argsort()
        codes = codes.view(-1, len(columns), codes.shape[1])[:, columns].flatten(0, 1)
    unpacked: Tensor = codes[:count] & (2**bits - 1)
    return unpacked


def pack_codes(codes: Tensor, bits: int, *, interleaved: bool = False) -> Tensor:
    """Pack integer codes into words of 32 bits, [words, columns]: the inverse of :func:`unpack_codes`."""
    lines = codes.T.to(torch.uint8)
    if interleaved:
        eights = lines.reshape(len(lines), -1, len(_INTERLEAVED))
        lines = eights[..., list(_INTERLEAVED)].flatten(1)
    powers = torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = ((lines.unsqueeze(-1) >> powers[:bits]) & 1).flatten(1)
    stream = nn.functional.pad(stream, (0, -stream.shape[1] % 32)).view(len(lines), -1, 8)
    words = (stream << powers).sum(-1, dtype=torch.uint8).view(torch.int32)
    return words.T.contiguous()


class _Grid(NamedTuple):
    """Codes, zero points and scales of a weight. Its values are ``(codes - zeros[groups]) · scales[groups]``.

    Attributes:
        codes: int8, or int16 for 8 bits, so that ``codes - zeros`` does not overflow, [in, out].
        zeros: Zero points in the dtype of the codes, [groups, out].
        scales: [groups, out].
        groups: The group of each input.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    @classmethod
    def of(cls, weight: Any) -> _Grid:
        """Unpack the codes, the zero points and the scales of a weight."""
        parts, (bits, group, awq) = weight.parts, weight.options
        rows, columns = weight.shape
        integers = torch.int16 if bits == 8 else torch.int8
        interleaved = awq and bits == 4
        zeros = unpack_codes(parts["qzeros"].T, bits, rows, interleaved=interleaved).T
        if awq:
            codes = unpack_codes(parts["qweight"].T, bits, rows, interleaved=interleaved).T
            groups = torch.arange(columns, device=codes.device) // group
        else:
            codes = unpack_codes(parts["qweight"], bits, columns)
            groups = parts["g_idx"].long()
        # Make both contiguous, because subtracting tensors with different strides is slow.
        codes, zeros = codes.contiguous().to(integers), zeros.contiguous().to(integers)
        return cls(codes, zeros, parts["scales"], groups)


# --- layers ---------------------------------------------------------------------------------------


def _objection(layer: Any) -> str | None:
    """Return the reason why a layer of the library is not supported, with a remedy, or None."""
    name = type(layer).__name__
    if name not in _GPTQ | _AWQ:
        return (
            f"gptqmodel's {name} stores weights in a form that lora_fx does not read: load a checkpoint in "
            f"gptq, gptq_v2 or gemm (AWQ) with {_BACKEND}"
        )
    planar = getattr(layer, "planar", False)
    if planar or layer.pack_dtype != torch.int32:
        form = "in planes (gptq_p)" if planar else f"in words of {layer.pack_dtype}"
        return (
            f"gptqmodel stores its {layer.bits} bits {form}, and adapters are for gptq, gptq_v2 and gemm "
            "(AWQ) in words of 32 bits: quantize the model again, in one of these"
        )
    if layer.adapter is not None or layer.online_full_had or layer.online_partial_had:
        does = "adds an adapter (EoRA)" if layer.adapter is not None else "rotates its inputs"
        return f"gptqmodel's {name} also {does}, which a merge could not keep: use a checkpoint without"
    tensors, per_word = layer._buffers, 32 / layer.bits
    shape = (math.ceil(layer.in_features / per_word), layer.out_features)
    if name in _AWQ:
        shape = (layer.in_features, math.ceil(layer.out_features / per_word))
    codes = tensors.get("qweight")
    if codes is None or codes.dtype != torch.int32 or tuple(codes.shape) != shape:
        return (
            f"gptqmodel's {name} has repacked it for its kernel, in the first call: load the model again and "
            f"rewrite it before you call it, or load it with {_BACKEND}"
        )
    return None


class _Layers(PackedLayers):
    """Layers of gptqmodel."""

    module = "gptqmodel.nn_modules.qlinear"

    def objection(self, layer: nn.Module, named: str) -> str | None:
        """See :class:`LibraryLayers`."""
        return _objection(layer)

    def parts(self, layer: nn.Module) -> Parts | None:
        """See :class:`PackedLayers`."""
        if not self.owns(type(layer)) or _objection(layer) is not None:
            return None
        of: Any = layer
        awq = type(layer).__name__ in _AWQ
        names = ("qweight", "qzeros", "scales", *(() if awq else ("g_idx",)))
        options = Packing(of.bits, min(of.group_size, of.in_features), awq)
        tensors: dict[str, Any] = {name: layer._buffers[name] for name in names}
        return Parts(tensors, (of.out_features, of.in_features), options)

    def adopt(self, model: nn.Module) -> None:
        """See :class:`PackedLayers`. Also set the format in the configuration of a GPTQ model to ``gptq_v2``.

        The library converts tensors to version 2, but not the configuration. So transformers (5.24) saves
        folders whose zero points the next load shifts again.
        """
        super().adopt(model)
        weights = (p for p in model.parameters() if isinstance(p, GPTQModelTensor))
        if all(weight.options.awq for weight in weights):
            return
        for module in model.modules():
            settings = getattr(vars(module).get("config"), "quantization_config", None)
            # transformers sets an object here, gptqmodel a dict.
            fields = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
            if fields.get("quant_method") == "gptq" and fields.get("format", "gptq") == "gptq":
                names = ("format", "checkpoint_format")
                fields.update({key: "gptq_v2" for key in names if key in fields})


class GPTQModelFormat(PackedFormat):
    """The format of gptqmodel."""

    library = "gptqmodel"
    title = "GPTQ, AWQ"
    tensor = GPTQModelTensor
    layers: ClassVar[LibraryLayers] = _Layers()

    def describe(self, weight: Any) -> Quantization:
        """See :class:`WeightFormat`."""
        bits, group, _ = weight.options
        return self.describe_as(
            weight, f"int{bits}", bits, None if group == weight.shape[1] else group
        )

    def decode(self, weight: Any) -> Tensor:
        """See :class:`PackedFormat`."""
        codes, zeros, scales, groups = _Grid.of(weight)
        return scales[groups].mul_(codes - zeros[groups]).T

    def requantize(self, values: Tensor, weight: Any) -> nn.Parameter:
        """See :class:`WeightFormat`. Groups keep scale and zero point if their values are in the range."""
        bits, _, awq = weight.options
        _, zeros, scales, groups = _Grid.of(weight)
        values, zeros, step = values.T.float(), zeros.float(), scales.float()
        index, last, middle = groups.unsqueeze(1).expand(values.shape), 2**bits - 1, 2 ** (bits - 1)
        lowest = torch.zeros_like(step).scatter_reduce(0, index, values, "amin")
        highest = torch.zeros_like(step).scatter_reduce(0, index, values, "amax")
        # Values in half precision may be a little outside of the range.
        fits = (lowest >= (-0.5 - zeros) * step) & (highest <= (last - zeros + 0.5) * step)
        if bool((zeros == middle).all()):  # symmetric
            new, new_zeros = torch.maximum(highest / (last - middle), lowest / -middle), zeros
        else:
            new = (highest - lowest) / last
            new_zeros = (lowest / -new).round().clamp(0, last)
        zeros = torch.where(fits, zeros, new_zeros)
        step = torch.where(fits, step, new).to(scales.dtype)
        divisors = torch.where(step > 0, step, 1).float()  # rounded to the dtype of the scales
        codes = (values / divisors[groups] + zeros[groups]).round().clamp(0, last)
        interleaved = awq and bits == 4
        words = pack_codes(codes.T if awq else codes, bits, interleaved=interleaved)
        tensors = {
            "qweight": words.T.contiguous() if awq else words,
            "qzeros": pack_codes(zeros.T, bits, interleaved=interleaved).T.contiguous(),
            "scales": step,
        }
        parameter: nn.Parameter = weight.with_parts(tensors)
        return parameter

    def grid(self, weight: Any) -> Grid:
        """See :class:`WeightFormat`."""
        _, zeros, scales, groups = _Grid.of(weight)
        levels = integer_levels(weight.options.bits, signed=False).float()
        return CodeGrid(levels, scales.float(), tuple(groups.tolist()), zeros.float())

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """See :class:`WeightFormat`. Codes of 2 and 3 bits are stored in 4."""
        codes, zeros, scales, groups = _Grid.of(weight)
        (bits, group, _), columns = weight.options, stored.shape[1]
        order = None
        if not torch.equal(groups, torch.arange(columns, device=groups.device) // group):
            if bool((groups.bincount(minlength=scales.shape[0]) != group).any()):
                return NoOperator(
                    f"is stored as {stored} in groups of several sizes, and an operator of ONNX has one"
                )
            order = groups.argsort(stable=True)
            codes = codes[order]
        codes = codes.T.contiguous().to(torch.uint8)
        packed = pack_integers(codes, scales.T, zeros.T, group, bits)
        if order is None or isinstance(packed, NoOperator):
            return packed
        return dataclasses.replace(packed, order=order)
