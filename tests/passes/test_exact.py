"""Merges in fp64 against sums of fractions: whatever cancels, each element is the nearest number."""

from __future__ import annotations

import copy
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.ir.record import record_of
from lora_fx.passes.merge.rounding import Term, slices_of, sum_exactly, two_products
from lora_fx.passes.parameters.factors import factors_of
from tests.algebra import randomize

floats = st.floats(-1e12, 1e12, allow_nan=False).filter(
    lambda value: value == 0 or abs(value) > 1e-90
)


def fractions(values: torch.Tensor) -> np.ndarray:
    found = np.vectorize(Fraction, otypes=[object])(values.detach().double().numpy())
    return found.reshape(values.shape)


def nearest(values: np.ndarray) -> torch.Tensor:
    """A fraction's float is the nearest one."""
    return torch.from_numpy(np.vectorize(float, otypes=[float])(values)).reshape(values.shape)


def change_of(model: nn.Module, adapter: str, site: str) -> np.ndarray:
    """``s · BA`` of one site, in the shape of its weight."""
    entry = record_of(model).adapters[adapter]
    (row,) = (row for row in entry.sites if row.name == site)
    a, b = (fractions(factor) for factor in factors_of(model, row, adapter).pair)
    groups, shape = row.site.groups, row.site.weight_shape
    if row.site.family == "embedding":
        delta = (b @ a).T
    elif row.site.experts or row.site.family == "linear":
        delta = b @ a
        delta = delta if row.site.layout == "out_in" else delta.swapaxes(-1, -2)
    else:
        a = a.reshape(groups, a.shape[0] // groups, -1)
        b = b.reshape(groups, b.shape[0] // groups, -1)
        delta = np.stack([up @ down for up, down in zip(b, a, strict=True)])
        if row.site.layout == "in_out":
            # [g, out/g, in/g, k] to [in, out/g, k].
            delta = delta.reshape(groups, shape[1], shape[0] // groups, -1).swapaxes(1, 2)
        delta = delta.reshape(shape)
    return Fraction(row.scale) * delta


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.turned = nn.ConvTranspose1d(8, 8, 3, padding=1, groups=2)
        self.raw = nn.Parameter(torch.randn(8, 6))
        self.last = nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.turned(self.conv(self.embed(ids).mT)).mT @ self.raw)


SITES = {
    "embed": "embed.weight",
    "conv": "conv.weight",
    "turned": "turned.weight",
    "raw": "raw",
    "last": "last.weight",
}


def adapted(model: nn.Module, **options) -> nn.Module:
    # Three fifths is no number that has an end in base two.
    config = LoraConfig(**{"r": 6, "lora_alpha": 3.6, **options})
    return randomize(lora_fx.rewrite(model.double(), config))


def cancel(model: nn.Module, base: nn.Module, sites: dict[str, str], digits: int) -> None:
    """Makes weights of which an adapter leaves little: what is left has its digits in the last places."""
    for site, weight in sites.items():
        delta = nearest(change_of(model, "default", site))
        noise = 1 + torch.randn_like(delta) * 2.0**-digits
        with torch.no_grad():
            base.get_parameter(weight).copy_(-delta * noise)


@pytest.mark.parametrize("digits", [0, 20, 40, 60])
def test_each_element_is_the_nearest_number_whatever_cancels(digits: int) -> None:
    base = Kinds()
    changed = adapted(base, target_modules=list(SITES))
    cancel(changed, base, SITES, digits)
    merged = lora_fx.merge(changed)
    target = lora_fx.merge(changed, into=copy.deepcopy(base))
    for site, weight in SITES.items():
        exact = fractions(base.get_parameter(weight)) + change_of(changed, "default", site)
        assert torch.equal(merged.get_parameter(weight), nearest(exact)), site
        assert torch.equal(target.get_parameter(weight), nearest(exact)), site


def test_an_accumulation_in_fp64_would_not_do() -> None:
    """The test before this one can fail."""
    base = Kinds()
    changed = adapted(base, target_modules=["last"])
    cancel(changed, base, {"last": "last.weight"}, 40)
    layer = changed.last
    (row,) = record_of(changed).adapters["default"].sites
    stored = layer.get_parameter("weight")
    plain = stored + row.scale * (layer.lora_B.default @ layer.lora_A.default)
    exact = nearest(fractions(stored) + change_of(changed, "default", "last"))
    unit = torch.from_numpy(np.spacing(exact.abs().numpy()))
    assert float(((plain.detach() - exact).abs() / unit).max()) > 1e3


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))
        self.down = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x, self.up), self.down.mT)


