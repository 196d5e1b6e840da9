"""Dropout masks: their law, their repeatability, and what they leave alone.

A bound of six standard deviations is passed by chance once in five hundred million tests, and the seeds are
fixed. The numbers of elements are such that one wrong bit slice in eight (an error of 1/256 at least, unless
it is the lowest) lies far outside.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_fx.runtime.kernels import masks
from lora_fx.runtime.kernels.masks import draw, kept, unpacked
from tests.numerics import assert_same_bits

pytestmark = pytest.mark.usefixtures("packed_masks")

SIGMAS = 6
COUNT = 1 << 21
# Every power of two, both ends, both parities, and what people use.
DROPOUTS = [*(2**-k for k in range(1, 9)), 0.0001, 0.05, 0.1, 0.3, 2 / 3, 0.9, 255 / 256, 0.9999]


def sample(count: int, dropout: float, seed: int = 0) -> torch.Tensor:
    """0 or 1 for each element, fp64."""
    torch.manual_seed(seed)
    x = torch.empty(count, dtype=torch.float64)
    return unpacked(draw(x, dropout), x)


def same_in_a_compiler(count: int, dropout: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)

    def mask(x: torch.Tensor) -> torch.Tensor:
        return unpacked(draw(x, dropout), x)

    # Every probability is a compilation, and their number is limited.
    torch._dynamo.reset()
    compiled = torch.compile(mask, fullgraph=True, backend="aot_eager")
    return compiled(torch.empty(count, dtype=torch.float64)).double()


def assert_mean(values: torch.Tensor, mean: float, variance: float) -> None:
    """The mean of independent values of a known variance is within the bound."""
    bound = SIGMAS * (variance / values.numel()) ** 0.5
    error = abs(values.double().mean().item() - mean)
    assert error <= bound, f"mean off by {error:.3g}, more than {bound:.3g}"


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("make", [sample, same_in_a_compiler], ids=["eager", "compiled"])
def test_mean_and_variance_are_those_of_bernoulli(make, dropout: float) -> None:
    q = kept(dropout) / 256
    mask = make(COUNT, dropout)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert_mean(mask, q, q * (1 - q))
    # The variance about the true mean: its own variance has the fourth moment in it.
    fourth = q * (1 - q) * (1 - 3 * q * (1 - q))
    assert_mean((mask - q) ** 2, q * (1 - q), fourth - (q * (1 - q)) ** 2)


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5, 0.9])
def test_every_place_of_a_word_has_the_same_mean(dropout: float) -> None:
    q = kept(dropout) / 256
    for place in sample(COUNT, dropout).view(-1, 64).unbind(1):
        assert_mean(place, q, q * (1 - q))


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5, 0.9])
# Neighbors in a byte, in a word, in the next byte and word, and one apart.
@pytest.mark.parametrize("lag", [1, 2, 7, 8, 9, 32, 63, 64, 65, 128, 64 * 1000])
def test_elements_are_independent_of_each_other(dropout: float, lag: int) -> None:
    q = kept(dropout) / 256
    centered = sample(COUNT, dropout) - q
    # Products of independent values: their covariances are zero, even where they share a factor.
    assert_mean(centered[lag:] * centered[:-lag], 0.0, (q * (1 - q)) ** 2)


def test_pairs_of_places_in_a_word_are_independent() -> None:
    q = kept(0.1) / 256
    words = (sample(COUNT, 0.1).view(-1, 64) - q) / (q * (1 - q)) ** 0.5
    correlation = words.T @ words / len(words)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() <= SIGMAS / len(words) ** 0.5


def test_masks_drawn_one_after_the_other_are_independent() -> None:
    torch.manual_seed(0)
    x = torch.empty(COUNT, dtype=torch.float64)
    q = kept(0.1) / 256
    first, second = (unpacked(draw(x, 0.1), x) - q for _ in range(2))
    assert_mean(first * second, 0.0, (q * (1 - q)) ** 2)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_the_scale_keeps_the_mean(dropout: float) -> None:
    """By the number that is kept, not by the number that was asked for."""
    q = kept(dropout) / 256
    x = torch.rand(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scaled = sample(COUNT, dropout) * x * (256 / kept(dropout))
    assert_mean(scaled - x, 0.0, (1 - q) / q * x.square().mean().item())


def test_probabilities_are_rounded_to_the_nearest_of_256() -> None:
    steps = range(1, 256)
    assert [kept(step / 256) for step in steps] == [256 - step for step in steps]
    assert kept(0.05) == 256 - 13
    assert kept(0.1) == 256 - 26
    # Something is dropped and something kept, however near the end.
    assert kept(1e-9) == 255
    assert kept(1 - 1e-9) == 1


@given(st.floats(1 / 512, 511 / 512, exclude_min=True, exclude_max=True))
def test_no_probability_is_more_than_half_a_step_away(dropout: float) -> None:
    assert abs((1 - kept(dropout) / 256) - dropout) <= 1 / 512


@given(
    shape=st.lists(st.integers(0, 13), max_size=3),
    dropout=st.sampled_from([0.05, 0.5, 255 / 256]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_one_bit_an_element(shape: list[int], dropout: float, dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype)
    mask = draw(x, dropout)
    assert mask.dtype == torch.uint8
    assert mask.shape == ((x.numel() + 7) // 8,)
    # Nothing else is kept alive by it.
    assert mask.untyped_storage().nbytes() == mask.numel()
    found = unpacked(mask, x)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    bits = np.unpackbits(mask.numpy(), count=x.numel(), bitorder="little").reshape(shape)
    assert_same_bits(found.double(), torch.tensor(1.0 - bits))


@pytest.mark.parametrize("count", [1, 7, 63, 65, 127, 1001])
def test_the_last_elements_have_the_same_law(count: int) -> None:
    x = torch.empty(count, dtype=torch.float64)
    torch.manual_seed(0)
    last = torch.stack([unpacked(draw(x, 0.3), x)[-1] for _ in range(5000)])
    q = kept(0.3) / 256
    assert_mean(last, q, q * (1 - q))


def test_strides_of_the_tensor_do_not_matter() -> None:
    x = torch.randn(6, 10)
    torch.manual_seed(0)
    first = unpacked(draw(x, 0.5), x)
    torch.manual_seed(0)
    assert_same_bits(unpacked(draw(x.T.contiguous().T, 0.5), x.T.contiguous().T), first)


def test_it_follows_manual_seed() -> None:
    assert_same_bits(sample(1000, 0.1, seed=3), sample(1000, 0.1, seed=3))
    assert not torch.equal(sample(1000, 0.1, seed=3), sample(1000, 0.1, seed=4))
    torch.manual_seed(0)
    x = torch.empty(1000)
    assert not torch.equal(draw(x, 0.1), draw(x, 0.1))


def test_a_state_of_the_generator_repeats_it() -> None:
    x = torch.empty(1000)
    state = torch.get_rng_state()
    first = draw(x, 0.1)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert_same_bits(draw(x, 0.1), first)


def test_other_generators_are_left_alone() -> None:
    own = torch.Generator().manual_seed(1)
    before = own.get_state(), random.getstate(), np.random.get_state()[1].copy()
    first = sample(1000, 0.1)
    assert torch.equal(own.get_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    # Nor does it read them.
    own.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    assert_same_bits(sample(1000, 0.1), first)


def test_unpacking_draws_nothing() -> None:
    x = torch.empty(1000)
    mask = draw(x, 0.1)
    state = torch.get_rng_state()
    assert_same_bits(unpacked(mask, x), unpacked(mask, x))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_device_but_that_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a default device nor CUDA has a part in it."""

    def no_cuda(*_: object) -> None:
        raise AssertionError("CUDA was asked for")

    monkeypatch.setattr(torch.cuda, "_lazy_init", no_cuda)
    masks._rows.cache_clear()
    expected = sample(100, 0.5)
    masks._rows.cache_clear()
    torch.manual_seed(0)
    x = torch.empty(100, dtype=torch.float64)
    with torch.device("meta"):
        found = unpacked(draw(x, 0.5), x)
    assert_same_bits(found, expected)


def test_a_tensor_without_values_leaves_nothing_behind() -> None:
    masks._rows.cache_clear()
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.empty(9))
        assert unpacked(draw(x, 0.5), x).shape == (9,)
    x = torch.empty(9)
    assert type(unpacked(draw(x, 0.5), x)) is torch.Tensor
    x = torch.empty(9, device="meta")
    assert unpacked(draw(x, 0.5), x).shape == (9,)


def test_inference_mode_leaves_nothing_behind() -> None:
    masks._rows.cache_clear()
    x = torch.ones(9)
    with torch.inference_mode():
        unpacked(draw(x, 0.5), x)
    leaf = torch.ones(9, requires_grad=True)
    (leaf * unpacked(draw(leaf, 0.5), leaf)).sum().backward()
    assert leaf.grad is not None


def test_a_few_elements_are_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "FEW", 65)
    x = torch.empty(8, 8)
    mask = draw(x, 0.25)
    assert (mask.dtype, mask.shape) == (torch.bool, x.shape)
    assert draw(torch.empty(65), 0.25).dtype == torch.uint8
    torch.manual_seed(1)
    values = torch.cat([draw(x, 0.25).flatten() for _ in range(1000)])
    assert_mean(values, 0.75, 0.75 * 0.25)
