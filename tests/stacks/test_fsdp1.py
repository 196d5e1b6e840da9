"""FSDP1 trains a rewritten model as one process does, and what it has trained is saved."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lora_fx
from lora_fx import CaptureError, LoraConfig
from tests.numerics import assert_close
from tests.stacks.models import IDS, adapted, llama

RANKS = 2
CASES: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": ["q_proj", "down_proj"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
}
POLICIES: dict[str, Any] = {
    "whole": None,
    "layers": functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}
    ),
}


def build(case: str) -> Any:
    return adapted(LoraConfig(r=2, **CASES[case])).train()


def train(model: Any, ids: torch.Tensor) -> list[float]:
    """Train for three steps, and return the losses."""
    optimizer = torch.optim.SGD(lora_fx.trainable_parameters(model), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run_rank(rank: int, folder: str) -> None:
    """Train each case in each way of wrapping, and keep what came out."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for case in CASES:
        for policy, wrap in POLICIES.items():
            model = build(case)
            wrapped = FullyShardedDataParallel(
                model, use_orig_params=True, auto_wrap_policy=wrap, device_id=torch.device("cpu")
            )
            result: dict[str, Any] = {"losses": train(wrapped, IDS)}
            for name, verb in (
                ("save", lambda model=model: lora_fx.save_adapter(model, f"{folder}/shards")),
                ("merge", lambda model=model: lora_fx.merge(model)),
            ):
                try:
                    verb()
                except CaptureError as error:
                    result[name] = str(error)
            result["status"] = str(lora_fx.status(model))
            with FullyShardedDataParallel.summon_full_params(wrapped):
                result["state"] = {
                    key: value.clone() for key, value in lora_fx.adapter_state_dict(wrapped).items()
                }
                result["merged"] = lora_fx.merge(model)(IDS).logits.detach()
            with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
                state = wrapped.state_dict()
            if rank == 0:
                model.name_or_path = "base"
                model.save_pretrained(f"{folder}/{case} {policy}", state_dict=state)
            dist.barrier()
            with torch.no_grad():
                result["logits"] = wrapped(IDS).logits
            results[case, policy] = result
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.feature("FSDP1", "train", "save", "merge")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_it_trains_and_saves_as_one_process_does(case: str, policy: str, folder: Path) -> None:
    model = build(case)
    start = lora_fx.adapter_state_dict(model)
    start = {key: value.clone() for key, value in start.items()}
    losses = train(model, IDS)
    state, logits = lora_fx.adapter_state_dict(model), model(IDS).logits
    assert any(not torch.equal(value, start[key]) for key, value in state.items())
    for rank in range(RANKS):
        result = torch.load(folder / f"{rank}.pt")[case, policy]
        assert_close(torch.tensor(result["losses"]), torch.tensor(losses))
        assert result["state"].keys() == state.keys()
        for key, value in state.items():
            assert_close(result["state"][key], value)
        assert_close(result["logits"], logits)
        assert_close(result["merged"], logits)
        assert "active" in result["status"]
        for name in ("save", "merge"):
            assert "in shards of FSDP1" in result[name]
            assert "summon_full_params" in result[name]
    again = lora_fx.load_adapter(llama(), folder / f"{case} {policy}")
    assert_close(again(IDS).logits, logits)
