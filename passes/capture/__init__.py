"""Capture of a model as graphs: three front-ends, and checks of their results."""

from __future__ import annotations

from lora_fx.passes.capture.auto import Frontend, capture
from lora_fx.passes.capture.check import (
    Count,
    count_weights,
    largest_difference,
    relative_difference,
    run_once,
    run_reference,
)
from lora_fx.passes.capture.decompositions import (
    experts_implementation,
    holds_quantized,
    written_out,
    written_out_layer,
)
from lora_fx.passes.capture.exported import MODULE_STACK, ONE_AT_A_TIME
from lora_fx.passes.capture.listener import Listener
from lora_fx.passes.capture.regions import Graphs
from lora_fx.passes.capture.state import State
from lora_fx.passes.capture.synthesis import CACHE, named_inputs, normalize, synthesise
from lora_fx.passes.capture.trace import Untraceable

__all__ = [
    "CACHE",
    "MODULE_STACK",
    "ONE_AT_A_TIME",
    "Count",
    "Frontend",
    "Graphs",
    "Listener",
    "State",
    "Untraceable",
    "capture",
    "count_weights",
    "experts_implementation",
    "holds_quantized",
    "largest_difference",
    "named_inputs",
    "normalize",
    "relative_difference",
    "run_once",
    "run_reference",
    "synthesise",
    "written_out",
    "written_out_layer",
]
