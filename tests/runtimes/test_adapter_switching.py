"""Adapters in runtimes that know no inputs with a default: each row has its adapter, or there is an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig, OnnxSession
from lora_fx.export.adapter_file import manifest_of_file, read_adapter
from lora_fx.export.adapter_manifest import SLOTS_INPUT
from tests.algebra import randomize
from tests.runtimes.conftest import CONSUMERS, ROOT, require
from tests.runtimes.files import MASKED, encoder
from tests.runtimes.test_browser import browse, in_chromium

pytestmark = [pytest.mark.runtime, pytest.mark.filterwarnings("ignore")]

WEB = ROOT / "examples" / "web"
NAMES = ("maths", "code")
WRONG = [2, 7, 2**62]  # ids that no adapter has
WRONG_32 = [2, 7, 2**31 - 1]  # OpenVINO keeps the low 32 bits of its inputs


class Convolves(nn.Module):
    """Convolutions, a lookup and products, with ids of tokens for an input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) * attention_mask[..., None]
        return self.head(self.conv(x.mT).relu().mean(2))


@dataclass(frozen=True)
class Written:
    """A model with two adapters, its bank and its swappable file, and what PyTorch gives for all rows."""

    folder: Path
    wanted: dict[str | None, np.ndarray[Any, Any]]

    def mixed(self, names: list[str | None]) -> np.ndarray[Any, Any]:
        return np.stack([self.wanted[name][row] for row, name in enumerate(names)])


def written(folder: Path, kind: str) -> Written:
    torch.manual_seed(0)
    if kind == "encoder":
        places: dict[str, Any] = {}
        base = encoder()
    else:
        places = {"target_modules": ["embed", "conv", "head"]}
        base = Convolves().eval()
    model = lora_fx.rewrite(base, LoraConfig(r=4, **places), adapter_name="maths").eval()
    lora_fx.add_adapter(model, LoraConfig(r=2, **places), "code")
    wanted: dict[str | None, Any] = {}
    for name in NAMES:
        lora_fx.set_adapter(model, name)
        randomize(model)
    for name in (*NAMES, None):
        if name is not None:
            lora_fx.set_adapter(model, name)
        with torch.no_grad():
            if name is None:
                with lora_fx.disable_adapter(model):
                    out = model(**MASKED)
            else:
                out = model(**MASKED)
        wanted[name] = (out if isinstance(out, Tensor) else out.logits).numpy()
    assert np.abs(wanted["maths"] - wanted["code"]).max() > 0.01
    assert np.abs(wanted["maths"] - wanted[None]).max() > 0.01
    lora_fx.export_onnx(model, folder / "bank.onnx", MASKED, adapters="bank")
    options = {"adapters": "inputs", "required_inputs": True}
    lora_fx.export_onnx(model, folder / "inputs.onnx", MASKED, **options)
    for name in NAMES:
        path = folder / f"{name}.onnx_adapter"
        lora_fx.save_onnx_adapter(model, path, base=folder / "inputs.onnx", adapter_name=name)
    return Written(folder, wanted)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(tmp_path_factory.mktemp("text"), "encoder")


