"""The environments that lora-fx is tested in: releases of PyTorch, of Python, and the oldest of everything."""

from __future__ import annotations

import dataclasses
import shutil
import sys

__all__ = ["NAMES", "NEWEST", "PYTHON", "TORCH", "Environment", "environment"]

TORCH = ("2.9", "2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
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
    kind, _, release = name.partition("-")
    python = f"python{release}" if kind == "python" else sys.executable
    if shutil.which(python) is None:
        raise SystemExit(f"{name} needs {python}, which is not in PATH: install it, or leave it out")
    match kind:
        case "torch":
            return Environment(name, python, (f"torch=={release}.*",))
        case "python":
            return Environment(name, python, (f"torch=={TORCH[-1]}.*",))
        case _:
            return Environment(name, python, resolution="lowest-direct")
