"""``lora-fx export-adapter``: an adapter folder as a file for an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

__all__ = ["export_adapter"]


def export_adapter(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="An adapter folder.", show_default=False)
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="The .onnx_adapter file.", show_default=False)
    ],
    base: Annotated[
        Path | None,
        typer.Option("--base", help="The .onnx file that it is for: it is checked against that."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Its model, for DoRA and others that depend on the base weights."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, fp16 or bf16; not with --base.")
    ] = None,
    force: o.Force = False,
) -> None:
    """Write an adapter for a file that was exported with --adapters inputs."""
    from lora_fx.checkpoint import load_adapter
    from lora_fx.export.adapters import save_onnx_adapter

    path = o.file_to_write(out, (".onnx_adapter",), force=force)
    source: Any = folder
    if model is not None:
        loaded: Any = o.load(model).model
        with console.progress("reading the adapter"):
            source = load_adapter(loaded, folder)
    kind: Any = dtype
    with console.progress("writing the adapter"):
        written = save_onnx_adapter(source, path, base=base, dtype=kind, force=force)
    size = written.stat().st_size
    console.output().print(
        f"{written}: {size / 1e3:.1f} kB", highlight=False, soft_wrap=True, markup=False
    )
