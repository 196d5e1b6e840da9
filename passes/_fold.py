"""Folds what adapters have at one weight into it: accumulated in fp64, slice by slice, and rounded once."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lora_fx.errors import MergeError
from lora_fx.passes._change import weight_change
from lora_fx.passes._own import own_value
from lora_fx.passes._rounding import rounded
from lora_fx.record import Record
from lora_fx.types import PlannedSite

__all__ = ["Fold"]

_CHUNK = 1 << 22  # elements of a weight that are widened to fp64 at a time


@dataclasses.dataclass(frozen=True)
class Fold:
    """Everything that is folded into one weight.

    Attributes:
        model: The rewritten model.
        record: Its record.
        rows: Sites of the weight, each with the name of its adapter.
    """

    model: nn.Module
    record: Record
    rows: tuple[tuple[PlannedSite, str], ...]

    @property
    def name(self) -> str:
        """FQN of the first site."""
        return self.rows[0][0].name

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapter of every site."""
        return tuple(adapter for _, adapter in self.rows)

    def folded(self, old: torch.Tensor) -> torch.Tensor:
        """The merged weight in the dtype of the old one; no second weight in fp64 is made.

        Raises:
            MergeError: If it overflows.
        """
        wide = torch.float32 if old.device.type == "mps" else torch.float64
        site = self.rows[0][0].site
        axis, old = site.axis, old.reshape(site.applied_shape)
        merged = torch.empty_like(old)
        features = old.shape[axis]
        step = features if site.groups > 1 else max(1, _CHUNK * features // max(1, old.numel()))
        for start in range(0, features, step):
            # A copy also where the dtype is fp64 already: `old` belongs to the user's model, too.
            total = old.narrow(axis, start, min(step, features - start)).to(wide, copy=True)
            self._add(total, start)
            merged.narrow(axis, start, total.shape[axis]).copy_(rounded(total, old.dtype))
        if not torch.isfinite(merged).all() and torch.isfinite(old).all():
            raise MergeError(
                f"{self.name}: the merged weight overflows {old.dtype}; merge in a wider dtype"
            )
        return merged.reshape(site.weight_shape)

    def exact(self, old: torch.Tensor) -> torch.Tensor:
        """The merged weight in fp64."""
        total = old.to(torch.float64, copy=True)
        self._add(total.view(self.rows[0][0].site.applied_shape), 0)
        return total

    def _add(self, total: torch.Tensor, start: int) -> None:
        """Adds everything to a slice of the weight that begins at ``start``."""
        several = any(row.dora for row, _ in self.rows) and len(self.rows) > 1
        moved = self._moved
        before = total.clone() if several and len(moved) > 1 else total
        self._add_moves(total, start, moved)
        # What DoRA adds depends on the unadapted weight, whatever else is added to it.
        base = total.clone() if several else total
        for row, adapter in self.rows:
            axis = row.site.axis
            first, last = row.site.rows or (0, row.site.applied_shape[axis])
            low, high = max(first, start), min(last, start + total.shape[axis])
            if low >= high:
                continue
            seen = base
            if row.dora and adapter in moved and len(moved) > 1:
                # Never active together: each was trained on the base that its own start has left.
                seen = before.clone()
                self._add_moves(seen, start, (adapter,))
            outputs = slice(low - first, high - first) if row.site.groups == 1 else slice(None)
            here = (axis, low - start, high - low)
            change = weight_change(self.model, row, adapter, seen.narrow(*here), outputs)
            total.narrow(*here).add_(change)

    @property
    def _moved(self) -> tuple[str, ...]:
        """The adapters whose initialisation has changed the weight itself."""
        weight = self.rows[0][0].site.weight
        owners = dict.fromkeys(self.adapters)
        return tuple(name for name in owners if weight in self.record.adapters[name].own)

    def _add_moves(self, total: torch.Tensor, start: int, adapters: tuple[str, ...]) -> None:
        """Adds what initialisations did to the weight itself."""
        site = self.rows[0][0].site
        for adapter in adapters:
            moved = own_value(self.model, adapter, site.weight).detach()
            for value, sign in ((moved, 1), (self.record.originals[site.weight], -1)):
                applied = value.reshape(site.applied_shape)
                part = applied.narrow(site.axis, start, total.shape[site.axis])
                total.add_(part.to(total), alpha=sign)
