"""What the variants of LoRA cost, and where they have no meaning: DoRA, and a bias on B."""

from __future__ import annotations

import dataclasses

from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir import Site

__all__ = ["Costs", "makes_base_again", "variant_costs", "variant_objection"]


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """What a variant adds to a site.

    Attributes:
        parameters: Trainable elements.
        flops: Forward FLOPs for one token; the norm does not depend on the number of tokens and is not in it.
        saved: Elements saved for backward for one token, if the next operation does not keep them anyway.
    """

    parameters: int = 0
    flops: int = 0
    saved: int = 0


def makes_base_again(site: Site) -> bool:
    """Whether the base product is made again for the gradient of a magnitude.

    What a layer that widens gives is nearly always kept by the next one (an activation), and what one gives
    that narrows is small beside its work: there the output is kept. docs/benchmarks.md has both costs.

    Args:
        site: The site.
    """
    square = site.in_features == site.out_features
    return site.pattern == "linear" and square and not site.part_of


def variant_costs(site: Site, config: LoraConfig) -> Costs:
    """What the configuration's variant adds to a site."""
    out = site.out_features
    if config.use_dora:
        return Costs(out, 2 * out, 0 if makes_base_again(site) else out)
    return Costs(out, out) if config.lora_bias else Costs()


def variant_objection(site: Site, config: LoraConfig) -> str | None:
    """Why a selected site cannot have the configuration's variant; None if it can.

    Raises:
        ConfigError: If it cannot, and the configuration names it in a list: then it is what was asked for.
    """
    reason = _reason(site, config)
    if reason is not None and _named(site.name, config):
        raise ConfigError(f"{site.name}: {reason}")
    return reason


def _reason(site: Site, config: LoraConfig) -> str | None:
    if config.use_dora and site.experts:
        return (
            "a weight with a matrix for each expert has no magnitude (as in PEFT): leave it out, or set "
            "use_dora=False"
        )
    if (config.use_dora or config.lora_bias) and not all(call.axes for call in site.calls):
        what, field = "DoRA scales", "use_dora"
        if config.lora_bias:
            what, field = "a bias on B adds to", "lora_bias"
        return (
            f"{what} each output feature, and nothing says where they are (an ellipsis in the equation "
            f"comes after them): write the dimensions out, or set {field}=False"
        )
    if config.lora_bias and site.experts:
        return (
            "a weight with a matrix for each expert has no bias on B (as in PEFT): leave it out, or set "
            "lora_bias=False"
        )
    if config.lora_bias and site.family == "embedding":
        return "an embedding has no bias on B (as in PEFT): leave it out, or set lora_bias=False"
    return None


def _named(name: str, config: LoraConfig) -> bool:
    targets = config.target_modules
    if not isinstance(targets, tuple):
        return False
    return any(name == target or name.endswith(f".{target}") for target in targets)
