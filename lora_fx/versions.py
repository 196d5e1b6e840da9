"""The releases of other libraries that lora-fx was tested with, and a warning about others.

The oldest are the lower bounds of ``pyproject.toml``. The newest are in :data:`NEWEST`, which
``tests/versions`` compares with its results.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Final

__all__ = ["NEWEST", "oldest", "warn_untested"]

NEWEST: Final[Mapping[str, str]] = {
    "torch": "2.15",
    "transformers": "5.24",
    "onnx": "1.23",
    "onnxscript": "0.7",
    "onnxruntime": "1.31",
}
"""The newest release of each library that the tests have run with."""

_WHEELS: Final = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")}
_NUMBERS: Final = re.compile(r"\d+(?:\.\d+)*")


def warn_untested(names: Iterable[str] | None = None) -> None:
    """Warn about libraries that are older or newer than the tested ones, once for each.

    Args:
        names: Modules; by default PyTorch and the others that are loaded.
    """
    if names is None:
        names = {"torch", *sys.modules}
    for name in NEWEST.keys() & {*names}:
        _warn(name)


@functools.cache
def _warn(name: str) -> None:
    version = _installed(name)
    first, last = oldest().get(name, ""), NEWEST[name]
    if not version:
        return
    if first and _release(version) < _release(first):
        remedy = f"it may fail: pip install --upgrade '{name}>={first}'"
    elif _release(version)[:2] > _release(last):
        remedy = (
            "it should work; if it does not, please report it with the output of `lora-fx doctor`"
        )
    else:
        return
    warnings.warn(
        f"lora-fx was tested with {name} {first or 'releases'} to {last}, and this is {version}: {remedy}",
        stacklevel=4,
    )


def _installed(name: str) -> str:
    """Return the version of a library, or an empty string if its package has no metadata."""
    for package in _WHEELS.get(name, (name,)):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


@functools.cache
def oldest() -> Mapping[str, str]:
    """Return the lower bounds of ``pyproject.toml``, by the name of the package."""
    try:
        lines = importlib.metadata.requires("lora-fx") or ()
    except importlib.metadata.PackageNotFoundError:  # run from a folder
        lines = ()
    bounds = (re.match(r"([\w-]+)(?:\[.*?\])?>=([\d.]+)", line) for line in lines)
    return {bound[1]: bound[2] for bound in bounds if bound is not None}


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: (2, 15, 0) for 2.15.0+cu132."""
    numbers = _NUMBERS.match(version)
    return tuple(map(int, numbers[0].split("."))) if numbers is not None else ()
