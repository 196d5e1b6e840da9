"""Stacks of quantized matrices: the weights of all experts of a layer, in any format.

A stack looks like the dense weight that it replaces, [E, out, in] or [E, in, out], so any code can read it.
It is stored as the tensors of a library's weight with one more axis in front. ``stack[e]`` is one matrix,
``stack[ids]`` a smaller stack, and a grouped product decodes the matrices of the experts that have rows, one
after the other. Decoded matrices are not kept for the backward pass.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.formats.base import Storage, WeightFormat, format_of, format_of_class, held, stored
from lora_fx.formats.packed import PackedFormat, PackedTensor, Parts, form_of
from lora_fx.formats.weights import StateHooks, dense, follow_state
from lora_fx.ir import NoOperator, OnnxWeight, Quantization

__all__ = [
    "StackFormat",
    "StackedTensor",
    "Stacking",
    "become_experts",
    "dense_twins",
    "follow_stacks",
    "grouped_product",
    "is_grouped_product",
    "stack_matrices",
    "stack_parts",
]

_aten = torch.ops.aten


class Stacking(NamedTuple):
    """The storage of the matrices of a stack.

    Attributes:
        matrix: The class of the library's weights.
        context: The second result of :meth:`WeightFormat.take_apart`, which is equal for all matrices.
        keys: The names of the tensors in the library's weight, in the order of the parts of the stack.
        turned: True if the stack has the shape [E, in, out]. Its tensors always store matrices [out, in].
        pieces: The number of the library's weights that make up a matrix, one below the other. If there are
            several, the parts of a matrix have one more axis in front.
    """

    matrix: str
    context: Any
    keys: tuple[str, ...]
    turned: bool
    pieces: int = 1


class StackedTensor(PackedTensor):
    """A stack of quantized matrices [E, out, in], or one of them, [out, in]. Its options are a `Stacking`."""

    def weights(self) -> list[Any]:
        """Return a single matrix as weights of the library: one weight, or one for each of its pieces."""
        keys, count = self.options.keys, self.options.pieces
        parts = dict(zip(keys, self.parts.values(), strict=True))
        pieces = [parts]
        if count > 1:
            pieces = [{key: part[index] for key, part in parts.items()} for index in range(count)]
        return [self.members.put_together(piece, self.options.context) for piece in pieces]

    @property
    def members(self) -> WeightFormat:
        """The format of the matrices."""
        return format_of_class(self.options.matrix)

    def selected(self, select: Callable[[Tensor], Tensor], count: int | None) -> StackedTensor:
        """Return some of the matrices as a smaller stack, or a single matrix.

        Args:
            select: Called with each tensor of the stack. Returns the entries of the selected matrices.
            count: The number of selected matrices; None for one matrix without the axis.
        """
        tensors = {name: select(part) for name, part in self.parts.items()}
        shape = (*(() if count is None else (count,)), *self.shape[1:])
        return StackedTensor(Parts(tensors, shape, self.options), self.dtype)

    @property
    def mirrored(self) -> StackedTensor:
        """The stack with rows and columns of each matrix exchanged, over the same memory."""
        options = _turned(self.options)
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return StackedTensor(Parts(self.parts, shape, options), self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute grouped products without decoding the whole stack."""
        if is_grouped_product(func) and len(args) > 1:
            weight, ends = args[1], _offsets(*args[2:], **(kwargs or {}))
            if isinstance(weight, StackedTensor) and ends is not None:
                return grouped_product(args[0], weight, ends)
        if torch.is_inference_mode_enabled() and not torch.compiler.is_compiling():
            # PyTorch cannot make views of tensor subclasses in this mode.
            view = _view(_FUNCTIONS, func, args, kwargs)
            if view is not None:
                return view
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Select matrices and exchange their axes without decoding them."""
        view = _view(_VIEWS, func, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs) if view is None else view


def is_grouped_product(func: Any) -> bool:
    """Return True for the grouped products of PyTorch and transformers, ``func(x, weight, offs=ends)``."""
    return func in torch_private.GROUPED_MM_FUNCTIONS or str(func) in _FALLBACKS


_FALLBACKS = ("transformers.grouped_mm_fallback", "transformers.grouped_mm_fallback.default")


def _offsets(offs: Any = None, bias: Any = None, out_dtype: Any = None, **_: Any) -> Any:
    """Return the ``offs`` argument of a grouped product. None if the call has a bias or an output dtype."""
    return None if bias is not None or out_dtype is not None else offs


# --- views: each function returns None if the call needs the dense values ---------------------------


_other_sides: dict[int, tuple[Stacking, Stacking]] = {}


def _turned(options: Stacking) -> Stacking:
    """Return the options of the same stack with rows and columns exchanged, the same object each time."""
    if id(options) not in _other_sides:
        other = options._replace(turned=not options.turned)
        _other_sides[id(options)] = options, other
        _other_sides[id(other)] = other, options
    return _other_sides[id(options)][1]


def _select(stack: StackedTensor, dim: int, index: int) -> StackedTensor | None:
    if stack.dim() != 3 or dim % 3:
        return None
    return stack.selected(lambda part: part[index], None)


def _index(stack: StackedTensor, indices: list[Tensor | None]) -> StackedTensor | None:
    ids = indices[0]
    if stack.dim() != 3 or len(indices) != 1 or ids is None or ids.dim() != 1:
        return None
    if ids.dtype == torch.bool:
        return None
    return stack.selected(lambda part: part[ids], ids.shape[0])


def _transpose(stack: StackedTensor, first: int, second: int) -> StackedTensor | None:
    last = {stack.dim() - 1, stack.dim() - 2}
    return stack.mirrored if {first % stack.dim(), second % stack.dim()} == last else None


def _permute(stack: StackedTensor, dims: list[int]) -> StackedTensor | None:
    return stack.mirrored if [d % 3 for d in dims] == [0, 2, 1] else None


def _same(stack: StackedTensor, shape: list[int], **_: Any) -> StackedTensor | None:
    """Return the stack itself for a view in its own shape, or None for another shape."""
    return stack.mirrored.mirrored if list(shape) == list(stack.shape) else None


def _item(stack: StackedTensor, index: Any) -> StackedTensor | None:
    if isinstance(index, Tensor) and index.dim() == 1:
        return _index(stack, [index])
    number = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
    return _select(stack, 0, int(index)) if number and not isinstance(index, bool) else None


_FUNCTIONS: Mapping[Any, Callable[..., StackedTensor | None]] = {
    Tensor.__getitem__: _item,
    Tensor.select: _select,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.t: lambda stack: stack.mirrored,
    Tensor.mT.__get__: lambda stack: stack.mirrored,  # type: ignore[attr-defined]
}
_VIEWS: Mapping[Any, Callable[..., StackedTensor | None]] = {
    _aten.select.int: _select,
    _aten.index.Tensor: _index,
    _aten.transpose.int: _transpose,
    _aten.t.default: lambda stack: stack.mirrored,
    _aten.permute.default: _permute,
    _aten.expand.default: _same,
    _aten.view.default: _same,
    torch_private.UNSAFE_VIEW: _same,
}


def _view(
    views: Mapping[Any, Callable[..., StackedTensor | None]], func: Any, args: Any, kwargs: Any
) -> StackedTensor | None:
    """Return the result of a function that only selects or transposes matrices of a stack.

    None for any other function, which needs the dequantized values.
    """
    view = views.get(func)
    if view is None or not isinstance(args[0], StackedTensor):
        return None
    return view(*args, **(kwargs or {}))


# --- grouped products --------------------------------------------------------------------------------


def grouped_product(x: Tensor, weight: StackedTensor, ends: Tensor) -> Tensor:
    """Multiply rows with the matrix of their expert, ``y[i] = x[i] W[e(i)]``; differentiable in x.

    Args:
        x: [n, in], sorted by expert.
        weight: [E, in, out].
        ends: The end of each expert's rows, [E]. Rows after the last end give zeros.

    Returns:
        [n, out], in the dtype of x.
    """
    parts, shape = list(weight.parts.values()), list(weight.shape)
    product: Tensor = _multiply(x, parts, ends, weight.key, shape)
    return product


def _stack_of(
    key: str, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
) -> StackedTensor:
    """Rebuild a stack from the tensors that an operator has received as arguments."""
    _, names, options = form_of(key)
    return StackedTensor(Parts(dict(zip(names, parts, strict=True)), shape, options), dtype)


# An operator is opaque to a compiler, which does not support loops over the values of a tensor.
@torch.library.custom_op("lora_fx::grouped_stack_product", mutates_args=())
def _multiply(
    x: Tensor, parts: Sequence[Tensor], ends: Tensor, key: str, shape: Sequence[int]
) -> Tensor:
    stack = _stack_of(key, parts, shape, x.dtype)
    out = x.new_zeros(x.shape[0], shape[-1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            matrix = dense(_member(stack, expert), x.dtype)
            torch.mm(x[start:end], matrix, out=out[start:end])
        start = end
    return out


@_multiply.register_fake
def _(x: Tensor, parts: Sequence[Tensor], ends: Tensor, key: str, shape: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], shape[-1])


def _as_parameter(weight: Any) -> nn.Parameter:
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def _member(stack: StackedTensor, expert: int) -> StackedTensor:
    return stack.selected(lambda part: part[expert], None)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, ends, ctx.key, ctx.shape = inputs
    ctx.save_for_backward(ends, *parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ends, *parts = ctx.saved_tensors
    stack = _stack_of(ctx.key, parts, ctx.shape, grad.dtype)
    to_x = grouped_product(grad.contiguous(), stack.mirrored, ends)
    return to_x, [None] * len(parts), None, None, None


_multiply.register_autograd(_backward, setup_context=_remember)


def stack_parts(
    cls: type[PackedTensor],
    keys: Sequence[str],
    parts: Parts,
    dtype: torch.dtype,
    *,
    turned: bool = False,
    pieces: int = 1,
) -> nn.Parameter:
    """Return a frozen stack over tensors as a library stores them.

    Args:
        cls: The class of the matrices.
        keys: The names of the tensors in a matrix, in the order of the parts.
        parts: The tensors by their names in the module, the shape of the stack, and the options of a matrix.
        dtype: The dtype of the values.
        turned: See :class:`Stacking`.
        pieces: See :class:`Stacking`.
    """
    _, rows, columns = parts.shape
    matrix = (columns, rows) if turned else (rows // pieces, columns)
    context = (cls, (matrix, dtype, parts.options))
    options = Stacking(cls.__name__, context, tuple(keys), turned, pieces)
    stack = StackedTensor(dataclasses.replace(parts, options=options), dtype)
    return nn.Parameter(stack, requires_grad=False)


def follow_stacks(model: nn.Module) -> None:
    """Register hooks that save and load the stacks of a model under the names of their tensors."""
    for module in model.modules():
        parameters: Mapping[str, Any] = module._parameters
        for name, parameter in parameters.items():
            if isinstance(parameter, StackedTensor):
                follow_state(module, name, layer=True)


# --- layers of experts that a library has replaced ----------------------------------------------------


def dense_twins(
    model: nn.Module, is_experts: Callable[[nn.Module], bool]
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each library layer of experts, with the same layer of the dense model on the meta device.

    Args:
        model: A model of transformers, or a module that has one.
        is_experts: Returns True for a layer of the library.
    """
    library: Any = sys.modules.get("transformers")
    done: set[nn.Module] = set()
    for owner in model.modules() if library is not None else ():
        if not isinstance(owner, library.PreTrainedModel):
            continue
        named = [(n, m) for n, m in owner.named_modules() if is_experts(m) and m not in done]
        if not named:
            continue
        with torch.device("meta"):
            twin = type(owner)(copy.deepcopy(owner.config))
        for name, layer in named:
            done.add(layer)
            yield layer, twin.get_submodule(name)


