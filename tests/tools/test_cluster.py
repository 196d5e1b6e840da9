"""What a step needs on a mesh, planned in one process, beside what 2 and 4 processes use."""

from __future__ import annotations

import json

import pytest
import torch
import torch.multiprocessing
import transformers
from torch import nn

import lora_fx
from lora_fx.tools.cluster import Ledger, Mesh, Settings, plan_step, step_inputs
from tests.tools.cluster_ranks import BATCH, CONFIG, SEQUENCE, model, run_rank


def planned(mesh: str, **how):
    made = model().to("meta")
    given = step_inputs(made, None, batch=BATCH, sequence=SEQUENCE)
    return plan_step(made, CONFIG, Mesh.parse(mesh), given, Settings(**how))


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp=2",
        pytest.param("fsdp=4", marks=pytest.mark.slow),
        pytest.param("replicate=2,fsdp=2", marks=pytest.mark.slow),
    ],
)
def test_a_plan_is_what_processes_use(mesh: str, tmp_path) -> None:
    need = planned(mesh)
    count = Mesh.parse(mesh).size
    torch.multiprocessing.spawn(run_rank, (str(tmp_path), mesh), nprocs=count)
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("weights", "adapters", "gradients", "optimizer", "gathered"):
        assert getattr(need, name) == found[name], name
    assert need.traffic == type(need.traffic)(**found["traffic"])
    assert need.activations == pytest.approx(found["activations"], rel=0.01)
    assert need.peak == pytest.approx(found["peak"], rel=0.01)
    # By the allocator, which knows nothing of the ledger; gloo's own buffers are in it.
    resident = need.weights + need.adapters + need.optimizer
    assert need.peak - resident == pytest.approx(found["grown"], rel=0.05)


def test_what_a_mesh_changes() -> None:
    alone, eight = planned("fsdp=1"), planned("fsdp=8")
    assert alone.traffic.total == 0
    assert alone.gathered == 0
    assert eight.weights == pytest.approx(alone.weights / 8, rel=0.01)
    assert eight.activations == pytest.approx(alone.activations, rel=0.01)
    assert eight.peak < alone.peak
    # Everything is gathered in the forward, and in the backward what was freed after it.
    whole = alone.weights + alone.adapters
    assert whole * 7 / 8 < eight.traffic.gather < 2 * whole


def test_checkpointing_keeps_less() -> None:
    assert planned("fsdp=2", checkpointing=True).activations < planned("fsdp=2").activations / 2


def test_half_precision_halves() -> None:
    full, half = planned("fsdp=2"), planned("fsdp=2", dtype=torch.bfloat16)
    assert half.weights < 0.6 * full.weights
    assert half.traffic.gather == pytest.approx(full.traffic.gather / 2, rel=0.01)


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=0", "tensors=2", "fsdp=2,fsdp=4", "fsdp=-1"])
def test_a_mesh_that_is_none(text: str) -> None:
    with pytest.raises(lora_fx.ConfigError, match="--mesh"):
        Mesh.parse(text)


def test_a_model_that_says_nothing() -> None:
    with pytest.raises(lora_fx.ConfigError, match="--inputs"):
        step_inputs(nn.Linear(2, 2), None, batch=1, sequence=1)
    linear = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    inputs = step_inputs(linear, (torch.zeros(3, 2),), batch=5, sequence=1)
    with pytest.raises(lora_fx.ConfigError, match="leave out --checkpointing"):
        plan_step(linear, lora_fx.LoraConfig(r=1), Mesh(), inputs, Settings(checkpointing=True))


def test_a_ledger_counts_what_lives() -> None:
    with Ledger() as ledger:
        one = torch.empty(1000)
        two = one * 2
        del one
        three = two[:10]
        assert ledger.live == 4000
    del two, three
    assert ledger.live == 0
    assert ledger.peak == 8000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mixture_whose_keys_and_values_differ_in_width(checkpointing: bool) -> None:
    config = transformers.DeepseekV3Config(
        num_hidden_layers=2,
        first_k_dense_replace=1,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_group=4,
        vocab_size=100,
        q_lora_rank=16,
        kv_lora_rank=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    with torch.device("meta"):
        made = transformers.DeepseekV3ForCausalLM(config)
    given = step_inputs(made, None, batch=1, sequence=32)
    need = plan_step(
        made,
        lora_fx.LoraConfig(r=2),
        Mesh(fsdp=2),
        given,
        Settings(dtype=torch.bfloat16, checkpointing=checkpointing),
    )
    held = sum(p.numel() for p in made.parameters()) * 2
    assert need.weights == pytest.approx(held / 2, rel=0.02)
