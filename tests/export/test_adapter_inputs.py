"""Files that take adapters: what they compute alone, with each, and with several at once."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import pickle
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig, OnnxSession, save_onnx_adapter
from lora_fx.errors import CheckpointError, ConfigError, ExportError, NoMatchError
from lora_fx.export.adapter_file import manifest_of_file, read_adapter, values_of_model
from lora_fx.export.adapter_manifest import MANIFEST_KEY, Manifest
from lora_fx.export.factor_model import random_factors
from lora_fx.export.onnx import export_onnx
from lora_fx.export.report import ExportReport
from tests.export.swapping import Net, adapted, ids, trained

EXACT = {"rtol": 1e-5, "atol": 1e-6}
NAMES = ("plain", "dora", "biased")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return adapted()


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, model: nn.Module
) -> tuple[Path, ExportReport]:
    target = tmp_path_factory.mktemp("swap") / "net.onnx"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    active = lora_fx.active_adapters(model)
    report = export_onnx(model.train(), target, ids(2, 7), adapters="inputs")
    # Exported for inference, whatever its mode; and left as it was.
    assert all(one.training for one in model.modules())
    assert lora_fx.active_adapters(model) == active
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()
    return target, report


@pytest.fixture(scope="module")
def path(exported: tuple[Path, ExportReport]) -> Path:
    return exported[0]


@pytest.fixture
def session(path: Path, model: nn.Module) -> OnnxSession:
    session = OnnxSession(path, "cpu")
    for name in NAMES:
        session.load_adapter(name, model, adapter_name=name)
    return session


def expected(model: nn.Module, names: list[str], x: torch.Tensor) -> torch.Tensor:
    """What PyTorch makes of it, with these adapters active."""
    before = lora_fx.active_adapters(model)
    try:
        lora_fx.set_adapter(model, names)
        with torch.no_grad():
            return model(x)
    finally:
        lora_fx.set_adapter(model, before)


# --- what the file computes -----------------------------------------------------------------------


def test_the_export_is_compared_alone_with_each_adapter_and_with_a_random_one(
    exported: tuple[Path, ExportReport],
) -> None:
    report = exported[1]
    rows = [row.name for row in report.parity]
    assert rows == [
        "output",
        *(f"output with adapter {name!r}" for name in NAMES),
        "output with a random adapter of rank 3",
        "output with a random adapter of rank 1",
    ]
    assert report.max_rel_error < 1e-5
    assert set(report.swappable) == {
        *("embed", "grouped", "transposed", "raw", "fc", "pool"),
        *(f"attention.{one}" for one in ("q", "k", "v", "out_proj")),
    }
    assert report.inputs == {"ids": ("batch", "sequence")}
    assert "adapters of any rank are inputs, at 10 places" in str(report)
    assert json.loads(report.to_json())["swappable"] == list(report.swappable)


def test_the_file_alone_is_the_base_model(path: Path, model: nn.Module) -> None:
    x = ids(4, 9)
    stock = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (alone,) = stock.run(None, {"ids": x.numpy()})
    base = expected(model, [], x)
    torch.testing.assert_close(torch.from_numpy(alone), base, **EXACT)
    torch.testing.assert_close(OnnxSession(path, "cpu").run(x)["output"], base, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_each_adapter(session: OnnxSession, model: nn.Module, name: str) -> None:
    x = ids(4, 3)
    want = expected(model, [name], x)
    torch.testing.assert_close(session.run(x, adapter=name)["output"], want, **EXACT)
    assert (want - expected(model, [], x)).abs().max() > 0.01
    arrays = session.run(x.numpy(), adapter=name)["output"]
    np.testing.assert_allclose(arrays, want.numpy(), **EXACT)


def test_several_with_weights(session: OnnxSession, model: nn.Module) -> None:
    x = ids()
    weights = {"plain": 1.0, "dora": 1.0, "biased": 1.0}
    got = session.run(x, adapter=weights)["output"]
    torch.testing.assert_close(got, expected(model, list(weights), x), **EXACT)
    # One with a weight is that much of its change: of a DoRA's, too.
    for name in NAMES:
        one = session.run(x, adapter={name: 1})["output"]
        torch.testing.assert_close(one, expected(model, [name], x), **EXACT)
    base = session.run(x)["output"]
    torch.testing.assert_close(session.run(x, adapter={})["output"], base)
    torch.testing.assert_close(session.run(x, adapter={"plain": 0.0})["output"], base, **EXACT)


def test_weights_are_those_of_a_weighted_adapter(session: OnnxSession, model: nn.Module) -> None:
    lora_fx.add_weighted_adapter(model, ["plain"], [-0.75], "sum", "cat")
    try:
        want = expected(model, ["sum"], ids())
    finally:
        lora_fx.delete_adapter(model, "sum")
    got = session.run(ids(), adapter={"plain": -0.75})["output"]
    torch.testing.assert_close(got, want, **EXACT)


def test_no_factor_is_turned_round_at_run_time_and_nothing_else_is_overridable(path: Path) -> None:
    graph = onnx.load(path).graph
    factors = set(manifest_of_file(path).inputs)
    constants = {value.name for value in graph.initializer}
    assert {value.name for value in graph.input} == {"ids", *factors}
    assert factors <= constants
    turned = {
        node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in factors | constants
    }
    # A transposed convolution takes [in, r]; it is as small as A.
    assert turned == {"transposed.lora_A.weight"}
    # As in a merged export, weights are stored as they are multiplied.
    shapes = {value.name: tuple(value.dims) for value in graph.initializer}
    assert shapes["fc.weight"] == (12, 8)
    assert shapes["fc.lora_A.weight"] == (12, 1)
    assert shapes["fc.lora_B.weight"] == (1, 8)
    assert shapes["grouped.lora_A.weight"] == (2, 4, 3)


class Shared(nn.Module):
    """A fused weight, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.qkv = nn.Linear(8, 24)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.embed(ids)).chunk(3, -1)
        return self.head(self.mix((q * k).tanh() + v))


