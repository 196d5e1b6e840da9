"""How a time is taken: interleaved, in one process, in random order, median and spread.

The machines that run this are shared and noisy. What is compared is run in turn, so that a slow
minute hits every contender, and ratios are taken within a turn.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["Progress", "Ratio", "Sample", "interleaved", "machine", "portion", "ratio"]

Progress = Callable[[int, int, str], None]
"""(done, total, contender): called after each run."""

_LEAST = 5


@dataclasses.dataclass(frozen=True)
class Sample:
    """Times of one contender.

    Attributes:
        times: Seconds of each counted run, in the order of the turns.
    """

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds."""
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return low, high

    @property
    def runs(self) -> int:
        """Number of runs that were counted."""
        return len(self.times)

    def __str__(self) -> str:
        low, high = self.quartiles
        if self.median < 0.1:
            return f"{1e3 * self.median:.3g} ms ({1e3 * low:.3g} to {1e3 * high:.3g})"
        return f"{self.median:.3f} s ({low:.3f} to {high:.3f})"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as long one contender takes as another: median and quartiles over the turns."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(sample: Sample, base: Sample) -> Ratio:
    """The ratio of times within each turn: what is slow for minutes slows both.

    Args:
        sample: The contender.
        base: What it is compared with, of the same call of :func:`interleaved`.
    """
    found = [mine / theirs for mine, theirs in zip(sample.times, base.times, strict=True)]
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return Ratio(median, low, high)


def interleaved(
    contenders: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]],
    *,
    repeats: int = 10,
    calls: int = 1,
    seconds: float = math.inf,
    seed: int = 0,
    synchronize: Callable[[], None] | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Sample]:
    """Times contenders in turn.

    Args:
        contenders: By name: a preparation that is not timed, and what is timed, which gets the
            preparation's result.
        repeats: Counted turns; one more, first, is not counted.
        calls: How often what is timed is called in a run; times are those of one call. For what takes so
            little that the clock or the scheduler would show.
        seconds: After this long no further turn begins, if five are done.
        seed: Of the random order.
        synchronize: Waits for the device, before and after each run.
        progress: Called with (done, total, contender) after each run.
        clock: Gives seconds. ``time.thread_time`` leaves out the time that other processes have.

    Returns:
        As many times of each contender as of the others: turns are whole.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    # A collection before each run looks at what runs have made, not at the libraries' objects each time.
    gc.collect()
    gc.freeze()
    try:
        for done, (turn, name) in enumerate(_turns(list(contenders), repeats, seconds, seed), 1):
            prepare, run = contenders[name]
            taken = _timed(prepare, run, calls, synchronize or _nothing, clock)
            if turn:
                times[name].append(taken)
            if progress is not None:
                progress(done, (repeats + 1) * len(contenders), name)
    finally:
        gc.unfreeze()
    return {name: Sample(tuple(values)) for name, values in times.items()}


def portion(progress: Progress | None, index: int, count: int, title: str = "") -> Progress | None:
    """The progress of one of several pieces of work of about the same length, as part of the whole.

    Args:
        progress: The whole's.
        index: Which piece, from 0.
        count: How many there are.
        title: Stands before the name of the contender.
    """
    if progress is None:
        return None
    tell = progress

    def advance(done: int, total: int, what: str) -> None:
        tell(index * total + done, count * total, f"{title} {what}".strip())

    return advance


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


def _turns(names: list[str], repeats: int, seconds: float, seed: int) -> Iterator[tuple[int, str]]:
    """The number of the turn, and who is next."""
    order = random.Random(seed)
    start = time.perf_counter()
    for turn in range(repeats + 1):
        if turn > _LEAST and time.perf_counter() - start > seconds:
            return
        for name in order.sample(names, len(names)):
            yield turn, name


def _timed(
    prepare: Callable[[], Any],
    run: Callable[[Any], Any],
    calls: int,
    wait: Callable[[], None],
    clock: Callable[[], float],
) -> float:
    given = prepare()
    gc.collect()
    wait()
    began = clock()
    for _ in range(calls):
        kept = run(given)
    wait()
    taken = clock() - began
    del given, kept
    return taken / calls


def _nothing() -> None:
    """There is no device to wait for."""


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
