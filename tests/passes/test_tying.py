"""Tied weights: untied by a merge with a warning, or kept tied where `ensure_weight_tying` asks for it."""

from __future__ import annotations

import copy
import logging
import warnings

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import Tied, seeded, tiny_gpt2, tiny_llama

IDS = torch.tensor([[1, 5, 3, 2], [4, 4, 0, 6]])


def tied_llama():
    model, inputs = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model, inputs["input_ids"]


def config(**changes) -> LoraConfig:
    given = {"r": 3, "target_modules": ["embed_tokens"], "ensure_weight_tying": True, **changes}
    return LoraConfig(**given)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]])
def test_a_tied_head_gets_the_embeddings_factors_and_a_merge_keeps_the_tie(targets, caplog):
    model, ids = tied_llama()
    plan = lora_fx.plan(model, config(target_modules=targets))
    rows = {row.name: row for row in plan}
    assert rows["lm_head"].tied == "model.embed_tokens"
    assert rows["lm_head"].parameters == 0
    assert "the transposed adapter of model.embed_tokens" in str(plan)
    adapted = lora_fx.rewrite(model, config(target_modules=targets))
    trained = sum(p.numel() for p in lora_fx.trainable_parameters(adapted))
    assert trained == plan.trainable_parameters
    with torch.no_grad():
        assert_same_bits(adapted(ids).logits, model.requires_grad_(False)(ids).logits)
    randomize(adapted)
    with caplog.at_level(logging.WARNING, "lora_fx"):
        merged = lora_fx.merge(adapted)
    assert not caplog.records
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert_close(merged(ids).logits, adapted(ids).logits, 1e-5)
    assert (adapted(ids).logits - model(ids).logits).abs().max() > 1e-3


