"""Forms of stored tensors: back and forth, and what PEFT computes with what is stored."""

from __future__ import annotations

import pytest
import torch

from lora_fx.checkpoint.keys import PLAIN, Dense, StackedDown, StackedUp, Transposed
from lora_fx.errors import CheckpointError
from tests.numerics import assert_close

FORMS = [
    (PLAIN, (2, 3)),
    (Transposed(), (2, 3)),
    (Dense(2), (4, 3, 5)),
    (StackedDown(3), (3, 2, 5)),
    (StackedDown(3, transposed=True), (3, 5, 2)),
    (StackedUp(3), (3, 5, 2)),
    (StackedUp(3, transposed=True), (3, 2, 5)),
]


@pytest.mark.parametrize(("form", "shape"), FORMS, ids=str)
def test_what_is_stored_comes_back(form, shape):
    value = torch.randn(shape)
    stored = form.encode(value)
    assert tuple(stored.shape) == form.stored(shape)
    assert torch.equal(form.decode(stored), value)


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_factors_mean_the_same_to_peft(transposed):
    """PEFT's sum over "o r e, e r i -> e o i" is B[e] A[e]."""
    experts, rank, inputs, outputs = 3, 2, 5, 4
    a, b = torch.randn(experts, rank, inputs), torch.randn(experts, outputs, rank)
    down = StackedDown(experts, transposed).encode(a.mT if transposed else a)
    up = StackedUp(experts, transposed).encode(b.mT if transposed else b)
    theirs = torch.einsum(
        "ore,eri->eoi",
        up.reshape(outputs, rank, experts),
        down.reshape(experts, rank, inputs),
    )
    assert_close(theirs, b @ a)


def test_a_dense_matrix_that_mixes_groups_has_no_place():
    with pytest.raises(CheckpointError, match=r"is dense.* 2 groups"):
        Dense(2).decode(torch.ones(4, 6))
