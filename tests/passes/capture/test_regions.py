"""Which modules become regions, what is left alone, and why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.passes.capture import regions as module_under_test
from lora_fx.passes.capture.regions import find_regions
from lora_fx.passes.graph import graphs_of, is_region
from tests import zoo
from tests.algebra import randomize
from tests.golden import check_golden, printed
from tests.models import builders
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import sample, seeded


def found(model):
    """Regions and the reasons where there is none."""
    capture = find_regions(model)
    return capture.regions, capture.opaque


class Opaque(nn.Module):
    """Branches on data: no graph of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() > -1e9 else x


def test_every_module_over_a_matrix_that_traces_is_a_region():
    regions, opaque = found(seeded(zoo.Residual)())
    blocks = [f"blocks.{i}" for i in range(2)]
    inner = [f"{block}.{layer}" for block in blocks for layer in ("up", "down")]
    assert set(regions) == {"", "embed", "head", *blocks, *inner}
    assert next(iter(regions)) == ""
    assert all(list(regions).index(name.rpartition(".")[0]) >= 0 for name in inner)
    assert opaque == {}


def test_parents_come_before_children():
    regions, _ = found(seeded(zoo.Residual)())
    order = list(regions)
    for name in order:
        parent = name.rpartition(".")[0]
        if parent in regions:
            assert order.index(parent) <= order.index(name)


def test_a_module_that_does_not_trace_costs_only_its_own_graph():
    model = nn.Sequential(Opaque(seeded(zoo.Block)()), nn.Linear(6, 6))
    regions, opaque = found(model)
    assert opaque == {"0": "its forward branches on a value that is known only when it runs"}
    assert set(regions) == {"", "0.inner", "0.inner.up", "0.inner.down", "1"}


def test_in_the_worst_case_each_layer_is_a_region():
    model = Opaque(Opaque(nn.Linear(4, 4)))
    regions, opaque = found(model)
    assert set(regions) == {"inner.inner"}
    assert set(opaque) == {"", "inner"}


def test_modules_over_no_matrix_are_left_alone():
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), nn.Linear(4, 4))
    regions, opaque = found(model)
    assert set(regions) == {"", "1"}
    assert opaque == {}


def test_layers_that_are_one_opaque_call_say_so():
    model = nn.Sequential(nn.LSTM(4, 4), nn.Flatten())
    _, opaque = found(model)
    assert opaque["0"] == "torch.nn.LSTM applies its weights inside one opaque call"


def test_containers_are_no_regions():
    class Holder(nn.Module):
        """Calls what is in a container that is never called itself."""

        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict(
                {"a": nn.Linear(4, 4), "b": nn.ModuleList([nn.Linear(4, 4)])}
            )

        def forward(self, x):
            return self.parts["b"][0](self.parts["a"](x))

    regions, opaque = found(Holder())
    assert set(regions) == {"", "parts.a", "parts.b.0"}
    assert opaque == {}


def test_a_subclass_of_a_container_with_a_forward_is_one():
    class Chain(nn.ModuleList):
        def forward(self, x):
            for layer in self:
                x = layer(x)
            return x

    model = nn.Sequential(Chain([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 2))
    regions, _ = found(model)
    assert "0" in regions
    assert_same_bits(
        lora_fx.capture(model).model(sample(2, 4)), model.requires_grad_(False)(sample(2, 4))
    )


def test_a_shared_layer_is_one_region():
    regions, _ = found(seeded(zoo.Shared)())
    assert set(regions) == {"", "layer", "head"}


def test_calls_stay_calls():
    """Blocks are called by their parent's graph, so that hooks, wrapping and checkpoints work."""
    regions, _ = found(seeded(zoo.Residual)())
    called = [n.target for n in regions[""].graph.nodes if n.op == "call_module"]
    assert called == ["embed", "blocks.0", "blocks.1", "norm", "head"]
    called = [n.target for n in regions["blocks.0"].graph.nodes if n.op == "call_module"]
    assert called == ["norm", "up", "dropout", "down"]


def test_equal_blocks_are_traced_once(monkeypatch):
    traced = []
    original = module_under_test.trace

    def counted(module, **options):
        traced.append(type(module).__name__)
        return original(module, **options)

    monkeypatch.setattr(module_under_test, "trace", counted)
    regions, _ = found(seeded(zoo.Residual)(blocks=5))
    assert traced.count("Block") == 1
    # up and down differ in their sizes, which are attributes; no other block is traced.
    assert traced.count("Linear") == 3
    assert regions["blocks.0"].graph is regions["blocks.4"].graph


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b, "factor", 3.0),
        lambda b: setattr(b, "twice", True),
        lambda b: setattr(b, "extra", nn.ReLU()),
        lambda b: setattr(b.fc, "bias", None),
        lambda b: setattr(b, "factor", 2),
    ],
)
def test_blocks_that_differ_are_not_taken_for_equal(change):
    blocks = [seeded(builders.Scaled)() for _ in range(3)]
    change(blocks[1])
    model = nn.Sequential(*blocks).requires_grad_(False)
    captured = lora_fx.capture(model)
    graphs = graphs_of(captured.model)
    assert graphs["0"] is graphs["2"]
    assert_same_bits(captured.model(sample(2, 4)), model(sample(2, 4)))


