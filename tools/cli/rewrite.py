"""``lora-fx rewrite``: look at the graphs and the code that a rewrite makes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich import box
from rich.syntax import Syntax
from rich.table import Table
from torch import fx, nn

from lora_fx.errors import ConfigError
from lora_fx.ir import META_KEY, Capture, Role
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o
from lora_fx.tools.cli import quantize_option as q

__all__ = ["rewrite"]

_TEXT = ".txt"


def rewrite(
    model: o.ModelName,
    r: o.Rank = None,
    alpha: o.Alpha = None,
    dropout: o.Dropout = None,
    target: o.Targets = None,
    target_regex: o.TargetRegex = None,
    exclude: o.Excludes = None,
    modules_to_save: o.Saved = None,
    rslora: o.RsLora = None,
    bias: o.Bias = None,
    config: o.ConfigSource = None,
    strict: o.Strict = False,
    quantize: q.Quantize = None,
    frontend: o.FrontendName = "auto",
    inputs: o.InputsName = None,
    region: Annotated[
        str | None,
        typer.Option("--region", help="Print the code of this module's forward; '' is the root."),
    ] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="With --region: the nodes of the graph, not the code.")
    ] = False,
    print_after: Annotated[
        list[str] | None,
        typer.Option(
            "--print-after",
            help="Print the graph after this pass, of --region or of all; 'all' is after every pass.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="Write all graphs: .html .svg .dot .graphml .json or .txt."),
    ] = None,
    force: o.Force = False,
) -> None:
    """Rewrite a model and look at the result: its regions, their code, or a picture of them."""
    from lora_fx.api import graphs
    from lora_fx.api import rewrite as rewrite_model
    from lora_fx.passes.pipeline import rewrite_passes
    from lora_fx.tools.draw import FORMATS, visualize

    chosen = o.config_from(
        config,
        r=r,
        alpha=alpha,
        dropout=dropout,
        targets=target,
        target_regex=target_regex,
        excludes=exclude,
        saved=modules_to_save,
        rslora=rslora,
        bias=bias,
    )
    file = None if out is None else o.file_to_write(out, (*FORMATS, _TEXT), force=force)
    loaded = (
        o.load(model, weights=inputs is not None)
        if quantize is None
        else q.load_quantised(model, quantize, frontend=frontend)
    )
    how = o.capture_options(loaded, frontend, inputs)
    screen = console.output()
    printer = None
    if print_after:
        known = ["capture", *(one.name for one in rewrite_passes(chosen))]
        printer = _Printer(screen, _passes_named(print_after, known), region)
    with console.progress("rewriting"):
        rewritten = rewrite_model(
            loaded.model,
            chosen,
            strict=strict,
            callback=None if printer is None else printer.see,
            **how,
        )
    found = graphs(rewritten)
    if printer is not None:
        printer.show()
    elif region is not None:
        _print_region(screen, found, region, as_graph=graph)
    elif file is None:
        screen.print(_table(rewritten, found))
        screen.print("--region NAME prints the code of one, --out FILE.html draws all", style="dim")
    if file is None:
        return
    if file.suffix.lower() == _TEXT:
        file.write_text("\n".join(map(_as_text, found.items())), encoding="utf-8")
    else:
        visualize(rewritten, file, force=force)
    screen.print(f"wrote {file}", highlight=False, soft_wrap=True)


class _Printer:
    """Keep the graphs after some passes, and print them once no progress bar is on the screen."""

    def __init__(self, screen: Any, passes: list[str], region: str | None) -> None:
        self._screen = screen
        self._passes = passes
        self._region = region
        self._seen: list[tuple[str, str]] = []

    def see(self, name: str, capture: Capture) -> None:
        """Keep what a pass has left."""
        if name in self._passes:
            self._seen.append((name, "\n".join(self._texts(name, capture))))

    def show(self) -> None:
        """Print all of it, in the order of the passes."""
        for name, text in self._seen:
            self._screen.rule(f"after {name}")
            self._screen.print(text, highlight=False, soft_wrap=True, markup=False)

    def _texts(self, name: str, capture: Capture) -> Iterator[str]:
        graphs = {key: one.graph for key, one in capture.regions.items()}
        if self._region is not None:
            graphs = {self._region: _region_of(graphs, self._region)}
        for key, graph in graphs.items():
            yield f"# {key or '(root)'}\n{graph}"
        if name == "plan":
            yield str(capture.plan)


def _passes_named(asked: list[str], known: list[str]) -> list[str]:
    for name in asked:
        if name not in (*known, "all"):
            near = difflib.get_close_matches(name, known, 3, cutoff=0.3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ConfigError(
                f"--print-after {name}: there is no such pass{hint}. All: {', '.join(known)}"
            )
    return known if "all" in asked else asked


def _region_of(graphs: Mapping[str, fx.Graph], region: str) -> fx.Graph:
    if region not in graphs:
        near = difflib.get_close_matches(region, graphs, 3, cutoff=0.3)
        hint = f"; nearest: {', '.join(map(repr, near))}" if near else ""
        raise ConfigError(f"there is no region {region!r}{hint}")
    return graphs[region]


def _print_region(screen: Any, found: dict[str, fx.Graph], region: str, *, as_graph: bool) -> None:
    chosen = _region_of(found, region)
    if as_graph:
        screen.print(str(chosen), highlight=False, soft_wrap=True, markup=False)
        return
    code = chosen.python_code("self").src.strip()
    if screen.is_terminal:
        screen.print(Syntax(code, "python", word_wrap=True))
    else:
        screen.print(code, highlight=False, soft_wrap=True, markup=False)


def _table(model: nn.Module, found: dict[str, fx.Graph]) -> Table:
    table = Table("region", "class", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("nodes", justify="right")
    table.add_column("branches", justify="right")
    for name, graph in found.items():
        roles = [getattr(node.meta.get(META_KEY), "role", None) for node in graph.nodes]
        kind = type(model.get_submodule(name)).__name__
        table.add_row(name or "(root)", kind, str(len(roles)), str(roles.count(Role.ADD)))
    return table


def _as_text(item: tuple[str, fx.Graph]) -> str:
    name, graph = item
    return f"# {name or '(root)'}\n{graph}\n\n{graph.python_code('self').src.strip()}\n"
