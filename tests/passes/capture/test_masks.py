"""Boolean attention masks of exported graphs."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.passes.capture.auto import capture
from lora_fx.tools.bench.counted import saved_bytes
from tests.numerics import assert_same_bits

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
ZEROS = torch.ops.aten.zeros_like.default
TOKENS = 24


class Layers(nn.Module):
    """Attention layers over one mask, which the model makes of its input."""

    def __init__(self, count: int = 3, *, numbers: bool = False, each: bool = False) -> None:
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


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.zeros(2, TOKENS, dtype=torch.bool)
    hidden[1, :5] = True
    return torch.randn(2, TOKENS, 8, dtype=dtype), hidden


def masks(model: nn.Module, *inputs: torch.Tensor) -> list[fx.Node]:
    """What each attention of the exported graph reads as its mask."""
    graph = capture(model, inputs, frontend="export").regions[""].graph
    return [
        node.args[3] if len(node.args) > 3 else node.kwargs["attn_mask"]
        for node in graph.find_nodes(op="call_function", target=ATTENTION)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outputs_and_gradients_are_the_same_bits(dtype: torch.dtype) -> None:
    model, (x, hidden) = Layers().to(dtype), batch(dtype)
    exported = capture(model, (x, hidden), frontend="export").model
    found = []
    for one in (model, exported):
        leaf = x.clone().requires_grad_()
        out = one(leaf, hidden)
        out.float().square().sum().backward()
        found.append({"out": out, "grad": leaf.grad})
    assert_same_bits(found[1], found[0])


def test_layers_that_read_one_mask_keep_its_numbers_once() -> None:
    (read,) = set(masks(Layers(), *batch()))
    assert read.target == torch.ops.aten.masked_fill.Scalar
    config = LoraConfig(r=2, target_modules="all-linear")
    less = {}
    for count in (2, 6):
        model, inputs = Layers(count), batch()
        by_region = lora_fx.rewrite(model, config, frontend="regions")
        exported = lora_fx.rewrite(model, config, inputs, frontend="export")
        kept = [saved_bytes(one, functools.partial(one, *inputs)) for one in (by_region, exported)]
        less[count] = kept[0] - kept[1]
    # Four layers more, and four times the numbers of one mask less.
    assert less[6] - less[2] == 4 * 2 * TOKENS * TOKENS * 4


@pytest.mark.parametrize("options", [{"count": 1}, {"numbers": True}, {"each": True}])
def test_what_is_read_once_or_has_numbers_stays_as_it_is(options) -> None:
    model, inputs = Layers(**options), batch()
    read = masks(model, *inputs)
    assert len(set(read)) == (3 if options.get("each") else 1)
    exported = capture(model, inputs, frontend="export")
    added = exported.regions[""].graph.find_nodes(op="call_function", target=ZEROS)
    assert len(added) == (1 if options.get("numbers") else 0)
    assert_same_bits({"": exported.model(*inputs)}, {"": model(*inputs)})
