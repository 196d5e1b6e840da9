"""The live bytes of a step by kind and module, beside the ledger that counts them, and their page."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lora_fx
from lora_fx.tools.cluster import Mesh, Need, Settings, plan_step, step_inputs
from lora_fx.tools.timeline import Allocation, Kind, Timeline, document_of, write_page
from tests.tools.browser import CHROMIUM, browser
from tests.tools.cluster_ranks import BATCH, CONFIG, SEQUENCE, model

NASTY = "a<b>&\"c'</script><img src=x onerror=alert`1`>"


@functools.cache
def recorded(mesh: str = "fsdp=1", *, checkpointing: bool = False) -> tuple[Need, Timeline]:
    net, timeline = model().to("meta"), Timeline()
    inputs = step_inputs(net, None, batch=BATCH, sequence=SEQUENCE)
    settings = Settings(checkpointing=checkpointing)
    need = plan_step(net, CONFIG, Mesh.parse(mesh), inputs, settings, ledger=timeline)
    return need, timeline


def kind_of(entry: Allocation) -> str:
    return str(entry.kind)


class Wide(nn.Module):
    """Blocks, one of which has an output that is much larger than every other tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.wide = nn.Linear(8, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return self.wide(x).exp().sum()


@functools.cache
def wide(rows: int = 4096) -> tuple[Need, Timeline]:
    timeline = Timeline()
    config = lora_fx.LoraConfig(r=2, target_modules=["blocks.0", "blocks.1", "wide"])
    need = plan_step(Wide(), config, Mesh(), {"x": torch.empty(rows, 8)}, ledger=timeline)
    return need, timeline


STEPS = pytest.mark.parametrize(
    ("mesh", "checkpointing"), [("", False), ("fsdp=1", False), ("fsdp=1", True), ("fsdp=2", False)]
)
"""A small step without a mesh, and steps of a model of transformers."""


def step(mesh: str, checkpointing: bool) -> tuple[Need, Timeline]:
    return recorded(mesh, checkpointing=checkpointing) if mesh else wide()


@STEPS
def test_bands_add_up_to_what_the_ledger_counts(mesh: str, checkpointing: bool) -> None:
    need, timeline = step(mesh, checkpointing)
    live = [operation.live for operation in timeline.operations]
    assert max(live) == live[timeline.peak_index] == need.peak
    for group in (kind_of, timeline.part_of, lambda entry: entry.module):
        bands = timeline.bands(group)
        assert [sum(column) for column in zip(*bands.values(), strict=True)] == live
    assert sum(size for _, size in timeline.at_peak()) == need.peak


@STEPS
def test_kinds_are_those_of_the_plan(mesh: str, checkpointing: bool) -> None:
    need, timeline = step(mesh, checkpointing)
    bands = timeline.bands(kind_of)
    phases = [operation.phase for operation in timeline.operations]
    assert list(dict.fromkeys(phases)) == ["forward", "backward", "optimizer"]
    last = phases.index("backward") - 1
    assert bands[Kind.ACTIVATIONS][last] == need.activations
    assert bands[Kind.GRADIENTS][phases.index("optimizer")] == need.gradients
    for kind, size in (
        (Kind.WEIGHTS, need.weights),
        (Kind.ADAPTERS, need.adapters),
        (Kind.OPTIMIZER, need.optimizer),
    ):
        assert set(bands[kind]) == {size}
    assert max(bands.get(Kind.GATHERED, [0])) == need.gathered
    assert (Kind.RECOMPUTED in bands) == checkpointing


@pytest.mark.parametrize(("mesh", "checkpointing"), [("fsdp=1", True), ("fsdp=2", False)])
def test_recording_changes_no_figure(mesh: str, checkpointing: bool) -> None:
    net = model().to("meta")
    inputs = step_inputs(net, None, batch=BATCH, sequence=SEQUENCE)
    settings = Settings(checkpointing=checkpointing)
    plain = plan_step(net, CONFIG, Mesh.parse(mesh), inputs, settings)
    assert recorded(mesh, checkpointing=checkpointing)[0] == plain


def test_what_is_computed_again_is_what_was_not_kept() -> None:
    whole, again = recorded()[1], recorded(checkpointing=True)[1]
    net = model()
    kept = max(whole.bands(kind_of)[Kind.ACTIVATIONS]) / net.config.num_hidden_layers
    most = max(again.bands(kind_of)[Kind.RECOMPUTED])
    assert 0.6 * kept < most < 1.4 * kept, "the activations of one block at a time"


def test_operations_know_their_module_in_both_directions() -> None:
    _, timeline = wide()
    ran = {
        (operation.module, operation.phase)
        for operation in timeline.operations
        if operation.operator in ("aten.mm", "aten.addmm")
    }
    # The first block gets no gradient of its input, and still multiplies for that of its adapter.
    names = ("blocks.0", "blocks.1", "blocks.2", "wide")
    assert ran == {(name, phase) for name in names for phase in ("forward", "backward")}
    assert timeline.parts == ["blocks.0", "blocks.1", "blocks.2", "wide"]
    exp = [operation for operation in timeline.operations if operation.operator == "aten.exp"]
    assert [(operation.module, operation.phase) for operation in exp] == [("", "forward")]


def test_a_huge_tensor_is_listed_first() -> None:
    need, timeline = wide()
    first = timeline.largest(10)[0]
    assert (first.shape, first.dtype, first.size) == ("4096 x 64", "float32", 4096 * 64 * 4)
    assert first.size > need.peak / 10
    heaviest, size = timeline.at_peak()[0]
    assert (heaviest.module or "(root)", size) == (first.module, first.size)
    _, other = wide(rows=1)
    assert (other.largest(1)[0].module, other.largest(1)[0].tensor) == ("wide", "weight")


def test_equal_tensors_of_layers_share_a_row() -> None:
    _, timeline = recorded()
    rows = timeline.largest(1000)
    layers = model().config.num_hidden_layers
    weights = [row for row in rows if row.module.endswith("mlp.up_proj") and row.tensor == "weight"]
    assert [(row.module, row.count) for row in weights] == [
        (f"model.layers.{{0-{layers - 1}}}.mlp.up_proj", layers)
    ]
    states = {row.tensor for row in rows if row.kind == Kind.OPTIMIZER}
    assert "exp_avg of lora_A.default" in states
    assert (
        sum(row.size * row.count for row in rows) == timeline.operations[timeline.peak_index].live
    )


def test_columns_keep_the_peak_and_the_top_of_each_group() -> None:
    _, timeline = wide()
    live = [operation.live for operation in timeline.operations]
    columns = timeline.columns(groups=20, around=3)
    peak = timeline.peak_index
    assert columns == sorted(set(columns))
    assert set(range(peak - 3, peak + 4)) <= set(columns)
    assert len(columns) <= 20 + 7 + 2
    assert timeline.columns(groups=10**6) == list(range(len(live)))
    some = timeline.bands(kind_of, columns)
    every = timeline.bands(kind_of)
    assert some == {kind: [values[column] for column in columns] for kind, values in every.items()}


def test_a_document_has_the_bands() -> None:
    need, timeline = wide()
    document = json.loads(json.dumps(document_of(timeline, {})))
    for bands in (document["kinds"], document["parts"]):
        sums = [0] * len(document["columns"])
        for _, runs in bands:
            ends = [*runs[2::2], len(sums)]
            for start, size, end in zip(runs[::2], runs[1::2], ends, strict=True):
                for column in range(start, end):
                    sums[column] += size
        assert sums == [timeline.operations[column].live for column in document["columns"]]
    assert timeline.operations[document["columns"][document["peak"]]].live == need.peak


def test_calls_are_as_before_also_after_an_error() -> None:
    call = nn.Module.__call__
    wide(rows=2)
    assert nn.Module.__call__ is call
    config = lora_fx.LoraConfig(r=1, target_modules=["wide"])
    with pytest.raises(lora_fx.ConfigError, match=r"cannot be planned.*reduction dim"):
        plan_step(Wide(), config, Mesh(), {"x": torch.empty(4, 9)}, ledger=Timeline())
    assert nn.Module.__call__ is call


def test_a_page_of_32_layers_is_small(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=32,
        num_attention_heads=4,
        vocab_size=1000,
    )
    with torch.device("meta"):
        net = transformers.LlamaForCausalLM(config)
    timeline = Timeline()
    plan_step(
        net,
        lora_fx.LoraConfig(r=8, target_modules="all-linear"),
        Mesh(),
        step_inputs(net, None, batch=1, sequence=64),
        Settings(dtype=torch.bfloat16),
        ledger=timeline,
    )
    write_page(timeline, tmp_path / "llama.html", "llama", {})
    assert len(timeline.operations) > 10_000
    assert (tmp_path / "llama.html").stat().st_size < 300_000


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page(tmp_path: Path) -> None:
    need, timeline = wide()
    path = tmp_path / "page.html"
    write_page(timeline, path, NASTY, {"model": NASTY})
    with browser() as page:
        page.size(1000, 700)
        page.open(path.as_uri())
        assert page.run("document.querySelector('h1').textContent") == NASTY
        areas = "document.querySelectorAll('#chart path').length"
        kinds = [kind for kind, values in timeline.bands(kind_of).items() if any(values)]
        assert page.run(areas) == len(kinds)
        summary = page.run("document.querySelector('#summary').textContent")
        assert f"peak{need.peak / 1e6:.3g} MB" in summary
        mark = page.run("document.querySelector('#chart .peak').textContent")
        assert timeline.operations[timeline.peak_index].operator in mark
        row = page.run("document.querySelector('#peak tbody tr').textContent")
        assert "4096 x 64 float32" in row

        page.run("document.querySelector('#chart').focus()")
        page.key("p")
        told = page.run("document.querySelector('#tooltip').textContent")
        assert f"{timeline.peak_index + 1} of {len(timeline.operations)}" in told
        assert f"live{need.peak / 1e6:.3g} MB" in told
        box = page.run(
            "(({ x, y, width, height }) => [x, y, width, height])"
            "(document.querySelector('#chart').getBoundingClientRect())"
        )
        page.mouse("mouseMoved", box[0] + box[2] - 15, box[1] + box[3] / 2)
        page.settle()
        assert f"{len(timeline.operations)} of " in page.run(
            "document.querySelector('#tooltip').textContent"
        )

        before = page.run(areas)
        page.press("#key button")
        assert page.run(areas) == before - 1, "a band is hidden"
        page.press("#key button")
        assert page.run(areas) == before
        page.run(
            "document.querySelector('#color').value = 'parts';"
            "document.querySelector('#color').dispatchEvent(new Event('change'))"
        )
        assert page.run(areas) == 5, "four parts and the root"
        legend = page.run("[...document.querySelectorAll('#key button')].map((b) => b.textContent)")
        assert any(re.match(r"blocks\.\{0-2\}", text) for text in legend)

        paper = "getComputedStyle(document.body).backgroundColor"
        light = page.run(paper)
        page.press("#theme")
        assert page.run(paper) != light
        assert not page.complaints
        assert not page.requests
