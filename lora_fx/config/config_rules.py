"""Which fields of `LoraConfig` exclude each other: rules over several of them."""

from __future__ import annotations

import logging
from typing import Any, Final

from lora_fx.config.fields import bad
from lora_fx.config.starts import OPTIONS

__all__ = ["check_together"]

_log = logging.getLogger("lora_fx")

# Whose options they are: loftq_config belongs to init_lora_weights="loftq".
_OWNERS: Final = {name: name.removesuffix("_config") for name in OPTIONS}


def check_together(config: Any) -> None:
    """Refuses what contradicts itself; options of an initialisation that is not chosen are only noted.

    Args:
        config: A `LoraConfig` whose fields are normalised.

    Raises:
        ConfigError: Two fields cannot both have the value that they have.
    """
    _check_selection(config)
    _check_variant(config)
    for name, owner in _OWNERS.items():
        if getattr(config, name) is not None and config.init_lora_weights != owner:
            _log.warning(
                "LoraConfig.%s is ignored: it belongs to init_lora_weights=%r, found %r",
                name,
                owner,
                config.init_lora_weights,
            )


def _check_selection(config: Any) -> None:
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                remedy = f"leave it out, or list the targets instead of {config.target_modules!r}"
                raise bad(name, getattr(config, name), remedy)
    if config.layers_pattern and config.layers_to_transform is None:
        raise bad("layers_pattern", config.layers_pattern, "give layers_to_transform as well")


def _check_variant(config: Any) -> None:
    if config.lora_bias:
        if config.use_dora:
            raise bad("lora_bias", True, "DoRA has no bias on B: leave out use_dora or lora_bias")
        if config.init_lora_weights not in (True, False):
            remedy = f"with init_lora_weights={config.init_lora_weights!r} B has no bias; use True or False"
            raise bad("lora_bias", True, remedy)
    if config.init_lora_weights == "orthogonal":
        for name, rank in (("r", config.r), *config.rank_pattern.items()):
            if rank % 2:
                where = name if name == "r" else f"rank_pattern[{name!r}]"
                raise bad(where, rank, "init_lora_weights='orthogonal' needs an even rank")
