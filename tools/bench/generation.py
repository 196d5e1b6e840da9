"""Text from an exported decoder, beside onnxruntime-genai on the file of its own model builder."""

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
from lora_fx.tools.bench.workloads import RANK, Served, llama_shape, randomize

__all__ = ["ADAPTED", "AGAIN", "MERGED", "PEER", "SECTION", "Generated"]


PEER, AGAIN = "onnxruntime-genai, its builder's file", "the same again (A/A)"
MERGED, BARE = "lora-fx, merged", "a bare loop over that file"
ADAPTED, ALONE = "lora-fx, swappable, one adapter", "lora-fx, swappable, no adapter"

_PROMPT, _TOKENS = 128, 64
_SECONDS = 120.0

_Text = Callable[[], list[int]]


@dataclasses.dataclass(frozen=True)
class Generated:
    """What the contenders took.

    Attributes:
        samples: CPU seconds of a text, by contender.
        tokens: New tokens of a text.
        equal: Contenders without an adapter whose tokens are those of the merged file.
        missing: Why the peer did not run, or "".
    """

    samples: Mapping[str, Sample]
    tokens: int
    equal: tuple[str, ...]
    missing: str = ""


class _Clock:
    """CPU seconds of this process and of those that report theirs."""

    def __init__(self) -> None:
        self.others = 0.0

    def __call__(self) -> float:
        return time.process_time() + self.others


class _Peer:
    """onnxruntime-genai in a process of its own, which generates when it is told.

    Args:
        python: Of its environment.
        folder: What it loads.
        prompt: The tokens that it goes on from.
        length: Of the whole text.
        clock: Is told what it takes.
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
        said = json.loads(self._process.stdout.readline() or '{"error": "it ended without a word"}')
        if "error" in said:
            raise ExportError(f"onnxruntime-genai: {said['error']}")
        self._clock.others += said["seconds"]
        tokens: list[int] = said["tokens"]
        return tokens


def _run(run: Run) -> Generated:
    tiny = run.size is Size.TINY
    shape = llama_shape(32, 48, 1, 2, 64) if tiny else llama_shape(512, 1376, 8, 8, 2000)
    # A token that random weights do not give: texts are of one length.
    shape |= {"eos_token_id": shape["vocab_size"] - 1, "max_position_embeddings": 512}
    model = Served(
        f"Llama {shape['num_hidden_layers']} × {shape['hidden_size']}",
        "text-generation",
        "LlamaForCausalLM",
        shape,
        "lm_head",
    )
    prompt = model.inputs(1, 8 if tiny else _PROMPT)["input_ids"]
    tokens = 4 if tiny else _TOKENS
    clock = _Clock()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        _write(model, folder)
        texts = _ours(folder, prompt, tokens)
        missing = _add_peer(texts, folder, prompt, tokens, clock, stack)
        want = texts[MERGED]()
        equal = [one for one, text in texts.items() if one != ADAPTED and text() == want]
        samples = run.times(
            {one: (lambda: None, functools.partial(_call, text)) for one, text in texts.items()},
            seconds=_SECONDS,
            clock=clock,
        )
    return Generated(samples, tokens, tuple(equal), missing)


def _call(text: _Text, _: None) -> list[int]:
    return text()


def _write(model: Served, folder: Path) -> None:
    base: Any = model.make()
    base.config.use_cache = True
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    layers = model.layers(base)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, init_lora_weights=False)
    ids = model.inputs()["input_ids"]
    adapted = randomize(rewrite(base, config).eval())
    export_onnx(base, folder / "merged.onnx", ids, task="text-generation", optimize="runtime")
    export_onnx(
        adapted,
        folder / "swappable.onnx",
        ids,
        task="text-generation",
        optimize="runtime",
        adapters="inputs",
    )
    save_onnx_adapter(adapted, folder / "a.onnx_adapter")


def _ours(folder: Path, prompt: torch.Tensor, tokens: int) -> dict[str, _Text]:
    def opened(name: str) -> OnnxSession:
        options = providers.import_onnxruntime().SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        return OnnxSession(folder / name, "cpu", session_options=options)

    merged, swappable = opened("merged.onnx"), opened("swappable.onnx")
    swappable.load_adapter("a", folder / "a.onnx_adapter")

    def text(session: OnnxSession, adapter: str | None = None) -> _Text:
        def generate() -> list[int]:
            made = session.generate(prompt, max_new_tokens=tokens, eos_token_id=[], adapter=adapter)
            found: list[int] = made[0].tolist()
            return found

        return generate

    return {
        MERGED: text(merged),
        BARE: lambda: _bare(merged, prompt, tokens),
        ADAPTED: text(swappable, "a"),
        ALONE: text(swappable),
    }


def _bare(session: OnnxSession, prompt: torch.Tensor, tokens: int) -> list[int]:
    """What one writes by hand: ``run`` of ONNX Runtime, its caches given back to it."""
    runtime = session._session
    outputs = [port.name for port in session.outputs]
    past = {}
    for port in session.inputs:
        if port.name.startswith("past"):
            _, heads, _, width = (size if isinstance(size, int) else 0 for size in port.shape)
            past[port.name] = np.zeros((1, heads, 0, width), np.float32)
    ids, found = prompt.numpy(), prompt[0].tolist()
    for _ in range(tokens):
        mask = np.ones((1, len(found)), np.int64)
        results = runtime.run(None, {**past, "input_ids": ids, "attention_mask": mask})
        named = dict(zip(outputs, results, strict=True))
        past = {name: named[name.replace("past_key_values", "present")] for name in past}
        ids = named["logits"][:, -1].argmax(-1)[:, None]
        found.append(int(ids[0, 0]))
    return found


def _add_peer(
    texts: dict[str, _Text],
    folder: Path,
    prompt: torch.Tensor,
    tokens: int,
    clock: _Clock,
    stack: ExitStack,
) -> str:
    """Add the peer, twice; or say why it does not run."""
    python, here = environment_of("genai"), environment_of(HERE)
    if python is None or here is None:
        return "not installed: make bench-envs"
    packages = next(python.parent.parent.glob("lib/python*/site-packages"))
    said = exported(here, "builder", (folder / "base", packages, folder / "built"))
    if said.error:
        return said.error
    length = prompt.shape[1] + tokens
    for name in (PEER, AGAIN):
        peer = _Peer(python, folder / "built", prompt[0].tolist(), length, clock)
        texts[name] = stack.enter_context(peer)
    return ""


def _rows(found: Generated) -> Iterator[list[str]]:
    if found.missing:
        yield [PEER, found.missing, "", "", ""]
    for name, sample in found.samples.items():
        peer = str(ratio(sample, found.samples[PEER])) if PEER in found.samples else ""
        took = f"{1e3 * statistics.median(sample.times) / found.tokens:.2f} ms"
        same = "" if name == ADAPTED else "yes" if name in found.equal else "no"
        yield [name, took, peer, str(ratio(sample, found.samples[BARE])), same]


SECTION = Section(
    "generation",
    ("contender", "CPU time a token", "of onnxruntime-genai", "of the bare loop", "equal tokens"),
    _run,
    _rows,
)
