"""Where the time of a step goes and what it keeps for its backward: what bounds the others' figures."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.tools.bench.contenders import (
    EXPORTED,
    FROZEN,
    OURS,
    PEFT,
    Contenders,
    Settings,
    built,
    name_of,
    variants,
)
from lora_fx.tools.bench.counted import saved_by
from lora_fx.tools.bench.measure import Place, Progress, Size, at_each, places, synchronizer
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.steps import loss_of, mebibytes
from lora_fx.tools.bench.workloads import small_llama

__all__ = ["KINDS", "SECTIONS", "group_of", "kind_of"]


def _contenders(*names: str) -> Contenders:
    """The frozen model, LoRA of these with each dropout, DoRA of both libraries."""
    plain = {key: one for p in (0.0, 0.05) for key, one in variants(names, (p,)).items()}
    dora = {name_of(f"{name} DoRA", 0): (name, Settings(use_dora=True)) for name in (OURS, PEFT)}
    return {**plain, **dora}


_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
_RANDOM = ("bernoulli", "dropout", "random", "uniform", "rand")
_COPIES = ("copy_", "clone", "zero_", "fill_", "cat")
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")

_BASE, _THIN, _ATTENTION, _DRAWN, _COPIED, _ELEMENTS, _OUTSIDE = GROUPS = (
    "base products",
    "thin products",
    "attention",
    "random numbers",
    "copies, fills",
    "element by element",
    "between operations",
)
_TURNS = 5

Profile = dict[str, float]
"""Seconds of one step by group."""


def _profiles(repeats: int, size: Size, progress: Progress | None) -> dict[str, dict[str, Profile]]:
    """Medians of the turns, by device and dtype, then by contender."""
    workload = small_llama(size)

    def work(place: Place, tell: Progress | None) -> dict[str, Profile]:
        inputs = workload.on(place)
        base = workload.make().to(place.device, place.dtype)
        models = built(_contenders(OURS, PEFT), base)
        turns: dict[str, list[Profile]] = {name: [] for name in models}
        # In turn, as times are taken; the first turn is not counted.
        counted = min(repeats, _TURNS)
        for turn in range(counted + 1):
            for done, (name, model) in enumerate(models.items(), 1):
                found = _profiled(model, loss_of(model, inputs), place.device)
                if turn:
                    turns[name].append(found)
                if tell is not None:
                    tell(turn * len(models) + done, (counted + 1) * len(models), name)
        return {
            name: {group: statistics.median(one[group] for one in each) for group in GROUPS}
            for name, each in turns.items()
        }

    return at_each(places(half=size is Size.FULL), work, progress)


def _profile_cells(results: Mapping[str, Mapping[str, Profile]]) -> Iterator[list[str]]:
    """Milliseconds of one step."""
    for where, found in results.items():
        for name, seconds in found.items():
            times = [*(seconds[group] for group in GROUPS), sum(seconds.values())]
            yield [where, name, *(f"{1e3 * one:.1f}" for one in times)]


def group_of(name: str, shapes: list[list[int]], rank: int) -> str:
    """The group of an operation.

    Args:
        name: As the profiler has it, ``aten::mm``.
        shapes: Of its tensors.
        rank: Of the adapters.
    """
    plain = name.removeprefix("aten::")
    if plain in _PRODUCTS:
        return _THIN if any(_is_thin(shape, rank) for shape in shapes) else _BASE
    if "attention" in plain:
        return _ATTENTION
    if any(plain.startswith(one) or one in plain for one in _RANDOM):
        return _DRAWN
    if plain in _COPIES:
        return _COPIED
    return _OUTSIDE if plain in _EMPTY or _only_calls(plain) else _ELEMENTS


def _is_thin(shape: Sequence[int], rank: int) -> bool:
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


def _profiled(model: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> Profile:
    wait: Callable[[], Any] = synchronizer(device) or (lambda: None)
    on_cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_cuda else []
    model.zero_grad()
    wait()
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        began = time.perf_counter()
        torch.autograd.backward(loss())
        wait()
        whole = time.perf_counter() - began
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in profile.key_averages(group_by_input_shape=True):
        taken = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if event.key.startswith("aten::"):
            seconds[group_of(event.key, event.input_shapes, Settings().r)] += taken / 1e6
    computed = sum(taken for group, taken in seconds.items() if group != _OUTSIDE)
    return seconds | {_OUTSIDE: max(0.0, whole - computed)}


_WIDE, _NARROW, _MASKS, _OTHER = KINDS = (
    "T × width",
    "T × r, r × width",
    "bits and whole numbers",
    "vectors, T × 1",
)
"""Of what is kept, in the order of the table."""


def _kept(repeats: int, size: Size, progress: Progress | None) -> dict[str, Mapping[str, int]]:
    """Bytes by contender, then by kind. Nothing is timed, and a CPU keeps what a GPU does."""
    workload, place = small_llama(size), Place(torch.device("cpu"), torch.float32)
    inputs = workload.on(place)
    models = built(_contenders(OURS, EXPORTED, PEFT), workload.make(), inputs)
    found: dict[str, Mapping[str, int]] = {}
    for done, (name, model) in enumerate(models.items(), 1):
        found[name] = saved_by(model, loss_of(model, inputs), kind_of)
        if progress is not None:
            progress(done, len(models), name)
    return found


def _kept_cells(results: Mapping[str, Mapping[str, int]]) -> Iterator[list[str]]:
    """MiB of each kind beyond the frozen step; in its own row, all of it."""
    for name, found in results.items():
        base: Mapping[str, int] = {} if name == FROZEN else results[FROZEN]
        sizes = [found.get(kind, 0) - base.get(kind, 0) for kind in KINDS]
        yield [name, *(f"{size / 2**20:z.2f}" for size in sizes), mebibytes(sum(sizes))]


def kind_of(tensor: Tensor) -> str:
    """The kind of something that is kept, at the rank of the benchmark."""
    if not tensor.is_floating_point():
        return _MASKS
    if _is_thin(tensor.shape, Settings().r):
        return _NARROW
    return _OTHER if sum(length > 1 for length in tensor.shape) < 2 else _WIDE


SECTIONS = (
    Section("profile_step", ("where", "contender", *GROUPS, "sum"), _profiles, _profile_cells),
    Section(
        "saved_step",
        ("contender", *(f"{kind}, MiB" for kind in KINDS), "sum, MiB"),
        _kept,
        _kept_cells,
    ),
)
