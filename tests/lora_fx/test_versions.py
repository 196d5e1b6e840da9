"""What is said about other libraries that are older or newer than what was tested."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
import types
import warnings
from pathlib import Path

import pytest

from lora_fx import extras, versions
from lora_fx.tools.cli import doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_warned", set())


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    """Other versions of libraries, which are loaded."""
    real = importlib.metadata.version
    shown = {name.replace("_", "-"): version for name, version in installed.items()}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: shown.get(name) or real(name))
    for name in shown:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def said() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.warn_untested()
        versions.warn_untested()
    return [str(warning.message) for warning in caught]


def test_nothing_is_said_about_what_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **{name: f"{newest}.9" for name, newest in versions.NEWEST.items()})
    assert said() == []


@pytest.mark.parametrize("name", versions.NEWEST)
def test_a_newer_one_is_named_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **versions.NEWEST)
    pretend(monkeypatch, **{name: "99.1.0+cu132"})
    (message,) = said()
    oldest = versions.oldest()[name]
    assert f"tested with {name} {oldest} to {versions.NEWEST[name]}, and this is 99.1.0" in message
    assert "doctor" in message


def test_an_older_one_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="1.13.1")
    (message,) = [message for message in said() if "1.13.1" in message]
    assert f"pip install --upgrade 'torch>={versions.oldest()['torch']}'" in message


def test_a_release_with_fewer_numbers_is_not_older(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch=versions.oldest()["torch"] + "a0+git1234")
    assert not [message for message in said() if "torch" in message]


def test_what_is_not_loaded_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **dict.fromkeys(versions.NEWEST, "99.0"))
    for name in versions.NEWEST:
        monkeypatch.delitem(sys.modules, name, raising=False)
    (message,) = said()
    assert "torch" in message


def test_the_bounds_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "torch>=" + versions.oldest()["torch"] in project["dependencies"]
    assert versions.oldest().keys() >= versions.NEWEST.keys()


def test_what_an_export_imports_is_looked_at_before(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, onnx="99.0")
    monkeypatch.delitem(sys.modules, "onnx")
    with pytest.warns(UserWarning, match=r"tested with onnx .* and this is 99\.0"):
        extras.check_installed(["onnx"], "the export", "lora-fx[gpu]")


def test_the_remedy_for_onnx_runtime_is_the_wheel_that_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two wheels share a folder, and break each other."""

    def version(name: str) -> str:
        if name == "onnxruntime-gpu":
            return "1.20.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    bound = versions.oldest()["onnxruntime-gpu"]
    assert f"pip install --upgrade 'onnxruntime-gpu>={bound}'" in versions.untested("onnxruntime")


@pytest.mark.parametrize("version", ["unknown", ""])
def test_a_version_without_numbers_is_not_judged(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert not any(map(versions.untested, versions.NEWEST))


def test_a_filter_that_makes_it_an_error_raises_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="99.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"99\.0"):
            versions.warn_untested(["torch"])
        versions.warn_untested(["torch"])


def test_the_warning_is_about_the_line_that_uses_lora_fx(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, onnx="99.0")
    with pytest.warns(UserWarning, match=r"99\.0") as caught:
        extras.load_optional("onnx", "the export", "lora-fx[gpu]")
    assert caught[0].filename == __file__


def test_doctor_says_what_was_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, onnx="99.0")
    findings = [one for one in doctor.examine() if one.detail == "not tested"]
    assert [finding.name for finding in findings] == ["onnx"]
    assert "this is 99.0" in findings[0].remedy
