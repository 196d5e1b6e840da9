"""Who reads a weight, apart from the operation that it is matched with.

An adapter changes one use of a weight, a merge all of them: what else reads it decides whether it can be
adapted at all.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections import defaultdict
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from lora_fx.ir import Capture, Region, Rejection, join
from lora_fx.passes.graph import is_built_in, is_matrix, nested, original_class, target_of, tree_of
from lora_fx.passes.patterns import itemised, site_name, splits, weight_of

__all__ = [
    "Path",
    "Read",
    "nameless",
    "no_product",
    "read_by_code",
    "readers",
    "weights_asked",
    "weights_read",
]


# Asked of a weight, these do not depend on its values.
_METADATA = frozenset({"shape", "dtype", "device", "ndim", "requires_grad", "layout"})
_METADATA_METHODS = frozenset(
    {"size", "dim", "numel", "element_size", "is_floating_point", "stride"}
)
_METADATA_ATTRIBUTES = (
    (_METADATA - {"layout"}) | _METADATA_METHODS | {"is_cuda", "is_meta", "data_ptr"}
)
# Those that say how it is stored: another answer, another result.
_STORED = _METADATA_METHODS | {"dtype", "shape", "ndim"}
_ABOUT_OBJECTS = ("isinstance", "hasattr", "getattr", "type", "id", "len")
# What gives all of a module's tensors, one after the other.
_WALKS = frozenset({"parameters", "named_parameters", "state_dict"})
_ANY, _ANYWHERE = "*", "**"

Path = tuple[str, ...]


def weights_read(module: nn.Module, regions: frozenset[nn.Module]) -> Iterator[tuple[str, str]]:
    """The matrices that the code of a module without a graph reads.

    Args:
        module: The module.
        regions: Modules with a graph: their ``forward`` is not looked at.

    Yields:
        The name of each matrix, relative to ``module``, and that of the function that reads it.
    """
    below = [(name, m) for name, m in module.named_modules() if name and not _without_code(m)]
    below_each: dict[nn.Module, dict[str, list[str]]] = {}
    for fqn, owner, function, reads in _reached(module, below, regions):
        for path in reads.used:
            for name in _matrices(owner, path, below_each):
                yield join(fqn, name), function.__qualname__
        # Wrappers of PyTorch go through them to compare devices.
        walks = reads.walks and not (function.__module__ or "").startswith("torch.")
        for name, parameter in owner.named_parameters() if walks else ():
            if is_matrix(parameter):
                yield join(fqn, name), function.__qualname__


def weights_asked(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The matrices of whose dtype or shape the code of a module, not of those below it, makes use.

    Args:
        module: Any module.

    Yields:
        As :func:`weights_read` does.
    """
    below_each: dict[nn.Module, dict[str, list[str]]] = {}
    for _, owner, function, reads in _reached(module, [], frozenset()):
        for path in reads.asked:
            for name in _matrices(owner, path, below_each):
                yield name, function.__qualname__


def _reached(
    module: nn.Module, below: list[tuple[str, nn.Module]], regions: frozenset[nn.Module]
) -> Iterator[tuple[str, nn.Module, FunctionType, _Reads]]:
    """The functions that a module's forward may call, of its own and of given modules, and what they read."""
    if _without_code(module):
        return
    leaves: dict[nn.Module, set[str]] = {}
    forward = module.__dict__.get("forward", original_class(module).forward)
    pending: list[tuple[str, nn.Module, Any]] = [("", module, forward)]
    done: set[tuple[str, str]] = set()
    while pending:
        fqn, owner, function = pending.pop()
        # Under every decorator, not the outermost alone.
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not isinstance(function, FunctionType) or (fqn, function.__qualname__) in done:
            continue
        done.add((fqn, function.__qualname__))
        yield fqn, owner, function, _reads_of(function, owner, leaves)
        names = _names(function.__code__)
        called = [(fqn, owner)] + (below if owner is module else [])
        for name, one in called:
            pending.extend(
                (name, one, getattr(type(one), method))
                for method in names & _methods(type(one))
                if method != "forward" or one not in regions
            )


