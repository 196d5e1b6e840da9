"""What a plan adapts is what PEFT adapts: names, ranks and scales, on four architectures.

Rules over names alone are compared in ``test_selection.py``; here operations come in, and what each library
makes of modules that are none. Deviations that are documented (``target_modules=None``, targets inside
``modules_to_save``) are no rows.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lora_fx
from lora_fx import LoraConfig, NoMatchError
from lora_fx.ir.graph import Capture
from lora_fx.ir.plan import Plan
from lora_fx.ir.site import Matches
from lora_fx.passes.capture.auto import capture as capture_model
from lora_fx.passes.pipeline import find_operations
from lora_fx.passes.plan.planning import make_plan


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=3, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config)


class Box(nn.Module):
    """Calls its children one after the other."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


class Odd(nn.Module):
    """Numbers and short names in all places, names that end in each other, a convolution and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Box(q=nn.Linear(4, 4), xq=nn.Linear(4, 4)) for _ in range(3))
        self.h = nn.ModuleList(Box(attn=Box(c_attn=nn.Linear(4, 4))) for _ in range(2))
        self.stages = nn.Sequential(
            Box(blocks=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), q=nn.Linear(4, 4)),
            Box(blocks=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))),
        )
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.out_q = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for layer in (*self.layers, *self.h):
            x = layer(x)
        x = self.norm(self.stages(x))
        return self.out_q(self.conv(x.mT).mT)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "bert": bert,
    "gpt2": gpt2,
    "odd": Odd,
}


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
QV = ["q_proj", "v_proj"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"target_modules": ["q_proj"]},
        {"target_modules": QV},
        {"target_modules": ATTENTION},
        {"target_modules": "all-linear"},
        {"target_modules": "All-Linear", "task_type": "CAUSAL_LM"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "mlp.up_proj": 3}},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 4},
        {"target_modules": ["proj"]},
        {"target_modules": ["_proj"]},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"]},
        {"target_modules": ["layers.2.mlp.gate_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.[02]\.mlp\..*_proj"},
        {"target_modules": r".*layers\.1\.self_attn\.[qk]_proj|lm_head"},
        {"target_modules": "q_proj"},
        {"target_modules": r".*q_proj$"},
        {"target_modules": ["q_proj", "none_such"]},
        {"target_modules": ["none_such"]},
        {"target_modules": ["self_attn"]},
        {"target_modules": ["norm"]},
        {"target_modules": QV, "exclude_modules": ["v_proj"]},
        {"target_modules": QV, "exclude_modules": ["layers.0.self_attn.v_proj"]},
        {"target_modules": QV, "exclude_modules": r".*\.2\..*"},
        {"target_modules": QV, "exclude_modules": QV},
        {"target_modules": QV, "layers_to_transform": 1},
        {"target_modules": QV, "layers_to_transform": [0, 2]},
        {"target_modules": QV, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "blocks"},
        {"target_modules": QV, "layers_to_transform": [9]},
        {"target_modules": [*QV, "lm_head"], "layers_to_transform": [1]},
        {"target_modules": ["model.layers.2.self_attn.q_proj", "v_proj"], "layers_to_transform": 0},
        {"target_modules": QV, "modules_to_save": ["lm_head"]},
        {"target_modules": QV, "modules_to_save": ["embed_tokens", "norm"]},
        {"target_modules": QV, "modules_to_save": ["lm_head"], "exclude_modules": ["v_proj"]},
        {"target_modules": QV, "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3},
        {"target_modules": QV, "r": 4, "lora_alpha": 6, "use_rslora": True},
        {"target_modules": QV, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
        {"target_modules": QV, "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 5}},
        {"target_modules": QV, "rank_pattern": {"q_proj": 5, r"layers\.1\..*": 3}},
        {"target_modules": QV, "rank_pattern": {"^model.layers.1.self_attn.q_proj": 3}},
        {"target_modules": QV, "alpha_pattern": {"self_attn.q_proj": 3, ".*": 7}},
        {"target_modules": QV, "rank_pattern": {"q_proj": 16}, "use_rslora": True},
    ],
    "bert": [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]},
        {"target_modules": ["query"], "task_type": "TOKEN_CLS"},
        {"target_modules": ["query"], "task_type": "FEATURE_EXTRACTION"},
        {"target_modules": ["query", "key", "value", "dense"]},
        {"target_modules": ["dense"]},
        {"target_modules": ["output.dense"]},
        {"target_modules": ["attention.output.dense"]},
        {"target_modules": ["intermediate.dense", "pooler.dense"]},
        {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
        {"target_modules": ["dense"], "exclude_modules": r".*attention.*"},
        {"target_modules": ["dense"], "layers_to_transform": [1]},
        {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
        {"target_modules": ["bert.pooler.dense", "query"], "layers_to_transform": 0},
        {"target_modules": ["classifier"]},
        {"target_modules": ["classifier", "query"]},
        {"target_modules": ["word_embeddings", "query"]},
        {"target_modules": ["position_embeddings"]},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"target_modules": "all-linear", "exclude_modules": ["classifier", "pooler.dense"]},
        {"target_modules": r".*layer\.\d+\..*dense"},
        {"target_modules": r"bert\.encoder\..*\.(query|key)"},
        {"target_modules": r"classifier|.*query"},
        {"target_modules": "bert.pooler.dense", "modules_to_save": ["classifier"]},
        {"target_modules": ["query"], "modules_to_save": ["classifier", "LayerNorm"]},
        {"target_modules": ["LayerNorm"]},
        {"target_modules": ["attention"]},
        {"target_modules": ["dense"], "rank_pattern": {"output.dense": 3}, "lora_alpha": 4},
        {"target_modules": ["dense"], "rank_pattern": {"attention.output.dense": 3, "dense": 5}},
        {"target_modules": ["dense"], "alpha_pattern": {r"layer\.0\..*": 1, "pooler.dense": 2.5}},
        {"target_modules": ["query"], "r": 5, "lora_alpha": 3, "use_rslora": True},
    ],
    "gpt2": [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["c_attn", "c_proj", "c_fc"]},
        {"target_modules": ["c_proj"]},
        {"target_modules": ["attn.c_proj"]},
        {"target_modules": ["mlp.c_proj", "attn.c_attn"]},
        {"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"]},
        {"target_modules": ["c_proj"], "exclude_modules": r".*h\.0.*"},
        {"target_modules": ["c_attn"], "layers_to_transform": [0, 2]},
        {"target_modules": ["c_attn"], "layers_to_transform": [0, 2], "layers_pattern": "h"},
        {"target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["c_attn", "lm_head"], "layers_to_transform": 1, "layers_pattern": "h"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["c_fc"]},
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 3},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["wte"]},
        {"target_modules": ["wte", "wpe", "c_attn"]},
        {"target_modules": r"transformer\.h\.\d\.attn\.c_(attn|proj)"},
        {"target_modules": r".*c_(attn|fc)"},
        {"target_modules": "c_attn"},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
        {"target_modules": ["c_attn"], "rank_pattern": {r"h\.1\..*": 3}, "lora_alpha": 6},
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"fc": 3, "c_attn": 5}},
        {"target_modules": ["c_attn", "c_fc"], "alpha_pattern": {"c_.*": 3, "c_fc": 5}},
        {"target_modules": ["h"]},
        {"target_modules": ["attention"]},
    ],
    "odd": [
        {"target_modules": ["q"]},
        {"target_modules": ["xq"]},
        {"target_modules": ["out_q"]},
        {"target_modules": ["q", "xq"], "layers_to_transform": [0]},
        {"target_modules": ["q", "xq"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "stages"},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "(layers|stages)"},
        {"target_modules": ["layers.0.q"]},
        {"target_modules": ["layers.0.q", "stages.0.q"], "layers_to_transform": [2]},
        {"target_modules": ["0.q"]},
        {"target_modules": ["blocks.0"]},
        {"target_modules": ["blocks.0", "q"], "alpha_pattern": {"0": 3, "^stages.0.q": 5}},
        {"target_modules": ["blocks.0", "blocks.2"], "layers_to_transform": [1]},
        {"target_modules": ["blocks.0"], "layers_to_transform": 0, "layers_pattern": "blocks"},
        {"target_modules": ["c_attn"]},
        {"target_modules": ["attn.c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["h.1.attn.c_attn"], "layers_to_transform": [0], "layers_pattern": "h"},
        {"target_modules": ["h.1.attn.c_attn"], "exclude_modules": ["h.1.attn"]},
        {"target_modules": ["c_attn", "q"], "exclude_modules": ["1.attn.c_attn"]},
        {"target_modules": ["c_attn", "q"], "exclude_modules": "q"},
        {"target_modules": "q"},
        {"target_modules": r".*q"},
        {"target_modules": r".*\.q"},
        {"target_modules": r"stages\.\d\.blocks\.[02]"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["out_q", "0"]},
        {"target_modules": ["conv"]},
        {"target_modules": ["conv", "tokens", "q"]},
        {"target_modules": ["tokens"], "r": 2, "lora_alpha": 5},
        {"target_modules": ["norm"]},
        {"target_modules": ["layers"]},
        {"target_modules": ["q"], "modules_to_save": ["out_q", "conv"]},
        {"target_modules": ["q", "xq"], "rank_pattern": {"q": 3}},
        {"target_modules": ["q", "xq"], "rank_pattern": {"0.q": 3, "xq": 5}},
        {"target_modules": ["q", "xq"], "rank_pattern": {r"layers\.0\.q": 3}, "lora_alpha": 7},
        {"target_modules": ["q", "c_attn"], "rank_pattern": {"layers.*": 3, ".*attn": 2}},
        {"target_modules": ["conv", "tokens"], "rank_pattern": {"con": 3, "tokens": 1}},
    ],
}
CASES = [
    pytest.param(name, values, id=f"{name}-{i}")
    for name, rows in ROWS.items()
    for i, values in enumerate(rows)
]

Found = dict[str, tuple[int, float]]


def by_peft(name: str, values: dict[str, Any]) -> Found | None:
    """Rank and scale of each module that PEFT adapts; None if it refuses."""
    # A fresh copy: PEFT extends and empties lists that it is given.
    config = peft.LoraConfig(**copy.deepcopy(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.get_peft_model(copy.deepcopy(model_of(name)), config).base_model
        except (ValueError, TypeError):
            return None
    found = {}
    for module in model.targeted_module_names:
        layer = model.model.get_submodule(module)
        assert isinstance(layer, LoraLayer)
        found[module] = (layer.r["default"], layer.scaling["default"])
    return found


@functools.cache
def capture_of(name: str) -> tuple[Capture, Matches]:
    capture = capture_model(model_of(name))
    return capture, find_operations(capture)


def planned(name: str, values: dict[str, Any]) -> Plan | None:
    """What ``lora_fx.plan`` gives, with one capture for all rows."""
    try:
        return make_plan(*capture_of(name), LoraConfig(**values))
    except NoMatchError:
        return None


@pytest.mark.parametrize(("name", "values"), CASES)
def test_adapts_what_peft_adapts(name: str, values: dict[str, Any]) -> None:
    plan, theirs = planned(name, values), by_peft(name, values)
    if plan is None or theirs is None:
        assert plan is theirs is None
        return
    assert sorted(row.name for row in plan.sites) == sorted(theirs)
    for row in plan.sites:
        rank, scale = theirs[row.name]
        assert row.rank == rank
        assert row.scale == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_are_what_plan_gives(name: str) -> None:
    for values in (ROWS[name][0], ROWS[name][-2]):
        rows, plan = planned(name, values), None
        try:
            plan = lora_fx.plan(model_of(name), LoraConfig(**values))
        except NoMatchError:
            assert rows is None
        else:
            assert rows is not None
            plan = dataclasses.replace(plan, advice=rows.advice)  # the rows have none
        assert plan == rows


def test_the_table_is_large_and_has_both_outcomes() -> None:
    outcomes = [planned(*case.values) is None for case in CASES]
    assert len(outcomes) >= 140
    assert 10 <= sum(outcomes) <= len(outcomes) // 5


STOPS: list[tuple[str, Any, list[str]]] = [
    (
        "gpt2",
        r".*attn",
        [f"transformer.h.{i}.attn.c_attn" for i in range(3)],
    ),
    ("odd", ["1"], ["stages.0.blocks.1"]),
    ("odd", ["0", "blocks.1"], [f"stages.{i}.blocks.0" for i in range(2)] + ["stages.0.blocks.1"]),
    ("odd", r"stages\.1\.blocks\.\d", ["stages.1.blocks.0", "stages.1.blocks.2"]),
    (
        "odd",
        r"(layers|h)\.\d\..*",
        [f"h.{i}.attn.c_attn" for i in range(2)]
        + [f"layers.{i}.{leaf}" for i in range(3) for leaf in ("q", "xq")],
    ),
]


@pytest.mark.parametrize(("name", "targets", "sites"), STOPS)
def test_containers_among_the_targets_stop_peft_only(
    name: str, targets: Any, sites: list[str]
) -> None:
    """Where a target names modules of both kinds, PEFT stops at one that it cannot adapt."""
    config = peft.LoraConfig(target_modules=copy.deepcopy(targets))
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(copy.deepcopy(model_of(name)), config)
    plan = planned(name, {"target_modules": targets})
    assert plan is not None
    assert sorted(row.name for row in plan.sites) == sorted(sites)
