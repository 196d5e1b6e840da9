"""What is chosen by a parameter's name and by an attention layer's, and how ranks are looked up then."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import NoMatchError, PartialMatchError
from tests.numerics import assert_close, assert_same_bits


class Raw(nn.Module):
    """Parameters of two and three dimensions beside modules."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 4))
        self.down = nn.Parameter(torch.randn(2, 6, 4))
        self.scale = nn.Parameter(torch.ones(6))
        self.table = nn.Parameter(torch.randn(3, 4))
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.proj(x) @ self.up.T * self.scale
        return torch.bmm(hidden.expand(2, -1, -1), self.down) + self.table.sum()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Raw(), Raw()])
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).sum(0)
        x = x[None]
        return self.head(self.attn(x, x, x, need_weights=False)[0])


X = torch.randn(5, 4)


def planned(strict: bool = False, **config: Any) -> dict[str, lora_fx.ir.plan.PlannedSite]:
    plan = lora_fx.plan(Model(), lora_fx.LoraConfig(**config), strict=strict)
    return {row.name: row for row in plan}


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["up"], ["layers.0.up", "layers.1.up"]),
        (["layers.1.up", "layers.0.down"], ["layers.0.down", "layers.1.up"]),
        (["0.down", "head.weight"], ["layers.0.down", "head"]),
        (["proj.weight"], ["layers.0.proj", "layers.1.proj"]),
    ],
)
def test_parameters_are_named_in_full_or_by_their_end(targets, names):
    assert list(planned(strict=True, target_parameters=targets)) == names


def test_an_end_begins_after_a_dot():
    with pytest.raises(NoMatchError, match="target_parameters 'p': matches nothing; nearest: 'up'"):
        planned(target_parameters=["p"])


def test_no_target_modules_means_no_modules_beside_parameters():
    assert list(planned(target_parameters=["0.up"])) == ["layers.0.up"]
    assert list(planned(target_parameters=["0.up"], target_modules=[])) == ["layers.0.up"]
    both = planned(target_parameters=["0.up"], target_modules=["head"])
    assert list(both) == ["layers.0.up", "head"]


def test_exclusions_and_layer_filters_are_for_modules():
    rows = planned(
        target_parameters=["up"],
        target_modules=["proj", "down"],
        exclude_modules=["layers.0.up", "0.proj"],
        layers_to_transform=[1],
    )
    # PEFT's expression sees no index in "layers.1.proj"; and it excludes modules only.
    assert list(rows) == ["layers.0.up", "layers.1.up"]


def test_what_is_trained_in_full_gets_no_adapter():
    config = lora_fx.LoraConfig(target_parameters=["up"], modules_to_save=["layers.1"])
    plan = lora_fx.plan(Model(), config)
    assert [row.name for row in plan] == ["layers.0.up"]
    reasons = {one.site.name: one.reason for one in plan.skipped}
    assert reasons["layers.1.up"] == "trained in full: modules_to_save 'layers.1'"


# PEFT cannot wrap a parameter of a module and one of a child of that module at once.
@pytest.mark.parametrize("targets", [["up", "down"], ["layers.1.proj.weight"]], ids=str)
@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"up": 3}, "alpha_pattern": {"layers.0.down": 5}},
        {"rank_pattern": {"layers.1.up": 2, "up": 3}},
        {"rank_pattern": {"proj": 3}, "alpha_pattern": {"proj.weight": 6}},
        {"rank_pattern": {".*": 3}, "use_rslora": True},
    ],
)
def test_ranks_and_scales_are_looked_up_by_the_parameter_as_in_peft(targets, patterns):
    config = {"target_parameters": targets, "target_modules": [], **patterns}
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    expected = {}
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "parameter_name"):
            weight = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            expected[weight] = (module.r["default"], module.scaling["default"])
    rows = planned(**config)
    ours = {row.site.weight: (row.rank, row.scale) for row in rows.values()}
    assert ours == expected


def test_entries_that_select_nothing_are_named():
    plan = lora_fx.plan(Model(), lora_fx.LoraConfig(target_parameters=["up", "dwon"]))
    assert plan.unmatched == ("target_parameters 'dwon': matches nothing; nearest: 'down'",)
    with pytest.raises(PartialMatchError, match="'dwon': matches nothing"):
        planned(strict=True, target_parameters=["up", "dwon"])
    saved = lora_fx.LoraConfig(
        target_parameters=["1.up", "0.up"], modules_to_save=["layers.1"], target_modules=["head"]
    )
    (line,) = lora_fx.plan(Model(), saved).unmatched
    assert line == "target_parameters '1.up': all that it names is left out (see 'not selected')"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("table", r"layers\.0\.table.*sum"),
        ("scale", r"layers\.0\.scale \[6\] is the weight of no linear operation"),
    ],
)
def test_a_parameter_that_cannot_be_adapted_is_an_error(target, reason):
    with pytest.raises(NoMatchError, match=reason):
        planned(target_parameters=[target, "up"])


def test_a_parameter_that_a_module_target_names_too_is_adapted_once():
    rows = planned(
        target_parameters=["proj.weight"],
        target_modules=["proj"],
        rank_pattern={"proj": 2, "proj.weight": 4},
    )
    assert {row.rank for name, row in rows.items() if name.startswith("layers")} == {4}


# --- attention ------------------------------------------------------------------------------------

FOUR = ["attn.q", "attn.k", "attn.v", "attn.out_proj"]


@pytest.mark.parametrize("target", [["attn"], ["attn", "head"], "attn", r"at+n"])
def test_the_name_of_an_attention_layer_means_its_four_projections(target):
    rows = planned(strict=True, target_modules=target)
    assert [name for name in rows if name != "head"] == FOUR


def test_an_attention_layer_without_one_of_its_projections():
    rows = planned(target_modules=["attn"], exclude_modules=["attn.k"])
    assert list(rows) == ["attn.q", "attn.v", "attn.out_proj"]
    with pytest.raises(NoMatchError):
        planned(target_modules=["attn"], exclude_modules=["attn"])


def test_patterns_for_an_attention_layer_and_for_one_of_its_projections():
    rows = planned(
        strict=True,
        target_modules=["attn"],
        rank_pattern={"attn": 4, "attn.v": 2},
        alpha_pattern={"attn": 3},
    )
    assert [row.rank for row in rows.values()] == [4, 4, 2, 4]
    assert {row.alpha for row in rows.values()} == {3.0}


def test_the_weight_of_a_fused_projection_as_a_parameter():
    assert list(planned(strict=True, target_parameters=["attn.in_proj_weight"])) == FOUR[:3]


@pytest.mark.parametrize(
    "config",
    [
        {"target_parameters": ["up", "down", "proj.weight"]},
        {"target_modules": ["attn"]},
    ],
)
def test_a_rewrite_changes_nothing(config):
    model = Model()
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(**config), X)
    # The attention is written out: its sums may be rounded in another order.
    same = assert_same_bits if "target_parameters" in config else assert_close
    same(adapted(X).detach(), model(X).detach())
    assert {n.rpartition(".lora_")[0] for n, p in adapted.named_parameters() if p.requires_grad}


def test_unequal_widths_have_four_sites_as_well():
    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2, kdim=6, vdim=8, batch_first=True)

        def forward(self, q, k, v):
            return self.attn(q, k, v)[0]

    rows = lora_fx.plan(Unequal(), lora_fx.LoraConfig(target_modules=["attn"]), strict=True)
    assert {row.site.weight for row in rows} == {
        *(f"attn.{letter}_proj_weight" for letter in "qkv"),
        "attn.out_proj.weight",
    }
