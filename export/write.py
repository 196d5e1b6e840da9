"""Writing a converted graph and its weights into a staging folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_fx.export.placement import Staging, write_errors

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["EXTERNAL_DATA_BYTES", "write"]

# Bytes of weights from which they go into a file of their own: a model file ends at 2 GB.
EXTERNAL_DATA_BYTES = 1536 * 1024**2


def write(model: ir.Model, stage: Staging, limit: int = EXTERNAL_DATA_BYTES) -> tuple[int, bool]:
    """Write the files of a model.

    Args:
        model: The graph with its weights.
        stage: Where to.
        limit: Bytes of weights from which they go into a file of their own.

    Returns:
        Bytes of all files together, and whether there is one for the weights.

    Raises:
        ExportError: The disk is full or cannot be written to.
    """
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = size > limit
    with write_errors(stage.target, size):
        ir.save(model, stage.model, external_data=stage.data.name if external else None)
        files = [file for file in (stage.model, stage.data) if file.exists()]
        return sum(file.stat().st_size for file in files), stage.data in files
