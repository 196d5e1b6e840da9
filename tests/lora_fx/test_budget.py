"""Ranks for a budget: within it, close to it, where the gradients are, and read by PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import lora_fx
import lora_fx.kinds as kinds
from lora_fx import ConfigError, LoraConfig
from lora_fx.extraction import RankChoice
from tests import zoo
from tests.lora_fx.test_initialize import tokens
from tests.lora_fx.test_kinds import example
from tests.numerics import assert_close, assert_same_bits


def mean(output, batch):
    return output.square().mean()


class Planted(nn.Module):
    """Four layers side by side, of which the loss depends on two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 16) for _ in range(4))

    def forward(self, x):
        parts = [layer(x) for layer in self.layers]
        return parts[0] * 0 + parts[1] + 1.5 * parts[2] + parts[3] * 0


@zoo.seeded
def planted(budget: int | str = 48 * 12, rows: int = 64, **options) -> lora_fx.Plan:
    config = LoraConfig(**{"r": 4, "target_modules": r"layers\.\d"} | options)
    batches = [(torch.randn(rows, 32),) for _ in range(2)]
    return lora_fx.plan(Planted(), config, budget=budget, inputs=batches, loss_fn=mean)


def ranks(plan: lora_fx.Plan) -> list[int]:
    return [row.rank for row in plan]


# --- the choice -----------------------------------------------------------------------------------


def test_the_layers_that_matter_get_the_ranks() -> None:
    plan = planted()
    first, second, third, fourth = ranks(plan)
    assert (first, fourth) == (1, 1)  # the smallest rank
    assert third > second > 1
    assert sum(ranks(plan)) == 12
    assert plan.sites[0].gain == 0
    assert sum(row.gain for row in plan) == pytest.approx(plan.spent.kept)
    # r=3 everywhere costs the same.
    assert plan.spent.equal_rank == 3
    assert plan.spent.kept > plan.spent.equal_kept > 0


def test_the_choice_is_the_best_that_the_budget_allows() -> None:
    """Against all distributions of the ranks: sites have the same cost, so that greedy is exact."""
    model = zoo.seeded(Planted)()
    x = zoo.seeded(lambda: torch.randn(24, 32))()
    config = LoraConfig(r=1, target_modules=r"layers\.[012]")
    plan = lora_fx.plan(model, config, budget=48 * 9, inputs=[(x,)], loss_fn=mean)
    mean(model(x), None).backward()
    squares = [
        torch.linalg.svdvals(model.layers[i].weight.grad.double()).square() for i in range(3)
    ]

    def gain(*chosen: int) -> float:
        return sum(float(s[:r].sum()) for s, r in zip(squares, chosen, strict=True))

    best = max(
        gain(a, b, 9 - a - b) for a in range(1, 8) for b in range(1, 9 - a) if 9 - a - b >= 1
    )
    assert gain(*ranks(plan)) == pytest.approx(best, rel=1e-5)
    assert plan.spent.kept == pytest.approx(best / sum(float(s.sum()) for s in squares), rel=1e-4)


def test_a_cheaper_layer_comes_first_if_the_gains_are_equal() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(8, 8), nn.Linear(8, 64)

        def forward(self, x):
            return torch.cat([self.small(x), self.large(x)[..., :8]], -1)

    x = zoo.seeded(lambda: torch.randn(50, 8))()
    plan = lora_fx.plan(zoo.seeded(Two)(), LoraConfig(r=1), budget=300, inputs=[(x,)], loss_fn=mean)
    small, large = ranks(plan)
    assert small > large


