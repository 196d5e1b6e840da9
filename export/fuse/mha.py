"""Attention without a cache as ``MultiHeadAttention``, or with its three products as ``Attention``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_fx.export.fuse.attention import Attention, find_attention
from lora_fx.export.fuse.graph import CONTRIB, Builder, axis_size, made_by, names_of, substitute
from lora_fx.export.fuse.packing import Product, join_constants, product_form, read_product
from lora_fx.export.fuse.rotary import flat_heads

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["multi_head_attention", "whole_attention"]


def multi_head_attention(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Make one ``MultiHeadAttention`` of each attention over the tokens of the call.

    Args:
        model: Changed in place.

    Returns:
        How many there were, and why others were left.
    """
    done, why = 0, dict[str, int]()
    for one in find_attention(model):
        reason = _objection(one)
        if reason:
            why[reason] = why.get(reason, 0) + 1
            continue
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
        done += 1
    return done, why


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


def whole_attention(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Let an attention compute query, key and value itself: ``Attention``.

    Args:
        model: Changed in place. :func:`multi_head_attention` has been over it.

    Returns:
        How many there were, and why others were left.
    """
    done, why = 0, dict[str, int]()
    for node in [one for one in model.graph if one.op_type == "MultiHeadAttention"]:
        products = [_source(value) for value in node.inputs[:3]]
        found = [one for one in products if one is not None]
        same = len(found) == 3 and len({id(one.node.inputs[0]) for one in found}) == 1
        if not same or any(product_form(one) != product_form(found[0]) for one in found):
            reason = "query, key and value are no plain products of one input"
            why[reason] = why.get(reason, 0) + 1
            continue
        if found[0].node.op_type != "MatMul" or found[0].bias is None:
            reason = "its products have no bias, or weights in few bits"
            why[reason] = why.get(reason, 0) + 1
            continue
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
        done += 1
    return done, why


def _source(value: ir.Value | None) -> Product | None:
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
