"""What is traced in the place of a quantized weight: arrays, and one operator over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.copy.quantized_weight import DENSE_INSTEAD, HeldWeight, StandIn
from lora_fx.export.report import StoredFormat
from lora_fx.formats import format_of, held
from lora_fx.ir import NoOperator, OnnxWeight

__all__ = [
    "PackedWeight",
    "pack_quantized",
    "packed",
    "stored_formats",
]


@torch.no_grad()
def packed(weight: HeldWeight) -> OnnxWeight:
    """Asks the format of a weight for the form that an operator reads.

    Raises:
        ExportError: There is none that has its values, or its scales are not finite.
    """
    known = format_of(weight)
    assert known is not None
    found = known.onnx_weight(held(weight), weight.stored)
    if isinstance(found, NoOperator):
        instead = f"; {DENSE_INSTEAD}" if found.remedy is None else f". {found.remedy}"
        raise ExportError(f"'{weight.where}' {found.reason}{instead}")
    if not bool(found.scales.isfinite().all()):
        raise ExportError(
            f"'{weight.where}' has scales that are not finite: it was quantized from a broken model"
        )
    return found


class PackedWeight(StandIn):
    """A quantized weight as ``weight.codes``, ``weight.scales`` and, where there are some, ``weight.zeros``.

    Args:
        weight: What it is made of.
        dtype: Of the model. Scales are in it where they lose nothing but digits, else in fp32.
        keep: Takes each tensor that is made anew, see ``Scratch.keep``.

    Attributes:
        operator: Of ONNX, which reads it.
        block: Values that share a scale there.
    """

    def __init__(
        self, weight: HeldWeight, dtype: torch.dtype, keep: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(weight.where, weight.stored, weight.dtype)
        found = packed(weight)
        self.operator, self.block = found.operator, found.block
        scales = found.scales
        # Values that an operator makes are rounded after it: its scales may have all digits.
        if not self.operator.dequantizes and _in_range(scales, dtype):
            scales = scales.to(dtype)
        # Two codes a byte are new where the library has one; others lie where they lay.
        codes = keep(found.codes) if found.fresh else found.codes
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(keep(scales), requires_grad=False)
        zeros = None if found.zeros is None else nn.Parameter(found.zeros, requires_grad=False)
        self.register_parameter("zeros", zeros)

    def product(self, x: Tensor) -> Tensor:
        """See :class:`StandIn`: to be traced, not run."""
        product: Tensor = torch.ops.lora_fx.quantized_product(
            x if self.operator.dequantizes else x.to(self.scales.dtype),
            self.codes,
            self.scales,
            self.zeros,
            self.operator.name,
            *self.stored.shape,
            self.block,
            self.stored.scheme,
        )
        return product.to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return sum(parameter.nbytes for parameter in self.parameters())


def pack_quantized(twin: nn.Module, dtype: torch.dtype, keep: Callable[[Tensor], Tensor]) -> None:
    """Puts arrays in the place of quantized weights.

    Args:
        twin: A copy that is exported. It is changed.
        dtype: What most of its weights are in.
        keep: Takes each tensor that is made anew, see ``Scratch.keep``.

    Raises:
        ExportError: No operator has the values of a weight.
    """
    known: dict[int, PackedWeight] = {}
    for module in list(twin.modules()):
        for name, child in module._modules.items():
            if not isinstance(child, HeldWeight):
                continue
            if id(child) not in known:
                known[id(child)] = PackedWeight(child, dtype, keep)
            module._modules[name] = known[id(child)]


def stored_formats(model: nn.Module, names: Container[str]) -> tuple[StoredFormat, ...]:
    """What of :func:`pack_quantized` is in a file, one entry a form.

    Args:
        model: The model that was traced: a file may have a part of it.
        names: Those of the file's weights.
    """
    found: dict[tuple[str, str, int | None], StoredFormat] = {}
    seen: set[PackedWeight] = set()
    for name, one in model.named_modules(remove_duplicate=False):
        if not isinstance(one, PackedWeight) or one in seen or f"{name}.codes" not in names:
            continue
        seen.add(one)
        by_row = one.operator.dequantizes and one.block == one.shape[1]
        key = (one.stored.scheme, one.operator.name, None if by_row else one.block)
        before = found.get(key, StoredFormat(*key, weights=0, values=0, bytes=0))
        found[key] = dataclasses.replace(
            before,
            weights=before.weights + 1,
            values=before.values + one.shape.numel(),
            bytes=before.bytes + one.nbytes,
        )
    return tuple(found.values())


def _in_range(scales: Tensor, dtype: torch.dtype) -> bool:
    """Whether scales keep the leading digits of a dtype: none is too small for them, none too large."""
    limits, sizes = torch.finfo(dtype), scales.abs()
    normal = (sizes == 0) | ((sizes >= limits.tiny) & (sizes <= limits.max))
    return bool(normal.all())


torch.library.define(
    "lora_fx::quantized_product",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, str operator, int rows, "
    "int columns, int block, str scheme) -> Tensor",
)


@torch.library.register_fake("lora_fx::quantized_product")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    operator: str,
    rows: int,
    columns: int,
    block: int,
    scheme: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))
