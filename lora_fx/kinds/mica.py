"""MiCA (arXiv:2604.01694): LoRA with a frozen B, the left singular vectors of the smallest singular values.

A starts at zero, so that the adapter changes nothing at first. ``init_lora_weights="mica"`` chooses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fx.ir import Site
from lora_fx.kinds import Starting
from lora_fx.kinds.lora import Lora, layer_objection

__all__ = ["KINDS", "Mica"]


class Mica(Lora):
    """Two factors. A is trained, B is frozen."""

    frozen = ("b",)
    chosen_start = "mica"

    def __init__(self) -> None:
        super().__init__()
        self.name = "mica"
        self.trains = "a frozen B, of singular vectors of the weight (MiCA)"

    def objection(self, site: Site, rank: int) -> str | None:
        """Return the reason why a site cannot have MiCA; None if it can.

        Only linear layers and embeddings can. Their weight must be dense, and have as many singular vectors
        as the rank.
        """
        whole = site.family == "embedding" and site.rows is None and site.view is None
        if not whole and (reason := layer_objection("MiCA", self, site)):
            return reason
        if site.quantized is not None:
            return (
                f"MiCA takes singular vectors of the weight, and it is stored as {site.quantized}: use it "
                f"over the dense model, or {self.remedy}"
            )
        most = min(site.weight_shape)
        if rank <= most:
            return super().objection(site, rank)
        return (
            f"MiCA takes {rank} singular vectors of the weight, and it has {most}: set a smaller rank with "
            "rank_pattern"
        )

    def start_pair(self, starting: Starting) -> tuple[Tensor, Tensor]:
        """Return zeros for A, and for B the singular vectors, computed in fp32 as in PEFT, or in fp64."""
        a, b = super().start_pair(starting)
        weight = starting.weight.to(torch.promote_types(starting.weight.dtype, torch.float32))
        site = starting.row.site
        turned = site.family == "embedding" or site.layout == "in_out"
        u = torch.linalg.svd(weight.T if turned else weight, full_matrices=False).U
        return torch.zeros_like(a), u[:, -b.shape[1] :].contiguous()


KINDS = (Mica(),)
