"""Hooks of mkdocs that add files outside of ``docs/`` to the site if pages link to them.

Examples become pages of code, and the README of the repository becomes the start page. Links to tests become
plain text, because a reader of the site has no tests.
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
    """Add a page for each example, and the pages of the repository's root."""
    for example in sorted((ROOT / "examples").rglob("*.py")):
        text = f"# {example.stem}\n\n```python\n{example.read_text('utf-8')}```\n"
        page = example.relative_to(ROOT).with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=text))
    for name, page in _SHOWN.items():
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=_from_root(text)))
    for file in files:
        # The start page is the README of the repository. The README of docs/ is the list of all pages.
        if file.src_uri == "README.md":
            file.dest_uri = "contents.html"
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page so that they hold in the site."""
    if page.file.src_uri in _SHOWN.values():
        return markdown
    folder = posixpath.dirname(page.file.src_uri)

    def lead(match: re.Match[str]) -> str:
        text, (path, mark, anchor) = match["text"], match["target"].partition("#")
        if not path or "://" in path:
            return match[0]
        target = posixpath.normpath(posixpath.join("docs", folder, path))
        if target.startswith("docs/"):
            return match[0]
        return _linked(text, target, mark + anchor, folder) or text

    return _LINK.sub(lead, markdown)


def _from_root(text: str) -> str:
    """Return a page of the repository's root with links that hold in the site."""
    text = re.sub(r'(src|href)="docs/', r'\1="', text)

    def lead(match: re.Match[str]) -> str:
        name, (path, mark, anchor) = match["text"], match["target"].partition("#")
        if not path or "://" in path:
            return match[0]
        if path.startswith("docs/"):
            return f"[{name}]({path.removeprefix('docs/')}{mark}{anchor})"
        return _linked(name, path, mark + anchor, "") or name

    return _LINK.sub(lead, text)


def _linked(text: str, path: str, anchor: str, folder: str) -> str | None:
    """Return a link to a path of the repository, or None if the site does not show the path."""
    if path.startswith("examples/") and path.endswith(".py"):
        page = path.removesuffix(".py") + ".md"
    elif path in _SHOWN:
        page = _SHOWN[path]
    else:
        return None
    return f"[{text}]({posixpath.relpath(page, folder or '.')}{anchor})"
