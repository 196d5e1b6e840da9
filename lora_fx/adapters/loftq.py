"""Factors that make up for what quantizing a base has lost: LoftQ's first step, over any format.

Quantizing leaves ``Q ≈ W``. The best product of rank r for what is missing is the leading part of its
singular value decomposition (LoftQ: Li et al. 2023, arXiv:2310.08659, section 3.1, with Q as it is):
``B A = [W - Q]_r / s``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.manage import adapter_record, the_adapter
from lora_fx.errors import CheckpointError, ConfigError
from lora_fx.files import WeightFiles
from lora_fx.formats import quantization_of
from lora_fx.ir import AdapterRecord, PlannedSite
from lora_fx.kinds import kind_of
from lora_fx.passes.insert import pissa, site_generator, slot_start
from lora_fx.passes.parameters import (
    as_factors,
    as_matrices,
    base_weight,
    factor_names,
    factors_of,
    inside,
    matrix_shape,
    part_of,
)
from lora_fx.passes.patterns import pattern_of

__all__ = ["CompensatedSite", "replace_lora_weights_loftq"]


@dataclasses.dataclass(frozen=True, slots=True)
class CompensatedSite:
    """What the factors of one site make up for.

    Attributes:
        name: FQN of the site.
        before: ``‖W - Q‖ / ‖W‖``, Frobenius: what quantizing lost.
        after: ``‖W - (Q + s·BA)‖ / ‖W‖``.
        kept: Whether the new factors were kept; False if the callback declined them.
    """

    name: str
    before: float
    after: float
    kept: bool = True


@inside
def replace_lora_weights_loftq(
    model: nn.Module,
    original: nn.Module | str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    callback: Callable[[nn.Module, str], bool] | None = None,
    iterations: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[CompensatedSite, ...]:
    """Gives an adapter over a quantized base the factors that best make up for what quantizing lost.

    What the factors held is lost, so that this comes before training. Sites over weights that are not
    quantized keep theirs; a magnitude becomes the norm of the new ``Q + s·BA``. Parameters are
    written in place: an optimizer and a compiled model go on. One dense weight is in memory at a time.

    Unlike PEFT's function of this name it takes every format, divides by the adapter's scale (PEFT is right
    where that is 1), and changes nothing if a weight is missing.

    Args:
        model: A rewritten model over a quantized base; the factors are changed.
        original: The model as it was before it was quantized; or its folder with ``model.safetensors``, or
            with shards and their index, or one such file, of which one tensor is read at a time.
        adapter_name: Which adapter; by default the only one, or the only active one.
        callback: Called with the model and the site's name after each site; if it returns False, that
            site gets its factors back. With one, sites are done one after the other.
        iterations: For a fast decomposition, by so many iterations of a subspace; the exact one by default.
            What is lost is noise, whose singular values lie close together: 16 find other directions,
            which leave next to nothing more (0.2 % in the tests).
        progress: Called with (done, total, site name) before each site.

    Returns:
        A row for each site that is over a quantized weight.

    Raises:
        ConfigError: If several adapters could be meant, no site of the adapter is over a quantized weight, or
            the original has another one, a quantized one or one that is not finite.
        CheckpointError: If the files are missing or damaged, or have no such weight.
    """
    adapter_name = the_adapter(model, adapter_name)
    entry = adapter_record(model, adapter_name)
    rows = tuple(row for row in entry.sites if row.site.quantized is not None)
    if not rows:
        raise ConfigError(
            f"no site of the adapter {adapter_name!r} is over a quantized weight, so that nothing was lost: "
            "over a dense base use init_lora_weights='pissa' or 'loftq'"
        )
    if iterations is not None and iterations < 1:
        raise ConfigError(f"iterations={iterations}: it is at least 1, or None")
    weights = _Originals(original, getattr(model, "base_model_prefix", ""))
    done: list[CompensatedSite] = []
    waiting: list[tuple[PlannedSite, dict[str, torch.Tensor]]] = []
    for number, row in enumerate(rows):
        if progress is not None:
            progress(number, len(rows), row.name)
        made, site = _compensated(model, row, entry, adapter_name, weights.of(row), iterations)
        if callback is None:
            waiting.append((row, made))
        else:
            site = dataclasses.replace(site, kept=_tried(model, row, adapter_name, made, callback))
        done.append(site)
    # All that can fail is done.
    for row, made in waiting:
        _write(model, row, adapter_name, made)
    return tuple(done)


class _Originals:
    """Dense weights of a model or of files."""

    def __init__(self, original: nn.Module | str | os.PathLike[str], prefix: Any) -> None:
        self.prefix = prefix if isinstance(prefix, str) else ""
        self.model = original if isinstance(original, nn.Module) else None
        self.files = (
            None if isinstance(original, nn.Module) else WeightFiles(Path(os.fspath(original)))
        )

    def of(self, row: PlannedSite) -> torch.Tensor:
        """The weight of a site, in its layout."""
        name, shape = row.site.weight, row.site.weight_shape
        if self.files is not None:
            # transformers writes a model without a head under names without its prefix.
            inner = name.removeprefix(f"{self.prefix}.") if self.prefix else name
            found = self.files.tensor(name, inner, f"{self.prefix}.{name}")
            if found is None:
                raise CheckpointError(
                    f"{self.files.path} has no {name}: give the files of the model that was quantized"
                )
        else:
            assert self.model is not None
            found = dict(self.model.named_parameters(remove_duplicate=False)).get(name)
            if found is None:
                raise ConfigError(
                    f"original has no {name}: give the model that was quantized, as it was before"
                )
        if quantization_of(found) is not None or found.is_meta:
            how = "on the meta device" if found.is_meta else f"stored as {quantization_of(found)}"
            raise ConfigError(
                f"{name} of the original is {how}: give the dense model, or its files"
            )
        if tuple(found.shape) != tuple(shape):
            raise ConfigError(
                f"{name} is {list(found.shape)} in the original and {list(shape)} here: give the model that "
                "was quantized"
            )
        if not torch.isfinite(found).all():
            raise ConfigError(f"{name} of the original has values that are not finite")
        return found.detach()


def _compensated(
    model: nn.Module,
    row: PlannedSite,
    entry: AdapterRecord,
    adapter: str,
    original: torch.Tensor,
    iterations: int | None,
) -> tuple[dict[str, torch.Tensor], CompensatedSite]:
    """What the parameters of a site are to hold, by the names of its factors, and its row of the report."""
    if not kind_of(row).low_rank:
        raise ConfigError(
            f"{row.name}: the kind {row.kind!r} has no factors that could make up for what quantizing lost"
        )
    site, stored = row.site, base_weight(model, row.site)
    _, out, inner = matrix_shape(site)
    if row.rank > min(out, inner):
        raise ConfigError(
            f"{row.name}: rank {row.rank} is more than a matrix [{out}, {inner}] has: set a smaller one with "
            "rank_pattern"
        )
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    exact = part_of(site, original.to(stored.device, wide))
    lost = as_matrices(site, exact - part_of(site, stored).to(wide))
    generator = site_generator(f"{row.name}.loftq", entry.config)
    a, b = pissa(lost, row.rank, row.scale, iterations, generator)
    left = lost - row.scale * (b @ a)
    size = float(exact.norm().clamp_min(torch.finfo(wide).tiny))
    report = CompensatedSite(row.name, float(lost.norm()) / size, float(left.norm()) / size)
    shapes = pattern_of(site).factors(site, row.rank)
    a, b = as_factors(shapes, a, b)
    names = factor_names(row)
    made = {names.a: a, names.b: b}
    for slot in kind_of(row).slots(site):
        if slot.neutral is None:
            made[slot.name] = slot_start(row, slot, stored, (a, b), entry.config)
        else:
            made[slot.name] = torch.full(slot.shape, slot.neutral)
    return made, report


def _tried(
    model: nn.Module,
    row: PlannedSite,
    adapter: str,
    made: dict[str, torch.Tensor],
    callback: Callable[[nn.Module, str], bool],
) -> bool:
    """Writes factors, and takes them back if nobody wants them."""
    factors = factors_of(model, row, adapter).values
    before = {name: factors[name].detach().clone() for name in made}
    _write(model, row, adapter, made)
    kept = False
    try:
        kept = bool(callback(model, row.name))
    finally:
        if not kept:
            _write(model, row, adapter, before)
    return kept


def _write(model: nn.Module, row: PlannedSite, adapter: str, made: dict[str, torch.Tensor]) -> None:
    factors = factors_of(model, row, adapter).values
    with torch.no_grad():
        for name, value in made.items():
            factors[name].copy_(value)
