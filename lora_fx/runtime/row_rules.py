"""Says to which samples of a batch the results of an operator belong, given that of its arguments.

The samples that an element was computed from are an interval: the least number and the negated greatest, so
that the union of two is their elementwise minimum, for both. Nothing at all is ``(EMPTY, EMPTY)``. The
intervals of a tensor of shape ``[...]`` are one of shape ``[channels, ...]``, and reductions, products and
broadcasts of the tensor are minima of that.

A rule may give more samples than there are, never fewer. So an operator that has none gives each result the
samples of all its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_fx.formats import row_operators

__all__ = [
    "Named",
    "Reader",
    "Rule",
    "batch_normalized",
    "rule_of",
    "tensors_in",
    "union",
]


class Reader(Protocol):
    """What a rule asks of what is known so far."""

    empty: int
    dtype: torch.dtype

    def read(self, tensor: Any) -> Tensor | None:
        """The samples of each element, [channels, *shape]; None if no element has one."""

    def placed(self) -> None:
        """Notes that values of the batch decide where an element lies."""


Named = Mapping[str, Any]
Rule = Callable[[Reader, Any, Named, Sequence[Tensor]], "Sequence[Tensor | None]"]


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, in lists, too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


def union(*sets: Tensor | None) -> Tensor | None:
    """The samples of elements that meet by broadcasting."""
    result: Tensor | None = None
    for one in sets:
        if one is None:
            continue
        if result is None:
            result = one
            continue
        dims = max(one.dim(), result.dim())
        result = torch.minimum(_aligned(one, dims), _aligned(result, dims))
    return result


def _aligned(sets: Tensor, dims: int) -> Tensor:
    """The same with axes of one element behind the channels, as broadcasting adds them."""
    return sets.reshape(sets.shape[0], *[1] * (dims - sets.dim()), *sets.shape[1:])


def _over(sets: Tensor | None, dims: Sequence[int], keep: bool = True) -> Tensor | None:
    """The union along axes of the tensor."""
    if sets is None or not dims:
        return sets
    count = sets.dim() - 1
    return sets.amin([dim % count + 1 for dim in dims], keepdim=keep) if count else sets


def _all(sets: Tensor | None) -> Tensor | None:
    return None if sets is None else sets.flatten(1).amin(1)


def _leading(sets: Tensor | None, dims: int) -> Tensor | None:
    """The union of all but the first axis, for a result of some number of axes with the same first axis."""
    if sets is None or sets.dim() < 2:
        return sets
    if sets.dim() > 2:
        sets = sets.flatten(2).amin(2)
    return sets.reshape(*sets.shape, *[1] * (dims - 1))


# --- families of operators ----------------------------------------------------------------------------


def _everything(
    reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Each result may be computed from everything."""
    met = union(*(_all(reader.read(one)) for one in tensors_in(list(named.values()))))
    return [met] * len(outs)


def _nothing(_: Reader, __: Any, ___: Named, outs: Sequence[Tensor]) -> list[Tensor | None]:
    """Values that do not depend on the arguments: zeros of the same shape, random numbers."""
    return [None] * len(outs)


def _pointwise(reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]) -> list[Tensor | None]:
    met = union(*(reader.read(one) for one in tensors_in(list(named.values()))))
    return [met] * len(outs)


def _same(reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]) -> list[Tensor | None]:
    """The first argument's elements in their order, in whatever shape; other results are not of the batch."""
    sets = reader.read(next(tensors_in(list(named.values()))))
    if sets is not None:
        sets = sets.reshape(sets.shape[0], *outs[0].shape)
    return [sets, *[None] * (len(outs) - 1)]


def _reduced(
    reader: Reader, func: Any, named: Named, outs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    sets = reader.read(named["self"])
    dims = named.get("dim")
    if sets is None or dims is None or dims == []:
        return _everything(reader, func, named, outs)
    dims = [dims] if isinstance(dims, int) else list(dims)
    return [_over(sets, dims, bool(named.get("keepdim", False)))] * len(outs)


def _along(reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]) -> list[Tensor | None]:
    """Every element along some axes may be computed from all of these axes, which may change their sizes."""
    dims = named.get("dim", -1)
    dims = [dims] if isinstance(dims, int) else list(dims)
    return [_over(reader.read(named["self"]), dims)] * len(outs)


