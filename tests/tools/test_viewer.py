from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.config import LoraConfig, judge
from lora_fx.errors import ConfigError
from lora_fx.tools.draw.drawing import picture_of, visualize
from lora_fx.tools.draw.layout import place, plan_layers
from lora_fx.tools.draw.page import asset, document_of, initially_open, to_html
from lora_fx.tools.draw.picture import Box, Kind, Picture, SiteRow, State
from tests.passes.test_selection import CASES, LINEARS
from tests.tools.browser import CHROMIUM, Page, browser
from tests.tools.pictures import AroundBare, Block, Net, Untraceable, adapted
from tests.zoo import tiny_llama, tiny_mixtral

NODE = shutil.which("node")
NASTY = "a<b>&\"c'</script><img src=x onerror=alert`1`>"

needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def ask_node(code: str, given: Any) -> Any:
    """What the page's own files say about something, outside of a browser."""
    scripts = "".join(asset(name) for name in ("place.js", "find.js", "graph.js"))
    read = "const given = JSON.parse(require('fs').readFileSync(0, 'utf-8'));"
    done = subprocess.run(
        [str(NODE), "-e", f"{scripts}\n{read}\n{code}"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


STACK = """
const graph = new Graph(given, {}, null);
const found = [];
for (const box of graph.shown()) {
  const spot = graph.spotOf(box);
  const wires = box.open && box.inside ? box.inside.wires.map((wire) => wire.points) : [];
  found.push([box.id, spot.x, spot.y, spot.width, spot.height, wires]);
}
console.log(JSON.stringify(found));
"""


@needs_node
@pytest.mark.parametrize("model", [Net(), Untraceable()], ids=["graph", "registration-order"])
@pytest.mark.parametrize("everything", [True, False], ids=["open", "first-view"])
def test_the_page_stacks_as_python_does(model: nn.Module, everything: bool) -> None:
    picture = picture_of(adapted(model))
    document = document_of(picture)
    boxes = list(picture.root.walk())
    for entry in document["boxes"]:
        entry["open"] = bool(entry.get("open")) or everything
    opened = {box.id for box, entry in zip(boxes, document["boxes"], strict=True) if entry["open"]}
    scene = place(picture, plan_layers(picture), lambda box: box.id in opened)
    found = ask_node(STACK, document)
    assert [boxes[index].id for index, *_ in found] == [placed.box.id for placed in scene.boxes]
    places = {placed.box.id: placed for placed in scene.boxes}
    for index, x, y, width, height, _ in found:
        placed = places[boxes[index].id]
        assert [x, y, width, height] == pytest.approx(
            [placed.x, placed.y, placed.width, placed.height]
        )
    wires = [wire for *_, inside in found for wire in inside]
    expected = [[value for point in wire.points for value in point] for wire in scene.wires]
    lengths = sorted(abs(wire[5] - wire[1]) for wire in wires)
    assert len(wires) == len(expected)
    assert lengths == pytest.approx(sorted(abs(wire[5] - wire[1]) for wire in expected))


NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in range(12)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "xq_proj")
] + ["lm_head", "model.embed"]

SELECT = """
const rows = given.names.map((name) => ({
  name, default: true, linear: true, weight: "", attention: "", reason: "", width: 0, parts: [],
}));
const answers = given.cases.map((typed) => {
  const ask = Find.asked(typed);
  if (ask.objection) return ask.objection.startsWith("Python may") ? "unsure" : "wrong";
  return [Find.select(rows, ask).selected.map((row) => row.name), Find.fields(ask, 4, 8)];
});
console.log(JSON.stringify(answers));
"""


@needs_node
@pytest.mark.parametrize(
    ("typed", "targets", "exclude"),
    [
        ("q_proj", ["q_proj"], None),
        ("q_proj, v_proj", ["q_proj", "v_proj"], None),
        ("['q_proj', 'mlp.up_proj']", ["q_proj", "mlp.up_proj"], None),
        ("lm_head", ["lm_head"], None),
        (r".*\.q_proj", r".*\.q_proj", None),
        (r".*q_proj", r".*q_proj", None),
        ("q_proj|v_proj|(lm_head)", "q_proj|v_proj|(lm_head)", None),
        (
            r"model\.layers\.(?:[0-3]|1\d)\.mlp\.\w+",
            r"model\.layers\.(?:[0-3]|1\d)\.mlp\.\w+",
            None,
        ),
        (r".*\.(?!q)\w_proj", r".*\.(?!q)\w_proj", None),
        ("q_proj", ["q_proj"], "layers.0.self_attn.q_proj"),
    ],
)
def test_what_if_selects_as_python_does(
    typed: str, targets: list[str] | str, exclude: str | None
) -> None:
    config = LoraConfig(target_modules=targets, exclude_modules=exclude and [exclude])
    expected = [name for name in NAMES if judge(name, config).selected]
    typed_in = {"target_modules": typed, "exclude_modules": exclude or ""}
    ((found, _),) = ask_node(SELECT, {"names": NAMES, "cases": [typed_in]})
    assert found == expected


@needs_node
def test_what_if_says_where_python_and_the_browser_may_differ() -> None:
    cases = [
        "(?i).*Q",
        "(?P<n>a)b",
        r"\Aq",
        "a++",
        "q{,3}",
        "[]a]",
        r"é+",
        r"(?<=a)b",
        "(a",
        r"a\Z",
    ]
    typed = [{"target_modules": case} for case in cases]
    typed += [{"modules_to_save": "(?i)x"}, {"layers_to_transform": "1", "layers_pattern": "h++"}]
    typed += [{"layers_pattern": "h"}, {"target_modules": ".*q", "layers_to_transform": "1"}]
    found = ask_node(SELECT, {"names": NAMES, "cases": typed})
    assert found == ["unsure"] * 8 + ["wrong", "unsure"] + ["unsure"] * 2 + ["wrong"] * 2


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


SEARCH = """
const graph = new Graph(given.document, {}, null);
const found = given.queries.map((query) => {
  const { hits, meant } = Find.search(query, graph.boxes, (part) => graph.partDrawnAs(part));
  return hits.map((box) => graph.meant(box, meant));
});
console.log(JSON.stringify(found));
"""


