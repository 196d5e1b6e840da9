"""Capture with ``torch.export``: one graph of ATen operations for the whole model, which never runs.

It shows operations that a symbolic trace cannot reach, in code that branches on Python values or takes
``**kwargs``. The modules run their own code, which reads each weight with its adapters applied.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from lora_fx import torch_private
from lora_fx.errors import CaptureError
from lora_fx.ir import Capture, Region
from lora_fx.passes.capture.state import State
from lora_fx.passes.capture.synthesis import named_inputs
from lora_fx.passes.graph import install, share_copy
from lora_fx.torch_private import pytree

__all__ = ["MODULE_STACK", "ONE_AT_A_TIME", "add_exported"]

MODULE_STACK = "nn_module_stack"
"""Key of ``node.meta`` with the FQNs of the modules that a node comes from, the outermost first."""

ONE_AT_A_TIME = threading.RLock()
"""Lock held while ``torch.export`` or the ONNX exporter runs, because both use global state.

The lock is reentrant, because an export to ONNX may capture in the same thread.
"""


def add_exported(capture: Capture, example_inputs: Any, dynamic_shapes: Any = None) -> Capture:
    """Add a graph of the whole model to a capture.

    Args:
        capture: The model with its regions.
        example_inputs: A tuple (args), a dict (kwargs) or a tensor.
        dynamic_shapes: Same as for ``torch.export.export``, by name. By default all shapes are fixed.

    Raises:
        CaptureError: If the model cannot be exported, with the reason.
    """
    # Export a copy, because the export runs the model, which may change its state.
    model = share_copy(capture.model)
    inputs = named_inputs(model, example_inputs)
    # Export the written-out forwards (of attention), so that both captures show the same operations.
    for region in capture.regions.values():
        if region.written_out:
            module = model.get_submodule(region.fqn)
            install([dataclasses.replace(region, module=module)])
    program = _exported(model, inputs, dynamic_shapes)
    module = _module_of(program, model)
    graph = fx.Graph()
    result: Any = graph.graph_copy(module.graph, {})
    for node in reversed(graph.nodes):
        if not node.users and torch_private.is_assertion(node.target):
            graph.erase_node(node)  # it only checks a value
    _name_tensors(graph, model)
    _name_placeholders(graph, inputs)
    leaves = pytree.tree_leaves(result)
    # Join several outputs into one value, as a model does with a class for its output.
    graph.output(leaves[0] if len(leaves) == 1 else graph.call_function(_outputs, tuple(leaves)))
    _keep_module_stacks(graph, model)
    below = {fqn: region for fqn, region in capture.regions.items() if fqn}
    regions = {
        "": Region("", capture.model, graph, not_run="torch.export only finds operations"),
        **below,
    }
    return dataclasses.replace(capture, regions=regions, frontend="export")


def _outputs(*values: Any) -> Any:
    """Return the values. An exported graph calls this instead of the class of the model's output."""
    return values


def _exported(model: nn.Module, inputs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    # Clone tensors, because export merges an object that is passed twice into one input.
    arguments = {
        k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }
    try:
        with ONE_AT_A_TIME, _named_arguments(model, arguments):
            return torch.export.export(model, (), arguments, dynamic_shapes=dynamic_shapes)
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


@contextmanager
def _named_arguments(model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """Add example arguments for ``**kwargs`` to the forward's signature: ``torch.export`` would lose them.

    Python objects that the forward changes are restored at the end.
    """
    before, own = State(model), model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    signature = inspect.signature(own)
    extra = [name for name in inputs if name not in signature.parameters]
    named = [p for p in signature.parameters.values() if not extra or p.kind is not p.VAR_KEYWORD]
    named += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    forward.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        before.restore()


def _module_of(program: ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """Return the graph of an export with the parameters of the model as attributes."""
    try:
        module: fx.GraphModule = program.module(check_guards=False)
    except Exception as error:
        # For example, a weight in a child whose name is an attribute of fx.GraphModule: "code".
        raise CaptureError(
            f"torch.export gives a program of {type(model).__name__} that PyTorch makes no module of "
            f"({error}): use frontend='regions'"
        ) from error
    return module


def _name_tensors(graph: fx.Graph, model: nn.Module) -> None:
    """Make nodes read a tensor by the first name of its module. Raise if the graph calls another graph."""
    first = {module: name for name, module in model.named_modules()}
    for node in graph.nodes:
        if node.op == "call_module":
            raise CaptureError(f"torch.export calls {node.target}, which lora_fx cannot follow")
        owner, _, key = str(node.target).rpartition(".")
        if node.op == "get_attr" and _has_module(model, owner):
            name = first[model.get_submodule(owner)]
            node.target = f"{name}.{key}" if name else key


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _name_placeholders(graph: fx.Graph, inputs: dict[str, Any]) -> None:
    """Name placeholders after arguments of forward. Erase placeholders of arguments that are no tensors."""
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


def _keep_module_stacks(graph: fx.Graph, model: nn.Module) -> None:
    """Drop the metadata of ``torch.export``, except the modules of each node, which diagrams show."""
    known = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    for node in graph.nodes:
        stack = node.meta.get(MODULE_STACK)
        node.meta.clear()
        if stack:
            names = dict.fromkeys(fqn for fqn, _ in stack.values() if fqn in known)
            node.meta[MODULE_STACK] = tuple(names)