def _product(first: str, second: str, *added: str) -> Rule:
    """A matrix product, or one of each of a batch."""

    def rule(reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]) -> list[Tensor | None]:
        left = _over(reader.read(named[first]), [-1])
        right = _over(reader.read(named[second]), [-2])
        met = union(left, right, *(reader.read(named.get(name)) for name in added))
        return [met] * len(outs)

    return rule


def _rows(*names: str) -> Rule:
    """A function of each vector along the last axis, and of everything in the other arguments."""

    def rule(reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]) -> list[Tensor | None]:
        rest = [value for name, value in named.items() if name not in names]
        met = union(
            *(_over(reader.read(named[name]), [-1]) for name in names),
            *(_all(reader.read(one)) for one in tensors_in(rest)),
        )
        return [met, *[_all(met)] * (len(outs) - 1)]

    return rule


def _each_first(*names: str) -> Rule:
    """A function of each slice along the first axis, and of everything in the other arguments."""

    def rule(reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]) -> list[Tensor | None]:
        rest = [value for name, value in named.items() if name not in names]
        other = union(*(_all(reader.read(one)) for one in tensors_in(rest)))
        results = []
        for out in outs:
            mine = (_leading(reader.read(named[name]), out.dim()) for name in names)
            results.append(union(*mine, other))
        return results

    return rule


def _normalized(
    reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]
) -> list[Tensor | None]:
    count = len(named["normalized_shape"])
    met = union(
        _over(reader.read(named["input"]), list(range(-count, 0))),
        _all(reader.read(named["weight"])),
        _all(reader.read(named.get("bias"))),
    )
    return [met] * len(outs)


def batch_normalized(
    reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]
) -> list[Tensor | None]:
    """In training the statistics are of the whole batch; the elements are still those of their samples."""
    return [reader.read(named["input"]), *[None] * (len(outs) - 1)]


def _attention(reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]) -> list[Tensor | None]:
    mask = named.get("attn_mask")
    mask = named.get("attn_bias") if mask is None else mask
    met = union(
        _over(reader.read(named["query"]), [-1]),
        # Heads of keys may be fewer.
        _over(reader.read(named["key"]), [1, 2, 3]),
        _over(reader.read(named["value"]), [1, 2, 3]),
        _over(reader.read(mask), [-1]),
    )
    batch = len(outs[0])
    # Beside the output are sums that the backward needs, of the same samples, and states of generators.
    rest = [
        _leading(met, out.dim()) if out.dim() > 1 and len(out) == batch else None
        for out in outs[1:]
    ]
    return [met, *rest]


def _embedded(reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]) -> list[Tensor | None]:
    ids = reader.read(named["indices"])
    met = union(None if ids is None else ids.unsqueeze(-1), _all(reader.read(named["weight"])))
    return [met] * len(outs)