def test_blocks_with_tables_of_their_own_are_not_taken_for_equal():
    class Table(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.table = table

        def forward(self, x):
            return self.fc(x) * self.table["factor"]

    model = nn.Sequential(Table({"factor": 1}), Table({"factor": 2})).requires_grad_(False)
    captured = lora_fx.capture(model)
    assert_same_bits(captured.model(sample(2, 4)), model(sample(2, 4)))


def test_one_that_fails_does_not_spoil_the_next():
    class Sometimes(nn.Module):
        def __init__(self, steps):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.branch = steps

        def forward(self, x):
            if self.branch and x.sum() > 0:
                return x
            return self.fc(x)

    regions, opaque = found(nn.Sequential(Sometimes(True), Sometimes(False)))
    assert "0" in opaque
    assert {"0.fc", "1", "1.fc"} <= set(regions)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 4),
        nn.Linear(4, 4, bias=False),
        nn.Conv1d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Embedding(4, 4),
        nn.Embedding(4, 4, padding_idx=1),
        nn.ConvTranspose1d(4, 4, 2),
        nn.EmbeddingBag(4, 4),
    ],
    ids=lambda layer: str(layer).replace("/", ""),
)
def test_one_operation_is_a_region_of_one_operation(layer):
    regions, _ = found(layer)
    assert set(regions) == {""}
    operations = [n for n in regions[""].graph.nodes if n.op in ("call_function", "call_method")]
    assert 1 <= len(operations) <= 2


def test_the_graph_of_a_block_is_as_expected():
    model = lora_fx.capture(seeded(zoo.Residual)()).model
    graphs = lora_fx.graphs(model)
    names = ["", "blocks.0", "blocks.0.up"]
    text = "\n".join(f"# {name or 'root'}\n{printed(graphs[name])}" for name in names)
    check_golden("capture_residual", text)


def test_a_rewritten_block_is_still_called_as_a_block():
    model = lora_fx.rewrite(seeded(zoo.Residual)(), lora_fx.LoraConfig(r=2))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(m))
    model(torch.tensor([[1, 2]]))
    assert seen == list(model.blocks)


class ReadsAChildsWeight(nn.Module):
    """Opaque, and applies the weight of a layer without calling the layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        if x.sum() > -1e9:
            x = F.linear(x, self.first.weight)
        return self.head(self.second(x))


def test_a_weight_that_code_without_a_graph_reads_is_adapted():
    model = seeded(ReadsAChildsWeight)()
    config = lora_fx.LoraConfig(r=2)
    assert [row.name for row in lora_fx.plan(model, config).sites] == ["first", "second"]
    adapted, x = randomize(lora_fx.rewrite(model, config)), sample(3, 4)
    merged = lora_fx.merge(adapted)
    assert_close(adapted(x), merged(x))
    with torch.no_grad():
        merged.first.weight.copy_(model.first.weight)
    assert not torch.allclose(adapted(x), merged(x))


def test_regions_are_installed_where_they_are_found():
    captured = lora_fx.capture(seeded(zoo.Residual)(), frontend="regions")
    found = {name for name, module in captured.model.named_modules() if is_region(module)}
    assert found == set(captured.regions)


class Signed(nn.Module):
    """What it adds depends on the sign of zero, or on the type of a number."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.value = value

    def forward(self, x):
        value = self.value[0] if isinstance(self.value, tuple) else self.value
        more = 1.0 if isinstance(value, bool) else 2.0 if isinstance(value, int) else 3.0
        return self.fc(x) + torch.atan2(x * 0, x.abs() * value) + more


@pytest.mark.parametrize(
    "pair",
    [(0.0, -0.0), (1, True), (1, 1.0), ((0.0,), (-0.0,)), (float("inf"), float("-inf"))],
    ids=str,
)
def test_modules_that_differ_in_a_number_that_is_equal_have_graphs_of_their_own(pair) -> None:
    model = seeded(lambda: nn.Sequential(*map(Signed, pair)))().double()
    x = sample(3, 4, dtype=torch.float64).abs() + 1
    config = lora_fx.LoraConfig(r=2, target_modules=["fc"])
    assert_close(lora_fx.rewrite(model, config)(x), model(x))