def test_parts_ties_and_starts_that_changed_the_base(tmp_path: Path) -> None:
    base = Shared().eval()
    tied = LoraConfig(r=2, target_modules=["embed", "head"], ensure_weight_tying=True)
    model = lora_fx.rewrite(base, tied, adapter_name="tied")
    targets = ["qkv.q", "qkv.v"]
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=targets, use_dora=True), "parts")
    lora_fx.add_adapter(model, LoraConfig(r=3, target_modules=["qkv"]), "whole")
    start = LoraConfig(r=2, target_modules=["mix"], init_lora_weights="pissa")
    lora_fx.add_adapter(model, start, "pissa")
    for name in lora_fx.adapter_names(model):
        lora_fx.set_adapter(model, name)
        with torch.no_grad():
            for parameter in lora_fx.trainable_parameters(model):
                parameter.add_(0.2 * torch.randn_like(parameter))
    report = export_onnx(model.eval(), tmp_path / "m.onnx", ids(2, 4), adapters="inputs")
    assert set(report.swappable) == {"embed", "head", "qkv", "qkv.q", "qkv.v", "mix"}
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    torch.testing.assert_close(session.run(ids())["output"], base(ids()).detach(), **EXACT)
    for name in lora_fx.adapter_names(model):
        file = save_onnx_adapter(model, tmp_path / f"{name}.onnx_adapter", adapter_name=name)
        session.load_adapter(name, file)
        want = expected(model, [name], ids())
        assert (want - base(ids())).abs().max() > 0.01
        torch.testing.assert_close(session.run(ids(), adapter=name)["output"], want, **EXACT)
    # What was taken out of the base at the start is in the file of the adapter.
    assert read_adapter(tmp_path / "pissa.onnx_adapter")["mix.lora_A.weight"].shape == (8, 4)


@pytest.mark.parametrize("targets", [["a.q", "a.v"], None])
def test_dora_inside_a_joined_attention_layer(tmp_path: Path, targets: list[str] | None) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.a(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=targets, use_dora=True)
    model = trained(lora_fx.rewrite(Attends().eval(), config))
    x = torch.randn(2, 3, 8)
    export_onnx(model, tmp_path / "m.onnx", x, adapters="inputs")
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    session.load_adapter("dora", model)
    with torch.no_grad():
        torch.testing.assert_close(session.run(x, adapter="dora")["output"], model(x), **EXACT)


