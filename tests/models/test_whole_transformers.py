"""Models of transformers captured whole: which calls the graph takes, and that all mean the same."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError
from lora_fx.runtime.watch import CODES
from tests import zoo
from tests.algebra import randomize
from tests.numerics import assert_close, tensors
from tests.zoo import seeded

transformers = pytest.importorskip("transformers")

CONFIG = lora_fx.LoraConfig(r=4, lora_dropout=0.0)
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}
IMAGES = {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 3}
LAYERS = ["sliding_attention", "full_attention"]
MODERN = {**SMALL, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2}
LABELS = {"num_labels": 3}
# A layer that is within one that checkpoints.
LINEARS = {"bert": "layer.0.intermediate.dense", "vit": "mlp.fc1", "llama": "layers.0.mlp.up_proj"}
# Class, its configuration's class and settings.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GROUPED, "sliding_window": 4, "layer_types": LAYERS},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "llama, classes": ("LlamaForSequenceClassification", "LlamaConfig", {**GROUPED, **LABELS}),
    "bert, tokens": ("BertForTokenClassification", "BertConfig", {**SMALL, **LABELS}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", MODERN),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**SMALL, "state_size": 4, "time_step_rank": 4}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**IMAGES, "mlp_ratio": 2}),
}
SLOW = {"gpt2", "vit", "clip", "qwen3", "bert, tokens", "modernbert", "dinov2"}
MODELS = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in (*zoo.TRANSFORMERS, *OTHERS)
]
# The sequence is a loop in Python: the graph is of one length.
ONE_LENGTH = {"mamba"}
CACHES = {"llama", "gpt2", "t5", "whisper", "mixtral", "gemma3", "qwen3", "llama, classes", "mamba"}


@seeded
def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    if name in zoo.TRANSFORMERS:
        return zoo.TRANSFORMERS[name]()
    cls, config, settings = OTHERS[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
    if model.main_input_name == "pixel_values":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    return model, {"input_ids": torch.randint(3, 40, (2, 6))}


def labeled(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The inputs, and what makes the model compute a loss."""
    if name == "clip":
        return {**inputs, "return_loss": True}
    if name in ("bert", "vit", "dinov2", "llama, classes"):
        return {**inputs, "labels": torch.tensor([0, 2])}
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    return {**inputs, "labels": ids % 3 if name == "bert, tokens" else ids}


class Both:
    """A model over the regions alone and one captured whole, with the same adapters.

    In fp64: where siblings share a product, it is rounded otherwise. Grouped products of experts know no
    fp64.
    """

    def __init__(self, name: str, with_labels: bool = False, **changes: Any) -> None:
        original, inputs = build(name)
        dtype = torch.float32 if name == "mixtral" else torch.float64
        self.tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
        self.original = original.to(dtype)
        self.inputs = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in inputs.items()
        }
        given = {**(labeled(name, self.inputs) if with_labels else self.inputs), **changes}
        before = self.original.config.to_dict()
        self.whole = lora_fx.rewrite(self.original, CONFIG, given, frontend="export")
        assert self.original.config.to_dict() == before == self.whole.config.to_dict()
        randomize(self.whole, 0.1)
        self.parts = lora_fx.rewrite(self.original, CONFIG, frontend="regions")
        self.parts.load_state_dict(self.whole.state_dict())
        self.past: list[int] = []
        # Beneath the class that is watched.
        region = [cls for cls in type(self.whole).__mro__ if CODES in vars(cls)][-1]
        namespace = vars(region)["_lora_fx_run"].__globals__
        own = namespace["_lora_fx_fallback"]

        def past(*args: Any, **kwargs: Any) -> Any:
            self.past.append(1)
            return own(*args, **kwargs)

        namespace["_lora_fx_fallback"] = past

    def same(
        self, inputs: dict[str, Any], *, graph: bool | None, training: bool = False, **k: Any
    ) -> Any:
        """Outputs and gradients agree, and the call takes the graph or goes past it; either for None."""
        results = []
        for model in (self.parts, self.whole):
            self.past.clear()
            model.train(training).zero_grad()
            torch.manual_seed(0)
            out = model(**inputs, **k)
            loss = out.get("loss")
            (sum(t.square().mean() for t in tensors(out)) if loss is None else loss).backward()
            factors = lora_fx.trainable_parameters(model)
            results.append((out, [p.grad for p in factors if p.grad is not None]))
        (expected, wanted), (found, grads) = results
        if graph is not None:
            assert (not self.past) == graph, f"{inputs.keys()}, {k}, training={training}"
        assert type(found) is type(expected)
        cache = set() if not graph else {"cache", "past_key_values"}
        assert list(found) == [key for key in expected if key not in cache]
        assert_close(
            [found[k] for k in found if k != "cache"],
            [expected[k] for k in found if k != "cache"],
            self.tolerance,
        )
        assert_close(grads, wanted, self.tolerance)
        return found


def takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_calls_without_labels(name):
    both = Both(name)
    inputs, cacheless = both.inputs, {}
    if takes(both.original, "use_cache"):
        cacheless = {"use_cache": False}
        both.same(inputs, graph=False, use_cache=True)
    both.same(inputs, graph=name not in CACHES)
    both.same(inputs, graph=True, training=True)
    both.same(inputs, graph=True, **cacheless)
    both.same(inputs, graph=True, training=True, **cacheless)
    both.same(labeled(name, inputs), graph=False, **cacheless)
    more = {k: torch.cat([v, v[:1]]) for k, v in inputs.items()}
    both.same(more, graph=True, **cacheless)
    both.same({k: v[:1] for k, v in inputs.items()}, graph=None, **cacheless)
    if "input_ids" in inputs:
        free = name not in ONE_LENGTH
        longer = {k: torch.cat([v, v], 1) if v.dim() == 2 else v for k, v in inputs.items()}
        both.same(longer, graph=free, training=True, **cacheless)
        if not both.original.config.is_encoder_decoder:
            mask = torch.ones_like(inputs["input_ids"])
            mask[0, :2] = 0
            given = "attention_mask" in inputs
            both.same({**inputs, "attention_mask": mask}, graph=given, **cacheless)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_calls_with_labels(name):
    both = Both(name, with_labels=True)
    inputs = labeled(name, both.inputs)
    cacheless = {"use_cache": False} if takes(both.original, "use_cache") else {}
    for training in (True, False):
        found = both.same(inputs, graph=True, training=training, **cacheless)
        assert found.loss.dim() == 0
    both.same(inputs, graph=True, training=True)
    both.same(both.inputs, graph=False, training=True, **cacheless)
    if name != "clip":  # its loss needs as many images as texts
        # The masks of some are made in another way for a batch of one, which is no call for the graph then.
        tail = {k: v[1:] for k, v in inputs.items()}
        both.same(tail, graph=None, training=True, **cacheless)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_arguments_by_place_and_by_name(name):
    both = Both(name)
    ids, *mask = both.inputs.values()
    both.whole.eval()
    with torch.no_grad():
        cacheless = {"use_cache": False} if name == "llama" else {}
        both.past.clear()
        found = both.whole(ids, *mask, **cacheless)
        assert not both.past
        assert_close(found.logits, both.parts.eval()(ids, *mask, **cacheless).logits, 1e-6)
        # A tuple instead of the class is another output.
        assert isinstance(both.whole(ids, *mask, **cacheless, return_dict=False), tuple)
        assert both.past


def test_a_configuration_that_is_changed_afterwards_counts():
    both = Both("llama")
    both.same(both.inputs, graph=False)
    for model in (both.whole, both.parts):
        model.config.use_cache = False
    both.same(both.inputs, graph=True)
    for model in (both.whole, both.parts):
        model.config.output_hidden_states = True
    both.same(both.inputs, graph=False)


