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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram, _trace
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fx.errors import ExportError
from lora_fx.export.adapter_bank import make_bank_overridable
from lora_fx.export.adapter_manifest import MANIFEST_KEY, Manifest
from lora_fx.export.arguments import FlatModel
from lora_fx.export.copy import stored_formats
from lora_fx.export.failures import SourceLocation, headline, inner_module, place_of, user_line
from lora_fx.export.ort import AXIS_LIMITS_KEY, INNER_SIZES_KEY, inner_sizes
from lora_fx.export.prepare import Prepared
from lora_fx.export.trace import Trace
from lora_fx.export.translations import expand_grouped, expand_quantized, translation_table

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ConversionError", "convert", "shield_half_inputs", "torch_export_context"]


# The names in an exported file: those that the user knows, and nothing of the build machine.
#
# torch.onnx calls a weight by its FQN until it folds a transpose into it, and leaves stack traces
# with absolute paths on every node. Here inputs, outputs, weights and axes get the names that a user
# would look for, in that order of precedence, and what is not needed is removed.

_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
_SCOPES = "pkg.torch.onnx.name_scopes"


def _weight_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """FQN of every parameter and buffer to all FQNs of the same tensor, itself among them."""
    names: dict[int, list[str]] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in (*parameters, *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def _name_values(
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


def _name_axes(
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


def _strip_build_traces(model: ir.Model, prefix: str) -> None:
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


# The first warns of empty lists that torchlib itself writes, the last that it has no advice on a branch
# on values.
_LOGGERS = (
    "onnx_ir._convenience",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx._internal.exporter._registration",  # that torchvision is not installed, with each export
)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Silence printed graphs, and warnings that a user cannot act on, inside the block."""
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
    """Replaces ``print``."""


def _repaired(program: ExportedProgram) -> ExportedProgram:
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


def _refuse_train_mode(program: ExportedProgram, prefix: str) -> None:
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


def _refuse_randomness(model: ir.Model, prefix: str) -> None:
    """Refuse a converted graph with random operations.

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
        place = SourceLocation(
            str(node.op_type),
            inner_module(scopes[:-1], prefix),  # the last one is the operation
            user_line(traces.get("pkg.torch.onnx.stack_trace", "")),
        )
        raise ExportError(f"the model is random in eval mode: {place}. {_REMEDY}")


def _argument(node: fx.Node, position: int) -> object:
    return node.args[position] if len(node.args) > position else None


def _make_overridable(model: ir.Model, manifest: Manifest) -> None:
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


def _input_with_rows(trace: Trace) -> str:
    """The name of the first input with a batch, which a bank needs to be of any size.

    Raises:
        ExportError: It is fixed, with the reason why.
    """
    pairs = zip(trace.arguments.names, trace.axes, strict=True)
    name, first = next((name, axes[0]) for name, axes in pairs if axes)
    if first.name is None:
        raise ExportError(
            f"a bank of adapters needs a batch of any size, and it is fixed: {first.reason}. Export with "
            "adapters='inputs', which runs one adapter for the whole batch"
        )
    return name


def _feed_as_stored(value: ir.Value) -> None:
    """Let a Gemm read a factor as it is given, where it read the transpose of its transpose."""
    import onnx_ir as ir

    for node, _ in list(value.uses()):
        if node.op_type != "Transpose" or list(node.attributes.get_ints("perm", (1, 0))) != [1, 0]:
            continue
        for gemm, place in list(node.outputs[0].uses()):
            if gemm.op_type == "Gemm" and place < 2:
                flag = ("transA", "transB")[place]
                turned = 1 - gemm.attributes.get_int(flag, 0)
                gemm.attributes.add(ir.AttrInt64(flag, turned))
                gemm.replace_input_with(place, value)
        if not list(node.outputs[0].uses()) and not node.outputs[0].is_graph_output():
            node.graph.remove(node, safe=True)


def shield_half_inputs(model: ir.Model) -> None:
    """Let every adapter input in fp16 be read through a Reshape to its own shape.

    Where a CPU has no kernel in fp16, ONNX Runtime casts the operator's inputs to fp32. Its versions 1.23 to
    1.28 take a cast initializer for a constant, and end the process at one that is an input as well
    (``FuseFp16InitializerToFp32NodeTransformer``; microsoft/onnxruntime#32143). A Reshape has a kernel in
    fp16 and copies nothing.

    Args:
        model: Changed in place, after all fusions.
    """
    import onnx_ir as ir

    graph = model.graph
    shapes: dict[int, ir.Value] = {}
    for value in graph.inputs:
        if value.dtype != ir.DataType.FLOAT16 or value.const_value is None or value.shape is None:
            continue
        rank = len(value.shape)
        if rank not in shapes:
            same = ir.tensor(np.zeros(rank, np.int64), name=f"lora_fx.same_shape_{rank}")
            shapes[rank] = ir.Value(name=same.name, const_value=same)
            shapes[rank].shape, shapes[rank].dtype = ir.Shape([rank]), ir.DataType.INT64
            graph.register_initializer(shapes[rank])
        held = ir.node("Reshape", [value, shapes[rank]])
        out = held.outputs[0]
        out.name, out.dtype, out.shape = f"{value.name}.held", value.dtype, value.shape
        for user, place in list(value.uses()):
            if user is not held:
                user.replace_input_with(place, out)
        graph.insert_before(graph[0], held)


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
    _refuse_train_mode(trace.program, prefix)
    program = _translate(trace, len(outputs), opset)
    _refuse_randomness(program, prefix)
    _repair_folded_dtypes(program)
    _name_values(program, trace.input_names, outputs, _weight_aliases(twin), prefix)
    expand_grouped(program)
    expand_quantized(program)
    _name_axes(program, trace.labels(), {**trace.symbols, **trace.extra_symbols})
    _strip_build_traces(program, prefix)
    _stamp(program, trace, prepared, opset)
    manifest = prepared.manifest
    if manifest is not None:
        if manifest.bank is None:
            _make_overridable(program, manifest)
        else:
            batched = _input_with_rows(trace)
            make_bank_overridable(program, manifest, prepared.banked(), batched)
        program.metadata_props[MANIFEST_KEY] = manifest.to_json()
    return program


@contextmanager
def torch_export_context() -> Iterator[None]:
    """What ``trace`` and ``convert`` both have to run in."""
    # MATH: the attention of the other backends has strides that are gone once it is decomposed,
    # after which torch refuses views that it recorded itself (T5). The ONNX nodes are the same.
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.MATH]), _without_chatter():
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
                _repaired(trace.program),
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
