"""The whole story on a real model."""

from __future__ import annotations

from lora_fx.tools.demo.story import CONFIG, DemoReport, claim_folder, run_demo
from lora_fx.tools.demo.task import (
    FULL,
    LIBRARIES,
    QUICK,
    Batch,
    Corpus,
    DemoSettings,
    SentenceClassifier,
    batches,
    collect,
    fit_head,
    logits,
    tokens,
    train,
)

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
