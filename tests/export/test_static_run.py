"""Fixed shapes and addresses, zero copies, and where nodes run: on the CPU, and on CUDA if it is there."""

from __future__ import annotations

import gc
import logging
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig, OnnxSession
from lora_fx.errors import CheckpointError, ConfigError, ExportError
from lora_fx.export import ort
from lora_fx.export import providers as loading
from lora_fx.export.adapter_manifest import Manifest, SiteInputs
from lora_fx.export.adapter_store import weighted_sum
from lora_fx.export.onnx import export_onnx
from lora_fx.export.ort import CPU, to_runtime, to_tensor
from lora_fx.export.providers import (
    NodePlacement,
    PlacementReport,
    read_placement,
    warn_of_work,
)
from lora_fx.export.session import MAX_SHAPES, StaticRunner, filled_up
from tests.export.swapping import trained

EXACT = {"rtol": 1e-5, "atol": 1e-6}


class Branches(nn.Module):
    """A grouped convolution, a layer that adds, and outputs of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        y = self.fc(self.grouped(x).transpose(1, 2))
        y = torch.where(keep[:, None, None], y, torch.zeros_like(y))
        return {"y": y, "kept": keep.logical_not(), "count": keep.long() + 1}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    targets = ["grouped", "fc"]
    config = LoraConfig(r=4, target_modules=targets, rank_pattern={"fc": 3})
    model = lora_fx.rewrite(Branches().eval(), config, adapter_name="first")
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=targets, use_dora=True), "second")
    return trained(model)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> Path:
    target = tmp_path_factory.mktemp("static") / "m.onnx"
    export_onnx(model, target, inputs(2, 5), adapters="inputs")
    return target


def inputs(batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, length, generator=generator)
    return {"x": x, "keep": torch.arange(batch) % 2 == 0}


def loaded(session: OnnxSession, model: nn.Module) -> OnnxSession:
    for name in ("first", "second"):
        session.load_adapter(name, model, adapter_name=name)
    return session


@pytest.fixture
def static(path: Path, model: nn.Module) -> OnnxSession:
    """As with cuda_graph=True, but for the capture, which the CPU provider does not do."""
    session = loaded(OnnxSession(path, "cpu", max_rank=8), model)
    manifest = session._store.manifest
    options = session.outputs, manifest, 8, CPU, session.path
    session._static = StaticRunner(onnxruntime, session._session, *options)
    return session


CHOICES: tuple[Any, ...] = ("first", None, "second", {"first": 0.5, "second": 2.0}, "first")


def test_runs_from_buffers_give_what_other_runs_give(
    static: OnnxSession, path: Path, model: nn.Module
) -> None:
    free = loaded(OnnxSession(path, "cpu"), model)
    kept = []
    for turn, choice in enumerate(CHOICES):
        for batch, length in ((2, 5), (3, 7)):
            x = inputs(batch, length, turn)
            got, want = static.run(x, adapter=choice), free.run(x, adapter=choice)
            torch.testing.assert_close(got, want, **EXACT)
            kept.append((got, {name: value.clone() for name, value in got.items()}))
    # What was handed out is the caller's: later runs do not write into it.
    torch.testing.assert_close([one for one, _ in kept], [two for _, two in kept], rtol=0, atol=0)


def test_addresses_stay_and_adapters_are_written_only_when_they_change(
    static: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = static._static
    assert runner is not None
    static.run(inputs(2, 5), adapter="first")
    addresses = {name: value.data_ptr() for name, value in runner._factors.items()}
    assert {tuple(value.shape()) for value in runner._factors.values()} == {
        *((8, 2, 3), (6, 4, 1), (6, 8), (8, 4), (6,), (4,))
    }
    (graph,) = runner._graphs.values()
    bound = [value.data_ptr() for value in (*graph.inputs.values(), *graph.outputs)]
    written: list[int] = []
    write = ort.write
    monkeypatch.setattr(
        ort,
        "write",
        lambda buffer, value: (written.append(buffer.data_ptr()), write(buffer, value)),
    )
    static.run(inputs(2, 5, 1), adapter="first")
    assert not set(written) & set(addresses.values())
    static.run(inputs(2, 5, 1), adapter="second")
    assert set(addresses.values()) <= set(written)
    assert addresses == {name: value.data_ptr() for name, value in runner._factors.items()}
    assert list(runner._graphs.values()) == [graph]
    assert bound == [value.data_ptr() for value in (*graph.inputs.values(), *graph.outputs)]


def test_an_error_leaves_no_half_written_adapter(
    static: OnnxSession, path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    static.run(inputs(2, 5), adapter="first")
    with monkeypatch.context() as patched:
        calls = iter(range(100))

        def fails(buffer: Any, value: Tensor) -> None:
            if next(calls) == 2:
                raise RuntimeError("no memory")

        patched.setattr(ort, "write", fails)
        with pytest.raises(ExportError, match=r"failed on .*in a graph: no memory"):
            static.run(inputs(2, 5), adapter="second")
    want = loaded(OnnxSession(path, "cpu"), model).run(inputs(2, 5), adapter="first")
    torch.testing.assert_close(static.run(inputs(2, 5), adapter="first"), want, **EXACT)


def test_so_many_shapes_and_no_more(static: OnnxSession) -> None:
    for length in range(1, MAX_SHAPES + 1):
        static.run(inputs(1, length))
    with pytest.raises(ExportError, match="16 combinations of input shapes"):
        static.run(inputs(1, 30))
    assert static.run(inputs(1, 3))["y"].shape == (1, 3, 4)


def test_threads_share_the_buffers(static: OnnxSession, path: Path, model: nn.Module) -> None:
    free = loaded(OnnxSession(path, "cpu"), model)
    choices = ["first", "second", None]
    want = [free.run(inputs(2, 5, n), adapter=one) for n, one in enumerate(choices)]
    wrong: list[Any] = []

    def work(number: int) -> None:
        for _ in range(20):
            got = static.run(inputs(2, 5, number), adapter=choices[number])
            if not torch.allclose(got["y"], want[number]["y"], **EXACT):
                wrong.append(choices[number])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(choices))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_a_factor_is_filled_up_with_zeros_group_by_group() -> None:
    site = SiteInputs("c", "conv", "float32", (None, 2, 1), (6, None, 1), 6, groups=2, gain=True)
    a, b, gain = site.inputs()
    value = torch.arange(8.0).reshape(4, 2, 1)
    whole = filled_up(site, a, value, max_rank=5)  # 6: the next multiple of the groups
    assert whole.shape == (6, 2, 1)
    assert torch.equal(whole.view(2, 3, 2)[:, :2], value.view(2, 2, 2))
    assert not whole.view(2, 3, 2)[:, 2:].any()
    up = filled_up(site, b, torch.ones(6, 2, 1), max_rank=5)
    assert up.shape == (6, 3, 1)
    assert torch.equal(up[0, :, 0], torch.tensor([1.0, 1.0, 0.0]))
    assert torch.equal(filled_up(site, gain, None, 5), torch.ones(6))
    assert torch.equal(filled_up(site, gain, torch.full((6,), 3.0), 5), torch.full((6,), 3.0))
    assert not filled_up(site, a, None, 5).any()


def test_a_weighted_sum_of_half_values_is_rounded_once() -> None:
    site = SiteInputs("l", "linear", "bfloat16", (3, None), (None, 2), 2, bias=True, gain=True)
    manifest = Manifest("", (site,))
    a, b, bias, gain = (one.name for one in site.inputs())
    parts = [
        (
            {
                a: torch.randn(3, rank).bfloat16(),
                b: torch.randn(rank, 2).bfloat16(),
                bias: torch.randn(2).bfloat16(),
                gain: 1 + torch.randn(2) / 8,
            },
            weight,
        )
        for rank, weight in ((2, 0.3), (1, -1.7))
    ]
    total = weighted_sum(manifest, parts)
    assert total[a].shape == (3, 3)
    exact = sum(w * one[a].double() @ one[b].double() for one, w in parts)
    torch.testing.assert_close(total[a].double() @ total[b].double(), exact, rtol=0.01, atol=0.02)
    want = 1 + sum(w * (one[gain].double() - 1) for one, w in parts)
    torch.testing.assert_close(total[gain], want.float())
    assert total[gain].dtype == torch.float32
    assert total[bias].dtype == torch.bfloat16


# --- no copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3, 4),
        torch.tensor([True, False]),
        torch.ones(2, 3).bfloat16(),
        torch.ones(2).half(),
        torch.arange(3),
        torch.tensor(5),
        torch.zeros(3, 0),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}",
)
def test_values_share_their_memory_both_ways(value: Tensor) -> None:
    held = to_runtime(onnxruntime, value)
    back = to_tensor(held)
    assert held.shape() == list(value.shape)
    assert back.dtype == value.dtype
    assert back.shape == value.shape
    assert torch.equal(back, value)
    if value.numel():
        assert held.data_ptr() == value.data_ptr() == back.data_ptr()


def test_outputs_outlive_their_session(path: Path, model: nn.Module) -> None:
    session = loaded(OnnxSession(path, "cpu"), model)
    got = session.run(inputs(2, 5), adapter="first")
    kept = {name: value.clone() for name, value in got.items()}
    del session
    gc.collect()
    [torch.randn(1000) for _ in range(100)]
    torch.testing.assert_close(got, kept, rtol=0, atol=0)
    assert {name: str(value.dtype) for name, value in got.items()} == {
        "y": "torch.float32",
        "kept": "torch.bool",
        "count": "torch.int64",
    }


def test_inputs_that_are_read_only_strided_or_want_gradients(path: Path) -> None:
    session = OnnxSession(path, "cpu")
    x, keep = inputs(2, 5).values()
    want = session.run((x, keep))["y"]
    strided = x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    assert torch.equal(session.run((strided, keep))["y"], want)
    frozen = x.numpy().copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(session.run((frozen, keep.numpy()))["y"], want.numpy())


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph=True is for provider='cuda', found 'cpu'"),
        ({"max_rank": 0}, "max_rank is 0"),
    ],
)
def test_arguments_that_contradict(path: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnnxSession(path, "cpu", **options)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a session on CUDA asks ONNX Runtime for; it gets one on the CPU."""
    options: dict[str, str] = {}

    def load(runtime: Any, path: Path, provider: str, given: dict[str, str], settings: Any) -> Any:
        options.update(given)
        return real(runtime, path, "cpu", {}, settings)

    real = loading.load
    monkeypatch.setattr("lora_fx.export.providers.load", load)
    return options


