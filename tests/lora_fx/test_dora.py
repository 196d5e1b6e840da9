"""What DoRA runs at training time: the norm without the weight, and the gradient of the magnitude."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradgradcheck
from torch.profiler import ProfilerActivity, profile

from lora_fx.errors import LoraFxError
from lora_fx.runtime.kernels import branch, dora
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import sample

# --- the norm -------------------------------------------------------------------------------------


@st.composite
def weights(draw):
    """A weight, its factors and how it lies: the shapes of linear layers and convolutions."""
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    kernel = draw(st.sampled_from(((), (1,), (3,), (2, 3), (1, 2, 2)))) if groups == 1 else (2, 2)
    outs, ins, rank = (draw(st.integers(1, 5)) for _ in range(3))
    layout = draw(st.sampled_from(("out_in", "in_out")))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sides = (groups * outs, ins) if layout == "out_in" else (groups * ins, outs)
    a, b = normal(groups * rank, ins, *kernel), normal(groups * outs, rank, *(1 for _ in kernel))
    return normal(*sides, *kernel), a, b, layout, groups


def exact_norm(weight, a, b, scale, layout, groups) -> torch.Tensor:
    """The adapted weight, feature by feature."""
    rows = []
    for down, up, part in zip(
        a.chunk(groups),
        b.chunk(groups),
        weight.chunk(groups),
        strict=True,
    ):
        delta = torch.einsum("or,ri...->oi...", up.flatten(1), down)
        turned = (part if layout == "out_in" else part.transpose(0, 1)) + scale * delta
        rows.append(turned.flatten(1).norm(dim=1))
    return torch.cat(rows)


@given(weights(), st.sampled_from((-2.0, 0.0, 0.5, 3.0)))
def test_the_norm_is_that_of_the_adapted_weight(made, scale: float) -> None:
    weight, a, b, layout, groups = made
    exact = exact_norm(weight, a, b, scale, layout, groups)
    assert_close(dora.weight_norm(weight, a, b, scale, layout, groups), exact, 1e-9)
    found = dora.weight_norm(weight.float(), a.float(), b.float(), scale, layout, groups)
    assert found.dtype is torch.float32
    assert_close(found, exact, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_a_half_weight_is_summed_in_fp32(dtype: torch.dtype) -> None:
    weight, a, b = sample(300, 4000).to(dtype), sample(4, 4000), sample(300, 4)
    exact = exact_norm(weight.double(), a.double(), b.double(), 0.1, "out_in", 1)
    assert_close(dora.weight_norm(weight, a, b, 0.1), exact, 1e-6)
    turned = dora.weight_norm(weight.T.contiguous(), a, b, 0.1, "in_out")
    assert_close(turned, exact, 1e-6)


def test_autocast_does_not_reach_the_norm() -> None:
    weight, a, b = sample(30, 40), sample(4, 40), sample(30, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = dora.weight_norm(weight, a, b, 0.5)
    assert_same_bits(found, dora.weight_norm(weight, a, b, 0.5))


def test_where_an_adapter_takes_all_away_the_norm_is_zero_and_not_nan() -> None:
    b, a = sample(6, 2), sample(2, 5)
    norm = dora.weight_norm(b @ a, a, b, -1.0)
    assert (norm >= 0).all()
    assert norm.max() < 1e-2


@pytest.mark.parametrize(
    ("shape", "layout", "channels_last"),
    [
        ((512, 700), "out_in", False),
        ((700, 512), "in_out", False),
        ((256, 128, 3, 3), "out_in", False),
        ((256, 128, 3, 3), "out_in", True),
        ((128, 256, 3, 3), "in_out", False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_weight_is_made(
    monkeypatch, shape, layout, channels_last, dtype
) -> None:
    # As if the weight were many times what is widened at a time.
    monkeypatch.setattr("lora_fx.runtime.kernels.dora._CHUNK", 1 << 15)
    weight = sample(*shape, dtype=dtype)
    if channels_last:
        weight = weight.to(memory_format=torch.channels_last)
    out_axis = 0 if layout == "out_in" else 1
    ins, outs, kernel = shape[1 - out_axis], shape[out_axis], shape[2:]
    a, b = sample(4, ins, *kernel), sample(outs, 4, *(1 for _ in kernel))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        dora.weight_norm(weight, a, b, 0.5, layout)
    # Allocations inside of kernels, too: a norm with another dtype copies its operand there.
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert largest < weight.numel() * weight.element_size() / 2


# --- the gain -------------------------------------------------------------------------------------


def test_the_gain_of_the_norm_itself_is_one_to_the_last_bit() -> None:
    weight, a, b = sample(50, 40), sample(4, 40), sample(50, 4)
    norm = dora.weight_norm(weight, a, b, 2.0)
    assert_same_bits(dora.gain(norm, weight, a, b, 2.0), torch.ones(50))


def test_a_feature_without_weights_has_gain_one_and_lets_b_learn() -> None:
    weight = sample(3, 4)
    weight[1] = 0
    a, b = sample(2, 4), torch.zeros(3, 2)
    magnitude = dora.weight_norm(weight, a, b, 1.0).requires_grad_()
    gains = dora.gain(magnitude, weight, a, b, 1.0)
    assert_same_bits(gains, torch.ones(3))
    gains.sum().backward()
    assert torch.isfinite(magnitude.grad).all()
    assert magnitude.grad[1] == 0


def test_only_gains_that_can_be_divided_by_are_held() -> None:
    fine = torch.tensor([1.0, -0.5, 2.0], requires_grad=True)
    assert not dora.held(fine).requires_grad
    small = torch.tensor([1.0, 1e-3], requires_grad=True)
    assert dora.held(small) is small
    with torch.no_grad():
        assert dora.held(fine) is fine


# --- its gradient ---------------------------------------------------------------------------------


def layer(gains, x, s, weight, bias, b, how: str):
    """A linear layer with a branch, as the graphs write it; (g - 1)(y - bias) + g·up on top of y."""
    base = F.linear(x, weight, bias)
    constant = dora.held(gains) if how == "output" else gains
    shift = None if bias is None else dora.shifted(bias, constant, base)
    up = F.linear(s, dora.scaled_b(b, constant, 2.0), shift)
    if how == "again":
        return dora.recomputed(base, up, gains, x, weight, bias)
    if how == "output":
        return dora.rescaled(base, None, up, gains, constant, bias)
    total = base if how == "base" else base + 1.0
    return dora.rescaled(total, None if how == "base" else base, up, gains)


def plainly(gains, x, s, weight, bias, b, how: str):
    product = F.linear(x, weight) + 2.0 * F.linear(s, b)
    result = gains * product + (0 if bias is None else bias)
    return result + 1.0 if how == "second" else result


HOW = pytest.mark.parametrize("how", ["output", "again", "base", "second"])
BIAS = pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])


def operands(biased: bool, dtype: torch.dtype = torch.float64, **changed):
    made = {
        "gains": 1 + 0.2 * sample(5, dtype=dtype),
        "x": sample(2, 3, 4, dtype=dtype),
        "s": sample(2, 3, 2, dtype=dtype) + 1,
        "weight": sample(5, 4, dtype=dtype),
        "bias": sample(5, dtype=dtype) - 2 if biased else None,
        "b": sample(5, 2, dtype=dtype),
        **changed,
    }
    return [None if value is None else value.detach().requires_grad_() for value in made.values()]


@HOW
@BIAS
def test_value_and_gradients_are_those_of_the_formula(how: str, biased: bool) -> None:
    found, exact = operands(biased), operands(biased)
    one, other = layer(*found, how), plainly(*exact, how)
    cotangent = sample(*other.shape, dtype=torch.float64)
    one.backward(cotangent)
    other.backward(cotangent)
    assert_close(one, other)
    # W is frozen where it is adapted, and its gradient is not asked for: `again` has none.
    pairs = [
        (a, b)
        for i, (a, b) in enumerate(zip(found, exact, strict=True))
        if a is not None and i != 3
    ]
    assert_close([a.grad for a, _ in pairs], [b.grad for _, b in pairs], 1e-12)


@HOW
@BIAS
@pytest.mark.parametrize("gain", [0.0, 1e-30, -1e-4, -0.5])
def test_a_gain_near_zero_has_its_gradient_too(how: str, biased: bool, gain: float) -> None:
    gains = torch.tensor([gain, 1.0, 0.9, gain, -1.1], dtype=torch.float64)
    found, exact = operands(biased, gains=gains), operands(biased, gains=gains)
    layer(*found, how).sum().backward()
    plainly(*exact, how).sum().backward()
    assert_close([found[0].grad, found[5].grad], [exact[0].grad, exact[5].grad], 1e-12)


@pytest.mark.parametrize("how", ["again", "base", "second"])
def test_a_second_backward_differentiates_the_first(how: str) -> None:
    gains, x, s, weight, bias, b = operands(True)

    def run(gains, x, s, b):
        return layer(gains, x, s, weight.detach(), bias.detach(), b, how)

    assert gradgradcheck(run, (gains, x, s, b))


def test_a_second_backward_is_refused_where_the_branch_has_a_constant() -> None:
    found = operands(True)
    out = layer(*found, "output").sum()
    with pytest.raises(LoraFxError, match=r"cannot be differentiated again.*freeze the magnitudes"):
        torch.autograd.grad(out, found[5], create_graph=True)


@HOW
def test_the_same_graph_may_be_used_twice(how: str) -> None:
    found = operands(True)
    out = layer(*found, how).square().sum()
    out.backward(retain_graph=True)
    first = copy.deepcopy(found[0].grad)
    out.backward()
    assert_close(found[0].grad, 2 * first, 1e-15)


@HOW
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_differences_from_one_survive_in_half_precision(how: str, dtype: torch.dtype) -> None:
    base = sample(64, 5).to(dtype)
    gains = torch.full((5,), 1.0 + 2**-10, requires_grad=True)
    up = torch.zeros_like(base)
    if how == "again":
        out = dora.recomputed(base, up, gains, base, torch.eye(5, dtype=dtype), None)
    else:
        constant = dora.held(gains) if how == "output" else gains
        out = dora.rescaled(base, base if how == "second" else None, up, gains, constant)
    exact = base.double() * (1 + 2**-10)
    assert out.dtype is dtype
    # Half a unit in the last place is the best there is. A gain in the half type would be 1.
    spacing = 2.0 ** torch.floor(torch.log2(exact.abs())) * torch.finfo(dtype).eps
    assert ((out.double() - exact).abs() / spacing).max() <= 0.5 + 2**-6
    out.double().sum().backward()
    assert_close(gains.grad, base.double().sum(0), 2e-2)


@pytest.mark.parametrize(
    ("axes", "sizes", "like", "shape"),
    [
        ((-1,), (), (2, 6), (6,)),
        ((-2,), (), (2, 6, 3), (6, 1)),
        ((-2,), (), (6,), (6,)),
        ((-3,), (), (2, 6, 3, 3), (6, 1, 1)),
        ((-1, -3), (2, 3), (4, 3, 5, 2), (3, 1, 2)),
        ((-3, -1), (2, 3), (4, 2, 5, 3), (2, 1, 3)),
    ],
)
def test_a_vector_is_spread_over_the_axes_of_the_features(axes, sizes, like, shape) -> None:
    vector = torch.arange(6.0)
    found = branch.spread(vector, torch.empty(like), axes, sizes)
    assert found.shape == shape
    if sizes:
        for place, value in enumerate(vector):
            first, second = divmod(place, sizes[1])
            at = (first, 0, second) if axes == (-3, -1) else (second, 0, first)
            assert found[at] == value
