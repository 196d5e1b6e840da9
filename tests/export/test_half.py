"""Half-precision exports: judged by the model in fp32, and what half precision cannot hold."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from lora_fx.errors import ParityError
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from lora_fx.export.verify import (
    TOLERANCES,
    Compared,
    PrecisionError,
    difference,
    overflows,
)


class Scored(nn.Module):
    """Scores, masked with the lowest number of their dtype, and the place of the best one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.register_buffer("scale", torch.tensor(0.3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.linear(x) * self.scale
        masked = scores.masked_fill(scores < 0, torch.finfo(scores.dtype).min)
        return {"scores": masked, "best": scores.argmax(-1)}


class Scaled(nn.Module):
    """Goes up by ``factor`` and down again."""

    def __init__(self, factor: float, offset: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.factor, self.offset = factor, offset
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.factor + self.offset - self.offset) / self.factor


@pytest.mark.parametrize("cast", [True, False])
def test_the_reference_is_the_rounded_model_in_fp32(tmp_path: Path, cast: bool) -> None:
    model = Scored()
    example = torch.randn(3, 8)
    if cast:
        report = export_onnx(model, tmp_path / "m.onnx", example, dtype="fp16")
    else:
        report = export_onnx(model.half(), tmp_path / "m.onnx", example.half())
    assert report.dtype == "fp16"
    assert report.reference == "the model in PyTorch in fp32, its weights rounded to float16"
    assert {row.name: row.tolerance for row in report.parity} == {"scores": 1e-2, "best": 0.0}
    assert 0 < report.max_rel_error < 2e-3

    rounded = Scored().half()
    rounded.load_state_dict(model.half().state_dict())
    x = torch.randn(5, 8).half()
    got = OnnxSession(tmp_path / "m.onnx", "cpu").run(x)["scores"]
    wide = rounded.float()(x.float())["scores"]
    valid = wide >= 0
    torch.testing.assert_close(got.float()[valid], wide[valid], rtol=2e-3, atol=2e-3)


def test_fp32_is_compared_with_the_model_itself(tmp_path: Path) -> None:
    report = export_onnx(Scored(), tmp_path / "m.onnx", torch.randn(3, 8))
    assert report.reference == "the model in PyTorch"
    assert report.parity[0].tolerance == 1e-4


def test_overflow_is_an_error_that_says_so(tmp_path: Path) -> None:
    model, example = Scaled(1e5), torch.linspace(0.9, 1.1, 8).reshape(2, 4)
    message = r"overflows in fp16: output 'output' is not finite on x \[2, 4\].*6\.55e\+04.*bf16"
    with pytest.raises(PrecisionError, match=message):
        export_onnx(model, tmp_path / "m.onnx", example, dtype="fp16")
    assert not list(tmp_path.iterdir())
    assert export_onnx(model, tmp_path / "m.onnx", example).verified


def test_a_precision_that_is_too_coarse_is_told_from_a_wrong_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    example = torch.linspace(0.9, 1.1, 8).reshape(2, 4)
    model = Scaled(1.0, 1000.0)
    # The CPU provider rounds once, at the end.
    report = export_onnx(model, tmp_path / "m.onnx", example, dtype="fp16")
    (row,) = report.parity
    assert row.pytorch_rel_error is not None
    assert row.max_rel_error < 1e-3 < 5e-2 < row.pytorch_rel_error
    assert "fp16 is too coarse" in caplog.text
    assert "PyTorch in this precision" in str(report)
    (tmp_path / "m.onnx").unlink()

    def rounding(self: OnnxSession, inputs: list[Tensor], **_: Any) -> dict[str, Tensor]:
        return {"output": deepcopy(model).half()(*inputs).detach()}

    with monkeypatch.context() as patch:
        patch.setattr(OnnxSession, "run", rounding)
        message = r"fp16 is too coarse.*'output' of PyTorch.*that of the file.*another precision"
        with pytest.raises(PrecisionError, match=message):
            export_onnx(model, tmp_path / "m.onnx", example, dtype="fp16")
    assert not list(tmp_path.iterdir())

    save = onnx_ir.save

    def corrupting(model: onnx_ir.Model, file: Path, **options: Any) -> None:
        value = model.graph.initializers["bias"]
        assert value.const_value is not None
        one = value.const_value.dtype.numpy().type(1)
        value.const_value = onnx_ir.tensor(value.const_value.numpy() + one)
        save(model, file, **options)

    monkeypatch.setattr(onnx_ir, "save", corrupting)
    with pytest.raises(ParityError, match="differs from the model in PyTorch in fp32") as caught:
        export_onnx(nn.Linear(4, 4), tmp_path / "m.onnx", example, dtype="fp16")
    assert not isinstance(caught.value, PrecisionError)
    assert not list(tmp_path.iterdir())


class HalfOnly(nn.Module):
    """Runs in half precision alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.mm(x, torch.ones(4, 4, dtype=torch.float16))


def test_a_model_that_runs_in_half_precision_only_is_compared_as_it_is(tmp_path: Path) -> None:
    report = export_onnx(HalfOnly().half(), tmp_path / "m.onnx", torch.randn(2, 4).half())
    assert report.verified
    assert report.reference == ("the model in PyTorch in float16, since it does not run in fp32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tolerance_is_twenty_roundings_of_the_dtype(dtype: torch.dtype) -> None:
    assert TOLERANCES[dtype] == pytest.approx(20 * torch.finfo(dtype).eps / 2, rel=0.05)


def test_difference_and_overflow_look_at_admitted_positions_only() -> None:
    want = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    got = torch.tensor([[1.0, 2.0], [3.5, torch.inf]]).half()
    everything = Compared("y", want, got, torch.float16)
    first_column = replace(everything, valid=torch.tensor([[1, 1], [1, 0]]))
    assert overflows(everything)
    assert not overflows(first_column)
    assert difference(everything).max_abs_error == float("inf")
    row = difference(first_column)
    assert (row.max_abs_error, row.max_rel_error) == (0.5, 0.125)
    infinite = torch.tensor([torch.inf])
    assert not overflows(Compared("y", infinite, infinite, torch.float16))
    lowest = torch.tensor([torch.finfo(torch.float32).min])
    narrow = torch.tensor([torch.finfo(torch.float16).min]).half()
    assert difference(Compared("y", lowest, narrow, torch.float16)).max_abs_error == 0


@pytest.mark.cuda
def test_bf16_is_validated_where_there_is_cuda(tmp_path: Path) -> None:
    report = export_onnx(Scored(), tmp_path / "m.onnx", torch.randn(3, 8), dtype="bf16")
    assert report.verified
    assert report.provider == "cuda"
    assert report.parity[0].tolerance == 8e-2
