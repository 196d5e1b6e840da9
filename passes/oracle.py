"""Comparison of an adapted model with the dense model, whose weights are ``W' = W + s · BA``.

Both are copies with random factors. Parameters of the base that are all zero get random values, because
zeros would hide differences in earlier layers. One forward of each model and one backward test all sites:
which did not run, which have no gradient, and if the outputs are equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError, ConfigError, MergeError, some
from lora_fx.formats import quantization_of
from lora_fx.ir import PlannedSite, Record, record_of, require_record
from lora_fx.kinds import Slot, kind_of
from lora_fx.passes.capture import relative_difference, run_once
from lora_fx.passes.effective import arm
from lora_fx.passes.graph import is_lazy, is_partitioned, share_copy
from lora_fx.passes.merge import delta_weight, merge
from lora_fx.passes.parameters import (
    factor_names,
    factors_of,
    inside,
    is_sharded,
    rows_name,
    tokens_of,
)
from lora_fx.runtime import watch
from lora_fx.runtime.modules import AdapterModule
from lora_fx.runtime.rows import tensors_in

__all__ = ["CheckReport", "check", "check_rewritten"]

_log = logging.getLogger("lora_fx")

# Relative to the largest value of an output: the effect of one rounding after a few layers.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}
_QUANTIZED = 5e-2  # larger, because kernels of 8 bits round their inputs, too
_CHANGE = 0.2  # size of random changes, relative to the root mean square of a weight
_LIMIT = 1 << 28  # elements of adapted weights up to which a rewrite runs the check
_BLAMED = 64
_SEED = 0
# Operators that select elements by size, each with the index of the result that has the selected indices.
_CHOICES: Mapping[str, int] = {
    "argmax": 0,
    "argmin": 0,
    "argsort": 0,
    "max": 1,
    "min": 1,
    "sort": 1,
    "topk": 1,
}


# By site and adapter: modules that hold its parameters, their names there, and the former parameters.
_Places = dict[tuple[str, str], list[tuple[nn.Module, str, nn.Parameter]]]


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """Result of :func:`check`.

    Attributes:
        sites: Number of sites of the active adapters.
        error: Largest difference from the dense model, relative to the largest value of the output.
        tolerance: Largest error allowed.
        not_run: Sites whose adapter did not run on these inputs.
        no_gradient: Sites that ran but whose factors got no gradient, because their output is detached.
        no_effect: Sites whose gradient is zero, because no output of the model depends on them.
    """

    sites: int
    error: float
    tolerance: float
    not_run: tuple[str, ...] = ()
    no_gradient: tuple[str, ...] = ()
    no_effect: tuple[str, ...] = ()

    def __str__(self) -> str:
        numbers = f"relative difference {self.error:.2g}, tolerance {self.tolerance:.2g}"
        lines = [f"{self.sites} site(s): the outputs are those of the dense weights ({numbers})"]
        for words, names in (
            ("did not run", self.not_run),
            ("got no gradient", self.no_gradient),
            ("had no effect", self.no_effect),
        ):
            lines += [f"{words}: {some(names, 6)}"] if names else []
        return "\n".join(lines)


class _CannotTell(Exception):
    """Error for a model that cannot be compared with its dense model. The message is the reason."""


@inside
def check(model: nn.Module, example_inputs: Any) -> CheckReport:
    """Compare an adapted model with the dense one, in which each weight is ``W' = W + s · BA``.

    Both run as copies in evaluation mode, with random factors. The argument is not changed. Both select the
    same experts in a mixture of experts. ``rewrite`` runs this check on its example inputs, unless the
    model is large. The check needs memory for a second copy of the adapted weights.

    Args:
        model: A rewritten model with active adapters.
        example_inputs: A tuple (args), a dict (kwargs) or a tensor: one call of the model.

    Returns:
        The report. Its ``str()`` has a line for each finding.

    Raises:
        ConfigError: If the model is not rewritten, or has no active adapter for the whole batch.
        CaptureError: If the outputs differ, with the sites that cause it; if code reads an adapted
            weight past its adapter; or if two runs on the same inputs differ.
        MergeError: If an adapter cannot be made dense (a bias on B without one in the base).
    """
    record = require_record(model)
    if not record.active or record.per_sample:
        raise ConfigError(
            "check compares adapters that are active for the whole batch: choose them with "
            "lora_fx.set_adapter(model, names)"
        )
    try:
        return _compare(model, record, example_inputs)
    except _CannotTell as reason:
        raise CaptureError(f"the model cannot be checked: {reason}") from reason


def check_rewritten(model: nn.Module, example_inputs: Any) -> None:
    """Run :func:`check` on a model that was just rewritten, unless it cannot be compared.

    Raises:
        CaptureError: If the outputs are not those of the dense weights, or the inputs do not fit.
    """
    record = require_record(model)
    weights = {
        row.site.weight: row.site.weight_shape
        for name in record.active
        for row in record.adapters[name].sites
    }
    if sum(map(math.prod, weights.values())) > _LIMIT:
        run_once(share_copy(model), example_inputs)
        return
    try:
        report = _compare(model, record, example_inputs)
    except (_CannotTell, MergeError) as reason:
        _log.info("not compared with the dense model: %s", reason)
        run_once(share_copy(model), example_inputs)
        return
    for words, names in (("did not run", report.not_run), ("had no effect", report.no_effect)):
        if names:
            _log.info("adapters that %s on the example inputs: %s", words, some(names, 6))


def _compare(model: nn.Module, record: Record, example_inputs: Any) -> CheckReport:
    rows = [(row, name) for name in record.active for row in record.adapters[name].sites]
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise _CannotTell(f"{name} is on the meta device: load its values first")
        if is_sharded(parameter) or is_partitioned(parameter):
            raise _CannotTell(
                f"{name} is cut over several processes: check the adapter on a model that is whole "
                "(lora_fx.load_adapter)"
            )
    adapted = share_copy(model)
    _randomize_zeros(adapted)
    start = _randomize(adapted, rows) | _randomize_tokens(adapted, record)
    dense = merge(adapted)[0]
    _check_merge(adapted, dense, rows, record)
    # The weights require gradients, like the factors: a forward may ask whether its input does.
    for row, _ in rows:
        weight = dense.get_parameter(row.site.weight)
        if quantization_of(weight) is None:
            weight.requires_grad_(weight.is_floating_point())
    choices = _Choices()
    with torch.enable_grad(), choices:
        expected = [output.detach() for output in _floats(run_once(dense, example_inputs))]
    if not expected:
        raise _CannotTell("it returns no floating-point tensor")
    for row, name in rows:
        for factor in factors_of(adapted, row, name).present:
            factor.requires_grad_()
    arm(adapted)
    with torch.enable_grad(), watch.reading(adapted) as read, choices.replayed():
        actual = _floats(run_once(adapted, example_inputs))
    tolerance = _tolerance(adapted, expected)
    error = relative_difference(actual, expected)
    if not error <= tolerance:
        with torch.enable_grad():
            error, tolerance = _judge_difference(
                adapted, dense, start, example_inputs, (actual, expected), tolerance
            )
    watch.mark_checked(model)
    return _report(adapted, rows, read, actual, error, tolerance)


def _report(
    adapted: nn.Module,
    rows: Sequence[tuple[PlannedSite, str]],
    read: frozenset[str] | set[str],
    outputs: Sequence[torch.Tensor],
    error: float,
    tolerance: float,
) -> CheckReport:
    generator = torch.Generator().manual_seed(_SEED)
    wanting = [output for output in outputs if output.requires_grad]
    if wanting:
        gradients_in = [
            torch.randn(output.shape, generator=generator).to(output) for output in wanting
        ]
        torch.autograd.backward(wanting, gradients_in)
    not_run, without, idle = [], [], []
    for row, name in rows:
        gradients = [factor.grad for factor in factors_of(adapted, row, name).present]
        if row.site.weight not in read:
            not_run.append(row.name)
        elif all(gradient is None for gradient in gradients):
            without.append(row.name)
        elif not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            idle.append(row.name)
    names = (tuple(dict.fromkeys(group)) for group in (not_run, without, idle))
    return CheckReport(len(rows), error, tolerance, *names)


# --- copies with random values ------------------------------------------------------------------------


def _randomize_zeros(model: nn.Module) -> None:
    """Replace all-zero parameters of the base by random ones. Zeros would hide errors in earlier layers."""
    generator = torch.Generator().manual_seed(_SEED)
    replacements: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, AdapterModule):
            continue
        for name, old in module._parameters.items():
            if old is None or is_lazy(old) or not old.is_floating_point():
                continue
            if quantization_of(old) is not None or not _is_zero(old):
                continue
            if id(old) not in replacements:
                values = 0.1 * torch.randn(old.shape, generator=generator)
                replacements[id(old)] = nn.Parameter(values.to(old), requires_grad=False)
            module._parameters[name] = replacements[id(old)]


def _is_zero(tensor: torch.Tensor) -> bool:
    first = tensor[:1] if tensor.dim() else tensor  # enough for most weights, and faster
    return bool(tensor.numel()) and not (bool(first.any()) or bool(tensor.any()))


def _randomize(model: nn.Module, rows: Sequence[tuple[PlannedSite, str]]) -> _Places:
    """Replace the factors of every site by random ones, whose product is a fraction of the weight.

    Returns:
        The former factors and their modules, by site and adapter.
    """
    generator = torch.Generator().manual_seed(_SEED)
    before: _Places = {}
    replacements: dict[int, nn.Parameter] = {}
    for row, adapter in rows:
        holder, names = model.get_submodule(row.site.holder), factor_names(row)
        slots = {slot.name: slot for slot in kind_of(row).slots(row.site)}
        trained = [name for name in names.present if name not in slots or slots[name].trained]
        weight = model.get_parameter(row.site.weight)
        size = 1.0 if quantization_of(weight) is not None else _size(weight)
        parts = [holder.get_submodule(name) for name in trained]
        before[row.name, adapter] = [(part, adapter, part.get_parameter(adapter)) for part in parts]
        for name, part in zip(trained, parts, strict=True):
            old = part.get_parameter(adapter)
            if id(old) not in replacements:
                noise = torch.randn(old.shape, generator=generator).to(old)
                moved = _moved(slots.get(name), old.detach(), noise, row, size)
                replacements[id(old)] = nn.Parameter(moved, requires_grad=False)
            part._parameters[adapter] = replacements[id(old)]
    return before


def _randomize_tokens(model: nn.Module, record: Record) -> _Places:
    """Add noise to the embedding rows that adapters train. Returns the same as :func:`_randomize`."""
    generator = torch.Generator().manual_seed(_SEED)
    before: _Places = {}
    for adapter in record.active:
        for row in record.adapters[adapter].tokens:
            old = tokens_of(model, row, adapter)
            noise = torch.randn(old.shape, generator=generator).to(old)
            values = old.detach() + _CHANGE * max(_size(old), 1e-2) * noise
            part = model.get_submodule(rows_name(row, adapter).rpartition(".")[0])
            part._parameters[adapter] = nn.Parameter(values, requires_grad=False)
            before[row.name, adapter] = [(part, adapter, old)]
    return before


def _moved(
    slot: Slot | None,
    old: torch.Tensor,
    noise: torch.Tensor,
    row: PlannedSite,
    size: float,
) -> torch.Tensor:
    """Return a factor or slot with random noise, whose size keeps the change of the weight moderate."""
    if slot is not None and slot.multiplies:
        return old * (1 + _CHANGE * noise.clamp(-2, 2))
    if slot is not None:
        return old + _CHANGE * noise * max(size, 1e-2)
    # The noise has the same size in both factors, and is added to the initial values.
    each = math.sqrt(_CHANGE * max(size, 1e-3) / (abs(row.scale) or 1.0) / math.sqrt(row.rank))
    return old + noise * each


def _size(values: torch.Tensor) -> float:
    """Return the root mean square of some values."""
    return float(values.detach().float().square().mean().sqrt()) if values.numel() else 0.0


def _check_merge(
    adapted: nn.Module,
    dense: nn.Module,
    rows: Sequence[tuple[PlannedSite, str]],
    record: Record,
) -> None:
    """Raise if a merged weight is not W + s · BA. Weights without a plain branch are skipped.

    One weight of each form is enough, because equal layers are merged in the same way.
    """
    every: dict[str, list[tuple[PlannedSite, str]]] = {}
    for row, name in rows:
        every.setdefault(row.site.weight, []).append((row, name))
    seen: set[tuple[object, ...]] = set()
    for weight, adapters in every.items():
        form = tuple(
            (row.site.form, row.site.weight_shape, row.kind, name) for row, name in adapters
        )
        if form in seen:
            continue
        seen.add(form)
        own = any(weight in record.adapters[name].own for _, name in adapters)
        old = adapted.get_parameter(weight)
        plain = all(
            not kind_of(row).transforms and row.site.rows is None and row.deploy is None
            for row, _ in adapters
        )
        if own or not plain or quantization_of(old) is not None:
            continue
        total = old.detach().double()
        for row, name in adapters:
            change = delta_weight(adapted, row, name, torch.float64)
            total = total + row.site.stored(change.reshape(row.site.applied_shape))
        merged = dense.get_parameter(weight).detach().double()
        largest = max(float(old.detach().abs().max()), float(total.abs().max()))
        allowed = 4 * torch.finfo(old.dtype).eps * largest
        if float((merged - total).abs().max()) > allowed:
            raise CaptureError(
                f"{adapters[0][0].name}: the merged weight is not W + s · BA. Please report this"
            )


# --- comparing ----------------------------------------------------------------------------------------


def _judge_difference(
    adapted: nn.Module,
    dense: nn.Module,
    start: _Places,
    example_inputs: Any,
    outputs: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    tolerance: float,
) -> tuple[float, float]:
    """Raise if the outputs of two models differ by more than the effect of rounding. Return both numbers.

    To estimate the effect, each weight is changed by one rounding step. The message names the sites that
    cause the difference.

    Raises:
        CaptureError: If the outputs are not those of the dense weights.
    """
    actual, expected = outputs
    error = relative_difference(actual, expected)
    choices = _Choices()
    with choices:
        again = _floats(run_once(dense, example_inputs))
    if relative_difference(again, expected) > tolerance:
        raise _CannotTell("two runs of it on the same inputs give different outputs")
    for parameter in dense.parameters():
        if parameter.is_floating_point() and quantization_of(parameter) is None:
            signs = torch.randint(0, 2, parameter.shape, device=parameter.device) * 2 - 1
            step = torch.finfo(parameter.dtype).eps * signs.to(parameter.dtype)
            # Not in place, because the memory is shared with the user's model.
            parameter.data = parameter.data * (1 + step)
    with choices.replayed():
        rounded = relative_difference(_floats(run_once(dense, example_inputs)), expected)
    tolerance = max(tolerance, 30 * rounded)
    if error <= tolerance:
        return error, tolerance
    blamed = _blamed(adapted, start, example_inputs, tolerance)
    where = f" with an adapter on {some(blamed, 6)}" if blamed else ""
    raise CaptureError(
        f"the adapted model does not compute what its dense weights W + s · BA compute{where}: relative "
        f"difference {error:.3g} on the example inputs. Some code uses these weights past the adapter: leave "
        "the sites out (exclude_modules), try another frontend, and please report this"
    )


def _blamed(
    adapted: nn.Module,
    start: _Places,
    example_inputs: Any,
    tolerance: float,
) -> list[str]:
    """Return the sites whose adapter, without all others, makes the outputs differ from the dense model's."""
    if len(start) > _BLAMED:
        return []
    random = {
        key: [(module, leaf, module.get_parameter(leaf)) for module, leaf, _ in parameters]
        for key, parameters in start.items()
    }
    blamed = []
    for alone in start:
        for key, parameters in start.items():
            for module, leaf, value in random[key] if key == alone else parameters:
                module._parameters[leaf] = value
        choices = _Choices()
        with choices:
            expected = _floats(run_once(merge(adapted)[0], example_inputs))
        with choices.replayed():
            outputs = _floats(run_once(adapted, example_inputs))
        if not relative_difference(outputs, expected) <= tolerance / 10:
            blamed.append(alone[0])
    return blamed


