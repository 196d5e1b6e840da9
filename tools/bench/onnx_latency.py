"""Latency of exported files: the base, a merged file, and a file that takes its adapters as inputs."""

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
from torch import Tensor, nn

from lora_fx.adapters import add_adapter
from lora_fx.api import merge, rewrite
from lora_fx.config import LoraConfig
from lora_fx.errors import ProviderError
from lora_fx.export.adapter_file import save_onnx_adapter
from lora_fx.export.onnx import export_onnx
from lora_fx.export.providers import check_provider, import_onnxruntime
from lora_fx.export.session import OnnxSession
from lora_fx.tools.bench.measure import Run, Sample, Size, ratio
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.workloads import RANK, Served, randomize, served

__all__ = [
    "AGAIN",
    "BANK",
    "BANK_SECTION",
    "BASE",
    "MERGED",
    "ONE",
    "ROWS",
    "SECTION",
    "SEPARATE",
    "SEPARATE_AGAIN",
    "Latency",
    "switch_time",
]

# --- one adapter for all rows ---------------------------------------------------------------------
# Time of a run of an exported file: the base, a merged file, and a file that takes its adapters as inputs.


BASE, AGAIN = "base", "base again (A/A)"
MERGED, BARE = "merged", "swappable, no adapter"
ONE, PAIR = "swappable, one adapter", "swappable, weighted pair"
_SAME, _TURNS, _LOAD = "one adapter all the time", "two adapters in turn", "load_adapter"

_Provider = Literal["cpu", "cuda"]
_TOKENS = 128
_SHORT = 8
_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times of one model's files on one execution provider of ONNX Runtime.

    Attributes:
        floor: F, the ratio of a run with an adapter to one without, by FLOPs alone.
        runs: Times of the contenders, by batch size.
        switching: Times of a short run with one adapter or two in turn, and of loading an adapter.
    """

    floor: float
    runs: Mapping[int, Mapping[str, Sample]]
    switching: Mapping[str, Sample]


def _run(run: Run) -> dict[tuple[str, str], Latency]:
    """Measure the files of each model on each execution provider, and return results by both names."""
    latencies: dict[tuple[str, str], Latency] = {}
    for model, part in run.each(served(run.size), lambda served_model: served_model.title):
        with tempfile.TemporaryDirectory() as folder:
            _write(model, Path(folder))
            for provider, provider_run in part.each(_providers()):
                latencies[model.title, provider] = _measured(
                    model, Path(folder), provider, provider_run
                )
    return latencies


def switch_time(latency: Latency) -> float:
    """Return the median seconds that a run takes longer if the run before used another adapter."""
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
        short = {
            f"{_SHORT} tokens: {key}": str(timing) for key, timing in latency.switching.items()
        }
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
        OnnxSession(folder / f"{name}.onnx", provider, session_options=_one_thread())
        for name in ("base", "merged", "swappable")
    )
    clock = time.thread_time if provider == "cpu" else time.perf_counter
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
            name: (functools.partial(_warmed, work, inputs), work) for name, work in chosen.items()
        }
        part = run.part(index, len(batches) + 1, f"batch {batch}")
        runs[batch] = part.times(contenders, calls=4 // batch or 1, seconds=_SECONDS, clock=clock)
    short = _placed(model.inputs(1, _SHORT), provider)
    part = run.part(len(batches), len(batches) + 1, "switching")
    return Latency(model.floor(), runs, _switching(swappable, short, folder, part))


def _one_thread() -> Any:
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = 1
    return options


def _warmed(work: Callable[[Any], Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a session once to warm it up, and return the inputs of the run."""
    work(inputs)
    return inputs


def _placed(inputs: dict[str, Tensor], provider: _Provider) -> dict[str, Tensor]:
    """Move inputs to the GPU for the CUDA provider, so that the copies are not timed."""
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

    # Each run of "ab", except the first, follows a run with the other adapter.
    works = {_SAME: runs("aa"), _TURNS: runs("ab"), _LOAD: load}
    contenders = {name: (lambda: None, work) for name, work in works.items()}
    timed = run.times(contenders, calls=10, seconds=_SECONDS)
    halves = {
        name: Sample(tuple(seconds / 2 for seconds in timed[name].times))
        for name in (_SAME, _TURNS)
    }
    return {**timed, **halves}


SECTION = Section(
    "onnx_latency",
    (
        *("model", "where", "batch", "contender", "median (quartiles)"),
        *("of base", "of merged", "of merged, shortest runs", "F"),
    ),
    _run,
    _rows,
)


