"""Attention as one operator: ``GroupQueryAttention`` with a cache, ``MultiHeadAttention`` without one.

ONNX Runtime's operator masks keys behind the query by itself. What else a model masks, padding on either
side and windows, is its ``attention_bias``. Its own rotary embedding counts the positions of a prompt from
the first token, padding included, and so turns keys otherwise than a model that counts from the first token
that matters: ``RotaryEmbedding`` takes the model's own angles.
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
"""In the metadata: a call that has a past and several new tokens takes one text."""

SHARED_CACHE_KEY = "lora_fx.shared_cache"
"""In the metadata: a cache may have room for more positions than are filled, and be appended to in place."""


CUDA_SINCE = "1.29"
"""The first ONNX Runtime whose CUDA provider takes the ``attention_bias`` of ``GroupQueryAttention``."""


def check_attention(
    metadata: Mapping[str, str], provider: str, version: str, dtype: str, file: str
) -> None:
    """Refuse a file whose attention a provider does not run.

    Args:
        metadata: Of the file.
        provider: "cpu", "cuda" or "webgpu".
        version: Of ONNX Runtime.
        dtype: Of its caches, as torch names it.
        file: Its name, for the message.

    Raises:
        ProviderError: With what to export, or to install.
    """
    if provider != "cuda" or ONE_ROW_CHUNKS_KEY not in metadata:
        return
    if dtype == "float32":
        raise ProviderError(
            f"{file} has GroupQueryAttention in fp32, for which the cuda provider has no kernel: export the "
            "model with optimize='runtime' and provider='cuda', or with optimize='standard'"
        )
    if _numbers(version) < _numbers(CUDA_SINCE):
        raise ProviderError(
            f"{file} has GroupQueryAttention with a mask, which the cuda provider runs from ONNX Runtime "
            f"{CUDA_SINCE} on, and this is {version}: pip install 'onnxruntime-gpu>={CUDA_SINCE}', or export "
            "the model with optimize='standard'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@dataclass(frozen=True)
class _Cached:
    """An attention over a cache.

    Attributes:
        attention: It, over keys and values of the past and of the call.
        past_key: The input.
        past_value: The input.
        query: [batch, heads, sequence, width], not yet turned.
        key: The new keys, not yet turned.
        value: The new values.
        turns: The rotary embeddings of query and key; None for a model without.
        mask: What it masks.
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
    """Make one ``GroupQueryAttention`` of each causal attention over a cache.

    Args:
        model: Changed in place. Its metadata says what the operator does not take.

    Returns:
        How many there were, and why others were left.
    """
    why: dict[str, int] = {}
    calls = _Calls(model)
    done = 0
    every = find_attention(model)
    unread = sum(rank(node.outputs[0]) == 4 for node in nodes_of(model, "Softmax")) - len(every)
    if unread > 0:
        why["its scores are not those of query and key alone, as under a soft cap"] = unread
    for attention in every:
        found = _cached(model, attention)
        if isinstance(found, str):
            why[found] = why.get(found, 0) + 1
            continue
        calls.fuse(found)
        done += 1
    if done:
        model.metadata_props[ONE_ROW_CHUNKS_KEY] = "1"
    return done, why


def _cached(model: ir.Model, attention: Attention) -> _Cached | str:
    """Read an attention as one over a cache, or say what is in the way."""
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
    """A cache that is an input, and what is appended to it."""
    whole = joined(value, 2)
    if whole is None:
        return None
    past, new = whole.inputs
    if past is None or new is None or not past.is_graph_input() or past.is_initializer():
        return None
    return past, new


