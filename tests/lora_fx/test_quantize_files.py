"""Models on the meta device that are quantized weight by weight from their files."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

import lora_fx
from lora_fx import CheckpointError, QuantizationError
from tests.lora_fx.test_quantize import gpt2, ids_of, t5
from tests.quantized import IDS, llama

INDEX = "model.safetensors.index.json"


def tied_llama() -> nn.Module:
    model = llama(1)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=97,
    )
    return BertModel(config).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "llama": (llama, ids_of),
    "gpt2, tied": (gpt2, ids_of),
    "bert": (bert, lambda m: m(IDS).last_hidden_state),
    "t5": (t5, lambda m: m(input_ids=IDS, decoder_input_ids=IDS).logits),
}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(1).save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / INDEX).is_file()
    return tmp_path


@pytest.mark.parametrize("shards", ["20KB", "5GB"])
@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_that_of_the_model_in_memory(name: str, shards: str, tmp_path: Path) -> None:
    make, call = MODELS[name]
    model = make().eval()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    empty = on_meta(make)
    steps: list[tuple[int, int, str]] = []
    result = lora_fx.quantize(
        empty, "nf4", weights=tmp_path, progress=lambda *step: steps.append(step)
    )
    with torch.no_grad():
        assert torch.equal(call(result), call(lora_fx.quantize(model, "nf4")))
    assert all(parameter.is_meta for parameter in empty.parameters())
    names = [one.name for one in lora_fx.plan_quantization(model, "nf4")]
    assert [name for _, _, name in steps] == [*names, ""]
    assert [(done, total) for done, total, _ in steps] == [
        (done, len(names)) for done in range(len(names) + 1)
    ]


def test_values_take_the_dtype_of_the_model(folder: Path) -> None:
    empty = on_meta(lambda: llama(1)).to(torch.bfloat16)
    result = lora_fx.quantize(empty, "nf4", weights=folder)
    expected = lora_fx.quantize(llama(1).to(torch.bfloat16), "nf4")
    assert result.lm_head.weight.dtype == torch.bfloat16
    for name, parameter in expected.named_parameters():
        assert torch.equal(result.get_parameter(name), parameter), name


def test_a_model_with_its_buffers_in_memory(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.norm = nn.BatchNorm1d(32)
            self.head = nn.Linear(32, 2)
            self.register_buffer("shift", torch.ones(32), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.fc(x) + self.shift))

    torch.manual_seed(0)
    model = Own().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_()
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    empty = Own().eval()
    for module in empty.modules():
        for key, parameter in module._parameters.items():
            module._parameters[key] = nn.Parameter(parameter.to("meta"))
    x = torch.randn(3, 32)
    for source in (file, tmp_path):
        result = lora_fx.quantize(empty, "int8", weights=source)
        assert torch.equal(result(x), lora_fx.quantize(model, "int8")(x))
    with torch.device("meta"):
        nothing = Own().eval()
    with pytest.raises(QuantizationError, match=r"shift is a buffer .*init_empty_weights"):
        lora_fx.quantize(nothing, "int8", weights=file)


# --- what is refused ----------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes what the shard with the norms holds, and the index with it."""
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    file = where["model.norm.weight"]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    where = {name: one for name, one in where.items() if one != file or name in tensors}
    where |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def set_to(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "without model.norm.weight"),
        (set_to("more.weight", torch.ones(2)), "with more.weight, which the model does not have"),
        (
            set_to("model.norm.weight", torch.ones(3)),
            r"model.norm.weight is \(3,\) there and \(64,\)",
        ),
        (
            set_to("model.norm.weight", torch.ones(64, dtype=torch.int32)),
            "model.norm.weight is of whole numbers there, I32, and torch.float32 in the model",
        ),
    ],
)
def test_files_of_another_model(folder: Path, change: Any, words: str) -> None:
    edit(folder, change)
    empty = on_meta(lambda: llama(1))
    with pytest.raises(CheckpointError, match=words):
        lora_fx.quantize(empty, "nf4", weights=folder)
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_files_that_are_damaged_or_not_there(folder: Path, tmp_path: Path) -> None:
    empty = on_meta(lambda: llama(1))

    def refused(words: str, source: Path = folder) -> None:
        with pytest.raises(CheckpointError, match=words):
            lora_fx.quantize(empty, "nf4", weights=source)

    refused("does not exist", tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    refused("found none", tmp_path / "bare")
    shard = next(folder.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused("missing, truncated or damaged")
    shard.unlink()
    refused("missing, truncated or damaged")
    shard.write_bytes(whole)
    (folder / INDEX).write_text("{}")
    refused("is no index of shards")
    (folder / INDEX).unlink()
    refused("files and no index")


def test_an_index_names_no_file_outside_its_folder(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    moved = {name: f"../elsewhere/{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    lora_fx.quantize(on_meta(lambda: llama(1)), "int8", weights=folder)


def test_weights_of_a_model_that_has_some_and_of_one_that_has_none(folder: Path) -> None:
    with pytest.raises(QuantizationError, match="leave weights= out"):
        lora_fx.quantize(llama(1), "nf4", weights=folder)
    with pytest.raises(QuantizationError, match="weights=FOLDER reads them"):
        lora_fx.quantize(on_meta(lambda: llama(1)), "nf4")


# --- memory -------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, and what is alive of them at most.

    Those of the model are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and type(one) is Tensor and one.device.type == "cpu":
                self._count(one.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("format_name", ["nf4", "int8", "int4"])
def test_no_more_than_one_weight_is_dense_at_a_time(format_name: str) -> None:
    class Deep(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(layers)])
            self.head = nn.Linear(256, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    lora_fx.quantize(Deep(1), format_name)
    transient = []
    for layers in (2, 12):
        model = Deep(layers)
        plan = lora_fx.plan_quantization(model, format_name)
        with Live(model) as live:
            result = lora_fx.quantize(model, format_name)
        assert result is not None
        # What stays is what the plan says, and the codes that all weights share.
        assert abs(live.now - plan.bytes) < 0.01 * plan.bytes
        transient.append(live.peak - live.now)
    # The dense weight and what rounding it takes, however many layers there are.
    assert transient[1] < 1.1 * transient[0] < 4 * 4 * 256 * 256


@pytest.mark.slow
def test_a_llama_of_1b_is_quantized_rewritten_and_stepped_in_4_gb(tmp_path: Path) -> None:
    """Shapes of Llama 3.2 1B, random weights in bf16, written and read layer by layer."""
    for step in ("write", "step"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.llama_1b", step, str(tmp_path)],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] == 1_235_814_400
    assert found["sites"] == 112
    assert found["loss"] > 0
    assert found["trained"]
    assert found["peak"] < 4 * 2**30
