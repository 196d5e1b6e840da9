"""What factors hold at the start: against PEFT, against the definition, and without touching the argument."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx.config.lora_config import LoraConfig
from lora_fx.errors import ConfigError, NoMatchError
from lora_fx.ir.record import record_of
from lora_fx.passes.insert.starts import levels, quantized
from lora_fx.passes.lowrank import low_rank_svd
from lora_fx.passes.parameters.factors import as_matrices
from tests import zoo
from tests.numerics import assert_close, assert_same_bits, relative_error
from tests.zoo import Form

SUBTRACTED = ("pissa_niter_2", "olora")
MATRICES = [form for form in zoo.FORMS if form.kind != "embedding"]


def config(start: bool | str, **changes: Any) -> LoraConfig:
    values = {"r": 2, "lora_alpha": 3, "target_modules": "op.*", "init_lora_weights": start}
    return LoraConfig(**{**values, **changes})


def rank_of(form: Form) -> int:
    return max(2, form.groups)


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- every form of a linear operation -------------------------------------------------------------


@pytest.mark.parametrize("start", SUBTRACTED)
@pytest.mark.parametrize("form", MATRICES, ids=lambda form: form.name)
def test_what_is_subtracted_is_added_again(form: Form, start: str) -> None:
    model, x = form.model(), form.x()
    before = states(model)
    adapted = lora_fx.rewrite(model, config(start, r=rank_of(form)))
    a, b = form.factors(adapted)
    weight = adapted.get_parameter(f"op.{form.weight}")
    original = model.get_parameter(f"op.{form.weight}")
    scale = 3 / rank_of(form)
    whole = weight + scale * form.delta(a, b).reshape(original.shape)
    assert_close(whole, original)
    assert relative_error(weight, original) > 1e-3
    assert_close(adapted(x), model(x))
    merged = lora_fx.merge(adapted)
    assert_close(merged.get_parameter(f"op.{form.weight}"), original, 1e-6)
    assert_close(lora_fx.merge(adapted, into=copy.deepcopy(model))(x), model(x))
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])


@pytest.mark.parametrize("form", MATRICES, ids=lambda form: form.name)
def test_pissa_takes_the_largest_part(form: Form) -> None:
    """The change is the best approximation of its rank (Eckart and Young), matrix by matrix."""
    model = form.model()
    adapted = lora_fx.rewrite(model, config("pissa", r=rank_of(form)))
    (row,) = record_of(adapted).adapters["default"].sites
    weight, original = (
        as_matrices(row.site, one.get_parameter(row.site.weight).reshape(row.site.applied_shape))
        for one in (adapted, model)
    )
    values = torch.linalg.svdvals(original.double()).square()
    rest = values[:, rank_of(form) // form.groups :].sum(1)
    found = torch.linalg.svdvals(weight.double()).square().sum(1)
    assert ((found - rest).abs() <= 1e-6 * values.sum(1)).all()


@pytest.mark.parametrize("form", MATRICES, ids=lambda form: form.name)
def test_orthogonal_factors_have_no_product(form: Form) -> None:
    model, x = form.model(), form.x()
    adapted = lora_fx.rewrite(model, config("orthogonal", r=2 * rank_of(form)))
    a, b = form.factors(adapted)
    assert a.abs().min() > 0
    assert b.abs().min() > 0
    size = a.flatten(1).norm() * b.flatten(1).norm()
    assert form.delta(a, b).norm() < 1e-6 * size
    assert_close(adapted(x), model(x))
    assert_same_bits(
        adapted.get_parameter(f"op.{form.weight}"), model.get_parameter(f"op.{form.weight}")
    )


@pytest.mark.parametrize(
    "start", ["pissa", "olora", "loftq", "orthogonal", "eva", "corda", "lora_ga"]
)
def test_embeddings_are_left_out_with_a_reason(start: str) -> None:
    with pytest.raises(NoMatchError, match="not for embeddings"):
        lora_fx.rewrite(
            zoo.Tied(), LoraConfig(r=2, target_modules=["embed"], init_lora_weights=start)
        )


# --- against PEFT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_factors_and_weights_are_those_of_peft(
    start: str, use_rslora: bool, shape: tuple[int, int]
) -> None:
    base = zoo.seeded(lambda: nn.Sequential(nn.Linear(*shape)))()
    values: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["0"],
        "init_lora_weights": start,
        "use_rslora": use_rslora,
    }
    ours = lora_fx.rewrite(base, LoraConfig(**values))[0]
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**values)).base_model.model[0]
    product = theirs.lora_B.default.weight @ theirs.lora_A.default.weight
    assert_close(ours.lora_B.default @ ours.lora_A.default, product)
    assert_close(ours.get_parameter("weight"), theirs.base_layer.weight)
    # Each factor too: rows and columns up to the sign that a decomposition leaves open.
    assert_close(ours.lora_A.default.abs(), theirs.lora_A.default.weight.abs())
    assert_close(ours.lora_B.default.abs(), theirs.lora_B.default.weight.abs())


def test_pissa_of_a_conv1d_is_that_of_peft() -> None:
    model, _ = zoo.tiny_gpt2()
    values: dict[str, Any] = {"r": 4, "target_modules": ["c_fc"], "init_lora_weights": "pissa"}
    ours = lora_fx.rewrite(model, LoraConfig(**values))
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**values, fan_in_fan_out=True)
    )
    assert_close(
        ours.get_parameter("transformer.h.0.mlp.c_fc.weight"),
        theirs.base_model.model.transformer.h[0].mlp.c_fc.base_layer.weight,
    )


def test_the_fast_pissa_finds_a_weight_of_low_rank() -> None:
    weight = zoo.sample(20, 3) @ zoo.sample(3, 30)
    model = nn.Sequential(nn.Linear(30, 20, bias=False))
    model[0].weight.data = weight
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=3, target_modules=["0"], init_lora_weights="pissa_niter_4")
    )
    assert adapted.get_parameter("0.weight").abs().max() < 1e-4 * weight.abs().max()


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    size=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_a_subspace_of_full_dimension_is_exact(
    rows: int, columns: int, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inner = min(rows, columns, size)
    left = torch.randn(rows, inner, dtype=torch.float64, generator=generator)
    matrix = left @ torch.randn(inner, columns, dtype=torch.float64, generator=generator)
    u, s, vh = low_rank_svd(matrix[None], size, 2, generator)
    assert_close((u * s[:, None]) @ vh, matrix[None], 1e-9)


# --- LoftQ ----------------------------------------------------------------------------------------

# Dettmers et al. 2023 (arXiv:2305.14314), appendix E.
PUBLISHED = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1.0"
)


def nearest(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Block-wise normal floats by the definition: the nearest level of each number."""
    table, flat = levels(bits).tolist(), values.flatten().tolist()
    result = []
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = max(abs(v) for v in block)
        result += [min(table, key=lambda one: abs(one - v / largest)) * largest for v in block]
    return torch.tensor(result, dtype=values.dtype).view(values.shape)


