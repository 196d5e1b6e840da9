"""PEFT's fields for other methods and engines: known, with the value that switches each off, and refused.

Nothing that a PEFT configuration asks for is dropped in silence: a field is one of `LoraConfig`, or it is
here, or it does not exist.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple

from lora_fx.errors import ConfigError, hint

__all__ = ["FOREIGN", "METADATA", "Foreign", "is_off", "only_own"]

# What PEFT writes about itself and the base model's class: no part of what an adapter computes.
METADATA: Final = frozenset({"peft_type", "auto_mapping", "peft_version"})


class Foreign(NamedTuple):
    """A field of PEFT's that lora_fx does not act on.

    Attributes:
        off: PEFT's default, which switches it off.
        what: What it belongs to, for the error.
    """

    off: object
    what: str


FOREIGN: Final[Mapping[str, Foreign]] = {
    "alora_invocation_tokens": Foreign(
        None, "aLoRA, adapters that a phrase in the prompt switches on"
    ),
    "arrow_config": Foreign(None, "Arrow, a router over several adapters"),
    "kasa_config": Foreign(None, "KaSA, another method than LoRA"),
    "layer_replication": Foreign(
        None, "the replication of layers, which makes another model: build that one first"
    ),
    "megatron_config": Foreign(None, "Megatron, an engine that lora_fx does not run on"),
    "megatron_core": Foreign("megatron.core", "Megatron, an engine that lora_fx does not run on"),
    "monteclora_config": Foreign(None, "MonteCLoRA, another method than LoRA"),
    "qalora_group_size": Foreign(16, "QALoRA, another method than LoRA"),
    "runtime_config": Foreign(
        None, "PEFT's runtime (offloading of norms), which saves nothing here"
    ),
    "use_bdlora": Foreign(None, "BD-LoRA, another method than LoRA"),
    "use_qalora": Foreign(False, "QALoRA, another method than LoRA"),
    "velora_config": Foreign(None, "VeLoRA, another method than LoRA"),
}


def is_off(value: object) -> bool:
    """Whether a value can only mean that a feature is not used."""
    if isinstance(value, Collection) and not isinstance(value, str):
        return not value
    return value is None or value is False


_SHORT = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "target": "target_modules",
    "exclude": "exclude_modules",
}
"""What other libraries and the command line call some fields."""


def only_own(values: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Drops fields of other methods that are switched off.

    Args:
        values: Fields by name.
        own: The names that lora_fx acts on.

    Raises:
        ConfigError: If a field of another method is switched on, or a name does not exist.
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in own:
            kept[name] = value
        elif name not in FOREIGN:
            near = hint(name, own, "did you mean '{}'? ", cutoff=0.5, between="' or '")
            if meant := _SHORT.get(name):
                near = f"did you mean {meant!r}? "
            raise ConfigError(
                f"LoraConfig has no field {name!r}; {near}The fields are {', '.join(own)}"
            )
        elif not is_off(value) and value != FOREIGN[name].off and not _is_runtime(name, value):
            off, what = FOREIGN[name]
            raise ConfigError(
                f"LoraConfig.{name}: found {value!r}; lora_fx does not support it: it belongs to {what}. "
                f"Leave it out or give {off!r}"
            )
    return kept


def _is_runtime(name: str, value: object) -> bool:
    """Whether it is PEFT's `LoraRuntimeConfig` with nothing switched on."""
    return name == "runtime_config" and is_off(getattr(value, "ephemeral_gpu_offload", True))
