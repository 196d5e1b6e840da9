"""Calls with an axis of size 0: the right empty output, or a typed error, and never ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_fx import OnnxSession
from lora_fx.errors import ExportError
from lora_fx.export import ort
from lora_fx.export.onnx import export_onnx
from lora_fx.export.ort import INNER_SIZES_KEY, EmptyAxisError, Port, empty_outputs, size_of


class Applied(nn.Module):
    """A layer, and something that is done to what it gives."""

    def __init__(self, then: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6)
        self.w = nn.Parameter(torch.randn(5, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm = nn.LSTM(6, 4)
        self.norm = nn.GroupNorm(2, 6)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.fc(x), x)


# Each of these ends the process in ONNX Runtime 1.31, or gives values of unused memory, in one of the calls
# of `test_no_call...`; the last ones are fine there.
THEN: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "einsum": lambda m, q, x: torch.einsum("bqd,bkd->bqk", q, x),
    "bmm": lambda m, q, x: torch.bmm(q, x.mT),
    "left": lambda m, q, x: m.w @ q.mT,
    "over-sequence": lambda m, q, x: q.mT @ x,
    "attention": lambda m, q, x: m.attention(q, q, q, need_weights=False)[0],
    "lstm": lambda m, q, x: m.lstm(q.transpose(0, 1))[0],
    "group-norm": lambda m, q, x: m.norm(q.mT),
    "mean": lambda m, q, x: q.mean(1),
    "sum": lambda m, q, x: q.sum(1),
    "flat": lambda m, q, x: q.flatten(0, 1),
    "inner-einsum": lambda m, q, x: torch.einsum("bqd,bkd->bqk", q[1:], x[1:]),
    "inner-over-sequence": lambda m, q, x: q[:, 2:].mT @ x[:, 2:],
    "shift": lambda m, q, x: torch.cat([q[:, :1], q[:, :-1]], 1),
}


def answer(session: OnnxSession, x: Tensor) -> Tensor | ExportError:
    """The output, or the error that a call raises."""
    try:
        output: Tensor = session.run(x)["output"]
    except ExportError as error:
        return error
    return output


@pytest.mark.parametrize("what", THEN)
def test_no_call_with_an_empty_axis_reaches_onnx_runtime(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Applied(THEN[what]).eval()
    export_onnx(model, tmp_path / "m.onnx", torch.randn(3, 5, 6))
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    ran: list[object] = []
    run = ort.bound_run
    monkeypatch.setattr(ort, "bound_run", lambda *a, **k: ran.append(a) or run(*a, **k))
    right = 0
    for shape in (
        (0, 5, 6),
        (3, 0, 6),
        (0, 0, 6),
        (1, 5, 6),
        (3, 2, 6),
        (1, 1, 6),
        (2, 4, 6),
        (2, 5, 6),
    ):
        x = torch.randn(shape)
        ran.clear()
        got = answer(session, x)
        if isinstance(got, ExportError):
            # A fixed axis, or no empty output: said before anything runs.
            assert "has shape" in str(got) or isinstance(got, EmptyAxisError)
            assert not ran
            continue
        assert bool(ran) <= (0 not in shape)
        try:
            with torch.no_grad():
                want = model(x)
        except RuntimeError:  # group_norm of PyTorch 2.15
            assert 0 in shape
            continue
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        right += 1
    assert right >= 1  # the last call is an ordinary one
    assert ran


def test_it_is_so_in_a_process_of_its_own(tmp_path: Path) -> None:
    # What is tested above would be the end of the tests: here it is a return code.
    export_onnx(Applied(THEN["einsum"]).eval(), tmp_path / "m.onnx", torch.randn(3, 5, 6))
    script = (
        "import sys, numpy as np; from lora_fx import OnnxSession\n"
        "s = OnnxSession(sys.argv[1], 'cpu')\n"
        "print(s.run(np.zeros((0, 4, 6), np.float32))['output'].shape)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m.onnx")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["(0,", "4,", "4)"]


def test_shapes_whose_inside_is_empty_are_not_compared_but_named(tmp_path: Path) -> None:
    model = Applied(THEN["inner-over-sequence"]).eval()
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(3, 5, 6))
    assert report.inputs == {"x": ("batch", "sequence", 6)}
    assert any(
        "inside the model has size 0 (sequence - 2)" in why
        for why in report.shapes_skipped.values()
    )
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    assert json.loads(session.metadata[INNER_SIZES_KEY]) == ["sequence - 2"]
    with pytest.raises(
        EmptyAxisError, match=r"size 0 \(sequence - 2\) on x \[1, 2, 6\].*output.*6, 6"
    ):
        session.run(torch.randn(1, 2, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool])
def test_empty_outputs_have_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    class To(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).to(dtype)

    export_onnx(To(), tmp_path / "m.onnx", torch.randn(3, 4))
    got = OnnxSession(tmp_path / "m.onnx", "cpu").run(torch.zeros(0, 4))["output"]
    assert (got.shape, got.dtype) == ((0, 4), dtype)


@pytest.mark.parametrize(
    ("axis", "size"),
    [
        (7, 7), (None, None), ("b", 0), ("s", 5), ("2*s + 1", 11), ("s*b", 0), ("(s**2)//s", 5),
        ("s//2", 2), ("s/2", None), ("-s + 6", 1), ("Max(1, b)", 1), ("floor(s/2)", 2), ("Mod(s, 3)", 2),
        ("s//b", None), ("u0", None), ("__import__('os').getcwd()", None), ("s.real", None), ("s +", None),
        ("s**s**s**s", None), ("True", None), ("1.5", None), ("open('x')", None), ("Max(s)", None),
    ],
)  # fmt: skip
def test_sizes_of_expressions(axis: int | str | None, size: int | None) -> None:
    assert size_of(axis, {"b": 0, "s": 5}) == size


def test_a_name_that_looks_like_an_expression_is_a_name() -> None:
    assert size_of("s-b", {"b": 2, "s": 5, "s-b": 0}) == 0
    assert size_of("2*s", {"b": 2, "s": 5, "s-b": 0}) is None


def test_the_past_of_a_decoder_may_be_empty() -> None:
    ports = [Port("past", "float32", ("batch", 2, "past_length", 4))]
    outputs = [Port("present", "float32", ("batch", 2, "past_length + 1", 4))]
    shapes = {"past": (1, 2, 0, 4)}
    assert empty_outputs(ports, outputs, shapes, "m", task=True) is None
    with pytest.raises(EmptyAxisError, match="axis 2 of 'past' has size 0"):
        empty_outputs(ports, outputs, shapes, "m")
    found = empty_outputs(ports, outputs, {"past": (0, 2, 0, 4)}, "m", task=True)
    assert found == [(0, 2, 1, 4)]
