"""What the benchmark runs on: the CPU always, and a CUDA device where there is one."""

from __future__ import annotations

import functools
import gc
import shutil
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._triton import has_triton

__all__ = [
    "allocator_peak",
    "compiles",
    "computes_bf16",
    "devices",
    "kernel_launches",
    "launches",
    "synchronizer",
]

CPU = torch.device("cpu")


def devices() -> tuple[torch.device, ...]:
    """Where to measure."""
    if torch.cuda.is_available():
        return (CPU, torch.device("cuda", torch.cuda.current_device()))
    return (CPU,)


def synchronizer(device: torch.device) -> Callable[[], None] | None:
    """What waits for the device's work, or None where there is nothing to wait for."""
    if device.type != "cuda":
        return None
    return functools.partial(torch.cuda.synchronize, device)


def kernel_launches(step: Callable[[], Any], device: torch.device) -> int | None:
    """How many kernels a step starts on a CUDA device; None elsewhere, where nothing is launched.

    Copies and fills are counted with the kernels: they cost the same to start.
    """
    if device.type != "cuda":
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step()
    # What is still running when the profiler starts would be counted, too.
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        torch.cuda.synchronize(device)
    return launches(profile.events() or ())


def launches(events: Iterable[Any]) -> int:
    """How many of a profiler's events are kernels, copies and fills on a GPU.

    Ranges that somebody has named are repeated on the GPU's time line and start nothing.
    """
    return sum(
        1 for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation
    )


def allocator_peak(
    step: Callable[[], Any], device: torch.device, reset: Callable[[], Any] | None = None
) -> int | None:
    """Bytes that a step takes from CUDA's allocator beyond what was held before; None elsewhere.

    Args:
        step: Run twice: the first run takes what libraries keep for good (workspaces of cuBLAS).
        device: Where.
        reset: Lets go of what a step leaves (gradients), which would count as held before.
    """
    if device.type != "cuda":
        return None
    step()
    if reset is not None:
        reset()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@functools.cache
def computes_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are worth measuring: at most a fifth slower than those in fp32.

    A processor without instructions for them is some ten times slower.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    single, half = (_product_time(dtype) for dtype in (torch.float32, torch.bfloat16))
    return half <= 1.2 * single


def compiles(device: torch.device) -> bool:
    """Whether inductor has what it needs: a C++ compiler for the CPU, Triton for CUDA."""
    if device.type == "cuda":
        return has_triton()
    return any(shutil.which(name) is not None for name in ("g++", "clang++", "c++"))


def _product_time(dtype: torch.dtype) -> float:
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return min(times)
