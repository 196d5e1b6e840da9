"""Adapters made from the difference between two models."""

from __future__ import annotations

from lora_fx.extraction.differences import Difference, Weights, names_of, weights_in, weights_of
from lora_fx.extraction.extracting import extract, extract_adapter
from lora_fx.extraction.ranks import RankChoice
from lora_fx.extraction.report import ExtractedSite, ExtractionReport

__all__ = [
    "Difference",
    "ExtractedSite",
    "ExtractionReport",
    "RankChoice",
    "Weights",
    "extract",
    "extract_adapter",
    "names_of",
    "weights_in",
    "weights_of",
]
