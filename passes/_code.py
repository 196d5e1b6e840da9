"""Which weights code reads by itself, where there is no graph that would show it.

A layer under a module without a graph can have an adapter, since the module calls it. But code may also
write ``F.linear(x, self.layer.weight)``, or call a method other than ``forward``: the adapter would then
never run, and a merge would change the output. The instructions of such code show what it reads.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_fx.passes._lazy import is_matrix
from lora_fx.passes._region import is_built_in, original_class
from lora_fx.types import join

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
    for fqn, owner, function in _reached(module, below, regions):
        reads = _reads(function.__code__)
        for path in reads.used:
            for name in _matrices(owner, path, below_each):
                yield join(fqn, name), function.__qualname__
        # Wrappers of PyTorch go through them to compare devices.
        walks = reads.walks and not function.__module__.startswith("torch.")
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
    for _, owner, function in _reached(module, [], frozenset()):
        for path in _reads(function.__code__).asked:
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
        names = _reads(function.__code__).names
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
        names: The names in it.
        used: The attribute paths whose values it uses.
        asked: Those that it asks how they are stored.
        walks: Whether it goes through all parameters of a module, beyond the first.
    """

    names: frozenset[str]
    used: tuple[Path, ...]
    asked: tuple[Path, ...]
    walks: bool


@functools.lru_cache(maxsize=4096)
def _reads(code: CodeType) -> _Reads:
    found = set(_paths(code))
    inner = [_reads(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    used, asked = (
        {path for path, metadata in found if not metadata},
        {path for path, metadata in found if metadata in _STORED},
    )
    return _Reads(
        frozenset(code.co_names).union(*(one.names for one in inner)),
        tuple(sorted(used.union(*(one.used for one in inner)))),
        tuple(sorted(asked.union(*(one.asked for one in inner)))),
        _walks(code) or any(one.walks for one in inner),
    )


def _walks(code: CodeType) -> bool:
    listed = _listed(code)
    for at, instruction in enumerate(listed):
        method = instruction.opname == "LOAD_METHOD" or "NULL|self" in instruction.argrepr
        if method and instruction.argval in _WALKS:
            # next(self.parameters()), and next(p.dtype for p in self.parameters()), take the first.
            before = [one.argval for one in listed[max(0, at - 5) : at]]
            if "next" not in before:
                return True
    return False


def _listed(code: CodeType) -> list[dis.Instruction]:
    skipped = ("CACHE", "EXTENDED_ARG", "PRECALL")
    return [one for one in dis.get_instructions(code) if one.opname not in skipped]


def _paths(code: CodeType) -> Iterator[tuple[Path, str]]:
    """Attribute paths, each with what is asked of it; empty where its value is used."""
    listed = _listed(code)
    root = code.co_varnames[0] if code.co_varnames and "self" in code.co_varnames[:1] else "self"
    for at, instruction in enumerate(listed):
        if "LOAD_FAST" not in instruction.opname and instruction.opname != "LOAD_DEREF":
            continue
        name = (
            instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
        )
        about_object = at > 0 and listed[at - 1].argval in _ABOUT_OBJECTS
        path, metadata = _followed(listed, at + 1)
        if path and not about_object:
            yield (path if name == root else (_ANYWHERE, *path[-1:])), metadata


def _followed(listed: list[dis.Instruction], at: int) -> tuple[Path, str]:
    """The attributes that are read one after the other, and the metadata that the last one is asked for."""
    path: list[str] = []
    while at < len(listed):
        name, value = listed[at].opname, listed[at].argval
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            if value in _METADATA:
                return tuple(path), value
            path.append(value)
        elif name.startswith("LOAD") and at + 1 < len(listed) and _subscripts(listed[at + 1]):
            path.append(_ANY)
            at += 1
        else:
            break
        at += 1
    return tuple(path), ""


def _subscripts(instruction: dis.Instruction) -> bool:
    return instruction.opname == "BINARY_SUBSCR" or instruction.argrepr == "[]"


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
