from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.ir.graph import META_KEY, Capture, Role
from lora_fx.ir.plan import Plan
from lora_fx.passes.capture.auto import capture
from lora_fx.passes.insert.add_factors import AddFactors
from lora_fx.passes.insert.insert_branches import Insert
from lora_fx.passes.parameters.factors import adapter_dtype
from lora_fx.passes.pipeline import plan_capture
from tests.golden import check_golden, printed
from tests.numerics import assert_same_bits
from tests.zoo import FORMS, Block, Mlp, Residual


def planned(model: nn.Module, **options) -> tuple[Capture, Plan]:
    captured = capture(model)
    return captured, plan_capture(captured, LoraConfig(**options))


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in f".{name}"}


# --- the pass -------------------------------------------------------------------------------------


def test_a_branch_is_inserted_at_every_planned_site() -> None:
    captured, plan = planned(Residual(), r=2)
    result = Insert(plan.sites)(captured)
    assert result.modified
    for row in plan:
        (call,) = row.site.calls
        roles = [
            node.meta[META_KEY].role
            for node in result.capture.regions[call.region].graph.nodes
            if META_KEY in node.meta
        ]
        assert roles == [
            Role.BASE,
            Role.FACTOR,
            Role.DOWN,
            Role.FACTOR,
            Role.UP,
            Role.SCALE,
            Role.ADD,
        ]


def test_every_node_of_a_branch_is_tagged_with_weight_role_and_adapter() -> None:
    captured, plan = planned(Mlp(), r=2, lora_dropout=0.1)
    before = {node.name for node in captured.regions["first"].graph.nodes}
    graph = Insert(plan.sites, "mine")(captured).capture.regions["first"].graph
    for node in graph.nodes:
        if node.name not in before:
            tag = node.meta[META_KEY]
            assert (tag.weight, tag.adapter) == ("weight", "mine")


def test_graphs_of_the_argument_are_not_edited() -> None:
    captured, plan = planned(Residual())
    before = {name: printed(region.graph) for name, region in captured.regions.items()}
    Insert(plan.sites)(captured)
    assert {name: printed(region.graph) for name, region in captured.regions.items()} == before


def test_an_empty_plan_modifies_nothing() -> None:
    captured, plan = planned(Residual(), target_modules=[])
    result = Insert(plan.sites)(captured)
    assert not result.modified
    assert result.capture is captured


def test_inserting_twice_changes_nothing_the_second_time() -> None:
    captured, plan = planned(Residual(), r=2)
    once = Insert(plan.sites)(captured).capture
    again = Insert(plan.sites)(once)
    assert not again.modified
    assert again.capture is once


