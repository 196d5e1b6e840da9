"""What a file is compared with: the model, or for a half-precision one the same model in fp32.

A half model run by PyTorch is no measure of a half model run by ONNX Runtime: both are off, by as
much as either may be. So the weights, as rounded to half precision, are widened again, exactly, and
the model computes with them in fp32. What then differs is the arithmetic of the file, which the
tolerance of its precision has to cover; the rounding of the weights is what the caller asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.arguments import FlatModel, cast_floating
from lora_fx.export.difference import Outputs
from lora_fx.export.prepare import Prepared
from lora_fx.passes._sharing import share_copy

__all__ = ["Reference"]

_log = logging.getLogger("lora_fx")
_HALF = (torch.bfloat16, torch.float16)  # the coarser one first


class Reference:
    """The model to compare with.

    Args:
        prepared: The model that was exported.
        keep: Takes each widened weight, see ``Scratch.keep``.

    Attributes:
        precision: The coarsest floating dtype of the model: it sets the tolerance.
        description: What it is, for the report.
    """

    def __init__(self, prepared: Prepared, keep: Callable[[Tensor], Tensor]) -> None:
        self._model = prepared.model
        self._wide: FlatModel | None = None
        self.precision = _coarsest(prepared)
        self.description = "the model in PyTorch"
        if self.precision not in _HALF:
            return
        rounded = str(self.precision).removeprefix("torch.")
        wide = FlatModel(_widened(prepared.model.model, keep), prepared.model.arguments)
        inputs = cast_floating(prepared.arguments.tensors, torch.float32)
        try:
            with torch.no_grad():
                wide.named(inputs)
        except ExportError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a model raises that is made for half
            _log.warning(
                "the model does not run in fp32, so that it is compared as it is: %s", error
            )
            self.description = f"the model in PyTorch in {rounded}, since it does not run in fp32"
            return
        self._wide = wide
        self.description = f"the model in PyTorch in fp32, its weights rounded to {rounded}"

    def named(self, tensors: Sequence[Tensor]) -> Outputs:
        """The outputs with their names. What is no floating number comes from the model as it is."""
        if self._wide is None:
            return self._model.named(tensors)
        wide = self._wide.named(cast_floating(tensors, torch.float32))
        if all(value.is_floating_point() for _, value in wide):
            return wide
        # An argmax over values that are rounded is another one: fp32 is no measure of it.
        own = self._model.named(tensors)
        return [
            (name, exact if exact.is_floating_point() else narrow)
            for (name, exact), (_, narrow) in zip(wide, own, strict=True)
        ]

    def narrow(self, tensors: Sequence[Tensor]) -> Outputs | None:
        """What PyTorch makes of the model in half precision; None where that is the reference."""
        return None if self._wide is None else self._model.named(tensors)


def _widened(model: nn.Module, keep: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy with every half-precision parameter and buffer in fp32."""
    wide = share_copy(model)
    cast: dict[int, nn.Parameter] = {}  # a tied weight stays one parameter
    for module in wide.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dtype not in _HALF:
                continue
            if id(parameter) not in cast:
                cast[id(parameter)] = nn.Parameter(keep(parameter.float()), requires_grad=False)
            module._parameters[name] = cast[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in _HALF:
                module._buffers[name] = buffer.float()
    return wide.eval()


def _coarsest(prepared: Prepared) -> torch.dtype:
    twin = prepared.model.model
    tensors = (*twin.parameters(), *twin.buffers(), *prepared.arguments.tensors)
    present = {tensor.dtype for tensor in tensors}
    return next((dtype for dtype in _HALF if dtype in present), torch.float32)