@needs_node
def test_a_search_finds_the_box_that_holds_a_parameter() -> None:
    config = LoraConfig(r=2, target_modules=["fc", "blocks.0.up", "blocks.1.up"])
    model = nn.ModuleDict({"around": AroundBare(), "net": Net(depth=2)})
    document = document_of(picture_of(lora_fx.rewrite(model, config)))
    queries = [
        "lora_A",
        "up.lora_b.default",
        "blocks.1.down.weight",
        "many",
        "bare.both",
        "norm.bias",
        "norm",
        "nothing",
        "lora_A adapted",
    ]
    found = ask_node(SEARCH, {"document": document, "queries": queries})
    assert dict(zip(queries, found, strict=True)) == {
        "lora_A": ["around.fc", "net.blocks.0.up"],
        "up.lora_b.default": ["net.blocks.0.up"],
        "blocks.1.down.weight": ["net.blocks.1.down"],
        "many": ["around.bare"],
        "bare.both": ["around.bare"],
        "norm.bias": ["net.norm"],
        "norm": ["net.norm"],
        "nothing": [],
        "lora_A adapted": ["around.fc", "net.blocks.0.up"],
    }


# --- in Chromium ---


class Nested(nn.Module):
    """Two blocks with a name that a page must not take for code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.parts = nn.ModuleDict({NASTY: Block(8)})
        self.blocks = nn.Sequential(*(Block(8) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for part in self.parts.values():
            x = part(x)
        return self.blocks(x)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as page:
        page.size(1200, 800)
        yield page


@pytest.fixture
def opened(chromium: Page, tmp_path: Path) -> Iterator[Page]:
    model = lora_fx.rewrite(Nested(), LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1))
    lora_fx.add_adapter(model, LoraConfig(r=3, target_modules=["up"]), "other")
    chromium.open(visualize(model, tmp_path / "graph.html").as_uri())
    chromium.complaints.clear()
    yield chromium
    assert not chromium.complaints
    assert not chromium.requests


def selected(page: Page) -> str:
    return str(page.run("loraFx.graphs[0].selected?.fqn ?? ''"))


def panel(page: Page) -> str:
    return str(page.run("document.querySelector('#details').innerText"))


SPOT = """
(() => {
  const graph = loraFx.graphs[0], { area, view } = graph, spot = graph.spotOf(graph.boxOf(%s));
  const x = spot.x + spot.width / 2, y = spot.y + 18;
  return [area.x + view.x + x * view.scale, area.y + view.y + y * view.scale];
})()
"""


def choose(page: Page, selector: str, value: str) -> None:
    """Sets a control, as a user would."""
    page.run(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
        "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind)); })()"
    )
    page.settle()


def spot(page: Page, fqn: str) -> tuple[float, float]:
    """Where a box is on the screen, right of its triangle."""
    x, y = page.run(SPOT % json.dumps(fqn))
    return x, y


@pytest.mark.slow
@needs_chromium
def test_a_click_pins_what_there_is_to_know(opened: Page) -> None:
    opened.click(*spot(opened, "stem"))
    assert selected(opened) == "stem"
    told = panel(opened)
    for words in ("r 2 · × 2 · p 0.1", "torch.nn.modules.linear.Linear", "FLOPs", "saved", "8×3"):
        assert words in told
    assert opened.run("location.hash") == "#stem"


@pytest.mark.slow
@needs_chromium
def test_keys_walk_open_and_close(opened: Page) -> None:
    opened.key("Tab")
    assert opened.run("loraFx.graphs[0].selected === loraFx.graphs[0].root")
    opened.key("Tab")
    opened.key("Tab")
    first = selected(opened)
    opened.key("Tab", shift=True)
    assert selected(opened) != first or first == ""
    opened.run("loraFx.select('blocks.0')")
    before = opened.run("loraFx.graphs[0].selected.open")
    opened.key(" ")
    assert opened.run("loraFx.graphs[0].selected.open") is not before
    opened.key("Backspace")
    assert selected(opened) == "blocks"
    scale = opened.run("loraFx.graphs[0].view.scale")
    opened.key("+")
    assert opened.run("loraFx.graphs[0].view.scale") > scale
    opened.key("?")
    assert opened.run("document.querySelector('#keys').open")
    opened.key("Escape")
    assert not opened.run("document.querySelector('#keys').open")
    opened.run("loraFx.select('stem')")
    opened.key("Escape")
    opened.key("Escape")
    assert opened.run("loraFx.graphs[0].selected === null")


@pytest.mark.slow
@needs_chromium
def test_arrows_follow_the_flow(opened: Page) -> None:
    opened.run("loraFx.select('stem')")
    opened.key("ArrowDown")
    below = selected(opened)
    assert below != "stem"
    opened.key("ArrowUp")
    assert selected(opened) == "stem"


@pytest.mark.slow
@needs_chromium
def test_search_finds_names_ranks_types_and_folded_layers(opened: Page) -> None:
    def search(text: str) -> str:
        opened.run("document.querySelector('#search').value = ''")
        opened.key("/")
        opened.type(text)
        told = str(opened.run("document.querySelector('#found').textContent"))
        opened.run("document.activeElement.blur()")
        return told

    assert search("stem").startswith("1 / 1")
    told = search("blocks.2.down")
    assert told.startswith("1 / 1")
    assert "blocks.2.down, drawn once for blocks.0" in told
    assert search("r:3").startswith("1 / 2")
    assert search("type:Linear r:2").startswith("1 / 5")
    assert search("nothing-like-it").startswith("0 / 0")


@pytest.mark.slow
@needs_chromium
def test_names_are_text(opened: Page) -> None:
    opened.run("loraFx.select(" + json.dumps(f"parts.{NASTY}") + ")")
    opened.settle()
    assert NASTY in panel(opened)
    assert not opened.run("document.querySelector('img')")


ROWS = "[...document.querySelectorAll('#sites tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))"

RANKS = """
(() => {
  const at = [...document.querySelectorAll("#sites th")].findIndex((head) => head.innerText.startsWith("r "));
  return [...document.querySelectorAll("#sites tbody tr")].map((row) => Number(row.cells[at].innerText));
})()
"""


@pytest.mark.slow
@needs_chromium
def test_the_table_and_the_graph_select_each_other(opened: Page) -> None:
    opened.key("t")
    rows = opened.run(ROWS)
    assert len(rows) == 7
    assert [row[:2] for row in rows if "{" in row[0]] == [
        ["blocks.{0-3}.up", "×4"],
        ["blocks.{0-3}.down", "×4"],
        ["blocks.{0-3}.up", "×4"],
    ]
    opened.press("#each-layer")
    assert len(opened.run(ROWS)) == 16
    opened.press('#sites tbody tr[data-name="blocks.3.up"]')
    assert selected(opened) == "blocks.0.up"
    opened.key("Escape")
    opened.run("loraFx.select('stem')")
    opened.key("t")
    chosen = opened.run(
        "[...document.querySelectorAll('#sites tr.chosen')].map((r) => r.dataset.name)"
    )
    assert chosen == ["stem"]
    opened.press('#sites th button[data-key="rank"]')
    opened.press('#sites th button[data-key="rank"]')
    ranks = opened.run(RANKS)
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.slow
@needs_chromium
def test_colors_by_rank(opened: Page) -> None:
    choose(opened, "#color", "rank")
    low, high = opened.run(
        "['stem', 'blocks.0.up'].map((n) => loraFx.graphs[0].color(loraFx.graphs[0].boxOf(n)))"
    )
    assert low != high
    assert "2" in opened.run("document.querySelector('#ramp').innerText")


@pytest.mark.slow
@needs_chromium
def test_what_if_is_live_and_can_be_taken_away(opened: Page) -> None:
    opened.key("w")
    opened.type("up, stem, nowhere")
    told = opened.run("document.querySelector('#verdict').innerText")
    assert told.startswith("6 of 11")
    assert "matches nothing: nowhere" in told
    config = opened.run("document.querySelector('#config').textContent")
    given = eval(config, {"lora_fx": lora_fx})
    assert set(given.target_modules) == {"up", "stem", "nowhere"}
    # What is not typed is that of the configuration that made the picture.
    assert (given.r, given.lora_alpha, given.lora_dropout) == (2, 4, 0.1)
    cost = int(re.search(r"([\d,]+) trained", told)[1].replace(",", ""))  # type: ignore[index]
    plan = lora_fx.plan(Nested(), LoraConfig(r=2, target_modules=["up", "stem"]))
    assert cost == plan.trainable_parameters


@pytest.mark.slow
@needs_chromium
def test_what_if_selects_in_the_browser_what_peft_does(opened: Page) -> None:
    """The table by which selection is compared with PEFT's, and the configuration that is taken away."""
    cases = [case.values[0] for case in CASES]
    cases = [values for values in cases if isinstance(values, dict) and "task_type" not in values]
    cases += [{"target_modules": ["q_proj"], "scope": ["model.layers.1", "h"]}]
    cases += [{"scope": ["model"], "modules_to_save": ["mlp"], "exclude_modules": ["k_proj"]}]
    typed = [{key: written(value) for key, value in values.items()} for values in cases]
    asked = [
        (one, told) for one, told in zip(cases, typed, strict=True) if None not in told.values()
    ]
    given = json.dumps({"names": LINEARS, "cases": [told for _, told in asked]})
    code = SELECT.replace("console.log(JSON.stringify(answers));", "return answers;")
    answers = opened.run(f"(() => {{ const given = {given}; {code} }})()")
    tried = 0
    for (values, _), answer in zip(asked, answers, strict=True):
        if answer == "unsure":
            continue
        found, fields = answer
        config = LoraConfig(**values)
        assert found == [name for name in LINEARS if judge(name, config).selected], values
        taken = LoraConfig(**fields)
        assert found == [name for name in LINEARS if judge(name, taken).selected], fields
        tried += 1
    assert tried >= 90


