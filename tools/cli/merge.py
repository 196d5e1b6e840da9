"""``lora-fx merge``: an adapter folded into the weights, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

__all__ = ["merge"]


def merge(
    model: o.ModelName,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="An adapter folder.", show_default=False)
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="For hf: models a folder, for others a .safetensors file of the state dict.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, fp16 or bf16; as it is without it.")
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Quantise merged weights of a quantised model again."),
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="The error of every weight.")] = False,
    force: o.Force = False,
) -> None:
    """Fold an adapter into a model's weights, and say how exact the result is.

    A quantised model becomes a dense one.
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
            adapted,
            dtype=wanted,
            requantize=requantize,
            return_report=True,
            progress=advance,
        )
    with console.progress("writing"):
        write_merged(merged, path, folder=loaded.folder)
    lines = str(report).splitlines()
    shown = lines if every else [lines[0], *(line for line in lines if "untied" in line)]
    screen = console.output()
    for line in shown:
        screen.print(line, highlight=False, soft_wrap=True)
    screen.print(f"wrote {path}", highlight=False, soft_wrap=True)
