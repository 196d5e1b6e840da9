"""The fused DoRA function against fp64, against the operations it stands for, and under autograd's checks."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import lora_fx
from lora_fx import LoraConfig
from lora_fx.errors import LoraFxError
from lora_fx.runtime.kernels.fused_dora import dora_linear
from lora_fx.tools.bench.counted import saved_bytes
from tests.dora import randomize_magnitudes
from tests.fused import (
    Operands,
    assert_close_under_autocast,
    canonical,
    errors,
    formula,
    forward_mode,
    fused,
    gradients,
    operands,
    with_gains,
)
from tests.lora_fx.test_fused import CHECKED, HALF, cases
from tests.numerics import assert_close, assert_same_bits

pytestmark = pytest.mark.usefixtures("packed_masks")

AGAIN = pytest.mark.parametrize("again", [True, False], ids=["again", "from the output"])
FROZEN = ("weight", "bias")
OPTIONS = pytest.mark.parametrize("options", CHECKED.values(), ids=CHECKED)
# So many outputs that the mean error of a vector of them is no matter of luck.
MANY = (96, 1000)
# Two that cannot be divided by, one of the other sign.
GAINS = torch.tensor([1.0, 0.0, -0.8, 1e-4, 1.2, 0.9], dtype=torch.float64)


def decomposed(again: bool = True, frozen: tuple[str, ...] = FROZEN, **options: Any) -> Operands:
    return with_gains(operands(frozen=frozen, **options), again)


@given_any(cases(), st.booleans())
@settings(max_examples=100)
def test_it_is_as_close_to_fp64_as_the_single_operations(case: Operands, again: bool) -> None:
    case = with_gains(case.mapped(lambda tensor: tensor), again)
    # The single operations know no gradient of a weight that is decomposed.
    case.weight.requires_grad_(False)
    if not again or case.rows is not None:
        case.x.requires_grad_()
    found, plain = errors(fused, case), errors(canonical, case)
    for name, error in found.items():
        assert error <= max(1.5 * plain[name], 2.0), f"{name}: {error} against {plain[name]}"


@AGAIN
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.1}, {"rows": (160, 900)}, {"bias": False}],
    ids=["", "dropout", "rows", "no bias"],
)
def test_no_error_is_larger_on_average(
    dtype: torch.dtype, again: bool, options: dict[str, Any]
) -> None:
    made = operands((4, 24), MANY, 8, dtype, torch.float32, frozen=FROZEN, **options)
    case = with_gains(made, again)
    found, plain = errors(fused, case, True), errors(canonical, case, True)
    for name, error in found.items():
        assert error <= 1.1 * plain[name], f"{name}: {error} against {plain[name]}"


@AGAIN
@OPTIONS
@pytest.mark.parametrize("gains", [None, GAINS], ids=["", "near zero"])
def test_value_and_gradients_are_those_of_the_formula(
    again: bool, options: dict[str, Any], gains: Tensor | None
) -> None:
    case = operands(frozen=(), **options)
    chosen = {} if gains is None else {"gains": gains[: case.b.shape[0]].clone()}
    case = with_gains(case, again, **chosen)
    cotangent = torch.randn(2, 3, 6, dtype=torch.float64)
    found, exact = (gradients(function, case, cotangent) for function in (fused, formula))
    assert_close(list(found.values()), list(exact.values()), 1e-12)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@AGAIN
@OPTIONS
@pytest.mark.parametrize(
    "frozen",
    [(), FROZEN, ("x", *FROZEN), ("a", "b", "weight"), ("x", "a", "weight")],
)
def test_gradients_are_those_of_differences(
    check: Any, again: bool, frozen: tuple[str, ...], options: dict[str, Any]
) -> None:
    case = with_gains(operands((2,), (3, 4), 2, frozen=frozen, **options), again)
    wanted = tuple(case.wanted)

    def function(*tensors: Tensor) -> Tensor:
        return fused(replace(case, **dict(zip(wanted, tensors, strict=True))))

    kept = again or case.rows is not None or not {"a", "weight"} <= set(frozen)
    if check is torch.autograd.gradgradcheck and not kept:
        with pytest.raises(LoraFxError, match=r"cannot be differentiated again.*make A trainable"):
            check(function, tuple(case.wanted.values()))
    else:
        assert check(function, tuple(case.wanted.values()))


@AGAIN
@OPTIONS
def test_no_bit_changes_where_all_gains_are_one_and_b_is_zero(
    again: bool, options: dict[str, Any]
) -> None:
    for dtype in (torch.float32, *HALF):
        made = operands((4, 3), (96, 64), 8, dtype, torch.float32, **options)
        made = replace(made, b=torch.zeros_like(made.b))
        case = with_gains(made, again, gains=torch.ones(made.b.shape[0]))
        base = nn.functional.linear(case.x, case.weight, case.bias)
        assert_same_bits(fused(case), base)


@AGAIN
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_computes_the_same(again: bool, mode: Any) -> None:
    case = decomposed(again, dropout=0.5)
    with mode():
        found = fused(case)
    assert not found.requires_grad
    assert_close(found, formula(case))


@AGAIN
def test_the_graph_can_be_kept_and_the_cotangent_is_not_written_into(again: bool) -> None:
    case = decomposed(again, dropout=0.5)
    cotangent = torch.ones(2, 3, 6, dtype=torch.float64)
    out = fused(case)
    out.backward(cotangent, retain_graph=True)
    once = [tensor.grad.clone() for tensor in case.wanted.values()]
    out.backward(cotangent)
    assert (cotangent == 1).all()
    assert_close([tensor.grad for tensor in case.wanted.values()], [2 * one for one in once])


@AGAIN
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_an_empty_batch_has_gradients_of_zero(again: bool, shape: tuple[int, ...]) -> None:
    case = with_gains(operands(shape, frozen=(), dropout=0.5), again)
    out = fused(case)
    assert out.shape == (*shape, 6)
    out.sum().backward()
    assert all((tensor.grad == 0).all() for tensor in case.tensors.values())


def test_the_output_may_be_written_into_where_it_is_not_kept() -> None:
    def changed(function: Any) -> Any:
        return lambda case: function(case).mul_(2).add_(1)

    case = decomposed()
    assert not fused(case)._is_view()
    ones = torch.ones(2, 3, 6)
    found, exact = (gradients(changed(one), case, ones) for one in (fused, formula))
    assert_close(list(found.values()), list(exact.values()))


# --- autocast, compilers, transforms -----------------------------------------------------------


@AGAIN
@pytest.mark.parametrize("whole", [True, False], ids=["whole step", "forward only"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.25}, {"rows": (160, 900)}], ids=["", "dropout", "rows"]
)
def test_autocast(options: dict[str, Any], dtype: torch.dtype, whole: bool, again: bool) -> None:
    case = with_gains(operands((4, 24), MANY, 8, torch.float32, **options), again)

    assert_close_under_autocast(case, dtype, whole)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_steps_and_modes_are_compiled_once(dropout: float) -> None:
    model = trained(dropout)
    x = torch.randn(5, 6)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=0.1)
    for _ in range(3):
        compiled(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1
    model.eval()
    with torch.no_grad():
        assert_close(compiled(x), copy.deepcopy(model)(x))


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_computes_a_model_and_its_gradients() -> None:
    model = trained(0.0)
    x = torch.randn(5, 6)

    def step(call: Any) -> list[Tensor]:
        model.zero_grad()
        out = call(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in lora_fx.trainable_parameters(model))]

    expected = step(model)
    assert_close(step(torch.compile(model, fullgraph=True)), expected)


@AGAIN
@OPTIONS
def test_func_transforms_apply(again: bool, options: dict[str, Any]) -> None:
    options = {key: value for key, value in options.items() if key != "dropout"}
    case = with_gains(operands((2,), (3, 4), 2, **options), again)

    def of(function: Any) -> Any:
        def loss(x: Tensor, a: Tensor, b: Tensor, gains: Tensor) -> Tensor:
            return function(replace(case, x=x, a=a, b=b, gains=gains)).square().sum()

        return loss

    names = ("x", "a", "b", "gains")
    point = tuple(getattr(case, name).detach() for name in names)
    every = (0, 1, 2, 3)
    for transform in (
        lambda f: torch.func.grad(f, every)(*point),
        lambda f: torch.func.jvp(f, point, point)[1],
        lambda f: forward_mode(f, point),
        lambda f: torch.func.hessian(f, every)(*point),
        lambda f: torch.vmap(torch.func.grad(f, (1, 2, 3)), (0, None, None, None))(*point),
    ):
        found, expected = transform(of(fused)), transform(of(formula))
        assert_close(found, expected)


# --- memory ------------------------------------------------------------------------------------

TOKENS, FEATURES, RANK = 64, 32, 4


def trained(dropout: float) -> nn.Module:
    """Square, widening and narrowing layers, with biases and without, none of whose branches is zero."""
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6, bias=False)
    )
    config = LoraConfig(
        r=3, lora_dropout=dropout, target_modules=".*", use_dora=True, init_lora_weights=False
    )
    return randomize_magnitudes(lora_fx.rewrite(base, config)).train()


def kept_bytes(
    base: nn.Module,
    dropout: float,
    frozen: tuple[str, ...] = (),
    memory: Any = "fast",
    **options: Any,
) -> int:
    config = LoraConfig(r=RANK, lora_dropout=dropout, target_modules=["0"], **options)
    model = lora_fx.rewrite(base, config, memory=memory).train()
    for name in frozen:
        model[0].get_parameter(f"{name}.default").requires_grad_(False)
    x = torch.randn(TOKENS, FEATURES, requires_grad=True)
    return saved_bytes(model, lambda: model(x))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_balanced_square_layer_keeps_what_lora_does_and_vectors(dropout: float) -> None:
    base = nn.Sequential(nn.Linear(FEATURES, FEATURES))
    plain = kept_bytes(base, dropout)
    found = kept_bytes(base, dropout, use_dora=True, memory="balanced")
    # The gain, the norm that it is divided by, and what autograd keeps of the division: [out] each.
    assert plain < found <= plain + 3 * FEATURES * 4
    assert found < 1.1 * plain


def step_flops(memory: Any, **options: Any) -> int:
    base = nn.Sequential(nn.Linear(FEATURES, FEATURES))
    config = LoraConfig(r=RANK, target_modules=["0"], **options)
    model = lora_fx.rewrite(base, config, memory=memory).train()
    x = torch.randn(TOKENS, FEATURES, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("memory", "products"), [("fast", 0), ("balanced", 1)])
def test_only_a_balanced_square_layer_makes_its_product_again(memory: Any, products: int) -> None:
    extra = step_flops(memory, use_dora=True) - step_flops(memory)
    # W Aᵀ, A Aᵀ and B times that, for the norm.
    norm = 2 * (FEATURES * RANK * FEATURES + RANK * FEATURES * RANK + FEATURES * RANK * RANK)
    assert extra == norm + products * 2 * TOKENS * FEATURES * FEATURES


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_layer_keeps_an_output_that_the_next_one_shares(dropout: float, square: bool) -> None:
    outputs = FEATURES if square else 2 * FEATURES
    base = nn.Sequential(nn.Linear(FEATURES, outputs))
    plain, found = (kept_bytes(base, dropout, use_dora=flag) for flag in (False, True))
    output = TOKENS * outputs * 4
    assert plain + output < found <= plain + output + 3 * outputs * 4
    # With an activation behind it, which keeps its input.
    base = nn.Sequential(nn.Linear(FEATURES, outputs), nn.GELU())
    plain, found = (kept_bytes(base, dropout, use_dora=flag) for flag in (False, True))
    assert plain < found <= plain + 3 * outputs * 4


def test_a_frozen_magnitude_keeps_the_gain_alone() -> None:
    base = nn.Sequential(nn.Linear(FEATURES, 2 * FEATURES))
    plain = kept_bytes(base, 0.05)
    found = kept_bytes(base, 0.05, ("lora_magnitude_vector",), use_dora=True)
    assert found == plain + 2 * FEATURES * 4


def test_the_function_is_that_of_the_branch_alone_under_dropout() -> None:
    """An identity for A and B shows the mask; the gain is on both, and the base has none."""
    size, dropout = 32, 0.25
    x, eye = torch.ones(64, size), torch.eye(size)
    gains = torch.full((size,), 2.0)
    torch.manual_seed(0)
    out = dora_linear(x, eye, None, eye, eye, 1.0, gains, dropout=dropout, training=True)
    kept = out != 2
    assert 0.6 < kept.double().mean() < 0.9
    assert_close(out[kept], torch.full_like(out[kept], 2 + 2 * 256 / 192))
    torch.manual_seed(0)
    still = dora_linear(x, eye, None, eye, eye, 1.0, gains, dropout=dropout, training=False)
    assert_close(still, torch.full_like(still, 4.0))
