"""Attention as one operator: ``GroupQueryAttention`` with a cache, ``MultiHeadAttention`` without one.

ONNX Runtime's ``GroupQueryAttention`` masks keys after the query. Other masks of a model, padding on either
side and windows, become its ``attention_bias``. Its built-in rotary embedding counts positions from the
first token, padding included. A model that counts from the first real token rotates keys differently, so
``RotaryEmbedding`` gets the model's own angles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.errors import ProviderError
from lora_fx.export.decoder_cache import GENERATION_KEY
from lora_fx.export.fuse.attention import Attention, Mask, bias_of, find_attention, read_mask
from lora_fx.export.fuse.graph import (
    CONTRIB,
    Builder,
    Size,
    at_each,
    at_nodes,
    axis_size,
    input_axis,
    joined,
    made_by,
    names_of,
    nodes_of,
    rank,
    size_vector,
    sizes,
    substitute,
    sum_of,
)
from lora_fx.export.fuse.products import Product, join_constants, product_form, read_product
from lora_fx.export.fuse.rotary import Rotary, Tables, find_rotary, flat_heads
from lora_fx.versions import release

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "CUDA_SINCE",
    "ONE_ROW_CHUNKS_KEY",
    "SHARED_CACHE_KEY",
    "check_attention",
    "group_query_attention",
    "multi_head_attention",
    "share_cache",
    "whole_attention",
]

ONE_ROW_CHUNKS_KEY = "lora_fx.one_row_chunks"
"""Metadata key of files in which a call with a past and several new tokens takes a batch of one only."""

SHARED_CACHE_KEY = "lora_fx.shared_cache"
"""Metadata key of files whose cache may have room for more positions, and is then extended in place."""


CUDA_SINCE = "1.29"
"""First version of ONNX Runtime whose CUDA provider takes an ``attention_bias`` (GroupQueryAttention)."""


def check_attention(
    metadata: Mapping[str, str], provider: str, version: str, dtype: str, file: str
) -> None:
    """Raise if a provider cannot run the attention of a file.

    Args:
        metadata: Metadata of the file.
        provider: "cpu", "cuda" or "webgpu".
        version: Version of ONNX Runtime.
        dtype: Dtype of the caches, by its torch name.
        file: Name of the file for the message.

    Raises:
        ProviderError: The message says what to export or install instead.
    """
    if provider != "cuda" or ONE_ROW_CHUNKS_KEY not in metadata:
        return
    if dtype == "float32":
        raise ProviderError(
            f"{file} has GroupQueryAttention in fp32, for which the cuda provider has no kernel: export the "
            "model with optimize='runtime' and provider='cuda', or with optimize='standard'"
        )
    if release(version) < release(CUDA_SINCE):
        raise ProviderError(
            f"{file} has GroupQueryAttention with a mask, which the cuda provider runs from ONNX Runtime "
            f"{CUDA_SINCE} on, and this is {version}: pip install 'onnxruntime-gpu>={CUDA_SINCE}', or export "
            "the model with optimize='standard'"
        )


@dataclass(frozen=True)
class _Cached:
    """Values of one attention over a cache, which one fused operator can compute.

    Attributes:
        attention: The attention, over keys and values of the past and of the call.
        past_key: The input with the cached keys.
        past_value: The input with the cached values.
        query: [batch, heads, sequence, width], before rotary embedding.
        key: The new keys, before rotary embedding.
        value: The new values.
        turns: The rotary embeddings of query and key, or None if the model has none.
        mask: The mask of the attention.
    """

    attention: Attention
    past_key: ir.Value
    past_value: ir.Value
    query: ir.Value
    key: ir.Value
    value: ir.Value
    turns: tuple[Rotary, Rotary] | None
    mask: Mask


def group_query_attention(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Replace each causal attention over a cache by one ``GroupQueryAttention``.

    Args:
        model: Changed in place. :data:`ONE_ROW_CHUNKS_KEY` is set in its metadata.

    Returns:
        The number of replaced attentions, and how many were left for each reason.
    """
    reasons: dict[str, int] = {}
    calls = _Calls(model)
    done = 0
    attentions = find_attention(model)
    unread = sum(rank(node.outputs[0]) == 4 for node in nodes_of(model, "Softmax")) - len(
        attentions
    )
    if unread > 0:
        reasons["its scores are not those of query and key alone, as under a soft cap"] = unread
    for attention in attentions:
        cached = _cached(model, attention)
        if isinstance(cached, str):
            reasons[cached] = reasons.get(cached, 0) + 1
            continue
        calls.fuse(cached)
        done += 1
    if done:
        model.metadata_props[ONE_ROW_CHUNKS_KEY] = "1"
    return done, reasons


