"""Targets for experts that transformers 5 stores as parameters, in the way that PEFT selects them.

transformers 5 stores the projections of all experts of a layer in two parameters. Before, each projection was
a module. PEFT 0.21 still accepts the names of these modules, and adapts the parameters instead, in models of
some types (``peft/utils/transformers_weight_conversion.py``). The gate and up projections share a parameter,
which gets twice the rank and alpha.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch import nn

from lora_fx.config import ALL_LINEAR, LoraConfig
from lora_fx.ir import Site

__all__ = ["expert_names", "with_experts"]

_NONE: Mapping[str, str] = MappingProxyType({})
_FUSED = "gate_up_proj"
_NAMES: Mapping[str, Mapping[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": _FUSED, "w3": _FUSED, "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": _FUSED,
        "up_proj": _FUSED,
        "down_proj": "down_proj",
    },
}
"""Old names of modules with the names of their parameters, by the type of checkpoint that is converted."""


def expert_names(model: nn.Module) -> Mapping[str, str]:
    """Return the parameters of experts that replace modules whose names PEFT still accepts as targets.

    Returns:
        The end of the parameter's name, by the last part of the former module's name. Empty for a model
        without such experts, and for transformers before 5.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    library = sys.modules.get("transformers.conversion_mapping")
    if kind is None or library is None or library.get_checkpoint_conversion_mapping(kind) is None:
        return _NONE
    # PEFT adds this type to the table of transformers.
    forms = {**library._MODEL_TO_CONVERSION_PATTERN, "mixtral": "mixtral"}
    return _NAMES.get(forms.get(kind, ""), _NONE)


def with_experts(config: LoraConfig, model: nn.Module, sites: Iterable[Site]) -> LoraConfig:
    """Extend ``"all-linear"`` by the experts that PEFT adapts in a model of transformers 5.

    Args:
        config: Any configuration. It is returned unchanged for other targets, and for other models.
        model: The model.
        sites: Its linear operations, with ``Site.all_linear`` set.
    """
    names = expert_names(model) if config.target_modules == ALL_LINEAR else _NONE
    if not names:
        return config
    layers = {site.owner.rpartition(".")[2] for site in sites if site.all_linear}
    fused = rf".*\.{re.escape(_FUSED)}"
    parts = sum(name == _FUSED for name in names.values())
    return dataclasses.replace(
        config,
        target_modules=tuple(sorted(layers - names.keys())),
        target_parameters=tuple(
            dict.fromkeys((*(config.target_parameters or ()), *names.values()))
        ),
        rank_pattern={**config.rank_pattern, fused: parts * config.r},
        alpha_pattern={**config.alpha_pattern, fused: parts * config.lora_alpha},
    )
