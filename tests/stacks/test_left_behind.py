"""What trainers leave on a model is in no merged model and in no export; what others set stays."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig, MergeError
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, adapted, llama
from tests.stacks.test_kept_forwards import accelerate_autocast, accelerate_hook, compiled
from tests.zoo import Mlp, sample


def prepared(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def trl_fused_head(model: nn.Module) -> None:
    pytest.importorskip("trl.trainer.utils").add_fused_lm_head(model)


def trl_in_accelerate(model: nn.Module) -> None:
    trl_fused_head(model)
    prepared(model)


TRAINERS = [
    accelerate_hook,
    accelerate_autocast,
    prepared,
    compiled,
    pytest.param(trl_fused_head, marks=pytest.mark.stack),
    pytest.param(trl_in_accelerate, marks=pytest.mark.stack),
]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_merged_model_has_nothing_of_a_trainer(trainer, caplog) -> None:
    model = adapted()
    wanted = model(IDS).logits
    trainer(model)
    with caplog.at_level(logging.WARNING, "lora_fx"):
        merged = lora_fx.merge(model)
    assert "for training is left out: the model" in caplog.text
    held = {name for module in merged.modules() for name in vars(module)}
    assert not held & {"forward", "_hf_hook", "_old_forward", "_original_forward"}
    found = merged(IDS).logits
    assert found.dtype is torch.float32
    assert_close(found, wanted)
    assert_same_bits(pickle.loads(pickle.dumps(merged))(IDS).logits, found)
    assert "forward" in vars(model)  # the model itself goes on training


@pytest.mark.feature("accelerate", "export")
def test_an_export_has_nothing_of_a_trainer(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x, base = sample(3, 5), Mlp().eval()
    model = lora_fx.rewrite(base, LoraConfig(r=2))
    nn.init.normal_(model.first.lora_B.default)
    wanted = {"merge": model(x), "inline": model(x), "inputs": base(x)}
    prepared(model)
    assert not torch.equal(model(x), wanted["merge"])
    for adapters, output in wanted.items():
        path = tmp_path / f"{adapters}.onnx"
        lora_fx.export_onnx(model, path, (x,), adapters=adapters)
        (found,) = lora_fx.OnnxSession(path, provider="cpu").run([x]).values()
        assert_close(torch.as_tensor(found), output)


def test_a_forward_that_was_there_at_the_rewrite_stays() -> None:
    base = llama()
    accelerate_hook(base.model.norm)
    merged = lora_fx.merge(adapted(base=base))
    assert "forward" in vars(merged.model.norm)


def test_a_forward_of_somebody_else_stays_and_runs_the_merged_weights() -> None:
    model = adapted()
    inner = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * inner(hidden)
    wanted = model(IDS).logits
    merged = lora_fx.merge(model)
    assert_close(merged(IDS).logits, wanted)
    again = copy.deepcopy(model)
    accelerate_hook(again.lm_head)  # around it: what was there before comes back
    assert_close(lora_fx.merge(again)(IDS).logits, wanted)


def test_one_within_the_other_is_refused_by_name() -> None:
    model = adapted()
    inner = model.lm_head.forward

    @functools.wraps(inner)
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return 2 * inner(hidden)

    model.lm_head.forward = torch.compile(forward, backend="eager")
    with pytest.raises(MergeError, match=r"lm_head: its forward was set .* by torch and by tests"):
        lora_fx.merge(model)