@pytest.fixture(scope="module")
def signal(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(tmp_path_factory.mktemp("signal"), "convolutions")


def close(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    error = np.abs(np.reshape(np.array(found, np.float64), np.shape(wanted)) - wanted).max()
    assert error <= tolerance * np.abs(wanted).max()


# --- JavaScript -----------------------------------------------------------------------------------

MIXES: list[list[str | None]] = [["maths", "code"], [None, "maths"], ["code", None]]


def tensors(ids: list[int] | None = None) -> dict[str, Any]:
    feeds = {**MASKED, **({} if ids is None else {SLOTS_INPUT: torch.tensor(ids)})}
    return {
        name: {"type": "int64", "dims": list(value.shape), "data": value.reshape(-1).tolist()}
        for name, value in feeds.items()
    }


def bank_request(file: str) -> dict[str, Any]:
    calls: list[dict[str, Any]] = [{"feeds": tensors(), "adapter": names} for names in MIXES]
    calls += [{"feeds": tensors(), "adapter": name} for name in (*NAMES, None)]
    calls += [{"feeds": tensors([0, wrong]), "raw": True} for wrong in WRONG]
    calls += [{"feeds": tensors(), "raw": True}, {"feeds": tensors(), "adapter": "absent"}]
    calls += [{"feeds": tensors(), "adapter": ["maths"]}]
    texts = "maths: 5 9 3 7\nnone: 5 9 3 7\ncode: 5 9 3 7"
    return {"file": file, "adapters": {}, "calls": calls, "page": {"texts": texts}}


def check_bank(found: dict[str, Any], written: Written) -> None:
    assert found["names"] == list(NAMES)
    results = found["results"]
    for names, result in zip(MIXES, results, strict=False):
        close(result["logits"], written.mixed(names))
    for name, result in zip((*NAMES, None), results[3:], strict=False):
        close(result["logits"], written.wanted[name])
    for result in results[6:9]:
        assert "error" in result or result["logits"][3:] == ["nan"] * 3, result
        if "error" not in result:
            close(result["logits"][:3], written.wanted["maths"][0])
    assert SLOTS_INPUT in results[9]["error"]
    assert "there are maths, code" in results[10]["error"]
    assert "give one for each row" in results[11]["error"]


def inputs_request(file: str, adapters: dict[str, str]) -> dict[str, Any]:
    calls: list[dict[str, Any]] = [
        {"feeds": tensors(), "adapter": name} for name in ("maths", None, "code", "maths")
    ]
    calls += [{"feeds": tensors(), "raw": True}, {"feeds": tensors(), "adapter": ["maths", "code"]}]
    return {"file": file, "adapters": adapters, "calls": calls, "page": {}}


def check_inputs(found: dict[str, Any], written: Written) -> None:
    results = found["results"]
    for name, result in zip(("maths", None, "code", "maths"), results, strict=False):
        close(result["logits"], written.wanted[name])
    assert "lora_" in results[4]["error"]
    assert "export a bank" in results[5]["error"]


@pytest.mark.parametrize("kind", ["bank", "inputs"])
def test_node_switches_adapters(
    kind: str, text: Written, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    file = str(text.folder / f"{kind}.onnx")
    request = bank_request(file)
    if kind == "inputs":
        paths = {name: str(text.folder / f"{name}.onnx_adapter") for name in NAMES}
        request = inputs_request(file, paths)
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    arguments = WEB / "adapters.mjs", CONSUMERS / "run_calls.mjs", tmp_path / "request.json"
    found = consume("js", "run_adapters.mjs", *arguments)
    (check_bank if kind == "bank" else check_inputs)(found, text)


def test_a_file_that_node_would_run_without_its_adapters_is_refused(
    text: Written, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    require("js")
    model = lora_fx.rewrite(encoder(), LoraConfig(r=4)).eval()
    lora_fx.export_onnx(model, tmp_path / "m.onnx", MASKED, adapters="inputs")
    request = inputs_request(str(tmp_path / "m.onnx"), {})
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    arguments = WEB / "adapters.mjs", CONSUMERS / "run_calls.mjs", tmp_path / "request.json"
    with pytest.raises(AssertionError, match="each run would be that of the base model"):
        consume("js", "run_adapters.mjs", *arguments)


@in_chromium
@pytest.mark.parametrize("provider", ["wasm", "webgpu"])
@pytest.mark.parametrize("kind", ["bank", "inputs"])
def test_chromium_switches_adapters(
    kind: str, provider: str, text: Written, tmp_path: Path
) -> None:
    require("js")
    for path in (*text.folder.iterdir(), *WEB.iterdir()):
        shutil.copyfile(path, tmp_path / path.name)
    for name in ("adapters.html", "run_calls.mjs"):
        shutil.copyfile(CONSUMERS / name, tmp_path / name)
    query = f"model={kind}.onnx&provider={provider}"
    if kind == "bank":
        request = bank_request("/bank.onnx")
    else:
        request = inputs_request("/inputs.onnx", {name: f"/{name}.onnx_adapter" for name in NAMES})
        query += "&adapters=" + ",".join(f"{name}.onnx_adapter" for name in NAMES)
    request["page"] = query
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    found = browse("adapters.html", provider, tmp_path)
    assert "results" in found, found
    (check_bank if kind == "bank" else check_inputs)(found, text)
    page = found["page"]
    assert page["ready"] == "ready: maths, code"
    session = OnnxSession(text.folder / "bank.onnx", "cpu")
    ids = torch.tensor([[5, 9, 3, 7]] * 3)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = session.run(feeds, adapter=["maths", "code", None])["logits"]
    assert [row[0] for row in page["rows"]] == ["maths", "code", "none"]
    close([[float(n) for n in row[1].split()] for row in page["rows"]], want.numpy())


# --- OpenVINO -------------------------------------------------------------------------------------


def ask_openvino(
    file: Path, calls: list[dict[str, Any]], folder: Path, consume: Callable[..., Any]
) -> list[Any]:
    """The first output of each call, or its error."""
    feeds = {
        f"{n}/{name}": np.asarray(v) for n, call in enumerate(calls) for name, v in call.items()
    }
    np.savez(folder / "calls.npz", **feeds)
    said = consume("openvino", "run_openvino.py", file, folder / "calls.npz", folder / "found.npz")
    found = {key.partition("/")[0]: value for key, value in np.load(folder / "found.npz").items()}
    return [said["errors"].get(str(n), found.get(str(n))) for n in range(len(calls))]


@pytest.mark.parametrize("kind", ["text", "signal"])
def test_openvino_gives_each_row_its_adapter(
    kind: str, tmp_path: Path, consume: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    require("openvino")
    files: Written = request.getfixturevalue(kind)
    numbers = {"maths": 0, "code": 1, None: -1}
    calls: list[dict[str, Any]] = [
        {**MASKED, SLOTS_INPUT: np.array([numbers[name] for name in names])} for names in MIXES
    ]
    calls += [{**MASKED, SLOTS_INPUT: np.array([numbers[name]])} for name in (*NAMES, None)]
    calls += [{**MASKED, SLOTS_INPUT: np.array([0, wrong])} for wrong in WRONG_32]
    calls += [MASKED]
    found = ask_openvino(files.folder / "bank.onnx", calls, tmp_path, consume)
    for names, got in zip(MIXES, found, strict=False):
        close(got, files.mixed(names))
    for name, got in zip((*NAMES, None), found[3:], strict=False):
        close(got, files.wanted[name])
    for got in found[6:9]:
        assert isinstance(got, str) or bool(np.isnan(got[1]).all())
        if not isinstance(got, str):
            close(got[0], files.wanted["maths"][0])
    assert isinstance(found[9], str), "without ids it has to fail"


def test_openvino_takes_factors(text: Written, tmp_path: Path, consume: Callable[..., Any]) -> None:
    require("openvino")
    file = text.folder / "inputs.onnx"
    neutral = manifest_of_file(file).no_adapter()
    values = {name: read_adapter(text.folder / f"{name}.onnx_adapter") for name in NAMES}
    order = ("maths", None, "code")
    calls = [{**MASKED, **neutral, **({} if name is None else values[name])} for name in order]
    found = ask_openvino(file, [*calls, MASKED], tmp_path, consume)
    for name, got in zip(order, found, strict=False):
        close(got, text.wanted[name])
    # It takes an input that is not fed for an empty one, which would be the base model.
    assert isinstance(found[3], str) or bool(np.isnan(found[3]).all())


def test_openvino_has_no_convolutions_with_kernels_of_any_rank(
    signal: Written, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    require("openvino")
    with pytest.raises(AssertionError, match="Doesn't support dynamic weights shape"):
        ask_openvino(signal.folder / "inputs.onnx", [MASKED], tmp_path, consume)


# --- tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bank", "inputs"])
@pytest.mark.parametrize("tool", ["onnxslim", "onnxsim", "int4", "int8"])
def test_rows_are_right_after_a_tool(
    tool: str, kind: str, text: Written, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    require("graph_tools")
    out = tmp_path / "out.onnx"
    consume("graph_tools", "rewrite_onnx.py", tool, text.folder / f"{kind}.onnx", out)
    session = OnnxSession(out, "cpu")
    quantized = tool in ("int4", "int8")
    if kind == "inputs":
        for name in NAMES:
            session.load_adapter(name, text.folder / f"{name}.onnx_adapter")
    for name in (*NAMES, None):
        got = session.run(MASKED, adapter=name)["logits"].numpy()
        if not quantized:
            close(got, text.wanted[name])
        else:  # nearer to this adapter than to any other
            apart = {one: float(np.abs(got - want).max()) for one, want in text.wanted.items()}
            assert min(apart, key=lambda one: apart[one]) == name
    if quantized:
        operators = {node.op_type for node in onnx.load(out).graph.node}
        assert operators & {"MatMulNBits", "MatMulInteger"}
