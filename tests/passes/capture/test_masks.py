"""Attention over boolean masks that a model makes of its input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.numerics import assert_close

TOKENS = 24


class Layers(nn.Module):
    """Attention layers over one mask."""

    def __init__(self, *, count: int = 3, numbers: bool = False, each: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))
        self.numbers, self.each = numbers, each

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        # The last rows see nothing at all.
        seen = (places[:, None] >= places) & (places[:, None] < x.shape[1] - 2)
        mask = (seen & ~hidden[:, None])[:, None]
        if self.numbers:
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -2.0)
        for place, layer in enumerate(self.layers):
            h = layer(x)[:, None]
            own = mask.clone() if self.each else mask
            # By name in one layer, by position in the next.
            if place % 2:
                x = x + F.scaled_dot_product_attention(h, h, h, own)[:, 0]
            else:
                x = x + F.scaled_dot_product_attention(h, h, h, attn_mask=own)[:, 0]
        return x


@pytest.mark.parametrize("frontend", ["export", "auto", "regions"])
@pytest.mark.parametrize("options", [{}, {"count": 1}, {"numbers": True}, {"each": True}])
def test_attend_as_the_dense_model_does(options: dict[str, Any], frontend: Any) -> None:
    model, x = Layers(**options).double(), torch.randn(2, TOKENS, 8, dtype=torch.float64)
    hidden = torch.zeros(2, TOKENS, dtype=torch.bool)
    hidden[1, :5] = True
    config = LoraConfig(r=2, target_modules=".*")
    adapted = randomize(lora_fx.rewrite(model, config, (x, hidden), frontend=frontend))
    found = []
    for one in (adapted, lora_fx.merge(adapted)):
        for rows in (x, x[:, :9]):
            leaf = rows.clone().requires_grad_()
            out = one(leaf, hidden[:, : rows.shape[1]])
            found.append([out, *torch.autograd.grad(out.float().square().sum(), leaf)])
    assert_close(found[:2], found[2:])
    assert not torch.allclose(found[0][0], model(x, hidden))