def test_the_levels_are_the_published_ones() -> None:
    published = torch.tensor([float(one) for one in PUBLISHED.split()], dtype=torch.float64)
    assert (levels(4) - published).abs().max() < 2e-7
    assert len(levels(2)) == 4


@pytest.mark.parametrize("bits", [2, 4])
def test_each_number_goes_to_the_nearest_level(bits: int) -> None:
    values = zoo.sample(7, 30, dtype=torch.float64)
    assert_close(quantized(values, bits), nearest(values, bits), 1e-12)


def test_eight_bits_are_whole_numbers_row_by_row() -> None:
    values = zoo.sample(7, 30, dtype=torch.float64)
    found = quantized(values, 8)
    step = values.half().double().abs().amax(1, keepdim=True) / 127
    assert ((found / step).round() - found / step).abs().max() < 1e-9
    assert ((found - values).abs() / step).max() < 0.52  # half a step, and the rounding to half


@pytest.mark.parametrize(("bits", "iterations"), [(4, 2), (8, 1)])
@pytest.mark.parametrize(
    "form", [f for f in MATRICES if "conv" not in f.pattern], ids=lambda f: f.name
)
def test_the_factors_are_what_quantizing_loses(form: Form, bits: int, iterations: int) -> None:
    options = {"loftq_bits": bits, "loftq_iter": iterations}
    model = form.model()
    adapted = lora_fx.rewrite(model, config("loftq", lora_alpha=2, loftq_config=options))
    (row,) = record_of(adapted).adapters["default"].sites
    exact = model.get_parameter(row.site.weight).detach().reshape(row.site.applied_shape)
    if row.site.rows is not None:
        exact = exact.narrow(row.site.axis, row.site.rows[0], row.site.rows[1] - row.site.rows[0])
    kept = exact
    for _ in range(iterations):
        values = quantized(kept, bits)
        u, s, vh = torch.linalg.svd(as_matrices(row.site, exact - values), full_matrices=False)
        product = u[:, :, :2] * s[:, None, :2] @ vh[:, :2]
        product = product if row.site.layout == "out_in" else product.mT
        kept = exact - product.reshape(exact.shape)
    found = adapted.get_parameter(row.site.weight).reshape(row.site.applied_shape)
    if row.site.rows is not None:
        found = found.narrow(row.site.axis, row.site.rows[0], row.site.rows[1] - row.site.rows[0])
    assert_close(found, values)
    merged = lora_fx.merge(adapted)
    assert_close(merged(form.x()), adapted(form.x()))


