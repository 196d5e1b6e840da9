"""Trained rows of embeddings and heads: PEFT's numbers, folders and refusals."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx import CheckpointError, ConfigError, LoraConfig, MergeError
from lora_fx.ir.record import record_of
from lora_fx.passes.insert.trained_whole import AddTokens, TrainTokens
from lora_fx.passes.pipeline import plan_model
from tests.golden import check_golden, printed
from tests.numerics import assert_close, assert_same_bits

IDS = torch.arange(24).reshape(3, 8) % 16
Q = ["q_proj"]


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, bos_token_id=1,
        eos_token_id=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, pad_token_id=0,
        num_attention_heads=2, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


class Plain(nn.Module):
    """Two tables, of which one is scaled after the lookup, and a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 6, padding_idx=3)
        self.kinds = nn.Embedding(4, 6)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) * 2.5 + self.kinds(ids % 4) + self.words(ids.flip(-1))
        return self.head(torch.tanh(self.fc(x)))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain()


def logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def in_peft(model: nn.Module, **values: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**copy.deepcopy(values)))


def shaken(model: nn.Module) -> None:
    """Other values for all that is trained, alike in both libraries."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and ("delta" in name or "lora_" in name):
                parameter.add_(torch.randn(parameter.shape) * 0.2)


CASES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (llama, {"target_modules": Q, "trainable_token_indices": [3, 1, 5]}),
    (lambda: llama(True), {"target_modules": Q, "trainable_token_indices": [3, 1, 5]}),
    (llama, {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [15, 0]}}),
    (llama, {"target_modules": Q, "trainable_token_indices": {"tokens": [2]}}),
    (llama, {"target_modules": Q, "trainable_token_indices": {"lm_head": [3, 1]}}),
    (
        llama,
        {"target_modules": Q, "trainable_token_indices": {"lm_head": [3, 1], "embed_tokens": [2]}},
    ),
    (
        lambda: llama(True),
        {"target_modules": Q, "trainable_token_indices": {"lm_head": [3], "embed_tokens": [3]}},
    ),
    (
        lambda: llama(True),
        {"target_modules": Q, "trainable_token_indices": {"lm_head": [3], "embed_tokens": [2]}},
    ),
    (lambda: llama(True), {"target_modules": Q, "trainable_token_indices": {"lm_head": [3]}}),
    (
        lambda: llama(True),
        {"target_modules": Q, "trainable_token_indices": [3], "ensure_weight_tying": True},
    ),
    (llama, {"target_modules": Q, "trainable_token_indices": [7], "modules_to_save": ["norm"]}),
    (llama, {"target_modules": Q, "trainable_token_indices": [7], "bias": "all"}),
    (bert, {"target_modules": ["query"], "trainable_token_indices": [1, 2]}),
    (
        bert,
        {
            "target_modules": ["query"],
            "task_type": "SEQ_CLS",
            "trainable_token_indices": {"token_type_embeddings": [0], "word_embeddings": [4, 9]},
        },
    ),
    (plain, {"target_modules": ["fc"], "trainable_token_indices": {"words": [2, 3, 9]}}),
    (plain, {"target_modules": ["fc"], "trainable_token_indices": {"kinds": [0, 1, 2, 3]}}),
]


@pytest.mark.parametrize(
    ("make", "values"), CASES, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_computes_saves_and_loads_as_peft(
    make: Callable[[], nn.Module], values: dict[str, Any], tmp_path: Path
) -> None:
    theirs = in_peft(make(), **values)
    shaken(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora_fx.load_adapter(make(), tmp_path / "theirs")
    assert_close(logits(ours(IDS)), logits(theirs(IDS)))

    lora_fx.save_adapter(ours, tmp_path / "ours")
    mine, other = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")
    )
    if values.get("bias", "none") == "none":
        assert {key: value.shape for key, value in mine.items()} == {
            key: value.shape for key, value in other.items()
        }
    for key in mine.keys() & other.keys():
        assert_same_bits(mine[key], other[key])
    read = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert_close(logits(read(IDS)), logits(ours(IDS)))
    assert_close(logits(lora_fx.merge(ours)(IDS)), logits(ours(IDS)))


@pytest.mark.parametrize(("make", "values"), CASES[:2] + CASES[4:5] + CASES[12:15])
def test_gradients_are_pefts(
    make: Callable[[], nn.Module], values: dict[str, Any], tmp_path: Path
) -> None:
    theirs = in_peft(make(), **values)
    shaken(theirs)
    theirs.save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(make(), tmp_path)
    found = []
    for model in (theirs.eval(), ours.eval()):
        logits(model(IDS)).square().sum().backward()
        rows = [(n, p.grad) for n, p in model.named_parameters() if n.endswith("delta.default")]
        found.append(dict(rows))
    assert len(found[0]) == len(found[1]) > 0
    for name, gradient in found[1].items():
        assert gradient is not None
        assert_close(gradient, found[0][f"base_model.model.{name}"])


@pytest.mark.parametrize("tied", [False, True])
def test_starts_at_the_base_to_the_last_bit(tied: bool) -> None:
    base = llama(tied).requires_grad_(False)
    config = LoraConfig(target_modules=Q, trainable_token_indices=[3, 1, 5])
    model = lora_fx.rewrite(base, config)
    assert_same_bits(model(IDS).logits, base(IDS).logits)
    plan = lora_fx.plan(base, config)
    assert plan.trainable_parameters == sum(p.numel() for p in lora_fx.trainable_parameters(model))
    assert "rows trained: 3 of model.embed_tokens" in str(plan)
    assert plan.to_dict()["tokens"]["model.embed_tokens"] == [3, 1, 5]
    assert ("lm_head" in plan.to_dict()["tokens"]) is tied


@pytest.mark.parametrize(("site", "file"), [("words", "lookup"), ("head", "product")])
def test_golden(site: str, file: str) -> None:
    config = LoraConfig(target_modules=["fc"], trainable_token_indices={site: [2, 3, 9]})
    graph = lora_fx.graphs(lora_fx.rewrite(plain(), config))[site]
    check_golden(f"train_tokens_{file}", printed(graph))


def test_a_second_run_changes_nothing() -> None:
    base = plain()
    config = LoraConfig(target_modules=["fc"], trainable_token_indices={"words": [2], "head": [3]})
    capture, plan = plan_model(base, config)
    nothing = dataclasses.replace(plan, tokens=())
    assert not AddTokens()(dataclasses.replace(capture, plan=nothing)).modified
    assert not TrainTokens(())(capture).modified
    before = graphs = {name: printed(region.graph) for name, region in capture.regions.items()}
    capture = dataclasses.replace(capture, plan=plan)
    for one in (AddTokens(), TrainTokens()):
        result = one(capture)
        assert result.modified
        again = one(result.capture)
        assert not again.modified
        assert again.capture is result.capture
        assert graphs == {name: printed(region.graph) for name, region in capture.regions.items()}
        capture = result.capture
        graphs = {name: printed(region.graph) for name, region in capture.regions.items()}
    assert sorted(name for name in graphs if graphs[name] != before[name]) == ["head", "words"]
    assert all(region.fallback for region in capture.regions.values())


def test_nothing_of_the_size_of_the_table_is_made() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5000, 8)
            self.fc = nn.Linear(8, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc(self.table(ids))

    config = LoraConfig(target_modules=["fc"], trainable_token_indices=[3, 4999])
    model = lora_fx.rewrite(Big(), config)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        loss = model(IDS).sum()
    loss.backward()
    assert max(sizes) < 5000
    assert model.table.token_adapter.trainable_tokens_delta.default.grad.shape == (2, 8)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merge_writes_the_rows_and_keeps_the_tie(tied: bool) -> None:
    base = llama(tied)
    config = LoraConfig(target_modules=Q, trainable_token_indices=[3, 1])
    model = lora_fx.rewrite(base, config)
    shaken(model)
    rows = model.model.embed_tokens.token_adapter.trainable_tokens_delta.default
    merged, report = lora_fx.merge(model, return_report=True)
    assert_same_bits(merged.model.embed_tokens.weight[[3, 1]], rows)
    untouched = [i for i in range(16) if i not in (1, 3)]
    assert_same_bits(
        merged.model.embed_tokens.weight[untouched], base.model.embed_tokens.weight[untouched]
    )
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    assert merged.config.tie_word_embeddings is tied
    assert not report.untied
    assert report.max_ulp <= 0.5
    assert {site.name for site in report.sites} >= {"model.embed_tokens"}
    assert not [n for n, _ in merged.named_modules() if "token_adapter" in n]
    assert torch.equal(base.model.embed_tokens.weight, llama(tied).model.embed_tokens.weight)


def test_a_head_alone_is_untied_by_a_merge() -> None:
    """PEFT's merge loses one of the two: it writes both into the weight that they share."""
    config = LoraConfig(target_modules=Q, trainable_token_indices={"lm_head": [3]})
    model = lora_fx.rewrite(llama(True), config)
    shaken(model)
    merged, report = lora_fx.merge(model, return_report=True)
    assert report.untied == ("lm_head.weight",)
    assert_close(merged(IDS).logits, model(IDS).logits)
    assert merged.config.tie_word_embeddings is False


