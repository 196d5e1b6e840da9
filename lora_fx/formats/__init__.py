"""Formats of quantized weights, one file for each library.

A new format is a subclass of :class:`WeightFormat` and a call of :func:`register_format`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from lora_fx.formats.base import (
    CONTRIB,
    DEQUANTIZE_LINEAR,
    MATMUL_N_BITS,
    STANDARD_OPERATORS,
    LibraryLayers,
    Storage,
    WeightFormat,
    format_named,
    format_of,
    formats,
    held,
    import_library,
    multiply_values,
    operator_named,
    pack_integers,
    quantization_of,
    register_format,
    row_operators,
    storage,
    stored,
)
from lora_fx.formats.bitsandbytes import BitsandbytesFormat, BitsandbytesName
from lora_fx.formats.compressed_tensors import CompressedTensorsFormat
from lora_fx.formats.deployment import DTYPES, deployment, deployment_options, rounded
from lora_fx.formats.finegrained_fp8 import FineGrainedFP8Format
from lora_fx.formats.gptqmodel import GPTQModelFormat
from lora_fx.formats.grids import CodeGrid, DtypeGrid, Grid, ulp
from lora_fx.formats.hqq import HqqFormat, HqqName
from lora_fx.formats.loading import keep_quantized
from lora_fx.formats.mxfp4 import MXFP4Format
from lora_fx.formats.packed import PackedFormat, PackedLayers, PackedTensor, Parts
from lora_fx.formats.stacks import (
    StackedTensor,
    StackFormat,
    Stacking,
    grouped_product,
    is_grouped_product,
    stack_matrices,
)
from lora_fx.formats.torchao import TorchaoFormat, TorchaoName
from lora_fx.formats.weights import (
    WHOLE_WEIGHTS,
    FormatHook,
    KeptWeight,
    LoadHook,
    SaveHook,
    StateHooks,
    dense,
    follow_state,
    is_format_hook,
    pickle_by_class,
    quantized_linear,
    requantized,
)

__all__ = [
    "CONTRIB",
    "DEQUANTIZE_LINEAR",
    "DTYPES",
    "MATMUL_N_BITS",
    "STANDARD_OPERATORS",
    "WHOLE_WEIGHTS",
    "CodeGrid",
    "Deploy",
    "DtypeGrid",
    "FormatHook",
    "FormatName",
    "Grid",
    "KeptWeight",
    "LibraryLayers",
    "LoadHook",
    "PackedFormat",
    "PackedLayers",
    "PackedTensor",
    "Parts",
    "SaveHook",
    "StackedTensor",
    "Stacking",
    "StateHooks",
    "Storage",
    "WeightFormat",
    "dense",
    "deployment",
    "deployment_options",
    "follow_state",
    "format_named",
    "format_of",
    "formats",
    "grouped_product",
    "held",
    "import_library",
    "is_format_hook",
    "is_grouped_product",
    "keep_quantized",
    "multiply_values",
    "operator_named",
    "pack_integers",
    "pickle_by_class",
    "quantization_of",
    "quantized_linear",
    "register_format",
    "requantized",
    "rounded",
    "row_operators",
    "stack_matrices",
    "storage",
    "stored",
    "ulp",
]

FormatName: TypeAlias = BitsandbytesName | TorchaoName | HqqName
"""Names of the formats that come with lora_fx. Registered formats have other names."""

Deploy: TypeAlias = FormatName | Literal["bf16", "fp16"]
"""Names of the storages for which adapters are trained. Registered formats have other names."""

register_format(BitsandbytesFormat())
register_format(TorchaoFormat())
register_format(FineGrainedFP8Format())
register_format(CompressedTensorsFormat())
register_format(MXFP4Format())
register_format(StackFormat())
register_format(GPTQModelFormat())
register_format(HqqFormat())
