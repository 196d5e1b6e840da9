"""The pass that makes one node of an operation and its branch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.formats import weights as quantized
from lora_fx.ir.graph import Capture, Role
from lora_fx.passes.capture.auto import capture
from lora_fx.passes.insert.insert_branches import Insert
from lora_fx.passes.optimize.fuse import Fuse
from lora_fx.passes.pipeline import plan_capture
from lora_fx.runtime.kernels.fused_dora import dora_linear
from lora_fx.runtime.kernels.fused_lora import lora_linear, quantized_lora_linear
from tests import algebra
from tests.algebra import Letters
from tests.fused import roles
from tests.golden import check_golden, printed
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import FORMS, Block, Form, Residual, forms, sample, seeded

# A weight on the left of a product.
LEFT = {"W @ x", "W @ x, vector", "W.mT @ x", "addmm, left", "bmm, weight left"}
FUSED = ("linear", "matmul")


def inserted(model: nn.Module, **options) -> Capture:
    captured = capture(model)
    plan = plan_capture(captured, LoraConfig(**options))
    return Insert(plan.sites)(captured).capture


def pair(model: nn.Module, config: LoraConfig) -> tuple[nn.Module, nn.Module]:
    """A model with the pass and without, with the same factors, none of them zero."""
    both = [lora_fx.rewrite(model, config, optimize=flag) for flag in (True, False)]
    values = torch.Generator().manual_seed(1)
    for left, right in zip(*(one.parameters() for one in both), strict=True):
        if left.requires_grad:
            left.data = torch.randn(left.shape, generator=values, dtype=left.dtype)
            right.data = left.data.clone()
    return both[0], both[1]


def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_(x.is_floating_point())
    out = model(x)
    out.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [out, *grads, *([x.grad] if x.grad is not None else [])]


@pytest.mark.parametrize("form", [pytest.param(form, id=form.name) for form in FORMS])
def test_every_form_computes_what_it_did(form: Form) -> None:
    config = LoraConfig(r=2 * form.groups, lora_alpha=3, target_modules=[form.site])
    fused, canonical = pair(form.model().double(), config)
    assert_close(run(fused, form.x(torch.float64)), run(canonical, form.x(torch.float64)))


@pytest.mark.parametrize("form", forms(*FUSED))
def test_linear_forms_are_fused(form: Form) -> None:
    model = lora_fx.rewrite(form.model(), LoraConfig(r=2, target_modules=[form.site]))
    if form.name in LEFT:
        assert Role.FUSED not in roles(model)
    else:
        assert roles(model) <= {Role.FUSED, Role.FACTOR, Role.CAST}, roles(model)


@pytest.mark.parametrize("form", forms(*FUSED))
def test_linear_forms_with_dora_are_fused_and_compute_what_they_did(form: Form) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[form.site], use_dora=True)
    fused, canonical = pair(form.model().double(), config)
    if form.name in LEFT:
        assert Role.FUSED not in roles(fused)
    else:
        expected = {Role.FUSED, Role.FACTOR, Role.CAST, Role.MAGNITUDE}
        assert Role.FUSED in roles(fused) <= expected, roles(fused)
    assert_close(run(fused, form.x(torch.float64)), run(canonical, form.x(torch.float64)))


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
def test_a_part_of_a_fused_weight(dora: bool) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 9)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return q * k + v

    fused, canonical = pair(
        Fused().double(), LoraConfig(r=2, target_modules=["qkv.v"], use_dora=dora)
    )
    assert Role.FUSED in roles(fused)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(run(fused, x), run(canonical, x))


def test_half_precision_casts_the_factors_in_the_function() -> None:
    fused, canonical = pair(Block().bfloat16(), LoraConfig(r=2, target_modules=["up", "down"]))
    assert Role.CAST not in roles(fused)
    assert Role.CAST in roles(canonical)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    found, exact = run(fused, x), run(copy.deepcopy(fused).double(), x.double())
    assert [one.dtype for one in found] == [one.dtype for one in run(canonical, x)]
    assert_close(found, exact, 3e-2)


def test_parts_with_dora_beside_each_other_stay_since_each_scales_the_pure_output() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 9)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return q * k + v

    config = LoraConfig(r=2, target_modules=["qkv.q", "qkv.v"], use_dora=True)
    fused, canonical = pair(Fused().double(), config)
    assert Role.FUSED not in roles(fused)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(run(fused, x), run(canonical, x))


def test_what_it_does_not_know_stays() -> None:
    config = LoraConfig(r=2, target_modules=["up"], lora_bias=True)
    assert Role.FUSED not in roles(lora_fx.rewrite(Block(), config))


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA second"])
def test_the_second_adapter_of_a_site_is_added_to_the_first(dora: bool) -> None:
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    fused, canonical = pair(Block().double(), config)
    other = LoraConfig(r=3, target_modules=["up"], use_dora=dora)
    for model in (fused, canonical):
        lora_fx.add_adapter(model, other, "other")
        lora_fx.set_adapter(model, ["default", "other"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".other"):
                    torch.manual_seed(0)
                    parameter.normal_()
    # The second with DoRA scales the output without the first: that has to be there.
    assert (Role.FUSED in roles(fused)) is not dora
    assert Role.ADD in roles(fused)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_close(run(fused, x), run(canonical, x))


def test_switching_keeps_the_choice() -> None:
    config = LoraConfig(r=2, target_modules=["up"])
    for optimize in (True, False):
        model = lora_fx.rewrite(Block(), config, optimize=optimize)
        with lora_fx.disable_adapter(model):
            pass
        assert (Role.FUSED in roles(model)) is optimize
        assert (Role.FUSED in roles(copy.deepcopy(model))) is optimize


def test_without_branches_there_is_nothing_to_do() -> None:
    captured = capture(Residual())
    result = Fuse()(captured)
    assert not result.modified
    assert result.capture is captured


def test_it_copies_graphs_and_equal_layers_share_theirs() -> None:
    captured = inserted(Residual(), r=2, target_modules=["up"])
    before = {fqn: printed(region.graph) for fqn, region in captured.regions.items()}
    after = Fuse()(captured).capture
    assert before == {fqn: printed(region.graph) for fqn, region in captured.regions.items()}
    assert after.regions["blocks.0.up"].graph is after.regions["blocks.1.up"].graph
    assert not Fuse()(after).modified


def test_no_bit_changes_at_the_start() -> None:
    model = Residual(dropout=0.1).eval()
    ids = torch.randint(0, 11, (3, 4))
    config = LoraConfig(r=2, target_modules=["up", "down", "head"], lora_dropout=0.5)
    assert_same_bits(lora_fx.rewrite(model, config)(ids), model(ids))


def test_a_model_may_write_into_the_output() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    fused, canonical = pair(model, LoraConfig(r=2, target_modules=["0", "2"]))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    assert_close(run(fused, x), run(canonical, x))


def test_golden() -> None:
    captured = inserted(Block(), r=2, target_modules=["up"], lora_dropout=0.1)
    check_golden("fuse_linear", printed(Fuse()(captured).capture.regions["up"].graph))


def test_golden_with_dora() -> None:
    captured = inserted(Block(), r=2, target_modules=["up"], lora_dropout=0.1, use_dora=True)
    check_golden("fuse_dora", printed(Fuse()(captured).capture.regions["up"].graph))


def test_nothing_before_the_first_adapter_is_kept_or_differentiated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4)))
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["3.0"]))
    parameters = {parameter.data_ptr() for parameter in adapted.parameters()}
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = adapted(torch.randn(5, 8))
    # x and x Aᵀ of the last layer, and what the GELU behind it reads.
    assert sorted(kept) == [(5, 2), (5, 8), (5, 8)]
    assert out.requires_grad


class Chain(nn.Module):
    """Products one after the other in one graph, and one that comes twice."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.randn(width, width) / 2) for _ in range(2))

    def forward(self, x):
        return torch.tanh(F.linear(F.linear(x @ self.u, self.v), self.v))


