"""The fused functions, plain and DoRA, beside the operations that they stand for, with one mask."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import lora_fx
from lora_fx.ir import Role, role_of
from lora_fx.runtime.kernels import dora
from lora_fx.runtime.kernels.fused_dora import dora_linear
from lora_fx.runtime.kernels.fused_lora import lora_linear
from lora_fx.runtime.kernels.masks import draw, kept, unpacked

__all__ = [
    "Operands",
    "assert_close_to_exact",
    "assert_close_under_autocast",
    "canonical",
    "errors",
    "formula",
    "forward_mode",
    "fused",
    "gradients",
    "laid_out",
    "operands",
    "recovered",
    "roles",
    "with_gains",
]

SEED = 5


@dataclass(frozen=True)
class Operands:
    """Arguments of ``lora_linear``, or with gains of ``dora_linear``; what wants a gradient is a leaf.

    ``mask`` is what the branch's input is multiplied with, scale included, under `dropout`.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float = 0.7
    dropout: float = 0.0
    rows: tuple[int, int] | None = None
    mask: Tensor | None = None
    gains: Tensor | None = None
    again: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("x", "weight", "bias", "a", "b", "gains")
        named = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def wanted(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def mapped(self, change: Any) -> Operands:
        """Every tensor changed, and a leaf that wants a gradient where it was one."""
        changed = {
            name: change(tensor.detach()).requires_grad_(tensor.requires_grad)
            for name, tensor in self.tensors.items()
        }
        mask = None if self.mask is None else change(self.mask)
        return replace(self, **changed, mask=mask)


def operands(
    tokens: tuple[int, ...] = (2, 3),
    features: tuple[int, int] = (8, 6),
    r: int = 2,
    dtype: torch.dtype = torch.float64,
    factors: torch.dtype | None = None,
    bias: bool = True,
    frozen: tuple[str, ...] = ("weight", "bias"),
    **options: Any,
) -> Operands:
    """Random ones, no factor of which is zero; under dropout with the mask that will be drawn."""
    rows = options.get("rows") or (0, features[1])
    values = torch.Generator().manual_seed(1)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=values, dtype=torch.float64).to(dtype)

    made = Operands(
        make(*tokens, features[0]),
        make(features[1], features[0]),
        make(features[1]) if bias else None,
        make(r, features[0], dtype=factors or dtype),
        make(rows[1] - rows[0], r, dtype=factors or dtype),
        **options,
    )
    for name, tensor in made.tensors.items():
        tensor.requires_grad_(name not in frozen)
    return recovered(made) if made.dropout else made


def recovered(given: Operands) -> Operands:
    """With the mask that :func:`fused` is going to draw."""
    torch.manual_seed(SEED)
    factor = unpacked(draw(given.x, given.dropout), given.x).double()
    return replace(given, mask=factor * (256 / kept(given.dropout)))


def with_gains(given: Operands, again: bool, **options: Any) -> Operands:
    """With a gain for each row of B, by default near 1, that wants a gradient."""
    wide = torch.float64 if given.weight.dtype == torch.float64 else torch.float32
    values = torch.Generator().manual_seed(3)
    count = given.b.shape[0]
    drawn = 1 + 0.2 * torch.randn(count, generator=values, dtype=torch.float64)
    gains = options.get("gains", drawn).to(wide)
    return replace(given, gains=gains.requires_grad_(), again=again)


def fused(given: Operands) -> Tensor:
    torch.manual_seed(SEED)
    tensors = (given.x, given.weight, given.bias, given.a, given.b)
    options = {"dropout": given.dropout, "training": True, "rows": given.rows}
    if given.gains is None:
        return lora_linear(*tensors, given.scale, **options)
    return dora_linear(*tensors, given.scale, given.gains, given.again, **options)


def canonical(given: Operands) -> Tensor:
    """What the graph computes without the pass."""
    out = F.linear(given.x, given.weight, given.bias)
    x = given.x if given.mask is None else given.x * given.mask.to(given.x.dtype)
    down = F.linear(x, given.a.type_as(out))
    if given.gains is not None:
        return _decomposed(given, out, down)
    branch = F.linear(down, given.b.type_as(out)) * given.scale
    return out + _padded(branch, given, out)


def _decomposed(given: Operands, out: Tensor, down: Tensor) -> Tensor:
    gains = given.gains
    constant = gains if given.again or given.rows is not None else dora.held(gains)
    scaled_b = dora.scaled_b(given.b, constant, given.scale).type_as(out)
    if given.rows is not None:
        up = _padded(F.linear(down, scaled_b), given, out)
        gains = _padded(gains, given, out, 1.0)
        if given.bias is not None:
            up = up + dora.shifted(given.bias, gains, out)
        return dora.rescaled(out, None, up, gains)
    shift = None if given.bias is None else dora.shifted(given.bias, constant, out)
    up = F.linear(down, scaled_b, shift)
    if given.again:
        return dora.recomputed(out, up, gains, given.x, given.weight, given.bias)
    return dora.rescaled(out, None, up, gains, constant, given.bias)


