"""Tables for the terminal: plans, the needs of a training step, heat maps, and reports of an export."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_fx.export.report import ExportReport, fusions_text, short, size_text, worst_by_layer
from lora_fx.ir import FoldedRow, Plan, folded, grouped
from lora_fx.tools.cli import console

if TYPE_CHECKING:
    from lora_fx.tools.cli.options import Training
    from lora_fx.tools.cluster import Need
    from lora_fx.tools.fit import Fit
    from lora_fx.tools.timeline import Row

__all__ = [
    "dict_of_fit",
    "render_export",
    "render_fits",
    "render_heat",
    "render_need",
    "render_plan",
]

# Positions in Plan.columns of the columns that a narrow terminal omits, the first to omit first.
_OPTIONAL = (7, 6, 1, 4, 2)
_GAP = 2
_LISTED = 12


def render_plan(plan: Plan, *, width: int, every: bool = False) -> RenderableType:
    """Render the output of ``lora-fx plan``.

    Args:
        plan: The plan.
        width: Columns of the terminal.
        every: One row for each site, instead of one for equal sites of numbered layers.
    """
    parts: list[RenderableType] = [
        _totals(plan),
        *(Text(line, "yellow") for line in plan.warnings()),
        *_sites(plan, width, every),
    ]
    parts += map(Text, plan.remarks())
    for title, rows in plan.sections().items():
        parts += _section(title, rows, every)
    for title, *notes in filter(None, [plan.capture_lines()]):
        parts += [Text(title), *(_indented(Text(note.strip(), "dim")) for note in notes)]
    advice = plan.advice.lines()
    parts += [Text("advice:", "bold")] if advice else []
    parts += [_indented(Text(line)) for line in advice]
    return Group(*parts)


def _sites(plan: Plan, width: int, every: bool) -> Iterator[RenderableType]:
    single = [FoldedRow(name, 1, tuple(cells)) for name, *cells in plan.rows()]
    rows = single if every else folded(plan.rows())
    columns = (*plan.columns, "sites")
    lines = [(row.name, *row.cells, row.times) for row in rows]
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
    shown = [i for i in range(len(columns)) if columns[i] != "sites" or not every]
    for i in _OPTIONAL:
        if sum(widths[i] + _GAP for i in shown) > width:
            shown.remove(i)
    left_out = [columns[i] for i in range(len(columns)) if i not in shown and columns[i] != "sites"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i in shown:
        # Names and patterns are left-aligned, numbers are right-aligned.
        justify: Literal["left", "right"] = "right" if i > 2 else "left"
        style = "cyan" if i == 0 else ""
        table.add_column(columns[i], justify=justify, no_wrap=i > 0, overflow="fold", style=style)
    for line in lines:
        table.add_row(*(Text(line[i]) for i in shown))
    yield table
    if left_out:
        yield Text(f"not shown at this width: {', '.join(left_out)} (--json has them)", "dim")


def _totals(plan: Plan) -> Text:
    trained, of_all = plan.totals()
    return Text.assemble(
        (f"{len(plan.sites):,} {'site' if len(plan.sites) == 1 else 'sites'}", "bold"),
        ", ",
        (trained, "bold green"),
        f"{of_all}\n{plan.cost()}",
    )


def _indented(line: Text) -> Padding:
    """Indent a line under a title, including the parts that wrap."""
    return Padding(line, (0, 0, 0, 2), expand=False)


def _section(title: str, rows: Sequence[tuple[str, str]], every: bool) -> Iterator[RenderableType]:
    if not rows:
        return
    yield Text(f"{title} ({len(rows)}):", "bold")
    listed = [FoldedRow(name, 1, (reason,)) for name, reason in rows] if every else grouped(rows)
    for row in listed if every else listed[:_LISTED]:
        yield _indented(Text.assemble((row.name or "(root)", "cyan"), f": {row.cells[0]}"))
    if not every and len(listed) > _LISTED:
        yield Text(f"  and {len(listed) - _LISTED} more: --all lists them", "dim")


def render_need(
    need: Need, training: Training, largest: Sequence[Row], *, text: bool
) -> RenderableType:
    """Render the memory and traffic of a GPU in a training step, to print it below the plan.

    Args:
        need: Memory and traffic of a GPU.
        training: Options of the training step.
        largest: The largest tensors at the peak, or nothing if they were not recorded.
        text: True if samples consist of tokens.
    """
    parts = [
        ("frozen weights", need.weights),
        ("adapters", need.adapters),
        ("gradients", need.gradients),
        ("optimizer state", need.optimizer),
        ("kept activations", need.activations),
        ("gathered blocks", need.gathered),
        ("peak", need.peak),
        *(
            [("on the host", need.host), ("to and from the host", 2 * need.host)]
            if need.host
            else []
        ),
    ]
    sent = need.traffic
    moved = [
        ("weights gathered", sent.gather),
        ("gradients scattered", sent.scatter),
        ("gradients reduced", sent.reduce),
    ]
    unit, of = _unit(need.peak)
    rows = [(name, _amount(size / of)) for name, size in parts]
    rows += [(f"sent: {name}", _amount(size / of)) for name, size in moved if size]
    title = Text(training.title(text=text), "bold")
    wrote = [Text(f"wrote {training.timeline}")] if largest else []
    return Group(
        title,
        console.table("on each GPU", unit, rows=rows, right=[unit]),
        *_peak(largest, unit, of),
        *wrote,
    )


def render_fits(rows: Sequence[Fit], training: Training) -> RenderableType:
    """Render the longest contexts and largest batches on a card."""
    from lora_fx.tools.fit import CONTEXT, FRAGMENTS, size_of, usable

    card = size_of("fit", training.fit or "")
    stored = rows[0].settings.quantize or training.dtype
    title = (
        f"on a card of {card / 1e9:,.1f} GB: {usable(card) / 1e9:,.1f} GB are usable, after "
        f"{CONTEXT / 1e9} GB for the CUDA context and {FRAGMENTS:.0%} of fragments. Weights in {stored}, "
        f"{training.optimizer}"
    )
    batches = f"samples of {training.sequence:,}"
    headings = ("memory", "longest context", "peak GB", "host GB", batches)
    cells = [
        (
            row.settings.memory,
            f"{row.context:,}" if row.context else "none",
            f"{row.need.peak / 1e9:,.1f}",
            f"{row.need.host / 1e9:,.1f}",
            f"{row.batch:,}",
        )
        for row in rows
    ]
    return Group(Text(title, "bold"), console.table(*headings, rows=cells, right=headings[1:]))


def dict_of_fit(fit: Fit) -> dict[str, Any]:
    """Return a fit as plain containers, ready for JSON."""
    settings = {**dataclasses.asdict(fit.settings), "dtype": str(fit.settings.dtype)}
    need = dataclasses.asdict(fit.need)
    return {"settings": settings, "context": fit.context, "batch": fit.batch, "need": need}


def _peak(rows: Sequence[Row], unit: str, of: float) -> Iterator[RenderableType]:
    """Yield a table of the largest tensors at the peak of a training step, if they were recorded."""
    if not rows:
        return
    cells = [
        (
            _amount(row.size / of),
            f"×{row.count}" if row.count > 1 else "",
            row.module,
            row.tensor,
            row.kind,
            f"{row.shape} {row.dtype}",
        )
        for row in rows
    ]
    headings = (unit, "", "module", "tensor or operator", "kind", "shape")
    yield Text("the largest tensors at the peak", "bold")
    yield console.table(*headings, rows=cells, right=[unit])


def _unit(size: int) -> tuple[str, float]:
    return ("GB", 1e9) if size >= 1e9 else ("MB", 1e6)


def _amount(size: float) -> str:
    """Format a size with three significant digits."""
    return f"{size:,.0f}" if size >= 1e3 else f"{size:.3g}"


def render_heat(
    title: str,
    layers: Sequence[str],
    modules: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    width: int,
) -> RenderableType:
    """Draw layers × modules in the terminal: the brighter a cell, the larger its value.

    Args:
        title: Name of the values.
        layers: Names of the rows.
        modules: Names of the columns. Each is shortened to the last parts that distinguish it.
        values: A row for each layer; None for missing values.
        width: Columns of the terminal. Modules that do not fit are named below.
    """
    known = [value for row in values for value in row if value is not None and value == value]
    most = max(known, default=0.0)
    names = _ends(modules)
    room = width - max((len(layer) for layer in layers), default=0) - 2
    shown = 0
    for name in names:
        room -= max(len(name), 7) + 2
        shown += room >= 0
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in names[:shown]:
        table.add_column(name, justify="right", no_wrap=True)
    for layer, row in zip(layers, values, strict=True):
        if all(value is None for value in row[:shown]):
            continue
        cells = [Text("" if x is None else f"{x:.3g}", _heat(x, most)) for x in row[:shown]]
        table.add_row(Text(layer or "(root)", "cyan"), *cells)
    if shown == len(names):
        return table
    left_out = ", ".join(modules[shown:])
    return Group(table, Text(f"not shown at this width: {left_out} (--json has them)", "dim"))


def _ends(names: Sequence[str]) -> list[str]:
    """Shorten names: return each name's shortest suffix that no other name has.

    A suffix that is only a number is not used.
    """
    ends = [
        [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        for parts in (name.split(".") for name in names)
    ]
    counts = Counter(end for several in ends for end in several)
    return [
        next((end for end in several if counts[end] == 1 and not end.isdigit()), several[-1])
        for several in ends
    ]


def _heat(value: float | None, most: float) -> str:
    """Return the text and background colors for a cell of the heat map."""
    if value is None or not most or value != value:
        return ""
    share = min(abs(value) / most, 1.0)
    ink = "black" if share > 0.5 else "white"
    return f"{ink} on rgb({int(20 + 30 * share)},{int(40 + 160 * share)},{int(90 + 150 * share)})"


_OPERATORS = 8  # number of operators that are named


def render_export(report: ExportReport) -> RenderableType:
    """Render the output of ``lora-fx export``.

    Args:
        report: Result of ``export_onnx``.
    """
    # An export for a task chooses the axes itself, so the user cannot change the fixed ones.
    fixed = report.fixed_axes if report.task is None else {}
    parts: list[RenderableType] = [
        console.facts(_facts(report), "dim"),
        console.table("", "name", "axes", "at most", rows=_ports(report)),
        *_pairs(("fixed axis", "because"), fixed),
        *_pairs(("fixed argument", "value"), report.baked_arguments),
    ]
    if report.merged is not None:
        parts.append(Text(report.merged.summary))
    if report.verified:
        parts.append(_parity(report))
    parts += _pairs(("not fused", "because"), report.not_fused)
    parts += _pairs(("shape not tried", "because PyTorch says"), report.shapes_skipped)
    if report.encoder is not None:
        parts += [Text("with the encoder beside it:", "dim"), render_export(report.encoder)]
    return Group(*parts)


def _pairs(headings: tuple[str, str], entries: Mapping[str, str]) -> list[Table]:
    return [console.table(*headings, rows=entries.items())] if entries else []


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
        where = f"at {sites} place{'s'[: sites > 1]}"
        if report.bank is None:
            yield "adapters", f"of any rank are inputs, {where}"
        else:
            yield "adapters", f"one for each row of a batch, {where}"
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
