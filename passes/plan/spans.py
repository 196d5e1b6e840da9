"""Search for spans: parts of a layer that can run in tiles of tokens.

A span goes from a module that makes tokens wider (more features) to one that makes them narrower. A graph of
the layer shows which modules it calls, even if the graph is never run or is incomplete. The search follows
the output of each widening module through the graph, and through the graphs of called modules. The operations
in between run on a few tokens, and are recorded as in a training step (:mod:`lora_fx.runtime.memory.spans`).
So a span is found only if a training step can record all of its operations.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx import torch_private
from lora_fx.ir import Capture, Span, join
from lora_fx.passes.graph import GuardedCodeGen, target_of
from lora_fx.runtime.memory import LazyTensor, Source, lazy_result
from lora_fx.torch_private import pytree

__all__ = ["find_spans"]

_TOKENS = 12


def find_spans(
    capture: Capture, layer: nn.Module, fqn: str, is_alone: Callable[[str], bool]
) -> tuple[list[Span], list[tuple[str, str]]]:
    """Return the spans of a layer, and modules that widen tokens but begin no span, each with the reason.

    Args:
        capture: The model with its graphs and sites.
        layer: The layer.
        fqn: Its FQN.
        is_alone: Function that returns True for the FQN of a module that computes each token on its own.
    """
    search = _Search(capture, layer, fqn, is_alone)
    if search.graph("") is not None:
        search.follow("", {})
    spans, left = [], []
    for result in search.results.values():
        reason = result.reason()
        if not reason:
            spans.append(Span(fqn, tuple(result.modules)))
        elif result.width in search.widths:
            left.append((join(fqn, result.modules[0]), reason))
    return spans, left


@dataclasses.dataclass
class _WideResult:
    """The result of a module that makes tokens wider.

    Attributes:
        width: Number of features of the result.
        modules: The module, and others that read or return values computed from its result.
        readers: Names of modules and operations that read such a value and that a step cannot record.
        ends: True if a reader makes tokens narrower, so that the span ends there.
    """

    width: int
    modules: list[str] = dataclasses.field(default_factory=list)
    readers: list[str] = dataclasses.field(default_factory=list)
    ends: bool = False

    def reason(self) -> str:
        """Return the reason why no span begins at the widening module; empty if a span does."""
        if not self.ends:
            reader = self.readers[0] if self.readers else "code without a graph"
            return (
                f"its result goes to {reader}, which may mix elements, write into them, draw random numbers, "
                "or read more tensors"
            )
        readers = " and ".join(self.readers)
        return f"{readers} read its result: tiles have one reader" if len(self.readers) > 1 else ""


class _Search:
    """Search for spans in one layer. Names of modules are relative to the layer.

    Attributes:
        results: The results of modules that make tokens wider.
        widths: Numbers of features that modules of the layer reduce.
    """

    def __init__(
        self, capture: Capture, layer: nn.Module, fqn: str, is_alone: Callable[[str], bool]
    ) -> None:
        self.results: dict[Source, _WideResult] = {}
        self._capture, self._layer, self._fqn, self._is_alone = capture, layer, fqn, is_alone
        assert capture.matches is not None
        self._sites = {site.owner: site for site in capture.matches.sites if not site.experts}
        inner = [site for owner, site in self._sites.items() if owner.startswith(f"{fqn}.")]
        self.widths = {site.in_features for site in inner if site.out_features < site.in_features}

    def graph(self, name: str) -> fx.Graph | None:
        """Return the graph of a module, which may be partial, or None."""
        region = self._capture.regions.get(join(self._fqn, name))
        return region.graph if region else self._capture.begun.get(join(self._fqn, name))

    def follow(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Run the graph of a module on values that record their operations, and return its result.

        Unknown values are None.
        """
        values: dict[fx.Node, Any] = {}
        graph = self.graph(name)
        assert graph is not None
        for node in graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = arguments.get(str(node.target))
            elif node.op == "get_attr":
                values[node] = str(node.target).rpartition(".")[2] == "training" or None
            elif node.op == "output":
                self._note_reader(() if name else args, "the output")
                return args[0]
            elif node.op == "call_module":
                inner = join(name, str(node.target))
                self._note_module(inner, (args, kwargs))
                values[node] = self._result(inner, args, kwargs)
                self._note_module(inner, values[node])
            else:
                function = target_of(node)
                reader = getattr(function, "__name__", node.name)
                values[node] = self._run(reader, function, args, kwargs)
        return None

    def _result(self, name: str, args: Any, kwargs: Any) -> Any:
        """Return the result of a called module: a new recorded value if the module makes tokens wider.

        Other modules run on the recorded values. The result is None if it is unknown.
        """
        fqn, leaves = join(self._fqn, name), pytree.tree_leaves((args, kwargs))
        site, module = self._sites.get(fqn), self._layer.get_submodule(name)
        if site is not None and len(leaves) == 1 and self._is_alone(fqn):
            value, wide, narrow = leaves[0], site.out_features, site.in_features
            if wide > narrow and value is None:
                source = Source(torch.randn(1, _TOKENS, narrow, requires_grad=True), module)
                self.results[source] = _WideResult(wide)
                return lazy_result(lambda rows: rows[..., :1] * torch.ones(wide), source)
            self._note_reader(value, name)
            if wide < narrow and isinstance(value, LazyTensor):
                self.results[value.source].ends = True
            return None
        graph = self.graph(name)
        if graph is not None:
            code = torch_private.codegen_of(graph)
            names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
            if isinstance(code, GuardedCodeGen):
                names = [parameter.name for parameter in code.parameters]
            return self.follow(name, {**dict(zip(names, args, strict=False)), **kwargs})
        bare = not any(True for _ in module.parameters())
        return self._run(name, copy.deepcopy(module).train() if bare else None, args, kwargs)

    def _run(self, reader: str, function: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on recorded values, and return its result if a training step can record it.

        Results that are not tensors, such as shapes, are returned, too. Otherwise return None.
        """
        result = None
        if _sources((args, kwargs)) and function is not None:
            try:
                with torch.enable_grad():
                    result = function(*args, **kwargs)
            except Exception:  # noqa: BLE001  other operands are unknown
                result = None
        if isinstance(result, Tensor | None) and not isinstance(result, LazyTensor):
            self._note_reader((args, kwargs), reader)
            return None
        return result

    def _note_module(self, module: str, values: Any) -> None:
        """Record by name a module that reads or returns values, with the results they come from."""
        for source in _sources(values):
            if module not in self.results[source].modules:
                self.results[source].modules.append(module)

    def _note_reader(self, values: Any, reader: str) -> None:
        """Record by name a module or an operation that reads values and that a step cannot record."""
        for source in _sources(values):
            self.results[source].readers.append(reader)


def _sources(values: Any) -> set[Source]:
    return {value.source for value in pytree.tree_leaves(values) if isinstance(value, LazyTensor)}
