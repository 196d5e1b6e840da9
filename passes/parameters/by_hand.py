"""Buffers that training changed (batch-norm statistics): they are part of what was learned."""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from lora_fx.formats import quantization_of
from lora_fx.ir import Record, join, record_of
from lora_fx.passes.graph import is_lazy, is_region, storage_of
from lora_fx.passes.parameters.replacements import base_modules, base_parameters

__all__ = [
    "buffer_digests",
    "changed_buffers",
    "claim",
    "claim_unfrozen",
    "is_guarded",
    "note_by_hand",
    "persistent_buffers",
    "protect",
    "replaced_modules",
    "trained_by_hand",
    "trained_starts",
    "unprotect",
]


# Storages are copied from an address that every dtype can begin at.
_ALIGNED = 16


def protect(model: nn.Module) -> None:
    """Has every frozen parameter of the base get storage of its own with its first gradient.

    Args:
        model: A copy over the weights of another model. What is protected already is left as it is.
    """
    root = weakref.ref(model)
    for parameter in _distinct(model):
        if parameter.requires_grad or is_guarded(parameter) or not _can_train(parameter):
            continue
        # Autograd takes hooks of what wants a gradient only, and keeps them afterwards.
        parameter.requires_grad_(True)
        parameter.register_hook(_Guard(parameter, root))  # type: ignore[no-untyped-call]
        parameter.requires_grad_(False)
    for _, module in base_modules(model):
        if not isinstance(module, torch.jit.ScriptModule) and not any(_load_hooks(module)):
            module.register_load_state_dict_pre_hook(_claim_loaded)  # type: ignore[no-untyped-call]


def unprotect(model: nn.Module) -> None:
    """Takes off what :func:`protect` has put on modules, of a copy: none of its parameters has a hook."""
    for module in model.modules():
        for key in list(_load_hooks(module)):
            del module._load_state_dict_pre_hooks[key]


def is_guarded(parameter: torch.Tensor) -> bool:
    """Whether :func:`protect` has seen a parameter. A copy of it, which shares nothing, is not guarded."""
    hooks = getattr(parameter, "_backward_hooks", None) or {}
    return any(isinstance(hook, _Guard) for hook in hooks.values())


def claim(parameter: torch.Tensor) -> None:
    """Gives a parameter storage of its own, before it is written into; nothing if it has that."""
    hooks = getattr(parameter, "_backward_hooks", None) or {}
    for hook in list(hooks.values()):
        if isinstance(hook, _Guard):
            hook(None)


def claim_unfrozen(model: nn.Module) -> None:
    """Gives storage of its own to what has been unfrozen by hand, before it has a gradient."""
    for parameter in _distinct(model):
        if parameter.requires_grad:
            claim(parameter)


def note_by_hand(model: nn.Module) -> None:
    """Notes in the record of a rewritten model what is trained by hand now, so that it stays known."""
    record = record_of(model)
    if record is None:
        return
    found = frozenset(trained_by_hand(model, record))
    if found != record.by_hand:
        model.__dict__["_lora_fx"] = dataclasses.replace(record, by_hand=found)


def trained_by_hand(model: nn.Module, record: Record) -> dict[str, nn.Parameter]:
    """The base's parameters that are, or were, trained and that no adapter trains, by each of their names.

    Those of a module that somebody has put in the place of one of the base are among them.

    Args:
        model: A rewritten model.
        record: Its record.
    """
    owned = {name for adapter in record.active for name in record.adapters[adapter].own}
    there = base_parameters(model)
    replaced = tuple(f"{name}." for name in replaced_modules(model, record))
    return {
        name: parameter
        for name, parameter in there.items()
        if name not in owned
        and (parameter.requires_grad or name in record.by_hand or name.startswith(replaced))
    }


def trained_starts(model: nn.Module, record: Record) -> Iterator[tuple[str, str]]:
    """Weights that want a gradient where an initialization has put them, and the adapter of each."""
    for adapter in record.active:
        entry = record.adapters[adapter]
        weights = {row.site.weight for row in entry.sites} - set(entry.given)
        for name in entry.own:
            if name in weights and model.get_parameter(name).requires_grad:
                yield name, adapter


def replaced_modules(model: nn.Module, record: Record) -> Iterator[str]:
    """FQNs of the modules that were put where there was a region at the rewrite."""
    if not any(is_guarded(parameter) for parameter in _distinct(model)):
        return  # it is a copy, in which nothing tells what is new
    for fqn, module in base_modules(model):
        if fqn in record.base.graphs and not is_region(module):
            held = [p for p in module.parameters() if type(p) is nn.Parameter]
            if held and not any(is_guarded(p) or p.is_meta for p in held):
                yield fqn


