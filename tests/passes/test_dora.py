"""DoRA at every form of a linear operation, against the decomposed weight in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_fx
from tests.algebra import adapt, randomise, scale_of
from tests.dora import explicit_dora, magnitude_of, randomise_magnitudes
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import FORMS, Form, seeded

DENSE = [form for form in FORMS if not form.kind.startswith("experts")]
EACH = pytest.mark.parametrize("form", DENSE, ids=lambda form: form.name)


def dora(form: Form, model: nn.Module, **options) -> nn.Module:
    return randomise_magnitudes(randomise(adapt(form, model, use_dora=True, **options)))


def reference(form: Form, model: nn.Module, adapted: nn.Module) -> torch.Tensor:
    a, b = (f.detach().double() for f in form.factors(adapted))
    m = magnitude_of(form, adapted).detach().double()
    exact = copy.deepcopy(model).double()
    return explicit_dora(form, exact, a, b, m, scale_of(adapted), form.x(torch.float64))


@EACH
def test_no_bit_changes_before_training(form: Form) -> None:
    model = form.model().requires_grad_(False)
    assert_same_bits(adapt(form, model, use_dora=True)(form.x()), model(form.x()))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_is_that_of_the_decomposed_weight(form: Form, dtype: torch.dtype) -> None:
    model = form.model().to(dtype)
    adapted = dora(form, model)
    assert_close(adapted(form.x(dtype)), reference(form, model, adapted))


@EACH
def test_gradients_are_those_of_the_decomposed_weight(form: Form) -> None:
    model = form.model().double()
    adapted = dora(form, model)
    x = form.x(torch.float64)
    if x.is_floating_point():
        x.requires_grad_()
    own = (*form.factors(adapted), magnitude_of(form, adapted))
    cotangent = seeded(torch.randn_like)(model(x))
    adapted(x).backward(cotangent)
    found = [p.grad for p in own] + ([x.grad] if x.requires_grad else [])
    a, b, m = (p.detach().clone().requires_grad_() for p in own)
    given = x.detach().requires_grad_(x.requires_grad)
    explicit_dora(form, model, a, b, m, scale_of(adapted), given).backward(cotangent)
    exact = [a.grad, b.grad, m.grad] + ([given.grad] if x.requires_grad else [])
    assert_close(found, exact, 1e-11)


@EACH
def test_the_merged_model_computes_the_same(form: Form) -> None:
    model = form.model()
    adapted = dora(form, model)
    merged = lora_fx.merge(adapted)
    assert merged.state_dict().keys() == model.state_dict().keys()
    assert_close(merged(form.x()), adapted(form.x()))
    assert_close(merged(form.x()), reference(form, model, adapted))
