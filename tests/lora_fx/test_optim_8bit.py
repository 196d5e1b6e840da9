"""Adapters over a quantized base under optimizers whose state has 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig, correct_gradients, parameter_groups
from tests.quantized import SCHEMES

# Both libraries keep 32 bits for what has fewer elements.
SMALLEST = 4096
CPU, CUDA = "cpu", pytest.param("cuda", marks=pytest.mark.cuda)
BITSANDBYTES = ("AdamW8bit", "PagedAdamW8bit", "Lion8bit")


class Net(nn.Module):
    """An embedding and two products over a quantized weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(600, 256)
        self.first, self.second = nn.Linear(256, 512), nn.Linear(512, 16)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(self.table(ids)).tanh())
        return result


IDS = torch.randint(0, 600, (64,), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 16, (64,), generator=torch.Generator().manual_seed(1))


def adapted(device: str = "cpu", targets: tuple[str, ...] = ("first", "second")) -> nn.Module:
    torch.manual_seed(0)
    base = Net()
    base.first, base.second = (SCHEMES["nf4 double"](one) for one in (base.first, base.second))
    config = LoraConfig(r=16, target_modules=list(targets))
    return lora_fx.rewrite(base.to(device), config).train()


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12) -> list[float]:
    device = next(model.parameters()).device
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(IDS.to(device)), LABELS.to(device))
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, torch.dtype]:
    state = optimizer.state[parameter]
    return {name: one.dtype for name, one in state.items() if name in ("state1", "state2")}


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("name", BITSANDBYTES)
# On the CPU there is nothing to page to.
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_loss_falls_and_the_state_has_8_bits(name: str, device: str) -> None:
    model = adapted(device)
    rate = 1e-3
    groups = parameter_groups(model, lr=rate, lora_plus_ratio=4, weight_decay=0.01)
    optimizer = getattr(bnb.optim, name)(groups, lr=rate)
    assert [(one["name"], one["lr"]) for one in optimizer.param_groups] == [
        ("lora_A", rate),
        ("lora_B", 4 * rate),
    ]
    found = losses(model, optimizer)
    assert found[-1] < 0.9 * found[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    assert {*optimizer.state} == {*trained}
    for parameter in trained:
        wanted = torch.uint8 if parameter.numel() >= SMALLEST else torch.float32
        dtypes = moments(optimizer, parameter)
        assert dtypes
        assert {*dtypes.values()} == {wanted}


def test_8_bits_of_state_train_nearly_as_32_do() -> None:
    kinds: tuple[Callable[..., Any], ...] = (bnb.optim.AdamW8bit, torch.optim.AdamW)
    found = []
    for kind in kinds:
        model = adapted()
        found.append(losses(model, kind(parameter_groups(model, lr=1e-3), lr=1e-3)))
    assert found[0][0] == found[1][0]
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_lora_fa_corrects_the_gradients_of_b() -> None:
    model = adapted()
    optimizer = bnb.optim.AdamW8bit(parameter_groups(model, lr=1e-3, lora_fa=True), lr=1e-3)
    correct_gradients(optimizer, model)
    first = model.first.lora_A.default.clone()
    found = losses(model, optimizer)
    assert found[-1] < found[0]
    assert torch.equal(model.first.lora_A.default, first)
    assert moments(optimizer, model.first.lora_B.default)["state1"] is torch.uint8


def test_the_embeddings_of_a_group_can_keep_32_bits() -> None:
    model = adapted(targets=("table", "first"))
    groups = parameter_groups(model, lr=1e-3)
    manager = bnb.optim.GlobalOptimManager.get_instance()
    for group in groups:
        if group["name"] == "embeddings":
            manager.override_config(group["params"], "optim_bits", 32)
    optimizer = bnb.optim.AdamW8bit(groups, lr=1e-3)
    losses(model, optimizer, 1)
    by_name = {one["name"]: one["params"] for one in groups}
    assert {one["name"] for one in groups} == {"lora_A", "lora_B", "embeddings"}
    for name, wanted in (("embeddings", torch.float32), ("lora_B", torch.uint8)):
        large = [p for p in by_name[name] if p.numel() >= SMALLEST]
        assert large
        for parameter in large:
            assert moments(optimizer, parameter)["state1"] is wanted, name


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_training_goes_on_from_a_saved_state(name: str) -> None:
    model = adapted()
    optimizer = getattr(bnb.optim, name)(parameter_groups(model, lr=1e-3), lr=1e-3)
    losses(model, optimizer, 3)
    values, state = copy.deepcopy((lora_fx.adapter_state_dict(model), optimizer.state_dict()))
    expected = losses(model, optimizer, 3)
    again = adapted()
    lora_fx.load_adapter_state_dict(again, values)
    other = getattr(bnb.optim, name)(parameter_groups(again, lr=1e-3), lr=1e-3)
    other.load_state_dict(state)
    assert losses(again, other, 3) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_optimizers_of_torchao(name: str) -> None:
    # They compile their step, which takes a while.
    import torchao.optim

    model = adapted()
    groups = parameter_groups(model, lr=1e-3, lora_plus_ratio=4)
    optimizer = getattr(torchao.optim, name)(groups, lr=1e-3)
    found = losses(model, optimizer)
    assert found[-1] < 0.9 * found[0]
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = type(optimizer.state[parameter]["exp_avg"]).__name__
            few = f"OptimState{name[5]}bit" if parameter.numel() >= SMALLEST else "Tensor"
            assert kind == few
