"""What a file is compared with: the model, or for a half-precision one the same model in fp32.

A half model run by PyTorch is no measure of a half model run by ONNX Runtime: both are off, by as
much as either may be. So the weights, as rounded to half precision, are widened again, exactly, and
the model computes with them in fp32. What then differs is the arithmetic of the file, which the
tolerance of its precision has to cover; the rounding of the weights is what the caller asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.copy import Casts, StandIn
from lora_fx.export.trace import Checked, Outputs, Widenable, cast_floating
from lora_fx.passes.graph import share_copy

__all__ = ["Reference"]

_log = logging.getLogger("lora_fx")
_HALF = (torch.bfloat16, torch.float16)  # the coarser one first


class Reference:
    """The model to compare with.

    Args:
        exported: The model that was exported, alone or with an adapter.
        casts: Makes the widened weights.

    Attributes:
        precision: The coarsest floating dtype of the model: it sets the tolerance.
        description: What it is, for the report.
    """

    def __init__(self, exported: Widenable, casts: Casts) -> None:
        self._exported = exported
        over = (
            ", over the values of its quantized weights"
            if any(isinstance(module, StandIn) for module in exported.model.modules())
            else ""
        )
        self._wide: Checked | None = None
        self.precision = _coarsest(exported)
        self.description = f"the model in PyTorch{over}"
        if self.precision not in _HALF:
            return
        rounded = str(self.precision).removeprefix("torch.")
        wide = exported.over(_widened(exported.model, casts))
        inputs = cast_floating(exported.arguments.tensors, torch.float32)
        try:
            with torch.no_grad():
                wide.named(inputs)
        except ExportError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a model raises that is made for half
            _log.warning(
                "the model does not run in fp32, so that it is compared as it is: %s", error
            )
            self.description = (
                f"the model in PyTorch in {rounded}{over}, since it does not run in fp32"
            )
            return
        self._wide = wide
        self.description = f"the model in PyTorch in fp32{over}, its weights rounded to {rounded}"

    @property
    def model(self) -> nn.Module:
        """The model that computes what is expected."""
        return (self._wide or self._exported).model

    def named(self, tensors: Sequence[Tensor]) -> Outputs:
        """The outputs with their names. What is no floating number comes from the model as it is."""
        if self._wide is None:
            return self._exported.named(tensors)
        wide = self._wide.named(cast_floating(tensors, torch.float32))
        if all(value.is_floating_point() for _, value in wide):
            return wide
        # An argmax over values that are rounded is another one: fp32 is no measure of it.
        own = self._exported.named(tensors)
        return [
            (name, exact if exact.is_floating_point() else narrow)
            for (name, exact), (_, narrow) in zip(wide, own, strict=True)
        ]

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        """``call(model, *args, **kwargs)`` in the precision of ``named``."""
        if self._wide is None:
            return self._exported.run(call, *args, **kwargs)
        named = {key: _wide_argument(value) for key, value in kwargs.items()}
        return self._wide.run(call, *map(_wide_argument, args), **named)

    def narrow(self, tensors: Sequence[Tensor]) -> Outputs | None:
        """What PyTorch makes of the model in half precision; None where that is the reference."""
        return None if self._wide is None else self._exported.named(tensors)


def _wide_argument(value: Any) -> Any:
    return cast_floating([value], torch.float32)[0] if isinstance(value, Tensor) else value


def _widened(model: nn.Module, casts: Casts) -> nn.Module:
    """A copy with every half-precision parameter and buffer in fp32."""
    wide = share_copy(model)
    for module in wide.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype in _HALF:
                module._parameters[name] = casts(parameter, torch.float32)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in _HALF:
                module._buffers[name] = buffer.float()
    return wide.eval()


def _coarsest(exported: Widenable) -> torch.dtype:
    model = exported.model
    tensors = (*model.parameters(), *model.buffers(), *exported.arguments.tensors)
    present = {tensor.dtype for tensor in tensors}
    return next((dtype for dtype in _HALF if dtype in present), torch.float32)
