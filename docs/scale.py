"""Training steps of large models on meshes of GPUs: plans them and writes the table of ``scale.md``.

python docs/scale.py            # print it: minutes on one core, no weights, no network
python docs/scale.py --write    # into docs/scale.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tables import show_or_write
from torch import nn

import lora_fx
from lora_fx.tools.cluster import Mesh, Need, Settings, plan_step, step_inputs
from lora_fx.tools.fit import fits, size_of, usable

PAGE = Path(__file__).with_name("scale.md")
CONFIG = lora_fx.LoraConfig(r=16)
GIGABYTE = 10**9
HEADINGS = (
    "model",
    "GPUs",
    "samples x tokens",
    "recompute",
    "weights",
    "adapters, gradients, AdamW",
    "kept",
    "gathered",
    "peak",
    "sent in a step",
)


def llama(width: int, inner: int, layers: int, heads: int) -> nn.Module:
    """Return a Llama of these sizes, with the vocabulary and the key heads of Llama 3."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def deepseek() -> nn.Module:
    """Return DeepSeek-V3 with its default configuration."""
    with torch.device("meta"):
        return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config())


def gpt_oss() -> nn.Module:
    """Return gpt-oss-20b: the default configuration with 24 layers of 32 experts."""
    config = transformers.GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    with torch.device("meta"):
        return transformers.GptOssForCausalLM(config)


MODELS: dict[str, Any] = {
    "8B (Llama 3)": lambda: llama(4096, 14336, 32, 32),
    "70B (Llama 3)": lambda: llama(8192, 28672, 80, 64),
    "671B (DeepSeek-V3)": deepseek,
    "gpt-oss-20b": gpt_oss,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Model, format of its weights, adapted layers (all linear ones by default), card.
CARDS: tuple[tuple[str, str, list[str] | None, str], ...] = (
    ("8B (Llama 3)", "nf4", None, "24GB"),
    ("70B (Llama 3)", "nf4", None, "80GB"),
    ("gpt-oss-20b", "mxfp4", ATTENTION, "16GiB"),
    ("gpt-oss-20b", "mxfp4", None, "24GB"),
)
FITTING = ("model", "weights", "adapters on", "card", "longest context", "peak", "on the host")
# Model, mesh, samples per GPU, tokens per sample, True if blocks are recomputed.
STEPS = (
    ("8B (Llama 3)", "fsdp=1", 1, 4096, True),
    ("8B (Llama 3)", "fsdp=8", 1, 4096, False),
    ("8B (Llama 3)", "fsdp=8", 4, 4096, True),
    ("70B (Llama 3)", "fsdp=8", 1, 4096, True),
    ("70B (Llama 3)", "fsdp=8,tp=2", 1, 4096, True),
    ("671B (DeepSeek-V3)", "fsdp=64", 1, 4096, True),
)


def rows() -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table, one for each step."""
    built: dict[str, nn.Module] = {}
    for name, mesh, batch, sequence, again in STEPS:
        if name not in built:
            built = {name: MODELS[name]()}
        model = built[name]
        inputs = step_inputs(model, None, batch=batch, sequence=sequence)
        settings = Settings(dtype=torch.bfloat16, checkpointing=again)
        need = plan_step(model, CONFIG, Mesh.parse(mesh), inputs, settings)
        shape = f"{batch} x {sequence:,}"
        row = (name, str(Mesh.parse(mesh)), shape, "yes" if again else "no", *sizes(need))
        sys.stderr.write(f"{' '.join(row)}\n")  # a step takes minutes
        yield row


def sizes(need: Need) -> tuple[str, ...]:
    """Return the columns of one step, in GB."""
    trained = need.adapters + need.gradients + need.optimizer
    parts = (need.weights, trained, need.activations, need.gathered, need.peak, need.traffic.total)
    return tuple(f"{part / GIGABYTE:,.1f}" for part in parts)


def longest() -> Iterator[tuple[str, ...]]:
    """Yield a row for each card: the longest context with ``memory="least"``."""
    for name, stored, targets, card in CARDS:
        config = lora_fx.LoraConfig(r=16, target_modules=targets)
        settings = Settings(dtype=torch.bfloat16, quantize=stored)
        room = usable(size_of("card", card))
        (fit,) = fits(MODELS[name](), config, room, settings, memories=["least"], sequence=1 << 30)
        adapted = "attention" if targets else "all linear layers"
        sizes = (f"{size / GIGABYTE:,.1f}" for size in (fit.need.peak, fit.need.host))
        row = (name, stored, adapted, card, f"{fit.context:,}", *sizes)
        sys.stderr.write(f"{' '.join(row)}\n")
        yield row


def table(headings: Sequence[str], rows: Iterable[tuple[str, ...]], text: int) -> str:
    """Return a table in Markdown, whose first columns are text."""
    lines = [headings, ("---",) * text + ("---:",) * (len(headings) - text), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    show_or_write(table(FITTING, longest(), 4), PAGE, "cards")
    show_or_write(table(HEADINGS, rows(), 4), PAGE, "steps")
