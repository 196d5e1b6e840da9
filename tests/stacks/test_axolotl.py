"""The plugin for axolotl, called by axolotl's own loader of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

import lora_fx
from tests.algebra import randomize
from tests.numerics import assert_close
from tests.stacks.models import IDS, llama

pytestmark = pytest.mark.stack


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loader of axolotl, with the plugin registered as its file would."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    pytest.importorskip("axolotl")
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders.adapter import load_adapter

    PluginManager.get_instance().register("lora_fx.axolotl.LoraFxPlugin")
    return load_adapter


def settings(**values: Any) -> Any:
    from axolotl.utils.dict import DictDefault

    usual = {"adapter": "lora_fx", "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    return DictDefault({**usual, "lora_target_linear": True, **values})


def test_axolotl_knows_the_adapter(load: Any) -> None:
    from axolotl.utils.schemas.peft import LoraConfig

    known = LoraConfig.model_validate({"adapter": "lora_fx", "lora_r": 2})
    assert known.adapter == "lora_fx"
    with pytest.raises(ValueError, match="lora_fy"):
        LoraConfig.model_validate({"adapter": "lora_fy"})


def test_a_model_is_rewritten_and_an_adapter_loaded(load: Any, tmp_path: Path) -> None:
    base = llama()
    model, config = load(base, settings(), "lora_fx")
    assert isinstance(model, peft.PeftModel)
    adapted = model.get_base_model()
    assert lora_fx.adapter_names(adapted) == ("default",)
    theirs = peft.get_peft_model(llama(), config)
    assert {n for n, p in theirs.named_parameters() if p.requires_grad} == {
        f"{n}.weight" for n, p in model.named_parameters() if p.requires_grad
    }
    randomize(adapted)
    model.save_pretrained(tmp_path)
    again, _ = load(llama(), settings(lora_model_dir=str(tmp_path)), "lora_fx", inference=True)
    assert_close(again(IDS).logits, model.eval()(IDS).logits)
    assert not [p for p in again.parameters() if p.requires_grad]


def test_a_trainer_that_adapts_by_itself_is_refused(load: Any) -> None:
    with pytest.raises(lora_fx.ConfigError, match="rl: dpo"):
        load(llama(), settings(rl="dpo"), "lora_fx", config_only=True)
    # Other adapters stay axolotl's.
    model, config = load(llama(), settings(adapter="lora"), "lora", config_only=True)
    assert model is None
    assert isinstance(config, peft.LoraConfig)
