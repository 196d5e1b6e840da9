"""Captures the whole model with ``torch.export``: one graph of ATen operations for the root.

It sees operations that no symbolic trace reaches, in code that branches on shapes or takes ``**kwargs``.
It holds for calls that look like the example inputs; the guard sends any other call to the model's own
forward, over the regions below, which share their adapters with it. So ``generate()``, gradient
checkpointing and other signatures go on working.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from lora_fx import torch_private
from lora_fx.errors import CaptureError
from lora_fx.ir import Capture, Region
from lora_fx.passes.capture.export_questions import (
    OF_GRAD_MODE,
    Questions,
    layout_conditions,
    shape_conditions,
)
from lora_fx.passes.capture.export_reads import NamedReads, ObjectReads, replaced_forwards
from lora_fx.passes.capture.state import State, difference, state_of
from lora_fx.passes.capture.synthesis import CACHE, named_inputs
from lora_fx.passes.graph import (
    CONSTANT,
    MATH,
    NEEDS_MODULES,
    WANTS_CACHE,
    Condition,
    Flag,
    GuardedCodeGen,
    Parameter,
    Path,
    Read,
    arguments,
    install,
    parameters_of,
    storage_of,
    uninstall,
)
from lora_fx.runtime import ops
from lora_fx.torch_private import pytree

__all__ = ["MODULE_STACK", "ONE_AT_A_TIME", "export_root"]

MODULE_STACK = "nn_module_stack"
"""The key of ``node.meta`` with the FQNs of the modules that a node comes from, the outermost first."""


# Settings of a transformers model that change what it returns; its forward reads them at each call.
_OUTPUT_SETTINGS = (
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
)


def _call_parameters(model: nn.Module, inputs: dict[str, Any]) -> tuple[Parameter, ...]:
    """The parameters of ``forward``: tensors are inputs of the graph, the rest is fixed.

    Args:
        model: The model.
        inputs: The call, from :func:`named_inputs`.

    Returns:
        The signature's parameters, and after them those that ``**kwargs`` takes.
    """
    fixed = {}
    signature = inspect.signature(model.forward).parameters
    for name, p in signature.items():
        if not isinstance(inputs.get(name), torch.Tensor):
            fixed[name] = inputs.get(name, None if p.default is p.empty else p.default)
    parameters = parameters_of(type(model).forward, fixed)
    if CACHE in signature and inputs.get(CACHE) is False and hasattr(model, "config"):
        # A caller that says nothing wants what the model's configuration says.
        needs = Flag(
            f"{WANTS_CACHE}(self, {CACHE})",
            note="the call, or the model's config, asks for a cache, which a graph does not return: pass "
            "use_cache=False",
        )
        parameters = tuple(
            dataclasses.replace(p, needs=needs) if p.name == CACHE else p for p in parameters
        )
    return parameters + tuple(_extras(parameters, inputs))


def _extras(parameters: tuple[Parameter, ...], inputs: dict[str, Any]) -> Iterator[Parameter]:
    named = {p.name for p in parameters if not p.variadic}
    keywords = next((p.name for p in parameters if p.variadic), "")
    for name, value in inputs.items():
        if name not in named:
            traced = isinstance(value, torch.Tensor)
            kind = int(inspect.Parameter.KEYWORD_ONLY)
            yield Parameter(name, kind, traced, None if traced else value, within=keywords)


def _cache_condition(value: Any) -> Iterator[Condition]:
    """The configuration says the same about a cache, in evaluation.

    In training it may say anything, as in :func:`lora_fx.runtime.ops.wants_cache`: trainers switch it off.

    Args:
        value: What ``config.use_cache`` was where the capture has read it.
    """
    if isinstance(value, bool):
        here = f"self.config.{CACHE}"
        yield Condition(here, "is", f"({here} if self.training else {value})")


def export_root(capture: Capture, example_inputs: Any, dynamic_shapes: Any = None) -> Capture:
    """Puts a graph of the whole model on the root of a capture.

    Args:
        capture: The model with its regions.
        example_inputs: A tuple (args), a dict (kwargs) or a tensor.
        dynamic_shapes: As ``torch.export.export`` takes it, by name; by default every dimension of
            every tensor may vary.

    Raises:
        CaptureError: If the model cannot be exported, with the reason.
    """
    model = capture.model
    inputs = named_inputs(model, example_inputs)
    # Attention is exported as the regions have it, so that both show the same operations.
    written = [r for r in capture.regions.values() if r.written_out]
    install(written)
    names = NamedReads(model)
    tensors = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]
    try:
        for prepared in _prepared(inputs):
            program, noted, asked = _exported(model, prepared, dynamic_shapes, names)
            notes, questions = [noted], [asked]
            if asked.grad_mode:
                noted, asked = _exported_otherwise(program, model, prepared, dynamic_shapes, names)
                notes.append(noted)
                questions.append(asked)
            module = _module_of(program, model)
            conditions = list(shape_conditions(program, module.graph, tensors))
            if _are_met(conditions, inputs):
                break
    finally:
        for region in written:
            uninstall(region.module)
    _check_globals(model, names)
    graph = _graph_of(program, module, model, inputs)
    device = torch.device("cpu")
    dtypes: tuple[Read, ...] = ()
    named = dict(model.named_parameters())
    found = (n for n in graph.nodes if n.op == "get_attr" and n.target in named)
    reference = next(found, None)
    if reference is not None:
        tensor = named[str(reference.target)]
        device = tensor.device
        _unbake_devices(graph, reference, device)
        weight = Path.to(str(reference.target)).attribute("dtype")
        dtypes = (Read(weight, "identity", tensor.dtype),)
    for one in questions:
        one.forget("is_autocast_enabled", device.type)
    conditions += _call_conditions(model, device)
    conditions.extend(dict.fromkeys(c for one in questions for c in one.conditions))
    if any(one.layout for one in questions):
        conditions.extend(layout_conditions(inputs))
    cached = [one.forget(getattr(model, "config", None), CACHE) for one in notes]
    conditions.extend(_cache_condition(cached[0]))
    _keep_module_stacks(graph, model)
    answers = dict.fromkeys(read for one in questions for read in one.reads)
    later = NamedReads(model, {cls for one in notes for cls in one.classes})
    # The modules first: a weight is where it was in the same modules alone.
    inside = (read for one in notes for read in one.reads)
    reads = (*later.reads.values(), *answers, *inside, *dtypes)
    parameters = _call_parameters(model, inputs)
    graph.set_codegen(GuardedCodeGen(parameters, conditions=tuple(conditions), reads=reads))
    graph.lint()
    below = {key: region for key, region in capture.regions.items() if region.fqn}
    # What stands in for it is the forward of the model, as for a graph that was traced.
    safe = all(region.fallback for region in capture.regions.values() if not region.fqn)
    regions = {"": Region("", model, graph, safe, overlay=True), **below}
    # The modules that do not trace stay listed: calls that go past the graph go through them.
    return dataclasses.replace(capture, regions=regions, frontend="export")


def _graph_of(
    program: ExportedProgram, module: fx.GraphModule, model: nn.Module, inputs: dict[str, Any]
) -> fx.Graph:
    """The graph of an exported program, with the names of the model and of its arguments.

    Args:
        program: The program.
        module: What the program gives as a module.
        model: The model, which gets the constants of the program.
        inputs: The call, by name.

    Raises:
        CaptureError: If something in it has no place on the model, or in a graph.
    """
    graph = fx.Graph()
    result: Any = graph.graph_copy(module.graph, {})
    _drop_copies_onto_itself(graph)
    _name_constants(graph, module, model)
    _name_shared(graph, model)
    graph.output(_container(graph, pytree.tree_unflatten(list(result), program.call_spec.out_spec)))
    _name_placeholders(graph, inputs)
    _unbake_modes(graph, model)
    _convert_masks(graph)
    return graph


def _call_conditions(model: nn.Module, device: torch.device) -> list[Condition]:
    """What has to be so around a call, and in the model, for its graph to do what the modules would."""
    # Under autocast the code chooses dtypes that the graph has as literals.
    autocast = Flag(
        f"torch.is_autocast_enabled({device.type!r})",
        note="the call is made under autocast, and the graph has the dtypes of one without",
    )
    hooks = Flag(
        f"{NEEDS_MODULES}(self, {len(replaced_forwards(model))})",
        note="a module inside has a hook or another forward, or checkpoints its activations, and the graph "
        "calls no modules: remove the hook, or switch checkpointing off",
    )
    # The configuration asks for the outputs that it asked for at the capture.
    config = getattr(model, "config", None)
    outputs = [
        Condition(f"self.config.{name}", "is", repr(value))
        for name in _OUTPUT_SETTINGS
        if isinstance(value := getattr(config, name, None), bool)
    ]
    return [autocast, hooks, *outputs]


def _keep_module_stacks(graph: fx.Graph, model: nn.Module) -> None:
    """Drops what ``torch.export`` says of a node but the modules that it comes from, which pictures show."""
    known = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    for node in graph.nodes:
        stack = node.meta.get(MODULE_STACK)
        node.meta.clear()
        if stack:
            node.meta[MODULE_STACK] = tuple(
                dict.fromkeys(fqn for fqn, _ in stack.values() if fqn in known)
            )


def _check_globals(model: nn.Module, before: NamedReads) -> None:
    """Refuses a forward that has written to a global, or to an attribute of a class.

    Raises:
        CaptureError: If it has.
    """
    for read in before.reads.values():
        try:
            changed = ops.differs(read.found(model), read.expected)
        except (AttributeError, LookupError):
            changed = True
        if changed and read.kind == "contents":
            raise CaptureError(
                f"its forward changes {read.path}, which a graph would not: frontend='regions' keeps it"
            )


def _prepared(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Tensors of their own: export takes one object passed twice for one input.

    A batch of one is made two first, since an axis of 1 cannot vary. A model that does something else for
    one is exported for that.
    """
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    if tensors and all(v.dim() > 0 and v.shape[0] == 1 for v in tensors.values()):
        yield {k: torch.cat([v, v]) if k in tensors else v for k, v in inputs.items()}
    yield {k: v.detach().clone() if k in tensors else v for k, v in inputs.items()}


