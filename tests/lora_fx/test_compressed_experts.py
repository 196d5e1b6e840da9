"""Mixtures whose experts llm-compressor has compressed: loaded as stacks, and saved in the same tensors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

import lora_fx
from lora_fx.formats import StackedTensor, dense
from tests.algebra import randomize
from tests.formats import mixture
from tests.numerics import assert_close, assert_same_bits

pytest.importorskip("compressed_tensors")

from tests.lora_fx.test_compressed_tensors import compressed, configured

IDS = torch.arange(1, 25).reshape(2, 12)
CONFIG = lora_fx.LoraConfig(r=3, target_modules=None)
# `make formats` tries the others.
SCHEMES = ["W4A16", "W4A16, zero points", "FP8, dynamic", "FP8, blocks", "MXFP4A16", "NVFP4A16"]
every = pytest.mark.parametrize("scheme", SCHEMES)


def write(folder: Path, scheme: str) -> dict[str, torch.Tensor]:
    """A folder with the experts in a scheme; returns the values of each expert's matrices."""
    mixture().save_pretrained(folder)
    tensors, values = load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if ".experts." in key]:
        layer = nn.Linear(*reversed(tensors[key].shape), bias=False)
        layer.weight = nn.Parameter(tensors.pop(key))
        (done,) = compressed(nn.Sequential(layer), scheme)
        for name, tensor in done.state_dict().items():
            tensors[key.replace("weight", name)] = tensor.contiguous()
        values[key] = alone(done)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    how = configured(scheme)
    how.ignore = ["lm_head", r"re:.*mlp.gate$", r"re:.*self_attn.*"]
    form: Any = done.quantization_scheme.format
    stored = {**json.loads(how.model_dump_json()), "quantization_status": "compressed"}
    stored["format"] = getattr(form, "value", form)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": stored}))
    return values


def alone(layer: nn.Module) -> torch.Tensor:
    """The library's values of a compressed layer."""
    from compressed_tensors.compressors import decompress_module

    twin = copy.deepcopy(layer)
    decompress_module(twin)
    return twin.weight.detach()


def kept(folder: Path) -> Any:
    with lora_fx.keep_quantized():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def stacks(model: nn.Module) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if isinstance(p.detach(), StackedTensor)}


@every
def test_values_are_those_of_the_library(scheme: str, tmp_path: Path) -> None:
    values = write(tmp_path, scheme)
    experts = stacks(kept(tmp_path))
    prefix = "model.layers.0.mlp.experts"
    assert {*experts} == {f"{prefix}.gate_up_proj", f"{prefix}.down_proj"}
    for number in range(4):
        gate, up, down = (
            values[f"{prefix}.{number}.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        stored = dense(experts[f"{prefix}.gate_up_proj"])[number]
        assert_same_bits(stored.to(gate.dtype), torch.cat([gate, up]))
        assert_same_bits(dense(experts[f"{prefix}.down_proj"])[number].to(down.dtype), down)


@every
def test_a_step_and_a_merge_are_those_of_the_values(scheme: str, tmp_path: Path) -> None:
    write(tmp_path / "base", scheme)
    model = kept(tmp_path / "base")
    plain = Qwen3MoeForCausalLM(model.config)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(dense(model.get_parameter(name)))
    adapted, exact = (randomize(lora_fx.rewrite(m, CONFIG), 0.1) for m in (model, plain))
    for either in (adapted, exact):
        either(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in exact.named_parameters() if p.requires_grad}
    for name, grad in grads.items():
        assert_close(adapted.get_parameter(name).grad, grad, 1e-5)
    adapted.eval()
    merged: Any = lora_fx.merge(adapted)
    merged.save_pretrained(tmp_path / "dense")
    assert any(
        ".experts.0.gate_proj.weight" in k for k in load_file(tmp_path / "dense/model.safetensors")
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        assert_close(merged(IDS).logits, adapted(IDS).logits, 1e-5)
        assert_same_bits(loaded(IDS).logits, merged(IDS).logits)

    again: Any = lora_fx.merge(adapted, requantize=True)
    again.save_pretrained(tmp_path / "again")
    before, after = (
        {k: (t.dtype, t.shape) for k, t in load_file(tmp_path / f / "model.safetensors").items()}
        for f in ("base", "again")
    )
    assert after == before
    reloaded = kept(tmp_path / "again")
    for name, stack in stacks(again).items():
        assert_same_bits(dense(reloaded.get_parameter(name)), dense(stack))
        change = (dense(stack) - merged.get_parameter(name)).norm() / dense(stack).norm()
        assert change < 0.2


@every
def test_an_onnx_file_has_the_values(scheme: str, tmp_path: Path) -> None:
    write(tmp_path, scheme)
    adapted = randomize(lora_fx.rewrite(kept(tmp_path), CONFIG), 0.1).eval()
    path = tmp_path / "model.onnx"
    if scheme.startswith("NVFP4"):
        with pytest.raises(lora_fx.ExportError, match="rounds to half precision"):
            lora_fx.export_onnx(adapted, path, (IDS,))
        return
    report = lora_fx.export_onnx(adapted, path, (IDS,))
    out = ort.InferenceSession(path).run(None, {"input_ids": IDS.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(out, adapted(IDS).logits, atol=2e-5)
    (entry,) = report.quantized
    assert entry.operator == ("MatMulNBits" if scheme.startswith("W4") else "DequantizeLinear")
    assert entry.weights == 8


def test_a_copy_keeps_what_saving_needs(tmp_path: Path) -> None:
    write(tmp_path / "base", "W4A16")
    twin = copy.deepcopy(kept(tmp_path / "base"))
    twin.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "again"))
    assert {*after} == {*before}
    for name, tensor in before.items():
        assert_same_bits(after[name], tensor)
