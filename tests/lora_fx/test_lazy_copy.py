"""Copies that share memory until somebody writes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_fx.runtime.kernels.recompute import lazy_copy


def address(tensor: Tensor) -> int:
    """Where the values are, without the right to write there."""
    return torch._C._data_address(tensor)


WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda y: y.mul_(2),
    "data": lambda y: y.data.mul_(2),
    "view": lambda y: y.view(-1)[:5].fill_(9),
    "transpose": lambda y: y.T.neg_(),
    "another dtype": lambda y: y.view(torch.int32).add_(1),
    "item": lambda y: y.__setitem__((0, 0), 9.0),
    "out": lambda y: torch.add(y, 1, out=y),
    "out of a product": lambda y: torch.mm(y.clone(), y.clone(), out=y),
    "addmm_": lambda y: y.addmm_(y.clone(), y.clone()),
    "relu": lambda y: F.relu(y, inplace=True),
    "dropout": lambda y: F.dropout(y, 0.5, inplace=True),
    "copy_": lambda y: y.copy_(torch.zeros_like(y)),
    "index_fill_": lambda y: y.index_fill_(0, torch.tensor([1]), 9.0),
    "foreach": lambda y: torch._foreach_mul_([y], 2.0),
    "random": lambda y: y.normal_(),
    "numpy": lambda y: y.numpy().__imul__(2),
    "dlpack": lambda y: torch.from_dlpack(y).mul_(2),
    "storage": lambda y: y.untyped_storage().fill_(0),
    "a tensor over the storage": lambda y: torch.empty(0).set_(y.untyped_storage()).add_(1),
    "shared memory": lambda y: y.share_memory_().mul_(2),
    "pointer": lambda y: ctypes.memset(y.data_ptr(), 0, 64),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_nobody_who_has_the_tensor_can_change_the_copy(write: Callable[[Tensor], Any]) -> None:
    y = torch.randn(8, 8)
    before = y.clone()
    copy = lazy_copy(y)
    assert address(copy) == address(y)
    write(y)
    assert not torch.equal(y, before)
    assert torch.equal(copy, before)


def test_readers_leave_the_memory_shared() -> None:
    y = torch.randn(8, 8)
    copy = lazy_copy(y)
    leaf = y.requires_grad_()
    read = (
        F.gelu(leaf),
        leaf * leaf,
        F.linear(leaf, torch.randn(3, 8)),
        leaf.softmax(-1),
        leaf[1:],
    )
    sum(out.sum() for out in read).backward()
    assert address(copy) == address(y)


def test_a_part_of_a_tensor_keeps_its_place() -> None:
    y = torch.randn(8, 8)[2:, 1:]
    copy = lazy_copy(y)
    assert address(copy) == address(y)
    assert copy.stride() == y.stride()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.from_numpy(np.ones((2, 2), np.float32)),
        lambda: torch.ones(2, 2).share_memory_(),
        lambda: torch.ones(2, 2).as_subclass(type("Mine", (Tensor,), {})),
    ],
    ids=["memory of NumPy", "shared memory", "subclass"],
)
def test_what_cannot_be_shared_is_copied_at_once(make: Callable[[], Tensor]) -> None:
    y = make()
    copy = lazy_copy(y)
    y.data.mul_(2)
    assert torch.equal(copy, torch.ones(2, 2))


def test_what_has_no_values_is_copied_as_such() -> None:
    assert lazy_copy(torch.empty(2, 3, device="meta")).is_meta
    with FakeTensorMode():
        assert lazy_copy(torch.empty(2, 3)).shape == (2, 3)
