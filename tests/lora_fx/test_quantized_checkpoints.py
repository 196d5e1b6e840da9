"""Adapter folders over quantized bases: read by PEFT over the same base, and PEFT's read here."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import lora_fx
from lora_fx import LoraConfig
from lora_fx.formats import quantization_of
from tests.numerics import assert_same_bits
from tests.quantized import IDS, SCHEMES, llama, quantized

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TorchaoLoraLinear was instantiated"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


def base_of(scheme: str, layers: int = 1) -> nn.Module:
    """What transformers would have loaded: PEFT asks the model what its layers are."""
    base = quantized(llama(layers), scheme).train()
    if "torchao" not in scheme:
        bits = 8 if "int8" in scheme else 4
        base.__dict__[f"is_loaded_in_{bits}bit"] = True
    for module in base.modules():
        # A kernel of the CPU that rounds to bfloat16, and repacks the weights in place.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def printed(model: Any, printing: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        printing(model)
    return out.getvalue()


BITSANDBYTES = ("nf4", "nf4 double", "fp4", "int8 bitsandbytes")


# PEFT has no DoRA over torchao.
@pytest.mark.parametrize(
    ("scheme", "use_dora"),
    [*((scheme, False) for scheme in SCHEMES), ("nf4", True), ("int8 bitsandbytes", True)],
)
def test_peft_computes_what_was_trained_here(scheme: str, use_dora: bool, tmp_path: Path) -> None:
    base = base_of(scheme)
    config = lora_fx.LoraConfig(r=4, lora_alpha=8, use_dora=use_dora)
    model = trained(lora_fx.rewrite(base, config).train())
    assert float((outputs(model) - outputs(base)).abs().max()) > 0.05
    lora_fx.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert written["init_lora_weights"] is True
    theirs = peft.PeftModel.from_pretrained(base_of(scheme), tmp_path, is_trainable=True).train()
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    if scheme in BITSANDBYTES:
        assert type(layer).__module__ == "peft.tuners.lora.bnb"
    torch.testing.assert_close(outputs(theirs), outputs(model), atol=1e-5, rtol=0)
    again = lora_fx.load_adapter(base_of(scheme), tmp_path).train()
    assert torch.equal(outputs(again), outputs(model))
    here = printed(model, lora_fx.print_trainable_parameters)
    assert here == printed(theirs, lambda one: one.print_trainable_parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_peft_trained_computes_the_same_here(scheme: str, tmp_path: Path) -> None:
    how = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    theirs = trained(peft.get_peft_model(base_of(scheme), how).train())
    theirs.save_pretrained(tmp_path)
    base = base_of(scheme)
    model = lora_fx.load_adapter(base, tmp_path).train()
    assert float((outputs(model) - outputs(base)).abs().max()) > 0.05
    torch.testing.assert_close(outputs(model), outputs(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_a_folder_of_a_model_quantized_here_runs_in_peft(kind: str, tmp_path: Path) -> None:
    base = lora_fx.quantize(llama(1), kind).train()
    model = trained(lora_fx.rewrite(base, lora_fx.LoraConfig(r=4)).train())
    lora_fx.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(lora_fx.quantize(llama(1), kind), tmp_path).train()
    torch.testing.assert_close(outputs(theirs), outputs(model), atol=1e-3, rtol=0)
    torch.testing.assert_close(outputs(theirs), outputs(model), atol=1e-5, rtol=0)


def test_in_eval_mode_peft_may_run_a_kernel_that_rounds(tmp_path: Path) -> None:
    base = quantized(llama(1), "nf4")
    base.__dict__["is_loaded_in_4bit"] = True
    model = trained(lora_fx.rewrite(base, lora_fx.LoraConfig(r=4)).train()).eval()
    lora_fx.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(quantized(llama(1), "nf4"), tmp_path).eval()
    # Where the processor has that kernel, bitsandbytes rounds x and the scales to bfloat16 in it.
    torch.testing.assert_close(outputs(theirs), outputs(model), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_transformers_saves_and_loads_tensors_of_torchao(kind: str, tmp_path: Path) -> None:
    base = lora_fx.quantize(llama(1), kind)
    model = lora_fx.rewrite(base, LoraConfig(r=2, init_lora_weights=False, seed=0))
    merged = lora_fx.merge(model, requantize=True)
    for name, saved in {"base": base, "merged": merged}.items():
        saved.save_pretrained(tmp_path / name)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / name)
        assert quantization_of(loaded.model.layers[0].mlp.up_proj.weight) is not None
        assert quantization_of(loaded.lm_head.weight) is None
        assert_same_bits(loaded(IDS).logits, saved(IDS).logits)


def test_a_checkpoint_of_an_adapter_has_no_tensors_of_its_base(tmp_path: Path) -> None:
    lora_fx.quantize(llama(1), "int8").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert base.hf_quantizer is not None
    model = lora_fx.rewrite(base, LoraConfig(r=2, init_lora_weights=False, seed=0))
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "model.safetensors")
    assert names
    assert all(".lora_" in name for name in names)
    assert model.hf_quantizer is not None


def test_a_model_without_a_folder_saves_its_base_in_int8(tmp_path: Path) -> None:
    base = lora_fx.quantize(llama(1), "int8")
    model = lora_fx.rewrite(base, LoraConfig(r=2, init_lora_weights=False, seed=0))
    model.save_pretrained(tmp_path)
    loaded = lora_fx.load_adapter(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path)
    assert_same_bits(loaded(IDS).logits, model(IDS).logits)
