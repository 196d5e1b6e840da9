"""Compares a written file with PyTorch, alone and with adapters: with which model, and how closely."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

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

__all__ = [
    "TOLERANCES",
    "Compared",
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
    """Calls that PyTorch takes, with what it makes of them.

    Where there is an attention mask, only positions that it admits count: what a model returns for
    padding is arbitrary.

    Args:
        model: In eval mode.
        trace: Which axes are dynamic.
        skipped: Takes up the shapes that PyTorch refuses, with its words.

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
    """Fresh inputs of the shapes that PyTorch takes, with what it makes of them."""

    model: Checked
    trace: Trace
    skipped: dict[Sizes, str]

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        # By name: axes of one name have one size in the file, whether they were traced as one or not.
        self.order = {
            name: index for index, name in enumerate(dict.fromkeys(self.trace.symbols.values()))
        }
        self.kept: list[str] = []  # inputs whose values are the example's
        self.note = ""

    def accepted(self, resize: _Resize) -> tuple[list[Tensor], Outputs]:
        """All dynamic axes resized, else one by one those that PyTorch lets be resized."""
        every = set(self.order)
        # Sizes that no other axis has show an axis that was taken for another; a model may still
        # need equal ones.
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
        """Use whole numbers of the example: first without the masks, then these, too."""
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
    """The rows of the example, moved by one, repeated for a larger batch.

    Shorter ones lose their end, longer ones repeat their last entry: which is mostly text, where
    markers come first.
    """
    if example.ndim == 0 or example.numel() == 0:
        return example.new_zeros(size) if example.ndim else example
    for axis, wanted in enumerate(size):
        places = torch.arange(wanted, device=example.device)
        have = example.shape[axis]
        places = (places + 1) % have if axis == 0 else places.clamp(max=have - 1)
        example = example.index_select(axis, places)
    return example


