"""Measurement of a section: placements, repeats and order of the runs, and the counters of the machine."""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import importlib.metadata
import math
import os
import platform
import random
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_fx import torch_private

__all__ = [
    "Contenders",
    "Placement",
    "Progress",
    "Ratio",
    "Run",
    "Sample",
    "Size",
    "allocator_peak",
    "compiles",
    "devices",
    "kernel_launches",
    "machine",
    "markdown",
    "placements",
    "ratio",
    "synchronizer",
    "version_of",
]


CPU = torch.device("cpu")


def devices() -> tuple[torch.device, ...]:
    """Return the devices to measure on."""
    if torch.cuda.is_available():
        return (CPU, torch.device("cuda", torch.cuda.current_device()))
    return (CPU,)


def synchronizer(device: torch.device) -> Callable[[], None] | None:
    """Return a function that waits for the device's work, or None for a CPU."""
    if device.type != "cuda":
        return None
    return functools.partial(torch.cuda.synchronize, device)


def kernel_launches(step: Callable[[], Any], device: torch.device) -> int | None:
    """Count the kernels that a step starts on a CUDA device. Return None elsewhere.

    Copies and fills are counted with the kernels: they cost the same to start.
    """
    if device.type != "cuda":
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step()
    # Kernels still running when the profiler starts would be counted, too.
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        torch.cuda.synchronize(device)
    return launches(profile.events() or ())


def launches(events: Iterable[Any]) -> int:
    """Count the kernels, copies and fills on a GPU among a profiler's events.

    Named ranges are repeated on the GPU's time line and start nothing.
    """
    return sum(
        1 for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation
    )


def allocator_peak(
    step: Callable[[], Any], device: torch.device, reset: Callable[[], Any] | None = None
) -> int | None:
    """Return the bytes that a step takes from CUDA's allocator beyond those allocated before; None elsewhere.

    Args:
        step: The step. It runs twice: the first run allocates what libraries keep, such as cuBLAS workspaces.
        device: Device of the step.
        reset: Frees what a step leaves, such as gradients, which would count as allocated before.
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
    """Return True if a device computes bf16 products at most a fifth slower than fp32 ones.

    Only then is bf16 worth measuring.

    A processor without instructions for them is some ten times slower.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    single, half = (_product_time(dtype) for dtype in (torch.float32, torch.bfloat16))
    return half <= 1.2 * single


def compiles(device: torch.device) -> bool:
    """Return True if inductor can compile: with a C++ compiler on the CPU, with Triton on CUDA."""
    if device.type == "cuda":
        return torch_private.has_triton()
    return any(shutil.which(name) is not None for name in ("g++", "clang++", "c++"))


def _product_time(dtype: torch.dtype) -> float:
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return min(times)


class Size(enum.StrEnum):
    """Amount of work in a section: all of it, a part that takes seconds, or as little as a test needs.

    Smaller sizes have other shapes than the page, so their figures only show that the tool works.
    """

    FULL = "full"
    QUICK = "quick"
    TINY = "tiny"


Progress = Callable[[int, int, str], None]
"""Callback with (done, total, contender), called after each run."""

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
        """Return the median in seconds."""
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Return the first and third quartile, in seconds."""
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return low, high

    @property
    def runs(self) -> int:
        """Return the number of runs that were counted."""
        return len(self.times)

    def __str__(self) -> str:
        low, high = self.quartiles
        if self.median < 0.1:
            return f"{1e3 * self.median:.3g} ms ({1e3 * low:.3g} to {1e3 * high:.3g})"
        return f"{self.median:.3f} s ({low:.3f} to {high:.3f})"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Ratio of a contender's time to that of another one: median and quartiles over the turns."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(sample: Sample, base: Sample) -> Ratio:
    """Return the ratio of two contenders' times, taken within each turn.

    A slow minute of the machine slows both contenders of a turn.

    Args:
        sample: The contender.
        base: Sample to compare with, from the same call of :func:`interleaved`.
    """
    ratios = [mine / theirs for mine, theirs in zip(sample.times, base.times, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


Contenders = Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]]
"""By name: a preparation that is not timed, and the timed function, which gets the preparation's result."""