def test_arguments_that_only_keywords_take_can_be_part_of_the_graph():
    """As the Trainer calls a model: the loss is divided by what it counted."""
    count = {"num_items_in_batch": torch.tensor(7)}
    both = Both("llama", with_labels=True, **count)
    inputs = labeled("llama", both.inputs)
    first = both.same(inputs, graph=True, training=True, **count)
    second = both.same(inputs, graph=True, training=True, num_items_in_batch=torch.tensor(14))
    assert_close(first.loss, 2 * second.loss, 1e-6)
    both.same(inputs, graph=False, training=True)
    both.same(inputs, graph=False, training=True, num_items_in_batch=7)
    both.same(inputs, graph=False, training=True, **count, position_ids=torch.arange(6)[None])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper", "mixtral", "mamba"])
def test_generate_goes_past_the_graph(name):
    both = Both(name)
    first = {k: v for k, v in both.inputs.items() if not k.startswith("decoder")}
    # Adapted in earnest, or every token would be the first.
    randomize(both.whole, 0.5)
    both.past.clear()
    found = both.whole.eval().generate(**first, max_new_tokens=5, do_sample=False)
    assert both.past
    merged = lora_fx.merge(both.whole)
    assert torch.equal(merged.generate(**first, max_new_tokens=5, do_sample=False), found)


def test_a_decoding_loop_that_asks_nothing_gets_its_cache():
    both = Both("llama")
    ids = both.inputs["input_ids"]
    both.whole.eval()
    with torch.no_grad():
        first = both.whole(ids[:, :-1])
        second = both.whole(ids[:, -1:], cache=first.cache)
        assert_close(second.logits[:, -1], both.whole(ids, use_cache=False).logits[:, -1], 1e-5)


def test_a_cache_that_is_asked_for_is_refused_in_words():
    model, inputs = build("llama")
    with pytest.raises(CaptureError, match="use_cache=False in example_inputs"):
        lora_fx.capture(model, {**inputs, "use_cache": True}, frontend="export")


def test_a_copy_of_a_whole_capture_has_the_same_guard():
    import copy

    both = Both("llama")
    other = copy.deepcopy(both.whole).train()
    ids = both.inputs["input_ids"]
    assert other(ids).keys() == {"logits"}
    assert "cache" in other.eval()(ids)
    assert_close(other(ids, use_cache=False).logits, both.whole.eval()(ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_runs_the_graph(tmp_path):
    # The Trainer counts the labels for models that take any keyword.
    both = Both("bert", with_labels=True, num_items_in_batch=torch.tensor(2.0))
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(1)}
        for ids in both.inputs["input_ids"]
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    both.past.clear()
    result = transformers.Trainer(model=both.whole, args=arguments, train_dataset=rows).train()
    assert 0 < result.training_loss < 10
    assert not both.past
    assert both.whole.config.use_cache is False, "the Trainer sets what the code of BERT reads"
    # In evaluation it counts: the graph is that of a call with the other value.
    for told in (False, True):
        both.past.clear()
        both.whole.config.use_cache = told
        both.whole.eval()(**labeled("bert", both.inputs), num_items_in_batch=torch.tensor(2.0))
        assert bool(both.past) is not told


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("frontend", ["export", "auto"])
@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_the_trainer_checkpoints_activations(name, frontend, tmp_path):
    """A hook on a layer would make the watch look elsewhere, so the calls of a function are counted."""
    model, inputs = build(name)
    given = labeled(name, inputs)
    rewritten = lora_fx.rewrite(model, CONFIG, given, frontend=frontend)
    labels = given["labels"]
    rows = [
        {**{key: value[place] for key, value in inputs.items()}, "labels": labels[place]}
        for place in range(2)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        gradient_checkpointing=True,
    )
    runs: list[str] = []
    module = next(m for n, m in rewritten.named_modules() if n.endswith(LINEARS[name]))
    own = type(module).forward

    class Counted(type(module)):
        def forward(self, x):
            runs.append("forward" if torch._C._current_graph_task_id() == -1 else "backward")
            return own(self, x)

    object.__setattr__(module, "__class__", Counted)
    result = transformers.Trainer(model=rewritten, args=arguments, train_dataset=rows).train()
    assert 0 < result.training_loss < 10
    assert runs == ["forward", "backward"] * 2