def _without_code(module: nn.Module) -> bool:
    return is_built_in(module) or isinstance(module, torch.jit.ScriptModule)


def _methods(cls: type[nn.Module]) -> frozenset[str]:
    """Functions of a class and of those above it, short of ``nn.Module``."""
    found: set[str] = set()
    for one in cls.__mro__:
        if one is nn.Module:
            break
        found.update(k for k, v in one.__dict__.items() if isinstance(v, FunctionType))
    return frozenset(name for name in found if not name.startswith("__"))


class _Reads(NamedTuple):
    """What a function's code reads.

    Attributes:
        used: The attribute paths whose values it uses.
        asked: Those that it asks how they are stored.
        walks: Whether it goes through all parameters of a module, beyond the first.
    """

    used: tuple[Path, ...]
    asked: tuple[Path, ...]
    walks: bool


_NONE = _Reads((), (), False)


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """The names of attributes and globals in code."""
    return frozenset(name for part in nested(code) for name in part.co_names)


@functools.lru_cache(maxsize=4096)
def _spelled(code: CodeType) -> frozenset[str]:
    """The same, and texts that ``getattr`` may look up."""
    texts = (one for part in nested(code) for one in part.co_consts if isinstance(one, str))
    return _names(code).union(texts)


def _reads_of(
    function: FunctionType, owner: nn.Module, leaves: dict[nn.Module, set[str]]
) -> _Reads:
    """What a function reads; the source is looked at if it names a matrix below, or all of them.

    Args:
        function: The function.
        owner: The module whose method it is.
        leaves: What was found before: the last parts of the names of matrices.
    """
    if owner not in leaves:
        named = owner.named_parameters()
        leaves[owner] = {name.rpartition(".")[2] for name, p in named if is_matrix(p)}
    names = _spelled(function.__code__)
    if names.isdisjoint(leaves[owner]) and names.isdisjoint(_WALKS):
        return _NONE
    return _reads(function.__code__, function.__qualname__)


@functools.lru_cache(maxsize=4096)
def _reads(code: CodeType, qualname: str) -> _Reads:
    found = tree_of(code, qualname)
    if isinstance(found, str):
        return _reads_by_name(code)
    looked = _Looks(code)
    tree = found[0]
    for one in [tree.body] if isinstance(tree, ast.Lambda) else tree.body:
        looked.visit(one)
    used = {path for path, asked in looked.found if not asked}
    stored = {path for path, asked in looked.found if asked in _STORED}
    return _Reads(tuple(sorted(used)), tuple(sorted(stored)), looked.walks)


def _reads_by_name(code: CodeType) -> _Reads:
    """Return what code may read, judged by its names alone."""
    names = sorted(_spelled(code))
    paths = tuple(path for name in names for path in ((name,), (_ANYWHERE, name)))
    walks = not _WALKS.isdisjoint(names) and "next" not in names
    return _Reads(paths, () if _STORED.isdisjoint(names) else paths, walks)


