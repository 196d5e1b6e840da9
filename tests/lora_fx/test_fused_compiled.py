"""Where the fused functions give way to plain operations: nothing to train, transforms, nested tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lora_fx
from tests.algebra import randomize
from tests.numerics import assert_close

VARIANTS = [{}, {"lora_dropout": 0.2}, {"use_dora": True}]


def adapted(**options: Any) -> nn.Module:
    base = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    config = lora_fx.LoraConfig(r=4, target_modules=["0", "2"], **options)
    model = lora_fx.rewrite(base, config)
    randomize(model)
    return model


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_frozen_adapters_outside_of_no_grad(options: dict[str, Any], training: bool) -> None:
    model = adapted(**options).requires_grad_(False).train(training)
    x = torch.randn(5, 8, dtype=torch.float64)

    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)

    if not (training and options.get("lora_dropout")):
        assert_close(got, model(x), 1e-12)


def test_layers_before_the_first_trainable_one() -> None:
    model = adapted(lora_dropout=0.2)
    model[0].requires_grad_(False)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None for p in model[2].parameters() if p.requires_grad)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of grad"])
def test_transforms_of_detached_parameters(options: dict[str, Any], transform: str) -> None:
    model = adapted(**options).train()
    detached = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = functional_call(model, parameters, (x,)).square().sum()
        return result

    over = {"in_dims": (None, 0), "randomness": "different"}
    run: Callable[..., Any] = {
        "grad": grad(loss),
        "vmap": vmap(loss, **over),
        "vmap of grad": vmap(grad(loss), **over),
    }[transform]
    x = torch.randn(5, 8, dtype=torch.float64)

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(detached, x)

    if not options.get("lora_dropout"):
        want = run(detached, x)
        pairs = [(got[name], want[name]) for name in want] if "grad" in transform else [(got, want)]
        for left, right in pairs:
            assert_close(left, right, 1e-12)


@pytest.mark.parametrize("options", VARIANTS[:2], ids=str)
def test_sequences_of_several_lengths(options: dict[str, Any]) -> None:
    model = adapted(**options).train()
    model[1] = nn.Identity()
    parts = [torch.randn(count, 8, dtype=torch.float64) for count in (2, 3)]
    out = model(torch.nested.nested_tensor(parts, layout=torch.jagged))
    out.values().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if not options:
        assert_close(out.values(), model(torch.cat(parts)), 1e-12)