def test_experts() -> None:
    base = Experts()
    changed = adapted(base, target_modules=[], target_parameters=["up", "down"])
    sites = {row.name: row.site.weight for row in record_of(changed).adapters["default"].sites}
    assert sites
    cancel(changed, base, sites, 30)
    merged = lora_fx.merge(changed)
    for site, weight in sites.items():
        exact = fractions(base.get_parameter(weight)) + change_of(changed, "default", site)
        assert torch.equal(merged.get_parameter(weight), nearest(exact)), site


def test_several_adapters_and_a_start_that_changed_the_weight() -> None:
    base = nn.Sequential(nn.Linear(9, 8)).double()
    changed = lora_fx.rewrite(
        base, LoraConfig(r=3, lora_alpha=2, target_modules=["0"], init_lora_weights="pissa")
    )
    lora_fx.add_adapter(changed, LoraConfig(r=2, lora_alpha=1.3, target_modules=["0"]), "other")
    lora_fx.set_adapter(changed, ["default", "other"])
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(changed):
            parameter.add_(torch.randn_like(parameter))
    merged = lora_fx.merge(changed)
    original = fractions(base[0].weight)
    # What runs is W₀ in the place of W, and both branches.
    exact = fractions(changed.get_parameter("0.weight")) + sum(
        change_of(changed, name, "0") for name in ("default", "other")
    )
    assert original.shape == exact.shape
    assert torch.equal(merged[0].weight, nearest(exact))


def test_rows_of_a_fused_weight() -> None:
    base = nn.MultiheadAttention(8, 2, batch_first=True)
    changed = adapted(Holder(base), target_modules=["attention"], r=2)
    merged = lora_fx.merge(changed)
    exact = fractions(base.in_proj_weight)
    for part, rows in (("q", slice(0, 8)), ("k", slice(8, 16)), ("v", slice(16, 24))):
        exact[rows] += change_of(changed, "default", f"attention.{part}")
    assert torch.equal(merged.attention.in_proj_weight, nearest(exact))


