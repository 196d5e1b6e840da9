"""The environments of ``make test-versions``: releases of PyTorch, releases of Python, the oldest of all."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

__all__ = [
    "NAMES",
    "NEWEST",
    "PYTHON",
    "TORCH",
    "Environment",
    "can_be_made",
    "environment",
    "lower_bounds",
]

TORCH = ("2.11", "2.12", "2.13", "2.14", "2.15")
"""Every minor release that ``pyproject.toml`` admits."""

PYTHON = ("3.12", "3.13", "3.14")
"""Releases of Python on which the newest PyTorch is tested; the oldest one is that of the others."""

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_FOR_USERS = ("onnx", "gpu", "cli", "hf", "quant")

NEWEST = f"torch-{TORCH[-1]}"
NAMES = (
    *(f"torch-{release}" for release in TORCH),
    *(f"python-{release}" for release in PYTHON),
    "oldest",
)


@dataclasses.dataclass(frozen=True)
class Environment:
    """What is installed.

    Attributes:
        name: One of :data:`NAMES`.
        python: The command of its Python.
        requirements: What is installed with the package.
    """

    name: str
    python: str
    requirements: tuple[str, ...]


def environment(name: str) -> Environment:
    """Return an environment by its name.

    Raises:
        SystemExit: If there is no such name, or its Python is not in PATH.
    """
    if name not in NAMES:
        raise SystemExit(f"{name!r} is no environment: there are {', '.join(NAMES)}")
    python = _python_of(name)
    if not _runs(python):
        raise SystemExit(
            f"{name} needs {python}, which is not in PATH: install it, or leave it out"
        )
    kind, _, release = name.partition("-")
    if kind == "oldest":
        return Environment(name, python, lower_bounds())
    release = release if kind == "torch" else TORCH[-1]
    return Environment(name, python, (f"torch=={release}.*",))


def lower_bounds() -> tuple[str, ...]:
    """Return the oldest of everything that users install with lora-fx, and of PEFT, as requirements."""
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in _FOR_USERS for line in extras[name])]
    lines += [line for line in extras["bench"] if line.startswith("peft")]
    bounds = {
        requirement.name: specifier.version
        for requirement in map(Requirement, lines)
        for specifier in requirement.specifier
    }
    return tuple(f"{name}=={version}" for name, version in bounds.items())


def can_be_made(name: str) -> bool:
    """Return True if the Python of an environment is in PATH."""
    return _runs(_python_of(name))


def _python_of(name: str) -> str:
    kind, _, release = name.partition("-")
    return f"python{release}" if kind == "python" else sys.executable


def _runs(python: str) -> bool:
    """Return True if a command runs Python: those of a version manager may only say what to install."""
    path = shutil.which(python)
    if path is None:
        return False
    return not subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode
