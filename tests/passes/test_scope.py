"""``scope``: only what lies in a module is adapted."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.numerics import assert_close


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.mixed = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.q(x) @ self.mixed


class Multimodal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = Tower()
        self.vision_extra = Tower()
        self.text = nn.ModuleList([Tower(), Tower()])
        self.q = nn.Linear(8, 3)

    def forward(self, x):
        x = self.vision_extra(self.vision(x))
        for one in self.text:
            x = one(x)
        return self.q(x)


def adapted(**fields) -> list[str]:
    return [row.name for row in lora_fx.plan(Multimodal(), LoraConfig(r=2, **fields))]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"scope": "text"}, ["text.0.q", "text.0.mixed", "text.1.q", "text.1.mixed"]),
        ({"scope": "text.1"}, ["text.1.q", "text.1.mixed"]),
        ({"scope": ["vision", "text.0"], "target_modules": ["q"]}, ["vision.q", "text.0.q"]),
        ({"scope": "vision", "target_modules": ".*q"}, ["vision.q"]),
        ({"scope": "vision", "target_modules": "all-linear"}, ["vision.q"]),
        ({"scope": "text.0", "target_parameters": ["mixed"]}, ["text.0.mixed"]),
        ({"scope": "text", "exclude_modules": ["q"]}, ["text.0.mixed", "text.1.mixed"]),
        ({"scope": "q", "target_modules": ["q"]}, ["q"]),
        ({"scope": []}, adapted()),
    ],
)
def test_only_what_lies_in_the_scope_is_adapted(fields, names) -> None:
    assert sorted(adapted(**fields)) == sorted(names)


def test_the_plan_says_what_is_outside() -> None:
    plan = lora_fx.plan(Multimodal(), LoraConfig(r=2, scope=["text"], target_modules=["q"]))
    reasons = {one.site.name: one.reason for one in plan.skipped}
    assert reasons["vision.q"] == "outside of scope 'text'"


def test_a_scope_that_holds_nothing_is_reported() -> None:
    config = LoraConfig(r=2, scope=["text", "txt"], target_modules=["q"])
    (entry,) = lora_fx.plan(Multimodal(), config).unmatched
    assert entry.startswith("scope 'txt': matches nothing; nearest: 'text'")
    with pytest.raises(lora_fx.PartialMatchError, match="'txt'"):
        lora_fx.plan(Multimodal(), config, strict=True)
    with pytest.raises(lora_fx.NoMatchError, match="outside of scope 'txt'"):
        lora_fx.plan(Multimodal(), LoraConfig(r=2, scope="txt"))


@pytest.mark.parametrize("value", [3, [""], ["a", 1], "text.", ".text"])
def test_a_scope_is_names_of_modules(value) -> None:
    with pytest.raises(lora_fx.ConfigError, match="scope"):
        LoraConfig(scope=value)


def test_a_saved_folder_names_its_targets_and_peft_reads_it(tmp_path) -> None:
    model = Multimodal()
    config = LoraConfig(r=2, scope="text", target_modules=["q"])
    ours = randomize(lora_fx.rewrite(model, config))
    lora_fx.save_adapter(ours, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "scope" not in written
    assert written["target_modules"] == ["text.0.q", "text.1.q"]
    x = torch.randn(3, 8)
    expected = ours(x)
    assert_close(lora_fx.load_adapter(model, tmp_path)(x), expected, 1e-6)
    assert_close(peft.PeftModel.from_pretrained(model, tmp_path)(x), expected, 1e-5)


def test_a_config_comes_back(tmp_path) -> None:
    config = LoraConfig(scope=["b", "a"])
    assert config.scope == ("a", "b")
    assert LoraConfig.from_dict(config.to_dict()) == config
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path) == config
    assert "scope" not in LoraConfig().to_dict()
