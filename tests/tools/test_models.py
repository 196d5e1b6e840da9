"""Models by name: every form, and what a wrong name gets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_fx.errors import ConfigError
from lora_fx.tools import models
from lora_fx.tools.models import load_model

SOURCE = """
import torch
from torch import nn

def net():
    return nn.Linear(4, 2).train()

def pair():
    return nn.Linear(4, 2), (torch.zeros(3, 4),)

class Holder:
    ready = nn.Linear(5, 5)

def number():
    return 3

def needs(argument):
    return argument

def fails():
    raise ZeroDivisionError("no weights")

constant = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_nets_for_tests.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "broken_for_tests.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "wants_for_tests.py").write_text("import no_such_thing_at_all\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_nets_for_tests", "broken_for_tests", "wants_for_tests"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def tiny_bert(folder: Path, *, weights: bool = True) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    if weights:
        model.save_pretrained(folder)
    else:
        config.architectures = ["BertForSequenceClassification"]
        config.save_pretrained(folder)
    return folder


def test_a_callable_gives_a_model_in_evaluation_mode(here: Path) -> None:
    loaded = load_model("my_nets_for_tests:net")
    assert isinstance(loaded.model, nn.Linear)
    assert not loaded.model.training
    assert loaded.example_inputs is None
    with pytest.raises(ConfigError, match="pair"):
        loaded.inputs()


def test_a_callable_may_give_its_inputs(here: Path) -> None:
    loaded = load_model("my_nets_for_tests:pair")
    assert loaded.model(*loaded.inputs()).shape == (3, 2)


def test_a_module_that_is_there_is_taken(here: Path) -> None:
    assert load_model("my_nets_for_tests:Holder.ready").model.in_features == 5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "names no model: use package.module:callable"),
        (":x", "names no model"),
        ("hf:", "names no model"),
        ("tim:resnet18", "did you mean timm:resnet18"),
        ("my_nets_for_tests:nett", "nearest: net"),
        ("my_nets_for_test:net", "nearest: my_nets_for_tests"),
        ("my_nets_for_tests:number", "gave int '3'"),
        ("my_nets_for_tests:constant", "is a int: name a callable"),
        ("my_nets_for_tests:needs", "without arguments: TypeError"),
        ("my_nets_for_tests:fails", "ZeroDivisionError: no weights"),
        ("broken_for_tests:x", "importing broken_for_tests failed: ZeroDivisionError"),
        ("wants_for_tests:x", "needs no_such_thing_at_all"),
        ("hf:nowhere", "there is no such folder"),
        ("hf:.", "no config.json"),
    ],
)
def test_a_wrong_name_is_named_with_the_remedy(here: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(name)
    assert words in str(caught.value)


def test_a_missing_folder_names_its_neighbors(here: Path) -> None:
    (here / "my-model").mkdir()
    with pytest.raises(ConfigError, match="nearest: my-model"):
        load_model("hf:my-modl")


def test_a_folder_gives_the_architecture_that_it_names(tmp_path: Path) -> None:
    loaded = load_model(f"hf:{tiny_bert(tmp_path / 'bert')}")
    assert type(loaded.model).__name__ == "BertForSequenceClassification"
    assert loaded.folder == tmp_path / "bert"
    assert loaded.model(**loaded.inputs()).logits.shape == (2, 3)


def test_a_folder_without_weights_is_untrained_but_the_same_each_time(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert", weights=False)
    first, second = (load_model(f"hf:{folder}").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_shapes_alone_are_on_the_meta_device(tmp_path: Path) -> None:
    loaded = load_model(f"hf:{tiny_bert(tmp_path / 'bert')}", weights=False)
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"meta"}


def test_a_folder_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(f"hf:{tmp_path}")


def test_timm() -> None:
    pytest.importorskip("timm")
    loaded = load_model("timm:test_vit")
    assert loaded.inputs().shape[:2] == (2, 3)
    with pytest.raises(ConfigError, match=r"nearest: .*test_vit"):
        load_model("timm:test_vitt")


def test_torchvision() -> None:
    pytest.importorskip("torchvision")
    loaded = load_model("torchvision:squeezenet1_1")
    with torch.no_grad():
        assert loaded.model(loaded.inputs()).shape == (2, 1000)
    with pytest.raises(ConfigError, match=r"nearest: .*resnet18"):
        load_model("torchvision:resnet_18")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-fx\[bench\]'"):
        load_model("timm:resnet18")


def test_every_form_is_documented() -> None:
    for scheme in models._LOADERS:
        assert f"{scheme}:" in models.FORMS
