"""Commands on a model: plan, rewrite, merge, visualize, inspect, verify."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from lora_fx.errors import ConfigError, MergeError, hint
from lora_fx.files import output_file
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import fx, nn

    from lora_fx.config import LoraConfig
    from lora_fx.ir import Capture, Comparison, Memory, Plan
    from lora_fx.passes.merge import MergeReport, RoundingName
    from lora_fx.passes.quantize import QuantizationPlan
    from lora_fx.tools.cluster import Need
    from lora_fx.tools.fit import Fit
    from lora_fx.tools.models import LoadedModel
    from lora_fx.tools.timeline import Row

__all__ = [
    "check_out",
    "inspect",
    "merge",
    "plan",
    "rewrite",
    "verify",
    "visualize",
    "write_merged",
]

_log = logging.getLogger("lora_fx")

_PICTURES = (".svg", ".dot", ".graphml", ".json", ".html")
_TEXT = ".txt"
_HERE = "this"
_TRAINED = ("adapted", "trained", "rows trained")


@o.command()
def plan(
    model: o.ModelName,
    *,
    adapters: o.Adapters,
    store: o.Storing,
    look: o.Capturing,
    training: o.Training,
    sizing: o.Sizing,
    why: str | None = None,
    diff: Path | None = None,
    deploy: str | None = None,
    merge_into: str | None = None,
    every: bool = False,
    as_json: bool = False,
) -> None:
    """Show which operations would be adapted and which not, with reasons and costs. Changes nothing.

    With --why or --diff the exit code is 1 if the operation is not adapted, or the plans differ.

    Args:
        model: The model.
        adapters: What to adapt.
        store: How to quantize it.
        look: How to capture.
        training: On which GPUs.
        sizing: Which ranks.
        why: Say if an operation, or those in a module, would be adapted, and why. Takes a name or its end.
        diff: Another configuration, as for --config: show how its plan differs.
        deploy: Check that every site can be trained for a storage: bf16, fp16, int8, int4, nf4, …
        merge_into: Predict how large a change has to be to survive a merge into a storage, as for --deploy.
        every: One row for each site; by default equal layers share a row.
        as_json: Print everything as JSON.
    """
    chosen = adapters.made()
    other = None if diff is None else o.config_in(diff)
    o.check_names(model)
    training.check()
    store.check()
    sizing.check(look, compares=diff is not None)

    from lora_fx.api import compare
    from lora_fx.api import plan as make_plan
    from lora_fx.tools.cli.tables import render_plan

    # The prediction of --merge-into reads the weights. Otherwise names and shapes are enough.
    loaded = look.load(model) if merge_into is None else o.load(model)
    stored = store.planned(loaded)
    how = look.of(loaded)
    with console.progress("planning"):
        if other is not None:
            both = compare({_HERE: chosen, str(diff): other}, loaded.model, **how)
            planned = both[_HERE]
        else:
            planned = make_plan(
                loaded.model,
                chosen,
                memory=cast("Memory", training.memory or "fast"),
                strict=adapters.strict,
                deploy=deploy,
                merge_into=merge_into,
                **sizing.of(how["example_inputs"]),
                **how,
            )
            chosen = sizing.write(planned.config, chosen)
    if why is not None:
        raise typer.Exit(_say_why(planned, why, as_json))
    if diff is not None:
        raise typer.Exit(_say_difference(both, diff, as_json))
    need = _Needs.of(loaded, chosen, how["example_inputs"], training, store.quantize)
    if as_json:
        shown = planned.to_dict() | need.to_dict()
        shown |= {} if stored is None else {"quantization": stored.to_dict()}
        console.say_json({**shown, "stored_in": loaded.stored_in})
        return
    out = console.output()
    _say_storage(loaded, stored)
    out.print(render_plan(planned, width=out.width, every=every), highlight=False)
    need.show(training)


@dataclasses.dataclass(frozen=True)
class _Needs:
    """Memory and traffic of a training step, on the GPUs that the options name.

    Attributes:
        need: The memory and traffic of each GPU; None if the options ask for no plan of a step.
        largest: The largest tensors at the peak, if the options ask for them.
        fitting: The largest batches and contexts that fit on a card, if the options name one.
        text: True if the model takes texts, so that a context has tokens.
    """

    need: Need | None
    largest: Sequence[Row]
    fitting: Sequence[Fit]
    text: bool

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        config: LoraConfig,
        inputs: Any,
        training: o.Training,
        quantize: str | None,
    ) -> _Needs:
        """Compute the needs of a training step. Without ``inputs``, take the model's example inputs."""
        from lora_fx.tools.cluster import takes_text

        inputs = loaded.example_inputs if inputs is None else inputs
        text = takes_text(loaded.model)
        fitting = training.fitting(loaded, config, quantize)
        need, largest = training.planned(loaded, config, inputs, text=text, quantize=quantize)
        return cls(need, largest, fitting, text)

    def to_dict(self) -> dict[str, Any]:
        """Return the needs as JSON values."""
        from lora_fx.tools.cli.tables import dict_of_fit

        shown: dict[str, Any] = {}
        if self.need is not None:
            shown["training"] = dataclasses.asdict(self.need)
            shown["training"]["largest"] = [dataclasses.asdict(row) for row in self.largest]
        return shown | (
            {"fits": [dict_of_fit(row) for row in self.fitting]} if self.fitting else {}
        )

    def show(self, training: o.Training) -> None:
        """Print tables of the needs."""
        from lora_fx.tools.cli.tables import render_fits, render_need

        out = console.output()
        if self.need is not None:
            table = render_need(self.need, training, self.largest, text=self.text)
            out.print(table, highlight=False)
        if self.fitting:
            out.print(render_fits(self.fitting, training), highlight=False)


