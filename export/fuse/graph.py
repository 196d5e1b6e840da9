"""Helpers to read and edit an ONNX graph: constants, computed sizes, and replacement of values."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "CONTRIB",
    "Builder",
    "Rewriting",
    "Size",
    "array_of",
    "at_each",
    "at_nodes",
    "axis_size",
    "consumers",
    "factors_of",
    "input_axis",
    "is_constant",
    "joined",
    "made_by",
    "names_of",
    "nodes_of",
    "only_user",
    "rank",
    "remove_dead",
    "remove_unused",
    "scalar",
    "size_vector",
    "sizes",
    "substitute",
    "sum_of",
]


CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

Size: TypeAlias = "int | str"
"""Size of an axis: a number, the name of an axis, or a sum of names in alphabetical order."""


Rewriting: TypeAlias = "Callable[[ir.Model], tuple[int, Mapping[str, int]]]"
"""Function that changes a graph. It returns the number of changes, and how often each reason forbade one."""

_T = TypeVar("_T")


def nodes_of(model: ir.Model, *operators: str, domain: str = "") -> list[ir.Node]:
    """Return the nodes of the main graph whose operator is one of ``operators``, in order."""
    return [node for node in model.graph if node.domain == domain and node.op_type in operators]


def at_each(
    find: Callable[[ir.Model], Iterable[_T]],
) -> Callable[[Callable[[ir.Model, _T], bool | str]], Rewriting]:
    """Return a decorator that turns a rule for one match of a pattern into a fusion of all matches.

    Args:
        find: Returns the matches in a model. It runs before any change.

    Returns:
        A decorator. The rule changes a model at a match and returns True. If it changes nothing, it
        returns False, or the reason if that should be reported.
    """

    def decorate(rule: Callable[[ir.Model, _T], bool | str]) -> Rewriting:
        @functools.wraps(rule)
        def rewrite(model: ir.Model) -> tuple[int, Mapping[str, int]]:
            outcomes = Counter(rule(model, site) for site in list(find(model)))
            return outcomes[True], {
                reason: n for reason, n in outcomes.items() if isinstance(reason, str)
            }

        return rewrite

    return decorate


def at_nodes(
    *operators: str, domain: str = ""
) -> Callable[[Callable[[ir.Model, ir.Node], bool | str]], Rewriting]:
    """Return a decorator that turns a rule for one node into a fusion, like :func:`at_each`."""
    return at_each(lambda model: nodes_of(model, *operators, domain=domain))


def made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the node that computes a value if its ONNX operator is one of ``operators``, else None."""
    node = None if value is None else value.producer()
    if node is None or node.domain != "" or node.op_type not in operators:
        return None
    return node


def joined(value: ir.Value | None, axis: int) -> ir.Node | None:
    """Return the ``Concat`` of two values along an axis of four that computes a value, or None."""
    node = made_by(value, "Concat")
    if node is None or len(node.inputs) != 2:
        return None
    return node if node.attributes.get_int("axis", 0) in (axis, axis - 4) else None


def consumers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a value, each once."""
    return list(dict.fromkeys(node for node, _ in value.uses()))


def only_user(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the node that reads a value if no other node does and its operator is one of ``operators``.

    Return None otherwise, or if the graph returns the value.
    """
    if value is None or value.is_graph_output():
        return None
    users = consumers(value)
    if len(users) != 1 or users[0].domain != "" or users[0].op_type not in operators:
        return None
    return users[0]


def is_constant(value: ir.Value) -> bool:
    """Return True if a value is a constant of the file. The data of a weight is not read."""
    if value.const_value is not None:
        return not value.is_graph_input()
    return array_of(value) is not None


