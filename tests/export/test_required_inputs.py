"""Files for consumers that know no inputs with a default: what has to be fed, and what tools do."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor, nn

import lora_fx
from lora_fx import ConfigError, ExportError, LoraConfig, OnnxSession
from lora_fx.export.adapter_file import manifest_of_file
from lora_fx.export.adapter_manifest import SLOTS_INPUT
from lora_fx.export.fuse import ADAPTER_NODES_KEY
from lora_fx.export.inspection import State, examine_file, metadata_of
from lora_fx.export.onnx import export_onnx
from lora_fx.export.report import ExportReport

EXACT = {"rtol": 1e-5, "atol": 1e-6}


class Net(nn.Module):
    """A lookup, products of three dimensions and of two, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.down(self.up(x).relu()))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    places = {"target_modules": ["embed", "up", "down", "head"], "init_lora_weights": False}
    model = lora_fx.rewrite(Net().eval(), LoraConfig(r=4, **places), adapter_name="maths")
    dora = {**places, "target_modules": ["up", "head"], "use_dora": True}
    lora_fx.add_adapter(model, LoraConfig(r=2, **dora), "code")
    return model.eval()


X = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]])
ROWS = [0, -1, 1]


@pytest.fixture(scope="module")
def wanted(model: nn.Module) -> dict[int, Tensor]:
    """What PyTorch gives for all rows, by the number of the adapter."""
    rows = {}
    for number, name in enumerate(("maths", "code")):
        lora_fx.set_adapter(model, name)
        with torch.no_grad():
            rows[number] = model(X)
    with torch.no_grad(), lora_fx.disable_adapter(model):
        rows[-1] = model(X)
    assert not torch.allclose(rows[0], rows[-1], atol=0.05)
    assert not torch.allclose(rows[1], rows[-1], atol=0.05)
    return rows


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, model: nn.Module
) -> dict[str, tuple[Path, ExportReport]]:
    folder = tmp_path_factory.mktemp("files")
    made = {}
    for name, options in {
        "bank": {"adapters": "bank"},
        "fixed": {"adapters": "bank", "required_inputs": True},
        "inputs": {"adapters": "inputs"},
        "required": {"adapters": "inputs", "required_inputs": True},
    }.items():
        path = folder / f"{name}.onnx"
        made[name] = path, export_onnx(model, path, {"ids": X[:2]}, **options)
    return made


def mixed(wanted: dict[int, Tensor]) -> Tensor:
    return torch.stack([wanted[number][row] for row, number in enumerate(ROWS)])


