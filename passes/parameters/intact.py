"""Whether everything that a rewritten model's record names is still in the model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lora_fx.errors import CaptureError
from lora_fx.ir.record import Record
from lora_fx.ir.values import PlannedSite, join
from lora_fx.passes.parameters.factors import factor_names
from lora_fx.passes.parameters.own import KEPT
from lora_fx.passes.parameters.tokens import rows_name

__all__ = ["check_intact"]

_SHOWN = 5


def check_intact(model: nn.Module, record: Record) -> None:
    """Refuses a model in which a layer that has an adapter was deleted or replaced after the rewrite.

    Args:
        model: A rewritten model.
        record: Its record.

    Raises:
        CaptureError: With every such place, and what to do.
    """
    lost = list(dict.fromkeys(_lost(model, record)))
    if not lost:
        return
    more = f"\n  and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    raise CaptureError(
        f"this {type(model).__name__} has lost what the rewrite put into it: layers were deleted or replaced "
        "since:\n  "
        + "\n  ".join(lost[:_SHOWN])
        + more
        + "\nPut the layers back, or make the change in the original model and rewrite that "
        "(lora_fx.load_adapter gives it what was saved before)"
    )


def _lost(model: nn.Module, record: Record) -> Iterator[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for adapter, entry in record.adapters.items():
        for row in entry.sites:
            yield from _lost_at_site(modules, row, adapter)
        for tokens in entry.tokens:
            name = rows_name(tokens, adapter)
            if not _has(modules, name):
                yield f"{tokens.name}: it has no trained rows of adapter {adapter!r} ({name})"
        for name in entry.own:
            owner, _, leaf = name.rpartition(".")
            # Of an adapter that is active it is in the place of the base's.
            kept = name if adapter in record.active else join(owner, KEPT + leaf, adapter)
            if not _has(modules, kept):
                yield f"{name}: adapter {adapter!r} has its own value of it, and it is not there"
    for fqn in record.base.kept:
        if fqn not in modules:
            yield f"{fqn}: it is not there, and its quantised weight is known to its graph alone"


def _lost_at_site(modules: dict[str, nn.Module], row: PlannedSite, adapter: str) -> Iterator[str]:
    site = row.site
    if not _has(modules, site.weight):
        yield f"{row.name}: its weight {site.weight} is not there"
        return
    for attribute in factor_names(row).present:
        if not _has(modules, join(site.holder, attribute, adapter)):
            yield f"{row.name}: it has no {attribute} of adapter {adapter!r}"
            return


def _has(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether there is such a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    module = modules.get(owner)
    if module is None:
        return False
    # Also a weight that is computed (torch.nn.utils.parametrize).
    return getattr(module, leaf, None) is not None
