"""Which parameters a model multiplies with its data: counted below autograd, not read off a graph.

This is the other witness to what is found in graphs. It watches the operators that PyTorch dispatches
and follows values by their storage, so that it needs no trace and knows no pattern.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fx.passes.graph.copies import storage_of

__all__ = ["Count", "count_weights"]

# Which arguments of an operator can be weights; every one of the list where one is a list.
_OPERANDS: dict[str, tuple[int, ...]] = {
    "addbmm": (1, 2),
    "addmm": (1, 2),
    "addmv": (1, 2),
    "baddbmm": (1, 2),
    "bmm": (0, 1),
    "convolution": (1,),
    "dot": (0, 1),
    "embedding": (0,),
    "_embedding_bag": (0,),
    "_embedding_bag_forward_only": (0,),
    "_grouped_mm": (0, 1),
    "_scaled_grouped_mm": (0, 1),
    "gru": (2, 3),
    "linear": (1,),
    "lstm": (2, 3),
    "mkldnn_rnn_layer": (1, 2),
    "mm": (0, 1),
    "mv": (0, 1),
    "_native_multi_head_attention": (5, 7),
    "_transformer_encoder_layer_fwd": (3, 5, 14, 16),
    "rnn_relu": (2, 3),
    "rnn_tanh": (2, 3),
}
_VECTORS = {"addmv", "dot", "mv"}  # elsewhere a vector is a bias
# What these give holds the first argument's values, whatever chose them.
_SELECT = {"gather", "index", "index_select", "take", "_unsafe_index"}
# Values as they were, in other storage.
_COPY = {"_to_copy", "cat", "clone", "constant_pad_nd", "contiguous", "copy", "stack"}


@dataclass(frozen=True)
class Count:
    """What was counted.

    Attributes:
        direct: Parameters that are a weight of a linear operation as they are, or reshaped, cast
            or in parts. Each entry is all the names of one parameter.
        computed: Weights that are computed: the parameters that each is computed from.
    """

    direct: tuple[frozenset[str], ...]
    computed: tuple[frozenset[str], ...]


def count_weights(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Count:
    """Runs the model once, as it is, and counts.

    Args:
        model: Any module; a call must leave it as it was.
        args: Positional arguments of one call.
        kwargs: Its keyword arguments.
    """
    watch = _Watch(model, (args, kwargs))
    # With gradients: the fast paths of nn.MultiheadAttention, one operator each, are then off.
    with torch.enable_grad(), watch:
        model(*args, **kwargs)
    direct = tuple(frozenset(names) for names in sorted(map(sorted, watch.direct)))
    computed = tuple(frozenset(names) for names in sorted(map(sorted, watch.computed)))
    return Count(direct, computed)


@dataclass(frozen=True)
class _Origin:
    """What a value is made of, if it is made of parameters alone."""

    names: frozenset[frozenset[str]]
    direct: bool


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Follows values by storage: a parameter's, computed from parameters, data, or neither."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.direct: set[frozenset[str]] = set()
        self.computed: set[frozenset[str]] = set()
        # An address is not given to another storage while there is a weak reference to the first.
        self._held: dict[int, StorageWeakRef] = {}
        self._named: list[torch.Tensor] = []
        self._data = {storage_of(tensor) for tensor in _tensors(inputs)}
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(storage_of(parameter), set()).add(name)
        self._origin = {
            storage: _Origin(frozenset({frozenset(group)}), direct=True)
            for storage, group in names.items()
        }
        self._parameters = frozenset(names)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operator and notes what its results are made of."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _OPERANDS:
            self._note(name, args)
            self._becomes_data(result)
            return result
        given = list(_tensors(args[:1])) if name in _SELECT else list(_tensors((args, kwargs)))
        if any(storage_of(tensor) in self._data for tensor in given):
            self._becomes_data(result)
            return result
        origins = [self._origin[s] for t in given if (s := storage_of(t)) in self._origin]
        if origins:
            copied = name in _SELECT or name in _COPY
            self._becomes(result, origins, copied and all(o.direct for o in origins))
        return result

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        least = 1 if name in _VECTORS else 2
        operands = [
            [
                self._origin[s]
                for t in _tensors((args[i],))
                if t.dim() >= least and (s := storage_of(t)) in self._origin
            ]
            for i in _OPERANDS[name]
            if i < len(args)
        ]
        if name in ("mm", "addmm", "bmm", "baddbmm") and all(operands):
            # Both are parameters: a learnt query through a layer, say. The layer's comes second.
            operands = operands[1:] if any(o.direct for o in operands[1]) else operands[:1]
        for origin in (origin for group in operands for origin in group):
            if origin.direct:
                self.direct |= origin.names
            else:
                self.computed.add(frozenset(n for group in origin.names for n in group))

    def _becomes_data(self, result: Any) -> None:
        for tensor in _tensors((result,)):
            self._hold(tensor)
            if storage_of(tensor) not in self._parameters:
                self._origin.pop(storage_of(tensor), None)
                self._data.add(storage_of(tensor))

    def _becomes(self, result: Any, origins: list[_Origin], direct: bool) -> None:
        merged = _Origin(frozenset().union(*(o.names for o in origins)), direct)
        for tensor in _tensors((result,)):
            self._hold(tensor)
            # A view has the storage, and with it the origin, of what it is a view of.
            self._origin.setdefault(storage_of(tensor), merged)

    def _hold(self, tensor: torch.Tensor) -> None:
        if tensor.layout is torch.strided and storage_of(tensor) not in self._held:
            held = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # of torch
            self._held[storage_of(tensor)] = held
        elif tensor.layout is not torch.strided:
            self._named.append(tensor)  # it is known by its own address


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor))
