from __future__ import annotations

import copy
import pickle

import pytest
import torch

import lora_fx
from lora_fx.runtime.modules.adapter_modules import AdapterFactors, check_adapter_name
from lora_fx.runtime.rows import SampleRows
from tests.numerics import assert_same_bits
from tests.zoo import Mlp


def test_factors_are_parameters_by_adapter() -> None:
    factors = AdapterFactors()
    factors.add("default", torch.ones(2, 3))
    factors.add("other", torch.zeros(4, 3))
    assert list(factors.state_dict()) == ["default", "other"]
    assert factors.default.requires_grad
    assert "default=(2, 3), other=(4, 3)" in repr(factors)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_factors_survive_a_copy(again) -> None:
    factors = AdapterFactors()
    factors.add("default", torch.randn(2, 3))
    assert_same_bits(again(factors).state_dict(), factors.state_dict())


@pytest.mark.parametrize("name", ["default", "a", "my-adapter", "v2", "2", "ädapter", "__x"])
def test_names_that_can_be_part_of_a_parameters_name(name: str) -> None:
    check_adapter_name(name)
    adapted = lora_fx.rewrite(Mlp().eval(), lora_fx.LoraConfig(), adapter_name=name)
    assert f"first.lora_A.{name}" in adapted.state_dict()
    adapted(torch.randn(2, 5))


@pytest.mark.parametrize(
    "name",
    ["", "a.b", "a/b", "a\\b", "..", 'a"b', "a b", "a\n", "class", "None", 3, None, b"a"],
)
def test_names_that_cannot_are_refused(name: object) -> None:
    with pytest.raises(lora_fx.ConfigError, match="adapter_name"):
        check_adapter_name(name)


@pytest.mark.parametrize(
    "name", ["add", "forward", "train", "parameters", "training", "samples", "repeats", "__init__"]
)
def test_names_that_nn_module_has_taken_are_refused(name: str) -> None:
    with pytest.raises(lora_fx.ConfigError, match=r"attribute of nn\.Module"):
        check_adapter_name(name)


@pytest.mark.parametrize("name", [name for name in dir(SampleRows) if not name.startswith("_")])
def test_names_of_the_table_of_samples_are_refused(name: str) -> None:
    with pytest.raises(lora_fx.ConfigError, match=r"attribute of nn\.Module"):
        check_adapter_name(name)


def test_rewrite_checks_the_name() -> None:
    with pytest.raises(lora_fx.ConfigError, match="adapter_name"):
        lora_fx.rewrite(Mlp(), lora_fx.LoraConfig(), adapter_name="a.b")
