"""Activated LoRA (aLoRA, arXiv:2504.12397): LoRA that acts from a phrase in the prompt on.

Positions before the last occurrence of the phrase have the outputs of the base, so its cache of keys and
values can be used for them. Samples without the phrase have no adapter.
"""

from __future__ import annotations

import operator

from torch import fx

from lora_fx.config import LoraConfig
from lora_fx.ir import OutputBuilder, Role, Site
from lora_fx.kinds import AdapterKind
from lora_fx.kinds.lora import Lora
from lora_fx.runtime.rows import active_positions, gated

__all__ = ["KINDS", "ActivatedLora"]


class ActivatedLora(Lora):
    """Two factors, and a phrase. The options of the kind are the ``tokens`` of the phrase."""

    in_parts = False
    reads_tokens = True
    dynamic = (
        "it acts from the invocation tokens of each prompt on (alora_invocation_tokens), and a merged weight "
        "would act everywhere (PEFT merges none either): keep the adapter unmerged (lora_fx.save_adapter), "
        "or train plain LoRA"
    )

    def __init__(self) -> None:
        super().__init__()
        self.deploys = False
        self.name = "alora"
        self.fields = ("alora_invocation_tokens",)
        self.trains = "activation by a phrase (alora_invocation_tokens)"

    def at(self, site: Site, config: LoraConfig) -> AdapterKind:
        """Return the kind with the configuration's phrase."""
        return self.with_options({"tokens": tuple(config.alora_invocation_tokens or ())})

    def objection(self, site: Site, rank: int) -> str | None:
        """Return the reason why a site cannot have aLoRA; None if it can.

        As in PEFT, only linear layers over tokens can.
        """
        whole = site.rows is None and not site.experts and not site.attention
        vectors = all(call.axes == (-1,) and not call.left for call in site.calls)
        if site.family != "linear" or not whole or not vectors:
            return "aLoRA is for linear layers over tokens alone (as in PEFT): leave it out"
        return super().objection(site, rank)

    def joined(self, build: OutputBuilder, up: fx.Node | None) -> fx.Node:
        """Write ``total + gate(up · s)``."""
        assert up is not None
        assert self.options is not None
        scaled = build.call(Role.SCALE, operator.mul, up, build.scale)
        weight = build.site.weight
        positions = build.of_call(active_positions, build.input, self.options["tokens"], weight)
        active = build.call(Role.SCALE, gated, scaled, positions, weight)
        return build.call(Role.ADD, operator.add, build.total, active)


KINDS = (ActivatedLora(),)
