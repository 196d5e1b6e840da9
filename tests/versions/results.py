"""What a run in an environment has shown, kept in ``results.json`` and as a table in CONTRIBUTING.md."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from tests.versions.environments import NAMES

__all__ = [
    "LIBRARIES",
    "PAGE",
    "RESULTS",
    "Result",
    "Suite",
    "load",
    "store",
    "table",
    "write_page",
]

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
LIBRARIES = ("torch", "numpy", "transformers", "peft", "onnx", "onnxscript", "onnxruntime-gpu")
_MARKS = re.compile(r"(<!-- versions -->\n).*?(?=<!-- /versions -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Suite:
    """How many tests of the default suite have passed."""

    passed: int
    skipped: int
    failed: int

    @classmethod
    def of_report(cls, path: Path) -> Suite | None:
        """Read a report of pytest in JUnit's format; None if there is no whole one."""
        try:
            total = ET.parse(path).getroot().find("testsuite")
        except (OSError, ET.ParseError):
            return None
        if total is None:
            return None
        count = {
            name: int(total.attrib[name]) for name in ("tests", "skipped", "failures", "errors")
        }
        failed = count["failures"] + count["errors"]
        return cls(count["tests"] - count["skipped"] - failed, count["skipped"], failed)


@dataclasses.dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        date: The day, as 2026-11-29.
        python: The version of Python.
        versions: What was installed of :data:`LIBRARIES`.
        snippet: The README's example has run.
        demo: The demo has run.
        suite: The default suite; None where it did not end.
    """

    date: str
    python: str
    versions: Mapping[str, str]
    snippet: bool
    demo: bool
    suite: Suite | None

    @property
    def passed(self) -> bool:
        """Everything has run, and nothing has failed."""
        tests = self.suite is not None and self.suite.passed > 0 and not self.suite.failed
        return self.snippet and self.demo and tests


def load(path: Path = RESULTS) -> dict[str, Result]:
    """Return the latest result of each environment, in the order of :data:`NAMES`."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results = {}
    for name in sorted(rows.keys() & set(NAMES), key=NAMES.index):
        row = rows[name]
        suite = row.pop("suite")
        results[name] = Result(**row, suite=suite and Suite(**suite))
    return results


def store(results: Mapping[str, Result], path: Path = RESULTS) -> None:
    """Write the results."""
    rows = {name: dataclasses.asdict(result) for name, result in results.items()}
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def table(results: Mapping[str, Result]) -> str:
    """Return the results as a table of Markdown."""
    head = ("environment", "Python", *LIBRARIES, "snippet", "demo", "default suite", "date")
    rows = [
        _row(name, results[name]) if name in results else (name, *[""] * (len(head) - 2), "not yet")
        for name in NAMES
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))


def _row(name: str, result: Result) -> Sequence[str]:
    suite = result.suite
    counts = "did not end"
    if suite is not None:
        parts = {"passed": suite.passed, "skipped": suite.skipped, "failed": suite.failed}
        counts = ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)
    versions = [result.versions.get(library, "") for library in LIBRARIES]
    did = ["runs" if ran else "fails" for ran in (result.snippet, result.demo)]
    return (name, result.python, *versions, *did, counts, result.date)


def write_page(results: Mapping[str, Result], page: Path = PAGE) -> None:
    """Write the table into CONTRIBUTING.md, between its marks."""
    text = page.read_text(encoding="utf-8")
    written = _MARKS.sub(lambda marks: f"{marks[1]}\n{table(results)}\n", text)
    page.write_text(written, encoding="utf-8")