def array_of(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return the values of a constant. Return None for inputs of the file and all other values."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = made_by(value, "Constant")
    if node is None:
        return None
    for name in ("value_int", "value_float", "value_ints", "value_floats"):
        if name in node.attributes:
            return np.asarray(node.attributes[name].value)
    attribute = node.attributes.get("value")
    return None if attribute is None else np.asarray(attribute.as_tensor().numpy())


def scalar(value: ir.Value | None) -> float | None:
    """Return the number in a constant of one element, or None."""
    array = array_of(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def rank(value: ir.Value | None) -> int | None:
    """Return the number of axes of a value, or None if it is unknown."""
    return None if value is None or value.shape is None else len(value.shape)


def axis_size(value: ir.Value | None, axis: int) -> Size | None:
    """Return the size of an axis, or None if it is unknown."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    if isinstance(size, int):
        return size
    return None if size.value is None else _sorted(size.value)


def _sorted(text: str) -> str:
    """Sort the terms of a sum alphabetically, because ``s + p`` and ``p + s`` are the same size."""
    if any(sign in text for sign in "()*/-%"):
        return text
    return " + ".join(sorted(term.strip() for term in text.split("+")))


def names_of(value: ir.Value | None) -> tuple[Size | None, ...]:
    """Return the sizes of all axes, or () if their number is unknown."""
    count = rank(value)
    return () if count is None else tuple(axis_size(value, axis) for axis in range(count))


def sizes(value: ir.Value | None) -> tuple[Size | None, ...] | None:
    """Evaluate a tensor of integers that is constant or computed from sizes of other values.

    Args:
        value: A scalar or a vector, such as the shape of a ``Reshape``.

    Returns:
        An entry for each element, None if it is unknown; or None if nothing is known.
    """
    array = array_of(value)
    if array is not None:
        if array.dtype.kind not in "iu" or array.ndim > 1:
            return None
        return tuple(int(number) for number in array.reshape(-1))
    if value is None:
        return None
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type in ("Squeeze", "Unsqueeze", "Reshape", "Identity", "Cast"):
        return sizes(node.inputs[0])
    read = _SIZE_OPERATORS.get(node.op_type)
    return None if read is None else read(node)


_Sizes: TypeAlias = "tuple[Size | None, ...] | None"


def _shape(node: ir.Node) -> _Sizes:
    axes = names_of(node.inputs[0])
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(axes))
    return axes[slice(start, end)] if axes else None


def _joined(node: ir.Node) -> _Sizes:
    elements: list[Size | None] = []
    for value in node.inputs:
        part = sizes(value)
        if part is None:
            return None
        elements += part
    return tuple(elements)


def _gathered(node: ir.Node) -> _Sizes:
    values, indices = sizes(node.inputs[0]), sizes(node.inputs[1])
    if values is None or indices is None:
        return None
    return tuple(values[index] if isinstance(index, int) else None for index in indices)


def _sliced(node: ir.Node) -> _Sizes:
    values = sizes(node.inputs[0])
    bounds = [array_of(value) for value in node.inputs[1:3]]
    if values is None or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    if len(node.inputs) > 4 and scalar(node.inputs[4]) != 1:
        return None
    start, end = (int(bound.reshape(-1)[0]) for bound in bounds if bound is not None)
    return values[start:end]


def _added(node: ir.Node) -> _Sizes:
    first, second = sizes(node.inputs[0]), sizes(node.inputs[1])
    if first is None or second is None or len(first) != 1 or len(second) != 1:
        return None
    left, right = first[0], second[0]
    return (None if left is None or right is None else sum_of(left, right),)


def sum_of(left: Size, right: Size) -> Size:
    """Add two sizes."""
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    if left == 0 or right == 0:
        return left or right
    return _sorted(f"{left} + {right}")


_SIZE_OPERATORS: Mapping[str, Callable[[ir.Node], _Sizes]] = {
    "Shape": _shape,
    "Concat": _joined,
    "Slice": _sliced,
    "Gather": _gathered,
    "Add": _added,
}


def factors_of(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Split a value into an unscaled value and the product of its constant scalar factors."""
    factor = 1.0
    while True:
        node = made_by(value, "Mul", "Div")
        if node is None:
            return value, factor
        left, right = node.inputs
        if (number := scalar(right)) is not None and number != 0:
            value, factor = left, (factor * number if node.op_type == "Mul" else factor / number)
        elif node.op_type == "Mul" and (number := scalar(left)) is not None:
            value, factor = right, factor * number
        else:
            return value, factor


class Builder:
    """Builder that inserts new nodes before another node.

    Args:
        model: The model. Constants with equal content are shared.
        before: The node before which new nodes are inserted.
    """

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self._model = model
        self._before = before

    def op(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: ir.Value | None = None,
        shape: Sequence[Size | None] | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Value:
        """Insert a node and return its first output, whose ``.producer().outputs`` are all outputs.

        Args:
            operator: Operator of the node.
            inputs: Inputs of the node; None for an optional input that is left out.
            attributes: Attributes of the node.
            like: A value with the dtype of the outputs.
            shape: Sizes of the axes of the first output, if they are known.
            domain: Domain of the operator.
            outputs: Number of outputs.
        """
        import onnx_ir as ir

        taken = list(inputs)
        while taken and taken[-1] is None:
            taken.pop()
        node = ir.node(operator, taken, attributes or {}, domain=domain, num_outputs=outputs)
        node.metadata_props.update(self._before.metadata_props)
        graph = self._before.graph
        assert graph is not None
        graph.insert_before(self._before, node)
        if domain:
            self._model.opset_imports.setdefault(domain, 1)
        dtype = None if like is None else like.dtype
        if operator == "Shape":
            dtype = ir.DataType.INT64
        elif operator == "Cast":
            dtype = ir.DataType(int((attributes or {})["to"]))
        for value in node.outputs:
            if dtype is not None:
                value.dtype = dtype
        if shape is not None:
            node.outputs[0].shape = ir.Shape(shape)
        return node.outputs[0]

    def ints(self, numbers: Sequence[int] | int, dtype: Any = np.int64) -> ir.Value:
        """Return a constant of integers: a vector, or a scalar for a single number."""
        return self.constant(np.asarray(numbers, dtype))

    def number(self, value: float, like: ir.Value) -> ir.Value:
        """Return a scalar constant with the dtype of another value."""
        assert like.dtype is not None
        return self.constant(np.asarray(value, like.dtype.numpy()), like.dtype)

    def later(
        self, name: str, make: Callable[[], np.ndarray[Any, Any]], shape: Sequence[int], dtype: Any
    ) -> ir.Value:
        """Return an initializer whose values are computed on each read and not kept in memory."""
        import onnx_ir as ir

        taken, plain, number = self._model.graph.initializers, name, 0
        while name in taken:
            number += 1
            name = f"{plain}_{number}"

        def tensor() -> ir.TensorProtocol:
            return ir.tensor(make(), dtype=dtype, name=name)

        lazy = ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)
        value = ir.val(name, const_value=lazy)
        self._model.graph.register_initializer(value)
        return value

    def constant(self, array: np.ndarray[Any, Any], dtype: Any = None) -> ir.Value:
        """Return an initializer of few values. Constants with equal content are shared."""
        import onnx_ir as ir

        tensor = ir.tensor(array, dtype=dtype)
        graph = self._model.graph
        key = "_".join(str(element) for element in array.reshape(-1).tolist()) or "none"
        name = f"constant_{str(tensor.dtype).lower()}_{array.ndim}d_{key}"
        if name in graph.initializers:
            return graph.initializers[name]
        value = ir.val(name, const_value=tensor)
        graph.register_initializer(value)
        return value


def size_vector(model: ir.Model, builder: Builder, size: Size | None) -> ir.Value | None:
    """Return a size as a vector of one element, read from the inputs of the file.

    Return None if the inputs do not have the size.
    """
    if size is None or isinstance(size, int):
        return None if size is None else builder.ints([size])
    axes = [input_axis(model, term) for term in size.split(" + ")]
    if None in axes:
        return None
    parts = [
        builder.op("Shape", [value], {"start": axis, "end": axis + 1}, shape=[1])
        for value, axis in filter(None, axes)
    ]
    return functools.reduce(
        lambda total, part: builder.op("Add", [total, part], like=part, shape=[1]), parts
    )


def input_axis(model: ir.Model, name: str) -> tuple[ir.Value, int] | None:
    """Return the first input of the file with an axis of this name, and the axis, or None."""
    for value in model.graph.inputs:
        for axis, size in enumerate(names_of(value)):
            if size == name:
                return value, axis
    return None


def substitute(old: ir.Value, new: ir.Value) -> None:
    """Replace all uses of ``old`` by ``new``. If ``old`` is a graph output, ``new`` gets its name."""
    graph = old.graph
    if new.shape is None:
        new.shape = old.shape
    if old.is_graph_output():
        assert graph is not None
        name, old.name = old.name, None
        for index, value in enumerate(graph.outputs):
            if value is old:
                graph.outputs[index] = new
        new.name = name
        new.shape, new.dtype = old.shape, old.dtype
    old.replace_all_uses_with(new)


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and constants that nothing reads, and common subexpressions."""
    from onnx_ir.passes.common import (
        CommonSubexpressionEliminationPass,
        NameFixPass,
        RemoveUnusedNodesPass,
    )

    model.graph.sort()
    RemoveUnusedNodesPass()(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)


def remove_dead(model: ir.Model) -> None:
    """Remove nodes and constants that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
