from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import networkx as nx
import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import lora_fx
from lora_fx.errors import ConfigError, LoraFxError
from lora_fx.export.inspection import read_graph
from lora_fx.ir import Region
from lora_fx.tools.draw.drawing import FORMATS, picture_of, to_svg, visualize
from lora_fx.tools.draw.layout import count_of
from lora_fx.tools.draw.painting import _FilePainter
from lora_fx.tools.draw.picture import SCHEMA, Box, State, added
from lora_fx.tools.draw.regions import measured
from tests.tools.pictures import ROLES, SVG, AroundBare, Net, Untraceable, adapted, drawn

OLDER = Version(transformers.__version__) < Version("5.24")
NASTY = "a<b>&\"c'</script><!--]]>\x07\\n{{data}}"


class Scripts(HTMLParser):
    """What a browser takes for the contents of the script elements, and all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        self.attributes += attrs
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def read_page(text: str) -> tuple[Scripts, list[dict[str, Any]]]:
    page = Scripts()
    page.feed(text)
    return page, json.loads(page.scripts[0])


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_writes_every_format(suffix: str, tmp_path: Path) -> None:
    path = visualize(adapted(Net()), tmp_path / f"graph{suffix}")
    assert path == tmp_path / f"graph{suffix}"
    assert path.stat().st_size > 1000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_every_adapter_has_its_nodes_in_the_svg() -> None:
    model = adapted(Net(depth=1))
    boxes = drawn(to_svg(picture_of(model)))
    owners = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    owners -= {"head"}
    for role in ROLES:
        assert {box.fqn for box in boxes if role in box.classes} == owners, role


def test_hovering_tells_what_a_node_is() -> None:
    boxes = drawn(to_svg(picture_of(adapted(Net(depth=1)))))
    (down,) = (box for box in boxes if "A" in box.classes and box.fqn == "stem")
    facts = dict(line.split(": ", 1) for line in down.title.splitlines())
    assert facts["module"] == facts["adapts"].removesuffix(".weight") == "stem"
    assert facts["class"] == "Linear"
    assert facts["op"] == "call_function"
    assert facts["target"].endswith("linear")
    assert facts["rank"] == "2"
    assert facts["scale"] == "2"
    assert "2×3 float32, 6 trainable" in facts.values()


@pytest.mark.parametrize("model", [Net(), Untraceable()], ids=["graph", "registration-order"])
def test_boxes_lie_inside_their_parents_and_never_on_each_other(model: nn.Module) -> None:
    picture = picture_of(adapted(model))
    boxes = {box.id: box for box in drawn(to_svg(picture))}
    assert set(boxes) == {box.id for box in picture.root.walk()}
    for one, other in itertools.combinations([box for box in boxes.values() if box.leaf], 2):
        assert not one.overlaps(other), (one, other)
    for parent in picture.root.walk():
        children = [boxes[child.id] for child in parent.children]
        outer = boxes[parent.id]
        for child in children:
            assert child.x >= outer.x
            assert child.y >= outer.y + 20
            assert child.x + child.width <= outer.x + outer.width
            assert child.y + child.height <= outer.y + outer.height
        for one, other in itertools.combinations(children, 2):
            assert not one.overlaps(other), (one, other)


def test_written_words_fit_their_boxes() -> None:
    for box in drawn(to_svg(picture_of(adapted(Net())))):
        name = next(word for word in box.words if len(word) > 1 or len(box.words) == 1)
        assert len(name) * 7.2 <= box.width


def test_equal_blocks_fold() -> None:
    boxes = drawn(to_svg(picture_of(adapted(Net(depth=4)))))
    folded = [box for box in boxes if box.count > 1]
    assert [(box.fqn, box.count) for box in folded] == [("blocks.0", 4)]
    assert "blocks.0 … blocks.3 (×4)" in folded[0].words
    assert not any(box.fqn.startswith("blocks.1") for box in boxes)


def test_equal_blocks_without_a_graph_around_them_fold() -> None:
    boxes = drawn(to_svg(picture_of(adapted(Untraceable(depth=3)))))
    assert [(box.fqn, box.count) for box in boxes if box.count > 1] == [("layers.0", 3)]


def test_blocks_that_differ_in_rank_do_not_fold() -> None:
    model = adapted(Net(depth=4), rank_pattern={"blocks.2.up": 3})
    folded = [box for box in picture_of(model).root.walk() if box.repeats]
    assert [box.repeats for box in folded] == [("blocks.0", "blocks.1")]


def test_blocks_that_differ_in_scale_do_not_fold() -> None:
    model = adapted(Net(depth=2), alpha_pattern={"blocks.1.down": 16})
    assert not [box for box in picture_of(model).root.walk() if box.repeats]


def test_counts_cover_what_is_folded_away() -> None:
    model = adapted(Net(depth=4))
    root = picture_of(model).root
    assert root.sites == 9
    assert root.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert root.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    (fold,) = (box for box in root.walk() if box.repeats)
    assert fold.sites == 8


class Masked(nn.Module):
    """Reads a weight itself, so that it has a graph for each form of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = nn.functional.linear(x, self.mix)
        if mask is not None:
            x = x * mask
        return self.head(x)


