"""What a plan says that a training step keeps, compared with what a step keeps."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.ir import Memory
from lora_fx.tools.bench.contenders import BUILDERS, FROZEN, Settings
from lora_fx.tools.bench.counted import saved_bytes
from lora_fx.tools.bench.measure import Size
from lora_fx.tools.bench.workloads import bert, gpt2, small_llama, vit

MODELS = {"llama": small_llama, "bert": bert, "gpt2": gpt2, "vit": vit}


@pytest.mark.parametrize(
    "more", [{}, {"lora_dropout": 0.1}, {"use_dora": True}], ids=["plain", "dropout", "dora"]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_keeps_what_the_plan_says(name: str, more: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    workload = MODELS[name](Size.TINY)
    model, inputs = workload.make(), dict(workload.inputs)
    config = LoraConfig(r=4, target_modules="all-linear", **more)
    found = lora_fx.plan(model, config, inputs).kept
    assert found is not None
    frozen = BUILDERS[FROZEN](model, Settings())
    assert found.frozen == saved_bytes(frozen, lambda: frozen(**inputs).loss)
    assert set(found.adapted) == {*get_args(Memory)}
    for memory, size in found.adapted.items():
        adapted: Any = lora_fx.rewrite(model, config, memory=memory).train()
        adapted(**inputs)  # the first call is watched
        assert size == saved_bytes(adapted, lambda adapted=adapted: adapted(**inputs).loss)
    assert found.adapted["balanced"] < found.adapted["fast"]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


def test_the_words_and_the_numbers() -> None:
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(r=2, target_modules=["first", "last"])
    plan = lora_fx.plan(model, config, torch.randn(4, 8))
    assert plan.kept is not None
    # The inputs of both layers and of the activation, and two products with A.
    assert plan.kept.adapted["fast"] == 4 * (8 + 32 + 32 + 2 + 2) * 4
    assert plan.kept.adapted["balanced"] == plan.kept.adapted["fast"] - 4 * 32 * 4
    assert "with memory='balanced'" in str(plan)
    assert plan.to_dict()["kept"]["balanced"] == plan.kept.adapted["balanced"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(one.requires_grad for one in model.parameters())
    assert lora_fx.plan(model, config).kept is None


def test_what_needs_values_is_not_counted() -> None:
    class Asks(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.sum() > -1e9) else x

    config = LoraConfig(r=2, target_modules=["first", "last"])
    plan = lora_fx.plan(Asks(), config, torch.randn(4, 8))
    assert plan.kept is None
    assert len(plan) == 2
