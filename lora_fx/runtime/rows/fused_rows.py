"""A linear operation whose rows have different adapters: ``y = W x + bias + s_k · B_k A_k drop_k(x)``.

k is the adapter of the row. One call computes the base product of the whole batch, and the two thin products
of each adapter over its own rows, forward and backward. Ranks may differ, and nothing is padded. If the rows
of each adapter are contiguous, they are read and written in place. Otherwise they are sorted by adapter
first, once for all adapters.

The tensors that are saved for the backward are those of :mod:`lora_fx.runtime.kernels.fused_lora`: x (or the
inputs that x is recomputed from), the products with the A's, and bit masks. An adapter without a row in the
batch gets no gradient, as if it had not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx import torch_private
from lora_fx.errors import LoraFxError
from lora_fx.runtime.kernels import (
    Kernel,
    Rows,
    Source,
    add_product,
    autocast_dtype,
    cast,
    draw,
    flat,
    masked,
    quantized_kernel,
    recovery,
    source_of,
    transformed,
    unpacked,
    without_autocast,
    writable,
)
from lora_fx.runtime.modules import check_not_in_parts
from lora_fx.runtime.rows.samples import (
    Layout,
    SampleRows,
    check_rows_followed,
    followed,
    rows_of,
    unfollowed,
)

__all__ = ["lora_rows", "quantized_lora_rows"]

_Dropout = tuple[float, bool] | None
"""The dropout probability of an adapter, and True if it is active now. None without dropout."""


class _Adapters(NamedTuple):
    """Settings of the adapters of a site, in the order of the adapters, and of the base product.

    Attributes:
        scales: The scales of the branches.
        dropouts: Dropout probabilities of the inputs of the branches.
        parts: The range of outputs that each branch is added to, or None for all.
        kernel: The kernel of a quantized base, else None.
        dtype: The dtype in which the branches are computed.
    """

    scales: Sequence[float]
    dropouts: Sequence[float]
    parts: Sequence[Rows | None]
    kernel: Kernel | None
    dtype: torch.dtype

    def base(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the output without adapters."""
        if self.kernel is not None:
            return self.kernel.product(x, bias)
        assert weight is not None
        return F.linear(x, weight, bias)

    def scale(self, index: int) -> float:
        """Return the scale of a branch, multiplied by the rescaling of its dropout."""
        dropout = self.dropouts[index]
        return self.scales[index] * (recovery(dropout) if dropout else 1.0)

    def part(self, outputs: Tensor, index: int) -> Tensor:
        """Return the columns of ``outputs`` that an adapter adds to, as a view."""
        part = self.parts[index]
        return outputs if part is None else outputs[:, part[0] : part[1]]

    @property
    def shared(self) -> float | None:
        """Return the dropout probability if all adapters have the same, or None if they differ."""
        first = self.dropouts[0]
        return first if all(dropout == first for dropout in self.dropouts) else None


def lora_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: SampleRows,
    adapters: tuple[str, ...],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dropouts: Sequence[_Dropout],
    parts: Sequence[Rows | None],
    name: str = "",
) -> Tensor:
    """Compute a linear operation with an adapter for each row of the batch.

    Dtypes, autocast, second derivatives and the transforms of ``torch.func`` work as in
    :func:`lora_fx.runtime.kernels.fused_lora.lora_linear`. A compiler sees plain operations, so that one
    compilation serves all orders of the rows.

    Args:
        x: [samples, ..., in]. Samples may be repeated, or have several consecutive rows.
        weight: [out, in], of any strides.
        bias: [out], or None.
        table: The samples of each adapter.
        adapters: Names of the adapters. The next five arguments are in the same order.
        a: A, [r, in] each. Ranks may differ.
        b: B, [n, r] each.
        scales: The scale of each branch.
        dropouts: The dropout of each branch's input.
        parts: The outputs (start, stop) that each branch is added to, or None for all.
        name: Name of the adapted weight in its module.

    Returns:
        [..., out].

    Raises:
        ConfigError: If the adapters of the rows are unknown.
        LoraFxError: In a second backward pass, if every A is frozen.
    """
    dtype = autocast_dtype(x.device.type)
    source = source_of(x)
    if dtype is not None:
        x, weight = cast(x, dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
    options = _Adapters(scales, _probabilities(dropouts), parts, None, x.dtype)
    return _applied(x, weight, bias, table, adapters, a, b, options, source, name)


def quantized_lora_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: SampleRows,
    adapters: tuple[str, ...],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dropouts: Sequence[_Dropout],
    parts: Sequence[Rows | None],
    name: str = "",
    compute_dtype: torch.dtype | None = None,
    threshold: float = 0.0,
    base_training: bool = False,
) -> Tensor:
    """Compute :func:`lora_rows` over a quantized weight, which is frozen.

    The last three arguments are those of :func:`lora_fx.runtime.kernels.fused_lora.quantized_lora_linear`.
    """
    kernel, dtype = quantized_kernel(x, weight, compute_dtype, threshold, base_training)
    options = _Adapters(scales, _probabilities(dropouts), parts, kernel, dtype)
    return _applied(x, None, bias, table, adapters, a, b, options, source_of(x), name)