def test_experts_take_factors_of_their_own(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    base = transformers.MixtralModel(config).eval()
    targets = ["experts.gate_up_proj", "experts.down_proj", "q_proj"]
    model = trained(lora_fx.rewrite(base, LoraConfig(r=2, target_modules=targets)))
    target = tmp_path / "m.onnx"
    x = {"input_ids": torch.randint(40, (2, 5))}
    report = export_onnx(model, target, x, adapters="inputs")
    assert len(report.swappable) == 3
    inputs = manifest_of_file(target).inputs
    up = "layers.0.mlp.experts.gate_up_proj.lora"
    assert inputs[f"{up}_A.weight"].shape == (3, 16, None)
    assert inputs[f"{up}_B.weight"].shape == (3, None, 24)
    turned = {n.input[0] for n in onnx.load(target).graph.node if n.op_type == "Transpose"}
    assert not turned & inputs.keys()
    session = OnnxSession(target, "cpu")
    session.load_adapter("a", model)
    y = {"input_ids": torch.randint(40, (3, 9))}
    with torch.no_grad():
        want, alone = model(**y)[0], base(**y)[0]
    torch.testing.assert_close(
        session.run(y, adapter="a")["last_hidden_state"], want, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(session.run(y)["last_hidden_state"], alone, rtol=1e-4, atol=1e-5)
    assert (want - alone).abs().max() > 0.01


def test_the_manifest_is_in_the_file(path: Path) -> None:
    manifest = manifest_of_file(path)
    assert manifest.base == "Net"
    sites = {site.name: site for site in manifest.sites}
    assert sites["fc"].a == (12, None)
    assert sites["fc"].gain
    assert sites["pool"].bias
    assert sites["grouped"].groups == 2
    assert str(manifest.inputs["fc.lora_A.weight"]) == "fc.lora_A.weight float32[12, r]"
    assert Manifest.from_metadata({MANIFEST_KEY: manifest.to_json()}) == manifest
    assert Manifest.from_metadata({}) is None
    with pytest.raises(ExportError, match="damaged"):
        Manifest.from_metadata({MANIFEST_KEY: "{}"})
    newer = json.dumps({"format": 4, "base": "", "sites": []})
    with pytest.raises(ExportError, match=r"format 4.*update lora_fx"):
        Manifest.from_metadata({MANIFEST_KEY: newer})


# --- files of adapters ----------------------------------------------------------------------------


def test_a_file_gives_what_the_model_gives_also_to_the_stock_api(
    tmp_path: Path, path: Path, model: nn.Module, session: OnnxSession
) -> None:
    x = ids()
    file = save_onnx_adapter(
        model, tmp_path / "plain.onnx_adapter", adapter_name="plain", base=path
    )
    session.load_adapter("from file", file)
    want = expected(model, ["plain"], x)
    torch.testing.assert_close(session.run(x, adapter="from file")["output"], want, **EXACT)

    stock = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    (got,) = stock.run(None, {"ids": x.numpy()}, options)
    torch.testing.assert_close(torch.from_numpy(got), want, **EXACT)


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.onnx_adapter"
    save_onnx_adapter(model, target, adapter_name="biased")
    before = target.read_bytes()
    with pytest.raises(ExportError, match="exists, and force=False"):
        save_onnx_adapter(model, target, adapter_name="biased", force=False)
    save_onnx_adapter(model, target, adapter_name="biased")
    assert target.read_bytes() == before

    def broken(self: object, name: str) -> None:
        Path(name).write_bytes(before[:10])
        raise RuntimeError("lora.cc:151 Failed to write :4000 bytes\n")

    monkeypatch.setattr(onnxruntime.AdapterFormat, "export_adapter", broken)
    with pytest.raises(ExportError, match=r"write .*a\.onnx_adapter: ONNX .*4000 bytes; the file"):
        save_onnx_adapter(model, target, adapter_name="biased", force=True)
    # ONNX Runtime says the same of a full disk.
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(
        ExportError, match=r"disk is full: cannot write .*a\.onnx_adapter, which takes \d+\.\d kB"
    ):
        save_onnx_adapter(model, target, adapter_name="biased", force=True)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "a.onnx_adapter"
    with pytest.raises(ExportError, match=r"cannot write .*a\.onnx_adapter: .*you may write to"):
        save_onnx_adapter(model, target, adapter_name="biased")
    target = target.with_suffix(".onnx")
    with pytest.raises(ExportError, match=r"cannot write .*a\.onnx: .*you may write to"):
        export_onnx(nn.Linear(2, 2), target, torch.randn(2, 2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.LayerNorm(4), r"\(the model has no linear"),
        (nn.Linear(4, 4), r"\(weight: the output head"),
    ],
)
def test_a_plain_model_without_a_place_says_what_to_do(
    tmp_path: Path, model: nn.Module, reason: str
) -> None:
    with pytest.raises(NoMatchError, match=rf"no adapters.*{reason}.*rewrite.*first.*'merge'"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4), adapters="inputs")


