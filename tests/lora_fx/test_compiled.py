"""Verbs that are given what torch.compile made: they work on the module inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.numerics import assert_close, assert_same_bits

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def drawn(**more: object) -> LoraConfig:
    return LoraConfig(r=2, init_lora_weights=False, **more)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)).eval()


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def by_layer(model: nn.Module) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")
    return model


def by_leaf(model: nn.Module) -> nn.Module:
    model[1] = torch.compile(model[1], backend="eager")
    return model


@pytest.fixture(params=[whole, by_layer, by_leaf], ids=lambda one: one.__name__)
def compiled(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return request.param


def both(compiled: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """One model as it is, and the same, compiled and run."""
    plain, model = (lora_fx.rewrite(base(), drawn(), adapter_name="a") for _ in range(2))
    model = compiled(model)
    model(X)
    return plain, model


def same(plain: nn.Module, model: nn.Module) -> None:
    assert lora_fx.active_adapters(plain) == lora_fx.active_adapters(model)
    assert lora_fx.adapter_names(plain) == lora_fx.adapter_names(model)
    assert str(lora_fx.status(plain)) == str(lora_fx.status(model))
    assert_close(model(X), plain(X))


def test_every_verb_works_on_what_is_inside(
    compiled: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    plain, model = both(compiled)
    for one in (plain, model):
        assert lora_fx.add_adapter(one, drawn(seed=1, bias="all"), "b") is one
        assert lora_fx.add_weighted_adapter(one, ["a"], [0.5], "less") is one
    same(plain, model)
    for names in ("b", ["a", "less"], []):
        for one in (plain, model):
            lora_fx.set_adapter(one, names)
        same(plain, model)
    for one in (plain, model):
        lora_fx.set_adapter(one, "a")
    with lora_fx.disable_adapter(model) as there:
        assert there is model
        assert_close(model(X), base()(X))
    with (
        lora_fx.adapter_ids(plain, ["a", None, "less"]),
        lora_fx.adapter_ids(model, ["a", None, "less"]),
    ):
        getattr(model, "_orig_mod", model)(X)  # a compiler cannot see which axis has the samples
        assert_close(model(X), plain(X))
    same(plain, model)
    assert_same_bits(lora_fx.merge(model)(X), lora_fx.merge(plain)(X))
    assert_same_bits(
        lora_fx.merge(model, adapter_names="b")(X), lora_fx.merge(plain, adapter_names="b")(X)
    )

    states = [lora_fx.adapter_state_dict(one, "b") for one in (plain, model)]
    assert states[0].keys() == states[1].keys()
    lora_fx.load_adapter_state_dict(model, states[0], "b")
    folder = lora_fx.save_adapter(model, tmp_path / "x", "a")
    assert lora_fx.load_adapter(model, folder, adapter_name="again") is model
    lora_fx.set_adapter(model, "again")
    assert_close(model(X), plain(X))
    assert lora_fx.prepare_hotswap(model, 4, "again") is model
    assert lora_fx.hotswap_adapter(model, folder, "again") is model
    assert_close(model(X), plain(X))
    lora_fx.delete_adapter(model, "a")
    assert "a" not in lora_fx.adapter_names(model)

    groups = lora_fx.parameter_groups(model, 1e-3, lora_fa=True)
    lora_fx.correct_gradients(torch.optim.SGD(groups), model)


def test_a_start_from_data(compiled: Callable[[nn.Module], nn.Module]) -> None:
    found = []
    for make in (lambda one: one, compiled):
        model = make(lora_fx.rewrite(base(), LoraConfig(r=2, init_lora_weights="corda")))
        assert lora_fx.initialize(model, [X], progress=False) is model
        assert_close(model(X), base()(X))
        found.append(lora_fx.adapter_state_dict(model))
    torch.testing.assert_close(*found)


def test_layers_are_compiled_again_afterwards() -> None:
    model = by_layer(lora_fx.rewrite(base(), drawn()))
    layer = model[0]
    with lora_fx.disable_adapter(model):
        assert model[0] is layer
    assert model[0] is layer
    with pytest.raises(ConfigError, match="no adapter 'x'"):
        lora_fx.set_adapter(model, "x")
    assert model[0] is layer


def test_what_has_no_adapters_says_so() -> None:
    with pytest.raises(ConfigError, match="has no adapters"):
        lora_fx.set_adapter(whole(base()), "a")
