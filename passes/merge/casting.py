"""A merged model in another precision: what was not merged, and so has not been rounded yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lora_fx.errors import MergeError
from lora_fx.formats.weights import quantization_of
from lora_fx.passes.graph.copies import memory_of
from lora_fx.passes.graph.lazy import is_lazy

__all__ = ["DTYPES", "KEPT_IN_FP32", "cast_model", "check_dtype"]

# transformers computes rotary angles in fp32 whatever the model's dtype: it keeps these out of
# half precision when it loads a model, since position * frequency has no digits to spare.
KEPT_IN_FP32 = ("inv_freq", "original_inv_freq")

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_dtype(dtype: object) -> None:
    """Refuses what is no dtype of weights.

    Raises:
        MergeError: If it is something else.
    """
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise MergeError(f"dtype is {dtype!r}; it is one of {known}")


def cast_model(
    model: nn.Module,
    dtype: torch.dtype,
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
    *,
    buffers: bool = True,
) -> None:
    """Casts parameters and buffers, as ``nn.Module.to`` does; parameters are new, and tied ones stay tied.

    Rotary frequencies stay in fp32, as transformers loads them.

    Args:
        model: A model that nobody else has, over weights that others may see.
        dtype: What to cast to.
        keep: Given each new weight, returns one of the same values to use in its place.
        buffers: Whether buffers are cast, too.

    Raises:
        MergeError: If a number overflows.
    """
    made: dict[tuple[object, ...], nn.Parameter] = {}
    for fqn, module in model.named_modules():
        for leaf, old in module._parameters.items():
            if old is None or old.dtype == dtype or not old.is_floating_point():
                continue
            if quantization_of(old) is not None or is_lazy(old):
                continue
            key = memory_of(old)
            if key not in made:
                value = keep(_cast(old.detach(), dtype, f"{fqn}.{leaf}"))
                made[key] = nn.Parameter(value, requires_grad=old.requires_grad)
            module._parameters[leaf] = made[key]
        for leaf, buffer in module._buffers.items() if buffers else ():
            if buffer is not None and buffer.is_floating_point() and leaf not in KEPT_IN_FP32:
                module._buffers[leaf] = _cast(buffer, dtype, f"{fqn}.{leaf}")


def _cast(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    cast = values.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(values.dtype).max
    if narrower and bool((cast.isinf() & values.isfinite()).any()):
        raise MergeError(f"{name} overflows {dtype}; merge in a wider dtype")
    return cast
