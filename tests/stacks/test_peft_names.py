"""lora_fx.peft, PEFT's names over lora-fx: what the scripts in examples/from_peft do not reach."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lora_fx
import lora_fx.peft
from lora_fx import ConfigError, LoraConfig
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, adapted, llama

THEIRS = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def wrapped(**options: Any) -> Any:
    return lora_fx.peft.get_peft_model(llama(), THEIRS, **options).eval()


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- one model, two adapters on top of each other -------------------------------------------------


@pytest.mark.parametrize("of_plain", [True, False], ids=["plain", "as PeftModel"])
def test_peft_cannot_adapt_a_rewritten_model_once_more(of_plain: bool) -> None:
    model = adapted()
    target = model if of_plain else lora_fx.as_peft_model(model)
    names, before, expected = [*dict(model.named_modules())], state(model), model(IDS).logits
    with pytest.raises(ConfigError, match=r"adapters of lora-fx \(default\).*peft_config=None"):
        peft.get_peft_model(target, THEIRS)
    with pytest.raises(ConfigError, match=r"lora_fx\.add_adapter"):
        peft.inject_adapter_in_model(THEIRS, target, "other")
    assert [*dict(model.named_modules())] == names
    assert_same_bits(state(model), before)
    assert_same_bits(model(IDS).logits, expected)


def test_peft_adapts_the_base_and_what_was_merged() -> None:
    base = llama()
    model = adapted(base=base)
    for free in (base, lora_fx.merge(model)):
        assert not hasattr(free, "peft_config")
        assert isinstance(peft.get_peft_model(free, THEIRS), peft.PeftModel)


@pytest.mark.stack
def test_trl_refuses_a_configuration_for_a_rewritten_model(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from tests.stacks.trainers import tokenizer

    data = Dataset.from_dict({"text": ["w1 w2"] * 4})
    arguments = trl.SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to=[])
    options = {"args": arguments, "train_dataset": data, "processing_class": tokenizer()}
    with pytest.raises(ConfigError, match="peft_config=None"):
        trl.SFTTrainer(adapted(), peft_config=copy.deepcopy(THEIRS), **options)


def test_a_rewritten_model_says_its_configurations() -> None:
    model = adapted()
    lora_fx.add_adapter(model, LoraConfig(r=3, target_modules=["v_proj"]), "other")
    assert {name: config.r for name, config in model.peft_config.items()} == {
        "default": 2,
        "other": 3,
    }
    assert isinstance(model.peft_config["default"], peft.LoraConfig)
    assert not hasattr(model.model, "peft_config")
    model.model.peft_config = "of its own"
    assert model.model.peft_config == "of its own"


# --- get_peft_model -------------------------------------------------------------------------------


def test_every_verb_takes_what_it_returns(tmp_path: Path) -> None:
    model = wrapped()
    assert isinstance(model, lora_fx.peft.PeftModel)
    assert lora_fx.status(model).adapters
    assert lora_fx.adapter_names(model) == ("default",)
    lora_fx.save_adapter(model, tmp_path / "adapter")
    read = lora_fx.load_adapter(llama(), tmp_path / "adapter")
    assert_close(read(IDS).logits, model(IDS).logits)
    assert_close(lora_fx.merge(model)(IDS).logits, model(IDS).logits)
    assert sum(p.numel() for p in lora_fx.trainable_parameters(model)) == 2 * 2 * (32 + 40)
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=["v_proj"]), "other")
    lora_fx.set_adapter(model, "other")
    assert model.active_adapter == "other"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_base_in_half_precision(dtype: torch.dtype) -> None:
    for cast, expected in ((True, torch.float32), (False, dtype)):
        models = [
            made(llama().to(dtype), copy.deepcopy(THEIRS), autocast_adapter_dtype=cast)
            for made in (lora_fx.peft.get_peft_model, peft.get_peft_model)
        ]
        for model in models:
            trained = [p for p in model.parameters() if p.requires_grad]
            assert {p.dtype for p in trained} == {expected}
            model(IDS, labels=IDS).loss.backward()
            assert {p.grad.dtype for p in trained} == {expected}


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match="mixed=True"):
        wrapped(mixed=True)
    with pytest.raises(ConfigError, match="PROMPT_TUNING"):
        lora_fx.peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM"))
    with pytest.raises(AttributeError, match=r"PromptTuningConfig.*docs/from-peft\.md"):
        _ = lora_fx.peft.PromptTuningConfig


def test_the_revision_is_in_the_folder(tmp_path: Path) -> None:
    wrapped(revision="v2").save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).revision == "v2"


# --- merge_adapter --------------------------------------------------------------------------------


def test_merged_for_a_while(tmp_path: Path) -> None:
    model = wrapped()
    names, before = [name for name, _ in model.named_parameters()], model(IDS).logits
    model.merge_adapter(safe_merge=True)
    assert_close(model(IDS).logits, before)
    # What a library sends to an inference engine: the names of the base, and no factors.
    plain = {f"base_model.model.{name}" for name, _ in llama().named_parameters()}
    assert {name for name, _ in model.named_parameters()} == plain
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\)"):
        model(IDS, adapter_names=["default"] * 2)
    model.save_pretrained(tmp_path)
    assert_close(peft.PeftModel.from_pretrained(llama(), tmp_path)(IDS).logits, before)
    model.unmerge_adapter()
    assert [name for name, _ in model.named_parameters()] == names
    assert_same_bits(model(IDS).logits, before)


@pytest.mark.parametrize("cycles", [3, pytest.param(1000, marks=pytest.mark.slow)])
def test_merged_and_unmerged_many_times_in_half_precision(cycles: int) -> None:
    model = lora_fx.peft.get_peft_model(llama().to(torch.bfloat16), copy.deepcopy(THEIRS))
    randomize(model.get_base_model()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = model(IDS).logits
    for _ in range(cycles):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(model.state_dict(), before)
    assert_same_bits(model(IDS).logits, outputs)


def test_a_merge_leaves_nothing_and_sees_through_compiled_layers() -> None:
    model = wrapped()
    before, inner = model(IDS).logits, model.get_base_model()
    assert model.peft_config
    assert inner.peft_config
    inner.model.layers[0] = torch.compile(inner.model.layers[0], backend="eager")
    merged = model.merge_and_unload()
    assert_close(merged(IDS).logits, before)
    assert not [name for name in vars(merged) if "lora" in name]
    assert_close(model.unload()(IDS).logits, llama()(IDS).logits)
    model.merge_adapter()
    assert_close(model(IDS).logits, before)


def test_a_bar_says_how_far_a_merge_is(capsys: pytest.CaptureFixture[str]) -> None:
    model = wrapped()
    model.merge_and_unload()
    assert "weight" not in capsys.readouterr().err
    model.merge_and_unload(progressbar=True)
    assert "4/4" in capsys.readouterr().err
    lora_fx.merge(model.get_base_model(), progress=True)
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().err


# --- AutoPeftModel… -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    lora_fx.peft.get_peft_model(base, THEIRS).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_with_its_base_in_one_call(saved: Path) -> None:
    expected = peft.PeftModel.from_pretrained(llama(), saved)(IDS).logits
    model = lora_fx.peft.AutoPeftModelForCausalLM.from_pretrained(saved)
    assert_close(model(IDS).logits, expected)
    assert not [p for p in model.parameters() if p.requires_grad]
    by_name = lora_fx.peft.AutoPeftModel.from_pretrained(saved, is_trainable=True)
    assert [p for p in by_name.parameters() if p.requires_grad]
    assert type(by_name.get_base_model()).__name__ == "LlamaForCausalLM"
    half = lora_fx.peft.AutoPeftModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert half(IDS).logits.dtype == torch.bfloat16


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_a_folder_imports_no_code_that_it_names(saved: Path) -> None:
    named = {"base_model_class": "Path", "parent_library": "pathlib"}
    with pytest.raises(ConfigError, match=r"which class of transformers.*PeftModel\.from_pretr"):
        lora_fx.peft.AutoPeftModel.from_pretrained(changed(saved, auto_mapping=named))


def test_a_folder_without_a_base_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="does not name its base"):
        lora_fx.peft.AutoPeftModelForCausalLM.from_pretrained(
            changed(saved, base_model_name_or_path=None)
        )


# --- what PEFT's users do with a PeftModel --------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two adapters of PEFT in one folder, each in a subfolder."""
    for number, name in enumerate(("a", "b")):
        torch.manual_seed(number)
        peft.get_peft_model(llama(), copy.deepcopy(THEIRS), name).save_pretrained(tmp_path)
    return tmp_path


