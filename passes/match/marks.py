"""Passes that mark matched sites: output head, linear layers, routers of experts, parts of fused weights.

The head is the linear operation that every path to the output goes through last. To find it, a walk goes from
an output back to the input along immediate dominators (`networkx.immediate_dominators`). The first linear
operation on this walk is the head. The walk skips an operation with a residual connection around it. A block
that repeats is never searched, because its last layer is a layer like any other. If a model names
its head (``get_output_embeddings`` of transformers, ``get_classifier`` of timm), that answer is used. If
the root of a transformers model has no graph, the head is a sibling of its base model.

A router's output selects the top-k experts, and has one feature for each expert. Only operations that keep
the scores of the experts apart may follow: a softmax, a bias, the best of each group. After them comes a
choice along the last axis, such as a top-k. The search goes from graph to graph, because a router is often a
separate module and the choice is in its parent. If the parent has no graph, the router is not recognized.

A fused weight belongs to one product whose output is cut into q, k and v, or into gate and up. The whole
weight stays one site. A configuration can name its parts instead (``qkv.q``), each with separate factors and
rank. A merge then changes only the rows of these parts. The nodes that read the output show how it is
divided. These nodes are in the graphs of the regions, or in the partial graphs of modules whose trace failed.

``target_modules="all-linear"`` selects by class, as in PEFT: every ``nn.Linear`` and Conv1D of
transformers, except the output embeddings of a transformers model.

In the same way, a search goes from a head's output to a cross entropy, to see if the loss can be computed
in chunks.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx, nn

from lora_fx import torch_private
from lora_fx.ir import Capture, Matches, Pass, PassResult, Region, Site, join
from lora_fx.passes.graph import arguments, is_conv1d, is_lazy, original_class, target_of
from lora_fx.passes.patterns import SPLIT, part_lengths, part_names, splits

__all__ = [
    "LOSSES",
    "MARKS",
    "Mark",
    "find_head",
    "find_linear_layers",
    "find_losses",
    "find_parts",
    "find_routers",
]

_SOURCE = "source"
_HEAD_NAMES = frozenset(
    {
        "head",
        "lm_head",
        "classifier",
        "score",
        "fc",
        "fc_out",
        "out",
        "output",
        "logits",
        "proj_out",
    }
)


_MAIN_OUTPUTS = ("logits", "last_hidden_state", "sample", "prediction_logits")
"""Names that libraries give to the part of an output that the head computes."""


def find_head(capture: Capture, matches: Matches) -> Matches:
    """Mark the output head among the sites of a model.

    Args:
        capture: The model.
        matches: Its linear operations.

    Returns:
        The matches with ``Site.head`` set.
    """
    declared = frozenset(_declared(capture.model))
    heads: frozenset[str] = frozenset()
    if not declared:
        outputs = {
            (call.region, call.output): site.weight for site in matches.sites for call in site.calls
        }
        with_sites = {region for region, _ in outputs}
        heads = frozenset(
            weight
            for region in _last_regions(capture)
            for weight in _descend(capture, region, outputs, with_sites)
        )

        if not heads and ("" not in capture.regions or capture.frontend == "export"):
            # In an exported graph other operations follow the head, such as those of a loss.
            names = [name for name, _ in capture.model.named_children()]
            heads = frozenset(_named(names, matches.sites))

    def marked(site: Site) -> Site:
        if site.weight in declared:
            return dataclasses.replace(site, head="declared")
        return dataclasses.replace(site, head="found") if site.weight in heads else site

    return dataclasses.replace(matches, sites=tuple(marked(site) for site in matches.sites))


def _named(layers: list[str], sites: tuple[Site, ...]) -> Iterator[str]:
    """Yield the weight of the last layer in ``layers`` if its name is that of a head, such as ``lm_head``."""
    last = layers[-1:]
    for site in sites:
        if site.family == "linear" and [site.owner] == last and last[0] in _HEAD_NAMES:
            yield site.weight


def _declared(model: nn.Module) -> Iterator[str]:
    """Yield the weights of the heads that a model itself declares, as transformers and timm models do."""
    names = {id(module): name for name, module in model.named_modules()}
    for method in ("get_output_embeddings", "get_classifier"):
        try:
            head = getattr(model, method, lambda: None)()
        except Exception:  # noqa: BLE001, S112  a model's own method may fail in any way
            continue
        for module in head if isinstance(head, tuple | list) else (head,):
            if isinstance(module, nn.Module) and id(module) in names:
                yield join(names[id(module)], "weight")


def find_linear_layers(capture: Capture, matches: Matches) -> Matches:
    """Mark the layers that ``target_modules="all-linear"`` stands for: those that PEFT selects.

    Args:
        capture: The model.
        matches: Its linear operations.

    Returns:
        The matches with ``Site.all_linear`` set.
    """
    embeddings = _output_embeddings(capture.model)
    layers = frozenset(
        name
        for name, module in capture.model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not embeddings
    )

    def is_selected(site: Site) -> bool:
        # PEFT also matches the names of the layers as suffixes: "proj" selects "embed.proj" as well.
        parts = site.owner.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        return site.parameter == "weight" and any(end in layers for end in ends)

    sites = (dataclasses.replace(site, all_linear=is_selected(site)) for site in matches.sites)
    return dataclasses.replace(matches, sites=tuple(sites))


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings of a transformers model, which PEFT leaves out."""
    if not any(cls.__name__ == "PreTrainedModel" for cls in original_class(model).__mro__):
        return None
    embeddings = model.get_output_embeddings()  # type: ignore[operator]
    return embeddings if isinstance(embeddings, nn.Module) else None


