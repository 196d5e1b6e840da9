"""The fused branch beside a quantized weight: against fp64 and the plain operations, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.errors import QuantizationError
from lora_fx.formats import dense, quantized_linear
from lora_fx.ir.graph import Role
from lora_fx.runtime.kernels.fused_lora import quantized_lora_linear
from lora_fx.runtime.kernels.masks import FEW, draw
from tests.fused import SEED, Operands, errors, gradients, operands, roles
from tests.golden import check_golden, printed
from tests.numerics import assert_close, assert_same_bits
from tests.quantized import SCHEMES

FEATURES = (64, 96)
OPTIONS = {
    "": {},
    "dropout": {"dropout": 0.5},
    "rows": {"rows": (32, 80)},
    "no bias": {"bias": False},
    "bias": {"frozen": ("weight",)},
    "frozen A": {"frozen": ("weight", "bias", "a")},
    "first layer": {"frozen": ("weight", "bias", "x")},
}
schemes = pytest.mark.parametrize("scheme", SCHEMES)
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def layer(scheme: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A quantized ``nn.Linear``."""
    torch.manual_seed(0)
    return SCHEMES[scheme](nn.Linear(*FEATURES, dtype=dtype)).requires_grad_(False)


def operands_of(
    weight: Tensor, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[Operands, Any, Any]:
    """Operands with the weight's values, and both functions over the weight itself."""
    made = operands((4, 6), FEATURES, 4, dtype, torch.float32, **more)
    made = Operands(**{**vars(made), "weight": dense(weight, dtype).detach()})

    def fused(given: Operands) -> Tensor:
        torch.manual_seed(SEED)
        given_to_both = (given.x, weight, given.bias, given.a, given.b, given.scale)
        return quantized_lora_linear(
            *given_to_both, given.dropout, training=True, rows=given.rows, base_training=True
        )

    def canonical(given: Operands) -> Tensor:
        out = quantized_linear(given.x, weight, given.bias, training=True)
        x = given.x if given.mask is None else given.x * given.mask.to(given.x.dtype)
        down = nn.functional.linear(x, given.a.type_as(x))
        branch = nn.functional.linear(down, given.b.type_as(down)) * given.scale
        start, stop = given.rows or (0, FEATURES[1])
        return out + nn.functional.pad(branch, (start, FEATURES[1] - stop))

    return made, fused, canonical


@schemes
@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_as_close_to_fp64_as_the_plain_operations(
    scheme: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    given, fused, canonical = operands_of(layer(scheme, dtype).weight, dtype, **options)
    found, plain = errors(fused, given, True), errors(canonical, given, True)
    assert set(found) == {"out", *given.wanted}
    for name, error in found.items():
        # Below a fifth of a rounding the order of a sum decides which of the two is the larger.
        assert error <= max(1.1 * plain[name], 0.2), f"{name}: {error} against {plain[name]}"


@schemes
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}], ids=["", "dropout"])
def test_the_gradient_can_be_differentiated(scheme: str, options: dict[str, Any]) -> None:
    given, fused, canonical = operands_of(layer(scheme).weight, **options)

    def twice(function: Any) -> tuple[Tensor, ...]:
        wanted = tuple(given.wanted.values())
        grads = torch.autograd.grad(function(given).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in grads), wanted)

    for found, expected in zip(twice(fused), twice(canonical), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.norm()))


@schemes
@pytest.mark.parametrize("autocast", [False, True])
def test_it_begins_as_the_base_also_under_autocast(scheme: str, autocast: bool) -> None:
    base = layer(scheme)
    given, *_ = operands_of(base.weight)
    with torch.no_grad():
        given.b.zero_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = quantized_linear(given.x, base.weight, given.bias, training=True)
            found = quantized_lora_linear(
                given.x, base.weight, given.bias, given.a, given.b, 1.0, base_training=True
            )
    assert_same_bits(found, expected)


@schemes
@options
def test_under_autocast_the_branch_is_computed_in_its_dtype(
    scheme: str, options: dict[str, Any]
) -> None:
    given, fused, canonical = operands_of(layer(scheme).weight, **options)
    bfloat16 = torch.finfo(torch.bfloat16).eps
    with torch.autocast("cpu", torch.bfloat16):
        dtype = canonical(given).dtype
        cotangent = torch.randn(4, 6, FEATURES[1])
        found, plain = (gradients(one, given, cotangent) for one in (fused, canonical))
    assert found["out"].dtype == dtype
    for name, tensor in found.items():
        assert tensor.dtype == plain[name].dtype, name
        off = (tensor - plain[name]).double().norm() / plain[name].double().norm()
        assert off < 2 * bfloat16, f"{name}: {off / bfloat16} roundings"
    if given.a.requires_grad:
        kept: list[torch.dtype] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.append(t.dtype) or t, lambda t: t
            ),
            torch.autocast("cpu", torch.bfloat16),
        ):
            fused(given)
        assert torch.bfloat16 in kept


