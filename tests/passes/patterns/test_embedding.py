from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx.passes.pipeline import plan_model
from tests import algebra
from tests.zoo import Form, forms

EMBEDDING = forms("embedding")


@pytest.mark.parametrize("form", EMBEDDING)
def test_no_output_bit_changes_before_training(form: Form) -> None:
    algebra.check_untouched(form)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", EMBEDDING)
def test_the_adapted_output_is_the_formula(form: Form, dtype: torch.dtype) -> None:
    algebra.check_adapted(form, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", EMBEDDING)
def test_merged_equals_adapted(form: Form, dtype: torch.dtype) -> None:
    algebra.check_merged(form, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", EMBEDDING)
def test_merged_half_weights_are_rounded_once(form: Form, dtype: torch.dtype) -> None:
    algebra.check_merged_half(form, dtype)


def test_gradients_are_those_of_the_formula() -> None:
    (plain,) = (p.values[0] for p in EMBEDDING if p.id == "nn.Embedding")
    algebra.check_gradients(plain)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Embedding(11, 6, padding_idx=2),
        lambda: nn.Embedding(11, 6, padding_idx=-9),
        lambda: nn.Embedding(11, 6, scale_grad_by_freq=True),
        lambda: nn.Embedding(11, 6, padding_idx=10, scale_grad_by_freq=True),
    ],
)
def test_the_table_of_a_learns_as_the_base_table_would(build) -> None:
    # What padding_idx and scale_grad_by_freq do to the gradient of W they do to that of Aᵀ.
    table = build()
    ids = torch.tensor([[0, 2, 5, 10], [2, 2, 9, 10]])
    adapted = algebra.randomize(
        lora_fx.rewrite(nn.Sequential(table), lora_fx.LoraConfig(r=3, target_modules=["0"]))
    )
    a, b = adapted[0].lora_embedding_A.default, adapted[0].lora_embedding_B.default
    cotangent = torch.randn(2, 4, 6)
    adapted(ids).backward(cotangent)
    plain = torch.nn.Parameter(a.detach().T.clone())
    down = F.embedding(ids, plain, table.padding_idx, None, 2.0, table.scale_grad_by_freq)
    scale = adapted._lora_fx.adapters["default"].sites[0].scale
    (scale * down @ b.detach().T).backward(cotangent)
    algebra.assert_close(a.grad, plain.grad.T, 1e-5)
    if table.padding_idx is not None:
        assert not a.grad[:, table.padding_idx].any()


def test_padding_counted_from_the_end_in_a_functional_call() -> None:
    (form,) = (p.values[0] for p in EMBEDDING if p.id == "F.embedding")
    adapted = algebra.randomize(algebra.adapt(form, form.model()))
    adapted(form.x()).sum().backward()
    a, _ = form.factors(adapted)
    assert not a.grad[:, 10].any()
    assert a.grad[:, 9].any()


def test_indices_have_no_dropout() -> None:
    model = nn.Sequential(nn.Embedding(11, 6))
    config = lora_fx.LoraConfig(target_modules=["0"], lora_dropout=0.5)
    (row,) = lora_fx.plan(model, config)
    assert row.dropout == 0.0
    adapted = algebra.randomize(lora_fx.rewrite(model, config)).train()
    ids = torch.arange(11)
    algebra.assert_same_bits(adapted(ids), adapted(ids))


@given(
    vocabulary=st.integers(1, 12),
    width=st.integers(1, 7),
    r=st.integers(1, 9),
    shape=st.lists(st.integers(0, 4), max_size=3),
)
def test_any_shape_and_rank(vocabulary: int, width: int, r: int, shape: list[int]) -> None:
    form = Form(
        "any",
        lambda: nn.Embedding(vocabulary, width),
        lambda: torch.randint(vocabulary, shape),
        "weight",
        "embedding",
        "embedding",
    )
    model = form.model().double()
    adapted = algebra.randomize(algebra.adapt(form, model, r))
    found, exact = adapted(form.x()), algebra.reference(form, model, adapted)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lora_fx.merge(adapted)(form.x()), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Embedding(11, 6, max_norm=1.0), "max_norm"),
        (lambda: nn.EmbeddingBag(11, 6), "embedding bags"),
    ],
)
def test_a_near_miss_is_refused_with_the_reason(build, reason: str) -> None:
    _, plan = plan_model(nn.Sequential(build()), lora_fx.LoraConfig(target_modules=[]))
    assert not plan.skipped
    (rejection,) = plan.rejections
    assert rejection.name == "0"
    assert reason in rejection.reason


def test_rows_taken_by_indexing_are_refused() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(11, 6))

        def forward(self, ids):
            return self.table[ids]

    _, plan = plan_model(Indexed(), lora_fx.LoraConfig(target_modules=[]))
    (rejection,) = plan.rejections
    assert rejection.name == "table"
    assert "getitem" in rejection.reason
