"""Inputs of blocks that wait for the backward pass in the memory of the host.

A block that the backward computes again keeps only its input. On a device with separate memory, the input of
each block is copied to pinned memory of the host while the device computes the block. In the backward,
fetching the input of one block starts the copy of the input of the block before it. Both copies run on a
separate stream.

On a CPU there is no other memory, and tensors stay where they are. A planner can simulate the copies of a
device, to count their memory (:func:`simulated`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lora_fx import torch_private
from lora_fx.errors import ConfigError

__all__ = ["check_room", "on_host", "simulated"]

_log = logging.getLogger("lora_fx")

_SEPARATE = ("cuda", "xpu")  # types of devices with their own memory and with streams

_copier: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("lora_fx_host", default=None)


@contextlib.contextmanager
def simulated(copier: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a planner replace the copies to the host by ``copier``, for tensors of any device.

    The planner counts the memory of the copies.
    """
    token = _copier.set(copier)
    try:
        yield
    finally:
        _copier.reset(token)


class _HostCopy:
    """Copy of a tensor in the memory of the host.

    Attributes:
        host: The copy.
        device: The device of the tensor.
        version: The version counter of the tensor. After a write it needs another copy.
        before: Weak reference to the copy that was made before this one, which the backward needs next.
        fetched: The tensor on the device and the event after which it is complete, once the copy back has
            begun.
        simulated: True if the copy was made for a planner (:func:`simulated`).
    """

    def __init__(self, tensor: Tensor, version: int, before: weakref.ref[_HostCopy] | None) -> None:
        self.device, self.version, self.before = tensor.device, version, before
        self.fetched: tuple[Tensor, Any] | None = None
        copier = _copier.get()
        self.simulated = copier is not None
        if copier is not None:
            self.host = copier(tensor)
            return
        stream = _stream_of(tensor.device)
        devices = torch.get_device_module(tensor.device)
        stream.wait_stream(devices.current_stream(tensor.device))
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with devices.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        # The allocator must not reuse the memory before the copy is complete.
        tensor.record_stream(stream)

    def start(self) -> None:
        """Start the copy back to the device."""
        if self.fetched is None and self.simulated:
            self.fetched = torch.empty_like(self.host).copy_(self.host), None
        elif self.fetched is None:
            stream = _stream_of(self.device)
            with torch.get_device_module(self.device).stream(stream):
                tensor = self.host.to(self.device, non_blocking=True)
                self.fetched = tensor, stream.record_event()

    def fetch(self) -> Tensor:
        """Return the tensor on the device, and start the copy of the tensor that is needed next."""
        self.start()
        assert self.fetched is not None
        tensor, event = self.fetched
        self.fetched = None
        if event is not None:
            current = torch.get_device_module(self.device).current_stream(self.device)
            current.wait_event(event)
            tensor.record_stream(current)
        before = None if self.before is None else self.before()
        if before is not None:
            before.start()
        return tensor


_streams: dict[torch.device, Any] = {}


def _stream_of(device: torch.device) -> Any:
    """Return the stream on which tensors of a device are copied."""
    if device not in _streams:
        _streams[device] = torch.get_device_module(device).Stream(device)
    return _streams[device]


# A tensor that several blocks read, such as the output of an encoder, is copied once.
_copies: Any = WeakTensorKeyDictionary()
_last: ContextVar[weakref.ref[_HostCopy] | None] = ContextVar("lora_fx_last_copy", default=None)


def on_host(args: Sequence[Any], blocks: int) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autograd keeps the arguments of a block in the memory of the host.

    Masks and positions are shared by all blocks, and stay. On a device without its own memory, the context
    does nothing.

    Args:
        args: The arguments. Tensors of the shape and dtype of the first one are moved, and any that require a
            gradient.
        blocks: The number of blocks of the model.

    Raises:
        ConfigError: When the host has less free memory than a tensor needs.
    """
    first = next((arg for arg in args if type(arg) is Tensor and arg.is_floating_point()), None)
    if first is None or not (first.device.type in _SEPARATE or _copier.get() is not None):
        return contextlib.nullcontext()
    form = (first.shape, first.dtype)

    def pack(tensor: Tensor) -> Any:
        moves = tensor.requires_grad or (tensor.shape, tensor.dtype) == form
        return _copied(tensor, blocks) if moves and type(tensor) is Tensor else tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _copied(tensor: Tensor, blocks: int) -> _HostCopy:
    copy: _HostCopy | None = _copies.get(tensor)
    version = torch_private.version_counter(tensor)
    if copy is None or copy.version != version:
        if tensor.device.type in _SEPARATE:
            last = _last.get()
            is_first = last is None or last() is None
            check_room(tensor.numel() * tensor.element_size(), blocks if is_first else 1)
        copy = _copies[tensor] = _HostCopy(tensor.detach(), version, _last.get())
        _last.set(weakref.ref(copy))
    return copy


def _unpack(saved: Any) -> Tensor:
    return saved.fetch() if isinstance(saved, _HostCopy) else saved


def check_room(size: int, copies: int) -> None:
    """Check the free memory of the host.

    Args:
        size: The bytes of the next copy.
        copies: The number of copies of about this size that a step still makes. If they need more memory than
            is free, a warning is logged.

    Raises:
        ConfigError: If the next copy needs more memory than is free.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    remedy = "use shorter sequences or memory='balanced'"
    if size > free:
        raise ConfigError(
            f"memory='least' keeps the inputs of blocks in the memory of the host, and the next one takes "
            f"{size / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free: {remedy}"
        )
    if size * copies > free:
        _log.warning(
            "memory='least' keeps the inputs of %d blocks in the memory of the host: about %.1f GB in this "
            "step, and %.1f GB are free: %s",
            copies,
            size * copies / 1e9,
            free / 1e9,
            remedy,
        )
