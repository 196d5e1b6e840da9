"""Pass that recomputes cheap operations in the backward: norms, activations, ``silu(g) * u``.

A *chain* is a connected part of a graph with one result. Its operations cost little compared with a matrix
product. Autograd over them keeps the inputs of the chain, and often more. The pass replaces the chain by one
call (:class:`lora_fx.runtime.kernels.recompute.Chain`), which keeps only the inputs. A fused product that
reads the result need not keep it, because the chain can compute it again. The call never keeps more than the
operations did: each input of a chain is also kept by one of its operations.

Norms and activations are modules without matrices. The capture makes no graph for them. If such a module is a
chain, this pass gives it a graph.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx import torch_private
from lora_fx.ir import (
    Capture,
    Pass,
    PassResult,
    Region,
    Role,
    join,
    role_of,
    tag_of,
)
from lora_fx.passes.capture import Graphs, Untraceable, written_out
from lora_fx.passes.graph import (
    GuardedCodeGen,
    MethodRead,
    Unchanged,
    copy_graph,
    is_lazy,
    is_matrix,
    may_write,
    original_class,
    target_of,
)
from lora_fx.runtime.kernels import recompute
from lora_fx.runtime.modules import AdapterModule

__all__ = ["Recompute"]

# The tensors that autograd keeps for an operation: its input, its result, both factors of a product, or none.
_KEEPS_INPUT = {"silu", "gelu", "mish", "softplus", "hardswish", "logsigmoid", "leaky_relu"}
_KEEPS_INPUT |= {"pow", "square", "erf", "layer_norm", "rms_norm"}
_KEEPS_RESULT = {"tanh", "sigmoid", "rsqrt", "sqrt", "exp", "reciprocal", "relu"}
_KEEPS_BOTH = {"mul", "truediv", "div"}
_KEEPS_NONE = {"add", "sub", "neg", "mean"}
_CASTS = {"to", "float", "type_as"}
_UNCOUNTED = {"getattr", *_CASTS}
# A chain without any of these (of sums and products of two tensors only) is not worth a call.
_WORTH = {*_KEEPS_INPUT, "tanh", "sigmoid", "rsqrt"} - {"leaky_relu"}


def _functions() -> Mapping[Any, str]:
    names = _KEEPS_INPUT | _KEEPS_RESULT | _KEEPS_BOTH | _KEEPS_NONE | _CASTS
    namespaces: Any = (operator, torch, F, torch.Tensor)
    names_by_function = {
        getattr(namespace, name): name
        for namespace in namespaces
        for name in names
        if hasattr(namespace, name)
    }
    return {**names_by_function, getattr: "getattr"}


_NAMES = _functions()

# Functions that models write out as several operations, and that PyTorch computes in one kernel.
_KERNELS: tuple[tuple[Any, Mapping[str, str]], ...] = (
    (F.gelu, {"approximate": "tanh"}),
    (F.gelu, {}),
    (F.silu, {}),
)
_REDUCING = {"mean", "layer_norm", "rms_norm"}
# Tolerances in fp64: so tight that an activation whose constants have only nine digits counts as another one.
_NEAR, _ROUNDED = 1e-14, 1e-13


def _name_of(node: fx.Node) -> str | None:
    """Return the name of an operation if a chain may contain it, or None.

    The nodes of a branch are never part of a chain.
    """
    if tag_of(node) is not None:
        return None
    target = target_of(node)
    if isinstance(target, torch_private.OpOverload):
        schema = torch_private.schema_of(target)
        name = schema.name.removeprefix("aten::")
        known = name in _NAMES.values() and not schema.is_mutable
        return name if known else None
    try:
        operation = _NAMES.get(target)
    except TypeError:  # it has no hash
        return None
    return operation if operation is not None and _is_cheap(node, operation) else None


def _is_cheap(node: fx.Node, name: str) -> bool:
    """Return True if a call of an operation is cheap and has no side effects, so that it may run twice."""
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return False
    if name == "getattr":
        return node.args[1] in ("dtype", "device")
    if name == "to":
        # To another device is not cheap.
        wanted = node.args[1:]
        known = len(wanted) == 1 and not node.kwargs
        return known and (isinstance(wanted[0], torch.dtype) or _is_dtype(wanted[0]))
    # A positional True may be ``inplace``.
    return name == "mean" or not any(value is True for value in node.args[1:])


def _is_dtype(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is getattr and value.args[1] == "dtype"


@dataclasses.dataclass(frozen=True)
class _ChainNodes:
    """A chain in a graph, before it becomes a :class:`lora_fx.runtime.kernels.recompute.Chain`.

    Attributes:
        root: The node of its result.
        nodes: The nodes of its operations, in the order of the graph.
        leaves: The nodes of its inputs, each with the kind of the input.
        saves: True if autograd over the operations keeps more than the inputs.
    """

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    leaves: Mapping[fx.Node, str]
    saves: bool


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module without parameters whose forward is one chain with one input, such as an activation.

    Attributes:
        called: Record of the module in a chain that calls it.
        graph: Its graph, with one input.
        saves: Same as in :class:`_ChainNodes`.
    """

    called: recompute.Called
    graph: fx.Graph
    saves: bool


