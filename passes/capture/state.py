"""Snapshot of the state that a forward can change during a trace, to find and undo the changes.

A graph has no side effects on Python objects. A forward that appends to a list, counts its calls or keeps
a result would do so only once, during the trace.
"""

from __future__ import annotations

import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lora_fx import torch_private

__all__ = ["State"]

# Exact classes, because subclasses may compute items, as transformers' table of activations does.
_CONTAINERS = frozenset((list, dict, set, deque, OrderedDict, defaultdict, Counter))
_OPAQUE = (nn.Module, torch.Tensor, type, types.FunctionType, types.MethodType, types.ModuleType)
_MISSING = object()


class State:
    """Snapshot of a module's attributes, of their contents, and of the random generators.

    Writes into buffers are detected, but not undone.
    """

    def __init__(self, module: nn.Module, objects: Iterable[Any] = ()) -> None:
        """Record the state.

        Args:
            module: The module. Modules below are included.
            objects: Further objects: defaults of parameters.
        """
        self._attributes = [
            (name, owner, dict(owner.__dict__))
            for name, owner in module.named_modules()
            # The __dict__ of a ScriptModule changes when it is used.
            if not isinstance(owner, torch.jit.ScriptModule)
        ]
        self._containers: dict[int, tuple[str, Any, Any]] = {}
        for name, _, attributes in self._attributes:
            for key, value in attributes.items():
                self._record(f"{name}.{key}" if name else key, value)
        for other in objects:
            self._record("a default", other)
        self._buffers = [
            (
                f"its forward writes into the buffer {name}",
                buffer,
                torch_private.version_counter(buffer),
            )
            for name, buffer in module.named_buffers()
            if not buffer.is_inference()
        ]
        self._random = random.getstate()
        self._torch = torch.get_rng_state()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def add(self, name: str, value: Any) -> None:
        """Add a container to the snapshot, before code may change the container."""
        self._record(name, value)

    def restore(self) -> str | None:
        """Restore everything except buffers, and return the first change in words, or None."""
        # Evaluate both before `or`, because each of them also restores.
        attributes, containers = self._attributes_changed(True), self._containers_changed(True)
        changed = attributes or containers
        if self._restore_generators():
            changed = changed or "its forward draws random numbers that the graph would keep"
        return changed

    def changed(self) -> str | None:
        """Return the first change in words, or None, without restoring it. Random generators are ignored."""
        written = (
            words
            for words, buffer, version in self._buffers
            if torch_private.version_counter(buffer) != version
        )
        changed = self._attributes_changed(False) or self._containers_changed(False)
        return changed or next(written, None)

    def _record(self, name: str, value: Any) -> None:
        if type(value) in _CONTAINERS:
            # Most are the hook dictionaries of modules, and empty.
            known = id(value) in self._containers
            self._containers[id(value)] = (name, value, value.copy() if value else ())
            if not known and value:
                inside = value.values() if isinstance(value, dict) else value
                for item in inside:
                    if type(item) in _CONTAINERS:
                        self._record(name, item)
            return
        attributes = None if isinstance(value, _OPAQUE) else getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._containers[id(attributes)] = (name, attributes, attributes.copy())

    def _attributes_changed(self, put_back: bool) -> str | None:
        changed: str | None = None
        for name, owner, before in self._attributes:
            now = owner.__dict__
            if len(now) == len(before) and all(
                now.get(k, _MISSING) is v for k, v in before.items()
            ):
                continue
            key = next(
                k for k in {**before, **now} if now.get(k, _MISSING) is not before.get(k, _MISSING)
            )
            if put_back:
                now.clear()
                now.update(before)
            changed = changed or f"its forward writes to self.{f'{name}.{key}' if name else key}"
        return changed

    def _containers_changed(self, put_back: bool) -> str | None:
        changed: str | None = None
        for name, now, before in self._containers.values():
            if _same(now, before):
                continue
            if put_back:
                now.clear()
                (now.extend if isinstance(now, list | deque) else now.update)(before)
            changed = changed or f"its forward changes what is in self.{name}"
        return changed

    def _restore_generators(self) -> bool:
        drawn = False
        if random.getstate() != self._random:
            random.setstate(self._random)
            drawn = True
        if not torch.equal(torch.get_rng_state(), self._torch):
            torch.set_rng_state(self._torch)
            drawn = True
        if self._numpy is not None:
            generator = sys.modules["numpy"].random
            now = generator.get_state()
            if now[2] != self._numpy[2] or (now[1] != self._numpy[1]).any():
                generator.set_state(self._numpy)
                drawn = True
        return drawn


def _same(now: Any, before: Any) -> bool:
    if len(now) != len(before) or not before:
        return len(now) == len(before)
    if isinstance(now, dict):
        return all(now.get(key, _MISSING) is value for key, value in before.items())
    if isinstance(now, set):
        return bool(now == before)
    return all(a is b for a, b in zip(now, before, strict=True))
