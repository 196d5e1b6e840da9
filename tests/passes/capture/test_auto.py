"""Which front-end is chosen, and what the choice says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError, ConfigError
from tests import zoo
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import sample, seeded


class Branches(nn.Module):
    """Its root has no graph of its own; the layers below have."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.kernel = nn.Parameter(torch.eye(4)) if own else None

    def forward(self, x):
        if x.dim() == 2:
            x = self.fc(x)
        if self.kernel is not None:
            x = x @ self.kernel
        return self.head(x)


def test_choose_symbolic_for_what_traces():
    captured = lora_fx.capture(seeded(zoo.Residual)())
    assert captured.frontend == "symbolic"
    assert captured.notes == ()
    assert lora_fx.capture(seeded(zoo.Mlp)(), sample(3, 5)).frontend == "symbolic"


def test_choose_regions_without_inputs_and_say_why():
    captured = lora_fx.capture(Branches(own=True))
    assert captured.frontend == "regions"
    assert captured.notes == (
        "not symbolic: Branches: its forward branches on a value that is known only when it runs",
        "not export: there are no example_inputs",
    )


def test_keep_the_regions_where_they_see_everything():
    captured = lora_fx.capture(Branches(), sample(2, 4))
    assert captured.frontend == "regions"
    assert captured.notes[1] == "not export: the regions see every weight"


def test_export_where_that_sees_more():
    captured = lora_fx.capture(Branches(own=True), sample(2, 4))
    assert captured.frontend == "export"
    assert captured.notes[0].startswith("not symbolic")
    assert "" in captured.regions
    config = lora_fx.LoraConfig(r=2)
    names = [row.name for row in lora_fx.plan(Branches(own=True), config, sample(2, 4)).sites]
    assert names == ["kernel", "fc"]
    assert [row.name for row in lora_fx.plan(Branches(own=True), config).sites] == ["fc"]
    model = Branches(own=True)
    adapted = randomize(lora_fx.rewrite(model, config, sample(2, 4)))
    merged = lora_fx.merge(adapted)
    for x in (sample(2, 4), sample(3, 2, 4)):
        assert not torch.allclose(adapted(x), model(x))
        assert_close(adapted(x), merged(x))


def test_keep_the_regions_where_export_fails_and_say_why():
    class DataDependent(Branches):
        def forward(self, x):
            if x.sum() > -1e9:
                x = x @ self.kernel
            return self.head(self.fc(x))

    model = DataDependent(own=True)
    captured = lora_fx.capture(model, sample(2, 4))
    assert captured.frontend == "regions"
    assert captured.notes[1].startswith("not export: torch.export fails on DataDependent")
    with pytest.raises(CaptureError, match=r"torch\.export fails on DataDependent"):
        lora_fx.capture(model, sample(2, 4), frontend="export")


def test_choose_symbolic_around_built_in_layers_without_a_graph():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    assert lora_fx.capture(Attends()).frontend == "symbolic"


def test_use_or_refuse_the_frontend_that_is_asked_for():
    model = seeded(zoo.Residual)()
    assert lora_fx.capture(model, frontend="regions").frontend == "regions"
    assert lora_fx.capture(model, frontend="symbolic").frontend == "symbolic"
    with pytest.raises(CaptureError, match="needs example_inputs"):
        lora_fx.capture(model, frontend="export")
    with pytest.raises(CaptureError, match=r"Branches does not trace.*branches on a value.*'auto'"):
        lora_fx.capture(Branches(), frontend="symbolic")
    with pytest.raises(ConfigError, match="found 'dynamo'"):
        lora_fx.capture(model, frontend="dynamo")


@pytest.mark.parametrize("frontend", ["symbolic", "regions", "export"])
def test_compute_the_same_with_every_frontend(frontend):
    model = seeded(zoo.Residual)(dropout=0.3).requires_grad_(False)
    ids = torch.tensor([[1, 2, 3], [3, 4, 5]])
    captured = lora_fx.capture(model, ids, frontend=frontend).model
    for training in (False, True):
        torch.manual_seed(5)
        expected = model.train(training)(ids)
        torch.manual_seed(5)
        assert_same_bits(captured.train(training)(ids), expected)


def test_refuse_to_capture_a_capture():
    captured = lora_fx.capture(seeded(zoo.Mlp)()).model
    with pytest.raises(CaptureError, match="captured or rewritten already"):
        lora_fx.capture(captured)
    rewritten = lora_fx.rewrite(seeded(zoo.Mlp)(), lora_fx.LoraConfig(r=2))
    with pytest.raises(ConfigError, match="rewritten already"):
        lora_fx.rewrite(rewritten, lora_fx.LoraConfig(r=2))


def test_print_regions_and_reasons():
    text = str(lora_fx.capture(Branches()))
    assert "captured by regions" in text
    assert "no graph: (root): its forward branches on a value" in text


def test_say_in_the_plan_which_frontend_and_why():
    plan = lora_fx.plan(Branches(), lora_fx.LoraConfig(r=2))
    assert plan.frontend == "regions"
    assert plan.notes[0].startswith("not symbolic")
    assert "not symbolic" not in str(plan)  # every weight is seen
    assert "not symbolic" in str(lora_fx.plan(Branches(own=True), lora_fx.LoraConfig(r=2)))


class Token(nn.Module):
    """No trace, and a parameter of two dimensions that is a token, or multiplied."""

    def __init__(self, multiplied: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(4, 4))
        self.fc = nn.Linear(4, 4)
        self.multiplied = multiplied

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.fc(x) @ self.token if self.multiplied else self.fc(x) + self.token[0]


@pytest.mark.parametrize("multiplied", [True, False])
def test_export_only_for_what_is_multiplied_out_of_sight(multiplied, monkeypatch) -> None:
    from lora_fx.passes.capture import auto

    asked = []
    monkeypatch.setattr(auto, "add_exported", lambda *a: asked.append(a) or a[0])
    lora_fx.capture(Token(multiplied), torch.randn(2, 4))
    assert bool(asked) == multiplied


@pytest.mark.parametrize("wrong", ["value", "error"])
def test_go_on_without_a_graph_that_is_wrong(wrong, monkeypatch):
    """No trace is known to be wrong; if one were, the example inputs would show it."""
    from lora_fx.passes.capture import regions

    original = regions.trace

    def trace(module, *args, **options):
        graph, doubt = original(module, *args, **options)
        if isinstance(module, zoo.Block):
            last = next(node for node in reversed(graph.nodes) if node.op == "output")
            with graph.inserting_before(last):
                name = "neg" if wrong == "value" else "no_such_method"
                last.args = (graph.call_method(name, (last.args[0],)),)
        return graph, doubt

    monkeypatch.setattr(regions, "trace", trace)
    model = seeded(zoo.Residual)().eval()
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(CaptureError, match="symbolic"):
        lora_fx.capture(model, ids, frontend="symbolic")
    captured = lora_fx.capture(model, ids)
    assert {"blocks.0.up", "head"} <= captured.regions.keys()
    assert "" not in captured.regions
    assert captured.frontend == "regions"
    assert "blocks.0" in captured.opaque
    assert any("symbolic" in note for note in captured.notes)
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2), ids)
    assert_same_bits(adapted.eval()(ids), model.requires_grad_(False)(ids))