CHAIN = {"u": Letters("io", "o", "i"), "v": Letters("oi", "o", "i")}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
def test_what_one_fused_operation_gives_is_what_the_next_one_reads(options) -> None:
    model, x = seeded(Chain)().double(), sample(3, 6, dtype=torch.float64)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["u", "v"], **options)
    adapted = algebra.randomize(lora_fx.rewrite(model, config)).eval()
    (graph,) = lora_fx.graphs(adapted).values()
    fused = [n for n in graph.nodes if n.target in (lora_linear, dora_linear)]
    assert len(fused) == 3
    algebra.check_dense(model, adapted, CHAIN, x)


def test_a_chain_with_two_adapters() -> None:
    model, x = seeded(Chain)().double(), sample(3, 6, dtype=torch.float64)
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["u", "v"]))
    lora_fx.add_adapter(adapted, LoraConfig(r=3, target_modules=["v"]), "second")
    lora_fx.set_adapter(adapted, ["default", "second"])
    algebra.check_dense(model, algebra.randomize(adapted), CHAIN, x)


def test_layers_one_after_the_other_in_an_exported_graph() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5)))().double()
    x = sample(3, 6, dtype=torch.float64)
    config = LoraConfig(r=2, target_modules=["0", "1"])
    adapted = lora_fx.rewrite(model, config, frontend="export", example_inputs=(x,))
    letters = {f"{name}.weight": Letters("oi", "o", "i") for name in "01"}
    algebra.check_dense(model, algebra.randomize(adapted), letters, x)


class Longer(nn.Module):
    """Its last product is the head, which is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v, self.w = (nn.Parameter(torch.randn(64, 64) / 8) for _ in range(3))

    def forward(self, x):
        return F.linear(F.linear(x @ self.u, self.v), self.w)


def test_a_chain_over_quantized_weights() -> None:
    model, dense, x = lora_fx.quantize(seeded(Longer)(), "nf4"), seeded(Longer)(), sample(3, 64)
    config = LoraConfig(r=2, target_modules=["u", "v", "w"])
    adapted = algebra.randomize(lora_fx.rewrite(model, config), 0.05)
    (graph,) = lora_fx.graphs(adapted).values()
    fused = [n.target for n in graph.nodes if n.target in (quantized_lora_linear, lora_linear)]
    assert fused == [quantized_lora_linear, quantized_lora_linear, lora_linear]
    dense.u.data = quantized.dense(model.u).T
    dense.v.data = quantized.dense(model.v)
    letters = {"u": CHAIN["u"], "v": CHAIN["v"], "w": CHAIN["v"]}
    weights = algebra.dense_weights(dense, adapted, letters)
    assert_close(adapted(x), torch.func.functional_call(dense, weights, (x,)), 1e-4)
