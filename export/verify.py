"""Comparison of a written file with PyTorch: alone and with adapters, against a reference and tolerances."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError, MergeError, ParityError, ProviderError
from lora_fx.export.adapter_bank import BankModel
from lora_fx.export.adapter_file import values_of_model
from lora_fx.export.adapter_manifest import Manifest, cast_to
from lora_fx.export.arguments import (
    Axis,
    Case,
    Cases,
    Checked,
    FlatModel,
    Outputs,
    Sizes,
    cast_floating,
)
from lora_fx.export.convert import ConversionError
from lora_fx.export.copy import Casts, StandIn, cast_model
from lora_fx.export.factor_model import FactorModel, random_factors
from lora_fx.export.ort import EmptyAxisError
from lora_fx.export.prepare import Prepared
from lora_fx.export.report import OutputParity, worse
from lora_fx.export.session import OnnxSession
from lora_fx.export.trace import Trace
from lora_fx.passes.capture import largest_difference
from lora_fx.passes.graph import share_copy
from lora_fx.passes.merge import Keep

__all__ = [
    "TOLERANCES",
    "Compared",
    "Loaded",
    "ModelReference",
    "Parity",
    "PrecisionError",
    "Reference",
    "difference",
    "drawn_cases",
    "overflows",
    "verify",
]

# --- fresh inputs ---------------------------------------------------------------------------------


_Resize: TypeAlias = Callable[[Axis, int], int]


def drawn_cases(model: Checked, trace: Trace, skipped: dict[Sizes, str]) -> Iterator[Case]:
    """Yield calls with fresh values and other sizes that PyTorch accepts, and the outputs of PyTorch.

    If there is an attention mask, only the positions that it admits are compared, because the outputs at
    padding are arbitrary.

    Args:
        model: The model in eval mode.
        trace: The trace, which has the dynamic axes.
        skipped: Receives the shapes that PyTorch refuses, with its error messages.

    Raises:
        ParityError: PyTorch refuses fresh values at the shapes of the example.
    """
    names = trace.arguments.names
    draw = _Draw(model, trace, skipped)
    for resize in (_same, _larger, _smaller):
        inputs, expected = draw.accepted(resize)
        yield Case(inputs, expected, _admitted(names, inputs, expected), draw.note)


@dataclass
class _Draw:
    """Source of fresh inputs for :func:`drawn_cases`, in shapes that PyTorch accepts."""

    model: Checked
    trace: Trace
    skipped: dict[Sizes, str]

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        # By name: axes with the same name have the same size in the file, even if they were traced apart.
        self.order = {
            name: index for index, name in enumerate(dict.fromkeys(self.trace.symbols.values()))
        }
        self.kept: list[str] = []  # inputs whose values are the example's
        self.note = ""

    def accepted(self, resize: _Resize) -> tuple[list[Tensor], Outputs]:
        """Return inputs with as many axes resized as PyTorch accepts, and the outputs of PyTorch."""
        every = set(self.order)
        # Distinct sizes reveal two axes that were mixed up, but a model may need equal sizes.
        apart = self.run(self.sizes(every, resize, self.order))
        result = apart or self.run(self.sizes(every, resize, {}))
        if result is not None:
            return result
        chosen: set[str] = set()
        result = self.run(self.sizes(chosen, resize, {}))
        if result is None:
            self.keep_more()
            return self.accepted(resize)
        for name in self.order:
            bigger = self.run(self.sizes(chosen | {name}, resize, {}))
            if bigger is not None:
                chosen.add(name)
                result = bigger
        return result

    def keep_more(self) -> None:
        """Use the example's values for more inputs, because PyTorch refuses fresh values.

        The first call keeps integer inputs other than masks, the second call also the masks.

        Raises:
            ParityError: All integer inputs already have the example's values.
        """
        names, tensors = self.trace.arguments.names, self.trace.arguments.tensors
        pairs = zip(names, tensors, strict=True)
        whole = [name for name, tensor in pairs if not tensor.is_floating_point()]
        reasons = "; ".join(dict.fromkeys(self.skipped.values()))
        for kept in ([name for name in whole if "mask" not in name], whole):
            if len(kept) > len(self.kept):
                self.kept = kept
                break
        else:
            raise ParityError(
                f"PyTorch refuses fresh values at the shapes of the example: {reasons}"
            )
        self.note = (
            f"{', '.join(kept)}: rows of the example, since PyTorch refuses fresh values: {reasons}"
        )
        self.skipped.clear()

    def sizes(self, names: set[str], resize: _Resize, offsets: Mapping[str, int]) -> Sizes:
        return tuple(
            tuple(
                resize(axis, offsets.get(axis.name, 0)) if axis.name in names else axis.size
                for axis in axes
            )
            for axes in self.trace.axes
        )

    def run(self, sizes: Sizes) -> tuple[list[Tensor], Outputs] | None:
        if sizes in self.skipped:
            return None
        arguments = self.trace.arguments
        inputs = [
            self.drawn(name, tensor, size)
            for name, tensor, size in zip(arguments.names, arguments.tensors, sizes, strict=True)
        ]
        try:
            with torch.no_grad():
                return inputs, self.model.named(inputs)
        except Exception as error:  # noqa: BLE001  # a model refuses a size in its own way
            self.skipped[sizes] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return None

    def drawn(self, name: str, like: Tensor, size: tuple[int, ...]) -> Tensor:
        if name in self.kept:
            return _rows(like, size)
        return _fresh(name, like, size, self.generator)


def _same(axis: Axis, offset: int) -> int:
    return axis.size


def _larger(axis: Axis, offset: int) -> int:
    if axis.name == "batch":
        return axis.size + 1
    size = axis.size + max(1, axis.size // 2) + offset
    return size if axis.high is None else min(size, axis.high)


def _smaller(axis: Axis, offset: int) -> int:
    return 1 if axis.name == "batch" else max(2, axis.size // 2)


def _fresh(name: str, like: Tensor, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    example = like.detach().cpu()
    fresh = _mask(example, size, generator) if "mask" in name else None
    if fresh is None:
        fresh = _positions(example, size)
    if fresh is None:
        fresh = _values(example, size, generator)
    return fresh.to(device=like.device, dtype=like.dtype)


def _rows(example: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the rows of the example, shifted by one row and repeated for a larger batch.

    Shorter rows lose their end, and longer rows repeat their last entry. The last entry is mostly text,
    because special tokens come first.
    """
    if example.ndim == 0 or example.numel() == 0:
        return example.new_zeros(size) if example.ndim else example
    for axis, length in enumerate(size):
        indices = torch.arange(length, device=example.device)
        available = example.shape[axis]
        indices = (indices + 1) % available if axis == 0 else indices.clamp(max=available - 1)
        example = example.index_select(axis, indices)
    return example


