"""Adapters made of the difference between two models."""

from __future__ import annotations

from lora_fx.extraction.differences import Difference, Weights, weights_in, weights_of
from lora_fx.extraction.extracting import extract, extract_adapter
from lora_fx.extraction.lowrank import (
    RankChoice,
    allocate,
    decompose,
    rank_of_energy,
    spectrum,
)
from lora_fx.extraction.report import ExtractedSite, ExtractionReport

__all__ = [
    "Difference",
    "ExtractedSite",
    "ExtractionReport",
    "RankChoice",
    "Weights",
    "allocate",
    "decompose",
    "extract",
    "extract_adapter",
    "rank_of_energy",
    "spectrum",
    "weights_in",
    "weights_of",
]
