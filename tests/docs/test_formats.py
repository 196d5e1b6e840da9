"""The table of formats in the guide: complete, and what its command writes."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.extras import is_installed
from tests import formats, quantized
from tests.formats import COLUMNS, FORMATS, Format, Variant, row_of, rows_of_page


def test_every_format_of_the_tests_has_a_row() -> None:
    rows = rows_of_page()
    assert [*rows] == [row.name for row in FORMATS], "make formats"
    assert all(row.partition("\n")[0].count(" | ") == len(COLUMNS) - 1 for row in rows.values())
    schemes = {*quantized.SCHEMES}
    if importlib.util.find_spec("compressed_tensors"):
        from tests.lora_fx import test_compressed_tensors

        schemes |= {*test_compressed_tensors.SCHEMES}
    listed = [scheme for row in FORMATS for one in row.variants.values() for scheme in one.schemes]
    assert not schemes - {*listed}, "FORMATS of tests/formats.py lacks them"


def test_every_format_that_quantize_makes_has_a_row() -> None:
    loads = {line.split(" | ")[0]: line.split(" | ")[2] for line in rows_of_page().values()}
    names = {name for known in lora_fx.formats.formats() for name in known.names}
    shown = {name for name, load in loads.items() if formats.QUANTIZE in load}
    assert all(any(name.lower() in row.lower() for row in shown) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_a_row_is_what_its_models_did(row: Format) -> None:
    if not is_installed(row.library):
        pytest.skip(f"{row.library} is not installed")
    assert row_of(row) == rows_of_page()[row.name], "make formats"


# --- the command --------------------------------------------------------------------------------------


def test_cells_name_models_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {"a": ["x", "yes"], "b": ["x", "refused: because"], "c": ["x", "yes"]}
    monkeypatch.setattr(formats, "COLUMNS", COLUMNS[:4])
    monkeypatch.setattr(formats, "cells_of", lambda variant: cells[variant.schemes[0]])
    variants = {name: Variant(lambda folder: None, {}, schemes=(name,)) for name in cells}
    row = row_of(Format("all", "a_b", variants))
    assert row == "| all | a-b | x | yes (a, c); refused (b) |\n- all, train: because."


def test_a_cell_has_the_reason_of_a_refusal() -> None:
    def refuse() -> str:
        raise ExportError("'0.weight' is stored as x, which no operator has; do this. And that")

    assert formats.tried(refuse) == "refused: it is stored as x, which no operator has"


def test_rows_of_missing_libraries_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats, "is_installed", lambda library: False)
    monkeypatch.setattr(sys, "argv", ["formats"])
    formats.main()
    out, error = capsys.readouterr()
    assert out in formats.PAGE.read_text(encoding="utf-8")
    assert all(line in out for row in rows_of_page().values() for line in row.splitlines())
    assert "compressed_tensors is not installed; its row stays as it is" in error
