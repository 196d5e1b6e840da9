from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.ir.site import Matches
from lora_fx.passes.capture.auto import capture
from lora_fx.passes.match.find_operations import match
from tests.algebra import randomize
from tests.golden import check_golden, printed
from tests.numerics import assert_close
from tests.zoo import Mlp, Residual, Shared, Tied


def matched(model: nn.Module) -> Matches:
    return match(capture(model))


def reasons(model: nn.Module) -> dict[str, str]:
    return {rejection.name: rejection.reason for rejection in matched(model).rejections}


def chunked(w):
    q, k, v = w.chunk(3)
    return q, k, v


def split(w):
    q, k, v = w.split([4, 4, 4])
    return q, k, v


def test_sites_come_in_the_order_of_the_parameters() -> None:
    names = [site.name for site in matched(Residual()).sites]
    assert names == [
        "embed",
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "blocks.1.down",
        "head",
    ]


def test_a_site_says_what_it_is() -> None:
    site = matched(Mlp((5, 8, 3))).sites[0]
    assert (site.name, site.pattern, site.family) == ("first", "linear", "linear")
    assert (site.weight, site.bias) == ("first.weight", "first.bias")
    assert (site.in_features, site.out_features, site.weight_shape) == (5, 8, (8, 5))
    assert (site.layout, site.groups, site.experts, site.tied_to) == ("out_in", 1, None, ())
    assert (site.owner, site.parameter, site.holder) == ("first", "weight", "first")


def test_a_parameter_that_is_not_called_weight_names_its_site() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.kernel

    (site,) = matched(nn.Sequential(Owner())).sites
    assert (site.name, site.weight, site.holder) == ("0.kernel", "0.kernel", "0.kernel_lora")
    (root,) = matched(Owner()).sites
    assert (root.name, root.holder) == ("kernel", "kernel_lora")


def test_the_weight_of_a_root_module_keeps_its_name() -> None:
    (site,) = matched(nn.Linear(3, 3)).sites
    assert (site.name, site.owner, site.holder) == ("weight", "", "")


def test_a_module_called_twice_is_one_site() -> None:
    sites = matched(Shared()).sites
    assert [site.name for site in sites] == ["layer", "head"]


def test_a_weight_applied_twice_in_one_graph_is_one_site_with_two_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return torch.tanh(x @ self.kernel) @ self.kernel

    (site,) = matched(Twice()).sites
    assert len(site.calls) == 2
    assert len({call.output for call in site.calls}) == 2


def test_ties_are_found_by_storage() -> None:
    sites = {site.name: site for site in matched(Tied()).sites}
    assert sites["embed"].tied_to == ("head.weight",)
    assert sites["head"].tied_to == ("embed.weight",)
    assert sites["body"].tied_to == ()
    model = Tied()
    # Two parameters over one storage, which is no less tied.
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    assert {s.name: s.tied_to for s in matched(model).sites}["head"] == ("embed.weight",)


class ReadsAChild(nn.Module):
    """Reads the weight of a child as swin transformers do, and never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.qkv.weight, self.qkv.bias)


def test_the_weight_of_a_child_that_is_read_directly_is_the_childs_site() -> None:
    (site,) = matched(ReadsAChild()).sites
    assert site.name == "qkv"
    assert {call.region for call in site.calls} == {"", "qkv"}


class TwoNames(nn.Module):
    """One parameter under two names, and a forward that reads it by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.rest = nn.Linear(4, 4)

    def forward(self, x):
        return self.rest(torch.tanh(F.linear(self.first(x), self.second.weight)))