def test_a_shared_module_is_drawn_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.same = nn.Sequential(self.net)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) + self.same(x)

    root = picture_of(Twice()).root
    calls = [box for box in root.walk() if box.kind == "call"]
    assert len(calls) == 1
    assert ("drawn at", "net") in calls[0].facts
    assert root.trainable == sum(p.numel() for p in Net().parameters())


def test_graphml_loads_in_networkx(tmp_path: Path) -> None:
    model = adapted(Net(depth=1))
    graph = nx.read_graphml(visualize(model, tmp_path / "graph.graphml"))
    assert nx.is_directed_acyclic_graph(graph)
    roles = [data["kind"] for _, data in graph.nodes(data=True) if data["adapter"]]
    assert roles.count("A") == roles.count("B") == 3
    assert {data["parent"] for _, data in graph.nodes(data=True)} - {""} <= set(graph)


def test_json_has_the_documented_schema(tmp_path: Path) -> None:
    path = visualize(adapted(Net()), tmp_path / "graph.json")
    document = json.loads(path.read_text("utf-8"))
    assert document["schema"] == SCHEMA
    everything = {entry["id"]: entry for entry in (*document["boxes"], *document["nodes"])}
    assert len(everything) == len(document["boxes"]) + len(document["nodes"])
    assert everything[document["root"]]["parent"] is None
    for box in document["boxes"]:
        assert all(everything[child]["parent"] == box["id"] for child in box["children"])
    for edge in document["edges"]:
        ends = (everything[edge["source"]], everything[edge["target"]])
        assert {end["parent"] for end in ends} == {edge["parent"]}


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_reads_the_dot_file(tmp_path: Path) -> None:
    model = nn.ModuleDict({NASTY: adapted(Net())})
    path = visualize(model, tmp_path / "graph.dot")
    done = subprocess.run(["dot", "-Tsvg", path], capture_output=True, check=True)
    assert not done.stderr
    ET.fromstring(done.stdout)


def test_dot_quotes_what_it_writes(tmp_path: Path) -> None:
    text = visualize(nn.ModuleDict({NASTY: Net()}), tmp_path / "graph.dot").read_text("utf-8")
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    assert re.fullmatch(r"[\w\s\[\]{}=,;.>-]*", outside)


@pytest.mark.parametrize("suffix", [".svg", ".graphml"])
def test_names_are_escaped_in_xml(suffix: str, tmp_path: Path) -> None:
    path = visualize(nn.ModuleDict({NASTY: nn.Linear(2, 2)}), tmp_path / f"graph{suffix}")
    text = "\n".join(ET.parse(path).getroot().itertext())
    assert NASTY.replace("\x07", "\ufffd") in text


def test_names_are_escaped_in_html(tmp_path: Path) -> None:
    path = visualize(nn.ModuleDict({NASTY: nn.Linear(2, 2)}), tmp_path / "graph.html")
    page, (document,) = read_page(path.read_text("utf-8"))
    assert len(page.scripts) == 2
    clean = NASTY.replace("\x07", "\ufffd")
    boxes, strings = document["boxes"], document["strings"]
    assert [strings[box["fqn"]] for box in boxes if "children" not in box] == [clean]


def test_html_is_self_contained(tmp_path: Path) -> None:
    text = visualize(adapted(Net()), tmp_path / "graph.html").read_text("utf-8")
    page, _ = read_page(text)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "url(" not in text
    assert "{{" not in text.replace("{{data}}", "")


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_same_model_same_bytes(suffix: str, tmp_path: Path) -> None:
    one = visualize(adapted(Net()), tmp_path / f"one{suffix}")
    other = visualize(adapted(Net()), tmp_path / f"other{suffix}")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    script = (
        "import sys; from lora_fx.tools.draw.drawing import visualize;"
        "from tests.tools.pictures import Net, adapted;"
        "visualize(adapted(Net()), sys.argv[1])"
    )
    files = [tmp_path / "one.html", tmp_path / "other.html"]
    for seed, path in enumerate(files):
        subprocess.run(
            [sys.executable, "-c", script, path],
            env={"PYTHONHASHSEED": str(seed + 1), "PATH": "/usr/bin:/bin"},
            cwd=Path(__file__).parents[2],
            check=True,
        )
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_plain_model_shows_its_graph_and_stays_as_it_was(tmp_path: Path) -> None:
    model = Net()
    classes = [type(module) for module in model.modules()]
    root = picture_of(model).root
    assert root.flow
    assert root.trainable == sum(p.numel() for p in model.parameters())
    assert root.sites == 0
    assert [type(module) for module in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())