def written(value: Any) -> str | None:
    """How a value of the table is typed into the page; None where it means something else there."""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return value if re.search(r"[\\^$*+?()\[\]{}|]", value) or value == "all-linear" else None
    return json.dumps([*value]) if value else None


PLANNED: list[dict[str, Any]] = [
    {},
    {"target_modules": "all-linear"},
    {"target_parameters": ["experts.gate_up_proj"]},
    {"target_parameters": ["gate_up_proj", "q_proj.weight"], "target_modules": ["v_proj"]},
    {"target_parameters": ["q_proj.weight"], "exclude_modules": ["q_proj"]},
    {"target_parameters": ["down_proj"], "scope": ["model.layers.1"]},
    {"target_parameters": ["q_proj.weight"], "modules_to_save": ["layers.0.self_attn"]},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
    {"scope": ["model.layers.0"], "layers_to_transform": [0]},
]  # fmt: skip


@pytest.mark.slow
@needs_chromium
def test_what_if_selects_what_a_plan_does(chromium: Page, tmp_path: Path) -> None:
    """With experts, a router and a head: what names alone do not say."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    chromium.open(visualize(model, tmp_path / "experts.html").as_uri())
    for values in PLANNED:
        typed = json.dumps({key: written(value) for key, value in values.items()})
        found = chromium.run(
            f"(() => {{ const ask = Find.asked({typed}), graph = loraFx.graphs[0];"
            "const { selected } = Find.select(graph.targets, ask, graph.modules);"
            "return [ask.objection, selected.map((row) => row.name),"
            "selected.reduce((sum, row) => sum + Find.costOf(row, 4), 0)]; })()"
        )
        plan = lora_fx.plan(model, LoraConfig(r=4, **values))
        cost = sum(row.parameters for row in plan.sites)
        assert found == ["", [row.name for row in plan.sites], cost], values
    chromium.key("w")
    whole = ["lm_head", "model.norm", "layers.1.mlp.gate"]
    for field, text in (("#saved", ", ".join(whole)), ("#targets", "q_proj")):
        choose(chromium, field, text)
    told = chromium.run("document.querySelector('#verdict').innerText")
    saved = lora_fx.plan(model, LoraConfig(target_modules=["q_proj"], modules_to_save=whole))
    lines = [line for line in told.splitlines() if line.startswith("trained in full: ")]
    assert {line.removeprefix("trained in full: ").partition(",")[0] for line in lines} == {
        *saved.saved_modules
    }
    counts = [int(line.rpartition(", ")[2].split()[0].replace(",", "")) for line in lines]
    adapted = sum(row.parameters for row in saved.sites)
    assert sum(counts) + adapted == saved.trainable_parameters
    for form in ("JSON", "YAML", "Python"):
        choose(chromium, "#form", form)
        assert "lm_head" in chromium.run("document.querySelector('#config').textContent")
    assert not chromium.complaints


class Fused(nn.Module):
    """A fused qkv, a fused gate and up, and an attention layer of PyTorch, in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusedLayer() for _ in range(2))
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class FusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.gate_up = nn.Linear(8, 32, bias=False)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


