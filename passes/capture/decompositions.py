"""Written-out forwards of library modules that apply several weights inside one call.

The original ``forward`` branches on its arguments, and has fast paths in C++ that would need each adapted
weight as a whole. The functions here compute the same with operations that a trace records. For attention,
these are one projection each for q, k and v, the attention (:func:`lora_fx.runtime.attention.attend`), and
one output projection. For a transposed convolution, the padding of the output is computed at each call. Each
function has the signature of the ``forward`` that it replaces, and its graph is right for every call.

A library of quantized weights may have its own layers, whose forward changes the layer's attributes. The
weight's format provides a written-out forward with the same weight and kernels. ``nn.Linear`` and other code
stay as they are, except that a product with a quantized weight becomes a call of ``quantized_linear``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx import torch_private
from lora_fx.formats import format_of, formats, quantization_of, quantized_linear
from lora_fx.ir import Region
from lora_fx.passes.graph import erase_unread, original_class
from lora_fx.passes.patterns import Product, product_of
from lora_fx.runtime import attention, experts, output_padding
from lora_fx.torch_private import pytree

__all__ = [
    "WRITTEN_OUT",
    "experts_implementation",
    "holds_quantized",
    "make_opaque",
    "setup_of",
    "written_conditions",
    "written_out",
    "written_out_layer",
]


def _written_out_of_torchvision(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """Return the written-out ``forward`` of a torchvision class, or None for other classes."""
    original = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)
    # A class of another package may have the same names.
    return _WINDOWED.get((cls.__module__, cls.__qualname__)) if original is cls else None


def _swin(self: Any, x: torch.Tensor) -> Any:
    return _windowed_attention(
        self, x, self.window_size, self.qkv.bias, self.get_relative_position_bias()
    )


def _swin_v2(self: Any, x: torch.Tensor) -> Any:
    position = self.get_relative_position_bias()
    bias = _node(attention.without_key_bias, self.qkv.bias)
    return _windowed_attention(self, x, self.window_size, bias, position, self.logit_scale)


def _swin_3d(self: Any, x: torch.Tensor) -> Any:
    window = _node(attention.fitted_window, x, self.window_size)
    return _windowed_attention(
        self, x, window, self.qkv.bias, self.get_relative_position_bias(window)
    )


def _windowed_attention(
    self: Any, x: torch.Tensor, window: Any, bias: Any, position: Any, logit_scale: Any = None
) -> Any:
    cut = _node(attention.partition, x, window, self.shift_size)
    qkv = F.linear(cut, self.qkv.weight, bias)
    out = _node(
        attention.attend_in_windows,
        qkv,
        position,
        logit_scale,
        x,
        window,
        self.shift_size,
        self.num_heads,
        self.attention_dropout,
        self.training,
    )
    out = F.linear(out, self.proj.weight, self.proj.bias)
    out = F.dropout(out, self.dropout, self.training)
    return _node(attention.reverse, out, x, window, self.shift_size)


_WINDOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): _swin,
    ("torchvision.models.swin_transformer", "ShiftedWindowAttentionV2"): _swin_v2,
    ("torchvision.models.video.swin_transformer", "ShiftedWindowAttention3d"): _swin_3d,
}


_FLAGS = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed")


def experts_implementation(module: nn.Module) -> str | None:
    """Return the name of the experts implementation that a transformers layer uses, such as ``eager``.

    None for other modules.
    """
    if "transformers.integrations.moe" not in sys.modules:
        return None
    config = module.__dict__.get("config")
    if not all(hasattr(module, flag) for flag in _FLAGS) or config is None:
        return None
    return getattr(config, "_experts_implementation", None) or "eager"


def _written_out_of_transformers(module: nn.Module) -> Callable[..., Any] | None:
    """Return the written-out ``forward`` of a transformers layer of experts, or None for other modules."""
    forward = _EXPERTS.get(experts_implementation(module) or "")
    if forward is None or getattr(module, "_is_expert_parallel", False):
        return None
    return _with_signature(forward, original_class(module).forward)


@functools.cache
def _with_signature(
    forward: Callable[..., Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a written-out forward with the signature of the original."""

    @functools.wraps(forward)
    def wrapped(*args: Any) -> Any:
        return forward(*args)

    wrapped.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return wrapped


def _eager(self: Any, hidden: torch.Tensor, chosen: Any, weights: Any) -> Any:
    out = torch.zeros_like(hidden)
    for expert in range(self.num_experts):
        # An expert that no token chose computes on zero rows.
        tokens = _node(experts.tokens_of, expert, chosen)
        choice, token = tokens[0], tokens[1]
        x = _projected(self, hidden[token], "up", expert)
        x = _projected(self, _activated(self, x), "down", expert)
        x = _normed(self, x) * weights[token, choice, None]
        out.index_add_(0, token, x.to(out.dtype))
    return out


def _projected(self: Any, x: Any, which: str, expert: int) -> Any:
    weight, bias = _weights(self, which)
    x = x @ weight[expert] if self.is_transposed else F.linear(x, weight[expert])
    return x if bias is None else x + bias[expert]


