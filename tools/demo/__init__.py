"""The whole story on a real model."""

from __future__ import annotations

from lora_fx.tools.demo.story import (
    CONFIG,
    FULL,
    LIBRARIES,
    QUICK,
    Batch,
    Corpus,
    DemoReport,
    DemoSettings,
    SentenceClassifier,
    batches,
    claim_folder,
    collect,
    fit_head,
    logits,
    run_demo,
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
