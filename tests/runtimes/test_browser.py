"""An exported file in onnxruntime-web, in headless Chromium: what it gives is PyTorch's."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtimes.conftest import CONSUMERS, require
from tests.runtimes.files import Call, case

pytestmark = [pytest.mark.runtime, pytest.mark.filterwarnings("ignore")]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",  # keeps it running until it is told to stop
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
]


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder and the files of onnxruntime-web, and takes the result."""

    def __init__(self, *args: Any, web: Path, found: queue.Queue[Any], **kwargs: Any) -> None:
        self.web, self.found = web, found
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        name = path.partition("?")[0]
        if name.startswith("/ort/"):
            return str(self.web / name.removeprefix("/ort/"))
        return super().translate_path(path)

    def do_POST(self) -> None:
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def as_json(call: Call) -> dict[str, Any]:
    """The inputs of a call."""
    return {
        name: {"type": "int64", "dims": one.shape, "data": one.reshape(-1).tolist()}
        for name, one in call.feeds.items()
    }


def browse(page: str, provider: str, folder: Path) -> Any:
    """What a page of a folder posts in Chromium, with onnxruntime-web under ``/ort/``."""
    web = require("js") / "node_modules" / "onnxruntime-web" / "dist"
    found: queue.Queue[Any] = queue.Queue()
    handler = partial(Handler, web=web, found=found, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{page}?provider={provider}"
        profile = f"--user-data-dir={folder / 'profile'}"
        browser = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, profile, address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            said = found.get(timeout=120)
        finally:
            browser.terminate()
            browser.wait(timeout=30)
            server.shutdown()
    return said


in_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)"
)


@in_chromium
@pytest.mark.parametrize("provider", ["wasm", "webgpu"])
@pytest.mark.parametrize("adapters", ["merge", "inputs"])
def test_a_browser_gives_what_pytorch_does(adapters: str, provider: str, tmp_path: Path) -> None:
    require("js")
    one = case("encoder", adapters, tmp_path)
    # onnxruntime-web knows no inputs that have a default: there such a file is the base model.
    plain = [call for call in one.calls if call.adapter is None]
    calls = json.dumps([as_json(call) for call in plain])
    (tmp_path / "calls.json").write_text(calls, encoding="utf-8")
    shutil.copyfile(CONSUMERS / "browser.html", tmp_path / "browser.html")
    said = browse("browser.html", provider, tmp_path)
    assert "results" in said, said
    for call, result in zip(plain, said["results"], strict=True):
        for name, want in call.want.items():
            got = torch.tensor(np.array(result[name], np.float32)).reshape(want.shape)
            error = float((got - want).abs().max() / want.abs().max())
            assert error <= 1e-4, f"{name}: {error:.2e}"
