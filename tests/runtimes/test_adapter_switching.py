"""Adapters in runtimes that know no inputs with a default: each row has its adapter, or there is an error."""

from __future__ import annotations

import json
import re
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
from lora_fx import ConfigError, ExportError, LoraConfig, OnnxSession
from lora_fx.export.adapter_file import manifest_of_file, read_adapter
from lora_fx.export.adapter_manifest import SLOTS_INPUT
from tests.runtimes.conftest import CONSUMERS, ROOT
from tests.runtimes.files import MASKED, encoder
from tests.runtimes.test_browser import browse, in_chromium
from tests.runtimes.test_genai import llama

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
    """A model with two adapters, its bank and its swappable file, and what PyTorch gives for all rows.

    Attributes:
        folder: The folder of the files.
        wanted: Outputs by name of the adapter, None for the base.
        heads: True if each adapter has its own head, and the swappable file therefore no base.
    """

    folder: Path
    wanted: dict[str | None, np.ndarray[Any, Any]]
    heads: bool = False

    def mixed(self, names: list[str | None]) -> np.ndarray[Any, Any]:
        return np.stack([self.wanted[name][row] for row, name in enumerate(names)])


PLACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "encoder": ({}, {}),
    "convolutions": ({"target_modules": ["embed", "conv", "head"]},) * 2,
    "kernels": ({"target_modules": ["head"], "modules_to_save": ["conv"]},) * 2,
    "heads": (
        # MASKED has all these tokens, some of them in the rows of other adapters.
        {
            "modules_to_save": ["classifier", "LayerNorm"],
            "trainable_token_indices": {"word_embeddings": [9, 2]},
        },
        {
            "modules_to_save": ["classifier", "LayerNorm"],
            "trainable_token_indices": {"word_embeddings": [2]},
        },
    ),
}


def randomize(model: nn.Module) -> None:
    """Changes all that the active adapter trains."""
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))


def written(folder: Path, kind: str) -> Written:
    torch.manual_seed(0)
    base = encoder() if kind in ("encoder", "heads") else Convolves().eval()
    first, second = PLACES[kind]
    model = lora_fx.rewrite(base, LoraConfig(r=4, **first), adapter_name="maths").eval()
    lora_fx.add_adapter(model, LoraConfig(r=2, **second), "code")
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
    write(model, folder, MASKED)
    return Written(folder, wanted, heads="modules_to_save" in first)


def write(model: nn.Module, folder: Path, example: Any, **options: Any) -> None:
    """Writes a bank, a swappable file without defaults, and the adapters."""
    lora_fx.export_onnx(model, folder / "bank.onnx", example, adapters="bank", **options)
    options |= {"adapters": "inputs", "required_inputs": True}
    lora_fx.export_onnx(model, folder / "inputs.onnx", example, **options)
    for name in NAMES:
        path = folder / f"{name}.onnx_adapter"
        lora_fx.save_onnx_adapter(model, path, base=folder / "inputs.onnx", adapter_name=name)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(tmp_path_factory.mktemp("text"), "encoder")