def _mask(example: Tensor, size: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    if not bool(((example == 0) | (example == 1)).all()):
        return None
    fresh = torch.ones(size)
    if len(size) == 2 and size[0] > 1:
        # Padding on the right, and no row that is nothing but padding.
        lengths = torch.randint(1, size[1] + 1, (size[0], 1), generator=generator)
        lengths[0] = size[1]
        fresh = (torch.arange(size[1])[None] < lengths).float()
    if example.is_floating_point() and not bool(example.any()):
        return torch.zeros(size)  # an additive mask, in which 0 is what admits a position
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
    """Of each output the positions that all attention masks admit."""
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
    error, scale = largest_difference(right, left)
    return OutputParity(output.name, error, error / max(scale, _SMALLEST_SCALE), tolerance)


def overflows(output: Compared) -> bool:
    """Whether ``got`` is inf or nan at a position that counts where ``want`` is a finite number."""
    if not output.got.is_floating_point():
        return False
    return bool((output.want.isfinite() & ~output.admitted.isfinite()).any())


def _judged(row: OutputParity, output: Compared, narrow: Tensor, shapes: str) -> OutputParity:
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
    """The differences of a row in words."""
    return (
        f"{row.max_abs_error:.2e} ({row.max_rel_error:.2e} of its largest value, allowed "
        f"{row.tolerance:.0e})"
    )


# What a file is compared with: the model, or for a half-precision one the same model in fp32.
#
# A half model run by PyTorch is no measure of a half model run by ONNX Runtime: both are off, by as
# much as either may be. So the weights, as rounded to half precision, are widened again, exactly, and
# the model computes with them in fp32. What then differs is the arithmetic of the file, which the
# tolerance of its precision has to cover; the rounding of the weights is what the caller asked for.

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

    def __init__(self, exported: FlatModel, casts: Casts) -> None:
        self._exported = exported
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


def _coarsest(exported: FlatModel) -> torch.dtype:
    model = exported.model
    tensors = (*model.parameters(), *model.buffers(), *exported.arguments.tensors)
    present = {tensor.dtype for tensor in tensors}
    return next((dtype for dtype in _HALF if dtype in present), torch.float32)


@dataclass
class Parity:
    """How a file was compared with PyTorch.

    Attributes:
        reference: What the file was compared with.
        rows: The differences by output.
        tried: The shapes that ran.
        skipped: Those that PyTorch refused, and why.
        note: What there is to say of the values that were tried, "" for fresh ones.
        provider: Execution provider of the comparison.
        reason: Why there was no comparison, else "".
    """

    reference: str = ""
    rows: dict[str, OutputParity] = field(default_factory=dict)
    tried: list[Sizes] = field(default_factory=list)
    skipped: dict[Sizes, str] = field(default_factory=dict)
    note: str = ""
    provider: str = ""
    reason: str = ""


_Run: TypeAlias = Callable[[list[Tensor]], dict[str, Any]]
"""Runs a file: from the tensors of a call to the outputs by name."""


def _check_parity(model: Reference, trace: Trace, run: _Run, cases: Cases | None = None) -> Parity:
    """Compare a file with the model on fresh inputs.

    Args:
        model: What the file has to agree with.
        trace: What the file was made from.
        run: Runs the file, from tensors to outputs by name.
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
            _compare(parity, model, trace, sizes, case, run)
        except EmptyAxisError as error:  # so the session refuses such calls
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
            row = _judged(row, output, narrow[name], shapes)
        parity.rows[name] = worse(parity.rows.get(name, row), row)
        if row.max_rel_error > row.tolerance:
            raise ParityError(
                f"output '{name}' of the exported file differs from {model.description} by "
                f"{_described(row)} on {shapes}; nothing was written"
            )


# Of the lowest sites. 1 is what the defaults have, too: an axis of size 1 is the one that is taken for
# something to broadcast.
_RANDOM_RANKS = (3, 1)


def _check(prepared: Prepared, traced: Trace, session: OnnxSession, casts: Casts) -> Parity:
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

    def taken(tensors: Sequence[Tensor]) -> list[Tensor]:
        # A runtime's file may take fp32 for what the model takes in half precision: no value changes.
        pairs = zip(tensors, session.inputs, strict=True)
        return [one.to(getattr(torch, port.dtype)) for one, port in pairs]

    def run(tensors: list[Tensor], adapter: str | None = None) -> dict[str, Any]:
        return session.run(taken(tensors), adapter=adapter)

    def compare_adapter(what: str, model: Reference, values: Mapping[str, Tensor]) -> None:
        session.load_adapter(what, values)
        with_it = functools.partial(run, adapter=what)
        parity.rows |= _labeled(what, _rows_of(f"with {what}", model, traced, with_it, prepared))
        session.unload_adapter(what)

    base, manifest = Reference(prepared.base, casts), prepared.manifest
    parity = _check_parity(base, traced, run, prepared.cases)
    if manifest is None:
        return parity
    if isinstance(prepared.model, BankModel):
        return _check_bank(prepared, prepared.model, traced, session, casts, parity)
    assert isinstance(prepared.model, FactorModel)
    for name, active in prepared.adapters.items():
        assert prepared.source is not None
        values = _in_range(name, manifest, values_of_model(prepared.source, name))
        compare_adapter(f"adapter {name!r}", Reference(active(), casts), values)
    for rank in _RANDOM_RANKS:
        values = _random_values(prepared.model, manifest, rank)
        what = f"a random adapter of rank {rank}"
        model = Reference(_Adapted(prepared.model, values, casts.keep), casts)
        compare_adapter(what, model, values)
        again = _rows_of(f"alone, after a run with {what}", base, traced, run, prepared)
        parity.rows |= {name: worse(parity.rows[name], row) for name, row in again.items()}
    return parity


def _rows_of(
    what: str, model: Reference, traced: Trace, run: _Run, prepared: Prepared
) -> dict[str, OutputParity]:
    """The differences of a file as it is run, from a model; an error says what it was run with."""
    try:
        return _check_parity(model, traced, run, prepared.cases).rows
    except ParityError as error:
        raise type(error)(f"{what}: {error}") from error


def _labeled(what: str, rows: Mapping[str, OutputParity]) -> dict[str, OutputParity]:
    """Rows that tell with which adapter they were."""
    labels = {name: f"{name} with {what}" for name in rows}
    return {labels[name]: dataclasses.replace(row, name=labels[name]) for name, row in rows.items()}


def _random_values(
    model: FactorModel, manifest: Manifest, rank: int, seed: int = 0
) -> dict[str, Tensor]:
    """A random adapter, without the biases that no weight can take: who has trained them compares those."""
    values = random_factors(manifest, rank, seed)
    return values | {name: torch.zeros_like(values[name]) for name in model.loose_biases()}


class _RowsReference(Reference):
    """A model whose rows have different adapters: what each adapter's model makes of the whole batch.

    Nothing of a bank is in it.

    Args:
        rows: The reference of each row; a batch of more begins again.
    """

    def __init__(self, rows: Sequence[Reference]) -> None:
        self._rows = rows
        self.precision = rows[0].precision
        self.description = rows[0].description

    @property
    def model(self) -> nn.Module:
        return self._rows[0].model

    def named(self, tensors: Sequence[Tensor]) -> Outputs:
        return _mixed_outputs(self._each(tensors, lambda one: one.named(tensors)))

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        return _mixed(self._each(given, lambda one: one.run(call, *args, **kwargs)))

    def narrow(self, tensors: Sequence[Tensor]) -> Outputs | None:
        made = self._each(tensors, lambda one: one.narrow(tensors))
        return None if made[0] is None else _mixed_outputs(made)

    def _each(self, given: Sequence[Any], make: Callable[[Reference], Any]) -> list[Any]:
        """What is made for each row of a batch, once for each reference."""
        count = next(len(one) for one in given if isinstance(one, Tensor) and one.dim())
        known: dict[int, Any] = {}
        rows = [self._rows[row % len(self._rows)] for row in range(count)]
        for one in rows:
            if id(one) not in known:
                known[id(one)] = make(one)
        return [known[id(one)] for one in rows]


def _mixed_outputs(made: Sequence[Outputs]) -> Outputs:
    return [
        (name, _mixed([values[place][1] for values in made]))
        for place, (name, _) in enumerate(made[0])
    ]


def _mixed(values: Sequence[Any]) -> Any:
    """Row n of value n, of tensors and of mappings and sequences of them; what else there is has no rows."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat([value[row : row + 1] for row, value in enumerate(values)])
    if isinstance(first, Mapping):
        made = {key: _mixed([value[key] for value in values]) for key in first}
        return made if type(first) is dict else type(first)(**made)
    if isinstance(first, list | tuple):
        return type(first)(_mixed(parts) for parts in zip(*values, strict=True))
    return None


def _check_bank(
    prepared: Prepared,
    model: BankModel,
    traced: Trace,
    session: OnnxSession,
    casts: Casts,
    parity: Parity,
) -> Parity:
    """Compare a file with a bank: with each adapter for all rows, and with another one for each row.

    Args:
        prepared: The model.
        model: What was traced.
        traced: What the file was made from.
        session: The file.
        casts: Makes the weights of the references of a half-precision file.
        parity: What came of the file alone.

    Raises:
        PrecisionError, ParityError: As :func:`_check`.
    """
    assert prepared.manifest is not None
    manifest, base = prepared.manifest, Reference(prepared.base, casts)
    place = model.batched

    def compare(what: str, rows: Sequence[tuple[str | None, Reference]]) -> None:
        def run(tensors: list[Tensor]) -> dict[str, Any]:
            names = [rows[row % len(rows)][0] for row in range(len(tensors[place]))]
            return session.run(tensors, adapter=names if len(rows) > 1 else names[0])

        reference = rows[0][1] if len(rows) == 1 else _RowsReference([one for _, one in rows])
        parity.rows |= _labeled(what, _rows_of(f"with {what}", reference, traced, run, prepared))

    own: list[tuple[str | None, Reference]] = []
    for name, active in prepared.adapters.items():
        assert prepared.source is not None
        _in_range(name, manifest, values_of_model(prepared.source, name))
        own.append((name, Reference(active(), casts)))
        compare(f"adapter {name!r}", own[-1:])
    if own:
        compare("an adapter for each row", [*own, (None, base)])
    for name in session.adapters:
        session.unload_adapter(name)
    drawn: list[tuple[str | None, Reference]] = [(None, base)]
    ranks = (max(1, model.bank.rank - 1), 1)[: model.bank.capacity]
    for seed, rank in enumerate(ranks):
        values = _random_values(model, manifest, rank, seed)
        name = f"random {seed}"
        session.load_adapter(name, values)
        drawn.append((name, Reference(_Adapted(model.single, values, casts.keep), casts)))
        compare(f"a random adapter of rank {rank}", drawn[-1:])
    compare("a random adapter for each row", drawn[::-1])
    return parity


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


class _Adapted(FlatModel):
    """A model with the same adapter at every call, folded into its weights where that can be.

    It cannot over quantized weights: there, and in half precision, which is no reference, the traced model
    is handed the factors.
    """

    def __init__(
        self, model: FactorModel, values: Mapping[str, Tensor], keep: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(model.model, model.arguments, model.call)
        self._flat = model
        self._values = values
        self._keep = keep
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


def verify(
    prepared: Prepared,
    traced: Trace,
    file: Path,
    keep: Callable[[Tensor], Tensor],
    *,
    large: bool = False,
) -> Parity:
    """Run a file and the model that it was made from on the same fresh inputs.

    Args:
        prepared: The model.
        traced: What the file was made from.
        file: The written file.
        keep: Takes each weight of the reference that is created, see ``Scratch.keep``.
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
            return Parity(reason=reason)
    except ExportError as error:
        raise ConversionError(
            f"ONNX Runtime refuses the exported file, so nothing was written: {error.__cause__}"
        ) from error
    casts = Casts(keep)  # one for all references: they have the same weights
    parity = _check(prepared, traced, session, casts)
    return dataclasses.replace(parity, provider=session.provider)
