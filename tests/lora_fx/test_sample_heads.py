"""Samples of a batch with heads, norms and trained tokens of their own adapters."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.algebra import randomize
from tests.zoo import tiny_classifier

EXACT = {"rtol": 1e-12, "atol": 1e-12}
IDS: list[str | None] = ["mood", None, "spam", "plain", "mood"]
X = torch.randint(3, 50, (5, 7), generator=torch.Generator().manual_seed(0))


def classifier() -> Any:
    return tiny_classifier().double()


def language(tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).double().eval()


ADAPTERS: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {
    "heads": (
        classifier,
        {
            "mood": {"target_modules": ["query"], "modules_to_save": ["classifier"]},
            "spam": {"target_modules": ["value"], "modules_to_save": ["classifier", "LayerNorm"]},
            "plain": {"target_modules": ["query", "value"]},
        },
    ),
    **{
        name: (
            lambda tied=tied: language(tied),
            {
                "mood": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9, 20]},
                "spam": {"target_modules": ["v_proj"], "trainable_token_indices": [9]},
                "plain": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
            },
        )
        for name, tied in (("tokens", False), ("tokens of a tied head", True))
    },
}


def adapted(case: str) -> Any:
    """A model with trained adapters, of which samples can have any."""
    build, adapters = ADAPTERS[case]
    model: Any = None
    for name, options in adapters.items():
        config = LoraConfig(r=2, init_lora_weights=False, **options)
        if model is None:
            model = lora_fx.rewrite(build(), config, adapter_name=name)
        else:
            lora_fx.add_adapter(model, config, name)
        lora_fx.set_adapter(model, name)
        randomize(model)
    return model.eval()


def each_alone(model: Any, ids: list[str | None], x: Tensor) -> Tensor:
    """The rows as a model computes them with one adapter at a time."""
    rows = []
    for name, row in zip(ids, x, strict=True):
        lora_fx.set_adapter(model, [] if name is None else name)
        rows.append(model(row[None]).logits)
    return torch.cat(rows)


def test_a_batch_is_that_of_peft(tmp_path: Path) -> None:
    def build() -> Any:  # PEFT takes a mixed batch where the head is a layer of PyTorch
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=50, intermediate_size=24, num_labels=3, **sizes)
        return BertForSequenceClassification(config).double().eval()

    wrapped: Any = None
    for seed, name in enumerate(("mood", "spam")):
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2 + seed, target_modules=["query", "value"])
        if wrapped is None:
            wrapped = peft.get_peft_model(build(), config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        wrapped.set_adapter(name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (p for p in wrapped.parameters() if p.requires_grad):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.3 * noise)
    wrapped.double().eval().save_pretrained(str(tmp_path))
    model: Any = build()
    for name in ("mood", "spam"):
        model = lora_fx.load_adapter(model, tmp_path / name, adapter_name=name)
    names = ["mood", "__base__", "spam", "spam", "mood"]
    with torch.no_grad():
        want = wrapped(input_ids=X, adapter_names=names).logits
        with lora_fx.adapter_ids(model, [None if n == "__base__" else n for n in names]):
            got = model.eval()(X).logits
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("case", ADAPTERS)
def test_outputs_and_gradients_are_those_of_one_adapter_at_a_time(case: str) -> None:
    model = adapted(case)
    names = list(ADAPTERS[case][1])
    trained = {}
    for name in names:
        lora_fx.set_adapter(model, name)
        trained[name] = list(lora_fx.trainable_parameters(model))
    # An adapter is frozen while another one is active, so that each row has its own backward.
    want = []
    for adapter, row in zip(IDS, X, strict=True):
        lora_fx.set_adapter(model, [] if adapter is None else adapter)
        want.append(model(row[None]).logits)
        if adapter is not None:
            want[-1].square().sum().backward()
    gradients = {name: [p.grad for p in own] for name, own in trained.items()}
    for parameter in (p for own in trained.values() for p in own):
        parameter.grad = None
    lora_fx.set_adapter(model, names, per_sample=True)
    got = model(X, adapter_ids=IDS).logits
    torch.testing.assert_close(got, torch.cat(want), **EXACT)
    got.square().sum().backward()
    for name in names:
        assert trained[name]
        for parameter, gradient in zip(trained[name], gradients[name], strict=True):
            assert gradient is not None
            torch.testing.assert_close(parameter.grad, gradient, **EXACT)


@pytest.mark.parametrize("case", ADAPTERS)
def test_other_orders_threads_copies_and_the_way_back(case: str) -> None:
    model = adapted(case)
    with torch.no_grad():
        want = each_alone(model, IDS, X)
        lora_fx.set_adapter(model, "spam")
        spam = model(X).logits
        lora_fx.set_adapter(model, list(ADAPTERS[case][1]), per_sample=True)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (model, copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            torch.testing.assert_close(other(X, adapter_ids=IDS).logits, want, **EXACT)
        wrong = []

        def call(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(10):
                order = torch.randperm(len(X), generator=generator).tolist()
                got = model(X[order], adapter_ids=[IDS[row] for row in order]).logits
                if not torch.allclose(got, want[order], **EXACT):
                    wrong.append(order)

        threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        lora_fx.set_adapter(model, "spam")
        torch.testing.assert_close(model(X).logits, spam, rtol=0, atol=0)


def test_what_is_stored_and_merged_is_one_adapter(tmp_path: Path) -> None:
    model = adapted("heads")
    lora_fx.set_adapter(model, "spam")
    want = model(X).logits
    lora_fx.set_adapter(model, ["mood", "spam"], per_sample=True)
    torch.testing.assert_close(lora_fx.merge(model, adapter_names="spam")(X).logits, want, **EXACT)
    lora_fx.save_adapter(model, tmp_path, adapter_name="spam")
    again = lora_fx.load_adapter(classifier(), tmp_path / "spam")
    torch.testing.assert_close(again(X).logits, want, **EXACT)
    lora_fx.delete_adapter(model, "plain")
    with lora_fx.disable_adapter(model):
        torch.testing.assert_close(model(X).logits, classifier()(X).logits, **EXACT)


def test_a_call_without_names_and_a_part_by_itself_are_errors() -> None:
    model = adapted("heads")
    lora_fx.set_adapter(model, ["mood", "spam"], per_sample=True)
    assert isinstance(model.classifier.dense.weight, nn.Parameter)
    for call in (lambda: model(X), lambda: model.classifier(torch.zeros(2, 3, 16).double())):
        with pytest.raises(ConfigError, match="which sample has which"):
            call()
    with pytest.raises(ConfigError, match=r"dense\.weight has no values for each row in sum\(\)"):
        model.classifier.dense.weight.sum()


def test_an_own_value_in_an_adapted_layer_is_refused_and_the_model_stays() -> None:
    model = adapted("heads")
    head = LoraConfig(r=2, target_modules=["dense"], init_lora_weights=False)
    lora_fx.add_adapter(model, head, "head")
    lora_fx.set_adapter(model, "mood")
    before = model(X).logits
    with pytest.raises(
        ConfigError, match=r"'mood' has its own classifier\.dense\.weight .*factors adapt"
    ):
        lora_fx.set_adapter(model, ["mood", "head"], per_sample=True)
    torch.testing.assert_close(model(X).logits, before, rtol=0, atol=0)
