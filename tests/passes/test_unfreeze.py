from __future__ import annotations

import dataclasses

import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.ir.graph import Capture, PassResult
from lora_fx.passes.capture.auto import capture
from lora_fx.passes.insert.trained_whole import Unfreeze
from lora_fx.passes.pipeline import plan_capture
from tests.golden import check_golden
from tests.numerics import assert_same_bits
from tests.zoo import Residual, Tied, seeded


def run(model: nn.Module, **options) -> tuple[Capture, PassResult]:
    captured = planned(model, **options)
    return captured, Unfreeze()(captured)


def planned(model: nn.Module, **options) -> Capture:
    captured = capture(model)
    return dataclasses.replace(captured, plan=plan_capture(captured, LoraConfig(**options)))


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_biases_of_adapted_layers_are_trained() -> None:
    _, result = run(Residual(1), bias="lora_only", target_modules=["up"])
    assert result.modified
    assert trainable(result.capture.model) == ["blocks.0.up.bias"]


def test_all_biases_are_trained() -> None:
    _, result = run(Residual(1), bias="all")
    assert all(name.endswith("bias") for name in trainable(result.capture.model))
    assert len(trainable(result.capture.model)) == 5


def test_saved_modules_are_trained_in_full() -> None:
    _, result = run(Residual(1), modules_to_save=["head", "norm"])
    expected = ["blocks.0.norm.weight", "blocks.0.norm.bias", "norm.weight", "norm.bias"]
    assert trainable(result.capture.model) == [*expected, "head.weight", "head.bias"]


def test_what_is_trained_has_storage_of_its_own() -> None:
    model = Residual(1)
    _, result = run(model, modules_to_save=["head"], bias="all")
    originals = {p.data_ptr() for p in model.parameters()}
    for name, parameter in result.capture.model.named_parameters():
        assert (parameter.data_ptr() in originals) != parameter.requires_grad, name
    assert_same_bits(result.capture.model.state_dict(), model.state_dict())


def test_a_tied_weight_is_trained_in_the_saved_module_alone() -> None:
    model = Tied()
    _, result = run(model, modules_to_save=["head"])
    copy = result.capture.model
    assert copy.head.weight.requires_grad
    assert not copy.embed.weight.requires_grad
    assert model.head.weight is model.embed.weight


def test_ties_inside_a_saved_module_are_kept() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Tied())
    _, result = run(model, target_modules=["0"], modules_to_save=["1"])
    assert result.capture.model[1].head.weight is result.capture.model[1].embed.weight


def test_a_shared_bias_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    _, result = run(model, bias="all")
    assert result.capture.model[0].bias is result.capture.model[1].bias
    assert result.capture.model[0].bias.requires_grad


def test_nothing_to_do_modifies_nothing() -> None:
    captured, result = run(Residual(1))
    assert not result.modified
    assert result.capture is captured


def test_a_second_run_changes_nothing() -> None:
    first = Unfreeze()(planned(Residual(1), bias="all", modules_to_save=["head"]))
    before = dict(first.capture.model.named_parameters())
    second = Unfreeze()(first.capture)
    assert (first.modified, second.modified) == (True, False)
    for name, parameter in second.capture.model.named_parameters():
        assert parameter is before[name]


def test_integers_are_not_trained() -> None:
    head = nn.Linear(4, 2)
    head.register_parameter("index", nn.Parameter(torch.arange(3), requires_grad=False))
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 4))
    model.add_module("head", head)
    adapted = lora_fx.rewrite(model, LoraConfig(modules_to_save=["head"]))
    assert not adapted.head.index.requires_grad
    assert adapted.head.weight.requires_grad


def test_golden() -> None:
    _, result = run(seeded(Residual)(1), modules_to_save=["head"], bias="lora_only")
    lines = (
        f"{name} {tuple(p.shape)} {'trained' if p.requires_grad else 'frozen'}\n"
        for name, p in result.capture.model.named_parameters()
    )
    check_golden("unfreeze_residual", "".join(lines))
