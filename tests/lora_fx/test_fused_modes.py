"""The fused LoRA function under autocast, checkpoints, compilers and transforms, and what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import LoraConfig
from lora_fx.runtime.kernels.fused_lora import lora_linear
from lora_fx.tools.bench.counted import saved_bytes
from tests.fused import (
    SEED,
    Operands,
    assert_close_under_autocast,
    canonical,
    errors,
    forward_mode,
    fused,
    gradients,
    operands,
)
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import Residual

pytestmark = pytest.mark.usefixtures("packed_masks")

HALF = (torch.bfloat16, torch.float16)
OPTIONS = {
    "plain": {},
    "dropout": {"dropout": 0.25},
    "rows": {"rows": (16, 32)},
    "no bias": {"bias": False},
}
IDS = torch.arange(12).view(3, 4) % 11


def trained(optimize: bool = True, dropout: float = 0.5, **options: Any) -> nn.Module:
    """A model in training, every linear of which has a branch that is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_dropout=dropout, init_lora_weights=False, **options)
    model = lora_fx.rewrite(Residual(), config, optimize=optimize)
    return model.train()


def step(call: Callable[[], Tensor], model: nn.Module) -> list[Tensor]:
    """Output and gradients of one step under a fixed seed."""
    model.zero_grad()
    torch.manual_seed(SEED)
    out = call()
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- autocast ----------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["whole step", "forward only"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_autocast(options: dict[str, Any], dtype: torch.dtype, whole: bool) -> None:
    """Dtypes are the plain operations', and errors against fp64 no larger than theirs."""
    case = operands((4, 24), (96, 64), 8, torch.float32, frozen=(), **options)

    assert_close_under_autocast(case, dtype, whole)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_autocast_entered_for_backward_only(options: dict[str, Any], dtype: torch.dtype) -> None:
    case = operands((4, 24), (96, 64), 8, torch.float32, frozen=(), **options)
    with torch.autocast("cpu", dtype=dtype):
        inside = errors(lambda given: _outside(fused, given), case)
    # It is not computed in less than the forward was.
    assert inside == errors(fused, case)


def _outside(function: Any, given: Operands) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return function(given)


def test_autocast_leaves_fp64_alone() -> None:
    case = operands(dropout=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(fused(case), _outside(fused, case))


def test_autocast_with_a_base_in_half_precision() -> None:
    case = operands((4,), (96, 64), 8, torch.bfloat16, torch.float32)
    ones = torch.ones(4, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        found = gradients(fused, case, ones)
        expected = gradients(canonical, case, ones)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
    assert_close(list(found.values()), list(expected.values()), 3e-2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_of_a_model(dtype: torch.dtype) -> None:
    def run(optimize: bool) -> list[Tensor]:
        model = trained(optimize, dropout=0.0)
        with torch.autocast("cpu", dtype=dtype):
            out = model(IDS)
        return step(lambda: out, model)

    found, expected = run(True), run(False)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert_close(found, [tensor.double() for tensor in expected], 4e-2)


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("cast", [False, True], ids=["", "autocast"])
def test_checkpoints_replay_their_masks(reentrant: bool, cast: bool) -> None:
    model = trained()
    x = torch.randn(3, 4, 6, requires_grad=True)

    def run(block: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        x.grad = None

        def call() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                hidden = x
                for one in model.blocks:
                    hidden = block(one, hidden)
            return hidden

        return [*step(call, model), x.grad.clone()]

    plain = run(lambda one, hidden: one(hidden))
    replayed = run(lambda one, hidden: checkpoint(one, hidden, use_reentrant=reentrant))
    assert_same_bits(replayed, plain)
    forgotten = run(
        lambda one, hidden: checkpoint(
            one, hidden, use_reentrant=reentrant, preserve_rng_state=False
        )
    )
    # Or nothing would have been replayed here.
    assert not torch.equal(forgotten[-1], plain[-1])


# --- compilers ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
# A compiler draws by itself: its mask is read off below.
@pytest.mark.parametrize("options", [{}, {"rows": (16, 32)}, {"bias": False}])
def test_compiled_whole(options: dict[str, Any]) -> None:
    case = operands((4, 24), (96, 64), 8, torch.float32, frozen=(), **options)

    def call(given: Operands) -> Tensor:
        tensors = (given.x, given.weight, given.bias, given.a, given.b)
        return lora_linear(*tensors, given.scale, rows=given.rows)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ones = torch.ones(4, 24, 64)
    found, expected = gradients(compiled, case, ones), gradients(fused, case, ones)
    assert_close(list(found.values()), list(expected.values()))


def dropped(x: Tensor) -> Tensor:
    """Shows its mask: nothing but the branch, with factors that are identities."""
    size = x.shape[-1]
    zero, a, b = torch.zeros(size, size), torch.eye(size), torch.eye(size)
    return lora_linear(x, zero, None, a, b, 1.0, dropout=0.25, training=True)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("again", [False, True], ids=["", "checkpoint"])
def test_compiled_dropout_has_one_mask_for_both_ways(backend: str, again: bool) -> None:
    def run(x: Tensor) -> Tensor:
        return checkpoint(dropped, x, use_reentrant=False) if again else dropped(x)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    x = torch.ones(64, 32, requires_grad=True)
    first = compiled(x)
    first.sum().backward()
    assert_same_bits(x.grad, first)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(256 / 192).item()}
    # Five standard deviations.
    assert abs((first == 0).double().mean() - 0.25) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5
    assert not torch.equal(compiled(x), first)


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_computes_a_model_and_its_gradients() -> None:
    model = trained(dropout=0.0)
    expected = step(lambda: model(IDS), model)
    compiled = torch.compile(model, fullgraph=True)
    assert_close(step(lambda: compiled(IDS), model), expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_steps_and_modes_are_compiled_once(dropout: float) -> None:
    model = trained(dropout=dropout)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=0.1)

    def train() -> None:
        compiled(IDS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    assert counter.frame_count == 1
    for _ in range(3):
        train()
    assert counter.frame_count == 1
    model.eval()
    with torch.no_grad():
        assert_close(compiled(IDS), copy.deepcopy(model)(IDS))
    seen = counter.frame_count
    assert seen == 2
    for _ in range(2):
        model.train()
        train()
        model.eval()
        with torch.no_grad():
            compiled(IDS)
    assert counter.frame_count == seen


# --- torch.func --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_func_transforms_apply(options: dict[str, Any]) -> None:
    """Gradients, products with vectors both ways, Hessians: all from the one function."""
    options = {**options, "rows": (1, 4)} if "rows" in options else options
    options = {key: value for key, value in options.items() if key != "dropout"}
    case = operands((2,), (3, 4), 2, **options)

    def of(function: Any) -> Callable[..., Tensor]:
        def loss(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            given = Operands(x, case.weight, case.bias, a, b, rows=case.rows)
            return function(given).square().sum()

        return loss

    point = tuple(tensor.detach() for tensor in (case.x, case.a, case.b))
    for transform in (
        lambda f: torch.func.grad(f, (0, 1, 2))(*point),
        lambda f: torch.func.vjp(f, *point)[1](torch.ones((), dtype=torch.float64)),
        lambda f: torch.func.jvp(f, point, point)[1],
        lambda f: forward_mode(f, point),
        lambda f: torch.func.jacrev(f, (1, 2))(*point),
        lambda f: torch.func.hessian(f, (0, 1, 2))(*point),
        lambda f: torch.vmap(torch.func.grad(f, (1, 2)), (0, None, None))(*point),
    ):
        found, expected = transform(of(fused)), transform(of(canonical))
        assert_close(found, expected)


def test_vmap_over_anything() -> None:
    case = operands((2,), (3, 4), 2)
    for name, tensor in case.tensors.items():
        many = torch.stack([tensor.detach(), 2 * tensor.detach()])

        def one(value: Tensor, name: str = name) -> Tensor:
            return fused(Operands(**{**case.tensors, name: value}))

        assert_close(torch.vmap(one)(many), torch.stack([one(many[0]), one(many[1])]))


def test_vmap_draws_as_it_is_told() -> None:
    x = torch.ones(2, 64, 32)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(dropped)(x)
    first, second = torch.vmap(dropped, randomness="same")(x)
    assert_same_bits(first, second)
    first, second = torch.vmap(dropped, randomness="different")(x)
    assert not torch.equal(first, second)


def test_per_sample_gradients_of_a_model() -> None:
    model = trained(dropout=0.0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = {name: model.get_parameter(name).detach() for name in names}

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (ids[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(values, IDS)
    for sample, ids in enumerate(IDS):
        expected = step(lambda ids=ids: model(ids[None]), model)[1:]
        assert_close([found[name][sample] for name in names], expected)


def test_forward_mode_outside_of_func_is_that_of_the_plain_operations() -> None:
    case = operands()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.x.detach(), torch.ones_like(case.x))
        both = [
            torch.autograd.forward_ad.unpack_dual(
                function(Operands(dual, case.weight, case.bias, case.a, case.b))
            )
            for function in (fused, canonical)
        ]
    assert_close(both[0].primal, both[1].primal)
    assert_close(both[0].tangent, both[1].tangent)


# --- memory ------------------------------------------------------------------------------------

TOKENS, FEATURES, RANK = 64, 32, 4


def kept_bytes(
    optimize: bool, dropout: float, dtype: torch.dtype, frozen: tuple[str, ...] = ()
) -> int:
    config = LoraConfig(r=RANK, lora_dropout=dropout, target_modules=["0"])
    base = nn.Sequential(nn.Linear(FEATURES, 48)).to(dtype)
    model = lora_fx.rewrite(base, config, optimize=optimize).train()
    for name in frozen:
        model.get_parameter(f"0.lora_{name}.default").requires_grad_(False)
    x = torch.randn(TOKENS, FEATURES, dtype=dtype, requires_grad=True)
    return saved_bytes(model, lambda: model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_it_keeps_x_the_product_with_a_and_a_bit_an_element(
    dropout: float, dtype: torch.dtype
) -> None:
    bits = TOKENS * FEATURES // 8 if dropout else 0
    expected = TOKENS * (FEATURES + RANK) * dtype.itemsize + bits
    assert kept_bytes(True, dropout, dtype) == expected
    plain = kept_bytes(False, dropout, dtype)
    # In fp32 and without dropout there is nothing else to keep.
    if dropout or dtype is not torch.float32:
        assert expected < plain
    else:
        assert expected == plain


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("frozen", ["A", "AB"])
def test_a_frozen_factor_needs_no_input(frozen: str, dropout: float) -> None:
    bits = TOKENS * FEATURES // 8 if dropout else 0
    # The gradient of B needs the product with A, that of x neither.
    expected = bits + (TOKENS * RANK * 4 if frozen == "A" else 0)
    found, plain = (
        kept_bytes(optimize, dropout, torch.float32, tuple(frozen)) for optimize in (True, False)
    )
    assert found == expected <= plain


def test_the_mask_is_that_of_the_seed_in_the_model_too() -> None:
    """The model's own function and this suite's: one draw for each branch, in order."""
    case = operands((64,), (32, 48), 4, torch.float32, dropout=0.25, scale=2.0)
    model = lora_fx.rewrite(
        nn.Sequential(nn.Linear(32, 48)),
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.25, target_modules=["0"]),
    ).train()
    state = zip(model.parameters(), (case.weight, case.bias, case.a, case.b), strict=True)
    with torch.no_grad():
        for parameter, value in state:
            parameter.copy_(value)
    torch.manual_seed(SEED)
    assert_close(model(case.x), canonical(case))
