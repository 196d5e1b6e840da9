"""Is the file the model? Both run on inputs that the export has not seen, and are compared.

Which inputs is not decided here: a task brings calls of its own, and for other exports they are
drawn (``draws.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lora_fx.errors import ExportError, ParityError
from lora_fx.export.ort.empty_axes import EmptyAxisError
from lora_fx.export.report import OutputParity, worse
from lora_fx.export.trace.cases import Case, Cases, Runner, Sizes
from lora_fx.export.trace.tracing import Trace
from lora_fx.export.verify.difference import Compared, described, difference, judged
from lora_fx.export.verify.draws import drawn_cases
from lora_fx.export.verify.reference import Reference

__all__ = ["Parity", "check_parity"]


@dataclass
class Parity:
    """The outcome.

    Attributes:
        reference: What the file was compared with.
        rows: The differences by output.
        tried: The shapes that ran.
        skipped: Those that PyTorch refused, and why.
        note: What there is to say of the values that were tried, "" for fresh ones.
    """

    reference: str
    rows: dict[str, OutputParity] = field(default_factory=dict)
    tried: list[Sizes] = field(default_factory=list)
    skipped: dict[Sizes, str] = field(default_factory=dict)
    note: str = ""


def check_parity(
    model: Reference, trace: Trace, session: Runner, cases: Cases | None = None
) -> Parity:
    """Compare the session with the model on fresh inputs.

    Args:
        model: What the file has to agree with.
        trace: What the file was made from.
        session: The file.
        cases: The calls to compare; None to draw them by axis.

    Raises:
        PrecisionError: The model itself does not bear the precision of the file.
        ParityError: An output differs by more than its tolerance, or ONNX Runtime refuses a shape
            that PyTorch takes.
    """
    parity = Parity(model.description)
    for case in drawn_cases(model, trace, parity.skipped) if cases is None else cases(model):
        sizes = tuple(tuple(tensor.shape) for tensor in case.inputs)
        if sizes in parity.tried:
            continue
        try:
            _compare(parity, model, trace, sizes, case, session)
        except EmptyAxisError as error:  # so the session refuses such calls
            parity.skipped[sizes] = str(error)
            continue
        parity.tried.append(sizes)
        parity.note = case.note or parity.note
    if not parity.tried:
        raise ParityError(f"there is no call to compare: {next(iter(parity.skipped.values()), '')}")
    return parity


def _compare(
    parity: Parity, model: Reference, trace: Trace, sizes: Sizes, case: Case, session: Runner
) -> None:
    names = trace.arguments.names
    shapes = ", ".join(f"{name} {list(size)}" for name, size in zip(names, sizes, strict=True))
    try:
        actual = session.run(list(case.inputs))
    except EmptyAxisError:
        raise
    except ExportError as error:
        raise ParityError(
            f"PyTorch runs on {shapes}, ONNX Runtime does not: {error}. Fix that axis with "
            f"dynamic_shapes if you do not need it"
        ) from error
    with torch.no_grad():
        narrow = dict(model.narrow(case.inputs) or ())
    for (name, want), got in zip(case.expected, actual.values(), strict=True):
        if want.shape != got.shape:
            raise ParityError(
                f"output '{name}' has shape {list(got.shape)} in the exported file and "
                f"{list(want.shape)} in PyTorch on {shapes}; nothing was written"
            )
        output = Compared(name, want, got, model.precision, case.valid.get(name))
        row = difference(output)
        if name in narrow:
            row = judged(row, output, narrow[name], shapes)
        parity.rows[name] = worse(parity.rows.get(name, row), row)
        if row.max_rel_error > row.tolerance:
            raise ParityError(
                f"output '{name}' of the exported file differs from {model.description} by "
                f"{described(row)} on {shapes}; nothing was written"
            )
