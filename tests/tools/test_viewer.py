from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from lora_fx.tools.draw.drawing import document_of, initially_open, picture_of, visualize
from lora_fx.tools.draw.layout import place, plan_layers
from tests.tools.pictures import Net, Untraceable, adapted

NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

COMPARE = """
const fs = require("fs"), Layout = require(process.argv.at(-1));
const doc = JSON.parse(fs.readFileSync(0, "utf-8"));
const boxes = new Map([...doc.boxes, ...doc.nodes].map((box) => [box.id, box]));
const scene = Layout.place(boxes, doc.root, doc.metrics, (box) => box.open);
console.log(JSON.stringify({
  boxes: scene.placed.map((p) => [p.box.id, p.x, p.y, p.width, p.height, p.open]),
  wires: scene.wires.map((w) => [w.link, w.points.flat()]),
}));
"""


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("model", [Net(), Untraceable()], ids=["graph", "registration-order"])
@pytest.mark.parametrize("everything", [True, False], ids=["open", "first-view"])
def test_browser_and_python_place_alike(model: Net, everything: bool) -> None:
    picture = picture_of(adapted(model))
    document = document_of(picture)
    for entry in document["boxes"]:
        entry["open"] = entry["open"] or everything
    opened = {entry["id"] for entry in document["boxes"] if entry["open"]}
    scene = place(picture, plan_layers(picture), lambda box: box.id in opened)
    with resources.as_file(
        resources.files("lora_fx.tools.draw") / "viewer" / "layout.js"
    ) as script:
        done = subprocess.run(
            [str(NODE), "-e", COMPARE, "--", str(script)],
            input=json.dumps(document),
            capture_output=True,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout)
    assert len(found["boxes"]) == len(scene.boxes)
    for (name, *numbers, is_open), placed in zip(found["boxes"], scene.boxes, strict=True):
        assert (name, is_open) == (placed.box.id, placed.open)
        assert numbers == pytest.approx([placed.x, placed.y, placed.width, placed.height])
    for (link, points), wire in zip(found["wires"], scene.wires, strict=True):
        assert link == list(wire.link)
        assert points == pytest.approx([value for point in wire.points for value in point])


def test_first_view_shows_an_adapter_and_not_everything() -> None:
    root = picture_of(adapted(Net(depth=1))).root
    opened = initially_open(root)
    assert root.id in opened
    assert any(child.adapter for box in root.walk() if box.id in opened for child in box.children)
    deep = picture_of(
        adapted(Net(depth=40), rank_pattern={f"{2 * i}.up": 3 for i in range(20)})
    ).root
    visible = sum(len(box.children) for box in deep.walk() if box.id in initially_open(deep))
    assert 40 <= visible < 200 < sum(1 for _ in deep.walk())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page_draws_in_a_browser(tmp_path: Path) -> None:
    path = visualize(adapted(Net()), tmp_path / "graph.html")
    address = f"{path.as_uri()}#blocks.2.down"
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    drawn = re.findall(r'<g class="([^"]*)" data-id="(\w+)"', done.stdout)
    assert {name for classes, name in drawn if "A" in classes.split()}
    assert len({name for _, name in drawn}) == len(drawn) > 20
    # The searched block is folded into the first: that one is found, shown and marked.
    assert len([name for classes, name in drawn if "hit" in classes.split()]) == 1
    assert ">1 / 1<" in done.stdout
