"""What einsum can mean beside a linear operation. The linear forms are in test_linear.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from tests.golden import check_golden, printed
from tests.zoo import Around, Einsum


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bi,bi->bi", (3, 5)),  # a product element by element
        ("bi,oi->b", (7, 5)),  # sums the output, too
        ("bi,ii->bi", (5, 5)),  # a diagonal
        ("bi,bo->bio", (3, 7)),  # an outer product over the batch
    ],
)
def test_what_is_no_product_with_a_matrix_is_refused_with_the_equation(equation, shape) -> None:
    plan = lora_fx.plan(Around(Einsum(equation, *shape)), lora_fx.LoraConfig(target_modules=[]))
    assert not plan.sites
    assert not plan.skipped
    (rejection,) = plan.rejections
    assert rejection.name == "op.kernel"
    assert repr(equation) in rejection.reason


def test_two_activations_are_not_its_business() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.einsum("bqd,bkd->bqk", self.q(x), self.k(x))

    plan = lora_fx.plan(Scores(), lora_fx.LoraConfig())
    assert [row.name for row in plan] == ["q", "k"]
    assert plan.rejections == ()


def test_its_branch_is_two_einsums() -> None:
    model = Around(Einsum("bsi,oi->bso", 7, 5))
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, target_modules=["kernel"]))
    check_golden("insert_einsum", printed(lora_fx.graphs(adapted)["op"]))