def test_modules_that_agree_in_a_number_that_is_none_share_their_graph() -> None:
    class Nan(Signed):
        def forward(self, x):
            return self.fc(x) * 2

    regions, _ = found(nn.Sequential(Nan(float("nan")), Nan(float("nan"))))
    assert regions["0"].graph is regions["1"].graph


class _Listed(nn.ModuleList):
    """A container with a weight of its own, whose forward goes through what is in it."""

    def __init__(self) -> None:
        super().__init__([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x @ self.kernel * len(self)


class _Named(nn.ModuleDict):
    def __init__(self) -> None:
        super().__init__({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x @ self.kernel * len(self)


class _Children(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        for name, layer in self.named_children():
            x = layer(x) if name else x
        return x @ self.kernel * len(list(self.children()))


@pytest.mark.parametrize(("model", "names"), [(_Listed, ["0", "1"]), (_Named, ["a", "b"])])
def test_a_container_of_layers_gets_no_adapter_of_its_own(model, names):
    """What holds the adapter would be one of its layers."""
    matches = lora_fx.plan(model(), lora_fx.LoraConfig(r=2, target_modules=names))
    assert [site.name for site in matches.sites] == names
    with pytest.raises(lora_fx.NoMatchError, match="container of layers"):
        lora_fx.plan(model(), lora_fx.LoraConfig(r=2, target_modules=["kernel"]))


def test_the_holder_of_an_adapter_says_that_it_is_no_layer():
    x = torch.randn(2, 4)
    adapted = randomize(lora_fx.rewrite(_Children(), lora_fx.LoraConfig(r=2, target_modules=".*")))
    torch.testing.assert_close(adapted(x), lora_fx.merge(adapted)(x), rtol=1e-4, atol=1e-4)
    adapted.add_module("c", nn.Linear(4, 4))
    with pytest.raises(lora_fx.ConfigError, match="children"):
        adapted(x)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x)


def _is_block(module: nn.Module) -> bool:
    return type(module) is _Block


_TABLE = {nn.Linear: 2.0}


def _told(forward):
    """A model whose forward has no graph."""

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.out = _Block(), nn.Linear(4, 4)

    def untraced(self, x):
        with Path(os.devnull).open():
            return self.out(self.block(x)) * self.factor(x)

    Told.forward, Told.factor = untraced, forward
    return Told()


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: 2 if type(self.out) is nn.Linear else 3,
        lambda self, x: 2 if self.out.__class__ == nn.Linear else 3,
        lambda self, x: 2 if type(self.block) in (_Block, nn.Conv1d) else 3,
        lambda self, x: 2 if _is_block(self.block) else 3,
        lambda self, x: _TABLE.get(type(self.out), 3),
        lambda self, x: 2 if type(self.block.fc) is type(self.out) else 3,
        lambda self, x: 2 if isinstance(self.out, type(self.block.fc)) else 3,
        lambda self, x: 2 if isinstance(self.out, nn.Linear) else 3,
        lambda self, x: 2 if type(x) is torch.Tensor else 3,
        lambda self, x: 2 if type(self).__name__ == "Told" else 3,
        lambda self, x: 2 if type(x) is type(torch.ones(1)) else 3,
    ],
)
def test_code_that_tells_modules_by_their_class_is_told_of_by_the_comparison(forward):
    """A layer with an adapter has another class, as PEFT's layers have."""
    model, x = _told(forward), torch.randn(2, 4)
    config = lora_fx.LoraConfig(r=2, target_modules=".*")
    assert {row.name for row in lora_fx.plan(model, config).sites} == {"out", "block.fc"}
    adapted = lora_fx.rewrite(model, config)
    if torch.equal(adapted(x), model(x)):
        return
    with pytest.raises(lora_fx.CaptureError, match=r"dense weights|something else"):
        lora_fx.rewrite(model, config, x)


class _Scaled(nn.Module):
    """A call with a scale is another one than its trace was made for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, **settings):
        x = self.fc(x) * (2 if isinstance(self.fc, nn.Linear) else 3)
        settings.setdefault("scale", 3.0)
        return x * settings["scale"]


@pytest.mark.parametrize("frontend", ["regions", "symbolic", "export"])
def test_a_call_that_a_graph_was_not_made_for_is_right(frontend):
    model, x = _Scaled(), torch.randn(2, 4)
    config = lora_fx.LoraConfig(r=2, target_modules=".*")
    example = x if frontend == "export" else None
    adapted = lora_fx.rewrite(model, config, example, frontend=frontend)
    for settings in ({}, {"scale": 2.0}):
        torch.testing.assert_close(adapted(x, **settings), model(x, **settings))
