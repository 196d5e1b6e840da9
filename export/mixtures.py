"""Marks in the graph of a traced model, which name the parts of each mixture of experts.

The experts of a layer are traced as a sort of the tokens, two grouped products and a sum. A mark is a node
that returns the output of this graph. Its other inputs are the tokens, their experts and weights, the
matrices, and the values before and after the gate. So a fusion need not recognize a mixture by its shape
(:mod:`lora_fx.export.fuse.experts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_fx.export.copy import PackedWeight
from lora_fx.formats import MATMUL_N_BITS
from lora_fx.passes.capture import experts_implementation
from lora_fx.passes.graph import is_region

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["MARK", "MARK_DOMAIN", "Mixture", "mark_mixtures", "marked_mixture"]

MARK_DOMAIN = "lora_fx"
"""Domain of the marks in an ONNX graph."""

MARK = "Mixture"
"""Operator of the marks in an ONNX graph."""


class Mixture(NamedTuple):
    """The tensors of a mixture of experts.

    Each of T tokens with d features uses k of E experts, which have n hidden channels. Blocks of b quantized
    values share a scale.
    The output is ``y[t] = Σ_j weights[t, j] · (down · gate(up · x[t] + up_bias) + down_bias)``, with the
    matrices of the expert ``chosen[t, j]``.

    Attributes:
        y: The output, [T, d].
        x: The tokens, [T, d].
        chosen: The experts of each token, [T, k].
        weights: The weights of these experts, [T, k].
        before: The input of the gate, [T k, 2 n].
        after: The output of the gate, [T k, n].
        up_codes: The matrices before the gate in the layout of ``MatMulNBits``, [E, 2 n, d / b, b / 2].
        up_scales: Scales of ``up_codes``, [E, 2 n · d / b].
        up_zeros: Zero points of ``up_codes``; None if all are in the middle of the range.
        up_bias: Bias before the gate, [E, 2 n], or None.
        down_codes: The matrices after the gate, [E, d, n / b, b / 2].
        down_scales: Scales of ``down_codes``.
        down_zeros: Zero points of ``down_codes``, or None.
        down_bias: Bias after the second product, [E, d], or None.
    """

    y: Any
    x: Any
    chosen: Any
    weights: Any
    before: Any
    after: Any
    up_codes: Any
    up_scales: Any
    up_zeros: Any
    up_bias: Any
    down_codes: Any
    down_scales: Any
    down_zeros: Any
    down_bias: Any


_OPTIONAL = {"up_zeros", "up_bias", "down_zeros", "down_bias"}
_ARGUMENTS = ", ".join(f"Tensor{'?' * (name in _OPTIONAL)} {name}" for name in Mixture._fields)
torch.library.define("lora_fx::mixture", f"({_ARGUMENTS}) -> Tensor")


@torch.library.register_fake("lora_fx::mixture")  # type: ignore[untyped-decorator]
def _(y: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(y)


def mark_mixtures(twin: nn.Module) -> None:
    """Make each layer of experts with matrices of 4-bit integers add a mark to its trace.

    Args:
        twin: The copy that is traced, after :func:`lora_fx.export.copy.pack_quantized`. It is changed.
    """
    for module in twin.modules():
        if _can_be_marked(module):
            vars(module)["forward"] = _marking(module, module.forward)


def _can_be_marked(module: nn.Module) -> bool:
    """Return True for a layer of transformers that computes the sum of :class:`Mixture`."""
    layer: Any = module
    if experts_implementation(module) != "grouped_mm" or is_region(module):
        return False
    if not layer.has_gate or layer.has_post_expert_norm:
        return False
    if getattr(layer, "_is_expert_parallel", False):
        return False
    stacks = [module._modules.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(s, PackedWeight) and s.operator == MATMUL_N_BITS for s in stacks)


def _marking(module: Any, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a forward that also adds a mark to the trace.

    Args:
        module: The layer of experts.
        forward: Its own forward, which calls its method ``_apply_gate`` once.
    """
    own_gate = module._apply_gate

    def marked(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        calls: list[tuple[Tensor, Tensor]] = []

        def gate(before: Tensor) -> Tensor:
            after: Tensor = own_gate(before)
            calls.append((before, after))
            return after

        vars(module)["_apply_gate"] = gate
        try:
            y = forward(x, chosen, weights)
        finally:
            del vars(module)["_apply_gate"]
        ((before, after),) = calls
        matrices = (*_arrays(module, "gate_up_proj"), *_arrays(module, "down_proj"))
        mark = Mixture(y, x, chosen, weights, before, after, *matrices)
        marked_y: Tensor = torch.ops.lora_fx.mixture(*mark)
        return marked_y

    return marked


def _arrays(module: Any, name: str) -> tuple[Tensor | None, ...]:
    stack = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    return stack.codes, stack.scales, stack.zeros, bias


def marked_mixture(node: ir.Node) -> Mixture:
    """Return the inputs of a mark by name, as values of the graph. An absent input is None."""
    absent = [None] * (len(Mixture._fields) - len(node.inputs))
    return Mixture(*node.inputs, *absent)
