"""Parameters of tests that say what docs/integrations.md shows of a stack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["features_in", "shown"]

_WORDS = {"dropout": "dropout", "dora": "DoRA", "bias": "biases"}


def features_in(name: str) -> list[str]:
    """Training, and what a case trains by the words in its name."""
    return ["train", *(feature for word, feature in _WORDS.items() if word in name.lower())]


def shown(
    names: Iterable[str], stack: Callable[[str], str], features: Callable[[str], Iterable[str]]
) -> list[Any]:
    """Cases of a test, each with what it shows of which stack."""
    return [
        pytest.param(name, id=name, marks=pytest.mark.feature(stack(name), *features(name)))
        for name in names
    ]
