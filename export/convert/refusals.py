"""Graphs that are not fit to ship: captured in train mode, or random."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import torch
from torch import fx
from torch.export import ExportedProgram

from lora_fx.errors import ExportError
from lora_fx.export.trace.source import Place, inner_module, place_of, user_line

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["refuse_randomness", "refuse_train_mode"]

_ATEN = torch.ops.aten
_DROPOUTS = (
    _ATEN.dropout.default,
    _ATEN.feature_dropout.default,
    _ATEN.alpha_dropout.default,
    _ATEN.feature_alpha_dropout.default,
)
_RANDOM_OPS = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
_REMEDY = (
    "Was its graph captured in train mode, or does it call F.dropout without "
    "training=self.training? Capture it in eval mode, or export the module that it was made from"
)


def refuse_train_mode(program: ExportedProgram, prefix: str) -> None:
    """Refuse a program with operations that train although the model is in eval mode.

    Args:
        program: What the model was traced to.
        prefix: What the FQNs of its modules have in front.

    Raises:
        ExportError: With the operation, its module and its line.
    """
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _DROPOUTS and _argument(node, 2) is True and _argument(node, 1) != 0.0:
            place = place_of(node, prefix)
            raise ExportError(f"the model is random in eval mode: Dropout: {place}. {_REMEDY}")
        # One without running statistics takes those of the batch in either mode.
        if (
            node.target is _ATEN.batch_norm.default
            and _argument(node, 5) is True
            and _argument(node, 3) is not None
        ):
            place = place_of(node, prefix)
            raise ExportError(f"the model trains its batch norm in eval mode: {place}. {_REMEDY}")


def refuse_randomness(model: ir.Model, prefix: str) -> None:
    """Refuse a converted graph with random operations, whatever they are made of.

    Args:
        model: The graph, with the traces that torch.onnx leaves on its nodes.
        prefix: What the FQNs of its modules have in front.

    Raises:
        ExportError: With the operation, its module and its line.
    """
    for node in model.graph.all_nodes():
        if node.op_type not in _RANDOM_OPS:
            continue
        traces = node.metadata_props
        scopes = ast.literal_eval(traces.get("pkg.torch.onnx.name_scopes", "[]"))
        place = Place(
            str(node.op_type),
            inner_module(scopes[:-1], prefix),  # the last one is the operation
            user_line(traces.get("pkg.torch.onnx.stack_trace", "")),
        )
        raise ExportError(f"the model is random in eval mode: {place}. {_REMEDY}")


def _argument(node: fx.Node, position: int) -> object:
    return node.args[position] if len(node.args) > position else None