def become_experts(
    layer: nn.Module, plain: nn.Module, stacks: Mapping[str, nn.Parameter | None]
) -> None:
    """Turn a library's layer of experts into the layer of the dense model, with stacks as its weights.

    Args:
        layer: The layer to change, in a copy of the user's model. It stays the same object, with its hooks.
        plain: The layer of the dense model. Its attributes move into ``layer``.
        stacks: The new parameters.
    """
    kept: dict[str, Any] = {
        key: layer.__dict__[key] for key in ("config", "training") if key in layer.__dict__
    }
    hooks: dict[str, Any] = {
        key: value for key, value in layer.__dict__.items() if key.endswith("_hooks")
    }
    layer.__dict__.clear()
    layer.__dict__.update({**plain.__dict__, **hooks, **kept})
    layer.__class__ = type(plain)
    for name, stack in stacks.items():
        layer.register_parameter(name, stack)
        follow_state(layer, name, layer=True)


# --- the format --------------------------------------------------------------------------------------


def stack_matrices(values: Tensor, how: Storage, parameter: str, *, turned: bool) -> nn.Parameter:
    """Return a frozen stack with these values, each matrix rounded as the format rounds it.

    Args:
        values: [E, out, in]; or [E, in, out] if ``turned``. No reference to it is kept.
        how: The format of the matrices.
        parameter: The name of the parameter in its module, with which the names of the parts begin.
        turned: True if the values are [E, in, out]. Each matrix is stored as [out, in] in any case, because
            the blocks of a format lie along the inputs.
    """
    matrices = values.mT if turned else values
    return _stacked(lambda index: [stored(matrices[index], how)], values, parameter, turned)


