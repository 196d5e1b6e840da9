"""The whole story on a real model."""

from __future__ import annotations

from lora_fx.tools.demo.data import LIBRARIES, Corpus, collect
from lora_fx.tools.demo.model import (
    FULL,
    QUICK,
    Batch,
    DemoSettings,
    SentenceClassifier,
    batches,
    fit_head,
    logits,
    tokens,
    train,
)
from lora_fx.tools.demo.story import CONFIG, DemoReport, claim_folder, run_demo

__all__ = [
    "CONFIG",
    "FULL",
    "LIBRARIES",
    "QUICK",
    "Batch",
    "Corpus",
    "DemoReport",
    "DemoSettings",
    "SentenceClassifier",
    "batches",
    "claim_folder",
    "collect",
    "fit_head",
    "logits",
    "run_demo",
    "tokens",
    "train",
]
