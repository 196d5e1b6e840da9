from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx.ir.graph import Role
from lora_fx.ir.site import Pattern
from lora_fx.passes import patterns as registry
from lora_fx.passes.capture.auto import capture
from lora_fx.passes.match.find_operations import match
from lora_fx.passes.patterns import pattern_of, patterns
from lora_fx.passes.patterns.linear import LinearPattern
from lora_fx.passes.patterns.sites import make_site
from tests import algebra
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import FORMS, Form

ALSO_READ: list[nn.Parameter] = []


@torch.fx.wrap
def gained_linear(x: torch.Tensor, weight: torch.Tensor, gain: float) -> torch.Tensor:
    """A user's own operation that is linear in its weight: y = gain · x Wᵀ."""
    y = gain * F.linear(x, weight)
    return y + F.linear(x, *ALSO_READ) if ALSO_READ else y


class GainedLinear(nn.Module):
    def __init__(self, gain: float = 3.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.gain = gain

    def forward(self, x):
        return gained_linear(x, self.weight, self.gain)


class GainedPattern(LinearPattern):
    """Only what differs from a linear layer is written: where it is found, and the gain."""

    name = "gained-linear"

    def match(self, node, region):
        if node.op != "call_function" or node.target is not gained_linear:
            return None
        x, weight, _ = node.args
        out_features, in_features = region.parameter(weight).shape
        return make_site(
            region,
            pattern=self.name,
            family="linear",
            weight=weight,
            bias=None,
            x=x,
            output=node,
            sizes=(in_features, out_features),
            layout="out_in",
        )

    def branch(self, site, node, region, build):
        x, _, gain = node.args
        down = build.call(Role.DOWN, F.linear, build.dropped(x), build.a)
        return build.call(Role.UP, gained_linear, down, build.b, gain)


@pytest.fixture
def gained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pattern]:
    monkeypatch.setattr(registry, "_registry", registry._registry)
    pattern = GainedPattern()
    lora_fx.register_pattern(pattern)
    return pattern


def model() -> nn.Module:
    return nn.Sequential(GainedLinear(), nn.Tanh(), nn.Linear(6, 2))


def test_names_are_unique_and_every_pattern_keeps_the_protocol() -> None:
    names = [pattern.name for pattern in patterns()]
    assert len(names) == len(set(names))
    assert all(isinstance(pattern, Pattern) for pattern in patterns())
    assert all(name == name.lower() and " " not in name for name in names)


def test_without_its_pattern_an_unknown_operation_is_a_row_of_the_plan() -> None:
    plan = lora_fx.plan(model(), lora_fx.LoraConfig(target_modules=["2"]))
    (rejection,) = plan.rejections
    assert rejection.name == "0"
    assert "gained_linear" in rejection.reason


def test_a_registered_pattern_works_end_to_end(gained: Pattern) -> None:
    base = model().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    config = lora_fx.LoraConfig(r=2)
    (row,) = lora_fx.plan(base, config)
    assert (row.name, row.site.pattern, row.parameters) == ("0", "gained-linear", 2 * (6 + 5))
    adapted = lora_fx.rewrite(base, config, x)
    assert_same_bits(adapted(x), base(x))
    algebra.randomize(adapted)
    a, b = adapted[0].lora_A.default, adapted[0].lora_B.default
    weight = base[0].weight + row.scale * b @ a
    exact = base[1:](3.0 * x @ weight.T)
    assert_close(adapted(x), exact, 1e-12)
    merged = lora_fx.merge(adapted)
    assert type(merged[0]) is GainedLinear
    assert_close(merged(x), exact, 1e-12)


class Beside(GainedLinear):
    """One graph with the operation and a plain product over another weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return super().forward(x) + F.linear(x, self.other)


def test_an_operation_that_reads_the_weight_of_another_is_refused(
    gained: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, x = Beside(), torch.randn(4, 5)
    adapted = algebra.randomize(lora_fx.rewrite(base, lora_fx.LoraConfig(r=2)))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "ALSO_READ", [base.other])
        with pytest.raises(
            lora_fx.CaptureError, match=r"^other: .* by mm at .*test_registry.* in gained_linear"
        ):
            adapted(x)
    merged = lora_fx.merge(adapted)
    assert_close(adapted(x), 3.0 * x @ merged.weight.T + x @ merged.other.T)


def test_the_last_registered_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nosy(LinearPattern):
        name = "nosy"

        def match(self, node, region):
            found = super().match(node, region)
            return found and dataclasses.replace(found, pattern=self.name)

    monkeypatch.setattr(registry, "_registry", registry._registry)
    lora_fx.register_pattern(Nosy())
    plan = lora_fx.plan(nn.Sequential(nn.Linear(3, 3)), lora_fx.LoraConfig(target_modules=["0"]))
    assert [row.site.pattern for row in plan] == ["nosy"]


def test_a_name_that_is_taken_is_refused(gained: Pattern) -> None:
    with pytest.raises(lora_fx.ConfigError, match="'gained-linear' is registered already"):
        lora_fx.register_pattern(GainedPattern())
    with pytest.raises(lora_fx.ConfigError, match="'linear' is registered already"):
        lora_fx.register_pattern(LinearPattern())


def test_what_is_no_pattern_is_refused_with_what_it_lacks() -> None:
    class Half:
        name = "half"

        def match(self, node: fx.Node, region: object) -> None:
            return None

    with pytest.raises(lora_fx.ConfigError, match="lacks factors, branch, delta, flops"):
        lora_fx.register_pattern(Half())


def test_a_site_of_a_pattern_that_is_not_here_says_what_to_do(gained: Pattern) -> None:
    (row,) = lora_fx.plan(model(), lora_fx.LoraConfig())
    stranger = dataclasses.replace(row.site, pattern="from-another-process")
    with pytest.raises(lora_fx.ConfigError, match="register_pattern"):
        pattern_of(stranger)


@pytest.mark.parametrize("form", [pytest.param(form, id=form.name) for form in FORMS])
def test_no_form_is_recognized_with_an_argument_that_its_pattern_does_not_know(form: Form) -> None:
    captured = capture(form.model())
    (site,) = match(captured).sites
    for call in site.calls:
        graph = captured.regions[call.region].graph
        (node,) = (one for one in graph.nodes if one.name == call.output)
        node.kwargs = {**node.kwargs, "weird": 1}
    found = match(captured)
    assert not found.sites
    (rejection,) = found.rejections
    assert rejection.name == site.name
    assert "is called with weird" in rejection.reason


def test_a_pattern_that_fails_is_named_with_the_node(gained: Pattern) -> None:
    class Broken(GainedPattern):
        name = "broken"

        def match(self, node, region):
            return node.args[7]

    lora_fx.register_pattern(Broken())
    with pytest.raises(lora_fx.CaptureError, match="the pattern 'broken' failed on node"):
        lora_fx.plan(model(), lora_fx.LoraConfig(r=2))
