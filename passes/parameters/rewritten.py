"""The state of a rewritten model: parameters trained by hand, changed buffers, and lost parameters.

A parameter is trained by hand if the user sets ``requires_grad``, so that no adapter trains it. A frozen
parameter shares its memory with the model before the rewrite. It gets separate memory before an optimizer can
write into it. Buffers that training changes, such as batch-norm statistics, count as learned, too.
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
from lora_fx.digests import add_values
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
from lora_fx.runtime.modules import AdapterModule

__all__ = [
    "AroundModel",
    "base_statistics",
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


# Storages are copied from an offset in bytes that is aligned for every dtype.
_ALIGNED = 16


def protect(model: nn.Module) -> None:
    """Give every frozen parameter of the base separate storage once it gets its first gradient.

    Args:
        model: A copy over the weights of another model. Parameters that are protected already are skipped.
    """
    root = weakref.ref(model)
    for parameter in _distinct(model):
        if parameter.requires_grad or is_guarded(parameter) or not _can_train(parameter):
            continue
        # Autograd accepts hooks only of tensors that require a gradient, and keeps them afterwards.
        parameter.requires_grad_(True)
        parameter.register_hook(_Guard(parameter, root))  # type: ignore[no-untyped-call]
        parameter.requires_grad_(False)
    for _, module in base_modules(model):
        if not isinstance(module, torch.jit.ScriptModule) and not any(_load_hooks(module)):
            module.register_load_state_dict_pre_hook(_claim_loaded)  # type: ignore[no-untyped-call]


def unprotect(model: nn.Module) -> None:
    """Remove the module hooks of :func:`protect` from a copy, whose parameters have no hooks."""
    for module in model.modules():
        for key in list(_load_hooks(module)):
            del torch_private.load_hooks(module)[key]


def is_guarded(parameter: torch.Tensor) -> bool:
    """Return True if :func:`protect` has guarded a parameter. A copy shares no memory and is not guarded."""
    hooks = torch_private.parameter_hooks(parameter)
    return any(isinstance(hook, _Guard) for hook in hooks.values())


def claim(parameter: torch.Tensor) -> None:
    """Give a parameter separate storage before it is written into; do nothing if it has that already."""
    hooks = torch_private.parameter_hooks(parameter)
    for hook in list(hooks.values()):
        if isinstance(hook, _Guard):
            hook(None)


def claim_unfrozen(model: nn.Module) -> None:
    """Give separate storage to parameters that were unfrozen by hand, before they have a gradient."""
    for parameter in _distinct(model):
        if parameter.requires_grad:
            claim(parameter)


def _note_by_hand(model: nn.Module) -> None:
    """Add to the record of a rewritten model the parameters that are trained by hand now."""
    record = record_of(model)
    if record is None:
        return
    names = frozenset(trained_by_hand(model, record))
    if names != record.by_hand:
        model.__dict__["_lora_fx"] = dataclasses.replace(record, by_hand=names)


def trained_by_hand(model: nn.Module, record: Record) -> dict[str, nn.Parameter]:
    """Return the base's parameters that the user trains, or has trained, under each of their names.

    Parameters that an adapter trains are left out. Parameters of modules that have replaced a module of the
    base are included.

    Args:
        model: A rewritten model.
        record: Its record.
    """
    owned = {name for adapter in record.placed for name in record.adapters[adapter].own}
    parameters = base_parameters(model)
    replaced = tuple(f"{name}." for name in _replaced_modules(model, record))
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name not in owned
        and (parameter.requires_grad or name in record.by_hand or name.startswith(replaced))
    }


def trained_starts(model: nn.Module, record: Record) -> Iterator[tuple[str, str]]:
    """Yield weights that require a gradient and whose values an adapter's initialization has replaced.

    Each weight comes with the name of the adapter.
    """
    for adapter in record.active:
        entry = record.adapters[adapter]
        weights = {row.site.weight for row in entry.sites} - set(entry.given)
        for name in entry.own:
            if name in weights and model.get_parameter(name).requires_grad:
                yield name, adapter


def _replaced_modules(model: nn.Module, record: Record) -> Iterator[str]:
    """Yield the FQNs of modules with which the user has replaced a region after the rewrite."""
    if not any(is_guarded(parameter) for parameter in _distinct(model)):
        return  # it is a copy, in which new modules cannot be recognized
    for fqn, module in base_modules(model):
        if fqn in record.base.graphs and not any(_load_hooks(module)):
            parameters = [p for p in module.parameters() if type(p) is nn.Parameter]
            if parameters and not any(is_guarded(p) or p.is_meta for p in parameters):
                yield fqn


class _Guard:
    """Hook on the gradient of a parameter that gives the parameter separate storage."""

    # Not pickled: a parameter in another process shares no memory with the user's model.
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
        parameters = {} if root is None else base_parameters(root)
        group = _sharing_bytes(parameter, parameters.values())
        if not is_partitioned(parameter):
            _give_storage(group)
        elif root is None or not is_owned(root):
            # If the model is in an engine of DeepSpeed, trained parameters have separate parts already.
            own_partition(parameter)
        if root is not None and record is not None:
            members = {id(member) for member in group}
            names = frozenset(name for name, value in parameters.items() if id(value) in members)
            root.__dict__["_lora_fx"] = dataclasses.replace(record, by_hand=record.by_hand | names)


def _load_hooks(module: nn.Module) -> Iterator[int]:
    """Yield the keys under which :func:`_claim_loaded` is registered in a module."""
    for key, hook in torch_private.load_hooks(module).items():
        # torch wraps the function in an object.
        if getattr(hook, "hook", hook) is _claim_loaded:
            yield key


def _claim_loaded(
    module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any
) -> None:
    """Give parameters separate storage before a state dict with other values is loaded into their module."""
    if metadata.get("assign_to_params_buffers"):
        return  # nothing is written: the parameters are replaced
    for name, parameter in module._parameters.items():
        value = state.get(prefix + name)
        if parameter is None or not isinstance(value, torch.Tensor) or not is_guarded(parameter):
            continue
        if parameter.is_meta or value.is_meta or parameter.shape != value.shape:
            continue
        if not torch.equal(parameter, value.to(parameter.device, parameter.dtype)):
            claim(parameter)


def _distinct(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield each parameter of the base once, without those of scripted modules."""
    seen: set[int] = set()
    for _, module in base_modules(model):
        # A scripted module was copied, and shares no memory.
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