def test_captured_and_merged_models() -> None:
    assert picture_of(lora_fx.capture(Net())).root.flow
    merged = picture_of(lora_fx.merge(adapted(Net()))).root
    assert merged.sites == 0
    assert not [box for box in merged.walk() if box.adapter]


def test_a_plan_shows_what_is_adapted_and_why_the_rest_is_not() -> None:
    plan = lora_fx.plan(Net(depth=3), lora_fx.LoraConfig(r=2, target_modules=["up", "down"]))
    picture = picture_of(plan)
    leaves = {box.fqn: box for box in picture.root.walk() if not box.children}
    assert leaves["blocks.0.up"].kind == "site"
    assert [branch.rank for branch in leaves["blocks.0.up"].branches] == [2]
    assert leaves["head"].kind == "skipped"
    assert any(label == "not selected" and value for label, value in leaves["head"].facts)
    (fold,) = (box for box in picture.root.walk() if box.repeats)
    assert fold.repeats == ("blocks.0", "blocks.1", "blocks.2")
    assert fold.sites == 6
    assert picture.root.trainable == plan.trainable_parameters


def test_plan_rows_of_other_ranks_do_not_fold() -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["up"], rank_pattern={"blocks.1.up": 4})
    root = picture_of(lora_fx.plan(Net(depth=3), config)).root
    assert not [box for box in root.walk() if box.repeats]


def by_fqn(root: Box) -> dict[str, Box]:
    """The boxes of modules by name."""
    found: dict[str, Box] = {}
    for box in root.walk():
        if box.kind not in ("input", "output", "op"):
            found.setdefault(box.fqn, box)
    return found


