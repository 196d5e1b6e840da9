"""Commands that write an adapter from other adapters or from a tuned model: extract, migrate, convert, ..."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from lora_fx.errors import ConfigError
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

if TYPE_CHECKING:
    from lora_fx.adapters import CombinationType
    from lora_fx.extraction import ExtractionReport

__all__ = ["combine", "convert", "extract", "migrate", "resize"]


@o.command(base={"metavar": "BASE"}, tuned={"metavar": "TUNED"}, out={"name": ("--out", "-o")})
def extract(
    base: str,
    tuned: str,
    out: Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: str | None = None,
    picture: Path | None = None,
    every: bool = False,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Extract an adapter from a fully fine-tuned model: low-rank factors of the change of its weights.

    The folders are read one tensor at a time, so that models of any size fit.

    Args:
        base: The folder of transformers with the model before tuning.
        tuned: The folder with the model after tuning.
        out: The adapter folder to write.
        rank: The rank of all sites; by default 16.
        energy: Instead of the rank: the share of the change to keep at each site, above 0 and at most 1.
        budget: Instead of the rank: a number of parameters, or a size such as 20MB.
        picture: Draw the loss of each site: .html, .svg, .dot, .graphml or .json.
        every: Show a line for each site.
        force: Replace an adapter in the folder.
        as_json: Print the report as JSON.
    """
    if out is None:
        raise ConfigError("say where to write the adapter: --out DIR")
    old, new = (Path(name.removeprefix("hf:")) for name in (base, tuned))
    for folder in (old, new):
        if not folder.expanduser().is_dir():
            raise ConfigError(
                f"{folder} is not a folder: give the folders of two models of transformers, with safetensors"
            )

    from lora_fx.tools.extract_files import extract_files

    with console.progress("extracting") as advance:
        report = extract_files(
            old,
            new,
            out,
            rank=rank,
            energy=energy,
            budget=budget,
            force=force,
            progress=advance,
        )
    _tell(report, out, picture=picture, every=every, as_json=as_json)