# --- the budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [7_000, 4_321, 2_700])
def test_parameters_are_within_the_budget_and_close_to_it(budget: int) -> None:
    model, _ = zoo.tiny_llama()
    plan = lora_fx.plan(model, LoraConfig(r=2), budget=budget, inputs=tokens(4))
    assert plan.spent.used == plan.trainable_parameters <= budget
    left = budget - plan.trainable_parameters
    grown = [row for row in plan if row.rank < min(row.site.in_features, row.site.out_features)]
    assert not grown or left < min(row.site.in_features + row.site.out_features for row in grown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_bytes_are_those_of_the_saved_tensors(
    dtype: torch.dtype, options: dict, tmp_path: Path
) -> None:
    model, _ = zoo.tiny_llama(attention_bias=True)
    model.to(dtype)
    plan = lora_fx.plan(model, LoraConfig(r=2, **options), budget="24kB", inputs=tokens(4))
    adapted = lora_fx.rewrite(model, plan.config)
    assert sum(p.numel() for p in lora_fx.trainable_parameters(adapted)) == plan.parameters
    sizes = sum(p.numel() * p.itemsize for p in lora_fx.trainable_parameters(adapted))
    assert sizes <= plan.spent.used <= 24_000
    assert plan.spent.used > 23_000
    lora_fx.save_adapter(adapted, tmp_path)
    header = int.from_bytes((tmp_path / "adapter_model.safetensors").read_bytes()[:8], "little")
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size - header - 8 <= plan.spent.used


def test_a_small_budget_says_how_much_the_smallest_ranks_take() -> None:
    with pytest.raises(ConfigError, match=r"at each of 4 sites takes 192: give at least that"):
        planted(budget=191)
    assert ranks(planted(budget=192)) == [1, 1, 1, 1]
    with pytest.raises(ConfigError, match=r"is 500 bytes, .* takes 768"):
        planted(budget="0.5kB")


def test_a_large_budget_ends_at_full_ranks() -> None:
    plan = planted(budget="1MB")
    assert ranks(plan) == [16] * 4
    assert plan.spent.kept == pytest.approx(1)
    assert plan.spent.used == 4 * 16 * 48 * 4


@pytest.mark.parametrize("budget", ["lots", "3e4", "0", 0, -1, True, 2.5, "0MB", ""])
def test_a_budget_is_a_size_or_a_number(budget) -> None:
    with pytest.raises(ConfigError, match="budget"):
        planted(budget=budget)


def test_a_budget_is_a_number_in_any_form() -> None:
    plan = planted(budget=48 * 12)
    assert ranks(planted(budget=str(48 * 12))) == ranks(plan)
    assert ranks(planted(budget=np.int64(48 * 12))) == ranks(plan)
    assert ranks(planted(budget=f"{4 * 48 * 12}B")) == ranks(plan)
    with pytest.raises(ConfigError, match=r"'3e4' is no size and no number of parameters"):
        planted(budget="3e4")


def test_numbers_of_numpy_choose_ranks() -> None:
    choice = RankChoice.of(rank=np.int64(8))
    assert choice == RankChoice(rank=8)
    assert type(choice.rank) is int
    assert RankChoice.of(energy=np.float32(0.5)) == RankChoice(rank=None, energy=0.5)
    assert RankChoice.of(budget="3000") == RankChoice(rank=None, budget=3000)
    with pytest.raises(ConfigError, match="rank: found True"):
        RankChoice.of(rank=True)


# --- the configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_stay(rslora: bool) -> None:
    plan = planted(lora_alpha=8, use_rslora=rslora)
    scale = 8 / 2 if rslora else 8 / 4
    assert [row.scale for row in plan] == pytest.approx([scale] * 4)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc", "wte"]}),
        (
            "mixtral",
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            },
        ),
        ("mixtral", {"target_modules": "all-linear"}),
    ],
)
def test_peft_reads_the_ranks(name: str, targets: dict, tmp_path: Path) -> None:
    model, inputs = zoo.TRANSFORMERS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grads = {key: p.requires_grad for key, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    plan = lora_fx.plan(
        model, LoraConfig(r=2, **targets), budget="10kB", inputs=tokens(6, vocabulary=30)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert {key: p.requires_grad for key, p in model.named_parameters()} == grads
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key])
    assert plan.unmatched == ()
    assert len(set(ranks(plan))) > 1
    assert plan.config.rank_pattern
    config = LoraConfig.from_dict(plan.config.to_dict() | {"init_lora_weights": False})
    adapted = lora_fx.rewrite(model, config).eval()
    lora_fx.save_adapter(adapted, tmp_path)
    wanted = adapted(**inputs).logits
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_close(theirs(**inputs).logits, wanted, 1e-5)


def test_peft_takes_the_configuration_itself() -> None:
    model, _ = zoo.tiny_llama()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"])
    plan = lora_fx.plan(model, config, budget=3000, inputs=tokens(4))
    values = {
        key: getattr(plan.config, key)
        for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    }
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], **values),
    )
    for row in plan:
        layer = theirs.base_model.model.get_submodule(row.name)
        assert layer.r["default"] == row.rank
        assert layer.scaling["default"] == pytest.approx(row.scale)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.back = nn.ConvTranspose1d(8, 4, 3)
        self.embed = nn.Embedding(12, 8)

    def forward(self, ids):
        return self.back(self.grouped(self.embed(ids).mT))


def test_groups_grow_together() -> None:
    ids = zoo.seeded(lambda: torch.randint(0, 12, (6, 9)))()
    targets = ["grouped", "back", "embed"]
    plan = lora_fx.plan(
        zoo.seeded(Convolutions)(),
        LoraConfig(r=2, target_modules=targets),
        budget=400,
        inputs=[(ids,)],
        loss_fn=mean,
    )
    assert {row.name: row.rank % row.site.groups for row in plan} == dict.fromkeys(targets, 0)
    assert 300 < plan.parameters <= 400


