"""DoRA on grouped convolutions: what a folder means is what PEFT computes from it, both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_fx
from tests.algebra import randomize
from tests.dora import randomize_magnitudes
from tests.numerics import assert_close
from tests.zoo import sample, seeded

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHAPES = pytest.mark.parametrize(
    ("dims", "groups", "outs"), [(1, 2, 6), (2, 3, 12), (2, 6, 6), (3, 2, 4)]
)


def convolution(dims: int, groups: int, outs: int) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(KINDS[dims - 1](6, outs, 3, groups=groups), nn.Tanh())
    )().double()


def trained(base: nn.Module, r: int, **options: Any) -> nn.Module:
    config = lora_fx.LoraConfig(r=r, lora_alpha=5, target_modules=["0"], use_dora=True, **options)
    return randomize_magnitudes(randomize(lora_fx.rewrite(base, config)))


def theirs(base: nn.Module, folder: Path) -> nn.Module:
    # In fp64, where PEFT's adapters are fp32 unless they are told otherwise.
    model = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), folder, autocast_adapter_dtype=False
    )
    return model.double()


@SHAPES
def test_peft_computes_what_was_saved(dims: int, groups: int, outs: int, tmp_path: Path) -> None:
    base, x = convolution(dims, groups, outs), sample(2, 6, *(5,) * dims, dtype=torch.float64)
    model = trained(base, 2 * groups)
    lora_fx.save_adapter(model, tmp_path)
    assert_close(theirs(base, tmp_path)(x), model(x), 1e-6)
    loaded = lora_fx.load_adapter(base, tmp_path)
    assert_close(loaded(x), model(x))
    assert_close(lora_fx.merge(loaded)(x), model(x))
    # The same without files, into a model that has an adapter already.
    other = trained(base, 2 * groups)
    with torch.no_grad():
        other[0].lora_magnitude_vector.default.zero_()
    lora_fx.load_adapter_state_dict(other, lora_fx.adapter_state_dict(model))
    assert_close(other(x), model(x))


@SHAPES
def test_what_peft_trained_is_what_is_loaded(
    dims: int, groups: int, outs: int, tmp_path: Path
) -> None:
    base, x = convolution(dims, groups, outs), sample(2, 6, *(5,) * dims, dtype=torch.float64)
    config = peft.LoraConfig(r=groups, lora_alpha=3, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(copy.deepcopy(base), config).double()
    randomize_magnitudes(randomize(model))
    down = model.base_model.model[0].lora_A.default.weight
    rows, channels = 1, 6 // groups
    with torch.no_grad():
        # What is dense beyond the groups has no weight, and is refused.
        for group in range(groups):
            block = slice(group * channels, (group + 1) * channels)
            own = down[group * rows : (group + 1) * rows, block].clone()
            down[group * rows : (group + 1) * rows] = 0
            down[group * rows : (group + 1) * rows, block] = own
    model.save_pretrained(tmp_path)
    loaded = lora_fx.load_adapter(base, tmp_path)
    assert_close(loaded(x), model(x), 1e-6)
    assert not torch.allclose(loaded(x), base(x), atol=1e-3)


def test_with_a_start_that_changed_the_base(tmp_path: Path) -> None:
    base, x = convolution(2, 3, 12), sample(2, 6, 5, 5, dtype=torch.float64)
    config = lora_fx.LoraConfig(r=6, target_modules=["0"], use_dora=True, init_lora_weights="pissa")
    model = lora_fx.rewrite(base, config)
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    lora_fx.save_adapter(model, tmp_path)
    assert_close(theirs(base, tmp_path)(x), model(x), 1e-5)
    assert_close(lora_fx.load_adapter(base, tmp_path)(x), model(x), 1e-6)
    before = model(x)
    with torch.no_grad():
        model[0].lora_magnitude_vector.default.mul_(1.5)
    lora_fx.load_adapter(model, tmp_path)
    assert_close(model(x), before, 1e-6)


def test_a_feature_without_weights_keeps_its_magnitude(tmp_path: Path) -> None:
    base, x = convolution(2, 2, 6), sample(2, 6, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        base[0].weight[1] = 0
    config = lora_fx.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = lora_fx.rewrite(base, config)
    lora_fx.save_adapter(model, tmp_path)
    loaded = lora_fx.load_adapter(base, tmp_path)
    assert_close(loaded(x), base(x))
    kept = loaded[0].lora_magnitude_vector.default
    assert torch.equal(kept, model[0].lora_magnitude_vector.default)
