"""Decoder that runs a session step by step, with a key-value cache.

Each batch of texts has one I/O binding of ONNX Runtime. Constant inputs are bound once when the texts begin:
the factors of an adapter, and the outputs of the encoder. Each step binds its tokens, the mask, and the
buffers of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.export import ort
from lora_fx.export.adapter_store import AdapterChoice
from lora_fx.export.fuse import SHARED_CACHE_KEY
from lora_fx.export.ort import Place, Port

__all__ = ["Decoder", "Decodes", "last_logits"]


_PAST, _PRESENT = "past_key_values.", "present."
_CROSS = ".encoder."
_LOGITS = "logits"

_ROOM = 256
"""Least number of free positions in new buffers of a cache, up to the largest length of a text."""


class Decodes:
    """Interface through which a decoder uses a session.

    Attributes:
        path: Path of the file.
        inputs: Inputs of the file.
        outputs: Outputs of the file.
        metadata: Metadata entries of the file.
        encoder: The session of the encoder, for an encoder-decoder.
    """

    path: Path
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    metadata: Mapping[str, str]
    encoder: Decodes | None
    _runtime: Any
    _device: torch.device
    _replays_graphs: bool
    _inner_sizes: Sequence[str]
    _cache_place: torch.device | Place

    def _hold(self, adapter: AdapterChoice) -> Any:
        """Look up an adapter in the session of each file of the model, with no load or unload in between."""
        raise NotImplementedError

    def _value(self, port: Port, value: Tensor) -> Any:
        """Convert a tensor to the value of an input on the device of the session."""
        raise NotImplementedError

    def _run_held(self, feeds: Mapping[str, Any], adapters: Any) -> list[Any]:
        """Run the file once. Outputs are on the device of the session."""
        raise NotImplementedError

    def _binding(self, adapters: Any, rows: int) -> Any:
        """Make a binding for a batch of ``rows`` rows with an adapter."""
        raise NotImplementedError

    def _run_bound(self, binding: Any, shapes: Callable[[], Mapping[str, Sequence[int]]]) -> None:
        """Run the file on a binding. ``shapes`` returns the input shapes, for the message of an error."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Entry:
    """Keys or values of one layer of the cache: an input and an output of the file.

    Attributes:
        past: The input.
        present: Name of the output.
        heads: Number of heads.
        width: Width of a head.
    """

    past: Port
    present: str
    heads: int
    width: int

    @classmethod
    def of(cls, port: Port) -> _Entry:
        """Return the entry for an input of the file.

        Raises:
            ExportError: The heads or the width are not fixed.
        """
        _, heads, _, width = port.shape
        if not isinstance(heads, int) or not isinstance(width, int):
            raise ExportError(
                f"input {port} is no cache of this library: heads and width are not fixed"
            )
        return cls(port, _PRESENT + port.name.removeprefix(_PAST), heads, width)

    def shape(self, batch: int, length: int) -> list[int]:
        """Return the shape of a cache of ``length`` positions."""
        return [batch, self.heads, length, self.width]