class _Guard:
    """The hook of one parameter."""

    # What goes to another process needs no hook, since it shares nothing with the user's model there.
    __torch_unserializable__ = True

    def __init__(self, parameter: nn.Parameter, root: weakref.ref[nn.Module]) -> None:
        self.parameter = TensorWeakRef(parameter)
        self.root = root
        self.claimed = False

    def __call__(self, gradient: torch.Tensor | None) -> None:
        parameter, root = self.parameter(), self.root()
        if self.claimed or parameter is None:
            return
        self.claimed = True
        record = None if root is None else record_of(root)
        there = {} if root is None else base_parameters(root)
        group = _together(parameter, there.values())
        _give_storage(group)
        if root is not None and record is not None:
            members = {id(one) for one in group}
            names = frozenset(name for name, one in there.items() if id(one) in members)
            root.__dict__["_lora_fx"] = dataclasses.replace(record, by_hand=record.by_hand | names)


def _load_hooks(module: nn.Module) -> Iterator[int]:
    """Keys of the hook in a module."""
    for key, hook in module._load_state_dict_pre_hooks.items():
        # torch wraps it.
        if getattr(hook, "hook", hook) is _claim_loaded:
            yield key


def _claim_loaded(
    module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any
) -> None:
    """Before a module is loaded: what a state dict has other values for gets storage of its own."""
    if metadata.get("assign_to_params_buffers"):
        return  # nothing is written: parameters are exchanged
    for name, parameter in module._parameters.items():
        value = state.get(prefix + name)
        if parameter is None or not isinstance(value, torch.Tensor) or not is_guarded(parameter):
            continue
        if parameter.is_meta or value.is_meta or parameter.shape != value.shape:
            continue
        if not torch.equal(parameter, value.to(parameter.device, parameter.dtype)):
            claim(parameter)


def _distinct(model: nn.Module) -> Iterator[nn.Parameter]:
    seen: set[int] = set()
    for _, module in base_modules(model):
        # What is scripted was copied, and shares nothing.
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def _can_train(parameter: nn.Parameter) -> bool:
    return (
        not is_lazy(parameter)
        and (parameter.is_floating_point() or parameter.is_complex())
        and not parameter.is_inference()
        and quantization_of(parameter) is None
    )


def _together(parameter: nn.Parameter, others: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """A parameter and those that have bytes in common with it: what is tied by its storage stays tied."""
    group = {id(parameter): parameter}
    if not _is_plain(parameter):
        return [parameter]
    storage = storage_of(parameter)
    same = {id(one): one for one in others if _is_plain(one) and storage_of(one) == storage}
    while True:
        low, high = _span(group.values())
        found = {
            key: one
            for key, one in same.items()
            if _extent(one)[0] < high and low < _extent(one)[1]
        }
        if found.keys() <= group.keys():
            return list(group.values())
        group |= found


def _give_storage(group: list[nn.Parameter]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        if not _is_plain(group[0]):
            group[0].data = group[0].detach().clone()
            return
        low, high = _span(group)
        low -= low % _ALIGNED
        old = torch.empty(0, dtype=torch.uint8, device=group[0].device)
        whole = old.set_(group[0].untyped_storage(), low, (high - low,), (1,)).clone()
        for one in group:
            place = (_extent(one)[0] - low) // one.element_size()
            view = torch.empty(0, dtype=one.dtype, device=one.device)
            one.data = view.set_(whole.untyped_storage(), place, one.shape, one.stride())


def _is_plain(parameter: torch.Tensor) -> bool:
    return type(parameter) is nn.Parameter and parameter.layout is torch.strided


def _span(group: Iterable[torch.Tensor]) -> tuple[int, int]:
    ends = [_extent(one) for one in group]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte of a tensor in its storage, the last one excluded."""
    start = int(tensor.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = start + sum((int(size) - 1) * int(stride) for size, stride in steps)
    end = last + 1 if tensor.numel() else start
    return start * tensor.element_size(), end * tensor.element_size()


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a state dict has, by FQN.

    No state dict is made for it: quantized embeddings of bitsandbytes refuse that.
    """
    kept = {
        join(fqn, key)
        for fqn, module in model.named_modules(remove_duplicate=False)
        # A script module has them in something that says its keys by no iteration.
        for key in module._buffers.keys()  # noqa: SIM118
        if key not in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def buffer_digests(model: nn.Module) -> dict[str, str]:
    """A fingerprint of every persistent buffer, by FQN."""
    found = persistent_buffers(model).items()
    return {name: _digest(buffer) for name, buffer in found if buffer.device.type != "meta"}


def changed_buffers(model: nn.Module, record: Record) -> Iterator[tuple[str, torch.Tensor]]:
    """The persistent buffers that are not what they were at the rewrite, or whose module is new."""
    buffers = dict(model.named_buffers())
    new = tuple(f"{name}." for name in replaced_modules(model, record))
    for name, digest in buffer_digests(model).items():
        if name.startswith(new) or record.buffers.get(name, digest) != digest:
            yield name, buffers[name]


def _digest(buffer: torch.Tensor) -> str:
    data = buffer.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()
