"""Generator of docs/integrations.md, the table of training stacks and their features, from test results.

``python docs/integrations.py --write`` runs every test with the marker ``feature`` and writes the page. It
runs the tests here and in each environment that ``make test-stacks`` has made. ``--record FILE --place NAME``
runs the tests in one environment, and ``--write FILE ...`` writes the page from recorded files. ``--check``
compares the page with the existing tests, and runs none.
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
# Stacks in which several processes share one model, and the features that were tried with them.
PARALLEL = (
    "DDP",
    "FSDP2",
    "HSDP",
    "tensor parallel",
    "FSDP2 x TP",
    "context parallel",
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
    """Result of one test with the marker for one feature of a stack.

    Attributes:
        stack: Stack that has the feature.
        feature: Feature, one of :func:`features_of` the stack.
        refused: True if the test shows that the feature is refused, with an error that says what to do.
        test: File and function of the test.
        node: Node id of the test, with its parameters.
        outcome: "passed", "failed", "skipped", or "collected" if the test was not run.
        reason: Reason why the test was skipped.
        environment: Environment in which the test ran.
    """

    stack: str
    feature: str
    refused: bool
    test: str
    node: str
    outcome: str
    reason: str
    environment: str


def features_of(stack: str) -> tuple[str, ...]:
    """Return the columns of the table that a stack is in."""
    return PARALLEL_FEATURES if stack in PARALLEL else FEATURES


class Recorder:
    """Plugin of pytest that keeps the outcomes of the tests with the marker."""

    def __init__(self, environment: str) -> None:
        self.environment = environment
        self.items: list[pytest.Item] = []
        self.outcomes: dict[str, tuple[str, str]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keep the selected tests."""
        self.items = list(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome. A test has passed if its call has passed, and setup and teardown did not fail."""
        if report.outcome == "passed" and report.when != "call":
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        self.outcomes[report.nodeid] = (report.outcome, reason.removeprefix("Skipped: "))

    def cases(self) -> list[Case]:
        """Return a case for each test and feature."""
        cases = []
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
                        stack,
                        feature,
                        refused,
                        test,
                        item.nodeid,
                        outcome,
                        reason,
                        self.environment,
                    )
                    cases.append(case)
        return cases


def record(environment: str, chosen: str, *, collect: bool) -> dict[str, Any]:
    """Run or collect the tests of this environment. Return the cases and the versions of libraries."""
    recorder = Recorder(environment)
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
    python: Path, environment: str, chosen: str, *more: str
) -> tuple[list[Case], dict[str, str]]:
    """Do the same in a process of another environment's Python."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [
            str(python),
            __file__,
            "--record",
            str(out),
            "--place",
            environment,
            "--choose",
            chosen,
        ]
        process = subprocess.run([*command, *more], cwd=ROOT, check=False, stdout=subprocess.PIPE)
        if not out.is_file():
            raise SystemExit(f"{environment}: {process.stdout.decode()}")
        return read(out)


def read(file: Path) -> tuple[list[Case], dict[str, str]]:
    """Return the cases and the versions that were recorded in a file."""
    recorded = json.loads(file.read_text(encoding="utf-8"))
    return [Case(**case) for case in recorded["cases"]], recorded["versions"]


def environments() -> list[tuple[Path, str, str]]:
    """Return Python, name and tests of this environment, and of those of ``make test-stacks``."""
    pythons = [(Path(sys.executable), "test extra", "feature and not cuda")]
    for stamp in sorted((ROOT / ".peers").glob(".stack-*")):
        name = stamp.name.removeprefix(".stack-")
        python = ROOT / ".peers" / name / "bin" / "python"
        pythons.append((python, name, "feature and stack and not cuda"))
    return pythons


def best(cases: list[Case]) -> list[Case]:
    """Return one case for each test and feature, from an environment where the test ran if there is one."""
    order = ("failed", "passed", "skipped", "collected")
    chosen: dict[tuple[str, str, str], Case] = {}
    for case in sorted(cases, key=lambda case: order.index(case.outcome)):
        chosen.setdefault((case.stack, case.feature, case.node), case)
    return list(chosen.values())


def verdict(cases: list[Case]) -> str:
    """Return the text of the cell for a stack and a feature."""
    ran = [case for case in cases if case.outcome == "passed"]
    if not ran:
        return "not run here"
    return "refused" if all(case.refused for case in ran) else "passed"


