"""The report of an extraction: how much of each change the factors hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from lora_fx.errors import some
from lora_fx.ir import html_block, html_lines, html_table, json_text

__all__ = ["ExtractedSite", "ExtractionReport"]


@dataclasses.dataclass(frozen=True, slots=True)
class ExtractedSite:
    """An operation whose weight changed.

    Attributes:
        name: FQN of the site.
        weight: FQN of the parameter.
        rank: Rank of the factors.
        largest_rank: The largest rank that a change of the weight can have.
        relative_change: ``‖ΔW‖ / ‖W‖``.
        error: ``‖ΔW - s·BA‖ / ‖ΔW‖``, with the factors as they are stored.
        change: ``‖ΔW‖``.
        output_error: ``‖(ΔW - s·BA) x‖ / ‖ΔW x‖`` over the inputs of the site; NaN without inputs.
    """

    name: str
    weight: str
    rank: int
    largest_rank: int
    relative_change: float
    error: float
    change: float
    output_error: float = math.nan

    @property
    def kept(self) -> float:
        """The share of ``‖ΔW‖²`` that the factors hold."""
        return 1 - self.error**2


@dataclasses.dataclass(frozen=True, repr=False)
class ExtractionReport:
    """The result of an extraction. Print it for a line for each site.

    Attributes:
        sites: The adapted operations.
        saved_modules: Modules that the adapter holds in full, such as norms.
        values: FQNs of single parameters that the adapter holds in full: biases, and parameters of modules
            that also have weights of their own.
        buffers: FQNs of buffers that changed, such as batch-norm statistics.
        left_out: Operations that changed and got no rank from the budget.
        unchanged: The number of parameters that are equal in both models.
        parameters: The number of elements that the adapter holds.
    """

    sites: tuple[ExtractedSite, ...]
    saved_modules: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    unchanged: int = 0
    parameters: int = 0

    @property
    def kept(self) -> float:
        """The share of ``‖ΔW‖²`` of all sites that the factors hold; NaN without sites."""
        total = sum(site.change**2 for site in self.sites)
        lost = sum((site.change * site.error) ** 2 for site in self.sites)
        return 1 - lost / total if total else math.nan

    @property
    def output_error(self) -> float:
        """The mean of the sites' output errors; NaN without inputs."""
        errors = [site.output_error for site in self.sites if not math.isnan(site.output_error)]
        return sum(errors) / len(errors) if errors else math.nan

    @property
    def summary(self) -> str:
        """The result in one line."""
        parts = [f"{len(self.sites)} site(s), {self.parameters:,} parameters"]
        if self.sites:
            ranks = [site.rank for site in self.sites]
            span = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
            parts += [f"rank {span}", f"{_percent(self.kept)} of ‖ΔW‖² kept"]
            least = min(self.sites, key=lambda site: site.kept)
            if least.kept < 0.9 * self.kept:
                parts[-1] += f", of {least.name} only {_percent(least.kept)}"
        if not math.isnan(self.output_error):
            parts.append(f"outputs of sites off by {_percent(self.output_error)} of their change")
        return ", ".join(parts)

    def to_json(self) -> str:
        """Return the report as JSON text; values that were not measured are null."""
        return json_text(self)

    def _remarks(self) -> Iterable[str]:
        if self.saved_modules:
            yield f"in full (modules_to_save): {some(self.saved_modules)}"
        if self.values:
            yield f"in full, by their names: {some(self.values)}"
        if self.buffers:
            yield f"buffers: {some(self.buffers)}"
        if self.left_out:
            yield f"left out, the budget is used up: {some(self.left_out)}"

    def __repr__(self) -> str:
        return f"<ExtractionReport: {self.summary}; print it for each site>"

    def __str__(self) -> str:
        return "\n".join([self.summary, *map(_line, self.sites), *self._remarks()])

    def _repr_html_(self) -> str:
        columns = ("site", "rank", "of", "changed by", "kept", "error", "output error")
        rows = [
            (
                site.name,
                str(site.rank),
                str(site.largest_rank),
                _percent(site.relative_change),
                _percent(site.kept),
                f"{site.error:.3g}",
                "" if math.isnan(site.output_error) else f"{site.output_error:.3g}",
            )
            for site in self.sites
        ]
        table = html_table(columns, rows)
        lines = html_lines([self.summary, *self._remarks()])
        return f"<div>{lines}{html_block(f'sites ({len(rows)})', table)}</div>"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _line(site: ExtractedSite) -> str:
    parts = [
        f"rank {site.rank} of {site.largest_rank}",
        f"changed by {_percent(site.relative_change)} of its norm",
        f"error {site.error:.3g} of the change",
    ]
    if not math.isnan(site.output_error):
        parts.append(f"output off by {_percent(site.output_error)}")
    return f"  {site.name}: {', '.join(parts)}"
