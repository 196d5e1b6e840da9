"""What a copy over the same quantised weights has of its own: everything that its library writes into.

bitsandbytes keeps the scales of a weight in objects beside it, which ``.to()`` and its own forward change in
place. The copy gets objects of its own over the same tensors.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from lora_fx.formats.made import pickle_by_class

__all__ = ["drop_repr", "keep_exact", "quantized_twin", "share_states"]


def quantized_twin(parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter | None:
    """A frozen parameter of the same class over the same memory, for those of bitsandbytes; None for others.

    Args:
        parameter: Any parameter.
        memo: For ``copy.deepcopy``: scales that lie in the layer, too, become the same object.
    """
    if type(parameter).__name__ not in ("Params4bit", "Int8Params"):
        return None
    pickle_by_class(type(parameter))
    plain = parameter.detach().as_subclass(torch.Tensor)
    twin: Any = torch.Tensor._make_subclass(type(parameter), plain, False)
    twin.__dict__.update(parameter.__dict__)
    if getattr(twin, "quant_state", None) is not None:
        twin.quant_state = _shallow(twin.quant_state, memo)
        if getattr(twin.quant_state, "packing_format_for_cpu", False):
            twin.data, _ = _unpacked(plain, twin.quant_state)
    # It would tell the layer of the original about a new state.
    if hasattr(twin, "module"):
        twin.module = None
    return twin  # type: ignore[no-any-return]


def share_states(module: nn.Module, memo: dict[int, Any]) -> None:
    """Has the state of an 8-bit layer copied without its tensors, and its scales found at its weight.

    Args:
        module: Any module of the model that is copied; its parameters are in ``memo``.
        memo: For ``copy.deepcopy``.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return
    weight, state = module._parameters.get("weight"), module.__dict__.get("state")
    if type(weight).__name__ != "Int8Params" or state is None:
        return
    memo[id(state)] = copy.copy(state)
    twin, held = memo[id(weight)], weight
    # Its first call moves the scales from the weight to the state.
    twin.CB = held.CB if held.CB is not None else state.CB  # type: ignore[union-attr]
    twin.SCB = held.SCB if held.SCB is not None else state.SCB  # type: ignore[union-attr]
    twin.row_scales = twin.SCB


def _unpacked(weight: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """The weight in its usual order, where a call in eval mode has packed it for a kernel of the CPU.

    The scales come back as that kernel has them, in bfloat16.

    Args:
        weight: What is packed.
        state: Its state; it is written.
    """
    functional = sys.modules["bitsandbytes"].functional
    found: tuple[torch.Tensor, Any] = functional._convert_weight_packed_for_cpu_inverse(
        weight, state
    )
    return found


def keep_exact(module: nn.Module) -> None:
    """Keeps a 4-bit layer from a kernel of the CPU that rounds x and the scales to bfloat16.

    The layer would pack its weight for it, in place, in its first call in eval mode; what runs in training
    and in eval mode would not be the same model then.
    """
    if getattr(module, "support_avx512bf16_for_cpu", False):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def drop_repr(module: nn.Module) -> None:
    """Takes off how torchao prints a layer: a function of the layer copied from, which no pickle takes."""
    told = getattr(module.__dict__.get("extra_repr"), "__func__", None)
    if str(getattr(getattr(told, "func", told), "__module__", "")).startswith("torchao."):
        del module.__dict__["extra_repr"]


def _shallow(state: Any, memo: dict[int, Any]) -> Any:
    if id(state) not in memo:
        own = memo[id(state)] = copy.copy(state)
        if getattr(own, "state2", None) is not None:
            own.state2 = copy.copy(own.state2)
    return memo[id(state)]
