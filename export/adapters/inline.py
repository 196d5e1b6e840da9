"""Adapters that stay beside their operations in a file, as constants.

Over a quantized weight that is what keeps it quantized: a merge would make it dense. The branches are those
of the model's own graphs. What would need the dense weight at every run, as the gain
``m / ‖W + s·BA‖``, is computed here once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from lora_fx.ir import Region, module_of, record_of
from lora_fx.kinds import kinds
from lora_fx.passes.graph import copy_graph, erase_dead, graphs_of, install, target_of
from lora_fx.runtime import AdapterFactors

__all__ = ["fix_gains", "has_gains", "over_quantized"]

_MAGNITUDE, _GAIN = "lora_magnitude_vector", "lora_gain"


def over_quantized(model: nn.Module) -> bool:
    """Whether an active adapter of a model is at a quantized weight."""
    record = record_of(model)
    if record is None:
        return False
    active = (record.adapters[name] for name in record.active)
    return any(row.site.quantized is not None for adapter in active for row in adapter.sites)


def has_gains(model: nn.Module) -> bool:
    """Whether graphs of a model compute gains."""
    return any(_gains(graph) for graph in graphs_of(model).values())


@torch.no_grad()
def fix_gains(model: nn.Module) -> None:
    """Makes constants of the gains, ``layer.lora_gain.NAME`` in fp32.

    Args:
        model: A copy of a rewritten model. Its graphs are replaced.
    """
    install(list(_fixed(model)))


def _fixed(model: nn.Module) -> Iterator[Region]:
    edited: dict[int, fx.Graph] = {}
    graphs = graphs_of(model)
    holding = {module_of(key) for key, graph in graphs.items() if _gains(graph)}
    for key, graph in graphs.items():
        if module_of(key) not in holding:
            continue
        module = model.get_submodule(module_of(key))
        for node in _gains(graph):
            path, _, adapter = _target(node).rpartition(".")
            _factors(module, path).add(adapter, _value(module, node))
        if id(graph) not in edited:
            edited[id(graph)] = _with_constants(graph)
        # Its own forward would leave the adapter out.
        yield Region.at(key, module, edited[id(graph)], fallback=False)


def _factors(module: nn.Module, path: str) -> AdapterFactors:
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner)
    if name not in holder._modules:
        holder.add_module(name, AdapterFactors())
    found = holder.get_submodule(name)
    assert isinstance(found, AdapterFactors)
    return found


def _with_constants(graph: fx.Graph) -> fx.Graph:
    graph = copy_graph(graph)
    for node in _gains(graph):
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(_target(node)))
    erase_dead(graph)
    graph.lint()
    return graph


def _gains(graph: fx.Graph) -> list[fx.Node]:
    constants = tuple(one for kind in kinds() for one in kind.constants)
    return [node for node in graph.nodes if any(target_of(node) is one for one in constants)]


def _target(node: fx.Node) -> str:
    """Where a gain is kept: beside the magnitude that it is made of."""
    magnitude = node.args[0]
    assert isinstance(magnitude, fx.Node)
    return str(magnitude.target).replace(_MAGNITUDE, _GAIN)


def _value(module: nn.Module, node: Any) -> Any:
    """What a node computes of parameters alone."""
    if not isinstance(node, fx.Node):
        return node
    args = [_value(module, one) for one in node.args]
    if node.op == "get_attr":
        value: Any = module
        for atom in str(node.target).split("."):
            value = getattr(value, atom)
        return value
    assert target_of(node) is not None, node.format_node()
    return target_of(node)(*args, **{key: _value(module, one) for key, one in node.kwargs.items()})
