"""Chooses the front-end.

``symbolic`` if everything traces, else ``export`` where it sees more, else ``regions``.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal, get_args

from torch import nn

from lora_fx.errors import CaptureError, ConfigError
from lora_fx.formats import quantization_of
from lora_fx.ir import Capture, Quantization
from lora_fx.passes.capture.check import check_unchanged, goes_past, run_reference, watch_reference
from lora_fx.passes.capture.exported import export_root
from lora_fx.passes.capture.regions import find_regions
from lora_fx.passes.capture.synthesis import by_place, describe, named_inputs, normalize, synthesise
from lora_fx.passes.graph import (
    check_model,
    is_built_in,
    is_matrix,
    is_partitioned,
    is_region,
    kept_graph,
    share_copy,
    show_shapes,
)

__all__ = ["Frontend", "capture"]

_log = logging.getLogger("lora_fx")

Frontend = Literal["auto", "symbolic", "export", "regions"]


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    frontend: Frontend = "auto",
    dynamic_shapes: Any = None,
) -> Capture:
    """Captures a model as graphs and checks them; see :func:`lora_fx.capture`.

    In the place of parameters that ZeRO-3 has partitioned are others of the true shapes, without values,
    until :func:`lora_fx.passes.graph.put_partitions_back`.
    """
    if example_inputs is not None and any(map(is_partitioned, model.parameters())):
        raise CaptureError(
            "the model is partitioned by ZeRO-3, so that nothing can be run on the example inputs before "
            "deepspeed.initialize: leave them out"
        )
    if frontend == "export" and example_inputs is None:
        return _from_made_up_inputs(model, dynamic_shapes)
    result = _captured(model, example_inputs, frontend, dynamic_shapes)
    # torch.export ran it on shapes alone. On the meta device there are no values to compare, and
    # transformers asks for some.
    valueless = result.frontend == "export" and any(p.is_meta for p in model.parameters())
    if example_inputs is None or valueless:
        return result
    try:
        # The call that the graph was made for, or the guard would compare the model with itself.
        if result.frontend == "export":
            named = named_inputs(model, example_inputs)
            check_unchanged(model, result, named)
            placed = by_place(model, example_inputs, named)
            if placed is not None and (not normalize(example_inputs)[1] or _runs(model, placed)):
                check_unchanged(model, result, placed)
        else:
            check_unchanged(model, result, example_inputs)
    except CaptureError as error:
        if frontend != "auto":
            raise
        # What a trace has fixed cannot be seen before it runs.
        _log.warning("not captured by %s: %s", result.frontend, error)
        notes = (*result.notes, f"not {result.frontend}: {error}")
        return _that_holds(model, result, example_inputs, notes)
    if frontend == "auto" and result.frontend != "export":
        return _for_that_call(model, result, example_inputs, dynamic_shapes)
    return result


def _runs(model: nn.Module, call: tuple[Any, ...]) -> bool:
    """Whether the model takes a call at all."""
    try:
        run_reference(model, call)
    except CaptureError:
        return False
    return True


def _that_holds(
    model: nn.Module, result: Capture, example_inputs: Any, notes: tuple[str, ...]
) -> Capture:
    """The regions, or where they compute something else, too, those of PyTorch's own layers alone."""
    traced = _captured(model, None, "regions", None)
    if result.frontend == "export":
        try:
            check_unchanged(model, traced, example_inputs)
        except CaptureError as error:
            notes = (*notes, f"not regions: {error}")
        else:
            return dataclasses.replace(traced, notes=notes)
    layers = {key: one for key, one in traced.regions.items() if is_built_in(one.module)}
    reason = "a graph in the model computes something else than the original on the example inputs"
    opaque = {one.fqn: reason for one in traced.regions.values() if one.key not in layers}
    traced = dataclasses.replace(
        traced, regions=layers, opaque={**traced.opaque, **opaque}, notes=notes
    )
    check_unchanged(model, traced, example_inputs)
    return traced


def _for_that_call(
    model: nn.Module, result: Capture, example_inputs: Any, dynamic_shapes: Any
) -> Capture:
    """What was traced, or an export where the example call does not take what was traced."""
    past = goes_past(result, example_inputs)
    if past is None:
        return result
    try:
        exported = capture(model, example_inputs, frontend="export", dynamic_shapes=dynamic_shapes)
    except CaptureError as error:
        notes = (f"the example inputs go past a graph: {past}", f"not export: {error}")
        return dataclasses.replace(result, notes=(*result.notes, *notes))
    return dataclasses.replace(exported, notes=(f"not {result.frontend}: {past}", *exported.notes))


