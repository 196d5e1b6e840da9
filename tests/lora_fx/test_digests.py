"""Digests of tensors: the bytes of their elements, and nothing about the tensors changes."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.digests import add_values


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.empty(0),
    ],
    ids=["fp32", "transposed", "scalar", "empty"],
)
def test_the_elements_are_added_in_their_order(values: Tensor) -> None:
    digest = hashlib.sha256()
    add_values(digest, values)
    plain = values.reshape(-1).clone().view(torch.uint8).tolist()
    assert digest.digest() == hashlib.sha256(bytes(plain)).digest()


def test_tensors_without_values_raise() -> None:
    with pytest.raises(NotImplementedError):
        add_values(hashlib.sha256(), torch.empty(2, device="meta"))


def test_a_merge_leaves_weights_that_can_be_resized() -> None:
    """FSDP1 frees gathered weights by resizing their storages."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["0"]))
    lora_fx.merge(adapted)
    for name, value in adapted.state_dict().items():
        value.untyped_storage().resize_(0)
        assert value.untyped_storage().nbytes() == 0, name