def test_half_precision_keeps_rows_in_fp32() -> None:
    base = llama(True).bfloat16()
    config = LoraConfig(target_modules=Q, trainable_token_indices=[3, 1])
    model = lora_fx.rewrite(base, config)
    rows = model.model.embed_tokens.token_adapter.trainable_tokens_delta.default
    assert rows.dtype is torch.float32
    assert_same_bits(model(IDS).logits, base(IDS).logits)
    shaken(model)
    assert_close(model(IDS).logits, lora_fx.merge(model)(IDS).logits, 3e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = lora_fx.rewrite(llama(True), config)
        shaken(wide)
        assert_close(wide(IDS).logits, lora_fx.merge(wide)(IDS).logits, 3e-2)


def test_a_head_with_a_bias_keeps_it() -> None:
    """PEFT leaves the bias of such a head out."""
    base = plain().eval().requires_grad_(False)
    config = LoraConfig(target_modules=["fc"], trainable_token_indices={"head": [3, 1]})
    model = lora_fx.rewrite(base, config)
    assert_same_bits(model(IDS), base(IDS))
    shaken(model)
    assert_close(lora_fx.merge(model)(IDS), model(IDS))
    assert (in_peft(plain(), target_modules=["fc"], trainable_token_indices={"head": [3]})(IDS)
            - base(IDS)).abs().max() > 0.1  # fmt: skip


def test_adapters_switch_and_are_deleted() -> None:
    base = llama(True).requires_grad_(False)
    first = LoraConfig(target_modules=Q, trainable_token_indices=[3, 1])
    second = LoraConfig(target_modules=Q, trainable_token_indices=[1, 9], seed=3)
    model = lora_fx.rewrite(base, first, adapter_name="one")
    lora_fx.add_adapter(model, second, "two")
    lora_fx.add_adapter(model, LoraConfig(target_modules=["v_proj"]), "three")
    lora_fx.add_adapter(model, LoraConfig(target_modules=["embed_tokens"]), "four")
    expected = {}
    for name in ("one", "two", "three", "four"):
        lora_fx.set_adapter(model, name)
        shaken(model)
        expected[name] = model(IDS).logits.detach()
        assert_close(lora_fx.merge(model)(IDS).logits, expected[name])
    for name in ("two", "one", "four", "three"):
        lora_fx.set_adapter(model, name)
        assert_same_bits(model(IDS).logits, expected[name])
        wanting = {n for n, p in model.named_parameters() if p.requires_grad}
        assert wanting
        assert all(n.endswith(f".{name}") for n in wanting)
    with lora_fx.disable_adapter(model):
        assert_same_bits(model(IDS).logits, base(IDS).logits)
    lora_fx.set_adapter(model, ["one", "three"])
    assert_close(lora_fx.merge(model)(IDS).logits, model(IDS).logits)
    for together, other in ((["one", "two"], "two"), (["four", "one"], "four")):
        before = record_of(model)
        with pytest.raises(ConfigError, match=rf"cannot be active together.*'{other}' adapts it"):
            lora_fx.set_adapter(model, together)
        assert record_of(model) is before
        with pytest.raises(MergeError, match="merge one"):
            lora_fx.merge(model, adapter_names=together)
    lora_fx.set_adapter(model, "two")
    lora_fx.delete_adapter(model, "one")
    assert_same_bits(model(IDS).logits, expected["two"])
    lora_fx.set_adapter(model, [])
    lora_fx.delete_adapter(model, "two")
    assert not [n for n, _ in model.named_modules() if "token_adapter" in n]


def test_samples_cannot_choose_rows_of_an_adapted_embedding() -> None:
    config = LoraConfig(target_modules=Q, trainable_token_indices=[3])
    model = lora_fx.rewrite(llama(), config)
    lora_fx.add_adapter(model, LoraConfig(target_modules=["embed_tokens"]), "other")
    with pytest.raises(
        ConfigError, match=r"own model\.embed_tokens\.weight .*factors adapt that layer"
    ):
        lora_fx.set_adapter(model, ["default", "other"], per_sample=True)


def test_survives_copies_pickles_and_moves() -> None:
    config = LoraConfig(target_modules=["fc"], trainable_token_indices={"words": [2, 9]})
    model = lora_fx.rewrite(plain(), config)
    shaken(model)
    expected = model(IDS)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(one(IDS), expected)
    assert not [name for name in model.state_dict() if "token_indices" in name]
    assert_close(copy.deepcopy(model).double()(IDS), expected, 1e-6)


def test_compiles_as_one_graph() -> None:
    config = LoraConfig(target_modules=["fc"], trainable_token_indices={"words": [2], "head": [3]})
    model = lora_fx.rewrite(plain(), config)
    shaken(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(IDS), model(IDS))


@pytest.mark.parametrize("frontend", ["export", "regions"])
def test_other_front_ends(frontend: Any) -> None:
    config = LoraConfig(target_modules=["fc"], trainable_token_indices={"words": [2], "head": [3]})
    model = lora_fx.rewrite(plain(), config, (IDS,), frontend=frontend)
    shaken(model)
    merged = lora_fx.merge(model)
    assert_close(model(IDS), merged(IDS))
    assert_close(model(IDS[:2]), merged(IDS[:2]))


def test_rows_alone() -> None:
    """With an empty list of targets nothing else is trained; PEFT refuses that."""
    config = LoraConfig(target_modules=[], trainable_token_indices=[3])
    model = lora_fx.rewrite(llama(), config)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    ]


