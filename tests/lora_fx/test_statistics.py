"""Batch norms in saved modules: each adapter has its statistics, and the base has its own, as in PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.numerics import assert_close, assert_same_bits

CONFIG: dict[str, Any] = {"r": 2, "target_modules": ["body"], "modules_to_save": ["head"]}
FIRST, SECOND = LoraConfig(**CONFIG, seed=2), LoraConfig(**CONFIG, seed=3)
MEAN = "head.1.running_mean"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def rows(seed: int) -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, seed: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()
    for step in range(3):
        model(rows(seed + step) + seed).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net(rows(9) * 2)  # statistics that are not those of a new module
    return net.eval()


def two(base: nn.Module) -> nn.Module:
    """Two adapters, trained one after the other on different data."""
    model = lora_fx.rewrite(base, FIRST, adapter_name="one")
    train(model, 1)
    lora_fx.add_adapter(model, SECOND, "two")
    lora_fx.set_adapter(model, "two")
    train(model, 5)
    return model


def outputs(model: nn.Module, choose: Callable[[str], None], x: Tensor) -> dict[str, Tensor]:
    """The outputs with each adapter."""
    result = {}
    for name in ("one", "two"):
        choose(name)
        result[name] = model(x).detach()
    return result


def test_each_adapter_has_its_own_as_in_peft(base: nn.Module) -> None:
    model = two(base)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CONFIG), "one")
    untrained = lora_fx.rewrite(base, FIRST, adapter_name="one")
    lora_fx.add_adapter(untrained, SECOND, "two")

    def begin(name: str) -> None:
        with torch.no_grad():
            for factor in ("lora_A", "lora_B"):
                layer = getattr(theirs.base_model.model.body, factor)[name]
                layer.weight.copy_(untrained.get_parameter(f"body.{factor}.{name}"))

    begin("one")
    train(theirs, 1)
    theirs.add_adapter("two", peft.LoraConfig(**CONFIG))
    begin("two")
    theirs.set_adapter("two")
    train(theirs, 5)
    x = rows(0)
    ours = outputs(model, lambda name: lora_fx.set_adapter(model, name), x)
    expected = outputs(theirs, theirs.set_adapter, x)
    for name in expected:
        assert_close(ours[name], expected[name])
    with lora_fx.disable_adapter(model):
        assert_same_bits(model(x), base(x))
    lora_fx.set_adapter(model, [])
    assert_same_bits(model(x), base(x))


def test_folders_hold_those_of_their_adapter(base: nn.Module, tmp_path: Path) -> None:
    model, x = two(base), rows(0)
    expected = outputs(model, lambda name: lora_fx.set_adapter(model, name), x)
    for name in ("one", "two"):
        lora_fx.save_adapter(model, tmp_path / name, name)
        folder = tmp_path / name / name
        loaded = lora_fx.load_adapter(base, folder)
        assert_same_bits(loaded(x), expected[name])
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert_close(theirs.eval()(x), expected[name])
    # Both into one model, and an adapter in the place of another one.
    both = lora_fx.load_adapter(base, tmp_path / "one" / "one", adapter_name="one")
    lora_fx.load_adapter(both, tmp_path / "two" / "two", adapter_name="two")
    again = outputs(both, lambda name: lora_fx.set_adapter(both, name), x)
    for name in expected:
        assert_same_bits(again[name], expected[name])
    lora_fx.set_adapter(both, "one")
    lora_fx.hotswap_adapter(both, tmp_path / "two" / "two", adapter_name="one")
    assert_same_bits(both(x), expected["two"])
    with lora_fx.disable_adapter(both):
        assert_same_bits(both(x), base(x))


def test_merges_take_those_of_their_adapter(base: nn.Module) -> None:
    model, x = two(base), rows(0)
    expected = outputs(model, lambda name: lora_fx.set_adapter(model, name), x)
    before = base.state_dict()[MEAN].clone()
    for name in expected:  # "two" is active
        assert_close(lora_fx.merge(model, adapter_names=name)(x), expected[name])
    into = copy.deepcopy(base)
    assert_close(lora_fx.merge(model, adapter_names="one", into=into)(x), expected["one"])
    assert_same_bits(base.state_dict()[MEAN], before)
    with lora_fx.disable_adapter(model):
        assert_same_bits(model(x), base(x))


def test_rows_of_a_batch_have_those_of_their_adapters(base: nn.Module) -> None:
    model, x = two(base), rows(0)
    expected = outputs(model, lambda name: lora_fx.set_adapter(model, name), x)
    lora_fx.set_adapter(model, ["one", "two"], per_sample=True)
    ids = ["one", None, "two", "one"] * 4
    result = model(x, adapter_ids=ids)
    for row, name in enumerate(ids):
        assert_close(result[row], (base(x) if name is None else expected[name])[row])
    model.train()
    with pytest.raises(ConfigError, match=r"head\.1\.running_mean has no values for each row"):
        model(x, adapter_ids=ids)


def test_copies_and_checkpoints_have_them(base: nn.Module) -> None:
    model, x = two(base), rows(0)
    expected = outputs(model, lambda name: lora_fx.set_adapter(model, name), x)
    for twin in (copy.deepcopy(model), lora_fx.reference(model)):
        for name, result in outputs(
            twin, lambda chosen, twin=twin: lora_fx.set_adapter(twin, chosen), x
        ).items():
            assert_same_bits(result, expected[name])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, 3)
    lora_fx.set_adapter(model, "one")
    train(model, 4)
    lora_fx.set_adapter(model, "two")
    model.load_state_dict(state)
    for name, result in outputs(
        model, lambda chosen: lora_fx.set_adapter(model, chosen), x
    ).items():
        assert_same_bits(result, expected[name])


def test_a_deleted_adapter_takes_its_own_along(base: nn.Module) -> None:
    model = two(base)
    lora_fx.delete_adapter(model, "one")
    assert not [name for name, _ in model.named_buffers() if "one" in name]
    (status,) = lora_fx.status(model)
    assert status.parameters == sum(p.numel() for p in lora_fx.trainable_parameters(model))
