"""DataParallel runs, FSDP1 is refused by name, and so is a loss that reads an adapted weight."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

import lora_fx
from lora_fx import CaptureError, LoraConfig
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, adapted

CONFIGS: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": ["q_proj"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
}


@pytest.mark.feature("DataParallel", "train")
@pytest.mark.parametrize("name", CONFIGS)
def test_replicas_of_data_parallel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own replicate; only the copies between GPUs are made on the CPU."""
    replicate: Any = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors: list[Any], devices: list[int], detach: bool = False) -> list[Any]:
        return [[tensor * 1 for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    model, other = (adapted(LoraConfig(r=2, **CONFIGS[name])) for _ in range(2))
    wanted = model(IDS).logits
    for replica in replicate.replicate(model, [0, 1]):
        assert_same_bits(replica(IDS).logits, wanted)
    halves = IDS.chunk(2)
    replicas = replicate.replicate(model.train(), [0, 1])
    for replica, half in zip(replicas, halves, strict=True):
        replica(half, labels=half).loss.backward()
    for half in halves:
        other.train()(half, labels=half).loss.backward()
    for key, parameter in other.named_parameters():
        if parameter.requires_grad:
            assert_close(model.get_parameter(key).grad, parameter.grad)


def flat(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    said = []
    for root in (True, False):
        model = adapted()
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        if root:
            wrapped: Any = FullyShardedDataParallel(model, **options)
        else:
            wrapped = model
            model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], **options)
        for verb in (
            lambda wrapped=wrapped: wrapped(IDS),
            lambda model=model: lora_fx.status(model),
        ):
            try:
                verb()
                said.append("nothing")
            except CaptureError as error:
                said.append(str(error))
    torch.save(said, Path(folder) / "said.pt")
    dist.destroy_process_group()


@pytest.mark.feature("FSDP1", "train", refused=True)
def test_fsdp1_is_refused(tmp_path: Path) -> None:
    multiprocessing.spawn(flat, (str(tmp_path),), nprocs=1)
    for words in torch.load(tmp_path / "said.pt"):
        assert "FSDP1" in words
        assert "fully_shard" in words


@pytest.mark.stack
def test_a_loss_that_reads_the_weight_of_an_adapted_head_is_refused() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    model = adapted(LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model(IDS)
    utils.add_fused_lm_head(model)
    with pytest.raises(CaptureError, match=r"lm_head: its weight .* is read by"):
        model(IDS, labels=IDS, fused_lm_head=True)
    # Without an adapter at the head it is right.
    other = adapted(LoraConfig(r=2, target_modules=["q_proj"]))
    wanted = other(IDS, labels=IDS).loss
    utils.add_fused_lm_head(other)
    assert_close(other(IDS, labels=IDS, fused_lm_head=True).loss, wanted)
