"""KaSA (Wang et al. 2024, arXiv:2412.06071): a trained diagonal between A and B, over a truncated base.

``W' = W₀ + s · B diag(d) A``. W₀ is W without its r smallest singular values. A folder has no base: W₀ is
computed again from the weight of the model, as in PEFT.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, fx

from lora_fx.config import complete_options
from lora_fx.ir import OutputBuilder, PlannedSite, Role, Site
from lora_fx.kinds import RANK, Costs, Slot, Starting
from lora_fx.kinds.lora import Lora, layer_objection

__all__ = ["KINDS", "Kasa"]

_DIAGONAL: Final = "lora_diag"


class Kasa(Lora):
    """Two factors, a diagonal between them, and a base without its smallest singular values."""

    in_parts = False

    def __init__(self, bias: bool = False) -> None:
        super().__init__(bias)
        self.name = "kasa-bias" if bias else "kasa"
        self.deploys = False
        self.fields = ("kasa_config", "lora_bias") if bias else ("kasa_config",)
        self.trains = "a trained diagonal between A and B (KaSA)"
        self.trains += " and a bias on B (lora_bias)" if bias else ""
        self.options = complete_options(self.fields[0], {})

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """Return the diagonal, [r], and B's bias, if B has one."""
        diagonal = Slot(
            _DIAGONAL,
            _DIAGONAL,
            (RANK,),
            "a diagonal",
            neutral=1.0,
            multiplies=True,
            over_outputs=False,
        )
        return (*super().slots(site), diagonal)

    def costs(self, site: Site, rank: int) -> Costs:
        """Return the costs of the diagonal: its elements. Its product with B is not a cost per token."""
        bias = super().costs(site, rank)
        return dataclasses.replace(bias, parameters=bias.parameters + rank)

    def objection(self, site: Site, rank: int) -> str | None:
        """Return the reason why a site cannot have KaSA; None if it can.

        Only a linear layer can, stored [out, in], whose weight is not tied. The rank must leave a singular
        value of the weight.
        """
        if reason := layer_objection("KaSA", self, site):
            return reason
        if site.layout == "in_out":
            return f"KaSA is for weights stored as [out, in] (as in PEFT): leave it out, or {self.remedy}"
        if site.tied_to:
            return (
                f"KaSA changes its weight, which {', '.join(site.tied_to)} shares: leave it out, or "
                f"{self.remedy}"
            )
        least = min(site.in_features, site.out_features)
        if rank < least:
            return None
        return (
            f"KaSA takes the {rank} smallest singular values out of the weight, and it has {least}: set a "
            "smaller rank with rank_pattern"
        )

    def start(self, slot: Slot, starting: Starting) -> Tensor:
        """Return normal random numbers. They change nothing, because B is zero at first."""
        if slot.name != _DIAGONAL:
            return super().start(slot, starting)
        name = f"{starting.row.name}.{_DIAGONAL}"
        return torch.empty(starting.row.rank).normal_(generator=starting.generator(name))

    def start_base(self, row: PlannedSite, weight: Tensor) -> Tensor:
        """Return the weight without its r smallest singular values, decomposed in fp32 as in PEFT."""
        u, s, vh = torch.linalg.svd(weight.to(torch.float32), full_matrices=False)
        kept = len(s) - row.rank
        base: Tensor = (u[:, :kept] * s[:kept]) @ vh[:kept]
        return base.to(weight.dtype)

    def penalty(
        self, row: PlannedSite, factors: Mapping[str, Tensor], *, sites: int, training: bool
    ) -> Tensor:
        """Return ``β ‖d‖² + γ (‖BᵀB - I‖ + ‖A Aᵀ - I‖)`` in fp32 (equations 9 to 11)."""
        assert self.options is not None
        a, b, diagonal = (factors[name].float() for name in ("a", "b", _DIAGONAL))
        identity = torch.eye(len(diagonal), device=diagonal.device)
        norm = torch.linalg.norm(b.mT @ b - identity) + torch.linalg.norm(a @ a.mT - identity)
        term: Tensor = self.options["beta"] * diagonal.square().sum() + self.options["gamma"] * norm
        return term

    # --- graphs -----------------------------------------------------------------------------------

    def factor(self, build: OutputBuilder, letter: str, stored: fx.Node) -> fx.Node:
        """Write ``B diag(d)`` for B."""
        if letter == "a":
            return stored
        return build.call(Role.FACTOR, operator.mul, stored, build.read_slot(_DIAGONAL))

    # --- merges -----------------------------------------------------------------------------------

    def merged_factors(
        self, site: Site, a: Tensor, b: Tensor, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return A and ``B diag(d)``."""
        return a, b * values[_DIAGONAL]


KINDS = (Kasa(), Kasa(bias=True))
