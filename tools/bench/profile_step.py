"""Where the time of a step goes: what bounds O."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.tools.bench import llama_step
from lora_fx.tools.bench.contenders import BUILDERS, EXPORTED, FROZEN, OURS, PEFT, Settings
from lora_fx.tools.bench.measure import Place, Progress, Size, at_each, places, synchronizer
from lora_fx.tools.bench.steps import loss_of, name_of

__all__ = [
    "GROUPS",
    "TITLE",
    "Profile",
    "caption",
    "contenders",
    "group_of",
    "is_thin",
    "rows",
    "run",
]

TITLE = "Where the time of that step goes"

BASE = "base products"
THIN = "thin products"
ATTENTION = "attention"
RANDOM = "random numbers"
COPIES = "copies, fills"
ELEMENTS = "element by element"
OUTSIDE = "between operations"
GROUPS = (BASE, THIN, ATTENTION, RANDOM, COPIES, ELEMENTS, OUTSIDE)
"""In the order of the table."""

_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
_RANDOM = ("bernoulli", "dropout", "random", "uniform", "rand")
_COPIES = ("copy_", "clone", "zero_", "fill_", "cat")
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")
_DROPOUTS = (0.0, 0.05)
_TURNS = 5


@dataclasses.dataclass(frozen=True)
class Profile:
    """Seconds of one step by group, each the median of the turns."""

    seconds: Mapping[str, float]


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, dict[str, Profile]]:
    """Profiles by device and dtype, then by contender."""
    workload = llama_step.workload(size)

    def work(place: Place, tell: Progress | None) -> dict[str, Profile]:
        inputs = workload.on(place)
        models = contenders(workload.make().to(place.device, place.dtype), Settings())
        steps = {
            name: functools.partial(_backward, loss_of(model, inputs))
            for name, model in models.items()
        }
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        # In turn, as times are taken; the first turn is not counted.
        counted = min(repeats, _TURNS)
        for turn in range(counted + 1):
            for done, (name, model) in enumerate(models.items(), 1):
                found = _profiled(model, steps[name], place.device)
                if turn:
                    turns[name].append(found)
                if tell is not None:
                    tell(turn * len(models) + done, (counted + 1) * len(models), name)
        return {name: _median(found) for name, found in turns.items()}

    return at_each(places(half=size is Size.FULL), work, progress)


def contenders(base: nn.Module, settings: Settings, both: bool = False) -> dict[str, nn.Module]:
    """What is looked at closely: the frozen model, LoRA of both libraries, their DoRA.

    Args:
        base: The model.
        settings: Of the adapters, but for dropout and DoRA.
        both: Whether lora-fx with example inputs is among them; the settings have them then.
    """
    models = {FROZEN: BUILDERS[FROZEN](base, settings)}
    for dropout in _DROPOUTS:
        for name in (OURS, EXPORTED, PEFT) if both else (OURS, PEFT):
            now = dataclasses.replace(settings, lora_dropout=dropout)
            models[name_of(name, dropout)] = BUILDERS[name](base, now)
    for name in (OURS, PEFT):
        now = dataclasses.replace(settings, use_dora=True)
        models[name_of(f"{name} DoRA", 0)] = BUILDERS[name](base, now)
    return {name: model.train() for name, model in models.items()}


def rows(
    results: dict[str, dict[str, Profile]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells, milliseconds of one step."""
    table = []
    for where, found in results.items():
        for name, profile in found.items():
            times = [*(profile.seconds[group] for group in GROUPS), sum(profile.seconds.values())]
            table.append((where, name, *(f"{1e3 * one:.1f}" for one in times)))
    return ("where", "contender", *GROUPS, "sum"), table


def caption() -> str:
    """What was measured."""
    return (
        "Milliseconds of one step by kind of operation, medians of steps that are taken in turn, as "
        "PyTorch's profiler sees it; the profiler itself makes steps slower, most of all between operations "
        "(Python, dispatch, autograd, views). On CUDA it is the time of kernels, and what is between "
        "operations is when none runs. A product is thin if one of its dimensions is the rank, or that of "
        "layers that share an input. What a contender has beyond the frozen step is what its adapters cost: "
        "F counts the thin products at the speed of the base products; what they take beyond that, and all "
        "other columns, is what keeps O above F. Masks of lora-fx are random numbers and bit operations, "
        "element by element. DoRA is without dropout."
    )


def group_of(name: str, shapes: list[list[int]], rank: int) -> str:
    """The group of an operation.

    Args:
        name: As the profiler has it, ``aten::mm``.
        shapes: Of its tensors.
        rank: Of the adapters.
    """
    plain = name.removeprefix("aten::")
    if plain in _PRODUCTS:
        return THIN if any(is_thin(shape, rank) for shape in shapes) else BASE
    if "attention" in plain:
        return ATTENTION
    if any(plain.startswith(one) or one in plain for one in _RANDOM):
        return RANDOM
    if plain in _COPIES:
        return COPIES
    return OUTSIDE if plain in _EMPTY or _only_calls(plain) else ELEMENTS


def is_thin(shape: Sequence[int], rank: int) -> bool:
    """Whether a dimension is a rank, or the ranks of up to three layers that share an input."""
    return any(length in (rank, 2 * rank, 3 * rank) for length in shape)


@functools.cache
def _only_calls(name: str) -> bool:
    """Whether an operation of ATen computes nothing itself: a view, or one that calls others."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    found = [getattr(packet, one) for one in packet.overloads() if not one.endswith("out")]
    # Some overloads are TorchScript's alone; the dispatcher does not know them.
    known = [one for one in found if torch._C._dispatch_has_kernel(one.name())]
    return bool(known) and all(
        one.is_view
        or torch._C._dispatch_has_kernel_for_dispatch_key(one.name(), "CompositeImplicitAutograd")
        for one in known
    )


def _profiled(model: nn.Module, step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of one step by group."""
    wait = synchronizer(device) or _nothing
    on_cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_cuda else []
    model.zero_grad()
    wait()
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        began = time.perf_counter()
        step()
        wait()
        whole = time.perf_counter() - began
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in profile.key_averages(group_by_input_shape=True):
        taken = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if event.key.startswith("aten::"):
            seconds[group_of(event.key, event.input_shapes, Settings().r)] += taken / 1e6
    computed = sum(taken for group, taken in seconds.items() if group != OUTSIDE)
    return seconds | {OUTSIDE: max(0.0, whole - computed)}


def _median(turns: list[dict[str, float]]) -> Profile:
    return Profile({group: statistics.median(one[group] for one in turns) for group in GROUPS})


def _backward(loss: Callable[[], Tensor]) -> None:
    torch.autograd.backward(loss())


def _nothing() -> None:
    """There is no device to wait for."""