def _from_made_up_inputs(model: nn.Module, dynamic_shapes: Any) -> Capture:
    check_model(model)
    made = synthesise(model)
    if made.inputs is None:
        raise CaptureError(
            "frontend='export' needs example_inputs (a tuple, a dict or a tensor that forward takes), "
            f"and none can be made up: {made.words}"
        )
    words = f"example inputs made up from {made.words}: {describe(made.inputs)}"
    try:
        result = capture(model, made.inputs, frontend="export", dynamic_shapes=dynamic_shapes)
    except CaptureError as error:
        raise CaptureError(
            f"{error} ({words}; if the model takes others, give example_inputs)"
        ) from error
    return dataclasses.replace(result, notes=(*result.notes, words))


def _captured(
    model: nn.Module, example_inputs: Any, frontend: Frontend, dynamic_shapes: Any
) -> Capture:
    if frontend not in get_args(Frontend):
        raise ConfigError(f"frontend must be auto, symbolic, export or regions, found {frontend!r}")
    check_model(model)
    if any(is_region(module) and kept_graph(module) is None for module in model.modules()):
        raise CaptureError(
            "the model is captured or rewritten already: capture the original, which was not changed"
        )
    copy = show_shapes(share_copy(model))
    stored = next((q for q in map(quantization_of, copy.parameters()) if q is not None), None)
    if stored is not None and frontend == "export":
        raise CaptureError(
            f"the model has quantized weights ({stored}), which torch.export takes apart: use "
            "frontend='auto' or 'regions'"
        )
    traced = find_regions(copy)
    reason = _not_symbolic(traced)
    if frontend == "symbolic" and "" not in traced.regions:
        raise CaptureError(
            f"{type(model).__name__} does not trace symbolically: {reason}. Use frontend='auto'"
        )
    if frontend == "symbolic" or (frontend == "auto" and reason is None):
        return dataclasses.replace(traced, frontend="symbolic")
    if frontend == "regions":
        return traced
    notes = (f"not symbolic: {reason}",)
    if frontend == "auto":
        why = _why_regions(model, traced, example_inputs, stored)
        if why is not None:
            return dataclasses.replace(traced, notes=(*notes, f"not export: {why}"))
    try:
        return dataclasses.replace(export_root(traced, example_inputs, dynamic_shapes), notes=notes)
    except CaptureError as error:
        if frontend == "export":
            raise
        # The export has run it: iterators and generators of random numbers have gone on.
        traced = find_regions(show_shapes(share_copy(model)))
        return dataclasses.replace(traced, notes=(*notes, f"not export: {error}"))


def _why_regions(
    model: nn.Module, traced: Capture, example_inputs: Any, stored: Quantization | None
) -> str | None:
    """Why the regions do without an export; None if one would see more."""
    if example_inputs is None:
        return "there are no example_inputs"
    if stored is not None:
        return f"its weights are quantized ({stored})"
    unseen = [fqn for fqn in traced.opaque if _own_matrix(traced.model.get_submodule(fqn))]
    # An export takes long: only where what no region sees is more than a table or a token.
    if not unseen or not _multiplied(model, example_inputs, unseen):
        return "the regions see every weight"
    return None


def _multiplied(model: nn.Module, example_inputs: Any, modules: list[str]) -> list[str]:
    """Those modules that have a parameter of their own that is multiplied with data."""
    count = watch_reference(model, example_inputs)
    owners = {
        name.rpartition(".")[0] for names in (*count.direct, *count.computed) for name in names
    }
    # A built-in layer is one opaque call, over the parameters of its children, too.
    return [fqn for fqn in modules if fqn in owners or is_built_in(model.get_submodule(fqn))]


def _not_symbolic(capture: Capture) -> str | None:
    """Why not everything is a graph, or None."""
    if "" in capture.opaque:
        return f"{type(capture.model).__name__}: {capture.opaque['']}"
    for fqn, reason in capture.opaque.items():
        if not is_built_in(capture.model.get_submodule(fqn)):
            return f"{fqn}: {reason}"
    return None


def _own_matrix(module: nn.Module) -> bool:
    built_in = is_built_in(module)
    return built_in or any(is_matrix(p) for p in module._parameters.values())
