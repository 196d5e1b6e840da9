"""State dicts of weights that are stored in few bits.

``Linear4bit`` of bitsandbytes writes the scales of its weight beside it, and no module of PyTorch reads
them back: ``model.load_state_dict(model.state_dict())`` fails on them. A parameter anywhere else would be
written without its scales, and read without a word. The hooks here write and read all of it, in
bitsandbytes' own keys. A tensor of torchao has its scales with it, and takes the values of its like only:
anything else is refused in words.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.formats.weights import quantization_of
from lora_fx.ir import Quantization

__all__ = ["checks_format", "loads_quantised"]

_PACKED = "quant_state.bitsandbytes__"
_REMEDY = (
    "quantise the model that the state dict is of with lora_fx.quantize, or load it before this one is "
    "quantised"
)


def loads_quantised(module: nn.Module, parameter: str, *, saves: bool) -> None:
    """Has a module read the scales of a 4-bit parameter from state dicts, and write them.

    Args:
        module: Whose parameter it is.
        parameter: Its name there.
        saves: Whether to write them, too: ``Linear4bit`` does that by itself.
    """
    if saves:
        module.register_state_dict_post_hook(_Save(parameter))  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_Load(parameter))  # type: ignore[no-untyped-call]


def checks_format(module: nn.Module, parameter: str) -> None:
    """Has a module refuse state dicts in which a parameter of torchao has another format.

    Args:
        module: Whose parameter it is.
        parameter: Its name there.
    """
    module.register_load_state_dict_pre_hook(_Check(parameter))  # type: ignore[no-untyped-call]


class _Save:
    """Writes the scales beside the weight."""

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> None:
        weight: Any = module._parameters.get(self.parameter)
        found = getattr(weight, "quant_state", None)
        if found is None or f"{prefix}{self.parameter}" not in state:
            return
        for key, value in found.as_dict(packed=True).items():
            state[f"{prefix}{self.parameter}.{key}"] = value.detach()


class _Load:
    """Takes the scales out of a state dict and copies them into those that are there."""

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter

    def __call__(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: Mapping[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        name = f"{prefix}{self.parameter}"
        weight: Any = module._parameters.get(self.parameter)
        own = getattr(weight, "quant_state", None)
        if own is None or name not in state:
            return
        found = {k: state[k] for k in list(state) if k.startswith(f"{name}.")}
        for key in found:
            del state[key]
        if not any(_PACKED in key for key in found):
            errors.append(
                f"{name} is stored in {own.quant_type} here and comes without its scales: {_REMEDY}"
            )
            del state[name]
            return
        given = {key.removeprefix(f"{name}."): value for key, value in found.items()}
        library = sys.modules["bitsandbytes"]
        scales = library.functional.QuantState.from_dict(given, weight.device)
        if _way(scales) != _way(own):
            errors.append(
                f"{name} is stored as {_way(own)} here, and as {_way(scales)} in the state dict"
            )
            return
        with torch.no_grad():
            own.absmax.copy_(scales.absmax)
            if own.state2 is not None:
                own.offset.copy_(scales.offset)
                own.state2.absmax.copy_(scales.state2.absmax)


class _Check:
    """Looks at how a weight of a state dict is stored."""

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter

    def __call__(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: Mapping[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        name = f"{prefix}{self.parameter}"
        weight = module._parameters.get(self.parameter)
        own = quantization_of(weight)
        if own is None or name not in state:
            return
        found = quantization_of(state[name])
        if found is not None and _format(found) == _format(own):
            return
        there = "has its values there" if found is None else f"as {found} in the state dict"
        errors.append(f"{name} is stored as {own} here and {there}: {_REMEDY}")
        # So that nothing else is said of it: it is not missing, and copying it changes nothing.
        state[name] = weight


def _format(found: Quantization) -> tuple[Any, ...]:
    return found.library, found.scheme, found.block_size


def _way(scales: Any) -> tuple[Any, ...]:
    inner = None if scales.state2 is None else scales.state2.blocksize
    return scales.quant_type, scales.blocksize, scales.nested, tuple(scales.shape), inner
