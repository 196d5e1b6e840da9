"""Is the file the model? Both run on inputs that the export has not seen, and are compared.

Which inputs is not decided here: a task brings calls of its own, and for other exports they are
drawn (``draws.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_fx.errors import ExportError, ParityError
from lora_fx.export.cases import Case, Cases, Checked, Runner, Sizes
from lora_fx.export.draws import drawn_cases
from lora_fx.export.report import OutputParity
from lora_fx.export.trace import Trace

__all__ = ["TOLERANCES", "Parity", "check_parity"]

# Over the largest magnitude of the output. Half precision: a few units in the last place (2⁻¹¹ and
# 2⁻⁸), as the two sides round at different points of a network.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

# Below it an output is taken for zero and the difference is compared with this instead.
_SMALLEST_SCALE = 1e-3


@dataclass
class Parity:
    """The outcome: ``rows`` by output, the shapes that ran, those that PyTorch refused and why."""

    rows: dict[str, OutputParity] = field(default_factory=dict)
    tried: list[Sizes] = field(default_factory=list)
    skipped: dict[Sizes, str] = field(default_factory=dict)


def check_parity(
    model: Checked, trace: Trace, session: Runner, cases: Cases | None = None
) -> Parity:
    """Compare the session with the model on fresh inputs.

    Where there is an attention mask, only positions that it admits are compared: what a model
    returns for padding is arbitrary.

    Args:
        model: In eval mode.
        trace: What the file was made from.
        session: The file.
        cases: The calls to compare; None to draw them by axis.

    Raises:
        ParityError: An output differs by more than its tolerance, or ONNX Runtime refuses a shape
            that PyTorch takes.
    """
    parity = Parity()
    for case in drawn_cases(model, trace, parity.skipped) if cases is None else cases(model):
        sizes = tuple(tuple(tensor.shape) for tensor in case.inputs)
        if sizes not in parity.tried:
            _compare(parity, trace, sizes, case, session)
            parity.tried.append(sizes)
    return parity


def _compare(parity: Parity, trace: Trace, sizes: Sizes, case: Case, session: Runner) -> None:
    names = trace.arguments.names
    shapes = ", ".join(f"{name} {list(size)}" for name, size in zip(names, sizes, strict=True))
    try:
        actual = session.run(list(case.inputs))
    except ExportError as error:
        raise ParityError(
            f"PyTorch runs on {shapes}, ONNX Runtime does not: {error}. Fix that axis with "
            f"dynamic_shapes if you do not need it"
        ) from error
    for (name, want), got in zip(case.expected, actual.values(), strict=True):
        row = _difference(name, want, got, case.valid.get(name), shapes)
        before = parity.rows.get(name, row)
        parity.rows[name] = max(before, row, key=lambda entry: entry.max_rel_error)
        if row.max_rel_error > row.tolerance:
            raise ParityError(
                f"output '{name}' of the exported file differs from PyTorch's by "
                f"{row.max_abs_error:.2e} ({row.max_rel_error:.2e} of its largest value, allowed "
                f"{row.tolerance:.0e}) on {shapes}; nothing was written"
            )


def _difference(
    name: str, want: Tensor, got: Tensor, valid: Tensor | None, shapes: str
) -> OutputParity:
    if want.shape != got.shape:
        raise ParityError(
            f"output '{name}' has shape {list(got.shape)} in the exported file and "
            f"{list(want.shape)} in PyTorch on {shapes}; nothing was written"
        )
    tolerance = TOLERANCES.get(want.dtype, 0.0)
    if valid is not None:
        # A masked-out position counts as equal.
        got = torch.where(valid.bool(), got, want)
    left, right = want.detach().double(), got.double()
    same = (left == right) | (left.isnan() & right.isnan())
    if bool(same.all()):
        return OutputParity(name, 0.0, 0.0, tolerance)
    apart = torch.where(same, 0.0, (left - right).abs())
    # inf or nan on one side only is no number to compare: it is wrong.
    error = float(apart.nan_to_num(nan=torch.inf).max())
    finite = torch.where(left.isfinite(), left.abs(), 0.0)
    scale = max(float(finite.max()), _SMALLEST_SCALE)
    return OutputParity(name, error, error / scale, tolerance)
