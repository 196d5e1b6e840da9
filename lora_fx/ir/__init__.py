"""The values that passes hand to each other: captures, regions, sites, plans, records."""

from __future__ import annotations

from lora_fx.ir.graph import (
    META_KEY,
    Capture,
    FusedBranch,
    Region,
    Role,
    Tag,
    join,
    module_of,
    relative,
)
from lora_fx.ir.onnx_weight import NoOperator, OnnxBuilder, OnnxOperator, OnnxProduct, OnnxWeight
from lora_fx.ir.passes import Kind, Pass, PassResult
from lora_fx.ir.plan import Plan, PlannedSite, PlannedTokens, Skipped
from lora_fx.ir.record import (
    ActiveAdapters,
    AdapterRecord,
    Base,
    Record,
    freeze,
    record_of,
    require_record,
    thaw,
)
from lora_fx.ir.site import (
    BranchBuilder,
    Call,
    Factors,
    Layout,
    Match,
    Matches,
    OutputBuilder,
    Pattern,
    Quantization,
    Rejection,
    Site,
)

__all__ = [
    "META_KEY",
    "ActiveAdapters",
    "AdapterRecord",
    "Base",
    "BranchBuilder",
    "Call",
    "Capture",
    "Factors",
    "FusedBranch",
    "Kind",
    "Layout",
    "Match",
    "Matches",
    "NoOperator",
    "OnnxBuilder",
    "OnnxOperator",
    "OnnxProduct",
    "OnnxWeight",
    "OutputBuilder",
    "Pass",
    "PassResult",
    "Pattern",
    "Plan",
    "PlannedSite",
    "PlannedTokens",
    "Quantization",
    "Record",
    "Region",
    "Rejection",
    "Role",
    "Site",
    "Skipped",
    "Tag",
    "freeze",
    "join",
    "module_of",
    "record_of",
    "relative",
    "require_record",
    "thaw",
]
