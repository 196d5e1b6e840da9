"""The environments of ``make test-versions``: releases of PyTorch, releases of Python, the oldest of all."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

__all__ = ["NAMES", "NEWEST", "PYTHON", "TORCH", "Environment", "can_be_made", "environment"]

TORCH = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
"""Every minor release that ``pyproject.toml`` admits."""

PYTHON = ("3.12", "3.13", "3.14")
"""Releases of Python on which the newest PyTorch is tested; the oldest one is that of the others."""

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
        resolution: Of uv: "highest", or "lowest-direct" for the lower bounds of ``pyproject.toml``.
    """

    name: str
    python: str
    requirements: tuple[str, ...] = ()
    resolution: str = "highest"


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
        return Environment(name, python, resolution="lowest-direct")
    release = release if kind == "torch" else TORCH[-1]
    return Environment(name, python, (f"torch=={release}.*",))


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