def test_a_flipped_byte_is_refused_or_changes_one_value(tmp_path: Path) -> None:
    model = lora_fx.rewrite(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    file = save_onnx_adapter(model, tmp_path / "a.onnx_adapter")
    content, want = file.read_bytes(), read_adapter(file)
    changed = 0
    for place, byte in enumerate(content):
        file.write_bytes(content[:place] + bytes([byte ^ 255]) + content[place + 1 :])
        try:
            got = read_adapter(file)
        except CheckpointError:
            continue
        assert {name: value.shape for name, value in got.items()} == {
            name: value.shape for name, value in want.items()
        }
        # The format has no checksum.
        changed += (different := sum(int((got[name] != want[name]).sum()) for name in want))
        assert different <= 1
    assert changed == sum(value.nbytes for value in want.values())


def test_a_broken_adapter_is_not_written(tmp_path: Path) -> None:
    model = trained(
        lora_fx.rewrite(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    )
    with torch.no_grad():
        model[0].lora_B.default[0, 0] = math.nan
    with pytest.raises(CheckpointError, match=r"0\.lora_B\.weight would hold values that are not"):
        save_onnx_adapter(model, tmp_path / "a.onnx_adapter")
    with torch.no_grad():
        model[0].lora_B.default[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="too large for its dtype"):
        save_onnx_adapter(model, tmp_path / "a.onnx_adapter", dtype="fp16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_values_go_through_a_file(tmp_path: Path, model: nn.Module, dtype: Any) -> None:
    file = save_onnx_adapter(model, tmp_path / "a.onnx_adapter", adapter_name="dora", dtype=dtype)
    values, wide = read_adapter(file), values_of_model(model, "dora")
    assert values.keys() == wide.keys()
    for name, value in values.items():
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        assert value.dtype == (torch.float32 if name.endswith("gain") else half)
        assert torch.equal(value, wide[name].to(value.dtype))


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("model", {"adapter_name": "none"}, ConfigError, "no adapter 'none'"),
        ("model", {"adapter_name": "dora", "dtype": "int8"}, ConfigError, "'int8' is unknown"),
        (
            "model",
            {"adapter_name": "dora", "base": "x", "dtype": "fp16"},
            ConfigError,
            "both given",
        ),
        ("model", {"adapter_name": "dora", "base": "gone.onnx"}, ExportError, "no file gone"),
        ("nowhere", {}, CheckpointError, "there is no adapter at nowhere"),
        (3, {}, ConfigError, "cannot be read from a int"),
    ],
)
def test_what_cannot_be_converted(
    tmp_path: Path, model: nn.Module, source: Any, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        save_onnx_adapter(
            model if source == "model" else source, tmp_path / "a.onnx_adapter", **options
        )
    assert not list(tmp_path.iterdir())


# --- adapters that do not fit ---------------------------------------------------------------------


FC_A, FC_B = "fc.lora_A.weight", "fc.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop(FC_A), "fc: it has B only: an adapter has A and B"),
        (lambda v: v.pop(FC_B), "fc: it has A only"),
        (
            lambda v: v.update({FC_A: v[FC_A].half()}),
            r"fc\.lora_A\.weight: it is float16.*base=FILE",
        ),
        (lambda v: v.update({FC_A: v[FC_A][:-1]}), r"shape \[11, 2\], the file takes .*\[12, r\]"),
        (lambda v: v.update({FC_A: v[FC_A][:, :1]}), "fc: A has rank 1, B has rank 2"),
        (
            lambda v: v[FC_B].fill_(math.nan),
            "fc.lora_B.weight: it holds values that are not finite",
        ),
        (
            lambda v: v.update({"fd.lora_A.weight": v[FC_A]}),
            "fd: the file takes no adapter there .*nearest.*fc.lora_A",
        ),
        (lambda v: v.update({"fc.lora_B.bias": v[FC_A]}), "the file takes .*fc.lora_gain there"),
        (lambda v: v.clear(), "it holds no value"),
    ],
)
def test_what_does_not_fit_is_named_and_the_session_goes_on(
    session: OnnxSession, model: nn.Module, change: Any, message: str
) -> None:
    values = values_of_model(model, "plain")
    change(values)
    with pytest.raises(CheckpointError, match=f"(?s)no adapter for this file.*Net.*{message}"):
        session.load_adapter("plain", values)
    assert session.adapters == NAMES
    want = expected(model, ["plain"], ids())
    torch.testing.assert_close(session.run(ids(), adapter="plain")["output"], want, **EXACT)


