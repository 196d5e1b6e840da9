"""The dry run: decide which sites are adapted, and with which adapters."""

from __future__ import annotations

from lora_fx.passes.plan.choice import priced, with_sample_cost
from lora_fx.passes.plan.peft_experts import expert_names
from lora_fx.passes.plan.planning import MakePlan, at_rank, foreign_factors, start_objection

__all__ = [
    "MakePlan",
    "at_rank",
    "expert_names",
    "foreign_factors",
    "priced",
    "start_objection",
    "with_sample_cost",
]