def _batched(self: Any, hidden: torch.Tensor, chosen: Any, weights: Any) -> Any:
    ids = chosen.reshape(-1)
    x = _gathered(self, _node(experts.repeated, hidden, chosen), "up", ids)
    x = _gathered(self, _activated(self, x), "down", ids)
    return _node(experts.summed, _normed(self, x) * weights.reshape(-1).unsqueeze(-1), hidden)


def _gathered(self: Any, x: Any, which: str, ids: Any) -> Any:
    weight, bias = _weights(self, which)
    if self.is_transposed:
        x = torch.bmm(x.unsqueeze(1), weight[ids]).squeeze(1)
    else:
        x = torch.bmm(weight[ids], x.unsqueeze(-1)).squeeze(-1)
    return x if bias is None else x + bias[ids]


def _grouped(self: Any, hidden: torch.Tensor, chosen: Any, weights: Any) -> Any:
    batch = _node(experts.sorted_by_expert, hidden, chosen, weights, self.num_experts)
    x, sorted_weights, ids, ends, order = batch[0], batch[1], batch[2], batch[3], batch[4]
    x = _sorted(self, x, "up", ids, ends)
    x = _sorted(self, _activated(self, x), "down", ids, ends)
    x = _node(experts.unsorted, _normed(self, x) * sorted_weights.unsqueeze(-1), order)
    return _node(experts.summed, x, hidden)


def _sorted(self: Any, x: Any, which: str, ids: Any, ends: Any) -> Any:
    weight, bias = _weights(self, which)
    x = _node(
        experts.grouped_mm, x, weight if self.is_transposed else weight.transpose(-2, -1), ends
    )
    return x if bias is None else x + bias[ids]


def _weights(self: Any, which: str) -> tuple[Any, Any]:
    name = "down_proj" if which == "down" else "gate_up_proj" if self.has_gate else "up_proj"
    return getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None


def _activated(self: Any, x: Any) -> Any:
    return self._apply_gate(x) if self.has_gate else self.act_fn(x)


def _normed(self: Any, x: Any) -> Any:
    return self.post_expert_norm(x) if self.has_post_expert_norm else x


_EXPERTS: dict[str, Callable[..., Any]] = {
    "eager": _eager,
    "batched_mm": _batched,
    "grouped_mm": _grouped,
}


