"""Which provider the written file is compared with PyTorch on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_fx.errors import ExportError, ProviderError
from lora_fx.export.convert.converting import ConversionError
from lora_fx.export.copy.casts import Casts
from lora_fx.export.prepare.preparing import Prepared
from lora_fx.export.session.onnx_session import OnnxSession
from lora_fx.export.trace.tracing import Trace
from lora_fx.export.verify.parity import Parity, check_parity
from lora_fx.export.verify.reference import Reference
from lora_fx.export.verify.verify_adapters import check_adapters

__all__ = ["Verdict", "verify"]

_log = logging.getLogger("lora_fx")


@dataclass(frozen=True)
class Verdict:
    """How a file was compared with PyTorch.

    Attributes:
        parity: The comparison; None if there was none.
        provider: Execution provider of the comparison, else "".
        reason: Why there was none, else "".
    """

    parity: Parity | None = None
    provider: str = ""
    reason: str = ""


def verify(
    prepared: Prepared,
    traced: Trace,
    file: Path,
    keep: Callable[[Tensor], Tensor],
    *,
    large: bool = False,
) -> Verdict:
    """Run a file and the model that it was made from on the same fresh inputs.

    Args:
        prepared: The model.
        traced: What the file was made from.
        file: The written file.
        keep: Takes each weight of the reference that is made anew, see ``Scratch.keep``.
        large: Leave the weights in the file, mapped into memory, although that is slower.

    Raises:
        ParityError: They differ.
        ConversionError: ONNX Runtime refuses the file.
        ProviderError: There is no ONNX Runtime.
    """
    try:
        session = OnnxSession(file, "cpu", low_memory=large)
    except ProviderError:
        if prepared.dtype != "bf16":
            raise
        # The CPU provider lacks bf16 kernels; a GPU has them.
        try:
            session = OnnxSession(file, "cuda")
        except ProviderError as error:
            reason = "ONNX Runtime runs bf16 on its cuda provider only, and this machine has none"
            _log.warning("not compared with PyTorch: %s: %s", reason, error)
            return Verdict(reason=reason)
    except ExportError as error:
        raise ConversionError(
            f"ONNX Runtime refuses the exported file, so nothing was written: {error.__cause__}"
        ) from error
    casts = Casts(keep)  # one for all references: they have the same weights
    check = check_adapters if prepared.manifest else _check_alone
    return Verdict(check(prepared, traced, session, casts), session.provider)


def _check_alone(prepared: Prepared, traced: Trace, session: OnnxSession, casts: Casts) -> Parity:
    return check_parity(Reference(prepared.model, casts), traced, session, prepared.cases)
