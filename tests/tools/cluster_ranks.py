"""A step of a sharded model in several processes over gloo, counted as it happens."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn

import lora_fx
from lora_fx.tools.cluster import Mesh, devices_of, run_step, shard
from tests.allocator import allocator_growth

__all__ = ["BATCH", "CONFIG", "SEQUENCE", "model", "run_rank"]

BATCH, SEQUENCE = 2, 24
CONFIG = lora_fx.LoraConfig(r=4, target_modules="all-linear")


def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def run_rank(rank: int, folder: str, mesh: str) -> None:
    """What a process runs; the first one writes what it has counted."""
    torch.set_num_threads(1)
    one = Mesh.parse(mesh)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=one.size)
    adapted: Any = lora_fx.rewrite(model(), CONFIG).train()
    shard(adapted, devices_of(one))
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    # A thread of gloo may hold what it sent while the peak is reached: the least peak is the model's.
    steps = [run_step(adapted, inputs, lambda: time.sleep(0.1)) for _ in range(4)]
    need = min(steps, key=lambda step: step.peak)
    trace = Path(folder, f"trace{rank}.json")
    backward = partial(_forward_and_backward, adapted, inputs)
    grown = min(allocator_growth(backward, trace) for _ in range(3))
    if rank == 0:
        found = {**dataclasses.asdict(need), "grown": grown}
        Path(folder, "found.json").write_text(json.dumps(found))
    # What holds the group has to go before it: its threads abort the process otherwise, now and then.
    del adapted, backward
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _forward_and_backward(adapted: nn.Module, inputs: dict[str, Any]) -> None:
    adapted(**inputs).loss.backward()
