"""lora-fx migrate: the dry run, the folder that it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lora_fx
from lora_fx import LoraConfig
from lora_fx.tools.cli.app import app
from tests.lora_fx.test_migration import TOKENS, Fused, Split, fuse, trained
from tests.migration import folders
from tests.migration.test_transformers4 import FILES, write
from tests.numerics import assert_close

SPLIT, FUSED = (f"tests.lora_fx.test_migration:{name}" for name in ("Split", "Fused"))


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["migrate", *words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_a_folder_of_transformers_4(tmp_path: Path) -> None:
    path = next(path for path in FILES if path.stem == "mixtral-4.57")
    record = json.loads(path.read_text(encoding="utf-8"))
    model, adapter = write(record, tmp_path)
    base = f"hf:{tmp_path / 'base'}"
    dry = run(str(adapter), "--to", base)
    assert "experts.{0-3}.w1 -> model.layers.{0-1}.mlp.experts.gate_up_proj.{0-3}" in dry
    assert "moved into a stack, fused" in dry
    out = tmp_path / "moved"
    assert f"{out} written" in run(str(adapter), "--to", base, "--out", str(out))
    inputs = folders.inputs_of(record["inputs"])
    with torch.no_grad():
        output = folders.spread(lora_fx.load_adapter(model, out).eval()(**inputs))
    assert_close(output, torch.tensor(record["adapted"]))
    assert "keep their name" in run(str(out), "--to", base)
    assert "--force" in run(str(adapter), "--to", base, "--out", str(out), code=2)
    run(str(adapter), "--to", base, "--out", str(out), "--force")


def test_with_the_old_model_and_as_json(tmp_path: Path) -> None:
    trained(Fused(), tmp_path / "old")
    refused = run(str(tmp_path / "old"), "--to", SPLIT, code=2)
    assert "ambiguous" in refused or "no operation" in refused
    assert "--from" in refused
    shown = json.loads(run(str(tmp_path / "old"), "--to", SPLIT, "--from", FUSED, "--json"))
    assert [move["old"] for move in shown["moves"]] == ["qkv_proj.q", "qkv_proj.k", "qkv_proj.v"]
    assert shown["problems"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--to MODEL"),
        (("--to", "nothing"), "nothing"),
        (("--to", SPLIT, "--out", "{folder}"), "give another folder"),
    ],
)
def test_what_is_typed_is_checked(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    trained(Split(), tmp_path)
    arguments = [word.format(folder=tmp_path) for word in words]
    assert message in run(str(tmp_path), *arguments, code=2)


def test_the_receipt_is_written_again(tmp_path: Path) -> None:
    split = Split()
    adapted = lora_fx.rewrite(split, LoraConfig(r=2, init_lora_weights=False))
    lora_fx.save_adapter(adapted, tmp_path / "old", receipt=TOKENS)
    moved = lora_fx.load_adapter(fuse(split), tmp_path / "old", match="graph")
    lora_fx.save_adapter(moved, tmp_path / "new", receipt=TOKENS)
    assert lora_fx.verify(tmp_path / "new", lora_fx.merge(moved)).applied
    # The untrained weights of a new Fused are not those of the receipt.
    words = (str(tmp_path / "old"), "--to", FUSED, "--out", str(tmp_path / "other"))
    assert "not those" in run(*words, code=2)
    assert not (tmp_path / "other").exists()