class Heads(nn.Module):
    """A shared weight that no model's configuration declares."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


@pytest.mark.parametrize("ensure", [False, True])
def test_a_tie_that_is_not_declared_is_kept_if_it_is_asked_for(ensure: bool) -> None:
    torch.manual_seed(0)
    ids = torch.arange(9)
    config = LoraConfig(
        target_modules=[], trainable_token_indices=[3, 4], ensure_weight_tying=ensure
    )
    model = lora_fx.rewrite(Heads(), config)
    shaken(model)
    merged = lora_fx.merge(model)
    assert (merged.head.weight is merged.table.weight) is ensure
    assert_close(merged(ids), model(ids))


def test_rows_of_other_tokens_name_the_remedy() -> None:
    adapters = [
        lora_fx.rewrite(llama(), LoraConfig(target_modules=Q, trainable_token_indices=tokens))
        for tokens in ([3], [3, 5])
    ]
    state = lora_fx.adapter_state_dict(adapters[0])
    with pytest.raises(
        CheckpointError, match=r"\[1, 8\] .*\[2, 8\] in the model\. Rewrite the base with the train"
    ):
        lora_fx.load_adapter_state_dict(adapters[1], state)


def test_a_vocabulary_that_was_resized_names_the_remedy(tmp_path: Path) -> None:
    larger: Any = llama()
    larger.resize_token_embeddings(20)
    adapted = lora_fx.rewrite(larger, LoraConfig(target_modules=Q))
    lora_fx.save_adapter(adapted, tmp_path, save_embedding_layers=True)
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(20\) first") as refusal:
        lora_fx.load_adapter(llama(), tmp_path)
    assert str(refusal.value).count("resize") == 2


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (llama, {"target_modules": ["embed_tokens"], "trainable_token_indices": [3]},
         "model.embed_tokens is adapted as well"),
        (llama, {"target_modules": Q, "modules_to_save": ["embed_tokens"],
                 "trainable_token_indices": [3]},
         "trained in full as part of model.embed_tokens"),
        (llama, {"target_modules": Q, "trainable_token_indices": [3, 99]},
         "found [99]; model.embed_tokens has 16 rows, 0 to 15. For new tokens, give the model 100 rows"),
        (llama, {"target_modules": Q, "trainable_token_indices": {"wte": [3]}},
         "found 'wte'; no module has a name that ends so; the embeddings are model.embed_tokens"),
        (llama, {"target_modules": Q, "trainable_token_indices": {"q_proj": [3]}},
         "q_proj is adapted as well"),
        (llama, {"target_modules": Q, "trainable_token_indices": {"self_attn": [3]}},
         "model.layers.0.self_attn is neither an embedding"),
        (plain, {"target_modules": ["fc"], "trainable_token_indices": [3]},
         "a list is about the model's one embedding; it has words, kinds: give a dict by name"),
    ],
)  # fmt: skip
def test_what_is_refused_as_in_peft(
    make: Callable[[], nn.Module], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        lora_fx.plan(make(), LoraConfig(**values))
    with pytest.raises((ValueError, TypeError, IndexError, AttributeError)):
        in_peft(make(), **values)(IDS)


def test_what_only_lora_fx_refuses() -> None:
    both = LoraConfig(target_modules=["lm_head"], trainable_token_indices=[3])
    with pytest.raises(ConfigError, match="lm_head is adapted as well"):
        lora_fx.plan(llama(True), both)
    base = Heads()
    config = LoraConfig(target_modules=[], trainable_token_indices={"table": [3], "head": [4]})
    lora_fx.plan(base, config)
    with pytest.raises(
        ConfigError, match=r"head is to stay tied to table .*which has others: \[3\]"
    ):
        lora_fx.plan(base, LoraConfig(**{**config.to_dict(), "ensure_weight_tying": True}))
    counted = nn.Sequential(nn.Embedding(9, 4, scale_grad_by_freq=True), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="scales gradients by the frequency"):
        lora_fx.plan(counted, LoraConfig(target_modules=["1"], trainable_token_indices=[3]))
    with pytest.raises(ConfigError, match="on the meta device"):
        lora_fx.rewrite(
            plain().to("meta"),
            LoraConfig(target_modules=["fc"], trainable_token_indices={"words": [3]}),
        )


def test_a_failure_leaves_the_model() -> None:
    model = lora_fx.rewrite(llama(), LoraConfig(target_modules=Q))
    before = (record_of(model), list(model.state_dict()))
    with pytest.raises(ConfigError, match="has 16 rows"):
        lora_fx.add_adapter(
            model, LoraConfig(target_modules=Q, trainable_token_indices=[77]), "other"
        )
    assert (record_of(model), list(model.state_dict())) == before


def test_rows_that_are_not_finite_are_not_merged() -> None:
    model = lora_fx.rewrite(llama(), LoraConfig(target_modules=Q, trainable_token_indices=[3]))
    with torch.no_grad():
        model.model.embed_tokens.token_adapter.trainable_tokens_delta.default.fill_(torch.nan)
    with pytest.raises(MergeError, match=r"model\.embed_tokens: adapter 'default' has rows"):
        lora_fx.merge(model)


def test_a_head_reads_the_adapted_layer_before_it_in_an_exported_graph() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(16, 6)
            self.fc = nn.Linear(6, 6)
            self.head = nn.Linear(6, 16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.fc(self.words(ids)))

    torch.manual_seed(0)
    model = Stack().double()
    rows = {"words": [1, 2], "head": [3, 4]}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["fc"], trainable_token_indices=rows)
    adapted = lora_fx.rewrite(model, config, frontend="export", example_inputs=(IDS,))
    shaken(adapted)
    trained = {
        name: parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    weights = {"fc.weight": model.fc.weight + 1.5 * (
        adapted.fc.lora_B.default @ adapted.fc.lora_A.default
    )}  # fmt: skip
    for name, indices in rows.items():
        (values,) = (value for key, value in trained.items() if key.startswith(f"{name}."))
        weights[f"{name}.weight"] = model.get_parameter(f"{name}.weight").index_copy(
            0, torch.tensor(indices), values
        )
    exact = torch.func.functional_call(model, weights, (IDS,))
    assert_close(adapted(IDS), exact)
    assert_close(lora_fx.merge(adapted)(IDS), exact)
