"""Makes again in the backward what is cheap to make: norms, activations, ``silu(g) * u``.

A *chain* is a connected part of a graph with one result, of operations that cost little beside a product.
Autograd over them keeps the tensors that it is made of (its inputs), and often more. The pass puts one call
in its place (:class:`lora_fx.runtime.recompute.Chain`), which keeps the inputs alone, and whose result a
fused product need not keep, either. Nothing is kept for a chain that was not kept without it: every input of
it is one that some operation of it keeps.

Norms and activations are modules over no matrix, which have no graph: those that are such a chain get one.
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
    Unchanged,
    copy_graph,
    is_lazy,
    is_matrix,
    may_write,
    original_class,
    target_of,
)
from lora_fx.runtime import AdapterModule, recompute

__all__ = ["Recompute"]

# What autograd keeps of an operation with one input: the input, the result or nothing. Of a product of two
# tensors it keeps both.
_KEEPS_INPUT = {"silu", "gelu", "mish", "softplus", "hardswish", "logsigmoid", "leaky_relu"}
_KEEPS_INPUT |= {"pow", "square", "erf", "layer_norm", "rms_norm"}
_KEEPS_RESULT = {"tanh", "sigmoid", "rsqrt", "sqrt", "exp", "reciprocal", "relu"}
_KEEPS_BOTH = {"mul", "truediv", "div"}
_KEEPS_NONE = {"add", "sub", "neg", "mean"}
_CASTS = {"to", "float", "type_as"}
_UNCOUNTED = {"getattr", *_CASTS}
# A chain without any of them is not worth a call: sums, products of two tensors.
_WORTH = {*_KEEPS_INPUT, "tanh", "sigmoid", "rsqrt"} - {"leaky_relu"}


def _functions() -> Mapping[Any, str]:
    names = _KEEPS_INPUT | _KEEPS_RESULT | _KEEPS_BOTH | _KEEPS_NONE | _CASTS
    places: Any = (operator, torch, F, torch.Tensor)
    found = {getattr(one, name): name for one in places for name in names if hasattr(one, name)}
    return {**found, getattr: "getattr"}


_NAMES = _functions()

# Functions that models write out as several operations, and that PyTorch computes by one.
_KERNELS: tuple[tuple[Any, Mapping[str, str]], ...] = (
    (F.gelu, {"approximate": "tanh"}),
    (F.gelu, {}),
    (F.silu, {}),
)
_REDUCING = {"mean", "layer_norm", "rms_norm"}
_NEAR, _ROUNDED = 1e-14, 1e-13  # of fp64: a constant with nine digits is another function


def _name_of(node: fx.Node) -> str | None:
    """What a node computes, if a chain may have it: nothing of a branch."""
    if tag_of(node) is not None:
        return None
    target = target_of(node)
    if isinstance(target, torch_private.OpOverload):
        schema = torch_private.schema_of(target)
        name = schema.name.removeprefix("aten::")
        known = name in _NAMES.values() and not schema.is_mutable
        return name if known else None
    try:
        found = _NAMES.get(target)
    except TypeError:  # it has no hash
        return None
    return found if found is not None and _is_cheap(node, found) else None


def _is_cheap(node: fx.Node, name: str) -> bool:
    """Whether an operation computes its result and does nothing else."""
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return False
    if name == "getattr":
        return node.args[1] in ("dtype", "device")
    if name == "to":
        # To another device is not cheap.
        wanted = node.args[1:]
        known = len(wanted) == 1 and not node.kwargs
        return known and (isinstance(wanted[0], torch.dtype) or _is_dtype(wanted[0]))
    # By its place it may be ``inplace``.
    return name == "mean" or not any(value is True for value in node.args[1:])


def _is_dtype(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is getattr and value.args[1] == "dtype"


@dataclasses.dataclass(frozen=True)
class _Found:
    """A chain in a graph.

    Attributes:
        root: Its result.
        nodes: Its operations, in the order of the graph.
        leaves: What goes into it, by node: the kind.
        saves: Whether autograd keeps more than the inputs.
    """

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    leaves: Mapping[fx.Node, str]
    saves: bool


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module without parameters that is a chain of one input.

    Attributes:
        called: What a chain says of it.
        graph: What it computes, of one input.
        saves: As of :class:`_Found`.
    """

    called: recompute.Called
    graph: fx.Graph
    saves: bool


