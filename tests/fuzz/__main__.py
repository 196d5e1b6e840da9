"""Runs many random programs and prints what came of them.

    python -m tests.fuzz --programs 10000 --seed 0 --processes 2

Each program is named SEED:NUMBER and comes back with ``--only SEED:NUMBER``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.choices import Alone, Repeated, Seeded, shrunk
from tests.fuzz.features import FEATURES, OFF
from tests.fuzz.grammar import write_program
from tests.fuzz.program import Outcome, Program
from tests.fuzz.worker import Worker, worker

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 if a program failed."""
    options = _options(argv)
    off = frozenset() if options.all_features else OFF
    off |= frozenset(options.without)
    if options.only:
        return _show(options.only, off, options.shrink)
    if options.each:
        return _each(options.each, options.group)
    start = time.monotonic()
    table = Table()
    _run(options, off, table)
    print(table)
    print(f"{table.total} programs in {time.monotonic() - start:.0f} s, seed {options.seed}")
    if options.shrink:
        with worker() as one:
            for names in table.failures.values():
                print(_banner(names[0]))
                print(_smallest(one, names[0], off))
    return 1 if table.failures else 0


class Table:
    """Outcomes, counted.

    Attributes:
        total: How many programs ran.
        failures: Names of the programs that failed, by what they failed with.
    """

    def __init__(self) -> None:
        self.total = 0
        self._kinds: Counter[str] = Counter()
        self._stages: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._adapted = self._sites = self._partial = 0
        self.failures: dict[str, list[str]] = defaultdict(list)
        self._blame: dict[str, Counter[str]] = defaultdict(Counter)
        self._used: Counter[str] = Counter()

    def add(self, name: str, program: Program, outcome: Outcome) -> None:
        """Counts one program."""
        self.total += 1
        self._kinds[outcome.kind] += 1
        self._stages[outcome.label] += 1
        self._adapted += outcome.sites > 0
        self._sites += outcome.sites
        self._partial += outcome.kind == "equal" and outcome.rejected > 0
        self._used.update(program.features)
        if outcome.kind == "refused":
            self._reasons[f"{outcome.stage}: {general(outcome.detail)}"] += 1
        if outcome.failed:
            cause = f"{outcome.label}: {general(outcome.detail)}"
            self.failures[cause].append(name)
            self._blame[cause].update(program.features)

    def __str__(self) -> str:
        lines = ["", "what came of them"]
        lines += [f"  {count:6d}  {label}" for label, count in self._stages.most_common()]
        lines += ["", f"  {self._adapted} programs with adapters, at {self._sites} places"]
        lines += [
            f"  {self._partial} of the equal ones with operations that are listed as rejected"
        ]
        lines += ["", "refused, by reason"]
        lines += [
            f"  {count:6d}  {reason[:200]}" for reason, count in self._reasons.most_common(40)
        ]
        if self.failures:
            lines += ["", "FAILURES, by what they failed with"]
        for cause, names in sorted(self.failures.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(names):6d}  {cause[:300]}")
            lines.append(f"          {', '.join(names[:6])}")
            lines.append(f"          {', '.join(self._suspects(cause, len(names)))}")
        kinds = ("equal", "refused", "silent", "raw", "dead", "unstable", "invalid")
        counts = ", ".join(f"{self._kinds[kind]} {kind}" for kind in kinds)
        return "\n".join([*lines, "", f"{self.total} programs: {counts}"])

    def _suspects(self, cause: str, count: int) -> list[str]:
        """Features that are more frequent among these failures than elsewhere."""
        lift = {
            name: (found / count) / (self._used[name] / self.total)
            for name, found in self._blame[cause].items()
            if found * 2 >= count
        }
        return [
            name for name, one in sorted(lift.items(), key=lambda item: -item[1])[:5] if one > 1.5
        ]


def general(detail: str) -> str:
    """A message without what is peculiar to the program, so that equal causes count together."""
    text = detail.strip().splitlines()[0] if detail.strip() else ""
    text = re.sub(r"\[fuzzed_\d+\.py:\d+\]", "[program]", text)
    text = re.sub(r"'[^']*'", "'…'", text)
    text = re.sub(r"[a-z_]+\d+[a-z_0-9.]*", "N", text)
    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", text)


def _run(options: argparse.Namespace, off: frozenset[str], table: Table) -> None:
    lock = threading.Lock()
    numbers = iter(range(options.start, options.start + options.programs))

    def loop() -> None:
        with worker() as one:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                name = f"{options.seed}:{number}"
                program = write_program(Seeded(name, off))
                outcome = one.judge(program)
                with lock:
                    table.add(name, program, outcome)
                    if options.log:
                        with options.log.open("a", encoding="utf-8") as file:
                            file.write(json.dumps([name, dataclasses.asdict(outcome)]) + "\n")
                    if outcome.failed and options.verbose:
                        print(_banner(name), program, outcome, sep="\n", flush=True)

    threads = [threading.Thread(target=loop) for _ in range(options.processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _each(count: int, groups: Sequence[str]) -> int:
    """Runs programs of one feature each, on or off, and prints what is not equal."""
    failed = 0
    with worker() as one:
        for feature in FEATURES:
            if groups and feature.partition("/")[0] not in groups:
                continue
            for number in range(count):
                # What is read is also changed: a value that never changes tells nothing.
                extra = frozenset({"change/what was read"}) if number else frozenset()
                outcome = one.judge(write_program(Alone(feature, str(number), extra)))
                failed += outcome.failed
                if outcome.kind != "equal":
                    print(f"{feature} {number}: {str(outcome).splitlines()[0][:200]}", flush=True)
    return int(failed > 0)


def _show(name: str, off: frozenset[str], shrink: bool) -> int:
    choices = Seeded(name, off)
    program = write_program(choices)
    with worker() as one:
        outcome = one.judge(program)
        print(program, outcome, sep="\n\n")
        if outcome.failed and shrink:
            print(_banner("the smallest that fails so"), _smallest(one, name, off), sep="\n")
    return int(outcome.failed)


def _smallest(one: Worker, name: str, off: frozenset[str]) -> str:
    """The source of the smallest program that was found to fail as the named one does."""
    choices = Seeded(name, off)
    wanted = one.judge(write_program(choices))
    cause = wanted.label, general(wanted.detail)
    if wanted.kind == "silent":
        cause = wanted.label, ""

    def still(log: Sequence[int]) -> Sequence[int] | None:
        repeated = Repeated(log, off)
        found = one.judge(write_program(repeated))
        seen = (found.label, "" if found.kind == "silent" else general(found.detail))
        return repeated.log if seen == cause else None

    best = Repeated(shrunk(choices.log, still), off)
    program = write_program(best)
    return f"{program}\n\n{one.judge(program)}"


def _banner(text: str) -> str:
    return f"\n{'#' * 20} {text} {'#' * 20}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first program")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--all-features", action="store_true", help="those that are off, too")
    parser.add_argument("--without", nargs="*", default=[], help="features to leave out")
    parser.add_argument("--only", help="run this program alone, by its name SEED:NUMBER")
    parser.add_argument("--each", type=int, default=0, help="programs of each feature alone")
    parser.add_argument("--group", nargs="*", default=[], help="with --each: of these groups")
    parser.add_argument("--shrink", action="store_true", help="make the programs that fail smaller")
    parser.add_argument("--log", type=Path, help="append each outcome to this file, as JSON")
    parser.add_argument("--verbose", action="store_true", help="print every program that fails")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