class Reader(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return F.linear(x, self.inner.weight)


class SharedAndRead(nn.Module):
    """A module under two names: one calls it, the other reads its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Sequential(nn.Linear(4, 4))
        self.reads = Reader(self.calls[0])

    def forward(self, x):
        return self.reads(torch.tanh(self.calls(x)))


@pytest.mark.parametrize("build", [TwoNames, SharedAndRead])
def test_a_tied_weight_that_is_read_under_a_name_nobody_knows_is_refused(build) -> None:
    found = matched(build())
    assert {site.name for site in found.sites} <= {"rest"}
    assert len(found.rejections) == 2
    for rejection in found.rejections:
        assert "under several names" in rejection.reason


def test_what_is_no_linear_operation_has_a_reason() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, 4))
            self.bilinear = nn.Bilinear(4, 4, 4)
            self.bias = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.bilinear(x * self.scale, x) + self.bias

    found = reasons(Other())
    assert found["scale"] == "its only use is by mul, not a linear operation"
    assert "bilinear" in found["bilinear"]
    assert "bias" not in found, "a vector is no matrix"


@pytest.mark.parametrize("layer", [nn.LSTM(4, 4), nn.GRU(4, 4)], ids=lambda m: type(m).__name__)
def test_a_recurrent_layer_says_why_it_has_no_site(layer: nn.Module) -> None:
    found = reasons(nn.Sequential(nn.Linear(4, 4), layer))
    assert found["1"] == (
        f"torch.nn.{type(layer).__name__} applies its weights inside one opaque call"
    )


def test_tokens_and_positions_are_not_listed_as_refused() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls = nn.Parameter(torch.randn(1, 1, 4))
            self.position = nn.Parameter(torch.randn(1, 3, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(torch.cat([self.cls.expand(2, -1, -1), x], 1) + self.position)

    assert reasons(Tokens()) == {}


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (lambda w: (w[:4], w[4:8], w[8:]), {"qkv.q", "qkv.k", "qkv.v"}),
        (chunked, {"qkv.q", "qkv.k", "qkv.v"}),
        (split, {"qkv.q", "qkv.k", "qkv.v"}),
        (lambda w: (w.narrow(0, 0, 6), w[6:], w[6:]), {"qkv.0_6", "qkv.6_12"}),
        (lambda w: (w[:5], w[5:9], w[9:]), {"qkv.0_5", "qkv.5_9", "qkv.9_12"}),
    ],
)
def test_a_weight_that_is_applied_in_parts_is_a_site_for_each(parts, names) -> None:
    model = Fused(parts)
    found = match(capture(model))
    assert {site.name for site in found.sites} == names
    config = lora_fx.LoraConfig(r=2, init_lora_weights=False)
    adapted = lora_fx.rewrite(model, dataclasses.replace(config, target_modules=sorted(names)))
    x = torch.randn(5, 4)
    merged = lora_fx.merge(adapted)
    assert_close(merged(x), adapted(x))
    assert not torch.equal(adapted(x), model(x))
    one = lora_fx.merge(
        lora_fx.rewrite(model, dataclasses.replace(config, target_modules=[min(names)]))
    )
    rows = next(site.rows for site in found.sites if site.name == min(names))
    changed = (one.qkv != model.qkv).any(1).nonzero().flatten().tolist()
    assert changed == list(range(*rows)), "only the rows of the part are touched"


def test_parts_that_overlap_are_refused() -> None:
    found = match(capture(Fused(lambda w: (w[:6], w[4:8], w[8:]))))
    assert not found.sites
    assert "in parts that overlap" in found.rejections[0].reason


def test_parts_beside_the_whole_are_read_with_its_adapter() -> None:
    found = match(capture(Fused(lambda w: (w, w[4:8], w[8:]))))
    assert [(site.name, site.rows, len(site.calls)) for site in found.sites] == [("qkv", None, 1)]


class Fused(nn.Module):
    """One weight for three projections, taken apart before it is applied."""

    def __init__(self, parts) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(12, 4))
        self.parts = parts

    def forward(self, x):
        return torch.cat([F.linear(x, part) for part in self.parts(self.qkv)], -1)


def test_matching_edits_nothing_and_is_the_same_twice() -> None:
    captured = capture(Residual())
    before = {name: printed(region.graph) for name, region in captured.regions.items()}
    state = copy.deepcopy(captured.model.state_dict())
    first, second = match(captured), match(captured)
    assert first == second
    assert before == {name: printed(region.graph) for name, region in captured.regions.items()}
    assert captured.model.state_dict().keys() == state.keys()


def test_golden() -> None:
    captured = capture(Tied())
    found = match(captured)
    graphs = "\n".join(
        f"# region {name or '(root)'}\n{printed(region.graph)}"
        for name, region in captured.regions.items()
    )
    sites = "\n".join(
        f"{site.name}: {site.pattern}, {site.layout} {site.weight_shape}, tied to {site.tied_to}, "
        + ", ".join(f"{c.region or '(root)'}: {c.input} -> {c.output}" for c in site.calls)
        for site in found.sites
    )
    check_golden("match_tied", f"{graphs}\n{sites}\n")


class Cuts(nn.Module):
    """Applies weights whose gradient it has cut."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.a = nn.Parameter(torch.randn(4, 4))
        self.b = nn.Parameter(torch.randn(4, 4))
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = F.linear(x, self.layer.weight.detach()) @ self.a.data
        return self.fc(x @ self.b.T.detach())


def test_a_weight_whose_gradient_is_cut_has_no_adapter():
    """The adapter would be in every output, and in no gradient."""
    plan = lora_fx.plan(Cuts(), lora_fx.LoraConfig(r=2, target_modules=["fc"]))
    assert [row.name for row in plan.sites] == ["fc"]
    assert {"layer", "a", "b"} <= {one.name for one in plan.rejections}


class Walks(nn.Module):
    """Goes through its parameters."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x):
        return self.other(self.fc(x)) * sum(p.square().sum() for p in self.parameters())


class TakesTheFirst(Walks):
    def forward(self, x):
        x = x.to(next(self.parameters()).dtype)
        return self.other(self.fc(x)) if x.sum() < 1e9 else x


def test_code_that_goes_through_the_parameters_is_found_by_comparison():
    """It finds the factors among them, and the weights without their adapters."""
    x, config = torch.randn(3, 4), lora_fx.LoraConfig(r=2, target_modules=["fc", "other"])
    with pytest.raises(lora_fx.CaptureError, match="dense weights"):
        lora_fx.rewrite(Walks(), config, x)
    model = randomize(lora_fx.rewrite(TakesTheFirst(), config, x))
    assert_close(model(x), lora_fx.merge(model)(x))
    assert not torch.allclose(model(x), TakesTheFirst.forward(model_without(model), x))


def model_without(model: nn.Module) -> nn.Module:
    """The model as it was before it had adapters."""
    return lora_fx.merge(model, adapter_names=[])


def test_a_forward_that_was_replaced_on_a_layer_has_its_adapter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    own = model[0].forward
    model[0].forward = lambda x: own(x) * 2
    plan = lora_fx.plan(model, lora_fx.LoraConfig(r=2, target_modules=["1", "2"]))
    assert [row.name for row in plan.sites] == ["1", "2"]
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, target_modules=["0"]))
    x, before = torch.randn(3, 4), adapted(torch.zeros(3, 4))
    assert_close(before, model(torch.zeros(3, 4)))
    dense = nn.functional.linear(x, lora_fx.merge(randomize(adapted))[0].weight, model[0].bias)
    assert_close(adapted(x), model[1:](dense * 2))


class Chooses(nn.Module):
    """Has a layer that a call may not come to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.way_a, self.way_b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, way: str):
        return getattr(self, f"way_{way}")(x @ self.first.weight.T)


def test_a_layer_that_an_exported_call_does_not_come_to_is_adapted_too() -> None:
    base, x = Chooses(), torch.randn(2, 4)
    config = lora_fx.LoraConfig(r=2, target_modules=["first", "way_a", "way_b"])
    model = randomize(lora_fx.rewrite(base, config, (x, "a"), frontend="export"))
    dense = lora_fx.merge(model)
    for way in ("a", "b"):
        assert_close(model(x, way), dense(x, way))
        assert not torch.allclose(model(x, way), base(x, way))