def test_options_are_passed_on(path: Path, asked: dict[str, str]) -> None:
    OnnxSession(path, "cuda")
    assert asked == {"use_tf32": "0"}
    OnnxSession(path, "cuda", tf32=True, provider_options={"device_id": "1"})
    assert asked == {"use_tf32": "1", "device_id": "1"}
    OnnxSession(path, "cuda", provider_options={"use_tf32": "1", "device_id": "0"})
    assert asked["use_tf32"] == "1"
    OnnxSession(path, "cuda", cuda_graph=True, max_rank=4)
    assert asked["enable_cuda_graph"] == "1"
    with pytest.raises(ConfigError, match=r"m\.onnx takes adapters.*give max_rank"):
        OnnxSession(path, "cuda", cuda_graph=True)


# --- where nodes run ------------------------------------------------------------------------------


def test_all_of_it_runs_on_the_cpu(path: Path) -> None:
    report = OnnxSession(path, "cpu").placement()
    assert list(report.counts) == ["CPUExecutionProvider"]
    assert "Conv" in {node.operator for node in report.nodes}
    assert report.elsewhere == ()
    assert "nodes on CPUExecutionProvider" in str(report)


def test_work_on_the_cpu_beside_cuda_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def node(name: str, kind: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, op_type=kind)

    parts = [
        ("CUDAExecutionProvider", [node("m", "MatMul"), node("a", "Add")]),
        ("CPUExecutionProvider", [node("s", "Shape"), node("g", "Gather"), node("n", "NonZero")]),
    ]
    session = SimpleNamespace(
        get_provider_graph_assignment_info=lambda: [
            SimpleNamespace(ep_name=name, get_nodes=lambda nodes=nodes: nodes)
            for name, nodes in parts
        ]
    )
    report = read_placement(session, "CUDAExecutionProvider")
    assert report.counts == {"CUDAExecutionProvider": 2, "CPUExecutionProvider": 3}
    assert report.elsewhere == (NodePlacement("n", "NonZero", "CPUExecutionProvider"),)
    assert "  NonZero n on CPUExecutionProvider" in str(report)
    with caplog.at_level(logging.WARNING, "lora_fx"):
        warn_of_work(session, "CUDAExecutionProvider", "m.onnx")
    assert "m.onnx: 1 nodes have no kernel on CUDAExecutionProvider" in caplog.text
    caplog.clear()
    parts[1][1].pop()
    warn_of_work(session, "CUDAExecutionProvider", "m.onnx")
    assert not caplog.text


