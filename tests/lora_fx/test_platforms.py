"""What other systems need: file names, encodings, and what Windows does in another way."""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_fx.files import flush

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("lora_fx", "passes", "export", "tools")
FOLDERS = (*PRODUCT, "tests", "docs", "examples")
NOT_FILES = ("os", "opener")  # what is opened by these names has no encoding
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def test_file_names_are_names_on_every_system() -> None:
    names = [
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if "__pycache__" not in path.parts
    ]
    wrong = [
        name
        for name in names
        if re.search(r'[:*?"<>|\\]', name)
        or any(part.endswith((".", " ")) or DEVICES.match(part) for part in name.split("/"))
    ]
    assert not wrong
    # macOS and Windows do not tell capitals from small letters.
    assert max(Counter(name.lower() for name in names).values()) == 1


def text_without_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of the system."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    texts = [one.value for one in values if isinstance(one, ast.Constant)]
    if any(keyword.arg == "encoding" for keyword in call.keywords) or "utf-8" in texts:
        return False
    if name in ("read_text", "write_text"):
        return True
    if name not in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        return False
    if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in NOT_FILES:
        return False
    return not any(
        isinstance(text, str) and re.fullmatch(r"[rwax+]*b[rwax+]*", text) for text in texts
    )


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("path.read_text()", True),
        ("path.open('w')", True),
        ("open(path)", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.read_text('utf-8')", False),
        ("path.open('rb')", False),
        ("path.open('x', encoding='utf-8')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("opener.open(request)", False),
    ],
)
def test_the_test_of_encodings(code: str, wrong: bool) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert text_without_encoding(call) is wrong


def test_text_has_an_encoding() -> None:
    places = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and text_without_encoding(call)
    ]
    assert not places


def test_windows_flushes_what_it_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"words")
    flags: list[int] = []
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flag: (flags.append(flag), opened(path, flag))[1])
    flush(path)
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        flush(path)
    assert flags == [os.O_RDONLY, os.O_RDWR]
    assert path.read_bytes() == b"words"


def test_the_cuda_provider_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fx.export import providers

    runtime = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sys, "platform", "win32")
    assert providers.missing_cuda_libraries(runtime) == ["onnxruntime_providers_cuda.dll"]
    library = providers.cuda_library(runtime)
    library.parent.mkdir()
    library.write_bytes(b"MZ" * 64)
    assert providers.missing_cuda_libraries(runtime) == []


def test_the_zoo_runs_without_a_server_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fx.tools.zoo import runner

    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert runner._context(["torch"]).get_start_method() == "spawn"


def test_the_command_line_writes_to_a_narrow_encoding(tmp_path: Path) -> None:
    """On Windows a pipe has the code page of the system, which lacks characters of a plan."""
    pytest.importorskip("typer")
    code = (
        "import sys; sys.argv[1:] = ['--version']\n"
        "from lora_fx.tools.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('\\u00d7 12 \\u2192')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "? 12 ?"
