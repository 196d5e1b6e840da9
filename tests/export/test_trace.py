"""Which axes a trace keeps dynamic, and the formulas of the sizes in it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._sympy import functions as sizes

import lora_fx
from lora_fx.export.trace import _free_name, normal_size


class Same(nn.Module):
    """Pads as TensorFlow does, so that a stride divides what there is, rounded up."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, stride=2) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            high, wide = (max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) for size in x.shape[2:])
            pads = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
            x = conv(nn.functional.pad(x, pads)).relu()
        return x


def test_padding_at_every_stride_keeps_the_axes(tmp_path: Path) -> None:
    model = Same().eval()
    report = lora_fx.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 64, 70))
    assert report.dynamic_axes == {"x": {0: "batch", 2: "height", 3: "width"}}
    assert report.outputs["output"][2:] == ("((height + 31)//32)", "((width + 31)//32)")
    session = lora_fx.OnnxSession(tmp_path / "m.onnx", "cpu")
    for size in [(33, 64), (97, 130), (128, 31)]:
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(session.run(x)["output"], model(x), rtol=1e-4, atol=1e-5)


def test_names_of_axes_are_different() -> None:
    taken = {"sequence", "past_sequence"}
    assert _free_name("ids", "sequence", taken) == "ids_sequence"
    assert _free_name("past", "sequence", taken) == "past_past_sequence"
    assert _free_name("ids", "width", taken) == "width"


SIZES = st.deferred(
    lambda: st.one_of(
        st.sampled_from(["s", "t"]).map(
            lambda name: sympy.Symbol(name, integer=True, positive=True)
        ),
        st.integers(0, 9).map(sympy.Integer),
        st.builds(lambda a, b: a + b, SIZES, SIZES),
        st.builds(lambda a, b: a - b, SIZES, SIZES),
        st.builds(lambda a, b: a * b, SIZES, st.integers(1, 6).map(sympy.Integer)),
        st.builds(sizes.Max, SIZES, SIZES),
        st.builds(sizes.Min, SIZES, SIZES),
        *(
            st.builds(kind, SIZES, st.integers(1, 9).map(sympy.Integer))
            for kind in (sizes.FloorDiv, sizes.PythonMod)
        ),
        st.builds(
            lambda a, n: sizes.CeilToInt(sizes.IntTrueDiv(a, n)),
            SIZES,
            st.integers(1, 9).map(sympy.Integer),
        ),
    )
)


@settings(max_examples=200)
@given(SIZES, st.integers(1, 99), st.integers(1, 99))
def test_the_normal_form_of_a_size_is_the_same_number(formula: Any, s: int, t: int) -> None:
    numbers = {one: sympy.Integer({"s": s, "t": t}[one.name]) for one in formula.free_symbols}
    found = normal_size(formula)
    assert int(found.xreplace(numbers)) == int(formula.xreplace(numbers))


@pytest.mark.parametrize(
    ("formula", "wanted"),
    [
        ("s + PythonMod(7 - PythonMod(s, 7), 7)", "7*FloorDiv(s + 6, 7)"),
        ("Max(0, 2*CeilToInt(IntTrueDiv(s, 2)) + 1 - s)", "2*FloorDiv(s + 1, 2) + 1 - s"),
        ("Min(s, 7*FloorDiv(s + 6, 7))", "s"),
        ("FloorDiv(FloorDiv(s + 1, 2) + 1, 2)", "FloorDiv(s + 3, 4)"),
        ("FloorDiv(-s, 4)", "-FloorDiv(s + 3, 4)"),
        ("FloorDiv(8*s + 3*t + 5, 4)", "2*s + 1 + FloorDiv(3*t + 1, 4)"),
        ("Max(s, t)", "Max(s, t)"),
        ("Max(0, s - 3)", "Max(0, s - 3)"),
    ],
)
def test_normal_forms(formula: str, wanted: str) -> None:
    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in "st"}
    known = {**vars(sizes), **symbols}
    assert normal_size(eval(formula, known)) == eval(wanted, known)
