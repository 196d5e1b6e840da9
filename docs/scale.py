"""Training steps of large models on meshes of GPUs: plans them and writes the table of ``scale.md``.

python docs/scale.py            # print it: minutes on one core, no weights, no network
python docs/scale.py --write    # into docs/scale.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tables import show_or_write
from torch import nn

import lora_fx
from lora_fx.tools.cluster import Mesh, Need, plan_step, step_inputs

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


MODELS: dict[str, Any] = {
    "8B (Llama 3)": lambda: llama(4096, 14336, 32, 32),
    "70B (Llama 3)": lambda: llama(8192, 28672, 80, 64),
    "671B (DeepSeek-V3)": deepseek,
}
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
        need = plan_step(
            model, CONFIG, Mesh.parse(mesh), inputs, dtype=torch.bfloat16, checkpointing=again
        )
        shape = f"{batch} x {sequence:,}"
        row = (name, str(Mesh.parse(mesh)), shape, "yes" if again else "no", *sizes(need))
        sys.stderr.write(f"{' '.join(row)}\n")  # a step takes minutes
        yield row


def sizes(need: Need) -> tuple[str, ...]:
    """Return the columns of one step, in GB."""
    trained = need.adapters + need.gradients + need.optimizer
    parts = (need.weights, trained, need.activations, need.gathered, need.peak, need.traffic.total)
    return tuple(f"{part / GIGABYTE:,.1f}" for part in parts)


def table() -> str:
    """Return the whole table in Markdown."""
    lines = [HEADINGS, ("---",) * 4 + ("---:",) * 6, *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    show_or_write(table(), PAGE, "steps")
