"""What holds for every test: no network, fixed seeds, one torch thread per test process."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Subprocesses of a test, too.
    os.environ["OMP_NUM_THREADS"] = "1"

import gc
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from lora_fx.garbage import collector_paused

ROOT = Path(__file__).resolve().parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Timings say nothing on a shared machine, and a failure must come back when it is run again.
hypothesis.settings.register_profile("lora_fx", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("lora_fx")


SLOW = ROOT / "tests" / "slow.txt"
"""Names of tests, and of files of tests, that took longer than `make slow-list` allows."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-slow",
        type=float,
        metavar="SECONDS",
        help="write the names of tests that took longer to tests/slow.txt",
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    limit = config.getoption("--write-slow")
    if limit is None:
        return
    reports = [one for found in terminalreporter.stats.values() for one in found]
    timed = [one for one in reports if isinstance(one, pytest.TestReport)]
    ran = {name for one in timed for name in (one.nodeid, _file_of(one.nodeid))}
    # What a fixture of a file takes goes to the next test where one of them is left out.
    names = {
        _file_of(one.nodeid) if one.when == "setup" else one.nodeid
        for one in timed
        if one.duration >= limit
    }
    names |= set(SLOW.read_text(encoding="utf-8").splitlines()) - ran
    kept = sorted(name for name in names if "::" not in name or _file_of(name) not in names)
    SLOW.write_text("".join(f"{name}\n" for name in kept), encoding="utf-8")


def _file_of(name: str) -> str:
    return name.partition("::")[0]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep Python's collector from looking through 17,000 tests, again and again.

    It takes half of the time of the collection otherwise, and half a second each later time.
    """
    with collector_paused():
        yield
        gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = frozenset(SLOW.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in slow or _file_of(item.nodeid) in slow:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(scope="module")
def packed_masks() -> Iterator[None]:
    """Dropout masks as bits for small tensors too: what large ones have, on small numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_fx.runtime.kernels.masks.FEW", 0)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    logging.disable(logging.NOTSET)  # whatever a command that a test has run has left
    logging.getLogger("lora_fx").setLevel(logging.NOTSET)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if (
        "torch._dynamo" in sys.modules
    ):  # what it has compiled, and given up on, belongs to the process
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
