"""What one run takes whose rows have different adapters, beside a run for each row."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters import add_adapter
from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.export.onnx import export_onnx
from lora_fx.export.providers import import_onnxruntime
from lora_fx.export.session import OnnxSession
from lora_fx.tools.bench.measure import Run, Sample, Size, ratio
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.workloads import RANK, Served, randomize, served

__all__ = ["AGAIN", "BANK", "ROWS", "SECTION", "SEPARATE"]

ROWS = 8
SEPARATE = f"{ROWS} runs of one row, swappable"
AGAIN = f"{SEPARATE}, again (A/A)"
BANK = f"one run, {ROWS} adapters"
_ONE, _BARE = "one run, one adapter", "one run, no adapter"
_STEPS = {"decode, past 128": (1, 128), "prefill, 128": (128, 0)}
_TINY_STEPS = {"decode, past 8": (1, 8)}
_SECONDS = 60.0


def _run(run: Run) -> dict[tuple[str, str], dict[str, Sample]]:
    """Times by model and step."""
    tiny = run.size is Size.TINY
    [model] = [Served("Llama 1 × 16", *_TINY)] if tiny else served(run.size)[1:]
    steps = _TINY_STEPS if tiny else _STEPS
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        bank, single, names = _sessions(model, Path(folder))
        for (title, (tokens, past)), part in run.each(steps.items(), lambda one: one[0]):
            inputs = _inputs(model, bank, tokens, past)
            contenders = _contenders(bank, single, names, inputs)
            found[model.title, title] = part.times(
                {name: (lambda: None, work) for name, work in contenders.items()},
                calls=10 if tokens == 1 else 1,
                seconds=_SECONDS,
                clock=time.thread_time,
            )
    return found


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
    """The files with a bank and with inputs, open on one thread, and the names of the adapters in both."""
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
    found = []
    for adapters in ("bank", "inputs"):
        file = folder / f"{adapters}.onnx"
        how: Any = {"adapters": adapters, "task": "text-generation", "optimize": "runtime"}
        export_onnx(adapted, file, ids, verify=False, **how)
        options = import_onnxruntime().SessionOptions()
        options.intra_op_num_threads = 1
        found.append(OnnxSession(file, "cpu", session_options=options))
    bank, single = found
    for name in names:
        single.load_adapter(name, adapted, adapter_name=name)
    return bank, single, names


def _inputs(model: Served, session: OnnxSession, tokens: int, past: int) -> dict[str, Tensor]:
    """One step of all rows, with a past of random keys and values."""
    draw = torch.Generator().manual_seed(0)
    found = {
        "input_ids": model.inputs(ROWS, tokens)["input_ids"],
        "attention_mask": torch.ones(ROWS, past + tokens, dtype=torch.long),
    }
    for port in session.inputs:
        if port.name not in found:
            _, heads, _, width = port.shape
            shape = (ROWS, int(heads or 0), past, int(width or 0))
            found[port.name] = torch.randn(shape, generator=draw)
    return found


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
        AGAIN: separate,
        BANK: functools.partial(together, adapter=names),
        _ONE: functools.partial(together, adapter=names[0]),
        _BARE: functools.partial(together, adapter=None),
    }


def _rows(results: Mapping[tuple[str, str], Mapping[str, Sample]]) -> Iterator[list[str]]:
    for where, samples in results.items():
        for name, sample in samples.items():
            yield [*where, name, str(sample), str(ratio(sample, samples[SEPARATE]))]


SECTION = Section(
    "onnx_bank",
    ("model", "step", "contender", "median (quartiles)", f"of {ROWS} runs"),
    _run,
    _rows,
)
