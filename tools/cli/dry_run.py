"""A plan as a table for the terminal: equal layers in one row, refusals with their reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_fx.ir import Plan

__all__ = ["Row", "folded_names", "folded_rows", "render"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")
# Columns that a narrow terminal does without, in this order, as positions in Plan.columns.
_OPTIONAL = (7, 6, 1, 4, 2)
_GAP = 2
_LISTED = 12


@dataclass(frozen=True, slots=True)
class Row:
    """Sites that differ in the numbers of their layers alone.

    Attributes:
        name: Their common name, ``layers.{0-31}.self_attn.q_proj``.
        count: How many they are.
        cells: The other columns of :attr:`Plan.columns`.
    """

    name: str
    count: int
    cells: tuple[str, ...]


def render(plan: Plan, *, width: int, every: bool = False) -> RenderableType:
    """What ``lora-fx plan`` prints.

    Args:
        plan: The plan.
        width: Columns of the terminal.
        every: One row for each site, instead of one for equal sites of numbered layers.
    """
    parts: list[RenderableType] = [
        Text.assemble("captured by ", (plan.frontend, "bold"), *_notes(plan.notes)),
        _table(plan, width, every),
        _totals(plan),
    ]
    if plan.saved_modules:
        parts.append(Text(f"trained in full: {', '.join(plan.saved_modules)}"))
    parts += [Text(f"rows trained: {len(row.indices)} of {row.name}") for row in plan.tokens]
    if plan.biases:
        parts.append(Text(f"biases trained: {len(plan.biases)}"))
    parts += [Text(f"matched nothing: {entry}", "yellow") for entry in plan.unmatched]
    divided = [
        (row.name, ", ".join(name for name, _ in row.site.parts))
        for row in plan.sites
        if row.site.parts
    ]
    parts += _section("fused, and a part can be named alone", divided, every)
    skipped = [(skipped.site.name, skipped.reason) for skipped in plan.skipped]
    rejected = [(rejection.name, rejection.reason) for rejection in plan.rejections]
    parts += _section("not selected", skipped, every)
    parts += _section("cannot be adapted", rejected, every)
    return Group(*parts)


def folded_rows(plan: Plan) -> list[Row]:
    """The plan's table with equal sites in one row, in order of appearance."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in plan.rows():
        groups.setdefault((_NUMBER.sub("*", name), *cells), []).append(name)
    return [Row(folded_names(names), len(names), tuple(key[1:])) for key, names in groups.items()]


def folded_names(names: Sequence[str]) -> str:
    """One name for names that differ in numbers: ``h.{0-11}.attn``, ``h.{0,2}.{1-3}``."""
    if len(names) == 1:
        return names[0]
    numbers = [_NUMBER.findall(name) for name in names]
    columns: list[set[int]] = [{int(n) for n in column} for column in zip(*numbers, strict=True)]
    spans = iter(_span(sorted(column)) for column in columns)
    return _NUMBER.sub(lambda _: next(spans), names[0])


def _span(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"{{{text}}}" if len(numbers) > 1 else text


def _table(plan: Plan, width: int, every: bool) -> Table:
    single = [Row(name, 1, tuple(cells)) for name, *cells in plan.rows()]
    rows = single if every else folded_rows(plan)
    columns = (*plan.columns, "sites")
    lines = [(row.name, *row.cells, f"×{row.count}" if row.count > 1 else "") for row in rows]
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
    shown = [i for i in range(len(columns)) if columns[i] != "sites" or not every]
    for i in _OPTIONAL:
        if sum(widths[i] + _GAP for i in shown) > width:
            shown.remove(i)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i in shown:
        # Names and patterns read from the left, numbers from the right.
        justify: Literal["left", "right"] = "right" if i > 2 else "left"
        style = "cyan" if i == 0 else ""
        table.add_column(columns[i], justify=justify, no_wrap=i > 0, overflow="fold", style=style)
    for line in lines:
        table.add_row(*(Text(line[i]) for i in shown))
    return table


def _totals(plan: Plan) -> Text:
    total = plan.base_parameters + plan.added_parameters
    share = 100 * plan.trainable_parameters / total if total else 0.0
    flops = sum(row.flops for row in plan.sites)
    saved = sum(row.saved for row in plan.sites)
    return Text.assemble(
        (f"{len(plan.sites):,} {'site' if len(plan.sites) == 1 else 'sites'}", "bold"),
        ", ",
        (f"{plan.trainable_parameters:,} trainable", "bold green"),
        f" of {total:,} parameters ({share:.4f} %); each token costs {flops:,} more FLOPs forward "
        f"and {saved:,} bytes kept for backward",
    )


def _notes(notes: Iterable[str]) -> Iterator[tuple[str, str]]:
    for note in notes:
        yield f"\n  {note}", "dim"


def _section(title: str, rows: Sequence[tuple[str, str]], every: bool) -> Iterator[RenderableType]:
    if not rows:
        return
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in rows:
        groups.setdefault((name if every else _NUMBER.sub("*", name), reason), []).append(name)
    yield Text(f"{title} ({len(rows)}):", "bold")
    listed = list(groups.items())
    for (_, reason), names in listed if every else listed[:_LISTED]:
        count = f" ×{len(names)}" if len(names) > 1 else ""
        name = folded_names(names) if len(names) > 1 else names[0]
        line = Text.assemble((name or "(root)", "cyan"), count, f": {reason}")
        yield Padding(line, (0, 0, 0, 2), expand=False)
    if not every and len(listed) > _LISTED:
        yield Text(f"  and {len(listed) - _LISTED} more: --all lists them", "dim")
