"""A training step in four gloo processes, counted as the planner counts one on stand-ins."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx import LoraConfig
from lora_fx.tools.cluster import Mesh, devices_of, parallelize, run_step, shard
from tests.zoo import seeded

__all__ = ["CONFIG", "INPUTS", "MESHES", "model", "work"]

MESHES = ("fsdp=4", "tp=4", "fsdp=2,tp=2", "replicate=2,tp=2")
CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
_IDS = torch.arange(64).view(2, 32)
INPUTS = {"input_ids": _IDS, "labels": _IDS}


@seeded
def model(**options: Any) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def measured(text: str) -> dict[str, Any]:
    mesh = Mesh.parse(text)
    devices, base = devices_of(mesh), model()
    if mesh.tp > 1:
        parallelize(base, devices)
    rewritten = lora_fx.rewrite(base, CONFIG)
    del base
    if mesh.size > mesh.tp:
        shard(rewritten, devices)
    rewritten.train()
    # A thread of gloo may hold what it sent while the peak is reached: the least peak is the model's.
    steps = [run_step(rewritten, INPUTS, lambda: time.sleep(0.1)) for _ in range(4)]
    return dataclasses.asdict(min(steps, key=lambda step: step.peak))


def work(rank: int, folder: str) -> dict[str, Any]:
    del rank, folder
    return {text: measured(text) for text in MESHES}
