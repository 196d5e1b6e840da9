"""One step of a rewritten model in several processes, each with samples of its own, over gloo."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora_fx
from tests.zoo import Residual

__all__ = ["RANKS", "WAYS", "alone", "run_rank"]

RANKS = 2
# What a process does with the model, and the dropout of its branches.
WAYS = {
    "ddp": 0.0,
    "ddp, dropout": 0.5,
    "fsdp": 0.0,
    "fsdp, dropout": 0.5,
    "fsdp, bf16": 0.0,
}


def build(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    config = lora_fx.LoraConfig(r=2, lora_dropout=dropout, init_lora_weights=False)
    return lora_fx.rewrite(Residual(width=8), config).train()


def step(model: Any, rank: int) -> None:
    """The loss of one rank's samples, under its own seed."""
    ids = torch.arange(24).view(RANKS, 3, 4)[rank] % 11
    torch.manual_seed(rank)
    model(ids).square().mean().backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def alone(way: str) -> dict[str, Tensor]:
    """The mean of all ranks' gradients, in one process."""
    model = build(WAYS[way])
    for rank in range(RANKS):
        step(model, rank)
    return {name: grad / RANKS for name, grad in gradients(model).items()}


def sharded(way: str, model: nn.Module) -> nn.Module:
    if way.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    half = torch.bfloat16 if "bf16" in way else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def run_rank(rank: int, folder: str) -> None:
    """What a process runs; the first one writes the gradients of every way."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    found = {}
    for way, dropout in WAYS.items():
        model = sharded(way, build(dropout))
        step(model, rank)
        found[way] = gradients(model)
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    # What holds the group has to go before it: its threads abort the process otherwise, now and then.
    del model
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
