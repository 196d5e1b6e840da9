"""When are two modules the same picture? Merkle hashes of modules, and runs of equal siblings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from lora_fx.ir.values import META_KEY
from lora_fx.passes.graph.region import original_class

__all__ = ["Digests", "children_of", "follows", "label_of", "runs", "target_name"]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_NUMBERED = re.compile(r"^(.*?)(\d+)(\D*)$", re.DOTALL)


def target_name(target: Any) -> str:
    """A readable name for what a node calls, the same in every process."""
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None)
    if module.startswith("torch._ops") or name is None:
        return _ADDRESS.sub("", str(target))
    module = "torch.nn.functional" if module == "torch._C._nn" else module.strip("_")
    return f"{module}.{name}" if module else name


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Child modules by name, a module that stands under two names twice."""
    return ((name, child) for name, child in module._modules.items() if child is not None)


class Digests:
    """Hashes that are equal where two modules look the same in a picture.

    A hash covers the class, ``extra_repr``, the shapes of the module's own tensors, the graph with
    its tags, and the same of all children. Ranks count (they are shapes) and so do scales and
    dropout (they are constants of the graph); values of weights do not.

    Args:
        graphs: The graphs of the regions, by ``id`` of the module.
    """

    def __init__(self, graphs: Mapping[int, fx.Graph]) -> None:
        self._graphs = graphs
        self._known: dict[int, str] = {}

    def __call__(self, module: nn.Module) -> str:
        """The hash of ``module``."""
        known = self._known.get(id(module))
        if known is None:
            text = "\n".join(self._lines(module))
            known = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
            self._known[id(module)] = known
        return known

    def _lines(self, module: nn.Module) -> Iterator[str]:
        cls = original_class(module)
        yield f"{cls.__module__}.{cls.__qualname__}({_ADDRESS.sub('', module.extra_repr())})"
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{name!r} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"
        graph = self._graphs.get(id(module))
        for node in graph.nodes if graph is not None else ():
            call = f"{node.op} {node.name} {target_name(node.target)} {node.args} {node.kwargs}"
            yield f"{_ADDRESS.sub('', call)} {node.meta.get(META_KEY)}"
        for name, child in children_of(module):
            yield f"{name!r} {self(child)}"


def follows(first: str, second: str) -> bool:
    """Whether two names differ only in their last number, and the second counts one on."""
    a, b = _NUMBERED.match(first), _NUMBERED.match(second)
    if a is None or b is None:
        return False
    return (a[1], a[3]) == (b[1], b[3]) and int(b[2]) == int(a[2]) + 1


def runs(names: Sequence[str], digests: Sequence[str]) -> Iterator[range]:
    """Splits siblings into runs that are drawn as one box: equal, and numbered in sequence."""
    start = 0
    for i in range(1, len(names) + 1):
        same = i < len(names) and digests[i] == digests[start] and follows(names[i - 1], names[i])
        if not same:
            yield range(start, i)
            start = i


def label_of(fqn: str) -> str:
    """The last part of a name, with the one before it where it is only a number."""
    parts = fqn.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
