"""Models by name: every form, and what a wrong name gets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CheckpointError, ConfigError
from lora_fx.extras import load_optional
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

def wants():
    import no_such_thing_at_all

def fails():
    raise ZeroDivisionError("no weights")

constant = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_nets_for_tests.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "broken_for_tests.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "wants_for_tests.py").write_text("import no_such_thing_at_all\n", encoding="utf-8")
    for folder, file in (("adapter", "adapter_config.json"), ("model", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_nets_for_tests", "broken_for_tests", "wants_for_tests"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def bert_config(**options: Any) -> Any:
    return pytest.importorskip("transformers").BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        **options,
    )


def tiny_bert(folder: Path, *, weights: bool = True) -> Path:
    transformers = pytest.importorskip("transformers")
    config = bert_config(num_labels=3)
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
        ("wants_for_tests:x", "needs no_such_thing_at_all: pip install no_such_thing_at_all"),
        ("my_nets_for_tests:wants", "'no_such_thing_at_all': pip install no_such_thing_at_all"),
        (
            "hf:nowhere",
            "there is no such folder. lora-fx downloads nothing: for a model of the Hub",
        ),
        (
            "hf:org/bert",
            "run `hf download org/bert --local-dir org/bert`, and then use hf:org/bert",
        ),
        ("org/bert", "run `hf download org/bert --local-dir org/bert`, and then use hf:org/bert"),
        ("hf:./nowhere", "there is no such folder"),
        (
            "adapter",
            "is the folder of an adapter, and a model is needed here: the model comes first",
        ),
        ("hf:adapter", "is the folder of an adapter, and a model is needed here"),
        ("model", "is a folder: for a model of transformers, write hf:model"),
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


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_package_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=f"pip install {library}$"):
        load_model(f"{library}:resnet18")


def test_what_a_package_needs_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(here)
    with pytest.raises(ConfigError, match=r"needs no_such_thing_at_all.*pip install no_such_thing"):
        load_optional("wants_for_tests", "this", "lora-fx[bench]")


def adapted_bert(folder: Path, *, of: str, task: str | None, labels: int = 5) -> Any:
    """Save a base model without a head, and train an adapter of a class with one."""
    transformers = pytest.importorskip("transformers")
    transformers.BertModel(bert_config()).save_pretrained(folder / "base")
    model = getattr(transformers, of).from_pretrained(folder / "base", num_labels=labels)
    kind: Any = task
    chosen = lora_fx.LoraConfig(
        r=2, modules_to_save=["classifier"], task_type=kind, init_lora_weights=False
    )
    adapted = lora_fx.rewrite(model.eval(), chosen)
    with torch.no_grad():
        adapted.classifier.weight.normal_()
    lora_fx.save_adapter(adapted, folder / "adapter")
    return adapted


@pytest.mark.parametrize(
    ("of", "task"),
    [
        ("AutoModelForSequenceClassification", "SEQ_CLS"),
        ("AutoModelForSequenceClassification", None),
        ("AutoModelForTokenClassification", "TOKEN_CLS"),
    ],
)
def test_the_class_is_the_one_that_the_adapter_was_trained_on(
    of: str, task: str | None, tmp_path: Path
) -> None:
    adapted = adapted_bert(tmp_path, of=of, task=task)
    assert type(load_model(f"hf:{tmp_path / 'base'}").model).__name__ == "BertModel"
    loaded = load_model(f"hf:{tmp_path / 'base'}", adapter=tmp_path / "adapter").model
    assert type(loaded).__name__ == type(adapted).__name__
    back = lora_fx.load_adapter(loaded, tmp_path / "adapter")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert back(ids).logits.shape[-1] == 5
        torch.testing.assert_close(back(ids).logits, adapted(ids).logits, rtol=0, atol=0)


def test_class_names_are_those_that_the_adapter_was_trained_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")
    model = adapted_bert(tmp_path, of="AutoModelForSequenceClassification", task="SEQ_CLS")
    base, adapter = f"hf:{tmp_path / 'base'}", tmp_path / "adapter"
    told = "does not say what its 5 classes are called"
    assert load_model(base, adapter=adapter).model.config.id2label[4] == "LABEL_4"
    assert told in caplog.text
    caplog.clear()
    model.config.id2label = dict(enumerate("abcde"))
    lora_fx.save_adapter(model, adapter)
    config: Any = load_model(base, adapter=adapter).model.config
    assert config.id2label == dict(enumerate("abcde"))
    assert config.label2id == {label: index for index, label in enumerate("abcde")}
    assert not caplog.text
    # PEFT reads the folder, and writes it without the names.
    plain: Any = load_model(base, adapter=adapter).model
    theirs = peft.PeftModel.from_pretrained(plain, adapter)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_model(base, adapter=tmp_path / "theirs").model.config.id2label[4] == "LABEL_4"
    assert told in caplog.text


def test_a_task_that_the_model_does_not_have_leaves_its_architecture(tmp_path: Path) -> None:
    adapted_bert(tmp_path, of="AutoModelForTokenClassification", task="SEQ_2_SEQ_LM")
    loaded = load_model(f"hf:{tmp_path / 'base'}", adapter=tmp_path / "adapter").model
    assert type(loaded).__name__ == "BertModel"


def test_a_part_that_neither_folder_has_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    adapted_bert(tmp_path, of="AutoModelForSequenceClassification", task="SEQ_CLS")
    base = transformers.BertModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"neither its folder nor .* contains bert\.pooler"):
        load_model(f"hf:{tmp_path / 'base'}", adapter=tmp_path / "adapter")


def test_every_form_is_documented() -> None:
    for scheme in models._LOADERS:
        assert f"{scheme}:" in models.FORMS


# --- GGUF files ---------------------------------------------------------------------------------------


def gguf_file(folder: Path, **options: Any) -> Path:
    """A Llama with random weights in a GGUF file."""
    pytest.importorskip("gguf")
    from tests.gguf_files import KINDS, write_gguf
    from tests.lora_fx.test_gguf import llama

    return write_gguf(folder / "llama.gguf", llama(), "llama", KINDS[2], **options)


def test_a_gguf_file(tmp_path: Path) -> None:
    path = gguf_file(tmp_path)
    loaded: Any = load_model(f"hf:{path}")
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert (loaded.folder, loaded.weights) == (tmp_path, path)
    loaded.model.save_pretrained(tmp_path / "saved")
    empty = load_model(f"hf:{path}", weights=False)
    assert all(p.is_meta and p._is_hf_initialized for p in empty.model.parameters())
    assert empty.weights is not None
    base = lora_fx.quantize(empty.model, "int8", weights=empty.weights)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(base.get_parameter(name), loaded.model.get_parameter(name))


def test_a_config_next_to_a_gguf_file_is_taken(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.lora_fx.test_gguf import llama, qwen3, scaled

    path = gguf_file(tmp_path, also=scaled)
    with pytest.raises(CheckpointError, match="scales rotary positions"):
        load_model(f"hf:{path}")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    llama(rope_parameters=rope).config.save_pretrained(tmp_path)
    loaded: Any = load_model(f"hf:{path}")
    assert loaded.model.config.rope_parameters["factor"] == 2.0
    qwen3(rope_parameters=rope).config.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has no .*norm\.weight of Qwen3.*config.json next to it"
    ):
        load_model(f"hf:{path}")


def test_names_of_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_file(tmp_path)
    for name, words in (
        (str(path), f"is a GGUF file: write hf:{path}"),
        (f"hf:{tmp_path}", f"no config.json in it: give a file: hf:{path}"),
        (f"hf:{tmp_path / 'no.gguf'}", "no.gguf cannot be read"),
    ):
        with pytest.raises(lora_fx.LoraFxError, match=words):
            models.check_model_name(name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs gguf: pip install 'lora-fx\[quant\]'"):
        models.check_model_name(f"hf:{path}")


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_weights_of_a_folder_stay_as_they_are_stored(form: str, tmp_path: Path) -> None:
    from lora_fx.formats import StackedTensor
    from lora_fx.passes.graph import share_copy
    from tests.lora_fx.test_kept_checkpoints import FOLDERS

    FOLDERS[form](tmp_path)
    model = share_copy(load_model(f"hf:{tmp_path}").model)
    kept = [name for name, p in model.named_parameters() if isinstance(p.detach(), StackedTensor)]
    assert len(kept) == 2
