"""The state of a rewritten model: what is trained by hand in it, what changed, and what it has lost.

A frozen parameter shares its memory with the model that was rewritten: it gets memory of its own before an
optimizer could write into it. Buffers that training changed (batch-norm statistics) are part of what was
learned.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from lora_fx import torch_private
from lora_fx.errors import CaptureError, ConfigError, some
from lora_fx.formats import quantization_of
from lora_fx.ir import PlannedSite, Record, join, record_of
from lora_fx.passes.graph import (
    is_lazy,
    is_owned,
    is_partitioned,
    original_class,
    own_partition,
    storage_of,
    without_zero_init,
)
from lora_fx.passes.parameters.factors import DROPOUT, factor_names, rows_name
from lora_fx.passes.parameters.replacements import KEPT, base_modules, base_parameters

__all__ = [
    "AroundModel",
    "buffer_digests",
    "changed_buffers",
    "check_intact",
    "claim",
    "claim_unfrozen",
    "digest_of",
    "inside",
    "is_guarded",
    "mark_adapted",
    "persistent_buffers",
    "protect",
    "trained_by_hand",
    "trained_starts",
    "unprotect",
    "without_wrappers",
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
        # Autograd takes hooks of what requires a gradient only, and keeps them afterwards.
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
            del torch_private.load_hooks(module)[key]


def is_guarded(parameter: torch.Tensor) -> bool:
    """Whether :func:`protect` has seen a parameter. A copy of it, which shares nothing, is not guarded."""
    hooks = torch_private.parameter_hooks(parameter)
    return any(isinstance(hook, _Guard) for hook in hooks.values())


def claim(parameter: torch.Tensor) -> None:
    """Gives a parameter storage of its own, before it is written into; nothing if it has that."""
    hooks = torch_private.parameter_hooks(parameter)
    for hook in list(hooks.values()):
        if isinstance(hook, _Guard):
            hook(None)


def claim_unfrozen(model: nn.Module) -> None:
    """Gives storage of its own to what has been unfrozen by hand, before it has a gradient."""
    for parameter in _distinct(model):
        if parameter.requires_grad:
            claim(parameter)


def _note_by_hand(model: nn.Module) -> None:
    """Notes in the record of a rewritten model what is trained by hand now, so that it stays known."""
    record = record_of(model)
    if record is None:
        return
    found = frozenset(trained_by_hand(model, record))
    if found != record.by_hand:
        model.__dict__["_lora_fx"] = dataclasses.replace(record, by_hand=found)


def trained_by_hand(model: nn.Module, record: Record) -> dict[str, nn.Parameter]:
    """The base's parameters that are, or were, trained and that no adapter trains, by each of their names.

    Those of a module that has replaced one of the base are among them.

    Args:
        model: A rewritten model.
        record: Its record.
    """
    owned = {name for adapter in record.active for name in record.adapters[adapter].own}
    there = base_parameters(model)
    replaced = tuple(f"{name}." for name in _replaced_modules(model, record))
    return {
        name: parameter
        for name, parameter in there.items()
        if name not in owned
        and (parameter.requires_grad or name in record.by_hand or name.startswith(replaced))
    }


def trained_starts(model: nn.Module, record: Record) -> Iterator[tuple[str, str]]:
    """Weights that require a gradient where an initialization has put them, and the adapter of each."""
    for adapter in record.active:
        entry = record.adapters[adapter]
        weights = {row.site.weight for row in entry.sites} - set(entry.given)
        for name in entry.own:
            if name in weights and model.get_parameter(name).requires_grad:
                yield name, adapter


def _replaced_modules(model: nn.Module, record: Record) -> Iterator[str]:
    """FQNs of the modules that were put where there was a region at the rewrite."""
    if not any(is_guarded(parameter) for parameter in _distinct(model)):
        return  # it is a copy, in which nothing tells what is new
    for fqn, module in base_modules(model):
        if fqn in record.base.graphs and not any(_load_hooks(module)):
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
        if not is_partitioned(parameter):
            _give_storage(group)
        elif root is None or not is_owned(root):
            # In an engine, what is trained has parts of its own already.
            own_partition(parameter)
        if root is not None and record is not None:
            members = {id(one) for one in group}
            names = frozenset(name for name, one in there.items() if id(one) in members)
            root.__dict__["_lora_fx"] = dataclasses.replace(record, by_hand=record.by_hand | names)


def _load_hooks(module: nn.Module) -> Iterator[int]:
    """Keys of the hook in a module."""
    for key, hook in torch_private.load_hooks(module).items():
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
    if not _is_plain(parameter) or is_partitioned(parameter):
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
        if key not in torch_private.transient_buffers(module)
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def buffer_digests(model: nn.Module) -> dict[str, str]:
    """A fingerprint of every persistent buffer, by FQN."""
    found = persistent_buffers(model).items()
    return {name: digest_of(buffer) for name, buffer in found if buffer.device.type != "meta"}


def changed_buffers(model: nn.Module, record: Record) -> Iterator[tuple[str, torch.Tensor]]:
    """The persistent buffers that are not what they were at the rewrite, or whose module is new."""
    buffers = dict(model.named_buffers())
    new = tuple(f"{name}." for name in _replaced_modules(model, record))
    for name, digest in buffer_digests(model).items():
        if name.startswith(new) or record.buffers.get(name, digest) != digest:
            yield name, buffers[name]


def digest_of(tensor: torch.Tensor) -> str:
    """The values of a tensor in few digits, whatever its shape and its layout."""
    found = hashlib.blake2b(digest_size=16)
    for part in _strided_parts(tensor.detach()):
        found.update(part.to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


_COMPRESSED = ("values", "crow_indices", "col_indices"), ("values", "ccol_indices", "row_indices")
_PARTS = {
    torch.sparse_coo: torch_private.SPARSE_PARTS,
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), _COMPRESSED[0]),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), _COMPRESSED[1]),
}
"""The methods that give what a sparse tensor holds."""


def _strided_parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    if tensor.is_nested:
        return tensor.unbind()
    if tensor.layout in _PARTS:
        return [getattr(tensor, name)() for name in _PARTS[tensor.layout]]
    return [tensor]


def check_intact(model: nn.Module, record: Record) -> None:
    """Refuses a model in which a layer that has an adapter was deleted or replaced after the rewrite.

    Args:
        model: A rewritten model.
        record: Its record.

    Raises:
        CaptureError: With every such place, and what to do.
    """
    lost = list(dict.fromkeys(_lost(model, record)))
    if not lost:
        return
    raise CaptureError(
        f"this {type(model).__name__} has lost what the rewrite put into it: layers were deleted or replaced "
        "since:\n  "
        + some(lost, 5, "\n  ")
        + "\nPut the layers back, or make the change in the original model and rewrite that "
        "(lora_fx.load_adapter gives it what was saved before)"
    )


def _lost(model: nn.Module, record: Record) -> Iterator[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for adapter, entry in record.adapters.items():
        for row in entry.sites:
            yield from _lost_at_site(modules, row, adapter)
        for tokens in entry.tokens:
            name = rows_name(tokens, adapter)
            if not _has(modules, name):
                found = _found(modules, tokens.site.holder)
                yield f"{tokens.name}: it has no trained rows of adapter {adapter!r}{found}"
        for name in entry.own:
            owner, _, leaf = name.rpartition(".")
            # That of an active adapter has replaced the base's.
            kept = name if adapter in record.active else join(owner, KEPT + leaf, adapter)
            if not _has(modules, kept):
                yield f"{name}: adapter {adapter!r} has its own value of it, and it is not there"
    for fqn in record.base.kept:
        if fqn not in modules:
            yield f"{fqn}: it is not there, and its quantized weight is known to its graph alone"


def _lost_at_site(modules: dict[str, nn.Module], row: PlannedSite, adapter: str) -> Iterator[str]:
    site = row.site
    if not _has(modules, site.weight):
        yield f"{row.name}: its weight {site.weight} is not there{_found(modules, site.owner)}"
        return
    for attribute in factor_names(row).present:
        if not _has(modules, join(site.holder, attribute, adapter)):
            found = _found(modules, site.holder)
            yield f"{row.name}: it has no {attribute} of adapter {adapter!r}{found}"
            return
    if row.dropout and join(site.holder, DROPOUT, adapter) not in modules:
        yield f"{row.name}: it has no {DROPOUT} of adapter {adapter!r}{_found(modules, site.holder)}"


def _found(modules: dict[str, nn.Module], fqn: str) -> str:
    """Say which module is where an adapter's parameters were."""
    module = modules.get(fqn)
    if module is None:
        return f" (there is no module {fqn})"
    if any(_load_hooks(module)):
        return ""  # it is the module that was rewritten, without its factors
    cls = original_class(module)
    return f" ({fqn or 'the model'} is a {cls.__module__}.{cls.__qualname__} now)"