class _Finder:
    """Finds chains in the graphs of a capture."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._graphs = Graphs()
        self._regions = capture.regions
        self._quiet: dict[int, bool] = {}

    def graph_of(self, module: nn.Module) -> fx.Graph | None:
        """The graph of a module that has none in the capture, if it is small and has one."""
        cls = original_class(module)
        if module._modules or isinstance(module, AdapterModule | torch.jit.ScriptModule):
            return None
        if any(is_lazy(p) or is_matrix(p) for p in module._parameters.values()):
            return None
        if "forward" in vars(module) or module._buffers or written_out(module) is not None:
            return None
        if cls.forward is nn.Module.forward:
            return None
        # One that runs a graph of this pass is traced as it was.
        own = object.__new__(cls)
        own.__dict__.update(vars(module))
        try:
            graph, doubt = self._graphs.of(own)
        except Untraceable:
            return None
        return None if doubt else graph

    def activation(self, region: Region, node: fx.Node) -> _Module | None:
        """What a ``call_module`` node calls, if it is a chain, without parameters and as a whole.

        Whatever else it does is done once, in the forward: it draws random numbers, say.
        """
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = region.submodule(node)
        if module is None or join(region.fqn, str(node.target)) in self._regions:
            return None
        if any(one is not None for one in module._parameters.values()):
            return None
        graph = self.graph_of(module)
        if graph is None:
            return None
        result, code = _result(graph), torch_private.codegen_of(graph)
        found = None if result is None else self.grow(Region("", module, graph), result)
        if found is None or {*_computed(graph)} != {*found.nodes}:
            return None
        if not isinstance(code, GuardedCodeGen) or code.extra or len(found.leaves) != 1:
            return None
        cls = original_class(module)
        if any(read.kind == "method" for read in code.reads):
            return None
        called = recompute.Called(cls, Unchanged(cls, code.reads))
        return _Module(called, graph, found.saves)

    def find(self, region: Region) -> Iterator[_Found]:
        """The chains of a region, the last one first."""
        taken: set[fx.Node] = set()
        for node in reversed(region.graph.nodes):
            if node not in taken and (found := self.grow(region, node)) is not None:
                taken.update(found.nodes)
                yield found

    def grow(self, region: Region, root: fx.Node) -> _Found | None:
        """The largest chain with a result."""
        if not self._belongs(region, root) or _name_of(root) in {*_KEEPS_RESULT, "getattr"}:
            return None
        outside: set[fx.Node] = set()
        while True:
            chain = self._connected(region, root, outside)
            leaves = self._leaves(region, chain)
            lost = [
                one
                for one, kind in leaves.items()
                if kind == recompute.ACTIVATION and not self._keeps(region, one, chain, leaves)
            ]
            if not lost:
                break
            # What reads an input and does not keep it stays outside, so that its result is the input.
            readers = {user for one in lost for user in one.users if user in chain}
            if root in readers:
                return None
            outside |= readers
        nodes = tuple(node for node in region.graph.nodes if node in chain)
        modules = [one for one in nodes if one.op == "call_module"]
        worth = bool(modules) or any(_name_of(one) in _WORTH for one in nodes)
        if not worth or recompute.ACTIVATION not in leaves.values():
            return None
        if not self._undisturbed(region, nodes):
            return None
        counted = [one for one in nodes if _name_of(one) not in _UNCOUNTED]
        inner = [found.saves for one in modules if (found := self.activation(region, one))]
        saves = len(counted) > 1 or any(inner) or _name_of(counted[0]) == "rms_norm"
        return _Found(root, nodes, leaves, saves)

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
                # Also what was left since one of its readers was not there yet.
                waiting += [above for one in chain for above in one.all_input_nodes]
        return chain

    def _leaves(self, region: Region, chain: set[fx.Node]) -> dict[fx.Node, str]:
        found: dict[fx.Node, str] = {}
        for node in region.graph.nodes:
            for one in node.all_input_nodes if node in chain else ():
                if one not in chain:
                    kind = recompute.PARAMETER if one.op == "get_attr" else recompute.ACTIVATION
                    found[one] = kind
        return found

    def _keeps(
        self, region: Region, leaf: fx.Node, chain: set[fx.Node], leaves: Mapping[fx.Node, str]
    ) -> bool:
        """Whether autograd over a chain keeps one of its inputs, or that in another dtype."""
        for user in (one for one in leaf.users if one in chain):
            name = _name_of(user)
            if user.op == "call_module":
                return True
            if name in _KEEPS_INPUT and user.args and user.args[0] is leaf:
                return True
            if name in _KEEPS_BOTH and all(
                isinstance(one, fx.Node) and _is_computed(one, leaves) for one in user.args[:2]
            ):
                return True
            cast = name in _CASTS and user.args[0] is leaf
            if cast and self._keeps(region, user, chain, leaves):
                return True
        return False

    def _undisturbed(self, region: Region, nodes: tuple[fx.Node, ...]) -> bool:
        """Whether nothing writes between the first operation of a chain and the last, which run as one."""
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
            self._quiet[key] = False  # one that calls itself
            self._quiet[key] = all(self._is_quiet(region, node) for node in region.graph.nodes)
        return self._quiet[key]


def _is_computed(node: fx.Node, leaves: Mapping[fx.Node, str]) -> bool:
    """Whether a value is computed from activations, and not from parameters alone."""
    kind = leaves.get(node)
    if kind is not None:
        return kind == recompute.ACTIVATION
    return any(_is_computed(one, leaves) for one in node.all_input_nodes)


def _result(graph: fx.Graph) -> fx.Node | None:
    """Return the output of a graph, if it is one value."""
    value = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return value if isinstance(value, fx.Node) else None


@dataclasses.dataclass(frozen=True)
class Recompute(Pass):
    """Has cheap inputs of products computed again in the backward pass instead of kept."""

    name: ClassVar[str] = "recompute"

    def __call__(self, capture: Capture) -> PassResult:
        """Edits every graph that has a chain, and gives one to every norm and activation that is one."""
        if not any(_has_product(region.graph) for region in capture.regions.values()):
            return PassResult(capture, False)
        finder = _Finder(capture)
        regions = dict(capture.regions)
        known: dict[int, tuple[fx.Graph | None, tuple[str, ...]]] = {}
        called: set[str] = set()
        for key, region in capture.regions.items():
            place = id(region.graph)
            if place not in known:
                known[place] = _edited(finder, region)
            graph, inside = known[place]
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
            if (made := edited[id(own)]) is not None:
                regions[fqn] = region.with_graph(made)
        return PassResult.of(capture, regions=regions)


def _has_product(graph: fx.Graph) -> bool:
    """Whether a graph has a fused product, which may read what a chain gives."""
    return any(role_of(node) is Role.FUSED for node in graph.nodes)


def _edited(finder: _Finder, region: Region) -> tuple[fx.Graph | None, tuple[str, ...]]:
    """A graph with a call for each chain, or None if it has none, and the modules that chains call."""
    known = tuple(_called_by(region.graph))
    if not any(True for _ in finder.find(region)):
        return None, known
    graph = copy_graph(region.graph)
    inside = list(known)
    for found in list(finder.find(region.with_graph(graph))):
        inside += [str(one.target) for one in found.nodes if one.op == "call_module"]
        _replace(graph, found, finder, region)
    graph.lint()
    return graph, tuple(inside)


def _called_by(graph: fx.Graph) -> Iterator[str]:
    """The modules that the chains of a graph call."""
    for node in graph.nodes:
        if isinstance(node.target, recompute.Chain):
            for kind, given in zip(node.target.kinds, node.args, strict=True):
                if kind == recompute.MODULE and isinstance(given, fx.Node):
                    yield str(given.target)


def _replace(graph: fx.Graph, found: _Found, finder: _Finder, region: Region) -> None:
    own = fx.Graph()
    inputs: dict[fx.Node, fx.Node] = {}
    for leaf in found.leaves:
        inputs[leaf] = own.placeholder(leaf.name)
    kinds, given = list(found.leaves.values()), list(found.leaves)
    called: list[recompute.Called] = []
    modules: dict[str, fx.Node] = {}
    with graph.inserting_before(found.root):
        for node in found.nodes:
            if node.op == "call_module" and str(node.target) not in modules:
                module = finder.activation(region, node)
                assert module is not None
                given.append(graph.get_attr(str(node.target)))
                modules[str(node.target)] = own.placeholder(given[-1].name)
                kinds.append(recompute.MODULE)
                called.append(module.called)
        for node in found.nodes:
            if node.op == "call_module":
                its = modules[str(node.target)]
                made = own.call_function(recompute.called, (its, inputs[node.args[0]]))  # type: ignore[index]
            else:
                made = own.node_copy(node, inputs.__getitem__)
            inputs[node] = made
        own.output(inputs[found.root])
        words = [_word(node) for node in found.nodes]
        name = "_".join(word for word in words if word)
        again = _again(own, found, finder, region)
        chain = recompute.chain_of(name, own, tuple(kinds), tuple(called), found.saves, again)
        call = graph.call_function(chain, tuple(given))
    found.root.replace_all_uses_with(call)
    for node in reversed(found.nodes):
        graph.erase_node(node)


def _again(own: fx.Graph, found: _Found, finder: _Finder, region: Region) -> fx.Graph | None:
    """The operations of a chain for the backward; None if they are the same.

    What modules compute stands in their place, and a kernel of PyTorch where one computes the same.
    """
    placeholders = [node for node in own.nodes if node.op == "placeholder"]
    calls = [node for node in own.nodes if node.target is recompute.called]
    if not calls:
        kernel = _kernel_of(own) if len(placeholders) == 1 < len(found.nodes) else None
        if kernel is None:
            return None
        graph = fx.Graph()
        given = graph.placeholder(placeholders[0].name)
        graph.output(graph.call_function(kernel[0], (given,), dict(kernel[1])))
        return graph
    modules = (finder.activation(region, node) for node in found.nodes if node.op == "call_module")
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
            start = next(one for one in module.graph.nodes if one.op == "placeholder")
            copies[node] = graph.graph_copy(module.graph, {start: x})
    return graph


def _computed(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _kernel_of(graph: fx.Graph) -> tuple[Any, Mapping[str, str]] | None:
    """The operation that computes what a graph of one input does, element by element."""
    computed = _computed(graph)
    if len(computed) < 2 or any(_name_of(node) in _REDUCING for node in computed):
        return None
    x = torch.linspace(-9, 9, 361, dtype=torch.float64)
    with torch.no_grad():
        found = fx.Interpreter(nn.Module(), graph=graph).run(x)
        for function, options in _KERNELS:
            if torch.allclose(found, function(x, **options), rtol=_ROUNDED, atol=_NEAR):
                return function, options
    return None


def _word(node: fx.Node) -> str:
    """Return the part of a chain's name that stands for a node; casts and constants have none."""
    if node.op == "call_module":
        return str(node.target).rpartition(".")[2]
    name = _name_of(node) or ""
    return "" if name in _UNCOUNTED else name