def _sharing_bytes(
    parameter: nn.Parameter, candidates: Iterable[nn.Parameter]
) -> list[nn.Parameter]:
    """Return a parameter and all parameters that share bytes with it, which have to move together."""
    group = {id(parameter): parameter}
    if not _is_plain(parameter) or is_partitioned(parameter):
        return [parameter]
    storage = storage_of(parameter)
    same = {
        id(candidate): candidate
        for candidate in candidates
        if _is_plain(candidate) and storage_of(candidate) == storage
    }
    while True:
        low, high = _span(group.values())
        overlapping = {
            key: candidate
            for key, candidate in same.items()
            if _extent(candidate)[0] < high and low < _extent(candidate)[1]
        }
        if overlapping.keys() <= group.keys():
            return list(group.values())
        group |= overlapping


def _give_storage(group: list[nn.Parameter]) -> None:
    """Move parameters that share bytes to a new storage, in which they share bytes in the same way."""
    with torch.inference_mode(False), torch.no_grad():
        if not _is_plain(group[0]):
            group[0].data = group[0].detach().clone()
            return
        low, high = _span(group)
        low -= low % _ALIGNED
        old = torch.empty(0, dtype=torch.uint8, device=group[0].device)
        whole = old.set_(group[0].untyped_storage(), low, (high - low,), (1,)).clone()
        for parameter in group:
            offset = (_extent(parameter)[0] - low) // parameter.element_size()
            view = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            parameter.data = view.set_(
                whole.untyped_storage(), offset, parameter.shape, parameter.stride()
            )


def _is_plain(parameter: torch.Tensor) -> bool:
    return type(parameter) is nn.Parameter and parameter.layout is torch.strided


def _span(group: Iterable[torch.Tensor]) -> tuple[int, int]:
    ends = [_extent(tensor) for tensor in group]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the range of bytes that a tensor uses in its storage, without the end."""
    start = int(tensor.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = start + sum((int(size) - 1) * int(stride) for size, stride in steps)
    end = last + 1 if tensor.numel() else start
    return start * tensor.element_size(), end * tensor.element_size()


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers of the base that a state dict would have, by FQN.

    No state dict is made, because quantized embeddings of bitsandbytes refuse that.
    """
    persistent = {
        join(fqn, key)
        for fqn, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, AdapterModule)
        # The buffers of a script module are in a container that cannot be iterated without keys().
        for key in module._buffers.keys()  # noqa: SIM118
        if key not in torch_private.transient_buffers(module)
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def base_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base's buffers that training may change, such as batch-norm statistics, by FQN.

    These are the floating-point buffers. Counters of batches are integers, and left out.
    """
    buffers = persistent_buffers(model).items()
    return {name: buffer for name, buffer in buffers if buffer.is_floating_point()}


def buffer_digests(model: nn.Module) -> dict[str, str]:
    """Return a fingerprint of every persistent buffer, by FQN."""
    buffers = persistent_buffers(model).items()
    return {name: digest_of(buffer) for name, buffer in buffers if buffer.device.type != "meta"}


def changed_buffers(model: nn.Module, record: Record) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the persistent buffers that have changed since the rewrite, or whose module is new."""
    buffers = dict(model.named_buffers())
    new = tuple(f"{name}." for name in _replaced_modules(model, record))
    for name, digest in buffer_digests(model).items():
        if name.startswith(new) or record.buffers.get(name, digest) != digest:
            yield name, buffers[name]