def _say_why(planned: Plan, name: str, as_json: bool) -> int:
    """Print if the operations of a name are adapted, and why. Return the exit code: 1 if none is adapted."""
    reasons = planned.why(name)
    _answer(("operation", "what becomes of it"), reasons.items(), as_json)
    return int(not any(text.startswith(_TRAINED) for text in reasons.values()))


def _say_difference(both: Comparison, other: Path, as_json: bool) -> int:
    """Print how the plan of another configuration differs. Return the exit code: 1 if it does."""
    changed = both[_HERE].changes(both[str(other)])
    if not as_json:
        console.say(str(both))
    rows = [(name, *texts) for name, texts in changed.items()]
    _answer(("differs", _HERE, str(other)), rows, as_json)
    return int(bool(changed))


def _say_storage(loaded: LoadedModel, planned: QuantizationPlan | None) -> None:
    """Print how weights will be quantized. If a folder has quantized weights, print their format."""
    if planned is not None:
        console.say(planned.summary())
    if loaded.folder is not None and loaded.stored_in is not None:
        console.say(
            f"the weights of {loaded.name} are quantized: {loaded.stored_in} (quantization_config in its "
            "config.json). Shapes and numbers below are those of the values"
        )


@o.command()
def rewrite(
    model: o.ModelName,
    *,
    adapters: o.Adapters,
    store: o.Storing,
    look: o.Capturing,
    region: str | None = None,
    graph: bool = False,
    every: bool = False,
    print_after: list[str] | None = None,
    out: str | None = None,
    force: bool = True,
    as_json: bool = False,
) -> None:
    """Rewrite a model and look at the result: its regions, their code, or a picture of them.

    Args:
        model: The model.
        adapters: What to adapt.
        store: How to quantize it.
        look: How to capture.
        region: Print the code of this module's forward; '' is the root.
        graph: With --region: print the nodes of the graph instead of the code.
        every: One row for each region; by default equal layers share a row.
        print_after: Print the graph of --region, or all graphs, after this pass; 'all' prints the changes of
            each pass.
        out: Write all graphs: .html .svg .dot .graphml .json or .txt.
        force: Replace an existing file.
        as_json: Print the regions as JSON.
    """
    chosen = adapters.made()
    file = None if out is None else o.file_to_write(out, (*_PICTURES, _TEXT), force=force)
    o.check_names(model)
    store.check()

    from lora_fx.api import graphs
    from lora_fx.api import rewrite as rewrite_model
    from lora_fx.passes.pipeline import rewrite_passes
    from lora_fx.tools.draw import visualize as draw

    loaded = store.load(model, look)
    how = look.of(loaded)
    printer = None
    if print_after:
        known = ["capture", *(pass_.name for pass_ in rewrite_passes(chosen))]
        printer = _Printer(_passes_named(print_after, known), region)
    with console.progress("rewriting"):
        see = None if printer is None else printer.see
        rewritten = rewrite_model(loaded.model, chosen, strict=adapters.strict, callback=see, **how)
    region_graphs = graphs(rewritten)
    if printer is not None:
        printer.show()
    elif region is not None:
        _print_region(region_graphs, region, as_graph=graph)
    elif as_json:
        entries = [
            dict(zip(_REGION, row, strict=True)) for row in _regions(rewritten, region_graphs)
        ]
        console.say_json(entries)
    elif file is None:
        console.output().print(_region_table(_regions(rewritten, region_graphs), every=every))
        console.say("--region NAME prints the code of one, --out FILE.html draws all", "dim")
    if file is None:
        return
    if file.suffix.lower() == _TEXT:
        file.write_text("\n".join(map(_as_text, region_graphs.items())), encoding="utf-8")
    else:
        draw(rewritten, file, force=force)
    console.say(f"wrote {file}")


