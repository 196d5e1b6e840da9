"""Blocks and modules of tokens that ``memory="least"`` finds, and the reasons for the others."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.ir import Savings

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 48}
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**SIZES, **LAYERS, "num_key_value_heads": 2}


def savings_of(model: nn.Module) -> Savings:
    savings = lora_fx.plan(model, LoraConfig(r=2), memory="least").savings
    assert savings is not None
    return savings


def made(name: str, **sizes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**sizes)
    heads = ("ForCausalLM", "LMHeadModel", "ForImageClassification", "ForMaskedLM")
    head = next(head for head in heads if hasattr(transformers, name + head))
    model: nn.Module = getattr(transformers, name + head)(config)
    return model


def test_llama() -> None:
    savings = savings_of(made("Llama", **GROUPED))
    assert savings.blocks == ("model.layers.0", "model.layers.1")
    parts = ("mlp", "input_layernorm", "post_attention_layernorm")
    tiles = {f"model.layers.{layer}.{part}" for layer in range(2) for part in parts}
    assert {*savings.tiles} == {*tiles, "model.norm"}
    assert dict(savings.left) == {
        f"model.layers.{layer}{rest}": "it needs more than one tensor [..., tokens, features]"
        for layer in range(2)
        for rest in ("", ".self_attn")
    }


EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "head_dim": 4,
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 4},
}


@pytest.mark.parametrize("name", EXPERTS)
def test_mixtures(name: str) -> None:
    savings = savings_of(made(name, **GROUPED, **EXPERTS[name]))
    assert {"model.layers.0.mlp", "model.layers.1.mlp"} <= {*savings.tiles}


def test_images_and_their_gated_parts() -> None:
    savings = savings_of(made("ViT", image_size=8, patch_size=2, **SIZES, **LAYERS))
    assert savings.blocks == ("vit.layers.0", "vit.layers.1")
    assert savings.tiles == ("vit.layers.0.mlp", "vit.layers.1.mlp")


def test_random_parts_are_left() -> None:
    savings = savings_of(made("GPT2", vocab_size=64, n_embd=16, n_layer=1, n_head=4))
    assert savings.blocks == ("transformer.h.0",)
    assert savings.tiles == ()
    assert dict(savings.left)["transformer.h.0.mlp"] == "it draws random numbers"


def test_the_same_without_values() -> None:
    with torch.device("meta"):
        empty = made("Llama", **GROUPED)
    assert savings_of(empty) == savings_of(made("Llama", **GROUPED))


class Rows(nn.Module):
    """MLP with a trap."""

    def __init__(self, trap: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.positions = nn.Parameter(torch.randn(64, 8))
        self.trap, self.count = trap, 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        if self.trap == "position":
            y = y + self.positions[: x.shape[-2]]
        elif self.trap == "mean":
            y = y - y.mean(-2, keepdim=True)
        elif self.trap == "neighbor":
            y = y + y.roll(1, -2) * 0
        elif self.trap == "length":
            y = y * x.shape[-2]
        elif self.trap == "noise":
            y = y + torch.randn_like(y) * 1e-9
        elif self.trap == "count":
            self.count += 1
        elif self.trap == "sum":
            y = y.sum(-2)
        return y


class Net(nn.Module):
    def __init__(self, trap: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Rows(trap), Rows(trap)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return x


TRAPS = {
    "": "",
    "position": "its tokens depend on their position or on each other",
    "mean": "it mixes tokens",
    "neighbor": "it mixes tokens",
    "length": "its tokens depend on their position or on each other",
    "noise": "it draws random numbers",
    "count": "it sets attributes or buffers",
    "sum": "it needs more than one tensor [..., tokens, features]",
}


@pytest.mark.parametrize(("trap", "reason"), TRAPS.items())
def test_a_module_with_a_trap_is_left(trap: str, reason: str) -> None:
    savings = savings_of(Net(trap))
    assert savings.blocks == ("parts.0", "parts.1")
    if reason:
        assert savings.tiles == ()
        assert dict(savings.left)["parts.0"] == reason
    else:
        assert savings.tiles == ("parts.0", "parts.1")


def test_the_plan_says_it() -> None:
    net = Net("mean")
    plan = lora_fx.plan(net, LoraConfig(r=2), memory="least")
    assert "run again in the backward (a GPU keeps their inputs on the host): parts.* (2)" in str(
        plan
    )
    assert "a tile of tokens at a time: none" in str(plan)
    assert "it mixes tokens" in str(plan)
    assert plan.to_dict()["savings"]["blocks"] == ("parts.0", "parts.1")
    assert lora_fx.plan(net, LoraConfig(r=2)).savings is None


def test_a_model_without_blocks() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    reasons = dict(savings_of(net).left)
    assert reasons[""] == "no list of layers of the same class was found: nothing is recomputed"


class Pixels(nn.Module):
    """Attention from each pixel of an image to each, after a scale for each channel."""

    pixels: ClassVar[list[int]] = []

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj((x * self.scale).flatten(-2).mT)
        scores = y @ y.mT
        if isinstance(size := y.shape[-2], int):  # no trace
            self.pixels.append(size)
        return (scores.softmax(-1) @ y).mT.unflatten(-1, x.shape[-2:])


def test_tokens_that_are_taken_for_pixels_are_not_attended() -> None:
    model = nn.Sequential(Pixels(160), Pixels(160))
    Pixels.pixels.clear()
    assert savings_of(model).tiles == ()
    assert Pixels.pixels == []
    assert model(torch.randn(160, 3, 5)).shape == (160, 3, 5)
    assert Pixels.pixels == [15, 15]
