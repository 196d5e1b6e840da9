"""The wheel, installed into an empty folder elsewhere: one import name, and nothing left out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "lora_fx": "lora_fx",
    "passes": "lora_fx/passes",
    "export": "lora_fx/export",
    "tools": "lora_fx/tools",
}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of an earlier build gets in and nothing is left behind."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    out = tmp_path_factory.mktemp("dist")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target")
    run(*pip, target, wheel, cwd=target)
    return target


def test_it_owns_one_import_name(wheel: Path, site: Path) -> None:
    info = wheel.name.partition("-py3")[0] + ".dist-info"
    assert {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()} == {
        "lora_fx",
        info,
    }
    # pip puts the command into bin/, which is no import name: it has no module in it.
    assert {path.name for path in site.iterdir()} == {"lora_fx", info, "bin"}
    assert [path.name for path in (site / "bin").iterdir() if path.is_file()] == ["lora-fx"]


def test_every_module_travels(site: Path) -> None:
    in_tree = {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    installed = {path.relative_to(site).as_posix() for path in site.rglob("lora_fx/**/*.py")}
    assert installed == in_tree


@pytest.mark.parametrize("package", ["draw", "bench", "zoo"])
def test_types_and_the_files_beside_the_code_travel(site: Path, package: str) -> None:
    assert (site / "lora_fx/py.typed").is_file()
    folder = ROOT / "tools" / package
    assets = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert assets
    assert not {name for name in assets if not (site / "lora_fx/tools" / package / name).is_file()}


def test_it_imports_from_there(site: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata, lora_fx, lora_fx.passes, lora_fx.export, lora_fx.tools\n"
        "print(lora_fx.__file__, lora_fx.passes.__file__, lora_fx.export.__file__,"
        " lora_fx.tools.__file__, sep='\\n')\n"
    )
    files = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert [Path(file).relative_to(site).as_posix() for file in files] == [
        "lora_fx/__init__.py",
        "lora_fx/passes/__init__.py",
        "lora_fx/export/__init__.py",
        "lora_fx/tools/__init__.py",
    ]


def test_the_build_knows_the_licence(site: Path) -> None:
    (info,) = site.glob("*.dist-info")
    assert "License-Expression: Apache-2.0" in (info / "METADATA").read_text(encoding="utf-8")
    assert (info / "licenses/LICENSE").is_file()