def _are_met(conditions: list[Condition], inputs: dict[str, Any]) -> bool:
    """Whether a graph applies to the example itself."""
    known = {**inputs, "torch": torch, MATH: math}
    return not any(eval(one.test, known) for one in conditions)


def _exported(
    model: nn.Module, inputs: dict[str, Any], dynamic_shapes: Any, names: NamedReads
) -> tuple[ExportedProgram, ObjectReads, Questions]:
    if dynamic_shapes is None:
        dynamic_shapes = {
            k: dict.fromkeys(range(v.dim()), Dim.AUTO) if isinstance(v, torch.Tensor) else None
            for k, v in inputs.items()
        }
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        # Otherwise a trace takes every size to be 2 or more, and never says where that matters.
        with (
            ONE_AT_A_TIME,
            torch_private.oblivious_shapes(),
            _watched(model, inputs, names) as (notes, questions),
        ):
            program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes)
        return program, notes, questions
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        hint = (
            "; with use_cache=False in example_inputs, or in the model's config, it returns none"
            if "Cache" in text[0]
            else ""
        )
        raise CaptureError(
            f"torch.export fails on {type(model).__name__}: {text[0]}{hint}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def _module_of(program: ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """The graph of an export with the parameters of the model as attributes."""
    try:
        module: fx.GraphModule = program.module(check_guards=False)
    except Exception as error:
        # A weight in a child that has the name of an attribute of its own: "code".
        raise CaptureError(
            f"torch.export gives a program of {type(model).__name__} that PyTorch makes no module of "
            f"({error}): use frontend='regions'"
        ) from error
    return module


def _exported_otherwise(
    program: ExportedProgram,
    model: nn.Module,
    inputs: dict[str, Any],
    dynamic_shapes: Any,
    names: NamedReads,
) -> tuple[ObjectReads, Questions]:
    """Exports a model that asks for the grad mode in the other one, and wants the same graph.

    Raises:
        CaptureError: If it is another one.
    """
    refusal = CaptureError(f"its forward {OF_GRAD_MODE}: frontend='regions' keeps it")
    if torch.is_inference_mode_enabled():
        raise refusal
    with torch.set_grad_enabled(not torch.is_grad_enabled()):
        other, notes, questions = _exported(model, inputs, dynamic_shapes, names)
    if _told(program) != _told(other):
        raise refusal
    return notes, questions


def _told(program: ExportedProgram) -> tuple[str, ...]:
    """All that a program computes, in words."""
    constants = [
        (name, str(value.tolist()) if isinstance(value, torch.Tensor) else str(value))
        for name, value in sorted(program.constants.items())
    ]
    graphs = [str(one.graph) for one in program.graph_module.modules() if hasattr(one, "graph")]
    return (*graphs, str(program.graph_signature), str(program.range_constraints), str(constants))


@contextlib.contextmanager
def _watched(
    model: nn.Module, inputs: dict[str, Any], names: NamedReads
) -> Iterator[tuple[ObjectReads, Questions]]:
    """Exports a forward that leaves nothing behind and has a name for every argument.

    What it writes into Python objects is part of no capture and is put back.
    Arguments that ``**kwargs`` takes get a place in the signature: torch.export loses them otherwise.

    Raises:
        CaptureError: If it has counted, or kept something: the graph would have the first value for ever. If
            it has asked for what no guard knows.
    """
    before, own = State(model), model.forward
    changed: list[str] = []
    notes, questions = ObjectReads(model, names.objects), Questions()

    def forward(*args: Any, **kwargs: Any) -> Any:
        state = state_of(model)
        with notes.watching(), questions.listening(kwargs):
            result = own(*args, **kwargs)
        # Here, since torch.export puts attributes back by itself.
        name = difference(state, state_of(model))
        if name is not None:
            changed.append(name)
        return result

    signature = inspect.signature(own)
    extra = [name for name in inputs if name not in signature.parameters]
    named = [p for p in signature.parameters.values() if not extra or p.kind is not p.VAR_KEYWORD]
    named += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    forward.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    model.__dict__["forward"] = forward
    try:
        yield notes, questions
    finally:
        before.restore()
    refused = [*questions.refused, *notes.refused]
    if refused:
        raise CaptureError(f"its forward {refused[0]}: frontend='regions' keeps it")
    if changed:
        raise CaptureError(
            f"its forward changes {changed[0]}, which a graph would not: frontend='regions' keeps it"
        )


def _drop_copies_onto_itself(graph: fx.Graph) -> None:
    """Takes out the copy of a buffer that an operation in place has written already.

    Export adds one at the end for every buffer that changes. It changes nothing, but autograd takes it for
    a write behind what it has kept for the backward pass.
    """
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.copy_.default or node.users:
            continue
        target, source = node.args[:2]
        while _writes_into_first(source):
            source = source.args[0]
        if source is target:
            graph.erase_node(node)


def _writes_into_first(value: Any) -> bool:
    if not isinstance(value, fx.Node) or not isinstance(value.target, torch_private.OpOverload):
        return False
    first = torch_private.schema_of(value.target).arguments[0].alias_info
    return (
        first is not None
        and first.is_write
        and torch_private.schema_of(value.target).name.endswith("_")
    )


def _name_constants(graph: fx.Graph, module: fx.GraphModule, model: nn.Module) -> None:
    """Gives tensors that export lifted out of the code a place on the model, where ``.to`` finds them."""
    known = {
        *dict(model.named_parameters(remove_duplicate=False)),
        *dict(model.named_buffers(remove_duplicate=False)),
    }
    moved: dict[str, str] = {}
    memory = {storage_of(p): name for name, p in model.named_parameters()}
    for node in graph.nodes:
        if node.op == "call_module":
            raise CaptureError(f"torch.export calls {node.target}, which lora_fx cannot follow")
        if node.op != "get_attr" or node.target in known:
            continue
        value: Any = module
        for atom in str(node.target).split("."):
            value = getattr(value, atom)
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                "a part of the model runs under another grad or autocast mode, in a graph of its own"
            )
        if (name := memory.get(storage_of(value))) is not None:
            # It would be a constant next to the parameter.
            raise CaptureError(
                f"its code gets to {name} past the model, in which it is a parameter: by a global, or a "
                "function around it"
            )
        if node.target not in moved:
            moved[str(node.target)] = f"{CONSTANT}{len(moved)}"
            model.register_buffer(moved[str(node.target)], value.detach().clone(), persistent=False)
        node.target = moved[str(node.target)]


def _name_shared(graph: fx.Graph, model: nn.Module) -> None:
    """A module under two names goes by the first, as everywhere else."""
    first = {module: name for name, module in model.named_modules()}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        owner, _, key = str(node.target).rpartition(".")
        name = first[model.get_submodule(owner)]
        node.target = f"{name}.{key}" if name else key


def _name_placeholders(graph: fx.Graph, inputs: dict[str, Any]) -> None:
    """Placeholders get the parameters' names; those of fixed arguments go."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = [(name, leaf) for name, value in inputs.items() for leaf in pytree.tree_leaves(value)]
    if len(placeholders) != len(leaves):
        raise CaptureError(
            f"torch.export made {len(placeholders)} inputs out of {len(leaves)} arguments"
        )
    for node, (name, leaf) in zip(placeholders, leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            node.target = name
        else:
            graph.erase_node(node)


def _container(graph: fx.Graph, value: Any) -> Any:
    """An output structure as graph arguments; classes like ``ModelOutput`` become constructor calls."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = (
            value.items()
            if isinstance(value, dict)
            else ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        )
        return graph.call_function(
            type(value), (), {k: _container(graph, v) for k, v in items if v is not None}
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return graph.call_function(type(value), tuple(_container(graph, item) for item in value))
    if type(value) in (list, tuple):
        return type(value)(_container(graph, item) for item in value)
    if type(value) is dict:
        return {key: _container(graph, item) for key, item in value.items()}
    if isinstance(value, fx.Node | int | float | str | bool | None):
        return value
    raise CaptureError(f"an output of type {type(value).__name__} cannot be rebuilt from a graph")


ONE_AT_A_TIME = threading.RLock()
"""Held while ``torch.export`` or the ONNX exporter runs.

Both keep what they are at in global state, and a capture by ``torch.export`` takes notes by way of classes
that other models have as well (:mod:`lora_fx.passes.capture.export_reads`). An export to ONNX may capture in
between, in the same thread.
"""


# --- what a trace has baked in --------------------------------------------------------------------
# Turns what ``torch.export`` bakes into a graph back into what the model does.
#
# Export runs the model once: its mode, its device and its asserts are literals of the graph.
# Dropout and batch norm become operations that read ``training`` of the module that they came from,
# device literals read the device of a parameter, and metadata asserts go.


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def _convert_masks(graph: fx.Graph) -> None:
    """Puts what attention would make of a boolean mask into the graph, where several calls share the mask.

    Args:
        graph: Of ``torch.export``, with the values in its metadata: a mask has the dtype of the queries.
    """
    calls: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        mask, dtype = _mask(node), _dtype(node.args[0])
        if isinstance(mask, fx.Node) and _dtype(mask) is torch.bool and dtype is not None:
            calls.setdefault((mask, dtype), []).append(node)
    for (mask, dtype), nodes in calls.items():
        if len(nodes) < 2:
            continue
        aten = torch.ops.aten
        with graph.inserting_after(mask):
            zeros = graph.call_function(aten.zeros_like.default, (mask,), {"dtype": dtype})
        with graph.inserting_after(zeros):
            hidden = graph.call_function(aten.logical_not.default, (mask,))
        with graph.inserting_after(hidden):
            numbers = graph.call_function(aten.masked_fill.Scalar, (zeros, hidden, -math.inf))
        for node in nodes:
            if "attn_mask" in node.kwargs:
                node.update_kwarg("attn_mask", numbers)
            else:
                node.update_arg(3, numbers)


def _mask(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def _dtype(value: Any) -> torch.dtype | None:
    """The dtype that a value had when it was exported."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found.dtype if isinstance(found, torch.Tensor) else None


def _call_owner(node: fx.Node, model: nn.Module, name: Callable[[fx.Node], str]) -> bool:
    """Puts a call of a module into the place of its operations. Edits the graph.

    Args:
        node: One of the operations, from ``torch.export``, with ``val``.
        model: The model that the module is in.
        name: Tells the module in whose forward a node was recorded.

    Returns:
        Whether that could be done: False leaves the graph as it was.
    """
    owner = name(node)
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return False
    if not owner or any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return False
    required = [
        p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty
    ]
    inside = _call_of(node, lambda one: f"{name(one)}.".startswith(f"{owner}."))
    given = {i for n in inside for i in n.all_input_nodes if i not in inside and _tensor(i)}
    results = [n for n in inside if any(user not in inside for user in n.users)]
    if len(required) != 1 or len(given) != 1 or len(results) != 1:
        return False
    (x,), (result,) = given, results
    if _shape(x) != _shape(result):
        return False
    with node.graph.inserting_before(result):
        call = node.graph.call_module(owner, (x,))
    call.meta.update(result.meta)
    result.replace_all_uses_with(call)
    for one in reversed([n for n in node.graph.nodes if n in inside]):
        node.graph.erase_node(one)
    return True


def _call_of(node: fx.Node, owned: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The tensors that hang together with one: a module that is called twice has two such groups."""
    found, pending = {node}, [node]
    while pending:
        one = pending.pop()
        near = {n for n in (*one.all_input_nodes, *one.users) if n not in found}
        fresh = {n for n in near if n.op == "call_function" and owned(n) and _tensor(n)}
        found |= fresh
        pending.extend(fresh)
    return found


def _tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _shape(node: fx.Node) -> list[Any]:
    sizes = node.meta["val"].shape
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]


_aten = torch.ops.aten
_DROPOUTS: dict[Any, Callable[..., torch.Tensor]] = {
    _aten.dropout.default: F.dropout,
    _aten.dropout_.default: F.dropout,
    _aten.feature_dropout.default: torch.feature_dropout,
    _aten.alpha_dropout.default: F.alpha_dropout,
    _aten.feature_alpha_dropout.default: F.feature_alpha_dropout,
}
_BATCH_NORM = "input weight bias running_mean running_var training momentum eps"
_INSTANCE_NORM = "input weight bias running_mean running_var use_input_stats momentum eps"


def _unbake_modes(graph: fx.Graph, model: nn.Module) -> None:
    """Makes ``train()`` and ``eval()`` mean what they always mean. Edits the graph.

    Args:
        graph: From ``torch.export`` of the model in training mode, with ``nn_module_stack``.
        model: The model; names in the graph are its own.

    Raises:
        CaptureError: If an operation draws random numbers in a way that cannot be tied to a mode.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or torch_private.is_erased(node):
            continue
        if node.target in _DROPOUTS:
            named = arguments(node, "input p train")
            if named["train"]:
                p = _setting(graph, node, model, "p", named["p"])
                args = (named["input"], p, _mode(graph, node, model))
                _replace(graph, node, _DROPOUTS[node.target], args)
        elif node.target is _aten.batch_norm.default:
            named = arguments(node, _BATCH_NORM)
            if named["training"] and named["running_mean"] is not None:
                _replace(graph, node, F.batch_norm, _norm(graph, node, model, named))
        elif node.target is _aten.instance_norm.default:
            named = arguments(node, _INSTANCE_NORM)
            if named["use_input_stats"] and named["running_mean"] is not None:
                _replace(graph, node, F.instance_norm, _norm(graph, node, model, named))
        elif node.target is _aten.scaled_dot_product_attention.default:
            _follow_attention_dropout(graph, node, model)
        elif _counts_batches(node):
            _replace(graph, node, ops.count_batch, (node.args[0], _mode(graph, node, model)))
        elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            _follow_draw(node, model)


def _unbake_devices(graph: fx.Graph, reference: fx.Node, device: torch.device) -> None:
    """Makes literals of the model's device follow ``.to(device)``. Edits the graph.

    Args:
        graph: From ``torch.export``.
        reference: A ``get_attr`` node of one of the model's tensors, before every use.
        device: The device on which the model was captured.
    """
    follows: fx.Node | None = None
    for node in list(graph.nodes):
        if node.target is torch_private.ASSERT_METADATA:
            graph.erase_node(node)
            continue
        literals = [
            a
            for a in (*node.args, *node.kwargs.values())
            if isinstance(a, torch.device) and a == device
        ]
        if not literals:
            continue
        if follows is None:
            with graph.inserting_after(reference):
                follows = graph.call_function(getattr, (reference, "device"))

        def swap(value: Any, new: fx.Node = follows) -> Any:
            return new if isinstance(value, torch.device) and value == device else value

        node.args = tuple(swap(a) for a in node.args)
        node.kwargs = {key: swap(a) for key, a in node.kwargs.items()}


def _norm(
    graph: fx.Graph, node: fx.Node, model: nn.Module, named: dict[str, Any]
) -> tuple[Any, ...]:
    return (
        named["input"],
        named["running_mean"],
        named["running_var"],
        named["weight"],
        named["bias"],
        _mode(graph, node, model),
        _setting(graph, node, model, "momentum", named["momentum"]),
        _setting(graph, node, model, "eps", named["eps"]),
    )


def _follow_attention_dropout(graph: fx.Graph, node: fx.Node, model: nn.Module) -> None:
    named = arguments(node, "query key value attn_mask dropout_p=0.0")
    if not named["dropout_p"]:
        return
    mode = _mode(graph, node, model)
    with graph.inserting_before(node):
        probability = graph.call_function(operator.mul, (mode, named["dropout_p"]))
    args = [named[name] for name in ("query", "key", "value", "attn_mask")]
    node.args = (*args, probability, *node.args[5:])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in named}


def _follow_draw(node: fx.Node, model: nn.Module) -> None:
    if not _call_owner(node, model, _owner):
        raise CaptureError(
            f"{_owner(node) or 'the model'} draws random numbers ({node.target}) and torch.export does "
            "not tell whether it does so in training only"
        )


def _counts_batches(node: fx.Node) -> bool:
    first = node.args[0] if node.args else None
    return (
        node.target is _aten.add_.Tensor
        and isinstance(first, fx.Node)
        and first.op == "get_attr"
        and str(first.target).endswith("num_batches_tracked")
    )


def _owner(node: fx.Node) -> str:
    stack = node.meta.get(MODULE_STACK) or {}
    return list(stack.values())[-1][0] if stack else ""


def _mode(graph: fx.Graph, node: fx.Node, model: nn.Module) -> fx.Node:
    """A node that reads ``training`` of the module in whose forward ``node`` was recorded."""
    owner = _owner(node)
    try:
        model.get_submodule(owner)
    except AttributeError:
        owner = ""
    with graph.inserting_before(node):
        return graph.create_node("get_attr", f"{owner}.training" if owner else "training")


def _setting(graph: fx.Graph, node: fx.Node, model: nn.Module, name: str, value: Any) -> Any:
    """A number of the layer, read where the layer has it, so that setting it later counts."""
    owner = _owner(node)
    try:
        found = getattr(model.get_submodule(owner), name, None)
    except AttributeError:
        return value
    if not owner or type(found) is not type(value) or found != value:
        return value
    with graph.inserting_before(node):
        return graph.create_node("get_attr", f"{owner}.{name}")


def _replace(
    graph: fx.Graph, node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
