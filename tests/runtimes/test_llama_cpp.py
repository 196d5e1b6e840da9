"""Folders of adapters in llama.cpp's converter: what it writes adds to the weights what the adapter does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.runtimes.conftest import require
from tests.runtimes.test_vllm import PATTERNS, base

pytestmark = [pytest.mark.runtime, pytest.mark.filterwarnings("ignore")]

# What llama.cpp calls the layers of a Llama.
LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def converted(folder: Path, base_folder: Path, target: Path) -> tuple[float, dict[str, Tensor]]:
    """The alpha and the tensors that the converter writes."""
    peer = require("llama_cpp")
    command = [sys.executable, str(peer / "convert_lora_to_gguf.py"), "--outtype", "f32"]
    command += ["--base", str(base_folder), "--outfile", str(target), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=peer)
    assert done.returncode == 0, done.stderr[-3000:]
    sys.path.insert(0, str(peer / "gguf-py"))
    try:
        from gguf import GGUFReader
    finally:
        sys.path.remove(str(peer / "gguf-py"))
    reader: Any = GGUFReader(target)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    return alpha, {one.name: torch.tensor(one.data) for one in reader.tensors}


def interleaved(delta: Tensor, heads: int) -> Tensor:
    """Rows of a query or a key in the order of llama.cpp, whose rotary embedding turns neighbors."""
    rows, width = delta.shape
    return delta.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


@pytest.mark.parametrize("options", [{}, PATTERNS], ids=["plain", "patterns"])
def test_a_converted_adapter_does_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    made: nn.Module = lora_fx.rewrite(model, LoraConfig(**{"r": 4, **options})).eval()
    randomize(made)
    folder = lora_fx.save_adapter(made, tmp_path / "a", format="gguf-ready")
    alpha, tensors = converted(folder, tmp_path / "base", tmp_path / "a.gguf")
    merged = lora_fx.merge(made)
    for layer in range(2):
        for ours, theirs in LAYERS.items():
            name = f"model.layers.{layer}.{ours}.weight"
            delta = merged.get_parameter(name) - model.get_parameter(name)
            if theirs in ("attn_q", "attn_k"):
                delta = interleaved(delta, 2 if theirs == "attn_q" else 1)
            a, b = (tensors.pop(f"blk.{layer}.{theirs}.weight.lora_{way}") for way in "ab")
            found = alpha / a.shape[0] * b @ a
            torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-5)
    assert not tensors
