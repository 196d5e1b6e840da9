"""Passes that make steps cheap: fusion, shared inputs, cheap dropout, recomputation, loss in chunks."""

from __future__ import annotations

from lora_fx.passes.optimize.chunk_loss import ChunkLoss
from lora_fx.passes.optimize.fuse import CheapDropout, Deploy, Fuse, FuseRows, ShareInputs
from lora_fx.passes.optimize.recompute import Recompute

__all__ = [
    "CheapDropout",
    "ChunkLoss",
    "Deploy",
    "Fuse",
    "FuseRows",
    "Recompute",
    "ShareInputs",
]
