"""Rules that compute the samples of an operator's results from the samples of its arguments.

The samples that an element was computed from are stored as an interval: the least sample number, and the
negated greatest. The union of two intervals is then their elementwise minimum. An element without samples has
``(EMPTY, EMPTY)``. A tensor of shape ``[...]`` has intervals of shape ``[channels, ...]``. Reductions,
products and broadcasts of the tensor become minima of the intervals.

A rule may report too many samples, never too few. An operator without a rule gives each result the samples of
all its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_fx import torch_private
from lora_fx.formats import row_operators

__all__ = [
    "Operation",
    "Reader",
    "Rule",
    "Sets",
    "batch_normalized",
    "is_elementwise",
    "operands_of",
    "rule_of",
    "union",
]


class Reader(Protocol):
    """Interface through which a rule reads the samples of tensors."""

    empty: int
    dtype: torch.dtype

    def read(self, tensor: Any) -> Tensor | None:
        """Return the samples of each element, [channels, *shape]; None if no element has samples."""

    def note_position_by_values(self) -> None:
        """Record that values of the batch decide the position of an element, as in a sort."""


Sets = Tensor | None
"""The samples of each element of a tensor; None if no element has one."""


class Operation(NamedTuple):
    """One call of an ATen operator, while rows of a batch are followed through it.

    Attributes:
        reader: The samples of tensors.
        func: The operator.
        named: Its arguments by name, with defaults.
        outs: Its results.
    """

    reader: Reader
    func: Any
    named: Mapping[str, Any]
    outs: Sequence[Tensor]

    @property
    def name(self) -> str:
        """Name of the operator, without its overload."""
        return str(self.func.overloadpacket.__name__)

    def sets(self, name: str) -> Sets:
        """Return the samples of a required argument."""
        return self.reader.read(self.named[name])

    def sets_if_any(self, name: str) -> Sets:
        """Return the samples of an optional argument."""
        return self.reader.read(self.named.get(name))

    def all_of(self, values: Iterable[Any]) -> Sets:
        """Return the union over all elements of some arguments."""
        return union(*(_all(self.reader.read(tensor)) for tensor in operands_of(list(values))))

    def all_except(self, names: Sequence[str]) -> Sets:
        """Return the union of the samples of all elements of all arguments except ``names``."""
        return self.all_of(value for name, value in self.named.items() if name not in names)

    def functional(self) -> Operation:
        """Replace an in-place operator by its out-of-place variant."""
        if not self.name.endswith("_"):
            return self
        packet = getattr(torch.ops.aten, self.name[:-1])
        return self._replace(func=getattr(packet, torch_private.overload_name(self.func)))

    def results(self, rule: Rule) -> Sequence[Sets]:
        """Apply a rule, and return the samples of each result."""
        sets = rule(self)
        return sets if isinstance(sets, list) else [sets] * len(self.outs)


Rule = Callable[[Operation], "Sets | list[Sets]"]
"""Function that returns the samples of each result of an operation, or one value for all results."""


def operands_of(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or results of an operator, also in lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from operands_of(value)


def union(*sets: Tensor | None) -> Tensor | None:
    """Return the union of samples, broadcast like the elements of their tensors."""
    result: Tensor | None = None
    for tensor in sets:
        if tensor is None:
            continue
        if result is None:
            result = tensor
            continue
        dims = max(tensor.dim(), result.dim())
        result = torch.minimum(_aligned(tensor, dims), _aligned(result, dims))
    return result


def _aligned(sets: Tensor, dims: int) -> Tensor:
    """Insert axes of size 1 after the channels, like broadcasting to ``dims`` dimensions."""
    return sets.reshape(sets.shape[0], *[1] * (dims - sets.dim()), *sets.shape[1:])


def _over(sets: Tensor | None, dims: Sequence[int], keep: bool = True) -> Tensor | None:
    """Return the union of samples along some axes of their tensor."""
    if sets is None or not dims:
        return sets
    count = sets.dim() - 1
    return sets.amin([dim % count + 1 for dim in dims], keepdim=keep) if count else sets


def _all(sets: Tensor | None) -> Tensor | None:
    return None if sets is None else sets.flatten(1).amin(1)


def _leading(sets: Tensor | None, dims: int) -> Tensor | None:
    """Return the union over all but the first axis, shaped to broadcast to ``dims`` dimensions."""
    if sets is None or sets.dim() < 2:
        return sets
    if sets.dim() > 2:
        sets = sets.flatten(2).amin(2)
    return sets.reshape(*sets.shape, *[1] * (dims - 1))


# --- families of operators ----------------------------------------------------------------------------


def _everything(op: Operation) -> Sets | list[Sets]:
    """Give each result the samples of all arguments, the rule of operators that have no other rule."""
    return op.all_of(op.named.values())


def _nothing(op: Operation) -> Sets | list[Sets]:
    """Return None for an operator whose results do not depend on values of its arguments.

    Examples are zeros of the same shape and random numbers.
    """
    return None


def _pointwise(op: Operation) -> Sets | list[Sets]:
    return union(*(op.reader.read(tensor) for tensor in operands_of(list(op.named.values()))))


def _same(op: Operation) -> Sets | list[Sets]:
    """Reshape the samples of the first argument to the first result. Other results have no samples."""
    sets = op.reader.read(next(operands_of(list(op.named.values()))))
    if sets is not None:
        sets = sets.reshape(sets.shape[0], *op.outs[0].shape)
    return [sets, *[None] * (len(op.outs) - 1)]


def _reduced(op: Operation) -> Sets | list[Sets]:
    if torch.Tag.pointwise in op.func.tags:
        return _pointwise(op)  # max or min of two tensors
    sets = op.sets("self")
    dims = op.named.get("dim")
    if sets is None or dims is None or dims == []:
        return _everything(op)
    dims = [dims] if isinstance(dims, int) else list(dims)
    return _over(sets, dims, bool(op.named.get("keepdim", False)))


def _along(op: Operation) -> Sets | list[Sets]:
    """Return the samples of an operator such as softmax or sort: the union along its axes.

    The operator may change the sizes of these axes.
    """
    dims = op.named.get("dim", -1)
    dims = [dims] if isinstance(dims, int) else list(dims)
    return _over(op.sets("self"), dims)


def _product(first: str, second: str, *added: str) -> Rule:
    """Return the rule of a matrix product, batched or not."""

    def rule(op: Operation) -> Sets | list[Sets]:
        left = _over(op.sets(first), [-1])
        right = _over(op.sets(second), [-2])
        return union(left, right, *(op.sets_if_any(name) for name in added))

    return rule


def _rows(*names: str) -> Rule:
    """Return the rule of a function of each vector along the last axis of ``names``.

    Each result also depends on all elements of the other arguments.
    """

    def rule(op: Operation) -> Sets | list[Sets]:
        met = union(*(_over(op.sets(name), [-1]) for name in names), op.all_except(names))
        return [met, *[_all(met)] * (len(op.outs) - 1)]

    return rule


def _each_first(*names: str) -> Rule:
    """Return the rule of a function of each slice along the first axis of ``names``.

    Each result also depends on all elements of the other arguments.
    """

    def rule(op: Operation) -> Sets | list[Sets]:
        other = op.all_except(names)
        return [
            union(*(_leading(op.sets(name), out.dim()) for name in names), other) for out in op.outs
        ]

    return rule


def _normalized(op: Operation) -> Sets | list[Sets]:
    count = len(op.named["normalized_shape"])
    own = _over(op.sets("input"), list(range(-count, 0)))
    return union(own, _all(op.sets("weight")), _all(op.sets_if_any("bias")))


def batch_normalized(op: Operation) -> Sets | list[Sets]:
    """Give each output element of a batch norm the samples of its input element.

    In training, the statistics depend on all samples, which does not count as mixing samples.
    """
    return [op.sets("input"), *[None] * (len(op.outs) - 1)]


def _attention(op: Operation) -> Sets | list[Sets]:
    mask = "attn_bias" if op.named.get("attn_mask") is None else "attn_mask"
    met = union(
        _over(op.sets("query"), [-1]),
        # There may be fewer heads of keys than of queries.
        _over(op.sets("key"), [1, 2, 3]),
        _over(op.sets("value"), [1, 2, 3]),
        _over(op.sets_if_any(mask), [-1]),
    )
    batch = len(op.outs[0])
    # Other results are sums for the backward, with the same samples, and states of random generators.
    auxiliary = [
        _leading(met, out.dim()) if out.dim() > 1 and len(out) == batch else None
        for out in op.outs[1:]
    ]
    return [met, *auxiliary]


def _embedded(op: Operation) -> Sets | list[Sets]:
    ids = op.sets("indices")
    return union(None if ids is None else ids.unsqueeze(-1), _all(op.sets("weight")))


def _recurrent(op: Operation) -> Sets | list[Sets]:
    """Return the samples of a recurrent layer.

    The input is [time, sample, feature] or [sample, time, feature]. The states are [.., sample, feature].
    """
    if op.named.get("batch_sizes"):
        return _everything(op)
    first = bool(op.named.get("batch_first")) and op.name == "_cudnn_rnn"
    x = op.sets("input")
    x = _over(x, [1, 2] if first else [0, 2])
    x = None if x is None else x.flatten(1)
    for name in ("hx", "hx_", "cx", "cx_"):
        state = op.sets_if_any(name)
        if state is not None:
            state = _over(state, [d for d in range(state.dim() - 1) if d != state.dim() - 3])
            assert state is not None
            x = union(x, state.flatten(1))
    if x is None:
        return None
    by_sample = x[:, :, None] if not first else x[:, :, None, None]
    results: list[Sets] = [by_sample]
    for out in op.outs[1:]:
        fits = out.dim() >= 2 and out.shape[-2] == x.shape[1]
        results.append(x[:, :, None] if fits else _all(x))
    return results


# --- operators that move elements -------------------------------------------------------------------


def _channels(op: Operation, moved: Sequence[str]) -> int:
    tensors = (tensor for name in moved for tensor in operands_of(op.named.get(name)))
    known = (op.reader.read(tensor) for tensor in tensors)
    return max((len(sets) for sets in known if sets is not None), default=0)


def _full(reader: Reader, tensor: Tensor, channels: int) -> Tensor:
    sets = reader.read(tensor)
    if sets is None:
        shape = (channels, *tensor.shape)
        return torch.full(shape, reader.empty, dtype=reader.dtype, device=tensor.device)
    return sets


def _moved(*moved: str, fill: str = "") -> Callable[[Operation], Sets]:
    """Return the rule of an operator that moves elements: apply the operator to the samples."""

    def rule(op: Operation) -> Sets:
        count = _channels(op, moved)
        if not count:
            return None
        arguments = dict(op.named)
        if fill:
            arguments[fill] = op.reader.empty
        results = []
        for channel in range(count):
            for name in moved:
                value = op.named[name]
                if isinstance(value, Tensor):
                    arguments[name] = _full(op.reader, value, count)[channel]
                elif isinstance(value, list | tuple):
                    arguments[name] = [_full(op.reader, item, count)[channel] for item in value]
            results.append(_called(op.func, arguments))
        return torch.stack(results)

    return rule


def _called(func: Any, named: Mapping[str, Any]) -> Tensor:
    arguments = torch_private.schema_of(func).arguments
    args = [named[argument.name] for argument in arguments if not argument.kwarg_only]
    only = (argument.name for argument in arguments if argument.kwarg_only)
    result: Tensor = func(*args, **{name: named[name] for name in only if name in named})
    return result


def _note_placed(reader: Reader, x: Any, indices: Mapping[int, Tensor]) -> None:
    """Note it if values of the batch decide which sample an element belongs to.

    So does an index, or a mask, that is computed from the batch, along an axis on which samples differ.
    """
    sets = reader.read(x)
    if sets is None:
        return
    for dim, index in indices.items():
        if reader.read(index) is None:
            continue
        axes = range(dim, dim + (index.dim() if index.dtype in (torch.bool, torch.uint8) else 1))
        for axis in axes:
            if not torch.equal(sets, sets.narrow(axis + 1, 0, 1).expand_as(sets)):
                reader.note_position_by_values()
        if index.dtype in (torch.bool, torch.uint8):
            reader.note_position_by_values()


def _where_empty(reader: Reader, sets: Sets, other: Sets) -> Sets:
    """Return ``sets``, with ``other`` for elements that have no samples."""
    if sets is None or other is None:
        return other if sets is None else sets
    dims = max(sets.dim(), other.dim())
    sets, other = _aligned(sets, dims), _aligned(other, dims)
    has = (sets != reader.empty).any(0, keepdim=True)
    return torch.where(has, sets, other)


def _selected(op: Operation) -> Sets | list[Sets]:
    """Return the samples of ``index_select`` and ``gather``: those of the selected elements.

    For ``index_select``, elements without samples get the samples of their index.
    """
    index, dim = op.named["index"], op.named["dim"]
    if not op.named["self"].dim():
        return _everything(op)
    dim %= op.named["self"].dim()
    _note_placed(op.reader, op.named["self"], {dim: index})
    sets = _moved("self")(op)
    chosen = op.reader.read(index)
    if chosen is not None and op.name == "index_select":
        shape = [1] * op.named["self"].dim()
        shape[dim] = -1
        chosen = chosen.reshape(len(chosen), *shape)
    return _where_empty(op.reader, sets, chosen)


def _indexed(op: Operation) -> Sets | list[Sets]:
    """Return the samples of ``x[i, j]``."""
    indices = op.named["indices"]
    by_dim: dict[int, Tensor] = {}
    dim = 0
    for index in indices:
        if index is not None:
            by_dim[dim] = index
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        dim += index.dim() if masks else 1
    _note_placed(op.reader, op.named["self"], by_dim)
    sets = _moved("self")(op)
    chosen = union(*(op.reader.read(index) for index in by_dim.values()))
    if chosen is None:
        return sets
    if any(index.dtype in (torch.bool, torch.uint8) for index in by_dim.values()):
        return _where_empty(op.reader, sets, _all(chosen))
    numbers = list(by_dim)
    together = numbers == list(range(numbers[0], numbers[-1] + 1))
    before = numbers[0] if together else 0
    after = op.outs[0].dim() - before - (chosen.dim() - 1)
    chosen = chosen.reshape(len(chosen), *[1] * before, *chosen.shape[1:], *[1] * after)
    return _where_empty(op.reader, sets, chosen)


def _accumulated(op: Operation) -> Sets | list[Sets]:
    """Return the samples of index_add and scatter_add: the union of all values that are added."""
    name = op.name.removesuffix("_")
    source = "source" if name == "index_add" else "src"
    count = _channels(op, ("self", source))
    _note_placed(
        op.reader,
        op.named[source],
        {op.named["dim"] % max(1, op.named["self"].dim()): op.named["index"]},
    )
    if not count or not op.named["self"].dim():
        return _everything(op)
    x, more = (_full(op.reader, op.named[argument], count) for argument in ("self", source))
    dim, index = op.named["dim"] % op.named["self"].dim(), op.named["index"]
    if name == "index_add":
        index = index.reshape([-1 if axis == dim else 1 for axis in range(more.dim() - 1)])
        index = index.expand(more.shape[1:])
    if index.shape != more.shape[1:]:
        return _everything(op)
    index = index.expand(more.shape)
    return x.scatter_reduce(dim + 1, index, more, "amin")


def _put(op: Operation) -> Sets | list[Sets]:
    """Return the samples of ``x[i, j] = values``."""
    if op.named.get("accumulate"):
        return _everything(op)
    if any(op.reader.read(index) is not None for index in op.named["indices"] if index is not None):
        op.reader.note_position_by_values()
    return _moved("self", "values")(op.functional())


def _copied_to(source: str) -> Rule:
    """Return the rule of index_copy, scatter and masked_scatter, which copy elements of ``source``."""

    def rule(op: Operation) -> Sets | list[Sets]:
        index = op.named.get("index", op.named.get("mask"))
        if isinstance(index, Tensor) and op.reader.read(index) is not None:
            op.reader.note_position_by_values()
        if not isinstance(op.named.get(source), Tensor):
            return _pointwise(op)
        return _moved("self", source)(op.functional())

    return rule


def _data_dependent(op: Operation) -> Sets | list[Sets]:
    """Return the samples of results whose shape depends on values, such as those of ``nonzero``."""
    met = op.all_of(op.named.values())
    if met is not None:
        op.reader.note_position_by_values()
    return met


def _copied(op: Operation) -> Sets | list[Sets]:
    return op.sets("src")


_FAMILIES: tuple[tuple[Rule, str], ...] = (
    (_copied, "copy"),
    (_everything, "addbmm _index_put_impl"),
    (_product("self", "mat2"), "mm bmm _int_mm"),
    (_product("mat1", "mat2", "self"), "addmm _addmm_activation"),
    (_product("batch1", "batch2", "self"), "baddbmm"),
    (_rows("input"), "linear"),
    (_each_first("input"), "convolution convolution_overrideable _convolution native_group_norm"),
    (
        _each_first("self"),
        (
            "mkldnn_convolution avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d "
            "_adaptive_avg_pool3d adaptive_max_pool2d max_pool2d_with_indices max_pool3d_with_indices "
            "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
            "upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa "
            "_upsample_bicubic2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d "
            "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
            "replication_pad3d im2col col2im"
        ),
    ),
    (_normalized, "native_layer_norm _fused_rms_norm"),
    (_each_first("input_gates", "hidden_gates", "cx"), "_thnn_fused_lstm_cell"),
    (_each_first("input_gates", "hidden_gates", "hx"), "_thnn_fused_gru_cell"),
    (_recurrent, "mkldnn_rnn_layer _cudnn_rnn"),
    (_embedded, "embedding"),
    (_indexed, "index _unsafe_index"),
    (_selected, "index_select gather"),
    (_accumulated, "index_add scatter_add"),
    (_put, "index_put"),
    (_copied_to("source"), "index_copy masked_scatter"),
    (_copied_to("src"), "scatter"),
    (_pointwise, "masked_fill"),
    (_moved("tensors"), "cat stack"),
    (_moved("self", fill="value"), "constant_pad_nd"),
    (
        _same,
        (
            "native_dropout tril triu clone contiguous _to_copy detach alias lift_fresh _unsafe_view "
            "_reshape_alias view_copy _conj_physical"
        ),
    ),
    (_data_dependent, "nonzero masked_select bincount _unique2 unique_dim unique_consecutive"),
    (
        _along,
        (
            "_softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin sort topk _fft_r2c "
            "_fft_c2r _fft_c2c"
        ),
    ),
    (
        _moved("self"),
        "repeat roll flip pixel_shuffle pixel_unshuffle unfold_copy expand_copy channel_shuffle",
    ),
    (_moved("self", "src"), "slice_scatter select_scatter diagonal_scatter"),
    (
        batch_normalized,
        (
            "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
            "_batch_norm_with_update _batch_norm_no_update cudnn_batch_norm miopen_batch_norm"
        ),
    ),
    (
        _attention,
        (
            "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
            "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
            "_scaled_dot_product_fused_attention_overrideable"
        ),
    ),
    (_each_first("input", "grid"), "grid_sampler_2d grid_sampler_3d"),
    (
        _reduced,
        (
            "sum mean amax amin any all prod var std argmax argmin max min logsumexp norm "
            "linalg_vector_norm var_mean std_mean nansum"
        ),
    ),
    (
        _nothing,
        (
            "zero zeros_like ones_like empty_like full_like rand_like randn_like randint_like "
            "new_zeros new_ones new_empty new_full new_empty_strided"
        ),
    ),
)
_RULES = {name: rule for rule, names in _FAMILIES for name in names.split()}

# Operators that fill a tensor in place, with numbers as parameters.
_FILLED = {
    *("fill_", "bernoulli_", "uniform_", "normal_"),
    *("random_", "exponential_", "cauchy_", "log_normal_"),
}


def rule_of(func: Any) -> Rule:
    """Return the rule of an operator, in-place or not."""
    name = func.overloadpacket.__name__
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    if func.overloadpacket.__name__ in _FILLED and torch_private.overload_name(func) != "Tensor":
        return _nothing
    if name in _RULES:
        return _RULES[name]
    quantized = row_operators()
    if name in quantized:
        return _rows(quantized[name])
    return _pointwise if torch.Tag.pointwise in func.tags else _everything


def is_elementwise(func: Any) -> bool:
    """Return True if an operator computes each element from the same element of its arguments.

    The operator must not draw random numbers, or write into its arguments.
    """
    if torch.Tag.nondeterministic_seeded in func.tags or torch_private.schema_of(func).is_mutable:
        return False
    return rule_of(func) is _pointwise or func.overloadpacket.__name__ == "_to_copy"
