"""Every test of a stack begins as a new process does."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_accelerator() -> Iterator[None]:
    """accelerate keeps how the first Accelerator of a process was made."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
