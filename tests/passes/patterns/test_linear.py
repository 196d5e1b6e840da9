from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx.passes.pipeline import plan_model
from tests import algebra
from tests.algebra import randomize
from tests.numerics import assert_close
from tests.views import Kernel
from tests.zoo import (
    Form,
    MatmulOperator,
    MatmulTransposed,
    WeightOnTheLeft,
    forms,
    sample,
    seeded,
)

LINEAR = forms("linear", "matmul", "einsum", "experts", "grouped-mm")
HALF = [torch.bfloat16, torch.float16]


def rejections(model: nn.Module) -> dict[str, str]:
    _, plan = plan_model(model, lora_fx.LoraConfig(target_modules=[]))
    assert not plan.sites
    return {rejection.name: rejection.reason for rejection in plan.rejections}


@pytest.mark.parametrize("form", LINEAR)
def test_no_output_bit_changes_before_training(form: Form) -> None:
    algebra.check_untouched(form)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", LINEAR)
def test_the_adapted_output_is_the_formula(form: Form, dtype: torch.dtype) -> None:
    algebra.check_adapted(form, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", LINEAR)
def test_a_half_precision_base_computes_in_its_own_dtype(form: Form, dtype: torch.dtype) -> None:
    algebra.check_adapted(form, dtype)


@pytest.mark.parametrize("form", LINEAR)
def test_gradients_are_those_of_the_formula(form: Form) -> None:
    algebra.check_gradients(form)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", LINEAR)
def test_merged_equals_adapted(form: Form, dtype: torch.dtype) -> None:
    algebra.check_merged(form, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", LINEAR)
def test_merged_half_weights_are_rounded_once(form: Form, dtype: torch.dtype) -> None:
    algebra.check_merged_half(form, dtype)


@given(
    build=st.sampled_from([nn.Linear, MatmulOperator, MatmulTransposed, WeightOnTheLeft]),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.lists(st.integers(0, 3), max_size=3),
    r=st.integers(1, 12),
)
def test_any_shape_and_rank(
    build: type[nn.Module], sizes: tuple[int, int], batch: list[int], r: int
) -> None:
    first, second = sizes
    weight = "weight" if build is nn.Linear else "kernel"
    in_out = build is MatmulOperator
    in_features = second if build in (MatmulTransposed, WeightOnTheLeft) else first
    shape = (*batch, in_features, 2) if build is WeightOnTheLeft else (*batch, in_features)
    form = Form(
        "any",
        lambda: build(first, second),
        lambda: torch.randn(shape),
        weight,
        "in_out" if in_out else "out_in",
        "linear" if build is nn.Linear else "matmul",
    )
    model = form.model().double()
    adapted = algebra.randomize(algebra.adapt(form, model, r))
    x = form.x(torch.float64)
    found, exact = adapted(x), algebra.reference(form, model, adapted)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lora_fx.merge(adapted)(x), found, rtol=1e-12, atol=1e-12)
    a, b = form.factors(adapted)
    assert a.numel() + b.numel() == r * (first + second)


def test_a_bias_that_is_a_parameter_belongs_to_the_site() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3, bias=False))
    config = lora_fx.LoraConfig(target_modules=["0", "2"])
    assert [row.site.bias for row in lora_fx.plan(model, config)] == ["0.bias", None]


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return F.linear(x, torch.tanh(self.kernel))


class TwoParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(4, 4))
        self.right = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x * (self.left @ self.right)


class FourDimensions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 2, 4, 4))

    def forward(self, x):
        return x @ self.kernel


class Columns(Kernel):
    """Some of its inputs, cut out of the transposed weight."""

    def forward(self, x):
        return x[:, :2] @ self.kernel.t()[:2]


class Moved(Kernel):
    """The experts are not the first dimension."""

    def forward(self, x):
        return x @ self.kernel.permute(1, 0, 2)


class ViewedByTheInput(Kernel):
    def forward(self, x):
        return x @ self.kernel.view(x.shape[-1], -1)


class IntegerExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kernel = torch.ones(2, 4, 4, dtype=torch.int8)
        self.kernel = nn.Parameter(kernel, requires_grad=False)

    def forward(self, x):
        return x @ self.kernel


