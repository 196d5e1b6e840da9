"""What the pages say holds: their code runs and prints what they show, and what they name exists."""

from __future__ import annotations

import contextlib
import io
import itertools
import linecache
import os
import pkgutil
import re
import runpy
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_fx
from lora_fx.formats import base
from lora_fx.passes import patterns
from tests.docs.pages import PAGES, ROOT, Block, blocks

WRITTEN_BY_TOOLS = ("docs/api.md", "docs/benchmarks.md", "docs/zoo.md")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_of(page: Path) -> list[Block]:
    return [one for one in blocks(page.read_text(encoding="utf-8")) if one.language == "python"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module in an empty folder, whose code has a source file: without one it has no graph."""
    monkeypatch.chdir(tmp_path)
    # A page may register a pattern or a format of its own.
    monkeypatch.setattr(patterns, "_registry", patterns._registry)
    for name in ("_formats", "_by_class"):
        monkeypatch.setattr(base, name, getattr(base, name))
    module = types.ModuleType("page")
    module.__file__ = str(tmp_path / "page.py")
    monkeypatch.setitem(sys.modules, "page", module)
    yield module
    linecache.checkcache(module.__file__)


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=named)
def test_the_code_runs(page: Path, module: types.ModuleType) -> None:
    """The blocks of a page run one after the other, as one script: lines have the page's numbers."""
    run(page, module)
    if page.name == "README.md" and page.parent == ROOT:
        picture = ROOT / "docs" / "img" / "readme.svg"
        if os.environ.get("LORA_FX_UPDATE_GOLDEN"):
            picture.write_bytes(Path("graph.svg").read_bytes())
        assert Path("graph.svg").read_bytes() == picture.read_bytes()


def test_the_readme_runs_twice_in_one_folder(module: types.ModuleType) -> None:
    """All that it writes is replaced."""
    run(ROOT / "README.md", module)
    first = {path.name: path.stat().st_mtime_ns for path in Path().iterdir()}
    run(ROOT / "README.md", module)
    second = {path.name: path.stat().st_mtime_ns for path in Path().iterdir()}
    assert {"graph.svg", "adapter", "model.onnx"} < {*first}
    assert {*first} == {*second}
    assert all(second[name] > first[name] for name in ("graph.svg", "model.onnx"))


def run(page: Path, module: types.ModuleType) -> None:
    code = code_of(page)
    script = ""
    for block in code:
        script += "\n" * (block.line - script.count("\n")) + block.text
    assert module.__file__ is not None
    Path(module.__file__).write_text(script, encoding="utf-8")
    for block in code:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            source = "\n" * block.line + block.text
            exec(compile(source, module.__file__, "exec", dont_inherit=True), vars(module))
        if block.output is not None:
            found = [line.rstrip() for line in printed.getvalue().strip().splitlines()]
            assert found == [line.rstrip() for line in block.output.strip().splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


HAND_WRITTEN = [page for page in PAGES if named(page) not in WRITTEN_BY_TOOLS]
FOLDERS = ("lora_fx", "passes", "export", "tools", "tests", "docs", "examples")


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=named)
def test_the_paths_exist(page: Path) -> None:
    """Every file, folder and module that a page names."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*)", text)
    # Placeholders and examples of what a user may have are written in capitals.
    wrong = [one for one in paths if not (ROOT / one.rstrip(".")).exists() and one == one.lower()]
    wrong += [name for name in set(re.findall(r"\blora_fx(?:\.\w+)+", text)) if not exists(name)]
    # A file without a folder is named where its folder is known from the text: one of that name is enough.
    alone = set(re.findall(r"`(\w+\.py)`", text))
    wrong += [name for name in alone if not list(ROOT.glob(f"[a-z]*/**/{name}"))]
    assert not wrong


def exists(name: str) -> bool:
    """Whether `lora_fx.x.y` is a module, or a name in one."""
    try:
        pkgutil.resolve_name(name)
    except lora_fx.ConfigError:
        return True  # it says which package it is for
    except (ImportError, AttributeError):
        return False
    return True


def test_the_test_of_paths_finds_what_is_missing() -> None:
    assert exists("lora_fx.passes.optimize.fuse.Fuse")
    assert exists("lora_fx.errors.CaptureError")
    assert not exists("lora_fx.passes.fuse")


BRITISH = (
    r"\b\w*(?:quantis|optimis|initialis|recognis|normalis|colour|neighbour|behaviour|licence)\w*"
)
RIDDLES = r"\b(?:anew|nobody|whoever|few bits|in the place of|beside)\b"


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=named)
def test_the_words_are_plain_american_english(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(f"{BRITISH}|{RIDDLES}", text, flags=re.IGNORECASE)


COMMANDS = [
    pytest.param(line, id=line[:60])
    for page in HAND_WRITTEN
    for block in blocks(page.read_text(encoding="utf-8"))
    if block.language == "sh"
    for line in block.text.splitlines()
    if line.startswith("lora-fx ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_exist(line: str) -> None:
    """Every subcommand and option that a page shows is one of the command's."""
    import typer.main

    from lora_fx.tools.cli.app import app

    words = line.partition("#")[0].split()[1:]
    command = typer.main.get_command(app).commands.get(words[0])  # type: ignore[attr-defined]
    assert command is not None or words[0].startswith("--")
    if command is not None:
        options = set(itertools.chain(*(one.opts + one.secondary_opts for one in command.params)))
        assert {word for word in words if word.startswith("--")} <= options | {"--help"}


def test_the_architecture_shows_what_the_compiler_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python docs/follow.py --write` writes the graphs of the page anew."""
    monkeypatch.setattr(sys, "argv", ["follow.py"])
    runpy.run_path(str(ROOT / "docs" / "follow.py"), run_name="__main__")
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = dict(
        re.findall(r"<!-- follow: ([\w-]+) -->\n```text\n(.*?)\n```", page, flags=re.DOTALL)
    )
    printed = capsys.readouterr().out
    parts = re.findall(r"^## ([\w-]+)\n\n(.*?)(?=\n\n## |\Z)", printed, re.DOTALL | re.MULTILINE)
    assert len(shown) == 8
    assert {name: text.rstrip() for name, text in parts} == shown


def test_the_chart_shows_the_figures_of_the_benchmarks() -> None:
    """`python docs/chart.py` draws it again."""
    chart = runpy.run_path(str(ROOT / "docs" / "chart.py"))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert chart["draw"](page) == chart["FILE"].read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for time, memory in chart["figures"](page).values():
        assert f"{memory:g} MiB" in readme
        assert f"{time:g}" in readme


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_every_error_has_a_remedy() -> None:
    page = (ROOT / "docs/guides/errors.md").read_text(encoding="utf-8")
    named = {name for name in lora_fx.__all__ if name.endswith("Error")} - {"LoraFxError"}
    assert {name for name in named if f"| `{name}` |" not in page} == set()
