"""Which provider the written file is compared with PyTorch on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError, MergeError, ParityError, ProviderError
from lora_fx.export.adapters import FactorModel, Manifest, cast_to, random_factors, values_of_model
from lora_fx.export.convert import ConversionError
from lora_fx.export.copy import Casts, StandIn
from lora_fx.export.ort import EmptyAxisError
from lora_fx.export.prepare import Prepared
from lora_fx.export.report import OutputParity, worse
from lora_fx.export.session import OnnxSession
from lora_fx.export.trace import Case, Cases, FlatModel, Outputs, Runner, Sizes, Trace
from lora_fx.export.verify.difference import Compared, PrecisionError, described, difference, judged
from lora_fx.export.verify.draws import drawn_cases
from lora_fx.export.verify.reference import Reference

__all__ = [
    "Parity",
    "Verdict",
    "check_adapters",
    "check_parity",
    "verify",
]


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


_log = logging.getLogger("lora_fx")

# Of the lowest sites. 1 is what the defaults have, too: an axis of size 1 is the one that is taken for
# something to broadcast.
_RANDOM_RANKS = (3, 1)


def check_adapters(prepared: Prepared, traced: Trace, session: OnnxSession, casts: Casts) -> Parity:
    """Compare the file with PyTorch: alone, with every adapter of the model, and with random ones.

    The random ones are judged by the model with their factors folded into its weights, so that nothing of
    what was traced judges itself. The file alone is judged again after each adapter: memory that a kernel
    never writes then holds what an adapter has left there, and not the zeros of a new process.

    Args:
        prepared: The model.
        traced: What the file was made from.
        session: The file.
        casts: Makes the weights of the references of a half-precision file.

    Raises:
        PrecisionError: The model, or an adapter, does not bear the precision of the file.
        ParityError: An output differs, with the adapter that it was with.
    """
    cases = prepared.cases
    base = Reference(prepared.base, casts)
    parity = check_parity(base, traced, session, cases)
    manifest = prepared.manifest
    assert manifest is not None
    assert isinstance(prepared.model, FactorModel)
    for name, active in prepared.adapters.items():
        assert prepared.source is not None
        values = _in_range(name, manifest, values_of_model(prepared.source, name))
        model = Reference(active(), casts)
        _check(parity, f"adapter {name!r}", model, traced, session, values, cases)
    for rank in _RANDOM_RANKS:
        # A bias that no weight can take is compared with the adapters that have trained it.
        loose = prepared.model.loose_biases()
        values = {
            name: torch.zeros_like(value) if name in loose else value
            for name, value in random_factors(manifest, rank).items()
        }
        random = Reference(_Adapted(prepared.model, values, casts.keep), casts)
        what = f"a random adapter of rank {rank}"
        _check(parity, what, random, traced, session, values, cases)
        _check_again(parity, what, base, traced, session, cases)
    return parity


def _check_again(
    parity: Parity,
    what: str,
    base: Reference,
    traced: Trace,
    session: OnnxSession,
    cases: Cases | None,
) -> None:
    """Compare the file alone once more, in the memory that a run with an adapter has left."""
    try:
        found = check_parity(base, traced, session, cases)
    except ParityError as error:
        raise type(error)(f"alone, after a run with {what}: {error}") from error
    parity.rows |= {name: worse(parity.rows[name], row) for name, row in found.rows.items()}


def _in_range(adapter: str, manifest: Manifest, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of an adapter in the dtypes of the file."""
    values = cast_to(manifest, exact)
    for name, value in values.items():
        if bool(exact[name].isfinite().all()) and not bool(value.isfinite().all()):
            dtype = str(value.dtype).removeprefix("torch.")
            raise PrecisionError(
                f"adapter {adapter!r} overflows in {dtype}: {name}, with its scale, goes up to "
                f"{float(exact[name].abs().max()):.3g} (the largest {dtype} number is "
                f"{torch.finfo(value.dtype).max:.3g}); nothing was written. Export it in another "
                f"precision"
            )
    return values


def _check(
    parity: Parity,
    what: str,
    model: Reference,
    traced: Trace,
    session: OnnxSession,
    values: Mapping[str, Tensor],
    cases: Cases | None,
) -> None:
    session.load_adapter(what, values)
    try:
        found = check_parity(model, traced, _With(session, what), cases)
    except ParityError as error:
        raise type(error)(f"with {what}: {error}") from error
    finally:
        session.unload_adapter(what)
    for name, row in found.rows.items():
        label = f"{name} with {what}"
        parity.rows[label] = dataclasses.replace(row, name=label)


class _With:
    """A session that runs with one adapter."""

    def __init__(self, session: OnnxSession, adapter: str) -> None:
        self._session = session
        self._adapter = adapter

    def run(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        return self._session.run(inputs, adapter=self._adapter)


class _Adapted:
    """A model with the same adapter at every call, folded into its weights where that can be.

    It cannot over quantized weights: there, and in half precision, which is no reference, the traced model
    is handed the factors.
    """

    def __init__(
        self,
        model: FactorModel,
        values: Mapping[str, Tensor],
        keep: Callable[[Tensor], Tensor],
    ) -> None:
        self._flat = model
        self._values = values
        self._keep = keep
        self.model = model.model
        self.arguments = model.arguments
        inputs = model.adapter_inputs
        self._factors = [
            values[one.name].to(model.device, getattr(torch, one.dtype)) for one in inputs
        ]
        self._dense = self._merged()

    def over(self, model: nn.Module) -> _Adapted:
        return _Adapted(self._flat.over(model), self._values, self._keep)

    def named(self, tensors: Sequence[Tensor]) -> Outputs:
        if self._dense is not None:
            return self._dense.named(tensors)
        return self._flat.named([*tensors, *self._factors])

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        if self._dense is not None:
            return self._dense.run(call, *args, **kwargs)
        return self._flat.handed(self._factors, call, *args, **kwargs)

    def _merged(self) -> FlatModel | None:
        if any(one.dtype in ("float16", "bfloat16") for one in self._flat.adapter_inputs):
            return None
        if any(isinstance(module, StandIn) for module in self.model.modules()):
            return None
        try:
            return self._flat.merged(self._factors, self._keep)
        except MergeError as error:
            _log.info("a random adapter is compared unmerged: %s", error)
            return None


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
