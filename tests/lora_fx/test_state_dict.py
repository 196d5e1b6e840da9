"""State dicts of adapters: PEFT's keys and values, in and out, and what does not fit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn

import lora_fx
from lora_fx.errors import CheckpointError, ConfigError
from tests import zoo
from tests.lora_fx.test_checkpoint import CASES, Case, adapted, in_peft, run
from tests.lora_fx.test_checkpoint_parameters import CASES as PARAMETERS
from tests.numerics import assert_close, assert_same_bits

PLAIN = [case for case in CASES if case.name in ("convolutions", "residual, patterns", "gpt2")]


def of_peft(model: Any) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model)
    return found


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_is_what_peft_gives_and_takes(case: Case) -> None:
    base, inputs = case.build()
    theirs = in_peft(base, case.config)
    ours = lora_fx.rewrite(base, lora_fx.LoraConfig(**case.config))
    lora_fx.load_adapter_state_dict(ours, of_peft(theirs))
    assert_close(run(ours, inputs), run(theirs, inputs))
    again = lora_fx.adapter_state_dict(ours)
    expected = of_peft(theirs)
    assert again.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(again[key], value)
    blank = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**case.config)).eval()
    result = peft.set_peft_model_state_dict(blank, again)
    assert not result.unexpected_keys
    assert_close(run(blank, inputs), run(theirs, inputs))


@pytest.mark.parametrize("name", ["mixtral", "matrices"])
def test_parameters(name: str) -> None:
    case = next(case for case in PARAMETERS if case.name == name)
    base = case.build().eval()
    theirs = in_peft(base, case.config)
    ours = lora_fx.rewrite(base, lora_fx.LoraConfig(**case.config))
    lora_fx.load_adapter_state_dict(ours, of_peft(theirs))
    assert_close(run(ours, case.inputs), run(theirs, case.inputs))


def two() -> nn.Module:
    model = adapted(zoo.Residual(), r=2, target_modules=["up", "head"])
    lora_fx.add_adapter(model, lora_fx.LoraConfig(r=3, target_modules=["down"]), "other")
    return model


def test_each_adapter_has_its_own() -> None:
    model = two()
    other = lora_fx.adapter_state_dict(model, "other")
    assert all(".down." in key for key in other)
    filled = {key: torch.full_like(value, 0.5) for key, value in other.items()}
    default = lora_fx.adapter_state_dict(model)
    lora_fx.load_adapter_state_dict(model, filled, "other")
    assert_same_bits(lora_fx.adapter_state_dict(model, "other"), filled)
    assert_same_bits(lora_fx.adapter_state_dict(model), default)
    with pytest.raises(ConfigError, match="there is no adapter 'none'"):
        lora_fx.adapter_state_dict(model, "none")
    with pytest.raises(ConfigError, match="there is no adapter 'none'"):
        lora_fx.load_adapter_state_dict(model, filled, "none")


def test_a_copy_stays_as_it_is_and_the_prefix_may_be_missing() -> None:
    model = two()
    state = lora_fx.adapter_state_dict(model)
    kept = copy.deepcopy(state)
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.zero_()
    assert_same_bits(state, kept)
    bare = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    lora_fx.load_adapter_state_dict(model, bare)
    assert_same_bits(lora_fx.adapter_state_dict(model), kept)
    assert set(state) - {f"base_model.model.{key}" for key in bare} == set()


def test_every_misfit_is_listed_and_nothing_changes() -> None:
    model = two()
    before = copy.deepcopy(model.state_dict())
    state = lora_fx.adapter_state_dict(model)
    head = "base_model.model.head.lora_"
    del state[f"{head}A.weight"]
    state[f"{head}B.weight"] = torch.zeros(3, 3)
    state["base_model.model.tail.lora_A.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="adapter 'default' of this Residual") as caught:
        lora_fx.load_adapter_state_dict(model, state)
    problems = [line.split()[:2] for line in str(caught.value).splitlines()[1:]]
    assert problems == [
        ["missing:", "head.lora_A.weight"],
        ["shape:", "head.lora_B.weight"],
        ["unexpected:", "tail.lora_A.weight"],
    ]
    assert_same_bits(model.state_dict(), before)


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[None]:
    """A process group of one process, which is enough for DTensors."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("build", [zoo.Residual, zoo.Mlp], ids=["residual", "mlp"])
def test_sharded_parameters_are_gathered_and_written(
    build: Callable[[], nn.Module], one_rank: None, tmp_path: Any
) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    config = lora_fx.LoraConfig(r=2, init_lora_weights=False)
    model = lora_fx.rewrite(build(), config)
    expected = lora_fx.adapter_state_dict(model)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    found = lora_fx.adapter_state_dict(model)
    assert not any(isinstance(value, DTensor) for value in found.values())
    assert_same_bits(found, expected)
    doubled = {key: value * 2 for key, value in expected.items()}
    lora_fx.load_adapter_state_dict(model, doubled)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert_same_bits(lora_fx.adapter_state_dict(model), doubled)