def interleaved(
    contenders: Contenders,
    *,
    repeats: int = 10,
    calls: int = 1,
    seconds: float = math.inf,
    seed: int = 0,
    synchronize: Callable[[], None] | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Sample]:
    """Time contenders in turn, so that a slow minute of the machine affects all of them.

    Args:
        contenders: The contenders.
        repeats: Counted turns. A first turn that is not counted comes before them.
        calls: Calls of the timed function in a run; times are those of one call. More than one is for
            functions so short that the clock or the scheduler would show.
        seconds: Time after which no further turn begins, if five are done.
        seed: Seed of the random order.
        synchronize: Waits for the device, before and after each run.
        progress: Called with (done, total, contender) after each run.
        clock: Returns seconds. ``time.thread_time`` leaves out the time of other processes.

    Returns:
        The sample of each contender. All have the same number of times, because turns are whole.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    # The collection before each run then scans only the objects of runs, not those of the libraries.
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
    """Return a progress callback for one of several equally long pieces of work.

    It reports to the callback of the whole.

    Args:
        progress: Callback of the whole.
        index: Index of the piece, from 0.
        count: Number of pieces.
        title: Text before the name of the contender.
    """
    if progress is None:
        return None
    tell = progress

    def advance(done: int, total: int, name: str) -> None:
        tell(index * total + done, count * total, f"{title} {name}".strip())

    return advance


def machine() -> dict[str, str]:
    """Return the facts that a reader needs to judge the numbers: hardware, versions, date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "GPU": device,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(map(version_of, ("torch", "transformers", "peft"))),
        "date": time.strftime("%Y-%m-%d"),
    }


def version_of(package: str) -> str:
    """Return a package's name and version, or a text that it is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return [head, "|" + "---|" * len(columns), *lines]


def _turns(names: list[str], repeats: int, seconds: float, seed: int) -> Iterator[tuple[int, str]]:
    """Yield the number of the turn and the name of the next contender, in random order within each turn."""
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
    prepared = prepare()
    gc.collect()
    wait()
    began = clock()
    for _ in range(calls):
        result = run(prepared)
    wait()
    taken = clock() - began
    del prepared, result
    return taken / calls


def _nothing() -> None:
    """Do nothing, as the synchronizer of a CPU, which has no work to wait for."""


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Placement:
    """A device and a dtype, such as "cpu, float32" in the tables.

    Attributes:
        device: Device of models and inputs.
        dtype: Dtype of weights and activations.
    """

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def on_cuda(self) -> bool:
        """Return True for a GPU."""
        return self.device.type == "cuda"


def placements(*, half: bool) -> tuple[Placement, ...]:
    """Return every device with fp32, then with bf16 the devices that compute well in it.

    Args:
        half: True to include bf16.
    """
    pairs = [Placement(device, torch.float32) for device in devices()]
    if half:
        pairs += [
            Placement(device, torch.bfloat16) for device in devices() if computes_bf16(device)
        ]
    return tuple(pairs)


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings of one measurement of a section.

    Attributes:
        repeats: Counted runs of each contender.
        size: Amount of the section to measure.
        progress: Called with (done, total, contender) after each run.
    """

    repeats: int
    size: Size
    progress: Progress | None = None

    def tell(self, done: int, total: int, contender: str) -> None:
        """Report progress if there is a callback."""
        if self.progress is not None:
            self.progress(done, total, contender)

    def part(self, index: int, count: int, title: str = "") -> Run:
        """Return settings for one of several pieces of work, with its part of the progress bar."""
        return dataclasses.replace(self, progress=portion(self.progress, index, count, title))

    def each(
        self, items: Collection[Item], title: Callable[[Item], str] = lambda _: ""
    ) -> Iterator[tuple[Item, Run]]:
        """Yield each item with settings to measure it, for items that take equally long."""
        for index, item in enumerate(items):
            yield item, self.part(index, len(items), title(item))

    def at_each(
        self, where: Collection[Placement], work: Callable[[Placement, Run], Result]
    ) -> dict[str, Result]:
        """Do the same work for each placement and return the results by the placement's name."""
        return {str(placement): work(placement, run) for placement, run in self.each(where)}

    def times(
        self, contenders: Contenders, device: torch.device = CPU, **options: Any
    ) -> dict[str, Sample]:
        """Time contenders in turn on a device; see :func:`interleaved` for the options."""
        return interleaved(
            contenders,
            repeats=self.repeats,
            synchronize=synchronizer(device),
            progress=self.progress,
            **options,
        )