class _Finder:
    """Finder of the chains in the graphs of a capture."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._graphs = Graphs()
        self._regions = capture.regions
        self._quiet: dict[int, bool] = {}

    def graph_of(self, module: nn.Module) -> fx.Graph | None:
        """Trace a small module without a graph, such as a norm. Return None if it cannot be traced."""
        cls = original_class(module)
        if module._modules or isinstance(module, AdapterModule | torch.jit.ScriptModule):
            return None
        if any(is_lazy(p) or is_matrix(p) for p in module._parameters.values()):
            return None
        if "forward" in vars(module) or module._buffers or written_out(module) is not None:
            return None
        if cls.forward is nn.Module.forward:
            return None
        # A module that runs a graph of this pass is traced with its original class.
        own = object.__new__(cls)
        own.__dict__.update(vars(module))
        try:
            graph, doubt = self._graphs.of(own)
        except Untraceable:
            return None
        return None if doubt else graph

    def activation(self, region: Region, node: fx.Node) -> _Module | None:
        """Return the module that a ``call_module`` node calls, if it is one chain without parameters.

        Other modules, such as those that draw random numbers, run once, in the forward.
        """
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = region.submodule(node)
        if module is None or join(region.fqn, str(node.target)) in self._regions:
            return None
        if any(parameter is not None for parameter in module._parameters.values()):
            return None
        graph = self.graph_of(module)
        if graph is None:
            return None
        result, code = _result(graph), torch_private.codegen_of(graph)
        chain = None if result is None else self.grow(Region("", module, graph), result)
        if chain is None or {*_computed(graph)} != {*chain.nodes}:
            return None
        if not isinstance(code, GuardedCodeGen) or code.extra or len(chain.leaves) != 1:
            return None
        cls = original_class(module)
        if any(isinstance(read, MethodRead) for read in code.reads):
            return None
        called = recompute.Called(cls, Unchanged(cls, code.reads))
        return _Module(called, graph, chain.saves)

    def find(self, region: Region) -> Iterator[_ChainNodes]:
        """Yield the chains of a region, the last chain first."""
        taken: set[fx.Node] = set()
        for node in reversed(region.graph.nodes):
            if node not in taken and (chain := self.grow(region, node)) is not None:
                taken.update(chain.nodes)
                yield chain

    def grow(self, region: Region, root: fx.Node) -> _ChainNodes | None:
        """Return the largest chain whose result is the node `root`, or None if no chain ends there."""
        if not self._belongs(region, root) or _name_of(root) in {*_KEEPS_RESULT, "getattr"}:
            return None
        outside: set[fx.Node] = set()
        while True:
            chain = self._connected(region, root, outside)
            leaves = self._leaves(region, chain)
            lost = [
                leaf
                for leaf, kind in leaves.items()
                if kind == recompute.ACTIVATION and not self._keeps(region, leaf, chain, leaves)
            ]
            if not lost:
                break
            # No operation of the chain keeps this input. So the operations that read it stay outside, and
            # their results become inputs of the chain.
            readers = {user for leaf in lost for user in leaf.users if user in chain}
            if root in readers:
                return None
            outside |= readers
        nodes = tuple(node for node in region.graph.nodes if node in chain)
        modules = [node for node in nodes if node.op == "call_module"]
        worth = bool(modules) or any(_name_of(node) in _WORTH for node in nodes)
        if not worth or recompute.ACTIVATION not in leaves.values():
            return None
        if not self._undisturbed(region, nodes):
            return None
        counted = [node for node in nodes if _name_of(node) not in _UNCOUNTED]
        inner = [
            activation.saves for node in modules if (activation := self.activation(region, node))
        ]
        saves = len(counted) > 1 or any(inner) or _name_of(counted[0]) == "rms_norm"
        return _ChainNodes(root, nodes, leaves, saves)

    def _belongs(self, region: Region, node: fx.Node) -> bool:
        return _name_of(node) is not None or self.activation(region, node) is not None

    def _connected(self, region: Region, root: fx.Node, outside: set[fx.Node]) -> set[fx.Node]:
        chain = {root}
        waiting = list(root.all_input_nodes)
        while waiting:
            node = waiting.pop()
            inside = all(user in chain for user in node.users)
            if node not in chain and node not in outside and inside and self._belongs(region, node):
                chain.add(node)
                # Look again at nodes that were left out because a reader was not in the chain yet.
                waiting += [above for member in chain for above in member.all_input_nodes]
        return chain

    def _leaves(self, region: Region, chain: set[fx.Node]) -> dict[fx.Node, str]:
        leaves: dict[fx.Node, str] = {}
        for node in region.graph.nodes:
            for value in node.all_input_nodes if node in chain else ():
                if value not in chain:
                    kind = recompute.PARAMETER if value.op == "get_attr" else recompute.ACTIVATION
                    leaves[value] = kind
        return leaves

    def _keeps(
        self, region: Region, leaf: fx.Node, chain: set[fx.Node], leaves: Mapping[fx.Node, str]
    ) -> bool:
        """Return True if an operation of a chain makes autograd keep an input of the chain, or a cast of it.

        The call that replaces a chain may keep only such inputs.
        """
        for user in (reader for reader in leaf.users if reader in chain):
            name = _name_of(user)
            if user.op == "call_module":
                return True
            if name in _KEEPS_INPUT and user.args and user.args[0] is leaf:
                return True
            if name in _KEEPS_BOTH and all(
                isinstance(operand, fx.Node) and _is_computed(operand, leaves)
                for operand in user.args[:2]
            ):
                return True
            cast = name in _CASTS and user.args[0] is leaf
            if cast and self._keeps(region, user, chain, leaves):
                return True
        return False

    def _undisturbed(self, region: Region, nodes: tuple[fx.Node, ...]) -> bool:
        """Return True if no operation between the first and the last of a chain writes in place.

        The chain may then run as one call.
        """
        node = nodes[0]
        while node is not nodes[-1]:
            if node not in nodes and not self._is_quiet(region, node):
                return False
            node = node.next
        return True

    def _is_quiet(self, region: Region, node: fx.Node) -> bool:
        if node.op != "call_module":
            return not may_write(node)
        if self.activation(region, node) is not None:
            return True
        called = self._regions.get(join(region.fqn, str(node.target)))
        return called is not None and self._runs_quietly(called)

    def _runs_quietly(self, region: Region) -> bool:
        key = id(region.graph)
        if key not in self._quiet:
            self._quiet[key] = False  # for a region that calls itself
            self._quiet[key] = all(self._is_quiet(region, node) for node in region.graph.nodes)
        return self._quiet[key]


def _is_computed(node: fx.Node, leaves: Mapping[fx.Node, str]) -> bool:
    """Return True if a value depends on activations, and not on parameters alone.

    ``leaves`` has the kind of each input of the chain.
    """
    kind = leaves.get(node)
    if kind is not None:
        return kind == recompute.ACTIVATION
    return any(_is_computed(value, leaves) for value in node.all_input_nodes)


def _result(graph: fx.Graph) -> fx.Node | None:
    """Return the node that a graph returns, or None if the graph does not return exactly one node."""
    value = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return value if isinstance(value, fx.Node) else None


@dataclasses.dataclass(frozen=True)
class Recompute(Pass):
    """Pass that recomputes cheap inputs of products in the backward instead of keeping them."""

    name: ClassVar[str] = "recompute"

    def __call__(self, capture: Capture) -> PassResult:
        """Edit every graph that has a chain. Give a graph to each norm and activation that is a chain."""
        if not any(_has_product(region.graph) for region in capture.regions.values()):
            return PassResult(capture, False)
        finder = _Finder(capture)
        regions = dict(capture.regions)
        known: dict[int, tuple[fx.Graph | None, tuple[str, ...]]] = {}
        called: set[str] = set()
        for key, region in capture.regions.items():
            graph_id = id(region.graph)
            if graph_id not in known:
                known[graph_id] = _edited(finder, region)
            graph, inside = known[graph_id]
            called.update(join(region.fqn, name) for name in inside)
            if graph is not None:
                regions[key] = region.with_graph(graph)
        edited: dict[int, fx.Graph | None] = {}
        for fqn, module in capture.model.named_modules():
            if fqn in capture.regions or fqn in called or (own := finder.graph_of(module)) is None:
                continue
            region = Region(fqn, module, own)
            if id(own) not in edited:
                edited[id(own)] = _edited(finder, region)[0]
            if (new_graph := edited[id(own)]) is not None:
                regions[fqn] = region.with_graph(new_graph)
        return PassResult.of(capture, regions=regions)


def _has_product(graph: fx.Graph) -> bool:
    """Return True if a graph has a fused product, which can recompute its input from a chain."""
    return any(role_of(node) is Role.FUSED for node in graph.nodes)


def _edited(finder: _Finder, region: Region) -> tuple[fx.Graph | None, tuple[str, ...]]:
    """Return a graph in which each chain of cheap operations is one call, and the modules that chains call.

    The graph is None if there is no chain.
    """
    known = tuple(_called_by(region.graph))
    if not any(True for _ in finder.find(region)):
        return None, known
    graph = copy_graph(region.graph)
    inside = list(known)
    for chain in list(finder.find(region.with_graph(graph))):
        inside += [str(node.target) for node in chain.nodes if node.op == "call_module"]
        _replace(graph, chain, finder, region)
    graph.lint()
    return graph, tuple(inside)


def _called_by(graph: fx.Graph) -> Iterator[str]:
    """Yield the names of the modules that run inside the chains of a graph."""
    for node in graph.nodes:
        if isinstance(node.target, recompute.Chain):
            for kind, argument in zip(node.target.kinds, node.args, strict=True):
                if kind == recompute.MODULE and isinstance(argument, fx.Node):
                    yield str(argument.target)


def _replace(graph: fx.Graph, chain: _ChainNodes, finder: _Finder, region: Region) -> None:
    own = fx.Graph()
    inputs: dict[fx.Node, fx.Node] = {}
    for leaf in chain.leaves:
        inputs[leaf] = own.placeholder(leaf.name)
    kinds, arguments = list(chain.leaves.values()), list(chain.leaves)
    called: list[recompute.Called] = []
    modules: dict[str, fx.Node] = {}
    with graph.inserting_before(chain.root):
        for node in chain.nodes:
            if node.op == "call_module" and str(node.target) not in modules:
                module = finder.activation(region, node)
                assert module is not None
                arguments.append(graph.get_attr(str(node.target)))
                modules[str(node.target)] = own.placeholder(arguments[-1].name)
                kinds.append(recompute.MODULE)
                called.append(module.called)
        for node in chain.nodes:
            if node.op == "call_module":
                owner = modules[str(node.target)]
                copy = own.call_function(recompute.called, (owner, inputs[node.args[0]]))  # type: ignore[index]
            else:
                copy = own.node_copy(node, inputs.__getitem__)
            inputs[node] = copy
        own.output(inputs[chain.root])
        words = [_word(node) for node in chain.nodes]
        name = "_".join(word for word in words if word)
        again = _backward_graph(own, chain, finder, region)
        operation = recompute.chain_of(name, own, tuple(kinds), tuple(called), chain.saves, again)
        call = graph.call_function(operation, tuple(arguments))
    chain.root.replace_all_uses_with(call)
    for node in reversed(chain.nodes):
        graph.erase_node(node)


def _backward_graph(
    own: fx.Graph, chain: _ChainNodes, finder: _Finder, region: Region
) -> fx.Graph | None:
    """Return the graph that computes a chain again in the backward; None to use the graph of the forward.

    Calls of modules are inlined. If one PyTorch kernel computes the same as a module or a chain, the graph
    calls this kernel.
    """
    placeholders = [node for node in own.nodes if node.op == "placeholder"]
    calls = [node for node in own.nodes if node.target is recompute.called]
    if not calls:
        kernel = _kernel_of(own) if len(placeholders) == 1 < len(chain.nodes) else None
        if kernel is None:
            return None
        graph = fx.Graph()
        value = graph.placeholder(placeholders[0].name)
        graph.output(graph.call_function(kernel[0], (value,), dict(kernel[1])))
        return graph
    modules = (finder.activation(region, node) for node in chain.nodes if node.op == "call_module")
    inside = dict(zip(calls, modules, strict=True))
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in own.nodes:
        if node not in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        module, x = inside[node], copies[node.args[1]]
        assert module is not None
        kernel = _kernel_of(module.graph)
        if kernel is not None:
            copies[node] = graph.call_function(kernel[0], (x,), dict(kernel[1]))
        else:
            start = next(inner for inner in module.graph.nodes if inner.op == "placeholder")
            copies[node] = graph.graph_copy(module.graph, {start: x})
    return graph


def _computed(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _kernel_of(graph: fx.Graph) -> tuple[Any, Mapping[str, str]] | None:
    """Return a PyTorch function, with keyword arguments, that computes the same as a graph, or None.

    The graph has one input, and each element of its result depends on one element of the input.
    """
    computed = _computed(graph)
    if len(computed) < 2 or any(_name_of(node) in _REDUCING for node in computed):
        return None
    x = torch.linspace(-9, 9, 361, dtype=torch.float64)
    with torch.no_grad():
        expected = fx.Interpreter(nn.Module(), graph=graph).run(x)
        for function, options in _KERNELS:
            if torch.allclose(expected, function(x, **options), rtol=_ROUNDED, atol=_NEAR):
                return function, options
    return None


def _word(node: fx.Node) -> str:
    """Return a node's part of the name of a chain, such as "silu"; casts and constants have no part."""
    if node.op == "call_module":
        return str(node.target).rpartition(".")[2]
    name = _name_of(node) or ""
    return "" if name in _UNCOUNTED else name