def stock(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def rows_of(path: Path, ids: list[int]) -> Tensor:
    feeds = {"ids": X.numpy(), SLOTS_INPUT: np.array(ids, np.int64)}
    return torch.from_numpy(stock(path).run(None, feeds)[0])


# --- what has to be fed ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bank", "fixed"])
def test_a_bank_does_not_run_without_ids(
    kind: str, files: dict[str, tuple[Path, ExportReport]], wanted: dict[int, Tensor]
) -> None:
    path = files[kind][0]
    with pytest.raises(ValueError, match=f"Required inputs.*{SLOTS_INPUT}"):
        stock(path).run(None, {"ids": X.numpy()})
    torch.testing.assert_close(rows_of(path, ROWS), mixed(wanted), **EXACT)
    session = OnnxSession(path, "cpu")
    assert [port.name for port in session.inputs] == ["ids"]
    got = session.run(X, adapter=["maths", None, "code"])["output"]
    torch.testing.assert_close(got, mixed(wanted), **EXACT)
    torch.testing.assert_close(session.run(X)["output"], wanted[-1], **EXACT)


def test_a_session_loads_further_adapters_unless_those_of_the_file_are_constants(
    files: dict[str, tuple[Path, ExportReport]], model: nn.Module, wanted: dict[int, Tensor]
) -> None:
    session = OnnxSession(files["bank"][0], "cpu")
    session.load_adapter("again", model, adapter_name="code")
    got = session.run(X, adapter=["maths", None, "again"])["output"]
    torch.testing.assert_close(got, mixed(wanted), **EXACT)
    path, report = files["fixed"]
    graph = onnx.load(path).graph
    assert {value.name for value in graph.input} == {"ids", SLOTS_INPUT}
    assert report.bank is not None
    assert report.bank.capacity == 2
    fixed = OnnxSession(path, "cpu")
    assert fixed.adapters == ("maths", "code")
    for change in (
        lambda: fixed.load_adapter("again", model, adapter_name="code"),
        lambda: fixed.unload_adapter("code"),
    ):
        with pytest.raises(
            ConfigError, match=r"are constants .it was exported with required_inputs"
        ):
            change()


def test_required_factors_are_fed_by_a_session_and_missed_by_others(
    files: dict[str, tuple[Path, ExportReport]], model: nn.Module, wanted: dict[int, Tensor]
) -> None:
    path = files["required"][0]
    graph = onnx.load(path).graph
    assert not {value.name for value in graph.input} & {tensor.name for tensor in graph.initializer}
    with pytest.raises(ValueError, match="Required inputs"):
        stock(path).run(None, {"ids": X.numpy()})
    session = OnnxSession(path, "cpu")
    assert [port.name for port in session.inputs] == ["ids"]
    torch.testing.assert_close(session.run(X)["output"], wanted[-1], **EXACT)
    for number, name in enumerate(("maths", "code")):
        session.load_adapter(name, model, adapter_name=name)
        torch.testing.assert_close(session.run(X, adapter=name)["output"], wanted[number], **EXACT)


def test_a_factor_without_a_rank_gives_nan(files: dict[str, tuple[Path, ExportReport]]) -> None:
    """OpenVINO takes inputs that are not fed for empty ones."""
    path = files["required"][0]
    ports = stock(path).get_inputs()
    entries = manifest_of_file(path).inputs
    ones = {
        port.name: np.ones(entries[port.name].sized(2), np.float32)
        for port in ports
        if port.name != "ids"
    }
    axes = {name: entries[name].rank_axis for name in ones}
    empty = {
        name: value if axes[name] is None else value.take([], axes[name])
        for name, value in ones.items()
    }
    (got,) = stock(path).run(None, {"ids": X.numpy(), **empty})
    assert bool(np.isnan(got).all())
    gains = {name: value[:0] for name, value in ones.items() if axes[name] is None}
    assert gains
    for name, value in gains.items():
        with pytest.raises(Exception, match="Can broadcast 0"):
            stock(path).run(None, {"ids": X.numpy(), **ones, name: value})


# --- ids that no adapter has ----------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [2, 3, 10**9, 2**63 - 1])
@pytest.mark.parametrize("kind", ["bank", "fixed"])
def test_an_id_out_of_range_is_an_error(
    kind: str, wrong: int, files: dict[str, tuple[Path, ExportReport]]
) -> None:
    with pytest.raises(Exception, match="out of data bounds"):
        rows_of(files[kind][0], [0, wrong, 1])


def test_where_no_runtime_checks_the_row_is_nan(
    tmp_path: Path, files: dict[str, tuple[Path, ExportReport]], wanted: dict[int, Tensor]
) -> None:
    """The lookup that raises is replaced by one that wraps, as a runtime without a check may do."""
    proto = onnx.load(files["fixed"][0])
    (ranges,) = [node.output[0] for node in proto.graph.node if node.op_type == "Range"]
    (lookup,) = [
        node for node in proto.graph.node if node.op_type == "Gather" and node.input[0] == ranges
    ]
    size = onnx.helper.make_node("Size", [ranges], ["slots_size"])
    wraps = onnx.helper.make_node("Mod", [lookup.input[1], "slots_size"], ["wrapped"])
    index = list(proto.graph.node).index(lookup)
    lookup.input[1] = "wrapped"
    proto.graph.node.insert(index, wraps)
    proto.graph.node.insert(index, size)
    onnx.save(proto, tmp_path / "wraps.onnx")
    for wrong in (2, 3, 10**9, 2**63 - 1):
        got = rows_of(tmp_path / "wraps.onnx", [0, wrong, 1])
        assert bool(got[1].isnan().all())
        torch.testing.assert_close(got[0], wanted[0][0], **EXACT)
        torch.testing.assert_close(got[2], wanted[1][2], **EXACT)
    assert bool(rows_of(tmp_path / "wraps.onnx", [7]).isnan().all())
    torch.testing.assert_close(rows_of(tmp_path / "wraps.onnx", [-9]), wanted[-1], **EXACT)


def test_the_reference_of_onnx_gives_the_rows(
    files: dict[str, tuple[Path, ExportReport]], wanted: dict[int, Tensor]
) -> None:
    evaluator = ReferenceEvaluator(str(files["fixed"][0]))
    (got,) = evaluator.run(None, {"ids": X.numpy(), SLOTS_INPUT: np.array(ROWS)})
    torch.testing.assert_close(torch.from_numpy(got), mixed(wanted), **EXACT)


# --- tools that take inputs out -------------------------------------------------------------------


def without_defaults(source: Path, target: Path) -> Path:
    """What onnxslim, onnxsim and graphsurgeon do: inputs that have a default become constants."""
    proto = onnx.load(source)
    stored = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.input if value.name not in stored]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    onnx.save(proto, target)
    return target


