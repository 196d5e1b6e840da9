"""An operation of your own: a linear layer that also scales its output, in one function.

lora_fx knows the operation once it knows where the weight and the input are. The algebra (factors,
branch, merge) is that of a linear operation and is inherited. The branch must compute what the weight's
change would: ``g * x ΔWᵀ``, so that it is scaled like the base.
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
    """``GAIN * x Wᵀ``: one opaque call in a graph, as a custom kernel would be."""
    return GAIN * nn.functional.linear(x, weight)


class ScaledLinearPattern(LinearPattern):
    """Finds :func:`scaled_linear`."""

    name = "scaled-linear"

    def match(self, node: fx.Node, region: Region) -> Match:
        """A site for every call over a parameter."""
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
        """``scaled_linear`` with A, then a plain product with B: the gain is in there once."""
        x: Any = node.args[0]
        down = build.call(Role.DOWN, scaled_linear, build.dropped(x), build.a)
        return build.call(Role.UP, nn.functional.linear, down, build.b)


class Net(nn.Module):
    """One scaled layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` is [batch, 16]."""
        return self.head(scaled_linear(x, self.weight).relu())


def main() -> None:
    """Registers the pattern, rewrites, and shows that the merge agrees."""
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
