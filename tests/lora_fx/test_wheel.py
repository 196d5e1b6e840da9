"""The wheel and the sdist, installed elsewhere: one import name, and nothing left out."""

from __future__ import annotations

import json
import os
import shutil
import site as sites
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.docs.pages import blocks

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "lora_fx": "lora_fx",
    "passes": "lora_fx/passes",
    "export": "lora_fx/export",
    "tools": "lora_fx/tools",
}

# Run from a clone, and not in the wheel.
OF_CLONES = ("bench", "zoo")

# What an sdist has beside the packages.
BESIDE = (".ci", "docs", "examples", "tests")

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
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that nothing of an earlier build gets in and nothing is left behind."""
    source = tmp_path_factory.mktemp("source")
    for folder in (*FOLDERS, *BESIDE):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in {"", ".in", ".md", ".py", ".toml", ".yml"}:
            shutil.copy(path, source)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # Of an earlier build: a module that is gone by now.
    left = source / "build" / "lib" / "lora_fx" / "gone.py"
    left.parent.mkdir(parents=True)
    left.touch()
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    code = "import sys, editable; print(editable.build_sdist(sys.argv[1]))"
    return out / run(sys.executable, "-c", code, out, cwd=source).splitlines()[-1]


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


def test_every_module_travels_but_those_of_clones(site: Path) -> None:
    left_out = tuple(f"lora_fx/tools/{package}/" for package in OF_CLONES)
    in_tree = {
        name
        for folder, installed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
        if not (name := f"{installed}/{path.relative_to(ROOT / folder).as_posix()}").startswith(
            left_out
        )
    }
    installed = {path.relative_to(site).as_posix() for path in site.rglob("lora_fx/**/*.py")}
    assert installed == in_tree


@pytest.mark.parametrize("command", OF_CLONES)
def test_commands_of_clones_say_so(site: Path, tmp_path: Path, command: str) -> None:
    assert not (site / "lora_fx/tools" / command).exists()
    # -S leaves out the import hook of our own editable install, which knows these packages.
    path = os.pathsep.join([str(site), *sys.path])
    done = subprocess.run(
        [sys.executable, "-S", "-m", "lora_fx", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"lora-fx {command} needs a clone of the repository" in said
    assert f"run make {command} in the clone" in said


def test_types_and_the_files_beside_the_code_travel(site: Path) -> None:
    assert (site / "lora_fx/py.typed").is_file()
    folder = ROOT / "tools" / "draw"
    assets = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert assets
    assert not {name for name in assets if not (site / "lora_fx/tools/draw" / name).is_file()}


def test_the_sdist_has_all_of_the_repository(sdist: Path) -> None:
    """Whoever has it can build, run the tests and read the documentation."""
    with tarfile.open(sdist) as tar:
        files = {name.partition("/")[2] for name in tar.getnames()}
    assert {"editable.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE"} <= files
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for folder in (*FOLDERS, *BESIDE)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert in_tree - files == set()
    assert not [name for name in files if "__pycache__" in name]


@pytest.mark.parametrize("file", ["wheel", "sdist"])
def test_the_readme_runs_in_a_new_environment(
    file: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Installed as a user does it, with the dependencies of this environment: they are not downloaded."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    built: Path = request.getfixturevalue(file)
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    (python,) = [*tmp_path.glob("env/bin/python"), *tmp_path.glob("env/Scripts/python.exe")]
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", where, cwd=tmp_path).strip())
    # Later on the path than what is installed here; files like our own editable install's are not read there.
    borrowed = "".join(f"{folder}\n" for folder in sites.getsitepackages())
    (packages / "borrowed.pth").write_text(borrowed, encoding="utf-8")
    pip = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--ignore-installed", built, cwd=tmp_path)

    code = next(
        block.text
        for block in blocks((ROOT / "README.md").read_text(encoding="utf-8"))
        if block.language == "python"
    )
    code += "\nprint(lora_fx.__file__, tuple(outputs['output'].shape), sep='\\n')\n"
    (tmp_path / "readme.py").write_text(code, encoding="utf-8")
    *_, installed, shape = run(python, "readme.py", cwd=tmp_path).splitlines()
    assert Path(installed) == packages / "lora_fx" / "__init__.py"
    assert shape == "(8, 5, 4)"
    (command,) = [*tmp_path.glob("env/bin/lora-fx"), *tmp_path.glob("env/Scripts/lora-fx.exe")]
    assert run(command, "--version", cwd=tmp_path).split()[-1] in built.name


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


SCRIPT = """
import torch
from torch import nn

