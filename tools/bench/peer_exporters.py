"""Files that others have exported: how large they are, and whether they compute what PyTorch does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import ConfigError, ExportError
from lora_fx.export.onnx import node_count
from lora_fx.export.ort import bound_run, feed, port_of, to_tensor
from lora_fx.export.providers import import_onnxruntime, load, session_settings

__all__ = [
    "HERE",
    "NAMES",
    "Exported",
    "File",
    "Runner",
    "describe",
    "environment_of",
    "exported",
    "largest_error",
    "runner",
    "set_environments",
]


HERE = "here"
"""The environment that the benchmark itself runs in."""

NAMES = ("olive", "optimum")
"""Of the others."""

_DEFAULT = Path(".peers")
_VARIABLE = "LORA_FX_PEER_"
_SCRIPT = Path(__file__).with_name("peer_script.py")
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
    """Runs ``peer_script.py`` and reads what it says.

    Args:
        python: Of the environment.
        script: The exporter.
        arguments: As it takes them.
    """
    # -I: neither this folder nor the caller's variables are on the path of the other environment.
    command = [str(python), "-I", str(_SCRIPT), script, *map(str, arguments)]
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


Runner = Callable[[Mapping[str, Tensor]], Tensor]
"""From the inputs of the model to its first output."""


@dataclasses.dataclass(frozen=True)
class File:
    """What is in a file.

    Attributes:
        size: Bytes, external data included.
        nodes: Nodes as written, before ONNX Runtime optimizes them.
    """

    size: int
    nodes: int


def describe(path: Path) -> File:
    """Reads what is there."""
    size = sum(
        one.stat().st_size for one in path.parent.glob(f"{path.stem}*.onnx*") if one.is_file()
    )
    return File(size, node_count(path))


def runner(path: Path, adapter: Path | None = None) -> Runner:
    """Runs a file on the CPU, as it is: with what it takes of ids, mask, positions and types of tokens.

    Args:
        path: The file.
        adapter: Values for inputs that are an adapter, in ONNX Runtime's format.

    Raises:
        ExportError: It cannot be loaded; and, from a run, it fails or takes something else.
    """
    runtime = import_onnxruntime()
    session = load(runtime, path, "cpu", {}, session_settings(runtime, None, low_memory=False))
    ports = [port_of(value) for value in session.get_inputs()]
    outputs = [port_of(value) for value in session.get_outputs()][:1]
    held = runtime.AdapterFormat.read_adapter(str(adapter)) if adapter is not None else None

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        values = _completed(inputs)
        # The values of an adapter lie in the memory of what was read.
        factors: dict[str, Any] = held.get_parameters() if held is not None else {}
        missing = [port.name for port in ports if port.name not in {*values, *factors}]
        if missing:
            raise ExportError(f"it takes {', '.join(missing)} as well")
        feeds = {
            port.name: feed(runtime, port, values[port.name])
            for port in ports
            if port.name in values
        }
        [result] = bound_run(session, feeds, factors, outputs)
        return to_tensor(result).clone()

    return run


def largest_error(run: Runner, references: Sequence[tuple[Mapping[str, Tensor], Tensor]]) -> float:
    """The largest difference of an element, beside the largest element: the worst of the inputs.

    Raises:
        ExportError: The file fails on one of them, or its output has another shape.
    """
    errors = []
    for inputs, expected in references:
        found = run(inputs)
        if found.shape != expected.shape:
            raise ExportError(
                f"it gives {list(found.shape)} for {list(inputs['input_ids'].shape)}, "
                f"PyTorch {list(expected.shape)}"
            )
        errors.append(((found - expected).abs().max() / expected.abs().max()).item())
    # max() of a list with a NaN may be another one of them.
    return torch.tensor(errors).max().item()


def _completed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With what exporters make inputs of, as transformers fills it in."""
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    return {**inputs, "position_ids": positions, "token_type_ids": torch.zeros_like(ids)}
