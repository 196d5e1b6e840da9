"""A trained bias on B, at every form of a linear operation: ``y + s · (B A x + bias)``."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import ConfigError, LoraConfig, MergeError
from tests.algebra import adapt, explicit, randomize, scale_of
from tests.numerics import assert_close, assert_same_bits, ulp_error
from tests.zoo import FORMS, Form, sample, seeded

LINEAR = [
    form
    for form in FORMS
    if not form.kind.startswith(("experts", "embedding")) and form.name != "conv1d unbatched"
]
EACH = pytest.mark.parametrize("form", LINEAR, ids=lambda form: form.name)


def bias_of(form: Form, model: nn.Module) -> nn.Parameter:
    owner = model.op if form.weight == "weight" else getattr(model.op, f"{form.weight}_lora")
    return owner.lora_bias.default


@EACH
def test_no_bit_changes_before_training(form: Form) -> None:
    model = form.model().requires_grad_(False)
    assert_same_bits(adapt(form, model, lora_bias=True)(form.x()), model(form.x()))


@EACH
def test_it_is_added_to_its_feature_and_scaled(form: Form) -> None:
    # Frozen: torch.matmul rounds otherwise where a weight wants a gradient.
    model = form.model().double().requires_grad_(False)
    adapted, x = adapt(form, model, lora_bias=True), form.x(torch.float64)
    a, b = form.factors(adapted)
    before = adapted.op(x).detach()
    for feature in (0, len(b) - 1):
        with torch.no_grad():
            bias_of(form, adapted).zero_()[feature] = 0.25
        difference = adapted.op(x).detach() - before
        # The outputs that belong to the feature are those that its row of W reaches (a transposed
        # convolution with a stride reaches some of them with its bias only).
        row = torch.zeros_like(b).index_fill_(0, torch.tensor([feature]), 1.0)
        down = seeded(torch.randn_like)(a)
        reached = explicit(form, model, down, row, 1.0, x) != model(x)
        assert reached.any()
        assert (difference[reached] != 0).all()
        assert difference.count_nonzero() == difference.numel() // len(b)
        found = difference[difference != 0]
        own = 2 if form.name == "affine subclass" else 1  # what the operation does afterwards
        assert_close(found, torch.full_like(found, own * 0.25 * scale_of(adapted)))


@EACH
def test_its_gradient_is_that_of_a_vector_that_is_added(form: Form) -> None:
    adapted = randomize(adapt(form, form.model().double(), lora_bias=True))
    x, bias = form.x(torch.float64), bias_of(form, adapted)
    before = adapted.op(x)
    cotangent, step = seeded(torch.randn_like)(before), seeded(torch.randn_like)(bias)
    before.backward(cotangent)
    with torch.no_grad():
        bias.add_(step)
        change = adapted.op(x) - before
    assert_close((change * cotangent).sum(), (bias.grad * step).sum(), 1e-10)


# --- merging --------------------------------------------------------------------------------------


def with_bias(model: nn.Module, **options) -> nn.Module:
    options = {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ".*", **options}
    return randomize(lora_fx.rewrite(model, LoraConfig(**options)))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(5, 7), (3, 5)),
        (lambda: nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9)),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8)),
        (lambda: nn.Conv3d(2, 4, 2), (1, 2, 3, 4, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 6)),
    ],
    ids=["linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d"],
)
def test_a_merge_folds_it_into_the_bias(layer, shape) -> None:
    model = seeded(lambda: nn.Sequential(layer()))().double()
    adapted = with_bias(model)
    x, before = sample(*shape, dtype=torch.float64), copy.deepcopy(model.state_dict())
    merged = lora_fx.merge(adapted)
    assert_close(merged(x), adapted(x))
    extra = adapted[0].lora_bias.default.detach()
    assert_close(
        merged[0].bias, model[0].bias + adapted._lora_fx.adapters["default"].sites[0].scale * extra
    )
    assert_same_bits(model.state_dict(), before)
    assert_close(lora_fx.merge(adapted, into=model)(x), adapted(x))


def test_a_trained_base_bias_is_what_it_is_added_to() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 7)))().double()
    adapted = with_bias(model, bias="all")
    with torch.no_grad():
        adapted[0].bias.add_(1.0)
    x = sample(3, 5, dtype=torch.float64)
    assert_close(lora_fx.merge(adapted)(x), adapted(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_merged_bias_is_rounded_once(dtype: torch.dtype) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 70)))().to(dtype)
    adapted = with_bias(model)
    scale = adapted._lora_fx.adapters["default"].sites[0].scale
    exact = model[0].bias.detach().double() + scale * adapted[0].lora_bias.default.detach().double()
    assert ulp_error(lora_fx.merge(adapted)[0].bias, exact) <= 0.5


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return torch.softmax(q @ k.mT, -1) @ v


@pytest.mark.parametrize("targets", [["qkv.q", "qkv.v"], ["qkv"]])
def test_parts_of_a_fused_bias(targets: list[str]) -> None:
    model = seeded(Fused)().double()
    adapted = with_bias(model, target_modules=targets)
    x = sample(2, 3, 6, dtype=torch.float64)
    merged = lora_fx.merge(adapted)
    assert_close(merged(x), adapted(x))
    changed = merged.qkv.bias != model.qkv.bias
    assert changed[6:12].any() == (targets == ["qkv"])


def test_rows_of_the_bias_of_an_attention() -> None:
    model = seeded(lambda: nn.MultiheadAttention(6, 2, batch_first=True))().double()
    adapted = with_bias(model, target_modules=["q", "v"])
    x = sample(2, 3, 6, dtype=torch.float64)
    merged = lora_fx.merge(adapted)
    assert_close(merged(x, x, x)[0], adapted(x, x, x)[0])
    assert_same_bits(merged.in_proj_bias[6:12], model.in_proj_bias[6:12])


def test_without_a_base_bias_it_trains_with_a_warning_and_does_not_merge(caplog) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 2)))()
    with caplog.at_level(logging.WARNING, "lora_fx"):
        adapted = with_bias(model)
    assert "no merge can fold the bias on B (lora_bias) of these" in caplog.text
    assert caplog.text.rstrip().endswith(": 0")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MergeError, match=r"^0: adapter 'default' has a bias on B"):
        lora_fx.merge(adapted, into=model)
    assert_same_bits(model.state_dict(), before)


def test_a_bias_that_is_a_matrix_cannot_take_it() -> None:
    class Addmm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.shift = (nn.Parameter(torch.randn(3, 3)) for _ in "ab")

        def forward(self, x):
            return torch.addmm(self.shift, x, self.kernel)

    adapted = with_bias(Addmm())
    with pytest.raises(MergeError, match=r"kernel: its bias shift is \[3, 3\]"):
        lora_fx.merge(adapted)


# --- what cannot have it --------------------------------------------------------------------------


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, ids):
        return self.fc(self.embed(ids))


def test_an_embedding_is_left_out_or_refused_by_name() -> None:
    plan = lora_fx.plan(Lookup(), LoraConfig(lora_bias=True, target_modules=".*"))
    assert [row.name for row in plan] == ["fc"]
    assert [one.reason for one in plan.skipped] == [
        "an embedding has no bias on B (as in PEFT): leave it out, or set lora_bias=False"
    ]
    assert "a bias on B (lora_bias): 1 site(s)" in str(plan)
    with pytest.raises(ConfigError, match="embed: an embedding has no bias on B"):
        lora_fx.rewrite(Lookup(), LoraConfig(lora_bias=True, target_modules=["fc", "embed"]))


def test_the_plan_counts_it() -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    config = LoraConfig(r=2, lora_bias=True, target_modules=".*")
    plan = lora_fx.plan(model, config)
    assert plan.trainable_parameters == 2 * (5 + 7) + 7
    trained = sum(p.numel() for p in lora_fx.trainable_parameters(lora_fx.rewrite(model, config)))
    assert plan.trainable_parameters == trained


def test_it_starts_at_random_where_b_does() -> None:
    model = nn.Sequential(nn.Linear(5, 700))
    config = LoraConfig(r=4, lora_bias=True, init_lora_weights=False, target_modules=".*")
    bias = lora_fx.rewrite(model, config)[0].lora_bias.default
    # nn.Linear(4, 700) draws its bias from ±1/√4.
    assert 0.45 < bias.abs().max() <= 0.5
    assert bias.unique().numel() > 690