IN_PARTS: list[dict[str, Any]] = [
    {},
    {"target_modules": "all-linear"},
    {"target_modules": ["qkv.q", "qkv.v"]},
    {"target_modules": ["q", "gate_up.up"]},
    {"target_modules": r".*\.(q|up)"},
    {"target_modules": r".*qkv(\.q)?"},
    {"target_modules": ["qkv"], "exclude_modules": ["qkv.k"]},
    {"exclude_modules": ["k", "gate"]},
    {"target_modules": ["qkv.0_8", "qkv.20_24", "down"]},
    {"target_modules": ["qkv.0_3", "layers.1.qkv.v"]},
    {"target_modules": ["qkv", "q"]},
    {"target_modules": ["q", "down"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
    {"target_modules": ["v", "head"], "modules_to_save": ["layers.0"]},
    {"target_modules": ["up"], "scope": ["layers.1"]},
    {"target_parameters": ["layers.0.qkv.weight"], "target_modules": ["gate"]},
    {"target_modules": ["attn"]},
    {"target_modules": ["attn"], "exclude_modules": ["out_proj"]},
    {"target_modules": ["attn.q", "out_proj"]},
    {"target_modules": ["qkv.q", "attn", "nowhere"]},
    {"target_modules": ["q", "down"], "rank_pattern": {"layers.1.qkv.q": 7, "down": 2}},
]  # fmt: skip


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("drawn", "kind"),
    [
        ("model", {}),
        ("plan", {}),
        ("rewritten", {}),
        ("plan", {"use_dora": True}),
        ("rewritten", {"lora_bias": True}),
    ],
)
def test_what_if_adapts_parts_as_a_plan_does(
    chromium: Page, tmp_path: Path, drawn: str, kind: dict[str, Any]
) -> None:
    """Of fused weights and of attention layers, whatever the picture that is looked at has adapted."""
    model, r = Fused(), 4
    config = LoraConfig(r=r, target_modules=["qkv.q", "qkv.8_16", "gate_up", "attn"], **kind)
    made = {
        "model": lambda: model,
        "plan": lambda: lora_fx.plan(model, config),
        "rewritten": lambda: lora_fx.rewrite(model, config),
    }
    chromium.open(visualize(made[drawn](), tmp_path / "parts.html").as_uri())
    for values in IN_PARTS:
        plan = lora_fx.plan(model, LoraConfig(r=r, **values, **kind))
        fields = {key: value for key, value in values.items() if key != "rank_pattern"}
        typed = json.dumps({key: written(value) for key, value in fields.items()})
        ranks = json.dumps(values.get("rank_pattern", {}))
        objection, names, cost, idle, clash = chromium.run(
            f"(() => {{ const ask = Find.asked({typed}), graph = loraFx.graphs[0];"
            "const { selected, idle, left, clash } = Find.select(graph.targets, ask, graph.modules);"
            f"const cost = selected.reduce((sum, row) => sum + Find.costOf(row, {r}, {ranks}), 0);"
            "return [ask.objection, selected.map((row) => row.name), cost, [...idle, ...left], clash]; })()"
        )
        assert (objection, clash) == ("", ""), values
        assert sorted(names) == sorted(row.name for row in plan.sites), values
        assert cost == sum(row.parameters for row in plan.sites), values
        told = {line.split("'")[1] for line in plan.unmatched}
        assert set(idle) == told, values
    assert not chromium.complaints


@pytest.mark.slow
@needs_chromium
def test_what_if_says_which_parts_cannot_be(chromium: Page, tmp_path: Path) -> None:
    """Where a plan is refused, the page says the same."""
    model = Fused()
    chromium.open(visualize(model, tmp_path / "parts.html").as_uri())
    chromium.key("w")
    for targets in (["qkv.0_9", "qkv.8_16"], ["qkv.16_40"], ["qkv.9_3"]):
        choose(chromium, "#targets", ", ".join(targets))
        told = chromium.run("document.querySelector('#verdict').innerText")
        with pytest.raises(ConfigError) as refused:
            lora_fx.plan(model, LoraConfig(target_modules=targets))
        said = str(refused.value).partition("rows")[2]
        assert said in told
    assert chromium.run("document.querySelector('#config').textContent") == ""


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["qkv.q", "qkv.v"], "r": 3, "lora_alpha": 0.5, "lora_dropout": 0.25},
    {"target_modules": r".*\.(q|up)", "use_rslora": True, "init_lora_weights": False},
    {"target_modules": "head", "modules_to_save": ["attn"], "bias": "lora_only"},
    {"target_modules": "all-linear", "exclude_modules": ["layers.0.qkv", "down"]},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
    {"target_modules": [], "target_parameters": ["qkv.weight"], "scope": "layers.1"},
    {"rank_pattern": {"layers.0.down": 2}, "alpha_pattern": {"qkv": 3.5}, "task_type": "SEQ_CLS"},
]


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("values", CONFIGS, ids=range(len(CONFIGS)))
def test_what_if_starts_with_the_configuration_of_the_picture(
    chromium: Page, tmp_path: Path, values: dict[str, Any]
) -> None:
    model, config = Fused(), LoraConfig(**values)
    plan = lora_fx.plan(model, config)
    if config.target_modules == "head":  # an expression, which looks like a name
        config = dataclasses.replace(config, target_modules="(?:head)")
    for drawn in (plan, lora_fx.rewrite(model, config)):
        chromium.open(visualize(drawn, tmp_path / "start.html", force=True).as_uri())
        chromium.key("w")
        taken = chromium.run("document.querySelector('#config').textContent")
        given = eval(taken, {"lora_fx": lora_fx})
        assert given == config
        told = chromium.run("document.querySelector('#verdict').innerText")
        cost = int(re.search(r"([\d,]+) trained", told)[1].replace(",", ""))  # type: ignore[index]
        assert cost == sum(row.parameters for row in plan.sites)
        choose(chromium, "#form", "JSON")
        taken = json.loads(chromium.run("document.querySelector('#config').textContent"))
        assert LoraConfig.from_dict(taken) == config
    assert not chromium.complaints


@pytest.mark.slow
@needs_chromium
def test_the_panel_names_the_layer_that_was_asked_for(opened: Page) -> None:
    """Equal layers are drawn once: a link, the table and the search mean one of them."""

    def link() -> None:
        opened.run("location.hash = '#blocks.3.up'")

    def row() -> None:
        opened.key("t")
        opened.press("#each-layer")
        opened.press('#sites tbody tr[data-name="blocks.3.up"]')
        assert opened.run("document.querySelector('tr.chosen').dataset.name") == "blocks.3.up"
        opened.press("#tab-details")

    def hit() -> None:
        choose(opened, "#search", "blocks.3.up")

    for ask in (link, row, hit):
        opened.run("loraFx.select('stem')")
        ask()
        opened.settle()
        told = panel(opened)
        assert "blocks.3.up" in told
        assert "blocks.0.up" not in told
        assert "drawn once for blocks.0 … blocks.3" in told
        assert selected(opened) == "blocks.0.up"
    opened.run("location.hash = '#blocks.2'")
    opened.settle()
    assert panel(opened).startswith("blocks.2\n")
    assert opened.run("location.hash") == "#blocks.2"


