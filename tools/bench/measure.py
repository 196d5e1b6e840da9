"""How a section measures: at which places, how often, in which order; and what a machine counts itself."""

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
    "Place",
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
    "places",
    "ratio",
    "synchronizer",
    "version_of",
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

    Named ranges are repeated on the GPU's time line and start nothing.
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
    """What a section measures: all of it, what takes seconds, or as little as a test needs.

    The shapes of a smaller size are not those of the page: its figures are for looking at the tool.
    """

    FULL = "full"
    QUICK = "quick"
    TINY = "tiny"


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


Contenders = Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]]
"""By name: a preparation that is not timed, and what is timed, which gets the preparation's result."""


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
    """Times contenders in turn.

    Args:
        contenders: What is timed.
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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "GPU": device,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(map(version_of, ("torch", "transformers", "peft"))),
        "date": time.strftime("%Y-%m-%d"),
    }


def version_of(package: str) -> str:
    """Returns a package's name and version, or says that it is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Makes the lines of a Markdown table."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return [head, "|" + "---|" * len(columns), *lines]


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


Found = TypeVar("Found")
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Place:
    """A device and a dtype; as a string, what the tables call it: "cpu, float32".

    Attributes:
        device: Where models and inputs are.
        dtype: Of weights and activations.
    """

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def on_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"


def places(*, half: bool) -> tuple[Place, ...]:
    """Every device with fp32, then those that compute in bf16 with that.

    Args:
        half: Whether bf16 is wanted.
    """
    found = [Place(device, torch.float32) for device in devices()]
    if half:
        found += [Place(device, torch.bfloat16) for device in devices() if computes_bf16(device)]
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Run:
    """How a section is measured.

    Attributes:
        repeats: Counted runs of each contender.
        size: How much of the section.
        progress: Called with (done, total, contender) after each run.
    """

    repeats: int
    size: Size
    progress: Progress | None = None

    def tell(self, done: int, total: int, what: str) -> None:
        """Reports progress if there is a callback."""
        if self.progress is not None:
            self.progress(done, total, what)

    def part(self, index: int, count: int, title: str = "") -> Run:
        """Returns the run of one of several pieces of work; see :func:`portion`."""
        return dataclasses.replace(self, progress=portion(self.progress, index, count, title))

    def each(
        self, items: Collection[Item], title: Callable[[Item], str] = lambda _: ""
    ) -> Iterator[tuple[Item, Run]]:
        """Yields pieces of work of about the same length, each with the run that measures it."""
        for index, item in enumerate(items):
            yield item, self.part(index, len(items), title(item))

    def at_each(
        self, where: Collection[Place], work: Callable[[Place, Run], Found]
    ) -> dict[str, Found]:
        """Does the same work at each place; the results by the place's name."""
        return {str(place): work(place, run) for place, run in self.each(where)}

    def times(
        self, contenders: Contenders, device: torch.device = CPU, **options: Any
    ) -> dict[str, Sample]:
        """Times contenders in turn on a device; see :func:`interleaved` for the options."""
        return interleaved(
            contenders,
            repeats=self.repeats,
            synchronize=synchronizer(device),
            progress=self.progress,
            **options,
        )
