"""From an exported program to an ONNX graph that is fit to ship."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fx.errors import ExportError
from lora_fx.export.arguments import FlatModel
from lora_fx.export.grouped import expand_grouped
from lora_fx.export.names import name_axes, name_values, strip_build_traces, weight_aliases
from lora_fx.export.overridable import make_overridable
from lora_fx.export.prepare import Prepared
from lora_fx.export.repair import repaired
from lora_fx.export.trace import Trace
from lora_fx.export.translations import translation_table

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ConversionError", "convert", "torch_export_context"]

_RANDOM_OPS = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


class ConversionError(ExportError):
    """An exported program that becomes no file which ONNX Runtime runs: another one may."""


def convert(trace: Trace, prepared: Prepared, opset: int) -> ir.Model:
    """Translate ``trace`` and give everything in the result its proper name.

    Args:
        trace: What ``trace()`` made of the model.
        prepared: The model, for the FQNs of its weights and the names of its outputs.
        opset: ONNX opset to write.

    Raises:
        ExportError: torch.onnx has no translation for something, or the graph is random.
    """
    twin, outputs = prepared.model.model, prepared.outputs
    manifest = prepared.manifest
    program = _translate(trace, len(outputs), opset)
    _refuse_randomness(program, type(twin).__name__)
    _repair_folded_dtypes(program)
    prefix = FlatModel.PREFIX
    name_values(program, trace.input_names, outputs, weight_aliases(twin), prefix)
    expand_grouped(program)
    name_axes(program, trace.labels(), {**trace.symbols, **trace.extra_symbols})
    strip_build_traces(program, prefix)
    _stamp(program, trace, prepared.dtype, opset)
    program.metadata_props.update(prepared.metadata)
    if manifest is not None:
        make_overridable(program, manifest)
    return program


@contextmanager
def torch_export_context() -> Iterator[None]:
    """What ``trace`` and ``convert`` both have to run in."""
    # MATH: the attention of the other backends has strides that are gone once it is decomposed,
    # after which torch refuses views that it recorded itself (T5). The ONNX nodes are the same.
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.MATH]):
        # torch's own use of its own deprecated names, on every export.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|onnxscript")
        yield


def _translate(trace: Trace, outputs: int, opset: int) -> ir.Model:
    # Neutral names on the way: an output named like a parameter would give an invalid model.
    count = len(trace.input_names)
    try:
        with torch_export_context():
            program = torch.onnx.export(
                repaired(trace.program),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=[f"__lora_fx_input_{index}" for index in range(count)],
                output_names=[f"__lora_fx_output_{index}" for index in range(outputs)],
                custom_translation_table=translation_table(trace.program),
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConversionError(f"torch.onnx cannot convert the model: {cause}") from error
    assert program is not None
    return program.model


def _repair_folded_dtypes(model: ir.Model) -> None:
    # onnxscript folds batch norm into a bf16 layer with numpy, which leaves the weights in fp32.
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or node.inputs[0] is None:
            continue
        wanted = node.inputs[0].dtype
        for value in node.inputs[1:]:
            if value is None or value.const_value is None or wanted is None:
                continue
            if value.const_value.dtype != wanted:
                array = value.const_value.numpy().astype(wanted.numpy())
                value.const_value = ir.tensor(array, dtype=wanted, name=value.name)
                value.type = ir.TensorType(wanted)


def _refuse_randomness(model: ir.Model, owner: str) -> None:
    for node in model.graph.all_nodes():
        if node.op_type not in _RANDOM_OPS:
            continue
        scope = node.metadata_props.get("pkg.torch.onnx.name_scopes", owner)
        raise ExportError(
            f"the model is random in eval mode: {node.op_type} in {scope}. Was its graph captured "
            f"in train mode, or does it call F.dropout without training=self.training?"
        )


def _stamp(model: ir.Model, trace: Trace, dtype: str, opset: int) -> None:
    version = importlib.metadata.version("lora-fx")
    model.producer_name = "lora-fx"
    model.producer_version = version
    model.metadata_props.update(
        {
            "lora_fx.version": version,
            "lora_fx.opset": str(opset),
            "lora_fx.dtype": dtype,
            "lora_fx.dynamic_axes": json.dumps(trace.dynamic_axes()),
        }
    )
