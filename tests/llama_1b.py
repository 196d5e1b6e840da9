"""A Llama of 1.2 billion parameters: written in shards, or quantized, rewritten and trained for one step.

``python -m tests.llama_1b write FOLDER``, then ``step FOLDER``: a process of its own, whose peak memory is
the largest that it ever had.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx


def empty() -> nn.Module:
    """Llama 3.2 1B on the meta device."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def write(folder: Path) -> None:
    """Random weights, one file for each layer."""
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in empty().named_parameters():
        group = ".".join(name.split(".")[:3])
        groups.setdefault(group, {})[name] = parameter
    where = {}
    for group, parameters in groups.items():
        file = f"{group}.safetensors"
        tensors = {
            name: torch.ones(p.shape, dtype=p.dtype)
            if p.dim() == 1
            else torch.empty(p.shape, dtype=p.dtype).normal_(0, 0.02, generator=generator)
            for name, p in parameters.items()
        }
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}), encoding="utf-8")


def step(folder: Path) -> dict[str, object]:
    """One step of training over the quantized model, and the peak memory of the process."""
    base = lora_fx.quantize(empty(), "nf4", weights=folder)
    config = lora_fx.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    plan = lora_fx.plan(base, config)
    model = lora_fx.rewrite(base, config).train()
    trained = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in trained.items() if p.requires_grad}
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=1e-3)
    ids = torch.randint(0, 128256, (1, 32), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return {
        "parameters": plan.base_parameters,
        "sites": len(plan),
        "loss": loss.item(),
        # B has moved; A waits for it, but for the decay of its weights.
        "trained": all(not torch.equal(trained[name], old) for name, old in before.items()),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    verb, place = sys.argv[1:]
    if verb == "write":
        write(Path(place))
    else:
        sys.stdout.write(json.dumps(step(Path(place))) + "\n")