def formula(given: Operands) -> Tensor:
    """What both stand for, without a term that another takes away: for fp64, and for bounds."""
    if given.gains is None:
        return canonical(given)
    product = F.linear(given.x, given.weight)
    x = given.x if given.mask is None else given.x * given.mask
    branch = F.linear(F.linear(x, given.a), given.b) * given.scale
    gains = _padded(given.gains, given, product, 1.0)
    out = gains * (product + _padded(branch, given, product))
    return out if given.bias is None else out + given.bias


def _padded(part: Tensor, given: Operands, like: Tensor, value: float = 0.0) -> Tensor:
    if given.rows is None:
        return part
    return F.pad(part, (given.rows[0], like.shape[-1] - given.rows[1]), value=value)


def gradients(function: Any, given: Operands, cotangent: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of everything that wants one."""
    out = function(given)
    wanted = given.wanted
    found = torch.autograd.grad(out, list(wanted.values()), cotangent.to(out.dtype))
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


def errors(
    function: Any,
    given: Operands,
    root_mean_square: bool = False,
    computed: torch.dtype | None = None,
) -> dict[str, float]:
    """How far output and gradients are from fp64, in roundings of the dtype.

    One rounding is the dtype's epsilon times what the same sums come to over absolute values: a bound that
    no cancellation makes small. The inputs are what they are after rounding. ``computed`` is the dtype of the
    computation where autocast makes it another than that of x.
    """
    shape = (*given.x.shape[:-1], given.weight.shape[0])
    values = torch.Generator().manual_seed(2)
    cotangent = torch.randn(shape, generator=values, dtype=torch.float64).to(given.x)
    found = gradients(function, given, cotangent)
    double = given.mapped(lambda tensor: tensor.double())
    exact = gradients(formula, double, cotangent.double())
    absolute = replace(double.mapped(torch.abs), scale=abs(given.scale))
    bound = gradients(formula, absolute, cotangent.double().abs())
    computed = computed or given.x.dtype
    epsilon = torch.finfo(computed).eps
    result = {}
    for name, tensor in found.items():
        assert tensor.shape == exact[name].shape, name
        expected = given.tensors[name].dtype if name != "out" else computed
        assert tensor.dtype == expected, f"{name} is {tensor.dtype}"
        off = (tensor.double() - exact[name]) / (epsilon * bound[name]).clamp_min(1e-300)
        assert off.isfinite().all(), name
        if not off.numel():
            result[name] = 0.0
        else:
            result[name] = float(
                off.square().mean().sqrt() if root_mean_square else off.abs().max()
            )
    return result


def assert_close_to_exact(case: Operands) -> None:
    """As the plain operations are, and with no error that is larger by more than luck."""
    found, plain = errors(fused, case), errors(canonical, case)
    for name, error in found.items():
        # Of few elements the largest error of one form may be the smaller by luck, never by much.
        assert error <= max(1.5 * plain[name], 2.0), f"{name}: {error} against {plain[name]}"


def assert_close_under_autocast(case: Operands, dtype: torch.dtype, whole: bool) -> None:
    """As the plain operations are, where autocast is on for the whole step, or for the forward only."""

    def within(function: Any) -> dict[str, float]:
        def forward(given: Operands) -> Tensor:
            # fp64 is not cast: the reference stays one.
            with torch.autocast("cpu", dtype=dtype):
                return function(given)

        around = torch.autocast("cpu", dtype=dtype) if whole else contextlib.nullcontext()
        with around:
            return errors(forward, case, root_mean_square=True, computed=dtype)

    found, plain = within(fused), within(canonical)
    for name, error in found.items():
        assert error <= 1.1 * plain[name], f"{name}: {error} against {plain[name]}"


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if layout == "first axis last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "every second":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    return x


def roles(model: nn.Module) -> set[Role]:
    """What the nodes of a rewritten model's graphs do for its adapters."""
    nodes = (node for graph in lora_fx.graphs(model).values() for node in graph.nodes)
    return {role for node in nodes if (role := role_of(node)) is not None}


def forward_mode(function: Callable[..., Tensor], point: tuple[Tensor, ...]) -> Tensor:
    """The derivative along the point itself, by dual numbers; its parts are trained, as factors are."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(one.clone().requires_grad_(), one) for one in point]
        return forward_ad.unpack_dual(function(*duals)).tangent