def transformer(name: str, **options: Any) -> nn.Module:
    """A small model of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = getattr(transformers, f"{name}Config")(num_attention_heads=4, **sizes, **options)
    suffix = "ForSequenceClassification" if name == "Bert" else "ForCausalLM"
    return getattr(transformers, f"{name}{suffix}")(config)  # type: ignore[no-any-return]


def test_experts_say_their_rank() -> None:
    model = transformer("Mixtral", num_local_experts=4, num_key_value_heads=2)
    for optimize in (True, False):
        rewritten = lora_fx.rewrite(model, lora_fx.LoraConfig(r=8), optimize=optimize)
        root = picture_of(rewritten).root
        experts = by_fqn(root)["model.layers.0.mlp.experts"]
        assert [branch.rank for branch in experts.branches] == [8, 8]
        assert [branch.weight for branch in experts.branches] == ["gate_up_proj", "down_proj"]


def test_ranks_of_experts_are_measured_where_no_plan_tells() -> None:
    model = transformer("Mixtral", num_local_experts=4, num_key_value_heads=2)
    rewritten = lora_fx.rewrite(model, lora_fx.LoraConfig(r=8))
    fqn = "model.layers.0.mlp.experts"
    experts, graph = rewritten.get_submodule(fqn), lora_fx.graphs(rewritten)[fqn]
    region = Region(fqn, experts, graph)
    assert measured(region, "gate_up_proj", "default") == (8, 1.0)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def test_a_name_with_a_parenthesis_is_drawn(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("fc(1)", nn.Linear(4, 4))
    model.add_module("act", nn.ReLU())
    config = lora_fx.LoraConfig(r=2, target_modules=["fc(1)"])
    for one in (model, lora_fx.rewrite(model, config)):
        lora_fx.visualize(one, tmp_path / "a.json", force=True)
        assert "fc(1)" in by_fqn(picture_of(one).root)


def test_a_model_whose_operations_an_export_found_is_drawn_by_its_modules() -> None:
    model = transformer("Llama", num_key_value_heads=2)
    inputs = {"input_ids": torch.randint(0, 64, (2, 8))}
    config = lora_fx.LoraConfig(r=2)
    sites = []
    for frontend in ("export", "auto"):
        adapted = lora_fx.rewrite(model, config, frontend=frontend, example_inputs=inputs)
        root = picture_of(adapted).root
        assert root.sites == 14
        sites.append({fqn: box.sites for fqn, box in by_fqn(root).items()})
    assert sites[0] == sites[1]
    assert sites[0]["model.layers.0"] == 14  # both layers in one box


def test_a_fused_operation_has_its_adapters_on_it() -> None:
    config = lora_fx.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["up"])
    model = lora_fx.rewrite(Net(depth=1), config)
    lora_fx.add_adapter(model, lora_fx.LoraConfig(r=3, target_modules=["up", "stem"]), "other")
    for active in (["default"], ["default", "other"]):
        lora_fx.set_adapter(model, active)
        boxes = by_fqn(picture_of(model).root)
        up = boxes["blocks.0.up"]
        assert not up.children
        assert [(one.adapter, one.rank, one.dropout) for one in up.branches] == [
            ("default", 2, 0.1),
            ("other", 3, 0.0),
        ]
        assert [one.active for one in up.branches] == [True, "other" in active]
        assert [one.adapter for one in boxes["stem"].branches] == ["other"]


def test_what_is_trained_otherwise_is_marked() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.fc, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.fc(self.emb(ids)))

    config = lora_fx.LoraConfig(
        r=2,
        target_modules=["fc"],
        modules_to_save=["head"],
        trainable_token_indices={"emb": [1, 2]},
    )
    for drawn_from in (lora_fx.rewrite(Tokens(), config), lora_fx.plan(Tokens(), config)):
        boxes = by_fqn(picture_of(drawn_from).root)
        assert [str(boxes[name].state) for name in ("emb", "fc", "head")] == [
            "rows",
            "adapted",
            "full",
        ]
        assert any("2 rows" in mark for mark in boxes["emb"].marks)
        assert picture_of(drawn_from).root.sites == 1


def test_a_fold_counts_alike_outside_and_inside() -> None:
    root = picture_of(adapted(Net(depth=4))).root
    (fold,) = (box for box in root.walk() if box.repeats)
    assert count_of(fold) == "2 of 2 adapted in each"
    assert sum(child.sites for child in fold.children) == 2


@pytest.mark.skipif(OLDER, reason="layers of transformers before 5.24 have graphs")
def test_modules_without_a_graph_show_how_data_flows() -> None:
    model = transformer("Llama")
    rewritten = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2), frontend="regions")
    before = lora_fx.status(rewritten)
    picture = picture_of(rewritten)
    assert lora_fx.status(rewritten) == before
    boxes = {box.id: box for box in picture.root.walk()}
    layer = by_fqn(picture.root)["model.layers.0"]
    edges = {(boxes[a].name, boxes[b].name) for a, b in layer.edges}
    assert {
        ("hidden_states", "input_layernorm"),
        ("input_layernorm", "self_attn"),
        ("hidden_states", "add"),
        ("add", "post_attention_layernorm"),
        ("post_attention_layernorm", "mlp"),
        ("mlp", "add"),
        ("add", "output"),
    } <= edges
    attention = by_fqn(picture.root)["model.layers.0.self_attn"]
    edges = {(boxes[a].name, boxes[b].name) for a, b in attention.edges}
    assert {("q_proj", "o_proj"), ("v_proj", "o_proj")} <= edges
    assert not picture.notes


def test_other_inputs_are_asked_for_where_a_model_says_nothing() -> None:
    picture = picture_of(Untraceable())
    assert any("registration" in note for note in picture.notes)
    picture = picture_of(Untraceable(), example_inputs=torch.randn(2, 8))
    assert not picture.notes
    assert picture.root.flow


def test_what_is_not_selected_says_why() -> None:
    model = lora_fx.rewrite(Net(depth=1), lora_fx.LoraConfig(r=2, target_modules=["stem"]))
    picture = picture_of(model)
    facts = dict(by_fqn(picture.root)["blocks.0.up"].facts)
    assert facts["not selected"] == "matches no target in target_modules"
    reasons = {row.name: row.reason for row in picture.sites}
    assert reasons["head"] == "matches no target in target_modules"
    assert not reasons["stem"]


class Parts(nn.Module):
    """A fused qkv, a product with a bare parameter, and a forward in a decorator."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.mix = nn.Parameter(torch.randn(8, 8))

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v) @ self.mix


def test_a_single_adapted_part_has_its_name_in_the_box() -> None:
    model = lora_fx.rewrite(Parts(), lora_fx.LoraConfig(r=2, target_modules=["qkv.v"]))
    picture = picture_of(model)
    box = by_fqn(picture.root)["qkv"]
    assert [branch.words for branch in box.branches] == ["v · r 2 · × 4 · default"]
    assert ("not selected", "q, k: matches no target in target_modules") in box.facts
    reasons = {row.name: row.reason for row in picture.sites}
    plan = lora_fx.plan(Parts(), lora_fx.LoraConfig(r=2, target_modules=["qkv.v"]))
    skipped = {row.site.name: row.reason for row in plan.skipped}
    assert {*skipped} == {"qkv.q", "qkv.k", "mix"}
    assert reasons == {**skipped, "qkv.v": ""}
    lora_fx.set_adapter(model, [])
    box = by_fqn(picture_of(model).root)["qkv"]
    assert [branch.words for branch in box.branches] == ["v · r 2 · × 4 · default (off)"]


