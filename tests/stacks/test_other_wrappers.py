"""DataParallel runs, and a loss that reads an adapted weight from the head's parameters is refused."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

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
