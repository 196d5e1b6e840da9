"""Compares an adapted model with the dense one: ``W' = W + s · BA`` in place of W, on given inputs.

Both are copies, with random factors and random values where the base has nothing but zeros, which would hide
what is behind them. One forward of each and one backward judge all sites: which did not run, which have no
gradient, and whether the outputs are those of the dense weights.
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
from lora_fx.ir import PlannedSite, Record, require_record
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
from lora_fx.runtime import AdapterModule, ops, watch

__all__ = ["CheckReport", "check", "check_rewritten"]

_log = logging.getLogger("lora_fx")

# Relative to the largest value of an output: what a few layers make of one rounding.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}
_QUANTIZED = 5e-2  # kernels of 8 bits round what they are given, too
_CHANGE = 0.2  # of a weight's size
_LIMIT = 1 << 28  # elements of adapted weights that a rewrite makes dense on its own account
_BLAMED = 64
_SEED = 0
# Choices by size, with which of their results is the choice.
_CHOICES: Mapping[str, int] = {
    "argmax": 0,
    "argmin": 0,
    "argsort": 0,
    "max": 1,
    "min": 1,
    "sort": 1,
    "topk": 1,
}


# By site and adapter: modules that hold its parameters, their names in them, and what was there.
_Places = dict[tuple[str, str], list[tuple[nn.Module, str, nn.Parameter]]]


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What :func:`check` has found.

    Attributes:
        sites: Number of sites of the active adapters.
        error: Largest difference from the dense model, relative to the largest value of the output.
        tolerance: What it may be.
        not_run: Sites whose adapter did not run on these inputs.
        no_gradient: Sites that ran, and whose factors got no gradient: their output is detached.
        no_effect: Sites whose gradient is zero: nothing that the model returns depends on them.
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
    """Why a model cannot be compared; the message is for a log or an error."""


@inside
def check(model: nn.Module, example_inputs: Any) -> CheckReport:
    """Compares an adapted model with the dense one, in which each weight is ``W' = W + s · BA``.

    It runs on copies in evaluation mode, with random factors; the argument is not changed. Where a mixture of
    experts chooses, both choose the same. ``rewrite`` does this when it is given example inputs, for models
    that are not large; a large one takes the memory of its adapted weights once more.

    Args:
        model: A rewritten model with active adapters.
        example_inputs: A tuple (args), a dict (kwargs) or a tensor: one call of the model.

    Returns:
        The report; ``str()`` has a line for what is to be looked at.

    Raises:
        ConfigError: If the model is not rewritten, or has no active adapter for the whole batch.
        CaptureError: If the outputs are others, with the sites that make them so; if code reads an adapted
            weight past its adapter; or if the model does not run on the inputs twice with equal results.
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
    """:func:`check` for a model that was just rewritten: one that cannot be compared stays unchecked.

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
    _own_zeros(adapted)
    start = _randomize(adapted, rows) | _randomize_tokens(adapted, record)
    dense = merge(adapted)[0]
    _check_merge(adapted, dense, rows, record)
    choices = _Choices()
    with torch.no_grad(), choices:
        expected = _floats(run_once(dense, example_inputs))
    if not expected:
        raise _CannotTell("it returns no floating-point tensor")
    for row, name in rows:
        for factor in factors_of(adapted, row, name).present:
            factor.requires_grad_()
    arm(adapted)
    with torch.enable_grad(), watch.reading(adapted) as read, choices.replayed():
        found = _floats(run_once(adapted, example_inputs))
    tolerance = _tolerance(adapted, expected)
    error = relative_difference(found, expected)
    if not error <= tolerance:
        with torch.no_grad():
            error, tolerance = _look_again(
                adapted, dense, start, example_inputs, (found, expected), tolerance
            )
    watch.mark_checked(model)
    return _report(adapted, rows, read, found, error, tolerance)


def _report(
    adapted: nn.Module,
    rows: Sequence[tuple[PlannedSite, str]],
    read: frozenset[str] | set[str],
    found: Sequence[torch.Tensor],
    error: float,
    tolerance: float,
) -> CheckReport:
    generator = torch.Generator().manual_seed(_SEED)
    wanting = [one for one in found if one.requires_grad]
    if wanting:
        ones = [torch.randn(one.shape, generator=generator).to(one) for one in wanting]
        torch.autograd.backward(wanting, ones)
    not_run, without, idle = [], [], []
    for row, name in rows:
        gradients = [factor.grad for factor in factors_of(adapted, row, name).present]
        if row.site.weight not in read:
            not_run.append(row.name)
        elif all(one is None for one in gradients):
            without.append(row.name)
        elif not any(one is not None and bool(one.any()) for one in gradients):
            idle.append(row.name)
    names = (tuple(dict.fromkeys(one)) for one in (not_run, without, idle))
    return CheckReport(len(rows), error, tolerance, *names)


# --- copies with random values ------------------------------------------------------------------------


def _own_zeros(model: nn.Module) -> None:
    """Gives parameters of the base that are all zero random values: nothing behind them would be seen."""
    generator = torch.Generator().manual_seed(_SEED)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, AdapterModule):
            continue
        for name, old in module._parameters.items():
            if old is None or is_lazy(old) or not old.is_floating_point():
                continue
            if quantization_of(old) is not None or not old.numel() or bool(old.any()):
                continue
            if id(old) not in made:
                values = 0.1 * torch.randn(old.shape, generator=generator)
                made[id(old)] = nn.Parameter(values.to(old), requires_grad=False)
            module._parameters[name] = made[id(old)]


def _randomize(model: nn.Module, rows: Sequence[tuple[PlannedSite, str]]) -> _Places:
    """Gives every site factors of its own whose product is a fraction of the weight.

    Returns:
        By site and adapter: where the factors that there were have to go back to.
    """
    generator = torch.Generator().manual_seed(_SEED)
    before: _Places = {}
    made: dict[int, nn.Parameter] = {}
    for row, adapter in rows:
        holder, names = model.get_submodule(row.site.holder), factor_names(row)
        slots = {slot.name: slot for slot in kind_of(row).slots(row.site)}
        weight = model.get_parameter(row.site.weight)
        size = 1.0 if quantization_of(weight) is not None else _size(weight)
        parts = [holder.get_submodule(name) for name in names.present]
        before[row.name, adapter] = [(one, adapter, one.get_parameter(adapter)) for one in parts]
        for name, part in zip(names.present, parts, strict=True):
            old = part.get_parameter(adapter)
            if id(old) not in made:
                noise = torch.randn(old.shape, generator=generator).to(old)
                moved = _moved(slots.get(name), old.detach(), noise, row, size)
                made[id(old)] = nn.Parameter(moved, requires_grad=False)
            part._parameters[adapter] = made[id(old)]
    return before


def _randomize_tokens(model: nn.Module, record: Record) -> _Places:
    """Moves the rows of embeddings that adapters train; returns as :func:`_randomize` does."""
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
    if slot is not None and slot.multiplies:
        return old * (1 + _CHANGE * noise.clamp(-2, 2))
    if slot is not None:
        return old + _CHANGE * noise * max(size, 1e-2)
    # Both factors are of one size, whatever they were: what a start has put into them stays in.
    each = math.sqrt(_CHANGE * max(size, 1e-3) / (abs(row.scale) or 1.0) / math.sqrt(row.rank))
    return old + noise * each


def _size(values: torch.Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt()) if values.numel() else 0.0


def _check_merge(
    adapted: nn.Module,
    dense: nn.Module,
    rows: Sequence[tuple[PlannedSite, str]],
    record: Record,
) -> None:
    """Compares merged weights with those that each site's pattern gives, where that is all there is."""
    every: dict[str, list[tuple[PlannedSite, str]]] = {}
    for row, name in rows:
        every.setdefault(row.site.weight, []).append((row, name))
    for weight, several in every.items():
        own = any(weight in record.adapters[name].own for _, name in several)
        old = adapted.get_parameter(weight)
        plain = all(not kind_of(row).transforms and row.site.rows is None for row, _ in several)
        if own or not plain or quantization_of(old) is not None:
            continue
        total = old.detach().double()
        for row, name in several:
            change = delta_weight(adapted, row, name, torch.float64)
            total = total + row.site.stored(change.reshape(row.site.applied_shape))
        merged = dense.get_parameter(weight).detach().double()
        allowed = 4 * torch.finfo(old.dtype).eps * float(total.abs().max())
        if float((merged - total).abs().max()) > allowed:
            raise CaptureError(
                f"{several[0][0].name}: the merged weight is not W + s · BA. Please report this"
            )


