"""Cutting a release: its checks, its files, and that an error changes nothing."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATE = "2030-01-31"
CHANGELOG = """# Changelog

All notable changes.

## [Unreleased]

### Added

- A thing.

## [0.1.0] - 2029-01-01

### Added

- The beginning.
"""
PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "editable"
backend-path = ["."]

[project]
name = "lora-fx"
version = "0.2.0"

[tool.setuptools]
packages = ["lora_fx"]
"""

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost", "-c", "core.hooksPath=")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clean repository of a project that can be built."""
    root = tmp_path / "repository"
    (root / "lora_fx").mkdir(parents=True)
    (root / "CHANGELOG.md").write_text(CHANGELOG, encoding="utf-8")
    (root / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (root / "lora_fx" / "__init__.py").write_text('__version__ = "0.2.0"\n', encoding="utf-8")
    (root / "MANIFEST.in").write_text("include editable.py *.md\n", encoding="utf-8")
    (root / ".gitignore").write_text("dist/\n", encoding="utf-8")
    shutil.copy(ROOT / "editable.py", root)
    git(root, "init", "--quiet")
    commit(root)
    return root


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Change something")


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(root).parts
    }


def test_the_section_gets_a_version_and_a_date() -> None:
    dated = script.date_section(CHANGELOG, "0.2.0", DATE)
    heading = f"## [Unreleased]\n\n## [0.2.0] - {DATE}\n\n### Added\n\n- A thing.\n"
    assert dated == CHANGELOG.replace("## [Unreleased]\n\n### Added\n\n- A thing.\n", heading)
    with pytest.raises(script.ReleaseError, match="is empty"):
        script.date_section(dated, "0.3.0", DATE)


def test_a_candidate_comes_before_its_release() -> None:
    candidate = CHANGELOG.replace("[0.1.0]", "[0.2.0rc1]")
    assert f"[0.2.0] - {DATE}" in script.date_section(candidate, "0.2.0", DATE)
    with pytest.raises(script.ReleaseError, match=r"0\.1\.0 already"):
        script.date_section(CHANGELOG, "0.1.0rc2", DATE)


