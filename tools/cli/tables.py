"""A plan and the report of an export as tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_fx.export.report import ExportReport, fusions_text, short, size_text, worst_by_layer
from lora_fx.ir import Plan
from lora_fx.tools.cli import console

if TYPE_CHECKING:
    from lora_fx.tools.cli.options import Training
    from lora_fx.tools.cluster import Need

__all__ = ["folded", "render_export", "render_need", "render_plan"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=[.(]|$)|^\d+(?=[.(]|$)")
# Columns that a narrow terminal does without, in this order, as positions in Plan.columns.
_OPTIONAL = (7, 6, 1, 4, 2)
_GAP = 2
_LISTED = 12


@dataclass(frozen=True, slots=True)
class Row:
    """Sites or regions that differ in the numbers of their layers alone.

    Attributes:
        name: Their common name, ``layers.{0-31}.self_attn.q_proj``.
        count: How many they are.
        cells: The other columns.
    """

    name: str
    count: int
    cells: tuple[str, ...]

    @property
    def times(self) -> str:
        """``×32``; empty for one."""
        return f"×{self.count}" if self.count > 1 else ""


def render_plan(plan: Plan, *, width: int, every: bool = False) -> RenderableType:
    """What ``lora-fx plan`` prints.

    Args:
        plan: The plan.
        width: Columns of the terminal.
        every: One row for each site, instead of one for equal sites of numbered layers.
    """
    parts: list[RenderableType] = [
        Text.assemble("captured by ", (plan.frontend, "bold")),
        *(_indented(Text(note, "dim")) for note in plan.notes),
        _sites(plan, width, every),
        _totals(plan),
    ]
    parts += map(Text, plan.remarks())
    parts += [Text(f"matched nothing: {entry}", "yellow") for entry in plan.unmatched]
    for title, rows in plan.sections().items():
        parts += _section(title, rows, every)
    return Group(*parts)


def folded(rows: Iterable[tuple[str, ...]]) -> list[Row]:
    """One row for all that differ in the numbers of their names alone, in order of appearance.

    Args:
        rows: Names, each with its cells.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
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


def _sites(plan: Plan, width: int, every: bool) -> Table:
    single = [Row(name, 1, tuple(cells)) for name, *cells in plan.rows()]
    rows = single if every else folded(plan.rows())
    columns = (*plan.columns, "sites")
    lines = [(row.name, *row.cells, row.times) for row in rows]
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
    trained, of_all = plan.totals()
    flops = sum(row.flops for row in plan.sites)
    saved = sum(row.saved for row in plan.sites)
    return Text.assemble(
        (f"{len(plan.sites):,} {'site' if len(plan.sites) == 1 else 'sites'}", "bold"),
        ", ",
        (trained, "bold green"),
        f"{of_all}; each token costs {flops:,} more FLOPs forward and {saved:,} bytes kept for "
        "backward",
    )


def _indented(line: Text) -> Padding:
    """A line, and what is wrapped of it, under a title."""
    return Padding(line, (0, 0, 0, 2), expand=False)


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
        yield _indented(line)
    if not every and len(listed) > _LISTED:
        yield Text(f"  and {len(listed) - _LISTED} more: --all lists them", "dim")


def render_need(need: Need, training: Training, *, text: bool) -> RenderableType:
    """What ``lora-fx plan --mesh`` prints below the plan: memory of a GPU, and what it sends.

    Args:
        need: What was found.
        training: What was asked.
        text: Whether samples are made of tokens.
    """
    from lora_fx.tools.cluster import Mesh

    tokens = f"of {training.sequence} tokens " if text else ""
    more = ", blocks computed again" if training.checkpointing else ""
    title = (
        f"a step of AdamW on {Mesh.parse(training.mesh or '')}: {training.batch} samples "
        f"{tokens}on each GPU, {training.dtype}{more}"
    )
    parts = [
        ("frozen weights", need.weights),
        ("adapters", need.adapters),
        ("gradients", need.gradients),
        ("optimizer state", need.optimizer),
        ("kept activations", need.activations),
        ("gathered blocks", need.gathered),
        ("peak", need.peak),
    ]
    sent = need.traffic
    moved = [
        ("weights gathered", sent.gather),
        ("gradients scattered", sent.scatter),
        ("gradients reduced", sent.reduce),
    ]
    rows = [(name, _gigabytes(size)) for name, size in parts]
    rows += [(f"sent: {name}", _gigabytes(size)) for name, size in moved if size]
    return Group(Text(title, "bold"), console.table("on each GPU", "GB", rows=rows, right=["GB"]))


