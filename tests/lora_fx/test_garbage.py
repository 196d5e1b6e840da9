"""The collector of garbage is paused during a rewrite, and is afterwards as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import lora_fx
from lora_fx import LoraConfig
from tests.zoo import Mlp


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


@pytest.mark.parametrize("before", [True, False])
def test_a_rewrite_leaves_the_collector_as_it_was(before: bool) -> None:
    if not before:
        gc.disable()
    during = []
    lora_fx.rewrite(Mlp(), LoraConfig(r=2), callback=lambda *_: during.append(gc.isenabled()))
    assert during
    assert not any(during)
    assert gc.isenabled() == before


def test_a_rewrite_that_fails_leaves_it_enabled() -> None:
    with pytest.raises(lora_fx.NoMatchError):
        lora_fx.rewrite(Mlp(), LoraConfig(r=2, target_modules=["nowhere"]))
    assert gc.isenabled()
