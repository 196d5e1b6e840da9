"""What stands for no adapter: zeros of rank 1 in the file, and nothing of rank 0 wherever it comes from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig, OnnxSession
from lora_fx.errors import ParityError
from lora_fx.export import verify
from lora_fx.export.adapter_file import manifest_of_file
from lora_fx.export.adapter_manifest import MANIFEST_KEY, SiteInputs
from lora_fx.export.factor_model import FactorModel, random_factors
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import filled_up
from tests.export.swapping import adapted, ids

TARGETS = ["einsum", "left", "fc"]


class Raw(nn.Module):
    """An einsum, a weight on the left, a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.einsum = nn.Parameter(torch.randn(6, 6) / 3)
        self.left = nn.Parameter(torch.randn(6, 6) / 3)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bsd,de->bse", x, self.einsum).tanh()
        return self.fc((self.left @ x.mT).mT.tanh())


def model() -> nn.Module:
    return lora_fx.rewrite(Raw().eval(), LoraConfig(r=2, target_modules=TARGETS)).eval()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("raw") / "m.onnx"
    report = export_onnx(model(), target, torch.randn(2, 3, 6), adapters="inputs")
    assert report.inputs == {"x": ("batch", "sequence", 6)}
    return target


def of_rank_zero(path: Path, target: Path) -> Path:
    """The same file as earlier versions wrote it."""
    proto = onnx.load(path)
    names = set(manifest_of_file(path).inputs)
    for one in proto.graph.initializer:
        if one.name in names:
            axis = 0 if one.name.endswith("lora_B.weight") else 1
            array = onnx.numpy_helper.to_array(one)
            empty = np.take(array, np.zeros(0, np.int64), axis)
            one.CopyFrom(onnx.numpy_helper.from_array(empty, one.name))
    for entry in proto.metadata_props:
        if entry.key == MANIFEST_KEY:
            data = json.loads(entry.value)
            assert data.pop("runs_alone")
            entry.value = json.dumps(data)
    onnx.save(proto, target)
    return target


def base(x: Tensor) -> Tensor:
    with torch.no_grad():
        return Raw()(x)


def test_the_file_alone_is_the_base_also_after_a_large_adapter(path: Path) -> None:
    session = OnnxSession(path, "cpu")
    manifest = manifest_of_file(path)
    shapes = {one.name: tuple(one.dims) for one in onnx.load(path).graph.initializer}
    assert {name: shapes[name] for name in manifest.inputs} == {
        f"{site}.lora_{role}.weight": shape
        for site in TARGETS
        for role, shape in (("A", (6, 1)), ("B", (1, 6)))
    }
    loud = {name: 100 * value for name, value in random_factors(manifest, 5).items()}
    session.load_adapter("loud", loud)
    for shape in ((2, 3, 6), (1, 7, 6), (3, 1, 6)):
        x = torch.randn(shape)
        for _ in range(3):
            torch.testing.assert_close(session.run(x)["output"], base(x), rtol=1e-5, atol=1e-5)
            assert session.run(x, adapter="loud")["output"].isfinite().all()


def test_a_file_of_rank_zero_runs_with_zeros_of_rank_one(path: Path, tmp_path: Path) -> None:
    old = of_rank_zero(path, tmp_path / "old.onnx")
    assert not manifest_of_file(old).runs_alone
    session = OnnxSession(old, "cpu")
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(session.run(x)["output"], base(x), rtol=1e-5, atol=1e-5)
    values = random_factors(manifest_of_file(old), 3)
    new = OnnxSession(path, "cpu")
    for name, chosen in (
        ("all", values),
        # An adapter at one place: the others have none.
        ("one", {name: value for name, value in values.items() if name.startswith("fc.")}),
    ):
        for one in (session, new):
            one.load_adapter(name, chosen)
        for choice in (name, {name: -0.5}, {}):
            torch.testing.assert_close(
                session.run(x, adapter=choice)["output"], new.run(x, adapter=choice)["output"]
            )
        session.unload_adapter(name)
        torch.testing.assert_close(session.run(x)["output"], base(x), rtol=1e-5, atol=1e-5)