# --- comparing ----------------------------------------------------------------------------------------


def _look_again(
    adapted: nn.Module,
    dense: nn.Module,
    start: _Places,
    example_inputs: Any,
    outputs: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    tolerance: float,
) -> tuple[float, float]:
    """Tells a difference from what roundings make of themselves, and names the sites that make it.

    Raises:
        CaptureError: If the outputs are not those of the dense weights.
    """
    found, expected = outputs
    error = relative_difference(found, expected)
    choices = _Choices()
    with choices:
        again = _floats(run_once(dense, example_inputs))
    if relative_difference(again, expected) > tolerance:
        raise _CannotTell("two runs of it on the same inputs give different outputs")
    for parameter in dense.parameters():
        if parameter.is_floating_point() and quantization_of(parameter) is None:
            signs = torch.randint(0, 2, parameter.shape, device=parameter.device) * 2 - 1
            step = torch.finfo(parameter.dtype).eps * signs.to(parameter.dtype)
            # Not in place: the memory is the user's.
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
    """The sites each of which makes a difference alone."""
    if len(start) > _BLAMED:
        return []
    random = {
        key: [(module, leaf, module.get_parameter(leaf)) for module, leaf, _ in held]
        for key, held in start.items()
    }
    found = []
    for alone in start:
        for key, held in start.items():
            for module, leaf, value in random[key] if key == alone else held:
                module._parameters[leaf] = value
        choices = _Choices()
        with choices:
            expected = _floats(run_once(merge(adapted)[0], example_inputs))
        with choices.replayed():
            outputs = _floats(run_once(adapted, example_inputs))
        if not relative_difference(outputs, expected) <= tolerance / 10:
            found.append(alone[0])
    return found


def _tolerance(model: nn.Module, outputs: Sequence[torch.Tensor]) -> float:
    dtypes = {one.dtype for one in outputs}
    dtypes |= {p.dtype for p in model.parameters() if p.dtype in _TOLERANCE}
    worst = max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    quantized = any(quantization_of(parameter) is not None for parameter in model.parameters())
    return max(worst, _QUANTIZED) if quantized else worst


def _floats(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output, in whatever it holds them."""
    strided = (one for one in ops.tensors_in(output) if one.layout is torch.strided)
    return [one for one in strided if one.is_floating_point()]


class _Choices(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Notes which elements the largest were, and chooses the same ones when it is replayed.

    The router of a mixture of experts chooses by size, where two sizes may be as good as equal.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self._noted: list[tuple[str, torch.Tensor]] = []
        self._next: int | None = None

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Chooses as it has noted, as long as choices come in the same order."""
        self._next = 0
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator, or chooses."""
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
    for place, argument in enumerate(torch_private.schema_of(func).arguments):
        if argument.name == "dim":
            given = (
                args[place] if place < len(args) and not argument.kwarg_only else kwargs.get("dim")
            )
            return -1 if given is None else int(given)
    return -1