def _stacked(
    make: Callable[[int], list[Any]], like: Tensor, parameter: str | tuple[str, ...], turned: bool
) -> nn.Parameter:
    """Build a stack from one quantized matrix at a time.

    Args:
        make: Returns the library's weights of the matrix with an index: one, or one for each piece.
        like: A tensor of the shape, dtype and device of the stack.
        parameter: The name of the parameter, or the names of the parts.
        turned: See :class:`Stacking`.
    """
    stacked: dict[str, Tensor] = {}
    context: Any = None
    for index in range(like.shape[0]):
        weights = make(index)
        known = format_of(weights[0])
        assert known is not None
        pieces = (len(weights),) if len(weights) > 1 else ()
        for number, weight in enumerate(weights):
            parts, context = known.take_apart(weight)
            for key, part in parts.items():
                if not index and not number:
                    stacked[key] = part.new_empty((like.shape[0], *pieces, *part.shape))
                matrix = stacked[key][index]
                (matrix[number] if pieces else matrix).copy_(part)
    keys = tuple(stacked)
    names = tuple(f"{parameter}_{key}" for key in keys) if isinstance(parameter, str) else parameter
    options = Stacking(type(held(weights[0])).__name__, context, keys, turned, len(weights))
    tensors = dict(zip(names, stacked.values(), strict=True))
    stack = StackedTensor(Parts(tensors, like.shape, options), like.dtype)
    return nn.Parameter(stack, requires_grad=False)


