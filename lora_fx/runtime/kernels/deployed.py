"""A linear operation with the adapted weight rounded as in the merged model: ``y = x Q(W + s·BA)ᵀ + bias``.

Q rounds the adapted weight to the format in which a merge stores it. Its gradient is that of the identity
(the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432): ``dA = s Bᵀ dyᵀ x``,
``dB = s dyᵀ x Aᵀ`` and ``dx = dy Q(W + s·BA)``. The first two are products of rank r, and no gradient of the
size of the weight is computed. Nothing of that size is kept: the backward pass rounds the weight again.

``W + s·BA`` is computed in fp64 and rounded to fp32. So the order of a sum hardly ever changes a bit, and
neither do the settings of fp32 products (TF32).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx import torch_private
from lora_fx.errors import LoraFxError
from lora_fx.formats import KeptWeight, dense, quantization_of, rounded
from lora_fx.ir import Deployment
from lora_fx.runtime.kernels.fused_lora import (
    autocast_dtype,
    cast,
    flat,
    quantized_kernel,
    without_autocast,
)
from lora_fx.runtime.kernels.masks import transformed
from lora_fx.runtime.kernels.recompute import Source, source_of
from lora_fx.runtime.modules import check_not_in_parts

__all__ = ["adapted_weight", "deployed_linear", "deployed_weight", "straight_through"]

_NO_FP64 = ("mps",)
_CHUNK = 1 << 16  # elements that are summed in fp64 at a time: they stay in a core's cache


@torch.no_grad()
def adapted_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``W + s·BA``, [out, in], in fp32, or fp64 for an fp64 weight.

    Args:
        weight: W, [out, in]: the values of a dense weight, or of a quantized one.
        a: A, [r, in].
        b: B, [out, r].
        scale: s.
    """
    kind, (rows, columns) = weight.device.type, weight.shape
    wide = torch.float32 if kind in _NO_FP64 else torch.float64
    dtype = torch.promote_types(weight.dtype, torch.float32)
    result = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    size = max(1, _CHUNK // max(1, columns)) if kind == "cpu" else max(1, rows)
    space = result.new_empty(min(size, rows), columns, dtype=wide)
    with without_autocast(kind):
        down, up = a.to(wide), b.to(wide) * scale
        for start in range(0, rows, size):
            # Separate operations, because the rounding of a fused one depends on the strides.
            part = torch.mm(up[start : start + size], down, out=space[: rows - start])
            part += weight[start : start + size]
            result[start : start + size] = part
    return result


def deployed_weight(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, deploy: Deployment
) -> Tensor:
    """Return ``Q(W + s·BA)`` as a merge stores it. No gradient is recorded.

    Args:
        weight: The weight of the base, [out, in], dense or quantized.
        a: A, [r, in].
        b: B, [out, r].
        scale: s.
        deploy: The storage.
    """
    with torch.no_grad():
        is_dense = quantization_of(weight) is None
        values = weight if is_dense else dense(weight, torch.float32)
        return rounded(adapted_weight(values, a, b, scale), weight, deploy)


def straight_through(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, deploy: Deployment
) -> Tensor:
    """Return the values of ``Q(W + s·BA)``, [out, in], for code that needs the weight itself.

    The gradient is that of ``W + s·BA``. The arguments are those of :func:`deployed_weight`, with a dense
    weight. The result is in fp32, or fp64 for an fp64 weight.
    """
    result: Tensor = _Rounded.apply(weight, a, b, scale, deploy)  # type: ignore[no-untyped-call]
    return result


class _Rounded(torch.autograd.Function):
    """Autograd function that returns ``Q(W + s·BA)`` with the gradient of ``W + s·BA``."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, a: Tensor, b: Tensor, scale: float, deploy: Deployment
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.scale, ctx.dtype = scale, weight.dtype
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return dense(deployed_weight(weight, a, b, scale, deploy), dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        (grad,) = grads
        wants, of_a, of_b, *_ = ctx.needs_input_grad
        with without_autocast(grad.device.type):
            grad_a = (b.T.to(grad.dtype) @ grad * ctx.scale).to(a.dtype) if of_a else None
            grad_b = (grad @ a.T.to(grad.dtype) * ctx.scale).to(b.dtype) if of_b else None
        return grad.to(ctx.dtype) if wants else None, grad_a, grad_b, None, None


@torch.library.custom_op("lora_fx::deployed_values", mutates_args=())
def _deployed_values(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    form: str,
    rounded_to: torch.dtype | None,
    block_size: int | None,
    double: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the values of ``Q(W + s·BA)`` for a dense weight. A compiler sees only one operator."""
    deploy = Deployment(form, rounded_to, block_size, double)
    return dense(deployed_weight(weight, a, b, scale, deploy), dtype)


@_deployed_values.register_fake
def _(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    form: str,
    rounded_to: torch.dtype | None,
    block_size: int | None,
    double: bool,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


class _Options(NamedTuple):
    """Options of one call of :func:`deployed_linear`.

    Attributes:
        scale: The factor s of the branch.
        deploy: The storage.
        kernel: Arguments of :func:`lora_fx.runtime.kernels.fused_lora.quantized_kernel` after the weight.
        dtype: Dtype of the products.
        opaque: True if the values come from one operator, because a compiler or a tensor without values
            cannot run the code of a library.
    """

    scale: float
    deploy: Deployment
    kernel: tuple[torch.dtype | None, float, bool]
    dtype: torch.dtype
    opaque: bool

    def weight(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return ``Q(W + s·BA)``, in its storage or, if ``opaque``, as plain values."""
        if not self.opaque:
            return deployed_weight(weight, a, b, self.scale, self.deploy)
        storage = self.deploy[:-1]
        values: Tensor = _deployed_values(weight, a, b, self.scale, *storage, self.dtype)
        return values


def deployed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    deploy: Deployment,
    compute_dtype: torch.dtype | None = None,
    threshold: float = 0.0,
    base_training: bool = False,
) -> Tensor:
    """Compute a linear operation with the adapted weight rounded to its storage in the merged model.

    The product is that of the merged model: the kernel of the format's library reads the stored weight. Under
    autocast the gradients of A and B are computed in autocast's dtype, else in that of ``x``. A compiler
    gets the values of the weight from one operator. Over a quantized base, the function is not compiled.

    Args:
        x: [..., in].
        weight: The weight of the base, [out, in].
        bias: [out], or None.
        a: A, [r, in].
        b: B, [out, r].
        scale: The factor s of the branch.
        deploy: The storage.
        compute_dtype: As in :func:`lora_fx.formats.weights.quantized_linear`.
        threshold: As in :func:`lora_fx.formats.weights.quantized_linear`.
        base_training: True if the model trains. LLM.int8() depends on it.

    Returns:
        [..., out].

    Raises:
        LoraFxError: Under a transform of ``torch.func``, and if the gradient is differentiated again.
    """
    check_not_in_parts(x)
    kernel = (compute_dtype, threshold, base_training)
    if torch.compiler.is_compiling():
        if deploy.as_base:
            return _outside(x, weight, bias, a, b, scale, deploy, kernel)
        return _run(x, weight, bias, a, b, scale, deploy, kernel)
    if transformed():
        raise LoraFxError(
            f"deploy={deploy.format!r} rounds the weight by the code of a library, which the transforms of "
            "torch.func cannot run: merge the model first, or rewrite it without deploy"
        )
    return _run(x, weight, bias, a, b, scale, deploy, kernel)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    deploy: Deployment,
    kernel: tuple[torch.dtype | None, float, bool],
) -> Tensor:
    compiling = torch.compiler.is_compiling()
    opaque = compiling or weight.is_meta or torch_private.is_fake(x)
    under = autocast_dtype(x.device.type)
    dtype = x.dtype if under is None or x.dtype == torch.float64 else under
    options = _Options(scale, deploy, kernel, dtype, opaque)
    if x.is_nested or x.layout is not torch.strided:
        values = straight_through(weight, a, b, scale, deploy)
        return F.linear(x, values.to(x.dtype), bias)
    source = source_of(x)
    if opaque or deploy.dtype is not None:
        x = cast(x, dtype)
        bias = None if bias is None else cast(bias, dtype)
    tensors = (x, weight, bias, a, b)
    if not torch.is_grad_enabled() or not any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    ):
        return _product(x, options.weight(weight, a, b), bias, options)
    result: Tensor = _Deployed.apply(*tensors, options, source)  # type: ignore[no-untyped-call]
    return result


def _outside(*arguments: Any) -> Tensor:
    """Compute the operation over a quantized base outside of the graph of a compiler."""
    run: Any = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
    result: Tensor = run(*arguments)
    return result


torch_private.make_uncompilable(_outside, "the format of a quantized base rounds its weight")


def _product(x: Tensor, stored: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
    """Compute ``x Wᵀ + bias`` with a stored weight, as the merged model does."""
    if quantization_of(stored) is not None:
        kernel, _ = quantized_kernel(x, stored, *options.kernel)
        return kernel.product(x, bias)
    with without_autocast(x.device.type):
        return F.linear(x, stored.to(x.dtype), bias)


def _to_input(grad: Tensor, stored: Tensor, options: _Options) -> Tensor:
    """Return the gradient of x, ``grad W``, [tokens, in], for a stored weight W."""
    return grad @ dense(stored, options.kernel[0] or grad.dtype).to(grad.dtype)


class _Deployed(torch.autograd.Function):
    """Autograd function of :func:`deployed_linear`.

    The backward pass rounds the weight again, so that the rounded weight is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        options: _Options,
        source: Source | None,
    ) -> Tensor:
        out = _product(x, options.weight(weight, a, b), bias, options)
        _, of_weight, _, of_a, of_b, *_ = ctx.needs_input_grad
        keep = of_weight or of_a
        again = source.saved if keep and source is not None else ()
        # Without a gradient of A (LoRA-FA, arXiv:2308.03303), that of B needs only the product with A.
        down = flat(x).to(options.dtype) @ a.T.to(options.dtype) if of_b and not keep else None
        is_quantized = quantization_of(weight) is not None
        ctx.weight = KeptWeight.of(weight) if is_quantized else None
        ctx.source = source.kept() if again and source is not None else None
        kept = x if keep and not again else None
        ctx.save_for_backward(kept, None if is_quantized else weight, a, b, down, *again)
        ctx.options, ctx.shape, ctx.dtype = options, x.shape, x.dtype
        result: Tensor = torch_private.UNSAFE_VIEW(out, out.shape)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise LoraFxError(
                f"deploy={ctx.options.deploy.format!r}: the rounding of a weight has no second derivative "
                "(create_graph=True): rewrite without deploy for this step"
            )
        with without_autocast(grads[0].device.type):
            return _gradients(ctx, grads[0])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants_x, of_weight, of_bias, of_a, of_b, *_ = ctx.needs_input_grad
    x, weight, a, b, down, *again = ctx.saved_tensors
    options = ctx.options
    if ctx.weight is not None:
        ctx.weight.check()
        weight = ctx.weight.weight
    if ctx.source is not None:
        x = ctx.source.value(again, False)
        ctx.source.done()
    rows = flat(grad).to(options.dtype)
    inputs: Any = None if x is None else flat(x).to(options.dtype)
    grad_x = grad_a = grad_b = None
    if of_a:
        inner = (rows @ b.to(rows.dtype)).mul(options.scale)
        grad_a = (inner.T @ inputs).to(a.dtype)
    if of_b:
        down = inputs @ a.T.to(rows.dtype) if down is None else down
        grad_b = (rows.T @ down).mul(options.scale).to(b.dtype)
    if wants_x:
        stored = options.weight(weight, a, b)
        grad_x = _to_input(rows, stored, options).to(ctx.dtype).view(ctx.shape)
    grad_weight = (rows.T @ inputs).to(weight.dtype) if of_weight else None
    grad_bias = rows.sum(0) if of_bias else None
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None