class ReadsItsLayer(nn.Module):
    """Applies the weight of a layer, in its own graph and in that of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.layer(x), self.layer.weight)


def test_each_graph_that_applies_a_weight_gets_its_branch() -> None:
    captured, plan = planned(ReadsItsLayer(), r=2, target_modules=["layer"])
    (row,) = plan.sites
    first, second = (call.region for call in row.site.calls)
    once = Insert(plan.sites)(captured).capture
    half = dataclasses.replace(once, regions={**once.regions, second: captured.regions[second]})
    again = Insert(plan.sites)(half)
    assert again.modified
    assert again.capture.regions[first] is once.regions[first]
    assert printed(again.capture.regions[second].graph) == printed(once.regions[second].graph)
    assert not Insert(plan.sites)(dataclasses.replace(once, regions={})).modified


def test_factors_are_added_once() -> None:
    captured, plan = planned(Residual(), r=2)
    captured = dataclasses.replace(captured, plan=plan)
    assert not factors(captured.model)
    once = AddFactors()(captured)
    assert once.modified
    values = {name: value.clone() for name, value in factors(captured.model).items()}
    assert len(values) == 2 * len(plan)
    assert not AddFactors()(captured).modified
    assert_same_bits(factors(captured.model), values)
    assert AddFactors("other")(captured).modified


def test_equal_layers_share_a_graph_before_and_after() -> None:
    captured, plan = planned(Residual(3), r=2)
    regions = Insert(plan.sites)(captured).capture.regions
    assert len({id(regions[f"blocks.{i}.up"].graph) for i in range(3)}) == 1
    # Not those that a pattern gives another scale.
    captured, plan = planned(Residual(3), r=2, rank_pattern={"blocks.1.up": 4})
    regions = Insert(plan.sites)(captured).capture.regions
    assert len({id(regions[f"blocks.{i}.up"].graph) for i in range(3)}) == 2


def test_layers_of_other_sizes_in_one_class_have_their_own_factors() -> None:
    class Own(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, size))

        def forward(self, x):
            return x @ self.kernel

    model = nn.Sequential(Own(4), nn.ReLU(), Own(7))
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["kernel"]))
    assert [tuple(p.shape) for p in factors(adapted).values()] == [(2, 4), (4, 2), (2, 4), (7, 2)]


def test_dropout_follows_the_mode_of_the_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    adapted = lora_fx.rewrite(
        model, LoraConfig(target_modules=["0"], lora_dropout=0.5, init_lora_weights=False, seed=1)
    )
    x = torch.randn(2, 64)
    adapted.eval()
    assert_same_bits(adapted(x), adapted(x))
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, seed=1)
    plain = lora_fx.rewrite(model, config)
    assert_same_bits(adapted(x), plain(x))
    adapted.train()
    assert not torch.equal(adapted(x), adapted(x))


def test_dropout_falls_on_the_input_of_the_branch_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    adapted = lora_fx.rewrite(model, LoraConfig(target_modules=["0"], lora_dropout=0.9)).train()
    x = torch.randn(2, 64)
    assert_same_bits(adapted(x), model(x))


def test_a_half_precision_base_has_fp32_factors_that_follow_its_activations() -> None:
    model = Mlp().to(torch.bfloat16).eval()
    captured, plan = planned(model, r=2)
    graph = Insert(plan.sites)(captured).capture.regions["first"].graph
    casts = [n for n in graph.nodes if META_KEY in n.meta and n.meta[META_KEY].role is Role.CAST]
    assert len(casts) == 2, "A and B are cast, x never is"
    adapted = lora_fx.rewrite(model, LoraConfig(r=2))
    assert {p.dtype for p in factors(adapted).values()} == {torch.float32}
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    assert adapted(x).dtype == torch.bfloat16
    adapted(x).sum().backward()
    assert {p.grad.dtype for p in factors(adapted).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("base", "factor"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_the_dtype_of_the_factors(base: torch.dtype, factor: torch.dtype) -> None:
    assert adapter_dtype(torch.empty(0, dtype=base)) == factor


def test_factors_are_in_the_mode_of_their_layer() -> None:
    for form in FORMS[:6]:
        model = form.model().eval()
        adapted = lora_fx.rewrite(model, LoraConfig(target_modules=[form.site]))
        assert not any(module.training for module in adapted.modules())


# --- initialization -------------------------------------------------------------------------------


def test_the_same_site_gets_the_same_factors_whatever_else_is_in_the_model() -> None:
    wide = factors(lora_fx.rewrite(Residual(3), LoraConfig(r=2, seed=1)))
    narrow = factors(lora_fx.rewrite(Residual(1), LoraConfig(r=2, target_modules=["up"], seed=1)))
    assert set(narrow) < set(wide)
    assert_same_bits({name: wide[name] for name in narrow}, narrow)


def test_sites_and_seeds_get_different_factors() -> None:
    first = factors(lora_fx.rewrite(Residual(), LoraConfig(r=2)))
    second = factors(lora_fx.rewrite(Residual(), LoraConfig(r=2, seed=1)))
    a = "blocks.0.up.lora_A.default"
    assert not torch.equal(first[a], second[a])
    assert not torch.equal(first[a], first["blocks.1.up.lora_A.default"])


def test_a_seed_leaves_the_global_generator_alone() -> None:
    model, state = Residual(), torch.get_rng_state()
    lora_fx.rewrite(model, LoraConfig(init_lora_weights="gaussian", seed=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_factors_follow_the_global_generator() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = lora_fx.rewrite(Residual(), LoraConfig(r=2))
        return factors(lora_fx.add_adapter(model, LoraConfig(r=2), "other"))

    first, again, third = drawn(1), drawn(1), drawn(2)
    assert_same_bits(first, again)
    one, other = (f"blocks.0.up.lora_A.{name}" for name in ("default", "other"))
    assert not torch.equal(first[one], third[one])
    assert not torch.equal(first[one], first[other])


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_the_distributions_are_pefts(init: bool | str) -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.Embedding(300, 400), nn.Conv2d(40, 50, 3))
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=16, target_modules=["0", "1", "2"], init_lora_weights=init)
    )
    for index, fan_in in ((0, 400), (2, 360)):
        a, b = adapted[index].lora_A.default, adapted[index].lora_B.default
        if init == "gaussian":
            assert math.isclose(a.std().item(), 1 / 16, rel_tol=0.05)
        else:
            bound = 1 / math.sqrt(fan_in)
            assert 0.95 * bound < a.abs().max().item() <= bound
            assert math.isclose(a.std().item(), bound / math.sqrt(3), rel_tol=0.05)
        if init is False:
            assert 0.9 * 0.25 < b.abs().max().item() <= 0.25
        else:
            assert not b.any()
    a, b = adapted[1].lora_embedding_A.default, adapted[1].lora_embedding_B.default
    assert math.isclose(b.std().item(), 1.0, rel_tol=0.05)
    assert a.any() if init is False else not a.any()


# --- golden ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        ("linear", "nn.Linear", {}),
        ("linear_dropout", "nn.Linear", {"lora_dropout": 0.1}),
        ("matmul_left", "W @ x", {}),
        ("conv2d_depthwise", "conv2d depthwise", {}),
        ("embedding", "padding_idx", {}),
    ],
)
def test_golden(name: str, form: str, options: dict) -> None:
    (found,) = (f for f in FORMS if f.name == form)
    captured, plan = planned(
        found.model(), r=2 * found.groups, lora_alpha=4, target_modules=[found.site], **options
    )
    after = Insert(plan.sites)(captured).capture
    check_golden(
        f"insert_{name}",
        f"# before\n{printed(captured.regions['op'].graph)}\n"
        f"# after\n{printed(after.regions['op'].graph)}",
    )


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_golden_variants(variant: str) -> None:
    captured, plan = planned(Block(), r=2, target_modules=["up"], **{variant: True})
    after = Insert(plan.sites)(captured).capture
    check_golden(f"insert_{variant}", printed(after.regions["up"].graph))


def test_golden_half_precision() -> None:
    captured, plan = planned(Block().half(), r=2, target_modules=["down"], lora_dropout=0.1)
    after = Insert(plan.sites)(captured).capture
    check_golden("insert_linear_half", printed(after.regions["down"].graph))