@pytest.mark.slow
@needs_chromium
def test_light_and_dark_can_be_switched(opened: Page) -> None:
    def colors() -> list[str]:
        return list(
            opened.run(
                "[getComputedStyle(document.body).backgroundColor,"
                "loraFx.graphs[0].looks.of('box leaf', 'frame', 'rect').fill]"
            )
        )

    light = colors()
    opened.press("#theme")
    dark = colors()
    assert all(one != other for one, other in zip(light, dark, strict=True))
    opened.run("document.activeElement.blur()")
    opened.key("d")
    assert colors() == light
    # What the system says later does not undo a choice.
    opened.size(1200, 800, dark=True)
    assert colors() == light
    opened.size(1200, 800)


@pytest.mark.slow
@needs_chromium
def test_dragging_wheel_and_depth(opened: Page) -> None:
    x, y = 300.0, 500.0
    before = opened.run("loraFx.graphs[0].view")
    opened.mouse("mousePressed", x, y, button="left", clickCount=1)
    opened.mouse("mouseMoved", x + 60, y + 40, button="left", buttons=1)
    opened.mouse("mouseReleased", x + 60, y + 40, button="left", clickCount=1)
    opened.settle()
    after = opened.run("loraFx.graphs[0].view")
    moved = [after[axis] - before[axis] for axis in "xy"]
    assert moved == pytest.approx([60, 40])
    opened.mouse("mouseWheel", x, y, deltaX=0, deltaY=-240)
    opened.settle()
    assert opened.run("loraFx.graphs[0].view.scale") > after["scale"]
    choose(opened, "#depth", "1")
    assert opened.run("[...loraFx.graphs[0].shown()].length") < 12


@pytest.mark.slow
@needs_chromium
def test_paper_and_svg_have_everything_that_is_open(opened: Page) -> None:
    words = opened.run("loraFx.graphs[0].toSvg().textContent")
    assert "stem" in words
    assert "r 2 · × 2" in words
    assert len(opened.pdf()) > 5000


@pytest.mark.slow
@needs_chromium
def test_files_are_saved_whole(opened: Page, tmp_path: Path) -> None:
    opened.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for button in ("#save-svg", "#save-png"):
        opened.press(button)
    svg, png = tmp_path / "Nested.svg", tmp_path / "Nested.png"
    for _ in range(100):
        opened.settle()
        if svg.is_file() and png.is_file():
            break
        time.sleep(0.05)
    drawn = ET.parse(svg)
    assert "stem" in "".join(drawn.getroot().itertext())
    assert png.read_bytes().startswith(b"\x89PNG")
    wide, high = struct.unpack(">II", png.read_bytes()[16:24])
    assert min(wide, high) > 300


@pytest.mark.slow
@needs_chromium
def test_two_are_compared_and_move_together(chromium: Page, tmp_path: Path) -> None:
    config = LoraConfig(r=2)
    model = Nested()
    both = [lora_fx.plan(model, config), lora_fx.rewrite(model, config)]
    chromium.open(visualize(both, tmp_path / "two.html").as_uri())
    chromium.click(*spot(chromium, "stem"))
    chosen = chromium.run("loraFx.graphs.map((graph) => graph.selected?.fqn)")
    assert chosen == ["stem", "stem"]
    tops = chromium.run(
        "loraFx.graphs.map((g) => g.view.y + g.spotOf(g.selected).y * g.view.scale)"
    )
    assert tops[0] == pytest.approx(tops[1])
    before = chromium.run("loraFx.graphs.map((graph) => graph.view)")
    chromium.mouse("mouseWheel", 300, 500, deltaX=0, deltaY=-240)
    chromium.settle()
    after = chromium.run("loraFx.graphs.map((graph) => graph.view)")
    factors = [new["scale"] / old["scale"] for new, old in zip(after, before, strict=True)]
    assert factors[0] > 1
    assert factors[0] == pytest.approx(factors[1])
    tops = chromium.run(
        "loraFx.graphs.map((g) => g.view.y + g.spotOf(g.selected).y * g.view.scale)"
    )
    assert tops[0] == pytest.approx(tops[1])
    assert not chromium.complaints
    assert not chromium.requests


@pytest.mark.slow
@needs_chromium
def test_a_phone_and_the_dark_have_all_of_it(opened: Page) -> None:
    try:
        light = opened.run("loraFx.graphs[0].looks.of('box leaf', 'frame', 'rect').fill")
        opened.size(380, 720, dark=True)
        opened.run("loraFx.select('stem')")
        opened.settle()
        dark = opened.run("loraFx.graphs[0].looks.of('box leaf', 'frame', 'rect').fill")
        assert dark != light
        assert opened.run("document.documentElement.scrollWidth") <= 380
        assert opened.run("document.documentElement.scrollHeight") <= 720
        assert opened.run("document.querySelector('#side').getBoundingClientRect().height") > 200
        assert "r 2" in panel(opened)
        area = opened.run(
            "(() => { const a = loraFx.graphs[0].area; return [a.width, a.height]; })()"
        )
        assert min(area) > 120
    finally:
        opened.size(1200, 800)


@pytest.mark.slow
@needs_chromium
def test_a_large_model_opens_and_answers_at_once(chromium: Page, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=8192,
                intermediate_size=28672,
                num_hidden_layers=80,
                num_attention_heads=64,
                num_key_value_heads=8,
            )
        )
    ranks = {f"layers.{i}.self_attn.q_proj": 8 + i for i in range(80)}
    model = lora_fx.rewrite(model, LoraConfig(r=8, rank_pattern=ranks))
    path = visualize(model, tmp_path / "large.html")
    assert path.stat().st_size < 2_500_000
    start = time.perf_counter()
    chromium.open(path.as_uri())
    assert time.perf_counter() - start < 2
    chromium.run("loraFx.graphs[0].toDepth(99)")
    chromium.key("Tab")
    took = chromium.run(
        "(() => { const start = performance.now();"
        "document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'Tab', bubbles: true }));"
        "loraFx.graphs[0].paint(); return performance.now() - start; })()"
    )
    assert took < 50
    assert not chromium.complaints


PAN = """
new Promise((done) => {
  const graph = loraFx.graphs[0], paint = graph.paint, told = { drawn: 0, still: 0, script: [] };
  let frames = 0, start = 0;
  graph.paint = () => {
    const before = performance.now(), area = paint.call(graph);
    told.script.push(performance.now() - before);
    told.drawn += graph.drawn;
    told.still += graph.drawn === 0;
    return area;
  };
  const step = () => {
    if (!frames) start = performance.now();
    if (++frames > 60) {
      delete graph.paint;
      told.script = told.script.sort((a, b) => a - b)[30];
      done({ ...told, frames: 60000 / (performance.now() - start) });
      return;
    }
    graph.move(graph.view.x + 3, graph.view.y + 1, graph.view.scale);
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})
"""


