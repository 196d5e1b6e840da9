"""Files of a task: what is in them, where they go, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from lora_fx.errors import ExportError, ParityError
from lora_fx.export import staging as placement
from lora_fx.export.decoder_cache import Past, filled_cache
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from lora_fx.export.staging import staging
from tests.export.tiny import LIMIT, VOCABULARY, Pair, generator

IDS = torch.arange(3, 9)[None]


def initializers(path: Path) -> dict[str, list[int]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {value.name: list(value.dims) for value in graph.initializer}


def test_weights_keep_their_names_and_the_file_says_what_it_is_for(tmp_path: Path) -> None:
    model = generator("gpt2")
    model.generation_config.temperature = 0.5
    report = export_onnx(
        model, tmp_path / "m.onnx", {"input_ids": IDS, "logits_to_keep": 0}, task="text-generation"
    )
    kept = initializers(tmp_path / "m.onnx")
    weights = {name for name, value in model.named_parameters() if value.ndim == 2}
    assert weights <= set(kept)
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    remembered = json.loads(session.metadata["lora_fx.generation"])
    assert session.metadata["lora_fx.task"] == report.task == "text-generation"
    assert remembered["limit"] == LIMIT
    assert remembered["defaults"]["temperature"] == 0.5
    assert remembered["defaults"]["eos_token_id"] == 2
    # The logits of all positions were asked for, and the model is as it was.
    assert report.outputs["logits"] == ("batch", "sequence", VOCABULARY)
    past = {
        port.name: torch.zeros(1, 2, 0, 8)
        for port in session.inputs
        if port.name.startswith("past_key_values")
    }
    got = session.run({"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **past})
    torch.testing.assert_close(got["logits"], model(IDS).logits.detach(), rtol=1e-4, atol=1e-4)
    assert model.config.use_cache
    lengths = {shapes["past_key_values.0.key"][2] for shapes in report.shapes_tried}
    assert {shapes["input_ids"][1] for shapes in report.shapes_tried} >= {1, 2, 6}
    assert 0 in lengths
    assert len(lengths) > 2
    assert {shapes["input_ids"][0] for shapes in report.shapes_tried} == {1, 2, 3}


@pytest.mark.parametrize(
    ("name", "kind", "example", "task", "message"),
    [
        ("near", "llama", IDS, "text_generaton", "Did you mean 'text-generation'"),
        ("far", "llama", IDS, "segmentation", "the tasks are 'text-generation', 'text2text"),
        ("swapped", "t5", IDS, "text-generation", "use task='text2text-generation'"),
        ("other way", "llama", IDS, "text2text-generation", "task='text-generation'"),
        ("more", "llama", {"input_ids": IDS, "labels": IDS}, "text-generation", "labels were"),
        ("shape", "llama", IDS[0], "text-generation", r"shape \[6\]"),
        ("keep", "llama", {"input_ids": IDS, "logits_to_keep": 3}, "text-generation", "is 3: give"),
        ("start", "bart", {"decoder_input_ids": IDS}, "text2text-generation", "of the encoder"),
    ],
)
def test_what_a_task_refuses(
    tmp_path: Path, name: str, kind: str, example: Any, task: Any, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(generator(kind), tmp_path / "m.onnx", example, task=task)
    assert not list(tmp_path.iterdir())


def test_models_that_keep_no_cache_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    bert = transformers.BertConfig(**small, num_attention_heads=2, intermediate_size=16)
    mamba = transformers.MambaConfig(**small, state_size=4)
    for model, message in (
        (nn.Embedding(9, 2), "Embedding takes no key-value cache"),
        (transformers.BertModel(bert), "BertModel gives no key-value cache back"),
        (transformers.MambaForCausalLM(mamba), "MambaForCausalLM"),
    ):
        with pytest.raises(ExportError, match=message):
            export_onnx(model, tmp_path / "m.onnx", IDS, task="text-generation")
    with pytest.raises(ExportError, match="leave dynamic_shapes out"):
        export_onnx(
            generator("llama"),
            tmp_path / "m.onnx",
            IDS,
            task="text-generation",
            dynamic_shapes={"input_ids": {0: "n"}},
        )


def test_a_cache_that_is_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The file would be equal to what PyTorch does with this cache, and not to the model.
    from lora_fx.export import tasks

    def halved(past: Past) -> Any:
        return filled_cache(
            {index: {**layer, "value": layer["value"] / 2} for index, layer in past.items()}
        )

    monkeypatch.setattr(tasks, "filled_cache", halved)
    with pytest.raises(ParityError, match="'logits'"):
        export_onnx(generator("gpt2"), tmp_path / "m.onnx", IDS, task="text-generation")
    assert not list(tmp_path.iterdir())


def test_a_model_that_counts_its_tokens_for_positions_is_checked_without_padding(
    tmp_path: Path,
) -> None:
    """Its cache counts tokens that pad, and its forward without a cache does not: both are right."""
    transformers = pytest.importorskip("transformers")
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.M2M100Config(
        vocab_size=6, d_model=16, max_position_embeddings=32, pad_token_id=1, **sizes, **heads
    )
    torch.manual_seed(0)
    model = transformers.M2M100ForConditionalGeneration(config).eval()
    ids = torch.randint(2, 6, (2, 5))
    report = export_onnx(
        model, tmp_path / "m.onnx", {"input_ids": ids}, task="text2text-generation"
    )
    assert report.verified


def test_an_encoder_lies_beside_its_decoder(exported: Callable[[str], Pair]) -> None:
    _, session = exported("t5")
    assert session.encoder is not None
    assert session.encoder.path.parent == session.path.parent
    assert session.encoder.path.name == session.metadata["lora_fx.encoder"]
    assert len(list(session.path.parent.iterdir())) == 2
    # The decoder has no weight of the encoder's own, and the other way round.
    assert not [name for name in initializers(session.path) if name.startswith("encoder.block")]
    own = [name for name in initializers(session.encoder.path) if name.startswith("decoder.")]
    assert own
    assert all("EncDecAttention" in name for name in own)


def test_an_encoder_is_replaced_with_its_decoder(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    stale = ("m.onnx", "m.00112233.encoder.onnx", "m.00112233.encoder.onnx.44556677.data")
    for name in ("m.notes", "other.00112233.encoder.onnx", *stale):
        (tmp_path / name).write_text("old", encoding="utf-8")
    report = export_onnx(
        generator("bart"), target, IDS, task="text2text-generation", verify=False, force=True,
        external_data_bytes=0,
    )  # fmt: skip
    assert report.encoder is not None
    assert "with the encoder beside it" in str(report)
    beside = Path(report.encoder.path)
    names = {"m.notes", "other.00112233.encoder.onnx", "m.onnx", beside.name}
    data = {*report.data_files, *report.encoder.data_files}
    assert len(data) == 2
    assert {path.name for path in tmp_path.iterdir()} == names | data
    assert {*report.files, *report.encoder.files} == data | {"m.onnx", beside.name}
    session = OnnxSession(target, "cpu")
    assert session.generate(IDS, max_new_tokens=2).shape == (1, 3)
    beside.unlink()
    with pytest.raises(
        ExportError, match=r"decoder of a model whose encoder is .*encoder\.onnx.*keep both"
    ):
        OnnxSession(target, "cpu")


def test_companions_go_along_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"

    def write(text: str) -> None:
        with staging(target) as stage:
            beside = stage.companion("encoder")
            for path in (stage.model, beside.model, beside.data):
                path.write_text(text, encoding="utf-8")
            stage.commit(force=True)

    write("old")
    before = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert len(before) == 3
    replace = Path.replace

    def fails(self: Path, where: Path) -> Path:
        if Path(where) == target:
            raise OSError(13, "no")
        return replace(self, where)

    with monkeypatch.context() as patch:
        patch.setattr(placement.Path, "replace", fails)
        with pytest.raises(ExportError, match="the file that was there is untouched"):
            write("new")
    assert {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()} == before
    write("new")
    after = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert set(after.values()) == {"new"}
    assert len(after) == 3
    assert set(before) & set(after) == {"m.onnx"}
