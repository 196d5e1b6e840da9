"""``lora-fx visualize``: a picture of a model, or of what would be adapted in it."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

__all__ = ["visualize"]


def visualize(
    model: o.ModelName,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="The file: .html to explore, .svg, .dot, .graphml, .json.",
            show_default=False,
        ),
    ],
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
    frontend: o.FrontendName = "auto",
    inputs: o.InputsName = None,
    base: Annotated[
        bool, typer.Option("--base", help="The model as it is, without adapters.")
    ] = False,
    as_plan: Annotated[
        bool, typer.Option("--plan", help="The sites by name, and what is not adapted and why.")
    ] = False,
    force: o.Force = False,
) -> None:
    """Draw the rewritten model: nested modules, equal blocks folded, adapters in colour."""
    from lora_fx.api import capture, rewrite
    from lora_fx.api import plan as make_plan
    from lora_fx.tools.draw import FORMATS
    from lora_fx.tools.draw import visualize as draw

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
    file = o.file_to_write(path, tuple(FORMATS), force=force)
    loaded = o.load(model, weights=inputs is not None)
    how = o.capture_options(loaded, frontend, inputs)
    with console.progress("drawing"):
        if base:
            plain = frontend == "auto" and inputs is None
            seen = loaded.model if plain else capture(loaded.model, **how)
            written = draw(seen, file, force=force)
        elif as_plan:
            written = draw(make_plan(loaded.model, chosen, strict=strict, **how), file, force=force)
        else:
            written = draw(rewrite(loaded.model, chosen, strict=strict, **how), file, force=force)
    size = written.stat().st_size / 1e3
    console.output().print(f"wrote {written} ({size:,.0f} kB)", highlight=False, soft_wrap=True)
