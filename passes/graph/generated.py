"""Python code that ``fx`` writes for a graph, made into a function that goes when nobody has it any more."""

from __future__ import annotations

import itertools
import linecache
import weakref
from typing import Any

import torch

__all__ = ["generated"]

_counter = itertools.count()


def generated(source: str, namespace: dict[str, Any], name: str) -> Any:
    """The ``forward`` that a source defines.

    Args:
        source: What ``fx`` has written.
        namespace: The globals of the function; it is written.
        name: Of the class that it is for, as tracebacks show it.
    """
    # Registered with linecache so that a traceback through generated code shows it.
    filename = f"<lora_fx {name} {next(_counter)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)
    # fx remembers the globals of code that calls functions which it is not to look into, for good, and
    # goes through all of them at each trace.
    forward = namespace.pop("forward")
    # The text lives as long as the code that it explains.
    weakref.finalize(forward, _forget, filename, id(namespace))
    return forward


def _forget(filename: str, namespace: int) -> None:
    linecache.cache.pop(filename, None)
    wrapped = torch.fx._symbolic_trace._wrapped_fns_to_patch
    for key in [key for key in wrapped if key[0] == namespace]:
        del wrapped[key]
