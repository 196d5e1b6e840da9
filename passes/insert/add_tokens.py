"""Gives embeddings the rows of which each is trained as a whole: beside the weight, the base's at the start.

The model of the capture is the pipeline's own.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from lora_fx.errors import ConfigError
from lora_fx.ir import Capture, Kind, Pass, PassResult, PlannedTokens
from lora_fx.passes.parameters import adapter_dtype, add_tokens, tokens_of

__all__ = ["AddTokens", "planned_rows"]


def planned_rows(
    rows: tuple[PlannedTokens, ...] | None, capture: Capture
) -> tuple[PlannedTokens, ...]:
    """Return the rows of embeddings that a pass was given, or else those of the capture's plan."""
    if rows is not None:
        return rows
    return () if capture.plan is None else capture.plan.tokens


@dataclasses.dataclass(frozen=True)
class AddTokens(Pass):
    """The pass.

    Attributes:
        rows: Which rows of what; None for those of the capture's plan.
        adapter: The adapter's name.
    """

    name: ClassVar[str] = "add-tokens"
    kind: ClassVar[Kind] = "in place"
    rows: tuple[PlannedTokens, ...] | None = None
    adapter: str = "default"

    def requires(self, capture: Capture) -> str | None:
        """A plan has to be there."""
        return "nothing is planned" if self.rows is None and capture.plan is None else None

    def __call__(self, capture: Capture) -> PassResult:
        """Adds what is not there yet; a head that is tied to an embedding has the same parameter."""
        model, changed = capture.model, False
        rows = planned_rows(self.rows, capture)
        for row in sorted(rows, key=lambda row: bool(row.tied)):
            try:
                tokens_of(model, row, self.adapter)
                continue
            except AttributeError:
                changed = True
            weight = model.get_parameter(row.site.weight).detach()
            if weight.is_meta:
                raise ConfigError(
                    f"{row.site.weight} is on the meta device, and trainable_token_indices start as rows of "
                    "it; give the model its weights first"
                )
            source = next((one for one in rows if one.name == row.tied), None)
            if source is not None:
                add_tokens(model, row, self.adapter, tokens_of(model, source, self.adapter))
            else:
                start = weight[list(row.indices)].to(adapter_dtype(weight), copy=True)
                add_tokens(model, row, self.adapter, start)
        return PassResult(capture, changed)
