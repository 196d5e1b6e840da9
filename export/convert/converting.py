"""From an exported program to an ONNX graph that is fit to ship."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram, _trace
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fx.errors import ExportError
from lora_fx.export.adapters import MANIFEST_KEY, Manifest
from lora_fx.export.convert.names import name_axes, name_values, strip_build_traces, weight_aliases
from lora_fx.export.convert.translations import expand_grouped, expand_quantized, translation_table
from lora_fx.export.copy import stored_formats
from lora_fx.export.ort import AXIS_LIMITS_KEY, INNER_SIZES_KEY, inner_sizes
from lora_fx.export.prepare import Prepared
from lora_fx.export.trace import (
    FlatModel,
    Place,
    Trace,
    headline,
    inner_module,
    place_of,
    user_line,
)

if TYPE_CHECKING:
    import onnx_ir as ir


__all__ = [
    "ConversionError",
    "convert",
    "make_overridable",
    "refuse_randomness",
    "refuse_train_mode",
    "repaired",
    "torch_export_context",
    "without_chatter",
]


# The first warns of empty lists that torchlib itself writes, the last that it has no advice on a branch
# on values.
_LOGGERS = ("onnx_ir._convenience", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """No whole graphs and no warnings that nobody can do anything about, inside the block."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # It prints the graph so far, once for each of its wrappers. The name is that module's alone, and
    # exports run one at a time.
    vars(_trace)["print"] = _nothing
    try:
        yield
    finally:
        vars(_trace).pop("print", None)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _nothing(*_: object, **__: object) -> None:
    """In the place of ``print``."""


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


def make_overridable(model: ir.Model, manifest: Manifest) -> None:
    """Give every adapter input a default, so that the file alone is the base model.

    The default is zeros of rank 1 (a gain of 1), see :attr:`SiteInputs.least_rank`: a product with them is
    zero and costs next to nothing. Only these inputs are initializers: what is both is no constant to an
    optimizer, and the weights have to stay that.

    Args:
        model: Changed in place. Its inputs have the names of the manifest.
        manifest: The adapter inputs.
    """
    import onnx_ir as ir

    inputs = {value.name: value for value in model.graph.inputs}
    for site in manifest.sites:
        for one in site.inputs():
            value = inputs[one.name]
            dtype = value.dtype
            assert dtype is not None
            neutral = np.full(one.sized(site.least_rank), one.neutral, dtype.numpy())
            value.const_value = ir.tensor(neutral, dtype=dtype, name=one.name)
            model.graph.register_initializer(value)
            _feed_as_stored(value)
    model.metadata_props[MANIFEST_KEY] = manifest.to_json()


def _feed_as_stored(value: ir.Value) -> None:
    """Let a Gemm read a factor as it is given, where it read the transpose of its transpose."""
    for node, _ in list(value.uses()):
        if node.op_type != "Transpose" or list(node.attributes.get_ints("perm", (1, 0))) != [1, 0]:
            continue
        for gemm, place in list(node.outputs[0].uses()):
            if gemm.op_type == "Gemm" and place < 2:
                flag = ("transA", "transB")[place]
                gemm.attributes.add(_flag(flag, 1 - gemm.attributes.get_int(flag, 0)))
                gemm.replace_input_with(place, value)
        if not list(node.outputs[0].uses()) and not node.outputs[0].is_graph_output():
            node.graph.remove(node, safe=True)


def _flag(name: str, value: int) -> ir.Attr:
    import onnx_ir as ir

    return ir.AttrInt64(name, value)


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
        model.metadata_props["lora_fx.quantized"] = described
