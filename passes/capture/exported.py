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
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from lora_fx.errors import CaptureError
from lora_fx.ir.values import Capture, Region
from lora_fx.passes.capture.conditions import (
    cache_condition,
    call_parameters,
    output_conditions,
    shape_conditions,
)
from lora_fx.passes.capture.decompositions import written_out
from lora_fx.passes.capture.inputs import CACHE, named_inputs
from lora_fx.passes.capture.lock import ONE_AT_A_TIME
from lora_fx.passes.capture.masks import convert_masks
from lora_fx.passes.capture.noting import Notes, noted_globals
from lora_fx.passes.capture.state import State, difference, state_of
from lora_fx.passes.capture.unbake import unbake_devices, unbake_modes
from lora_fx.passes.graph.copies import storage_of
from lora_fx.passes.graph.region import CONSTANT, install, uninstall
from lora_fx.passes.graph.signature import NEEDS_MODULES, GuardedCodeGen, attribute

__all__ = ["export_root"]


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
    written = [r for r in capture.regions.values() if written_out(r.module)]
    install(written)
    try:
        program, notes = _exported(model, _prepared(inputs), dynamic_shapes)
    finally:
        for region in written:
            uninstall(region.module)
    module = program.module(check_guards=False)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result: Any = graph.graph_copy(module.graph, copied)
    _drop_copies_onto_itself(graph)
    _name_constants(graph, module, model)
    _name_shared(graph, model)
    graph.output(_container(graph, pytree.tree_unflatten(list(result), program.call_spec.out_spec)))
    conditions = shape_conditions(
        program, module.graph, [n for n, v in inputs.items() if isinstance(v, torch.Tensor)]
    )
    _name_placeholders(graph, inputs)
    unbake_modes(graph, model)
    convert_masks(graph)
    device = torch.device("cpu")
    named = dict(model.named_parameters())
    found = (n for n in graph.nodes if n.op == "get_attr" and n.target in named)
    reference = next(found, None)
    if reference is not None:
        tensor = named[str(reference.target)]
        device = tensor.device
        unbake_devices(graph, reference, device)
        conditions.append(f"{attribute(str(reference.target))}.dtype != {tensor.dtype}")
    # Under autocast the code chooses dtypes that the graph has as literals.
    conditions.append(f"torch.is_autocast_enabled({device.type!r})")
    conditions.append(f"{NEEDS_MODULES}(self)")
    conditions.extend(output_conditions(model))
    conditions.extend(cache_condition(notes.forget(getattr(model, "config", None), CACHE)))
    for node in graph.nodes:
        node.meta.clear()
    reads = (*noted_globals(model), notes.read)
    parameters = call_parameters(model, inputs)
    graph.set_codegen(GuardedCodeGen(parameters, conditions=tuple(conditions), reads=reads))
    graph.lint()
    below = {key: region for key, region in capture.regions.items() if region.fqn}
    regions = {"": Region("", model, graph, overlay=True), **below}
    # The modules that do not trace stay listed: calls that go past the graph go through them.
    return dataclasses.replace(capture, regions=regions, frontend="export")


def _prepared(inputs: dict[str, Any]) -> dict[str, Any]:
    """Tensors of their own (export takes one object passed twice for one input), with batch >= 2."""
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    single = bool(tensors) and all(v.dim() > 0 and v.shape[0] == 1 for v in tensors.values())
    return {
        k: (torch.cat([v, v]) if single else v.detach().clone()) if k in tensors else v
        for k, v in inputs.items()
    }


def _exported(
    model: nn.Module, inputs: dict[str, Any], dynamic_shapes: Any
) -> tuple[ExportedProgram, Notes]:
    if dynamic_shapes is None:
        dynamic_shapes = {
            k: dict.fromkeys(range(v.dim()), Dim.AUTO) if isinstance(v, torch.Tensor) else None
            for k, v in inputs.items()
        }
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        with ONE_AT_A_TIME, _watched(model, inputs) as notes:
            return torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes), notes
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


@contextlib.contextmanager
def _watched(model: nn.Module, inputs: dict[str, Any]) -> Iterator[Notes]:
    """Exports a forward that leaves nothing behind and has a name for every argument.

    What it writes into Python objects is part of no capture and is put back.
    Arguments that ``**kwargs`` takes get a place in the signature: torch.export loses them otherwise.

    Raises:
        CaptureError: If it has counted, or kept something: the graph would have the first value for ever.
    """
    before, own = State(model), model.forward
    changed: list[str] = []
    notes = Notes(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        state = state_of(model)
        with notes.taken():
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
        yield notes
    finally:
        before.restore()
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
    if not isinstance(value, fx.Node) or not isinstance(value.target, torch._ops.OpOverload):
        return False
    first = value.target._schema.arguments[0].alias_info
    return first is not None and first.is_write and value.target._schema.name.endswith("_")


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
            # It would be a constant beside the parameter.
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
