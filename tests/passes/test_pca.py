"""Principal components of batches: with all components kept they are those of all the data at once."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx.adapters.initialization import Components
from tests.numerics import assert_close
from tests.zoo import sample


@settings(max_examples=25)
@given(
    features=st.integers(2, 6),
    batches=st.lists(st.integers(6, 20), min_size=1, max_size=4),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
def test_nothing_is_lost_if_all_components_are_kept(
    features: int, batches: list[int], shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = 2.0 ** -torch.arange(features)
    found = Components(features, 0.99, generator)
    every = []
    for place, count in enumerate(batches):
        batch = torch.randn(count, features, generator=generator) * scales + shift * place
        assert found.add(batch)
        every.append(batch)
    data = torch.cat(every).double()
    data = data - data.mean(0)
    _, values, directions = torch.linalg.svd(data, full_matrices=False)
    assert_close(found.values, values, 1e-4)
    assert_close(found.shares, values.square() / data.square().sum(), 1e-4)
    gap = (values[:-1] - values[1:]).min() / values[0]
    if gap > 0.02:  # else they turn freely
        assert_close(found.directions.abs(), directions.abs(), 1e-3)


def test_a_batch_that_is_too_small_is_left_out() -> None:
    found = Components(4, 0.99, torch.Generator())
    assert not found.add(sample(3, 8))
    assert found.directions is None
    assert found.add(sample(4, 8))


def test_components_stand_still_when_the_data_repeats() -> None:
    found = Components(3, 0.999, torch.Generator())
    batch = sample(50, 8) * torch.tensor([8, 4, 2, 1, 1, 1, 1, 1.0])
    found.add(batch)
    assert not found.steady.any()
    found.add(batch)
    assert found.steady.all()
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()
