"""Writing a converted graph and its weights into a staging folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_fx.errors import ExportError
from lora_fx.export.placement import Staging, write_errors

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["EXTERNAL_DATA_BYTES", "SHARD_BYTES", "write"]

# Bytes of weights from which they go into a file of their own. A model file with weights inside is
# put together in memory, twice over; weights beside it are written one by one.
EXTERNAL_DATA_BYTES = 256 * 1024**2

# Bytes of one file of weights: what every file system and download takes.
SHARD_BYTES = 4_000_000_000

_PROTO_BYTES = 2**31 - 1  # what a protobuf message can hold
_PAGE = 65536  # of every system: weights on page boundaries can be mapped into memory


def write(
    model: ir.Model,
    stage: Staging,
    limit: int = EXTERNAL_DATA_BYTES,
    shard: int = SHARD_BYTES,
) -> dict[str, int]:
    """Write the files of a model.

    Weights in files of their own are written one after the other: beside the weights themselves,
    which are the model's, no more than one of them is in memory.

    Args:
        model: The graph with its weights.
        stage: Where to.
        limit: Bytes of weights from which they go into files of their own.
        shard: Bytes of one such file. A weight that is larger has a file for itself.

    Returns:
        Name to bytes of every file, the model first.

    Raises:
        ExportError: The disk is full or cannot be written to, or the weights fit in no model file
            and ``limit`` asks for that.
    """
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = size > limit
    if not external and size >= _PROTO_BYTES:
        raise ExportError(
            f"{size / 1e9:.1f} GB of weights do not fit into the model file, which ends at 2 GB: "
            f"give a smaller external_data_bytes"
        )
    with write_errors(stage.target, size):
        if external:
            ir.save(
                model,
                stage.model,
                external_data=stage.data.name,
                max_shard_size_bytes=shard,
                alignment=_PAGE,
            )
        else:
            ir.save(model, stage.model)
        return {file.name: file.stat().st_size for file in stage.written()}
