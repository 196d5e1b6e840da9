"""The dry run: decide which sites are adapted, and with which adapters."""

from __future__ import annotations

from lora_fx.passes.plan.advice import with_advice
from lora_fx.passes.plan.choice import (
    base_flops,
    priced,
    sample_cost,
    tied_embedding,
    with_sample_cost,
)
from lora_fx.passes.plan.peft_experts import expert_names, with_experts
from lora_fx.passes.plan.planning import (
    MakePlan,
    at_rank,
    choose,
    foreign_factors,
    fresh_modules,
    start_objection,
)
from lora_fx.passes.plan.savings import FindSavings

__all__ = [
    "FindSavings",
    "MakePlan",
    "at_rank",
    "base_flops",
    "choose",
    "expert_names",
    "foreign_factors",
    "fresh_modules",
    "priced",
    "sample_cost",
    "start_objection",
    "tied_embedding",
    "with_advice",
    "with_experts",
    "with_sample_cost",
]