def _last_regions(capture: Capture) -> list[Region]:
    """Return the regions in which to search for the head.

    Search the root or, if it has no graph, the siblings of a transformers model's base model.
    """
    if "" in capture.regions:
        return [capture.regions[""]]
    base = getattr(capture.model, "base_model_prefix", "")
    names = [name for name, _ in capture.model.named_children()]
    if base not in names:
        return []
    beside = [name for name in names if name != base and name in capture.regions]
    # Prefer a layer with the name of a head: a pooler may come before it.
    named = [name for name in beside if name in _HEAD_NAMES]
    return [capture.regions[name] for name in named or beside]


def _descend(
    capture: Capture, region: Region, outputs: dict[tuple[str, str], str], with_sites: set[str]
) -> Iterator[str]:
    """Yield the weights of heads, in a search from each output of a region back along dominators."""
    above = _dominators(region.graph)
    for node in _leaves(region.graph):
        current: fx.Node | str | None = node
        while isinstance(current, fx.Node):
            weight = outputs.get((region.fqn, current.name))
            if weight is not None:
                yield weight
                break
            if _is_secondary_output(current):
                break
            if current.op == "call_module":
                child = join(region.fqn, str(current.target))
                if any(name == child or name.startswith(f"{child}.") for name in with_sites):
                    if child in capture.regions and not _is_block(capture.model, child):
                        yield from _descend(capture, capture.regions[child], outputs, with_sites)
                    break
            current = above.get(current)


def _is_secondary_output(node: fx.Node) -> bool:
    """Return True if a node selects a secondary part of a module's output, such as states or features."""
    of_module = bool(node.args) and getattr(node.args[0], "op", "") == "call_module"
    part = node.args[1] if of_module and len(node.args) > 1 else None
    return node.target in (getattr, operator.getitem) and (
        (isinstance(part, int) and part != 0)
        or (isinstance(part, str) and part not in _MAIN_OUTPUTS)
    )


def _dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node | str]:
    # The import takes a third of a second. Most models of libraries name their head and do not need it.
    import networkx as nx

    flow = nx.DiGraph()
    flow.add_node(_SOURCE)
    for node in graph.nodes:
        if node.op == "placeholder":
            flow.add_edge(_SOURCE, node)
        for user in node.users:
            if node.op != "get_attr":
                flow.add_edge(node, user)
    dominators: dict[fx.Node, fx.Node | str] = nx.immediate_dominators(flow, _SOURCE)
    return dominators


