"""The least that adapters can cost: F, the floor of O.

A frozen step of a linear operation of T tokens, d outputs and k inputs is two products, forward and for the
gradient of the input: 4·T·d·k FLOPs. A branch of rank r adds six thin ones (S = xAᵀ, SBᵀ, G = s·yB and the
gradients of A, B and x): 6·T·r·(d + k). So F = 1 + 1.5·r·(d + k) / (d·k), if a FLOP costs the same everywhere
and nothing but FLOPs costs.

For a model both are summed over its linear layers, each with the tokens that it sees, adapted or not (the
head is in the denominator only). Attention, norms and the loss are left out of the denominator, so that the
true floor is a little lower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.tools.bench.linears import is_linear, matrix

__all__ = ["linear_floor", "model_floor"]


def linear_floor(out_features: int, in_features: int, rank: int) -> float:
    """F of one linear operation."""
    return 1 + 1.5 * rank * (out_features + in_features) / (out_features * in_features)


def model_floor(
    model: nn.Module, adapted: Iterable[str], rank: int, forward: Callable[[nn.Module], Any]
) -> float:
    """F of a model.

    Args:
        model: Without adapters.
        adapted: Names of the linear layers that get one.
        rank: Of all of them.
        forward: Runs the model once, to see how many tokens each layer gets.
    """
    names = set(adapted)
    base = branches = 0

    def count(module: nn.Module, given: tuple[Tensor, ...], name: str) -> None:
        nonlocal base, branches
        out_features, in_features = matrix(module).shape
        tokens = given[0].numel() // in_features
        base += 4 * tokens * out_features * in_features
        if name in names:
            branches += 6 * tokens * rank * (out_features + in_features)

    hooks = [
        module.register_forward_pre_hook(
            lambda module, given, name=name: count(module, given, name)
        )
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    try:
        with torch.no_grad():
            forward(model)
    finally:
        for hook in hooks:
            hook.remove()
    return 1 + branches / base