def test_a_runtime_that_does_not_say_where() -> None:
    with pytest.raises(ExportError, match="update it"):
        read_placement(SimpleNamespace(), "CPUExecutionProvider")
    warn_of_work(SimpleNamespace(), "CUDAExecutionProvider", "m.onnx")
    assert PlacementReport((), "CPUExecutionProvider").counts == {}


# --- on CUDA --------------------------------------------------------------------------------------


def on_cuda(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in values.items()}


@pytest.mark.cuda
def test_cuda_tensors_stay_on_the_device(path: Path, model: nn.Module) -> None:
    session = loaded(OnnxSession(path, "cuda"), model)
    free = loaded(OnnxSession(path, "cpu"), model)
    for choice in CHOICES:
        x = inputs(3, 6)
        got = session.run(on_cuda(x), adapter=choice)
        assert all(value.is_cuda for value in got.values())
        want = free.run(x, adapter=choice)
        torch.testing.assert_close({k: v.cpu() for k, v in got.items()}, want, **EXACT)
        torch.testing.assert_close(session.run(x, adapter=choice), want, **EXACT)
    held = session._store.chosen("first").bound.values.values()
    assert {value.device_name() for value in held} == {"cuda"}
    assert session.placement().elsewhere == ()


@pytest.mark.cuda
def test_a_cuda_graph_is_captured_and_replayed_with_other_adapters(
    path: Path, model: nn.Module
) -> None:
    session = loaded(OnnxSession(path, "cuda", cuda_graph=True, max_rank=8), model)
    free = loaded(OnnxSession(path, "cpu"), model)
    for turn, choice in enumerate(CHOICES * 2):
        for batch in (2, 3):
            x = inputs(batch, 5, turn)
            want = free.run(x, adapter=choice)
            torch.testing.assert_close(session.run(x, adapter=choice), want, **EXACT)
            got = session.run(on_cuda(x), adapter=choice)
            torch.testing.assert_close({k: v.cpu() for k, v in got.items()}, want, **EXACT)
    wide = lora_fx.rewrite(Branches(), LoraConfig(r=16, target_modules=["fc"]))
    with pytest.raises(CheckpointError, match="max_rank=8"):
        session.load_adapter("wide", wide)


@pytest.mark.cuda
def test_tf32_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    layer = nn.Linear(512, 512)
    export_onnx(layer, tmp_path / "m.onnx", torch.randn(2, 512))
    x = torch.randn(64, 512)
    exact = layer.double()(x.double())
    errors = {
        tf32: float(
            (OnnxSession(tmp_path / "m.onnx", "cuda", tf32=tf32).run(x)["output"] - exact)
            .abs()
            .max()
        )
        for tf32 in (False, True)
    }
    assert errors[False] < 1e-5
    assert math.isfinite(errors[True])
    assert errors[True] > errors[False]
