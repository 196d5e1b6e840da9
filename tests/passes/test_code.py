"""Which weights code reads by itself: by its source, and by its names where there is none."""

from __future__ import annotations

import ast
import linecache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.passes.match.readers import weights_asked, weights_read

ROOT = Path(__file__).resolve().parents[2]
ALL = {"kernel", "fc.weight", "out.weight", "layers.0.weight", "layers.1.weight"}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def product(self, x):
        return F.linear(x, self.fc.weight)


def read(forward):
    module = type("Model", (Base,), {"forward": forward})()
    # Layers of PyTorch run their own forward, as regions do.
    return {name for name, _ in weights_read(module, frozenset())}


def asked(forward):
    return {name for name, _ in weights_asked(type("Model", (Base,), {"forward": forward})())}


def in_a_loop(self, x):
    for layer in self.layers:
        x = F.linear(x, layer.weight)
    return x


def with_another_name(this, x):
    return this.out(F.linear(x, this.fc.weight))


def in_an_inner_function(self, x):
    def inner(y):
        return F.linear(y, self.fc.weight)

    return inner(x)


def all_of_them(self, x):
    for name, p in self.named_parameters():
        x = x + p.sum() if name else x
    return x


def written(self, x):
    self.fc.weight *= 2
    return self.fc(x)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: self.fc(x), set()),
        (lambda self, x: x @ self.kernel, {"kernel"}),
        (lambda self, x: F.linear(x, self.fc.weight), {"fc.weight"}),
        (lambda self, x: x @ self.fc.weight.t(), {"fc.weight"}),
        (lambda self, x: F.linear(x, self.fc.weight[0:2]), {"fc.weight"}),
        (
            lambda self, x: F.linear(x, self.layers[0].weight),
            {"layers.0.weight", "layers.1.weight"},
        ),
        (
            lambda self, x: x @ self.layers[len(x) - 1].weight,
            {"layers.0.weight", "layers.1.weight"},
        ),
        (lambda self, x: x @ self.layers[1:][0].weight, {"layers.0.weight", "layers.1.weight"}),
        (lambda self, x: F.linear(x, getattr(self.fc, "weight")), {"fc.weight"}),  # noqa: B009
        (lambda self, x: F.linear(x, getattr(self, "fc").weight), {"fc.weight"}),  # noqa: B009
        (lambda self, x: x @ self.layers[self.fc.weight.argmax()](x), {"fc.weight"}),
        (lambda self, x: sum(F.linear(x, m.weight) for m in self.layers), ALL - {"kernel"}),
        (lambda self, x: self.product(x), {"fc.weight"}),
        (lambda self, x: self.fc(x).to(self.fc.weight.dtype), set()),
        (lambda self, x: self.fc(x).view(self.fc.weight.size(0)), set()),
        (lambda self, x: self.fc(x) if isinstance(self.fc.weight, nn.Parameter) else x, set()),
        (lambda self, x: self.fc(x) if hasattr(self.fc, "weight") else x, set()),
        (lambda self, x: x.to(next(self.parameters()).dtype), set()),
        (lambda self, x: x.to(next(iter(self.parameters())).dtype), set()),
        (lambda self, x: x.to(next(p.dtype for p in self.parameters())), set()),
        (lambda self, x: x + sum(p.sum() for p in self.parameters()), ALL),
        (lambda self, x: next(p for p in [x]) + len(self.state_dict()), ALL),
        (all_of_them, ALL),
        (in_a_loop, ALL - {"kernel"}),
        (with_another_name, {"fc.weight"}),
        (in_an_inner_function, {"fc.weight"}),
        (written, {"fc.weight"}),
    ],
)
def test_what_the_source_says(forward, expected):
    assert read(forward) == expected


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: x.to(self.fc.weight.dtype), {"fc.weight"}),
        (lambda self, x: x.view(self.kernel.shape[0], -1), {"kernel"}),
        (lambda self, x: x.to(self.fc.weight.device), set()),
        (lambda self, x: F.linear(x, self.fc.weight), set()),
        (lambda self, x: x.to(getattr(self.fc, "weight").dtype), {"fc.weight"}),  # noqa: B009
    ],
)
def test_what_is_asked_of_weights(forward, expected):
    assert asked(forward) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("self.fc(x)", set()),
        ("x @ self.kernel", {"kernel"}),
        ("F.linear(x, self.fc.weight)", ALL - {"kernel"}),
        ("F.linear(x, getattr(self.fc, 'weight'))", ALL - {"kernel"}),
        ("x.to(self.fc.weight.dtype)", ALL - {"kernel"}),
        ("x + sum(p.sum() for p in self.parameters())", ALL),
        ("x.to(next(self.parameters()).dtype)", set()),
    ],
)
def test_without_a_source_whatever_the_names_may_mean_counts(body, expected):
    space = {"F": F}
    exec(f"def forward(self, x):\n    return {body}", space)
    assert read(space["forward"]) == expected
    assert asked(space["forward"]) == (expected if ".dtype" in body else set())


def test_a_source_that_was_edited_is_not_believed(tmp_path):
    path = tmp_path / "edited.py"
    path.write_text("def forward(self, x):\n    return F.linear(x, self.fc.weight)\n")
    space = {"F": F}
    exec(compile(path.read_text(), str(path), "exec"), space)
    path.write_text("def forward(self, x):\n    return self.fc(x)\n")
    linecache.checkcache(str(path))
    assert read(space["forward"]) == ALL - {"kernel"}


def test_nobody_knows_opcodes():
    """Their names change from one version of Python to the next, and nothing would say so."""
    for folder in ("lora_fx", "passes", "export", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [
                    one.name for one in getattr(node, "names", ()) if isinstance(one, ast.alias)
                ]
                assert "dis" not in [*names, getattr(node, "module", "")], path
                assert getattr(node, "attr", "") not in ("opname", "opmap", "opcode"), path