SHIFT = """
(() => {
  const graph = loraFx.graphs[0], context = graph.canvas.getContext("2d");
  const pixels = () => context.getImageData(...graph.window).data;
  graph.view = { ...graph.view, x: 40, y: -100 };
  graph.painted = null;
  graph.paint();
  let few = 0, still = 0;
  for (const [x, y] of [[7, 5], [-30, 12], [18, -40], [-150, 260], [170, -90], [3, 3]]) {
    graph.view = { ...graph.view, x: graph.view.x + x, y: graph.view.y + y };
    graph.paint();
    few = Math.max(few, graph.drawn);
    still += graph.drawn === 0;
  }
  const shifted = pixels();
  graph.painted = null;
  graph.paint();
  const whole = pixels();
  let other = 0;
  for (let i = 0; i < whole.length; i++) if (Math.abs(whole[i] - shifted[i]) > 8) other++;
  return [other / whole.length, few, graph.drawn, still];
})()
"""


def many_boxes(count: int) -> Picture:
    """A picture with a given number of boxes, all of them open."""
    ids = itertools.count()
    blocks = []
    for block in range(count // 20):
        children = tuple(
            Box(f"n{next(ids)}", Kind.SITE, f"proj{i}", "Linear 64×64", f"blocks.{block}.proj{i}")
            for i in range(19)
        )
        edges = tuple((a.id, b.id) for a, b in itertools.pairwise(children))
        fqn = f"blocks.{block}"
        blocks.append(
            Box(f"n{next(ids)}", Kind.MODULE, fqn, "Block", fqn, (), children, edges, flow=True)
        )
    root = Box(f"n{next(ids)}", Kind.OPAQUE, "model", "Model", "", (), tuple(blocks))
    return Picture("Many", (), root, sites=(SiteRow("blocks.0.proj0", State.ADAPTED, rank=1),))


@pytest.mark.slow
@needs_chromium
def test_pans_over_twenty_thousand_boxes(chromium: Page, tmp_path: Path) -> None:
    path = tmp_path / "many.html"
    path.write_text(to_html(many_boxes(20_000)), encoding="utf-8")
    chromium.open(path.as_uri())
    chromium.run("loraFx.graphs[0].toDepth(9)")
    for more in (1, 9):
        start = f"loraFx.graphs[0].fit(loraFx.graphs[0].root, false); loraFx.graphs[0].zoom({more})"
        for _ in range(3):  # others use the machine, too
            chromium.run(start)
            chromium.settle()
            whole = chromium.run("loraFx.graphs[0].drawn")
            told = chromium.run(PAN)
            # A frame moves what is there; what comes into view is drawn ahead, once in a while.
            assert told["still"] >= 55
            assert told["drawn"] < whole
            assert told["script"] < 2
            if told["frames"] > 30:
                break
        assert told["frames"] > 30
    chromium.run("loraFx.graphs[0].fit(loraFx.graphs[0].root, false)")
    chromium.settle()
    other, few, every, still = chromium.run(SHIFT)
    assert other < 0.002
    assert few < every / 2
    assert still >= 1


# --- the first ten seconds ---


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 32, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    return lora_fx.rewrite(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    return lora_fx.rewrite(model, LoraConfig(r=4))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 31}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    return lora_fx.rewrite(model, config)


def resnet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return lora_fx.rewrite(torchvision.models.resnet18(), LoraConfig(r=4))


FIRST = """
(() => {
  const graph = loraFx.graphs[0], { area, view } = graph, spot = graph.spotOf(graph.trained[0]);
  const left = view.x + spot.x * view.scale, top = view.y + spot.y * view.scale;
  const right = left + spot.width * view.scale, bottom = top + spot.height * view.scale;
  const inside = left >= 0 && top >= 0 && right <= area.width && bottom <= area.height;
  const idle = [...graph.shown()].filter((box) => box.open && box.children.length && !box.sites).length;
  return [graph.trained[0].fqn, inside, view.scale, idle];
})()
"""

HEADER = """
Object.fromEntries(
  [...document.querySelectorAll("#summary div")].map(({ children: [a, b] }) => [a.innerText, b.innerText])
)
"""


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("draw", "first", "why"),
    [
        (resnet, "conv1", "the output head"),
        (bert, "bert.encoder.layer.0.attention.self.query", "trained in full"),
        (llama, "model.layers.0.self_attn.q_proj", "matches no target in target_modules"),
        (mixtral, "model.layers.0.self_attn.q_proj", "the router of a mixture of experts"),
    ],
)
def test_the_first_screen_answers_where_what_and_why(
    chromium: Page, tmp_path: Path, draw: Callable[[], nn.Module], first: str, why: str
) -> None:
    """Where adapters are and what they cost is there at once, why others are not is one key away."""
    model = draw()
    inputs = torch.randn(2, 3, 64, 64) if draw is resnet else None
    chromium.open(visualize(model, tmp_path / "first.html", example_inputs=inputs).as_uri())
    chromium.complaints.clear()
    name, inside, scale, idle = chromium.run(FIRST)
    assert (name, inside, idle) == (first, True, 0)
    assert scale >= 0.75
    header = chromium.run(HEADER)
    unit = "sample" if draw is resnet else "token"
    assert {"trainable", "adapted sites", f"extra FLOPs a {unit}"} < {*header}
    assert header[f"saved for backward a {unit}"].endswith("B")
    chromium.key("t")
    rows = chromium.run(ROWS)
    states = [row[1] if row[1] in ("adapted", "not adapted") else row[2] for row in rows]
    assert {*states} == {"adapted", "not adapted"}
    assert len(rows) < 25
    assert any(why in cell for row in rows for cell in row)
    for row, state in zip(rows, states, strict=True):
        assert state == "adapted" or len(max(row, key=len)) > 10
    assert not chromium.complaints


@pytest.mark.slow
@needs_chromium
def test_costs_in_the_header_are_those_of_the_plan(chromium: Page, tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_dropout=0.1)
    plan = lora_fx.plan(Nested(), config)
    headers = []
    for drawn in (plan, lora_fx.rewrite(Nested(), config)):
        chromium.open(visualize(drawn, tmp_path / "costs.html", force=True).as_uri())
        headers.append(chromium.run(HEADER))
    assert headers[0]["extra FLOPs a token"] == headers[1]["extra FLOPs a token"]
    extra = headers[1]["extra FLOPs a token"]
    assert re.fullmatch(rf"{re.escape(f'{plan.flops / 1000:.3g}')} k \(\+\d+ %\)", extra)
    assert headers[1]["saved for backward a token"] == f"{plan.saved / 1000:.3g} kB"