def _probabilities(dropouts: Sequence[_Dropout]) -> tuple[float, ...]:
    return tuple(dropout[0] if dropout is not None and dropout[1] else 0.0 for dropout in dropouts)


def _applied(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: SampleRows,
    adapters: tuple[str, ...],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    options: _Adapters,
    source: Source | None,
    name: str,
) -> Tensor:
    check_not_in_parts(x)
    with without_autocast(x.device.type):
        plain = torch.compiler.is_compiling() or transformed()
        if plain or x.layout is not torch.strided:
            each = [rows_of(x, table, adapter) for adapter in adapters]
            return _composed(x, weight, bias, each, a, b, options, _drawn)
        check_rows_followed(x, name)
        layout = table.lay_out(x, adapters)
        if torch.is_grad_enabled():
            args = (x, weight, bias, layout, options, source, *a, *b)
            out: Tensor = _LoraRows.apply(*args)  # type: ignore[no-untyped-call]
        else:
            out = _computed(x, weight, bias, layout, options, a, b)[0]
        return followed(out, table, name)


_Drop = Callable[[Tensor, int, float], Tensor]
"""Dropout of a branch's input: takes its rows, the index of its adapter and the dropout probability."""


def _drawn(own: Tensor, _: int, dropout: float) -> Tensor:
    return masked(own, draw(own, dropout)) if dropout else own


def _composed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    options: _Adapters,
    drop: _Drop,
) -> Tensor:
    """Compute :func:`lora_rows` with plain operations, none of which works in place.

    Args:
        x: [..., in].
        weight: [out, in], or None with a kernel.
        bias: [out], or None.
        rows: For each adapter, the indices of its rows in the matrix [tokens, in], or None without rows.
        a: A of each adapter.
        b: B of each adapter.
        options: The other settings of the adapters.
        drop: Returns the input of a branch after its dropout.
    """
    out = options.base(x, weight, bias)
    total, inputs = flat(out), flat(x).to(options.dtype)
    for k, (index, down, up) in enumerate(zip(rows, a, b, strict=True)):
        if index is None:
            continue
        own = drop(inputs.index_select(0, index), k, options.dropouts[k])
        thin = F.linear(own, down.to(own.dtype)).to(out.dtype)
        delta = F.linear(thin, up.to(out.dtype)) * options.scale(k)
        if (part := options.parts[k]) is not None:
            delta = F.pad(delta, (part[0], total.shape[1] - part[1]))
        total = total.index_add(0, index, delta)
    return total.reshape(out.shape)


class _Masks:
    """The dropout masks of a call: a single one if all adapters have equal dropout, else one per adapter."""

    def __init__(self, bits: Sequence[Tensor], options: _Adapters, layout: Layout) -> None:
        self.bits, self._options, self._layout = bits, options, layout

    @classmethod
    def drawn(cls, rows: Tensor, options: _Adapters, layout: Layout) -> _Masks:
        """Draw dropout masks for the rows of all adapters."""
        shared = options.shared
        if shared is not None:
            return cls((draw(rows, shared),) if shared else (), options, layout)
        own = zip(layout.adapters, layout.cut(rows), strict=True)
        branches = [(rows, options.dropouts[k]) for k, rows in own]
        return cls([draw(rows, dropout) for rows, dropout in branches if dropout], options, layout)

    def factors(self, rows: Tensor) -> Sequence[Tensor | None]:
        """Return the masks (0 or 1) for the inputs of each adapter that has rows; None without dropout."""
        layout, options = self._layout, self._options
        if not self.bits:
            return [None] * len(layout.adapters)
        if options.shared is not None:
            return layout.cut(unpacked(self.bits[0], rows))
        waiting, own = iter(self.bits), zip(layout.adapters, layout.cut(rows), strict=True)
        return [unpacked(next(waiting), rows) if options.dropouts[k] else None for k, rows in own]


