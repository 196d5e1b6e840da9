"""Optional packages that are missing: each error has the command that installs them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    LoraFxError,
    ProviderError,
    QuantizationError,
)
from lora_fx.extras import check_installed, install_command, is_installed, load_optional

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("lora_fx", "passes", "export", "tools")


@pytest.mark.parametrize(
    ("requirements", "command"),
    [
        (["lora-fx[quant]"], "pip install 'lora-fx[quant]'"),
        (["lightning"], "pip install lightning"),
        (["lora-fx[gpu]", "lora-fx[cpu]"], "pip install 'lora-fx[gpu]', or 'lora-fx[cpu]'"),
        (["bitsandbytes>=0.49"], "pip install 'bitsandbytes>=0.49'"),
    ],
)
def test_the_command(requirements: list[str], command: str) -> None:
    assert install_command(*requirements) == command


def test_a_package_that_is_there() -> None:
    assert load_optional("json", "this test", "lora-fx[cli]") is sys.modules["json"]
    check_installed(["json", "torch"], "this test", "lora-fx[cli]")


def test_a_package_that_is_missing() -> None:
    assert not is_installed("there_is_no_such_package")
    message = (
        r"^this test needs there_is_no_such_package, which cannot be imported "
        r"\(No module .*\): pip install 'lora-fx\[cli\]'$"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        load_optional("there_is_no_such_package.inner", "this test", "lora-fx[cli]")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(ExportError, match=r"^this test needs no_a, no_b: pip install lightning$"):
        check_installed(["json", "no_b", "no_a"], "this test", "lightning", error=ExportError)


@pytest.mark.parametrize("reason", [OSError("libx.so: no such file"), RuntimeError("no CUDA")])
def test_a_package_that_does_not_load(
    reason: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"raise {type(reason).__name__}({str(reason)!r})\n"
    (tmp_path / "broken_package.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ProviderError, match=f"cannot be imported .{reason}.: pip install x"):
        load_optional("broken_package", "this test", "x", error=ProviderError)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def file(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.touch()
    return path


def export(folder: Path) -> None:
    lora_fx.export_onnx(net(), folder / "model.onnx", torch.randn(2, 64))


def stops_at_words(folder: Path) -> None:
    from lora_fx.export.generation import _stop_criteria
    from lora_fx.export.generation_settings import GenerationSettings

    _stop_criteria(GenerationSettings(stop_strings=["."]), Tokenizer())


def streams(folder: Path) -> None:
    from lora_fx.export.generation import _pieces

    next(_pieces(None, Tokenizer(), {}))  # type: ignore[arg-type]  # the call comes later


class Tokenizer:
    """Looks like a tokenizer, with no library behind it."""

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: Any) -> str:
        return ""


def reads_an_array_in_bf16(folder: Path) -> None:
    from lora_fx.export import ort

    runtime = pytest.importorskip("onnxruntime")
    ort.unwrap(ort.to_runtime(runtime, torch.ones(2, dtype=torch.bfloat16)), None)


def examines(folder: Path) -> None:
    from lora_fx.export.inspection import examine_file

    examine_file(file(folder))


def loads(name: str) -> Callable[[Path], Any]:
    def load(folder: Path) -> None:
        from lora_fx.tools.models import load_model

        (folder / "config.json").write_text("{}", encoding="utf-8")
        load_model(name.format(folder))

    return load


def reads_gguf(folder: Path) -> None:
    (folder / "model.gguf").write_bytes(b"GGUF")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)).to("meta")
    lora_fx.quantize(model, "int8", weights=folder / "model.gguf")


def reads_yaml(folder: Path) -> None:
    from lora_fx.tools.cli.options import _parse_yaml

    _parse_yaml("r: 4")


def reads_a_tokenizer(folder: Path) -> None:
    from lora_fx.tools.cli.onnx_commands import _tokenizer

    _tokenizer(folder)


def demonstrates(folder: Path) -> None:
    from lora_fx.tools.demo import QUICK, run_demo

    run_demo(folder, QUICK, None)  # type: ignore[arg-type]  # nothing is told before it begins


ONNX, RUNTIME = r"'lora-fx\[onnx\]'", r"'lora-fx\[gpu\]', or 'lora-fx\[cpu\]'"
HF = r"'lora-fx\[hf\]'"
CASES: dict[str, tuple[str, Callable[[Path], Any], type[LoraFxError], str]] = {
    "nf4": (
        "bitsandbytes",
        lambda _: lora_fx.quantize(net(), "nf4"),
        QuantizationError,
        r"'lora-fx\[quant\]'",
    ),
    "int8": (
        "torchao",
        lambda _: lora_fx.quantize(net(), "int8"),
        QuantizationError,
        r"'lora-fx\[quant\]'",
    ),
    "export without onnx": ("onnx", export, ExportError, RUNTIME),
    "export without onnxscript": ("onnxscript", export, ExportError, RUNTIME),
    "export without onnx-ir": ("onnx_ir", export, ExportError, RUNTIME),
    "session": (
        "onnxruntime",
        lambda folder: lora_fx.OnnxSession(file(folder), provider="cpu"),
        ProviderError,
        RUNTIME,
    ),
    "picture of a file": (
        "onnx",
        lambda folder: lora_fx.visualize(file(folder), folder / "graph.svg"),
        ExportError,
        ONNX,
    ),
    "doctor": ("onnx_ir", examines, ExportError, ONNX),
    "bf16": ("ml_dtypes", reads_an_array_in_bf16, ExportError, ONNX),
    "stop_strings": ("transformers", stops_at_words, ExportError, HF),
    "stream": ("transformers", streams, ExportError, HF),
    "trainer": (
        "transformers",
        lora_fx.trainer_callback,
        ConfigError,
        HF,
    ),
    "lightning": (
        "lightning",
        lora_fx.lightning_callback,
        ConfigError,
        "lightning$",
    ),
    "hf:": ("transformers", loads("hf:{}"), ConfigError, HF),
    "timm:": ("timm", loads("timm:resnet18"), ConfigError, "timm"),
    "torchvision:": (
        "torchvision",
        loads("torchvision:resnet18"),
        ConfigError,
        "torchvision",
    ),
    "GGUF": ("gguf", reads_gguf, CheckpointError, r"'lora-fx\[quant\]'"),
    "YAML": ("yaml", reads_yaml, ConfigError, r"'lora-fx\[cli\]'"),
    "--tokenizer": ("transformers", reads_a_tokenizer, ConfigError, HF),
    "demo": ("sklearn", demonstrates, ConfigError, r"'lora-fx\[demo\]'"),
}


@pytest.mark.parametrize(("package", "use", "error", "remedy"), CASES.values(), ids=CASES)
def test_each_use_names_the_command(
    package: str,
    use: Callable[[Path], Any],
    error: type[LoraFxError],
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lora_fx.checkpoint import trainers

    trainers.callback_class.cache_clear()
    for name in [one for one in sys.modules if one.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(error, match=f"{package}.*pip install {remedy}"):
        use(tmp_path)


# Handlers that choose another way instead of an error, or have a message of their own.
HANDLERS = {
    "export/staging.py": "no fcntl on Windows: folders of processes that died stay there",
    "passes/graph/reads.py": "the name of a function leads to no module: no package is asked for",
    "lora_fx/runtime/kernels/masks.py": "without Triton, masks and products are PyTorch's",
    "tools/cli/__init__.py": "the command line itself is missing",
    "tools/models.py": "a module of the user's",
}


def test_no_other_place_handles_a_missing_package() -> None:
    """One helper writes the message, so that none lacks the command."""
    places = {
        path.relative_to(ROOT).as_posix()
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and node.type is not None
        and {"ImportError", "ModuleNotFoundError"}
        & {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
    }
    assert places == set(HANDLERS)