@pytest.mark.slow
@needs_chromium
def test_buttons_open_the_table_and_what_if(opened: Page) -> None:
    for button, sheet in (("#show-sites", "#sites"), ("#show-try", "#try")):
        for shown in (True, False):
            opened.press(button)
            assert opened.run(f"document.querySelector('{sheet}').checkVisibility()") is shown
            pressed = opened.run(f"document.querySelector('{button}').getAttribute('aria-pressed')")
            assert pressed == str(shown).lower()
    opened.press("#show-try")
    assert "linear operations" in opened.run("document.querySelector('#verdict').innerText")


@pytest.mark.slow
@needs_chromium
def test_the_legend_explains_what_is_drawn(opened: Page, tmp_path: Path) -> None:
    legend = opened.run(
        "[...document.querySelectorAll('#key > span')].map((s) => s.lastChild.textContent)"
    )
    signs = {"adapted", "all inside are adapted", "equal modules, drawn once", "default", "other"}
    assert signs < {*legend}
    assert "linear, not adapted" not in legend  # there is none
    sizes = opened.run("[...document.querySelectorAll('#key svg')].map((s) => s.getBBox().width)")
    assert min(sizes) > 10
    config = LoraConfig(r=2, target_modules=["head"], modules_to_save=["stem"])
    opened.open(visualize(lora_fx.rewrite(Net(), config), tmp_path / "legend.html").as_uri())
    legend = opened.run(
        "[...document.querySelectorAll('#key > span')].map((s) => s.lastChild.textContent)"
    )
    assert {"adapted", "linear, not adapted", "trained in full"} < {*legend}
    assert {"some inside are adapted", "none inside is adapted"} < {*legend}


@pytest.mark.slow
@needs_chromium
def test_n_and_p_visit_the_adapters(opened: Page) -> None:
    order = opened.run("loraFx.graphs[0].trained.map((box) => box.fqn)")
    assert order[0] == "stem"
    assert len(order) == 5
    visited = []
    for _ in order:
        opened.key("n")
        visited.append(selected(opened))
    assert visited == order
    assert opened.run("document.querySelector('#found').textContent").startswith("adapter 5 / 5")
    assert "r 3 · × 2.667 · other" in panel(opened) or "r 2" in panel(opened)
    opened.key("n")
    assert selected(opened) == order[0]
    opened.key("p")
    assert selected(opened) == order[-1]
    # Between two of them.
    opened.run(f"loraFx.select({json.dumps(f'parts.{NASTY}.act')})")
    opened.key("p")
    assert selected(opened).endswith(".up")
    opened.run(f"loraFx.select({json.dumps(f'parts.{NASTY}.act')})")
    opened.key("n")
    assert selected(opened).endswith(".down")