def _computed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    options: _Adapters,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """Compute the forward of :func:`lora_rows`: the output, the products with the A's, and the masks."""
    out = writable(options.base(x, weight, bias))
    total = flat(out)
    downs: list[Tensor] = []
    with unfollowed():
        rows = layout.taken(flat(x)).to(options.dtype)
        masks = _Masks.drawn(rows, options, layout)
        # The branches of sorted rows are written into a separate matrix, which is added once.
        moved = total if layout.order is None else total.new_zeros(rows.shape[0], total.shape[1])
        dtype = total.dtype
        each = (layout.adapters, layout.cut(rows), layout.cut(moved), masks.factors(rows))
        for k, inputs, outputs, factor in zip(*each, strict=True):
            inputs = inputs if factor is None else inputs * factor
            down = F.linear(inputs, a[k].to(options.dtype))
            up = b[k].to(dtype).T
            options.part(outputs, k).addmm_(down.to(dtype), up, alpha=options.scale(k))
            downs.append(down)
        if layout.order is not None:
            total.index_add_(0, layout.order, moved)
    # ``total`` may be a view, and autograd forbids in-place writes into views that a function returns.
    return torch_private.UNSAFE_VIEW(total, out.shape), downs, masks.bits


class _LoraRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        layout: Layout,
        options: _Adapters,
        source: Source | None,
        *factors: Tensor,
    ) -> Tensor:
        count = len(factors) // 2
        a, b = factors[:count], factors[count:]
        out, downs, bits = _computed(x, weight, bias, layout, options, a, b)
        of_x, of_weight = ctx.needs_input_grad[:2]
        wanted = ctx.needs_input_grad[6:]
        of_a = any(wanted[k] for k in layout.adapters)
        of_b = any(wanted[count + k] for k in layout.adapters)
        # With a frozen A (LoRA-FA, arXiv:2308.03303) x need not be saved.
        keep = of_a or of_weight
        again = source.saved if keep and source is not None else ()
        ctx.source = source.kept() if source is not None and again else None
        ctx.counts = (count, len(bits), len(downs) if of_b else 0)
        ctx.save_for_backward(
            x if keep and not again else None,
            weight,
            bias,
            *factors,
            *bits,
            *(downs if of_b else ()),
            *again,
        )
        ctx.layout, ctx.options = layout, options
        ctx.shape, ctx.of_x = x.shape, of_x
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(grad.device.type):
            grads = _again(ctx, grad) if torch.is_grad_enabled() else _gradients(ctx, grad)
        if ctx.source is not None:
            ctx.source.done()
        return grads


class _Kept(NamedTuple):
    """Tensors that the forward saved for the backward.

    Masks and products are only those of the adapters that have rows.
    """

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    masks: _Masks
    downs: Sequence[Tensor]


