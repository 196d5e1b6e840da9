"""Writes docs/integrations.md, the table of training stacks and of what they do, from tests that were run.

``python docs/integrations.py --write`` runs every test with the marker ``feature``, here and in each
environment that ``make test-stacks`` has made, and writes the page. ``--record FILE --place NAME`` runs
them in one environment, and ``--write FILE ...`` writes the page from what was recorded. ``--check`` compares
the page with the tests that there are, and runs none.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "integrations.md"
FEATURES = (
    "train",
    "activation checkpoints, reentrant",
    "activation checkpoints, non-reentrant",
    "resume, bit-equal",
    "save",
    "switch",
    "merge",
    "export",
)
# Stacks in which several processes have one model, and what was tried with them.
PARALLEL = (
    "DDP",
    "FSDP2",
    "HSDP",
    "tensor parallel",
    "FSDP2 x TP",
    "pipeline stages",
    "DeepSpeed ZeRO-3",
)
PARALLEL_FEATURES = (
    "train",
    "dropout",
    "DoRA",
    "biases",
    "experts",
    "NF4",
    "save",
    "switch",
    "merge",
    "add later",
    "resume, bit-equal",
    "resume in other parts",
    "start on meta",
    "start in parts",
    "several machines",
)
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "diffusers",
    "lightning",
    "opacus",
    "ray",
    "sentence-transformers",
    "timm",
    "torchao",
    "trl",
)


@dataclass(frozen=True)
class Case:
    """What one test with the marker says about one feature of a stack.

    Attributes:
        stack: Whose feature it is.
        feature: One of :func:`features_of` the stack.
        refused: The test shows that it is refused, with an error that says what to do.
        test: The file and the function.
        node: The test's node id, with its parameters.
        outcome: "passed", "failed", "skipped", or "collected" where it was not run.
        reason: Why it was skipped.
        place: The environment that it ran in.
    """

    stack: str
    feature: str
    refused: bool
    test: str
    node: str
    outcome: str
    reason: str
    place: str


def features_of(stack: str) -> tuple[str, ...]:
    """The columns of the table that a stack is in."""
    return PARALLEL_FEATURES if stack in PARALLEL else FEATURES


class Recorder:
    """A plugin of pytest that keeps what becomes of the tests with the marker."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.items: list[pytest.Item] = []
        self.outcomes: dict[str, tuple[str, str]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keeps what was selected."""
        self.items = list(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has passed if its call has, and nothing around it failed."""
        if report.outcome == "passed" and report.when != "call":
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        self.outcomes[report.nodeid] = (report.outcome, reason.removeprefix("Skipped: "))

    def cases(self) -> list[Case]:
        """One for each test and feature."""
        found = []
        for item in self.items:
            outcome, reason = self.outcomes.get(item.nodeid, ("collected", ""))
            for mark in item.iter_markers("feature"):
                stack, *features = mark.args
                for feature in features:
                    known = features_of(stack)
                    if feature not in known:
                        raise SystemExit(f"{item.nodeid}: {feature!r} is none of {known}")
                    test = item.nodeid.partition("[")[0]
                    refused = mark.kwargs.get("refused", False)
                    case = Case(
                        stack, feature, refused, test, item.nodeid, outcome, reason, self.place
                    )
                    found.append(case)
        return found


def record(place: str, chosen: str, *, collect: bool) -> dict[str, Any]:
    """Runs, or collects, the tests of this environment; what was found, and the versions of libraries."""
    recorder = Recorder(place)
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"mark\.feature\(|on_stacks\(|shown\(", path.read_text(encoding="utf-8"))
    ]
    arguments = ["-q", "-m", chosen, "--rootdir", str(ROOT), *(["--collect-only"] * collect)]
    code = pytest.main([*arguments, *files], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {code}")
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return {"cases": [asdict(case) for case in recorder.cases()], "versions": versions}


def record_in(
    python: Path, place: str, chosen: str, *more: str
) -> tuple[list[Case], dict[str, str]]:
    """The same in a process of another environment's Python."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [
            str(python),
            __file__,
            "--record",
            str(out),
            "--place",
            place,
            "--choose",
            chosen,
        ]
        said = subprocess.run([*command, *more], cwd=ROOT, check=False, stdout=subprocess.PIPE)
        if not out.is_file():
            raise SystemExit(f"{place}: {said.stdout.decode()}")
        return read(out)


def read(file: Path) -> tuple[list[Case], dict[str, str]]:
    """What was recorded in a file."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return [Case(**case) for case in found["cases"]], found["versions"]


def environments() -> list[tuple[Path, str, str]]:
    """The Python, the name and the tests of each: this one, and those of ``make test-stacks``."""
    found = [(Path(sys.executable), "test extra", "feature and not cuda")]
    for stamp in sorted((ROOT / ".peers").glob(".stack-*")):
        name = stamp.name.removeprefix(".stack-")
        python = ROOT / ".peers" / name / "bin" / "python"
        found.append((python, name, "feature and stack and not cuda"))
    return found


def best(cases: list[Case]) -> list[Case]:
    """One case for each test and feature: of the environment where it ran, if it did in one."""
    order = ("failed", "passed", "skipped", "collected")
    found: dict[tuple[str, str, str], Case] = {}
    for case in sorted(cases, key=lambda case: order.index(case.outcome)):
        found.setdefault((case.stack, case.feature, case.node), case)
    return list(found.values())


def verdict(cases: list[Case]) -> str:
    """What the cell of a stack and a feature says."""
    ran = [case for case in cases if case.outcome == "passed"]
    if not ran:
        return "not run here"
    return "refused" if all(case.refused for case in ran) else "passed"


def rows(cases: list[Case]) -> list[str]:
    """The tests of one stack: one row for each feature and test function."""
    found = []
    for feature in features_of(cases[0].stack):
        tests: dict[str, list[Case]] = defaultdict(list)
        for case in cases:
            if case.feature == feature:
                tests[case.test].append(case)
        for test, same in sorted(tests.items()):
            file, _, function = test.partition("::")
            ran = [case for case in same if case.outcome == "passed"]
            result = verdict(same)
            if ran:
                where = ", ".join(sorted({case.place for case in ran}))
                count = str(len(ran))
            else:
                where, count = same[0].reason or "no reason is known", "0"
            found.append(
                f"| {feature} | {result} | [`{function}`](../{file}) | {count} | {where} |"
            )
    return found


def table(stacks: dict[str, list[Case]], features: tuple[str, ...]) -> list[str]:
    """One row for each stack, one column for each feature."""
    lines = ["| stack | " + " | ".join(features) + " |", "|---" * (1 + len(features)) + "|"]
    for name, cases in stacks.items():
        cells = []
        for feature in features:
            same = [case for case in cases if case.feature == feature]
            anchor = re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-")
            cells.append(f"[{verdict(same)}](#{anchor})" if same else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write(cases: list[Case], versions: dict[str, str]) -> str:
    """The page."""
    stacks: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        stacks[case.stack].append(case)
    names = sorted(
        stacks, key=lambda name: (-len({case.feature for case in stacks[name]}), name.lower())
    )
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    lines = [
        "# Integrations",
        "",
        "What was tried with each training stack. Every cell comes from tests that run the library itself.",
        "`python docs/integrations.py --write` runs them and writes the page. *Passed* leads to the tests;",
        "*refused* means that an error says what to do, which a test checks; an empty cell has no test.",
        "[Training](guides/training.md#trainers-and-checkpoints) tells how to use the stacks.",
        "",
        f"Run with {used}.",
        "",
        *table({name: stacks[name] for name in names if name not in PARALLEL}, FEATURES),
        "",
        "## Several processes",
        "",
        "Stacks in which two or four processes have one model. Losses, gradients and merged weights are",
        "those of one process. [Many GPUs](guides/training.md#many-gpus) tells how to use them.",
        "",
        *table({name: stacks[name] for name in PARALLEL if name in stacks}, PARALLEL_FEATURES),
    ]
    lines += [
        "",
        "## Tests",
        "",
        "The last columns say how many cases of a test passed, and in which environment: that of `make",
        "test`, or the one that `make test-stacks` makes for a stack. A test that was not run says why.",
    ]
    for name in names:
        lines += ["", f"### {name}", "", "| feature | result | test | cases | where |"]
        lines += ["|---|---|---|---|---|", *rows(stacks[name])]
    return "\n".join(lines) + "\n"


def listed(page: str) -> set[tuple[str, str, str]]:
    """The stack, the feature and the test of each row of the page."""
    found, stack = set(), ""
    for line in page.splitlines():
        if line.startswith("### "):
            stack = line[4:]
        elif row := re.match(r"\| ([^|]+) \| [^|]+ \| \[`(\w+)`\]\(\.\./([\w./]+)\) \|", line):
            found.add((stack, row[1], f"{row[3]}::{row[2]}"))
    return found


def check() -> None:
    """Ends with an error if tests have come or gone since the page was written."""
    cases, _ = record_in(Path(sys.executable), "here", "feature", "--collect")
    there = {(case.stack, case.feature, case.test) for case in cases}
    shown = listed(PAGE.read_text(encoding="utf-8"))
    if there != shown:
        missing, gone = sorted(there - shown), sorted(shown - there)
        raise SystemExit(
            f"{PAGE.name} is not up to date: it lacks {missing} and lists {gone}. Run `make test-stacks` and "
            "`python docs/integrations.py --write`"
        )


def main() -> None:
    """Writes the page, checks it, or records one environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", nargs="*", type=Path, metavar="FILE", help="write the page, from recorded files"
    )
    parser.add_argument("--check", action="store_true", help="compare the page with the tests")
    parser.add_argument("--record", type=Path, metavar="FILE", help="run the tests of this Python")
    parser.add_argument("--place", default="test extra", help="what that environment is called")
    parser.add_argument("--choose", default="feature", help="the tests, as pytest's -m")
    parser.add_argument("--collect", action="store_true", help="only list the tests")
    options = parser.parse_args()
    if options.record is not None:
        found = record(options.place, options.choose, collect=options.collect)
        options.record.write_text(json.dumps(found), encoding="utf-8")
    elif options.check:
        check()
    elif options.write is not None:
        cases: list[Case] = []
        versions: dict[str, str] = {}
        given = (read(file) for file in options.write)
        ran = (record_in(*environment) for environment in environments())
        for more, theirs in given if options.write else ran:
            cases += more
            versions = {**theirs, **versions}
        if failed := sorted(
            {f"{case.node} ({case.place})" for case in cases if case.outcome == "failed"}
        ):
            raise SystemExit(
                "these tests failed, so the page stays as it is:\n" + "\n".join(failed)
            )
        PAGE.write_text(write(best(cases), versions), encoding="utf-8")
    else:
        parser.error("--write, --check or --record")


if __name__ == "__main__":
    main()