def test_a_product_with_a_bare_parameter_says_why_it_is_not_adapted() -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["qkv"])
    for optimize in (True, False):
        model = lora_fx.rewrite(Parts(), config, optimize=optimize)
        root = picture_of(model).root
        (box,) = (box for box in root.walk() if box.name == "matmul")
        assert box.state == "unselected"
        assert dict(box.facts)["not selected"] == "matches no target in target_modules"
        assert not any(box.state == "unselected" for box in root.walk() if box.adapter)


def test_the_source_of_a_forward_is_not_that_of_its_decorator() -> None:
    facts = dict(picture_of(Parts()).root.facts)
    assert facts["source"].startswith("test_visualize.py:")


@pytest.mark.parametrize("targets", [None, "all-linear", ["gate_proj", "0.self_attn.q_proj"]])
def test_reasons_are_those_of_the_plan(targets: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    config = lora_fx.LoraConfig(r=2, target_modules=targets, exclude_modules=["o_proj"])
    skipped = {row.site.name: row.reason for row in lora_fx.plan(model, config).skipped}
    rows = picture_of(lora_fx.rewrite(model, config)).sites
    assert {row.name: row.reason for row in rows if row.reason} == skipped


def test_the_header_of_a_convolution_has_the_cost_of_a_sample() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))
    config, inputs = lora_fx.LoraConfig(r=2), torch.randn(2, 3, 16, 16)
    plan = lora_fx.plan(model, config, example_inputs=inputs)
    adapted = lora_fx.rewrite(model, config)
    facts = dict(picture_of(adapted, inputs).facts)
    base = 2 * (4 * 3 * 9 * 14 * 14 + 4 * 4 * 9 * 6 * 6)
    words = f"{plan.flops / 1000:.3g} k ({added(plan.flops / base)})"
    assert plan.sample_flops == base
    assert facts["extra FLOPs a sample"] == words
    assert dict(picture_of(plan).facts)["extra FLOPs a sample"] == words
    assert facts["saved for backward a sample"] == f"{plan.saved / 1000:.3g} kB"
    unknown = picture_of(adapted)
    assert not any("FLOPs" in label for label, _ in unknown.facts)
    assert "example_inputs" in unknown.notes[-1]


def test_the_legend_of_an_svg_file_keeps_to_its_width() -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["head"], modules_to_save=["stem"])
    root = ET.fromstring(to_svg(picture_of(lora_fx.rewrite(Net(), config))))
    texts = [each for each in root.iter(f"{SVG}text") if each.get("class") == "legend"]
    words = {text.text for text in texts}
    assert {"adapted", "linear, not adapted", "trained in full", "some inside are adapted"} < words
    assert "none inside is adapted" in words
    *legend, picture = root.findall(f"{SVG}g")
    assert len(legend) == len(words)

    def spot(group: ET.Element) -> tuple[float, float]:
        x, y = re.findall(r"[\d.]+", group.get("transform") or "")
        return float(x), float(y)

    for group in legend:
        x, y = spot(group)
        assert x + 26 + 6.6 * len(group.findtext(f"{SVG}text") or "") <= float(
            root.get("width") or 0
        )
        assert y + 14 <= spot(picture)[1]


def test_the_share_of_extra_flops_is_that_of_all_linear_operations() -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["stem"])
    for drawn_from in (lora_fx.plan(Net(depth=1), config), lora_fx.rewrite(Net(depth=1), config)):
        picture = picture_of(drawn_from)
        base = 2 * (3 * 8 + 2 * 8 * 16 + 8 * 2)
        assert dict(picture.facts)["extra FLOPs a token"] == f"44 ({added(44 / base)})"
        (row,) = (row for row in picture.sites if row.name == "stem")
        assert (row.flops, row.base) == (44, 48)
        facts = dict(by_fqn(picture.root)["stem"].facts)
        if "extra FLOPs a token" in facts:
            assert facts["extra FLOPs a token"] == "44 (+92 %)"


def test_convolutions_without_adapters_count_in_the_share() -> None:
    """Their positions are not tokens, so a call has to count both."""
    model = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(2), nn.Linear(16, 8))
    model = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, target_modules=["2"]))
    facts = dict(picture_of(model, torch.randn(2, 3, 8, 8)).facts)
    extra, base = 4 * 2 * 2 * (16 + 8), 4 * 2 * 16 * 8 + 16 * 2 * 4 * 12
    assert facts["extra FLOPs a token"] == f"96 ({added(extra / base)})"
    assert dict(picture_of(model).facts)["extra FLOPs a token"] == "96"


def test_shares_have_two_digits() -> None:
    assert [added(share) for share in (0.00062, 0.008, 0.0625, 0.5, 1.25)] == [
        "+0.062 %",
        "+0.8 %",
        "+6.3 %",
        "+50 %",
        "+125 %",
    ]