# --- parts, half precision, devices, seeds ---------------------------------------------------------


def test_the_parts_of_a_weight_change_their_own_rows() -> None:
    layer = zoo.seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))()

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    model, x = Attention(), zoo.sample(2, 5, 8)
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=2, target_modules=["attn.q", "attn.v"], init_lora_weights="pissa")
    )
    weight = adapted.get_parameter("attn.in_proj_weight")
    original = model.attn.in_proj_weight
    assert_same_bits(weight[8:16], original[8:16])
    for rows in (slice(0, 8), slice(16, 24)):
        rest = torch.linalg.svdvals(original[rows].double())[2:]
        assert_close(torch.linalg.svdvals(weight[rows].double())[:6], rest, 1e-5)
    assert_close(adapted(x), model(x))
    assert_close(lora_fx.merge(adapted).attn.in_proj_weight, original, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_weight_is_rounded_once(dtype: torch.dtype) -> None:
    model = zoo.seeded(lambda: nn.Sequential(nn.Linear(16, 12)))().to(dtype)
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=3, target_modules=["0"], init_lora_weights="pissa")
    )
    layer = adapted[0]
    assert layer.lora_A.default.dtype == torch.float32
    exact = (
        model[0].weight.double()
        - 8 / 3 * layer.lora_B.default.double() @ layer.lora_A.default.double()
    )
    spacing = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).smallest_normal)
    assert ((layer.get_parameter("weight").double() - exact).abs() / spacing).max() <= 0.51


def test_a_double_precision_weight_is_decomposed_in_double() -> None:
    model = zoo.seeded(lambda: nn.Sequential(nn.Linear(16, 12)))().double()
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=3, target_modules=["0"], init_lora_weights="pissa")
    )
    x = zoo.sample(4, 16, dtype=torch.float64)
    assert_close(adapted(x), model(x), 1e-13)