def rows(cases: list[Case]) -> list[str]:
    """Return the rows of one stack, one for each feature and test function."""
    lines = []
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
                where = ", ".join(sorted({case.environment for case in ran}))
                count = str(len(ran))
            else:
                where, count = same[0].reason or "no reason is known", "0"
            lines.append(
                f"| {feature} | {result} | [`{function}`](../{file}) | {count} | {where} |"
            )
    return lines


def table(stacks: dict[str, list[Case]], features: tuple[str, ...]) -> list[str]:
    """Return a table with one row for each stack and one column for each feature."""
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
    """Return the page."""
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
        "A *stack* is a library, or a feature of one, that trains models or changes them. The tables show",
        "which features of lora-fx were tested with each stack. Every result comes from tests that run the",
        "library itself. [Trainers and checkpoints](guides/trainers.md) shows how to use the stacks.",
        "",
        "| cell | meaning |",
        "|---|---|",
        "| passed | the tests of this feature passed; the link leads to them |",
        "| refused | lora-fx raises an error that says what to do; a test checks this |",
        "| not run here | there is a test, but its library or device was missing |",
        "| empty | there is no test |",
        "",
        "`python docs/integrations.py --write` runs the tests and writes this page. The last run used",
        f"{used}.",
        "",
        *table({name: stacks[name] for name in names if name not in PARALLEL}, FEATURES),
        "",
        "## Several processes",
        "",
        "In these stacks, two or four processes train one model together. The tests compare losses,",
        "gradients and merged weights with those of one process.",
        "[Many processes](guides/processes.md) shows how to use them.",
        "",
        *table({name: stacks[name] for name in PARALLEL if name in stacks}, PARALLEL_FEATURES),
    ]
    lines += [
        "",
        "## Tests",
        "",
        "*Cases* is the number of cases of a test that passed. *Where* is the environment in which the test",
        "ran: `test extra` is that of `make test`, and the others are made by `make test-stacks`. For a test",
        "that did not run, it is the reason.",
    ]
    for name in names:
        lines += ["", f"### {name}", "", "| feature | result | test | cases | where |"]
        lines += ["|---|---|---|---|---|", *rows(stacks[name])]
    return "\n".join(lines) + "\n"


def listed(page: str) -> set[tuple[str, str, str]]:
    """Return the stack, the feature and the test of each row of the page."""
    rows_of_page, stack = set(), ""
    for line in page.splitlines():
        if line.startswith("### "):
            stack = line[4:]
        elif row := re.match(r"\| ([^|]+) \| [^|]+ \| \[`(\w+)`\]\(\.\./([\w./]+)\) \|", line):
            rows_of_page.add((stack, row[1], f"{row[3]}::{row[2]}"))
    return rows_of_page


def check() -> None:
    """Raise SystemExit if tests were added or removed since the page was written."""
    cases, _ = record_in(Path(sys.executable), "here", "feature", "--collect")
    existing = {(case.stack, case.feature, case.test) for case in cases}
    shown = listed(PAGE.read_text(encoding="utf-8"))
    if existing != shown:
        missing, gone = sorted(existing - shown), sorted(shown - existing)
        raise SystemExit(
            f"{PAGE.name} is not up to date: it lacks {missing} and lists {gone}. Run `make test-stacks` and "
            "`python docs/integrations.py --write`"
        )


def main() -> None:
    """Write the page, check it, or record one environment."""
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
        results = record(options.place, options.choose, collect=options.collect)
        options.record.write_text(json.dumps(results), encoding="utf-8")
    elif options.check:
        check()
    elif options.write is not None:
        cases: list[Case] = []
        versions: dict[str, str] = {}
        recorded = (read(file) for file in options.write)
        ran = (record_in(*environment) for environment in environments())
        for more, theirs in recorded if options.write else ran:
            cases += more
            versions = {**theirs, **versions}
        if failed := sorted(
            {f"{case.node} ({case.environment})" for case in cases if case.outcome == "failed"}
        ):
            raise SystemExit(
                "these tests failed, so the page stays as it is:\n" + "\n".join(failed)
            )
        PAGE.write_text(write(best(cases), versions), encoding="utf-8")
    else:
        parser.error("--write, --check or --record")


if __name__ == "__main__":
    main()
