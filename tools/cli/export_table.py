"""The report of an export as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_fx.export.report import ExportReport, short, size_text, worst_by_layer

__all__ = ["render"]

_OPERATORS = 8  # how many of them are named


def render(report: ExportReport) -> RenderableType:
    """What ``lora-fx export`` prints.

    Args:
        report: What ``export_onnx`` returned.
    """
    parts: list[RenderableType] = [_facts(report), _ports(report)]
    # Which axes a task leaves fixed is a fact of the model, no answer to a wish.
    if report.fixed_axes and report.task is None:
        rows = report.fixed_axes.items()
        parts.append(_table(("fixed axis", "because"), rows))
    if report.baked_arguments:
        parts.append(_table(("fixed argument", "value"), report.baked_arguments.items()))
    if report.verified:
        parts.append(_parity(report))
    if report.shapes_skipped:
        rows = report.shapes_skipped.items()
        parts.append(_table(("shape not tried", "because PyTorch says"), rows))
    if report.encoder is not None:
        parts += [Text("with the encoder beside it:", "dim"), render(report.encoder)]
    return Group(*parts)


def _facts(report: ExportReport) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, size in report.files.items():
        table.add_row(
            "file" if name not in report.data_files else "weights", f"{name}  {size_text(size)}"
        )
    table.add_row("written as", f"{report.dtype}, opset {report.opset}")
    if report.task is not None:
        table.add_row("task", report.task)
    for form in report.quantized:
        table.add_row("few bits", str(form))
    if report.adapters == "inline":
        table.add_row("adapters", "are products of their own beside the operations")
    if report.swappable:
        sites = len(report.swappable)
        table.add_row("adapters", f"of any rank are inputs, at {sites} place{'s'[: sites > 1]}")
    named = [f"{count} {op}" for op, count in list(report.operators.items())[:_OPERATORS]]
    more = ", …" if len(report.operators) > _OPERATORS else ""
    table.add_row("nodes", f"{report.nodes}: {', '.join(named)}{more}")
    table.add_row("tensors", str(report.initializers))
    if report.verified:
        table.add_row("checked", f"on {report.provider} against {report.reference}")
        if report.values_tried:
            table.add_row("values", Text(report.values_tried))
    else:
        table.add_row("checked", Text(f"NOT CHECKED: {report.unverified_reason}", "bold yellow"))
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())
    table.add_row("seconds", f"{report.total_seconds:.1f}: {stages}")
    return table


def _ports(report: ExportReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "name", "axes", "at most"):
        table.add_column(heading)
    for kind, ports in (("input", report.inputs), ("output", report.outputs)):
        for name, axes in short(ports).items():
            limits = {axis: report.axis_limits.get(str(axis)) for axis in axes}
            bounded = [f"{axis} {limit}" for axis, limit in limits.items() if limit is not None]
            table.add_row(kind, Text(name), ", ".join(map(str, axes)), ", ".join(bounded))
    return table


def _parity(report: ExportReport) -> Table:
    half = any(row.pytorch_rel_error is not None for row in report.parity)
    headings = [f"parity on {len(report.shapes_tried)} shapes", "largest error", "relative"]
    rows = []
    for row in worst_by_layer(report.parity):
        cells = [row.name, f"{row.max_abs_error:.1e}", f"{row.max_rel_error:.1e}"]
        if half:
            narrow = row.pytorch_rel_error
            cells.append("" if narrow is None else f"{narrow:.1e}")
        rows.append([*cells, f"{row.tolerance:.0e}" if row.tolerance else "equal"])
    if half:
        headings.append(f"PyTorch in {report.dtype}")
    return _table((*headings, "allowed"), rows)


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
