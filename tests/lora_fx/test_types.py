from __future__ import annotations

import dataclasses
import pickle
import typing

import pytest
from torch import fx, nn

import lora_fx
from lora_fx.ir.graph import Pass, Region, Role, Tag, join
from lora_fx.ir.site import Factors
from lora_fx.passes.capture.auto import capture
from lora_fx.passes.insert.add_factors import AddFactors
from lora_fx.passes.insert.insert_branches import Insert
from lora_fx.passes.insert.trained_whole import Unfreeze
from tests.zoo import Residual


def test_names_are_joined_without_empty_parts() -> None:
    assert join("", "a", "", "b.c") == "a.b.c"
    assert join("", "") == ""


def test_factors_count_their_elements() -> None:
    assert Factors((2, 3), (5, 2)).numel == 16
    assert Factors((2, 3, 3, 3), (5, 2, 1, 1)).numel == 64


def test_a_region_reads_its_module() -> None:
    module = nn.BatchNorm1d(3)
    graph = fx.Graph()
    weight, buffer = graph.get_attr("weight"), graph.get_attr("running_mean")
    mode, missing = graph.get_attr("training"), graph.get_attr("nothing.here")
    region = Region("", module, graph)
    assert region.parameter(weight) is module.weight
    assert region.tensor(buffer) is module.running_mean
    assert region.parameter(buffer) is None
    for other in (mode, missing, graph.placeholder("x"), 3, None):
        assert region.tensor(other) is None


def test_a_region_finds_the_module_that_a_node_calls() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_module("0", (x,))
    region = Region("", module, graph)
    assert region.submodule(call) is module[0]
    assert region.submodule(x) is None


def test_passes_are_frozen_dataclasses_with_a_kebab_case_name() -> None:
    plan = lora_fx.plan(Residual(), lora_fx.LoraConfig())
    for one in (AddFactors(), Insert(plan.sites), Unfreeze()):
        assert isinstance(one, Pass)
        assert one.name == one.name.lower().replace("_", "-")
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.name = None


def test_what_a_model_keeps_can_be_pickled() -> None:
    plan = lora_fx.plan(Residual(), lora_fx.LoraConfig(rank_pattern={"up": 2}, bias="all"))
    assert pickle.loads(pickle.dumps(plan)) == plan
    tag = Tag("weight", Role.UP, "default")
    assert pickle.loads(pickle.dumps(tag)) == tag
    assert hash(plan.sites[0]) == hash(pickle.loads(pickle.dumps(plan.sites[0])))


def test_a_plan_is_a_sequence_of_its_sites() -> None:
    plan = lora_fx.plan(Residual(), lora_fx.LoraConfig())
    assert len(plan) == len(plan.sites) == 4
    assert tuple(plan) == plan.sites
    assert len(plan.rows()) == 4
    assert all(len(row) == len(plan.columns) for row in plan.rows())


def test_a_capture_says_what_it_holds() -> None:
    text = str(capture(nn.Sequential(Residual(1), nn.LSTM(8, 2))))
    assert "captured by" in text
    assert "0.blocks.0.up: " in text
    assert "no graph: 1" in text


def test_every_annotation_of_the_public_verbs_can_be_resolved() -> None:
    for name in lora_fx.__all__:
        verb = getattr(lora_fx, name)
        if callable(verb) and not isinstance(verb, type):
            typing.get_type_hints(verb)