def digest_of(tensor: torch.Tensor) -> str:
    """Return a short digest of a tensor's values, whatever its shape and its layout."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _strided_parts(tensor.detach()):
        add_values(digest, part)
    return digest.hexdigest()


_COMPRESSED = ("values", "crow_indices", "col_indices"), ("values", "ccol_indices", "row_indices")
_PARTS = {
    torch.sparse_coo: torch_private.SPARSE_PARTS,
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), _COMPRESSED[0]),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), _COMPRESSED[1]),
}
"""The methods that return the parts of a sparse tensor."""


def _strided_parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    if tensor.is_nested:
        return tensor.unbind()
    if tensor.layout in _PARTS:
        return [getattr(tensor, name)() for name in _PARTS[tensor.layout]]
    return [tensor]


def check_intact(model: nn.Module, record: Record) -> None:
    """Raise if a layer that has an adapter was deleted or replaced after the rewrite.

    Args:
        model: A rewritten model.
        record: Its record.

    Raises:
        CaptureError: With every such layer, and a remedy.
    """
    losses = list(dict.fromkeys(_lost(model, record)))
    if not losses:
        return
    raise CaptureError(
        f"this {type(model).__name__} has lost what the rewrite put into it: layers were deleted or replaced "
        "since:\n  "
        + some(losses, 5, "\n  ")
        + "\nPut the layers back, or make the change in the original model and rewrite that "
        "(lora_fx.load_adapter gives it what was saved before)"
    )


def _lost(model: nn.Module, record: Record) -> Iterator[str]:
    """Yield a message for each layer, row or tensor of an adapter that the model does not have any more."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for adapter, entry in record.adapters.items():
        for row in entry.sites:
            yield from _lost_at_site(modules, row, adapter)
        for tokens in entry.tokens:
            name = rows_name(tokens, adapter)
            if not _has(modules, name):
                replacement = _module_now_at(modules, tokens.site.holder)
                yield f"{tokens.name}: it has no trained rows of adapter {adapter!r}{replacement}"
        for name in entry.own:
            owner, _, leaf = name.rpartition(".")
            stored = name if adapter in record.placed else join(owner, KEPT + leaf, adapter)
            if not _has(modules, stored):
                yield f"{name}: adapter {adapter!r} has its own value of it, and it is not there"
    for fqn in record.base.kept:
        if fqn not in modules:
            yield f"{fqn}: it is not there, and its quantized weight is known to its graph alone"


def _lost_at_site(modules: dict[str, nn.Module], row: PlannedSite, adapter: str) -> Iterator[str]:
    site = row.site
    if not _has(modules, site.weight):
        yield f"{row.name}: its weight {site.weight} is not there{_module_now_at(modules, site.owner)}"
        return
    for attribute in factor_names(row).present:
        if not _has(modules, join(site.holder, attribute, adapter)):
            replacement = _module_now_at(modules, site.holder)
            yield f"{row.name}: it has no {attribute} of adapter {adapter!r}{replacement}"
            return
    if row.dropout and join(site.holder, DROPOUT, adapter) not in modules:
        yield f"{row.name}: it has no {DROPOUT} of adapter {adapter!r}{_module_now_at(modules, site.holder)}"


def _module_now_at(modules: dict[str, nn.Module], fqn: str) -> str:
    """Return words for an error: which module now has the name of a module with an adapter's parameters."""
    module = modules.get(fqn)
    if module is None:
        return f" (there is no module {fqn})"
    if any(_load_hooks(module)):
        return ""  # it is the module that was rewritten, without its factors
    cls = original_class(module)
    return f" ({fqn or 'the model'} is a {cls.__module__}.{cls.__qualname__} now)"


def _has(modules: dict[str, nn.Module], name: str) -> bool:
    """Return True if a module in ``modules`` has the parameter or buffer of this FQN."""
    owner, _, leaf = name.rpartition(".")
    module = modules.get(owner)
    if module is None:
        return False
    # Also a weight that is computed (torch.nn.utils.parametrize).
    return getattr(module, leaf, None) is not None


