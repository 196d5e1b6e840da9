"""``lora-fx export``: a model, with or without an adapter, as a checked ONNX file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

__all__ = ["export"]

_STAGES = 5  # of export_onnx


def export(
    model: o.ModelName,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The .onnx file.", show_default=False)],
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="An adapter folder: to merge, or to have the places of."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="text-generation (a decoder with its key-value cache) or text2text-generation (an "
            "encoder-decoder): a file for `lora-fx generate`.",
        ),
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(
            "--adapters",
            help="merge; inline: beside the operations, as it is over quantised weights without this "
            "option; or inputs: the base model, which takes adapters as it is run.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, fp16 or bf16; as it is without it.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option("--opset", help="ONNX opset; by default 20, or 22 for bf16.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare ONNX Runtime with PyTorch.")
    ] = True,
    force: o.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Write an ONNX file, which takes its place only after it was compared with PyTorch."""
    from lora_fx.checkpoint import load_adapter
    from lora_fx.export.onnx import export_onnx
    from lora_fx.tools.cli.export_table import render

    path = o.file_to_write(out, (".onnx",), force=force)
    loaded = o.load(model)
    inputs = loaded.inputs()
    base: Any = loaded.model
    if loaded.folder is not None and hasattr(base.config, "use_cache"):
        base.config.use_cache = False  # a cache is no output of one pass
    if adapter is not None:
        with console.progress("reading the adapter"):
            base = load_adapter(base, adapter)
    kind: Any = dtype
    purpose: Any = task
    how: Any = adapters
    with console.steps("exporting", _STAGES) as begin:
        report = export_onnx(
            base,
            path,
            inputs,
            task=purpose,
            adapters=how,
            dtype=kind,
            opset=opset,
            verify=verify,
            force=force,
            progress=begin,
        )
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
        return
    console.output().print(render(report), highlight=False)
