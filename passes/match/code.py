"""Which weights code reads by itself, where there is no graph that would show it.

A layer under a module without a graph can have an adapter, since the module calls it. But code may also
write ``F.linear(x, self.layer.weight)``, or call a method other than ``forward``: the adapter would then
never run, and a merge would change the output. The source of such code shows what it reads, if it is that of
the code (:mod:`lora_fx.passes.graph.source`). Of other code only the names are known: all that they may mean
counts.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_fx.ir.values import join
from lora_fx.passes.graph.lazy import is_matrix
from lora_fx.passes.graph.region import is_built_in, original_class
from lora_fx.passes.graph.source import nested, tree_of

__all__ = ["weights_asked", "weights_read"]

# Asked of a weight, these do not depend on its values.
_METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_meta"}
) | {*("size", "dim", "numel", "element_size", "is_floating_point", "stride", "data_ptr")}
# Those that say how it is stored: another answer, another result.
_STORED = frozenset(
    {"dtype", "shape", "ndim", "size", "dim", "numel", "element_size", "stride"}
) | {"is_floating_point"}
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
    if _without_code(module):
        return
    below = [(name, m) for name, m in module.named_modules() if name and not _without_code(m)]
    below_each: dict[nn.Module, dict[str, list[str]]] = {}
    leaves: dict[nn.Module, set[str]] = {}
    for fqn, owner, function in _reached(module, below, regions):
        reads = _reads_of(function, owner, leaves)
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
    if _without_code(module):
        return
    below_each: dict[nn.Module, dict[str, list[str]]] = {}
    leaves: dict[nn.Module, set[str]] = {}
    for _, owner, function in _reached(module, [], frozenset()):
        reads = _reads_of(function, owner, leaves)
        for path in reads.asked:
            for name in _matrices(owner, path, below_each):
                yield name, function.__qualname__


def _reached(
    module: nn.Module, below: list[tuple[str, nn.Module]], regions: frozenset[nn.Module]
) -> Iterator[tuple[str, nn.Module, FunctionType]]:
    """The functions that a module's forward may call: its own, and those of the modules that are given."""
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
        yield fqn, owner, function
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
    """What code may read, by the names in it alone."""
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
        ends = [place for place, step in enumerate(steps) if step in _METADATA]
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
