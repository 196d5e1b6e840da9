"""The fused LoRA function against fp64, against the plain operations, and under autograd's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lora_fx.errors import LoraFxError
from lora_fx.runtime.kernels.fused_lora import lora_linear
from tests.fused import (
    Operands,
    assert_close_to_exact,
    canonical,
    errors,
    fused,
    gradients,
    laid_out,
    operands,
    recovered,
)
from tests.numerics import assert_close

pytestmark = pytest.mark.usefixtures("packed_masks")

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)


LAYOUTS = st.sampled_from(["plain", "transposed", "first axis last", "every second", "offset"])


@st.composite
def cases(draw: Any) -> Operands:
    dtype = draw(st.sampled_from(DTYPES))
    features = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    start = draw(st.integers(0, features[1] - 1))
    stop = draw(st.integers(start + 1, features[1]))
    tensors = ("x", "weight", "bias", "a", "b")
    made = operands(
        tuple(draw(st.lists(st.integers(0, 5), max_size=3))),
        features,
        draw(st.integers(1, 9)),
        dtype,
        draw(st.sampled_from([dtype, torch.float32])) if dtype in HALF else dtype,
        bias=draw(st.booleans()),
        # Something has to want a gradient.
        frozen=tuple(draw(st.sets(st.sampled_from(tensors), max_size=4))),
        scale=draw(st.sampled_from([1.0, 0.25, -3.0])),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.1, 0.75])),
        rows=draw(st.sampled_from([None, (start, stop)])),
    )
    if not made.wanted:
        made.b.requires_grad_()
    layouts = {name: draw(LAYOUTS) for name in ("x", "weight", "a", "b")}
    named = {
        name: laid_out(tensor.detach(), layouts.get(name, "plain")).requires_grad_(
            tensor.requires_grad
        )
        for name, tensor in made.tensors.items()
    }
    made = Operands(
        **{"bias": None, **named}, scale=made.scale, dropout=made.dropout, rows=made.rows
    )
    return recovered(made) if made.dropout else made


@given_any(cases())
@settings(max_examples=300)
def test_it_is_as_close_to_fp64_as_the_plain_operations(case: Operands) -> None:
    assert_close_to_exact(case)


@pytest.mark.parametrize("factors", [None, torch.float32], ids=["factors too", "fp32 factors"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.1}, {"rows": (16, 32)}, {"bias": False}],
    ids=["", "dropout", "rows", "no bias"],
)
def test_no_error_is_larger_on_average(
    dtype: torch.dtype, factors: torch.dtype | None, options: dict[str, Any]
) -> None:
    case = operands((4, 24), (96, 64), 8, dtype, factors, frozen=(), **options)
    found, plain = errors(fused, case, True), errors(canonical, case, True)
    for name, error in found.items():
        # Averages of a twentieth of a rounding, as those of b here, differ from machine to machine.
        assert error <= max(1.1 * plain[name], 0.1), f"{name}: {error} against {plain[name]}"


CHECKED = {
    "plain": {},
    "dropout": {"dropout": 0.5},
    "rows": {"rows": (1, 4)},
    "dropout and rows": {"dropout": 0.5, "rows": (1, 4)},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize(
    "frozen",
    [(), ("weight", "bias"), ("x", "weight", "bias"), ("a", "b"), ("a",), ("x", "a", "weight")],
)
@pytest.mark.parametrize("options", CHECKED.values(), ids=CHECKED)
def test_gradients_are_those_of_differences(check, frozen, options: dict[str, Any]) -> None:
    case = operands((2,), (3, 4), 2, frozen=frozen, **options)
    wanted = tuple(case.wanted)

    def function(*tensors: Tensor) -> Tensor:
        return fused(
            Operands(
                **{"bias": None, **case.tensors, **dict(zip(wanted, tensors, strict=True))},
                scale=case.scale,
                dropout=case.dropout,
                rows=case.rows,
            )
        )

    assert check(function, tuple(case.wanted.values()))


@pytest.mark.parametrize("options", CHECKED.values(), ids=CHECKED)
def test_a_frozen_a_is_differentiated_once(options: dict[str, Any]) -> None:
    case = operands(frozen=("weight", "bias", "a"), **options)
    ones = torch.ones(2, 3, 6, dtype=torch.float64)
    found, expected = gradients(fused, case, ones), gradients(canonical, case, ones)
    assert_close(list(found.values()), list(expected.values()))
    with pytest.raises(LoraFxError, match=r"cannot be differentiated again.*make A trainable"):
        torch.autograd.grad(fused(case).sum(), case.b, create_graph=True)


def test_without_training_there_is_no_dropout_and_nothing_is_drawn() -> None:
    case = operands()
    state = torch.get_rng_state()
    given = (case.x, case.weight, case.bias, case.a, case.b, case.scale)
    found = lora_linear(*given, dropout=0.5, training=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(found, canonical(case))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_computes_the_same(mode: Any) -> None:
    case = operands(dropout=0.5)
    with mode():
        found = fused(case)
    assert not found.requires_grad
    assert_close(found, canonical(case))


def test_only_what_wants_a_gradient_makes_the_output_want_one() -> None:
    case = operands(frozen=("x", "weight", "bias", "a", "b"))
    assert not fused(case).requires_grad


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}], ids=["", "dropout"])
def test_gradients_add_up_and_the_graph_can_be_kept(options: dict[str, Any]) -> None:
    case = operands(**options)
    fused(case).sum().backward(retain_graph=True)
    once = case.a.grad.clone()
    out = fused(case)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert_close(case.a.grad, 3 * once)


def test_the_gradient_that_comes_in_is_not_written_into() -> None:
    case = operands()
    cotangent = torch.ones(2, 3, 6, dtype=torch.float64)
    fused(case).backward(cotangent)
    assert (cotangent == 1).all()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize("options", CHECKED.values(), ids=CHECKED)
def test_the_output_may_be_written_into(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    def step(function: Any) -> dict[str, Tensor]:
        def changed(case: Operands) -> Tensor:
            out = function(case)
            assert not out._is_view()
            return out.mul_(2).add_(1)

        case = operands(shape, **options)
        return gradients(changed, case, torch.ones(*shape, 6))

    found, expected = step(fused), step(canonical)
    assert_close(list(found.values()), list(expected.values()))
    assert found["out"].is_contiguous()


def test_a_change_of_what_was_kept_is_noticed() -> None:
    case = operands()
    x = case.x.detach().clone()
    out = fused(Operands(x, case.weight, case.bias, case.a, case.b))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_an_empty_batch_has_gradients_of_zero(shape: tuple[int, ...]) -> None:
    case = operands(shape, frozen=(), dropout=0.5)
    out = fused(case)
    assert out.shape == (*shape, 6)
    out.sum().backward()
    assert all((tensor.grad == 0).all() for tensor in case.tensors.values())
