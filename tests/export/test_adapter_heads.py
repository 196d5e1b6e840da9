"""Adapters with heads, norms and biases of their own: one file is many classifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
)

import lora_fx
from lora_fx import CheckpointError, ConfigError, ExportError, LoraConfig, OnnxSession
from lora_fx.export.adapter_file import manifest_of_file, read_adapter
from lora_fx.export.adapter_manifest import MANIFEST_KEY, Manifest
from lora_fx.export.inspection import metadata_of
from lora_fx.export.onnx import export_onnx
from tests.zoo import tiny_classifier

EXACT = {"rtol": 1e-5, "atol": 1e-6}
NAMES = ["mood", "topic", "spam"]
ROWS = ["spam", None, "mood", "topic", "spam"]
HEAD = [
    f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")
]


def feeds(batch: int, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, 50, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def randomize(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Classifiers that PEFT has saved, by name; the last one trains its layer norms, too."""
    folders = {}
    for seed, name in enumerate(NAMES):
        norms = ["LayerNorm"] if name == "spam" else None
        config = peft.LoraConfig(
            task_type="SEQ_CLS",
            r=2 + seed,
            target_modules=["query", "value"],
            modules_to_save=norms,
        )
        wrapped = peft.get_peft_model(tiny_classifier(), config)
        randomize((p for p in wrapped.parameters() if p.requires_grad), seed)
        folders[name] = tmp_path_factory.mktemp(name)
        wrapped.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> dict[str | None, Any]:
    """PEFT's own model of each adapter, by name, and the base."""
    models: dict[str | None, Any] = {
        name: peft.PeftModel.from_pretrained(tiny_classifier(), folder).eval()
        for name, folder in folders.items()
    }
    return {**models, None: tiny_classifier()}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def rows_of(wanted: dict[str | None, Any], names: list[str | None], x: dict[str, Tensor]) -> Tensor:
    """The row of each name, as its own model computes it alone."""
    alone = [
        logits(wanted[name], {key: value[row : row + 1] for key, value in x.items()})
        for row, name in enumerate(names)
    ]
    return torch.cat(alone)


def loaded(folders: dict[str, Path]) -> nn.Module:
    model: Any = None
    for name, folder in folders.items():
        model = lora_fx.load_adapter(model or tiny_classifier(), folder, adapter_name=name)
    return model.eval()


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> nn.Module:
    return loaded(folders)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank.onnx"
    export_onnx(model, path, feeds(2), adapters="bank")
    return path


