"""Operations of an exported program that torch.onnx translates in another form only."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

__all__ = ["repaired"]


def repaired(program: ExportedProgram) -> ExportedProgram:
    """Write what has no translation as something that has one and is the same.

    Args:
        program: As ``torch.export`` made it; its graph is changed in place.

    Returns:
        The program.
    """
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op == "call_function"
            and node.target is torch.ops.aten.unsqueeze.default
            and isinstance(value, torch.Tensor)
            and value.is_complex()
        ):
            # Rotary embeddings with complex numbers (Llama 4, DeepSeek-V2).
            tensor, axis = node.args
            node.target, node.args = torch.ops.aten.stack.default, ([tensor], axis)
    program.graph_module.recompile()
    return program
