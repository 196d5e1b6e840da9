"""Exports of the same adapters by lora-fx, by PEFT and torch.onnx, by Olive and by optimum-onnx."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_fx.checkpoint import load_adapter
from lora_fx.errors import LoraFxError
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from lora_fx.tools.bench.measure import Progress, Size
from lora_fx.tools.bench.peer_exporters import (
    HERE,
    File,
    Runner,
    describe,
    environment_of,
    exported,
    largest_error,
    runner,
)
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.served import RANK, Served, randomize, served

__all__ = ["KINDS", "SECTION", "Row"]

KINDS = ("LoRA", "rank_pattern, alpha_pattern", "DoRA")
"""The adapters."""

_OURS: Mapping[str, Literal["merge", "inputs"]] = {
    "lora-fx, merged": "merge",
    "lora-fx, swappable": "inputs",
}
# Environment, script, and how the script goes about it.
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
"""Inputs, and the output of PyTorch."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What PyTorch computes: with the adapter, and without."""

    adapted: References
    base: References


@dataclasses.dataclass(frozen=True)
class Row:
    """One export.

    Attributes:
        error: Why there is no file, or why it does not run; "" if it does.
        seconds: Of loading and exporting, and with lora-fx of the comparison with PyTorch.
        file: What was written.
        parity: The largest error beside the largest element, over inputs of two other shapes.
        bare: That of a file which takes adapters, without one, beside the base; or why it does not run.
    """

    error: str = ""
    seconds: float | None = None
    file: File | None = None
    parity: float | None = None
    bare: str = ""

    @property
    def outcome(self) -> str:
        """In words."""
        if self.error or self.parity is None:
            return self.error
        return "yes" if self.parity <= _EXACT else "a file that computes something else"


def _run(repeats: int, size: Size, progress: Progress | None) -> dict[tuple[str, str, str], Row]:
    """Rows by model, adapter and contender. Each export runs once, however many repeats."""
    cases = [(model, kind) for model in served(size) for kind in KINDS]
    if size is not Size.FULL:
        cases = cases[:1] if size is Size.TINY else cases[:2]
    found: dict[tuple[str, str, str], Row] = {}
    contenders = _contenders()
    for model, kind in cases:
        with tempfile.TemporaryDirectory() as name:
            expected = _write(model, kind, Path(name))
            for contender, work in contenders.items():
                found[model.title, kind, contender] = work(model, Path(name), expected)
                if progress is not None:
                    progress(len(found), len(cases) * len(contenders), contender)
    return found


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


def _contenders() -> dict[str, Callable[[Served, Path, Expected], Row]]:
    found: dict[str, Callable[[Served, Path, Expected], Row]] = {}
    for name, adapters in _OURS.items():
        found[name] = functools.partial(_ours, adapters)
    for name, (environment, script, how) in _PEERS.items():
        found[name] = functools.partial(_theirs, environment, script, how)
    return found


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
            return _checked(path, seconds, expected, lambda given: session.run(given)[first])
        session.load_adapter("a", adapted)
        return _checked(
            path,
            seconds,
            expected,
            lambda given: session.run(given, adapter="a")[first],
            lambda given: session.run(given)[first],
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
    said = exported(python, script, (folder / "base", folder / "adapter", out, model.task, how))
    if said.error:
        return Row(error=_short(said.error, folder))
    path = Path(said.file)
    try:
        if not said.adapter:
            return _checked(path, said.seconds, expected, runner(path))
        with_adapter = runner(path, Path(said.adapter))
        return _checked(path, said.seconds, expected, with_adapter, runner(path))
    except LoraFxError as error:
        return Row(_reason(error, folder), said.seconds, describe(path))


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
    """Short enough for a cell, the end being where ONNX Runtime says what is wrong."""
    text = text.replace(f"{folder}/", "")
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH // 3]} … {text[-2 * _WIDTH // 3 :]}"


def _write(model: Served, kind: str, folder: Path) -> Expected:
    """The folders of a base and an adapter, and what PyTorch computes with them."""
    import peft

    base: Any = model.make()
    base.save_pretrained(folder / "base")
    _write_tokenizer(folder / "base")
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
    fields: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK}
    if kind == "DoRA":
        fields["use_dora"] = True
    elif kind != "LoRA":
        fields["rank_pattern"] = {name: 4 for name in names if name.startswith("q")}
        fields["alpha_pattern"] = {name: RANK / 2 for name in names if name.startswith("v")}
    return {**fields, "target_modules": layers}


def _references(model: Served, adapted: nn.Module) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for seed, (batch, tokens) in enumerate(_FRESH, 1):
        inputs = model.inputs(batch, tokens, seed)
        with torch.no_grad():
            yield inputs, adapted(**inputs)[0]


def _write_tokenizer(folder: Path) -> None:
    # Olive copies one and gives up where there is none.
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
