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

__all__ = ["NEWEST", "installed", "oldest", "release", "untested", "warn_untested"]

NEWEST: Final[Mapping[str, str]] = {
    "torch": "2.15",
    "transformers": "5.24",
    "onnx": "1.23",
    "onnxscript": "0.7",
    "onnxruntime": "1.32",
}
"""The newest release of each library that the tests have run with."""

_WHEELS: Final = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-webgpu")}
"""Alternative packages of a module, if their names may differ from the module's."""

_NUMBERS: Final = re.compile(r"\d+(?:\.\d+)*")

_warned: set[str] = set()


def warn_untested(names: Iterable[str] | None = None) -> None:
    """Warn about libraries that are older or newer than the tested ones, once for each library.

    Args:
        names: Modules; by default PyTorch and all loaded modules.
    """
    loaded = {"torch", *sys.modules} if names is None else {*names}
    for name in NEWEST:
        if name not in loaded or name in _warned:
            continue
        _warned.add(name)  # before the warning, which a filter may turn into an error
        message = untested(name)
        if message:
            warnings.warn(f"lora-fx was tested with {message}", stacklevel=_outside())


def untested(name: str) -> str:
    """Return the text of a warning if the installed version of a library is outside of the tested range.

    Args:
        name: A module of :data:`NEWEST`.

    Returns:
        The tested range, the installed version and a remedy; empty if the version was tested or none is
        installed.
    """
    package, version = installed(name)
    first, last = oldest().get(package, oldest().get(name, "")), NEWEST[name]
    if not release(version):
        return ""
    if first and release(version) < release(first):
        remedy = f"it may fail: pip install --upgrade '{package}>={first}'"
    elif release(version)[:2] > release(last):
        remedy = (
            "it should work; if it does not, please report it with the output of `lora-fx doctor`"
        )
    else:
        return ""
    return f"{package} {first or 'releases'} to {last}, and this is {version}: {remedy}"


def _outside() -> int:
    """Return the ``stacklevel`` at which a warning shows the code that called lora-fx."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("lora_fx"):
        frame, level = frame.f_back, level + 1
    return level


def installed(name: str) -> tuple[str, str]:
    """Return the name and the version of the installed package that provides a module.

    The version is empty if no such package is installed.
    """
    for package in _WHEELS.get(name, (name,)):
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return name, ""


@functools.cache
def oldest() -> Mapping[str, str]:
    """Return the oldest supported version of each package, from the lower bounds of ``pyproject.toml``."""
    try:
        lines = importlib.metadata.requires("lora-fx") or ()
    except importlib.metadata.PackageNotFoundError:  # run from source, without being installed
        lines = ()
    bounds = (re.match(r"([\w-]+)(?:\[.*?\])?>=([\d.]+)", line) for line in lines)
    return {bound[1]: bound[2] for bound in bounds if bound is not None}


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version as a tuple: (2, 15, 0) for 2.15.0+cu132."""
    numbers = _NUMBERS.match(version)
    return tuple(map(int, numbers[0].split("."))) if numbers is not None else ()