def _cached(model: ir.Model, attention: Attention) -> _Cached | str:
    """Return the parts of an attention over a cache, or the reason why it cannot be fused."""
    width, sequence = axis_size(attention.query, 3), axis_size(attention.query, 2)
    if axis_size(attention.key, 3) != width or axis_size(attention.value, 3) != width:
        return "keys and values have different widths"
    if not isinstance(width, int) or width % 8:
        return "the width of a head is no multiple of 8"
    keys, values = _appended(attention.key), _appended(attention.value)
    if keys is None or values is None:
        return "it has no cache among the inputs of the file"
    past = axis_size(keys[0], 2)
    total = None if past is None or sequence is None else sum_of(past, sequence)
    names = {size for value in model.graph.inputs for size in names_of(value)}
    if not {past, sequence, axis_size(attention.query, 0)} <= names:
        return "its sizes are no axes of the inputs"
    mask = read_mask(attention.mask, past, total)
    if mask is None or not mask.causal:
        return "its mask is not seen to be causal"
    query, key = attention.query, keys[1]
    turned = find_rotary(query), find_rotary(key)
    turns = None
    if turned[0] is not None and turned[1] is not None:
        turns = turned[0], turned[1]
        query, key = turns[0].x, turns[1].x
        if turns[0].cosine.angles is not turns[1].cosine.angles:
            return "query and key are turned by different angles"
    return _Cached(attention, keys[0], values[0], query, key, values[1], turns, mask)


