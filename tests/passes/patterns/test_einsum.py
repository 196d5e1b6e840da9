"""What einsum can mean beside a linear operation. The linear forms are in test_linear.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx.passes.pipeline import plan_model
from tests import algebra
from tests.algebra import Letters
from tests.golden import check_golden, printed
from tests.numerics import assert_close, relative_error
from tests.zoo import Around, Einsum, sample, seeded


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
    _, plan = plan_model(Around(Einsum(equation, *shape)), lora_fx.LoraConfig(target_modules=[]))
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


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, Letters, tuple[int, ...], tuple[int, ...]]:
    """Any linear one: letters of the batch, kept, summed, shared, and summed over x alone, in any order."""
    pool = draw(st.permutations("abcdefghijkl"))
    taken = iter(pool)
    batch, kept, summed, shared, alone = (
        "".join(next(taken) for _ in range(draw(st.integers(*bounds))))
        for bounds in ((0, 2), (1, 3), (1, 3), (0, 2), (0, 1))
    )
    x, weight, out = (
        "".join(draw(st.permutations(term)))
        for term in (batch + summed + shared + alone, kept + summed + shared, batch + kept + shared)
    )
    sizes = {letter: draw(st.integers(1, 3)) for letter in sorted(x + weight)}
    terms = [weight, x] if draw(st.booleans()) else [x, weight]
    shapes = [tuple(sizes[letter] for letter in term) for term in (weight, x)]
    return f"{','.join(terms)}->{out}", Letters(weight, kept, summed), shapes[0], shapes[1]


class Tensors(nn.Module):
    def __init__(self, equation: str, first: bool, *shape: int) -> None:
        super().__init__()
        self.equation, self.first = equation, first
        self.kernel = nn.Parameter(torch.randn(*shape).double())

    def forward(self, x):
        operands = (self.kernel, x) if self.first else (x, self.kernel)
        return torch.tanh(torch.einsum(self.equation, *operands))


@given(case=equations(), dora=st.booleans())
def test_every_linear_equation_is_that_of_the_dense_weight(case, dora: bool) -> None:
    equation, letters, shape, x = case
    first = equation.startswith(f"{letters.weight},")
    model = seeded(Tensors)(equation, first, *shape)
    experts = set(letters.weight) - set(letters.kept + letters.summed)
    options = {"use_dora": dora and not experts}
    config = lora_fx.LoraConfig(r=2, lora_alpha=3, target_modules=["kernel"], **options)
    adapted = lora_fx.rewrite(model, config)
    value = sample(*x, dtype=torch.float64)
    assert_close(adapted(value), model(value))
    algebra.check_dense(model, algebra.randomize(adapted), {"kernel": letters}, value)


HEADS = [
    ("bsd,dhe->bhse", Letters("dhe", "he", "d"), (4, 2, 3), (2, 5, 4)),
    ("bsd,hde->bhse", Letters("hde", "he", "d"), (2, 4, 3), (2, 5, 4)),
    ("bshe,hed->bsd", Letters("hed", "d", "he"), (2, 3, 4), (2, 5, 2, 3)),
    ("bhse,hde->bsd", Letters("hde", "d", "he"), (2, 4, 3), (2, 2, 5, 3)),
]


@pytest.mark.parametrize(("equation", "letters", "shape", "x"), HEADS)
def test_heads_are_saved_and_loaded(equation, letters, shape, x, tmp_path) -> None:
    model = seeded(Tensors)(equation, False, *shape)
    config = lora_fx.LoraConfig(r=2, target_modules=["kernel"], use_dora=True)
    adapted = algebra.randomize(lora_fx.rewrite(model, config))
    lora_fx.save_adapter(adapted, tmp_path)
    value = sample(*x, dtype=torch.float64)
    algebra.check_dense(model, lora_fx.load_adapter(model, tmp_path), {"kernel": letters}, value)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize(("equation", "letters", "shape", "x"), HEADS)
def test_a_start_out_of_the_weight_leaves_the_sum(equation, letters, shape, x, start) -> None:
    model = seeded(Tensors)(equation, False, *shape)
    more = {"loftq_config": {"loftq_bits": 8}} if start == "loftq" else {}
    config = lora_fx.LoraConfig(
        r=2, target_modules=["kernel"], init_lora_weights=start, **more
    )  # fmt: skip
    adapted = lora_fx.rewrite(model, config)
    holder = adapted.kernel_lora
    delta = letters.delta(holder.lora_A.default, holder.lora_B.default, shape)
    stored = adapted.get_parameter("kernel")
    total = stored + lora_fx.LoraConfig(r=2).lora_alpha / 2 * delta
    assert relative_error(total, model.kernel) < (1e-6 if start != "loftq" else 0.02)
    assert relative_error(stored, model.kernel) > 1e-3


def test_a_bias_on_b_needs_to_know_where_the_outputs_are() -> None:
    model = seeded(Tensors)("bi...,oi->bo...", False, 4, 3)
    config = lora_fx.LoraConfig(r=2, target_modules=["kernel"], lora_bias=True)
    with pytest.raises(lora_fx.ConfigError, match="an ellipsis in the equation comes after them"):
        lora_fx.plan(model, config)


def test_a_bias_on_b_is_added_where_the_outputs_are() -> None:
    model = seeded(Tensors)("bsd,hde->bhse", False, 2, 4, 3)
    config = lora_fx.LoraConfig(r=2, target_modules=["kernel"], lora_bias=True)
    adapted = algebra.randomize(lora_fx.rewrite(model, config))
    x = sample(2, 5, 4, dtype=torch.float64)
    weights = algebra.dense_weights(model, adapted, {"kernel": Letters("hde", "he", "d")})
    scale = algebra.scale_of(adapted)
    bias = scale * adapted.kernel_lora.lora_bias.default.view(2, 1, 3)
    exact = torch.tanh(torch.einsum("bsd,hde->bhse", x, weights["kernel"]) + bias)
    assert_close(adapted(x), exact)


def test_the_output_of_several_letters_has_no_parts() -> None:
    class Cut(Tensors):
        def forward(self, x):
            first, second = torch.einsum("bsd,hde->bshe", x, self.kernel).chunk(2, -1)
            return first * second

    plan = lora_fx.plan(
        Cut("", False, 2, 4, 6), lora_fx.LoraConfig(target_modules=["kernel"])
    )  # fmt: skip
    assert [row.site.parts for row in plan] == [()]


def test_a_permuted_view_is_refused_with_the_reason() -> None:
    class Viewed(Tensors):
        def forward(self, x):
            return torch.einsum("bsd,hde->bhse", x, self.kernel.view(2, 4, 3))

    _, plan = plan_model(Viewed("", False, 8, 3), lora_fx.LoraConfig(target_modules=[]))
    (rejection,) = plan.rejections
    assert "permutes a view of its weight" in rejection.reason
