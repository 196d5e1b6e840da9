"""Folders of PEFT, run by ONNX Runtime beside PEFT itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fx
from lora_fx import OnnxSession, save_onnx_adapter
from lora_fx.errors import CheckpointError, ConfigError, ParityError
from lora_fx.export.adapter_file import read_adapter
from lora_fx.export.onnx import export_onnx

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 17, 3, 9], [1, 2, 60, 4], [7, 7, 7, 30]])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def gpt2() -> nn.Module:
    """Its linear layers are stored [in, out], and one of them is q, k and v."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1,
        eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


class Convs(nn.Module):
    """What PEFT names as it does linear layers, and stores otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.plain = nn.Conv1d(4, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 6, 3, groups=3)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.plain(self.embed(ids).transpose(1, 2)).relu()
        return self.head(self.grouped(x).mean(2))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gpt2") / "gpt2.onnx"
    export_onnx(gpt2(), target, {"input_ids": IDS[:2, :3]}, adapters="inputs")
    return target


def saved(model: nn.Module, folder: Path, **options: Any) -> Any:
    """PEFT's model with trained values, and its folder."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder))
    return wrapped.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_proj", "c_fc"]},
        {"r": 4, "use_rslora": True, "target_modules": ["c_fc"], "fan_in_fan_out": True},
        {
            "r": 2,
            "target_modules": ["c_attn", "c_fc", "c_proj"],
            "rank_pattern": {"c_fc": 5, r"h\.0\.attn\.c_proj": 1},
            "alpha_pattern": {"attn.c_attn": 9},
        },
    ],
)
def test_a_folder_alone_is_enough(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    wrapped = saved(gpt2(), tmp_path / "adapter", **options)
    with torch.no_grad():
        want = wrapped(input_ids=IDS).logits
        assert (want - gpt2()(IDS).logits).abs().max() > 0.02
    session = OnnxSession(base, "cpu")
    session.load_adapter("folder", tmp_path / "adapter")
    file = save_onnx_adapter(tmp_path / "adapter", tmp_path / "a.onnx_adapter")
    session.load_adapter("file", file)
    again = save_onnx_adapter(tmp_path / "adapter", tmp_path / "b.onnx_adapter", base=base)
    assert read_adapter(file).keys() == read_adapter(again).keys()
    for name in ("folder", "file"):
        got = session.run({"input_ids": IDS}, adapter=name)["logits"]
        torch.testing.assert_close(got, want, **CLOSE)
    model = lora_fx.load_adapter(gpt2(), tmp_path / "adapter")
    session.load_adapter("model", model)
    got = session.run({"input_ids": IDS}, adapter="model")["logits"]
    torch.testing.assert_close(got, want, **CLOSE)


def test_dora_needs_the_model_and_a_file_with_gains(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "dora"
    wrapped = saved(gpt2(), folder, r=2, use_dora=True, target_modules=["c_fc"])
    with pytest.raises(CheckpointError, match=r"cannot be converted by itself.*norms of DoRA"):
        save_onnx_adapter(folder, tmp_path / "a.onnx_adapter")
    model = lora_fx.load_adapter(gpt2(), folder)
    with pytest.raises(CheckpointError, match=r"c_fc\.lora_gain.*Export the model again"):
        OnnxSession(base, "cpu").load_adapter("a", model)
    target = tmp_path / "gains.onnx"
    export_onnx(model, target, {"input_ids": IDS}, adapters="inputs", verify=False)
    session = OnnxSession(target, "cpu")
    session.load_adapter("a", model)
    with torch.no_grad():
        want, alone = wrapped(input_ids=IDS).logits, gpt2()(IDS).logits
    got = session.run({"input_ids": IDS}, adapter="a")["logits"]
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(session.run({"input_ids": IDS})["logits"], alone, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["head.weight"]}, "target_parameters.*only the model knows"),
        (
            {"target_modules": ["c_fc"], "init_lora_weights": "pissa", "fan_in_fan_out": True},
            "'pissa'.*changed the base",
        ),
    ],
)
def test_what_a_folder_cannot_say_alone(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "adapter"
    saved(Convs() if "target_parameters" in options else gpt2(), folder, r=2, **options)
    with pytest.raises(CheckpointError, match=f"{message}.*load_adapter"):
        save_onnx_adapter(folder, tmp_path / "a.onnx_adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


class Joined(nn.Module):
    """A weight whose parts can be adapted one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(q * k + v)


def test_a_place_that_the_file_has_not_says_what_to_do(tmp_path: Path) -> None:
    model, x = Joined().eval(), torch.randn(2, 8)

    def adapted(*targets: str) -> nn.Module:
        config = lora_fx.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
        return lora_fx.rewrite(model, config).eval()

    whole, parts = adapted("qkv"), adapted("qkv.q", "qkv.v")
    sessions = []
    for name, one in (("whole", whole), ("parts", parts)):
        lora_fx.save_adapter(one, tmp_path / name)
        export_onnx(one, tmp_path / f"{name}.onnx", x, adapters="inputs", verify=False)
        sessions.append(OnnxSession(tmp_path / f"{name}.onnx", "cpu"))
    of_whole, of_parts = sessions
    with pytest.raises(
        CheckpointError, match=r"qkv: the file takes its parts.*qkv\.q.*load_adapter"
    ):
        of_parts.load_adapter("a", tmp_path / "parts")
    # And what it says does it.
    of_parts.load_adapter("a", lora_fx.load_adapter(parts, tmp_path / "parts", adapter_name="again"),
                          adapter_name="again")  # fmt: skip
    with torch.no_grad():
        want = parts(x)
    torch.testing.assert_close(of_parts.run(x, adapter="a")["output"], want, **CLOSE)
    with pytest.raises(CheckpointError, match=r"takes qkv as a whole.*save_adapter"):
        of_whole.load_adapter("a", parts)
    of_whole.load_adapter("a", tmp_path / "parts")
    torch.testing.assert_close(of_whole.run(x, adapter="a")["output"], want, **CLOSE)
    with pytest.raises(CheckpointError, match=r"head: the file takes no adapter.*Export the model"):
        of_whole.load_adapter("a", adapted("head"))
    for call in (
        of_whole.load_adapter,
        lambda _, *a, **k: save_onnx_adapter(*a, tmp_path / "f.onnx_adapter", **k),
    ):
        with pytest.raises(
            ConfigError, match="adapter_name='b' chooses among the adapters of a model"
        ):
            call("a", tmp_path / "whole", adapter_name="b")


@pytest.mark.parametrize("broken", ["rank", "whole numbers", "one axis"])
def test_factors_that_are_no_pair(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "adapter"
    saved(gpt2(), folder, r=2, target_modules=["c_fc"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if "lora_A" in name)
    value = tensors[key]
    cut = {"rank": value[:1], "whole numbers": value.int(), "one axis": value[0]}[broken]
    save_file({**tensors, key: cut.contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"c_fc has A .* and B .*no pair"):
        save_onnx_adapter(folder, tmp_path / "a.onnx_adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_for_another_model(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "adapter"
    saved(Convs(), folder, r=2, target_modules=["plain"])
    session = OnnxSession(base, "cpu")
    with pytest.raises(
        CheckpointError, match=r"GPT2LMHeadModel.*\n.*plain: the file takes no adapter there"
    ):
        session.load_adapter("other", folder)
    with pytest.raises(CheckpointError, match=f"did you mean {folder}\\?"):
        session.load_adapter("other", tmp_path)
    with pytest.raises(CheckpointError, match="no adapter for this file"):
        save_onnx_adapter(folder, tmp_path / "a.onnx_adapter", base=base)
    wide = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    )
    saved(wide, tmp_path / "wide", r=2, target_modules=["c_fc"])
    with pytest.raises(CheckpointError, match=r"shape \[32, 2\], the file takes .*\[16, r\]"):
        session.load_adapter("wide", tmp_path / "wide")
    assert session.adapters == ()


def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    model = Convs().eval()
    first = lora_fx.LoraConfig(r=3, target_modules=["embed", "plain", "grouped"])
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    export_onnx(
        lora_fx.rewrite(model, first), tmp_path / "m.onnx", ids, adapters="inputs", verify=False
    )
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    targets = ["embed", "plain"]
    wrapped = saved(
        copy.deepcopy(model), tmp_path / "peft", r=2, lora_alpha=6, target_modules=targets
    )
    session.load_adapter("peft", tmp_path / "peft")
    with torch.no_grad():
        want = wrapped(ids)
        assert (want - model(ids)).abs().max() > 0.02
    torch.testing.assert_close(session.run(ids, adapter="peft")["output"], want, **CLOSE)
    # PEFT's A of a grouped convolution sees all channels: ours is written so that it is the same.
    grouped = lora_fx.rewrite(model, lora_fx.LoraConfig(r=6, target_modules=["grouped"])).eval()
    with torch.no_grad():
        grouped.grouped.lora_B.default.normal_()
        want = grouped(ids)
    lora_fx.save_adapter(grouped, tmp_path / "grouped")
    session.load_adapter("grouped", tmp_path / "grouped")
    torch.testing.assert_close(session.run(ids, adapter="grouped")["output"], want, **CLOSE)
    file = save_onnx_adapter(tmp_path / "grouped", tmp_path / "g.onnx_adapter")
    assert read_adapter(file)["grouped.lora_A.weight"].shape == (6, 2, 3)
    saved(Convs(), tmp_path / "dense", r=3, target_modules=["grouped"])
    with pytest.raises(CheckpointError, match=r"grouped\.lora_A\.weight is dense"):
        session.load_adapter("dense", tmp_path / "dense")


def test_a_file_that_ignores_its_adapters_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the runtime took no notice of what is bound, as its own API does there.
    run = OnnxSession.run
    monkeypatch.setattr(OnnxSession, "run", lambda self, inputs, adapter=None: run(self, inputs))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    with pytest.raises(ParityError, match="with a random adapter of rank 3: output 'output'"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4), adapters="inputs")
    assert not list(tmp_path.iterdir())


def test_adapters_of_peft_are_no_secret_in_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrapped = saved(Convs(), tmp_path / "adapter", r=2, target_modules=["head"])
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    export_onnx(wrapped, tmp_path / "m.onnx", ids)
    assert "such as that at base_model.model.head, are not merged" in caplog.text
    got = OnnxSession(tmp_path / "m.onnx", "cpu").run(ids)["output"]
    torch.testing.assert_close(got, wrapped(ids).detach(), **CLOSE)
    caplog.clear()
    export_onnx(wrapped.merge_and_unload(), tmp_path / "m.onnx", ids, force=True)
    assert "not merged" not in caplog.text
