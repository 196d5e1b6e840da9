"""Adapters of exported files: as inputs, inline, in files of their own."""

from __future__ import annotations

from lora_fx.export.adapters.factor_model import (
    FactorModel,
    Swappable,
    base_of,
    origin_of,
    random_factors,
    swappable,
    with_adapter,
)
from lora_fx.export.adapters.file import save_onnx_adapter, values_of, values_of_model
from lora_fx.export.adapters.manifest import (
    MANIFEST_KEY,
    AdapterInput,
    Manifest,
    SiteInputs,
    cast_to,
)
from lora_fx.export.adapters.store import AdapterChoice, AdapterStore, HeldAdapter

__all__ = [
    "MANIFEST_KEY",
    "AdapterChoice",
    "AdapterInput",
    "AdapterStore",
    "FactorModel",
    "HeldAdapter",
    "Manifest",
    "SiteInputs",
    "Swappable",
    "base_of",
    "cast_to",
    "origin_of",
    "random_factors",
    "save_onnx_adapter",
    "swappable",
    "values_of",
    "values_of_model",
    "with_adapter",
]
