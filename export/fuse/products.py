"""Passes that pack products of one input into one with a split, and fold scales of branches into factors."""

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
    is_constant,
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
    """A product with a constant weight, and its bias if only a bias reads the product.

    Attributes:
        node: The node of the product.
        bias: Vector added to every row, or None.
        output: The result, with the bias added.
        width: Number of columns of the result.
    """

    node: ir.Node
    bias: ir.Value | None
    output: ir.Value
    width: int


_QUANTIZED = ("MatMulNBits", "MatMulBnb4")


_Normed: TypeAlias = "Mapping[ir.Value, ir.Value]"
"""Map from the output of a norm to its input."""


def _attentions(model: ir.Model) -> list[tuple[ir.Node, _Normed]]:
    normed = {norm.output: norm.x for norm in find_norms(model)}
    return [(node, normed) for node in nodes_of(model, "GroupQueryAttention", domain=CONTRIB)]


@at_each(_attentions)
def pack_products(model: ir.Model, match: tuple[ir.Node, _Normed]) -> bool | str:
    """Pack the products that feed one attention into one, with the adapter factors of the same input.

    ``x·Wq, x·Wk, x·Wv, x·Aq, …`` become ``x · [Wq Wk Wv Aq …]`` and a ``Split``. Factors that are inputs
    of the file stay separate products, because an adapter may be at some of the sites only.
    """
    attention, normed = match
    products = [_source(value, normed) for value in attention.inputs[:3]]
    distinct = list({product.node: product for product in products if product is not None}.values())
    if (
        None in products
        or len(distinct) < 2
        or len({id(product.node.inputs[0]) for product in distinct}) > 1
    ):
        return "query, key and value are no products of one input"
    if any(product_form(product) != product_form(distinct[0]) for product in distinct):
        return "the weights of query, key and value are stored in different forms"
    _pack(model, [*distinct, *_factors(distinct)])
    return True


def _source(value: ir.Value | None, normed: _Normed) -> Product | None:
    """Return the product that computes a query, key or value, or None.

    The search passes rotary embeddings, norms of heads and adapter branches.
    """
    while value is not None and (node := value.producer()) is not None:
        if value in normed:
            value = normed[value]
        elif node.op_type in ("MatMul", *_QUANTIZED):
            return read_product(node)
        elif node.op_type in ("RotaryEmbedding", "Reshape"):
            value = node.inputs[0]
        elif node.op_type in ("Mul", "Add") and any(_is_vector(operand) for operand in node.inputs):
            # A bias or a gain: continue with the other operand.
            value = next(
                (
                    operand
                    for operand in node.inputs
                    if rank(operand) == 3 and not _is_vector(operand)
                ),
                None,
            )
        elif node.op_type == "Add":
            # One side is the product of the base, the other the low-rank branch of an adapter.
            sides = [_source(operand, normed) for operand in node.inputs]
            bases = {side.node: side for side in sides if side is not None and not _is_branch(side)}
            return next(iter(bases.values())) if len(bases) == 1 else None
        else:
            return None
    return None


def _is_vector(value: ir.Value | None) -> bool:
    """Return True if a value is the same vector for all tokens of a row, such as a bias or a gain."""
    return rank(value) == 1 or (rank(value) == 3 and axis_size(value, 1) == 1)


def _is_branch(product: Product) -> bool:
    """Return True if the input of a product is the product of an adapter's first factor: ``(x·A)·B``."""
    before = None if product.node.inputs[0] is None else product.node.inputs[0].producer()
    if before is None or before.op_type != "MatMul":
        return False
    return isinstance(axis_size(before.inputs[1], -1), int | str)


def read_product(node: ir.Node) -> Product | None:
    """Return a node as a product with its bias, or None unless its weights are constant and used once."""
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
        other = next((operand for operand in added.inputs if operand is not output), None)
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
    """Return a key of operator, dtypes and attributes. Products with equal keys can be packed into one."""
    node = product.node
    kinds = tuple(None if value is None else (value.dtype, rank(value)) for value in node.inputs)
    options = {name: attribute.value for name, attribute in node.attributes.items() if name != "N"}
    return node.domain, node.op_type, kinds, tuple(sorted(options.items())), product.bias is None


