"""Commands on a model in PyTorch: plan, rewrite, merge, visualize."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.syntax import Syntax
from rich.table import Table
from torch import fx, nn

from lora_fx.errors import ConfigError, hint
from lora_fx.ir import META_KEY, Capture, Role
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

__all__ = ["merge", "plan", "rewrite", "visualize"]

_TEXT = ".txt"


@o.command()
def plan(
    model: o.ModelName,
    *,
    adapters: o.Adapters,
    store: o.Storing,
    look: o.Capturing,
    every: bool = False,
    as_json: bool = False,
) -> None:
    """Show what would be adapted, what not and why, and what it costs. Changes nothing.

    Args:
        model: The model.
        adapters: What to adapt.
        store: In few bits.
        look: How to capture.
        every: One row a site; equal layers are one row without it.
        as_json: Everything, as JSON.
    """
    from lora_fx.api import plan as make_plan
    from lora_fx.tools.cli.tables import render_plan

    chosen = adapters.made()
    loaded = look.load(model)
    stored = store.planned(loaded)
    how = look.of(loaded)
    with console.progress("planning"):
        made = make_plan(loaded.model, chosen, strict=adapters.strict, **how)
    if as_json:
        shown = made.to_dict()
        if stored is not None:
            shown["quantization"] = stored.to_dict()
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return
    out = console.output()
    if stored is not None:
        out.print(stored.summary(), highlight=False, soft_wrap=True, markup=False)
    out.print(render_plan(made, width=out.width, every=every), highlight=False)


@o.command()
def rewrite(
    model: o.ModelName,
    *,
    adapters: o.Adapters,
    store: o.Storing,
    look: o.Capturing,
    region: str | None = None,
    graph: bool = False,
    print_after: list[str] | None = None,
    out: str | None = None,
    force: bool = False,
) -> None:
    """Rewrite a model and look at the result: its regions, their code, or a picture of them.

    Args:
        model: The model.
        adapters: What to adapt.
        store: In few bits.
        look: How to capture.
        region: Print the code of this module's forward; '' is the root.
        graph: With --region: the nodes of the graph, not the code.
        print_after: Print the graph after this pass, of --region or of all; 'all' is after every pass.
        out: Write all graphs: .html .svg .dot .graphml .json or .txt.
        force: Write over what is there.
    """
    from lora_fx.api import graphs
    from lora_fx.api import rewrite as rewrite_model
    from lora_fx.passes.pipeline import rewrite_passes
    from lora_fx.tools.draw import FORMATS
    from lora_fx.tools.draw import visualize as draw

    chosen = adapters.made()
    file = None if out is None else o.file_to_write(out, (*FORMATS, _TEXT), force=force)
    loaded = store.load(model, look)
    how = look.of(loaded)
    screen = console.output()
    printer = None
    if print_after:
        known = ["capture", *(one.name for one in rewrite_passes(chosen))]
        printer = _Printer(screen, _passes_named(print_after, known), region)
    with console.progress("rewriting"):
        rewritten = rewrite_model(
            loaded.model,
            chosen,
            strict=adapters.strict,
            callback=None if printer is None else printer.see,
            **how,
        )
    found = graphs(rewritten)
    if printer is not None:
        printer.show()
    elif region is not None:
        _print_region(screen, found, region, as_graph=graph)
    elif file is None:
        screen.print(_regions(rewritten, found))
        screen.print("--region NAME prints the code of one, --out FILE.html draws all", style="dim")
    if file is None:
        return
    if file.suffix.lower() == _TEXT:
        file.write_text("\n".join(map(_as_text, found.items())), encoding="utf-8")
    else:
        draw(rewritten, file, force=force)
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
            near = hint(name, known, cutoff=0.3)
            raise ConfigError(
                f"--print-after {name}: there is no such pass{near}. All: {', '.join(known)}"
            )
    return known if "all" in asked else asked


def _region_of(graphs: Mapping[str, fx.Graph], region: str) -> fx.Graph:
    if region not in graphs:
        near = hint(region, graphs, "; nearest: '{}'", cutoff=0.3, between="', '")
        raise ConfigError(f"there is no region {region!r}{near}")
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


def _regions(model: nn.Module, found: dict[str, fx.Graph]) -> Table:
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


@o.command()
def merge(
    model: o.ModelName,
    adapter: Path,
    out: str,
    dtype: str | None = None,
    requantize: bool = False,
    every: bool = False,
    force: bool = False,
) -> None:
    """Fold an adapter into a model's weights, and say how exact the result is.

    A quantized model becomes a dense one.

    Args:
        model: The model.
        adapter: An adapter folder.
        out: For hf: models a folder, for others a .safetensors file of the state dict.
        dtype: fp32, fp16 or bf16; as it is without it.
        requantize: Quantize merged weights of a quantized model again.
        every: The error of every weight.
        force: Write over what is there.
    """
    from lora_fx.api import merge as merge_model
    from lora_fx.checkpoint import load_adapter
    from lora_fx.tools.cli.merged_files import check_out, dtype_of, write_merged

    path = check_out(model, out, force=force)
    wanted = dtype_of(dtype)
    loaded = o.load(model)
    with console.progress("reading the adapter"):
        adapted = load_adapter(loaded.model, adapter)
    with console.progress("merging") as advance:
        merged, report = merge_model(
            adapted, dtype=wanted, requantize=requantize, return_report=True, progress=advance
        )
    with console.progress("writing"):
        write_merged(merged, path, folder=loaded.folder)
    lines = str(report).splitlines()
    shown = lines if every else [lines[0], *(line for line in lines if "untied" in line)]
    screen = console.output()
    for line in shown:
        screen.print(line, highlight=False, soft_wrap=True)
    screen.print(f"wrote {path}", highlight=False, soft_wrap=True)


@o.command()
def visualize(
    model: o.ModelName,
    path: str,
    *,
    adapters: o.Adapters,
    look: o.Capturing,
    base: bool = False,
    as_plan: bool = False,
    force: bool = False,
) -> None:
    """Draw the rewritten model: nested modules, equal blocks folded, adapters in color.

    Args:
        model: The model.
        path: The file: .html to explore, .svg, .dot, .graphml, .json.
        adapters: What to adapt.
        look: How to capture.
        base: The model as it is, without adapters.
        as_plan: The sites by name, and what is not adapted and why.
        force: Write over what is there.
    """
    from lora_fx.api import capture
    from lora_fx.api import plan as make_plan
    from lora_fx.api import rewrite as rewrite_model
    from lora_fx.tools.draw import FORMATS
    from lora_fx.tools.draw import visualize as draw

    chosen = adapters.made()
    file = o.file_to_write(path, tuple(FORMATS), force=force)
    loaded = look.load(model)
    how = look.of(loaded)
    drawn: Any = loaded.model
    with console.progress("drawing"):
        if base:
            drawn = drawn if look.by_default else capture(drawn, **how)
        else:
            verb = make_plan if as_plan else rewrite_model
            drawn = verb(drawn, chosen, strict=adapters.strict, **how)
        written = draw(drawn, file, force=force)
    size = written.stat().st_size / 1e3
    console.output().print(f"wrote {written} ({size:,.0f} kB)", highlight=False, soft_wrap=True)