def test_parts_of_fused_weights_get_their_own_rank() -> None:
    model, _ = zoo.tiny_gpt2()
    config = LoraConfig(r=2, target_modules=["c_attn.q", "c_attn.v"])
    plan = lora_fx.plan(model, config, budget=700, inputs=tokens(4))
    assert len(plan) == 4
    by_part = {row.name.rpartition(".")[2]: row.gain for row in plan}
    assert by_part["v"] > by_part["q"]
    assert plan.parameters <= 700


def test_starts_keep_their_conditions() -> None:
    plan = planted(init_lora_weights="orthogonal", budget=48 * 13)
    assert all(rank % 2 == 0 for rank in ranks(plan))
    assert sum(ranks(plan)) == 12
    options = {"direction": "ArBr"}
    plan = planted(init_lora_weights="lora_ga", lora_ga_config=options, budget=10**6)
    assert ranks(plan) == [8] * 4  # it takes 2 r directions of 16


# --- refusals -------------------------------------------------------------------------------------


def test_what_a_budget_needs() -> None:
    model, config = zoo.seeded(Planted)(), LoraConfig(r=2, target_modules=r"layers\.\d")
    with pytest.raises(ConfigError, match="budget needs inputs"):
        lora_fx.plan(model, config, budget=1000)
    with pytest.raises(ConfigError, match="inputs are for a budget"):
        lora_fx.plan(model, config, inputs=[(torch.randn(2, 32),)])
    with pytest.raises(ConfigError, match="has no loss"):
        lora_fx.plan(model, config, budget=1000, inputs=[(torch.randn(2, 32),)])
    with pytest.raises(ConfigError, match="distributes the ranks itself"):
        planted(init_lora_weights="eva")
    with pytest.raises(ConfigError, match="no operation is adapted"):
        planted(target_modules=[], modules_to_save=["layers.0"])
    with torch.device("meta"):
        empty = Planted()
    with pytest.raises(ConfigError, match="meta device"):
        lora_fx.plan(empty, config, budget=1000, inputs=[(torch.randn(2, 32),)], loss_fn=mean)


def test_gradients_that_cannot_be_computed_say_why() -> None:
    config = LoraConfig(r=2, target_modules=r"layers\.\d")
    batches = [(torch.randn(2, 32),)]

    def planned(loss_fn: Callable[[Tensor, Any], Tensor]) -> lora_fx.Plan:
        model = zoo.seeded(Planted)()
        return lora_fx.plan(model, config, budget=1000, inputs=batches, loss_fn=loss_fn)

    with pytest.raises(ConfigError, match="does not depend on any adapted weight"):
        planned(lambda output, batch: mean(output.detach(), batch))
    with pytest.raises(ConfigError, match="gradients of all adapted weights are 0"):
        planned(lambda output, batch: 0 * mean(output, batch))
    model = zoo.seeded(Planted)()
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        lora_fx.plan(model, config, budget=1000, inputs=batches, loss_fn=mean)


@pytest.mark.parametrize("number", ["5M", True, math.nan, 0, 1.5])
def test_a_number_of_tokens_is_whole(number: Any) -> None:
    model, config = zoo.seeded(Planted)(), LoraConfig(r=2, target_modules=r"layers\.\d")
    with pytest.raises(ConfigError, match="tokens is"):
        lora_fx.plan(model, config, tokens=number)
    advice = lora_fx.plan(model, config, tokens=np.int64(5000)).advice
    assert advice == lora_fx.plan(model, config, tokens=5000).advice


def test_a_kind_without_factors_has_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_registry", kinds._BUILT_IN)
    example()
    with pytest.raises(ConfigError, match="'ia3' has no rank to choose"):
        planted(kind="ia3")


def test_a_quantized_weight_has_no_gradient() -> None:
    model = lora_fx.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), "int8")
    with pytest.raises(ConfigError, match="plan over the dense model"):
        lora_fx.plan(
            model,
            LoraConfig(target_modules=["0"]),
            budget=10**6,
            inputs=[(torch.randn(2, 64),)],
            loss_fn=mean,
        )


def test_the_ranks_are_for_a_quantized_model_as_well() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 2))
    plan = lora_fx.plan(
        model,
        LoraConfig(target_modules=["0", "2"]),
        budget=128 * 9,
        inputs=[(torch.randn(9, 64),)],
        loss_fn=mean,
    )
    packed = lora_fx.quantize(model, "int8")
    assert ranks(lora_fx.plan(packed, plan.config)) == ranks(plan)
    assert sum(ranks(plan)) == 9