def _factors(products: Sequence[Product]) -> list[Product]:
    """Return the products ``x·A`` of adapters with constant A that can be packed with ``products``."""
    first = products[0]
    x = first.node.inputs[0]
    if x is None or first.node.op_type != "MatMul" or first.bias is not None:
        return []
    taken = {product.node for product in products}
    readers = dict.fromkeys(
        node for node, _ in x.uses() if node.op_type == "MatMul" and node not in taken
    )
    candidates = [read_product(node) for node in readers if node.inputs[0] is x]
    return [
        candidate
        for candidate in candidates
        if candidate is not None
        and product_form(candidate) == product_form(first)
        and candidate.width < min(p.width for p in products)
    ]


def _pack(model: ir.Model, group: Sequence[Product]) -> None:
    first = group[0].node
    builder = Builder(model, first)
    axis = 1 if first.op_type == "MatMul" else 0
    packed = [
        None
        if value is None
        else join_constants(builder, [product.node.inputs[index] for product in group], axis)
        for index, value in enumerate(first.inputs)
        if index > 0
    ]
    attributes = {name: attribute.value for name, attribute in first.attributes.items()}
    total = sum(product.width for product in group)
    if first.domain == CONTRIB:
        attributes["N"] = total
    x = first.inputs[0]
    shape = [*names_of(x)[:-1], total]
    result = builder.op(
        first.op_type, [x, *packed], attributes, like=x, shape=shape, domain=first.domain
    )
    if group[0].bias is not None:
        bias = join_constants(builder, [product.bias for product in group], 0)
        result = builder.op("Add", [result, bias], like=x, shape=shape)
    widths = builder.ints([product.width for product in group])
    first_part = builder.op("Split", [result, widths], {"axis": -1}, like=x, outputs=len(group))
    node = first_part.producer()
    assert node is not None
    for product, part in zip(group, node.outputs, strict=True):
        part.shape = None
        substitute(product.output, part)


def join_constants(builder: Builder, values: Sequence[ir.Value | None], axis: int) -> ir.Value:
    """Concatenate constants along an axis. The data is joined only when the file is written."""
    tensors: list[Any] = [None if value is None else value.const_value for value in values]
    shape = list(tensors[0].shape.numpy())
    shape[axis] = sum(tensor.shape.numpy()[axis] for tensor in tensors)
    names = [str(value.name) for value in values if value is not None]

    def join() -> np.ndarray[Any, Any]:
        return np.concatenate([tensor.numpy() for tensor in tensors], axis=axis)

    return builder.later(" + ".join(names), join, shape, tensors[0].dtype)


# --- scales ---------------------------------------------------------------------------------------


@at_nodes("MatMul")
def fold_scales(model: ir.Model, node: ir.Node) -> bool:
    """Rewrite ``s · ((x·A)·B)`` as ``(x·A)·(s·B)`` if B is constant."""
    inner, factor = node.inputs
    scaled = only_user(node.outputs[0], "Mul")
    if scaled is None or factor is None or not _is_low_rank(inner, factor):
        return False
    number = next(
        (scalar(operand) for operand in scaled.inputs if operand is not node.outputs[0]), None
    )
    if number is None:
        return False
    builder = Builder(model, node)
    product = builder.op(
        "MatMul",
        [inner, _times(builder, factor, number)],
        like=node.outputs[0],
        shape=scaled.outputs[0].shape,
    )
    substitute(scaled.outputs[0], product)
    return True


def _is_low_rank(inner: ir.Value | None, factor: ir.Value) -> bool:
    """Return True if ``inner · factor`` is ``(x·A)·B``, and the size between A and B is the smallest."""
    first = made_by(inner, "MatMul")
    if first is None or rank(factor) != 2 or len(factor.uses()) != 1 or not is_constant(factor):
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
        scaled: np.ndarray[Any, Any] = (array.astype(np.float64) * number).astype(array.dtype)
        return scaled

    name, factor.name = str(factor.name), f"{factor.name}.unscaled"
    return builder.later(name, values, list(tensor.shape.numpy()), tensor.dtype)
