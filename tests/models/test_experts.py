"""Mixtures of experts of transformers, through each of its implementations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.tools.zoo import job
from lora_fx.tools.zoo.job import in_fp64
from lora_fx.tools.zoo.models import wake
from tests.algebra import randomize
from tests.mixtures import IDS, MODELS, SIZES, drawn
from tests.numerics import assert_close, assert_same_bits

transformers = pytest.importorskip("transformers")

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
CONFIG = lora_fx.LoraConfig(r=3, target_modules=["gate_up_proj", "down_proj"])


def built(name: str, implementation: str) -> nn.Module:
    model = MODELS[name]()
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    return model


def expert_sites(model: nn.Module) -> list[str]:
    return [row.name for row in lora_fx.plan(model, CONFIG) if row.site.experts]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_rewrite_changes_no_bit_and_a_merge_keeps_what_was_learned(name, implementation):
    model = built(name, implementation)
    layers = 1 if name == "deepseek_v3" else 2
    assert len(expert_sites(model)) == 2 * layers
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=3))
    assert not lora_fx.plan(model, CONFIG).rejections
    with torch.no_grad():
        assert_same_bits(adapted(IDS).logits, model.requires_grad_(False)(IDS).logits)
    randomize(adapted, 0.1)
    with torch.no_grad():
        found, before = adapted(IDS).logits, model(IDS).logits
        merged = lora_fx.merge(adapted)
        assert type(merged) is type(model)
        assert_close(merged(IDS).logits, found, 1e-5)
    assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_the_dense_oracle(name, implementation):
    """Routers, attention and experts, beside the original with W' = W + s·BA in it."""
    model = wake(built(name, implementation))
    exact = in_fp64(model, (IDS,))
    original, inputs, narrowest = exact or (model, (IDS,), torch.float32)
    adapted = lora_fx.rewrite(original, lora_fx.LoraConfig(r=3))

    def call(either):
        output = either(*inputs, labels=IDS)
        return (output.logits, output.loss), output.loss

    verdict = job.judge(original, adapted.eval(), call, narrowest)
    assert verdict.right, verdict
    assert not verdict.unreached
    assert exact is not None or implementation == "grouped_mm"  # whose kernel has no fp64


@pytest.mark.parametrize("name", MODELS)
def test_all_implementations_agree_on_gradients(name):
    """Against autograd through the merged weights, with transformers' own code."""
    grads = []
    for implementation in IMPLEMENTATIONS:
        model = built(name, implementation)
        adapted = randomize(lora_fx.rewrite(model, CONFIG), 0.1)
        adapted(IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
        assert all(grad is not None for grad in grads[-1].values())
    merged = lora_fx.merge(adapted).requires_grad_(True)
    merged(IDS, labels=IDS).loss.backward()
    for row in lora_fx.plan(model, CONFIG):
        if not row.site.experts:
            continue
        a, b = (
            adapted.get_parameter(f"{row.site.holder}.{side}.default").detach()
            for side in ("lora_A", "lora_B")
        )
        weight = merged.get_parameter(row.site.weight).grad
        weight = weight if row.site.layout == "out_in" else weight.mT
        exact = [row.scale * b.mT @ weight, row.scale * weight @ a.mT]
        for found in grads:
            names = [f"{row.site.holder}.{side}.default" for side in ("lora_A", "lora_B")]
            assert_close([found[n] for n in names], exact, 1e-4)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in inputs:
                self.elements = max(self.elements, made.numel())
        return out


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_tensor_of_the_size_of_an_expert_is_made(implementation):
    """Forward and backward, with experts that are large beside everything else."""
    config = transformers.MixtralConfig(
        **{**SIZES, "hidden_size": 64, "num_hidden_layers": 1},
        intermediate_size=96,
        num_local_experts=8,
        experts_implementation=implementation,
    )
    model = drawn(config)
    adapted = lora_fx.rewrite(model, CONFIG)
    ids = torch.tensor([[1, 2, 3, 4]])
    embedded = adapted.get_input_embeddings()(ids).requires_grad_()
    with Largest() as seen:
        adapted(inputs_embeds=embedded).logits.sum().backward()
    assert seen.elements < 64 * 96


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_changed_implementation_is_not_ignored(implementation):
    model = built("mixtral", implementation)
    adapted = randomize(lora_fx.rewrite(model, CONFIG))
    before, merged = adapted(IDS).logits, lora_fx.merge(adapted)
    other = next(one for one in IMPLEMENTATIONS if one != implementation)
    adapted.set_experts_implementation(other)
    merged.set_experts_implementation(other)
    assert_close(adapted(IDS).logits, merged(IDS).logits, 1e-4)
    assert_close(adapted(IDS).logits, before, 1e-4)
    assert not torch.allclose(before, model(IDS).logits, atol=1e-3)
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_the_whole_compiles_without_a_break(implementation):
    model = built("mixtral", implementation)
    adapted = randomize(lora_fx.rewrite(model, CONFIG), 0.1)
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    assert_close(compiled(IDS).logits, adapted(IDS).logits, 1e-5)


def test_dropout_and_half_precision():
    model = built("mixtral", "grouped_mm").bfloat16()
    config = lora_fx.LoraConfig(r=3, lora_dropout=0.5, target_modules=["gate_up_proj"])
    adapted = randomize(lora_fx.rewrite(model, config), 0.1).train()
    one, other = adapted(IDS).logits, adapted(IDS).logits
    assert not torch.equal(one, other)
    adapted.eval()
    assert_close(adapted(IDS).logits.float(), lora_fx.merge(adapted)(IDS).logits.float(), 3e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_copy_and_a_pickle_answer_alike(implementation):
    adapted = randomize(lora_fx.rewrite(built("gpt_oss", implementation), CONFIG), 0.1)
    with torch.no_grad():
        expected = adapted(IDS).logits
        assert_same_bits(copy.deepcopy(adapted)(IDS).logits, expected)
        assert_same_bits(pickle.loads(pickle.dumps(adapted))(IDS).logits, expected)


def test_generate_and_checkpointing_go_on_working():
    adapted = randomize(lora_fx.rewrite(built("mixtral", "grouped_mm"), CONFIG), 0.1)
    merged = lora_fx.merge(adapted)
    given = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(adapted.generate(IDS, **given), merged.generate(IDS, **given))
    adapted.train()
    adapted(IDS, labels=IDS).loss.backward()
    wanted = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    adapted.gradient_checkpointing_enable()
    adapted(IDS, labels=IDS).loss.backward()
    found = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert_close(found, wanted, 1e-6)


def test_an_adapter_of_experts_comes_back(tmp_path):
    model = built("qwen3_moe", "grouped_mm")
    adapted = randomize(lora_fx.rewrite(model, CONFIG), 0.1)
    lora_fx.save_adapter(adapted, tmp_path)
    loaded = lora_fx.load_adapter(model, tmp_path)
    with torch.no_grad():
        assert_same_bits(loaded(IDS).logits, adapted(IDS).logits)