def _has(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether there is such a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    module = modules.get(owner)
    if module is None:
        return False
    # Also a weight that is computed (torch.nn.utils.parametrize).
    return getattr(module, leaf, None) is not None


_COMPILED, _CHECKPOINTED = torch_private.ORIGINAL_MODULE, torch_private.CHECKPOINTED_MODULE
_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""For each rewritten model, what a thread holds while it changes it."""
_Verb = TypeVar("_Verb", bound=Callable[..., Any])


class AroundModel:
    """A module that is an interface of a rewritten model: verbs work on that."""

    def get_base_model(self) -> nn.Module:
        """Return the rewritten model."""
        raise NotImplementedError


def inside(verb: _Verb) -> _Verb:
    """Let a verb see through compiled models, and through compiled or checkpointed layers.

    What the verb returns is what it was given, where that is what it would return. Layers of a model that it
    makes of one that is not rewritten have the wrappers that they had in that.

    A transform of ``torch.func`` around the call does not reach what the verb computes.

    Raises:
        CaptureError: If a layer that has an adapter was deleted or replaced.
        ConfigError: If parameters of the model are those that such a transform differentiates.
    """

    @functools.wraps(verb)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        if torch_private.in_functorch_level():
            _check_not_transformed(verb.__name__, model)
            with torch_private.outside_of_transforms():
                return call(model, *args, **kwargs)
        if isinstance(model, nn.Module) and record_of(_unwrapped(model)) is None:
            return _in_original(verb, model, *args, **kwargs)
        with without_zero_init(), without_wrappers(model) as inner:
            result = verb(inner, *args, **kwargs)
        return model if result is inner else result

    return cast(_Verb, call)


def _check_not_transformed(verb: str, model: Any) -> None:
    """Refuse a model whose parameters a transform differentiates: it would not reach the result."""
    for name, parameter in model.named_parameters() if isinstance(model, nn.Module) else ():
        if torch_private.is_transformed(parameter):
            raise ConfigError(
                f"{verb}: {name} belongs to a transform of torch.func that is running, which cannot reach "
                "through a rewrite or a merge: call it before, and give the transform what it returns"
            )


def _in_original(verb: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a verb on a model that is not rewritten, without the wrappers that checkpoint its layers."""
    inner = _unwrapped(model, (_CHECKPOINTED,))
    with without_zero_init(), _layers_unwrapped(inner, (_CHECKPOINTED,)) as places:
        result = verb(inner, *args, **kwargs)
        names = {id(module): name for name, module in inner.named_modules()}
        wrappers = {join(names[id(parent)], name): child for parent, name, child in places}
    if result is inner:
        return model
    if isinstance(result, nn.Module) and record_of(result) is not None:
        # Those of layers inside other ones first.
        for name, wrapper in sorted(wrappers.items(), reverse=True):
            result.set_submodule(name, _wrapped_again(wrapper, result.get_submodule(name)))
        return result if inner is model else _wrapped_again(model, result)
    return result


def _wrapped_again(wrapper: nn.Module, inner: nn.Module) -> nn.Module:
    """Copy a wrapper, around another module."""
    inside = wrapper._modules[_CHECKPOINTED]
    assert inside is not None
    if _CHECKPOINTED in inside._modules:
        inner = _wrapped_again(inside, inner)
    result = copy.copy(wrapper)
    result.__dict__["_modules"] = {**wrapper._modules, _CHECKPOINTED: inner}
    return result


@contextmanager
def without_wrappers(model: Any, *, leaving: bool = False) -> Iterator[Any]:
    """Give the module inside of wrappers, with its layers as they are without theirs.

    These are the wrappers of ``torch.compile``, of FSDP1, and those that checkpoint or offload activations
    (``apply_activation_checkpointing``). They are in their places again when the context ends, and go by what
    the module inside is then. One thread at a time is in such a context of a model.

    Args:
        model: A rewritten model; anything else is given back as it is.
        leaving: Whether a ``with`` block is left, which has to end whatever has become of the model.

    Raises:
        CaptureError: If a layer that has an adapter was deleted or replaced.
    """
    inner = _unwrapped(model) if isinstance(model, nn.Module) else None
    record = None if inner is None else record_of(inner)
    if inner is None or record is None:
        yield model
        return
    with _locks.setdefault(inner, threading.RLock()), _layers_unwrapped(inner):
        if not leaving:
            check_intact(inner, record)
        _note_by_hand(inner)
        yield inner
        protect(inner)


_Place = tuple[nn.Module, str, nn.Module]
_WRAPPERS = (_COMPILED, _CHECKPOINTED, torch_private.FLATTENED_MODULE)


@contextmanager
def _layers_unwrapped(
    model: nn.Module, wrappers: tuple[str, ...] = _WRAPPERS
) -> Iterator[list[_Place]]:
    """Take the wrappers off layers, for as long as the context lasts.

    Yields:
        The places: a module, a name in it, and the wrapper that it has there otherwise.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        if _inside_of(parent, wrappers) is None
        for name, child in parent._modules.items()
        if child is not None and _inside_of(child, wrappers) is not None
    ]
    for parent, name, child in places:
        parent._modules[name] = _unwrapped(child, wrappers)
    try:
        yield places
    finally:
        for parent, name, child in places:
            if parent._modules.get(name) is _unwrapped(child, wrappers):
                parent._modules[name] = child


def _inside_of(module: nn.Module, wrappers: tuple[str, ...] = _WRAPPERS) -> nn.Module | None:
    """The module that a wrapper is around; None for any other module."""
    if isinstance(module, torch.jit.ScriptModule):
        return None  # its modules cannot be looked up by name
    if isinstance(module, AroundModel):
        return module.get_base_model()
    found = (module._modules.get(name) for name in wrappers)
    return next((inner for inner in found if inner is not None), None)


def _unwrapped(module: nn.Module, wrappers: tuple[str, ...] = _WRAPPERS) -> nn.Module:
    while (inner := _inside_of(module, wrappers)) is not None:
        module = inner
    return module


def mark_adapted(model: nn.Module, *, adapted: bool) -> None:
    """Writes ``is_quantized`` where transformers has quantized: whether weights are all that there is.

    Args:
        model: A model of lora_fx's own.
        adapted: Whether it has adapters.
    """
    for module in model.modules():
        if module.__dict__.get("hf_quantizer") is not None:
            module.__dict__["is_quantized"] = not adapted