_described: dict[tuple[str, int, int], Quantization | None] = {}
"""The storage of a matrix, by the key of its stack (:attr:`PackedTensor.key`) and the shape of the matrix."""


class StackFormat(PackedFormat):
    """The format of stacks, which leaves everything about a matrix to the format of the matrices."""

    library = "lora_fx"
    tensor = StackedTensor

    def describe(self, weight: Any) -> Quantization | None:
        """See :class:`WeightFormat`."""
        key = (weight.key, *weight.shape[-2:])
        if key not in _described:  # every product calls this, and a weight takes time to make
            single = weight if weight.dim() == 2 else _member(weight, 0)
            _described[key] = weight.members.describe(held(single.weights()[0]))
        quantization = _described[key]
        if quantization is None:
            return None
        count = None if weight.dim() == 2 else int(weight.shape[0])
        shape = (quantization.shape[0] * weight.options.pieces, quantization.shape[1])
        return dataclasses.replace(quantization, shape=shape, dtype=weight.dtype, stacked=count)

    def values(self, weight: Any, dtype: torch.dtype) -> Tensor:
        """See :class:`WeightFormat`."""
        if type(next(iter(weight.parts.values()))) is not Tensor:
            return super().values(weight, dtype)
        if weight.dim() == 2:
            pieces = [dense(piece, dtype) for piece in weight.weights()]
            matrix = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            return matrix.mT if weight.options.turned else matrix
        members = (self.values(_member(weight, index), dtype) for index in range(len(weight)))
        return torch.stack(list(members))

    def decode(self, weight: Any) -> Tensor:
        """See :class:`PackedFormat`."""
        return self.values(weight, weight.dtype)

    def state_hooks(self, parameter: str, *, layer: bool) -> StateHooks:
        """See :class:`WeightFormat`. The names of the parts already begin with the parameter's name."""
        return super().state_hooks(parameter, layer=True)

    def widened(self, parameter: nn.Parameter) -> nn.Parameter:
        """See :class:`WeightFormat`."""
        stack: Any = parameter.detach()

        def make(index: int) -> list[nn.Parameter]:
            old = _member(stack, index)
            return [old.members.widened(_as_parameter(piece)) for piece in old.weights()]

        return _stacked(make, stack, stack.part_names, stack.options.turned)

    def requantize(self, values: Tensor, weight: Any) -> nn.Parameter:
        """See :class:`WeightFormat`."""
        turned = weight.options.turned

        def make(index: int) -> list[nn.Parameter]:
            matrix = values[index].T if turned else values[index]
            old = _member(weight, index)
            pieces = zip(matrix.chunk(weight.options.pieces), old.weights(), strict=True)
            return [old.members.requantize(part, held(piece)) for part, piece in pieces]

        return _stacked(make, weight, weight.part_names, turned)

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """Return the arrays of all matrices, with one more axis in front."""
        pieces = weight.options.pieces
        shape = (stored.shape[0] // pieces, stored.shape[1])
        single = dataclasses.replace(stored, shape=shape, stacked=None)
        arrays: list[OnnxWeight] = []
        for index in range(len(weight)):
            member = _member(weight, index)
            for piece in member.weights():
                array = member.members.onnx_weight(held(piece), single)
                if isinstance(array, NoOperator):
                    return array
                arrays.append(array)
        if any(array.order is not None for array in arrays):
            return NoOperator(
                "has reordered columns (act-order), which a stack cannot be exported with"
            )
        first, zeros = arrays[0], [array.zeros for array in arrays]
        if any(zero is None for zero in zeros) and any(zero is not None for zero in zeros):
            return NoOperator("has zero points in some of its matrices, and in others none")

        def joined(parts: list[Tensor]) -> Tensor:
            steps = range(0, len(parts), pieces)
            return torch.stack([torch.cat(parts[start : start + pieces]) for start in steps])

        return dataclasses.replace(
            first,
            codes=joined([array.codes for array in arrays]),
            scales=joined([array.scales for array in arrays]),
            zeros=None if first.zeros is None else joined(cast("list[Tensor]", zeros)),
            fresh=True,
        )