def _tolerance(model: nn.Module, outputs: Sequence[torch.Tensor]) -> float:
    dtypes = {output.dtype for output in outputs}
    dtypes |= {p.dtype for p in model.parameters() if p.dtype in _TOLERANCE}
    worst = max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    record = record_of(model)
    quantized = any(quantization_of(parameter) is not None for parameter in model.parameters())
    quantized = quantized or (record is not None and record.deploys)
    return max(worst, _QUANTIZED) if quantized else worst


def _floats(output: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors of an output, at any depth."""
    strided = (tensor for tensor in tensors_in(output) if tensor.layout is torch.strided)
    return [tensor for tensor in strided if tensor.is_floating_point()]


class _Choices(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Dispatch mode that records selections such as top-k, and replays them in a second run.

    Two scores of a router may be almost equal. Rounding could then select other experts in the second run.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self._noted: list[tuple[str, torch.Tensor]] = []
        self._next: int | None = None

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Replay the recorded selections, as long as the operators run in the same order."""
        self._next = 0
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and record or replay its selection."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _CHOICES or (_CHOICES[name] and not isinstance(result, tuple)):
            return result
        chosen = result[1] if _CHOICES[name] else result
        if not isinstance(chosen, torch.Tensor):
            return result
        if self._next is None:
            self._noted.append((name, chosen.detach().clone()))
            return result
        if self._next >= len(self._noted):
            return result
        noted, indices = self._noted[self._next]
        self._next += 1
        if noted != name or indices.shape != chosen.shape:
            return result
        if not _CHOICES[name]:
            return indices.clone()
        values = args[0]
        dim = _dim(func, args, kwargs or {})
        keep = indices if indices.dim() == values.dim() else indices.unsqueeze(dim)
        taken = values.gather(dim, keep)
        taken = taken if keep is indices else taken.squeeze(dim)
        return taken, indices.clone()


def _dim(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for index, argument in enumerate(torch_private.schema_of(func).arguments):
        if argument.name == "dim":
            dim = (
                args[index] if index < len(args) and not argument.kwarg_only else kwargs.get("dim")
            )
            return -1 if dim is None else int(dim)
    return -1
