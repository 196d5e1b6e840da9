"""What two gloo processes do with stages that are cut from a rewritten model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.stacks.models import llama
from tests.stacks.tensor_parallel import TARGETS

__all__ = ["IDS", "OPTIONS", "RANKS", "SCHEDULES", "build", "loss", "pipelines", "trained"]

RANKS = 2
MICROBATCHES = 4
IDS = torch.arange(96).view(8, 12) % 64
SCHEDULES: dict[str, Any] = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
}


class Stage(nn.Module):
    """Some layers of a Llama; the first stage has the embedding, the last one the head."""

    def __init__(self, model: Any, index: int, stages: int) -> None:
        super().__init__()
        layers = model.model.layers
        share = len(layers) // stages
        self.embed = model.model.embed_tokens if index == 0 else None
        self.layers = layers[index * share : (index + 1) * share]
        self.rotary = model.model.rotary_emb
        self.ends = nn.Sequential(model.model.norm, model.lm_head) if index == stages - 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.embed is None else self.embed(x)
        places = torch.arange(x.shape[1], device=x.device)[None]
        angles = self.rotary(x, places)
        for layer in self.layers:
            x = layer(x, position_ids=places, position_embeddings=angles)
        return x if self.ends is None else self.ends(x)


def build(name: str) -> Any:
    options = {"r": 2, "target_modules": [*TARGETS, "lm_head"], **OPTIONS[name]}
    return randomize(lora_fx.rewrite(llama().double(), LoraConfig(**options)))


def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def trained(model: Any, schedule: Any = None) -> dict[str, Any]:
    """Two steps of SGD: the losses, and the gradients of the first one."""
    optimizer = torch.optim.SGD(lora_fx.trainable_parameters(model), lr=0.1)
    losses, gradients = [], {}
    for step in range(2):
        if schedule is None:
            parts = zip(IDS.chunk(MICROBATCHES), IDS.chunk(MICROBATCHES), strict=True)
            found = [loss(model(x).logits, y) for x, y in parts]
            torch.stack(found).mean().backward()
            losses += [one.detach() for one in found]
        else:
            found = []
            first = dist.get_rank() == 0
            schedule.step(*((IDS,) if first else ()), target=IDS, losses=found)
            losses += [one.detach() for one in found]
        if step == 0:
            gradients = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients}


def piped(name: str, kind: str, folder: str) -> dict[str, Any]:
    rank = dist.get_rank()
    model = build(name).train()
    part = PipelineStage(Stage(model, rank, RANKS), rank, RANKS, torch.device("cpu"))
    found = trained(model, SCHEDULES[kind](part, MICROBATCHES, loss_fn=loss))
    # What each process has trained, put together in all of them.
    state = lora_fx.adapter_state_dict(model)
    mine = {key: value for key, value in state.items() if key_of(key, found["gradients"])}
    states: list[Any] = [None] * RANKS
    dist.all_gather_object(states, mine)
    lora_fx.load_adapter_state_dict(model, {k: v for one in states for k, v in one.items()})
    if rank == 0:
        lora_fx.save_adapter(model, Path(folder) / f"{name} {kind}")
    return found


def key_of(key: str, gradients: dict[str, Any]) -> bool:
    """Whether a process has trained what is under a key of the adapter."""
    module = key.removeprefix("base_model.model.").partition(".lora_")[0]
    return any(name.startswith(f"{module}.lora_") for name in gradients)


def pipelines(rank: int, folder: str) -> dict[str, Any]:
    del rank
    return {(name, kind): piped(name, kind, folder) for name in OPTIONS for kind in SCHEDULES}