@pytest.mark.parametrize("start", ["pissa_niter_2", "orthogonal", "pissa", "gaussian"])
def test_a_start_depends_on_the_seed_and_the_site_only(start: str) -> None:
    model = zoo.seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))()

    def factors(targets: list[str], seed: int = 0) -> torch.Tensor:
        adapted = lora_fx.rewrite(
            model,
            LoraConfig(r=2, target_modules=targets, init_lora_weights=start, seed=seed),
        )
        return adapted[1].lora_A.default

    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = factors(["0", "1"])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same_bits(factors(["1"]), first)
    assert start == "pissa" or not torch.equal(factors(["1"], seed=1), first)


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_2", "olora", "loftq", "orthogonal", "eva", "corda", "lora_ga"]
)
def test_on_the_meta_device_there_are_shapes(start: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 12))
    real = nn.Sequential(nn.Linear(16, 12))
    values: dict[str, Any] = {"r": 2, "target_modules": ["0"], "init_lora_weights": start}
    shapes = [
        {
            name: value.shape
            for name, value in lora_fx.rewrite(one, LoraConfig(**values)).state_dict().items()
        }
        for one in (model, real)
    ]
    assert shapes[0] == shapes[1]


def test_what_is_tied_keeps_its_weight() -> None:
    model = zoo.seeded(zoo.Tied)()
    ids = torch.arange(6)[None]
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=2, target_modules=["head"], init_lora_weights="pissa")
    )
    assert_close(adapted(ids), model(ids))
    places = [adapted.get_parameter(f"{name}.weight").data_ptr() for name in ("embed", "head")]
    assert places[0] == model.embed.weight.data_ptr() != places[1]
    merged = lora_fx.merge(adapted)
    assert_close(merged.head.weight, model.head.weight, 1e-6)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merge_of_two_starts_is_the_sum_of_both_changes(use_dora: bool) -> None:
    """Each was trained on a base of its own, which a magnitude must not mix up."""
    base = zoo.seeded(lambda: nn.Sequential(nn.Linear(5, 4)))().double()
    values = {"target_modules": ["0"], "use_dora": use_dora}
    model = lora_fx.rewrite(base, config("pissa", **values))
    lora_fx.add_adapter(model, config("olora", r=3, **values), "other")
    with torch.no_grad():
        for factors in (model[0].lora_A, model[0].lora_B):
            for parameter in factors.parameters():
                parameter.mul_(1.5)

    def change(*names: str) -> torch.Tensor:
        return lora_fx.merge(model, adapter_names=names)[0].weight - base[0].weight

    assert_close(change("default", "other"), change("default") + change("other"))
    assert change("other").abs().max() > 1e-2


def test_a_merge_is_relative_to_the_model_before() -> None:
    model = zoo.seeded(lambda: nn.Sequential(nn.Linear(16, 12)))()
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    )
    lora_fx.add_adapter(
        adapted, LoraConfig(r=2, target_modules=["0"], init_lora_weights="olora"), "other"
    )
    with torch.no_grad():
        adapted[0].lora_B.default.add_(0.1)
        adapted[0].lora_B.other.add_(0.1)
    layer = adapted[0]
    assert "other" not in record_of(adapted).active
    exact = model[0].weight.double()
    for name in ("default", "other"):
        new, old = (
            side[0].double() @ side[1].double()
            for side in (
                (getattr(layer.lora_B, name), getattr(layer.lora_A, name)),
                (getattr(layer.lora_B_start, name), getattr(layer.lora_A_start, name)),
            )
        )
        exact = exact + 4 * (new - old)
    merged = lora_fx.merge(adapted, adapter_names=["default", "other"])
    assert_close(merged[0].weight, exact.float(), 1e-6)


@pytest.mark.parametrize(
    ("start", "rank", "reason"),
    [("pissa", 9, "takes 9 directions"), ("olora", 9, "takes 9"), ("lora_ga", 5, "takes 10")],
)
def test_a_rank_above_the_weights_is_a_reason(start: str, rank: int, reason: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(NoMatchError, match=reason):
        lora_fx.rewrite(model, LoraConfig(r=rank, target_modules=["0"], init_lora_weights=start))


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "pissa_niter_2"])
def test_a_weight_that_is_not_finite_is_named(start: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"0\.weight has values that are not finite"):
        lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=start))
