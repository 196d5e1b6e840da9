"""Advice of a plan: coverage, forgotten modules, capacity and learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lora_fx
from lora_fx import ConfigError, LoraConfig
from lora_fx.ir import Advice
from tests.zoo import TRANSFORMERS, Residual


def advice(model: nn.Module, *, tokens: int | None = None, inputs=None, **options) -> Advice:
    return lora_fx.plan(model, LoraConfig(**options), inputs, tokens=tokens).advice


def llama_8b() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


# --- coverage -------------------------------------------------------------------------------------


def test_attention_alone_covers_a_fifth_of_llama() -> None:
    plan = lora_fx.plan(llama_8b(), LoraConfig(target_modules=ATTENTION))
    # 4096 · (4096 + 1024) · 2 of these and 3 · 4096 · 14336 elements, without the head.
    attention, mlp = 2 * 4096 * (4096 + 1024), 3 * 4096 * 14336
    assert plan.advice.coverage.share == pytest.approx(attention / (attention + mlp))
    assert [name for name, _ in plan.advice.coverage.uncovered] == [
        f"model.layers.{{0-1}}.mlp.{name}" for name in MLP
    ]
    shares = [share for _, share in plan.advice.coverage.uncovered]
    assert sum(shares) == pytest.approx(mlp / (attention + mlp))
    text = str(plan)
    assert text.index("advice:") > text.index("not selected")
    assert "only 19 % of the FLOPs" in text
    assert "model.layers.{0-1}.mlp.gate_proj 27 %" in text
    assert "only 19 % of the FLOPs" in plan._repr_html_()
    assert plan.to_dict()["advice"]["coverage"]["share"] == plan.advice.coverage.share


def test_attention_is_little_of_a_hybrid_model() -> None:
    """Names of attention layers select some layers, and training goes on without an error."""
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model("nemotron_h")
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = advice(model, target_modules=ATTENTION)
    assert found.coverage.share < 0.1
    assert "model.layers.0.mixer.in_proj 15 %" in found.coverage.line()
    assert advice(model).coverage.share > 0.999


def test_a_plan_without_adapters_has_no_coverage() -> None:
    assert advice(Residual(), target_modules=[], modules_to_save=["head"]).coverage is None


@pytest.mark.parametrize("options", [{}, {"target_modules": MLP}, {"target_modules": "all-linear"}])
def test_good_coverage_is_not_mentioned(options: dict) -> None:
    found = advice(llama_8b(), **options)
    assert found.coverage.share > 0.8
    assert not any("FLOPs" in line for line in found.lines())


def test_modules_that_are_trained_in_full_are_covered() -> None:
    found = advice(Residual(), target_modules=["down"], modules_to_save=["blocks.0"])
    part = advice(Residual(), target_modules=["down"])
    assert part.coverage.share == pytest.approx(0.5)
    assert found.coverage.share == pytest.approx(0.75)


def test_an_expert_counts_for_the_tokens_that_its_router_gives_it() -> None:
    model, _ = TRANSFORMERS["mixtral"]()
    assert model.config.num_experts_per_tok == 2
    plan = lora_fx.plan(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    (chosen,) = {s.site.chosen for s in plan.skipped if s.site.router}
    assert chosen == 2
    own = {name: p.numel() for name, p in model.model.layers[0].named_parameters()}
    experts = sum(size for name, size in own.items() if "experts" in name) / 4 * 2
    others = {n: size for n, size in own.items() if "self_attn" in n}
    adapted = sum(size for n, size in others.items() if "q_proj" in n or "v_proj" in n)
    assert plan.advice.coverage.share == pytest.approx(adapted / (sum(others.values()) + experts))


class Listed(nn.Module):
    """One of three experts of a list is chosen for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x)
        chosen = self.router(x).argmax(dim=-1)
        mixed = sum(
            torch.where((chosen == index).unsqueeze(-1), expert(x), 0.0)
            for index, expert in enumerate(self.experts)
        )
        return self.head(mixed)


def test_experts_of_a_list_share_the_tokens() -> None:
    assert advice(Listed(), target_modules=["first"]).coverage.share == pytest.approx(0.5)