import lora_fx
from lora_fx.passes.patterns import LinearPattern


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def mine(self) -> int:
        return 3


adapted = lora_fx.rewrite(Net(), lora_fx.LoraConfig(r=2))
number: int = adapted.mine()
merged: Net = lora_fx.merge(adapted)
loaded: Net = lora_fx.load_adapter(Net(), "adapter")
nodes: int = lora_fx.export_onnx(merged, "model.onnx", torch.randn(2, 3)).nodes
rows: list[tuple[str, ...]] = lora_fx.plan(Net(), lora_fx.LoraConfig()).rows()
pattern: type[LinearPattern] = LinearPattern
for start in (True, "eva", "pissa_niter_4"):
    lora_fx.LoraConfig(init_lora_weights=start, bias="all", task_type="CAUSAL_LM")
lora_fx.rewrite(Net(), lora_fx.LoraConfig(), memory="balanced", frontend="regions")
lora_fx.quantize(Net(), "nf4")
lora_fx.add_weighted_adapter(adapted, ["a", "b"], [1.0, 1.0], "mix", combination_type="ties", density=0.5)
lora_fx.export_onnx(merged, "m.onnx", None, optimize="runtime", provider="webgpu", dtype="bf16")
lora_fx.save_adapter(adapted, "adapter", format="vllm")
lora_fx.OnnxSession("m.onnx", provider="cpu")
wrong: str = lora_fx.plan(Net(), lora_fx.LoraConfig()).parameters  # wrong
lora_fx.LoraConfig(bias="some")  # wrong
lora_fx.LoraConfig(task_type="SEQ")  # wrong
lora_fx.plan(Net(), lora_fx.LoraConfig(), frontend="region")  # wrong
lora_fx.rewrite(Net(), lora_fx.LoraConfig(), memory="fat")  # wrong
lora_fx.add_weighted_adapter(adapted, ["a"], [1.0], "mix", combination_type="tie")  # wrong
lora_fx.export_onnx(merged, "m.onnx", None, optimize="all")  # wrong
lora_fx.export_onnx(merged, "m.onnx", None, provider="gpu")  # wrong
lora_fx.save_adapter(adapted, "adapter", format="vlm")  # wrong
lora_fx.OnnxSession("m.onnx", provider="gpu")  # wrong
lora_fx.visualize(merged, "m.json", file_format="explorer")  # wrong
lora_fx.verify("adapter", merged, provider="gpu")  # wrong
"""
WRONG = [number for number, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")]


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an editable install leads: the folder of links that its .pth file names."""
    target = tmp_path_factory.mktemp("editable")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation")
    run(*pip, "--no-index", "--target", target, "--editable", source, cwd=target)
    (named,) = target.glob("lora_fx_for_type_checkers.pth")
    return Path(named.read_text(encoding="utf-8").strip())


@pytest.mark.parametrize("install", ["site", "editable"])
def test_mypy_sees_types(install: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The errors are the script's own: all else is known, and of the right type; so are names of choices."""
    pytest.importorskip("mypy")
    where: Path = request.getfixturevalue(install)
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    mypy = (sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py")
    done = subprocess.run(
        mypy,
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(where), "MYPY_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [int(line.split(":")[1]) for line in errors] == WRONG, done.stdout
    assert 'expression has type "int", variable has type "str"' in errors[0]


PYRIGHT = shutil.which("pyright") or ROOT / ".peers/js/node_modules/.bin/pyright"


@pytest.mark.skipif(not Path(PYRIGHT).exists(), reason="no pyright: make .peers/.runtime-js")
@pytest.mark.parametrize("install", ["site", "editable"])
def test_pyright_sees_types(install: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    where: Path = request.getfixturevalue(install)
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    settings = {
        "include": ["script.py"],
        "extraPaths": [str(where)],
        "reportMissingTypeStubs": False,
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = (str(PYRIGHT), "--outputjson", "--pythonpath", sys.executable)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = [
        one for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"
    ]
    assert [one["range"]["start"]["line"] + 1 for one in found] == WRONG, found
    assert '"int" is not assignable to "str"' in found[0]["message"]


def test_the_links_are_those_of_the_wheel(editable: Path, site: Path) -> None:
    def modules(root: Path) -> set[str]:
        # A link to a folder is not entered by rglob.
        folders = {root, *(folder.resolve() for folder in root.iterdir() if folder.is_dir())}
        files = [file for folder in folders for file in folder.rglob("*.py")]
        return {file.name for file in files if file.parent.name not in OF_CLONES}

    assert modules(editable / "lora_fx") == modules(site / "lora_fx")