@pytest.fixture(scope="module")
def swappable(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "inputs.onnx"
    export_onnx(model, path, feeds(2), adapters="inputs")
    return path


def test_each_row_of_a_bank_has_the_head_of_its_adapter(bank: Path, wanted: Any) -> None:
    session = OnnxSession(bank, "cpu")
    x = feeds(len(ROWS))
    want = rows_of(wanted, ROWS, x)
    got = session.run(x, adapter=ROWS)["logits"]
    torch.testing.assert_close(got, want, **EXACT)
    plain = logits(wanted[None], x)
    assert all(float((want[row] - plain[row]).abs().max()) > 0.05 for row in (0, 2, 3, 4))
    for name in (*NAMES, None):
        torch.testing.assert_close(
            session.run(x, adapter=name)["logits"], logits(wanted[name], x), **EXACT
        )


def test_adapters_of_a_bank_are_exchanged_with_their_heads(
    bank: Path, model: Any, wanted: Any
) -> None:
    session = OnnxSession(bank, "cpu")
    x = feeds(3)
    session.unload_adapter("mood")
    session.load_adapter("other", model, adapter_name="spam")
    session.load_adapter("topic", model, adapter_name="mood")
    got = session.run(x, adapter=["other", "topic", None])["logits"]
    torch.testing.assert_close(got, rows_of(wanted, ["spam", "mood", None], x), **EXACT)


def test_a_swappable_file_takes_the_head_with_the_adapter(
    swappable: Path, model: Any, wanted: Any
) -> None:
    session = OnnxSession(swappable, "cpu")
    x = feeds(3)
    torch.testing.assert_close(session.run(x)["logits"], logits(wanted[None], x), **EXACT)
    for name in NAMES:
        session.load_adapter(name, model, adapter_name=name)
        got = session.run(x, adapter=name)["logits"]
        torch.testing.assert_close(got, logits(wanted[name], x), **EXACT)
    torch.testing.assert_close(session.run(x)["logits"], logits(wanted[None], x), **EXACT)


def test_folders_of_peft_are_loaded_without_their_model(
    tmp_path: Path, folders: dict[str, Path], wanted: Any
) -> None:
    """A file of classifiers whose adapters all train the head alone."""
    heads = {name: folders[name] for name in ("mood", "topic")}
    path = tmp_path / "m.onnx"
    export_onnx(loaded(heads), path, feeds(2), adapters="inputs", verify=False)
    session = OnnxSession(path, "cpu")
    x = feeds(3)
    for name, folder in heads.items():
        session.load_adapter(name, folder)
        torch.testing.assert_close(
            session.run(x, adapter=name)["logits"], logits(wanted[name], x), **EXACT
        )
        file = lora_fx.save_onnx_adapter(folder, tmp_path / f"{name}.onnx_adapter", base=path)
        session.load_adapter("file", file)
        torch.testing.assert_close(
            session.run(x, adapter="file")["logits"], logits(wanted[name], x), **EXACT
        )


def test_an_adapter_without_the_head_is_refused_and_nothing_is_lost(
    tmp_path: Path, swappable: Path, bank: Path, folders: dict[str, Path], model: Any, wanted: Any
) -> None:
    plain = lora_fx.rewrite(tiny_classifier(), LoraConfig(r=2, target_modules=["query", "value"]))
    lora_fx.save_adapter(plain, tmp_path / "plain")
    # "spam" also trains norms, of which the folder of "mood" has no values, and its model has the base's.
    lacking = {tmp_path / "plain": r"classifier\.dense\.weight", folders["mood"]: "LayerNorm"}
    x = feeds(2)
    for path in (swappable, bank):
        session = OnnxSession(path, "cpu")
        session.load_adapter("mood", model, adapter_name="mood")
        for source, parameter in lacking.items():
            with pytest.raises(
                CheckpointError, match=rf"{parameter}.*this has none.*modules_to_save"
            ):
                session.load_adapter("mood", source)
        got = session.run(x, adapter="mood")["logits"]
        torch.testing.assert_close(got, logits(wanted["mood"], x), **EXACT)


def test_a_head_of_another_size_is_refused_by_shape(
    tmp_path: Path, swappable: Path, bank: Path, folders: dict[str, Path]
) -> None:
    tensors = safetensors.torch.load_file(folders["spam"] / "adapter_model.safetensors")
    (key,) = (key for key in tensors if key.endswith("out_proj.weight"))
    wider = tmp_path / "wider"
    wider.mkdir()
    (wider / "adapter_config.json").write_bytes(
        (folders["spam"] / "adapter_config.json").read_bytes()
    )
    safetensors.torch.save_file(
        {**tensors, key: torch.zeros(5, 16)}, wider / "adapter_model.safetensors"
    )
    for path in (swappable, bank):
        session = OnnxSession(path, "cpu")
        with pytest.raises(
            CheckpointError,
            match=r"out_proj\.weight: it has shape \[5, 16\].*\[3, 16\].*as many classes",
        ):
            session.load_adapter("wider", wider)


def test_the_model_gives_what_a_folder_lacks(
    tmp_path: Path, swappable: Path, folders: dict[str, Path], wanted: Any
) -> None:
    """A model runs the adapter with the parameters of its base, and the file does so, too."""
    plain = lora_fx.rewrite(tiny_classifier(), LoraConfig(r=2, target_modules=["query"])).eval()
    randomize(lora_fx.trainable_parameters(plain), 7)
    session = OnnxSession(swappable, "cpu")
    x = feeds(2)
    for name, model in (("plain", plain), ("mood", loaded({"mood": folders["mood"]}))):
        session.load_adapter(name, model)
        got = session.run(x, adapter=name)["logits"]
        torch.testing.assert_close(got, logits(model, x), **EXACT)
    path = tmp_path / "plain.onnx"
    export_onnx(plain, path, feeds(2), adapters="inputs", verify=False)
    session = OnnxSession(path, "cpu")
    with pytest.raises(CheckpointError, match="export the model again with such an adapter"):
        session.load_adapter("mood", folders["mood"])


def test_biases_of_a_folder_with_a_saved_head(tmp_path: Path) -> None:
    """PEFT also writes the biases of the head that was replaced."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], bias="all")
    wrapped = peft.get_peft_model(tiny_classifier(), config)
    randomize((p for p in wrapped.parameters() if p.requires_grad), 3)
    wrapped.eval().save_pretrained(tmp_path / "peft")
    model = lora_fx.load_adapter(tiny_classifier(), tmp_path / "peft").eval()
    export_onnx(model, tmp_path / "m.onnx", feeds(2), adapters="inputs", verify=False)
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    session.load_adapter("a", tmp_path / "peft")
    got = session.run(feeds(3), adapter="a")["logits"]
    torch.testing.assert_close(got, logits(wrapped, feeds(3)), **EXACT)


def test_different_heads_have_no_sum(swappable: Path, model: Any) -> None:
    session = OnnxSession(swappable, "cpu")
    for name in ("mood", "topic"):
        session.load_adapter(name, model, adapter_name=name)
    with pytest.raises(ConfigError, match=r"different values of classifier\.dense\.weight"):
        session.run(feeds(2), adapter={"mood": 0.5, "topic": 0.5})
    assert session.run(feeds(2), adapter={"mood": 0.5})["logits"].isfinite().all()
    plain = session.run(feeds(2))["logits"]
    torch.testing.assert_close(session.run(feeds(2), adapter={})["logits"], plain, rtol=0, atol=0)


def test_required_inputs(tmp_path: Path, model: Any, wanted: Any) -> None:
    x = feeds(len(ROWS))
    bank, swappable = tmp_path / "bank.onnx", tmp_path / "inputs.onnx"
    export_onnx(model, bank, feeds(2), adapters="bank", required_inputs=True)
    inputs = [value.name for value in onnx.load(bank).graph.input]
    assert inputs == ["input_ids", "attention_mask", "adapter_ids"]
    session = OnnxSession(bank, "cpu")
    want = rows_of(wanted, ROWS, x)
    torch.testing.assert_close(session.run(x, adapter=ROWS)["logits"], want, **EXACT)
    report = export_onnx(model, swappable, feeds(2), adapters="inputs", required_inputs=True)
    assert report.verified
    assert set(HEAD) <= set(report.swappable)
    # An input that OpenVINO is not fed is empty if a size has a name, and otherwise memory with any values.
    shapes = {
        value.name: value.type.tensor_type.shape for value in onnx.load(swappable).graph.input
    }
    inputs_of_adapters = manifest_of_file(swappable).inputs
    assert all(any(axis.dim_param for axis in shapes[name].dim) for name in inputs_of_adapters)
    session = OnnxSession(swappable, "cpu")
    session.load_adapter("topic", model, adapter_name="topic")
    got = session.run(x, adapter="topic")["logits"]
    torch.testing.assert_close(got, logits(wanted["topic"], x), **EXACT)
    with pytest.raises(
        ConfigError, match=r"has no base: .*classifier\.dense\.weight.*choose an adapter"
    ):
        session.run(x)


def test_nodes_that_read_heads_are_kept_from_quantizers(
    tmp_path: Path, model: Any, wanted: Any
) -> None:
    report = export_onnx(model, tmp_path / "m.onnx", feeds(2), adapters="bank", quantize="int8")
    graph = onnx.load(tmp_path / "m.onnx").graph
    by_name = {node.name: node for node in graph.node}
    read = {name for node in report.adapter_nodes for name in by_name[node].input}
    assert set(HEAD) <= read
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    x = feeds(len(ROWS))
    want, plain = rows_of(wanted, ROWS, x), logits(wanted[None], x)
    got = session.run(x, adapter=ROWS)["logits"]
    assert float((got - want).norm()) < 0.05 * float((plain - want).norm())


def test_files_in_half_precision(tmp_path: Path, model: Any, wanted: Any) -> None:
    for adapters in ("bank", "inputs"):
        path = tmp_path / f"{adapters}.onnx"
        report = export_onnx(model, path, feeds(2), adapters=adapters, dtype="fp16")
        assert report.verified


@pytest.mark.parametrize("required", [False, True], ids=["defaults", "required"])
@pytest.mark.parametrize("adapters", ["bank", "inputs"])
def test_the_base_of_a_large_head_in_half_precision(
    tmp_path: Path, adapters: Any, required: bool
) -> None:
    """A cast of that size is computed when it is read, and the file holds its values."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 20_000)).eval()
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = lora_fx.rewrite(base, config)
    randomize(lora_fx.trainable_parameters(model), 0)
    x = torch.randn(2, 8)
    options: Any = {"adapters": adapters, "dtype": "fp16", "required_inputs": required}
    assert export_onnx(model, tmp_path / "m.onnx", x, **options).verified
    export_onnx(model, tmp_path / "m.onnx", x, **options, verify=False)
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    if adapters == "inputs":
        session.load_adapter("default", model)
    want: dict[str | None, Tensor] = {"default": model(x)}
    with lora_fx.disable_adapter(model):
        want[None] = model(x)
    for name in ["default"] if required and adapters == "inputs" else want:
        got = session.run(x.half(), adapter=name)["output"].float()
        torch.testing.assert_close(got, want[name].detach(), rtol=1e-2, atol=1e-2)


def test_earlier_versions_refuse_the_file(bank: Path, model: Any) -> None:
    metadata = metadata_of(onnx.load(bank))
    manifest = Manifest.from_metadata(metadata)
    assert manifest is not None
    assert json.loads(metadata[MANIFEST_KEY])["format"] == 3
    assert Manifest.from_metadata({MANIFEST_KEY: manifest.to_json()}) == manifest
    assert [parameter.name for parameter in manifest.parameters][:4] == HEAD


class Vision(nn.Module):
    """Convolutions with norms over channels, a written norm, a lookup, and a head over a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.batch = nn.BatchNorm2d(8)
        self.kind = nn.Embedding(4, 8)
        self.up = nn.Linear(8, 8)
        self.last = nn.RMSNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor, kind: Tensor) -> Tensor:
        x = self.batch(self.norm(self.stem(image))).relu().flatten(2).mean(2)
        return self.head(self.last(self.up(x) + self.kind(kind)))


@pytest.mark.parametrize("adapters", ["bank", "inputs"])
def test_parameters_of_any_layer(tmp_path: Path, adapters: Any) -> None:
    saved = ["stem", "norm", "batch", "kind", "last", "head"]
    config = LoraConfig(r=2, target_modules=["up"], modules_to_save=saved, init_lora_weights=False)
    torch.manual_seed(0)
    model = lora_fx.rewrite(Vision().eval(), config, adapter_name="first")
    lora_fx.add_adapter(model, config, "second")
    for seed, name in enumerate(("first", "second")):
        lora_fx.set_adapter(model, name)
        randomize(lora_fx.trainable_parameters(model), seed)
    inputs = {"image": torch.randn(3, 3, 6, 6), "kind": torch.tensor([0, 3, 1])}
    report = export_onnx(model.eval(), tmp_path / "m.onnx", inputs, adapters=adapters)
    assert report.verified
    assert len(report.parity) >= 4
    parameters = [name for name in report.swappable if name.partition(".")[0] in saved]
    assert len(parameters) == 12  # with the mean and the variance of the batch norm


def test_biases(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["query"], bias="all", init_lora_weights=False)
    model = lora_fx.rewrite(tiny_classifier(), config, adapter_name="mood")
    randomize(lora_fx.trainable_parameters(model), 0)
    for adapters in ("bank", "inputs"):
        path = tmp_path / f"{adapters}.onnx"
        export_onnx(model.eval(), path, feeds(2), adapters=adapters)
        session = OnnxSession(path, "cpu")
        session.load_adapter("mood", model)
        got = session.run(feeds(3), adapter="mood")["logits"]
        torch.testing.assert_close(got, logits(model, feeds(3)), **EXACT)


@pytest.mark.parametrize("adapters", ["bank", "inputs"])
@pytest.mark.parametrize("init", [False, "pissa"])
def test_kinds_beside_a_head(tmp_path: Path, adapters: Any, init: Any) -> None:
    """DoRA and a trained bias of one layer, a layer that one adapter saves and another adapts, PiSSA."""
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).eval()
    start = {"r": 2, "init_lora_weights": init}
    first = LoraConfig(target_modules=["0"], use_dora=not init, bias="lora_only", **start)
    model = lora_fx.rewrite(model, first, adapter_name="first")
    lora_fx.add_adapter(
        model, LoraConfig(target_modules=["0"], modules_to_save=["2"], **start), "second"
    )
    lora_fx.add_adapter(model, LoraConfig(target_modules=["2"], use_dora=True, **start), "third")
    for seed, name in enumerate(("first", "second", "third")):
        lora_fx.set_adapter(model, name)
        randomize(lora_fx.trainable_parameters(model), seed)
    report = export_onnx(model.eval(), tmp_path / "m.onnx", torch.randn(3, 8), adapters=adapters)
    assert report.verified


def test_a_tied_bias_is_replaced_under_both_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForMaskedLM(BertConfig(vocab_size=50, intermediate_size=24, **sizes)).eval()
    config = LoraConfig(r=2, target_modules=["query"], bias="all", init_lora_weights=False)
    model = lora_fx.rewrite(base, config)
    randomize(lora_fx.trainable_parameters(model), 0)
    for adapters in ("bank", "inputs"):
        path = tmp_path / f"{adapters}.onnx"
        assert export_onnx(model.eval(), path, feeds(2), adapters=adapters).verified


def test_a_parametrized_head_is_refused_by_name(tmp_path: Path) -> None:
    head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 5))
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    model = lora_fx.rewrite(nn.Sequential(nn.Linear(8, 8), head), config)
    with pytest.raises(
        ExportError, match=r"1\.parametrizations\.weight\.original0 is computed from"
    ):
        export_onnx(model.eval(), tmp_path / "m.onnx", torch.randn(3, 8), adapters="inputs")


class Odd(nn.Module):
    """A head whose matrix is read by a function that has no form with a matrix for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", self.up(x), self.head.weight)


def test_a_function_without_rows_is_named_and_one_adapter_at_a_time_runs(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
    model = lora_fx.rewrite(Odd(), config).eval()
    x = torch.randn(3, 8)
    with pytest.raises(
        ExportError, match=r"head\.weight has no values for each row in einsum.*'inputs'"
    ):
        export_onnx(model, tmp_path / "m.onnx", x, adapters="bank")
    assert not list(tmp_path.iterdir())
    assert export_onnx(model, tmp_path / "m.onnx", x, adapters="inputs").verified


# --- trained rows of embeddings -------------------------------------------------------------------


class Language(nn.Module):
    """An embedding and a head, which may have one weight."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.up(self.embed(ids)).tanh())


IDS = torch.tensor([[3, 5, 0, 9], [9, 3, 3, 1], [7, 0, 5, 3]])
TOKENS = {"three": [3, 9, 5], "one": [9], "none": None}


def language(tied: bool) -> nn.Module:
    """A model with adapters that train three tokens, one and none."""
    torch.manual_seed(0)
    model: nn.Module = Language(tied=tied).eval()
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        config = LoraConfig(
            r=2,
            target_modules=["up"],
            init_lora_weights=False,
            trainable_token_indices=tokens and {"embed": tokens},
        )
        if seed:
            lora_fx.add_adapter(model, config, name)
            lora_fx.set_adapter(model, name)
        else:
            model = lora_fx.rewrite(model, config, adapter_name=name)
        randomize(lora_fx.trainable_parameters(model), seed)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("adapters", ["bank", "inputs"])
def test_trained_rows_of_embeddings(tmp_path: Path, tied: bool, adapters: Any) -> None:
    model = language(tied)
    want = {}
    for name in TOKENS:
        lora_fx.set_adapter(model, name)
        want[name] = model(IDS).detach()
    with lora_fx.disable_adapter(model):
        want[None] = model(IDS).detach()
    path = tmp_path / "m.onnx"
    assert export_onnx(model, path, IDS, adapters=adapters).verified
    session = OnnxSession(path, "cpu")
    for name in TOKENS:
        session.load_adapter(name, model, adapter_name=name)
        # With one slot for all rows, too.
        torch.testing.assert_close(session.run(IDS, adapter=name)["output"], want[name], **EXACT)
    torch.testing.assert_close(session.run(IDS)["output"], want[None], **EXACT)
    if adapters == "bank":
        names = ["one", None, "three"]
        mixed = torch.stack([want[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(session.run(IDS, adapter=names)["output"], mixed, **EXACT)


def test_trained_rows_of_peft_folders(tmp_path: Path) -> None:
    """Its folder suffices for a file that was exported for as many rows, or more."""
    path = tmp_path / "m.onnx"
    export_onnx(language(tied=False), path, IDS, adapters="inputs", verify=False)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["up"], trainable_token_indices={"embed": [5, 7]})
    wrapped = peft.get_peft_model(Language(tied=False), config)  # type: ignore[arg-type]
    randomize((p for p in wrapped.parameters() if p.requires_grad), 4)
    wrapped.save_pretrained(str(tmp_path / "peft"))
    session = OnnxSession(path, "cpu")
    session.load_adapter("peft", tmp_path / "peft")
    with torch.no_grad():
        want = wrapped(IDS)
    torch.testing.assert_close(session.run(IDS, adapter="peft")["output"], want, **EXACT)
    file = lora_fx.save_onnx_adapter(tmp_path / "peft", tmp_path / "a.onnx_adapter")
    session.load_adapter("file", file)
    torch.testing.assert_close(session.run(IDS, adapter="file")["output"], want, **EXACT)


def test_trained_rows_beside_a_whole_embedding(tmp_path: Path) -> None:
    """An adapter without rows of tokens has the values that it has saved, for every token."""
    model = language(tied=True)
    whole = LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
    lora_fx.add_adapter(model, whole, "whole")
    lora_fx.set_adapter(model, "whole")
    randomize(lora_fx.trainable_parameters(model), 5)
    names: list[str | None] = ["whole", "three", "whole"]
    want = []
    for row, name in enumerate(names):
        lora_fx.set_adapter(model, name)
        want.append(model(IDS[row : row + 1]).detach())
    for adapters in ("bank", "inputs"):
        path = tmp_path / f"{adapters}.onnx"
        assert export_onnx(model, path, IDS, adapters=adapters).verified
    got = OnnxSession(tmp_path / "bank.onnx", "cpu").run(IDS, adapter=names)["output"]
    torch.testing.assert_close(got, torch.cat(want), **EXACT)


BAD_TOKENS: dict[str, tuple[list[int], list[float] | None, str]] = {
    "negative": ([-1, 3, 5], [1, 2, 3], "-1 is none of the 20 tokens"),
    "unknown": ([1, 20, 5], [1, 2, 3], "20 is none of the 20 tokens"),
    "one axis": ([1, 2], None, r"lora_tokens\.weight: it has shape \[2\]"),
    "twice": ([1, 1, 5], [1, 2, 3], "different rows for the token 1"),
    "fewer rows": ([1, 2, 3], [1, 2], r"lora_tokens\.weight: it has shape \[2, 8\]"),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_tokens_that_cannot_be(tmp_path: Path, case: str) -> None:
    tokens, rows, message = BAD_TOKENS[case]
    path = tmp_path / "m.onnx"
    export_onnx(language(tied=False), path, IDS, adapters="inputs", verify=False)
    values = {
        "embed.lora_tokens.indices": torch.tensor(tokens),
        "embed.lora_tokens.weight": torch.ones(2)
        if rows is None
        else torch.tensor(rows)[:, None].expand(-1, 8).contiguous(),
    }
    with pytest.raises(CheckpointError, match=message):
        OnnxSession(path, "cpu").load_adapter("bad", values)


def test_tokens_stay_whole_numbers_in_half_precision(tmp_path: Path) -> None:
    file = lora_fx.save_onnx_adapter(
        language(tied=False), tmp_path / "a.onnx_adapter", adapter_name="three", dtype="fp16"
    )
    values = read_adapter(file)
    assert values["embed.lora_tokens.indices"].tolist() == TOKENS["three"]
    assert values["embed.lora_tokens.weight"].dtype == torch.float16


def test_more_rows_than_the_file_takes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(language(tied=False), path, IDS, adapters="bank", verify=False)
    config = LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"embed": [1, 2, 3, 4]})
    model = lora_fx.rewrite(Language(tied=False), config)
    session = OnnxSession(path, "cpu")
    message = r"embed\.lora_tokens\.indices: it has shape \[4\], .*\[3\].*export the model again"
    with pytest.raises(CheckpointError, match=message):
        session.load_adapter("four", model)
    assert session.adapters == tuple(TOKENS)


@pytest.mark.parametrize("adapters", ["bank", "inputs"])
def test_statistics_of_saved_modules(tmp_path: Path, adapters: Any) -> None:
    """PEFT has a copy of the module for each adapter, with the statistics of its batch norm."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
        return nn.Sequential(nn.Linear(8, 8), head).eval()

    model, x = build(), torch.randn(4, 8)
    expected = {None: model(x)}
    for number, name in enumerate(("one", "two")):
        config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
        wrapped = peft.get_peft_model(build(), config)  # type: ignore[arg-type]
        wrapped.train()(torch.randn(8, 8) + number)
        wrapped.eval().save_pretrained(str(tmp_path / name))
        expected[name] = wrapped(x)
        model = lora_fx.load_adapter(model, tmp_path / name, adapter_name=name)
    path = tmp_path / "m.onnx"
    assert export_onnx(model, path, torch.randn(3, 8), adapters=adapters).verified
    session = OnnxSession(path, "cpu")
    for name in ("one", "two"):
        session.load_adapter(f"{name} again", tmp_path / name)
        session.load_adapter(name, model, adapter_name=name)
    for name, want in expected.items():
        lora_fx.set_adapter(model, [name] if name else [])
        torch.testing.assert_close(model(x), want, **EXACT)
        (got,) = session.run(x, adapter=name).values()
        torch.testing.assert_close(got, want, **EXACT)
        if name:
            (got,) = session.run(x, adapter=f"{name} again").values()
            torch.testing.assert_close(got, want, **EXACT)
