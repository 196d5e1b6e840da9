"""Fields of the configuration that nothing acts on yet: refused, so that none is dropped in silence."""

from __future__ import annotations

from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError

__all__ = ["refuse_pending"]

_FIELDS = ("use_dora", "lora_bias")
_STARTS = (True, False, "gaussian")


def refuse_pending(config: LoraConfig) -> None:
    """Refuses what is not built yet.

    Raises:
        ConfigError: If the configuration asks for it.
    """
    for name in _FIELDS:
        if getattr(config, name):
            raise ConfigError(
                f"LoraConfig.{name}: found {getattr(config, name)!r}; not supported yet"
            )
    if config.init_lora_weights not in _STARTS:
        raise ConfigError(
            f"LoraConfig.init_lora_weights: found {config.init_lora_weights!r}; not supported yet"
        )
