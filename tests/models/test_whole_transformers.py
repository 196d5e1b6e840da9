"""Models of transformers whose operations ``torch.export`` finds: every call gives the right result."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError
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


class Models:
    """A model whose operations ``torch.export`` found, one over the regions, and a dense one.

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
        assert lora_fx.plan(self.original, CONFIG, given, frontend="export").frontend == "export"
        randomize(self.whole, 0.1)
        self.parts = lora_fx.rewrite(self.original, CONFIG, frontend="regions")
        self.parts.load_state_dict(self.whole.state_dict())
        self.dense = lora_fx.merge(self.whole)

    def check_same(self, inputs: dict[str, Any], training: bool = False, **more: Any) -> Any:
        """Compare the outputs of all, and the gradients of the adapters."""
        results = []
        for model in (self.dense, self.parts, self.whole):
            model.train(training).zero_grad()
            torch.manual_seed(0)
            out = model(**inputs, **more)
            loss = out.get("loss")
            gradients = []
            if model is not self.dense:
                (sum(t.square().mean() for t in tensors(out)) if loss is None else loss).backward()
                factors = lora_fx.trainable_parameters(model)
                gradients = [p.grad for p in factors if p.grad is not None]
            results.append((out, gradients))
        (expected, _), (_, wanted), (found, gradients) = results
        for out, _ in results:
            assert type(out) is type(expected)
            assert list(out) == list(expected)
            compared = [key for key in expected if key != "cache"]
            assert_close(
                [out[k] for k in compared], [expected[k] for k in compared], self.tolerance
            )
        assert_close(gradients, wanted, self.tolerance)
        return found


def takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_make_calls_of_every_form(name: str) -> None:
    models = Models(name)
    inputs = models.inputs
    with torch.no_grad():
        first, second = (next(iter(tensors(m(**inputs)))) for m in (models.original, models.whole))
        assert not torch.allclose(first, second), "the adapters count"
    models.check_same(inputs)
    models.check_same(inputs, training=True)
    models.check_same({k: torch.cat([v, v[:1]]) for k, v in inputs.items()})
    models.check_same({k: v[:1] for k, v in inputs.items()})
    if takes(models.original, "use_cache"):
        for cached in (True, False):
            models.check_same(inputs, use_cache=cached)
    if "input_ids" in inputs:
        longer = {k: torch.cat([v, v], 1) if v.dim() == 2 else v for k, v in inputs.items()}
        models.check_same(longer, training=True)
        if not models.original.config.is_encoder_decoder:
            mask = torch.ones_like(inputs["input_ids"])
            mask[0, :2] = 0
            models.check_same({**inputs, "attention_mask": mask})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_compute_losses(name: str) -> None:
    models = Models(name, with_labels=True)
    inputs = labeled(name, models.inputs)
    for training in (True, False):
        assert models.check_same(inputs, training=training).loss.dim() == 0
    models.check_same(models.inputs, training=True)
    if name != "clip":  # its loss needs as many images as texts
        models.check_same({k: v[1:] for k, v in inputs.items()}, training=True)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_take_arguments_by_place_and_a_tuple_for_the_output(name: str) -> None:
    models = Models(name)
    ids, *mask = models.inputs.values()
    with torch.no_grad():
        for more in ({}, {"return_dict": False}, {"output_hidden_states": True}):
            found, expected = (m.eval()(ids, *mask, **more) for m in (models.whole, models.dense))
            assert type(found) is type(expected)
            assert isinstance(found, tuple) == ("return_dict" in more)
            assert_close(found[0], expected[0], models.tolerance)


def test_follow_a_configuration_that_is_changed_afterwards() -> None:
    models = Models("llama")
    for setting, value in (("use_cache", False), ("output_hidden_states", True)):
        for model in (models.whole, models.parts, models.dense):
            setattr(model.config, setting, value)
        found = models.check_same(models.inputs)
    assert "cache" not in found
    assert len(found.hidden_states) == 3