def _appended(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return the cache (a graph input) and the new part that a value concatenates, otherwise None."""
    whole = joined(value, 2)
    if whole is None:
        return None
    past, new = whole.inputs
    if past is None or new is None or not past.is_graph_input() or past.is_initializer():
        return None
    return past, new


def share_cache(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Compute the number of past positions from the mask, so that a cache may have room for more positions.

    ``GroupQueryAttention`` appends in place if one buffer is both its past and its present.

    Args:
        model: Changed in place. :data:`SHARED_CACHE_KEY` is set in its metadata.

    Returns:
        The number of caches, and the reasons why they cannot be shared.
    """
    caches = [
        value
        for value in model.graph.inputs
        if (value.name or "").startswith("past_key_values.") and ".encoder." not in str(value.name)
    ]
    attention = nodes_of(model, "GroupQueryAttention", domain=CONTRIB)
    if not caches or not attention:
        return 0, {}
    past = axis_size(caches[0], 2)
    counted = []
    for node in _readers(caches, attention):
        read = sizes(node.outputs[0]) if node.op_type == "Shape" else (past, None)
        if read is None or (past in read and len(read) > 1) or node.inputs[0] not in caches:
            return 0, {"a cache is read outside of GroupQueryAttention": 1}
        if past in read:
            counted.append(node)
    if counted and None in (input_axis(model, "total_length"), input_axis(model, "sequence")):
        return 0, {"no input of the file has the length of the whole text": 1}
    for node in counted:
        builder = Builder(model, node)
        total = size_vector(model, builder, "total_length")
        new = size_vector(model, builder, "sequence")
        assert total is not None
        count = builder.op("Sub", [total, new], like=total, shape=node.outputs[0].shape)
        substitute(node.outputs[0], count)
    model.metadata_props[SHARED_CACHE_KEY] = "1"
    return len(caches), {}


def _readers(caches: Sequence[ir.Value], attention: Sequence[ir.Node]) -> Iterator[ir.Node]:
    """Yield the nodes other than ``attention`` that read a past or present cache."""
    for value in caches:
        for node, index in value.uses():
            if node not in attention or index not in (3, 4):
                yield node
    for attention_node in attention:
        for value in attention_node.outputs[1:]:
            yield from (node for node, _ in value.uses())


class _Calls:
    """Builder of the fused operators. Values that all layers share are computed once."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._tables = Tables(model, _position_limit(model))
        self._lengths: dict[tuple[Size | None, ...], tuple[ir.Value, ir.Value]] = {}
        self._biases: dict[tuple[object, ...], ir.Value | None] = {}

    def fuse(self, cached: _Cached) -> None:
        """Replace an attention by a ``GroupQueryAttention``."""
        attention = cached.attention
        builder = Builder(self._model, attention.product)
        query, key, value = (
            flat_heads(builder, value) for value in (cached.query, cached.key, cached.value)
        )
        if cached.turns is not None:
            query = self._tables.turn(builder, cached.turns[0], query, attention.heads)
            key = self._tables.turn(builder, cached.turns[1], key, attention.groups)
        last, total = self._length(builder, cached, query)
        bias = self._bias(builder, cached)
        width = axis_size(cached.query, 3)
        attributes = {
            "num_heads": attention.heads,
            "kv_num_heads": attention.groups,
            "scale": float(attention.scale),
            "do_rotary": 0,
        }
        inputs = [
            query,
            key,
            value,
            cached.past_key,
            cached.past_value,
            last,
            total,
            None,
            None,
            None,
            bias,
        ]
        result = builder.op(
            "GroupQueryAttention",
            inputs,
            attributes,
            like=query,
            shape=query.shape,
            domain=CONTRIB,
            outputs=3,
        )
        node = result.producer()
        assert node is not None
        batch, sequence, _ = names_of(query)
        assert isinstance(width, int)
        apart = batch, sequence, attention.heads, width
        rows = builder.op(
            "Reshape",
            [result, builder.ints([0, 0, attention.heads, width])],
            like=query,
            shape=apart,
        )
        turned = builder.op("Transpose", [rows], {"perm": [0, 2, 1, 3]}, like=query)
        substitute(attention.output, turned)
        substitute(attention.key, node.outputs[1])
        substitute(attention.value, node.outputs[2])

    def _length(
        self, builder: Builder, cached: _Cached, query: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Return inputs of the operator: the index of the last key of each row, and the number of keys."""
        batch, past, sequence = (
            axis_size(cached.past_key, 0),
            axis_size(cached.past_key, 2),
            axis_size(query, 1),
        )
        key = batch, past, sequence
        if key not in self._lengths:
            assert past is not None
            assert sequence is not None
            total = size_vector(self._model, builder, sum_of(past, sequence))
            rows = size_vector(self._model, builder, batch)
            assert total is not None
            assert rows is not None
            total = builder.op("Cast", [total], {"to": 6})
            last = builder.op("Sub", [total, builder.ints([1], np.int32)], like=total)
            self._lengths[key] = builder.op("Expand", [last, rows], like=total), total
        return self._lengths[key]

    def _bias(self, builder: Builder, cached: _Cached) -> ir.Value | None:
        mask = cached.mask
        key = mask.low, mask.conditions, axis_size(cached.query, 2)
        if key not in self._biases:
            sequence = size_vector(self._model, builder, axis_size(cached.query, 2))
            assert sequence is not None
            self._biases[key] = bias_of(builder, mask, cached.query, sequence)
        return self._biases[key]


def _position_limit(model: ir.Model) -> int | None:
    """Return the number of positions of the model from the metadata of the task, or None."""
    limit = json.loads(model.metadata_props.get(GENERATION_KEY, "{}")).get("limit")
    return limit if isinstance(limit, int) else None


# --- attention without a cache --------------------------------------------------------------------
# Attention without a cache as ``MultiHeadAttention``, or with its three products as ``Attention``.


@at_each(find_attention)
def multi_head_attention(model: ir.Model, attention: Attention) -> bool | str:
    """Replace an attention over the tokens of the call by a ``MultiHeadAttention``."""
    if reason := _objection(attention):
        return reason
    builder = Builder(model, attention.product)
    query, key, value = (
        flat_heads(builder, part) for part in (attention.query, attention.key, attention.value)
    )
    result = builder.op(
        "MultiHeadAttention",
        [query, key, value, None, None, attention.mask],
        {"num_heads": attention.heads, "scale": float(attention.scale)},
        like=query,
        shape=(*names_of(query)[:2], axis_size(value, 2)),
        domain=CONTRIB,
    )
    batch, sequence = names_of(query)[:2]
    width = axis_size(attention.value, 3)
    assert isinstance(width, int)
    apart = builder.op(
        "Reshape",
        [result, builder.ints([0, 0, attention.heads, width])],
        like=query,
        shape=(batch, sequence, attention.heads, width),
    )
    turned = builder.op("Transpose", [apart], {"perm": [0, 2, 1, 3]}, like=query)
    substitute(attention.output, turned)
    return True


def _objection(attention: Attention) -> str:
    """Return the reason why ``MultiHeadAttention`` cannot compute an attention, or ""."""
    if attention.guard is not None:
        return "a row of its mask may be -inf as a whole"
    if attention.heads != attention.groups:
        return "its heads share keys"
    for value in (attention.query, attention.key, attention.value):
        turned = made_by(value, "Transpose")
        if turned is None or list(turned.attributes.get_ints("perm", ())) != [0, 2, 1, 3]:
            return "its heads are laid out in another way, or have a cache"
    if attention.mask is None:
        return ""
    shape = names_of(attention.mask)
    full = axis_size(attention.query, 2), axis_size(attention.key, 2)
    if len(shape) != 4 or shape[2:] != full or shape[1] not in (1, attention.heads):
        return "its mask has another shape"
    return ""


@at_nodes("MultiHeadAttention", domain=CONTRIB)
def whole_attention(model: ir.Model, node: ir.Node) -> bool | str:
    """Fuse an attention with the products of query, key and value into an ``Attention``.

    It runs after :func:`multi_head_attention`.
    """
    products = [_product_of(value) for value in node.inputs[:3]]
    sources = [product for product in products if product is not None]
    same = len(sources) == 3 and len({id(product.node.inputs[0]) for product in sources}) == 1
    if not same or any(product_form(product) != product_form(sources[0]) for product in sources):
        return "query, key and value are no plain products of one input"
    if sources[0].node.op_type != "MatMul" or sources[0].bias is None:
        return "its products have no bias, or quantized weights"
    builder = Builder(model, node)
    x = sources[0].node.inputs[0]
    weights = join_constants(builder, [source.node.inputs[1] for source in sources], 1)
    bias = join_constants(builder, [source.bias for source in sources], 0)
    mask = node.inputs[5] if len(node.inputs) > 5 else None
    fused = builder.op(
        "Attention",
        [x, weights, bias, None, None, mask],
        {
            "num_heads": node.attributes.get_int("num_heads", 1),
            "scale": node.attributes.get_float("scale", 0.0),
            "qkv_hidden_sizes": [source.width for source in sources],
        },
        like=x,
        shape=node.outputs[0].shape,
        domain=CONTRIB,
    )
    substitute(node.outputs[0], fused)
    return True


def _product_of(value: ir.Value | None) -> Product | None:
    """Return the product, with its bias, that computes a value, or None."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Add":
        products = [
            read_product(before) for before in map(_producer, node.inputs) if before is not None
        ]
        matches = [
            product for product in products if product is not None and product.output is value
        ]
        return matches[0] if len(matches) == 1 else None
    return None if node is None else read_product(node)


def _producer(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "MatMul" else None
