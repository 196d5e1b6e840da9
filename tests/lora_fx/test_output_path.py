"""Paths to write to: all who write refuse a folder, or a file of another kind, and write nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig, save_onnx_adapter, visualize
from lora_fx.errors import ConfigError, ExportError, OutputPathError
from lora_fx.export.onnx import export_onnx
from lora_fx.files import output_file
from lora_fx.tools.cli.model_commands import check_out


def model() -> nn.Module:
    return lora_fx.rewrite(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), LoraConfig(r=2)).eval()


def export(path: Any, **options: Any) -> object:
    return export_onnx(model(), path, torch.randn(2, 4), verify=False, **options)


def save(path: Any, **options: Any) -> object:
    return save_onnx_adapter(model(), path, **options)


def draw(path: Any) -> object:
    return visualize(model(), path)


def merge(path: Any) -> object:
    return check_out("tests.tiny:net", path, force=False)


WRITERS = [
    pytest.param(export, ".onnx", OutputPathError, id="export_onnx"),
    pytest.param(save, ".onnx_adapter", OutputPathError, id="save_onnx_adapter"),
    pytest.param(draw, ".svg", ConfigError, id="visualize"),
    pytest.param(merge, ".safetensors", ConfigError, id="merge"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for suffix in (".onnx", ".onnx_adapter", ".svg", ".safetensors"):
        (tmp_path / f"folder{suffix}").mkdir()
    return tmp_path


@pytest.mark.parametrize(("write", "suffix", "error"), WRITERS)
@pytest.mark.parametrize(
    "path",
    ["folder", "folder/", "new/", "new{}/", "folder{}", "folder{}/", ".", "..", "new/..", "/"],
)
def test_a_folder_is_no_file(
    write: Callable[[Any], object], suffix: str, error: type[Exception], path: str, here: Path
) -> None:
    before = sorted(here.rglob("*"))
    given = path.format(suffix)
    with pytest.raises(
        error, match=f"is a folder: give the name of the file to write in it, as .*{suffix}"
    ):
        write(given)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(("write", "suffix", "error"), WRITERS)
@pytest.mark.parametrize("path", ["model.txt", "model", "new/model.pt", "model.onnx.gz", ".onnx"])
def test_a_file_of_another_kind_is_refused(
    write: Callable[[Any], object], suffix: str, error: type[Exception], path: str, here: Path
) -> None:
    before = sorted(here.rglob("*"))
    for given in (path, Path(path)):
        with pytest.raises(
            error, match=rf"{path} has (the suffix \.\w+|no suffix), and .*{suffix}.*write to "
        ):
            write(given)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(("write", "suffix", "error"), WRITERS)
@pytest.mark.parametrize(
    ("path", "said"), [("", "''"), (None, "a NoneType"), (b"m.onnx", "a bytes")]
)
def test_what_is_no_path_is_refused(
    write: Callable[[Any], object], suffix: str, error: type[Exception], path: Any, said: str
) -> None:
    if write is merge and not isinstance(path, str):
        pytest.skip("the command line gives texts")
    with pytest.raises(error, match=f"path is {said}: give the name of the file"):
        write(path)


def test_it_is_an_error_that_callers_catch(tmp_path: Path) -> None:
    for kind in (ExportError, ConfigError, ValueError, lora_fx.LoraFxError):
        with pytest.raises(kind):
            export(tmp_path)


@pytest.mark.parametrize(("write", "name"), [(export, "m.onnx"), (save, "m.onnx_adapter")])
def test_a_file_that_exists_is_refused_without_force(
    write: Callable[..., object], name: str, tmp_path: Path
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(OutputPathError, match=f"{name} exists, and force=False was given"):
        write(tmp_path / name, force=False)


def test_the_kinds_of_refusals_are_those_of_the_page(tmp_path: Path) -> None:
    for write, name in ((export, "m.pt"), (save, "m.pt"), (draw, "m.pt"), (draw, "folder/")):
        with pytest.raises(OutputPathError):
            write(f"{tmp_path}/{name}")


def test_what_is_fine_is_a_path(tmp_path: Path) -> None:
    for name in ("m.onnx", "a.b.ONNX", "new/m.onnx"):
        assert output_file(tmp_path / name, (".onnx",)) == tmp_path / name
        assert output_file(str(tmp_path / name), (".onnx",)) == tmp_path / name
    assert export(tmp_path / "upper.ONNX")
    assert (tmp_path / "upper.ONNX").is_file()


@pytest.mark.parametrize("path", ["m.safetensors", "m.onnx", "m.bin"])
def test_a_model_of_transformers_goes_into_a_folder(path: str, here: Path) -> None:
    with pytest.raises(ConfigError, match="named like one, and hf:bert is written as a folder"):
        check_out("hf:bert", path, force=True)
    assert check_out("hf:bert", "llama-3.1", force=False) == Path("llama-3.1")
