from __future__ import annotations

import itertools
import random

import pytest

from lora_fx.tools.draw.layout import DUMMY, METRICS, flow, grid, layers_of

CHAIN = [("x", "drop"), ("drop", "a"), ("a", "b"), ("b", "add"), ("add", "out")]
BRANCH = (
    ["x", "base", "drop", "a", "b", "add", "out"],
    [("x", "base"), *CHAIN, ("base", "add")],
)


def random_graph(seed: int) -> tuple[list[str], list[tuple[str, str]]]:
    draw = random.Random(seed)
    ids = [f"n{i}" for i in range(30)]
    pairs = {tuple(sorted(draw.sample(range(30), 2))) for _ in range(50)}
    return ids, [(ids[a], ids[b]) for a, b in sorted(pairs)]


def test_a_branch_is_a_column_beside_the_base() -> None:
    layers = layers_of(*BRANCH, ["x"], ["out"])
    assert [len(row) for row in layers.rows] == [1, 2, 2, 2, 1, 1]
    assert {row[1] for row in layers.rows[1:4]} == {"drop", "a", "b"}
    steps = {(link.upper, link.lower) for link in layers.links if link.source == "base"}
    assert steps == {("base", "~0"), ("~0", "~1"), ("~1", "add")}


def test_constants_stand_above_their_reader() -> None:
    edges = [("x", "a"), ("a", "b"), ("b", "c"), ("mask", "c")]
    layers = layers_of(["x", "mask", "a", "b", "c"], edges, ["x"])
    assert "mask" in layers.rows[2]


@pytest.mark.parametrize("seed", range(5))
def test_links_lead_from_source_to_target_one_row_at_a_time(seed: int) -> None:
    ids, edges = random_graph(seed)
    layers = layers_of(ids, edges)
    row_of = {name: i for i, row in enumerate(layers.rows) for name in row}
    assert sorted(name for name in row_of if not name.startswith(DUMMY)) == sorted(ids)
    above = {(link.source, link.lower): link.upper for link in layers.links}
    assert len(above) == len(layers.links)
    for source, target in edges:
        name = target
        while name != source:
            upper = above[source, name]
            assert row_of[upper] == row_of[name] - 1
            name = upper


def test_an_input_that_is_read_everywhere_is_one_line() -> None:
    ids = ["x", *(f"n{i}" for i in range(50))]
    edges = [("x", name) for name in ids[1:]] + list(itertools.pairwise(ids[1:]))
    layers = layers_of(ids, edges, ["x"])
    assert len(layers.links) == len(edges) + 49


@pytest.mark.parametrize("seed", range(5))
def test_rows_keep_their_distance(seed: int) -> None:
    ids, edges = random_graph(seed)
    layers = layers_of(ids, edges)
    draw = random.Random(seed)
    sizes = {name: (draw.uniform(20, 300), draw.uniform(20, 100)) for name in ids}
    local = flow(sizes, layers)
    for row in layers.rows:
        boxes = [name for name in row if name in sizes]
        for one, other in itertools.pairwise(boxes):
            gap = local.spots[other][0] - local.spots[one][0] - sizes[one][0]
            assert gap >= METRICS["gapX"] - 1e-6
    assert min(x for x, _ in local.spots.values()) >= -1e-6
    assert max(x + sizes[n][0] for n, (x, _) in local.spots.items()) <= local.width + 1e-6


def test_a_chain_is_straight_beside_a_passing_edge() -> None:
    ids = ["x", "a", "b", "c", "add"]
    edges = [("x", "a"), ("a", "b"), ("b", "c"), ("c", "add"), ("x", "add")]
    widths = [20.0, 60.0, 400.0, 60.0, 30.0]
    sizes = {name: (width, 20.0) for name, width in zip(ids, widths, strict=True)}
    local = flow(sizes, layers_of(ids, edges, ["x"]))
    centers = [local.spots[name][0] + sizes[name][0] / 2 for name in ids]
    assert max(centers) - min(centers) < 25


def test_grid_stacks_small_boxes_beside_a_tall_one() -> None:
    local = grid({"tall": (100.0, 200.0), "a": (50.0, 30.0), "b": (50.0, 30.0)})
    assert local.height == 200
    assert local.spots["a"][0] == local.spots["b"][0] > 100
    assert local.spots["b"][1] >= 30 + METRICS["gapY"]