@schemes
def test_x_and_its_product_with_a_are_kept_and_one_bit_for_each_element(scheme: str) -> None:
    weight = layer(scheme).weight
    rows = FEW // FEATURES[0]
    x = torch.randn(rows, FEATURES[0], requires_grad=True)
    a, b = (torch.randn(s, requires_grad=True) for s in ((4, FEATURES[0]), (FEATURES[1], 4)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = quantized_lora_linear(x, weight, None, a, b, 1.0, 0.5, training=True)
    shapes = {(one.dtype, tuple(one.shape)) for one in kept}
    assert shapes == {
        (torch.float32, (rows, FEATURES[0])),
        (torch.float32, (rows, 4)),
        (torch.uint8, tuple(draw(x, 0.5).shape)),
        (torch.float32, tuple(a.shape)),
        (torch.float32, tuple(b.shape)),
    }
    assert len(kept) == 5
    assert x.data_ptr() in {one.data_ptr() for one in kept}
    # What a node keeps as an attribute no hook sees: it is the parameter that is there anyway.
    ((_, _, kernel),) = out.grad_fn.options
    assert kernel.weight.weight is weight


@schemes
def test_hooks_may_replace_what_is_saved(scheme: str) -> None:
    given, fused, _ = operands_of(layer(scheme).weight)
    expected = gradients(fused, given, torch.ones(4, 6, FEATURES[1]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        found = gradients(fused, given, torch.ones(4, 6, FEATURES[1]))
    assert_same_bits(list(found.values()), list(expected.values()))


def written(weight: Tensor) -> None:
    """Zeros written into a weight, or into what it is made of."""
    inside = getattr(type(weight), "__tensor_flatten__", None)
    if inside is None:
        weight.zero_()
        return
    for name in inside(weight)[0]:
        written(getattr(weight, name))


@schemes
def test_a_weight_that_is_written_into_is_an_error(scheme: str) -> None:
    given, fused, _ = operands_of(weight := layer(scheme).weight)
    out = fused(given)
    with torch.no_grad():
        written(weight)
    with pytest.raises(QuantizationError, match=r"of shape \(.*\) was written into between"):
        out.sum().backward()


@schemes
def test_the_output_may_be_written_into(scheme: str) -> None:
    given, fused, canonical = operands_of(layer(scheme).weight)

    def changed(function: Any) -> dict[str, Tensor]:
        return gradients(lambda given: function(given).mul_(2), given, torch.ones(4, 6, 96))

    found, expected = changed(fused), changed(canonical)
    assert_close(list(found.values()), list(expected.values()), 1e-4)


@schemes
@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (64,)])
def test_of_no_tokens_and_of_one(scheme: str, shape: tuple[int, ...]) -> None:
    weight = layer(scheme).weight
    x = torch.randn(shape, requires_grad=True)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(96, 4, requires_grad=True)
    out = quantized_lora_linear(x, weight, None, a, b, 1.0, 0.5, training=True, base_training=True)
    assert out.shape == (*shape[:-1], 96)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


# --- in a model --------------------------------------------------------------------------------------


def pair(scheme: str, **more: Any) -> tuple[nn.Module, nn.Module]:
    """Two layers, fused and canonical, with the same factors."""
    base = nn.Sequential(layer(scheme), nn.Tanh(), SCHEMES[scheme](nn.Linear(96, 64))).train()
    config = lora_fx.LoraConfig(
        seed=0, r=4, target_modules=["0", "2"], init_lora_weights=False, **more
    )
    fused, canonical = (lora_fx.rewrite(base, config, optimize=one) for one in (True, False))
    return fused.train(), canonical.train()


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x = x.detach().clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    assert x.grad is not None
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    for parameter in model.parameters():
        parameter.grad = None
    return [out.detach(), x.grad, *grads]


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))


@schemes
def test_a_model_is_fused_and_computes_what_it_did(scheme: str) -> None:
    fused, canonical = pair(scheme)
    assert roles(fused) == {Role.FUSED, Role.FACTOR}
    for found, expected in zip(step(fused, X), step(canonical, X), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dora_stays_as_it_is() -> None:
    fused, canonical = pair("nf4", use_dora=True)
    assert Role.FUSED not in roles(fused)
    assert_same_bits(step(fused, X), step(canonical, X))


@pytest.mark.parametrize("scheme", ["nf4", "int8 torchao"])
def test_a_part_of_a_fused_weight(scheme: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = layer(scheme)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return q * k + v

    config = lora_fx.LoraConfig(seed=0, r=4, target_modules=["qkv.v"], init_lora_weights=False)
    both = [lora_fx.rewrite(Attention().train(), config, optimize=one) for one in (True, False)]
    assert Role.FUSED in roles(both[0])
    for found, expected in zip(*(step(one, X) for one in both), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_golden() -> None:
    fused, _ = pair("nf4", lora_dropout=0.1)
    check_golden("fuse_quantized", printed(lora_fx.graphs(fused)["0"]))
    fused, _ = pair("int8 bitsandbytes")
    check_golden("fuse_quantized_int8", printed(lora_fx.graphs(fused)["0"]))


@schemes
def test_compiled(scheme: str) -> None:
    fused, _ = pair(scheme)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for found, expected in zip(step(compiled, X), step(fused, X), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@schemes
def test_checkpointed_with_dropout(scheme: str, reentrant: bool) -> None:
    fused, _ = pair(scheme, lora_dropout=0.5)

    def run(given: Tensor) -> Tensor:
        result: Tensor = checkpoint(fused, given, use_reentrant=reentrant)
        return result

    torch.manual_seed(0)
    expected = step(fused, X)
    torch.manual_seed(0)
    wrapped = nn.Module()
    wrapped.inner = fused
    wrapped.forward = run
    assert_same_bits(step(wrapped, X), expected)


@schemes
def test_the_transforms_of_torch_func(scheme: str) -> None:
    fused, _ = pair(scheme)
    factors = {n: p.detach() for n, p in fused.named_parameters() if p.requires_grad}

    def loss(factors: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(fused, factors, (x,)).square().sum()
        return result

    _, _, *expected = step(fused, X)
    found = torch.func.grad(loss)(factors, X)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(factors, X)
    for name, grad in zip(factors, expected, strict=True):
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(each[name].sum(0), grad, rtol=1e-4, atol=1e-4)
