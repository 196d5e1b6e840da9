"""``lora-fx doctor``: what is installed and whether it can work."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from lora_fx.tools.cli import console
from lora_fx.tools.cli.diagnosis import Finding, State, examine

__all__ = ["doctor"]


def doctor(
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if there is a problem.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show versions, ONNX Runtime's providers, each CUDA library, wheels in conflict, extras."""
    with console.progress("looking around"):
        findings = examine()
    problems = [finding for finding in findings if finding.state is State.PROBLEM]
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        _print(findings, len(problems))
    if problems and strict:
        raise typer.Exit(1)


def _print(findings: list[Finding], problems: int) -> None:
    styles = {State.OK: "green", State.NOTE: "yellow", State.PROBLEM: "bold red"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    topic = ""
    for one in findings:
        heading = "" if one.topic == topic else one.topic
        if heading and topic:
            table.add_section()
        topic = one.topic
        detail = Text(one.detail)
        if one.remedy:
            detail.append(f"\n{one.remedy}", "yellow")
        table.add_row(heading, one.name, Text(one.state, styles[one.state]), detail)
    screen = console.output()
    screen.print(table)
    if problems:
        screen.print(f"{problems} problem(s)", style="bold red")
    else:
        screen.print("no problems", style="green")
