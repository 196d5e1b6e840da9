"""Text generation compared with onnxruntime-genai, and single runs compared with files of other exporters."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.errors import ExportError
from lora_fx.export import providers
from lora_fx.export.adapter_file import save_onnx_adapter
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from lora_fx.tools.bench.export_peers import HERE, SCRIPT, environment_of, exported, write_tokenizer
from lora_fx.tools.bench.measure import Run, Sample, Size, ratio
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.workloads import RANK, Served, llama_shape, randomize, served

__all__ = [
    "ADAPTED",
    "AGAIN",
    "ALONE",
    "BUILT",
    "FILES",
    "MERGED",
    "OPTIMIZED",
    "PEER",
    "RUNS_SECTION",
    "SECTION",
    "Generated",
    "Runs",
]


PEER, AGAIN = "onnxruntime-genai, its builder's file", "the same again (A/A)"
MERGED, BARE = "lora-fx, merged", "a bare loop over that file"
ADAPTED, ALONE = "lora-fx, swappable, one adapter", "lora-fx, swappable, no adapter"

_PROMPT, _TOKENS = 128, 64
_SECONDS = 120.0
_MISSING = "not installed: make bench-envs"

_Text = Callable[[], list[int]]


@dataclasses.dataclass(frozen=True)
class Generated:
    """The times in which the contenders generate a text, and whether the tokens are equal.

    Attributes:
        samples: CPU seconds of a text, by contender.
        tokens: New tokens of a text.
        equal: Contenders without an adapter whose tokens are those of the merged file.
        missing: The reason why the peer did not run, or "".
    """

    samples: Mapping[str, Sample]
    tokens: int
    equal: tuple[str, ...]
    missing: str = ""


class _Clock:
    """Clock of CPU seconds that adds up this process and the peers' processes, which report theirs."""

    def __init__(self) -> None:
        self.others = 0.0

    def __call__(self) -> float:
        return time.process_time() + self.others


