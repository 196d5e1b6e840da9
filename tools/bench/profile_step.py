"""Where the time of a step goes: what bounds O."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.tools.bench import llama_step
from lora_fx.tools.bench.contenders import BUILDERS, FROZEN, OURS, PEFT, Settings
from lora_fx.tools.bench.hardware import devices, synchronizer
from lora_fx.tools.bench.measure import Progress, portion
from lora_fx.tools.bench.sizes import Size
from lora_fx.tools.bench.steps import case, loss_of, name_of

__all__ = ["GROUPS", "TITLE", "Profile", "caption", "group_of", "rows", "run"]

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
_DROPOUTS = (0.0, 0.05)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Seconds of one step by group."""

    seconds: Mapping[str, float]


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, dict[str, Profile]]:
    """Profiles by device and dtype, then by contender."""
    workload = llama_step.workload(size)
    results: dict[str, dict[str, Profile]] = {}
    for index, device in enumerate(devices()):
        base = workload.make().to(device)
        inputs = workload.on(device, torch.float32)
        models = _models(base)
        tell = portion(progress, index, len(devices()))
        found = results[case(device, torch.float32)] = {}
        for done, (name, model) in enumerate(models.items(), 1):
            loss = loss_of(model, inputs)
            found[name] = _profiled(model, functools.partial(_backward, loss), device, repeats)
            if tell is not None:
                tell(done, len(models), name)
    return results


def rows(
    results: dict[str, dict[str, Profile]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells, milliseconds of one step."""
    return ("where", "contender", *GROUPS), [
        (where, name, *(f"{1e3 * profile.seconds[group]:.1f}" for group in GROUPS))
        for where, found in results.items()
        for name, profile in found.items()
    ]


def caption() -> str:
    """What was measured."""
    return (
        "Milliseconds of one step by kind of operation, as PyTorch's profiler sees it; the profiler itself "
        "makes steps slower, most of all between operations (Python, dispatch, autograd). A product is thin "
        "if one of its dimensions is the rank. What a contender has beyond the frozen step is what its "
        "adapters cost. Masks of lora-fx are random numbers and bit operations, element by element."
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
        return THIN if any(rank in shape for shape in shapes) else BASE
    if "attention" in plain:
        return ATTENTION
    if any(plain.startswith(one) or one in plain for one in _RANDOM):
        return RANDOM
    if plain in _COPIES:
        return COPIES
    return ELEMENTS


def _models(base: nn.Module) -> dict[str, nn.Module]:
    models = {FROZEN: BUILDERS[FROZEN](base, Settings())}
    for dropout in _DROPOUTS:
        for name in (OURS, PEFT):
            settings = Settings(lora_dropout=dropout)
            models[name_of(name, dropout)] = BUILDERS[name](base, settings)
    return {name: model.train() for name, model in models.items()}


def _profiled(
    model: nn.Module, step: Callable[[], Any], device: torch.device, repeats: int
) -> Profile:
    wait = synchronizer(device) or _nothing
    on_cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_cuda else []
    step()
    wait()
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        began = time.perf_counter()
        for _ in range(repeats):
            model.zero_grad()
            step()
        wait()
        whole = time.perf_counter() - began
    seconds: dict[str, float] = collections.defaultdict(float)
    for event in profile.key_averages(group_by_input_shape=True):
        taken = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if event.key.startswith("aten::"):
            group = group_of(event.key, event.input_shapes, Settings().r)
            seconds[group] += taken / 1e6 / repeats
    seconds[OUTSIDE] = max(0.0, whole / repeats - sum(seconds.values()))
    return Profile({group: seconds[group] for group in GROUPS})


def _backward(loss: Callable[[], Tensor]) -> None:
    torch.autograd.backward(loss())


def _nothing() -> None:
    """There is no device to wait for."""