def theirs(folder: Path) -> torch.Tensor:
    logits: torch.Tensor = peft.PeftModel.from_pretrained(llama(), folder).eval()(IDS).logits
    return logits


def test_the_classes_are_pefts() -> None:
    for name in lora_fx.peft._CONFIGS:
        assert getattr(lora_fx.peft, name).__module__.startswith("peft.")
    assert lora_fx.peft.LoraConfig is peft.LoraConfig
    assert lora_fx.peft.PeftModelForCausalLM is lora_fx.peft.PeftModel


def test_a_subfolder_is_heeded_and_no_option_is_dropped(folders: Path) -> None:
    model = lora_fx.peft.PeftModel.from_pretrained(llama(), folders, "a", subfolder="a")
    model.load_adapter(folders, "b", subfolder="b")
    assert_close(model(IDS).logits, theirs(folders / "a"))
    model.set_adapter("b")
    assert_close(model(IDS).logits, theirs(folders / "b"))
    for options in ({"config": THEIRS}, {"revision": "v2"}, {"key_mapping": {"a": "b"}}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            lora_fx.peft.PeftModel.from_pretrained(llama(), folders / "a", **options)
    with pytest.raises(ConfigError, match="safe_serialization=False"):
        model.save_pretrained(folders / "new", safe_serialization=False)
    assert not (folders / "new").exists()


def test_an_adapter_goes_onto_a_model_that_has_one(folders: Path) -> None:
    model = lora_fx.peft.PeftModel.from_pretrained(llama(), folders / "a", "a")
    assert lora_fx.peft.PeftModel.from_pretrained(model, folders / "b", "b") is model
    assert lora_fx.as_peft_model(model) is model
    assert_close(model(IDS).logits, theirs(folders / "b"))


def test_what_is_done_to_a_merged_model_is_not_lost(folders: Path) -> None:
    model = lora_fx.peft.PeftModel.from_pretrained(llama(), folders / "a", "a", is_trainable=True)
    model.load_adapter(folders / "b", "b")
    base, first = llama()(IDS).logits, model.eval()(IDS).logits
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(model(IDS).logits, base)
    assert_close(model(IDS).logits, first)
    model.set_adapter("b")  # unmerges first, as in PEFT
    assert_close(model(IDS).logits, theirs(folders / "b"))
    model.merge_adapter()
    model.train()
    model.to(torch.float64)
    model.unmerge_adapter()
    inner = model.get_base_model()
    assert {module.training for module in inner.modules()} == {True}
    assert {p.dtype for p in inner.parameters()} == {torch.float64}


def test_merges_inside_a_block_take_effect_after_it(folders: Path) -> None:
    base, adapted = llama()(IDS).logits, theirs(folders / "a")
    for library in (lora_fx.peft, peft):
        model = library.PeftModel.from_pretrained(llama(), folders / "a", "a")
        with model.disable_adapter():
            assert model.active_adapters == ["a"]
            model.merge_adapter()
            assert_close(model(IDS).logits, base)
        assert_close(model(IDS).logits, adapted)
        model.unmerge_adapter()
        assert_close(model(IDS).logits, adapted)
    model = lora_fx.peft.PeftModel.from_pretrained(llama(), folders / "a", "a")
    model.load_adapter(folders / "b", "b")
    with model.disable_adapter(), model.disable_adapter():
        assert_close(model.merge_and_unload()(IDS).logits, adapted)
        model.merge_adapter(["b"])
        model.to(torch.float64)
    assert_close(model(IDS).logits, theirs(folders / "b").double(), 1e-5)
    model.train()
    with model.disable_adapter():
        assert model.get_base_model().training
        model.unmerge_adapter()
    assert_close(model.eval()(IDS).logits, adapted.double(), 1e-5)


CONFIGS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_status_is_pefts(name: str) -> None:
    models = [
        library.get_peft_model(llama(), peft.LoraConfig(r=2, **CONFIGS[name]))
        for library in (lora_fx.peft, peft)
    ]

    def check() -> None:
        ours, theirs = (model.get_layer_status() for model in models)
        assert ours == theirs
        ours, theirs = (model.get_model_status() for model in models)
        if name == "head":
            # PEFT counts the base's head, too, and finds "other" irregular, which has none.
            theirs.active_adapters, theirs.total_params = ours.active_adapters, ours.total_params
        elif name == "tokens":
            theirs.active_adapters = ours.active_adapters
        assert ours == theirs

    check()
    for model in models:
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    check()
    for model in models:
        model.set_adapter("other")
    check()
    for model in models:
        with model.disable_adapter():
            # PEFT's factors need no gradient in it.
            assert not model.get_model_status().enabled
            assert not any(row.enabled for row in model.get_layer_status())
        model.merge_adapter()
    check()


def test_the_status_of_a_plain_rewritten_model() -> None:
    model = adapted()
    rows = lora_fx.peft.get_layer_status(model)
    assert rows[0].name == "model.layers.0.self_attn.q_proj"
    assert lora_fx.peft.get_layer_status(torch.compile(model, backend="eager")) == rows
    wrapper = lora_fx.as_peft_model(model)
    assert lora_fx.peft.get_layer_status(wrapper) == wrapper.get_layer_status()
    assert lora_fx.peft.get_model_status(wrapper) == lora_fx.peft.get_model_status(model)
    with pytest.raises(ConfigError, match="has no adapters"):
        lora_fx.peft.get_model_status(llama())


def test_states_have_the_names_of_peft(tmp_path: Path) -> None:
    model, other = wrapped(), wrapped()
    state = lora_fx.peft.get_peft_model_state_dict(model)
    with pytest.raises(ConfigError, match=r"lora_fx\.peft\.set_peft_model_state_dict"):
        peft.set_peft_model_state_dict(other, state)
    lora_fx.peft.set_peft_model_state_dict(other, state)
    assert_same_bits(other(IDS).logits, model(IDS).logits)
    other = wrapped()
    other.load_state_dict(model.state_dict())
    assert_same_bits(other(IDS).logits, model(IDS).logits)
    state = other.state_dict()
    renamed = {f"{name}.weight" if ".lora_" in name else name: v for name, v in state.items()}
    around = nn.ModuleDict({"net": wrapped()})
    around.load_state_dict({f"net.{name}": value for name, value in renamed.items()})
    assert_same_bits(around["net"](IDS).logits, model(IDS).logits)
    around.load_state_dict(around.state_dict())
    with pytest.raises(ConfigError, match=r"lora_fx\.peft\.get_peft_model_state_dict"):
        peft.get_peft_model_state_dict(model)
    state = lora_fx.peft.get_peft_model_state_dict(model)
    assert lora_fx.peft.set_peft_model_state_dict(model, state).unexpected_keys == []
    with pytest.raises(ConfigError, match="state_dict"):
        lora_fx.peft.get_peft_model_state_dict(model, model.state_dict())


def test_an_added_adapter_has_pefts_targets() -> None:
    model = wrapped()
    model.add_adapter("other", peft.LoraConfig(r=2))
    assert model.peft_config["other"].target_modules == {"q_proj", "v_proj"}


def test_what_is_set_on_a_configuration_is_saved(tmp_path: Path) -> None:
    model = wrapped()
    model.peft_config["default"].base_model_name_or_path = "somewhere/else"
    model.active_peft_config.inference_mode = True
    model.save_pretrained(tmp_path)
    written = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (written.base_model_name_or_path, written.inference_mode) == ("somewhere/else", True)


def test_copies_and_pickles(tmp_path: Path) -> None:
    model = wrapped()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    model.note = 3
    assert copy.deepcopy(model).note == 3
    for one in (copy.deepcopy(model), loaded):
        assert isinstance(one, lora_fx.peft.PeftModel)
        assert_same_bits(one(IDS).logits, model(IDS).logits)
        assert one.get_base_model() is not model.get_base_model()


def test_what_trainers_and_engines_ask(tmp_path: Path) -> None:
    model = wrapped()
    assert model.prefix == model.base_model.prefix == "lora_"
    assert model.to("meta").device == torch.device("meta")
    model = wrapped()
    model.add_adapter("other", copy.deepcopy(THEIRS))
    model.base_model.set_adapter(["default", "other"])
    assert model.base_model.active_adapters == ["default", "other"]
    model.base_model.set_adapter("default")
    assert_close(model.base_model.merge_and_unload()(IDS).logits, model(IDS).logits)
    with pytest.raises(ConfigError, match="get_peft_model"):
        lora_fx.peft.PeftModel(llama(), THEIRS)


class Regression(nn.Module):
    """A model that is none of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x).sum(-1) - labels).square().mean()}


def test_the_trainer_takes_a_model_of_no_library(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["layer"])
    model = lora_fx.peft.get_peft_model(Regression(), config)
    data = [{"x": torch.ones(4), "labels": torch.tensor(1.0)}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    Trainer(model, arguments, train_dataset=data).train()
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()


def test_no_weight_that_was_loaded_is_said_to_start_at_random(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert bitsandbytes
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = LlamaForCausalLM.from_pretrained(
        saved.parent / "base", quantization_config=how, dtype=torch.bfloat16, device_map="cpu"
    )
    prepared = lora_fx.peft.prepare_model_for_kbit_training(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = lora_fx.peft.get_peft_model(prepared, config)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert "starts at random" not in caplog.text


def test_a_copy_of_a_merged_model_is_merged(folders: Path) -> None:
    model = lora_fx.peft.PeftModel.from_pretrained(llama(), folders / "a", "a", is_trainable=True)
    model.load_adapter(folders / "b", "b", is_trainable=True)
    plain = model.eval()(IDS).logits
    model.merge_adapter(["b"])
    assert not torch.equal(model(IDS).logits, plain)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(one(IDS).logits, model(IDS).logits)
        one.unmerge_adapter()
        assert_close(one(IDS).logits, plain)
    # No step could be taken and lost when the model is unmerged.
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(False)
    model.unmerge_adapter()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    configs = model.peft_config
    assert type(copy.deepcopy(configs)) is dict
    assert pickle.loads(pickle.dumps(configs)).keys() == configs.keys()


def test_modes_are_those_of_peft(folders: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    for library in (lora_fx.peft, peft):
        model = library.get_peft_model(llama(), copy.deepcopy(config))  # the base is in eval mode
        assert model.training
        layer = model.get_base_model().model.layers[0]
        assert not layer.mlp.training
        assert layer.self_attn.q_proj.lora_dropout.default.training
        model.load_adapter(folders / "a", "a")
        assert not model.training
        assert not layer.self_attn.q_proj.lora_dropout.default.training
        model = library.PeftModel.from_pretrained(llama(), folders / "a", is_trainable=True)
        assert model.training
        assert not model.get_base_model().model.layers[0].mlp.training
        assert not model.peft_config["default"].inference_mode
    model = lora_fx.peft.get_peft_model(llama(), config)
    ones = {name: torch.ones_like(v) for name, v in lora_fx.adapter_state_dict(model).items()}
    lora_fx.load_adapter_state_dict(model, ones)
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_options_of_accelerate_are_known(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path, save_function=torch.save, is_main_process=True)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_state_is_one_of_parameters() -> None:
    """torch.distributed.checkpoint and functional_call go by the names of parameters."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = wrapped()
    assert get_model_state_dict(model).keys() == model.state_dict().keys()
    assert {name for name, _ in model.named_parameters()} <= model.state_dict().keys()
    out = torch.func.functional_call(model, model.state_dict(), (IDS,)).logits
    assert_same_bits(out, model(IDS).logits)
