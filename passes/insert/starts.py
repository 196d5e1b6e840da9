"""What the factors of a site hold before training, and what that does to the base weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.starts import changes_base, needs_data
from lora_fx.errors import ConfigError
from lora_fx.ir.values import Factors, PlannedSite
from lora_fx.passes.insert.seeds import site_generator
from lora_fx.passes.insert.start_data import corda, lora_ga
from lora_fx.passes.insert.start_loftq import loftq
from lora_fx.passes.insert.start_plain import orthogonal, plain
from lora_fx.passes.insert.start_weight import olora, pissa
from lora_fx.passes.parameters.factors import adapter_dtype
from lora_fx.passes.parameters.matrices import as_factors, as_matrices, part_of, subtracted, wide
from lora_fx.passes.patterns.registry import pattern_of

__all__ = ["Start", "data_start", "initial_start"]


@dataclasses.dataclass(frozen=True)
class Start:
    """What a site starts with.

    Attributes:
        a, b: What the factors hold.
        weight: What becomes of the whole weight, a new tensor; None if it stays as it is.
        subtracted: Whether that is ``W - s · B A``, so that the sum of both is W still.
    """

    a: torch.Tensor
    b: torch.Tensor
    weight: torch.Tensor | None = None
    subtracted: bool = False


def initial_start(row: PlannedSite, weight: torch.Tensor, config: LoraConfig) -> Start:
    """The start from the weight alone. One that needs data is a plain one until it has some.

    Args:
        row: The site.
        weight: Its weight; it is not written.
        config: Which start; random numbers come from a generator of the site's own.

    Raises:
        ConfigError: If the weight has values that are not finite.
    """
    start = config.init_lora_weights
    shapes = pattern_of(row.site).factors(row.site, row.rank)
    if needs_data(start):
        start = True
    if weight.device.type == "meta":
        return _without_values(shapes, weight, start)
    generator = site_generator(row.name, config)
    if not isinstance(start, str) or start == "gaussian":
        return Start(*_placed(*plain(row.site, shapes, start, generator), weight))
    if start == "orthogonal":
        return Start(*_placed(*orthogonal(row.site, shapes, generator), weight))
    if not torch.isfinite(weight).all():
        raise ConfigError(
            f"{row.name}: init_lora_weights={start!r} decomposes the weight, and {row.site.weight} has "
            "values that are not finite"
        )
    return _from_weight(row, weight, config, generator)


def data_start(
    row: PlannedSite, weight: torch.Tensor, config: LoraConfig, seen: torch.Tensor
) -> Start:
    """The start from data, for the initialisations that want some.

    Args:
        row: The site.
        weight: Its weight; it is not written.
        config: Which start.
        seen: For ``eva`` the components [r, in]; for ``corda`` the second moments of the inputs
            [in, in]; for ``lora_ga`` the gradient of the weight, in its shape.

    Raises:
        ConfigError: If the statistics do not allow a start.
    """
    shapes = pattern_of(row.site).factors(row.site, row.rank)
    if config.init_lora_weights == "eva":
        return Start(*_placed(seen, torch.zeros(shapes.b), weight))
    exact = as_matrices(row.site, wide(part_of(row.site, weight)))
    options: Any = getattr(config, f"{config.init_lora_weights}_config")
    if config.init_lora_weights == "corda":
        a, b = corda(exact[0], seen, row.rank, row.scale, options["corda_method"])
    else:
        gradient = as_matrices(row.site, wide(part_of(row.site, seen)).to(exact.device))
        rank, generator = row.rank // row.site.groups, site_generator(row.name, config)
        a, b = lora_ga(exact, gradient, rank, row.scale, options, generator)
    return _taken_out(row, weight, *as_factors(shapes, a, b))


def _from_weight(
    row: PlannedSite, weight: torch.Tensor, config: LoraConfig, generator: torch.Generator
) -> Start:
    start, site = str(config.init_lora_weights), row.site
    shapes = pattern_of(site).factors(site, row.rank)
    if start == "loftq":
        options: Any = config.loftq_config
        a, b, changed = loftq(row, weight, options["loftq_bits"], options["loftq_iter"])
        return Start(*_placed(*as_factors(shapes, a, b), weight), changed)
    matrices = as_matrices(site, wide(part_of(site, weight.detach())))
    rank = row.rank // site.groups
    if start == "olora":
        a, b = olora(matrices, rank)
    else:
        iterations = int(start.rpartition("_")[2]) if "_niter_" in start else None
        a, b = pissa(matrices, rank, row.scale, iterations, generator)
    return _taken_out(row, weight, *as_factors(shapes, a, b))


def _taken_out(row: PlannedSite, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Start:
    a, b = _placed(a, b, weight)
    return Start(a, b, subtracted(row, weight, a, b), subtracted=True)


def _placed(
    a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = adapter_dtype(weight)
    return a.to(weight.device, dtype), b.to(weight.device, dtype)


def _without_values(shapes: Factors, weight: torch.Tensor, start: bool | str) -> Start:
    dtype = adapter_dtype(weight)
    a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape in (shapes.a, shapes.b))
    changed = changes_base(start)
    return Start(a, b, torch.empty_like(weight) if changed else None, changed and start != "loftq")
