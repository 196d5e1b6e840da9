"""What a run of an exported file takes: the base, a merged file, and one that is handed its adapters."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora_fx.api import merge, rewrite
from lora_fx.config import LoraConfig
from lora_fx.errors import ProviderError
from lora_fx.export.adapters import save_onnx_adapter
from lora_fx.export.onnx import export_onnx
from lora_fx.export.ort import check_provider, import_onnxruntime
from lora_fx.export.session import OnnxSession
from lora_fx.tools.bench.measure import Progress, Sample, Size, interleaved, portion, ratio
from lora_fx.tools.bench.served import RANK, Served, randomise, served

__all__ = [
    "AGAIN",
    "BASE",
    "MERGED",
    "ONE",
    "TITLE",
    "Latency",
    "caption",
    "rows",
    "run",
    "switch_time",
]

TITLE = "A run of an exported file in ONNX Runtime, rank 16"

BASE, AGAIN = "base", "base again (A/A)"
MERGED, BARE = "merged", "swappable, no adapter"
ONE, PAIR = "swappable, one adapter", "swappable, weighted pair"
_SAME, _TURNS, _LOAD = "one adapter all the time", "two adapters in turn", "load_adapter"

_Provider = Literal["cpu", "cuda"]
_TOKENS = 128
_SHORT = 8
_REST = 0.1  # seconds
_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Latency:
    """One model on one provider.

    Attributes:
        floor: F, what a run with an adapter takes beside one without if nothing but FLOPs counts.
        runs: By batch: the contenders.
        switching: Runs of one short input with the same adapter, with two adapters in turn, and loading one.
    """

    floor: float
    runs: Mapping[int, Mapping[str, Sample]]
    switching: Mapping[str, Sample]


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[tuple[str, str], Latency]:
    """Results by model and provider."""
    models = served(size)
    found: dict[tuple[str, str], Latency] = {}
    for index, model in enumerate(models):
        tell = portion(progress, index, len(models), model.title)
        with tempfile.TemporaryDirectory() as folder:
            _write(model, Path(folder))
            providers = _providers()
            for place, provider in enumerate(providers):
                part = portion(tell, place, len(providers))
                found[model.title, provider] = _measured(
                    model, Path(folder), provider, size, repeats, part
                )
    return found


def switch_time(latency: Latency) -> float:
    """Seconds that a run takes more if the one before had another adapter: the median over the turns."""
    same, turns = (latency.switching[name].times for name in (_SAME, _TURNS))
    return statistics.median(mine - theirs for mine, theirs in zip(turns, same, strict=True))


def rows(
    results: dict[tuple[str, str], Latency],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    columns = (
        *("model", "where", "batch", "contender", "median (quartiles)"),
        *("of base", "of merged", "of merged, shortest runs", "F"),
    )
    cells: list[tuple[str, ...]] = []
    for (title, provider), latency in results.items():
        for batch, samples in latency.runs.items():
            merged = samples[MERGED]
            cells += [
                (
                    *(title, provider, str(batch), name, str(sample)),
                    *(str(ratio(sample, samples[BASE])), str(ratio(sample, merged))),
                    f"{min(sample.times) / min(merged.times):.2f}",
                    f"{latency.floor:.3f}" if name == ONE else "",
                )
                for name, sample in samples.items()
            ]
        cells += [
            (title, provider, "1", f"{_SHORT} tokens: {name}", str(sample), "", "", "", "")
            for name, sample in latency.switching.items()
        ]
        taken = f"{1e3 * switch_time(latency):.3f} ms"
        cells.append((title, provider, "1", "a switch of adapters", taken, "", "", "", ""))
    return columns, cells


def caption() -> str:
    """What was measured."""
    return (
        f"Files of `export_onnx` with {_TOKENS} tokens a sequence, fp32, random weights; adapters of rank "
        f"{RANK} at every linear operation but the head. The weighted pair has rank {2 * RANK}. A switch "
        f"is what a run takes more if another adapter ran before it, on {_SHORT} tokens, where a run "
        "is short: no session is loaded again, other values are bound. `load_adapter` reads a file, checks "
        "it and puts it onto the device. F is 1 + Σ r·(d + k) / Σ d·k over the linear layers, the head in "
        "the second sum only: what the thin products of one adapter cost if a FLOP costs the same "
        "everywhere. What is beyond it is the addition of each branch, a pass over its output, and "
        "fusions with what follows (a bias in GELU, in a layer norm) that ONNX Runtime does not find with it."
    )


def _providers() -> tuple[_Provider, ...]:
    try:
        check_provider(import_onnxruntime(), "cuda")
    except ProviderError:
        return ("cpu",)
    return ("cpu", "cuda")


def _write(model: Served, folder: Path) -> None:
    base, inputs = model.make(), model.inputs()
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=model.layers(base), init_lora_weights=False
    )
    for seed, name in enumerate("ba"):
        adapted = randomise(rewrite(base, config), seed)
        save_onnx_adapter(adapted, folder / f"{name}.onnx_adapter")
    export_onnx(base, folder / "base.onnx", inputs)
    export_onnx(merge(adapted), folder / "merged.onnx", inputs)
    export_onnx(adapted, folder / "swappable.onnx", inputs, adapters="inputs")


def _measured(
    model: Served,
    folder: Path,
    provider: _Provider,
    size: Size,
    repeats: int,
    progress: Progress | None,
) -> Latency:
    base, merged, swappable = (
        OnnxSession(folder / f"{name}.onnx", provider) for name in ("base", "merged", "swappable")
    )
    for name in "ab":
        swappable.load_adapter(name, folder / f"{name}.onnx_adapter")
    pair = {"a": 0.7, "b": 0.3}
    chosen: dict[str, Callable[[Any], Any]] = {
        BASE: base.run,
        AGAIN: base.run,
        MERGED: merged.run,
        BARE: swappable.run,
        ONE: functools.partial(swappable.run, adapter="a"),
        PAIR: functools.partial(swappable.run, adapter=pair),
    }
    batches = (1,) if size is Size.TINY else (1, 8)
    tokens = _SHORT if size is Size.TINY else _TOKENS
    runs = {}
    for index, batch in enumerate(batches):
        inputs = _placed(model.inputs(batch, tokens), provider)
        runs[batch] = interleaved(
            {
                name: (functools.partial(_rested, work, inputs), work)
                for name, work in chosen.items()
            },
            repeats=repeats,
            calls=4 // batch or 1,
            seconds=_SECONDS,
            progress=portion(progress, index, len(batches) + 1, f"batch {batch}"),
        )
    short = _placed(model.inputs(1, _SHORT), provider)
    tell = portion(progress, len(batches), len(batches) + 1, "switching")
    return Latency(model.floor(), runs, _switching(swappable, short, folder, repeats, tell))


def _rested(work: Callable[[Any], Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, when the threads of other sessions sleep and those of this one are awake.

    Threads of ONNX Runtime spin for a while after a run, on the cores that the next session needs.
    """
    time.sleep(_REST)
    work(inputs)
    return inputs


def _placed(inputs: dict[str, Tensor], provider: _Provider) -> dict[str, Tensor]:
    """On a GPU inputs and outputs stay there: the copies would be timed else."""
    on_gpu = provider == "cuda" and torch.cuda.is_available()
    return {name: value.cuda() if on_gpu else value for name, value in inputs.items()}


def _switching(
    session: OnnxSession,
    inputs: dict[str, Tensor],
    folder: Path,
    repeats: int,
    progress: Progress | None,
) -> dict[str, Sample]:
    def runs(names: str) -> Callable[[Any], None]:
        def work(_: Any) -> None:
            for name in names:
                session.run(inputs, adapter=name)

        return work

    def load(_: Any) -> None:
        session.load_adapter("c", folder / "b.onnx_adapter")

    # Each run of "ab" but the first follows one with the other adapter.
    contenders = {_SAME: runs("aa"), _TURNS: runs("ab"), _LOAD: load}
    found = interleaved(
        {name: (lambda: None, work) for name, work in contenders.items()},
        repeats=repeats,
        calls=10,
        seconds=_SECONDS,
        progress=progress,
    )
    halves = {name: Sample(tuple(one / 2 for one in found[name].times)) for name in (_SAME, _TURNS)}
    return {**found, **halves}
