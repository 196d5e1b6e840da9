"""What a run of an exported file takes: the base, a merged file, and one that is handed its adapters."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
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
from lora_fx.tools.bench.measure import Run, Sample, Size, ratio
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.workloads import RANK, Served, randomize, served

__all__ = ["AGAIN", "BASE", "MERGED", "ONE", "SECTION", "Latency", "switch_time"]

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
        floor: F, the ratio of a run with an adapter to one without if nothing but FLOPs counts.
        runs: By batch: the contenders.
        switching: Runs of one short input with the same adapter, with two adapters in turn, and loading one.
    """

    floor: float
    runs: Mapping[int, Mapping[str, Sample]]
    switching: Mapping[str, Sample]


def _run(run: Run) -> dict[tuple[str, str], Latency]:
    """Results by model and provider."""
    found: dict[tuple[str, str], Latency] = {}
    for model, part in run.each(served(run.size), lambda one: one.title):
        with tempfile.TemporaryDirectory() as folder:
            _write(model, Path(folder))
            for provider, here in part.each(_providers()):
                found[model.title, provider] = _measured(model, Path(folder), provider, here)
    return found


def switch_time(latency: Latency) -> float:
    """Seconds that a run takes more if the one before had another adapter: the median over the turns."""
    same, turns = (latency.switching[name].times for name in (_SAME, _TURNS))
    return statistics.median(mine - theirs for mine, theirs in zip(turns, same, strict=True))


def _rows(results: Mapping[tuple[str, str], Latency]) -> Iterator[list[str]]:
    for where, latency in results.items():
        for batch, samples in latency.runs.items():
            base, merged = samples[BASE], samples[MERGED]
            for name, sample in samples.items():
                beside = [str(ratio(sample, base)), str(ratio(sample, merged))]
                beside += [f"{min(sample.times) / min(merged.times):.2f}"]
                floor = f"{latency.floor:.3f}" if name == ONE else ""
                yield [*where, str(batch), name, str(sample), *beside, floor]
        short = {f"{_SHORT} tokens: {name}": str(one) for name, one in latency.switching.items()}
        short["a switch of adapters"] = f"{1e3 * switch_time(latency):.3f} ms"
        for name, taken in short.items():
            yield [*where, "1", name, taken, "", "", "", ""]


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
        adapted = randomize(rewrite(base, config), seed)
        save_onnx_adapter(adapted, folder / f"{name}.onnx_adapter")
    export_onnx(base, folder / "base.onnx", inputs)
    export_onnx(merge(adapted), folder / "merged.onnx", inputs)
    export_onnx(adapted, folder / "swappable.onnx", inputs, adapters="inputs")


def _measured(model: Served, folder: Path, provider: _Provider, run: Run) -> Latency:
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
    batches = (1,) if run.size is Size.TINY else (1, 8)
    tokens = _SHORT if run.size is Size.TINY else _TOKENS
    runs = {}
    for index, batch in enumerate(batches):
        inputs = _placed(model.inputs(batch, tokens), provider)
        contenders = {
            name: (functools.partial(_rested, work, inputs), work) for name, work in chosen.items()
        }
        part = run.part(index, len(batches) + 1, f"batch {batch}")
        runs[batch] = part.times(contenders, calls=4 // batch or 1, seconds=_SECONDS)
    short = _placed(model.inputs(1, _SHORT), provider)
    part = run.part(len(batches), len(batches) + 1, "switching")
    return Latency(model.floor(), runs, _switching(swappable, short, folder, part))


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
    session: OnnxSession, inputs: dict[str, Tensor], folder: Path, run: Run
) -> dict[str, Sample]:
    def runs(names: str) -> Callable[[Any], None]:
        def work(_: Any) -> None:
            for name in names:
                session.run(inputs, adapter=name)

        return work

    def load(_: Any) -> None:
        session.load_adapter("c", folder / "b.onnx_adapter")

    # Each run of "ab" but the first follows one with the other adapter.
    works = {_SAME: runs("aa"), _TURNS: runs("ab"), _LOAD: load}
    contenders = {name: (lambda: None, work) for name, work in works.items()}
    found = run.times(contenders, calls=10, seconds=_SECONDS)
    halves = {name: Sample(tuple(one / 2 for one in found[name].times)) for name in (_SAME, _TURNS)}
    return {**found, **halves}


SECTION = Section(
    "onnx_latency",
    (
        *("model", "where", "batch", "contender", "median (quartiles)"),
        *("of base", "of merged", "of merged, shortest runs", "F"),
    ),
    _run,
    _rows,
)
