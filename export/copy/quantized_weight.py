"""Quantized weights in the copy of a model that is exported.

Their libraries have layers and tensors of their own, whose products torch.export does not see through. So in
the copy a module stands in the place of each such parameter, wherever that is: in a layer of the library, in
an ``nn.Linear``, in a graph. Whoever multiplies by it asks it for the product
(``__torch_function__``).

What it computes here is ``x Wᵀ`` with the values that the library itself makes of its codes, in full
precision: what a file is compared with. What is traced has another one in its place
(:mod:`lora_fx.export.copy.packing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.formats import dense, format_of, formats, quantization_of, quantized_linear
from lora_fx.ir import Quantization
from lora_fx.passes.capture import written_out_layer
from lora_fx.passes.graph import is_region

__all__ = ["DENSE_INSTEAD", "HeldWeight", "StandIn", "hold_quantized"]

DENSE_INSTEAD = (
    "export a dense model instead: lora_fx.merge(model, dtype=torch.float32) makes one of a rewritten "
    "model"
)


class StandIn(nn.Module):
    """What stands in the place of a quantized parameter [out, in].

    Attributes:
        where: FQN of the parameter.
        stored: How its library has stored it.
        dtype: What code that asks the parameter for its dtype is told.
    """

    def __init__(self, where: str, stored: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.where = where
        self.stored = stored
        self.dtype = dtype

    def product(self, x: Tensor) -> Tensor:
        """``x Wᵀ`` in the dtype of x: [..., in] gives [..., out]."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """That of the matrix."""
        return torch.Size(self.stored.shape)

    @property
    def device(self) -> torch.device:
        """Where its values are."""
        return next(self.parameters()).device

    @property
    def T(self) -> _Turned:  # a tensor's name for it
        """The matrix as [in, out], for a product from the right."""
        return _Turned(self)

    def t(self) -> _Turned:
        """See ``T``."""
        return _Turned(self)

    def transpose(self, first: int, second: int) -> _Turned:
        """See ``T``."""
        if {first % 2, second % 2} != {0, 1}:
            raise self.refusal("transpose")
        return _Turned(self)

    def refusal(self, name: str) -> ExportError:
        """What to raise where it is read in another way than in a product."""
        return ExportError(
            f"'{self.where}' is stored as {self.stored}, and {name} reads it: products x Wᵀ with quantized "
            f"weights can be exported, nothing else; {DENSE_INSTEAD}"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(zip(("x", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
        x: Any = named.get("x", named.get("input"))
        weight = named.get("weight")
        if func in (F.linear, quantized_linear) and isinstance(weight, cls):
            return _sum(weight.product(x), named.get("bias"))
        raise _first(cls, (*args, *named.values())).refusal(_name(func))


class _Turned:
    """A stand-in as [in, out]."""

    def __init__(self, weight: StandIn) -> None:
        self.weight = weight

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.weight.product(x)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not kwargs and isinstance(args[-1], cls):
            if func in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
                return args[-1].weight.product(args[0])
            if func is torch.addmm:
                return _sum(args[-1].weight.product(args[1]), args[0])
        raise _first(cls, (*args, *(kwargs or {}).values())).weight.refusal(_name(func))


class HeldWeight(StandIn):
    """The parameter itself, as its library has it.

    Attributes:
        held: The parameter.
    """

    def __init__(self, where: str, stored: Quantization, parameter: nn.Parameter) -> None:
        super().__init__(where, stored, parameter.dtype)
        self.held = parameter

    def product(self, x: Tensor) -> Tensor:
        """See :class:`StandIn`."""
        # Few bits in few digits would be rounded twice.
        return F.linear(x, dense(self.held, torch.float32).to(x.dtype))


def hold_quantized(twin: nn.Module) -> None:
    """Puts a stand-in into the place of every quantized parameter.

    Args:
        twin: A copy of a model, over the same memory. It is changed.

    Raises:
        ExportError: A weight is one of these libraries, but in no form that is known.
    """
    known: dict[int, HeldWeight] = {}
    for prefix, module in list(twin.named_modules()):
        if isinstance(module, StandIn):
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            where = f"{prefix}.{name}" if prefix else name
            stored = quantization_of(parameter)
            if stored is None:
                _refuse_foreign(where, parameter)
                continue
            if id(parameter) not in known:
                own = format_of(parameter)
                assert own is not None
                known[id(parameter)] = HeldWeight(where, stored, own.widened(parameter))
            _release(module)
            del module._parameters[name]
            module.add_module(name, known[id(parameter)])


def _release(module: nn.Module) -> None:
    """Makes a plain layer of a library's own, and drops what it remembers of its weight."""
    own = written_out_layer(module, type(module)) is not None
    for known in formats():
        known.layers.release(module)
    if own and not is_region(module):
        object.__setattr__(module, "__class__", nn.Linear)


def _refuse_foreign(where: str, parameter: nn.Parameter) -> None:
    kind = type(parameter)
    if any(known.owns(kind) for known in formats()):
        raise ExportError(
            f"'{where}' is a {kind.__name__} in a form that has no counterpart in a file (is it quantized "
            f"already? does it quantize activations?); {DENSE_INSTEAD}"
        )


def _sum(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.to(product.dtype)


def _first(cls: type, values: Sequence[Any]) -> Any:
    """The first of its instances among values, or in a list among them."""
    flat = [
        one for value in values for one in (value if isinstance(value, list | tuple) else [value])
    ]
    return next(one for one in flat if isinstance(one, cls))


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
