"""New weights of an export that have no memory: each is computed when something reads it, and then dropped.

A merged or cast weight is a function of weights that the caller has. So only the function is stored (the
recipe), and the modules hold a stand-in: a tensor whose memory is never written. A view of a stand-in is
recognized by its address. Two readers find the recipe in this way: a dispatch mode, which computes the values
before an operator runs, and :meth:`Deferred.link`, which makes a graph compute its weights when they are
written to a file.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_fx import torch_private

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Deferred"]


@dataclass
class _Entry:
    """Record of one deferred weight.

    Attributes:
        stand_in: The tensor without memory in place of the weight, contiguous.
        make: Computes the weight; None if ``stand_in`` has the values.
    """

    stand_in: Tensor
    make: Callable[[], Tensor] | None


class Deferred(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Weights that are computed when they are read, and the mode under which operators read them.

    Code that runs a model has to run under the mode. A trace reads no values, so it has to run without.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self._entries: dict[int, _Entry] = {}
        self._starts: list[int] = []

    def add(self, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that stands for a weight. It takes no memory until something writes into it.

        Args:
            like: A tensor of the shape and dtype of the weight.
            make: Computes the weight. It is called at each read, and has to return the same values.
        """
        # The system gives no memory to pages that are never written.
        with torch_private.disable_dispatch_modes():
            stand_in = torch.empty(like.shape, dtype=like.dtype)
        start = stand_in.data_ptr()
        self._entries[start] = _Entry(stand_in, make)
        bisect.insort(self._starts, start)
        return stand_in

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and compute the deferred weights that it reads.

        An operator that returns a view of a weight reads no values.
        """
        kwargs = kwargs or {}
        if not any(map(self._entry_of, _operands((*args, *kwargs.values())))):
            return func(*args, **kwargs)
        schema = torch_private.schema_of(func)
        if any(argument.is_write for argument in _aliases(schema.arguments)):
            self._keep_written(schema, args, kwargs)
        elif any(_aliases(schema.returns)) and not torch_private.is_composite(func):
            return func(*args, **kwargs)  # a composite one, such as a cast, may return a copy
        args, kwargs = torch_private.pytree.tree_map(self._read, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)

    def _read(self, value: Any) -> Any:
        entry = self._entry_of(value)
        if entry is None or entry.make is None:
            return value
        return self._values(entry).as_strided(value.shape, value.stride(), value.storage_offset())

    def _entry_of(self, value: Any) -> _Entry | None:
        if (
            not self._entries
            or type(value) not in (Tensor, nn.Parameter)
            or value.layout is not torch.strided
        ):
            return None
        return self._entries.get(value.untyped_storage().data_ptr())

    def _values(self, entry: _Entry) -> Tensor:
        assert entry.make is not None
        with self, torch.no_grad():  # the recipe may read other deferred weights
            values = entry.make()
        stand_in = entry.stand_in
        assert (values.shape, values.dtype) == (stand_in.shape, stand_in.dtype)
        return values.contiguous()

    def _keep_written(self, schema: Any, args: Any, kwargs: Any) -> None:
        """Compute the deferred weights that an operator writes into, and keep their values in memory."""
        named = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
        named |= kwargs
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                torch_private.pytree.tree_map(self._settle, named.get(argument.name))

    def _settle(self, value: Any) -> None:
        entry = self._entry_of(value)
        if entry is not None and entry.make is not None:
            values = self._values(entry)
            entry.make = None
            with torch_private.disable_dispatch_modes(), torch.no_grad():
                entry.stand_in.copy_(values)

    def link(self, model: ir.Model, used: Iterable[Tensor]) -> bool:
        """Make an ONNX graph compute its deferred weights when it is written to a file.

        Args:
            model: The graph, with weights that are views of stand-ins. It is changed in place.
            used: The weights that the exported program reads.

        Returns:
            False if the conversion read the values of a stand-in, so that the graph has no view of it. The
            stand-in has the values of its weight from now on: convert the program again.
        """
        seen: set[int] = set()
        for value in model.graph.initializers.values():
            tensor = value.const_value
            view = None if tensor is None else self._view(tensor)
            if view is not None:
                seen.add(view[0].stand_in.data_ptr())
                value.const_value = self._lazy(tensor, *view)
        missing = [
            tensor
            for tensor in used
            if (entry := self._entry_of(tensor)) is not None
            and entry.make is not None
            and entry.stand_in.data_ptr() not in seen
        ]
        for tensor in missing:
            self._settle(tensor)
        return not missing

    def _view(
        self, tensor: ir.TensorProtocol
    ) -> tuple[_Entry, tuple[int, ...], tuple[int, ...], int] | None:
        """Return the deferred weight behind a constant, and the constant's sizes, strides and offset in it.

        Strides and offset are in elements. Return None for a constant that is no view of a stand-in.
        """
        raw: Any = getattr(tensor, "raw", None)
        if isinstance(raw, Tensor):
            entry = self._entry_of(raw)
            shape, strides, offset = tuple(raw.shape), raw.stride(), int(raw.storage_offset())
        elif isinstance(raw, np.ndarray):
            address = raw.ctypes.data
            index = bisect.bisect_right(self._starts, address) - 1
            entry = self._entries[self._starts[index]] if index >= 0 else None
            if entry is None or address >= entry.stand_in.data_ptr() + entry.stand_in.nbytes:
                return None
            size = entry.stand_in.element_size()
            if raw.itemsize != size:
                return None
            shape, strides = raw.shape, tuple(stride // size for stride in raw.strides)
            offset = (address - entry.stand_in.data_ptr()) // size
        else:
            return None
        if entry is None or entry.make is None:
            return None
        return entry, shape, strides, offset

    def _lazy(
        self,
        tensor: Any,
        entry: _Entry,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
    ) -> ir.LazyTensor:
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor

        name, dtype = tensor.name, tensor.dtype

        def make() -> ir.TensorProtocol:
            values = self._values(entry).as_strided(shape, strides, offset)
            return TorchTensor(values.contiguous(), name=name)

        return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)


def _operands(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, list | tuple) else (value,)


def _aliases(values: Iterable[Any]) -> Iterable[Any]:
    return [value.alias_info for value in values if value.alias_info is not None]
