"""``prepare_for_kbit_training`` beside what PEFT's function of that job does."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import lora_fx
from lora_fx import ConfigError, LoraConfig, QuantizationError, prepare_for_kbit_training
from tests.numerics import assert_same_bits
from tests.quantized import IDS, SCHEMES, llama, quantized


def half(scheme: str = "nf4") -> nn.Module:
    """A Llama in bfloat16 over a quantized base, with what transformers sets on one that it has loaded."""
    model: Any = quantized(llama().bfloat16(), scheme).train()
    if "torchao" in scheme:
        model.quantization_method = "torchao"
    elif "int8" in scheme:
        model.is_loaded_in_8bit = True
    else:
        model.is_loaded_in_4bit = True
    return model


def peft_prepared(scheme: str, **options: Any) -> nn.Module:
    model = half(scheme)
    # The warnings are about names of transformers and about use_reentrant.
    result: nn.Module = peft.prepare_model_for_kbit_training(model, **options)
    return result


def embedded(model: Any) -> Tensor:
    """What the input embeddings give in a call."""
    kept: list[Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, given, output: kept.append(output)
    )
    model(IDS)
    handle.remove()
    return kept[0]


def grads(model: Any, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore:.*checkpoint")
def test_it_does_what_pefts_does(scheme: str) -> None:
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    ours, theirs = (
        prepare_for_kbit_training(half(scheme), **options),
        peft_prepared(scheme, **options),
    )
    dtypes = [{n: p.dtype for n, p in model.named_parameters()} for model in (ours, theirs)]
    assert dtypes[0] == dtypes[1]
    assert not any(p.requires_grad for p in ours.parameters())
    assert ours.model.layers[0].gradient_checkpointing
    assert theirs.model.layers[0].gradient_checkpointing
    assert embedded(ours).requires_grad
    assert embedded(theirs).requires_grad
    assert_same_bits(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.filterwarnings("ignore:.*checkpoint")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_without_checkpoints(reentrant: bool, dropout: float) -> None:
    config = LoraConfig(seed=0, r=4, init_lora_weights=False, lora_dropout=dropout)
    options = {"use_reentrant": reentrant}
    with_checkpoints = prepare_for_kbit_training(half(), True, options)
    without = prepare_for_kbit_training(half(), use_gradient_checkpointing=False)
    assert not without.model.layers[0].gradient_checkpointing
    assert not embedded(without).requires_grad
    models = [lora_fx.rewrite(one, config).train() for one in (with_checkpoints, without)]
    found, expected = (grads(one) for one in models)
    assert len(expected) == 28
    assert all(grad.abs().max() > 0 for grad in expected.values())
    assert_same_bits(list(found.values()), list(expected.values()))


def test_blocks_keep_their_inputs_only() -> None:
    def kept(model: nn.Module) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(IDS)
        return sum(sizes)

    config = LoraConfig(seed=0, r=4)
    base = half()
    checkpointed = lora_fx.rewrite(prepare_for_kbit_training(base), config).train()
    plain = lora_fx.rewrite(prepare_for_kbit_training(base, False), config).train()
    assert kept(checkpointed) < kept(plain) / 4


def test_the_argument_is_not_touched_and_quantized_weights_are_shared() -> None:
    base = half()
    before = {n: (p.dtype, p.requires_grad, p.data_ptr()) for n, p in base.named_parameters()}
    with torch.no_grad():
        expected = base(IDS).logits
    prepared = prepare_for_kbit_training(base)
    assert type(prepared) is type(base)
    assert not base.model.layers[0].gradient_checkpointing
    assert not base.get_input_embeddings()._forward_hooks
    assert before == {
        n: (p.dtype, p.requires_grad, p.data_ptr()) for n, p in base.named_parameters()
    }
    with torch.no_grad():
        assert_same_bits(base(IDS).logits, expected)
    found = {n: p.data_ptr() for n, p in prepared.named_parameters()}
    shared = {n for n, (_, _, address) in before.items() if found[n] == address}
    assert shared == {n for n, (dtype, *_) in before.items() if dtype is torch.uint8}


def test_tied_weights_stay_tied() -> None:
    base = half()
    base.lm_head.weight = base.model.embed_tokens.weight
    prepared: Any = prepare_for_kbit_training(base)
    assert prepared.lm_head.weight is prepared.model.embed_tokens.weight
    assert prepared.lm_head.weight.dtype is torch.float32


def test_a_model_without_tokens_is_checkpointed_too() -> None:
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        num_labels=3,
    )
    torch.manual_seed(0)
    base = quantized(ViTForImageClassification(config), "nf4")
    pixels = torch.randn(2, 3, 32, 32)
    adapter = LoraConfig(seed=0, r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def step(prepared: nn.Module) -> list[Tensor]:
        model = lora_fx.rewrite(prepared, adapter).train()
        model(pixel_values=pixels, labels=torch.tensor([0, 2])).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    found = step(prepare_for_kbit_training(base, True, {"use_reentrant": True}))
    expected = step(prepare_for_kbit_training(base, False))
    assert len(expected) == 8
    assert_same_bits(found, expected)


class Blocks(nn.Module):
    """No model of transformers: a norm in half precision between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.second = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


def test_a_plain_model() -> None:
    base = quantized(Blocks().bfloat16(), "nf4")
    with pytest.raises(
        ConfigError, match=r"Blocks cannot checkpoint.*use_gradient_checkpointing=False"
    ):
        prepare_for_kbit_training(base)
    prepared = prepare_for_kbit_training(base, use_gradient_checkpointing=False)
    assert prepared.norm.weight.dtype is torch.float32
    assert prepared.first.bias.dtype is torch.float32
    assert base.norm.weight.dtype is torch.bfloat16
    model = lora_fx.rewrite(prepared, LoraConfig(seed=0, r=4, target_modules=["first", "second"]))
    out = model(torch.randn(3, 64))
    out.sum().backward()
    assert out.dtype is torch.float32


def test_what_cannot_be_prepared_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"nothing in LlamaForCausalLM is quantized"):
        prepare_for_kbit_training(llama())
    adapted = lora_fx.rewrite(half(), LoraConfig(seed=0, r=4))
    with pytest.raises(ConfigError, match=r"has adapters already.*prepare the base"):
        prepare_for_kbit_training(adapted)


def test_a_prepared_model_can_be_copied_and_saved() -> None:
    prepared = prepare_for_kbit_training(half())
    twice = prepare_for_kbit_training(prepared)
    config = LoraConfig(seed=0, r=4, init_lora_weights=False)
    models = [
        lora_fx.rewrite(one, config).train() for one in (prepared, copy.deepcopy(prepared), twice)
    ]
    first, *others = (list(grads(one).values()) for one in models)
    for other in others:
        assert_same_bits(other, first)


@pytest.mark.filterwarnings("ignore:.*checkpoint")
def test_operations_that_are_no_layers_are_prepared_as_well() -> None:
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=97, n_positions=32, **none)
    torch.manual_seed(0)
    base = lora_fx.quantize(GPT2LMHeadModel(config).bfloat16(), "nf4")
    adapter = LoraConfig(seed=0, r=4, init_lora_weights=False)
    models = [
        lora_fx.rewrite(prepare_for_kbit_training(base, checkpoints), adapter).train()
        for checkpoints in (True, False)
    ]
    found, expected = (grads(one) for one in models)
    assert len(expected) == 16
    assert_same_bits(list(found.values()), list(expected.values()))
