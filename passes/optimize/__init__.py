"""Makes branches cheap: fused operations, shared inputs, dropout of one bit, inputs that are made again."""

from __future__ import annotations

from lora_fx.passes.optimize.fuse import CheapDropout, Fuse, FuseRows, ShareInputs
from lora_fx.passes.optimize.recompute import Recompute

__all__ = ["CheapDropout", "Fuse", "FuseRows", "Recompute", "ShareInputs"]