@dataclass(eq=False)
class _BufferCache:
    """Key-value cache in preallocated buffers on the device of the session.

    Two sets of buffers are read and written in turn. A file whose attention appends in place (``shared``) has
    a single set, with room for more positions than are filled.

    Args:
        runtime: The onnxruntime module.
        entries: Keys and values of all layers.
        batch: Number of texts.
        limit: Largest number of positions.
        device: Device of the session.
        shared: True if a step reads and writes the same buffers.
    """

    runtime: Any
    entries: Sequence[_Entry]
    batch: int
    limit: int
    device: torch.device
    shared: bool
    _sets: list[dict[str, Any]] = field(default_factory=list)
    _room: int = 0

    def bind(self, binding: Any, past: int, total: int) -> None:
        """Bind the cache for a step that reads ``past`` positions and returns ``total`` positions."""
        grows = total > self._room
        old = self._sets
        if grows:
            self._room = min(self.limit, max(total + _ROOM, 2 * self._room))
            self._sets = [self._buffers() for _ in range(1 if self.shared else 2)]
            if self.shared and past:
                for name, buffer in self._sets[0].items():
                    ort.to_tensor(buffer)[:, :, :past] = ort.to_tensor(old[0][name])[:, :, :past]
        if self.shared:
            if grows:
                self._bind(binding, self._sets[0], self._sets[0], self._room, self._room)
            return
        # The last written buffers are read where they are, even if they are too small now.
        source = old[0] if grows and past else self._sets[0]
        self._bind(binding, source, self._sets[1], past, total)
        self._kept = source
        self._sets.reverse()

    def after_step(self, binding: Any) -> None:
        """Do nothing, because the step has written its keys and values into the buffers."""

    def reorder(self, rows: Tensor, past: int) -> None:
        """Reorder the cache for beam search: row i gets the cache of row ``rows[i]``."""
        if self.device.type != "cpu" and not torch.cuda.is_available():
            raise ExportError(
                f"beam search reorders a cache on {self.device.type} with PyTorch, and this PyTorch has no "
                "CUDA: install one that has, or generate with num_beams=1"
            )
        rows = rows.to(self.device)
        for entry in self.entries:
            value = ort.to_tensor(self._sets[0][entry.past.name])
            if self.shared:
                filled = value[:, :, :past]
                filled.copy_(filled[rows])
            else:
                shape = entry.shape(self.batch, past)
                filled = value.view(-1)[: math.prod(shape)].view(shape)
                filled.copy_(filled[rows])

    def _buffers(self) -> dict[str, Any]:
        return {
            entry.past.name: ort.allocate(
                self.runtime,
                entry.shape(self.batch, self._room),
                ort.element_named(entry.past.dtype),
                self.device,
            )
            for entry in self.entries
        }

    def _bind(
        self,
        binding: Any,
        source: Mapping[str, Any],
        target: Mapping[str, Any],
        past: int,
        total: int,
    ) -> None:
        kind, index = self.device.type, self.device.index
        for entry in self.entries:
            name, element = entry.past.name, ort.element_named(entry.past.dtype)
            address = source[name].data_ptr()
            binding.bind_input(name, kind, index, element, entry.shape(self.batch, past), address)
            address = target[name].data_ptr()
            shape = entry.shape(self.batch, total)
            binding.bind_output(entry.present, kind, index, element, shape, address)


@dataclass(eq=False)
class _ReturnedCache:
    """Key-value cache in memory that ONNX Runtime allocates at each step, for devices without PyTorch.

    Args:
        runtime: The onnxruntime module.
        entries: Keys and values of all layers.
        batch: Number of texts.
        device: Device of the outputs.
    """

    runtime: Any
    entries: Sequence[_Entry]
    batch: int
    device: torch.device | Place
    _values: dict[str, Any] = field(default_factory=dict)

    def bind(self, binding: Any, past: int, total: int) -> None:
        """Bind the cache for a step that reads ``past`` positions and returns ``total`` positions."""
        for entry in self.entries:
            if not past:
                empty = torch.zeros(
                    entry.shape(self.batch, 0), dtype=getattr(torch, entry.past.dtype)
                )
                self._values[entry.past.name] = ort.to_runtime(self.runtime, empty)
            binding.bind_ortvalue_input(entry.past.name, self._values[entry.past.name])
            binding.bind_output(entry.present, self.device.type, self.device.index)

    def after_step(self, binding: Any) -> None:
        """Keep the keys and values that a step returned, as inputs of the next step."""
        # Outputs come in the order in which they were bound, with the logits last.
        for entry, value in zip(self.entries, binding.get_outputs(), strict=False):
            self._values[entry.past.name] = value

    def reorder(self, rows: Tensor, past: int) -> None:
        """Reorder the cache for beam search, on the CPU: row i gets the cache of row ``rows[i]``."""
        for name, value in self._values.items():
            moved = torch.from_numpy(value.numpy())[rows]
            self._values[name] = ort.to_runtime(self.runtime, moved)


