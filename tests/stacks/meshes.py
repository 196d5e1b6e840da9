"""What four gloo processes do with FSDP2, HSDP and FSDP2 over tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.stacks.tensor_parallel import (
    TARGETS,
    filled,
    gathered,
    parallelized,
    said,
    step,
    whole,
)

__all__ = ["IDS", "LATE", "RANKS", "WAYS", "alone", "combined", "config", "mean_step", "work"]

RANKS = 4
IDS = torch.arange(48).view(4, 12)
# The mesh, how many processes have other samples, and options of the configuration.
WAYS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fsdp": ("fsdp", 4, {}),
    "hsdp, dropout": ("hsdp", 4, {"lora_dropout": 0.5}),
    "hsdp, dora": ("hsdp", 4, {"use_dora": True}),
    "hsdp, bias of B": ("hsdp", 4, {"lora_bias": True}),
    "fsdp x tp": ("fsdp x tp", 2, {"lora_dropout": 0.5}),
    "fsdp x tp, dora": ("fsdp x tp", 2, {"use_dora": True}),
    "fsdp x tp, bias of B": ("fsdp x tp", 2, {"lora_bias": True}),
    "fsdp x tp, all biases": ("fsdp x tp", 2, {"bias": "all"}),
}
# Those to which an adapter is added when they are sharded.
LATE = tuple(way for way in WAYS if "biases" not in way)


def config(options: dict[str, Any]) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": TARGETS, "seed": 0, **options})


def alone(options: dict[str, Any]) -> Any:
    """The model of one process, with an adapter that changes its outputs."""
    return randomize(lora_fx.rewrite(base(options), config(options)))


def base(options: dict[str, Any]) -> Any:
    """Llama, with biases where something of them is trained."""
    biases = "bias" in options or "lora_bias" in options
    return whole({"biases": biases})


def combined(model: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A combination of both adapters; nothing where there is none."""
    if options.keys() & {"use_dora", "lora_bias"}:
        return {}
    lora_fx.add_weighted_adapter(model, ["default", "late"], [1.0, -0.5], "both", "cat")
    return lora_fx.adapter_state_dict(model, "both")


def mean_step(model: Any, groups: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss, and gradients, of what each process or group has of the samples."""
    steps = [step(model, seed, part) for seed, part in enumerate(IDS.chunk(groups))]
    losses = torch.stack([loss for loss, _ in steps])
    means = {
        name: torch.stack([gradients[name] for _, gradients in steps]).mean(0)
        for name in steps[0][1]
    }
    return losses.mean(), means


def meshes(way: str) -> tuple[Any, Any]:
    """The mesh of FSDP2, and that of tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh

    if way == "fsdp":
        return init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",)), None
    if way == "hsdp":
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "fsdp")), None
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    return mesh["fsdp"], mesh["tp"]


def shard(model: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh)
    return model


def one_way(way: str) -> dict[str, Any]:
    name, groups, options = WAYS[way]
    data, tensor = meshes(name)
    own = base(options) if tensor is None else parallelized(base(options), tensor)
    model = filled(lora_fx.rewrite(own, config(options)), alone(options))
    model = shard(model, data)
    mine = dist.get_rank() * groups // RANKS
    loss, gradients = step(model, mine, IDS.chunk(groups)[mine])
    merged = lora_fx.merge(model)
    state = {name: gathered(value) for name, value in merged.state_dict().items()}
    with torch.no_grad():
        logits = gathered(merged(IDS).logits)
    found: dict[str, Any] = {"loss": loss, "gradients": gradients, "merged": (state, logits)}
    if way in LATE:
        lora_fx.add_adapter(model, config({**options, "r": 3, "init_lora_weights": False}), "late")
        both = combined(model, options)
        lora_fx.set_adapter(model, "late")
        states = [lora_fx.adapter_state_dict(model, "late")]
        loss, gradients = step(model, mine, IDS.chunk(groups)[mine])
        late = {key: value for key, value in gradients.items() if ".late" in key}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            torch.manual_seed(mine)
            part = IDS.chunk(groups)[mine]
            model(part, labels=part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(lora_fx.adapter_state_dict(model, "late"))
        found["late"] = {"loss": loss, "gradients": late, "states": states, "both": both}
        found["refused"] = said(
            lambda: lora_fx.add_adapter(model, config({"modules_to_save": ["lm_head"]}), "more")
        )
    return found


def work(rank: int, folder: str) -> dict[str, Any]:
    return {way: one_way(way) for way in WAYS}
