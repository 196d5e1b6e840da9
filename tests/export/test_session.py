"""Running a file, and every way in which it is refused."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lora_fx.errors import ConfigError, ExportError, ProviderError
from lora_fx.export import providers
from lora_fx.export.adapter_manifest import MANIFEST_KEY
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, features: Tensor, index: Tensor) -> dict[str, Tensor]:
        return {"scores": self.linear(features), "next": index + 1}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Scaled().eval()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> Path:
    target = tmp_path_factory.mktemp("session") / "m.onnx"
    export_onnx(model, target, (torch.randn(2, 4), torch.tensor([1, 5])))
    return target


@pytest.fixture(scope="module")
def session(path: Path) -> OnnxSession:
    return OnnxSession(path, "cpu")


def test_says_what_it_takes_and_where_it_runs(session: OnnxSession) -> None:
    assert session.provider == "cpu"
    assert [str(port) for port in session.inputs] == [
        "features float32[batch, 4]",
        "index int64[batch]",
    ]
    assert [port.name for port in session.outputs] == ["scores", "next"]
    assert "m.onnx" in repr(session)


def test_tensors_in_tensors_out_arrays_in_arrays_out(
    session: OnnxSession, model: nn.Module
) -> None:
    features, index = torch.randn(3, 4), torch.tensor([3, 1, 2])
    expected = model(features, index)
    by_order = session.run((features, index))
    by_name = session.run({"index": index.numpy(), "features": features.numpy()})
    assert isinstance(by_order["scores"], Tensor)
    assert isinstance(by_name["scores"], np.ndarray)
    torch.testing.assert_close(by_order, {key: value.detach() for key, value in expected.items()})
    np.testing.assert_array_equal(by_name["scores"], by_order["scores"].numpy())
    strided = torch.randn(4, 3).T.requires_grad_()
    torch.testing.assert_close(
        session.run((strided, index))["scores"], model.linear(strided).detach()
    )


FEATURES, INDEX = np.zeros((2, 4), np.float32), np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"features": FEATURES}, "lacks index"),
        ({"features": FEATURES, "indx": INDEX}, "lacks index and has 'indx'.*mean 'index'"),
        ((FEATURES,), r"takes 2 inputs \(features, index\), but got 1"),
        ((FEATURES.astype(np.float64), INDEX), "'features' is float64, the file takes float32"),
        ((FEATURES, INDEX.astype(np.int32)), "'index' is int32, the file takes int64"),
        ((FEATURES[0], INDEX), r"'features' has shape \[4\].*\[batch, 4\]"),
        ((FEATURES[:, :3], INDEX), r"'features' has shape \[2, 3\]"),
        (([[0.0] * 4], INDEX), "'features' is a list"),
    ],
)
def test_wrong_inputs_are_named(session: OnnxSession, inputs: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        session.run(inputs)


@pytest.mark.parametrize("where", ["meta", "sparse"])
def test_tensors_without_dense_values(session: OnnxSession, where: str) -> None:
    x = torch.randn(2, 4)
    given = x.to("meta") if where == "meta" else x.to_sparse()
    with pytest.raises(ExportError, match="give a dense tensor"):
        session.run([given, torch.tensor([1, 5])])


def test_tf32_is_for_cuda(path: Path) -> None:
    with pytest.raises(ConfigError, match="tf32=True is for provider='cuda'"):
        OnnxSession(path, "cpu", tf32=True)


def test_options_that_the_cpu_provider_would_ignore_are_refused(path: Path) -> None:
    assert OnnxSession(path, "cpu", provider_options={}).provider == "cpu"
    with pytest.raises(
        ConfigError, match=r"has use_arena, device_id: .*cpu provider has no options"
    ):
        OnnxSession(path, "cpu", provider_options={"use_arena": "0", "device_id": "1"})
    # If this fails, ONNX Runtime has some by now.
    options = [("CPUExecutionProvider", {"use_arena": "nonsense"})]
    stock = onnxruntime.InferenceSession(str(path), providers=options)
    assert stock.get_provider_options() == {"CPUExecutionProvider": {}}


def test_failure_inside_the_runtime_names_the_shapes(
    session: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : out of memory")

    broken = SimpleNamespace(io_binding=session._session.io_binding, run_with_iobinding=fails)
    monkeypatch.setattr(session, "_session", broken, raising=True)
    with pytest.raises(ExportError, match=r"features \[2, 4\], index \[2\]: out of memory"):
        session.run((FEATURES, INDEX))


@pytest.mark.parametrize("content", [b"", b"no model at all", "half"])
def test_damaged_file(tmp_path: Path, path: Path, content: bytes | str) -> None:
    broken = tmp_path / "broken.onnx"
    whole = path.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(ExportError, match=r"broken\.onnx cannot be loaded"):
        OnnxSession(broken, "cpu")


def test_missing_file_and_missing_external_data(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no file .*gone\.onnx"):
        OnnxSession(tmp_path / "gone.onnx", "cpu")
    wide = nn.Linear(64, 64)
    report = export_onnx(wide, tmp_path / "m.onnx", torch.randn(2, 64), external_data_bytes=0)
    (tmp_path / report.data_files[0]).unlink()
    with pytest.raises(ExportError, match=r"m\.onnx cannot be loaded.*external data"):
        OnnxSession(tmp_path / "m.onnx", "cpu")


@pytest.mark.parametrize("name", ["cud", "gpu", "CUDAexecutionprovider", "", ["gpu"]])
def test_unknown_provider(path: Path, name: Any) -> None:
    with pytest.raises(
        ProviderError, match=r"the providers are 'cuda' \(GPUs of NVIDIA\)"
    ) as caught:
        OnnxSession(path, name)
    assert ("Did you mean" in str(caught.value)) is (
        name == "cud"
    )  # "gpu" is no misspelled "webgpu"


@pytest.mark.parametrize("name", ["CPUExecutionProvider", ["CPUExecutionProvider"], ("cpu",)])
def test_names_of_onnx_runtime_and_lists_are_providers_too(
    path: Path, model: nn.Module, name: Any
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    x = torch.randn(2, 4), torch.tensor([1, 2])
    for session in (OnnxSession(path, name), OnnxSession(path, providers=name)):
        assert session.provider == "cpu"
        torch.testing.assert_close(session.run(x)["scores"], model(*x)["scores"].detach())
    assert runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="give one, because lora-fx does not fall back"):
        OnnxSession(path, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ExportError, match="no file"):
        OnnxSession(path.with_name("gone.onnx"), "cuda")  # before the provider starts


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_is_refused_where_there_is_none(path: Path) -> None:
    with pytest.raises(ProviderError) as caught:
        OnnxSession(path, "cuda")
    message = str(caught.value)
    assert "cuda" in message
    assert "pip install" in message or "driver" in message
    assert "CPUExecutionProvider" in message


@pytest.mark.cuda
def test_cuda_runs_what_the_cpu_runs(path: Path, session: OnnxSession) -> None:
    inputs = (torch.randn(3, 4), torch.tensor([3, 1, 2]))
    got = OnnxSession(path, "cuda").run(inputs)
    torch.testing.assert_close(got, session.run(inputs))


def test_session_that_fell_back_is_not_handed_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if every library were there and CUDA failed all the same, which ONNX Runtime does not say.
    monkeypatch.setattr("lora_fx.export.providers.check_provider", lambda runtime, provider: None)
    fell_back = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **options: fell_back)
    with pytest.raises(ProviderError, match=r"asked for cuda.*gave CPUExecutionProvider"):
        OnnxSession(path, "cuda")


def test_provider_that_is_not_compiled_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=r"only CPUExecutionProvider.*lora-fx\[gpu\]"):
        OnnxSession(path, "cuda")


def test_webgpu_has_a_wheel_of_its_own(path: Path) -> None:
    if "WebGpuExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it is here")
    with pytest.raises(ProviderError, match=r"no webgpu provider.*pip install onnxruntime-webgpu"):
        OnnxSession(path, "webgpu")
    with pytest.raises(ConfigError, match="cuda_graph=True is for provider='cuda'"):
        OnnxSession(path, "webgpu", cuda_graph=True)


@pytest.mark.parametrize(
    ("version", "provider", "off"),
    [
        ("1.22.1", "cpu", []),
        ("1.23.2", "cpu", ["FuseFp16InitializerToFp32NodeTransformer"]),
        ("1.28.0", "webgpu", ["FuseFp16InitializerToFp32NodeTransformer"]),
        ("1.28.0", "cuda", []),
        ("1.29.0", "cpu", []),
        ("1.30.0", "cpu", ["SkipLayerNormFusion"]),
        ("1.33.0.dev20261101", "cpu", ["SkipLayerNormFusion"]),
        ("1.31.1", "webgpu", []),
        ("2.0.0", "cpu", ["SkipLayerNormFusion"]),
        ("unknown", "cpu", []),
    ],
)
def test_what_a_version_is_bad_at_is_left_out(
    tmp_path: Path, version: str, provider: str, off: list[str]
) -> None:
    plain, swappable = tmp_path / "plain.onnx", tmp_path / "swappable.onnx"
    plain.write_bytes(b"weights")
    swappable.write_bytes(b"weights" + MANIFEST_KEY.encode() + b"{}")
    assert providers.optimizers_off(version, provider, swappable) == off
    everywhere = {one.name for one in providers.SLOW_OR_BROKEN if not one.mark}
    assert providers.optimizers_off(version, provider, plain) == [
        name for name in off if name in everywhere
    ]
    plain.write_bytes(b"")
    assert set(providers.optimizers_off(version, provider, plain)) <= everywhere


def test_a_session_goes_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.linear(x))

    def operators(name: str) -> set[str]:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / name)
        OnnxSession(tmp_path / "m.onnx", "cpu", session_options=options)
        return {node.op_type for node in onnx.load(tmp_path / name).graph.node}

    export_onnx(Residual(), tmp_path / "m.onnx", torch.randn(2, 3, 8))
    # The version that is installed has the kernel that is slow; another one may not have it.
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    assert "SkipLayerNormalization" not in operators("without.onnx")
    monkeypatch.setattr(onnxruntime, "__version__", "1.29.0")
    assert "SkipLayerNormalization" in operators("with.onnx")


def test_both_wheels_at_once_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    assert "both installed" in providers.wheel_conflict()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=r"onnxruntime 1\.2\.3 and onnxruntime-gpu 1\.2\.3"):
        OnnxSession(path, "cuda")


def test_missing_driver_and_missing_libraries_have_different_remedies(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: sys.stdout.write("noise"), raising=False
    )
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    for missing, remedy in ((["libcuda.so.1"], "NVIDIA driver"), (["libcudart.so.13"], "cudnn")):
        monkeypatch.setattr(providers, "missing_cuda_libraries", lambda _, names=missing: names)
        with pytest.raises(ProviderError, match=f"{missing[0]} cannot be loaded.*{remedy}"):
            OnnxSession(path, "cuda")


def test_without_onnxruntime(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"pip install 'lora-fx\[gpu\]'"):
        OnnxSession(path, "cpu")
    # What pip uninstall of one of the two wheels leaves of the other.
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(ProviderError, match="damaged"):
        OnnxSession(path, "cpu")


def test_needed_libraries_are_read_from_the_provider() -> None:
    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not library.is_file():
        pytest.skip("this wheel has no CUDA provider")
    needed = providers._needed(library)
    assert any(name.startswith("libcudart.so") for name in needed)
    assert any(name.startswith("libcublas.so") for name in needed)


def test_bf16_goes_through_a_file(tmp_path: Path) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1)

    export_onnx(Double(), tmp_path / "m.onnx", torch.randn(2, 4).bfloat16(), verify=False)
    try:
        session = OnnxSession(tmp_path / "m.onnx", "cpu")
    except ProviderError:
        pytest.skip("no bf16 kernel on this CPU provider")
    x = torch.randn(3, 4).bfloat16()
    assert torch.equal(session.run(x)["output"], x.reshape(-1))
    array = session.run(session.run(x)["output"].reshape(3, 4).contiguous())["output"]
    assert array.dtype == torch.bfloat16


def test_bf16_on_a_cpu_says_what_it_takes(tmp_path: Path) -> None:
    model = nn.Linear(4, 2).bfloat16()
    export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4).bfloat16(), verify=False)
    with pytest.raises(ProviderError, match=r"bf16 needs provider='cuda'.*dtype='fp32' or 'fp16'"):
        OnnxSession(tmp_path / "m.onnx", "cpu")


def test_a_folder_is_no_file(path: Path) -> None:
    with pytest.raises(ExportError, match=r"is a folder, which holds m\.onnx: give the file"):
        OnnxSession(path.parent, "cpu")


def test_sizes_that_do_not_go_together_are_named(tmp_path: Path, session: OnnxSession) -> None:
    message = r"m\.onnx has one 'batch' for axis 0 of 'features' and axis 0 of 'index', and they have 3 and 2"
    with pytest.raises(ExportError, match=message):
        session.run((torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)))

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table[: x.shape[1]]

    report = export_onnx(Positions(), tmp_path / "p.onnx", torch.randn(2, 5, 4))
    assert report.axis_limits == {"sequence": 6}
    limited = OnnxSession(tmp_path / "p.onnx", "cpu")
    assert limited.run(torch.zeros(1, 6, 4))["output"].shape == (1, 6, 4)
    with pytest.raises(ExportError, match=r"axis 1 of 'x' has 7, .* at most 6 \('sequence'\)"):
        limited.run(torch.zeros(1, 7, 4))


def test_options_of_the_session_are_those_that_were_given(path: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = OnnxSession(path, "cpu", session_options=options)
    assert session._session.get_session_options().intra_op_num_threads == 1
    assert (tmp_path / "optimized.onnx").is_file()
    assert session.placement().nodes  # what the session itself asks for is there as well
    with pytest.raises(ConfigError, match="session_options is a dict: give an onnxruntime"):
        OnnxSession(path, "cpu", session_options={"intra_op_num_threads": 1})