@o.command(
    folder={"metavar": "DIR"},
    to={"name": "--to", "metavar": "MODEL"},
    source={"name": "--from", "metavar": "MODEL"},
    out={"name": ("--out", "-o")},
)
def migrate(
    folder: Path,
    to: str | None = None,
    out: Path | None = None,
    source: str | None = None,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Show how an adapter fits a model with other names, as in a newer transformers, and write it with these.

    Without --out nothing is written. Anything ambiguous is an error.

    Args:
        folder: The adapter folder.
        to: The model to load it on.
        out: The folder to write, for PEFT, vLLM and others.
        source: The model that the adapter was made for. It helps to match the parts of fused matrices, and
            the order of execution.
        force: Replace an adapter in the folder to write.
        as_json: Print every move as JSON.
    """
    if to is None:
        raise ConfigError("say which model the adapter is for: --to MODEL")
    o.check_names(to, [folder])
    if source is not None:
        o.check_names(source)
    if out is not None and out.resolve() == folder.resolve():
        raise ConfigError(f"--out {out} is the adapter that is moved: give another folder")

    from lora_fx.checkpoint import (
        has_receipt,
        load_adapter,
        load_onto_empty,
        plan_migration,
        save_adapter,
    )

    proven = has_receipt(folder)
    loaded = o.load(to, weights=proven, adapter=folder)
    old = None if source is None else o.load(source, weights=False).model
    with console.progress("matching"):
        planned = plan_migration(loaded.model, folder, source=old)
    if as_json:
        from lora_fx.ir import json_text

        console.say_json(json_text({"moves": planned.moves, "problems": planned.problems}))
    else:
        console.say(str(planned))
    planned.check()
    if out is None:
        return
    with console.progress("writing"):
        if proven:
            adapted = load_adapter(loaded.model, folder, match="graph", source=old)
        else:
            adapted = load_onto_empty(
                loaded.model, folder, lambda name: None, match="graph", source=old
            )
        save_adapter(adapted, out, force=force)
    if not as_json:
        console.say(f"{out} written" + (", its outputs are those of the receipt" if proven else ""))


@o.command(
    adapter={"metavar": "ADAPTER"},
    to={"name": "--to", "metavar": "MODEL"},
    out={"name": ("--out", "-o")},
)
def convert(
    adapter: Path,
    to: str | None = None,
    out: Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: str | None = None,
    component: str | None = None,
    picture: Path | None = None,
    every: bool = False,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Convert an adapter of another method to LoRA: LoHa, LoKr, OFT, IA3, VeRA and others, or LyCORIS files.

    The folder of a model of transformers is read one tensor at a time, so that models of any size fit.

    Args:
        adapter: A folder of PEFT, or a file of LyCORIS, kohya or ComfyUI.
        to: The base model.
        out: The adapter folder to write.
        rank: The rank of all sites; by default 16.
        energy: Instead of the rank: the share of the change to keep at each site. 1 is exact.
        budget: Instead of the rank: a number of parameters, or a size such as 20MB.
        component: The name of the model's part of a pipeline, such as unet, if several parts of a file fit.
        picture: Draw the loss of each site: .html, .svg, .dot, .graphml or .json.
        every: Show a line for each site.
        force: Replace an adapter in the folder.
        as_json: Print the report as JSON.
    """
    if to is None:
        raise ConfigError("say which model the adapter is for: --to MODEL")
    if out is None:
        raise ConfigError("say where to write the adapter: --out DIR")
    o.check_names(to, [adapter])

    from lora_fx.tools.convert_files import convert_files

    with console.progress("converting") as advance:
        report = convert_files(
            adapter,
            to,
            out,
            rank=rank,
            energy=energy,
            budget=budget,
            component=component,
            force=force,
            progress=advance,
        )
    _tell(report, out, picture=picture, every=every, as_json=as_json)


@o.command(folder={"metavar": "DIR"}, out={"name": ("--out", "-o")})
def resize(
    folder: Path,
    out: Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    every: bool = False,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Write a LoRA adapter with the closest factors of a smaller rank. No model is needed.

    Args:
        folder: The adapter folder.
        out: The folder to write.
        rank: The rank of all layers; by default 16.
        energy: Instead of the rank: the share of the change to keep at each layer.
        every: Show a line for each layer.
        force: Replace an adapter in the folder.
        as_json: Print the report as JSON.
    """
    if out is None:
        raise ConfigError("say where to write the adapter: --out DIR")

    from lora_fx.folders import resize_adapter

    report = resize_adapter(folder, out, rank=rank, energy=energy, force=force)
    if as_json:
        console.say_json(report.to_json())
        return
    console.say(f"{report if every else report.summary}\nwrote {out}")


@o.command(
    folders={"metavar": "DIR..."},
    out={"name": ("--out", "-o")},
    weight={"name": "--weights"},
    kind={"name": "--type"},
)
def combine(
    folders: list[Path],
    out: Path | None = None,
    weight: str | None = None,
    kind: str = "svd",
    rank: int | None = None,
    density: float | None = None,
    force: bool = False,
) -> None:
    """Write the weighted combination of LoRA adapters. No model is needed.

    Args:
        folders: The adapter folders.
        out: The folder to write.
        weight: A number for each adapter, with commas; by default 1 for each.
        kind: svd (the closest of a rank), cat (exact; the rank is the sum of the ranks), linear, ties,
            dare_ties and others, as in PEFT.
        rank: For types with svd: the rank; by default the largest of the adapters.
        density: For types that drop elements: the share to keep.
        force: Replace an adapter in the folder.
    """
    if out is None:
        raise ConfigError("say where to write the adapter: --out DIR")
    try:
        weights = [1.0] * len(folders) if weight is None else [float(w) for w in weight.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--weights: found {weight!r}; give numbers with commas: 0.7,0.3"
        ) from error

    from lora_fx.adapters import Combination
    from lora_fx.folders import combine_folders

    how = Combination(cast("CombinationType", kind), svd_rank=rank, density=density)
    count = combine_folders(folders, weights, out, how, force=force)
    console.say(f"{len(folders)} adapters, {count} layer(s)\nwrote {out}")


def _tell(
    report: ExtractionReport, out: Path, *, picture: Path | None, every: bool, as_json: bool
) -> None:
    """Print the report about a written adapter, and draw it if ``picture`` is given."""
    if picture is not None:
        from lora_fx.tools.draw import visualize

        visualize(report, picture)
    if as_json:
        console.say_json(report.to_json())
        return
    lines = str(report).splitlines()
    shown = lines if every else [line for line in lines if not line.startswith("  ")]
    console.say("\n".join([*shown, f"wrote {out}"]))
