"""Files on the WebGPU provider of ONNX Runtime, on a Vulkan driver that may compute on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runtimes.conftest import ROOT, require
from tests.runtimes.files import Case, case, check

pytestmark = [pytest.mark.runtime, pytest.mark.filterwarnings("ignore")]

WEBGPU = "WebGpuExecutionProvider"
DRIVERS = [Path("/usr/share/vulkan/icd.d"), Path("/etc/vulkan/icd.d")]

# What must not leave the device: one product there and back costs more than it takes.
PRODUCTS = {"MatMul", "Gemm", "MatMulNBits", "FusedMatMul", "GroupQueryAttention", "Softmax"}


RUNTIMES = sorted(one.stem for one in (ROOT / "tests/runtimes/requirements").glob("webgpu*.txt"))


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    """The newest build with WebGPU, and the oldest."""
    require(request.param)
    if not any(folder.glob("*.json") for folder in DRIVERS if folder.is_dir()):
        pytest.skip("there is no Vulkan driver; Debian's package mesa-vulkan-drivers has one")
    return str(request.param)


def on_device(
    consume: Callable[..., Any], runtime: str, one: Case, folder: Path, tolerance: float
) -> None:
    placed = check(
        one,
        consume,
        runtime,
        folder,
        provider=WEBGPU,
        cache="webgpu",
        tolerance=tolerance,
    )
    assert PRODUCTS & set(placed[WEBGPU])
    assert not PRODUCTS & set(placed.get("CPUExecutionProvider", []))


# A new form of files joins here.
@pytest.mark.parametrize("adapters", ["merge", "inputs", "bank"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("optimize", ["standard", "runtime"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_file_gives_what_pytorch_does(
    runtime: str,
    dtype: str,
    optimize: str,
    kind: str,
    adapters: str,
    tmp_path: Path,
    consume: Callable[..., Any],
) -> None:
    options = {"dtype": dtype, "optimize": optimize}
    if optimize == "runtime":
        options["provider"] = "webgpu"
    one = case(kind, adapters, tmp_path, **options)
    on_device(consume, runtime, one, tmp_path, 2e-2 if dtype == "fp16" else 1e-4)


@pytest.mark.parametrize("scheme", ["nf4", "int4 torchao", "int8 torchao"])
def test_quantized_weights_give_what_pytorch_does(
    runtime: str, scheme: str, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    on_device(consume, runtime, case(scheme, "inline", tmp_path), tmp_path, 1e-3)