def test_divide_the_loss_by_what_the_trainer_counts() -> None:
    count = {"num_items_in_batch": torch.tensor(7)}
    models = Models("llama", with_labels=True, **count)
    inputs = labeled("llama", models.inputs)
    first = models.check_same(inputs, training=True, **count)
    second = models.check_same(inputs, training=True, num_items_in_batch=torch.tensor(14))
    assert_close(first.loss, 2 * second.loss, 1e-6)
    models.check_same(inputs, training=True)
    models.check_same(inputs, training=True, num_items_in_batch=7)
    models.check_same(inputs, training=True, **count, position_ids=torch.arange(6)[None])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper", "mixtral", "mamba"])
def test_generate(name: str) -> None:
    models = Models(name)
    first = {k: v for k, v in models.inputs.items() if not k.startswith("decoder")}
    # Adapted in earnest, or every token would be the first.
    randomize(models.whole, 0.5)
    found = models.whole.eval().generate(**first, max_new_tokens=5, do_sample=False)
    merged = lora_fx.merge(models.whole)
    assert torch.equal(merged.generate(**first, max_new_tokens=5, do_sample=False), found)


def test_give_a_decoding_loop_its_cache() -> None:
    whole, ids = Models("llama").whole.eval(), labeled("llama", build("llama")[1])["input_ids"]
    with torch.no_grad():
        first = whole(ids[:, :-1])
        second = whole(ids[:, -1:], cache=first.cache)
        assert_close(second.logits[:, -1], whole(ids, use_cache=False).logits[:, -1], 1e-5)


def test_refuse_to_export_a_cache_in_words() -> None:
    model, inputs = build("llama")
    with pytest.raises(CaptureError, match="use_cache=False in example_inputs"):
        lora_fx.capture(model, {**inputs, "use_cache": True}, frontend="export")


def test_copy_a_model() -> None:
    models = Models("llama")
    models.whole = copy.deepcopy(models.whole)
    for training in (True, False):
        assert "cache" in models.check_same(models.inputs, training=training)
    models.check_same(models.inputs, use_cache=False)


def rows_of(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value[place] for key, value in inputs.items()} for place in range(2)]


def arguments(folder: Path, **more: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **more,
    )


@pytest.mark.filterwarnings("ignore")
def test_train_as_the_regions_do(tmp_path: Path) -> None:
    # The Trainer counts the labels for models that take any keyword.
    models = Models("bert", with_labels=True, num_items_in_batch=torch.tensor(2.0))
    rows = rows_of(labeled("bert", models.inputs))
    losses = []
    for model in (models.parts, models.whole):
        trainer = transformers.Trainer(model=model, args=arguments(tmp_path), train_dataset=rows)
        losses.append(trainer.train().training_loss)
        assert model.config.use_cache is False, "the Trainer sets what the code of BERT reads"
    assert 0 < losses[0] < 10
    assert abs(losses[1] - losses[0]) < 1e-6
    state = models.parts.state_dict()
    assert_close(list(models.whole.state_dict().values()), list(state.values()), 1e-6)
    models.dense = lora_fx.merge(models.whole)
    models.check_same(labeled("bert", models.inputs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("frontend", ["export", "auto"])
@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_checkpoint_activations_in_a_trainer(name: str, frontend: Any, tmp_path: Path) -> None:
    """A hook on a layer would make the watch look elsewhere, so the calls of a function are counted."""
    model, inputs = build(name)
    given = labeled(name, inputs)
    rewritten = lora_fx.rewrite(model, CONFIG, given, frontend=frontend)
    rows = rows_of(given)
    runs: list[str] = []
    module = next(m for n, m in rewritten.named_modules() if n.endswith(LINEARS[name]))
    own = type(module).forward

    class Counted(type(module)):
        def forward(self, x):
            runs.append("forward" if torch._C._current_graph_task_id() == -1 else "backward")
            return own(self, x)

    object.__setattr__(module, "__class__", Counted)
    settings = arguments(tmp_path, gradient_checkpointing=True)
    result = transformers.Trainer(model=rewritten, args=settings, train_dataset=rows).train()
    assert 0 < result.training_loss < 10
    assert runs == ["forward", "backward"] * 2
