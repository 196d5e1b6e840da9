"""What processes do with checkpoints in parts, and with models that begin on the meta device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaForCausalLM

import lora_fx
from tests.stacks.meshes import config, shard
from tests.stacks.models import IDS, llama
from tests.stacks.tensor_parallel import gathered, parallelized, said

__all__ = ["HOW", "STARTS", "load", "load_and_train", "one_more", "optimized", "save"]

# How two processes hold what four hold otherwise.
HOW = ("fsdp", "tp")
# Options of adapters that begin on the meta device.
STARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "both random": {"init_lora_weights": False},
    "dora": {"use_dora": True},
}


def optimized(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def one_more(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """A step in which every process has the same samples."""
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def adapted(how: str) -> Any:
    """Llama with an adapter, in the parts that this many processes hold."""
    base, size = llama().double(), dist.get_world_size()
    if how == "fsdp":
        return shard(lora_fx.rewrite(base, config({})), init_device_mesh("cpu", (size,)))
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("fsdp", "tp"))
    model = lora_fx.rewrite(parallelized(base, mesh["tp"]), config({}))
    return model if size == 2 else shard(model, mesh["fsdp"])


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    held, kept = get_state_dict(model, optimizer)
    return {"model": held, "optimizer": kept}


def load_and_train(model: Any, where: Path, **options: Any) -> dict[str, Any]:
    """The adapter of a checkpoint, and what it is after one more step."""
    optimizer = optimized(model)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=where, **options)
    held, kept = state["model"], state["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=held, optim_state_dict=kept)
    found = {"loaded": lora_fx.adapter_state_dict(model)}
    one_more(model, optimizer)
    return {**found, "trained": lora_fx.adapter_state_dict(model)}


def save(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"meta": {name: from_meta(STARTS[name]) for name in STARTS}}
    for how in HOW:
        model = adapted(how)
        optimizer = optimized(model)
        for _ in range(2):
            one_more(model, optimizer)
        dcp.save(state_of(model, optimizer), checkpoint_id=Path(folder) / how)
        lora_fx.save_adapter(model, Path(folder) / f"adapter {how} {rank}")
        saved = lora_fx.adapter_state_dict(model)
        one_more(model, optimizer)
        found[how] = {"saved": saved, "trained": lora_fx.adapter_state_dict(model)}
    return found


def load(rank: int, folder: str) -> dict[str, Any]:
    found = {}
    for how in HOW:
        model = adapted(how)
        found[how] = load_and_train(model, Path(folder) / how)
        again = lora_fx.load_adapter_state_dict
        again(model, found[how]["loaded"])
        lora_fx.save_adapter(model, Path(folder) / f"adapter {how} of four {rank}")
    return found


def from_meta(options: dict[str, Any]) -> dict[str, Any]:
    """Rewritten without memory, sharded, given memory, and then its weights and its start."""
    whole = llama().double()
    with torch.device("meta"):
        empty = LlamaForCausalLM(copy.deepcopy(whole.config)).double().eval()
    model = lora_fx.rewrite(empty, config(options))
    no_values = said(lambda: lora_fx.initialize(model))
    model = shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for name, buffer in whole.named_buffers():
        model.get_buffer(name).copy_(buffer)
    everything = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, whole.state_dict(), options=everything)
    lora_fx.initialize(model)
    with torch.no_grad():
        logits = gathered(model(IDS).logits)
    return {"state": lora_fx.adapter_state_dict(model), "logits": logits, "refused": no_values}
