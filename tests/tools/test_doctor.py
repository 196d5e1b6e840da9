"""The doctor: what it finds here, and on machines that are put together wrong."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from lora_fx.errors import ProviderError
from lora_fx.export import providers
from lora_fx.tools.cli import doctor
from lora_fx.tools.cli.doctor import EXTRAS, Finding, State, examine


def found(name: str) -> Finding:
    return next(finding for finding in examine() if finding.name == name)


def test_it_finds_the_versions() -> None:
    import torch

    assert found("torch").detail == torch.__version__
    assert found("lora-fx").state is State.OK


def test_the_extras_are_those_of_the_project(root: Path) -> None:
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    optional = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        listed = {re.split(r"[\[<>=; ]", entry)[0] for entry in optional[extra]} - {"lora-fx"}
        assert set(packages) == listed, extra
    assert set(optional) - set(EXTRAS) == {"test", "lint"}


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
