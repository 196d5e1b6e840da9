"""Running at fixed shapes and fixed addresses, which is what a CUDA graph is captured from.

A captured graph repeats its kernels on the memory that they saw. So every input, output and factor has
a buffer that never moves: a run writes its inputs into theirs, and a switch of adapters writes the
factors, filled up with zeros to the highest rank that there may be.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.export.adapters import AdapterInput, HeldAdapter, Manifest, SiteInputs
from lora_fx.export.ort import BF16, CPU, Device, Port, reason_of, settle, to_tensor

__all__ = ["MAX_SHAPES", "StaticRunner", "filled_up"]

MAX_SHAPES = 16
"""How many combinations of input shapes have a graph, and buffers, of their own."""

_GRAPH_ID = "gpu_graph_id"
_NO_CAPTURE = "-1"


@dataclass(frozen=True)
class _Graph:
    """The buffers and the binding of one combination of shapes."""

    inputs: Mapping[str, Any]
    outputs: tuple[Any, ...]
    binding: Any
    options: Any


class StaticRunner:
    """Runs a session from buffers, one run at a time.

    Args:
        runtime: The onnxruntime module.
        session: Its session.
        outputs: The outputs of the file.
        manifest: The adapter inputs; None for a file without.
        max_rank: The rank that factors are filled up to.
        device: Where the session runs.
    """

    def __init__(
        self,
        runtime: Any,
        session: Any,
        outputs: Sequence[Port],
        manifest: Manifest | None,
        max_rank: int,
        device: Device,
    ) -> None:
        self._runtime = runtime
        self._session = session
        self._outputs = tuple(outputs)
        self._sites = manifest.sites if manifest else ()
        self._max_rank = max_rank
        self._device = device
        self._lock = threading.Lock()
        self._graphs: dict[tuple[tuple[str, tuple[int, ...]], ...], _Graph] = {}
        self._loaded: HeldAdapter | None = None
        self._factors: dict[str, Any] = {}

    def run(
        self,
        feeds: Mapping[str, Any],
        adapter: HeldAdapter,
        device: Device,
        host: Collection[str] = (),
    ) -> list[Any]:
        """Run once.

        Args:
            feeds: Values for the inputs of the model.
            adapter: What to run with.
            device: Where the results are to lie.
            host: Outputs that are to lie on the CPU all the same.

        Returns:
            Values with memory of their own, in the order of the outputs.

        Raises:
            ExportError: ONNX Runtime fails, or there are too many shapes.
        """
        try:
            with self._lock:
                self._switch(adapter)
                graph = self._graph(feeds)
                for name, value in feeds.items():
                    self._write(graph.inputs[name], to_tensor(value))
                self._session.run_with_iobinding(graph.binding, graph.options)
                return [
                    self._taken(value, CPU if port.name in host else device)
                    for port, value in zip(self._outputs, graph.outputs, strict=True)
                ]
        except ExportError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape()}" for name, value in feeds.items())
            raise ExportError(
                f"ONNX Runtime failed on {shapes}, in a graph: {reason_of(error)}"
            ) from error

    def _switch(self, adapter: HeldAdapter) -> None:
        """Writes the factors of an adapter, unless they are there already."""
        if self._loaded is adapter:
            return
        self._loaded = None  # what an error leaves half written is written again
        for site in self._sites:
            for one in site.inputs():
                value = filled_up(site, one, adapter.values.get(one.name), self._max_rank)
                if one.name not in self._factors:
                    self._factors[one.name] = self._buffer(value.shape, _element(value))
                self._write(self._factors[one.name], value)
        self._loaded = adapter

    def _graph(self, feeds: Mapping[str, Any]) -> _Graph:
        key = tuple((name, tuple(value.shape())) for name, value in sorted(feeds.items()))
        if key not in self._graphs:
            if len(self._graphs) >= MAX_SHAPES:
                raise ExportError(
                    f"a session with cuda_graph=True keeps buffers for {MAX_SHAPES} combinations of input "
                    "shapes, and this is one more: pad the inputs to a few sizes, or run it without"
                )
            self._graphs[key] = self._prepared(feeds, len(self._graphs) + 1)
        return self._graphs[key]

    def _prepared(self, feeds: Mapping[str, Any], number: int) -> _Graph:
        inputs = {
            name: self._buffer(value.shape(), value.element_type()) for name, value in feeds.items()
        }
        for name, value in feeds.items():
            self._write(inputs[name], to_tensor(value))
        # A first run says how large the outputs are. It must not be captured: they move.
        binding = self._bound(inputs)
        for port in self._outputs:
            binding.bind_output(port.name, self._device.kind, self._device.index)
        self._session.run_with_iobinding(binding, self._options(_NO_CAPTURE))
        outputs = tuple(
            self._buffer(value.shape(), value.element_type()) for value in binding.get_outputs()
        )
        binding = self._bound(inputs)
        for port, value in zip(self._outputs, outputs, strict=True):
            binding.bind_ortvalue_output(port.name, value)
        return _Graph(inputs, outputs, binding, self._options(str(number)))

    def _bound(self, inputs: Mapping[str, Any]) -> Any:
        binding = self._session.io_binding()
        for name, value in (*inputs.items(), *self._factors.items()):
            binding.bind_ortvalue_input(name, value)
        return binding

    def _options(self, graph: str) -> Any:
        options = self._runtime.RunOptions()
        options.add_run_config_entry(_GRAPH_ID, graph)
        return options

    def _buffer(self, shape: Sequence[int], element: Any) -> Any:
        return self._runtime.OrtValue.ortvalue_from_shape_and_type(
            list(shape), element, self._device.kind, self._device.index
        )

    def _write(self, buffer: Any, value: Tensor) -> None:
        if not value.numel():
            return
        if value.is_cuda:
            to_tensor(buffer).copy_(value)
            settle([value])
            return
        value = value.contiguous()
        # The bytes are copied as they are, and numpy has no bf16.
        raw = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
        buffer.update_inplace(raw.numpy())

    def _taken(self, buffer: Any, device: Device) -> Any:
        """A copy that owns its memory: the next run writes into the buffer."""
        taken = self._runtime.OrtValue.ortvalue_from_shape_and_type(
            buffer.shape(), buffer.element_type(), device.kind, device.index
        )
        if self._device.kind == "cpu" or torch.cuda.is_available():
            value = to_tensor(buffer)
        else:
            value = torch.from_numpy(buffer.numpy())
        self._write(taken, value if device.kind != "cpu" else value.cpu())
        return taken


def filled_up(site: SiteInputs, one: AdapterInput, value: Tensor | None, max_rank: int) -> Tensor:
    """A factor at the highest rank: what is beyond its own rank is zero, and so adds nothing.

    Args:
        site: Where it is.
        one: Which factor, bias or gain.
        value: It, or None for an adapter that is not at this site.
        max_rank: That rank; for a grouped convolution the next multiple of its groups.
    """
    groups = site.groups
    rank = -(-max_rank // groups) * groups
    whole = torch.full(one.sized(rank), one.neutral, dtype=getattr(torch, one.dtype))
    if value is None:
        return whole
    axis = one.rank_axis
    if axis is None:
        return value
    if one.role == "A" and groups > 1:
        # The ranks of one group come after those of another.
        size = len(value) // groups
        whole.view(groups, -1, *whole.shape[1:])[:, :size] = value.view(
            groups, size, *value.shape[1:]
        )
        return whole
    whole.narrow(axis, 0, value.shape[axis]).copy_(value)
    return whole


def _element(value: Tensor) -> Any:
    return BF16 if value.dtype == torch.bfloat16 else value.contiguous().numpy().dtype