class Decoder:
    """Step-by-step run of a decoder on a batch of texts, with the key-value cache as state.

    Args:
        session: Session of the decoder's file.
        mask: Mask of the prompts, [batch, sequence]. Later tokens always count.
        source: Inputs of the encoder by name, for an encoder-decoder.
        adapter: The adapter to run with.
        length: Largest number of tokens of a text, the prompt included.
        copies: Number of consecutive rows of ``mask`` that continue one text of ``source``.

    Raises:
        ExportError: The file has no cache, the session replays graphs, or ``source`` does not fit
            the encoder.
    """

    def __init__(
        self,
        session: Decodes,
        mask: Tensor,
        source: Mapping[str, Tensor],
        adapter: AdapterChoice = None,
        *,
        length: int,
        copies: int = 1,
    ) -> None:
        if session._replays_graphs:
            raise ExportError(
                "cuda_graph=True is for calls of one shape, and a text grows with each token: open "
                "the session without it to generate"
            )
        self._session = session
        self._ports = {port.name: port for port in session.inputs}
        outputs = {port.name: port for port in session.outputs}
        cached = [port for port in session.inputs if port.name.startswith(_PAST)]
        if not cached or _LOGITS not in outputs:
            raise ExportError(
                f"{session.path.name} has no key-value cache to generate with: export the model "
                f"with task='text-generation' or task='text2text-generation'"
            )
        self._logits_port = outputs[_LOGITS]
        batch = len(mask)
        self._mask: Tensor | None = None
        if "attention_mask" in self._ports:
            self._mask = torch.ones(batch, length, dtype=self._dtype("attention_mask"))
            self._mask[:, : mask.shape[1]] = mask
        self._past = 0
        self._entries = [_Entry.of(port) for port in cached if _CROSS not in port.name]
        self._cache = self._new_cache(batch, length)
        # The adapter stays the same for the whole text, even if another is loaded under its name meanwhile.
        self._held = session._hold(adapter)
        self._binding = session._binding(self._held, batch)
        self._fixed: dict[str, Any] = {}
        if session.encoder is not None:
            self._fixed = self._encoded(session.encoder, source, copies)
        for name, value in self._fixed.items():
            self._binding.bind_ortvalue_input(name, value)
        self._inputs: dict[str, Tensor] = {}  # a binding does not own memory
        # A CPU session reads bound memory at each run, so new tokens can be written into it. For other
        # devices, the memory is copied when it is bound.
        self._rereads = session._cache_place == ort.CPU
        # Logits of the last step, or None if their shape is unknown before it.
        self._logits: Tensor | None = None
        self._new = 0  # tokens of the last step

    def step(self, ids: Tensor) -> Tensor:
        """Run the decoder over more tokens, and keep their keys and values in the cache.

        Args:
            ids: The next tokens of each text, [batch, sequence].

        Returns:
            Logits after the last token, [batch, vocabulary], fp32, on the CPU, as a copy.

        Raises:
            ExportError: ONNX Runtime fails, or a fixed axis of the file has another size.
        """
        new = ids.shape[1]
        past, total = self._past, self._past + new
        # Each step reads all weights, which empties the CPU's caches. A call of PyTorch or of a binding then
        # costs about ten microseconds, so there are as few as possible here.
        if self._rereads and new == self._new:
            self._inputs["input_ids"].copy_(ids)
        else:
            self._bind("input_ids", ids.to(self._dtype("input_ids"), copy=True))
        if self._mask is not None:
            self._bind("attention_mask", self._mask[:, :total])
        self._cache.bind(self._binding, past, total)
        if past == 0 or self._session._inner_sizes:
            self._check()
        if new != self._new:
            self._bind_logits()
            self._new = new
        self._session._run_bound(self._binding, self._shapes)
        self._cache.after_step(self._binding)
        self._past = total
        last = self._returned_logits()[:, -1] if self._logits is None else self._logits
        return last.to(torch.float32, copy=True)

    def reorder(self, rows: Tensor) -> None:
        """Reorder the cache for beam search: text i continues from text ``rows[i]``.

        Both texts must have the same mask and source.
        """
        self._cache.reorder(rows, self._past)

    def forget(self) -> None:
        """Drop the cache. The next step has to read the whole text."""
        self._past = 0

    def _new_cache(self, batch: int, length: int) -> _BufferCache | _ReturnedCache:
        cache_place = self._session._cache_place
        entries, runtime = self._entries, self._session._runtime
        if isinstance(cache_place, Place):
            return _ReturnedCache(runtime, entries, batch, cache_place)
        # On CUDA, appending in place is untested.
        shared = SHARED_CACHE_KEY in self._session.metadata and cache_place.type != "cuda"
        return _BufferCache(runtime, entries, batch, length, cache_place, shared)

    def _dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._ports[name].dtype)
        return dtype

    def _bind(self, name: str, value: Tensor) -> None:
        value = value.contiguous()
        self._inputs[name] = value
        element = ort.element_named(self._ports[name].dtype)
        self._binding.bind_input(name, "cpu", 0, element, list(value.shape), value.data_ptr())

    def _shapes(self) -> dict[str, list[int]]:
        """Return the shapes of the inputs of this step by name."""
        batch = len(self._inputs["input_ids"])
        return {
            **{name: value.shape() for name, value in self._fixed.items()},
            **{name: list(value.shape) for name, value in self._inputs.items()},
            **{entry.past.name: entry.shape(batch, self._past) for entry in self._entries},
        }

    def _check(self) -> None:
        """Raise if the file does not take the shapes of this step, as ``OnnxSession.run`` does."""
        session, shapes = self._session, self._shapes()
        for name, shape in shapes.items():
            ort.check_shape(self._ports[name], shape)
        inner = session._inner_sizes
        file = session.path.name
        ort.empty_outputs(session.inputs, session.outputs, shapes, file, inner=inner, task=True)

    def _bind_logits(self) -> None:
        port = self._logits_port
        sizes: dict[str, int] = {}
        for name, input_shape in self._shapes().items():
            labels = zip(self._ports[name].shape, input_shape, strict=True)
            sizes.update((label, size) for label, size in labels if isinstance(label, str))
        shape = [ort.size_of(axis, sizes) for axis in port.shape]
        known = [size for size in shape if size is not None]
        if len(known) < len(shape):
            self._logits = None
            self._binding.bind_output(port.name, "cpu", 0)
            return
        whole = torch.empty(known, dtype=getattr(torch, port.dtype))
        self._logits = whole[:, -1]
        element, address = ort.element_named(port.dtype), whole.data_ptr()
        self._binding.bind_output(port.name, "cpu", 0, element, known, address)

    def _returned_logits(self) -> Tensor:
        return ort.to_tensor(self._binding.get_outputs()[-1])  # bound last

    def _encoded(
        self, encoder: Decodes, source: Mapping[str, Tensor], copies: int
    ) -> dict[str, Any]:
        names = [port.name for port in encoder.outputs]
        input_names = [port.name for port in encoder.inputs]
        inputs = ort.inputs_by_name(source, input_names, encoder.path.name)
        feeds = {port.name: encoder._value(port, inputs[port.name]) for port in encoder.inputs}
        values = encoder._run_held(feeds, self._held)
        fixed = {
            _PAST + name.removeprefix(_PRESENT): value
            for name, value in zip(names, values, strict=True)
        }
        if "encoder_attention_mask" in self._ports:
            fixed["encoder_attention_mask"] = feeds["attention_mask"]
        if copies == 1:
            return fixed
        runtime, device = self._session._runtime, self._session._device
        return {
            name: ort.placed(runtime, ort.on_host(value).repeat_interleave(copies, dim=0), device)
            for name, value in fixed.items()
        }


def last_logits(
    session: Decodes, ids: Tensor, mask: Tensor, adapter: AdapterChoice = None
) -> Tensor:
    """Return the logits after the last token of each text, [batch, vocabulary], fp32, on the CPU.

    Texts may have padding on the right, because each text runs alone, without its masked tokens.
    """
    rows = []
    for tokens, counts in zip(ids, mask, strict=True):
        text = tokens[counts.bool()][None]
        length = text.shape[1]
        rows.append(Decoder(session, torch.ones_like(text), {}, adapter, length=length).step(text))
    return torch.cat(rows)