def test_a_file_that_lost_its_inputs_is_refused(
    tmp_path: Path, files: dict[str, tuple[Path, ExportReport]]
) -> None:
    path = without_defaults(files["inputs"][0], tmp_path / "slim.onnx")
    with pytest.raises(ExportError, match=r"lacks .* every run would be that of the base model"):
        OnnxSession(path, "cpu")
    found = {one.name: one for one in examine_file(path)}
    assert found["inputs"].state is State.PROBLEM
    assert "required_inputs=True" in found["inputs"].remedy


def test_a_bank_keeps_its_adapters_and_loads_no_others(
    tmp_path: Path,
    files: dict[str, tuple[Path, ExportReport]],
    model: nn.Module,
    wanted: dict[int, Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = without_defaults(files["bank"][0], tmp_path / "slim.onnx")
    torch.testing.assert_close(rows_of(path, ROWS), mixed(wanted), **EXACT)
    with caplog.at_level(logging.WARNING, "lora_fx"):
        session = OnnxSession(path, "cpu")
    assert "loads no others" in caplog.text
    got = session.run(X, adapter=["maths", None, "code"])["output"]
    torch.testing.assert_close(got, mixed(wanted), **EXACT)
    with pytest.raises(ConfigError, match="a tool took them for constants"):
        session.load_adapter("again", model, adapter_name="code")
    found = {one.name: one for one in examine_file(path)}
    assert found["inputs"].state is State.OK
    assert found["further adapters"].state is State.NOTE


@pytest.mark.parametrize("kind", ["fixed", "required"])
def test_files_without_defaults_lose_nothing(
    kind: str, tmp_path: Path, files: dict[str, tuple[Path, ExportReport]]
) -> None:
    path = without_defaults(files[kind][0], tmp_path / "slim.onnx")
    assert {value.name for value in onnx.load(path).graph.input} == {
        value.name for value in onnx.load(files[kind][0]).graph.input
    }
    found = {one.name: one for one in examine_file(path)}
    assert found["inputs"].state is State.OK
    assert "without defaults" in found["inputs"].detail


# --- quantizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bank", "fixed", "inputs", "required"])
@pytest.mark.parametrize("tool", ["dynamic", "nbits"])
def test_quantizers_leave_out_the_nodes_in_the_list(
    tool: str, kind: str, tmp_path: Path, files: dict[str, tuple[Path, ExportReport]]
) -> None:
    source, report = files[kind]
    listed = json.loads(metadata_of(onnx.load(source))[ADAPTER_NODES_KEY])
    assert tuple(listed) == report.adapter_nodes
    path = tmp_path / "quantized.onnx"
    if tool == "dynamic":
        quantize_dynamic(source, path, nodes_to_exclude=listed)
    else:
        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, nodes_to_exclude=listed)
        quantizer.process()
        onnx.save(quantizer.model.model, path)
    before, after = (
        {
            t.name: (t.data_type, tuple(t.dims))
            for t in onnx.load(one).graph.initializer
            if "lora_" in t.name
        }
        for one in (source, path)
    )
    assert before == after
    assert any("quant" in t.name or "_Q4" in t.name for t in onnx.load(path).graph.initializer)
    assert {one.name: one for one in examine_file(path)}["inputs"].state is State.OK
    session = OnnxSession(path, "cpu")
    assert session.run(X)["output"].shape == (3, 4)


def test_a_merged_file_has_no_such_nodes(tmp_path: Path, model: nn.Module) -> None:
    report = export_onnx(model, tmp_path / "m.onnx", {"ids": X})
    assert report.adapter_nodes == ()
    assert ADAPTER_NODES_KEY not in report.metadata
    inline = export_onnx(model, tmp_path / "m.onnx", {"ids": X}, adapters="inline")
    assert inline.adapter_nodes


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize(
    ("adapters", "required"),
    [("merge", False), ("inputs", True), ("inputs", False), ("bank", False)],
)
def test_an_export_is_quantized(
    scheme: str, adapters: str, required: bool, tmp_path: Path, model: nn.Module
) -> None:
    path = tmp_path / "m.onnx"
    lora_fx.set_adapter(model, "maths")
    report = export_onnx(
        model, path, {"ids": X}, adapters=adapters, required_inputs=required, quantize=scheme
    )
    (form,) = report.quantized
    assert (form.scheme, form.weights) == (scheme, 3)
    assert form.bits < (6 if scheme == "int4" else 10)
    assert report.operators[form.operator] == 3
    assert report.parity[0].tolerance == {"int4": 0.5, "int8": 0.1}[scheme]
    assert "quantizing" in report.seconds
    session = OnnxSession(path, "cpu")
    with torch.no_grad():
        want = model(X)
        with lora_fx.disable_adapter(model):
            base = model(X)
    if adapters == "merge":
        got = session.run(X)["output"]
    else:
        if adapters == "inputs":
            session.load_adapter("maths", model, adapter_name="maths")
        got = session.run(X, adapter="maths")["output"]
    # The adapter is applied: the error is far below its effect.
    assert (got - want).norm() < 0.25 * (want - base).norm()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"required_inputs": True}, "is of adapters='inputs' and adapters='bank'"),
        ({"required_inputs": True, "adapters": "merge"}, "is of adapters='inputs' and"),
        ({"required_inputs": True, "adapters": "bank", "max_adapters": 4}, "max_adapters is for"),
        (
            {"required_inputs": True, "adapters": "inputs", "target": "genai"},
            "genai runs a file without",
        ),
        ({"quantize": "int3"}, "give 'int4', 'int8' or None"),
        ({"quantize": "int4", "optimize": "runtime"}, "Leave optimize out"),
        ({"quantize": "int8", "dtype": "fp16"}, "in half precision"),
        ({"quantize": "int4", "dtype": "bf16"}, "in half precision"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: dict[str, object], says: str, tmp_path: Path, model: nn.Module
) -> None:
    path = tmp_path / "m" if "target" in options else tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=says):
        export_onnx(model, path, {"ids": X}, **options)
    assert list(tmp_path.iterdir()) == []


def test_constants_need_adapters(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="it has none"):
        export_onnx(Net().eval(), tmp_path / "m.onnx", X, adapters="bank", required_inputs=True)


def test_a_quantized_model_and_one_without_products_are_refused(tmp_path: Path) -> None:
    quantized = lora_fx.quantize(Net().eval(), "int4")
    with pytest.raises(ExportError, match="quantized already"):
        export_onnx(quantized, tmp_path / "m.onnx", X, quantize="int4")
    with pytest.raises(ExportError, match="has a constant matrix: leave it out"):
        export_onnx(
            nn.Sequential(nn.LayerNorm(4)), tmp_path / "m.onnx", torch.ones(2, 4), quantize="int8"
        )
