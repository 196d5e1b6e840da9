"""Cut a release: check the repository, build ``dist/``, and write the date into CHANGELOG.md.

``make release`` runs this script. It builds from the last commit, in a temporary folder. The repository
changes only once both files are built. Nothing is committed, tagged, pushed or published: the commands for
that are printed.
"""

from __future__ import annotations

import argparse
import ast
import datetime as dt
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["ReleaseError", "build", "check", "date_section", "main", "release"]

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = "CHANGELOG.md"
UNRELEASED = "## [Unreleased]"
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:(a|b|rc)(\d+))?")
_HEADING = re.compile(r"^## .*$", re.MULTILINE)
_RELEASED = re.compile(r"^## \[(?P<version>[^\]]+)\] - \d{4}-\d{2}-\d{2}$", re.MULTILINE)


class ReleaseError(Exception):
    """The repository is not ready to be released. The message is one line, with what to do."""


def check(root: Path) -> str:
    """Return the version to release.

    Args:
        root: The repository.

    Raises:
        ReleaseError: The tree is not clean, the version is not the same everywhere, it is not newer than the
            last one, or its tag exists.
    """
    version = _version(root)
    if status := _git(root, "status", "--porcelain"):
        lines = status.splitlines()
        more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise ReleaseError(
            f"the working tree is not clean ({lines[0].strip()}{more}): commit or remove it"
        )
    if _git(root, "tag", "--list", f"v{version}"):
        raise ReleaseError(
            f"the tag v{version} exists: set a newer version in pyproject.toml and lora_fx/__init__.py"
        )
    return version


def date_section(text: str, version: str, date: str) -> str:
    """Return a changelog in which the section of unreleased changes is that of a version.

    Args:
        text: The changelog.
        version: The version, as ``1.2.0``.
        date: The day, as ``2030-01-31``.

    Returns:
        The changelog, with an empty section of unreleased changes above the new one.

    Raises:
        ReleaseError: There is no such section, it is empty, or the version is not newer than the last one.
    """
    if text.count(f"{UNRELEASED}\n") != 1:
        raise ReleaseError(f"{CHANGELOG} has to have one section {UNRELEASED!r}: add it at the top")
    head, _, tail = text.partition(f"{UNRELEASED}\n")
    end = _HEADING.search(tail)
    if not re.search(r"^- \S", tail[: end.start()] if end else tail, re.MULTILINE):
        raise ReleaseError(
            f"the section {UNRELEASED!r} of {CHANGELOG} is empty: there is no change"
        )
    for section in _RELEASED.finditer(text):
        if _order(section["version"]) >= _order(version):
            raise ReleaseError(
                f"{CHANGELOG} has {section['version']} already, and the version is {version}: set a newer "
                "one in pyproject.toml and lora_fx/__init__.py"
            )
    return f"{head}{UNRELEASED}\n\n## [{version}] - {date}\n{tail}"


def build(root: Path, changelog: str, out: Path) -> list[Path]:
    """Build the sdist from the last commit, and the wheel from the sdist.

    Args:
        root: The repository.
        changelog: The text of the changelog to build with.
        out: The folder to write both files into.

    Returns:
        The sdist and the wheel.

    Raises:
        ReleaseError: The build failed.
    """
    with TemporaryDirectory() as name:
        source, unpacked = Path(name, "source"), Path(name, "unpacked")
        archive = Path(name, "head.tar")
        _git(root, "archive", "--format=tar", f"--output={archive}", "HEAD")
        _extract(archive, source)
        (source / CHANGELOG).write_text(changelog, encoding="utf-8", newline="\n")
        sdist = out / _backend(source, "build_sdist", out)
        # From the sdist: a file that it lacks is missed here, and not by its first user.
        _extract(sdist, unpacked)
        (folder,) = unpacked.iterdir()
        return [sdist, out / _backend(folder, "build_wheel", out)]


def release(root: Path, date: str) -> list[Path]:
    """Check a repository, build its files into ``dist/``, and date its changelog.

    Args:
        root: The repository.
        date: The day, as ``2030-01-31``.

    Returns:
        The sdist and the wheel.

    Raises:
        ReleaseError: The repository is not ready, or the build failed. Nothing has changed.
    """
    version = check(root)
    path = root / CHANGELOG
    if not path.is_file():
        raise ReleaseError(f"there is no {CHANGELOG}: add it, with a section {UNRELEASED!r}")
    changelog = date_section(path.read_text(encoding="utf-8"), version, date)
    with TemporaryDirectory() as name:
        files = build(root, changelog, Path(name))
        dist = root / "dist"
        dist.mkdir(exist_ok=True)
        placed = [Path(shutil.copy(file, dist / file.name)) for file in files]
    path.write_text(changelog, encoding="utf-8", newline="\n")
    return placed


def commands(version: str, files: Sequence[str]) -> list[str]:
    """Return the commands that commit, tag, push and publish a release, in their order."""
    return [
        f"git commit --message 'Release {version}' {CHANGELOG}",
        f"git tag --annotate v{version} --message 'lora-fx {version}'",
        f"git push origin HEAD v{version}",
        f"twine upload {' '.join(files)}",
    ]


def _version(root: Path) -> str:
    """Return the version of ``pyproject.toml``, which that of the package has to equal."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version: str = project["version"]
    if _VERSION.fullmatch(version) is None:
        raise ReleaseError(
            f"the version {version!r} of pyproject.toml is not of the form 1.2.3 or 1.2.3rc1"
        )
    tree = ast.parse((root / "lora_fx" / "__init__.py").read_text(encoding="utf-8"))
    own = next(
        (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
        ),
        None,
    )
    if own != version:
        raise ReleaseError(
            f"pyproject.toml has the version {version}, and lora_fx/__init__.py has {own}: set both to one"
        )
    return version


def _order(version: str) -> tuple[int, int, int, str, int]:
    """Return a key that sorts versions. A candidate comes before its release."""
    match = _VERSION.fullmatch(version)
    if match is None:
        raise ReleaseError(f"{CHANGELOG} has a section of {version!r}, which is no version")
    major, minor, patch, stage, number = match.groups()
    return int(major), int(minor), int(patch), stage or "release", int(number or 0)


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
    except FileNotFoundError as error:
        raise ReleaseError("there is no git: install it") from error
    if done.returncode:
        raise ReleaseError(f"git {arguments[0]} failed: {_last_line(done.stderr)}")
    return done.stdout.rstrip("\n")


def _backend(source: Path, hook: str, out: Path) -> str:
    """Call a hook of the build backend in a subprocess, and return the name of the file that it built."""
    code = f"import sys, editable; print(editable.{hook}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise ReleaseError(f"{hook} failed: {_last_line(done.stderr)}")
    return done.stdout.splitlines()[-1]


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _last_line(text: str) -> str:
    return next(iter(reversed(text.strip().splitlines())), "it says nothing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return 0, or 1 if the repository is not ready."""
    parser = argparse.ArgumentParser(description="Check, date the changelog and build dist/.")
    parser.add_argument("--date", type=dt.date.fromisoformat, metavar="YYYY-MM-DD")
    date = parser.parse_args(arguments).date or dt.datetime.now(dt.UTC).date()
    try:
        files = release(ROOT, date.isoformat())
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    names = [file.relative_to(ROOT).as_posix() for file in files]
    print(f"Built {' and '.join(names)}, and dated {CHANGELOG}.")
    print("Nothing is committed, tagged or published. These commands do it:\n")
    print("\n".join(f"  {command}" for command in commands(_version(ROOT), names)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
