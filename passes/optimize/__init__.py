"""Makes branches cheap: fused operations, shared inputs, dropout of one bit, inputs that are made again."""

from __future__ import annotations

from lora_fx.passes.optimize.fuse import CheapDropout, Fuse, ShareInputs
from lora_fx.passes.optimize.fuse_rows import FuseRows
from lora_fx.passes.optimize.recompute import Recompute

__all__ = ["CheapDropout", "Fuse", "FuseRows", "Recompute", "ShareInputs"]