def test_a_truncated_file(tmp_path: Path, session: OnnxSession, model: nn.Module) -> None:
    whole = save_onnx_adapter(model, tmp_path / "a.onnx_adapter", adapter_name="dora").read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 100):
        (tmp_path / "a").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated, damaged or no"):
            session.load_adapter("a", tmp_path / "a")
    assert session.adapters == NAMES


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("plane", "no adapter 'plane': the session has 'plain', 'dora', 'biased'"),
        ({"plain": 1, "x": 1}, "no adapter 'x'"),
        ({"plain": math.nan}, "weight of adapter 'plain' is nan"),
        ({"plain": math.inf}, "is inf"),
        ({"plain": "much"}, "is 'much': give a finite number"),
        ({"plain": True}, "is True"),
        ({"plain": 10**400}, "give a finite number"),
        ({"plain": 1e300}, "too large: the weighted sum"),
        ({"plain": torch.ones(2)}, r"is tensor\(\[1., 1.\]\): give a finite"),
        (["plain"], "adapter is a list"),
    ],
)
def test_choices_that_mean_nothing(session: OnnxSession, choice: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        session.run(ids(), adapter=choice)
    assert session.run(ids())["output"].isfinite().all()


@pytest.mark.parametrize("weight", [np.float32(0.25), torch.tensor(0.25), np.array(0.25)])
def test_weights_may_be_numbers_of_numpy_and_torch(session: OnnxSession, weight: Any) -> None:
    want = session.run(ids(), adapter={"plain": 0.25})["output"]
    assert torch.equal(session.run(ids(), adapter={"plain": weight})["output"], want)


def test_values_by_name_are_copied(session: OnnxSession, model: nn.Module) -> None:
    values = values_of_model(model, "plain")
    session.load_adapter("own", values)
    want = session.run(ids(), adapter="own")["output"].clone()
    for value in values.values():
        value.zero_()
    assert torch.equal(session.run(ids(), adapter="own")["output"], want)
    session.unload_adapter("own")


@pytest.mark.parametrize("name", [None, 3, ""])
def test_names_are_texts(session: OnnxSession, model: nn.Module, name: Any) -> None:
    with pytest.raises(ConfigError, match="give another text"):
        session.load_adapter(name, model, adapter_name="plain")


def test_a_session_is_not_copied(session: OnnxSession) -> None:
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match="open the file again"):
            copied(session)


def test_wrong_inputs_with_an_adapter(session: OnnxSession) -> None:
    for bad, message in (
        ({}, "lacks ids"),
        (ids().int(), "'ids' is int32"),
        (ids()[0], "has shape"),
        ({"ids": ids(), "fc.lora_A.weight": ids()}, "feeds fc.lora_A.weight of .* itself"),
    ):
        with pytest.raises(ExportError, match=message):
            session.run(bad, adapter="plain")
    with pytest.raises(ExportError, match="failed on ids"):
        session.run(ids() + 1000, adapter="plain")
    assert session.run(ids(), adapter="plain")["output"].isfinite().all()


