"""Pictures of models and plans, for looking at and for other programs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from lora_fx.api import capture
from lora_fx.errors import CaptureError, ConfigError, LoraFxError
from lora_fx.files import output_file, replacing
from lora_fx.ir import Capture, Plan
from lora_fx.passes.graph import graphs_of
from lora_fx.tools.draw.dot import to_dot, to_graphml
from lora_fx.tools.draw.html import to_html
from lora_fx.tools.draw.model_picture import picture_of_model
from lora_fx.tools.draw.picture import Picture
from lora_fx.tools.draw.plan_picture import picture_of_plan
from lora_fx.tools.draw.svg import to_svg

__all__ = ["FORMATS", "picture_of", "visualize"]


def _to_json(picture: Picture) -> str:
    return json.dumps(picture.to_dict(), indent=1) + "\n"


FORMATS: Mapping[str, Callable[[Picture], str]] = {
    ".svg": to_svg,
    ".dot": to_dot,
    ".graphml": to_graphml,
    ".json": _to_json,
    ".html": to_html,
}
"""What each suffix is written by."""


def visualize(
    model_or_plan: nn.Module | Capture | Plan, path: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Draws a model or a plan into a file, in the format that the suffix names.

    Modules are nested boxes, those with a graph show its nodes; equal blocks in sequence are drawn
    once, with their number. ``.svg`` and ``.html`` are for looking at: the page opens and closes
    boxes, searches and zooms, and needs no network. ``.dot`` is for Graphviz, ``.graphml`` for
    networkx, Gephi and yEd, ``.json`` for programs of your own: ``boxes`` (with children),
    ``nodes`` (without) and ``edges``, each box and node with its ``parent``; see
    :meth:`lora_fx.tools.draw.picture.Picture.to_dict`. The same model gives the same bytes.

    Args:
        model_or_plan: Any module (plain, captured, rewritten or merged), a capture, or a plan: then
            the sites by name, and beside them what is not adapted and why.
        path: The file to write.
        force: Whether to write over a file that exists.

    Returns:
        The path of the file.

    Raises:
        ConfigError: The suffix is none of these, the folder does not exist, or the file does.
        LoraFxError: The file could not be written; one that was there is still there.
    """
    if isinstance(path, nn.Module):
        raise ConfigError(
            f"path is a {type(path).__name__}: give the model first, then a file name"
        )
    target = output_file(path, tuple(FORMATS), ConfigError)
    write = FORMATS[target.suffix.lower()]
    if not target.parent.is_dir():
        raise ConfigError(f"cannot write {target}: there is no folder {target.parent}; create it")
    if target.exists() and not force:
        raise ConfigError(
            f"{target} exists: pass force=True to write over it, or choose another name"
        )
    _replace(target, write(picture_of(model_or_plan)))
    return target


def picture_of(model_or_plan: object) -> Picture:
    """What :func:`visualize` draws, before it is a file."""
    if isinstance(model_or_plan, Plan):
        return picture_of_plan(model_or_plan)
    if isinstance(model_or_plan, Capture):
        graphs = {name: region.graph for name, region in model_or_plan.regions.items()}
        return picture_of_model(model_or_plan.model, graphs)
    if isinstance(model_or_plan, nn.Module):
        graphs = graphs_of(model_or_plan)
        return picture_of_model(model_or_plan, graphs) if graphs else _plain(model_or_plan)
    found = type(model_or_plan).__name__
    raise ConfigError(f"cannot draw a {found}: give an nn.Module, or what lora_fx.plan() returns")


def _plain(model: nn.Module) -> Picture:
    """A model that nobody has captured yet: captured for the picture alone."""
    try:
        captured = capture(model)
    except CaptureError as error:
        return picture_of_model(model, {}, (f"no graphs: {error}",))
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    # The copy is frozen; its parameters are its own, only their storage is shared.
    for name, parameter in captured.model.named_parameters():
        if trains.get(name, False):
            parameter.requires_grad_(True)
    return picture_of(captured)


def _replace(target: Path, text: str) -> None:
    try:
        with replacing(target) as new:
            new.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise LoraFxError(f"could not write {target}: {error}") from error