class _Peer:
    """onnxruntime-genai in a separate process, which generates one text per call.

    Args:
        python: Python of its environment.
        folder: Folder of the model to load.
        prompt: Tokens to continue.
        length: Number of tokens of the whole text.
        clock: Clock to which the process's CPU seconds are added.
    """

    def __init__(
        self, python: Path, folder: Path, prompt: Sequence[int], length: int, clock: _Clock
    ) -> None:
        command = [str(python), "-I", str(SCRIPT), "genai", str(folder), str(length)]
        self._clock = clock
        self._process = subprocess.Popen(
            [*command, json.dumps(list(prompt))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> _Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def __call__(self) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        reply = json.loads(
            self._process.stdout.readline() or '{"error": "it ended without a word"}'
        )
        if "error" in reply:
            raise ExportError(f"onnxruntime-genai: {reply['error']}")
        self._clock.others += reply["seconds"]
        tokens: list[int] = reply["tokens"]
        return tokens


def _decoder(size: Size) -> Served:
    tiny = size is Size.TINY
    shape = llama_shape(32, 48, 1, 2, 64) if tiny else llama_shape(512, 1376, 8, 8, 2000)
    # Random weights do not produce this token, so all texts have the same length.
    shape |= {"eos_token_id": shape["vocab_size"] - 1, "max_position_embeddings": 1024}
    return Served(
        f"Llama {shape['num_hidden_layers']} × {shape['hidden_size']}",
        "text-generation",
        "LlamaForCausalLM",
        shape,
        "lm_head",
    )


def _run(run: Run) -> Generated:
    tiny = run.size is Size.TINY
    model = _decoder(run.size)
    prompt = model.inputs(1, 8 if tiny else _PROMPT)["input_ids"]
    tokens = 4 if tiny else _TOKENS
    clock = _Clock()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        _write(model, folder)
        texts = _ours(folder, prompt, tokens)
        missing = _add_peer(texts, folder, prompt, tokens, clock, stack)
        want = texts[MERGED]()
        equal = [title for title, text in texts.items() if title != ADAPTED and text() == want]
        samples = run.times(
            {
                title: (lambda: None, functools.partial(_call, text))
                for title, text in texts.items()
            },
            seconds=_SECONDS,
            clock=clock,
        )
    return Generated(samples, tokens, tuple(equal), missing)


def _call(text: _Text, _: None) -> list[int]:
    return text()


def _write(model: Served, folder: Path) -> None:
    base: Any = model.make()
    generates = model.task == "text-generation"
    base.config.use_cache = generates
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    layers = model.layers(base)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, init_lora_weights=False)
    inputs = model.inputs()["input_ids"] if generates else model.inputs()
    adapted = randomize(rewrite(base, config).eval())
    options: Any = {"optimize": "runtime"}
    if generates:
        options["task"] = "text-generation"
    export_onnx(base, folder / "merged.onnx", inputs, **options)
    export_onnx(adapted, folder / "swappable.onnx", inputs, adapters="inputs", **options)
    save_onnx_adapter(adapted, folder / "a.onnx_adapter")


def _one_thread() -> Any:
    options = providers.import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _opened(file: Path) -> OnnxSession:
    return OnnxSession(file, "cpu", session_options=_one_thread())


def _ours(folder: Path, prompt: torch.Tensor, tokens: int) -> dict[str, _Text]:
    merged, swappable = _opened(folder / "merged.onnx"), _opened(folder / "swappable.onnx")
    swappable.load_adapter("a", folder / "a.onnx_adapter")

    def text(session: OnnxSession, adapter: str | None = None) -> _Text:
        def generate() -> list[int]:
            batch = session.generate(
                prompt, max_new_tokens=tokens, eos_token_id=[], adapter=adapter
            )
            row: list[int] = batch[0].tolist()
            return row

        return generate

    return {
        MERGED: text(merged),
        BARE: lambda: _bare(merged, prompt, tokens),
        ADAPTED: text(swappable, "a"),
        ALONE: text(swappable),
    }


def _bare(session: OnnxSession, prompt: torch.Tensor, tokens: int) -> list[int]:
    """Generate a text by calling ONNX Runtime's ``run``, with each step's cache as the next step's input."""
    runtime = session._session
    outputs = [port.name for port in session.outputs]
    past = {}
    for port in session.inputs:
        if port.name.startswith("past"):
            _, heads, _, width = (size if isinstance(size, int) else 0 for size in port.shape)
            past[port.name] = np.zeros((1, heads, 0, width), np.float32)
    ids, generated = prompt.numpy(), prompt[0].tolist()
    for _ in range(tokens):
        mask = np.ones((1, len(generated)), np.int64)
        results = runtime.run(None, {**past, "input_ids": ids, "attention_mask": mask})
        named = dict(zip(outputs, results, strict=True))
        past = {name: named[name.replace("past_key_values", "present")] for name in past}
        ids = named["logits"][:, -1].argmax(-1)[:, None]
        generated.append(int(ids[0, 0]))
    return generated


def _add_peer(
    texts: dict[str, _Text],
    folder: Path,
    prompt: torch.Tensor,
    tokens: int,
    clock: _Clock,
    stack: ExitStack,
) -> str:
    """Add onnxruntime-genai to the contenders under two names, which shows the noise.

    Return the reason if it does not run, or "".
    """
    python = environment_of("genai")
    missing = _build(folder)
    if missing or python is None:
        return missing
    length = prompt.shape[1] + tokens
    for name in (PEER, AGAIN):
        peer = _Peer(python, folder / "built", prompt[0].tolist(), length, clock)
        texts[name] = stack.enter_context(peer)
    return ""


def _build(folder: Path) -> str:
    """Write a file of the base with onnxruntime-genai's builder. Return the reason if this fails, or ""."""
    python, own = environment_of("genai"), environment_of(HERE)
    if python is None or own is None:
        return _MISSING
    packages = next(python.parent.parent.glob("lib/python*/site-packages"))
    return exported(own, "builder", (folder / "base", packages, folder / "built")).error


def _rows(results: Generated) -> Iterator[list[str]]:
    if results.missing:
        yield [PEER, results.missing, "", "", ""]
    for name, sample in results.samples.items():
        peer = str(ratio(sample, results.samples[PEER])) if PEER in results.samples else ""
        took = f"{1e3 * statistics.median(sample.times) / results.tokens:.2f} ms"
        same = "" if name == ADAPTED else "yes" if name in results.equal else "no"
        yield [name, took, peer, str(ratio(sample, results.samples[BARE])), same]


SECTION = Section(
    "generation",
    ("contender", "CPU time a token", "of onnxruntime-genai", "of the bare loop", "equal tokens"),
    _run,
    _rows,
)


# --- single runs ----------------------------------------------------------------------------------
# One call of a file on the CPU, its inputs and outputs bound, compared with files of other exporters.


BUILT, OPTIMIZED = "onnxruntime-genai's builder", "optimum, transformers.optimizer"
_BARE_SUMS = f"{OPTIMIZED}, sums apart"
FILES = (BUILT, OPTIMIZED, _BARE_SUMS)
"""Files of other exporters."""

# Rows, new tokens, tokens in the cache.
_STEPS = {
    "prefill, 128": (1, 128, 0),
    "prefill, 8 × 128": (8, 128, 0),
    "decode, past 128": (1, 1, 128),
    "decode, past 512": (1, 1, 512),
    "decode of 8, past 128": (8, 1, 128),
}
_TINY_STEPS = {"prefill, 8": (1, 8, 0), "decode, past 8": (1, 1, 8)}
_READS = {"read 1 × 128": (1, 128, 0), "read 8 × 128": (8, 128, 0)}
_TINY_READS = {"read 1 × 8": (1, 8, 0)}
_RUNS_SECONDS = 40.0


@dataclasses.dataclass(frozen=True)
class Runs:
    """The times of single runs of a file, without generation.

    Attributes:
        samples: CPU seconds of a run by contender, for each model and step.
        floors: F by model: the ratio of a run with an adapter to one without, by FLOPs alone.
        missing: The reason by peer for each that did not run.
    """

    samples: Mapping[tuple[str, str], Mapping[str, Sample]]
    floors: Mapping[str, float]
    missing: Mapping[str, str]


def _run_once(run: Run) -> Runs:
    tiny = run.size is Size.TINY
    decoder, encoder = _decoder(run.size), served(run.size)[0]
    samples: dict[tuple[str, str], dict[str, Sample]] = {}
    missing = {}
    cases = [
        (decoder, BUILT, _TINY_STEPS if tiny else _STEPS),
        (encoder, OPTIMIZED, _TINY_READS if tiny else _READS),
    ]
    for (model, peer, steps), part in run.each(cases, lambda case: case[0].title):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _write(model, folder)
            if peer == BUILT:
                theirs = {peer: folder / "built" / "model.onnx"}
                missing[peer] = _build(folder)
            else:
                theirs = {title: folder / title / "optimized.onnx" for title in (peer, _BARE_SUMS)}
                missing[peer] = _optimize(folder, theirs)
            if missing[peer]:
                theirs = {}
            for (step, size), step_run in part.each(steps.items(), lambda item: item[0]):
                contenders = {
                    title: (lambda: None, work)
                    for title, work in _single(model, folder, theirs, size).items()
                }
                samples[model.title, step] = step_run.times(
                    contenders,
                    calls=min(10, max(1, 512 // (size[0] * size[1]))),
                    seconds=_RUNS_SECONDS,
                    clock=time.thread_time,
                )
    floors = {model.title: model.floor() for model in (decoder, encoder)}
    return Runs(samples, floors, {peer: why for peer, why in missing.items() if why})


def _optimize(folder: Path, files: Mapping[str, Path]) -> str:
    """Write files of the base with ONNX Runtime's optimizer. Return the reason if this fails, or ""."""
    python = environment_of("optimum")
    if python is None:
        return _MISSING
    for name, file in files.items():
        file.parent.mkdir()
        sums = "apart" if name == _BARE_SUMS else "fused"
        if error := exported(python, "optimizer", (folder / "base", file.parent, sums)).error:
            return error
    return ""


def _single(
    model: Served, folder: Path, theirs: Mapping[str, Path], size: tuple[int, int, int]
) -> dict[str, Callable[[Any], None]]:
    runtime = providers.import_onnxruntime()
    factors = runtime.AdapterFormat.read_adapter(str(folder / "a.onnx_adapter"))
    runs = {}
    for name, file in theirs.items():
        session = runtime.InferenceSession(
            str(file),
            _one_thread(),
            providers=["CPUExecutionProvider"],
            # Otherwise ONNX Runtime fuses the sums itself.
            disabled_optimizers=["SkipLayerNormFusion"] if name == _BARE_SUMS else [],
        )
        runs[name] = _bound(session, model, size)
        runs.setdefault(AGAIN, runs[name])
    swappable = _opened(folder / "swappable.onnx")._session
    runs[MERGED] = _bound(_opened(folder / "merged.onnx")._session, model, size)
    runs[ALONE] = _bound(swappable, model, size)
    runs[ADAPTED] = _bound(swappable, model, size, factors)
    return runs


def _bound(
    session: Any, model: Served, size: tuple[int, int, int], factors: Any = None
) -> Callable[[Any], None]:
    """Return a function that runs a session on fixed inputs, into memory that stays allocated.

    The inputs are the same for all files.
    """
    rows, new, past = size
    heads = model.shape["num_attention_heads"]
    draw = np.random.default_rng(0)
    values: dict[str, Any] = {
        "input_ids": model.inputs(rows, new)["input_ids"].numpy(),
        "attention_mask": np.ones((rows, past + new), np.int64),
        "token_type_ids": np.zeros((rows, new), np.int64),
    }
    binding = session.io_binding()
    for port in session.get_inputs():
        if port.name.startswith("past"):
            shape = (rows, heads, past, model.shape["hidden_size"] // heads)
            values[port.name] = draw.standard_normal(shape, dtype=np.float32)
        binding.bind_cpu_input(port.name, values[port.name])
    ortvalues = {} if factors is None else factors.get_parameters()
    for name, value in ortvalues.items():
        binding.bind_ortvalue_input(name, value)
    outputs = [port.name for port in session.get_outputs()]
    for name in outputs:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    for name, value in zip(outputs, binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(name, value)

    def work(_: Any, kept: Any = (factors, ortvalues, values)) -> None:
        session.run_with_iobinding(binding)

    return work


def _run_rows(results: Runs) -> Iterator[list[str]]:
    for peer, why in results.missing.items():
        yield ["", "", peer, why, "", "", ""]
    for (model, step), samples in results.samples.items():
        theirs = [samples[title] for title in FILES if title in samples]
        for name, sample in samples.items():
            beside = str(ratio(sample, theirs[0])) if theirs else ""
            swapped = str(ratio(sample, samples[ALONE])) if name == ADAPTED else ""
            floor = f"{results.floors[model]:.3f}" if name == ADAPTED else ""
            yield [model, step, name, str(sample), beside, swapped, floor]


RUNS_SECTION = Section(
    "peer_runs",
    ("model", "step", "contender", "CPU time (quartiles)", "of the peer", "of no adapter", "F"),
    _run_once,
    _run_rows,
)