def test_a_merged_file_takes_no_adapter(tmp_path: Path, model: nn.Module) -> None:
    export_onnx(nn.Linear(4, 4), tmp_path / "m.onnx", torch.randn(2, 4), verify=False)
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    with pytest.raises(ConfigError, match=r"m\.onnx takes no adapters.*adapters='inputs'"):
        session.load_adapter("a", model, adapter_name="plain")
    with pytest.raises(ExportError, match=r"m\.onnx takes no adapters"):
        save_onnx_adapter(
            model, tmp_path / "a.onnx_adapter", adapter_name="plain", base=tmp_path / "m.onnx"
        )
    with pytest.raises(ConfigError, match=r"m\.onnx takes no adapters.*adapters='inputs'"):
        session.run(torch.randn(2, 4), adapter="a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "loftq"}, "its base was quantized for it"),
        ({"init_lora_weights": "eva"}, "waits for data"),
    ],
)
def test_what_has_no_factors_is_refused_by_name(tmp_path: Path, options: Any, message: str) -> None:
    model = lora_fx.rewrite(Net(), LoraConfig(r=2, target_modules=["fc"], **options))
    for write in (
        lambda: export_onnx(model, tmp_path / "m.onnx", ids(), adapters="inputs"),
        lambda: save_onnx_adapter(model, tmp_path / "a.onnx_adapter"),
    ):
        with pytest.raises(ExportError, match=f"'default' cannot be an input.*{message}.*merge"):
            write()
    assert not list(tmp_path.iterdir())


# --- holding and switching ------------------------------------------------------------------------


def test_load_replace_unload(session: OnnxSession, model: nn.Module) -> None:
    assert session.adapters == NAMES
    session.load_adapter("plain", model, adapter_name="dora")
    got = session.run(ids(), adapter="plain")["output"]
    torch.testing.assert_close(got, expected(model, ["dora"], ids()), **EXACT)
    session.unload_adapter("plain")
    assert session.adapters == NAMES[1:]
    with pytest.raises(ConfigError, match="no adapter 'plain'"):
        session.run(ids(), adapter="plain")
    with pytest.raises(ConfigError, match="no adapter 'plain'"):
        session.unload_adapter("plain")


def test_max_rank_limits_adapters_and_sums(path: Path, model: nn.Module) -> None:
    session = OnnxSession(path, "cpu", max_rank=5)
    with pytest.raises(CheckpointError, match="grouped: the rank is 6, above the max_rank=5"):
        session.load_adapter("plain", model, adapter_name="plain")
    for name in ("dora", "biased"):
        session.load_adapter(name, model, adapter_name=name)
    session.load_adapter("more", model, adapter_name="biased")
    session.run(ids(), adapter={"dora": 1, "biased": 1})
    with pytest.raises(ConfigError, match="'biased', 'more' add up to 6, above the max_rank=5"):
        session.run(ids(), adapter={"biased": 1, "more": 1})


def test_an_adapter_that_is_unloaded_is_gone_also_from_sums(
    session: OnnxSession,
) -> None:
    held = session._store.chosen("plain")
    kept = [weakref.ref(value) for value in held.bound.values.values()]
    total = weakref.ref(session._store.chosen({"plain": 1.0, "dora": 2.0}))
    assert session._store.chosen({"plain": 1.0, "dora": 2.0}) is total()
    del held
    session.unload_adapter("plain")
    gc.collect()
    assert total() is None
    assert not [one for one in kept if one() is not None]


def test_sums_are_kept_only_so_many(session: OnnxSession) -> None:
    sums = [weakref.ref(session._store.chosen({"plain": float(n)})) for n in range(20)]
    gc.collect()
    assert [one() is not None for one in sums] == [False] * 12 + [True] * 8


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's /proc")
def test_a_thousand_switches_leak_nothing(session: OnnxSession, path: Path) -> None:
    manifest = manifest_of_file(path)
    values = random_factors(manifest, 400)  # 130 kB: a thousand of them would be noticed
    x = ids()

    def switch(times: int) -> None:
        for turn in range(times):
            session.load_adapter("big", values)
            session.run(x, adapter="big")
            session.run(x, adapter={"big": 1.0, "plain": float(turn)})
            session.unload_adapter("big")

    switch(100)
    before = resident()
    switch(1000)
    size = sum(value.nbytes for value in values.values())
    assert size > 100_000
    assert resident() - before < 50 * size


