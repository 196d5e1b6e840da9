"""Hooks of mkdocs: what the pages link to outside of ``docs/`` becomes part of the site.

Examples are shown as pages of code, the README of the repository as the start page. Links to tests stay
text: a reader of the site has no tests.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_SHOWN = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each example, and those of the repository's root."""
    for example in sorted((ROOT / "examples").glob("*.py")):
        text = f"# {example.stem}\n\n```python\n{example.read_text('utf-8')}```\n"
        files.append(File.generated(config, f"examples/{example.stem}.md", content=text))
    for name, page in _SHOWN.items():
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=_from_root(text)))
    for file in files:
        if (
            file.src_uri == "README.md"
        ):  # the start page is the repository's; this is the list of all
            file.dest_uri = "contents.html"
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to where things are in the site."""
    if page.file.src_uri in _SHOWN.values():
        return markdown
    folder = posixpath.dirname(page.file.src_uri)

    def lead(match: re.Match[str]) -> str:
        text, (path, mark, rest) = match["text"], match["target"].partition("#")
        if not path or "://" in path:
            return match[0]
        there = posixpath.normpath(posixpath.join("docs", folder, path))
        if there.startswith("docs/"):
            return match[0]
        return _linked(text, there, mark + rest, folder) or text

    return _LINK.sub(lead, markdown)


def _from_root(text: str) -> str:
    """A page of the repository's root, with links that hold in the site."""
    text = re.sub(r'(src|href)="docs/', r'\1="', text)

    def lead(match: re.Match[str]) -> str:
        name, (path, mark, rest) = match["text"], match["target"].partition("#")
        if not path or "://" in path:
            return match[0]
        if path.startswith("docs/"):
            return f"[{name}]({path.removeprefix('docs/')}{mark}{rest})"
        return _linked(name, path, mark + rest, "") or name

    return _LINK.sub(lead, text)


def _linked(text: str, path: str, rest: str, folder: str) -> str | None:
    """A link to what is at a path of the repository, if the site shows it."""
    if path.startswith("examples/") and path.endswith(".py"):
        page = path.removesuffix(".py") + ".md"
    elif path in _SHOWN:
        page = _SHOWN[path]
    else:
        return None
    return f"[{text}]({posixpath.relpath(page, folder or '.')}{rest})"
