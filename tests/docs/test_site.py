"""The site of the documentation: its links, and its search in a page that is opened as a file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.pages import ROOT
from tests.tools.browser import CHROMIUM, browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(["make", "--silent", "layout"], cwd=ROOT, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Links(HTMLParser):
    """What a page links to, loads, and can be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[tuple[str, str]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append((tag, value))
            elif name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere_in_it(site: Path) -> None:
    # 404.html is for servers: its links begin at the root.
    paths = [path for path in site.rglob("*.html") if path.name != "404.html"]
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in paths}
    assert {"zoo.html", "from-peft.html", "index.html"} < {path.name for path in paths}
    broken = []
    for path, page in pages.items():
        for tag, target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                assert tag == "a", f"{path.name} loads {target}"
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            file = file / "index.html" if file.is_dir() else file
            anchor = unquote(url.fragment)
            if not file.is_file() or (
                anchor and file in pages and anchor not in pages[file].anchors
            ):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_site_searches_without_a_server(site: Path) -> None:
    with browser() as page:
        page.size(1200, 800)
        page.open((site / "guides" / "visualizing.html").as_uri())
        page.run("document.querySelector('[data-md-component=search-query]').focus()")
        page.type("requantize")
        for _ in range(100):
            hits = page.run(
                "[...document.querySelectorAll('.md-search-result__item a')].map((a) => a.href)"
            )
            if hits:
                break
            page.run("new Promise((done) => setTimeout(done, 100))")
        assert hits
        assert all(hit.startswith(site.as_uri()) for hit in hits)
        assert not page.complaints
        assert all(request.startswith("file:") for request in page.requests)