def _kept(ctx: Any, again: bool) -> _Kept:
    x, weight, bias, *tensors = ctx.saved_tensors
    count, bits, downs = ctx.counts
    ends = (count, 2 * count, 2 * count + bits, 2 * count + bits + downs)
    a, b, masks, products = (tensors[i:j] for i, j in zip((0, *ends), ends, strict=False))
    if ctx.source is not None:
        x = ctx.source.value(tensors[ends[-1] :], again)
    return _Kept(x, weight, bias, a, b, _Masks(masks, ctx.options, ctx.layout), products)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the backward of :func:`lora_rows`: the gradient of every argument of its forward."""
    kept, layout, options = _kept(ctx, again=False), ctx.layout, ctx.options
    count, wanted = len(kept.a), ctx.needs_input_grad
    exact = flat(grad_out)
    grad = exact.to(options.dtype)
    rows = layout.taken(grad)
    of_a, of_b = wanted[6 : 6 + count], wanted[6 + count :]
    grads_a: list[Tensor | None] = [None] * count
    grads_b: list[Tensor | None] = [None] * count
    inputs = None if kept.x is None else layout.taken(flat(kept.x)).to(options.dtype)
    grad_x: Any = None
    moved: Any = None
    if ctx.of_x:
        grad_x = _to_input(kept.weight, options, grad, exact)
        moved = grad_x
        if layout.order is not None:
            moved = grad_x.new_zeros(rows.shape[0], grad_x.shape[1])
    like = rows.new_empty(()).expand(rows.shape[0], ctx.shape[-1])
    nothing: Sequence[Any] = [None] * len(layout.adapters)
    each = (
        layout.adapters,
        layout.cut(rows),
        nothing if inputs is None else layout.cut(inputs),
        nothing if moved is None else layout.cut(moved),
        kept.downs or nothing,
        kept.masks.factors(like),
    )
    zero = rows.new_zeros(())
    for k, outputs, own, target, down, factor in zip(*each, strict=True):
        scale, part = options.scale(k), options.part(outputs, k)
        a, b = kept.a[k], kept.b[k]
        if of_b[k]:
            product = torch.addmm(zero, part.T, down, beta=0, alpha=scale)
            grads_b[k] = product.to(b.dtype)
        if not (of_a[k] or target is not None):
            continue
        inner = torch.addmm(zero, part, b.to(options.dtype), beta=0, alpha=scale)
        if of_a[k]:
            own = own if factor is None else own * factor
            grads_a[k] = (inner.T @ own).to(a.dtype)
        if target is not None:
            add_product(target, inner, a.to(options.dtype), again=False, factor=factor)
    if grad_x is not None:
        if layout.order is not None:
            grad_x.index_add_(0, layout.order, moved)
        grad_x = grad_x.view(ctx.shape)
    grad_weight = grad.T @ flat(kept.x).to(options.dtype) if wanted[1] else None  # type: ignore[arg-type]
    grad_bias = grad.sum(0) if wanted[2] else None
    return grad_x, grad_weight, grad_bias, None, None, None, *grads_a, *grads_b


def _to_input(weight: Tensor | None, options: _Adapters, grad: Tensor, exact: Tensor) -> Tensor:
    """Return the gradient of x through the base product, [tokens, in], in the dtype of ``grad``.

    Args:
        weight: [out, in], or None with a kernel.
        options: The settings, with the kernel of a quantized base.
        grad: The gradient of the output, in the dtype of the branches.
        exact: The same gradient in its original dtype, which a kernel takes.
    """
    if options.kernel is not None:
        return options.kernel.to_input(exact).to(grad.dtype)
    assert weight is not None
    return grad @ weight


def _again(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated again, computed with plain operations."""
    kept, layout, options = _kept(ctx, again=True), ctx.layout, ctx.options
    if kept.x is None:
        raise LoraFxError(
            "the gradients of adapters whose A's are frozen (LoRA-FA) cannot be differentiated again "
            "(create_graph=True), since their input is not kept: make A trainable, or rewrite with "
            "optimize=False"
        )
    rows = torch.arange(flat(kept.x).shape[0], device=kept.x.device)
    indices = layout.indices(len(kept.a), rows)
    like = kept.x.new_empty((), dtype=options.dtype)
    like = like.expand(layout.taken(rows).shape[0], ctx.shape[-1])
    drops = dict(zip(layout.adapters, kept.masks.factors(like), strict=True))

    def drop(own: Tensor, k: int, _: float) -> Tensor:
        factor = drops[k]
        return own if factor is None else own * factor

    out = _composed(kept.x, kept.weight, kept.bias, indices, kept.a, kept.b, options, drop)
    args = (kept.x, kept.weight, kept.bias, None, None, None, *kept.a, *kept.b)
    positions = [position for position, want in enumerate(ctx.needs_input_grad) if want]
    inputs: list[Any] = [args[position] for position in positions]
    grads = torch.autograd.grad(out, inputs, grad, create_graph=True, allow_unused=True)
    results: list[Tensor | None] = [None] * len(args)
    for position, value in zip(positions, grads, strict=True):
        results[position] = value
    return tuple(results)