class Holder(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_a_bias_on_b() -> None:
    base = nn.Sequential(nn.Linear(4, 6)).double()
    changed = adapted(base, target_modules=["0"], lora_bias=True)
    extra = changed[0].lora_bias.default
    scale = record_of(changed).adapters["default"].sites[0].scale
    with torch.no_grad():
        base[0].bias.copy_(-(scale * extra))
    exact = fractions(base[0].bias) + Fraction(scale) * fractions(extra)
    assert torch.equal(lora_fx.merge(changed)[0].bias, nearest(exact))


def test_a_wider_dtype_than_the_weights_own() -> None:
    base = nn.Sequential(nn.Linear(5, 4, bias=False))
    changed = randomize(
        lora_fx.rewrite(base, LoraConfig(r=3, lora_alpha=1.1, target_modules=["0"]))
    )
    exact = fractions(base[0].weight) + change_of(changed, "default", "0")
    assert torch.equal(lora_fx.merge(changed, dtype=torch.float64)[0].weight, nearest(exact))


def test_dora_is_off_by_a_few_units() -> None:
    """The sum is rounded once, the norm and the gain round as well."""
    base = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    changed = adapted(base, target_modules=["0"], use_dora=True)
    cancel(changed, base, {"0": "0.weight"}, 30)
    merged, report = lora_fx.merge(changed, return_report=True)
    total = fractions(base[0].weight) + change_of(changed, "default", "0")
    magnitude = changed[0].lora_magnitude_vector.default.detach()
    with localcontext() as context:
        context.prec = 60
        for place, line in enumerate(total):
            square = sum(value * value for value in line)
            norm = (Decimal(square.numerator) / Decimal(square.denominator)).sqrt()
            for column, value in enumerate(line):
                exact = Decimal(float(magnitude[place])) / norm
                exact *= Decimal(value.numerator) / Decimal(value.denominator)
                found = float(merged[0].weight.detach()[place, column])
                unit = Decimal(float(np.spacing(abs(float(exact)))))
                assert abs(Decimal(found) - exact) <= 4 * unit
    assert report.max_ulp <= 0.5


@pytest.mark.parametrize("value", [1e200, 1e-200, 1e-320])
def test_numbers_that_cannot_be_taken_apart_are_accumulated(value: float) -> None:
    base = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    changed = adapted(base, target_modules=["0"])
    with torch.no_grad():
        changed[0].lora_B.default.fill_(value)
    (row,) = record_of(changed).adapters["default"].sites
    expected = base[0].weight + (row.scale * changed[0].lora_B.default) @ changed[0].lora_A.default
    torch.testing.assert_close(lora_fx.merge(changed)[0].weight, expected, rtol=1e-12, atol=0)


def test_what_is_not_finite_stays_so_and_an_overflow_is_refused() -> None:
    base = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    changed = adapted(base, target_modules=["0"])
    with torch.no_grad():
        base[0].weight[0, 0] = torch.inf
        base[0].weight[0, 1] = torch.nan
    merged = lora_fx.merge(changed)[0].weight
    assert merged[0, 0] == torch.inf
    assert merged[0, 1].isnan()
    assert merged.isfinite().sum() == 7
    with torch.no_grad():
        base[0].weight.fill_(1.0)
        changed[0].lora_B.default.fill_(1.7e308)
        changed[0].lora_A.default.fill_(1e9)
    with pytest.raises(lora_fx.MergeError, match="overflows"):
        lora_fx.merge(changed)


@given(st.lists(floats, min_size=1, max_size=12), st.integers(1, 300))
def test_slices_add_up_to_what_they_are_of(values: list[float], terms: int) -> None:
    given_ = torch.tensor(values, dtype=torch.float64)
    found = slices_of(given_, terms)
    assert found is not None
    total = sum((fractions(one) for one in found), np.full(given_.shape, Fraction(0)))
    assert (total == fractions(given_)).all()
    # Any two, that many times, have room in fp64.
    for one in found:
        unit = min((abs(value) & -abs(value)) for value in whole(one)) if one.any() else 1
        largest = max(abs(value) for value in whole(one))
        assert terms * (largest // unit) ** 2 <= 2**53


def whole(values: torch.Tensor) -> list[int]:
    """The values, all times one power of two, without zeros."""
    return [int(Fraction(value) * 2**1074) for value in values.tolist() if value]


@given(st.lists(floats, min_size=1, max_size=8), floats.filter(lambda value: abs(value) > 1e-20))
def test_a_product_in_two_numbers(values: list[float], factor: float) -> None:
    given_ = torch.tensor([value for value in values if abs(value) > 1e-20], dtype=torch.float64)
    found = two_products(given_, factor)
    total = sum((fractions(one) for one in found), np.full(given_.shape, Fraction(0)))
    assert (total == Fraction(factor) * fractions(given_)).all()


@given(st.data())
def test_a_sum_is_the_nearest_number(data) -> None:
    rows = data.draw(st.integers(1, 6))
    numbers = st.floats(-1e300, 1e300, allow_nan=False, allow_infinity=False)
    terms = [
        torch.tensor(data.draw(st.lists(numbers, min_size=4, max_size=4)), dtype=torch.float64)
        for _ in range(rows)
    ]
    # Some that cancel, and ties: half a unit beside a number.
    terms += [-terms[0], terms[-1] * 2.0**-53]
    total = torch.tensor(data.draw(st.lists(numbers, min_size=4, max_size=4)), dtype=torch.float64)
    exact = sum((fractions(one) for one in terms), fractions(total))
    sum_exactly(total, lambda: (Term(one) for one in terms))
    assert torch.equal(total, nearest(exact))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_merge_does_not_look_at_the_default_dtype(half, dtype) -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    adapted = randomize(lora_fx.rewrite(nn.Sequential(nn.Linear(5, 7, dtype=half)), config))
    expected = lora_fx.merge(adapted)[0].weight
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(lora_fx.merge(adapted)[0].weight, expected)
    finally:
        torch.set_default_dtype(before)
