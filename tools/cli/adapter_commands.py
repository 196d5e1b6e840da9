"""Commands that make adapters of something else."""

from __future__ import annotations

from pathlib import Path

from lora_fx.errors import ConfigError
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

__all__ = ["extract"]


@o.command()
def extract(
    base: str,
    tuned: str,
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    budget: str | None = None,
    picture: Path | None = None,
    every: bool = False,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Make an adapter of a fully fine-tuned model: low-rank factors of what tuning has changed.

    The folders are read one tensor at a time, so that models of any size fit.

    Args:
        base: The folder of transformers before tuning.
        tuned: The folder after tuning.
        out: The adapter folder to write.
        rank: The rank of all sites; by default 16.
        energy: Instead of the rank: the share of the change to keep at each site, above 0 and at most 1.
        budget: Instead of the rank: a number of parameters, or a size such as 20MB.
        picture: Draw what was lost where: .html, .svg, .dot, .graphml or .json.
        every: Show a line for each site.
        force: Replace an adapter in the folder.
        as_json: Print the report as JSON.
    """
    folders = [Path(name.removeprefix("hf:")) for name in (base, tuned)]
    for folder in folders:
        if not folder.expanduser().is_dir():
            raise ConfigError(
                f"{folder} is not a folder: give the folders of two models of transformers, with safetensors"
            )
    size = int(budget) if budget is not None and budget.isdecimal() else budget

    from lora_fx.tools.draw import visualize
    from lora_fx.tools.extract_files import extract_files

    with console.progress("extracting") as advance:
        report = extract_files(
            *folders,
            out,
            rank=rank,
            energy=energy,
            budget=size,
            force=force,
            progress=advance,
        )
    if picture is not None:
        visualize(report, picture)
    if as_json:
        console.say_json(report.to_json())
        return
    lines = str(report).splitlines()
    shown = lines if every else [line for line in lines if not line.startswith("  ")]
    console.say("\n".join([*shown, f"wrote {out}"]))
