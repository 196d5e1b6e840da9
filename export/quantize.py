"""Quantization of a finished graph by ONNX Runtime's own tools, which leave the adapters alone."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from lora_fx.adapters import quantized_parameters
from lora_fx.errors import ExportError
from lora_fx.export.providers import import_onnxruntime
from lora_fx.export.report import StoredFormat
from lora_fx.extras import load_optional

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "QUANTIZED_TOLERANCES",
    "QuantizedScheme",
    "check_dense",
    "check_scheme",
    "quantized_graph",
]

QuantizedScheme: TypeAlias = Literal["int4", "int8"]

QUANTIZED_TOLERANCES: dict[str, float] = {"int4": 0.5, "int8": 0.1}
"""Largest difference of an output from the dense model, relative to its largest magnitude."""

_BLOCK = 32
_FP32_PRODUCTS = 1  # accuracy_level of MatMulNBits: no activation is rounded to 8 bits
_PROTO_BYTES = 2**31 - 1


def check_scheme(scheme: object, optimize: str) -> None:
    """Raise for an unknown scheme, or for a level of fusion that hides the weights from the tools.

    Raises:
        ExportError: The message names the argument and the remedy.
    """
    if scheme not in (None, *QUANTIZED_TOLERANCES):
        raise ExportError(f"quantize={scheme!r} is unknown: give 'int4', 'int8' or None")
    if scheme is not None and optimize == "runtime":
        raise ExportError(
            f"quantize={scheme!r}: operators of optimize='runtime' hold weights, and the factors of adapters "
            "next to them, where the tool does not find them. Leave optimize out"
        )


def check_dense(model: nn.Module, scheme: str, dtype: str | None) -> None:
    """Raise unless ONNX Runtime's tools can quantize a model: it is dense, and of a supported dtype.

    Raises:
        ExportError: The message names the argument and the remedy.
    """
    if quantized_parameters(model):
        raise ExportError(
            f"quantize={scheme!r}: weights of the model are quantized already. Leave it out, and the file "
            "keeps their format"
        )
    widths = {parameter.dtype for parameter in model.parameters()}
    half = dtype in ("fp16", "bf16") or (dtype is None and torch.float32 not in widths)
    if (scheme == "int8" and half) or dtype == "bf16":
        raise ExportError(
            f"quantize={scheme!r}: ONNX Runtime has no kernels for it in half precision. Give dtype='fp32'"
        )


def quantized_graph(
    model: ir.Model, scheme: QuantizedScheme, exclude: Collection[str]
) -> tuple[ir.Model, StoredFormat]:
    """Return a copy of a graph with quantized products, and the format of its weights.

    The constant matrix of each ``MatMul`` and ``Gemm`` is quantized: with "int4" in blocks of 32 along the
    inputs, symmetric, for ``MatMulNBits``; with "int8" per output channel, for ``MatMulInteger``, which also
    rounds the activations to 8 bits in each run. Embeddings and convolutions stay as they are.

    Args:
        model: The graph in fp32; for "int4" in fp16, too. It is not changed.
        scheme: The format.
        exclude: Names of the nodes that are left alone.

    Raises:
        ExportError: There is nothing to quantize, the weights exceed 2 GB, or ONNX Runtime's tool fails.
    """
    import onnx_ir as ir

    import_onnxruntime()
    load_optional("onnxruntime.quantization", "quantize=", "lora-fx[onnx]", error=ExportError)
    from onnxruntime.quantization.onnx_model import ONNXModel

    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if size >= _PROTO_BYTES:
        raise ExportError(
            f"quantize={scheme!r}: {size / 1e9:.1f} GB of weights are more than ONNX Runtime's tools take at "
            "once, which is 2 GB. Quantize the model in PyTorch (lora_fx.quantize) before the rewrite"
        )
    proto = ir.to_proto(model)
    whole = ONNXModel(proto)
    with _quiet():
        try:
            whole.replace_gemm_with_matmul()
            products = whole.model.graph.node
            before = {node.output[0] for node in products if node.op_type == "MatMul"}
            done = _TOOLS[scheme](whole.model, sorted(exclude))
        except Exception as error:
            raise ExportError(
                f"quantize={scheme!r}: ONNX Runtime's tool fails: {error}. Quantize the model in PyTorch "
                "(lora_fx.quantize) before the rewrite"
            ) from error
    quantized = ir.from_proto(done)
    form = _stored(quantized, scheme)
    if form.weights == 0:
        raise ExportError(
            f"quantize={scheme!r}: none of the {len(before)} products has a constant matrix: leave it out"
        )
    return quantized, form


def _int4(proto: Any, exclude: list[str]) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    tool = MatMulNBitsQuantizer(
        proto,
        block_size=_BLOCK,
        is_symmetric=True,
        accuracy_level=_FP32_PRODUCTS,
        nodes_to_exclude=exclude,
    )
    tool.process()
    return tool.model.model


def _int8(proto: Any, exclude: list[str]) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="lora_fx_") as folder:
        out = Path(folder) / "quantized.onnx"
        quantize_dynamic(
            proto,
            out,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,  # CPUs without VNNI add pairs of 8-bit products in 16 bits
            weight_type=QuantType.QInt8,
            nodes_to_exclude=exclude,
        )
        return onnx.load(str(out))


_TOOLS = {"int4": _int4, "int8": _int8}
_OPERATORS = {"int4": "MatMulNBits", "int8": "MatMulInteger"}


def _stored(model: ir.Model, scheme: QuantizedScheme) -> StoredFormat:
    """Return the entry of the report about the quantized matrices of a graph: their number and sizes."""
    operator = _OPERATORS[scheme]
    matrices: dict[str, tuple[int, int]] = {}
    for node in model.graph.all_nodes():
        if node.op_type != operator:
            continue
        constants = [value for value in node.inputs[1:] if value is not None and value.const_value]
        name = str(node.inputs[1].name)
        if scheme == "int4":
            values = node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
        else:
            values = math.prod(node.inputs[1].shape.numpy())
        matrices[name] = values, sum(value.const_value.nbytes for value in constants)
    values, size = (
        (sum(part) for part in zip(*matrices.values(), strict=True)) if matrices else (0, 0)
    )
    for name, value in model.graph.initializers.items():
        # The scale of a MatMulInteger is an input of a later Mul.
        if scheme == "int8" and name.endswith("_scale") and value.const_value is not None:
            size += value.const_value.nbytes
    block = _BLOCK if scheme == "int4" else None
    return StoredFormat(scheme, operator, block, len(matrices), values, size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tools inside the block. They log every node, and change the root logger on import."""
    root = logging.getLogger()
    disabled, level, handlers = logging.root.manager.disable, root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