def _answer(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], as_json: bool) -> None:
    """Print rows as JSON, or as a table in which rows that differ only in numbers share a line."""
    from lora_fx.ir import folded

    rows = list(rows)
    if as_json:
        answers = {name: cells[0] if len(cells) == 1 else cells for name, *cells in rows}
        console.say_json(answers)
        return
    lines = [
        (row.name + (f" {row.times}" if row.times else ""), *row.cells) for row in folded(rows)
    ]
    if lines:
        console.output().print(console.table(*columns, rows=lines))


@dataclasses.dataclass
class _Printer:
    """Store of the graphs after certain passes. They are printed when the progress bar is gone."""

    passes: list[str]
    region: str | None
    seen: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    last: dict[str, str] = dataclasses.field(default_factory=dict)

    def see(self, name: str, capture: Capture) -> None:
        """Store the graphs that a pass has left."""
        if name in self.passes:
            self.seen.append((name, "\n".join(self._texts(name, capture))))

    def show(self) -> None:
        """Print the stored graphs, in the order of the passes."""
        for name, text in self.seen:
            console.output().rule(f"after {name}")
            console.say(text)

    def _texts(self, name: str, capture: Capture) -> Iterator[str]:
        graphs = {key: item.graph for key, item in capture.regions.items()}
        if self.region is not None:
            graphs = {self.region: _region_of(graphs, self.region)}
        changed = {
            key: str(graph) for key, graph in graphs.items() if self.last.get(key) != str(graph)
        }
        self.last |= changed
        for key, text in changed.items():
            yield f"# {key or '(root)'}\n{text}"
        if len(changed) < len(graphs):
            yield f"({len(graphs) - len(changed)} of {len(graphs)} graphs as printed above)"
        if name == "plan":
            yield str(capture.plan)


def _passes_named(requested: list[str], known: list[str]) -> list[str]:
    for name in requested:
        if name not in (*known, "all"):
            near = hint(name, known, cutoff=0.3)
            raise ConfigError(
                f"--print-after {name}: there is no such pass{near}. All: {', '.join(known)}"
            )
    return known if "all" in requested else requested


def _region_of(graphs: Mapping[str, fx.Graph], region: str) -> fx.Graph:
    if region not in graphs:
        near = hint(region, graphs, "; nearest: '{}'", cutoff=0.3, between="', '")
        raise ConfigError(f"there is no region {region!r}{near}")
    return graphs[region]


def _print_region(graphs: dict[str, fx.Graph], region: str, *, as_graph: bool) -> None:
    from rich.syntax import Syntax

    screen = console.output()
    chosen = _region_of(graphs, region)
    code = str(chosen) if as_graph else chosen.python_code("self").src.strip()
    if screen.is_terminal and not as_graph:
        screen.print(Syntax(code, "python", word_wrap=True))
    else:
        console.say(code)


_REGION = ("region", "class", "nodes", "branches")


def _regions(model: nn.Module, graphs: dict[str, fx.Graph]) -> list[tuple[str, str, int, int]]:
    """Return a row for each region: its name, its class, and the numbers of nodes and branches.

    A fused node has a branch per weight and adapter.
    """
    from lora_fx.ir import adapters_of

    rows = []
    for key, graph in graphs.items():
        kind = type(model.get_submodule(key)).__name__
        rows.append((key or "(root)", kind, len(graph.nodes), len(adapters_of(graph))))
    return rows


