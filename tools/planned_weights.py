"""Quantized weights that have a size but no values, for the plan of a training step.

In the plan, such a weight takes as many bytes as a weight of the format
(:meth:`lora_fx.formats.WeightFormat.bytes`). It is decoded in the same way, one dense matrix at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters import plan_quantization
from lora_fx.formats import (
    PackedFormat,
    PackedTensor,
    Parts,
    Storage,
    formats,
    register_format,
    stack_matrices,
)
from lora_fx.ir import Quantization
from lora_fx.passes.graph import share_copy

__all__ = ["STORED", "names_of_formats", "quantized_without_values"]

Size = Callable[[tuple[int, int]], int]


def _fp8(shape: tuple[int, int]) -> int:
    rows, columns = shape
    return rows * columns + 4 * math.ceil(rows / 128) * math.ceil(columns / 128)


STORED: Mapping[str, Size] = {
    "mxfp4": lambda shape: shape[0] * (shape[1] // 2 + math.ceil(shape[1] / 32)),
    "fp8": _fp8,
    "gptq": lambda shape: shape[0] * shape[1] // 2 + math.ceil(shape[0] * shape[1] / 128 * 2.5),
}
"""Sizes in bytes of a matrix [out, in] in formats of checkpoints that :func:`lora_fx.quantize` cannot write.

Besides the values there are scales. MXFP4 has a byte for 32 values of 4 bits, FP8 has an fp32 number for
128 x 128 values. GPTQ and AWQ, with 4 bits and groups of 128, have an fp16 number and 4 bits for each group.
"""


class PlannedTensor(PackedTensor):
    """A stand-in for a quantized matrix: it has a shape and a size in bytes, and no values."""


class _PlannedFormat(PackedFormat):
    """Format of the weights in a plan, which have a size but no values.

    Attributes:
        size: Returns the size in bytes of a matrix [out, in].
    """

    library = "the planner"
    names = ("planned",)
    tensor = PlannedTensor
    size: Size

    def describe(self, weight: Any) -> Quantization:
        """See :class:`lora_fx.formats.WeightFormat`."""
        return self.describe_as(weight, "planned", bits=8)

    def decode(self, weight: Any) -> Tensor:
        """Return an empty tensor in the shape and dtype of the dequantized values."""
        values: Tensor = weight.codes.new_empty(tuple(weight.shape), dtype=weight.dtype)
        return values

    def pack(self, values: Tensor, how: Storage) -> nn.Parameter:
        """Return a parameter without values that has the size of the packed weight."""
        size = self.size((values.shape[0], values.shape[1]))
        codes = torch.empty(size, dtype=torch.uint8, device=values.device)
        parts = Parts({"codes": codes}, tuple(values.shape), None)
        return nn.Parameter(PlannedTensor(parts, values.dtype), requires_grad=False)


_format = _PlannedFormat()


def quantized_without_values(model: nn.Module, name: str) -> nn.Module:
    """Return a copy of a model on the meta device, with weights that have the size of a format.

    Linear layers and experts get such weights. Other operations keep dense weights.

    Args:
        model: The model on the meta device.
        name: A format of :func:`lora_fx.quantize`, or one of :data:`STORED`.

    Raises:
        QuantizationError: As :func:`lora_fx.quantize`.
    """
    plan = plan_quantization(model, "int8" if name in STORED else name)
    if _format not in formats():
        register_format(_format)
    _format.size = STORED.get(name) or functools.partial(plan.storage.bytes, dtype=torch.bfloat16)
    how = Storage("planned", None)
    result = share_copy(model)
    for row in plan.weights:
        owner = result.get_submodule(row.site.owner)
        weight = owner.get_parameter(row.site.parameter)
        turned = row.site.layout == "in_out"
        if row.site.experts is not None:
            parameter = stack_matrices(weight, how, row.site.parameter, turned=turned)
        elif isinstance(owner, nn.Linear):
            parameter = _format.pack(weight, how)
        else:
            continue
        owner._parameters[row.site.parameter] = parameter
    return result


def names_of_formats() -> tuple[str, ...]:
    """Return the names of the formats of :func:`lora_fx.quantize`, which a plan can assume."""
    return tuple(name for known in formats() if known is not _format for name in known.names)
