"""Modules of ``torch.nn`` that apply several weights inside one call, written out.

Their own ``forward`` branches on how it is called and has fast paths in C++ that read the weights past every
adapter. What is here computes the same from operations that can be seen: one projection each for q, k and
v, the attention between them (:func:`lora_fx.runtime.attention.attend`), one projection out. A transposed convolution
takes the size of its output from its caller. Each function has the signature of the ``forward`` that it
stands for, and its graph holds for every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.passes.capture.quantized import written_out_of_bitsandbytes
from lora_fx.passes.capture.written_out_torchvision import written_out_of_torchvision
from lora_fx.passes.capture.written_out_transformers import (
    experts_implementation,
    written_out_of_transformers,
)
from lora_fx.passes.graph.region import original_class
from lora_fx.runtime.attention import attend, causal_hint, zero_padding
from lora_fx.runtime.ops import output_padding

__all__ = ["WRITTEN_OUT", "written_conditions", "written_out"]

fx.wrap("attend")
fx.wrap("causal_hint")
fx.wrap("output_padding")
fx.wrap("zero_padding")


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
    if self._qkv_same_embed_dim:
        weights = [self.in_proj_weight[part] for part in parts]
    else:
        weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
    bias: torch.Tensor | None = self.in_proj_bias
    biases = [None if bias is None else bias[part] for part in parts]
    q = F.linear(query, weights[0], biases[0])
    k = F.linear(key, weights[1], biases[1])
    v = F.linear(value, weights[2], biases[2])
    out, weight = attend(
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
    return self.out_proj(out), weight


def _encoder_layer(
    self: Any,
    src: torch.Tensor,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    def attention(x: torch.Tensor) -> Any:
        return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

    if self.norm_first:
        x = src + attention(self.norm1(src))
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + attention(src))
    return self.norm2(x + self._ff_block(x))


def _encoder(
    self: Any,
    src: torch.Tensor,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Any:
    causal = causal_hint(src, mask, is_causal, self.layers[0].self_attn.batch_first)
    x = src
    for layer in self.layers:
        x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
    x = zero_padding(
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

    if self.norm_first:
        x = tgt + attention(self.norm1(tgt))
        x = x + cross(self.norm2(x))
        return x + self._ff_block(self.norm3(x))
    x = self.norm1(tgt + attention(tgt))
    x = self.norm2(x + cross(x))
    return self.norm3(x + self._ff_block(x))


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
    causal = causal_hint(tgt, tgt_mask, tgt_is_causal, self.layers[0].self_attn.batch_first)
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
    geometry = (self.stride, self.padding, self.kernel_size, self.dilation)
    added = output_padding(input, output_size, self.output_padding, *geometry)
    convolution = _CONVOLUTIONS[len(self.kernel_size)]
    operands = (input, self.weight, self.bias)
    return convolution(*operands, self.stride, self.padding, added, self.groups, self.dilation)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = frozenset(cls.forward for cls in _TRANSPOSED)
_OUTPUT_PADDING = nn.ConvTranspose2d._output_padding


def _written_out_convolution(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """What computes as a transposed convolution of torch, also as a subclass that changes none of it."""
    if not issubclass(cls, _TRANSPOSED) or cls.forward not in _FORWARDS:
        return None
    return _conv_transpose if cls._output_padding is _OUTPUT_PADDING else None


WRITTEN_OUT: Mapping[type[nn.Module], Callable[..., Any]] = {
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoderLayer: _decoder_layer,
    nn.TransformerDecoder: _decoder,
}
"""By exact class: a subclass may have changed what it computes."""


def written_out(module: nn.Module) -> Callable[..., Any] | None:
    """What to trace in the place of a module's own ``forward``, or None."""
    cls = original_class(module)
    return (
        WRITTEN_OUT.get(cls)
        or _written_out_convolution(cls)
        or written_out_of_torchvision(cls)
        or written_out_of_transformers(module)
        or written_out_of_bitsandbytes(module, cls)
    )


def written_conditions(module: nn.Module) -> tuple[str, ...]:
    """Expressions that are true when what was written out does not hold any more."""
    chosen = experts_implementation(module)
    return (
        ()
        if chosen is None
        else (f"(self.config._experts_implementation or 'eager') != {chosen!r}",)
    )