def test_threads_that_share_a_session_each_get_their_own_answer(
    session: OnnxSession, model: nn.Module
) -> None:
    choices: list[Any] = [*NAMES, None, {"plain": 0.5, "dora": -1.0}]
    alone = [session.run(ids(seed=n), adapter=one)["output"] for n, one in enumerate(choices)]
    wrong: list[Any] = []

    def work(number: int) -> None:
        for _ in range(40):
            got = session.run(ids(seed=number), adapter=choices[number])["output"]
            if not torch.allclose(got, alone[number], **EXACT):
                wrong.append(choices[number])

    def churn() -> None:
        for _ in range(40):
            session.load_adapter("other", model, adapter_name="biased")
            session.unload_adapter("other")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(choices))]
    threads.append(threading.Thread(target=churn))
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_a_site_has_what_adapters_of_several_kinds_train_there(tmp_path: Path) -> None:
    """One adapter scales a layer and another gives it a bias, over a bias of its own."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6)).eval()
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    dora, biased = (
        dataclasses.replace(config, **{name: True}) for name in ("use_dora", "lora_bias")
    )
    model = lora_fx.rewrite(base, dora, adapter_name="dora")
    lora_fx.add_adapter(model, biased, "biased")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "lora_bias" in name:
                parameter.add_(torch.rand(parameter.shape))
    x, file = torch.randn(5, 4), tmp_path / "model.onnx"
    lora_fx.export_onnx(model.eval(), file, (x,), adapters="inputs")
    session = OnnxSession(file, "cpu")
    for name in ("dora", "biased"):
        session.load_adapter(name, model, adapter_name=name)
        got = session.run(x, adapter=name)["output"]
        torch.testing.assert_close(got, expected(model, [name], x), **EXACT)


# --- bindings ---------------------------------------------------------------------------------------


@pytest.fixture
def bindings(session: OnnxSession, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A weak reference to each binding that was made."""
    made: list[object] = []
    make = session._session.io_binding

    def counted() -> Any:
        binding = make()
        made.append(weakref.ref(binding))
        return binding

    monkeypatch.setattr(session._session, "io_binding", counted)
    return made


def test_an_adapter_is_bound_once(
    session: OnnxSession, bindings: list[Any], model: nn.Module
) -> None:
    for turn in range(3):
        for count, name in enumerate((None, *NAMES), start=1):
            x = ids(1 + turn, 5 + turn)
            want = expected(model, [name] if name else [], x)
            torch.testing.assert_close(session.run(x, adapter=name)["output"], want, **EXACT)
            torch.testing.assert_close(session.run(x, adapter=name)["output"], want, **EXACT)
            assert len(bindings) == (count if turn == 0 else 1 + len(NAMES))
    session.load_adapter("plain", model, adapter_name="dora")
    gc.collect()
    assert sum(one() is None for one in bindings) == 1
    session.run(ids(), adapter="plain")
    assert len(bindings) == 2 + len(NAMES)


def test_results_stay_as_they_were(session: OnnxSession, model: nn.Module) -> None:
    calls = [ids(3, 6, seed=turn) for turn in range(6)]
    arrays = [session.run([x.numpy()], adapter="plain")["output"] for x in calls]
    tensors = [session.run(x, adapter="plain")["output"] for x in calls]
    for x, array, tensor in zip(calls, arrays, tensors, strict=True):
        want = expected(model, ["plain"], x)
        torch.testing.assert_close(tensor, want, **EXACT)
        torch.testing.assert_close(torch.from_numpy(array), want, **EXACT)


def test_a_run_that_fails_takes_its_binding_along(
    session: OnnxSession, bindings: list[Any], model: nn.Module
) -> None:
    with pytest.raises(ExportError, match="failed on ids"):
        session.run(ids(1, 5) + 10**6, adapter="plain")
    gc.collect()
    assert [one() for one in bindings] == [None]
    x = ids()
    want = expected(model, ["plain"], x)
    torch.testing.assert_close(session.run(x, adapter="plain")["output"], want, **EXACT)


def test_threads_have_a_binding_each(
    session: OnnxSession, bindings: list[Any], model: nn.Module
) -> None:
    want = {size: expected(model, ["dora"], ids(size, 6)) for size in (1, 2, 3, 4)}
    wrong: list[int] = []

    def work(size: int) -> None:
        for _ in range(40):
            found = session.run(ids(size, 6), adapter="dora")["output"]
            if not torch.allclose(found, want[size], **EXACT):
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in want]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
    assert 1 <= len(bindings) <= len(want)


def test_what_was_given_and_what_came_out_are_not_kept(session: OnnxSession) -> None:
    x = np.zeros((2, 6), np.int64)
    found = session.run([x], adapter="plain")["output"]
    kept = weakref.ref(x), weakref.ref(found)
    del x, found
    gc.collect()
    assert [one() is None for one in kept] == [True, True]
