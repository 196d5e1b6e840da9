"""``--quantize`` on the command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import ViTConfig, ViTModel
from typer.testing import CliRunner

import lora_fx
from lora_fx.tools.cli.app import app
from tests.quantized import llama


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    log = logging.getLogger("lora_fx")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers, log.level = handlers, level


@pytest.fixture
def folder(tmp_path: Path) -> str:
    llama(1).save_pretrained(tmp_path / "llama", max_shard_size="30KB")
    return f"hf:{tmp_path / 'llama'}"


def lora(*args: str, code: int = 0) -> str:
    result: Result = CliRunner().invoke(app, args)
    assert result.exit_code == code, result.output
    return result.output


def test_plan_says_what_is_stored_and_what_is_left(folder: str) -> None:
    shown = lora("plan", folder, "--quantize", "nf4")
    assert "7 weights in nf4 (bitsandbytes, blocks of 64, double)" in shown
    assert "as it is: lm_head: it is the output head" in shown
    assert "q_proj" in shown
    found = json.loads(lora("plan", folder, "--quantize", "int8", "--json"))
    assert found["quantization"]["format"] == "int8"
    assert len(found["quantization"]["weights"]) == len(found["sites"]) == 7


@pytest.mark.parametrize("format_name", ["nf4", "int4"])
def test_rewrite_shows_the_quantized_operation(folder: str, format_name: str) -> None:
    region = "model.layers.0.mlp.up_proj"
    shown = lora("rewrite", folder, "--quantize", format_name, "--region", region, "--graph")
    assert "lora_A" in shown
    assert "quantized" in shown


def test_a_folder_whose_names_its_loader_changes_is_loaded_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
    )
    ViTModel(config).save_pretrained(tmp_path)
    assert "branches" in lora("rewrite", f"hf:{tmp_path}", "--quantize", "int8")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--quantize", "nf5"), "use nf4, fp4, int8, int4"),
        (("--quantize", "nf4", "--frontend", "export"), "use auto or regions"),
    ],
)
def test_bad_input_is_one_message(folder: str, args: tuple[str, ...], words: str) -> None:
    shown = lora("rewrite", folder, *args, code=2)
    assert words in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("command", ["plan", "rewrite"])
def test_a_folder_that_is_quantized_already_is_refused(command: str, tmp_path: Path) -> None:
    lora_fx.quantize(llama(1), "nf4").save_pretrained(tmp_path)
    name = f"hf:{tmp_path}"
    assert "is quantized already" in lora(command, name, "--quantize", "int8", code=2)
    shown = lora("plan", name)
    assert "q_proj" in shown
    assert "are quantized: bitsandbytes nf4" in shown
    assert '"stored_in": "bitsandbytes nf4"' in lora("plan", name, "--json")