def share_cache(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Count past positions by the mask and not by the cache, which may have room for what follows then.

    ``GroupQueryAttention`` appends where it is if one buffer is both its past and its present.

    Args:
        model: Changed in place. Its metadata says that a cache may be shared.

    Returns:
        How many caches there are, and why they cannot be shared.
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
    for node in counted:
        builder = Builder(model, node)
        total = size_vector(model, builder, "total_length")
        new = size_vector(model, builder, "sequence")
        if total is None or new is None:
            return 0, {"no input of the file has the length of the whole text": 1}
        count = builder.op("Sub", [total, new], like=total, shape=node.outputs[0].shape)
        substitute(node.outputs[0], count)
    model.metadata_props[SHARED_CACHE_KEY] = "1"
    return len(caches), {}


def _readers(caches: Sequence[ir.Value], attention: Sequence[ir.Node]) -> Iterator[ir.Node]:
    """What else reads a cache, before a step or after it."""
    for value in caches:
        for node, place in value.uses():
            if node not in attention or place not in (3, 4):
                yield node
    for made in attention:
        for value in made.outputs[1:]:
            yield from (node for node, _ in value.uses())


class _Calls:
    """Makes the operators; what all layers share is made once."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._tables = Tables(model, _position_limit(model))
        self._lengths: dict[tuple[Size | None, ...], tuple[ir.Value, ir.Value]] = {}
        self._biases: dict[tuple[object, ...], ir.Value | None] = {}

    def fuse(self, one: _Cached) -> None:
        """Replace an attention."""
        attention = one.attention
        builder = Builder(self._model, attention.product)
        query, key, value = (
            flat_heads(builder, value) for value in (one.query, one.key, one.value)
        )
        if one.turns is not None:
            query = self._tables.turn(builder, one.turns[0], query, attention.heads)
            key = self._tables.turn(builder, one.turns[1], key, attention.groups)
        last, total = self._length(builder, one, query)
        bias = self._bias(builder, one)
        width = axis_size(one.query, 3)
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
            one.past_key,
            one.past_value,
            last,
            total,
            None,
            None,
            None,
            bias,
        ]
        made = builder.op(
            "GroupQueryAttention",
            inputs,
            attributes,
            like=query,
            shape=query.shape,
            domain=CONTRIB,
            outputs=3,
        )
        node = made.producer()
        assert node is not None
        batch, sequence, _ = names_of(query)
        assert isinstance(width, int)
        apart = batch, sequence, attention.heads, width
        rows = builder.op(
            "Reshape", [made, builder.ints([0, 0, attention.heads, width])], like=query, shape=apart
        )
        turned = builder.op("Transpose", [rows], {"perm": [0, 2, 1, 3]}, like=query)
        substitute(attention.output, turned)
        substitute(attention.key, node.outputs[1])
        substitute(attention.value, node.outputs[2])

    def _length(self, builder: Builder, one: _Cached, query: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The place of the last key, for each row, and the number of keys."""
        batch, past, sequence = (
            axis_size(one.past_key, 0),
            axis_size(one.past_key, 2),
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

    def _bias(self, builder: Builder, one: _Cached) -> ir.Value | None:
        mask = one.mask
        key = mask.low, mask.others, axis_size(one.query, 2)
        if key not in self._biases:
            sequence = size_vector(self._model, builder, axis_size(one.query, 2))
            assert sequence is not None
            self._biases[key] = bias_of(builder, mask, one.query, sequence)
        return self._biases[key]


def _position_limit(model: ir.Model) -> int | None:
    """How many positions the model has, as the metadata of the task says."""
    limit = json.loads(model.metadata_props.get(GENERATION_KEY, "{}")).get("limit")
    return limit if isinstance(limit, int) else None


# --- attention without a cache --------------------------------------------------------------------
# Attention without a cache as ``MultiHeadAttention``, or with its three products as ``Attention``.


@at_each(find_attention)
def multi_head_attention(model: ir.Model, one: Attention) -> bool | str:
    """Make one ``MultiHeadAttention`` of each attention over the tokens of the call."""
    if reason := _objection(one):
        return reason
    builder = Builder(model, one.product)
    query, key, value = (flat_heads(builder, part) for part in (one.query, one.key, one.value))
    made = builder.op(
        "MultiHeadAttention",
        [query, key, value, None, None, one.mask],
        {"num_heads": one.heads, "scale": float(one.scale)},
        like=query,
        shape=(*names_of(query)[:2], axis_size(value, 2)),
        domain=CONTRIB,
    )
    batch, sequence = names_of(query)[:2]
    width = axis_size(one.value, 3)
    assert isinstance(width, int)
    apart = builder.op(
        "Reshape",
        [made, builder.ints([0, 0, one.heads, width])],
        like=query,
        shape=(batch, sequence, one.heads, width),
    )
    turned = builder.op("Transpose", [apart], {"perm": [0, 2, 1, 3]}, like=query)
    substitute(one.output, turned)
    return True


def _objection(one: Attention) -> str:
    """Why an attention is not one over the tokens of the call, "" where it is."""
    if one.guard is not None:
        return "a row of its mask may be -inf as a whole"
    if one.heads != one.groups:
        return "its heads share keys"
    for value in (one.query, one.key, one.value):
        turned = made_by(value, "Transpose")
        if turned is None or list(turned.attributes.get_ints("perm", ())) != [0, 2, 1, 3]:
            return "its heads are laid out in another way, or have a cache"
    if one.mask is None:
        return ""
    shape = names_of(one.mask)
    full = axis_size(one.query, 2), axis_size(one.key, 2)
    if len(shape) != 4 or shape[2:] != full or shape[1] not in (1, one.heads):
        return "its mask has another shape"
    return ""


@at_nodes("MultiHeadAttention", domain=CONTRIB)
def whole_attention(model: ir.Model, node: ir.Node) -> bool | str:
    """Let an attention compute query, key and value itself: ``Attention``.

    It comes after :func:`multi_head_attention`.
    """
    products = [_product_of(value) for value in node.inputs[:3]]
    found = [one for one in products if one is not None]
    same = len(found) == 3 and len({id(one.node.inputs[0]) for one in found}) == 1
    if not same or any(product_form(one) != product_form(found[0]) for one in found):
        return "query, key and value are no plain products of one input"
    if found[0].node.op_type != "MatMul" or found[0].bias is None:
        return "its products have no bias, or quantized weights"
    builder = Builder(model, node)
    x = found[0].node.inputs[0]
    weights = join_constants(builder, [one.node.inputs[1] for one in found], 1)
    bias = join_constants(builder, [one.bias for one in found], 0)
    mask = node.inputs[5] if len(node.inputs) > 5 else None
    made = builder.op(
        "Attention",
        [x, weights, bias, None, None, mask],
        {
            "num_heads": node.attributes.get_int("num_heads", 1),
            "scale": node.attributes.get_float("scale", 0.0),
            "qkv_hidden_sizes": [one.width for one in found],
        },
        like=x,
        shape=node.outputs[0].shape,
        domain=CONTRIB,
    )
    substitute(node.outputs[0], made)
    return True


def _product_of(value: ir.Value | None) -> Product | None:
    """The product that a value is, with its bias."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Add":
        found = [
            read_product(before) for before in map(_producer, node.inputs) if before is not None
        ]
        whole = [one for one in found if one is not None and one.output is value]
        return whole[0] if len(whole) == 1 else None
    return None if node is None else read_product(node)


def _producer(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "MatMul" else None