def test_the_box_around_bare_parameters_says_why_they_are_not_adapted() -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["fc"])
    box = by_fqn(picture_of(lora_fx.rewrite(AroundBare(), config)).root)["bare"]
    assert box.state is State.BASE
    facts = {value for label, value in box.facts if label == "not selected"}
    assert facts == {"up, down: matches no target in target_modules"}
    refused = [value for label, value in box.facts if label == "cannot be adapted"]
    assert [value.partition(": ")[0] for value in refused] == ["many", "both"]
    assert all("linear operation" in value for value in refused)


def test_a_closed_module_says_how_many_operations_are_adapted() -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["fc"])
    bare, some, every = "0 of 4 adapted", "1 of 5 adapted", "2 of 2 adapted"
    for drawn_from in (
        lora_fx.plan(AroundBare(), config),
        lora_fx.rewrite(AroundBare(), config),
        lora_fx.rewrite(AroundBare(), config, frontend="export", example_inputs=torch.randn(2, 8)),
    ):
        picture = picture_of(drawn_from)
        boxes = {box.fqn: box for box in picture.root.walk() if box.children}
        assert [count_of(boxes[name]) for name in ("", "bare")] == [some, bare]
        texts = {sign.text for sign in picture.legend}
        assert {"some inside are adapted", "none inside is adapted"} < texts
        svg = drawn(to_svg(picture))
        (shown,) = (box for box in svg if box.fqn == "bare" and bare in box.words)
        assert "bare" in shown.classes
    # All, and all of several equal modules.
    boxes = by_fqn(picture_of(lora_fx.rewrite(Net(depth=1), lora_fx.LoraConfig(r=2))).root)
    assert count_of(boxes["blocks.0"]) == every
    # Without adapters, nothing is missing.
    plain = picture_of(lora_fx.capture(AroundBare()))
    assert not any(count_of(box) for box in plain.root.walk())
    # A module that is trained in full lacks no adapters.
    full = lora_fx.LoraConfig(r=2, target_modules=["stem"], modules_to_save=["blocks"])
    for drawn_from in (lora_fx.plan(Net(), full), lora_fx.rewrite(Net(), full)):
        blocks = by_fqn(picture_of(drawn_from).root)["blocks"]
        assert blocks.linear == 8
        assert not count_of(blocks)


def test_a_box_has_the_names_of_its_parameters() -> None:
    model = lora_fx.rewrite(AroundBare(), lora_fx.LoraConfig(r=2, target_modules=["fc", "up"]))
    boxes = by_fqn(picture_of(model).root)
    assert boxes["fc"].parameters == ("weight", "bias", "lora_A.default", "lora_B.default")
    assert {"up", "down", "many", "both"} < {*boxes["bare"].parameters}
    assert not boxes[""].parameters
    named = {name for name, _ in model.named_parameters()}
    shown = {f"{fqn}.{name}" for fqn, box in boxes.items() for name in box.parameters}
    assert shown == named
    plan = picture_of(lora_fx.plan(AroundBare(), lora_fx.LoraConfig(r=2, target_modules=["fc"])))
    assert by_fqn(plan.root)["fc"].parameters == ("weight",)


