"""Reasons why adapters of other methods cannot be loaded as LoRA, and what works instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_fx.config import CONFIG_NAME, read_json
from lora_fx.errors import CheckpointError
from lora_fx.files import current
from lora_fx.methods.base import CONVERTER, Method

__all__ = ["method_of", "read_config", "refusal"]

_PROMPTS: Final = (
    "It trains vectors that are put before the input, or before keys and values, and changes no weight. So "
    "no LoRA equals it: serve it with PEFT, or train LoRA on the same data"
)
_ROUTED: Final = (
    "{} No single LoRA equals it: serve it with PEFT. Its LoRA adapters can be converted one by one if you "
    "have their folders"
)
_ACTIVATIONS: Final = (
    "It computes with the activations in a way that no change of a weight does. So no LoRA equals it: "
    "serve it with PEFT, or train LoRA on the same data"
)
# Reasons by PEFT's peft_type. Methods that change weights and are not listed can be merged by PEFT.
_REASONS: Final[Mapping[str, str]] = {
    "PROMPT_TUNING": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PREFIX_TUNING": _PROMPTS,
    "ADAPTION_PROMPT": _PROMPTS,
    "CPT": _PROMPTS,
    "CARTRIDGE": _PROMPTS,
    "XLORA": _ROUTED.format(
        "It mixes several LoRA adapters anew for each token, with weights that it computes from the input."
    ),
    "POLY": _ROUTED.format("It mixes several LoRA adapters with weights that depend on the task."),
    "PEANUT": _ACTIVATIONS,
    "SHADOW": _ACTIVATIONS,
}
_MERGE: Final = (
    "lora_fx does not read this method. PEFT can merge it, if it changes weights: "
    "PeftModel.from_pretrained(base, folder).merge_and_unload(). Then "
    "lora_fx.extract_adapter(base, merged, rank=...) makes LoRA of the difference"
)


def refusal(peft_type: str, methods: Mapping[str, Method]) -> str | None:
    """Return the reason why a folder cannot be loaded as LoRA; None if it can, as LoRA or a kind of lora_fx.

    Args:
        peft_type: ``peft_type`` of its configuration.
        methods: Methods that can be converted, by ``peft_type``.
    """
    if peft_type == "LORA" or peft_type.startswith("LORA_FX_"):
        return None
    if peft_type in methods:
        method = methods[peft_type]
        return f"it is an adapter of {method.name} ({method.does}), not LoRA. {CONVERTER}"
    reason = _REASONS.get(peft_type, _MERGE)
    return f"it is an adapter of another method than LoRA. {reason}"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the values of ``adapter_config.json``.

    Raises:
        CheckpointError: If the file is missing or damaged, or has no ``peft_type``.
    """
    path = current(folder / CONFIG_NAME)
    config = read_json(path)
    if not isinstance(config.get("peft_type"), str):
        raise CheckpointError(
            f"{path}: peft_type is {config.get('peft_type')!r}, which names no method; save the adapter again"
        )
    return config


def method_of(folder: Path, config: Mapping[str, Any], methods: Mapping[str, Method]) -> Method:
    """Return the method of a folder.

    Raises:
        CheckpointError: If it is LoRA, or cannot be converted.
    """
    peft_type = config["peft_type"]
    reason = refusal(peft_type, methods)
    if reason is None:
        raise CheckpointError(
            f"{folder} is a LoRA adapter already: lora_fx.load_adapter(model, folder) loads it"
        )
    if peft_type not in methods:
        raise CheckpointError(f"{folder}: peft_type is {peft_type!r}: {reason}")
    return methods[peft_type]
