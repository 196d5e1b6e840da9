"""Commands that convert, resize and combine adapter folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lora_fx
from tests.algebra import randomize
from tests.methods.test_peft_folders import IDS, output, peft

pytestmark = pytest.mark.filterwarnings("ignore")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def command(*arguments: object) -> tuple[int, str]:
    from lora_fx.tools.cli.app import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with a tiny model of transformers."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 20}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def test_convert_writes_lora_for_a_folder_of_transformers(llama: Path, tmp_path: Path) -> None:
    config = peft.LoHaConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(loaded(llama), config).eval()
    theirs.save_pretrained(tmp_path / "loha")
    ours = tmp_path / "ours"
    code, text = command(
        *("convert", tmp_path / "loha", "--to", f"hf:{llama}", "-o", ours, "--energy", "1", "--all")
    )
    assert code == 0, text
    assert "rank 4 of 16" in text
    expected = output(theirs, IDS)
    assert torch.allclose(
        output(lora_fx.load_adapter(loaded(llama), ours), IDS), expected, atol=1e-5
    )
    lora = peft.PeftModel.from_pretrained(loaded(llama), ours).eval()
    assert torch.allclose(output(lora, IDS), expected, atol=1e-5)
    code, text = command("convert", tmp_path / "loha", "--to", f"hf:{llama}", "-o", ours)
    assert code == 2
    assert "holds an adapter already" in text
    code, text = command(
        *("convert", tmp_path / "loha", "--to", f"hf:{llama}", "-o", ours, "--force", "--json"),
    )
    assert code == 0, text
    assert {site["rank"] for site in json.loads(text)["sites"]} == {4}


def test_a_head_that_the_base_lacks_is_stored_in_full(llama: Path, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    theirs.config.pad_token_id = 0
    config = peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(theirs, config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.3
    theirs.save_pretrained(tmp_path / "vera")
    ours = tmp_path / "ours"
    code, text = command("convert", tmp_path / "vera", "--to", f"hf:{llama}", "-o", ours)
    assert code == 0, text
    assert "modules_to_save): score" in text
    base = transformers.AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    base.config.pad_token_id = 0
    for loaded_model in (
        lora_fx.load_adapter(base, ours),
        peft.PeftModel.from_pretrained(base, ours),
    ):
        assert torch.allclose(output(loaded_model.eval(), IDS), output(theirs, IDS), atol=1e-5)


def test_other_commands_name_the_converter(llama: Path, tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(loaded(llama), config).save_pretrained(tmp_path / "loha")
    out = tmp_path / "out"
    for arguments in (
        ("merge", f"hf:{llama}", tmp_path / "loha", out),
        ("inspect", tmp_path / "loha"),
        ("resize", tmp_path / "loha", "-o", out),
    ):
        code, text = command(*arguments)
        assert (code, "lora-fx convert" in " ".join(text.split())) == (2, True), text
    assert not out.exists()


def test_convert_says_what_is_missing(llama: Path, tmp_path: Path) -> None:
    code, text = command("convert", llama, "-o", tmp_path / "out")
    assert (code, "--to MODEL" in text) == (2, True)
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(loaded(llama), config).save_pretrained(tmp_path / "prompt")
    code, text = command(
        "convert", tmp_path / "prompt", "--to", f"hf:{llama}", "-o", tmp_path / "x"
    )
    assert code == 2
    assert "put before the input" in " ".join(text.split())
    assert not (tmp_path / "x").exists()


def test_resize_and_combine_work_on_folders(llama: Path, tmp_path: Path) -> None:
    model = lora_fx.rewrite(loaded(llama), lora_fx.LoraConfig(r=4, target_modules=["q_proj"]))
    for name in ("a", "b"):
        randomize(model)
        lora_fx.save_adapter(model, tmp_path / name)
    code, text = command("resize", tmp_path / "a", "-o", tmp_path / "small", "--rank", 2, "--all")
    assert code == 0, text
    assert "2 layer(s), rank 4 before, 2 now" in text
    assert "rank 2 of 4, error" in text
    code, text = command("resize", tmp_path / "a", "-o", tmp_path / "json", "--json")
    assert code == 0, text
    assert json.loads(text)["kept"] == 1
    adapters = (tmp_path / "a", tmp_path / "b")
    code, text = command(
        *("combine", *adapters, "-o", tmp_path / "sum", "--weights", "0.5,-1", "--type", "cat")
    )
    assert code == 0, text
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["r"] == 8
    for arguments, says in (
        (("resize", tmp_path / "a"), "--out DIR"),
        (("combine", *adapters), "--out DIR"),
        (("combine", *adapters, "-o", tmp_path / "x", "--weights", "a"), "numbers with commas"),
        (("combine", *adapters, "-o", tmp_path / "x", "--type", "sum"), "combination_type"),
    ):
        code, text = command(*arguments)
        assert (code, says in " ".join(text.split())) == (2, True), text