@pytest.fixture(scope="module")
def signal(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(tmp_path_factory.mktemp("signal"), "convolutions")


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Adapters with heads, norms and trained tokens."""
    return written(tmp_path_factory.mktemp("heads"), "heads")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Adapters with a convolution that is trained in full."""
    return written(tmp_path_factory.mktemp("kernels"), "kernels")


@pytest.fixture
def files(request: pytest.FixtureRequest) -> Written:
    """The fixture of a name: parametrize it indirectly."""
    named: Written = request.getfixturevalue(request.param)
    return named


with_heads = pytest.mark.parametrize("files", ["text", "heads"], indirect=True)


def close(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    error = np.abs(np.reshape(np.array(found, np.float64), np.shape(wanted)) - wanted).max()
    assert error <= tolerance * np.abs(wanted).max()


# --- JavaScript -----------------------------------------------------------------------------------

MIXES: list[list[str | None]] = [["maths", "code"], [None, "maths"], ["code", None]]


def tensors(feeds: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: {"type": "int64", "dims": list(value.shape), "data": value.reshape(-1).tolist()}
        for name, value in feeds.items()
    }


def bank_request(file: str) -> dict[str, Any]:
    calls: list[dict[str, Any]] = [{"feeds": tensors(MASKED), "adapter": names} for names in MIXES]
    calls += [{"feeds": tensors(MASKED), "adapter": name} for name in (*NAMES, None)]
    calls += [
        {"feeds": tensors({**MASKED, SLOTS_INPUT: torch.tensor([0, wrong])}), "raw": True}
        for wrong in WRONG
    ]
    calls += [
        {"feeds": tensors(MASKED), "raw": True},
        {"feeds": tensors(MASKED), "adapter": "absent"},
    ]
    calls += [{"feeds": tensors(MASKED), "adapter": ["maths"]}]
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
        {"feeds": tensors(MASKED), "adapter": name} for name in ("maths", None, "code", "maths")
    ]
    calls += [
        {"feeds": tensors(MASKED), "raw": True},
        {"feeds": tensors(MASKED), "adapter": ["maths", "code"]},
    ]
    return {"file": file, "adapters": adapters, "calls": calls, "page": {}}


def check_inputs(found: dict[str, Any], written: Written) -> None:
    results = found["results"]
    for name, result in zip(("maths", None, "code", "maths"), results, strict=False):
        if name is None and written.heads:
            assert "has no base" in result["error"]
        else:
            close(result["logits"], written.wanted[name])
    assert re.search(r"lora_|classifier", results[4]["error"])
    assert "export a bank" in results[5]["error"]


def in_node(request: dict[str, Any], folder: Path, consume: Callable[..., Any]) -> Any:
    """What adapters.mjs gives for a request in Node."""
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    arguments = WEB / "adapters.mjs", CONSUMERS / "run_calls.mjs", folder / "request.json"
    return consume("js", "run_adapters.mjs", *arguments)


def in_browser(request: dict[str, Any], provider: str, written: Path, folder: Path) -> Any:
    """What adapters.mjs gives for a request in Chromium, and what the page shows."""
    for path in (*written.iterdir(), *WEB.iterdir()):
        shutil.copyfile(path, folder / path.name)
    for name in ("adapters.html", "run_calls.mjs"):
        shutil.copyfile(CONSUMERS / name, folder / name)
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    found = browse("adapters.html", provider, folder)
    assert "results" in found, found
    return found


@with_heads
@pytest.mark.parametrize("kind", ["bank", "inputs"])
@pytest.mark.runtime("js")
def test_node_switches_adapters(
    kind: str, files: Written, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    file = str(files.folder / f"{kind}.onnx")
    request = bank_request(file)
    if kind == "inputs":
        paths = {name: str(files.folder / f"{name}.onnx_adapter") for name in NAMES}
        request = inputs_request(file, paths)
    found = in_node(request, tmp_path, consume)
    (check_bank if kind == "bank" else check_inputs)(found, files)


@pytest.mark.runtime("js")
def test_a_file_that_node_would_run_without_its_adapters_is_refused(
    tmp_path: Path, consume: Callable[..., Any]
) -> None:
    model = lora_fx.rewrite(encoder(), LoraConfig(r=4)).eval()
    lora_fx.export_onnx(model, tmp_path / "m.onnx", MASKED, adapters="inputs")
    request = inputs_request(str(tmp_path / "m.onnx"), {})
    with pytest.raises(AssertionError, match="each run would be that of the base model"):
        in_node(request, tmp_path, consume)


@in_chromium
@with_heads
@pytest.mark.parametrize("provider", ["wasm", "webgpu"])
@pytest.mark.parametrize("kind", ["bank", "inputs"])
@pytest.mark.runtime("js")
def test_chromium_switches_adapters(
    kind: str, provider: str, files: Written, tmp_path: Path
) -> None:
    query = f"model={kind}.onnx&provider={provider}"
    if kind == "bank":
        request = bank_request("/bank.onnx")
    else:
        request = inputs_request("/inputs.onnx", {name: f"/{name}.onnx_adapter" for name in NAMES})
        query += "&adapters=" + ",".join(f"{name}.onnx_adapter" for name in NAMES)
    request["page"] = query
    found = in_browser(request, provider, files.folder, tmp_path)
    (check_bank if kind == "bank" else check_inputs)(found, files)
    page = found["page"]
    assert page["ready"] == "ready: maths, code"
    names: list[str | None] = [*NAMES, None]
    if kind == "inputs" and files.heads:
        names.remove(None)
    session = OnnxSession(files.folder / "bank.onnx", "cpu")
    ids = torch.tensor([[5, 9, 3, 7]] * len(names))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = session.run(feeds, adapter=names)["logits"]
    assert [row[0] for row in page["rows"]] == [name or "none" for name in names]
    close([[float(n) for n in row[1].split()] for row in page["rows"]], want.numpy())


# --- generation in JavaScript ---------------------------------------------------------------------

# The second prompt is padded on the left.
PROMPTS = {
    "input_ids": torch.tensor([[5, 9, 3, 7], [0, 8, 2, 9]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
}
NEW = 8


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A decoder whose adapters have heads and trained tokens; what is wanted are tokens."""
    torch.manual_seed(0)
    places: dict[str, Any] = {"modules_to_save": ["lm_head"]}
    base = llama(eos_token_id=None)
    config = LoraConfig(r=4, trainable_token_indices={"embed_tokens": [9, 2]}, **places)
    model = lora_fx.rewrite(base, config, adapter_name="maths").eval()
    config = LoraConfig(r=2, trainable_token_indices={"embed_tokens": [9]}, **places)
    lora_fx.add_adapter(model, config, "code")
    wanted: dict[str | None, Any] = {}
    for name in NAMES:
        lora_fx.set_adapter(model, name)
        randomize(model)
        wanted[name] = model.generate(**PROMPTS, max_new_tokens=NEW, do_sample=False)[:, 4:].numpy()
    with lora_fx.disable_adapter(model):
        wanted[None] = model.generate(**PROMPTS, max_new_tokens=NEW, do_sample=False)[:, 4:].numpy()
    assert len({tuple(row) for tokens in wanted.values() for row in tokens.tolist()}) == 6
    folder = tmp_path_factory.mktemp("speech")
    write(model, folder, PROMPTS["input_ids"], task="text-generation")
    return Written(folder, wanted, heads=True)


def generation_request(file: str, adapters: dict[str, str]) -> dict[str, Any]:
    cache = {"type": "float32", "dims": [2, 2, 0, 8], "data": []}
    names = [f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    feeds = {**tensors(PROMPTS), **dict.fromkeys(names, cache)}
    chosen = NAMES if adapters else (*NAMES, None, *MIXES)
    calls = [{"feeds": feeds, "adapter": adapter, "new": NEW} for adapter in chosen]
    return {"file": file, "adapters": adapters, "calls": calls}


def check_generation(found: dict[str, Any], written: Written, kind: str) -> None:
    chosen: tuple[Any, ...] = NAMES if kind == "inputs" else (*NAMES, None, *MIXES)
    assert len(found["results"]) == len(chosen)
    for adapter, result in zip(chosen, found["results"], strict=True):
        names = adapter if isinstance(adapter, list) else [adapter] * 2
        assert result == {"tokens": written.mixed(names).tolist()}


@pytest.mark.parametrize("kind", ["bank", "inputs"])
@pytest.mark.runtime("js")
def test_node_generates_with_adapters(
    kind: str, speech: Written, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    paths = {name: str(speech.folder / f"{name}.onnx_adapter") for name in NAMES}
    file = str(speech.folder / f"{kind}.onnx")
    request = generation_request(file, paths if kind == "inputs" else {})
    check_generation(in_node(request, tmp_path, consume), speech, kind)


@in_chromium
@pytest.mark.parametrize("provider", ["wasm", "webgpu"])
@pytest.mark.parametrize("kind", ["bank", "inputs"])
@pytest.mark.runtime("js")
def test_chromium_generates_with_adapters(
    kind: str, provider: str, speech: Written, tmp_path: Path
) -> None:
    paths = {name: f"/{name}.onnx_adapter" for name in NAMES}
    request = generation_request(f"/{kind}.onnx", paths if kind == "inputs" else {})
    check_generation(in_browser(request, provider, speech.folder, tmp_path), speech, kind)


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


@pytest.mark.parametrize("files", ["text", "signal", "heads", "kernels"], indirect=True)
@pytest.mark.runtime("openvino")
def test_openvino_gives_each_row_its_adapter(
    files: Written, tmp_path: Path, consume: Callable[..., Any]
) -> None:
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


@pytest.mark.parametrize("files", ["text", "heads", "kernels"], indirect=True)
@pytest.mark.runtime("openvino")
def test_openvino_takes_factors(
    files: Written, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    file = files.folder / "inputs.onnx"
    neutral = manifest_of_file(file).no_adapter()
    values = {name: read_adapter(files.folder / f"{name}.onnx_adapter") for name in NAMES}
    order = ("maths", None, "code", "maths")
    calls = [{**MASKED, **neutral, **({} if name is None else values[name])} for name in order]
    whole = {**MASKED, **values["maths"]}
    # A convolution has a kernel and a bias of fixed sizes: without one, any memory is taken for it.
    required = [name for name in values["maths"] if not name.startswith("conv.")]
    lacking = [{key: whole[key] for key in whole if key != name} for name in required]
    found = ask_openvino(file, [*calls, MASKED, *lacking], tmp_path, consume)
    for name, got in zip(order, found, strict=False):
        if name is not None or not files.heads:
            close(got, files.wanted[name])
        elif "conv.weight" not in whole:  # the neutral values have no head
            assert isinstance(got, str) or bool(np.isnan(got).all())
    # It takes an input that is not fed for an empty one: all of them would be the base model.
    for got in found[4:]:
        assert isinstance(got, str) or bool(np.isnan(got).all())


@pytest.mark.runtime("openvino")
def test_openvino_has_no_convolutions_with_kernels_of_any_rank(
    signal: Written, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    with pytest.raises(AssertionError, match="Doesn't support dynamic weights shape"):
        ask_openvino(signal.folder / "inputs.onnx", [MASKED], tmp_path, consume)


# --- tools ----------------------------------------------------------------------------------------


@with_heads
@pytest.mark.parametrize("kind", ["bank", "inputs"])
@pytest.mark.parametrize("tool", ["onnxslim", "onnxsim", "int4", "int8"])
@pytest.mark.runtime("graph_tools")
def test_rows_are_right_after_a_tool(
    tool: str, kind: str, files: Written, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    out = tmp_path / "out.onnx"
    consume("graph_tools", "rewrite_onnx.py", tool, files.folder / f"{kind}.onnx", out)
    session = OnnxSession(out, "cpu")
    quantized = tool in ("int4", "int8")
    if kind == "inputs":
        for name in NAMES:
            session.load_adapter(name, files.folder / f"{name}.onnx_adapter")
    no_base = kind == "inputs" and files.heads
    if no_base:
        with pytest.raises(ConfigError, match="has no base"):
            session.run(MASKED)
    choices: list[Any] = [*NAMES] if no_base else [*NAMES, None]
    if kind == "bank" and files.heads and tool == "onnxslim":
        # It gives adapter_ids the axis of the batch, so that there has to be one for each row.
        with pytest.raises(ExportError, match="re-use buffer"):
            session.run(MASKED, adapter="maths")
        choices = [[name] * 2 for name in choices]
    for choice in choices:
        name = choice[0] if isinstance(choice, list) else choice
        got = session.run(MASKED, adapter=choice)["logits"].numpy()
        if not quantized:
            close(got, files.wanted[name])
        else:  # nearer to this adapter than to any other
            apart = {one: float(np.abs(got - want).max()) for one, want in files.wanted.items()}
            assert min(apart, key=lambda one: apart[one]) == name
    if kind == "bank" and not quantized:
        for names in MIXES:
            close(session.run(MASKED, adapter=names)["logits"].numpy(), files.mixed(names))
    if quantized:
        operators = {node.op_type for node in onnx.load(out).graph.node}
        assert operators & {"MatMulNBits", "MatMulInteger"}
