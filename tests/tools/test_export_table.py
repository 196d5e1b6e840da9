"""The report of an export in the terminal."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from lora_fx.export.report import ExportReport, OutputParity
from lora_fx.tools.cli.tables import render_export as render
from tests.export.test_report import REPORT


def shown(report: ExportReport) -> str:
    console = Console(width=160, record=True)
    with console.capture() as caught:
        console.print(render(report), highlight=False)
    return caught.get()


def test_everything_that_matters_is_in_the_tables() -> None:
    text = shown(REPORT)
    for part in (
        "m.onnx  45.7 kB",
        "m.onnx.0011aabb.data  12.3 MB",
        "fp32, opset 20",
        "123: 120 MatMul, 3 Add",
        "on cpu against the model in PyTorch",
        "1.5: capturing the model 1.0, writing the file 0.5",
        "batch, sequence, 99",
        "sequence 64",
        "the example has size 1 here",
        "parity on 2 shapes",
        "2.5e-06",
        "equal",
        "input_ids [1, 3]",
        "too short",
        "input_ids: rows of the example",
    ):
        assert part in text, part


def test_a_decoder_with_its_encoder_is_short() -> None:
    layers = {f"past_key_values.{layer}.key": ("batch", 2, "past_length", 4) for layer in range(3)}
    rows = tuple(OutputParity(f"present.{i}.key", 0.0, i * 1e-6, 1e-4) for i in range(3))
    encoder = dataclasses.replace(REPORT, files={"m.0011aabb.encoder.onnx": 1000}, seconds={})
    text = shown(
        dataclasses.replace(
            REPORT, task="text2text-generation", inputs=layers, parity=rows, encoder=encoder,
            swappable=("q", "v"),
        )
    )  # fmt: skip
    assert text.count("past_key_values") == 1
    assert "past_key_values.*.key" in text
    assert "present.*.key" in text
    assert "2.0e-06" in text
    assert "text2text-generation" in text
    assert "of any rank are inputs, at 2 places" in text
    before, beside = text.split("with the encoder beside it:")
    assert "the example has size 1 here" not in before  # the task has fixed it
    assert "m.0011aabb.encoder.onnx" in beside


def test_half_precision_shows_what_pytorch_gives_in_it() -> None:
    assert "PyTorch in fp32" in shown(REPORT)  # the report's second output has such a figure
    plain = tuple(dataclasses.replace(row, pytorch_rel_error=None) for row in REPORT.parity)
    assert "PyTorch in fp32" not in shown(dataclasses.replace(REPORT, parity=plain))


def test_an_unchecked_export_and_names_that_look_like_markup() -> None:
    report = dataclasses.replace(
        REPORT, verified=False, unverified_reason="verify=False", inputs={"[red]x": (1,)}
    )
    text = shown(report)
    assert "NOT CHECKED: verify=False" in text
    assert "[red]x" in text
    assert "parity" not in text