def _recurrent(
    reader: Reader, func: Any, named: Named, outs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """A layer of [time, sample, feature], or [sample, time, feature], and states [.., sample, feature]."""
    if named.get("batch_sizes"):
        return _everything(reader, func, named, outs)
    first = bool(named.get("batch_first")) and func.overloadpacket.__name__ == "_cudnn_rnn"
    x = reader.read(named["input"])
    x = _over(x, [1, 2] if first else [0, 2])
    x = None if x is None else x.flatten(1)
    for name in ("hx", "hx_", "cx", "cx_"):
        state = reader.read(named.get(name))
        if state is not None:
            state = _over(state, [d for d in range(state.dim() - 1) if d != state.dim() - 3])
            assert state is not None
            x = union(x, state.flatten(1))
    if x is None:
        return [None] * len(outs)
    by_sample = x[:, :, None] if not first else x[:, :, None, None]
    results: list[Tensor | None] = [by_sample]
    for out in outs[1:]:
        fits = out.dim() >= 2 and out.shape[-2] == x.shape[1]
        results.append(x[:, :, None] if fits else _all(x))
    return results


# --- operators that move elements -------------------------------------------------------------------


def _channels(reader: Reader, named: Named, moved: Sequence[str]) -> int:
    found = (reader.read(one) for name in moved for one in tensors_in(named.get(name)))
    return max((len(sets) for sets in found if sets is not None), default=0)


def _full(reader: Reader, tensor: Tensor, channels: int) -> Tensor:
    sets = reader.read(tensor)
    if sets is None:
        shape = (channels, *tensor.shape)
        return torch.full(shape, reader.empty, dtype=reader.dtype, device=tensor.device)
    return sets


def _moved(*moved: str, fill: str = "") -> Rule:
    """An operator that does with the samples what it does with the elements."""

    def rule(
        reader: Reader, func: Any, named: Named, outs: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        count = _channels(reader, named, moved)
        if not count:
            return [None] * len(outs)
        given = dict(named)
        if fill:
            given[fill] = reader.empty
        results = []
        for channel in range(count):
            for name in moved:
                value = named[name]
                if isinstance(value, Tensor):
                    given[name] = _full(reader, value, count)[channel]
                elif isinstance(value, list | tuple):
                    given[name] = [_full(reader, one, count)[channel] for one in value]
            results.append(_called(func, given))
        return [torch.stack(results)] * len(outs)

    return rule


def _called(func: Any, named: Named) -> Tensor:
    args = [named[one.name] for one in func._schema.arguments if not one.kwarg_only]
    only = (one.name for one in func._schema.arguments if one.kwarg_only)
    result: Tensor = func(*args, **{name: named[name] for name in only if name in named})
    return result


def _note_placed(reader: Reader, x: Any, indices: Mapping[int, Tensor]) -> None:
    """Notes if other values of the batch in the indices would give the elements of other samples."""
    sets = reader.read(x)
    if sets is None:
        return
    for dim, index in indices.items():
        if reader.read(index) is None:
            continue
        axes = range(dim, dim + (index.dim() if index.dtype in (torch.bool, torch.uint8) else 1))
        for axis in axes:
            if not torch.equal(sets, sets.narrow(axis + 1, 0, 1).expand_as(sets)):
                reader.placed()
        if index.dtype in (torch.bool, torch.uint8):
            reader.placed()


def _where_empty(reader: Reader, sets: Tensor | None, other: Tensor | None) -> Tensor | None:
    """What was chosen has the samples of its elements, or, where it has none, those of the choice."""
    if sets is None or other is None:
        return other if sets is None else sets
    dims = max(sets.dim(), other.dim())
    sets, other = _aligned(sets, dims), _aligned(other, dims)
    has = (sets != reader.empty).any(0, keepdim=True)
    return torch.where(has, sets, other)


def _selected(
    reader: Reader, func: Any, named: Named, outs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """index_select and gather."""
    index, dim = named["index"], named["dim"]
    if not named["self"].dim():
        return _everything(reader, func, named, outs)
    dim %= named["self"].dim()
    _note_placed(reader, named["self"], {dim: index})
    (sets,) = _moved("self")(reader, func, named, outs)
    chosen = reader.read(index)
    if chosen is not None and func.overloadpacket.__name__ == "index_select":
        shape = [1] * named["self"].dim()
        shape[dim] = -1
        chosen = chosen.reshape(len(chosen), *shape)
    return [_where_empty(reader, sets, chosen)]


def _indexed(
    reader: Reader, func: Any, named: Named, outs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """``x[i, j]``."""
    indices = named["indices"]
    places: dict[int, Tensor] = {}
    dim = 0
    for one in indices:
        if one is not None:
            places[dim] = one
        masks = one is not None and one.dtype in (torch.bool, torch.uint8)
        dim += one.dim() if masks else 1
    _note_placed(reader, named["self"], places)
    (sets,) = _moved("self")(reader, func, named, outs)
    chosen = union(*(reader.read(one) for one in places.values()))
    if chosen is None:
        return [sets]
    if any(one.dtype in (torch.bool, torch.uint8) for one in places.values()):
        return [_where_empty(reader, sets, _all(chosen))]
    numbers = list(places)
    together = numbers == list(range(numbers[0], numbers[-1] + 1))
    before = numbers[0] if together else 0
    after = outs[0].dim() - before - (chosen.dim() - 1)
    chosen = chosen.reshape(len(chosen), *[1] * before, *chosen.shape[1:], *[1] * after)
    return [_where_empty(reader, sets, chosen)]


def _accumulated(
    reader: Reader, func: Any, named: Named, outs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """index_add and scatter_add: what meets in one place has the samples of all of it."""
    name = func.overloadpacket.__name__.removesuffix("_")
    source = "source" if name == "index_add" else "src"
    count = _channels(reader, named, ("self", source))
    _note_placed(
        reader, named[source], {named["dim"] % max(1, named["self"].dim()): named["index"]}
    )
    if not count or not named["self"].dim():
        return _everything(reader, func, named, outs)
    x, more = (_full(reader, named[one], count) for one in ("self", source))
    dim, index = named["dim"] % named["self"].dim(), named["index"]
    if name == "index_add":
        index = index.reshape([-1 if axis == dim else 1 for axis in range(more.dim() - 1)])
        index = index.expand(more.shape[1:])
    if index.shape != more.shape[1:]:
        return _everything(reader, func, named, outs)
    index = index.expand(more.shape)
    return [x.scatter_reduce(dim + 1, index, more, "amin")]


def _put(
    reader: Reader, func: Any, named: Named, outs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """``x[i, j] = values``."""
    if named.get("accumulate"):
        return _everything(reader, func, named, outs)
    if any(reader.read(one) is not None for one in named["indices"] if one is not None):
        reader.placed()
    return _moved("self", "values")(reader, _functional(func), named, outs)


def _copied_to(source: str) -> Rule:
    """index_copy, scatter and masked_scatter: elements of the source in some places of x."""

    def rule(
        reader: Reader, func: Any, named: Named, outs: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        index = named.get("index", named.get("mask"))
        if isinstance(index, Tensor) and reader.read(index) is not None:
            reader.placed()
        if not isinstance(named.get(source), Tensor):
            return _pointwise(reader, func, named, outs)
        return _moved("self", source)(reader, _functional(func), named, outs)

    return rule


def _functional(func: Any) -> Any:
    """The operator of a new result that one in place has beside it."""
    packet = func.overloadpacket
    name = packet.__name__
    if not name.endswith("_"):
        return func
    return getattr(getattr(torch.ops.aten, name[:-1]), func._overloadname)


def _data_dependent(
    reader: Reader, func: Any, named: Named, outs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Results whose very shape follows the values."""
    results = _everything(reader, func, named, outs)
    if any(one is not None for one in results):
        reader.placed()
    return results


def _copied(reader: Reader, _: Any, named: Named, outs: Sequence[Tensor]) -> list[Tensor | None]:
    return [reader.read(named["src"])]


_RULES: dict[str, Rule] = {
    "copy": _copied,
    "addbmm": _everything,
    "mm": _product("self", "mat2"),
    "bmm": _product("self", "mat2"),
    "addmm": _product("mat1", "mat2", "self"),
    "_addmm_activation": _product("mat1", "mat2", "self"),
    "baddbmm": _product("batch1", "batch2", "self"),
    "_int_mm": _product("self", "mat2"),
    "linear": _rows("input"),
    "convolution": _each_first("input"),
    "convolution_overrideable": _each_first("input"),
    "mkldnn_convolution": _each_first("self"),
    "_convolution": _each_first("input"),
    "native_layer_norm": _normalized,
    "_fused_rms_norm": _normalized,
    "native_group_norm": _each_first("input"),
    "_thnn_fused_lstm_cell": _each_first("input_gates", "hidden_gates", "cx"),
    "_thnn_fused_gru_cell": _each_first("input_gates", "hidden_gates", "hx"),
    "mkldnn_rnn_layer": _recurrent,
    "_cudnn_rnn": _recurrent,
    "embedding": _embedded,
    "index": _indexed,
    "_unsafe_index": _indexed,
    "index_select": _selected,
    "gather": _selected,
    "index_add": _accumulated,
    "scatter_add": _accumulated,
    "index_put": _put,
    "_index_put_impl": _everything,
    "index_copy": _copied_to("source"),
    "scatter": _copied_to("src"),
    "masked_scatter": _copied_to("source"),
    "masked_fill": _pointwise,
    "cat": _moved("tensors"),
    "stack": _moved("tensors"),
    "constant_pad_nd": _moved("self", fill="value"),
    "native_dropout": _same,
    "tril": _same,
    "triu": _same,
    "nonzero": _data_dependent,
    "masked_select": _data_dependent,
    "bincount": _data_dependent,
    "_unique2": _data_dependent,
    "unique_dim": _data_dependent,
    "unique_consecutive": _data_dependent,
}
_RULES |= dict.fromkeys(
    [
        "_softmax",
        "_log_softmax",
        "cumsum",
        "cumprod",
        "logcumsumexp",
        "cummax",
        "cummin",
        "sort",
        "topk",
        "_fft_r2c",
        "_fft_c2r",
        "_fft_c2c",
    ],
    _along,
)
_RULES |= dict.fromkeys(
    [
        "clone",
        "contiguous",
        "_to_copy",
        "detach",
        "alias",
        "lift_fresh",
        "_unsafe_view",
        "_reshape_alias",
        "view_copy",
        "_conj_physical",
    ],
    _same,
)
_RULES |= dict.fromkeys(
    [
        "repeat",
        "roll",
        "flip",
        "pixel_shuffle",
        "pixel_unshuffle",
        "unfold_copy",
        "expand_copy",
        "channel_shuffle",
    ],
    _moved("self"),
)
_RULES |= dict.fromkeys(
    ("slice_scatter", "select_scatter", "diagonal_scatter"), _moved("self", "src")
)
_RULES |= dict.fromkeys(
    [
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_with_update",
        "_batch_norm_no_update",
        "cudnn_batch_norm",
        "miopen_batch_norm",
    ],
    batch_normalized,
)
_RULES |= dict.fromkeys(
    [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ],
    _attention,
)
_RULES |= dict.fromkeys(
    [
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_linear1d",
        "upsample_trilinear3d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "reflection_pad1d",
        "reflection_pad2d",
        "reflection_pad3d",
        "replication_pad1d",
        "replication_pad2d",
        "replication_pad3d",
        "im2col",
        "col2im",
    ],
    _each_first("self"),
)
_RULES["grid_sampler_2d"] = _RULES["grid_sampler_3d"] = _each_first("input", "grid")
_RULES |= dict.fromkeys(
    [
        "zero",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "randint_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_empty_strided",
    ],
    _nothing,
)
# In place, with numbers for parameters.
_FILLED = frozenset(
    [
        "fill_",
        "bernoulli_",
        "uniform_",
        "normal_",
        "random_",
        "exponential_",
        "cauchy_",
        "log_normal_",
    ]
)
_REDUCTIONS = frozenset(
    [
        "sum",
        "mean",
        "amax",
        "amin",
        "any",
        "all",
        "prod",
        "var",
        "std",
        "argmax",
        "argmin",
        "max",
        "min",
        "logsumexp",
        "norm",
        "linalg_vector_norm",
        "var_mean",
        "std_mean",
        "nansum",
    ]
)


def rule_of(func: Any) -> Rule:
    """The rule for an operator, in place or not."""
    name = func.overloadpacket.__name__
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    if func.overloadpacket.__name__ in _FILLED and func._overloadname != "Tensor":
        return _nothing
    if name in _RULES:
        return _RULES[name]
    quantized = row_operators()
    if name in quantized:
        return _rows(quantized[name])
    if torch.Tag.pointwise in func.tags:
        return _pointwise
    if name in _REDUCTIONS:
        # Of two tensors, max and min are pointwise.
        return _pointwise if func._overloadname == "other" else _reduced
    return _everything
