"""Choice of the front-end.

``symbolic`` if everything can be traced, else ``export`` if an export sees more weights, else ``regions``.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal, get_args

from torch import nn

from lora_fx.errors import CaptureError, ConfigError
from lora_fx.formats import quantization_of
from lora_fx.ir import Capture, Quantization, join
from lora_fx.passes.capture.check import check_unchanged, watch_reference
from lora_fx.passes.capture.exported import add_exported
from lora_fx.passes.capture.regions import find_regions
from lora_fx.passes.capture.synthesis import describe, synthesise
from lora_fx.passes.graph import (
    check_model,
    is_built_in,
    is_matrix,
    is_partitioned,
    is_region,
    kept_graph,
    share_copy,
    show_shapes,
    storage_of,
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
    verify: bool = True,
) -> Capture:
    """Capture a model as graphs and check them; see :func:`lora_fx.capture`.

    Without ``verify`` the graphs are not compared with the model. A rewrite passes ``verify=False``, because
    it compares its own result.

    Parameters that ZeRO-3 has partitioned are replaced by meta parameters of the full shape.
    :func:`lora_fx.passes.graph.put_partitions_back` undoes that.
    """
    if example_inputs is not None and any(map(is_partitioned, model.parameters())):
        raise CaptureError(
            "the model is partitioned by ZeRO-3, so that nothing can be run on the example inputs before "
            "deepspeed.initialize: leave them out"
        )
    if frontend == "export" and example_inputs is None:
        return _from_made_up_inputs(model, dynamic_shapes)
    result = _captured(model, example_inputs, frontend, dynamic_shapes)
    # On the meta device there are no values to compare, and code of transformers reads values.
    if example_inputs is None or any(p.is_meta for p in model.parameters()):
        return result
    if not verify or all(region.not_run for region in result.regions.values()):
        return result
    try:
        check_unchanged(model, result, example_inputs)
    except CaptureError as error:
        if frontend not in ("auto", "export"):
            raise
        # Only a run shows that the trace has fixed a value that changes.
        _log.warning("not captured by %s: %s", result.frontend, error)
        notes = (*result.notes, f"not {result.frontend}: {error}")
        return _keep_built_in_graphs(model, result, example_inputs, notes)
    return result


def _keep_built_in_graphs(
    model: nn.Module, result: Capture, example_inputs: Any, notes: tuple[str, ...]
) -> Capture:
    """Drop the graphs of all modules but PyTorch's own layers, after the comparison with the model failed."""
    kept = {
        fqn: region
        for fqn, region in result.regions.items()
        if region.not_run or is_built_in(region.module)
    }
    reason = "a graph in the model computes something else than the original on the example inputs"
    opaque = {**result.opaque, **dict.fromkeys(result.regions.keys() - kept.keys(), reason)}
    frontend = "export" if result.frontend == "export" else "regions"
    reduced = dataclasses.replace(
        result, regions=kept, opaque=opaque, notes=notes, frontend=frontend
    )
    check_unchanged(model, reduced, example_inputs)
    return reduced


def _from_made_up_inputs(model: nn.Module, dynamic_shapes: Any) -> Capture:
    check_model(model)
    synthesis = synthesise(model)
    if synthesis.inputs is None:
        raise CaptureError(
            "frontend='export' needs example_inputs (a tuple, a dict or a tensor that forward takes), "
            f"and none can be made up: {synthesis.words}"
        )
    words = f"example inputs made up from {synthesis.words}: {describe(synthesis.inputs)}"
    try:
        result = capture(model, synthesis.inputs, frontend="export", dynamic_shapes=dynamic_shapes)
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
    whole = dataclasses.replace(traced, frontend="symbolic") if reason is None else traced
    if frontend in ("symbolic", "regions"):
        return dataclasses.replace(traced, frontend=frontend)
    notes = () if reason is None else (f"not symbolic: {reason}",)
    if frontend == "auto":
        why = _why_regions(model, traced, example_inputs, stored)
        if why is not None:
            return dataclasses.replace(whole, notes=(*notes, f"not export: {why}") if notes else ())
    try:
        return dataclasses.replace(
            add_exported(traced, example_inputs, dynamic_shapes), notes=notes
        )
    except CaptureError as error:
        if frontend == "export":
            raise
        # The export has run the copy, and so advanced its iterators and random generators.
        traced = find_regions(show_shapes(share_copy(model)))
        return dataclasses.replace(
            traced, frontend=whole.frontend, notes=(*notes, f"not export: {error}")
        )


def _why_regions(
    model: nn.Module, traced: Capture, example_inputs: Any, stored: Quantization | None
) -> str | None:
    """Return the reason to capture by regions and not by export, or None if an export would see more."""
    if example_inputs is None:
        return "there are no example_inputs"
    if stored is not None:
        return f"its weights are quantized ({stored})"
    seen = {
        join(region.fqn, str(node.target))
        for region in traced.regions.values()
        for node in region.graph.nodes
        if node.op == "get_attr"
    }
    unread = {
        storage_of(parameter)
        for name, parameter in traced.model.named_parameters(remove_duplicate=False)
        if is_matrix(parameter) and name not in seen
    }
    read = {storage_of(traced.model.get_parameter(name)) for name in seen & _names(traced.model)}
    # An export is slow, so it only runs if the model multiplies with a weight that no graph reads.
    if unread <= read:
        return "the regions see every weight"
    count = watch_reference(model, example_inputs)
    if all(not names.isdisjoint(seen) for names in (*count.direct, *count.computed)):
        return "the regions see every weight"
    return None


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _not_symbolic(capture: Capture) -> str | None:
    """Return the first reason why a module has no graph, or None if every module of user code has a graph."""
    if "" in capture.opaque:
        return f"{type(capture.model).__name__}: {capture.opaque['']}"
    for fqn, reason in capture.opaque.items():
        if not is_built_in(capture.model.get_submodule(fqn)):
            return f"{fqn}: {reason}"
    return None
