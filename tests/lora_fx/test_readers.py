"""Who reads what: docs/guides/checkpoints.md has the table, and each library here reads the file itself.

vLLM and llama.cpp's converter are in tests/runtimes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import CheckpointError, LoraConfig
from tests.algebra import randomize
from tests.lora_fx.test_dialects import SAMPLE, unet
from tests.numerics import assert_close

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[1, 2, 3]])

# Columns of the table.
FEATURES: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "ranks, rsLoRA": {
        "rank_pattern": {"{one}": 2},
        "alpha_pattern": {"{two}": 3},
        "use_rslora": True,
    },
    "DoRA": {"use_dora": True},
    "bias of B": {"lora_bias": True},
    "in full": {"modules_to_save": ["{full}"]},
    "bias": {"bias": "lora_only"},
}
DECODER = {"one": "q_proj", "two": "v_proj", "full": "lm_head"}
UNET = {"one": "to_k", "two": "to_out.0", "full": "conv_out"}


def decoder() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        vocab_size=20,
        num_hidden_layers=2,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def adapted(model: nn.Module, feature: str, names: dict[str, str]) -> nn.Module:
    """A model with an adapter that uses one feature, all of it trained."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key.format(**names): one for key, one in value.items()}
        return [one.format(**names) for one in value] if isinstance(value, list) else value

    options = {key: named(value) for key, value in FEATURES[feature].items()}
    targets = [names["one"], names["two"]]
    made = lora_fx.rewrite(model, LoraConfig(r=4, target_modules=targets, **options)).eval()
    randomize(made)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.1 * torch.ones_like(parameter))
    return made


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def picture(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**SAMPLE).sample
    return found


def by_peft(folder: Path) -> nn.Module:
    model: nn.Module = peft.PeftModel.from_pretrained(decoder(), folder)
    return model.eval()


def by_transformers(folder: Path) -> nn.Module:
    model: Any = decoder()
    model.load_adapter(str(folder))
    loaded: nn.Module = model.eval()
    return loaded


def by_lora_fx(folder: Path) -> nn.Module:
    return lora_fx.load_adapter(decoder(), folder).eval()


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("read", [by_peft, by_transformers, by_lora_fx], ids=lambda f: f.__name__)
def test_libraries_of_text_read_it(
    read: Callable[[Path], nn.Module], feature: str, tmp_path: Path
) -> None:
    made = adapted(decoder(), feature, DECODER)
    want = logits(made)
    assert not torch.allclose(want, logits(decoder()), atol=1e-2)
    lora_fx.save_adapter(made, tmp_path)
    found = logits(read(tmp_path))
    if read is by_transformers and feature == "DoRA":
        # It makes new magnitudes, of PEFT's own folders as well. The table says so.
        assert not torch.allclose(found, want, atol=1e-2)
    else:
        assert_close(found, want)


@pytest.mark.parametrize("feature", FEATURES)
def test_diffusers_reads_it_or_it_is_not_written(feature: str, tmp_path: Path) -> None:
    made = adapted(unet(), feature, UNET)
    if feature in ("in full", "bias"):
        trained = "modules_to_save" if feature == "in full" else "is trained"
        with pytest.raises(CheckpointError, match=trained):
            lora_fx.save_adapter(made, tmp_path / "a", format="diffusers")
        return
    lora_fx.save_adapter(made, tmp_path / "a", format="diffusers")
    theirs: Any = unet()
    theirs.load_lora_adapter(
        str(tmp_path / "a"), prefix="unet", weight_name="pytorch_lora_weights.safetensors"
    )
    assert_close(picture(theirs.eval()), picture(made))
    assert_close(picture(lora_fx.load_adapter(unet(), tmp_path / "a").eval()), picture(made))
