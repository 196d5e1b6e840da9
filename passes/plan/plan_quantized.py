"""What a configuration asks of quantised weights that cannot be done to them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.starts import changes_base
from lora_fx.errors import ConfigError
from lora_fx.formats.weights import quantization_of
from lora_fx.ir.values import Site

__all__ = ["refuse_quantized"]


def refuse_quantized(
    model: nn.Module, config: LoraConfig, saved: Iterable[str], sites: Iterable[Site]
) -> None:
    """Refuses to train quantised weights in full, and starts that would write into them.

    Args:
        model: The model.
        config: What is asked for.
        saved: The modules that are to be trained in full.
        sites: The sites that are to be adapted.

    Raises:
        ConfigError: With the name of the weight, and what to do.
    """
    for name in saved:
        for leaf, parameter in model.get_submodule(name).named_parameters():
            found = quantization_of(parameter)
            if found is not None:
                raise ConfigError(
                    f"modules_to_save names {name}, and {leaf} in it is stored as {found}, which cannot be "
                    f"trained: leave it out, or quantise the model with exclude=[{name!r}]"
                )
    start = config.init_lora_weights
    if not changes_base(start):
        return
    for site in sites:
        if site.quantized is not None:
            raise ConfigError(
                f"init_lora_weights={start!r} changes the base weight, and {site.weight} is stored as "
                f"{site.quantized}. Use it over the dense model, or use True here and then "
                "lora_fx.replace_lora_weights_loftq(model, original), which makes up for what quantising "
                "lost; 'eva', 'orthogonal' and 'gaussian' leave the base as it is"
            )
