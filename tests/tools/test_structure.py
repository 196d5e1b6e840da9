from __future__ import annotations

import functools
import operator

import pytest
import torch
from torch import nn

from lora_fx.tools.draw.picture import clean, elide, follows, human, label_of, runs, times
from lora_fx.tools.draw.regions import Digests, target_name
from tests.tools.pictures import Block


def test_equal_modules_have_equal_digests() -> None:
    digest = Digests({})
    assert digest(Block(4)) == digest(Block(4))


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(4, 5),
        nn.Linear(4, 4, bias=False),
        nn.Linear(4, 4, dtype=torch.float64),
        nn.Linear(4, 4).requires_grad_(False),
        nn.Bilinear(4, 4, 4),
        nn.Sequential(nn.Linear(4, 4)),
    ],
)
def test_other_modules_have_other_digests(other: nn.Module) -> None:
    digest = Digests({})
    assert digest(nn.Linear(4, 4)) != digest(other)


def test_settings_count() -> None:
    digest = Digests({})
    assert digest(nn.Dropout(0.1)) != digest(nn.Dropout(0.2))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("0", "1", True),
        ("9", "10", True),
        ("layers.3", "layers.4", True),
        ("h.3.mlp", "h.4.mlp", True),
        ("encoder_layer_0", "encoder_layer_1", True),
        ("0", "2", False),
        ("1", "0", False),
        ("up", "down", False),
        ("conv1", "norm2", False),
        ("a.0", "b.1", False),
    ],
)
def test_follows(first: str, second: str, expected: bool) -> None:
    assert follows(first, second) is expected


def test_runs_stop_at_what_differs() -> None:
    names = ["0", "1", "2", "3", "norm"]
    assert [list(run) for run in runs(names, ["a", "a", "b", "b", "b"])] == [[0, 1], [2, 3], [4]]
    assert list(runs([], [])) == []


def test_target_names() -> None:
    assert target_name("layers.0") == "layers.0"
    assert target_name(torch.nn.functional.linear) == "torch.nn.functional.linear"
    assert target_name(operator.add) == "operator.add"
    assert target_name(torch.ops.aten.linear.default) == "aten.linear.default"
    assert "0x" not in target_name(functools.partial(operator.add, lambda: None))


def test_words() -> None:
    assert label_of("model.layers.3") == "layers.3"
    assert label_of("model.layers.3.mlp") == "mlp"
    assert label_of("3") == "3"
    assert elide("abcdefghij", 5) == "ab…ij"
    assert elide("abcde", 5) == "abcde"
    assert [human(n) for n in (0, 999, 1000, 16_777_216, 6_738_415_616)] == [
        "0",
        "999",
        "1 k",
        "16.8 M",
        "6.74 B",
    ]
    assert times((4, 5)) == "4×5"
    assert times(()) == "scalar"
    assert clean("a\x00b\ud800c\n") == "a\ufffdb\ufffdc\n"
