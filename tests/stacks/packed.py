"""What two gloo processes do with FSDP2 over quantized weights, each with samples of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests import formats, quantized
from tests.stacks.data_parallel import outputs, step, stepped
from tests.stacks.tensor_parallel import said

__all__ = ["LOST", "RANKS", "SHARDED", "WHOLE", "alone", "packed"]

RANKS = 2
SHARDED = ("nf4", "nf4 double", "nf4 bf16", "nf4 called before", "nf4 torchao")
"""Weights that FSDP2 shards."""
LOST = ("int8 bitsandbytes", "fp8", "experts nf4")
"""Weights that lose their scales if they are not ignored."""
WHOLE = ("nf4", "int8 torchao", "int4 torchao", "experts int8", *LOST)
"""Weights that FSDP2 ignores."""


def build(case: str) -> Any:
    name, _, storage = case.partition(" ")
    options: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
    if name == "experts":
        base = lora_fx.quantize(formats.mixture(), storage)
        options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    elif case in quantized.SCHEMES:
        base = quantized.quantized(quantized.llama(), case)
    else:
        base = quantized.quantized(quantized.llama(), name)
    if storage == "bf16":
        for layer in base.modules():
            if hasattr(layer, "quant_storage"):
                layer.weight.data = layer.weight.data.flatten().view(torch.bfloat16).unsqueeze(1)
                layer.weight.quant_storage = layer.quant_storage = torch.bfloat16
    config = LoraConfig(r=2, init_lora_weights=False, seed=0, **options)
    return lora_fx.rewrite(base, config).train()


def shard(model: Any, ignored: set[nn.Parameter], **options: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh, ignored_params=ignored, **options)
    return model


def alone(case: str) -> dict[str, Any]:
    """One process, with the mean of all gradients."""
    model = build(case)
    losses = [step(model, rank) for rank in range(RANKS)]
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= RANKS
    return {"losses": losses, "gradients": stepped(model), "outputs": outputs(model)}


def trained(case: str, *, whole: bool) -> dict[str, Any]:
    model = build(case)
    if "before" in case:
        model(quantized.IDS)
    stored = [p.numel() for p in lora_fx.quantized_parameters(model)]
    shard(model, lora_fx.quantized_parameters(model) if whole else set())
    loss = step(model, dist.get_rank())
    found = {"loss": loss, "gradients": stepped(model), "refused": "", "stored": len(stored)}
    if whole or "torchao" in case:
        return {**found, "outputs": outputs(model)}
    return {**found, "refused": said(lambda: lora_fx.merge(model))}


def converted() -> str:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.float16)
    model = shard(build("nf4 bf16"), set(), mp_policy=policy)
    return said(lambda: step(model, 0))


def packed(rank: int, folder: str) -> dict[Any, Any]:
    """Losses, gradients, outputs and errors of each case."""
    del rank, folder
    found: dict[Any, Any] = {("sharded", case): trained(case, whole=False) for case in SHARDED}
    found |= {("whole", case): trained(case, whole=True) for case in WHOLE}
    for case in LOST:
        model = shard(build(case), set())
        found["lost", case] = said(lambda model=model: step(model, 0))
    return {**found, "converted": converted()}
