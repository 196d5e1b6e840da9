"""The doctor: what it finds here, and on machines that are put together wrong."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import ExportError, ProviderError
from lora_fx.export import providers
from lora_fx.tools import threads
from lora_fx.tools.cli import doctor
from lora_fx.tools.cli.doctor import EXTRAS, Finding, State, examine


def found(name: str) -> Finding:
    return next(finding for finding in examine() if finding.name == name)


def test_it_finds_the_versions() -> None:
    # The version of a wheel has no build in it.
    assert found("torch").detail.partition("+")[0] == torch.__version__.partition("+")[0]
    assert found("lora-fx").state is State.OK


def test_the_extras_are_those_of_the_project(root: Path) -> None:
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    optional = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        listed = {re.split(r"[\[<>=; ]", entry)[0] for entry in optional[extra]} - {"lora-fx"}
        assert set(packages) == listed, extra
    assert set(optional) - set(EXTRAS) == {"test", "lint"}


def test_threads_that_are_slower_than_one_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "slowdown", lambda: 1.05)
    assert found("threads").state is State.OK
    monkeypatch.setattr(threads, "slowdown", lambda: 1.8)
    assert found("threads").state is State.NOTE
    assert "1.8 times as long as one" in found("threads").remedy
    assert "OMP_NUM_THREADS=1" in found("threads").remedy


def test_the_measurement_of_threads_leaves_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        # A clock on which a step takes 3 seconds with two threads, and 2 with one.
        clock = iter([second for turn in range(100) for second in (0, 2 + (turn % 2 == 0))])
        monkeypatch.setattr(threads.time, "perf_counter", lambda: next(clock))
        assert threads.slowdown() == 1.5
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert threads.slowdown() == 1
    finally:
        torch.set_num_threads(before)


def test_both_wheels_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "wheel_conflict", lambda: "uninstall both")
    assert found("wheels").state is State.PROBLEM
    assert found("wheels").remedy == "uninstall both"


def test_a_missing_library_is_a_problem_only_with_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(providers, "missing_cuda_libraries", lambda runtime: ["libcublas.so.99"])
    if not any(finding.topic == "CUDA libraries" for finding in examine()):
        pytest.skip("this ONNX Runtime has no CUDA provider")
    for device, state in ((True, State.PROBLEM), (False, State.NOTE)):
        monkeypatch.setattr(doctor, "_has_device", lambda device=device: device)
        assert found("libcublas.so.99").state is state


def test_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ProviderError("it is not installed")

    version = doctor._version
    monkeypatch.setattr(providers, "import_onnxruntime", missing)
    assert found("onnxruntime").state is State.PROBLEM  # installed, and cannot be imported
    monkeypatch.setattr(
        doctor, "_version", lambda package: "" if "onnxruntime" in package else version(package)
    )
    assert found("onnxruntime").state is State.NOTE
    assert found("gpu").remedy == "pip install 'lora-fx[gpu]'"


def test_a_missing_base_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "")
    assert found("networkx").state is State.PROBLEM
    assert found("networkx").remedy == "pip install networkx"


def _exported(path: Path, **options: Any) -> Path:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2))
    lora_fx.export_onnx(adapted, path, torch.randn(2, 32), **options)
    return path


def _problems(path: Path) -> list[Finding]:
    return [one for one in doctor.examine_file(path) if one.state is State.PROBLEM]


def test_a_file_is_looked_at(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    merged = _exported(tmp_path / "merged.onnx", external_data_bytes=0)
    assert not _problems(merged)
    assert doctor.examine_file(merged)[-1].detail == "none: the file takes no adapters"
    swappable = _exported(tmp_path / "swappable.onnx", adapters="inputs")
    assert not _problems(swappable)
    assert doctor.examine_file(swappable)[-1].detail == "2 at 1 sites"
    data = next(tmp_path.glob("merged.onnx.*.data"))
    data.write_bytes(data.read_bytes()[:10])
    assert [one.name for one in _problems(merged)] == [data.name]
    data.unlink()
    assert _problems(merged)[0].detail == "missing"
    with pytest.raises(ExportError, match="there is no file"):
        doctor.examine_file(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf")
    with pytest.raises(ExportError, match="damaged"):
        doctor.examine_file(tmp_path / "bad.onnx")


def _with_external(path: Path, *, inner: bool = False, shape: int = 4, **where: str) -> Path:
    """A file with one tensor of four bytes an element elsewhere, in the graph or in a branch of it."""
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[shape])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in where.items():
        tensor.external_data.add(key=key, value=value)
    named = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [shape])
        for name in ("x", "y")
    }
    add = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([add], "g", [named["x"]], [named["y"]], [tensor])
    if inner:
        branch = onnx.helper.make_graph([add], "branch", [], [named["y"]], [tensor])
        which = onnx.helper.make_tensor_value_info("which", onnx.TensorProto.BOOL, [])
        same = onnx.helper.make_node("Identity", ["x"], ["y"])
        other = onnx.helper.make_graph([same], "other", [], [named["y"]])
        node = onnx.helper.make_node("If", ["which"], ["y"], then_branch=branch, else_branch=other)
        graph = onnx.helper.make_graph([node], "g", [which, named["x"]], [named["y"]])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


def test_the_formats_are_named_with_their_libraries() -> None:
    found = {(one.name, one.detail) for one in examine() if one.topic == "formats"}
    assert ("bitsandbytes", "NF4, FP4, LLM.int8()") in found
    assert ("gptqmodel", "GPTQ, AWQ") in found
    assert ("hqq", "HQQ") in found


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"location": "d"}, ""),
        ({"location": "d", "offset": "0", "length": "16"}, ""),
        ({"location": "gone"}, "missing"),
        ({"location": "d", "offset": "a"}, "invalid literal"),
        ({"location": "d", "offset": "-4"}, "non-negative"),
        ({"location": "d", "offset": "4"}, "16 bytes, where the weights need 20"),
        ({"location": "d", "length": "12"}, "12 bytes in d, where its shape needs 16"),
        ({}, "16 bytes in no file"),
        ({"location": "../d"}, "outside"),
    ],
)
def test_weights_in_other_files_are_looked_at(
    where: dict[str, str], says: str, inner: bool, tmp_path: Path
) -> None:
    (tmp_path / "data").write_bytes(b"0" * 16)
    (tmp_path / "d").symlink_to(tmp_path / "data")
    found = _problems(_with_external(tmp_path / "model.onnx", inner=inner, **where))
    assert len(found) == bool(says)
    assert not says or says in found[0].detail


def test_a_file_without_bytes_is_no_model(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ExportError, match="is empty"):
        doctor.examine_file(tmp_path / "empty.onnx")


def test_factors_that_a_tool_has_folded_away_are_a_problem(tmp_path: Path) -> None:
    import onnx

    runtime = pytest.importorskip("onnxruntime")
    swappable = _exported(tmp_path / "swappable.onnx", adapters="inputs")
    # A tool that wants constants: the inputs that have defaults are no inputs any more, and are folded.
    model = onnx.load(swappable)
    kept = [one for one in model.graph.input if "lora" not in one.name]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.save(model, tmp_path / "constants.onnx")
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    runtime.InferenceSession(
        tmp_path / "constants.onnx", options, providers=["CPUExecutionProvider"]
    )
    for name in ("constants", "folded"):
        (problem,) = _problems(tmp_path / f"{name}.onnx")
        assert "2 of 2 at 1 sites are gone" in problem.detail
        assert "an adapter would change nothing" in problem.remedy
    dropped = onnx.load(swappable)
    del dropped.metadata_props[:]
    onnx.save(dropped, tmp_path / "dropped.onnx")
    (problem,) = _problems(tmp_path / "dropped.onnx")
    assert (problem.name, "export again" in problem.remedy) == ("metadata", True)
