"""The table of stacks lists the tests that there are; only running them can write it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(__file__).parents[2] / "docs" / "integrations.py"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    return runpy.run_path(str(COMMAND))


def test_the_page_lists_the_tests_that_there_are() -> None:
    ran = subprocess.run(
        [sys.executable, str(COMMAND), "--check"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_cells_say_what_became_of_the_tests(names: dict[str, Any]) -> None:
    def case(stack: str, feature: str, outcome: str, **more: Any) -> Any:
        more = {"refused": False, "reason": "", "environment": "here", **more}
        test = f"tests/test_{feature}.py::test_{stack}"
        return names["Case"](
            stack=stack, feature=feature, test=test, node=f"{test}[x]", outcome=outcome, **more
        )

    cases = [
        case("one", "train", "skipped", reason="trl is not installed"),
        case("one", "train", "passed", environment="trl"),
        case("one", "merge", "passed", refused=True),
        case("two", "save", "skipped", reason="ray is not installed"),
    ]
    page = names["write"](names["best"](cases), {"torch": "2"})
    assert "| one | [passed](#one) |  |  |  |  |  | [refused](#one) |  |" in page
    assert "| two |  |  |  |  | [not run here](#two) |  |  |  |" in page
    assert re.search(r"\| train \| passed \| \[`test_one`\]\(\S+\) \| 1 \| trl \|", page)
    assert re.search(r"\| save \| not run here \| .* \| 0 \| ray is not installed \|", page)
    assert names["listed"](page) == {(one.stack, one.feature, one.test) for one in cases}
