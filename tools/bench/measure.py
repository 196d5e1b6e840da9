"""How a time is taken: interleaved, in one process, in random order, median and spread.

The machines that run this are shared and noisy. What is compared is run in turn, so that a slow
minute hits every contender, and ratios are taken of medians.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["Sample", "interleaved", "machine"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Times of one contender.

    Attributes:
        median: Seconds.
        low, high: First and third quartile, in seconds.
        runs: Number of runs that were counted.
    """

    median: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} s ({self.low:.3f} to {self.high:.3f})"


def interleaved(
    contenders: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]],
    *,
    repeats: int = 10,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Sample]:
    """Times contenders in turn.

    Args:
        contenders: By name: a preparation that is not timed, and what is timed, which gets the
            preparation's result.
        repeats: Counted runs of each; one more, first, is not counted.
        seed: Of the random order.
        progress: Called with (done, total, contender) after each run.
    """
    order = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    done, total = 0, (repeats + 1) * len(contenders)
    for turn in range(repeats + 1):
        for name in order.sample(list(contenders), len(contenders)):
            prepare, run = contenders[name]
            given = prepare()
            gc.collect()
            began = time.perf_counter()
            kept = run(given)
            seconds = time.perf_counter() - began
            del given, kept
            if turn:
                times[name].append(seconds)
            done += 1
            if progress is not None:
                progress(done, total, name)
    return {name: _sample(values) for name, values in times.items()}


def machine() -> dict[str, str]:
    """What a reader has to know to read the numbers: hardware, versions, date."""
    versions = []
    for package in ("torch", "transformers", "peft"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "GPU": device,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(versions),
        "date": time.strftime("%Y-%m-%d"),
    }


def _sample(values: list[float]) -> Sample:
    low, median, high = statistics.quantiles(values, n=4)
    return Sample(median, low, high, len(values))


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
