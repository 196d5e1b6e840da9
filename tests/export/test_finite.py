"""Models that ask whether values are finite, as those do that were trained in fp16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.onnx import export_onnx
from lora_fx.export.report import ExportReport
from lora_fx.export.session import OnnxSession


class Clamping(nn.Module):
    """Does something else in each branch, so that a wrong one is seen."""

    def __init__(self, test: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.test = test

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if {
            "not finite": lambda: not torch.isfinite(x).all(),
            "method": lambda: not x.isfinite().all(),
            "function": lambda: not torch.all(torch.isfinite(x)),
            "inf or nan": lambda: torch.isinf(x).any() or torch.isnan(x).any(),
        }[self.test]():
            x = x.clamp(-1000, 1000) + 5
        return x.relu()


@pytest.mark.parametrize("test", ["not finite", "method", "function", "inf or nan"])
def test_the_branch_of_finite_values_is_the_file_and_the_report_says_so(
    tmp_path: Path, test: str
) -> None:
    model, x = Clamping(test), torch.randn(3, 4)
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4))
    assert report.dynamic_axes == {"x": {0: "batch"}}
    assert report.operators == {"Gemm": 1, "Relu": 1}
    (place, *_) = report.finite
    assert "test_finite.py:" in place
    assert f"values are taken to be finite, at {place}" in str(report)
    got = OnnxSession(tmp_path / "m.onnx", "cpu").run(x)["output"]
    torch.testing.assert_close(got, model(x).detach())


class Otherwise(nn.Module):
    """Branches that one value decides, or other values."""

    def __init__(self, test: str) -> None:
        super().__init__()
        self.test = test

    def forward(self, x: Tensor) -> Tensor:
        if {
            "any finite": lambda: torch.isfinite(x).any(),
            "all infinite": lambda: torch.isinf(x).all(),
            "other values": (x > 0).all,
        }[self.test]():
            return x + 1
        return x - 1


@pytest.mark.parametrize("test", ["any finite", "all infinite", "other values"])
def test_other_branches_on_values_are_refused(tmp_path: Path, test: str) -> None:
    with pytest.raises(ExportError, match=r"cannot capture Otherwise.*data-dependent"):
        export_onnx(Otherwise(test), tmp_path / "m.onnx", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


def test_bart_in_half_precision(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        max_position_embeddings=32,
    )  # fmt: skip
    example = {"input_ids": torch.randint(3, 61, (2, 6))}

    def exported(dtype: str) -> ExportReport:
        model = transformers.BartModel(config).eval()
        return export_onnx(model, tmp_path / f"{dtype}.onnx", example, dtype=dtype)  # type: ignore[arg-type]

    half, single = exported("fp16"), exported("fp32")
    assert half.verified
    assert half.dynamic_axes == {"input_ids": {0: "batch", 1: "sequence"}}
    assert [place.split(" (")[0] for place in half.finite] == ["a condition in 'encoder.layers.0'"]
    assert single.finite == ()  # it asks in fp16 only
    assert half.operators == single.operators
