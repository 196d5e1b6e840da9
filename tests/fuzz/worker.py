"""Runs programs in a process of its own, so that one that kills the process is an outcome like others.

    python -m tests.fuzz.worker

reads a program a line and writes an outcome a line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz.program import Outcome, Program

__all__ = ["Worker", "worker"]

_ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 120.0
_PROGRAMS = 400


class Worker:
    """A process that runs programs, and another one when that has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._done = 0
        self._tail: list[str] = []

    def judge(self, program: Program) -> Outcome:
        """What comes of the program."""
        if self._process is None or self._done >= _PROGRAMS:
            self.close()
            self._start()
        self._done += 1
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(program.to_json() + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], _SECONDS)
            line = process.stdout.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if not line:
            return self._ended(hung=line is None)
        outcome = Outcome(**json.loads(line))
        if outcome.failed:
            # It may have left the process in a state that the next program would be blamed for.
            self.close()
        return outcome

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._done = 0

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._tail = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker"],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read_errors, args=(self._process,), daemon=True).start()

    def _read_errors(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self._tail = [*self._tail[-19:], line]

    def _ended(self, hung: bool) -> Outcome:
        assert self._process is not None
        if hung:
            self.close()
            return Outcome("dead", "hung", f"no answer in {_SECONDS:g} s")
        code = self._process.wait()
        tail = "".join(self._tail).strip()
        self.close()
        return Outcome("dead", f"exit {code}", tail[-2000:])


@contextmanager
def worker() -> Iterator[Worker]:
    """A worker that is ended when it is left."""
    one = Worker()
    try:
        yield one
    finally:
        one.close()


def _main() -> None:
    import torch

    from tests.fuzz.judge import judge

    torch.set_num_threads(1)
    # What a program prints must not be taken for an outcome.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        outcome = judge(Program.from_json(line))
        answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