class Pyramid(nn.Module):
    """A convolution at many positions, and one at few."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(4, 4, 3, padding=1)
        self.coarse = nn.Conv2d(4, 4, 3, padding=1, stride=4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.coarse(self.fine(x)).mean((2, 3)))


def test_convolutions_count_at_each_position() -> None:
    x = torch.randn(2, 4, 16, 16)
    assert advice(Pyramid(), inputs=(x,), target_modules=["coarse"]).coverage.share == (
        pytest.approx(16 / (256 + 16))
    )
    # Nothing is said if the positions are unknown.
    assert advice(Pyramid(), target_modules=["coarse"]).coverage is None


# --- forgotten modules ----------------------------------------------------------------------------


def test_experts_that_names_of_layers_do_not_reach() -> None:
    model, _ = TRANSFORMERS["mixtral"]()
    (line,) = advice(model, target_modules=[*ATTENTION, *MLP]).forgotten
    assert "experts.gate_up_proj ×2" in line
    assert "target_parameters" in line
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    assert advice(model, target_modules=ATTENTION, target_parameters=parameters).forgotten == ()
    assert advice(model).forgotten == ()
    assert advice(model, target_modules=ATTENTION, exclude_modules=r".*experts.*").forgotten == ()


@pytest.fixture
def grown(tmp_path: Path) -> nn.Module:
    """A language model that got three tokens after it was loaded."""
    model, _ = TRANSFORMERS["llama"]()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert advice(loaded).forgotten == ()
    loaded.resize_token_embeddings(43)
    return loaded


def test_rows_of_added_tokens(grown: nn.Module) -> None:
    (line,) = advice(grown).forgotten
    assert line.startswith("rows 40 to 42 of model.embed_tokens, lm_head are not in the checkpoint")
    new = [40, 41, 42]
    for options in (
        {"trainable_token_indices": {"embed_tokens": new, "lm_head": new}},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ):
        assert advice(grown, **options).forgotten == ()
    (line,) = advice(grown, modules_to_save=["embed_tokens"]).forgotten
    assert line.startswith("rows 40 to 42 of lm_head ")
    (line,) = advice(grown, trainable_token_indices={"embed_tokens": new[:2]}).forgotten
    assert "model.embed_tokens" in line


# --- capacity and learning rate -------------------------------------------------------------------


def test_capacity_is_two_bits_for_a_parameter_and_one_for_a_token() -> None:
    plan = lora_fx.plan(llama_8b(), LoraConfig(r=4), tokens=10_000_000)
    capacity = plan.advice.capacity
    assert capacity.parameters == capacity.factors == plan.trainable_parameters
    needed = 10_000_000 / 2 / plan.trainable_parameters
    assert capacity.lacking == pytest.approx(needed)
    assert needed > 1
    assert f"to store all, multiply r by {needed:.3g}" in str(plan)
    larger = lora_fx.plan(llama_8b(), LoraConfig(r=4 * 8), tokens=10_000_000)
    assert larger.advice.capacity.lacking == 1
    assert "hold at most about 10 Mbit: enough" in str(larger)


def test_parameters_without_a_rank_store_bits_as_well() -> None:
    capacity = advice(Residual(), tokens=10**6, modules_to_save=["head"]).capacity
    own = sum(p.numel() for p in Residual().head.parameters())
    assert capacity.factors == capacity.parameters - own
    grown = own + capacity.lacking * capacity.factors
    assert grown == pytest.approx(10**6 / 2)


@pytest.mark.parametrize("tokens", [0, -3])
def test_a_number_of_tokens_is_positive(tokens: int) -> None:
    with pytest.raises(ConfigError, match="give the number of tokens"):
        lora_fx.plan(Residual(), LoraConfig(), tokens=tokens)


def test_learning_rate_of_a_language_model() -> None:
    rate = advice(llama_8b(), r=8, lora_alpha=32).learning_rate
    assert rate.width == 4096
    assert rate.low == pytest.approx(5e-4 * (2000 / 4096) ** 0.781)
    assert rate.high == pytest.approx(5e-4 * (2000 / 4096) ** 0.0775)
    assert (
        "10 times that of full fine-tuning, for width 4,096 about 2.9e-4 to 4.7e-4" in rate.line()
    )
    assert "alpha" not in rate.line()
    # The alpha of a scale by 1 / sqrt(r) is that of the same scale by 1 / r.
    rooted = advice(llama_8b(), r=16, lora_alpha=4, use_rslora=True).learning_rate
    assert rooted.alpha == pytest.approx(16)
    assert "with 16, first steps are 2 times smaller" in rooted.line()


def test_no_rate_is_claimed_for_widths_that_were_not_measured() -> None:
    model, _ = TRANSFORMERS["llama"]()
    assert advice(model).learning_rate is None
    assert advice(model).lines() == []
    rate = advice(model, tokens=1000).learning_rate
    assert (rate.low, rate.high, rate.width) == (None, None, 16)
    assert "width" not in rate.line()
    assert "10 times that of full fine-tuning; 15 times" in rate.line()
