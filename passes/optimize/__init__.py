"""Makes branches cheap: fused operations, shared inputs, dropout of one bit."""

from __future__ import annotations

from lora_fx.passes.optimize.fuse import CheapDropout, Fuse, ShareInputs

__all__ = ["CheapDropout", "Fuse", "ShareInputs"]
