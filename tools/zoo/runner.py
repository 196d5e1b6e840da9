"""List and select the entries of the zoo, and run the job of each entry in a separate process.

If a process crashes or hangs, only the row of its model is lost. The processes are forked from a server that
has imported the heavy packages, so that they start quickly.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lora_fx.errors import ConfigError
from lora_fx.export.fuse import Level
from lora_fx.tools.zoo.job import run_job
from lora_fx.tools.zoo.models import PLAIN_MODELS, Entry, library_models
from lora_fx.tools.zoo.report import Row

__all__ = ["ENTRIES", "Options", "find", "run_jobs", "select"]

LIBRARIES = ("torchvision", "timm", "transformers", "diffusers")
"""Libraries with a table of models each."""

ENTRIES: tuple[Entry, ...] = (
    *PLAIN_MODELS,
    *(entry for name in LIBRARIES for entry in library_models(name)),
)


def find(name: str) -> Entry:
    """Return the entry with a name.

    Raises:
        ConfigError: If there is no such entry; the message has the nearest names.
    """
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    raise ConfigError(f"the zoo has no model {name!r}{_nearest(name, [e.name for e in ENTRIES])}")


def groups() -> tuple[str, ...]:
    """Return the groups, in order."""
    return tuple(dict.fromkeys(entry.group for entry in ENTRIES))


def select(only: str | None = None, group: str | None = None) -> list[Entry]:
    """Return the selected entries.

    Args:
        only: A part of the name, or a pattern with ``*`` and ``?`` for the whole name.
        group: A group, or the beginning of its name.

    Raises:
        ConfigError: If nothing is selected; the message has the known names.
    """
    chosen = list(ENTRIES)
    if group is not None:
        chosen = [entry for entry in chosen if entry.group.startswith(group)]
        if not chosen:
            raise ConfigError(f"the zoo has no group {group!r}: {', '.join(groups())}")
    if only is None:
        return chosen
    entries = [entry for entry in chosen if _fits(entry.name, only)]
    if not entries:
        names = [entry.name for entry in chosen]
        raise ConfigError(f"no model of the zoo is called {only!r}{_nearest(only, names)}")
    return entries


def _fits(name: str, pattern: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name.lower(), pattern.lower())
    return pattern.lower() in name.lower()


def _nearest(name: str, known: list[str]) -> str:
    short = {known_name.partition("/")[2]: known_name for known_name in known}
    near = difflib.get_close_matches(name.rpartition("/")[2], short, 3, cutoff=0.5)
    return f"; nearest: {', '.join(short[n] for n in near)}" if near else ""


_PRELOAD = (
    "lora_fx.tools.zoo.runner",
    "lora_fx.export.onnx",
    "lora_fx.passes.capture.exported",
    "torch._dynamo",
    "torchvision",
    "timm",
    "transformers",
    "diffusers",
)
_START = 120.0  # seconds until a process sends its first row, because the server may import first


@dataclass(frozen=True)
class Options:
    """Settings of the jobs.

    Attributes:
        jobs: Processes at a time.
        timeout: Seconds that one model may take, from the first row of its process.
        onnx: True to export.
        optimize: Level of fusions in exports; "runtime" runs only those exports.
        find: Returns the entry of a name; it is called in the process of the job.
        preload: Modules that the server of processes imports.
    """

    jobs: int = 1
    timeout: float = 300.0
    onnx: bool = True
    optimize: Level = "standard"
    find: Callable[[str], Entry] = find
    preload: Sequence[str] = _PRELOAD


def run_jobs(
    entries: Sequence[Entry],
    options: Options,
    progress: Callable[[int, int, str], None] | None = None,
    finished: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Run the job on each entry.

    Args:
        entries: Entries to run.
        options: Settings of the jobs.
        progress: Called with (done, total, names of running entries).
        finished: Called with each row when it is finished.

    Returns:
        A row for each entry, in the same order. If a process was lost, the row has an error with the reason.
    """
    context = _context(options.preload)
    waiting, running = list(reversed(entries)), list[_Running]()
    rows: dict[str, Row] = {}
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                running.append(_Running.start(context, waiting.pop(), options))
            if progress is not None:
                progress(len(rows), len(entries), ", ".join(job.row.name for job in running))
            wait([job.results for job in running], timeout=0.5)
            for job in [job for job in running if job.poll(options.timeout)]:
                running.remove(job)
                rows[job.row.name] = job.row
                if finished is not None:
                    finished(job.row)
    finally:
        for job in running:
            job.stop()
    return [rows[entry.name] for entry in entries]


def _context(preload: Iterable[str]) -> Any:
    """Return a multiprocessing context whose processes inherit no threads and start quickly.

    On Windows they start slowly, because there is no fork server.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


@dataclass
class _Running:
    """A job's process, and the latest row that it sent."""

    process: Any
    results: Connection
    row: Row
    began: float
    begun: bool = False

    @classmethod
    def start(cls, context: Any, entry: Entry, options: Options) -> _Running:
        results, theirs = context.Pipe(duplex=False)
        arguments = (entry.name, options, theirs)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return cls(process, results, Row(entry.name, entry.group, entry.note), time.monotonic())

    def poll(self, timeout: float) -> bool:
        """Read the rows that a job's process has sent. Return True if it ended, crashed or timed out."""
        for message in self.messages():
            self.row = message
            if not self.begun:
                self.begun, self.began = True, time.monotonic()
            if not self.row.stage:
                self.stop()
                return True
        limit = timeout if self.begun else timeout + _START
        if time.monotonic() - self.began > limit:
            self.lost(f"Timeout: more than {timeout:g} s")
            return True
        if self.results.closed or (not self.process.is_alive() and not self.results.poll()):
            self.lost(f"Crash: the process ended with {self.process.exitcode}")
            return True
        return False

    def messages(self) -> Iterator[Row]:
        try:
            while self.results.poll():
                yield self.results.recv()
        except EOFError:
            self.process.join(timeout=5)
            self.results.close()

    def lost(self, reason: str) -> None:
        stage = self.row.stage or "build"
        self.row = dataclasses.replace(self.row, stage="")
        self.row.errors[stage] = reason
        self.row.seconds.setdefault(stage, time.monotonic() - self.began - self.row.total_seconds)
        self.stop()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.results.close()


def _work(name: str, options: Options, results: Connection) -> None:
    # ONNX Runtime writes its log to the file descriptor, so Python cannot redirect it. Its errors are raised,
    # too, so the log is not needed.
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    entry = options.find(name)
    row = run_job(entry, onnx=options.onnx, optimize=options.optimize, begin=results.send)
    results.send(row)
    results.close()
