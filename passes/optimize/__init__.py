"""Makes branches cheap: fused operations, shared inputs, dropout of one bit."""

from __future__ import annotations

from lora_fx.passes.optimize.cheap_dropout import CheapDropout
from lora_fx.passes.optimize.fuse import Fuse
from lora_fx.passes.optimize.share_inputs import ShareInputs

__all__ = ["CheapDropout", "Fuse", "ShareInputs"]