def test_adapters_of_one_end_alone_untie_what_another_one_ties():
    """As many adapters at the embedding as at the head, and not the same."""
    model, ids = tied_llama()
    adapted = lora_fx.rewrite(model.double(), config())
    lora_fx.add_adapter(adapted, config(ensure_weight_tying=False), "table")
    lora_fx.add_adapter(adapted, LoraConfig(r=2, target_modules=["lm_head"]), "head")
    randomize(adapted)
    lora_fx.set_adapter(adapted, ["default", "table", "head"])
    merged = lora_fx.merge(adapted)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert_close(merged(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize("targets", [["lm_head"], "lm_head|.*q_proj", ["lm_head", "q_proj"]])
def test_a_tied_head_that_is_named_means_its_embedding(targets, tmp_path):
    """As in PEFT, which puts the embedding into the targets."""
    base, ids = tied_llama()
    given = {"r": 3, "target_modules": targets, "ensure_weight_tying": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**given)).eval()
    model = lora_fx.rewrite(base, LoraConfig(**given))
    assert not lora_fx.plan(base, LoraConfig(**given)).unmatched
    rows = [row.name for row in lora_fx.plan(base, LoraConfig(**given))]
    prefix = "base_model.model."
    adapted = (name for name, one in theirs.named_modules() if isinstance(one, LoraLayer))
    assert sorted(rows) == sorted(name.removeprefix(prefix) for name in adapted)
    randomize(model)
    lora_fx.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert_close(read(ids).logits, model(ids).logits)
    alone = config(target_modules=targets, exclude_modules=["embed_tokens"])
    assert "model.embed_tokens" not in [row.name for row in lora_fx.plan(base, alone)]


def test_gradients_of_both_ends_add_up():
    model, ids = tied_llama()
    adapted = randomize(lora_fx.rewrite(model.double(), config()))
    adapted(ids).logits.square().sum().backward()
    merged = lora_fx.merge(adapted).requires_grad_(True)
    merged(ids).logits.square().sum().backward()
    grad = merged.lm_head.weight.grad  # [V, d], both uses
    embed = adapted.model.embed_tokens
    a, b = embed.lora_embedding_A.default, embed.lora_embedding_B.default
    scale = 8 / 3
    exact = [scale * b.detach().T @ grad.T, scale * grad.T @ a.detach().T]
    assert_close([a.grad, b.grad], exact, 1e-10)


def test_without_it_a_merge_unties_with_a_warning(caplog, tmp_path):
    model, ids = tied_llama()
    adapted = randomize(lora_fx.rewrite(model, config(ensure_weight_tying=False)))
    with caplog.at_level(logging.WARNING, "lora_fx"):
        merged = lora_fx.merge(adapted)
    assert "untied" in caplog.text
    assert_same_bits(merged.lm_head.weight, model.lm_head.weight)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same_bits(again(ids).logits, merged(ids).logits)


def test_it_comes_back_from_a_folder(tmp_path):
    model, ids = tied_llama()
    adapted = randomize(lora_fx.rewrite(model, config()))
    lora_fx.save_adapter(adapted, tmp_path)
    loaded = lora_fx.load_adapter(model, tmp_path)
    assert (
        loaded.lm_head.lora_embedding_A.default
        is loaded.model.embed_tokens.lora_embedding_A.default
    )
    assert_same_bits(loaded(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize("ours_first", [True, False])
def test_peft_and_we_read_each_other(ours_first, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = tied_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if ours_first:
            adapted = randomize(lora_fx.rewrite(model, config()))
            lora_fx.save_adapter(adapted, tmp_path)
            found = peft.PeftModel.from_pretrained(tied_llama()[0], tmp_path)
            expected = adapted(ids).logits
        else:
            theirs = peft.LoraConfig(
                r=3,
                target_modules=["embed_tokens"],
                ensure_weight_tying=True,
                task_type="CAUSAL_LM",
            )
            wrapped = randomize(peft.get_peft_model(tied_llama()[0], theirs))
            wrapped.save_pretrained(tmp_path)
            found, expected = lora_fx.load_adapter(model, tmp_path), wrapped(ids).logits
    assert_close(found(ids).logits, expected, 1e-5)


def test_modules_to_save_are_tied_as_well():
    model, ids = tied_llama()
    adapted = lora_fx.rewrite(
        model, config(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    )
    assert adapted.lm_head.weight is adapted.model.embed_tokens.weight
    assert adapted.lm_head.weight.requires_grad
    with torch.no_grad():
        adapted.lm_head.weight.mul_(1.5)
    merged = lora_fx.merge(adapted)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(merged(ids).logits, adapted(ids).logits, 1e-5)


@pytest.mark.parametrize(
    ("saved", "target"), [("embed_tokens", "lm_head"), ("lm_head", "embed_tokens")]
)
def test_what_is_tied_to_a_saved_module_has_no_adapter(saved, target, tmp_path):
    """Both are trained in full: the adapter of one would untie them, and no folder could be loaded."""
    model, ids = tied_llama()
    settings = config(target_modules=[target, "q_proj"], modules_to_save=[saved])
    plan = lora_fx.plan(model, settings)
    assert {row.name.rpartition(".")[2] for row in plan} == {"q_proj"}
    (skipped,) = [one for one in plan.skipped if one.site.name.endswith(target)]
    assert skipped.reason.startswith("trained in full")
    adapted = lora_fx.rewrite(model, settings)
    assert adapted.lm_head.weight is adapted.model.embed_tokens.weight
    with torch.no_grad():
        adapted.lm_head.weight.add_(0.1)
    folder = lora_fx.save_adapter(adapted, tmp_path)
    assert_close(lora_fx.load_adapter(model, folder)(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize(
    "other",
    [{"trainable_token_indices": {"embed_tokens": [3]}}, {"target_modules": ["embed_tokens"]}],
)
def test_one_end_that_another_adapter_trains_in_full_is_untied(other):
    model, ids = tied_llama()
    full = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = lora_fx.rewrite(model.double(), full)
    lora_fx.add_adapter(adapted, config(**{"target_modules": ["v_proj"], **other}), "other")
    lora_fx.set_adapter(adapted, ["default", "other"])
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(adapted):
            parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    merged = lora_fx.merge(adapted)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert_close(merged(ids).logits, adapted(ids).logits)


def test_where_nothing_is_tied_the_dry_run_says_so():
    model, _ = tiny_gpt2(tie_word_embeddings=False)
    plan = lora_fx.plan(model, LoraConfig(target_modules=["wte"], ensure_weight_tying=True))
    assert any("ensure_weight_tying" in entry for entry in plan.unmatched)
    with pytest.raises(lora_fx.PartialMatchError, match="ensure_weight_tying"):
        lora_fx.plan(
            model, LoraConfig(target_modules=["wte"], ensure_weight_tying=True), strict=True
        )


def test_tied_modules_of_plain_pytorch():
    model = seeded(Tied)()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=2, target_modules=names, ensure_weight_tying=True)
    )
    randomize(adapted)
    assert_close(lora_fx.merge(adapted)(IDS), adapted(IDS), 1e-5)
