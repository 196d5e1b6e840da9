"""Files exported by other libraries: their size, and whether they compute the same as PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_fx.checkpoint import load_adapter
from lora_fx.errors import ConfigError, ExportError, LoraFxError
from lora_fx.export import ort, providers
from lora_fx.export.onnx import export_onnx, node_count
from lora_fx.export.session import OnnxSession
from lora_fx.tools.bench.contenders import KINDS as ADAPTER_KINDS
from lora_fx.tools.bench.contenders import OTHER_KIND, PLAIN_KIND
from lora_fx.tools.bench.measure import Run, Size
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.workloads import RANK, Served, randomize, served

__all__ = [
    "HERE",
    "SCRIPT",
    "SECTION",
    "Row",
    "environment_of",
    "exported",
    "set_environments",
    "write_tokenizer",
]


HERE = "here"
"""The environment that the benchmark itself runs in."""

NAMES = ("olive", "optimum", "genai")
"""Environments of the other libraries."""

_DEFAULT = Path(".peers")
_VARIABLE = "LORA_FX_PEER_"
SCRIPT = Path(__file__).with_name("peer_script.py")
_SECONDS = 600
# Weights are on the disk, so scripts need no downloads, and telemetry is off.
_QUIET = {"HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """Result that ``peer_script.py`` reports about an export with another library.

    Attributes:
        error: The reason why there is no file, in one line; "" if there is a file.
        seconds: Time of loading and exporting, without imports.
        file: Path of the model.
        adapter: Path of the adapter if it is a separate file, or "".
    """

    error: str = ""
    seconds: float = 0.0
    file: str = ""
    adapter: str = ""


def set_environments(texts: Iterable[str]) -> None:
    """Set where the Python environments of other libraries are, each as ``NAME=FOLDER``.

    The setting holds for this process and its children.

    Raises:
        ConfigError: If a text has another form, a name is unknown, or a folder has no Python.
    """
    for text in texts:
        name, _, folder = text.partition("=")
        if name not in NAMES or not folder:
            known = ", ".join(NAMES)
            raise ConfigError(
                f"{text!r} is no environment: give NAME=FOLDER, with a name of {known}"
            )
        python = _python(Path(folder))
        if not python.exists():
            raise ConfigError(f"there is no {python}: `make bench-envs` makes environments")
        os.environ[_VARIABLE + name.upper()] = folder


def environment_of(name: str, variables: Mapping[str, str] = os.environ) -> Path | None:
    """Return the path of Python in another library's environment, or None if that is not installed.

    Args:
        name: A name of :data:`NAMES`, or :data:`HERE`.
        variables: Environment variables: ``LORA_FX_PEER_OLIVE`` and the like name the folders. The default is
            ``.peers/olive``.
    """
    if name == HERE:
        return Path(sys.executable)
    python = _python(Path(variables.get(_VARIABLE + name.upper()) or _DEFAULT / name))
    # Absolute, but not resolved: the link of an environment points to the bare interpreter.
    return python.absolute() if python.exists() else None


def exported(python: Path, script: str, arguments: Sequence[str | Path]) -> Exported:
    """Run ``peer_script.py`` in another environment, and return its report about the export.

    Args:
        python: Python of the environment.
        script: The exporter.
        arguments: Arguments of the exporter, in its order.
    """
    # -I keeps this folder and the caller's variables off the path of the other environment.
    command = [str(python), "-I", str(SCRIPT), script, *map(str, arguments)]
    env = {**os.environ, **_QUIET}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS, env=env
        )
    except subprocess.TimeoutExpired:
        return Exported(error=f"not done after {_SECONDS} s")
    return read(done.stdout, done.stderr)


def read(stdout: str, stderr: str) -> Exported:
    """Parse the output of ``peer_script.py``: the last JSON line, or else the last line of errors."""
    for line in reversed(stdout.splitlines()):
        if line.startswith("{"):
            report = Exported(**json.loads(line))
            return dataclasses.replace(report, error=_first_line(report.error))
    lines = stderr.strip().splitlines()
    return Exported(error=lines[-1] if lines else "it ended without a word")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


Runner = Callable[[Mapping[str, Tensor]], Tensor]
"""Function from the inputs of the model to its first output."""


@dataclasses.dataclass(frozen=True)
class File:
    """Size of an exported file.

    Attributes:
        size: Bytes, external data included.
        nodes: Nodes as written, before ONNX Runtime optimizes them.
    """

    size: int
    nodes: int


def describe(path: Path) -> File:
    """Return the size and the number of nodes of an exported file."""
    size = sum(
        file.stat().st_size for file in path.parent.glob(f"{path.stem}*.onnx*") if file.is_file()
    )
    return File(size, node_count(path))


def runner(path: Path, adapter: Path | None = None) -> Runner:
    """Return a function that runs a file on the CPU.

    The file may take ids, mask, positions and types of tokens.

    Args:
        path: The file.
        adapter: File with the values of an adapter's inputs, in ONNX Runtime's format.

    Raises:
        ExportError: If the file cannot be loaded. A run raises it if it fails or has other inputs.
    """
    runtime = providers.import_onnxruntime()
    session = providers.load(
        runtime, path, "cpu", {}, providers.session_settings(runtime, None, low_memory=False)
    )
    ports = [ort.port_of(value) for value in session.get_inputs()]
    outputs = [ort.port_of(value) for value in session.get_outputs()][:1]
    file_adapter = runtime.AdapterFormat.read_adapter(str(adapter)) if adapter is not None else None

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        values = _completed(inputs)
        # The values of an adapter share the memory of the adapter that was read.
        factors: dict[str, Any] = file_adapter.get_parameters() if file_adapter is not None else {}
        missing = [port.name for port in ports if port.name not in {*values, *factors}]
        if missing:
            raise ExportError(f"it takes {', '.join(missing)} as well")
        feeds = {
            port.name: ort.feed(runtime, port, values[port.name])
            for port in ports
            if port.name in values
        }
        [result] = ort.bound_run(session, feeds, ort.Bound(factors), outputs)
        return ort.to_tensor(result).clone()

    return run


def largest_error(run: Runner, references: Sequence[tuple[Mapping[str, Tensor], Tensor]]) -> float:
    """Return the largest error of a file against PyTorch, relative to the largest element of an output.

    Raises:
        ExportError: If the file fails on an input, or its output has another shape.
    """
    errors = []
    for inputs, expected in references:
        output = run(inputs)
        if output.shape != expected.shape:
            raise ExportError(
                f"it gives {list(output.shape)} for {list(inputs['input_ids'].shape)}, "
                f"PyTorch {list(expected.shape)}"
            )
        errors.append(((output - expected).abs().max() / expected.abs().max()).item())
    # Python's max() may miss a NaN in the list.
    return torch.tensor(errors).max().item()


def _completed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with position and token type ids, which some exported files take.

    The values are those that transformers fills in.
    """
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    return {**inputs, "position_ids": positions, "token_type_ids": torch.zeros_like(ids)}


