"""What is said about other libraries that are older or newer than what was tested."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_fx import extras, versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _warn_again() -> Iterator[None]:
    versions._warn.cache_clear()
    yield
    versions._warn.cache_clear()


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