def _leaves(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that a graph returns."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return list(output.all_input_nodes)


def _is_block(model: nn.Module, fqn: str) -> bool:
    """Return True if a module has siblings of its class and children, as a layer of a transformer has."""
    module = model.get_submodule(fqn)
    parent, _, _ = fqn.rpartition(".")
    if isinstance(module, nn.Sequential) and fqn.rpartition(".")[2] in _HEAD_NAMES:
        # The classes of its children do not show that a Sequential is a head, but its name does.
        return False
    kinds = Counter(type(child) for child in model.get_submodule(parent).children())
    return kinds[type(module)] > 1 and any(True for _ in module.children())


# Names of functions, methods and ATen operators, each with its parameters as `arguments` reads them.
_CHOICES = {
    "topk": "input|self k=None dim=-1",
    "argmax": "input|self dim=None",
    "max": "input|self dim=None",
    "sort": "input|self dim=-1",
    "argsort": "input|self dim=-1",
}
_KEEPING = frozenset(
    (
        *("softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "tanh", "relu"),
        *("softplus", "sqrt", "exp", "neg", "abs", "clamp", "clamp_", "nan_to_num", "dropout"),
        *("add", "sub", "mul", "div", "truediv", "true_divide", "where", "masked_fill"),
        *("add_", "sub_", "mul_", "div_", "masked_fill_", "iadd", "isub", "imul", "itruediv"),
        *("to", "float", "double", "half", "bfloat16", "type", "type_as", "_to_copy"),
        *("contiguous", "clone", "detach", "alias", "view", "reshape", "_unsafe_view", "flatten"),
        *("unflatten", "unsqueeze", "squeeze", "expand", "getitem", "getattr"),
        *("topk", "sort", "sum", "amax"),  # the best of each group
    )
)


def find_routers(capture: Capture, matches: Matches) -> Matches:
    """Mark the routers among the sites of a model.

    Args:
        capture: The model.
        matches: Its linear operations.

    Returns:
        The matches with ``Site.router`` set.
    """
    experts = _experts(capture.model)
    if not experts:
        return matches
    # Built on first use, because most models have no candidate.
    flow = functools.cache(lambda: _Flow(capture))

    def marked(site: Site) -> Site:
        if site.family != "linear" or site.experts is not None or site.out_features == 1:
            return site
        above = _above(site.owner)
        if not any(site.out_features in experts.get(name, ()) for name in above):
            return site
        counts: list[int] = []

        def chooses(region: Region, user: fx.Node, value: fx.Node) -> bool:
            chosen = _chooses(region, user, value)
            counts.extend([_number_chosen(user)] if chosen else [])
            return chosen

        arrives = any(
            flow().follow(call.region, call.output, chooses, _KEEPING).arrives
            for call in site.calls
        )
        return dataclasses.replace(site, router=True, chosen=max(counts)) if arrives else site

    return dataclasses.replace(matches, sites=tuple(marked(site) for site in matches.sites))


def _experts(model: nn.Module) -> dict[str, set[int]]:
    """Return the numbers of experts that each module may have: lengths of its lists and stacks, by FQN."""
    counts: dict[str, set[int]] = defaultdict(set)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            counts[name.rpartition(".")[0]].add(len(module))
            counts[name].add(len(module))
        for value in module._parameters.values():
            if value is not None and not is_lazy(value) and value.dim() == 3:
                counts[name].add(value.shape[0])
                counts[name.rpartition(".")[0]].add(value.shape[0])
    return counts


def _above(owner: str) -> Iterator[str]:
    """Yield the FQNs of a module, of its parent and of its grandparent."""
    for _ in range(3):
        yield owner
        if not owner:
            return
        owner = owner.rpartition(".")[0]


def find_losses(capture: Capture, matches: Matches) -> Matches:
    """Mark the heads whose loss may be computed in chunks, and note the reason for the others.

    Only reasons that hold for every call are found here. Each call is checked again when it runs.

    Args:
        capture: The model.
        matches: Its linear operations, with the head marked.

    Returns:
        The matches with ``Site.loss`` set.
    """
    flow = _Flow(capture)
    losses = any(
        flow.ends_in_loss(region, node)
        for region in capture.regions.values()
        for node in region.graph.nodes
    )
    known = {site.weight for site in matches.sites if site.head}
    if "" not in capture.regions and not known:
        # The head is the last child with weights. A loss, metrics or a dropout may come after it.
        children = capture.model.named_children()
        known.update(
            _named([name for name, child in children if _has_weights(child)], matches.sites)
        )

    def marked(site: Site) -> Site:
        is_head = site.weight in known
        if site.family != "linear" or site.experts is not None or not (is_head or losses):
            return site
        reason = _why_whole(capture, site)
        paths = [
            flow.follow(call.region, call.output, flow.takes_loss, _TO_LOSS) for call in site.calls
        ]
        arrives = any(path.arrives for path in paths)
        if not (is_head or arrives):
            return site
        readers = sorted({name for path in paths for name in path.other_readers})
        if reason is None and arrives and readers:
            reason = f"they are read by {readers[0]}, too"
        if reason is None and not arrives and _has_no_optional_arguments(capture):
            reason = "no cross entropy of them is computed in the model's forward"
        return dataclasses.replace(site, loss=reason or "chunked")

    return dataclasses.replace(matches, sites=tuple(map(marked, matches.sites)))


def _why_whole(capture: Capture, site: Site) -> str | None:
    """Return the reason why the logits of a head cannot be computed in chunks, or None."""
    if site.quantized is not None:
        return "the head's weight is quantized"
    if site.out_features <= site.in_features:
        return (
            f"they are no larger than what the head reads ({site.out_features} and "
            f"{site.in_features} numbers)"
        )
    if any(call.left or call.axes != (-1,) for call in site.calls) or site.rows is not None:
        return "the head's outputs are not the last axis"
    regions = [capture.regions[call.region] for call in site.calls]
    if any("forward" in vars(region.module) for region in regions):
        return "the forward of the head was set on the instance"
    return None


def _has_no_optional_arguments(capture: Capture) -> bool:
    """Return True if the root has a graph and its forward has no optional arguments.

    A cross entropy that is not in the graph is then computed in no call.
    """
    if "" not in capture.regions:
        return False
    parameters = inspect.signature(capture.model.forward).parameters.values()
    return all(
        parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        for parameter in parameters
    )


_LOSSES = frozenset({"cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd"})
_TO_LOSS = _KEEPING | {
    *("transpose", "permute", "movedim", "slice", "select", "narrow", "index", "index_select"),
}


class _Path(NamedTuple):
    """Result of a search that starts at a value.

    Attributes:
        arrives: True if the value reaches the node that was searched for.
        other_readers: Names of operations that read the value and are not known to keep its last axis.
    """

    arrives: bool
    other_readers: frozenset[str]


class _Flow:
    """Search that follows an output from graph to graph, along operations that keep its last axis."""

    def __init__(self, capture: Capture) -> None:
        self._regions = capture.regions
        self._callers: dict[str, list[tuple[Region, fx.Node]]] = defaultdict(list)
        for region in self._regions.values():
            for node in region.graph.nodes:
                if node.op == "call_module":
                    self._callers[join(region.fqn, str(node.target))].append((region, node))
        self._modules = dict(capture.model.named_modules())

    def follow(
        self,
        key: str,
        name: str,
        arrives: Callable[[Region, fx.Node, fx.Node], bool],
        through: frozenset[str],
    ) -> _Path:
        """Follow the output of a node from reader to reader, up to a target.

        Args:
            key: Key of the region.
            name: Name of the node.
            arrives: Function that returns True for the target. Its arguments are a region, a node that reads
                the value, and the value.
            through: Names of the operations that keep the last axis.
        """
        region = self._regions.get(key)
        if region is None:
            return _Path(False, frozenset())
        start = next((node for node in region.graph.nodes if node.name == name), None)
        pending = [] if start is None else [(region, start)]
        seen: set[tuple[str, fx.Node]] = set()
        reaches_target, unknown = False, set()
        while pending:
            region, node = pending.pop()
            for user in node.users:
                if arrives(region, user, node):
                    reaches_target = True
                    continue
                if _asks_for_shape(user):
                    continue
                record = isinstance(user.target, type)  # a class that collects outputs
                known = record or user.op in ("output", "call_module") or _name(user) in through
                unknown |= set() if known else {_name(user)}
                for reached in self._reached(region, node, user, through):
                    visited = (reached[0].fqn, reached[1])
                    if visited not in seen:
                        seen.add(visited)
                        pending.append(reached)
        return _Path(reaches_target, frozenset(unknown))

    def ends_in_loss(self, region: Region, node: fx.Node) -> bool:
        """Return True if a node computes a cross entropy."""
        if node.op == "call_module":
            module = region.submodule(node)
            return isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss)
        return _name(node) in _LOSSES

    def takes_loss(self, region: Region, user: fx.Node, node: fx.Node) -> bool:
        """Return True if `user` computes a cross entropy of the value of `node`."""
        inputs = (*user.args[:1], user.kwargs.get("input"))
        return any(value is node for value in inputs) and self.ends_in_loss(region, user)

    def _reached(
        self, region: Region, node: fx.Node, user: fx.Node, through: frozenset[str]
    ) -> Iterator[tuple[Region, fx.Node]]:
        if user.op == "output":
            yield from self._returned(region, node, user)
        elif user.op == "call_module":
            yield from self._entered(region, node, user)
        elif _name(user) in through:
            yield region, user

    def _returned(
        self, region: Region, node: fx.Node, output: fx.Node
    ) -> Iterator[tuple[Region, fx.Node]]:
        value = output.args[0]
        for caller, call in self._callers[region.fqn]:
            if value is node:
                yield caller, call
            elif isinstance(value, tuple | list):
                indices = [index for index, item in enumerate(value) if item is node]
                yield from (
                    (caller, user)
                    for user in call.users
                    if _name(user) == "getitem" and user.args[1] in indices
                )

    def _entered(
        self, region: Region, node: fx.Node, call: fx.Node
    ) -> Iterator[tuple[Region, fx.Node]]:
        name = join(region.fqn, str(call.target))
        inner, module = self._regions.get(name), self._modules.get(name)
        if inner is not None:
            inputs = [candidate for candidate in inner.graph.nodes if candidate.op == "placeholder"]
            values = [*zip(inputs, call.args, strict=False)]
            values += [(named, call.kwargs.get(str(named.target))) for named in inputs]
            yield from ((inner, placeholder) for placeholder, value in values if value is node)
        elif module is not None and not _has_weights(module):
            # An activation or a dropout, which has no graph.
            yield region, call


def _asks_for_shape(node: fx.Node) -> bool:
    """Return True if a node reads only the shape, dtype or device of a tensor."""
    if _name(node) == "getattr":
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return _name(node) in ("size", "sym_size", "dim", "numel", "len")


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _name(node: fx.Node) -> str:
    target: Any = target_of(node)
    if isinstance(target, torch_private.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", ""))


def _chooses(_: Region, user: fx.Node, value: fx.Node) -> bool:
    """Return True if ``user`` chooses experts by the scores in ``value``, along the last axis."""
    declared = _CHOICES.get(_name(user))
    if declared is None or user.args[:1] != (value,):
        return False
    dim = arguments(user, declared)["dim"]
    # Counted from the front the last axis is 1 of [tokens, experts], and 2 of [batch, sequence, experts].
    if not isinstance(dim, int) or (dim != -1 and dim <= 0):
        return False
    if _name(user) in ("argmax", "argsort"):
        return True
    # The largest values alone choose nothing: their indices do.
    return any(_is_index(part) and part.users for part in user.users)


def _number_chosen(node: fx.Node) -> int:
    """Return how many experts a node chooses for each token; 0 if the number is not a constant."""
    if _name(node) in ("argmax", "max"):
        return 1
    count = arguments(node, _CHOICES["topk"])["k"] if _name(node) == "topk" else None
    return count if isinstance(count, int) else 0


def _is_index(node: fx.Node) -> bool:
    return _name(node) in ("getitem", "getattr") and node.args[1] in (1, "indices")


# --- parts of fused outputs -----------------------------------------------------------------------


_aten = torch.ops.aten
_T = torch.Tensor
_SHAPES = (
    *(_T.view, _T.reshape, torch.reshape, _T.unflatten, torch.unflatten),
    *(_aten.view.default, _aten.reshape.default, torch_private.UNSAFE_VIEW),
)
_NARROW = (torch.narrow, _T.narrow)
_UNBIND = (torch.unbind, _T.unbind, _aten.unbind.int)
_SELECT = (torch.select, _T.select, _aten.select.int)
_PERMUTE = (torch.permute, _T.permute, _aten.permute.default)
_TRANSPOSE = (torch.transpose, _T.transpose, _aten.transpose.int)
# The features are the last dimension, which is 2 of [batch, sequence, features].
_LAST = (-1, 2)

_Rows = tuple[int, int]


def find_parts(capture: Capture, matches: Matches) -> Matches:
    """Mark the parts of the sites whose output is divided.

    Args:
        capture: The model.
        matches: Its linear operations.

    Returns:
        The matches with ``Site.parts`` set.
    """
    callers = _callers(capture)

    def marked(site: Site) -> Site:
        if not site.divisible:
            return site
        seen = {_division(node, site.out_features) for node in _outputs(capture, site, callers)}
        seen.discard(())
        if len(seen) != 1:
            return site
        (ranges,) = seen
        names = part_names(site.weight, ranges)
        return dataclasses.replace(site, parts=tuple(zip(names, ranges, strict=True)))

    return dataclasses.replace(matches, sites=tuple(marked(site) for site in matches.sites))


def _callers(capture: Capture) -> dict[int, list[fx.Node]]:
    """Return the nodes that call each module, in complete and in partial graphs, by the module's id."""
    callers: dict[int, list[fx.Node]] = defaultdict(list)
    graphs = {fqn: region.graph for fqn, region in capture.regions.items()}
    modules = dict(capture.model.named_modules(remove_duplicate=False))
    for fqn, graph in {**capture.begun, **graphs}.items():
        for node in graph.nodes:
            if node.op == "call_module":
                module = modules.get(join(fqn, str(node.target)))
                callers[id(module)].append(node)
    return callers


def _outputs(capture: Capture, site: Site, callers: dict[int, list[fx.Node]]) -> Iterator[fx.Node]:
    """Yield the nodes whose value is the output of a site."""
    for call in site.calls:
        region = capture.regions[call.region]
        node = next(node for node in region.graph.nodes if node.name == call.output)
        yield node
        # Conv1D of GPT-2 reshapes its output.
        final = next(iter(node.users), node)
        for last in (node, final):
            if any(user.op == "output" and user.args[0] is last for user in last.users):
                yield from callers.get(id(region.module), ())


def _division(node: fx.Node, size: int) -> tuple[_Rows, ...]:
    """Return the ranges into which the users of a node divide its whole last dimension, or ()."""
    cuts: set[_Rows] = set()
    for user in node.users:
        cuts.update(_cuts(user, size))
    ordered = sorted(cuts)
    edges = [0, *(stop for _, stop in ordered)]
    whole = [start for start, _ in ordered] == edges[:-1] and edges[-1] == size
    return tuple(ordered) if whole and len(ordered) > 1 else ()


def _cuts(user: fx.Node, size: int) -> Iterator[_Rows]:
    """Yield the ranges of the last dimension, of this size, that a node takes from its input."""
    target = target_of(user)
    if splits(user):
        if arguments(user, SPLIT)["dim"] in _LAST:
            yield from _between(part_lengths(user, size))
    elif target in _SHAPES:
        yield from _viewed(user, size)
    elif target is operator.getitem:
        index = user.args[1]
        if isinstance(index, tuple) and index[:-1] == (Ellipsis,):
            yield from _sliced(index[-1], size)
    elif target is _aten.slice.Tensor:
        named = arguments(user, "input|self dim=0 start=None end=None step=1")
        if named["dim"] in _LAST:
            yield from _sliced(slice(named["start"], named["end"], named["step"]), size)
    elif target in _NARROW:
        named = arguments(user, "input|self dim start length")
        start, length = named["start"], named["length"]
        if named["dim"] in _LAST and isinstance(start, int) and isinstance(length, int):
            yield start, start + length


def _between(lengths: Iterable[int]) -> Iterator[_Rows]:
    """Yield consecutive ranges of some lengths, from 0 on."""
    edges = [0, *itertools.accumulate(lengths)]
    return itertools.pairwise(edges)


def _sliced(index: Any, size: int) -> Iterator[_Rows]:
    if not isinstance(index, slice) or index.step not in (None, 1):
        return
    if not all(isinstance(bound, int | None) for bound in (index.start, index.stop)):
        return
    start, stop, _ = index.indices(size)
    if (start, stop) != (0, size):
        yield start, stop


def _viewed(user: fx.Node, size: int) -> Iterator[_Rows]:
    """Yield the parts of a value that is reshaped, as to ``(batch, length, 3, heads, -1)``, and then split.

    The split is along the dimension of size 3. If the heads come before this dimension, the parts are not
    ranges of rows. Nothing is yielded then.
    """
    shape: tuple[Any, ...] = user.args[1:]
    before = 0
    if target_of(user) in (_T.unflatten, torch.unflatten):
        shape, before = (shape[1:], 2) if shape[0] in _LAST else ((), 0)
    sizes = list(shape[0]) if shape and isinstance(shape[0], list | tuple) else list(shape)
    for first, count in enumerate(sizes):
        if not isinstance(count, int) or count < 1:
            continue
        known = [s for s in sizes[first:] if isinstance(s, int) and s > 0]
        open_ones = len(sizes) - first - len(known)
        product = math.prod(known)
        if (product == size and not open_ones) or (size % product == 0 and open_ones == 1):
            if count > 1 and _taken_apart(user, before + first, before + len(sizes)):
                yield from _between([size // count] * count)
            return


def _taken_apart(node: fx.Node, axis: int, dims: int) -> bool:
    """Return True if a value is indexed or unbound along an axis, before or after a permutation."""
    for user in node.users:
        target = target_of(user)
        operands: tuple[Any, ...] = user.args[1:]
        if target in _UNBIND or splits(user):
            names = "input dim=0" if target in _UNBIND else SPLIT
            if arguments(user, names)["dim"] in (axis, axis - dims):
                return True
        elif target is operator.getitem:
            index = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
            if Ellipsis not in index and len(index) > axis and isinstance(index[axis], int):
                return True
        elif target in _SELECT:
            if operands[0] in (axis, axis - dims):
                return True
        elif target in _PERMUTE:
            order = operands[0] if isinstance(operands[0], list | tuple) else operands
            wanted = [d % dims for d in order if isinstance(d, int)]
            if axis in wanted and _taken_apart(user, wanted.index(axis), dims):
                return True
        elif target in _TRANSPOSE and all(isinstance(d, int) for d in operands):
            axis_a, axis_b = (d % dims for d in operands)
            moved = {axis_a: axis_b, axis_b: axis_a}.get(axis, axis)
            if _taken_apart(user, moved, dims):
                return True
    return False


# --- the passes -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mark(Pass):
    """Pass that marks some of the operations.

    Attributes:
        operations: The operations that the pass marks, in words.
        find: Returns the matches with the marks.
    """

    needs: ClassVar[str] = "matches"

    operations: str
    find: Callable[[Capture, Matches], Matches]

    @property
    def name(self) -> str:
        """Return the name for errors, logs and the command line."""
        return f"mark-{self.operations}"

    def __call__(self, capture: Capture) -> PassResult:
        """Set the marks in the matches of a capture."""
        assert capture.matches is not None
        return PassResult.of(capture, matches=self.find(capture, capture.matches))


MARKS = (
    Mark("head", find_head),
    Mark("linear layers", find_linear_layers),
    Mark("routers", find_routers),
    Mark("parts", find_parts),
)
"""The marks, in the order in which they run."""

LOSSES = Mark("losses", find_losses)
"""Mark that runs after `MARKS`, if losses are to be computed in chunks."""