@pytest.mark.parametrize(
    ("text", "version", "message"),
    [
        (CHANGELOG.replace("## [Unreleased]\n", ""), "0.2.0", "has to have one section"),
        (CHANGELOG + "\n## [Unreleased]\n", "0.2.0", "has to have one section"),
        (CHANGELOG.replace("- A thing.\n", ""), "0.2.0", "is empty"),
        (CHANGELOG, "0.1.0", r"has 0\.1\.0 already, and the version is 0\.1\.0"),
        (CHANGELOG, "0.0.9", r"has 0\.1\.0 already, and the version is 0\.0\.9"),
        (CHANGELOG.replace("[0.1.0]", "[first]"), "0.2.0", "'first', which is no version"),
    ],
    ids=["no section", "two sections", "empty", "the same version", "an older version", "words"],
)
def test_a_changelog_that_cannot_be_dated(text: str, version: str, message: str) -> None:
    with pytest.raises(script.ReleaseError, match=message) as caught:
        script.date_section(text, version, DATE)
    assert "\n" not in str(caught.value)


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Return a change of a committed file."""

    def change(root: Path) -> None:
        path = root / name
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        commit(root)

    return change


def remove(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).unlink()
        commit(root)

    return change


def leave_uncommitted(root: Path) -> None:
    (root / "CHANGELOG.md").write_text(CHANGELOG + "\n", encoding="utf-8")


def leave_unknown(root: Path) -> None:
    (root / "notes.txt").write_text("words", encoding="utf-8")


def tag(root: Path) -> None:
    git(root, "tag", "v0.2.0")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "another version": (
        replace("pyproject.toml", "0.2.0", "0.3.0"),
        r"^pyproject.toml has the version 0\.3\.0, and lora_fx/__init__.py has 0\.2\.0: set both",
    ),
    "no version in the package": (
        replace("lora_fx/__init__.py", "__version__", "version"),
        "lora_fx/__init__.py has None: set both",
    ),
    "a version of another form": (
        replace("pyproject.toml", "0.2.0", "0.2.dev1"),
        r"'0\.2\.dev1' of pyproject.toml is not of the form 1\.2\.3",
    ),
    "uncommitted": (leave_uncommitted, r"not clean \(M CHANGELOG.md\): commit or remove it$"),
    "unknown": (leave_unknown, r"not clean \(\?\? notes.txt\): commit or remove it$"),
    "tagged": (tag, r"^the tag v0\.2\.0 exists: set a newer version"),
    "no changes": (replace("CHANGELOG.md", "- A thing.", ""), "is empty: there is no change"),
    "no changelog": (remove("CHANGELOG.md"), "there is no CHANGELOG.md"),
    "no repository": (lambda root: shutil.rmtree(root / ".git"), "git status failed: .*repository"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_changes_nothing(
    change: Callable[[Path], None],
    message: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(repository)
    before = contents(repository)
    monkeypatch.setattr(script, "build", lambda *_: pytest.fail("it was built"))
    with pytest.raises(script.ReleaseError, match=message):
        script.release(repository, DATE)
    monkeypatch.setattr(script, "ROOT", repository)
    assert script.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("release: ")
    assert printed.err.count("\n") == 1
    assert contents(repository) == before


def test_a_build_that_fails_changes_nothing(repository: Path) -> None:
    """MANIFEST.in leaves the build backend out of the sdist, so the wheel cannot be built from it."""
    replace("MANIFEST.in", "editable.py", "")(repository)
    before = contents(repository)
    with pytest.raises(script.ReleaseError, match=r"build_wheel failed: .*editable"):
        script.release(repository, DATE)
    assert contents(repository) == before


def test_a_release(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of an earlier build: setuptools would take up what it lists.
    (repository / ".git" / "info" / "exclude").write_text("*.egg-info/\n", encoding="utf-8")
    left = repository / "lora_fx.egg-info" / "SOURCES.txt"
    left.parent.mkdir()
    left.write_text("notes.txt\n", encoding="utf-8")
    head = git(repository, "rev-parse", "HEAD")
    monkeypatch.setattr(script, "ROOT", repository)
    assert script.main(["--date", DATE]) == 0

    dated = script.date_section(CHANGELOG, "0.2.0", DATE)
    assert (repository / "CHANGELOG.md").read_text(encoding="utf-8") == dated
    assert git(repository, "status", "--porcelain") == " M CHANGELOG.md\n"
    assert git(repository, "rev-parse", "HEAD") == head
    assert git(repository, "tag") == ""

    sdist, wheel = "dist/lora_fx-0.2.0.tar.gz", "dist/lora_fx-0.2.0-py3-none-any.whl"
    assert {f"dist/{path.name}" for path in (repository / "dist").iterdir()} == {sdist, wheel}
    with tarfile.open(repository / sdist) as tar:
        file = tar.extractfile("lora_fx-0.2.0/CHANGELOG.md")
        assert file is not None
        assert file.read().decode() == dated
    assert "lora_fx/__init__.py" in zipfile.ZipFile(repository / wheel).namelist()

    printed = capsys.readouterr().out
    assert [line.strip() for line in printed.splitlines() if line.startswith("  ")] == [
        "git commit --message 'Release 0.2.0' CHANGELOG.md",
        "git tag --annotate v0.2.0 --message 'lora-fx 0.2.0'",
        "git push origin HEAD v0.2.0",
        f"twine upload {sdist} {wheel}",
    ]
    # After the first two commands the same version is refused.
    git(repository, "commit", "--quiet", "--message", "Release 0.2.0", "CHANGELOG.md")
    git(repository, "tag", "--annotate", "v0.2.0", "--message", "lora-fx 0.2.0")
    with pytest.raises(script.ReleaseError, match=r"the tag v0\.2\.0 exists"):
        script.release(repository, DATE)


def test_this_project_has_what_a_release_asks_for() -> None:
    """The version is one, and the changelog has a section to date."""
    version = script._version(ROOT)
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert script.UNRELEASED in text
    if f"## [{version}]" not in text:
        assert f"## [{version}] - {DATE}" in script.date_section(text, version, DATE)