def _attention(
    self: nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    width = self.embed_dim
    parts = [slice(i * width, (i + 1) * width) for i in range(3)]
    if torch_private.projects_at_once(self):
        weights = [self.in_proj_weight[part] for part in parts]
    else:
        weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
    bias: torch.Tensor | None = self.in_proj_bias
    biases = [None if bias is None else bias[part] for part in parts]
    q = F.linear(query, weights[0], biases[0])
    k = F.linear(key, weights[1], biases[1])
    v = F.linear(value, weights[2], biases[2])
    out, weight = _node(
        attention.attend,
        q,
        k,
        v,
        key_padding_mask,
        need_weights,
        attn_mask,
        average_attn_weights,
        is_causal,
        heads=self.num_heads,
        batch_first=self.batch_first,
        dropout=self.dropout,
        training=self.training,
        bias_k=self.bias_k,
        bias_v=self.bias_v,
        add_zero_attn=self.add_zero_attn,
    )
    out = self.out_proj(out)
    if self.batch_first:
        out = _node(attention.sequence_first_in_memory, out, self.training)
    return out, weight


def _encoder_layer(
    self: Any,
    src: torch.Tensor,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    def attention(x: torch.Tensor) -> Any:
        return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

    x = _residual(self, src, self.norm1, attention)
    return _residual(self, x, self.norm2, self._ff_block)


def _residual(self: Any, x: Any, norm: Any, block: Any) -> Any:
    return x + block(norm(x)) if self.norm_first else norm(x + block(x))


def _encoder(
    self: Any,
    src: torch.Tensor,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Any:
    causal = _node(
        attention.causal_hint, src, mask, is_causal, self.layers[0].self_attn.batch_first
    )
    x = src
    for layer in self.layers:
        x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
    x = _node(
        attention.zero_padding,
        x,
        src,
        src_key_padding_mask,
        mask,
        nested=bool(getattr(self, "use_nested_tensor", False)),
        mask_check=bool(getattr(self, "mask_check", True)),
        training=self.layers[0].training,
    )
    return x if self.norm is None else self.norm(x)


def _decoder_layer(
    self: Any,
    tgt: torch.Tensor,
    memory: torch.Tensor,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> Any:
    def attention(x: torch.Tensor) -> Any:
        return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

    def cross(x: torch.Tensor) -> Any:
        return self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

    x = _residual(self, tgt, self.norm1, attention)
    x = _residual(self, x, self.norm2, cross)
    return _residual(self, x, self.norm3, self._ff_block)


def _decoder(
    self: Any,
    tgt: torch.Tensor,
    memory: torch.Tensor,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Any:
    causal = _node(
        attention.causal_hint, tgt, tgt_mask, tgt_is_causal, self.layers[0].self_attn.batch_first
    )
    x = tgt
    for layer in self.layers:
        x = layer(
            x,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=causal,
            memory_is_causal=memory_is_causal,
        )
    return x if self.norm is None else self.norm(x)


_CONVOLUTIONS: dict[int, Any] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def _conv_transpose(self: Any, input: torch.Tensor, output_size: Any = None) -> Any:  # noqa: A002  as torch has it
    sizes = (self.stride, self.padding, self.kernel_size, self.dilation)
    added = _node(output_padding, input, output_size, self.output_padding, *sizes)
    convolution = _CONVOLUTIONS[len(self.kernel_size)]
    operands = (input, self.weight, self.bias)
    geometry = (self.stride, self.padding, added, self.groups, self.dilation)
    return _node(convolution, *operands, *geometry)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = frozenset(cls.forward for cls in _TRANSPOSED)


def _written_out_convolution(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """Return the written-out ``forward`` of a transposed convolution, or None for other classes."""
    if not issubclass(cls, _TRANSPOSED) or cls.forward not in _FORWARDS:
        return None
    return (
        _conv_transpose
        if torch_private.output_padding_of(cls) is torch_private.OUTPUT_PADDING
        else None
    )


def _node(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Record a call of a lora_fx function as one node. Without a traced value, call the function."""
    values = pytree.tree_leaves((args, kwargs))
    proxy = next((value for value in values if issubclass(type(value), fx.Proxy)), None)
    if proxy is None:
        return function(*args, **kwargs)
    return proxy.tracer.create_proxy("call_function", function, args, kwargs)


WRITTEN_OUT: Mapping[type[nn.Module], Callable[..., Any]] = {
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoderLayer: _decoder_layer,
    nn.TransformerDecoder: _decoder,
}
"""Written-out forwards by exact class, because a subclass may compute something else."""


def written_out(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function to trace instead of a module's own ``forward``; None to trace its own."""
    cls = original_class(module)
    return (
        WRITTEN_OUT.get(cls)
        or _written_out_convolution(cls)
        or _written_out_of_torchvision(cls)
        or _written_out_of_transformers(module)
        or written_out_layer(module, cls)
    )


def written_conditions(module: nn.Module) -> tuple[str, ...]:
    """Return guard expressions in ``self`` that are true if the written-out forward no longer applies."""
    chosen = experts_implementation(module)
    if chosen is None:
        return ()
    return (f"(self.config._experts_implementation or 'eager') != {chosen!r}",)


def written_out_layer(module: nn.Module, cls: type[nn.Module]) -> Callable[..., Any] | None:
    """Return the function to trace for a library's quantized layer, or None for other modules.

    Args:
        module: The layer.
        cls: The class of the layer, without classes that lora_fx adds.
    """
    for known in formats():
        forward = known.layers.forward(cls)
        if forward is not None:
            return None if quantization_of(module._parameters.get("weight")) is None else forward
    return None


def holds_quantized(module: nn.Module) -> bool:
    """Return True if a module's own forward must not run with quantized weights.

    This is true for a library's layer, whose forward may set attributes on which its graph depends, as in
    bitsandbytes. It is also true if a child has a quantized weight, which the module's code could misread.
    """
    if setup_of(module) is not None:
        return True
    below = (p for child in module.children() for p in child.parameters())
    return any(quantization_of(p) is not None for p in below)


def setup_of(module: nn.Module) -> tuple[Any, ...] | None:
    """Return the settings on which the graph of a library's quantized layer depends; None for others."""
    if written_out_layer(module, original_class(module)) is None:
        return None
    known = format_of(module._parameters["weight"])
    return None if known is None else known.layers.setup(module)


def make_opaque(graph: fx.Graph, module: nn.Module) -> fx.Graph:
    """Replace products with a quantized weight by :func:`quantized_linear`.

    Other products with a quantized weight (with some rows, or with the transpose) are not replaced. Patterns
    refuse them with a reason.

    Args:
        graph: The graph of the module. It is edited.
        module: The module.
    """
    if not any(quantization_of(p) for p in module.parameters()):
        return graph
    region = Region("", module, graph)
    for node in list(graph.nodes):
        seen = product_of(node, region)
        if not isinstance(seen, Product) or seen.left or seen.layout != "out_in":
            continue
        view = seen.view
        stored = quantization_of(region.parameter(view.source))
        if stored is None or stored.stacked is not None or view.rows or view.indexed:
            continue
        bias = region.parameter(seen.bias)
        if (
            (seen.bias is not None and (bias is None or bias.dim() != 1))
            or view.cast
            or view.viewed
        ):
            continue
        with graph.inserting_before(node):
            operands: Any = (seen.x, view.source, seen.bias)
            replacement = graph.call_function(quantized_linear, operands)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        erase_unread(graph, seen.operand)
    return graph
