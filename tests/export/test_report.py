"""The report as text and as JSON, and what importing the package does not import."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lora_fx.export.report import ExportReport, OutputParity

REPORT = ExportReport(
    path="out/m.onnx",
    files={"m.onnx": 45_678, "m.onnx.0011aabb.data": 12_300_000},
    opset=20,
    dtype="fp32",
    nodes=123,
    operators={"MatMul": 120, "Add": 3},
    initializers=38,
    inputs={"input_ids": ("batch", "sequence"), "scale": (1,)},
    outputs={"logits": ("batch", "sequence", 99)},
    dynamic_axes={"input_ids": {0: "batch", 1: "sequence"}, "scale": {}},
    axis_limits={"sequence": 64},
    fixed_axes={"scale[0]": "the example has size 1 here"},
    baked_arguments={"factor": "3.0"},
    verified=True,
    unverified_reason="",
    parity=(OutputParity("logits", 2.5e-6, 1e-7, 1e-4), OutputParity("ids", 0.0, 0.0, 0.0, 0.25)),
    shapes_tried=({"input_ids": (2, 7), "scale": (1,)}, {"input_ids": (3, 10), "scale": (1,)}),
    values_tried="input_ids: rows of the example",
    shapes_skipped={"input_ids [1, 3]": "too short"},
    provider="cpu",
    reference="the model in PyTorch",
    seconds={"capturing the model": 1.0, "writing the file": 0.5},
    metadata={"lora_fx.version": "0.1.0"},
    versions={"torch": "2.13.0"},
    opset_reason="asked for",
)


def test_text_says_what_was_written_and_how_it_was_checked() -> None:
    text = str(REPORT)
    for part in (
        "out/m.onnx: 12.3 MB, opset 20, fp32, 123 nodes, 38 initializers, 1.5 s",
        "opset 20: asked for",
        "m.onnx.0011aabb.data",
        "input_ids[batch, sequence]",
        "sequence is at most 64",
        "fixed: scale[0]: the example has size 1 here",
        "baked in: factor = 3.0",
        "checked on cpu against the model in PyTorch, with\n    input_ids [2, 7], scale [1]\n    input_ids",
        "parity logits: max error 2.5e-06 absolute, 1.0e-07 relative (allowed 1e-04)",
        "(allowed 0e+00, PyTorch in this precision 2.5e-01)",
        "  input_ids: rows of the example\n",
        "not tried: input_ids [1, 3]: too short",
    ):
        assert part in text
    assert "NOT CHECKED" not in text


def test_text_of_an_unchecked_export_says_so() -> None:
    report = dataclasses.replace(
        REPORT, verified=False, unverified_reason="verify=False", parity=(), files={"m.onnx": 999}
    )
    assert "NOT CHECKED against PyTorch: verify=False" in str(report)
    assert "1.0 kB" in str(report)
    assert report.max_abs_error == report.max_rel_error == 0.0


def test_json_holds_every_field() -> None:
    data = json.loads(REPORT.to_json())
    assert set(data) == {field.name for field in dataclasses.fields(ExportReport)}
    assert data["parity"][0]["max_abs_error"] == 2.5e-6
    assert data["dynamic_axes"]["input_ids"]["1"] == "sequence"
    assert data["shapes_tried"][1]["input_ids"] == [3, 10]


def test_json_has_null_for_what_is_not_finite() -> None:
    """JSON has neither infinity nor NaN: a reader would refuse the whole report."""
    worst = OutputParity("logits", float("inf"), float("nan"), 1e-4)
    data = json.loads(
        dataclasses.replace(REPORT, parity=(worst,)).to_json(), parse_constant=pytest.fail
    )
    assert data["parity"][0]["max_abs_error"] is None
    assert data["parity"][0]["max_rel_error"] is None


def test_totals_and_frozen() -> None:
    assert REPORT.max_abs_error == 2.5e-6
    assert REPORT.max_rel_error == 1e-7
    assert REPORT.total_seconds == 1.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        REPORT.opset = 21  # type: ignore[misc]