KINDS = (PLAIN_KIND, "rank_pattern, alpha_pattern", OTHER_KIND)
"""Kinds of adapters."""

_OURS: Mapping[str, Literal["merge", "inputs"]] = {
    "lora-fx, merged": "merge",
    "lora-fx, swappable": "inputs",
}
# Environment, script, and the script's mode.
_PEERS = {
    "PEFT merge + torch.onnx": (HERE, "torch_onnx", "merge"),
    "Olive, merged": ("olive", "olive", "merge"),
    "Olive, ExtractAdapters": ("olive", "olive", "inputs"),
    "optimum-onnx, PEFT merge": ("optimum", "optimum", "merge"),
    "optimum-onnx, adapter folder": ("optimum", "optimum", "folder"),
}
_FRESH = ((3, 7), (1, 33))
_EXACT = 1e-4
_WIDTH = 150

References = list[tuple[dict[str, Tensor], Tensor]]
"""Pairs of inputs and PyTorch's output."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """Outputs of PyTorch, with the adapter and without it, to compare files with."""

    adapted: References
    base: References


@dataclasses.dataclass(frozen=True)
class Row:
    """Result of one export.

    Attributes:
        error: The reason why there is no file, or why it does not run; "" if it runs.
        seconds: Time of loading and exporting; for lora-fx it includes the comparison with PyTorch.
        file: Size of the exported file.
        parity: The largest error relative to the largest element, over inputs of two other shapes.
        bare: The same error without an adapter, against the base, for a file that takes adapters; or the
            reason why it does not run.
    """

    error: str = ""
    seconds: float | None = None
    file: File | None = None
    parity: float | None = None
    bare: str = ""

    @property
    def outcome(self) -> str:
        """Return a cell of the table: "yes" if the file computes the same as PyTorch, or else the reason."""
        if self.error or self.parity is None:
            return self.error
        return "yes" if self.parity <= _EXACT else "a file that computes something else"


def _run(run: Run) -> dict[tuple[str, str, str], Row]:
    """Measure the exports of all libraries. Return rows by model, adapter and contender.

    Each export runs once, whatever the number of repeats.
    """
    cases = [(model, kind) for model in served(run.size) for kind in KINDS]
    if run.size is not Size.FULL:
        cases = cases[:1] if run.size is Size.TINY else cases[:2]
    rows: dict[tuple[str, str, str], Row] = {}
    contenders = _contenders()
    for model, kind in cases:
        with tempfile.TemporaryDirectory() as name:
            expected = _write(model, kind, Path(name))
            for contender, work in contenders.items():
                rows[model.title, kind, contender] = work(model, Path(name), expected)
                run.tell(len(rows), len(cases) * len(contenders), contender)
    return rows


def _rows(results: Mapping[tuple[str, str, str], Row]) -> Iterator[list[str]]:
    for key, row in results.items():
        sizes = [f"{row.file.size / 1e6:.1f}", str(row.file.nodes)] if row.file else ["", ""]
        yield [
            *key,
            row.outcome.replace("|", r"\|"),
            "" if row.seconds is None else f"{row.seconds:.1f}",
            *sizes,
            "" if row.parity is None else f"{row.parity:.1e}",
            row.bare.replace("|", r"\|"),
        ]


def _contenders() -> Mapping[str, Callable[[Served, Path, Expected], Row]]:
    return {name: functools.partial(_ours, how) for name, how in _OURS.items()} | {
        name: functools.partial(_theirs, *how) for name, how in _PEERS.items()
    }


def _ours(
    adapters: Literal["merge", "inputs"], model: Served, folder: Path, expected: Expected
) -> Row:
    path = folder / f"ours-{adapters}" / "model.onnx"
    path.parent.mkdir()
    base = model.make()
    began = time.perf_counter()
    try:
        adapted = load_adapter(base, folder / "adapter")
        export_onnx(adapted, path, model.inputs(), adapters=adapters)
        seconds = time.perf_counter() - began
        session = OnnxSession(path, "cpu")
        first = session.outputs[0].name
        if adapters == "merge":
            return _checked(path, seconds, expected, lambda inputs: session.run(inputs)[first])
        session.load_adapter("a", adapted)
        return _checked(
            path,
            seconds,
            expected,
            lambda inputs: session.run(inputs, adapter="a")[first],
            lambda inputs: session.run(inputs)[first],
        )
    except LoraFxError as error:
        return Row(error=_reason(error, folder))


def _theirs(
    environment: str, script: str, how: str, model: Served, folder: Path, expected: Expected
) -> Row:
    python = environment_of(environment)
    if python is None:
        return Row(error="not installed: make bench-envs")
    out = folder / f"{script}-{how}"
    out.mkdir()
    report = exported(python, script, (folder / "base", folder / "adapter", out, model.task, how))
    if report.error:
        return Row(error=_short(report.error, folder))
    path = Path(report.file)
    try:
        if not report.adapter:
            return _checked(path, report.seconds, expected, runner(path))
        with_adapter = runner(path, Path(report.adapter))
        return _checked(path, report.seconds, expected, with_adapter, runner(path))
    except LoraFxError as error:
        return Row(_reason(error, folder), report.seconds, describe(path))


def _checked(
    path: Path, seconds: float, expected: Expected, run: Runner, bare: Runner | None = None
) -> Row:
    parity = largest_error(run, expected.adapted)
    without = ""
    if bare is not None:
        try:
            without = f"{largest_error(bare, expected.base):.1e}"
        except LoraFxError as error:
            without = _reason(error, path.parent)
    return Row("", seconds, describe(path), parity, without)


def _reason(error: LoraFxError, folder: Path) -> str:
    return _short(str(error).splitlines()[0], folder)


def _short(text: str, folder: Path) -> str:
    """Shorten an error to fit a cell of the table.

    The end is kept, because ONNX Runtime states the error there.
    """
    text = text.replace(f"{folder}/", "")
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH // 3]} … {text[-2 * _WIDTH // 3 :]}"


def _write(model: Served, kind: str, folder: Path) -> Expected:
    """Write the folders of a base and an adapter, and return PyTorch's outputs for both."""
    import peft

    base: Any = model.make()
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    layers = model.layers(base)
    adapted: Any = peft.get_peft_model(base, peft.LoraConfig(**_fields(kind, layers)))
    randomize(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    adapted.eval()
    with adapted.disable_adapter():
        bare = list(_references(model, adapted))
    return Expected(list(_references(model, adapted)), bare)


def _fields(kind: str, layers: list[str]) -> dict[str, Any]:
    names = sorted({name.rpartition(".")[2] for name in layers})
    fields: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, **ADAPTER_KINDS.get(kind, {})}
    if kind not in ADAPTER_KINDS:
        fields["rank_pattern"] = {name: 4 for name in names if name.startswith("q")}
        fields["alpha_pattern"] = {name: RANK / 2 for name in names if name.startswith("v")}
    return {**fields, "target_modules": layers}


def _references(model: Served, adapted: nn.Module) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for seed, (batch, tokens) in enumerate(_FRESH, 1):
        inputs = model.inputs(batch, tokens, seed)
        with torch.no_grad():
            yield inputs, adapted(**inputs)[0]


def write_tokenizer(folder: Path) -> None:
    """Write the files of a tokenizer. Exporters copy them, and some fail without."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


SECTION = Section(
    "export_peers",
    (
        *("model", "adapter", "exporter", "equal to PyTorch", "seconds", "MB", "nodes"),
        *("error", "error without adapter"),
    ),
    _run,
    _rows,
)
