"""The whole story on a real model."""

from __future__ import annotations

from lora_fx.tools.demo.data import LIBRARIES, Corpus, collect
from lora_fx.tools.demo.model import Batch, SentenceClassifier, batches, fit_head, logits, tokens
from lora_fx.tools.demo.report import FULL, QUICK, DemoReport, DemoSettings, claim_folder
from lora_fx.tools.demo.story import CONFIG, run_demo
from lora_fx.tools.demo.training import train

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
