"""Runtimes that cannot share an environment with the tests: each is in ``.peers/NAME`` and runs a script."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSUMERS = Path(__file__).parent / "consumers"


@pytest.fixture
def consume() -> Callable[..., Any]:
    """Runs a script of ``consumers`` with a runtime, and reads the JSON that it prints last."""

    def run(runtime: str, script: str, *arguments: object) -> Any:
        peer = ROOT / ".peers" / runtime
        program = peer / "node_modules" if script.endswith(".mjs") else peer / "bin" / "python"
        if not program.exists():
            pytest.skip(f"{runtime} is not installed: make test-runtimes does that")
        # Node looks for packages from the folder of the script upwards.
        if script.endswith(".mjs"):
            copied = peer / script
            copied.write_text((CONSUMERS / script).read_text(encoding="utf-8"), encoding="utf-8")
            command = ["node", str(copied)]
        else:
            command = [str(program), str(CONSUMERS / script)]
        done = subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
