"""``lora-fx plan``: the dry run."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o
from lora_fx.tools.cli import quantize_option as q

__all__ = ["plan"]


def plan(
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
    every: Annotated[
        bool, typer.Option("--all", help="One row a site; equal layers are one row without it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Show what would be adapted, what not and why, and what it costs. Changes nothing."""
    from lora_fx.api import plan as make_plan
    from lora_fx.tools.cli.dry_run import render

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
    loaded = o.load(model, weights=inputs is not None)
    stored = None if quantize is None else q.planned(loaded, quantize)
    how = o.capture_options(loaded, frontend, inputs)
    with console.progress("planning"):
        made = make_plan(loaded.model, chosen, strict=strict, **how)
    if as_json:
        shown = made.to_dict()
        if stored is not None:
            shown["quantization"] = stored.to_dict()
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return
    out = console.output()
    if stored is not None:
        out.print(stored.summary(), highlight=False, soft_wrap=True, markup=False)
    out.print(render(made, width=out.width, every=every), highlight=False)