def _mask(example: Tensor, size: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    if not bool(((example == 0) | (example == 1)).all()):
        return None
    fresh = torch.ones(size)
    if len(size) == 2 and size[0] > 1:
        # Padding is on the right, and no row is all padding.
        lengths = torch.randint(1, size[1] + 1, (size[0], 1), generator=generator)
        lengths[0] = size[1]
        fresh = (torch.arange(size[1])[None] < lengths).float()
    if example.is_floating_point() and not bool(example.any()):
        return torch.zeros(size)  # an additive mask, where 0 admits a position
    return fresh


def _positions(example: Tensor, size: tuple[int, ...]) -> Tensor | None:
    if example.is_floating_point() or example.ndim == 0 or example.shape[-1] < 2:
        return None
    first = example.reshape(-1)[0]
    counting = torch.arange(example.shape[-1]) + first
    if not bool((example == counting).all()):
        return None
    return (torch.arange(size[-1]) + first).expand(size).clone()


def _values(example: Tensor, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if example.numel() == 0:
        return torch.zeros(size)
    if not example.is_floating_point():
        low, high = int(example.min()), int(example.max())
        return torch.randint(low, high + 1, size, generator=generator)
    values = example.double()
    spread = values.std(correction=0)
    fresh = values.mean() + spread * torch.randn(size, generator=generator, dtype=torch.float64)
    return fresh.clamp(values.min(), values.max())


def _admitted(
    names: Sequence[str], inputs: Sequence[Tensor], expected: Outputs
) -> dict[str, Tensor]:
    """Map the name of each output to the positions that all attention masks admit."""
    valid: dict[str, Tensor] = {}
    for name, mask in zip(names, inputs, strict=True):
        if not name.endswith("attention_mask") or mask.ndim != 2:
            continue
        for output, want in expected:
            if want.shape[:2] == mask.shape:
                inside = (mask != 0).reshape(*mask.shape, *[1] * (want.ndim - 2))
                valid[output] = inside & valid.get(output, torch.ones_like(inside))
    return valid


# --- the comparison -------------------------------------------------------------------------------


_log = logging.getLogger("lora_fx")

# Tolerances relative to the largest magnitude of the output. In half precision they allow about twenty
# roundings to 11 or 8 bits (2⁻¹¹ and 2⁻⁸), which is the error of a deep network whose operations each round
# once. In single precision (2⁻²⁴) they are far above the rounding; long sums in another order differ most.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

# An output with a smaller magnitude counts as zero, and its difference is divided by this instead.
_SMALLEST_SCALE = 1e-3


class PrecisionError(ParityError):
    """Error for a model whose outputs are wrong in the precision of the export."""


@dataclass(frozen=True)
class Compared:
    """One output of one call: the reference and the result to judge.

    Attributes:
        name: Name of the output.
        want: The reference.
        got: The result that is judged, of the same shape.
        precision: The coarsest dtype in which ``got`` was computed.
        valid: Mask of the positions that count, expandable to the shape; None for all.
        tolerance: Largest difference; None for the tolerance of the precision.
    """

    name: str
    want: Tensor
    got: Tensor
    precision: torch.dtype
    valid: Tensor | None = None
    tolerance: float | None = None

    @property
    def admitted(self) -> Tensor:
        """Tensor ``got``, with the values of ``want`` at the positions that do not count."""
        if self.valid is None:
            return self.got
        return torch.where(self.valid.bool(), self.got, self.want.to(self.got.dtype))


def difference(output: Compared) -> OutputParity:
    """Return the differences of an output and its tolerance, which is 0 for integers and booleans."""
    want, got = output.want, output.admitted
    tolerance = TOLERANCES[output.precision] if output.tolerance is None else output.tolerance
    tolerance = tolerance if want.is_floating_point() else 0.0
    left, right = want.detach().double(), got.double()
    if got.is_floating_point():
        # Masks are filled with the lowest number of their dtype, which differs between dtypes.
        limit = torch.finfo(got.dtype).max
        left = torch.where(left.isfinite(), left.clamp(-limit, limit), left)
    error, scale = largest_difference(right, left)
    return OutputParity(output.name, error, error / max(scale, _SMALLEST_SCALE), tolerance)


def overflows(output: Compared) -> bool:
    """Return True if ``got`` is inf or nan at a position that counts and ``want`` is finite there."""
    if not output.got.is_floating_point():
        return False
    return bool((output.want.isfinite() & ~output.admitted.isfinite()).any())


def _judged(row: OutputParity, output: Compared, narrow: Tensor, shapes: str) -> OutputParity:
    """Decide if differences of a half-precision output come from the precision or from the file.

    ONNX Runtime's CPU provider computes half operations in fp32 and skips roundings between them. PyTorch
    rounds each operation, as a GPU does.

    Args:
        row: Differences of the file from the reference.
        output: The compared tensors; the precision is fp16 or bf16.
        narrow: Output of PyTorch in that precision.
        shapes: Shapes of the inputs, for the message.

    Returns:
        The row, with the difference of PyTorch from the reference.

    Raises:
        PrecisionError: The file or PyTorch overflows, or both exceed the tolerance.
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
            f"{short} differs from fp32 by {_described(own)}"
        )
        if row.max_rel_error > row.tolerance:
            raise PrecisionError(
                f"{words}, that of the file by {_described(row)}; nothing was written. Export it in "
                f"another precision"
            )
        _log.warning("%s; the file is checked on a provider that rounds less often", words)
    return dataclasses.replace(row, pytorch_rel_error=own.max_rel_error)


def _described(row: OutputParity) -> str:
    """Return the differences of a row in words."""
    return (
        f"{row.max_abs_error:.2e} ({row.max_rel_error:.2e} of its largest value, allowed "
        f"{row.tolerance:.0e})"
    )


# The reference of a file: the model, or for a half-precision model the same model in fp32.
#
# A half-precision model in PyTorch is a poor reference for one in ONNX Runtime, because both have rounding
# errors of the same size. So the weights, already rounded to half precision, are widened exactly, and the
# model computes with them in fp32. Only the arithmetic of the file then differs, which the tolerance of its
# precision has to cover. The caller asked for the rounding of the weights.

_HALF = (torch.bfloat16, torch.float16)  # the coarser one first


class Reference(Protocol):
    """Model that a file is compared with.

    Attributes:
        precision: The coarsest floating dtype of the model, which sets the tolerance.
        description: The reference in words, for the report.
        tolerance: Largest difference of a file with quantized weights; None for the default of the precision.
    """

    precision: torch.dtype
    description: str
    tolerance: float | None

    @property
    def model(self) -> nn.Module:
        """Model that computes the expected outputs."""
        ...

    def named(self, tensors: Sequence[Tensor]) -> Outputs:
        """Return the expected outputs of a call. Integers and booleans are not from a model cast to fp32."""
        ...

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        """Return ``call(model, *args, **kwargs)`` in the precision of ``named``."""
        ...

    def narrow(self, tensors: Sequence[Tensor]) -> Outputs | None:
        """Return the half-precision outputs of a model whose reference is a cast to fp32, else None."""
        ...


class ModelReference:
    """Reference of one model; see :class:`Reference`.

    Args:
        exported: The model that was exported, alone or with an adapter.
        casts: Cache of the weights that are widened to fp32.
        tolerance: Largest difference; None for the tolerance of the precision.
    """

    def __init__(self, exported: FlatModel, casts: Casts, tolerance: float | None = None) -> None:
        self._exported = exported
        self.tolerance = tolerance
        over = (
            ", over the values of its quantized weights"
            if any(isinstance(module, StandIn) for module in exported.model.modules())
            else ""
        )
        self._wide: FlatModel | None = None
        self.precision = _coarsest(exported)
        self.description = f"the model in PyTorch{over}"
        if self.precision not in _HALF:
            return
        rounded = str(self.precision).removeprefix("torch.")
        copy = share_copy(exported.model)
        cast_model(copy, torch.float32, casts, of=_HALF)
        wide = exported.over(copy.eval())
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
        """Model that computes the expected outputs."""
        return (self._wide or self._exported).model

    def named(self, tensors: Sequence[Tensor]) -> Outputs:
        """Return the expected outputs of a call. Integers and booleans are not from a model cast to fp32."""
        if self._wide is None:
            return self._exported.named(tensors)
        wide = self._wide.named(cast_floating(tensors, torch.float32))
        if all(value.is_floating_point() for _, value in wide):
            return wide
        # An argmax over rounded values may differ, so fp32 is no reference for it.
        own = self._exported.named(tensors)
        return [
            (name, exact if exact.is_floating_point() else narrow)
            for (name, exact), (_, narrow) in zip(wide, own, strict=True)
        ]

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        """Return ``call(model, *args, **kwargs)`` in the precision of ``named``."""
        if self._wide is None:
            return self._exported.run(call, *args, **kwargs)
        named = {key: _wide_argument(value) for key, value in kwargs.items()}
        return self._wide.run(call, *map(_wide_argument, args), **named)

    def narrow(self, tensors: Sequence[Tensor]) -> Outputs | None:
        """Return the half-precision outputs of a model whose reference is a cast to fp32, else None."""
        return None if self._wide is None else self._exported.named(tensors)


def _wide_argument(value: Any) -> Any:
    return cast_floating([value], torch.float32)[0] if isinstance(value, Tensor) else value


def _coarsest(exported: FlatModel) -> torch.dtype:
    model = exported.model
    tensors = (*model.parameters(), *model.buffers(), *exported.arguments.tensors)
    present = {tensor.dtype for tensor in tensors}
    return next((dtype for dtype in _HALF if dtype in present), torch.float32)


@dataclass
class Parity:
    """Result of comparing a file with PyTorch.

    Attributes:
        reference: The reference in words.
        rows: Differences by output.
        tried: The shapes that ran.
        skipped: The shapes that PyTorch refused, with reasons.
        note: Remark on the values that were tried, "" for fresh values.
        provider: Execution provider of the comparison.
        reason: Reason why there was no comparison, else "".
    """

    reference: str = ""
    rows: dict[str, OutputParity] = field(default_factory=dict)
    tried: list[Sizes] = field(default_factory=list)
    skipped: dict[Sizes, str] = field(default_factory=dict)
    note: str = ""
    provider: str = ""
    reason: str = ""


_Run: TypeAlias = Callable[[list[Tensor]], dict[str, Any]]
"""Function that runs a file: it takes the tensors of a call and returns outputs by name."""


def _check_parity(model: Reference, trace: Trace, run: _Run, cases: Cases | None = None) -> Parity:
    """Compare a file with the model on fresh inputs.

    Args:
        model: The reference.
        trace: The trace that the file was made from.
        run: Runs the file, from tensors to outputs by name.
        cases: The calls to compare; None to draw them by axis.

    Raises:
        PrecisionError: The model itself is wrong in the precision of the file.
        ParityError: An output differs by more than its tolerance, or ONNX Runtime refuses a shape
            that PyTorch takes.
    """
    parity = Parity(model.description)
    for case in drawn_cases(model, trace, parity.skipped) if cases is None else cases(model):
        sizes = tuple(tuple(tensor.shape) for tensor in case.inputs)
        if sizes in parity.tried:
            continue
        try:
            _compare(parity, model, trace, sizes, case, run)
        except EmptyAxisError as error:  # the session refuses such calls, too
            parity.skipped[sizes] = str(error)
            continue
        parity.tried.append(sizes)
        parity.note = case.note or parity.note
    if not parity.tried:
        raise ParityError(f"there is no call to compare: {next(iter(parity.skipped.values()), '')}")
    return parity


def _compare(
    parity: Parity, model: Reference, trace: Trace, sizes: Sizes, case: Case, run: _Run
) -> None:
    names = trace.arguments.names
    shapes = ", ".join(f"{name} {list(size)}" for name, size in zip(names, sizes, strict=True))
    try:
        actual = run(list(case.inputs))
    except EmptyAxisError:
        raise
    except ExportError as error:
        raise ParityError(
            f"PyTorch runs on {shapes}, the file does not: {error}. Fix that axis with "
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
        valid = case.valid.get(name)
        output = Compared(name, want, got, model.precision, valid, model.tolerance)
        row = difference(output)
        if name in narrow:
            row = _judged(row, output, narrow[name], shapes)
        parity.rows[name] = worse(parity.rows.get(name, row), row)
        if row.max_rel_error > row.tolerance:
            raise ParityError(
                f"output '{name}' of the exported file differs from {model.description} by "
                f"{_described(row)} on {shapes}; nothing was written"
            )


# Ranks of the random adapters. Rank 1 is included because an axis of size 1 may be broadcast by mistake.
_RANDOM_RANKS = (3, 1)


class Loaded(Protocol):
    """A written file in its runtime.

    Attributes:
        provider: The runtime in words.
    """

    provider: str

    @property
    def inputs(self) -> Sequence[Any]:
        """The inputs of the call, with name and dtype."""

    @property
    def max_rank(self) -> int | None:
        """The highest rank of an adapter, or None."""

    def run(self, tensors: list[Tensor], *, adapter: Any = None) -> dict[str, Any]:
        """Return the outputs of a call by name."""

    def load_adapter(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Add an adapter."""

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter."""


def _check(
    prepared: Prepared,
    traced: Trace,
    session: Loaded | OnnxSession,
    casts: Casts,
    *,
    max_rank: int | None = None,
    tolerance: float | None = None,
) -> Parity:
    """Compare the file with PyTorch: alone, with every adapter of the model, and with random adapters.

    The reference of a random adapter has its factors folded into the weights, so that it shares no code
    with the traced graph. The file alone is compared again after each adapter. Memory that a kernel never
    writes then holds the adapter's leftovers instead of the zeros of a new process.

    Args:
        prepared: The model.
        traced: The trace that the file was made from.
        session: The file.
        casts: Cache of the fp32 weights for the references of a half-precision file.
        max_rank: The highest rank that the file takes; None for any.
        tolerance: Largest difference; None for the tolerance of the precision.

    Raises:
        PrecisionError: The model, or an adapter, is wrong in the precision of the file.
        ParityError: An output differs; the message names the adapter.
    """

    def taken(tensors: Sequence[Tensor]) -> list[Tensor]:
        # The file of a runtime may take fp32 although the model takes half precision. No value changes.
        pairs = zip(tensors, session.inputs, strict=True)
        return [tensor.to(getattr(torch, port.dtype)) for tensor, port in pairs]

    alone = None
    manifest = prepared.manifest
    if manifest is not None and manifest.required and manifest.bank is None:
        alone = "base"
        session.load_adapter(alone, {**manifest.no_adapter(), **prepared.base_values()})

    def run(tensors: list[Tensor], adapter: str | None = alone) -> dict[str, Any]:
        return session.run(taken(tensors), adapter=adapter)

    def compare_adapter(label: str, model: Reference, values: Mapping[str, Tensor]) -> None:
        session.load_adapter(label, values)
        with_it = functools.partial(run, adapter=label)
        parity.rows |= _labeled(label, _rows_of(f"with {label}", model, traced, with_it, prepared))
        session.unload_adapter(label)

    reference = functools.partial(ModelReference, casts=casts, tolerance=tolerance)
    base = reference(prepared.base)
    parity = _check_parity(base, traced, run, prepared.cases)
    if manifest is None:
        return parity
    if isinstance(prepared.model, BankModel):
        assert isinstance(session, OnnxSession)
        return _check_bank(prepared, prepared.model, traced, session, casts, parity, tolerance)
    assert isinstance(prepared.model, FactorModel)
    for name, active in prepared.adapters.items():
        assert prepared.source is not None
        values = _in_range(name, manifest, values_of_model(prepared.source, name))
        compare_adapter(f"adapter {name!r}", reference(active()), values)
    for rank in _RANDOM_RANKS:
        if max_rank is not None and rank > max_rank:
            continue
        values = _random_values(prepared.model, manifest, rank, max_rank=max_rank)
        label = f"a random adapter of rank {rank}"
        model = reference(_Adapted(prepared.model, values, casts.keep))
        compare_adapter(label, model, values)
        rows = _rows_of(f"alone, after a run with {label}", base, traced, run, prepared)
        parity.rows |= {name: worse(parity.rows[name], row) for name, row in rows.items()}
    return parity


def _rows_of(
    label: str, model: Reference, traced: Trace, run: _Run, prepared: Prepared
) -> dict[str, OutputParity]:
    """Return the differences of a file from a reference, by output. An error begins with ``label``."""
    try:
        return _check_parity(model, traced, run, prepared.cases).rows
    except ParityError as error:
        raise type(error)(f"{label}: {error}") from error


def _labeled(label: str, rows: Mapping[str, OutputParity]) -> dict[str, OutputParity]:
    """Return the differences of outputs with ``label``, the adapter, added to each name."""
    names = {name: f"{name} with {label}" for name in rows}
    return {names[name]: dataclasses.replace(row, name=names[name]) for name, row in rows.items()}


def _random_values(
    model: FactorModel, manifest: Manifest, rank: int, seed: int = 0, max_rank: int | None = None
) -> dict[str, Tensor]:
    """Return a random adapter with zeros for the biases in ``model.loose_biases()``."""
    values = random_factors(manifest, rank, seed, max_rank)
    return values | {name: torch.zeros_like(values[name]) for name in model.loose_biases()}


class _RowsReference:
    """Reference for a batch whose rows have different adapters; see :class:`Reference`.

    The model of each adapter runs the whole batch, and each row is taken from its own model. No code of a
    bank runs.

    Args:
        rows: The reference of each row. A larger batch repeats them.
    """

    def __init__(self, rows: Sequence[Reference]) -> None:
        self._rows = rows
        self.precision = rows[0].precision
        self.description = rows[0].description
        self.tolerance = rows[0].tolerance

    @property
    def model(self) -> nn.Module:
        return self._rows[0].model

    def named(self, tensors: Sequence[Tensor]) -> Outputs:
        return _mixed_outputs(self._each(tensors, lambda reference: reference.named(tensors)))

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        arguments = (*args, *kwargs.values())
        return _select_rows(
            self._each(arguments, lambda reference: reference.run(call, *args, **kwargs))
        )

    def narrow(self, tensors: Sequence[Tensor]) -> Outputs | None:
        outputs = self._each(tensors, lambda reference: reference.narrow(tensors))
        return None if outputs[0] is None else _mixed_outputs(outputs)

    def _each(self, arguments: Sequence[Any], make: Callable[[Reference], Any]) -> list[Any]:
        """Return the result of ``make`` for each row of a batch. It runs once for each reference."""
        count = next(len(value) for value in arguments if isinstance(value, Tensor) and value.dim())
        results: dict[int, Any] = {}
        rows = [self._rows[row % len(self._rows)] for row in range(count)]
        for reference in rows:
            if id(reference) not in results:
                results[id(reference)] = make(reference)
        return [results[id(reference)] for reference in rows]


def _mixed_outputs(outputs: Sequence[Outputs]) -> Outputs:
    return [
        (name, _select_rows([values[index][1] for values in outputs]))
        for index, (name, _) in enumerate(outputs[0])
    ]


def _select_rows(values: Sequence[Any]) -> Any:
    """Build a batch whose row n is row n of ``values[n]``, also in containers. Other values become None."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat([value[row : row + 1] for row, value in enumerate(values)])
    if isinstance(first, Mapping):
        mixed = {key: _select_rows([value[key] for value in values]) for key in first}
        return mixed if type(first) is dict else type(first)(**mixed)
    if isinstance(first, list | tuple):
        return type(first)(_select_rows(parts) for parts in zip(*values, strict=True))
    return None


def _check_bank(
    prepared: Prepared,
    model: BankModel,
    traced: Trace,
    session: OnnxSession,
    casts: Casts,
    parity: Parity,
    tolerance: float | None,
) -> Parity:
    """Compare a file that has a bank: each adapter for all rows, then a different adapter for each row.

    Args:
        prepared: The model.
        model: The traced model.
        traced: The trace that the file was made from.
        session: The file.
        casts: Cache of the fp32 weights for the references of a half-precision file.
        parity: Result for the file alone.
        tolerance: Largest difference; None for the tolerance of the precision.

    Raises:
        PrecisionError, ParityError: As :func:`_check`.
    """
    assert prepared.manifest is not None
    make = functools.partial(ModelReference, casts=casts, tolerance=tolerance)
    manifest, base = prepared.manifest, make(prepared.base)
    batched = model.batched

    def compare(label: str, rows: Sequence[tuple[str | None, Reference]]) -> None:
        def run(tensors: list[Tensor]) -> dict[str, Any]:
            names = [rows[row % len(rows)][0] for row in range(len(tensors[batched]))]
            return session.run(tensors, adapter=names if len(rows) > 1 else names[0])

        reference = rows[0][1] if len(rows) == 1 else _RowsReference([part for _, part in rows])
        parity.rows |= _labeled(label, _rows_of(f"with {label}", reference, traced, run, prepared))

    own: list[tuple[str | None, Reference]] = []
    for name, active in prepared.adapters.items():
        assert prepared.source is not None
        _in_range(name, manifest, values_of_model(prepared.source, name))
        own.append((name, make(active())))
        compare(f"adapter {name!r}", own[-1:])
    if own:
        compare("an adapter for each row", [*own, (None, base)])
    if manifest.required:  # no others can be loaded
        return parity
    for name in session.adapters:
        session.unload_adapter(name)
    drawn: list[tuple[str | None, Reference]] = [(None, base)]
    ranks = (max(1, model.bank.rank - 1), 1)[: model.bank.capacity]
    for seed, rank in enumerate(ranks):
        values = _random_values(model, manifest, rank, seed)
        name = f"random {seed}"
        session.load_adapter(name, values)
        drawn.append((name, make(_Adapted(model.single, values, casts.keep))))
        compare(f"a random adapter of rank {rank}", drawn[-1:])
    compare("a random adapter for each row", drawn[::-1])
    return parity


def _in_range(adapter: str, manifest: Manifest, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of an adapter in the dtypes of the file. Raise if one overflows."""
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


class _Adapted(FlatModel):
    """Model with the same adapter at every call, folded into its weights if possible.

    An adapter cannot be folded into quantized weights, and half precision is no reference. In these cases the
    factors are passed to the traced model.
    """

    def __init__(self, model: FactorModel, values: Mapping[str, Tensor], keep: Keep) -> None:
        super().__init__(model.model, model.arguments, model.call)
        self._flat = model
        self._values = values
        self._keep = keep
        inputs = model.adapter_inputs
        self._factors = [
            values[factor.name].to(model.device, getattr(torch, factor.dtype)) for factor in inputs
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
        return self._flat.call_with_factors(self._factors, call, *args, **kwargs)

    def _merged(self) -> FlatModel | None:
        if any(factor.dtype in ("float16", "bfloat16") for factor in self._flat.adapter_inputs):
            return None
        if any(isinstance(module, StandIn) for module in self.model.modules()):
            return None
        try:
            return self._flat.merged(self._factors, self._keep)
        except MergeError as error:
            _log.info("a random adapter is compared unmerged: %s", error)
            return None


def verify(
    prepared: Prepared,
    traced: Trace,
    file: Path,
    keep: Keep,
    *,
    large: bool = False,
    loaded: Loaded | None = None,
    tolerance: float | None = None,
) -> Parity:
    """Run a file and the model that it was made from on the same fresh inputs.

    Args:
        prepared: The model.
        traced: The trace that the file was made from.
        file: The written file.
        keep: Called with each new weight of the reference, see ``Scratch.keep``.
        tolerance: Largest difference of an output; None for the tolerance of the precision.
        large: Leave the weights in the file and map it into memory, which is slower.
        loaded: The file in its runtime; None to load an ONNX file in ONNX Runtime.

    Raises:
        ParityError: The outputs differ.
        ConversionError: ONNX Runtime refuses the file.
        ProviderError: There is no ONNX Runtime.
    """
    casts = Casts(keep)  # shared, because all references have the same weights
    if loaded is not None:
        parity = _check(
            prepared, traced, loaded, casts, max_rank=loaded.max_rank, tolerance=tolerance
        )
        return dataclasses.replace(parity, provider=loaded.provider)
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
            return Parity(reason=reason)
    except ExportError as error:
        raise ConversionError(
            f"ONNX Runtime refuses the exported file, so nothing was written: {error.__cause__}"
        ) from error
    parity = _check(prepared, traced, session, casts, tolerance=tolerance)
    return dataclasses.replace(parity, provider=session.provider)
