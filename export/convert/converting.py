"""From an exported program to an ONNX graph that is fit to ship."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fx.errors import ExportError
from lora_fx.export.convert.grouped import expand_grouped
from lora_fx.export.convert.names import name_axes, name_values, strip_build_traces, weight_aliases
from lora_fx.export.convert.overridable import make_overridable
from lora_fx.export.convert.quantized_nodes import expand_quantized
from lora_fx.export.convert.quiet import without_chatter
from lora_fx.export.convert.refusals import refuse_randomness, refuse_train_mode
from lora_fx.export.convert.repair import repaired
from lora_fx.export.convert.translations import translation_table
from lora_fx.export.copy.packed_weight import stored_formats
from lora_fx.export.ort.calls import AXIS_LIMITS_KEY
from lora_fx.export.ort.empty_axes import INNER_SIZES_KEY, inner_sizes
from lora_fx.export.prepare.preparing import Prepared
from lora_fx.export.trace.arguments import FlatModel
from lora_fx.export.trace.failures import headline
from lora_fx.export.trace.source import place_of
from lora_fx.export.trace.tracing import Trace

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ConversionError", "convert", "torch_export_context"]

_FAILED_NODE = re.compile(r"Error when translating node %(?P<name>\w+)")


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
    prefix = FlatModel.PREFIX
    refuse_train_mode(trace.program, prefix)
    program = _translate(trace, len(outputs), opset)
    refuse_randomness(program, prefix)
    _repair_folded_dtypes(program)
    name_values(program, trace.input_names, outputs, weight_aliases(twin), prefix)
    expand_grouped(program)
    expand_quantized(program)
    name_axes(program, trace.labels(), {**trace.symbols, **trace.extra_symbols})
    strip_build_traces(program, prefix)
    _stamp(program, trace, prepared, opset)
    if prepared.manifest is not None:
        make_overridable(program, prepared.manifest)
    return program


@contextmanager
def torch_export_context() -> Iterator[None]:
    """What ``trace`` and ``convert`` both have to run in."""
    # MATH: the attention of the other backends has strides that are gone once it is decomposed,
    # after which torch refuses views that it recorded itself (T5). The ONNX nodes are the same.
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.MATH]), without_chatter():
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
        raise ConversionError(_failure(trace, error)) from error
    assert program is not None
    return program.model


def _failure(trace: Trace, error: Exception) -> str:
    """What torch.onnx says, with the operation, the module and the line that it says it of."""
    chain = [error]
    while isinstance(chain[-1].__cause__, Exception):
        chain.append(chain[-1].__cause__)
    found = (_FAILED_NODE.search(str(one)) for one in chain)
    node = next((_decomposed(trace, one["name"]) for one in found if one is not None), None)
    what = "the model" if node is None else str(place_of(node, FlatModel.PREFIX))
    return (
        f"torch.onnx cannot convert {what}: {headline(chain[-1])}. Compute it with other operations, "
        f"or leave it out of what is exported"
    )


def _decomposed(trace: Trace, name: str) -> fx.Node | None:
    # torch.onnx names a node of what it made of the program, which it does not give out.
    for program in (trace.program, trace.program.run_decompositions()):
        found: list[fx.Node] = [node for node in program.graph.nodes if node.name == name]
        if found:
            return found[0]
    return None


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


def _stamp(model: ir.Model, trace: Trace, prepared: Prepared, opset: int) -> None:
    version = importlib.metadata.version("lora-fx")
    model.producer_name = "lora-fx"
    model.producer_version = version
    model.metadata_props.update(
        {
            "lora_fx.version": version,
            "lora_fx.opset": str(opset),
            "lora_fx.dtype": prepared.dtype,
            "lora_fx.dynamic_axes": json.dumps(trace.dynamic_axes()),
            AXIS_LIMITS_KEY: json.dumps(trace.axis_limits()),
            INNER_SIZES_KEY: json.dumps(inner_sizes(model)),
            **prepared.origin,
            **prepared.metadata,
        }
    )
    forms = stored_formats(prepared.model.model, model.graph.initializers)
    if forms:
        described = json.dumps([dataclasses.asdict(form) for form in forms])
        model.metadata_props["lora_fx.formats.weights"] = described