def _gigabytes(size: int) -> str:
    """Bytes as 10^9 of them, with three digits that count."""
    return f"{size / 1e9:.3g}" if size < 1e12 else f"{size / 1e9:,.0f}"


_OPERATORS = 8  # how many of them are named


def render_export(report: ExportReport) -> RenderableType:
    """What ``lora-fx export`` prints.

    Args:
        report: What ``export_onnx`` returned.
    """
    # Which axes a task leaves fixed is a fact of the model, no answer to a wish.
    fixed = report.fixed_axes if report.task is None else {}
    parts: list[RenderableType] = [
        console.facts(_facts(report), "dim"),
        console.table("", "name", "axes", "at most", rows=_ports(report)),
        *_pairs(("fixed axis", "because"), fixed),
        *_pairs(("fixed argument", "value"), report.baked_arguments),
    ]
    if report.verified:
        parts.append(_parity(report))
    parts += _pairs(("not fused", "because"), report.not_fused)
    parts += _pairs(("shape not tried", "because PyTorch says"), report.shapes_skipped)
    if report.encoder is not None:
        parts += [Text("with the encoder beside it:", "dim"), render_export(report.encoder)]
    return Group(*parts)


def _pairs(headings: tuple[str, str], found: Mapping[str, str]) -> list[Table]:
    return [console.table(*headings, rows=found.items())] if found else []


def _facts(report: ExportReport) -> Iterator[tuple[str, str | Text]]:
    for name, size in report.files.items():
        yield "weights" if name in report.data_files else "file", f"{name}  {size_text(size)}"
    yield "written as", f"{report.dtype}, opset {report.opset}"
    if report.task is not None:
        yield "task", report.task
    yield from (("few bits", str(form)) for form in report.quantized)
    if report.adapters == "inline":
        yield "adapters", "are products of their own beside the operations"
    if sites := len(report.swappable):
        places = f"at {sites} place{'s'[: sites > 1]}"
        if report.bank is None:
            yield "adapters", f"of any rank are inputs, {places}"
        else:
            yield "adapters", f"one for each row of a batch, {places}"
            yield "bank", str(report.bank)
    if report.fused:
        yield "fused", f"{report.optimize}: {fusions_text(report.fused)}"
    named = [f"{count} {op}" for op, count in list(report.operators.items())[:_OPERATORS]]
    more = ", …" if len(report.operators) > _OPERATORS else ""
    yield "nodes", f"{report.nodes}: {', '.join(named)}{more}"
    yield "tensors", str(report.initializers)
    if report.verified:
        yield "checked", f"on {report.provider} against {report.reference}"
    else:
        yield "checked", Text(f"NOT CHECKED: {report.unverified_reason}", "bold yellow")
    if report.verified and report.values_tried:
        yield "values", report.values_tried
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())
    yield "seconds", f"{report.total_seconds:.1f}: {stages}"


def _ports(report: ExportReport) -> Iterator[tuple[str, str, str, str]]:
    for kind, ports in (("input", report.inputs), ("output", report.outputs)):
        for name, axes in short(ports).items():
            limits = {axis: report.axis_limits.get(str(axis)) for axis in axes}
            bounded = [f"{axis} {limit}" for axis, limit in limits.items() if limit is not None]
            yield kind, name, ", ".join(map(str, axes)), ", ".join(bounded)


def _parity(report: ExportReport) -> Table:
    half = any(row.pytorch_rel_error is not None for row in report.parity)
    headings = [f"parity on {len(report.shapes_tried)} shapes", "largest error", "relative"]
    headings += [f"PyTorch in {report.dtype}"] if half else []
    rows = []
    for row in worst_by_layer(report.parity):
        cells = [row.name, f"{row.max_abs_error:.1e}", f"{row.max_rel_error:.1e}"]
        if half:
            narrow = row.pytorch_rel_error
            cells.append("" if narrow is None else f"{narrow:.1e}")
        rows.append([*cells, f"{row.tolerance:.0e}" if row.tolerance else "equal"])
    return console.table(*headings, "allowed", rows=rows)