def _region_table(rows: list[tuple[str, str, int, int]], *, every: bool) -> Table:
    from lora_fx.ir import folded

    cells = [(name, kind, str(nodes), str(branches)) for name, kind, nodes, branches in rows]
    if every:
        return console.table(*_REGION, rows=cells, right=_REGION[2:])
    lines = [(row.name, *row.cells, row.times) for row in folded(cells)]
    headings = (*_REGION, "regions")
    return console.table(*headings, rows=lines, right=headings[2:])


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
    rounding: str = "nearest",
    seed: int = 0,
    every: bool = False,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Fold an adapter into a model's weights, and report how much of its change is left after rounding.

    A folder of transformers is merged one tensor at a time, so that a model of any size fits; after an
    interruption, the same command continues. A quantized model is loaded, and becomes a dense one.

    Args:
        model: The model.
        adapter: An adapter folder.
        out: For hf: models a folder, for others a .safetensors file of the state dict.
        dtype: fp32, fp16 or bf16; by default the model's.
        requantize: Quantize merged weights of a quantized model again.
        rounding: nearest, stochastic or compensated. Only lora_fx.merge can use inputs for compensated.
        seed: The seed of stochastic rounding.
        every: Measure the error of every weight, and show it.
        force: Overwrite existing files.
        as_json: Print the report as JSON, with the errors.
    """
    o.check_names(model, [adapter], dtype=dtype)
    path = check_out(model, out, force=force)

    from lora_fx.api import merge as merge_model
    from lora_fx.checkpoint import load_adapter

    wanted, report = o.dtype_of(dtype), None
    if not requantize:
        measure = every or as_json
        options = {"rounding": rounding, "seed": seed, "measure": measure, "force": force}
        report = _merged_by_files(model, adapter, path, dtype=wanted, **options)
    if report is None:
        loaded = o.load(model, adapter=adapter)
        with console.progress("reading the adapter"):
            adapted = load_adapter(loaded.model, adapter)
        with console.progress("merging") as advance:
            merged, report = merge_model(
                adapted,
                dtype=wanted,
                requantize=requantize,
                rounding=cast("RoundingName", rounding),
                seed=seed,
                return_report=True,
                progress=advance,
            )
        with console.progress("writing"):
            write_merged(merged, path, folder=loaded.folder)
    if as_json:
        console.say_json(report.to_json())
        return
    lines = str(report).splitlines()
    shown = lines if every else [lines[0], *(line for line in lines if "untied" in line)]
    console.say("\n".join([*shown, f"wrote {path}"]))


@o.command()
def visualize(
    model: o.ModelName,
    path: str,
    *,
    adapters: o.Adapters,
    look: o.Capturing,
    adapter: list[Path] | None = None,
    base: bool = False,
    as_plan: bool = False,
    compare: bool = False,
    original: Path | None = None,
    provider: str = "cpu",
    as_format: str | None = None,
    force: bool = True,
) -> None:
    """Draw the rewritten model: nested modules, equal blocks folded, adapters in color.

    MODEL may be an .onnx file or an adapter folder as well.

    Args:
        model: The model.
        path: The file: .html to explore, .svg, .dot, .graphml, .json.
        adapters: What to adapt.
        look: How to capture.
        adapter: An adapter folder, instead of the options that say what to adapt. Repeat it.
        base: Draw the model as it is, without adapters.
        as_plan: Draw the plan: sites by name, and why other operations are not adapted.
        compare: Draw the plan and the rewritten model in one page; with --adapter, each adapter alone.
        original: The folder that a quantized model was made from: colors show what quantizing has lost.
        provider: cpu, cuda or webgpu: the provider on which the nodes of an .onnx file would run.
        as_format: model-explorer writes a .json that Google's Model Explorer loads, and ranks for it.
        force: Replace an existing file.
    """
    file = o.file_to_write(path, _PICTURES, force=force)
    is_file = ":" not in model or Path(model).exists()  # the name of a model has a colon
    o.check_names(None if Path(model).exists() else model, adapter or [], provider=provider)

    from lora_fx.tools.draw import visualize as draw

    if is_file:
        written = draw(_file(model, provider), file, force=force, file_format=_format(as_format))
    else:
        with console.progress("drawing"):
            drawn, inputs = _drawn(model, adapters, look, adapter or [], base, as_plan, compare)
            more: dict[str, Any] = {"example_inputs": inputs, "original": original}
            written = draw(drawn, file, force=force, file_format=_format(as_format), **more)
    size = written.stat().st_size / 1e3
    console.say(f"wrote {written} ({size:,.0f} kB)")


@o.command(folder={"metavar": "DIR"})
def inspect(folder: Path, every: bool = False, as_json: bool = False) -> None:
    """Show what an adapter folder holds: configuration, sites, norms, singular values, a heat map.

    Args:
        folder: An adapter folder.
        every: Show a row for each site below the heat map.
        as_json: Print everything as JSON, with all singular values.
    """
    o.check_names(adapters=[folder])

    from lora_fx.ir import folded
    from lora_fx.tools.adapter_folder import inspect_adapter
    from lora_fx.tools.cli.tables import render_heat

    with console.progress("looking at the factors"):
        report = inspect_adapter(folder)
    if as_json:
        console.say_json(report.to_json())
        return
    out = console.output()
    out.print(console.facts(report.facts(), "dim"))
    for line in report.warnings():
        console.say(line, "yellow")
    for title, figure in (("‖ΔW‖", "norm"), ("effective rank", "effective_rank")):
        out.print(render_heat(title, *report.heat(figure), width=out.width))
    if every:
        out.print(console.table(*report.columns, rows=report.rows(), right=report.columns[1:]))
    for row in folded((key, "x".join(map(str, shape))) for key, shape in report.others.items()):
        console.say(f"also: {row.name} {row.cells[0]} {row.times}".rstrip())


def _file(path: str, provider: str) -> Any:
    """Return the path of an ONNX file, or an open session if a provider other than the CPU is requested."""
    from lora_fx.export.providers import chosen_provider

    if chosen_provider(provider) == "cpu":
        return path
    from lora_fx.export.session import OnnxSession

    wanted: Any = provider
    return OnnxSession(path, wanted)


def _format(name: str | None) -> Any:
    """Return the value of ``--format``; :func:`lora_fx.visualize` raises if it is unknown."""
    return name


def _drawn(
    model: str,
    adapters: o.Adapters,
    look: o.Capturing,
    folders: list[Path],
    base: bool,
    as_plan: bool,
    compare: bool,
) -> tuple[Any, Any]:
    """Return the objects that the command ``visualize`` draws, and example inputs if they are known."""
    from lora_fx.adapters import set_adapter
    from lora_fx.api import capture
    from lora_fx.api import plan as make_plan
    from lora_fx.api import rewrite as rewrite_model
    from lora_fx.checkpoint import load_adapter

    if folders and (base or as_plan):
        raise ConfigError("--adapter draws what is in a folder: leave out --base and --plan")
    chosen = adapters.made()
    loaded = o.load(model, adapter=folders[0]) if folders else look.load(model)
    how = look.of(loaded)
    drawn: Any = loaded.model
    if folders:
        names = [folder.name if len(folders) > 1 else "default" for folder in folders]
        if compare:
            panes = {folder.name: load_adapter(drawn, folder) for folder in folders}
            if len(panes) < 2:  # one folder, or folders of one name
                panes = {
                    "base": drawn,
                    **{str(path): load_adapter(drawn, path) for path in folders},
                }
            return panes, loaded.example_inputs
        for name, folder in zip(names, folders, strict=True):
            drawn = load_adapter(drawn, folder, adapter_name=name)
        set_adapter(drawn, names)
    elif base:
        drawn = drawn if look.by_default else capture(drawn, **how)
    elif compare:
        planned = make_plan(drawn, chosen, strict=adapters.strict, **how)
        drawn = [planned, rewrite_model(drawn, chosen, strict=adapters.strict, **how)]
    else:
        verb = make_plan if as_plan else rewrite_model
        drawn = verb(drawn, chosen, strict=adapters.strict, **how)
    return drawn, loaded.example_inputs


_FILES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".gguf")


def _merged_by_files(
    name: str,
    adapter: Path,
    out: Path,
    *,
    dtype: torch.dtype | None,
    **options: Any,
) -> MergeReport | None:
    """Merge the files of a folder of transformers without loading the model.

    Returns:
        The report, or None if the model has to be loaded.
    """
    from lora_fx.tools.merge_files import WholeModelError, merge_files

    folder = Path(name.removeprefix("hf:")).expanduser()
    if not name.startswith("hf:") or not any(folder.glob("*.safetensors")):
        return None
    try:
        with console.progress("merging") as advance:
            return merge_files(folder, adapter, out, dtype=dtype, progress=advance, **options)
    except WholeModelError as error:
        _log.warning("the whole model is loaded and merged in memory: %s", error.reason)
        return None


def check_out(name: str, path: str | Path, *, force: bool) -> Path:
    """Check before any work that the result can be written.

    Args:
        name: The model's name.
        path: The path to write.
        force: True if the path may exist.

    Returns:
        The path.

    Raises:
        ConfigError: If the path cannot be used; the message says what to give instead.
    """
    out = Path(path)
    folder = name.startswith("hf:")
    if not folder:
        output_file(path, (".safetensors",))
    elif out.is_file() or out.suffix.lower() in _FILES:
        raise ConfigError(
            f"cannot write {out}: it is a file, or named like one, and {name} is written as a folder"
        )
    used = out.exists() and (not folder or any(out.iterdir()))
    if used and not force:
        raise ConfigError(f"{out} exists: give another name, or --force to write over it")
    if folder and out.exists() and out.resolve() == Path(name[3:]).expanduser().resolve():
        raise ConfigError(f"{out} is the model that is merged: give another folder")
    return out


def write_merged(model: nn.Module, out: Path, *, folder: Path | None = None) -> None:
    """Write the folder of a transformers model, or else a safetensors state dict.

    Args:
        model: The merged model.
        out: The path to write. Its parent folder is created.
        folder: The folder of transformers that the model came from.

    Raises:
        MergeError: If the files cannot be written. Existing files are kept then.
    """
    from lora_fx.tools.merge_files import COMPANIONS

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
            stage = Path(staging, "model")
            if folder is None:
                _save_weights(model, stage)
                stage.replace(out)
                return
            saveable: Any = model
            saveable.save_pretrained(stage)
            for pattern in COMPANIONS:
                for path in folder.glob(pattern):
                    if path.is_file() and not (stage / path.name).exists():
                        shutil.copyfile(path, stage / path.name)
            out.mkdir(exist_ok=True)
            for path in sorted(stage.iterdir()):
                path.replace(out / path.name)
    except OSError as error:
        raise MergeError(
            f"{out} cannot be written ({error}): give a place that is writable and has room"
        ) from error


def _save_weights(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    try:
        save_model(model, str(path))  # tied weights once
    except SafetensorError as error:
        raise MergeError(f"the weights cannot be written: {error}") from error


@o.command(folder={"metavar": "DIR"})
def verify(
    folder: Path,
    onnx: Path | None = None,
    model: str | None = None,
    url: str | None = None,
    name: str | None = None,
    base_name: str | None = None,
    provider: str = "cpu",
    as_json: bool = False,
) -> None:
    """Check if a file, a model or a server applies an adapter; exit with 1 if it does not.

    Args:
        folder: An adapter folder that was saved with receipt=.
        onnx: An .onnx file. If it takes adapters, this adapter is loaded into it.
        model: A model that has the adapter in its weights.
        url: The address of a server that speaks OpenAI's protocol, as http://127.0.0.1:8000/v1.
        name: The name that the server has for the adapter.
        base_name: The name that the server has for the base, if it does not report it.
        provider: cpu or cuda, for a file.
        as_json: Print the result as JSON.
    """
    subjects = [option for option in (onnx, model, url) if option is not None]
    if len(subjects) != 1:
        raise ConfigError("say what to ask: one of --onnx FILE, --model MODEL and --url ADDRESS")
    if url is not None and not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url}: an address begins with http:// or https://")
    o.check_names(model, [folder], provider=provider)
    if onnx is not None:
        o.check_file(onnx)

    from lora_fx.tools.adapter_folder import verify as judge

    subject: Any = onnx or url
    if model is not None:
        subject = o.load(model).model
    requested: Any = provider
    with console.progress("asking"):
        verdict = judge(folder, subject, name=name, base_name=base_name, provider=requested)
    if as_json:
        from lora_fx.ir import json_text

        console.say_json(json_text(verdict))
    else:
        console.output().print(str(verdict), highlight=False)
    if not verdict.applied:
        raise typer.Exit(1)