class _Looks(ast.NodeVisitor):
    """Finds the attributes that a function reads, one after the other: ``self.layers[0].weight``.

    Attributes:
        found: Attribute paths, each with what is asked of it; empty where its value is used.
        walks: Whether it goes through all parameters of a module.
    """

    def __init__(self, code: CodeType) -> None:
        self.found: set[tuple[Path, str]] = set()
        self.walks = False
        parts = list(nested(code))
        self._variables = {
            name for one in parts for name in (*one.co_varnames, *one.co_cellvars, *one.co_freevars)
        }
        self._owner = code.co_varnames[0] if code.co_argcount else "self"
        self._firsts: set[ast.AST] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A path that ends here."""
        self._follow(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """A path that ends here."""
        self._follow(node)

    def visit_Call(self, node: ast.Call) -> None:
        """A call, which may look at an object and not at what it holds."""
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "next" and node.args:
            self._firsts.add(_first_asked(node.args[0]))
        if isinstance(node.func, ast.Attribute) and node.func.attr in _WALKS:
            self.walks |= node not in self._firsts
        if _named_by_text(node) is not None:
            self._follow(node)
        elif name in _ABOUT_OBJECTS and node.args:
            self._follow(node.args[0], use=False)
            for one in (*node.args[1:], *(keyword.value for keyword in node.keywords)):
                self.visit(one)
        else:
            self.generic_visit(node)

    def _follow(self, node: ast.AST, *, use: bool = True) -> None:
        """Notes a path, and visits what is on the way."""
        steps: list[str] = []
        while True:
            text = _named_by_text(node)
            if text is not None:
                assert isinstance(node, ast.Call)
                for default in node.args[2:]:
                    self.visit(default)
                steps.append(text)
                node = node.args[0]
            elif isinstance(node, ast.Attribute):
                steps.append(node.attr)
                node = node.value
            elif isinstance(node, ast.Subscript):
                self.visit(node.slice)
                # Of several layers some are still those layers.
                steps.extend(() if isinstance(node.slice, ast.Slice) else (_ANY,))
                node = node.value
            else:
                break
        if not isinstance(node, ast.Name):
            self.visit(node)
        elif use and node.id in self._variables:
            self._note(node.id, tuple(reversed(steps)))

    def _note(self, root: str, steps: Path) -> None:
        ends = [place for place, step in enumerate(steps) if step in _METADATA_ATTRIBUTES]
        path, asked = (steps[: ends[0]], steps[ends[0]]) if ends else (steps, "")
        if path:
            self.found.add((path if root == self._owner else (_ANYWHERE, path[-1]), asked))


def _named_by_text(node: ast.AST) -> str | None:
    """The attribute that a call of ``getattr`` reads; None for any other node."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return None
    if (
        node.func.id != "getattr"
        or len(node.args) < 2
        or not isinstance(node.args[1], ast.Constant)
    ):
        return None
    text = node.args[1].value
    return text if isinstance(text, str) else None


def _first_asked(node: ast.AST) -> ast.AST:
    """What ``next`` takes the first of: in ``next(p.dtype for p in self.parameters())`` the parameters."""
    if isinstance(node, ast.GeneratorExp):
        return _first_asked(node.generators[0].iter)
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if called and node.func.id == "iter" and node.args:  # type: ignore[attr-defined]
        return _first_asked(node.args[0])  # type: ignore[attr-defined]
    return node


def _matrices(
    owner: nn.Module, path: Path, below_each: dict[nn.Module, dict[str, list[str]]]
) -> Iterator[str]:
    """Names of the matrices that a path leads to, itself or on the way to a method of theirs.

    Args:
        owner: Where the path starts.
        path: The attributes.
        below_each: What was found below modules before: names of matrices by their last part.
    """
    if path[0] == _ANYWHERE:
        if owner not in below_each:
            by_leaf: dict[str, list[str]] = {}
            for name, matrix in owner.named_parameters():
                if "." in name and is_matrix(matrix):
                    by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
            below_each[owner] = by_leaf
        yield from below_each[owner].get(path[1], ())
        return
    found: list[tuple[str, nn.Module]] = [("", owner)]
    for step in path:
        for name, one in found:
            parameter = one._parameters.get(step)
            if is_matrix(parameter):
                yield join(name, step)
        found = [
            (join(name, key), child)
            for name, one in found
            for key, child in one.named_children()
            if step in (_ANY, key)
        ]


# What gives a weight another form, and says nothing about what is done with it.
_FORMS = frozenset(
    {"view", "reshape", "expand", "expand.default", "repeat", "unsqueeze", "squeeze", "clone", "to"}
)
# What is done with tables, tokens and biases of two dimensions: nothing that a low-rank factor stands for.
_NO_PRODUCTS = frozenset(
    {"add", "iadd", "add_", "add.Tensor", "cat", "concat", "cat.default", "stack", "attend"}
)