def test_in_processes_of_their_own(path: Path, tmp_path: Path) -> None:
    # Rank 0 in an Einsum is the end of the process; so it is here, for what runs the old file as it is.
    old = of_rank_zero(path, tmp_path / "old.onnx")
    ours = "from lora_fx import OnnxSession as S; r = S(sys.argv[1], 'cpu').run(x)['output']"
    stock = (
        "import onnxruntime as o; "
        "r, = o.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider']).run(None, {'x': x})"
    )
    codes = {}
    for name, how, file in (("ours", ours, old), ("new", stock, path), ("stock", stock, old)):
        script = (
            f"import sys, numpy as np; x = np.ones((2, 3, 6), np.float32); {how}; print(r[0, 0, 0])"
        )
        ran = subprocess.run(
            [sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False
        )
        codes[name] = ran.returncode
        if name != "stock":
            assert ran.returncode == 0, ran.stderr
            assert abs(float(ran.stdout) - float(base(torch.ones(2, 3, 6))[0, 0, 0])) < 1e-5
    assert codes["stock"] != 0  # else ONNX Runtime has mended it, and this file may go


def test_no_adapter_has_a_rank_and_a_cuda_graph_fills_it_up() -> None:
    linear = SiteInputs("fc", "linear", "float32", (6, None), (None, 4), 4, gain=True)
    conv = SiteInputs("c", "conv", "float32", (None, 3, 3), (6, None, 1), 6, groups=2)
    for site in (linear, conv):
        assert site.least_rank == site.groups
        for one in site.inputs():
            assert 0 not in one.sized(site.least_rank)
            whole = filled_up(site, one, None, 3)
            assert 0 not in whole.shape
            assert (whole == one.neutral).all()


# --- what the comparison sees ---------------------------------------------------------------------


def test_memory_that_is_never_written_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it was: rank 0, with a weight on the left of a MatMul. It passed in a fresh process.
    monkeypatch.setattr(SiteInputs, "least_rank", property(lambda self: 0))

    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w = nn.Parameter(torch.randn(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.w @ x

    left = lora_fx.rewrite(Left().eval(), LoraConfig(r=2, target_modules=["w"]))
    with pytest.raises(ParityError):
        export_onnx(left, tmp_path / "m.onnx", torch.randn(2, 6, 5), adapters="inputs")
    assert not list(tmp_path.iterdir())


def test_the_file_alone_is_compared_again_after_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirty: list[str] = []
    run = OnnxSession.run

    def left_over(self: OnnxSession, inputs: Any, *, adapter: Any = None) -> dict[str, Any]:
        found = run(self, inputs, adapter=adapter)
        if adapter is not None:
            dirty.append(adapter)
        return {k: v + 1 if dirty and adapter is None else v for k, v in found.items()}

    monkeypatch.setattr(OnnxSession, "run", left_over)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    message = "alone, after a run with a random adapter of rank 3: output"
    with pytest.raises(ParityError, match=message):
        export_onnx(
            net, tmp_path / "m.onnx", torch.randn(2, 4), adapters="inputs", dynamic_shapes={}
        )
    assert not list(tmp_path.iterdir())


def test_the_traced_model_does_not_judge_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_with_factors = FactorModel.call_with_factors

    def doubled(self: FactorModel, factors: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        twice = [
            2 * one if place.role == "B" else one
            for place, one in zip(self.adapter_inputs, factors, strict=True)
        ]
        return call_with_factors(self, twice, call, *args, **kwargs)

    monkeypatch.setattr(FactorModel, "call_with_factors", doubled)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    with pytest.raises(ParityError, match="with a random adapter of rank 3: output"):
        export_onnx(
            net, tmp_path / "m.onnx", torch.randn(2, 4), adapters="inputs", dynamic_shapes={}
        )


def test_every_place_is_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    init = verify._Adapted.__init__

    def seen(self: Any, *args: Any) -> None:
        init(self, *args)
        made.append(self._dense)

    monkeypatch.setattr(verify._Adapted, "__init__", seen)
    # Lookups, attention, convolutions, DoRA, biases on B, parts: nothing is judged unmerged.
    export_onnx(adapted(), tmp_path / "m.onnx", ids(2, 7), adapters="inputs")
    assert len(made) == 2
    assert all(isinstance(one, nn.Module) for one in made)
    assert not [name for one in made for name, _ in one.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("optimize", ["standard", "none"])
def test_no_operator_reads_a_factor_in_fp16_directly(tmp_path: Path, optimize: Any) -> None:
    # ONNX Runtime 1.23 to 1.28 would take it for a constant, cast, and end the process.
    target = tmp_path / "m.onnx"
    options = {"adapters": "inputs", "dtype": "fp16", "optimize": optimize}
    export_onnx(model(), target, torch.randn(2, 3, 6), **options)
    graph = onnx.load(target).graph
    factors = {value.name for value in graph.input if "lora_" in value.name}
    readers = [node.op_type for node in graph.node if factors & set(node.input)]
    assert readers == ["Reshape"] * len(factors)
    assert len(factors) == 6