def test_sites_of_a_model_say_what_the_adapter_does() -> None:
    model = lora_fx.rewrite(Net(depth=1), lora_fx.LoraConfig(r=2, lora_alpha=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    rows = {row.name: row for row in picture_of(model).sites}
    stem = model.get_submodule("stem")
    a, b = (stem.get_parameter(f"lora_{letter}.default") for letter in "AB")
    expected = 2 * (b @ a).norm() / stem.get_parameter("weight").norm()
    assert rows["stem"].share == pytest.approx(expected.item(), rel=1e-4)
    assert 1 <= (rows["stem"].effective or 0) <= 2
    assert rows["head"].state == "unselected"
    assert rows["stem"].gradient is None
    model(torch.randn(2, 3)).sum().backward()
    rows = {row.name: row for row in picture_of(model).sites}
    assert (rows["stem"].gradient or 0) > 0


@pytest.mark.parametrize("name", ["graph", "graph.png", "graph.html.gz", ".svg"])
def test_refuses_other_suffixes(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.svg, \.dot, \.graphml, \.json, \.html"):
        visualize(Net(), tmp_path / name)


def test_writes_over_a_picture_but_not_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "graph.SVG"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists, and force=False"):
        visualize(Net(), path, force=False)
    with pytest.raises(ConfigError, match="cannot draw a int"):
        visualize(3, path)  # type: ignore[arg-type]
    assert path.read_text() == "mine"
    assert visualize(Net(), path).read_text("utf-8").startswith("<svg")
    with pytest.raises(ConfigError, match="suffix"):
        visualize(Net(), tmp_path / "graph.py")


def test_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        visualize(Net(), tmp_path / "nowhere" / "graph.svg")


def test_refuses_a_folder_as_file(tmp_path: Path) -> None:
    (tmp_path / "graph.svg").mkdir()
    with pytest.raises(ConfigError, match="folder"):
        visualize(Net(), tmp_path / "graph.svg", force=True)


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="draw a set"):
        visualize({1}, tmp_path / "graph.svg")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one or more"):
        visualize({}, tmp_path / "graph.html")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph.svg"
    path.write_text("old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(LoraFxError, match="No space left"):
        visualize(Net(), path, force=True)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_llama_7b_is_quick_and_small(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    config = lora_fx.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = lora_fx.rewrite(model, config)
    start = time.perf_counter()
    path = visualize(model, tmp_path / "llama.html")
    assert time.perf_counter() - start < 5
    assert path.stat().st_size < 1_000_000
    root = picture_of(model).root
    assert (root.sites, root.trainable) == (128, 16_777_216)
    assert [len(box.repeats) for box in root.walk() if box.repeats] == [32]


def test_resnet_and_vit() -> None:
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        resnet, vit = models.resnet18(weights=None), models.vit_b_16(weights=None)
    for model, folds in ((resnet, [2]), (vit, [12])):
        picture = picture_of(adapted(model))
        assert [len(box.repeats) for box in picture.root.walk() if box.repeats] == folds
        leaves = [box for box in drawn(to_svg(picture)) if box.leaf]
        assert not [pair for pair in itertools.combinations(leaves, 2) if pair[0].overlaps(pair[1])]


# --- other things than models ---


def test_an_onnx_file_keeps_its_modules(tmp_path: Path) -> None:
    model = lora_fx.rewrite(Net(depth=2), lora_fx.LoraConfig(r=2))
    report = lora_fx.export_onnx(model, tmp_path / "net.onnx", (torch.randn(2, 3),))
    for drawn_from in (report, tmp_path / "net.onnx"):
        boxes = by_fqn(picture_of(drawn_from).root)
        assert {"stem", "blocks", "blocks.0", "blocks.0.up", "head"} <= set(boxes)
        assert boxes["blocks.0.up"].caption == "Gemm 16×8"
        names = {child.id: child.name for child in boxes["blocks.0"].children}
        edges = {(names[a], names[b]) for a, b in boxes["blocks.0"].edges}
        assert edges == {("up", "act"), ("act", "down"), ("down", "Add")}


def test_an_adapter_folder_says_what_it_holds(tmp_path: Path) -> None:
    config = lora_fx.LoraConfig(r=2, lora_alpha=6, modules_to_save=["head"])
    model = lora_fx.rewrite(Net(depth=2), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    lora_fx.save_adapter(model, tmp_path / "adapter")
    picture = picture_of(tmp_path / "adapter")
    boxes = by_fqn(picture.root)
    assert [(one.rank, one.scale) for one in boxes["stem"].branches] == [(2, 3.0)]
    assert boxes["head.weight"].state == "full"
    here = {row.name: row.effective for row in picture.sites}
    inside = {row.name: row.effective for row in picture_of(model).sites if row.adapter}
    assert here == {name: pytest.approx(value, rel=1e-3) for name, value in inside.items()}


def test_a_merge_says_what_it_changed() -> None:
    model = lora_fx.rewrite(Net(depth=2), lora_fx.LoraConfig(r=2))
    _, report = lora_fx.merge(model, return_report=True)
    picture = picture_of(report)
    assert picture.root.sites == 6 - 1
    assert dict(picture.facts)["weights merged"] == "5"
    assert all(0 <= (row.error or 0) <= 0.5 for row in picture.sites)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.onnx", "there is no .*nowhere.onnx; nearest: nowhen.onnx: give an .onnx file"),
        (
            "nowhere",
            "there is no .*nowhere.*: give an .onnx file, the folder of an adapter, or a mod",
        ),
        ("empty", "empty holds no adapter, adapter_config.json is missing: give a folder"),
        ("adapter.txt", "cannot draw .*adapter.txt: give an .onnx file"),
    ],
)
def test_paths_to_nothing_are_refused(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("adapter.txt", "nowhen.onnx"):
        (tmp_path / file).touch()
    with pytest.raises(ConfigError, match=told):
        visualize(tmp_path / name, tmp_path / "graph.svg")
    assert not (tmp_path / "graph.svg").exists()


def test_nodes_of_a_file_say_what_runs_them(tmp_path: Path) -> None:
    model = Net(depth=1)
    report = lora_fx.export_onnx(model, tmp_path / "net.onnx", (torch.randn(2, 3),))
    runtime = pytest.importorskip("onnxruntime")
    plain = runtime.SessionOptions()
    plain.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = lora_fx.OnnxSession(tmp_path / "net.onnx", "cpu", session_options=plain)
    for drawn_from in (report, tmp_path / "net.onnx", session):
        picture = picture_of(drawn_from)
        operators = [box for box in picture.root.walk() if "operator" in dict(box.facts)]
        assert len(operators) > 5
        assert {dict(box.facts)["runs on"] for box in operators} == {"cpu"}
        assert int(dict(picture.facts)["on cpu"]) == len(session.placement().nodes)
    # What the report of a session on a GPU looks like where one operator has no kernel there.
    report = session.placement()
    there = [
        dataclasses.replace(node, provider=report.provider.replace("CPU", "CUDA"))
        for node in report.nodes
    ]
    nodes = tuple(
        node if node.operator != "Gemm" else old
        for node, old in zip(there, report.nodes, strict=True)
    )
    split = dataclasses.replace(report, nodes=nodes, provider="CUDAExecutionProvider")
    root = _FilePainter(read_graph(session.path), split).paint()
    marked = {box.name for box in root.walk() if "cpu" in box.marks}
    assert marked == {"stem", "up", "down", "head"}
    assert {dict(box.facts)["runs on"] for box in root.walk() if "operator" in dict(box.facts)} == {
        "cpu",
        "cuda",
    }


def test_what_quantizing_has_lost_is_known_from_the_original(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    base = lora_fx.quantize(model, "nf4", compute_dtype=torch.float32, exclude=["2"])
    adapted = lora_fx.rewrite(base, lora_fx.LoraConfig(r=2, target_modules=["0"]))
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    for drawn_from in (base, adapted):
        page = visualize(drawn_from, tmp_path / "page.html", original=model, force=True)
        _, (document,) = read_page(page.read_text("utf-8"))
        rows = {row.name: row for row in picture_of(drawn_from, None, model).sites}
        assert rows["0"].quantized
        assert rows["2"].lost is None
        place = document["columns"].index("lost")
        assert 0.05 < rows["0"].lost < 0.15  # type: ignore[operator]
        assert document["sites"][0][place] == pytest.approx(rows["0"].lost, rel=1e-3)
        assert all(row.lost is None for row in picture_of(drawn_from).sites)
    report = lora_fx.replace_lora_weights_loftq(adapted, model)
    assert rows["0"].lost == pytest.approx(report[0].before, rel=1e-4)
    with pytest.raises(ConfigError, match="no weight that is drawn is quantized"):
        visualize(model, tmp_path / "other.html", original=model)
    with pytest.raises(ConfigError, match=r"original has no 0\.weight"):
        visualize(base, tmp_path / "other.html", original=nn.Linear(2, 2))
    again = lora_fx.merge(adapted, requantize=True, return_report=True)[1]
    (row,) = picture_of(again).sites
    assert (row.error, row.lost) == (None, again.sites[0].requantization_error)


def test_several_are_compared_in_a_page_only(tmp_path: Path) -> None:
    plan = lora_fx.plan(Net(), lora_fx.LoraConfig(r=2))
    path = visualize([plan, adapted(Net())], tmp_path / "two.html")
    _, documents = read_page(path.read_text("utf-8"))
    assert [document["title"] for document in documents] == ["Plan", "Net"]
    with pytest.raises(ConfigError, match=r"\.html"):
        visualize([plan, plan], tmp_path / "two.svg")


def test_panes_that_are_compared_have_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, target_modules=["0"]))
    page = tmp_path / "two.html"
    lora_fx.visualize({"before": model, "after": adapted}, page)
    text = page.read_text(encoding="utf-8")
    assert "before: Sequential" in text
    assert "after: Sequential" in text


def test_model_explorer_gets_a_graph_and_ranks(tmp_path: Path) -> None:
    model = lora_fx.rewrite(Net(depth=2), lora_fx.LoraConfig(r=2))
    path = visualize(model, tmp_path / "net.json", file_format="model-explorer")
    (graph,) = json.loads(path.read_text("utf-8"))["graphs"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    for node in nodes.values():
        assert {edge["sourceNodeId"] for edge in node["incomingEdges"]} <= set(nodes)
        assert node["namespace"] in graph["groupNodeAttributes"]
    (data,) = json.loads((tmp_path / "net.nodes.json").read_text("utf-8")).values()
    ranks = {nodes[name]["label"]: one["value"] for name, one in data["results"].items()}
    assert ranks == {"stem": 2, "up": 2, "down": 2}
    with pytest.raises(ConfigError, match=r"net\.json"):
        visualize(model, tmp_path / "net.html", file_format="model-explorer")


def test_an_operation_in_place_has_the_name_that_torch_gives_it() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            y += x
            return y

    names = {box.name for box in picture_of(adapted(Adds())).root.walk()}
    assert "add_" in names
    assert "in_place" not in names
