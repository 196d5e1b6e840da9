"""Environments of other exporters, whose pins do not go with ours, and scripts that run in them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lora_fx.errors import ConfigError

__all__ = ["HERE", "NAMES", "Exported", "environment_of", "exported", "set_environments"]

HERE = "here"
"""The environment that the benchmark itself runs in."""

NAMES = ("olive", "optimum")
"""Of the others."""

_DEFAULT = Path(".peers")
_VARIABLE = "LORA_FX_PEER_"
_SCRIPTS = Path(__file__).with_name("exporters")
_SECONDS = 600
# Weights are on the disk: nothing is to be looked for elsewhere, and nothing to be told.
_QUIET = {"HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What a script says of its export.

    Attributes:
        error: Why there is no file, in a line; "" if there is one.
        seconds: Of loading and exporting, without imports.
        file: The model.
        adapter: The file of the adapter where that is apart, or "".
    """

    error: str = ""
    seconds: float = 0.0
    file: str = ""
    adapter: str = ""


def set_environments(given: Iterable[str]) -> None:
    """Takes ``NAME=FOLDER`` for this process and those that it starts.

    Raises:
        ConfigError: It is of another form, the name is unknown, or there is no Python in the folder.
    """
    for text in given:
        name, _, folder = text.partition("=")
        if name not in NAMES or not folder:
            raise ConfigError(
                f"{text!r} is no environment: give NAME=FOLDER, with a name of {', '.join(NAMES)}"
            )
        if not _python(Path(folder)).exists():
            raise ConfigError(
                f"there is no {_python(Path(folder))}: `make bench-envs` makes environments"
            )
        os.environ[_VARIABLE + name.upper()] = folder


def environment_of(name: str, variables: Mapping[str, str] = os.environ) -> Path | None:
    """The Python of an environment, or None if it is not installed.

    Args:
        name: One of :data:`NAMES`, or :data:`HERE`.
        variables: ``LORA_FX_PEER_OLIVE`` and the like name folders; without, it is ``.peers/olive``.
    """
    if name == HERE:
        return Path(sys.executable)
    python = _python(Path(variables.get(_VARIABLE + name.upper()) or _DEFAULT / name))
    # Absolute, but not resolved: what the link of an environment points to is the bare interpreter.
    return python.absolute() if python.exists() else None


def exported(python: Path, script: str, arguments: Sequence[str | Path]) -> Exported:
    """Runs a script of ``exporters/`` and reads what it says.

    Args:
        python: Of the environment.
        script: Its name.
        arguments: As the script takes them.
    """
    # -I: neither this folder nor the caller's variables are on the path of the other environment.
    command = [str(python), "-I", str(_SCRIPTS / f"{script}.py"), *map(str, arguments)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
            env={**os.environ, **_QUIET},
        )
    except subprocess.TimeoutExpired:
        return Exported(error=f"not done after {_SECONDS} s")
    return read(done.stdout, done.stderr)


def read(stdout: str, stderr: str) -> Exported:
    """What the last line of a script says; what its last line of errors says if that is nothing."""
    for line in reversed(stdout.splitlines()):
        if line.startswith("{"):
            found = Exported(**json.loads(line))
            return dataclasses.replace(found, error=_first_line(found.error))
    lines = stderr.strip().splitlines()
    return Exported(error=lines[-1] if lines else "it ended without a word")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
