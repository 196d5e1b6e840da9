"""Compares what a plan mentions with what a model multiplies with its data."""

from __future__ import annotations

from lora_fx.ir.values import Plan
from lora_fx.passes.capture.watch import Count

__all__ = ["unseen"]


def unseen(count: Count, plan: Plan) -> tuple[str, ...]:
    """Weights that were counted and that the plan does not mention: neither adapted nor refused."""
    known: set[str] = set()
    for site in [*(row.site for row in plan.sites), *(row.site for row in plan.skipped)]:
        known |= {site.weight, *site.tied_to}
    refused = {rejection.name for rejection in plan.rejections}

    def mentioned(name: str) -> bool:
        owner = name.rpartition(".")[0]
        holder = name.partition(".parametrizations.")[0]
        return name in known or bool({name, owner, holder} & refused)

    found = [" = ".join(sorted(names)) for names in count.direct if not any(map(mentioned, names))]
    found += [
        f"computed from {', '.join(sorted(names))}"
        for names in count.computed
        if not any(map(mentioned, names))
    ]
    return tuple(found)
