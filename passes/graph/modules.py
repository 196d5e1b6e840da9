"""Functions that return a module's own class, and the graph that it runs."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lora_fx.ir import record_of
from lora_fx.runtime import GRAPH
from lora_fx.runtime.modules import BASE, inner_class

__all__ = [
    "KEPT",
    "class_name",
    "graphs_of",
    "is_built_in",
    "is_conv1d",
    "is_region",
    "kept_graph",
    "original_class",
]

KEPT = "_lora_fx_kept"
"""Attribute of a region's class: True if its graph has permanently replaced the module's forward."""


def is_region(module: nn.Module) -> bool:
    """Return True if the module's forward is generated from a graph."""
    return GRAPH in inner_class(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's own class, without the subclasses of regions and watched modules."""
    cls = inner_class(module)
    original: type[nn.Module] = cls.__dict__.get(BASE, cls)
    return original


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's own class."""
    cls = original_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def is_conv1d(module: nn.Module) -> bool:
    """Return True for a Conv1D of transformers, a linear layer whose weight is stored [in, out]."""
    return any(
        (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
        for cls in original_class(module).__mro__
    )


def is_built_in(module: nn.Module) -> bool:
    """Return True if the module is a layer of PyTorch, also if its weight is reparametrized."""
    cls: type = original_class(module)
    if cls.__module__ == "torch.nn.utils.parametrize":
        cls = cls.__mro__[1]
    return cls.__module__.startswith(("torch.nn.modules.", "torch.nn.utils.", "torch.ao.nn."))


def graphs_of(model: nn.Module) -> dict[str, fx.Graph]:
    """Return the graphs of a captured or rewritten model by FQN (``""`` is the root), parents first.

    For a module that runs its own forward, the result has the graph that was captured.
    """
    modules = dict(model.named_modules())
    running = {name: getattr(type(m), GRAPH) for name, m in modules.items() if is_region(m)}
    record = record_of(model)
    captured = {} if record is None else record.base.graphs
    return {
        **{name: running.get(name, graph) for name, graph in captured.items() if name in modules},
        **running,
    }


def kept_graph(module: nn.Module) -> fx.Graph | None:
    """Return the graph that has permanently replaced a module's forward, or None."""
    cls: Any = inner_class(module)
    return getattr(cls, GRAPH) if cls.__dict__.get(KEPT) else None