# --- banks ----------------------------------------------------------------------------------------
# Time of one run whose rows have different adapters, compared with a run for each row.


ROWS = 8
SEPARATE = f"{ROWS} runs of one row, swappable"
SEPARATE_AGAIN = f"{SEPARATE}, again (A/A)"
BANK = f"one run, {ROWS} adapters"
_ONE, _BARE = "one run, one adapter", "one run, no adapter"
_STEPS = {"decode, past 128": (1, 128), "prefill, 128": (128, 0)}
_TINY_STEPS = {"decode, past 8": (1, 8)}
_BANK_SECONDS = 60.0


def _run_bank(run: Run) -> dict[tuple[str, str], dict[str, Sample]]:
    """Measure steps with a bank of adapters, and return the times by model and step."""
    tiny = run.size is Size.TINY
    [model] = [Served("Llama 1 × 16", *_TINY)] if tiny else served(run.size)[1:]
    steps = _TINY_STEPS if tiny else _STEPS
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        bank, single, names = _sessions(model, Path(folder))
        for (title, (tokens, past)), part in run.each(steps.items(), lambda item: item[0]):
            inputs = _inputs(model, bank, tokens, past)
            contenders = _contenders(bank, single, names, inputs)
            times[model.title, title] = part.times(
                {name: (lambda: None, work) for name, work in contenders.items()},
                calls=10 if tokens == 1 else 1,
                seconds=_BANK_SECONDS,
                clock=time.thread_time,
            )
    return times


_TINY = (
    *("text-generation", "LlamaForCausalLM"),
    {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "lm_head",
)


def _sessions(model: Served, folder: Path) -> tuple[OnnxSession, OnnxSession, list[str]]:
    """Export a file with a bank of adapters and a file with adapter inputs, and return their sessions.

    Both run on one thread. Also return the names of the adapters.
    """
    base = model.make()
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=model.layers(base), init_lora_weights=False
    )
    names = [f"adapter{number}" for number in range(ROWS)]
    adapted: nn.Module = rewrite(base, config, adapter_name=names[0])
    for name in names[1:]:
        add_adapter(adapted, config, name)
    randomize(adapted).eval()
    ids = model.inputs(2, 8)["input_ids"]
    sessions = []
    for adapters in ("bank", "inputs"):
        file = folder / f"{adapters}.onnx"
        options: Any = {"adapters": adapters, "task": "text-generation", "optimize": "runtime"}
        export_onnx(adapted, file, ids, verify=False, **options)
        sessions.append(OnnxSession(file, "cpu", session_options=_one_thread()))
    bank, single = sessions
    for name in names:
        single.load_adapter(name, adapted, adapter_name=name)
    return bank, single, names


def _inputs(model: Served, session: OnnxSession, tokens: int, past: int) -> dict[str, Tensor]:
    """Return inputs for one step of all rows of a batch, with random keys and values in the cache."""
    draw = torch.Generator().manual_seed(0)
    feeds = {
        "input_ids": model.inputs(ROWS, tokens)["input_ids"],
        "attention_mask": torch.ones(ROWS, past + tokens, dtype=torch.long),
    }
    for port in session.inputs:
        if port.name not in feeds:
            _, heads, _, width = port.shape
            shape = (ROWS, int(heads or 0), past, int(width or 0))
            feeds[port.name] = torch.randn(shape, generator=draw)
    return feeds


def _contenders(
    bank: OnnxSession, single: OnnxSession, names: list[str], inputs: dict[str, Tensor]
) -> dict[str, Callable[[Any], Any]]:
    rows = [
        {name: value[row : row + 1].clone() for name, value in inputs.items()}
        for row in range(ROWS)
    ]

    def separate(_: Any) -> None:
        for row, name in zip(rows, names, strict=True):
            single.run(row, adapter=name)

    def together(_: Any, adapter: Any) -> None:
        bank.run(inputs, adapter=adapter)

    return {
        SEPARATE: separate,
        SEPARATE_AGAIN: separate,
        BANK: functools.partial(together, adapter=names),
        _ONE: functools.partial(together, adapter=names[0]),
        _BARE: functools.partial(together, adapter=None),
    }


def _bank_rows(results: Mapping[tuple[str, str], Mapping[str, Sample]]) -> Iterator[list[str]]:
    for where, samples in results.items():
        for name, sample in samples.items():
            yield [*where, name, str(sample), str(ratio(sample, samples[SEPARATE]))]


BANK_SECTION = Section(
    "onnx_bank",
    ("model", "step", "contender", "median (quartiles)", f"of {ROWS} runs"),
    _run_bank,
    _bank_rows,
)
