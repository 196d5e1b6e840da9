"""Example inputs for models that say what they take, and what is said where none can be made up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError
from lora_fx.passes.capture.synthesis import synthesise
from tests import zoo
from tests.zoo import seeded

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

CONFIG = lora_fx.LoraConfig(r=2)
LAYERS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**LAYERS, "vocab_size": 40, "intermediate_size": 16, "max_position_embeddings": 32}
WAVE = {
    **LAYERS,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SPECTROGRAM = {**LAYERS, "intermediate_size": 16, "max_length": 40, "num_mel_bins": 32}
SPEECH = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "vocab_size": 40,
}
BART = {**SPEECH, "max_position_embeddings": 32, "pad_token_id": 1, "eos_token_id": 2}
# Class, configuration, settings.
MORE = {
    "bert": ("BertModel", "BertConfig", {**TEXT, "max_position_embeddings": 8}),
    "bart, classes": ("BartForSequenceClassification", "BartConfig", BART),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", WAVE),
    "spectrogram": ("ASTModel", "ASTConfig", SPECTROGRAM),
    "speech to text": ("Speech2TextModel", "Speech2TextConfig", SPEECH),
}


@seeded
def build(name: str) -> nn.Module:
    if name in zoo.TRANSFORMERS:
        return zoo.TRANSFORMERS[name]()[0]
    cls, config, settings = MORE[name]
    return getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()


@pytest.mark.parametrize("name", [*zoo.TRANSFORMERS, *MORE])
def test_models_of_transformers_run_on_them(name):
    model = build(name)
    inputs = synthesise(model).inputs
    assert {value.shape[0] for value in inputs.values()} == {2}
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "whisper", "vit"])
def test_export_makes_its_own_inputs(name):
    plan = lora_fx.plan(build(name), CONFIG, frontend="export")
    assert plan.frontend == "export"
    assert plan.notes[-1].startswith("example inputs made up from main_input_name")
    assert "[2, " in plan.notes[-1]


@pytest.mark.parametrize("name", zoo.TIMM)
def test_models_of_timm_say_what_they_take(name):
    model, x = zoo.TIMM[name]()
    inputs = synthesise(model).inputs
    assert inputs.shape[:2] == x.shape[:2]
    with torch.no_grad():
        model(inputs)


def test_channels_are_those_that_the_model_was_made_with():
    model = timm.create_model("resnet18", pretrained=False, in_chans=4)
    assert synthesise(model).inputs.shape == (2, 4, 224, 224)
    assert lora_fx.capture(zoo.TIMM["vit"]()[0], frontend="export").frontend == "export"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_the_models(dtype):
    assert synthesise(build("vit").to(dtype)).inputs["pixel_values"].dtype == dtype
    assert synthesise(build("llama").to(dtype)).inputs["input_ids"].dtype == torch.int64


def test_the_device_is_the_models():
    with torch.device("meta"):
        model = zoo.tiny_llama()[0]
    assert synthesise(model).inputs["input_ids"].device.type == "meta"
    assert lora_fx.plan(model, CONFIG, frontend="export").frontend == "export"


def test_token_types_are_there_if_the_model_has_several():
    model = build("bert")
    types = synthesise(model).inputs["token_type_ids"]
    assert types.tolist() == [[0] * 6 + [1] * 6] * 2
    model.config.type_vocab_size = 1
    assert "token_type_ids" not in synthesise(model).inputs
    assert set(synthesise(build("llama")).inputs) == {"input_ids", "attention_mask"}


def test_nothing_is_drawn_from_the_users_generator():
    before = torch.get_rng_state()
    synthesise(build("clip"))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_looked_for_is_said():
    model = seeded(zoo.Mlp)()
    with pytest.raises(CaptureError, match=r"needs example_inputs.*neither the config"):
        lora_fx.capture(model, frontend="export")
    with pytest.raises(CaptureError, match=r"needs example_inputs.*neither the config"):
        lora_fx.rewrite(model, CONFIG, frontend="export")
    other = build("bert")
    other.main_input_name = "bbox"
    with pytest.raises(CaptureError, match="main_input_name is bbox"):
        lora_fx.plan(other, CONFIG, frontend="export")
    speech = build("whisper")
    speech.config = transformers.PretrainedConfig()
    with pytest.raises(CaptureError, match="do not tell the size of input_features"):
        lora_fx.plan(speech, CONFIG, frontend="export")


def test_inputs_that_do_not_fit_after_all_are_shown():
    class Picky(nn.Module):
        main_input_name = "pixel_values"
        config = transformers.PretrainedConfig(image_size=8, num_channels=1)

        def forward(self, pixel_values, boxes):
            return pixel_values

    with pytest.raises(
        CaptureError, match=r"do not fit.*float32\[2, 1, 8, 8\].*give example_inputs"
    ):
        lora_fx.capture(Picky(), frontend="export")


def test_auto_makes_none_up():
    plan = lora_fx.plan(build("llama"), CONFIG)
    assert plan.frontend == "regions"
    assert plan.notes[-1] == "not export: there are no example_inputs"
