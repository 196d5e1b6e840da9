"""Models of transformers that are saved in several files."""

from __future__ import annotations

from pathlib import Path

import torch

import lora_fx
from lora_fx.tools.models import load_model
from tests.lora_fx.test_checkpoint import adapted, run
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import tiny_llama


def shards(folder: Path) -> int:
    return len(list(folder.glob("model-*-of-*.safetensors")))


def test_a_base_in_several_files_and_a_merged_model_in_several(tmp_path: Path) -> None:
    base, inputs = tiny_llama()
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert shards(tmp_path / "base") > 1
    model = adapted(base, r=2, target_modules=["q_proj", "embed_tokens", "down_proj"])
    lora_fx.save_adapter(model, tmp_path / "adapter")
    loaded = load_model(f"hf:{tmp_path / 'base'}").model
    again = lora_fx.load_adapter(loaded, tmp_path / "adapter")
    assert_same_bits(run(again, inputs), run(model, inputs))
    merged = lora_fx.merge(again)
    merged.save_pretrained(tmp_path / "merged", max_shard_size="8KB")
    assert shards(tmp_path / "merged") > 1
    back = load_model(f"hf:{tmp_path / 'merged'}").model
    state = back.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in merged.state_dict().items())
    assert_close(run(back, inputs), run(model, inputs))
