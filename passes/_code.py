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
from typing import Any

import torch
from torch import nn

from lora_fx.passes._lazy import is_matrix
from lora_fx.passes._region import is_built_in
from lora_fx.types import join

__all__ = ["weights_read"]

# Asked of a weight, these do not depend on its values.
_METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_meta"}
) | {*("size", "dim", "numel", "element_size", "is_floating_point", "stride", "data_ptr")}
_ABOUT_OBJECTS = ("isinstance", "hasattr", "getattr", "type", "id", "len")
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
    forward = module.__dict__.get("forward", type(module).forward)
    pending: list[tuple[str, nn.Module, Any]] = [("", module, forward)]
    done: set[tuple[str, str]] = set()
    while pending:
        fqn, owner, function = pending.pop()
        # Under every decorator, not the outermost alone.
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not isinstance(function, FunctionType) or (fqn, function.__qualname__) in done:
            continue
        done.add((fqn, function.__qualname__))
        names, paths = _reads(function.__code__)
        for path in paths:
            for name in _matrices(owner, path):
                yield join(fqn, name), function.__qualname__
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


@functools.lru_cache(maxsize=4096)
def _reads(code: CodeType) -> tuple[frozenset[str], tuple[Path, ...]]:
    """The names in a function's code, and the attribute paths whose values it uses."""
    names, paths = set(code.co_names), set(_paths(code))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            more_names, more_paths = _reads(constant)
            names |= more_names
            paths |= set(more_paths)
    return frozenset(names), tuple(sorted(paths))


def _paths(code: CodeType) -> Iterator[Path]:
    skipped = ("CACHE", "EXTENDED_ARG", "PRECALL")
    listed = [i for i in dis.get_instructions(code) if i.opname not in skipped]
    root = code.co_varnames[0] if code.co_varnames and "self" in code.co_varnames[:1] else "self"
    for at, instruction in enumerate(listed):
        if "LOAD_FAST" not in instruction.opname and instruction.opname != "LOAD_DEREF":
            continue
        name = (
            instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
        )
        asked = at > 0 and listed[at - 1].argval in _ABOUT_OBJECTS
        path, used = _followed(listed, at + 1)
        if path and used and not asked:
            yield path if name == root else (_ANYWHERE, *path[-1:])


def _followed(listed: list[dis.Instruction], at: int) -> tuple[Path, bool]:
    """The attributes that are read one after the other, and whether the last one's value is used."""
    path: list[str] = []
    while at < len(listed):
        name, value = listed[at].opname, listed[at].argval
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            if value in _METADATA:
                return tuple(path), False
            path.append(value)
        elif name.startswith("LOAD") and at + 1 < len(listed) and _subscripts(listed[at + 1]):
            path.append(_ANY)
            at += 1
        else:
            break
        at += 1
    return tuple(path), True


def _subscripts(instruction: dis.Instruction) -> bool:
    return instruction.opname == "BINARY_SUBSCR" or instruction.argrepr == "[]"


def _matrices(owner: nn.Module, path: Path) -> Iterator[str]:
    """Names of the matrices that a path leads to, itself or on the way to a method of theirs."""
    if path[0] == _ANYWHERE:
        for name, matrix in owner.named_parameters():
            if name.rpartition(".")[2] == path[1] and is_matrix(matrix) and "." in name:
                yield name
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
