"""What two gloo processes do with DDP and FSDP2, each with samples of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests import mixtures, quantized
from tests.algebra import randomize
from tests.stacks.models import llama
from tests.stacks.tensor_parallel import gathered, said

__all__ = ["CASES", "RANKS", "REWRITES", "STACKS", "alone", "data_parallel", "outputs"]

RANKS = 2
STACKS = ("DDP", "FSDP2")
IDS = torch.arange(48).view(4, 12)
LONG = (torch.arange(1200) * 7 % 64).view(4, 300)  # more than a tile of tokens
# The base, and options of the configuration.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "dropout": ("llama", {"lora_dropout": 0.5}),
    "DoRA": ("llama", {"use_dora": True}),
    "biases": ("llama with biases", {"bias": "all"}),
    "experts": ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "NF4": ("nf4", {}),
    "loss in chunks": ("llama", {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "least memory": ("llama", {"lora_dropout": 0.5}),
}
# Options of the rewrite.
REWRITES: dict[str, dict[str, Any]] = {
    "loss in chunks": {"loss": "chunked"},
    "least memory": {"memory": "least"},
}
# Whose NF4: FSDP2 shards that of torchao; DDP would quantize it a second time as it sends it to all.
NF4 = {"DDP": "nf4", "FSDP2": "nf4 torchao"}


def base(stack: str, name: str) -> Any:
    if name == "mixtral":
        return mixtures.mixtral()  # its kernel has no fp64
    if name == "nf4":
        return quantized.quantized(quantized.llama(), NF4[stack])
    biases = name == "llama with biases"
    return llama(attention_bias=biases, mlp_bias=biases).double()


def build(stack: str, case: str) -> Any:
    name, options = CASES[case]
    config = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    return randomize(
        lora_fx.rewrite(base(stack, name), LoraConfig(**config), **REWRITES.get(case, {}))
    )


def wrapped(stack: str, model: Any) -> Any:
    if stack == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh)
    return model


def step(model: Any, rank: int, case: str = "") -> torch.Tensor:
    """The loss of one rank's samples, under its own seed."""
    torch.manual_seed(rank)
    ids = (LONG if case == "least memory" else IDS).chunk(RANKS)[rank]
    loss: torch.Tensor = model.train()(ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def stepped(model: Any) -> dict[str, torch.Tensor]:
    """The gradients; the parameters are a step further."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = {
        name.removeprefix("module."): gathered(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    optimizer.step()
    optimizer.zero_grad()
    return found


def outputs(model: Any) -> dict[str, torch.Tensor]:
    """What it computes with the adapter, without it, and merged; and the adapter."""
    model.eval()
    with torch.no_grad():
        found = {"on": gathered(model(IDS).logits)}
        with lora_fx.disable_adapter(model):
            found["off"] = gathered(model(IDS).logits)
        found["merged"] = gathered(lora_fx.merge(model).eval()(IDS).logits)
    return {**found, **lora_fx.adapter_state_dict(model)}


def alone(stack: str, case: str) -> dict[str, Any]:
    """One process, with the mean of all gradients."""
    model = build(stack, case)
    losses = [step(model, rank, case) for rank in range(RANKS)]
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= RANKS
    return {"losses": losses, "gradients": stepped(model), "outputs": outputs(model)}


def one(stack: str, case: str) -> dict[str, Any]:
    model = wrapped(stack, build(stack, case))
    loss = step(model, dist.get_rank(), case)
    gradients = stepped(model)
    inner = model.module if stack == "DDP" else model
    refused = said(lambda: lora_fx.merge(model, requantize=True)) if case == "NF4" else ""
    return {"loss": loss, "gradients": gradients, "outputs": outputs(inner), "said": refused}


def data_parallel(rank: int, folder: str) -> dict[str, Any]:
    del rank, folder
    return {(stack, case): one(stack, case) for stack in STACKS for case in CASES}
