"""Products of one input with several weights as one, split again; scales of branches in their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lora_fx.export.fuse.graph import (
    CONTRIB,
    Builder,
    array_of,
    at_each,
    at_nodes,
    axis_size,
    made_by,
    names_of,
    nodes_of,
    only_user,
    rank,
    scalar,
    substitute,
)
from lora_fx.export.fuse.pointwise import find_norms

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "Product",
    "fold_scales",
    "join_constants",
    "pack_products",
    "product_form",
    "read_product",
]


@dataclass(frozen=True)
class Product:
    """A product with a weight, and a bias that alone reads it.

    Attributes:
        node: The product.
        bias: What is added to every row; None for nothing.
        output: The result, with the bias.
        width: Columns of the result.
    """

    node: ir.Node
    bias: ir.Value | None
    output: ir.Value
    width: int


_QUANTIZED = ("MatMulNBits", "MatMulBnb4")


_Normed: TypeAlias = "Mapping[ir.Value, ir.Value]"
"""The outputs of norms, and what is normalized."""


def _attentions(model: ir.Model) -> list[tuple[ir.Node, _Normed]]:
    normed = {norm.output: norm.x for norm in find_norms(model)}
    return [(one, normed) for one in nodes_of(model, "GroupQueryAttention", domain=CONTRIB)]


@at_each(_attentions)
def pack_products(model: ir.Model, place: tuple[ir.Node, _Normed]) -> bool | str:
    """Make one product of those that feed one attention, with the factors of adapters at them.

    ``x·Wq, x·Wk, x·Wv, x·Aq, …`` become ``x · [Wq Wk Wv Aq …]`` and a ``Split``. Factors that are inputs
    of the file stay products of their own, since an adapter may be at some of the places only.
    """
    attention, normed = place
    products = [_source(value, normed) for value in attention.inputs[:3]]
    found = list({one.node: one for one in products if one is not None}.values())
    if None in products or len(found) < 2 or len({id(one.node.inputs[0]) for one in found}) > 1:
        return "query, key and value are no products of one input"
    if any(product_form(one) != product_form(found[0]) for one in found):
        return "the weights of query, key and value are stored in different forms"
    _pack(model, [*found, *_factors(found)])
    return True


def _source(value: ir.Value | None, normed: _Normed) -> Product | None:
    """The product that a value comes from, behind positions, norms of heads and branches of adapters."""
    while value is not None and (node := value.producer()) is not None:
        if value in normed:
            value = normed[value]
        elif node.op_type in ("MatMul", *_QUANTIZED):
            return read_product(node)
        elif node.op_type in ("RotaryEmbedding", "Reshape"):
            value = node.inputs[0]
        elif node.op_type in ("Mul", "Add") and any(_is_vector(one) for one in node.inputs):
            # A bias, or a gain.
            value = next(
                (one for one in node.inputs if rank(one) == 3 and not _is_vector(one)), None
            )
        elif node.op_type == "Add":
            # The wider product is the base's, the other one that of an adapter.
            sides = [_source(one, normed) for one in node.inputs]
            bases = {one.node: one for one in sides if one is not None and not _is_branch(one)}
            return next(iter(bases.values())) if len(bases) == 1 else None
        else:
            return None
    return None


def _is_vector(value: ir.Value | None) -> bool:
    """Whether a value is one vector for all tokens, of the file or of a row of the batch."""
    return rank(value) == 1 or (rank(value) == 3 and axis_size(value, 1) == 1)


def _is_branch(product: Product) -> bool:
    """Whether its input is itself a product of lower rank: ``(x·A)·B``."""
    before = None if product.node.inputs[0] is None else product.node.inputs[0].producer()
    if before is None or before.op_type != "MatMul":
        return False
    return isinstance(axis_size(before.inputs[1], -1), int | str)


def read_product(node: ir.Node) -> Product | None:
    """A product with constant weights that nothing else reads, and its bias."""
    if any(array is None for array in map(_shape_of_constant, node.inputs[1:])):
        return None
    if any(value is not None and len(value.uses()) > 1 for value in node.inputs[1:]):
        return None
    output = node.outputs[0]
    if node.op_type == "MatMul":
        width = axis_size(node.inputs[1], 1) if rank(node.inputs[1]) == 2 else None
    else:
        width = node.attributes.get_int("N", 0)
    if not isinstance(width, int) or output.is_graph_output():
        return None
    bias = None
    users = list(output.uses())
    if len(users) == 1 and users[0][0].op_type == "Add" and users[0][0].domain == "":
        added = users[0][0]
        other = next((one for one in added.inputs if one is not output), None)
        if rank(other) == 1 and array_of(other) is not None and axis_size(other, 0) == width:
            bias, output = other, added.outputs[0]
    return Product(node, bias, output, width)


def _shape_of_constant(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None:
        return ()
    if value.const_value is None or value.is_graph_input():
        return None
    return tuple(value.const_value.shape.numpy())


def product_form(product: Product) -> tuple[object, ...]:
    """What two products have in common that can be one."""
    node = product.node
    kinds = tuple(None if one is None else (one.dtype, rank(one)) for one in node.inputs)
    options = {name: one.value for name, one in node.attributes.items() if name != "N"}
    return node.domain, node.op_type, kinds, tuple(sorted(options.items())), product.bias is None


def _factors(products: Sequence[Product]) -> list[Product]:
    """Products of the same input with the constant factors A of adapters at these places."""
    first = products[0]
    x = first.node.inputs[0]
    if x is None or first.node.op_type != "MatMul" or first.bias is not None:
        return []
    taken = {one.node for one in products}
    readers = dict.fromkeys(
        node for node, _ in x.uses() if node.op_type == "MatMul" and node not in taken
    )
    found = [read_product(node) for node in readers if node.inputs[0] is x]
    return [
        one
        for one in found
        if one is not None
        and product_form(one) == product_form(first)
        and one.width < min(p.width for p in products)
    ]


def _pack(model: ir.Model, group: Sequence[Product]) -> None:
    first = group[0].node
    builder = Builder(model, first)
    axis = 1 if first.op_type == "MatMul" else 0
    packed = [
        None
        if value is None
        else join_constants(builder, [one.node.inputs[place] for one in group], axis)
        for place, value in enumerate(first.inputs)
        if place > 0
    ]
    attributes = {name: one.value for name, one in first.attributes.items()}
    total = sum(one.width for one in group)
    if first.domain == CONTRIB:
        attributes["N"] = total
    x = first.inputs[0]
    shape = [*names_of(x)[:-1], total]
    made = builder.op(
        first.op_type, [x, *packed], attributes, like=x, shape=shape, domain=first.domain
    )
    if group[0].bias is not None:
        bias = join_constants(builder, [one.bias for one in group], 0)
        made = builder.op("Add", [made, bias], like=x, shape=shape)
    widths = builder.ints([one.width for one in group])
    first_part = builder.op("Split", [made, widths], {"axis": -1}, like=x, outputs=len(group))
    node = first_part.producer()
    assert node is not None
    for one, part in zip(group, node.outputs, strict=True):
        part.shape = None
        substitute(one.output, part)


def join_constants(builder: Builder, values: Sequence[ir.Value | None], axis: int) -> ir.Value:
    """The constants of several products as one; it is put together when it is written."""
    tensors: list[Any] = [None if one is None else one.const_value for one in values]
    shape = list(tensors[0].shape.numpy())
    shape[axis] = sum(tensor.shape.numpy()[axis] for tensor in tensors)
    names = [str(one.name) for one in values if one is not None]

    def join() -> np.ndarray[Any, Any]:
        return np.concatenate([tensor.numpy() for tensor in tensors], axis=axis)

    return builder.later(" + ".join(names), join, shape, tensors[0].dtype)


# --- scales ---------------------------------------------------------------------------------------


@at_nodes("MatMul")
def fold_scales(model: ir.Model, node: ir.Node) -> bool:
    """Write ``s · ((x·A)·B)`` as ``(x·A)·(s·B)``, B being constant."""
    inner, factor = node.inputs
    scaled = only_user(node.outputs[0], "Mul")
    if scaled is None or factor is None or not _is_low_rank(inner, factor):
        return False
    number = next((scalar(one) for one in scaled.inputs if one is not node.outputs[0]), None)
    if number is None:
        return False
    builder = Builder(model, node)
    made = builder.op(
        "MatMul",
        [inner, _times(builder, factor, number)],
        like=node.outputs[0],
        shape=scaled.outputs[0].shape,
    )
    substitute(scaled.outputs[0], made)
    return True


def _is_low_rank(inner: ir.Value | None, factor: ir.Value) -> bool:
    """Whether it is the second of two products, the rank between them being the smallest size."""
    first = made_by(inner, "MatMul")
    if first is None or rank(factor) != 2 or len(factor.uses()) != 1 or array_of(factor) is None:
        return False
    low, wide, source = axis_size(factor, 0), axis_size(factor, 1), axis_size(first.inputs[0], -1)
    if not isinstance(low, int) or not isinstance(wide, int) or not isinstance(source, int):
        return False
    return low < min(wide, source)


def _times(builder: Builder, factor: ir.Value, number: float) -> ir.Value:
    tensor = factor.const_value
    assert tensor is not None

    def values() -> np.ndarray[Any, Any]:
        array = tensor.numpy()
        made: np.ndarray[Any, Any] = (array.astype(np.float64) * number).astype(array.dtype)
        return made

    name, factor.name = str(factor.name), f"{factor.name}.unscaled"
    return builder.later(name, values, list(tensor.shape.numpy()), tensor.dtype)
