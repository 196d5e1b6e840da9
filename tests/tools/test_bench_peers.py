"""What lora-fx is measured against computes the same, and what bounds it is counted right."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from lora_fx.tools.bench import contenders as contraction
from lora_fx.tools.bench.contenders import (
    ChosenContraction,
    Contraction,
    FiveOperations,
    InPlace,
    LowRank,
    WeightChange,
    choose,
    linear_floor,
    matrix,
    model_floor,
    replaced,
    shared_copy,
)

PEERS = (FiveOperations, InPlace, WeightChange, ChosenContraction)


def gradients(layer: LowRank, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    given = x.clone().requires_grad_()
    y = layer(given)
    return (y.detach(), *torch.autograd.grad(y, (given, layer.A, layer.B), grad))


def reference(layer: LowRank, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    given = x.clone().requires_grad_()
    a, b = (one.detach().clone().requires_grad_() for one in (layer.A, layer.B))
    y = layer.base(given) + layer.scale * (given @ a.T) @ b.T
    return (y.detach(), *torch.autograd.grad(y, (given, a, b), grad))


def made(kind: type[LowRank], d: int, k: int, rank: int, bias: bool = True) -> LowRank:
    torch.manual_seed(0)
    layer = kind(nn.Linear(k, d, bias=bias).double().requires_grad_(False), rank, 2.0 * rank, 0.0)
    nn.init.normal_(layer.B)
    return layer


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("bias", [False, True])
def test_peers_compute_lora(kind: type[LowRank], bias: bool) -> None:
    layer = made(kind, 6, 10, 3, bias)
    x, grad = torch.randn(2, 5, 10).double(), torch.randn(2, 5, 6).double()
    for found, expected in zip(gradients(layer, x, grad), reference(layer, x, grad), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chosen", list(itertools.product((False, True), repeat=3)))
def test_every_contraction_computes_the_same(
    chosen: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contraction, "choose", lambda *_: Contraction(*chosen))
    layer = made(ChosenContraction, 6, 10, 3)
    x, grad = torch.randn(7, 10).double(), torch.randn(7, 6).double()
    for found, expected in zip(gradients(layer, x, grad), reference(layer, x, grad), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_weight_is_merged_where_tokens_are_many() -> None:
    # dk / (d + k) is 32.
    assert not choose(16, 64, 64, 8).merged_forward
    assert choose(128, 64, 64, 8).merged_forward
    assert choose(128, 64, 64, 8).merged_backward
    # Z = yᵀx costs another base product, which only a rank near the width would be worth.
    assert not choose(128, 64, 64, 8).outer
    assert choose(4096, 64, 64, 64).outer


@pytest.mark.parametrize("kind", [FiveOperations, InPlace, WeightChange])
def test_dropout_is_on_the_branch_and_in_training_only(kind: type[LowRank]) -> None:
    layer = made(kind, 6, 10, 3)
    layer.dropout = 1.0
    x = torch.randn(4, 10).double()
    torch.testing.assert_close(layer.train()(x), layer.base(x))
    assert not torch.allclose(layer.eval()(x), layer.base(x))


def test_layers_are_replaced_over_the_same_weights() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = replaced(base, ["2"], lambda one: FiveOperations(one, 2, 2, 0.0))
    assert isinstance(base[2], nn.Linear)
    assert isinstance(model.get_submodule("2"), FiveOperations)
    assert model.get_parameter("2.base.weight") is base[2].weight
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {"2.A", "2.B"}
    torch.testing.assert_close(model(torch.ones(3, 4)), base(torch.ones(3, 4)))
    assert matrix(base[2]).shape == (2, 4)


def test_the_floor_of_one_layer_and_of_a_model() -> None:
    assert linear_floor(768, 768, 16) == pytest.approx(1.0625)
    assert linear_floor(4096, 4096, 8) == pytest.approx(1.005859375)
    one = nn.Sequential(nn.Linear(6, 10))
    given = torch.ones(7, 6)
    assert model_floor(one, ["0"], 2, lambda model: model(given)) == pytest.approx(
        linear_floor(10, 6, 2)
    )
    # A layer without an adapter is in the denominator: 4·7·(60 + 20), of which 60 has a branch.
    two = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 2))
    found = model_floor(two, ["0"], 2, lambda model: model(given))
    assert found == pytest.approx(1 + 6 * 2 * 16 / (4 * 80))
    assert not any(one._forward_pre_hooks for one in two.modules())


def test_a_copy_for_peft_is_frozen_and_shares_storage() -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    copied = shared_copy(base)
    assert copied is not base
    assert copied.get_parameter("0.weight") is base[0].weight
