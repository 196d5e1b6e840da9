"""From a model and one call to an exported program with dynamic axes."""

from __future__ import annotations

from lora_fx.export.trace.arguments import (
    Arguments,
    Axis,
    Case,
    Cases,
    Checked,
    Extra,
    FlatModel,
    Outputs,
    Sizes,
    cast_floating,
    named_outputs,
)
from lora_fx.export.trace.failures import (
    SourceLocation,
    headline,
    inner_module,
    place_of,
    user_line,
)
from lora_fx.export.trace.tracing import Trace, trace, widen_batch

__all__ = [
    "Arguments",
    "Axis",
    "Case",
    "Cases",
    "Checked",
    "Extra",
    "FlatModel",
    "Outputs",
    "Sizes",
    "SourceLocation",
    "Trace",
    "cast_floating",
    "headline",
    "inner_module",
    "named_outputs",
    "place_of",
    "trace",
    "user_line",
    "widen_batch",
]
