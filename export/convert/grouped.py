"""Products with one matrix for each group of rows, in operators of ONNX.

The rows are split where the groups end, each part is multiplied with its matrix, and the products are put
one below the other. Nothing is computed twice, and no matrix is copied at run time: those of a constant
weight become initializers of their own (``experts.down_proj.0``, …), views of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_fx.export.convert.translations import DOMAIN, GROUPED_MATMUL

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["expand_grouped"]


def expand_grouped(model: ir.Model) -> None:
    """Replace every grouped product.

    Args:
        model: Changed in place; its weights have their names.
    """
    nodes = [
        node
        for node in model.graph.all_nodes()
        if node.domain == DOMAIN and node.op_type == GROUPED_MATMUL
    ]
    known: dict[Any, list[ir.Value]] = {}
    ends: dict[Any, list[ir.Value]] = {}
    for node in nodes:
        _expand(node, known, ends)
    for weight in known:
        if weight.is_initializer() and not weight.uses():
            del weight.graph.initializers[weight.name]
    model.opset_imports.pop(DOMAIN, None)


def _expand(node: ir.Node, known: dict[Any, Any], sizes: dict[Any, Any]) -> None:
    import onnx_ir as ir

    rows, weight, ends = node.inputs
    (result,) = node.outputs
    assert rows is not None
    assert weight is not None
    assert ends is not None
    assert weight.shape is not None
    (groups, _, width) = weight.shape
    assert isinstance(groups, int)
    tape = ir.tape.Tape()
    if ends not in sizes:
        sizes[ends] = _sizes(tape, rows, ends)
    # What is behind the last group belongs to no expert: zero, as PyTorch has it.
    parts = tape.op_multi_out(
        "Split", [rows, sizes[ends]], {"axis": 0}, num_outputs=groups + 1, name=node.name
    )
    if weight not in known:
        known[weight] = _matrices(tape, weight, groups)
    products = [
        tape.op("MatMul", [part, matrix])
        for part, matrix in zip(parts[:-1], known[weight], strict=True)
    ]
    count = tape.op("Shape", [parts[-1]], {"start": 0, "end": 1})
    shape = tape.op("Concat", [count, _size(tape, weight, 2)], {"axis": 0})
    nothing = tape.op("CastLike", [_constant(tape, 0.0), rows])
    rest = tape.op("Expand", [nothing, shape])
    joined = tape.op("Concat", [*products, rest], {"axis": 0})
    for value in (joined, *products):
        value.dtype = rows.dtype
    for value in products:
        value.shape = ir.Shape([None, width])
    for part in parts:
        part.dtype, part.shape = rows.dtype, ir.Shape([None, weight.shape[1]])
    joined.shape, joined.name = result.shape, result.name
    result.name = None
    scopes = dict(node.metadata_props)
    for one in tape.nodes:
        one.metadata_props.update(scopes)
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, tape.nodes)
    result.replace_all_uses_with(joined, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _sizes(tape: Any, rows: ir.Value, ends: ir.Value) -> ir.Value:
    """Rows in each group, and those behind the last."""
    wide = tape.op("Cast", [ends], {"to": 7})
    count = tape.op("Shape", [rows], {"start": 0, "end": 1})
    stops = tape.op("Concat", [wide, count], {"axis": 0})
    starts = tape.op("Concat", [_ints(tape, [0]), wide], {"axis": 0})
    sizes: ir.Value = tape.op("Sub", [stops, starts])
    return sizes


def _matrices(tape: Any, weight: ir.Value, groups: int) -> list[ir.Value]:
    import onnx_ir as ir

    if weight.const_value is None or not weight.is_initializer():
        return [
            tape.op("Gather", [weight, _constant(tape, index)], {"axis": 0})
            for index in range(groups)
        ]
    graph = weight.graph
    assert graph is not None
    array = weight.const_value.numpy()
    matrices = []
    for index in range(groups):
        tensor = ir.Tensor(array[index], dtype=weight.dtype, name=f"{weight.name}.{index}")
        matrix = ir.val(tensor.name, const_value=tensor)
        graph.register_initializer(matrix)
        matrices.append(matrix)
    return matrices


def _size(tape: Any, value: ir.Value, axis: int) -> Any:
    """A size as a tensor: a number, or, of a factor whose rank is not known, what it is then."""
    assert value.shape is not None
    size = value.shape[axis]
    if isinstance(size, int):
        return _ints(tape, [size])
    return tape.op("Shape", [value], {"start": axis, "end": axis + 1})


def _ints(tape: Any, values: list[int]) -> Any:
    return tape.op("Constant", [], {"value_ints": values})


def _constant(tape: Any, value: float) -> Any:
    key = "value_int" if isinstance(value, int) else "value_float"
    return tape.op("Constant", [], {key: value})
