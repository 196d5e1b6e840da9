"""Add an operation: a function that applies a linear layer and scales the output.

A pattern tells lora_fx which arguments of the function are the weight and the input. Factors, branch and
merge are inherited from the pattern of linear operations. The branch must compute the effect of the weight's
change, ``g * x ΔWᵀ``. So it must be scaled like the base operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import lora_fx
from lora_fx.ir import BranchBuilder, Match, Region, Role, Site
from lora_fx.passes.patterns import LinearPattern, make_site

GAIN = 3.0


@fx.wrap
def scaled_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``GAIN * x Wᵀ``. In a graph this is one opaque call, like a custom kernel."""
    return GAIN * nn.functional.linear(x, weight)


class ScaledLinearPattern(LinearPattern):
    """Pattern of :func:`scaled_linear`."""

    name = "scaled-linear"

    def match(self, node: fx.Node, region: Region) -> Match:
        """Return a site if a node calls the function with a parameter as its weight, else None."""
        if node.target is not scaled_linear or region.parameter(node.args[1]) is None:
            return None
        x: Any = node.args[0]
        weight: Any = node.args[1]
        out_features, in_features = region.parameter(weight).shape  # type: ignore[union-attr]
        return make_site(
            region,
            pattern=self.name,
            family="linear",
            weight=weight,
            bias=None,
            x=x,
            output=node,
            sizes=(in_features, out_features),
            layout="out_in",
        )

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Write a branch: ``scaled_linear`` with A, then a plain product with B. The gain applies once."""
        x: Any = node.args[0]
        down = build.call(Role.DOWN, scaled_linear, build.dropped(x), build.a)
        return build.call(Role.UP, nn.functional.linear, down, build.b)


class Net(nn.Module):
    """Example model: one scaled layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, 2] for ``x`` [batch, 16]."""
        return self.head(scaled_linear(x, self.weight).relu())


def main() -> None:
    """Register the pattern, rewrite a model, and check that the merged model gives the same outputs."""
    lora_fx.register_pattern(ScaledLinearPattern())
    config = lora_fx.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    adapted = lora_fx.rewrite(Net(), config)
    print(lora_fx.plan(Net(), config))
    merged = lora_fx.merge(adapted)
    x = torch.randn(5, 16)
    torch.testing.assert_close(merged(x), adapted(x))
    print("merged output equals adapted output")


if __name__ == "__main__":
    main()
