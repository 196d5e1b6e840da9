"""How far apart two outputs are, and whether one of them has overflowed."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fx.errors import ParityError
from lora_fx.export.report import OutputParity

__all__ = [
    "TOLERANCES",
    "Compared",
    "PrecisionError",
    "described",
    "difference",
    "judged",
    "overflows",
]

_log = logging.getLogger("lora_fx")

# Over the largest magnitude of the output. Half precision: twenty roundings to 11 and to 8 digits
# (2⁻¹¹ and 2⁻⁸), what a deep network adds up when each operation rounds once. Single precision has
# room to spare (2⁻²⁴): there, the order of a long sum decides.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

# Below it an output is taken for zero and the difference is compared with this instead.
_SMALLEST_SCALE = 1e-3


class PrecisionError(ParityError):
    """The model itself is not what it was in the precision that it is to be exported in."""


@dataclass(frozen=True)
class Compared:
    """One output of one call, twice.

    Attributes:
        name: Of the output.
        want: The reference.
        got: What is judged by it, of the same shape.
        precision: The coarsest dtype in which ``got`` was computed.
        valid: What of it counts, a mask that can be expanded to its shape; None for all.
    """

    name: str
    want: Tensor
    got: Tensor
    precision: torch.dtype
    valid: Tensor | None = None

    @property
    def admitted(self) -> Tensor:
        """``got`` with ``want`` in the positions that do not count."""
        if self.valid is None:
            return self.got
        return torch.where(self.valid.bool(), self.got, self.want.to(self.got.dtype))


def difference(output: Compared) -> OutputParity:
    """The differences, with the tolerance of the precision; 0 for what is no floating number."""
    want, got = output.want, output.admitted
    tolerance = TOLERANCES[output.precision] if want.is_floating_point() else 0.0
    left, right = want.detach().double(), got.double()
    if got.is_floating_point():
        # The lowest number of a dtype, with which masks are filled, is not that of another one.
        limit = torch.finfo(got.dtype).max
        left = torch.where(left.isfinite(), left.clamp(-limit, limit), left)
    same = (left == right) | (left.isnan() & right.isnan())
    if bool(same.all()):
        return OutputParity(output.name, 0.0, 0.0, tolerance)
    apart = torch.where(same, 0.0, (left - right).abs())
    # inf or nan on one side only is no number to compare: it is wrong.
    error = float(apart.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
    finite = torch.where(left.isfinite(), left.abs(), 0.0)
    scale = max(float(finite.max()), _SMALLEST_SCALE)
    return OutputParity(output.name, error, error / scale, tolerance)


def overflows(output: Compared) -> bool:
    """Whether ``got`` is inf or nan at a position that counts where ``want`` is a finite number."""
    if not output.got.is_floating_point():
        return False
    return bool((output.want.isfinite() & ~output.admitted.isfinite()).any())


def judged(row: OutputParity, output: Compared, narrow: Tensor, shapes: str) -> OutputParity:
    """Tell what half precision does to a model from what is wrong with its file.

    ONNX Runtime's CPU provider computes half operations in fp32 and leaves out roundings between
    them, so that PyTorch shows what a GPU will do.

    Args:
        row: How far the file is from the reference.
        output: The same in full; its precision is fp16 or bf16.
        narrow: What PyTorch gave in that precision.
        shapes: Those of the inputs, for the message.

    Returns:
        The row, with how far PyTorch is from the reference.

    Raises:
        PrecisionError: One of the two overflows, or both are further off than the tolerance.
    """
    name, precision = output.name, output.precision
    short = "fp16" if precision is torch.float16 else "bf16"
    pytorch = dataclasses.replace(output, got=narrow)
    if overflows(output) or overflows(pytorch):
        remedy = "bf16, which has the range of fp32, or fp32" if short == "fp16" else "fp32"
        raise PrecisionError(
            f"the model overflows in {short}: output '{name}' is not finite on {shapes}, where "
            f"it is in fp32 (the largest {short} number is {torch.finfo(precision).max:.3g}); "
            f"nothing was written. Export it as {remedy}"
        )
    own = difference(pytorch)
    if own.max_rel_error > own.tolerance:
        words = (
            f"{short} is too coarse for the model: on {shapes} output '{name}' of PyTorch in "
            f"{short} differs from fp32 by {described(own)}"
        )
        if row.max_rel_error > row.tolerance:
            raise PrecisionError(
                f"{words}, that of the file by {described(row)}; nothing was written. Export it in "
                f"another precision"
            )
        _log.warning("%s; the file is checked on a provider that rounds less often", words)
    return dataclasses.replace(row, pytorch_rel_error=own.max_rel_error)


def described(row: OutputParity) -> str:
    """The differences of a row in words."""
    return (
        f"{row.max_abs_error:.2e} ({row.max_rel_error:.2e} of its largest value, allowed "
        f"{row.tolerance:.0e})"
    )
