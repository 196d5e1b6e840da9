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
    "environment",
    "lower_bounds",
    "obstacle",
]

TORCH = ("2.11", "2.12", "2.13", "2.14", "2.15")
"""Every minor release that ``pyproject.toml`` admits."""

PYTHON = ("3.12", "3.13", "3.14")
"""Releases of Python on which the newest PyTorch is tested. The other environments have that of ``.venv``."""

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
# The lower bounds have no wheels for later ones.
_OLDEST_RUNS_ON = ((3, 11), (3, 12))
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
        SystemExit: If there is no such name, or it cannot be made here.
    """
    if name not in NAMES:
        raise SystemExit(f"{name!r} is no environment: there are {', '.join(NAMES)}")
    if needed := obstacle(name):
        raise SystemExit(f"{name} needs {needed}: install it, or leave it out")
    python = _python_of(name)
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


def obstacle(name: str) -> str:
    """Return the Python that an environment needs and that is not here, or an empty string."""
    python = _python_of(name)
    if not _runs(python):
        return f"{python}, which is not in PATH"
    if name == "oldest" and sys.version_info[:2] not in _OLDEST_RUNS_ON:
        return "a .venv with Python 3.11 or 3.12 (make PYTHON=python3.11)"
    return ""


def _python_of(name: str) -> str:
    kind, _, release = name.partition("-")
    return f"python{release}" if kind == "python" else sys.executable


def _runs(python: str) -> bool:
    """Return True if a command runs Python: those of a version manager may only say what to install."""
    if python == sys.executable:
        return True
    path = shutil.which(python)
    if path is None:
        return False
    try:
        done = subprocess.run(
            [path, "-c", ""],
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=30,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
