"""A plugin for axolotl: ``adapter: lora_fx`` trains an adapter by the ``lora_…`` and ``peft_…`` options.

::

    plugins:
      - lora_fx.axolotl.LoraFxPlugin
    adapter: lora_fx
    lora_r: 16
    lora_alpha: 32
    lora_target_linear: true

axolotl (0.19) asks its plugins for adapters that it does not know (``BasePlugin.load_adapter``). It imports
this module by the name above. Nothing else imports it.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from lora_fx import peft
from lora_fx.errors import ConfigError
from lora_fx.extras import load_optional

__all__ = ["NAME"]

NAME = "lora_fx"
"""The value of ``adapter:`` in axolotl's file that chooses lora-fx."""

_PLUGINS = "axolotl.integrations.base"


def __getattr__(name: str) -> Any:
    """Create the plugin class on first use, because its base class belongs to axolotl."""
    if name == "LoraFxPlugin":
        return _plugin_class()
    raise AttributeError(f"lora_fx.axolotl has no {name}")


@functools.cache
def _plugin_class() -> type:
    base = load_optional(_PLUGINS, "LoraFxPlugin", "axolotl", attribute="BasePlugin")
    return type("LoraFxPlugin", (_Rewrites, base), {"__module__": __name__})


class _Rewrites:
    """Mixin with the methods of lora_fx's plugin for axolotl.

    The plugin's other base class is axolotl's ``BasePlugin``.
    """

    def get_adapter_capabilities(self) -> list[Any]:
        """Return the name and the properties of the adapter, for which axolotl asks its plugins."""
        capabilities = load_optional(
            _PLUGINS, "LoraFxPlugin", "axolotl", attribute="AdapterCapabilities"
        )
        return [capabilities(name=NAME, lora_like=True)]

    def load_adapter(
        self, model: nn.Module, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """Rewrite a model, or load the adapter of ``lora_model_dir`` onto it.

        Args:
            model: The model that axolotl has loaded.
            cfg: The values of axolotl's file.
            inference: True to freeze the adapter.
            config_only: Refused: axolotl then lets TRL's trainer adapt the model with PEFT.

        Returns:
            The model as a ``PeftModel``, and the configuration of PEFT; None if ``adapter:`` names another
            library.

        Raises:
            ConfigError: As :func:`lora_fx.rewrite` and :func:`lora_fx.load_adapter` raise, and for trainers
                that adapt the model themselves.
        """
        if cfg.adapter != NAME:
            return None
        if config_only:
            raise ConfigError(
                f"adapter: {NAME} with rl: {cfg.rl}: axolotl gives that trainer a configuration and no "
                "adapted model, and PEFT would adapt it. Use adapter: lora, or give TRL's trainer "
                "lora_fx.peft.get_peft_model(model, config)"
            )
        load_lora = load_optional(
            "axolotl.loaders.adapter", "LoraFxPlugin", "axolotl", attribute="load_lora"
        )
        _, config = load_lora(model, cfg, config_only=True)
        cast = cfg.peft_autocast_adapter_dtype is not False
        if cfg.lora_model_dir:
            adapted = peft.PeftModel.from_pretrained(
                model,
                cfg.lora_model_dir,
                is_trainable=not inference,
                autocast_adapter_dtype=cast,
            )
        else:
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=cast)
        adapted.print_trainable_parameters()
        return adapted, config