class TwoShapes(Kernel):
    """One weight, applied as one matrix and as two."""

    def forward(self, x):
        return x @ self.kernel.view(8, 4).T, x @ self.kernel


class ScaledAddmm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.addmm(x, x, self.kernel, alpha=2.0)


class Buffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(4, 4))
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return F.linear(x, self.kernel) @ self.scale


class OnlyActivations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(x) @ x.T


class AppliedTwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.tanh(x @ self.kernel) @ self.kernel.T


class ReadBesides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.kernel + self.kernel.norm()


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False)

    def forward(self, x):
        return torch.matmul(x, self.kernel)


@pytest.mark.parametrize("build", [lambda: TwoShapes(2, 4, 4), AppliedTwoWays])
def test_what_is_applied_in_two_ways_is_adapted_in_both(build: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    config = lora_fx.LoraConfig(r=1, target_modules=["kernel"])
    adapted = randomize(lora_fx.rewrite(build(), config))
    assert_close(adapted(x), lora_fx.merge(adapted)(x))


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [
        (Computed, "kernel", "computed from it (tanh)"),
        (TwoParameters, "left", "its only use is by matmul"),
        (FourDimensions, "kernel", "its weight has 4 dimensions"),
        (lambda: Columns(4, 4), "kernel", "computed from it (getitem)"),
        (lambda: Moved(2, 4, 4), "kernel", "computed from it (permute)"),
        (lambda: ViewedByTheInput(4, 4), "kernel", "its only use is by matmul"),
        (IntegerExperts, "kernel", "torch.int8, not floating point"),
        (ScaledAddmm, "kernel", "alpha or beta other than 1"),
        (Buffer, "kernel", "its weight is a buffer"),
        (Integers, "kernel", "torch.int32, not floating point"),
    ],
)
def test_a_near_miss_is_refused_with_the_reason(
    build: type[nn.Module], name: str, reason: str
) -> None:
    assert reason in rejections(build())[name]


def test_what_else_reads_a_weight_reads_it_with_its_adapter() -> None:
    base, x = seeded(ReadBesides)(), sample(3, 4)
    config = lora_fx.LoraConfig(r=2, target_modules=["kernel"], init_lora_weights=False)
    model = lora_fx.rewrite(base, config)
    (row,) = model._lora_fx.adapters["default"].sites
    holder = model.kernel_lora
    a, b = holder.lora_A.default, holder.lora_B.default
    weight = base.kernel + row.scale * (b @ a if row.site.layout == "out_in" else (b @ a).T)
    exact = torch.func.functional_call(base, {"kernel": weight}, (x,))
    assert_close(model(x), exact)
    assert not torch.allclose(exact, base(x))


def test_products_of_activations_are_not_mine() -> None:
    plan = lora_fx.plan(OnlyActivations(), lora_fx.LoraConfig(target_modules=["lin"]))
    assert [row.name for row in plan] == ["lin"]
    assert not plan.rejections


def test_shape_questions_do_not_count_as_reads() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return (x @ self.kernel).view(-1, self.kernel.shape[1]) / self.kernel.size(0)

    plan = lora_fx.plan(Asks(), lora_fx.LoraConfig(target_modules=["kernel"]))
    assert [row.name for row in plan] == ["kernel"]


@pytest.mark.parametrize("kind", ["weight_norm", "parametrized", "spectral"])
def test_a_weight_that_is_recomputed_at_each_call_is_refused(kind: str) -> None:
    wrap = {
        "weight_norm": torch.nn.utils.weight_norm,
        "parametrized": torch.nn.utils.parametrizations.weight_norm,
        "spectral": torch.nn.utils.parametrizations.spectral_norm,
    }[kind]
    model = nn.Sequential(
        wrap(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    x = torch.randn(3, 4)
    plan = lora_fx.plan(model, lora_fx.LoraConfig())
    assert [row.name for row in plan] == ["2"]
    with pytest.raises(lora_fx.NoMatchError, match="0"):
        lora_fx.plan(model, lora_fx.LoraConfig(target_modules=["0"]))
    model.eval()
    assert torch.equal(lora_fx.rewrite(model, lora_fx.LoraConfig())(x), model(x))
