"""``lora-fx export --task`` and ``lora-fx generate``, from a folder of transformers to tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import transformers
from typer.testing import CliRunner, Result

from lora_fx.tools.cli.app import app
from tests.export.tiny import generator


def lora(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of words, and its file."""
    place = tmp_path_factory.mktemp("generate")
    generator("llama").save_pretrained(place / "model")
    _tokenizer().save_pretrained(place / "model")
    made = lora("export", f"hf:{place / 'model'}", place / "m.onnx", "--task", "text-generation")
    assert made.exit_code == 0, made.output
    assert "past_key_values.*.key batch, 2, past_length, 4" in " ".join(made.stdout.split())
    assert "past_key_values.1" not in made.stdout
    return place


def _tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{index}": index for index in range(61)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")


def test_tokens_are_those_of_generate(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([[0, 0, 9, 4], [5, 7, 9, 11]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6)[:, 4:].tolist()
    lines = [" ".join(map(str, row)) for row in expected]
    more = ("--max-new-tokens", "6")
    made = lora("generate", folder / "m.onnx", "--ids", "9 4", "--ids", "5,7 9 11", *more)
    assert made.stdout.splitlines() == lines
    assert "2 × 6 tokens" in made.stderr
    words = ("--text", "w9 w4", "--text", "w5 w7 w9 w11", "--tokenizer", folder / "model")
    made = lora("generate", folder / "m.onnx", *words, *more)
    assert made.stdout.splitlines() == [" ".join(f"w{token}" for token in row) for row in expected]


def test_a_seed_draws_the_same_tokens_again(folder: Path) -> None:
    draw = ("generate", folder / "m.onnx", "--ids", "9 4", "--sample", "--top-k", "0", "--seed")
    first = lora(*draw, "1").stdout
    assert lora(*draw, "1").stdout == first
    assert lora(*draw, "2").stdout != first


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 3), np.int64))
    file = folder / "m.onnx"
    for args, words in (
        ((), "takes input_ids: there are none"),
        (("--ids", "1 x"), "give the numbers of tokens"),
        (("--ids", "1", "--text", "w1"), "give one of them"),
        (("--text", "w1"), "--text needs --tokenizer"),
        (("--text", "w1", "--tokenizer", tmp_path / "none"), "there is no such folder"),
        (("--text", "w1", "--tokenizer", tmp_path), "holds no tokenizer"),
        (("--input", "x"), "write name=FILE.npy"),
        (("--input", "x=none.npy"), "not a readable .npy"),
        (("--ids", "1", "--input", f"features={tmp_path / 'x.npy'}"), "not 'features'"),
        (("--ids", "1", "--temperature", "0"), "--temperature 0.0"),
    ):
        made = lora("generate", file, *args)
        assert made.exit_code == 2
        assert words in made.stderr
    made = lora("export", f"hf:{folder / 'model'}", tmp_path / "y.onnx", "--task", "generation")
    assert "give one of text-generation, text2text-generation" in made.stderr