@dataclasses.dataclass(frozen=True)
class Read:
    """A node that reads the values of a weight, and what it does."""

    region: str
    node: str
    what: str


def readers(capture: Capture) -> dict[str, list[Read]]:
    """By FQN of each matrix: the nodes that read its values, transposes passed over."""
    result: dict[str, list[Read]] = defaultdict(list)
    for region in capture.regions.values():
        for node in region.graph.nodes:
            parameter = region.parameter(node)
            if not is_matrix(parameter):
                continue
            name = join(region.fqn, str(node.target))
            for user in _consumers(node, region):
                result[name].append(
                    Read(region.key, user.name, itemised(target_of(user) or user.target))
                )
    return result


def no_product(weight: str, reads: list[Read]) -> Rejection | None:
    """Return the reason for a weight without a matching operation; None where none is expected."""
    # A bias for each expert is a table, too.
    if all(read.what in _NO_PRODUCTS for read in reads) or weight.endswith("bias"):
        return None
    name = site_name(weight)
    return Rejection(name, f"its only use is by {reads[0].what}, not a linear operation")


def nameless(capture: Capture) -> dict[str, Rejection]:
    """Tied weights that a graph reads without saying by which of their names.

    A trace calls every one of them by the first. Merging unties, so that it would matter.
    """
    result = {}
    everywhere = _places(capture.model)
    for region in capture.regions.values():
        read = [(n, p) for n in region.graph.nodes if (p := region.parameter(n)) is not None]
        if not any(
            "." in str(node.target) or len(region.module._parameters) > 1 for node, _ in read
        ):
            continue
        places = _places(region.module)
        for node, parameter in read:
            names = {join(region.fqn, name) for name in places[id(parameter)].values()}
            # A module under two names: its own graph has the first, one that reads it, the other.
            names.update(everywhere[id(parameter)][place] for place in places[id(parameter)])
            if len(names) == 1 or not is_matrix(parameter):
                continue
            reason = (
                f"its weight is one parameter under several names ({', '.join(sorted(names))}), "
                "and a forward reads it directly: call the module that holds it, or use one name"
            )
            for name in names:
                result[name] = Rejection(site_name(name), reason, region.fqn, node.name)
    return result


def _places(module: nn.Module) -> dict[int, dict[tuple[int, str], str]]:
    """By parameter: where it is registered, with a name for each place."""
    places: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)
    for fqn, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                places[id(parameter)][id(owner), key] = join(fqn, key)
    return places


def _consumers(node: fx.Node, region: Region) -> Iterator[fx.Node]:
    for user in node.users:
        looks = weight_of(user, region) is not None or splits(user)
        if looks or itemised(target_of(user) or user.target) in _FORMS:
            yield from _consumers(user, region)
        elif not _asks_metadata(user):
            yield user


def _asks_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    return node.target is getattr and node.args[1] in _METADATA


def _applied(module: nn.Module) -> Iterator[tuple[str, str]]:
    """What a layer of PyTorch without a graph applies: its own matrices."""
    for name, parameter in module._parameters.items():
        if is_matrix(parameter):
            yield name, f"{type(module).__qualname__}.forward"


def read_by_code(capture: Capture) -> dict[str, Rejection]:
    """Matrices that a module without a graph does more with than call the layer that holds them."""
    result: dict[str, Rejection] = {}
    graphs = frozenset(region.module for region in capture.regions.values())
    first = {module: fqn for fqn, module in capture.model.named_modules()}
    for fqn in capture.opaque:
        module = capture.model.get_submodule(fqn)
        read = _applied(module) if is_built_in(module) else weights_read(module, graphs)
        for name, reader in read:
            owner, _, key = join(fqn, name).rpartition(".")
            weight = join(first[capture.model.get_submodule(owner)], key)
            reason = (
                f"its weight is also read by {reader}, which has no graph "
                f"({capture.opaque[fqn]}): an adapter would not be applied there"
            )
            result.setdefault(weight, Rejection(site_name(weight), reason, fqn))
    return result