@pytest.mark.slow
@needs_chromium
def test_an_open_branch_is_visited_at_its_beginning(chromium: Page, tmp_path: Path) -> None:
    """Without fusion, a module with an adapter is a tall box, and a bare parameter has none of its own."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.mix = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) @ self.mix

    model = adapted(Bare(), target_modules=["fc", "mix"])
    chromium.open(visualize(model, tmp_path / "open.html").as_uri())
    chromium.complaints.clear()
    top = chromium.run("(() => { const { view, trained } = loraFx.graphs[0];"
                       "return view.y + loraFx.graphs[0].spotOf(trained[0]).y * view.scale })()")  # fmt: skip
    assert 0 <= top < 300
    names = []
    for _ in range(2):
        chromium.key("n")
        names.append(chromium.run("loraFx.graphs[0].selected.name"))
    assert names == ["fc", "linear"]
    assert "mix" in panel(chromium)
    assert not chromium.complaints


INSIDE = """
(() => {
  const graph = loraFx.graphs[0], { area, view, root } = graph;
  const right = area.width - view.x - root.width * view.scale;
  return [view.x, view.y, right, area.height - view.y - root.height * view.scale];
})()
"""


@pytest.mark.slow
@needs_chromium
def test_fit_shows_the_whole_picture(opened: Page) -> None:
    """Both ways, and again once a panel takes room."""
    opened.run("loraFx.graphs[0].toDepth(99)")
    for ask in ("#fit", "#show-try", "#hide"):
        opened.press(ask)
        left, top, right, bottom = opened.run(INSIDE)
        assert min(left, top, right, bottom) >= 23
        assert left == pytest.approx(right)
        assert top == pytest.approx(bottom)


SCREEN = """
(() => {
  const graph = loraFx.graphs[0], { view, area } = graph, spot = graph.spotOf(graph.boxOf(%s));
  return [view.x + spot.x * view.scale, view.x + (spot.x + spot.width) * view.scale, area.width];
})()
"""


@pytest.mark.slow
@needs_chromium
def test_the_panel_covers_nothing(opened: Page) -> None:
    """The picture moves aside, and what was clicked stays in view."""
    opened.run("loraFx.graphs[0].move(loraFx.graphs[0].view.x + 300, 30, 0.9)")
    opened.settle()
    opened.click(*spot(opened, "stem"))
    left, right, width = opened.run(SCREEN % '"stem"')
    assert width < 810
    assert 0 <= left < right <= width
    opened.key("Escape")
    middle = opened.run("loraFx.graphs[0].area.width / 2")
    opened.run("loraFx.graphs[0].begin()")
    opened.settle()
    opened.click(*spot(opened, ""))
    left, right, width = opened.run(SCREEN % '""')
    assert width < 810 < 2 * middle
    assert (left + right) / 2 == pytest.approx(width / 2, abs=1)


@pytest.mark.slow
@needs_chromium
def test_a_double_click_opens_what_its_first_click_selects(opened: Page) -> None:
    """Although the panel that the first click opens moves the picture."""
    opened.press("#fit")
    x, y = spot(opened, "blocks.0")
    before = opened.run("loraFx.graphs[0].boxOf('blocks.0').open")
    opened.mouse("mouseMoved", x, y)
    for count in (1, 2):
        opened.mouse("mousePressed", x, y, button="left", clickCount=count)
        opened.mouse("mouseReleased", x, y, button="left", clickCount=count)
        opened.settle()
    assert selected(opened) == "blocks.0"
    assert opened.run("loraFx.graphs[0].boxOf('blocks.0').open") is not before


@pytest.mark.slow
@needs_chromium
def test_a_click_closes_the_tooltip(opened: Page) -> None:
    opened.press("#fit")
    x, y = spot(opened, "stem")
    opened.mouse("mouseMoved", x, y)
    opened.settle()
    assert not opened.run("document.querySelector('#tooltip').hidden")
    opened.click(x, y)
    assert opened.run("document.querySelector('#tooltip').hidden")
    x, y = spot(opened, "stem")
    opened.mouse("mouseMoved", x + 2, y)
    opened.settle()
    assert opened.run("document.querySelector('#tooltip').hidden")  # the panel says it all
    opened.mouse("mouseMoved", *spot(opened, "blocks.0"))
    opened.settle()
    assert not opened.run("document.querySelector('#tooltip').hidden")


@pytest.mark.slow
@needs_chromium
def test_a_tooltip_begins_with_the_reason(chromium: Page, tmp_path: Path) -> None:
    model = lora_fx.rewrite(tiny_llama()[0], LoraConfig(r=2, target_modules=["q_proj"]))
    chromium.open(visualize(model, tmp_path / "graph.html").as_uri())
    name = "model.layers.0.self_attn.k_proj"
    chromium.run("loraFx.select('model.layers.0.self_attn.q_proj')")  # opens what is around it
    chromium.press("#fit")
    assert chromium.run(f"loraFx.graphs[0].boxOf({json.dumps(name)}).facts.length") > 8
    chromium.mouse("mouseMoved", *spot(chromium, name))
    chromium.settle()
    told = chromium.run("document.querySelector('#tooltip').textContent")
    assert told.startswith("not selectedmatches no target in target_modules")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_hits_are_amber(opened: Page, dark: bool) -> None:
    try:
        opened.size(1200, 800, dark=dark)
        color = opened.run("loraFx.graphs[0].looks.of('box leaf hit', 'frame', 'rect').stroke")
        red, green, blue = map(int, re.findall(r"\d+", color)[:3])
        assert red > 200
        assert 130 < green < 220
        assert blue < 80
    finally:
        opened.size(1200, 800)


@pytest.mark.slow
@needs_chromium
def test_fields_of_nodes_are_internals(opened: Page) -> None:
    opened.run("loraFx.select('stem')")
    told = panel(opened)
    assert "call_function" not in told
    assert "trained" in told
    assert "Internals" in told
    opened.press("#details summary")
    told = panel(opened)
    assert "call_function" in told
    assert "lora_linear" in told


@pytest.mark.slow
@needs_chromium
def test_the_panel_begins_with_the_reason(chromium: Page, tmp_path: Path) -> None:
    model = lora_fx.rewrite(Net(), LoraConfig(r=2, target_modules=["head"]))
    chromium.open(visualize(model, tmp_path / "why.html").as_uri())
    chromium.run("loraFx.select('stem')")
    told = panel(chromium).splitlines()
    reason = "Not adapted: matches no target in target_modules"
    assert reason in told
    assert told.index(reason) < told.index("class")


@pytest.mark.slow
@needs_chromium
def test_the_panel_of_a_module_has_the_reasons_of_its_operations(
    chromium: Page, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["fc", "up"], exclude_modules=["0.up"])
    model = nn.ModuleDict({"around": AroundBare(), "blocks": nn.ModuleList([Block(8), Block(8)])})
    chromium.open(visualize(lora_fx.rewrite(model, config), tmp_path / "why.html").as_uri())
    reasons = """
      [...document.querySelectorAll("#details .reason")].map((line) => line.innerText.split("\\n"))
    """

    def told(name: str) -> list[list[str]]:
        chromium.run(f"loraFx.select({json.dumps(name)})")
        lines: list[list[str]] = chromium.run(reasons)
        return lines

    unmatched = "Not adapted: matches no target in target_modules"
    bare = told("around.bare")
    assert bare[0] == [unmatched, "down"]
    assert [line[1] for line in bare[1:]] == ["many", "both"]
    assert all(line[0].startswith("Cannot be adapted: ") for line in bare[1:])
    assert told("blocks.1") == [[unmatched, "down"]]
    excluded, rest = told("blocks.0")
    assert "exclude_modules" in excluded[0]
    assert excluded[1] == "up"
    assert rest == [unmatched, "down"]
    assert told("blocks.0.down") == [[unmatched]]
    assert told("blocks.1.up") == []


@pytest.mark.slow
@needs_chromium
def test_the_panel_has_the_share_of_extra_flops(chromium: Page, tmp_path: Path) -> None:
    model = lora_fx.rewrite(Net(depth=2), LoraConfig(r=2, target_modules=["up"]))
    chromium.open(visualize(model, tmp_path / "share.html").as_uri())
    # 2 r (in + out) of 2 in out, and of the whole block.
    for name, share in (("blocks.0.up", "+38 %"), ("blocks.0", "+19 %"), ("", "+17 %")):
        chromium.run(f"loraFx.select({json.dumps(name)})")
        assert f"a token ({share})" in panel(chromium)
    chromium.press("#tab-sites")
    shares = [row[7] for row in chromium.run(ROWS) if "adapted" in row]
    assert shares == ["+38 %"]  # both layers


CUT = """
[...document.querySelectorAll("#sites, #sites td")]
  .filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.innerText)
"""


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("target", ["q_proj", "lm_head", "down_proj"])
def test_the_table_of_sites_fits_a_window(chromium: Page, tmp_path: Path, target: str) -> None:
    """Every reason can be read as a whole, without scrolling."""
    model, _ = tiny_mixtral(hidden_size=256, intermediate_size=512)
    model = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=[target]))
    try:
        chromium.size(1400, 900)
        chromium.open(visualize(model, tmp_path / "wide.html").as_uri())
        chromium.press("#show-sites")
        assert chromium.run(CUT) == []
        assert "matches no target in target_modules" in str(chromium.run(ROWS))
    finally:
        chromium.size(1200, 800)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_module_without_adapters_is_gray(chromium: Page, tmp_path: Path, dark: bool) -> None:
    config = LoraConfig(r=2, target_modules=["fc"])
    chromium.open(visualize(lora_fx.rewrite(AroundBare(), config), tmp_path / "g.html").as_uri())
    try:
        chromium.size(1200, 800, dark=dark)
        classes = "loraFx.graphs[0].classesOf(loraFx.graphs[0].boxOf('bare'), 1)"
        assert "bare" in chromium.run(classes).split()
        look = "loraFx.graphs[0].looks.of(%s, 'frame', 'rect').fill"
        gray, plain = (chromium.run(look % one) for one in (classes, "'box module'"))
        assert gray != plain
        assert gray == chromium.run(look % "'box leaf is-unselected'")
    finally:
        chromium.size(1200, 800)
