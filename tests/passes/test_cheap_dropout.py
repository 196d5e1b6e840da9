"""The pass that gives branches dropout of lora_fx."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.runtime.kernels.masks import dropped, kept
from tests.golden import check_golden, printed

pytestmark = pytest.mark.usefixtures("packed_masks")

UNFUSED = LoraConfig(r=2, target_modules=["0"], lora_dropout=0.25, lora_bias=True)


def targets(model: nn.Module) -> set:
    return {node.target for graph in lora_fx.graphs(model).values() for node in graph.nodes}


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (nn.Conv2d(2, 3, 3), {}),
        (nn.Conv2d(2, 3, 3), {"use_dora": True}),
        (nn.Linear(4, 3), {"lora_bias": True}),
    ],
)
def test_branches_that_are_not_fused_have_it(layer: nn.Module, options: dict) -> None:
    config = LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1, **options)
    assert dropped in targets(lora_fx.rewrite(nn.Sequential(layer), config))
    assert F.dropout not in targets(lora_fx.rewrite(nn.Sequential(layer), config))
    canonical = lora_fx.rewrite(nn.Sequential(layer), config, optimize=False)
    assert F.dropout in targets(canonical)


def test_dropout_of_the_model_itself_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    torch.manual_seed(0)
    expected = model(torch.ones(2, 4))
    torch.manual_seed(0)
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["0"]))
    torch.manual_seed(0)
    assert torch.equal(adapted(torch.ones(2, 4)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_follow_one_mask(dtype: torch.dtype) -> None:
    x = torch.full((50, 41), 3.0, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    out = dropped(x, 0.25, True)
    out.sum().backward()
    scale = 256 / kept(0.25)
    is_kept = out != 0
    assert 0.68 < is_kept.double().mean() < 0.82
    assert torch.equal(out, torch.where(is_kept, torch.tensor(3 * scale, dtype=dtype), 0))
    assert torch.equal(x.grad, torch.where(is_kept, torch.tensor(scale, dtype=dtype), 0))
    torch.manual_seed(0)
    assert torch.equal(dropped(x, 0.25, True), out)
    assert dropped(x, 0.25, False) is x


def test_it_is_differentiated_twice() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return dropped(x, 0.25, True) ** 2

    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_it_keeps_a_bit_an_element() -> None:
    kept_bytes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept_bytes.append(tensor.nbytes)
        return tensor

    x = torch.randn(64, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dropped(x, 0.1, True)
    assert kept_bytes == [800]


def test_compilers_and_transforms() -> None:
    model = lora_fx.rewrite(nn.Sequential(nn.Linear(4, 3)), UNFUSED)
    x = torch.randn(5, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    gradient = torch.func.grad(lambda value: model(value).sum())(x)
    assert gradient.shape == x.shape


def test_golden() -> None:
    graph = lora_fx.graphs(lora_fx.rewrite(nn.Sequential(nn.Linear(4, 3)), UNFUSED))["0"]
    check_golden("cheap_dropout", printed(graph))
