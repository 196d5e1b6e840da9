"""Runtimes that cannot share an environment with the tests: each is in ``.peers/NAME`` and runs a script."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSUMERS = Path(__file__).parent / "consumers"


def require(runtime: str) -> Path:
    """The folder of a runtime; the test is skipped where it is not installed."""
    peer = ROOT / ".peers" / runtime
    if not (ROOT / ".peers" / f".runtime-{runtime}").exists():
        pytest.skip(f"{runtime} is not installed: make test-runtimes does that")
    return peer


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test of a runtime that is not installed before its fixtures write files for it."""
    for mark in item.iter_markers("runtime"):
        for runtime in mark.args:
            require(runtime)


@pytest.fixture
def consume() -> Callable[..., Any]:
    """Runs a script of ``consumers`` with a runtime, and reads the JSON that it prints last."""

    def run(runtime: str, script: str, *arguments: object) -> Any:
        peer = require(runtime)
        # Node looks for packages from the folder of the script upwards.
        if script.endswith(".mjs"):
            copied = shutil.copyfile(CONSUMERS / script, peer / script)
            command = ["node", str(copied)]
        else:
            command = [str(peer / "bin" / "python"), str(CONSUMERS / script)]
        done = subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
