"""The names in an exported file: those that the user knows, and nothing of the build machine.

torch.onnx calls a weight by its FQN until it folds a transpose into it, and leaves stack traces
with absolute paths on every node. Here inputs, outputs, weights and axes get the names that a user
would look for, in that order of precedence, and what nobody needs goes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["name_axes", "name_values", "strip_build_traces", "weight_aliases"]

_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
_SCOPES = "pkg.torch.onnx.name_scopes"


def weight_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """FQN of every parameter and buffer to all FQNs of the same tensor, itself among them."""
    names: dict[int, list[str]] = {}
    for named in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in named:
            names.setdefault(id(tensor), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def name_values(
    model: ir.Model,
    inputs: Sequence[str],
    outputs: Sequence[str],
    aliases: Mapping[str, tuple[str, ...]],
    prefix: str,
) -> None:
    """Give inputs and outputs their names and every weight its FQN.

    A weight that is stored transposed has the FQN too; where it is stored both ways (a tied one),
    the other takes another of its names, or the FQN with ``.T``. Where a name is taken by an input
    or output, the weight gets a number behind it.

    Args:
        model: Changed in place.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order; made unique if they are not.
        aliases: What ``weight_aliases`` says of the exported model.
        prefix: What the FQNs in ``model`` have in front.
    """
    from onnx_ir.passes.common import NameFixPass

    graph = model.graph
    wanted = _weight_names(graph, aliases, prefix)
    # Two steps: a name can only be given away once its present owner has let go of it.
    for index, initializer in enumerate(list(graph.initializers.values())):
        wanted.setdefault(initializer, initializer.name or "constant")
        initializer.name = f"__lora_fx_{index}"
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name
    taken = {value.name for value in (*graph.inputs, *graph.outputs)}
    for initializer, name in wanted.items():
        if not initializer.is_graph_output():
            initializer.name = _free(name, taken)
            taken.add(initializer.name)
    NameFixPass()(model)


def name_axes(
    model: ir.Model, shapes: Sequence[Sequence[int | str]], symbols: Mapping[str, str]
) -> None:
    """Write the axes of the inputs and rename torch's symbols in all other shapes.

    Args:
        model: Changed in place.
        shapes: For each input its sizes and axis names.
        symbols: torch's symbol to the name of the axis.
    """
    import onnx_ir as ir

    for value, axes in zip(model.graph.inputs, shapes, strict=True):
        value.shape = ir.Shape(axes)
    known = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b") if symbols else None
    for value in _values(model):
        if value.shape is None or known is None:
            continue
        value.shape = ir.Shape([_renamed(dim, known, symbols) for dim in value.shape])


def strip_build_traces(model: ir.Model, prefix: str) -> None:
    """Remove stack traces, documentation and metadata; keep each node's module scope.

    Args:
        model: Changed in place.
        prefix: What the scopes have in front, removed too.
    """
    model.doc_string = None
    model.metadata_props.clear()
    for graph in _graphs(model):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            scopes = _scopes(node.metadata_props.get(_SCOPES, ""), prefix)
            node.doc_string = None
            node.metadata_props.clear()
            if scopes:
                node.metadata_props[_SCOPES] = repr(scopes)
    for value in _values(model):
        value.doc_string = None
        value.metadata_props.clear()
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
            if value.const_value.doc_string:  # those that are read from a proto cannot be set
                value.const_value.doc_string = None


def _weight_names(
    graph: ir.Graph, aliases: Mapping[str, tuple[str, ...]], prefix: str
) -> dict[ir.Value, str]:
    wanted: dict[ir.Value, str] = {}
    folded: list[tuple[ir.Value, str]] = []
    for initializer in graph.initializers.values():
        own = (initializer.name or "").removeprefix(prefix)
        if own in aliases:
            wanted[initializer] = _first_free(aliases[own], wanted.values()) or own
            continue
        sources = _literal(initializer.metadata_props.get(_FOLDED_FROM, ""))
        if len(sources) == 1 and sources[0].removeprefix(prefix) in aliases:
            folded.append((initializer, sources[0].removeprefix(prefix)))
    for initializer, source in folded:
        names = (source, *aliases[source])
        wanted[initializer] = _first_free(names, wanted.values()) or f"{source}.T"
    return wanted


def _first_free(names: Sequence[str], taken: object) -> str | None:
    used = set(taken)  # type: ignore[call-overload]
    return next((name for name in names if name not in used), None)


def _free(name: str, taken: set[str | None]) -> str:
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _literal(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def _scopes(text: str, prefix: str) -> list[str]:
    root = prefix.removesuffix(".")
    scopes = [scope for scope in _literal(text) if scope]
    return ["" if scope == root else scope.removeprefix(prefix) for scope in scopes]


def _renamed(
    dim: int | ir.SymbolicDim, known: re.Pattern[str], symbols: Mapping[str, str]
) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return known.sub(lambda found: symbols[found[0]], dim.value) if dim.value else None


def _graphs(model: ir.Model) -> list[Any]:
    return [model.graph, *model.functions.values()]


def _values(model: ir.Model) -> list[ir.Value]:
    values: dict[ir.Value, None] = {}
    for graph in _graphs(model):
        values.update(dict.fromkeys(graph.inputs))
        values.update(dict.fromkeys(graph.outputs))
        values.update(dict.fromkeys(getattr(graph, "initializers", {}).values()))
        for node in graph.all_nodes():
            values.update(dict.fromkeys(node.outputs))
    return list(values)
