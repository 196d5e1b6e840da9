"""The environments of other versions, and the table of what they have shown."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lora_fx import versions
from tests.versions import environments, results
from tests.versions.results import Result, Suite

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10" time="1.0"/></testsuites>
"""


# A run that is to be recorded does not judge what is recorded.
recorded = pytest.mark.skipif("LORA_FX_RECORDS" in os.environ, reason="it is being recorded")


def row(**changes: object) -> Result:
    values = {
        "date": "2026-11-29",
        "python": "3.11.7",
        "versions": {"torch": "2.15.0", "numpy": "2.4.6"},
        "snippet": True,
        "demo": True,
        "suite": Suite(12_000, 300, 0),
    }
    return Result(**{**values, **changes})  # type: ignore[arg-type]


def test_every_declared_release_of_pytorch_has_an_environment() -> None:
    (torch,) = (line for line in PROJECT["dependencies"] if line.startswith("torch"))
    assert torch == f"torch>={environments.TORCH[0]}"
    minors = [int(release.partition(".")[2]) for release in environments.TORCH]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert versions.NEWEST["torch"] == environments.TORCH[-1]


def test_every_declared_python_has_an_environment() -> None:
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if " :: 3." in line]
    assert named == [PROJECT["requires-python"].removeprefix(">="), *environments.PYTHON]


def test_the_lower_bounds_are_all_of_what_users_install() -> None:
    bounds = [Requirement(line) for line in environments.lower_bounds()]
    names = {bound.name for bound in bounds}
    assert {
        "torch",
        "numpy",
        "transformers",
        "peft",
        "onnx",
        "onnxscript",
        "onnxruntime-gpu",
    } <= names
    assert "torch==2.11" in environments.lower_bounds()


@recorded
def test_what_was_tested_is_what_no_warning_is_about() -> None:
    """``NEWEST`` in ``lora_fx/versions.py`` is what the run on the newest PyTorch had installed."""
    installed = results.load()[environments.NEWEST].versions
    for name, newest in versions.NEWEST.items():
        # Environments have the wheel for GPUs, which comes after the one for CPUs.
        if name != "onnxruntime":
            assert installed[name].startswith(f"{newest}."), name


@recorded
def test_what_has_run_has_passed() -> None:
    assert [name for name, result in results.load().items() if not result.passed] == []


@recorded
def test_the_table_is_what_was_recorded() -> None:
    assert results.table(results.load()) in results.PAGE.read_text(encoding="utf-8")


def test_a_report_is_counted(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT, encoding="utf-8")
    assert Suite.of_report(tmp_path / "report.xml") == Suite(passed=4, skipped=3, failed=3)


@pytest.mark.parametrize("text", ["", REPORT[:70], "<other/>", None])
def test_a_report_that_is_not_whole_counts_as_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.xml").write_text(text, encoding="utf-8")
    assert Suite.of_report(tmp_path / "report.xml") is None


@pytest.mark.parametrize(
    ("changes", "passed", "words"),
    [
        ({}, True, "| runs | runs | 12,000 passed, 300 skipped | 2026-11-29 |"),
        ({"suite": Suite(5, 0, 2)}, False, "| 5 passed, 2 failed |"),
        ({"suite": None}, False, "| did not end |"),
        ({"suite": Suite(0, 3, 0)}, False, "| 3 skipped |"),
        ({"snippet": False}, False, "| fails | runs |"),
        ({"demo": False}, False, "| runs | fails |"),
    ],
)
def test_a_row_says_what_happened(changes: dict[str, object], passed: bool, words: str) -> None:
    result = row(**changes)
    assert result.passed is passed
    assert words in results.table({"torch-2.15": result})


def test_results_are_kept_and_written_into_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- versions -->\nold\n<!-- /versions -->\nafter\n", encoding="utf-8")
    results.store({"oldest": row(), "torch-2.11": row(suite=None)}, tmp_path / "results.json")
    shown = results.load(tmp_path / "results.json")
    assert list(shown) == ["torch-2.11", "oldest"]
    assert shown["oldest"] == row()
    results.write_page(shown, page)
    text = page.read_text(encoding="utf-8")
    assert "old\n" not in text
    assert results.table(shown) in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.versions", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    done = command("torch-1.13")
    assert done.returncode == 1
    assert "there are torch-2.11" in done.stderr


def test_a_python_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As a version manager has it: a command that only says what to install.
    (tmp_path / "python3.13").write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")
    (tmp_path / "python3.13").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"python-3\.13 needs python3\.13, which is not in PATH"):
        environments.environment("python-3.13")
    assert environments.obstacle("python-3.13")
    assert not environments.obstacle("torch-2.11")


def test_the_newest_one_is_listed_first() -> None:
    first, *others = command("--list").stdout.split()
    assert first == environments.NEWEST
    assert {*others} <= {*environments.NAMES} - {first}