_COMPILED, _CHECKPOINTED = torch_private.ORIGINAL_MODULE, torch_private.CHECKPOINTED_MODULE
_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""The lock of each rewritten model. A thread holds it while it changes the model."""
_Verb = TypeVar("_Verb", bound=Callable[..., Any])


class AroundModel:
    """A module that wraps a rewritten model. The functions of lora_fx work on the model inside."""

    def get_base_model(self) -> nn.Module:
        """Return the rewritten model."""
        raise NotImplementedError


def inside(verb: _Verb) -> _Verb:
    """Make a verb (a function of lora_fx on a model) work on wrapped models, and with wrapped layers.

    The wrappers are those of :func:`without_wrappers`. If the verb would return the model inside, the result
    is the wrapped model that was passed. If the verb rewrites a model, the new model gets the layer wrappers
    of the original.

    A transform of ``torch.func`` around the call does not apply to the computation of the verb.

    Raises:
        CaptureError: If a layer that has an adapter was deleted or replaced.
        ConfigError: If a transform of ``torch.func`` differentiates parameters of the model.
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
    """Raise if the parameters of a model belong to a running transform of ``torch.func``.

    The model that a verb returns would have parameters that the transform does not differentiate.

    Args:
        verb: Name of the public function that was called, such as ``merge``.
        model: Its first argument.
    """
    for name, parameter in model.named_parameters() if isinstance(model, nn.Module) else ():
        if torch_private.is_transformed(parameter):
            raise ConfigError(
                f"{verb}: {name} belongs to a transform of torch.func that is running, which cannot reach "
                "through a rewrite or a merge: call it before, and give the transform what it returns"
            )


def _in_original(verb: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a function of lora_fx on a model before the rewrite, without checkpoint wrappers of its layers."""
    inner = _unwrapped(model, (_CHECKPOINTED,))
    with without_zero_init(), _layers_unwrapped(inner, (_CHECKPOINTED,)) as wrapped:
        result = verb(inner, *args, **kwargs)
        names = {id(module): name for name, module in inner.named_modules()}
        wrappers = {join(names[id(parent)], name): child for parent, name, child in wrapped}
    if result is inner:
        return model
    if isinstance(result, nn.Module) and record_of(result) is not None:
        # Wrap inner layers first.
        for name, wrapper in sorted(wrappers.items(), reverse=True):
            result.set_submodule(name, _wrapped_again(wrapper, result.get_submodule(name)))
        return result if inner is model else _wrapped_again(model, result)
    return result


def _wrapped_again(wrapper: nn.Module, inner: nn.Module) -> nn.Module:
    """Return a copy of a checkpoint wrapper, around another module."""
    inside = wrapper._modules[_CHECKPOINTED]
    assert inside is not None
    if _CHECKPOINTED in inside._modules:
        inner = _wrapped_again(inside, inner)
    result = copy.copy(wrapper)
    result.__dict__["_modules"] = {**wrapper._modules, _CHECKPOINTED: inner}
    return result


@contextmanager
def without_wrappers(model: Any, *, leaving: bool = False) -> Iterator[Any]:
    """Yield the module inside of wrappers, with the wrappers of its layers removed.

    Wrappers are those of ``torch.compile``, of FSDP1, and those that checkpoint or offload activations
    (``apply_activation_checkpointing``). When the context ends, they are put back around the current inner
    modules. Only one thread at a time can be in such a context of a model.

    Args:
        model: A rewritten model; anything else is yielded unchanged.
        leaving: True at the end of a ``with`` block. The model is then not checked, because leaving a block
            must succeed in any state of the model.

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
    """Remove the wrappers of layers while the context lasts.

    Yields:
        The wrapped layers: a parent module, the name in it, and the wrapper.
    """
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        if _inside_of(parent, wrappers) is None
        for name, child in parent._modules.items()
        if child is not None and _inside_of(child, wrappers) is not None
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = _unwrapped(child, wrappers)
    try:
        yield wrapped
    finally:
        for parent, name, child in wrapped:
            if parent._modules.get(name) is _unwrapped(child, wrappers):
                parent._modules[name] = child


def _inside_of(module: nn.Module, wrappers: tuple[str, ...] = _WRAPPERS) -> nn.Module | None:
    """Return the module inside a wrapper; None for any other module."""
    if isinstance(module, torch.jit.ScriptModule):
        return None  # its modules cannot be looked up by name
    if isinstance(module, AroundModel):
        return module.get_base_model()
    children = (module._modules.get(name) for name in wrappers)
    return next((inner for inner in children if inner is not None), None)


def _unwrapped(module: nn.Module, wrappers: tuple[str, ...] = _WRAPPERS) -> nn.Module:
    while (inner := _inside_of(module, wrappers)) is not None:
        module = inner
    return module


def mark_adapted(model: nn.Module, *, adapted: bool) -> None:
    """Set ``is_quantized`` on models that transformers has quantized.

    It is False with adapters, because the Trainer of transformers refuses to train a quantized model.

    Args:
        model: A copy that lora_fx made; it is changed.
        adapted: True if the copy has adapters.
    """
    for module in model.modules():
        if module.__dict__.get("hf_quantizer") is not None:
            module.__dict__["is_quantized"] = not adapted
