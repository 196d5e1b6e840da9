"""The attention of torchvision's Swin transformers, written out.

Its ``forward`` hands the weights of ``qkv`` and ``proj`` to one function, which ``torch.fx`` does not look
into. What is here reads the same weights in the same order of operations; what lies between them is in
:mod:`lora_fx.runtime.windows`. torchvision is never imported: a model that has such a layer has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.runtime.windows import (
    attend_in_windows,
    fitted_window,
    partition,
    reverse,
    without_key_bias,
)

__all__ = ["written_out_of_torchvision"]

fx.wrap("attend_in_windows")
fx.wrap("fitted_window")
fx.wrap("partition")
fx.wrap("reverse")
fx.wrap("without_key_bias")


def written_out_of_torchvision(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """What to trace in the place of a class's ``forward``; None if it is none of torchvision's."""
    found = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)
    # A class of the same name may be another one.
    return _FORWARDS.get((cls.__module__, cls.__qualname__)) if found is cls else None


def _swin(self: Any, x: torch.Tensor) -> Any:
    return _attention(self, x, self.window_size, self.qkv.bias, self.get_relative_position_bias())


def _swin_v2(self: Any, x: torch.Tensor) -> Any:
    position = self.get_relative_position_bias()
    bias = without_key_bias(self.qkv.bias)
    return _attention(self, x, self.window_size, bias, position, self.logit_scale)


def _swin_3d(self: Any, x: torch.Tensor) -> Any:
    window = fitted_window(x, self.window_size)
    return _attention(self, x, window, self.qkv.bias, self.get_relative_position_bias(window))


def _attention(
    self: Any, x: torch.Tensor, window: Any, bias: Any, position: Any, logit_scale: Any = None
) -> Any:
    windows = partition(x, window, self.shift_size)
    qkv = F.linear(windows, self.qkv.weight, bias)
    out = attend_in_windows(
        qkv,
        position,
        logit_scale,
        x,
        window,
        self.shift_size,
        self.num_heads,
        self.attention_dropout,
        self.training,
    )
    out = F.linear(out, self.proj.weight, self.proj.bias)
    out = F.dropout(out, self.dropout, self.training)
    return reverse(out, x, window, self.shift_size)


_FORWARDS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): _swin,
    ("torchvision.models.swin_transformer", "ShiftedWindowAttentionV2"): _swin_v2,
    ("torchvision.models.video.swin_transformer", "ShiftedWindowAttention3d"): _swin_3d,
}
