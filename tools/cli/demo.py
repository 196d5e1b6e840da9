"""``lora-fx demo``: the whole story on a real pretrained model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_fx.ir import Plan
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o
from lora_fx.tools.demo import FULL, QUICK, DemoReport, claim_folder

__all__ = ["demo"]

_STAGES = 11
_INDENT = 8


class _OnScreen:
    """Shows every stage as it goes on."""

    def __init__(self, screen: Console) -> None:
        self.screen = screen
        self.count = 0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[console.Advance]:
        self.count += 1
        self.screen.print(Text(f"[{self.count}/{_STAGES}] {name}", "bold"))
        began = time.perf_counter()
        # On one console: two would write into each other's lines.
        with console.progress(name, self.screen) as advance:
            yield advance
        self._print(Text(f"{time.perf_counter() - began:.1f} s", "dim"))

    def note(self, text: str) -> None:
        self._print(Text(text))

    def planned(self, made: Plan) -> None:
        from lora_fx.tools.cli.dry_run import render

        # Wide, so less indented.
        self._print(render(made, width=self.screen.width - 2), indent=2)

    def _print(self, what: RenderableType, *, indent: int = _INDENT) -> None:
        self.screen.print(Padding(what, (0, 0, 0, indent), expand=False), highlight=False)


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Less text: under a minute.")] = False,
    out: Annotated[
        Path, typer.Option("--out", help="The folder to write; an earlier demo's is replaced.")
    ] = Path("out/demo"),
    force: o.Force = False,
) -> None:
    """Plan, rewrite, train, save, load, merge, export and run a real sentence encoder."""
    from lora_fx.tools.demo import run_demo

    claim_folder(out, force=force)
    screen = console.output()
    began = time.perf_counter()
    report = run_demo(out, QUICK if quick else FULL, _OnScreen(screen))
    screen.print()
    screen.print(
        f"Which of {len(report.libraries)} libraries wrote it? "
        f"{report.sentences[1]:,} held-out sentences",
        style="bold",
        highlight=False,
    )
    screen.print(_accuracy(report))
    screen.print(_figures(report, out))
    screen.print(f"{time.perf_counter() - began:.0f} s in all", style="dim", highlight=False)


def _accuracy(report: DemoReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    for name, value in report.accuracy.items():
        style = "green" if value > report.accuracy["frozen"] else ""
        shown = "frozen encoder, trained head" if name == "frozen" else name
        table.add_row(shown, f"{100 * value:.1f} %", style=style)
    return table


def _figures(report: DemoReport, out: Path) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    share = 100 * report.trainable / report.parameters
    reloaded = "bit-equal" if report.reload_error == 0 else f"{report.reload_error:.1e}"
    rows = {
        "trainable": f"{report.trainable:,} of {report.parameters:,} parameters ({share:.2f} %)",
        "adapter reloaded": reloaded,
        "merge": f"weights within {report.merge_ulp:.2f} ulp of the exact value, outputs within "
        f"{report.merge_error:.1e}",
        "parity": f"ONNX Runtime within {report.parity_error:.1e} of PyTorch",
        **{
            Path(name).name: f"{size / 1e6:.1f} MB in {Path(name).parent}"
            for name, size in report.files.items()
        },
    }
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), value)
    for number, (name, seconds) in enumerate(report.seconds.items()):
        heading = Text("" if number else "time", "bold")
        table.add_row(heading, Text(f"{seconds:6.1f} s  {name}", "dim"))
    table.add_row(Text("look at", "bold"), Text(str(out / "graph.html"), "cyan"))
    return table
