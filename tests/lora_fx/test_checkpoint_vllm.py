"""Folders for vLLM: one rank, one alpha, and what it refuses is refused here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CheckpointError
from tests import zoo
from tests.lora_fx.test_checkpoint import (
    CONFIG,
    IDS,
    PATTERNS,
    WEIGHTS,
    adapted,
    keys,
    read_by_peft,
    run,
)
from tests.lora_fx.test_checkpoint_joined import X, attention, fused
from tests.numerics import assert_close


def served(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of every layer as vLLM computes it: from r, lora_alpha and the tensors, and nothing else."""
    config = json.loads((folder / CONFIG).read_text())
    r, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
    assert not config["use_dora"]
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert config["target_modules"]
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in keys(folder).items():
        name, letter = re.fullmatch(
            r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key
        ).groups()
        assert value.shape[0 if letter == "A" else 1] == r
        found.setdefault(name, {})[letter] = value
    return {name: scale * pair["B"] @ pair["A"] for name, pair in found.items()}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["up", "head"]},
        {"target_modules": ["embed", "up", "down", "head"], "r": 4, "lora_alpha": 16, **PATTERNS},
        {"target_modules": ["up", "down", "head"], "use_rslora": True, **PATTERNS},
        {"target_modules": ["up", "head"], "lora_alpha": 0, "alpha_pattern": {"head": 1}},
    ],
    ids=["plain", "patterns", "rank-stabilized", "a scale of zero"],
)
def test_patterns_are_folded_into_b(config: dict[str, Any], tmp_path: Path) -> None:
    base = zoo.seeded(zoo.Residual)()
    model = adapted(base, **config)
    lora_fx.save_adapter(model, tmp_path, vllm=True)
    merged = lora_fx.merge(model).state_dict()
    for name, delta in served(tmp_path).items():
        expected = merged[f"{name}.weight"] - base.state_dict()[f"{name}.weight"]
        assert_close(delta.T if name == "embed" else delta, expected)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    assert_close(run(read_by_peft(base, tmp_path), IDS), run(model, IDS))
    assert_close(run(lora_fx.load_adapter(base, tmp_path), IDS), run(model, IDS))


def test_one_scale_changes_no_bit(tmp_path: Path) -> None:
    model = adapted(zoo.Residual(), target_modules=["up", "head"])
    lora_fx.save_adapter(model, tmp_path / "plain")
    lora_fx.save_adapter(model, tmp_path / "served", vllm=True)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "served" / name).read_bytes()


def test_parts_are_served_as_the_whole(tmp_path: Path) -> None:
    base = fused()
    model = adapted(base, target_modules=["qkv.q", "qkv.v", "proj"])
    lora_fx.save_adapter(model, tmp_path, vllm=True)
    assert served(tmp_path).keys() == {"qkv", "proj"}
    assert_close(run(lora_fx.load_adapter(base, tmp_path), X), run(model, X))


class Everything(nn.Module):
    """Something of all that vLLM does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.raw = Raw()
        self.root = nn.Parameter(torch.randn(8, 8))
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.raw(self.inner(self.conv(x.mT).mT)) @ self.root
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.kernel


def test_all_that_is_refused_is_listed(tmp_path: Path) -> None:
    model = adapted(
        Everything(),
        target_modules=["conv", "inner.0", "kernel", "root", "attn"],
        bias="lora_only",
        modules_to_save=["head"],
    )
    with pytest.raises(CheckpointError, match="vLLM cannot serve this adapter") as caught:
        lora_fx.save_adapter(model, tmp_path / "new", vllm=True)
    text = str(caught.value)
    for line in (
        "modules_to_save: head is trained in full",
        "bias: inner.0.bias is trained",
        "root: PEFT has no name for this weight",
        "raw.kernel: it is a parameter, not a layer",
        "attn: it is an nn.MultiheadAttention",
        "conv: it is a convolution",
    ):
        assert f"\n  {line}\n" in f"{text}\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"use_dora": True}, "use_dora: head has a magnitude"),
        ({"lora_bias": True}, "lora_bias: head has a bias on B"),
    ],
)
def test_variants_are_refused(config: dict[str, Any], line: str, tmp_path: Path) -> None:
    model = adapted(attention(), target_modules=["head"], **config)
    with pytest.raises(CheckpointError, match=line):
        lora_fx.save_adapter(model, tmp_path, vllm=True)
