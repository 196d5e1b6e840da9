"""Copies of models that share the weights. Every front-end works on such a copy.

Structure, buffers and plain attributes are copied. Each parameter becomes a new frozen parameter over the
same storage. So no change to the copy can reach the original, and the weights are in memory only once.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError, MergeError
from lora_fx.formats import LibraryLayers, format_of, formats
from lora_fx.passes.graph.nodes import is_lazy
from lora_fx.passes.graph.partitions import copy_partitioned, is_partitioned, partitioned_twin
from lora_fx.passes.graph.units import copy_units, is_unit
from lora_fx.runtime.modules import held_in

__all__ = [
    "check_model",
    "exchange",
    "holder_of",
    "memory_of",
    "share_copy",
    "storage_of",
]


_ATOMS = (
    *(str, bytes, int, float, complex, bool, type(None), range, slice, type, types.ModuleType),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.Generator),
)
"""Classes of values that hold no references to follow."""

_KEYED, _LISTED, _FIXED = dict, (list, deque), (tuple, frozenset)
_SEQUENCES = (*_LISTED, *_FIXED, set)
_CACHED = type(functools.lru_cache(lambda: None))
_APART = (sys.stdlib_module_names | {"torch", "numpy", "lora_fx", "deepspeed"}) - {
    "types",
    "collections",
    "argparse",
}
"""Packages whose objects are never a part of a model. Most are in the standard library."""


def _follow(result: nn.Module, memo: dict[int, Any], originals: Iterable[Any]) -> None:
    """Replace references to the original model, in everything that its copy reaches, by those to the copy.

    Args:
        result: The copy. It is changed.
        memo: The memo of ``copy.deepcopy``: copies by the id of their originals.
        originals: Modules and parameters of the model that was copied.

    Raises:
        CaptureError: If the copy still reaches a part of the original. Globals of modules and attributes of
            classes are not checked.
    """
    apart = {id(item): item for item in originals}
    # Also follow other objects that deepcopy has copied: functions of the copy must read the copy's settings.
    copied = {
        id(item): item for item in memo.get(id(memo), ()) if memo.get(id(item), item) is not item
    }
    _Following(memo, {**copied, **apart}).within(result)
    path = _Following(memo, apart).path(result)
    if path is not None:
        raise CaptureError(
            f"the model cannot be copied as a whole: {path} holds a module or a parameter in a way that "
            "copy.deepcopy does not follow, so that the copy would go on using the original's. Keep it in "
            "an attribute, a list or a dict of the module, or give its class a __deepcopy__"
        )


def exchange(model: nn.Module, before: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Replace references to former parameters by the present parameters, in all objects of a model.

    Args:
        model: A model in which parameters of modules were replaced. Its lists, objects and functions may
            still refer to the old parameters, and are changed.
        before: Name and value of each former parameter.

    Raises:
        MergeError: If one parameter has become several, and something other than a module holds it.
    """
    now = dict(model.named_parameters(remove_duplicate=False))
    became: dict[int, tuple[str, nn.Parameter, dict[int, nn.Parameter]]] = {}
    for name, old in before:
        if name in now:
            became.setdefault(id(old), (name, old, {}))[2][id(now[name])] = now[name]
    became = {key: row for key, row in became.items() if row[2].keys() != {key}}
    split = {key: row for key, row in became.items() if len(row[2]) > 1}
    own = {id(module): module for module in model.modules()}  # hooks are often their methods
    for key, (name, old, _) in split.items():
        for module in model.modules():
            if any(_Following({}, {key: old}, own).reaches(value) for value in _beside(module)):
                raise MergeError(
                    f"{name}: several layers had this weight in common, have one each after the merge, and "
                    "something beside them holds it: which one is meant cannot be told. Give each layer its "
                    "own weight, or leave adapters off all but one"
                )
    for key in split:
        del became[key]
    following = _Following(
        {key: next(iter(new.values())) for key, (_, _, new) in became.items()},
        {key: old for key, (_, old, _) in became.items()},
    )
    following.all_its_own = True
    if following.reaches(model):
        following.within(model)


def _beside(module: nn.Module) -> list[Any]:
    """Return the attributes of a module except its parameters and children."""
    apart = ("_parameters", "_modules")
    return [value for key, value in module.__dict__.items() if key not in apart]


class _Following:
    """Traversal of the objects that a value reaches, which replaces originals by their copies.

    Attributes:
        all_its_own: True if all these objects belong to the model, so that they are changed in place and not
            copied first.
    """

    def __init__(
        self,
        memo: dict[int, Any],
        originals: dict[int, Any],
        apart: Mapping[int, Any] | None = None,
    ) -> None:
        """Create a traversal that has visited nothing yet.

        Args:
            memo: The memo of ``copy.deepcopy``: copies by the id of their originals.
            originals: Objects to replace, by id.
            apart: Objects whose references are not followed, by id.
        """
        self._memo = memo
        self._originals = originals
        self._copies = {id(item) for key, item in memo.items() if key != id(memo)}
        self.all_its_own = False
        # Objects that reach no original, by id. The references keep the ids from being reused.
        self._none: dict[int, Any] = dict(apart or {})
        self._atoms: dict[type, bool] = {}  # by class: a cache of isinstance
        self._done: dict[int, Any] = {}
        self._made: dict[int, Any] = {}

    def reaches(self, value: Any) -> bool:
        """Return True if a value refers to a part of the original, directly or through other objects."""
        originals, none = self._originals, self._none
        seen: dict[int, Any] = {id(value): value}
        pending, atoms = [value], self._atoms
        while pending:
            for child in _held(pending.pop()):
                key, cls = id(child), type(child)
                if key in originals:
                    return True
                if key in seen:
                    continue
                atom = atoms.get(cls)
                if atom is None:
                    atom = isinstance(child, _ATOMS)
                    if child.__class__ is cls:  # a proxy has the class of another object
                        atoms[cls] = atom
                if atom:
                    continue
                seen[key] = child
                if key not in none:
                    pending.append(child)
        none.update(seen)
        return False

    def path(self, value: Any) -> str | None:
        """Return the path of attributes from a value to a part of the original, or None if there is none."""
        if not self.reaches(value):
            return None
        seen: dict[int, Any] = {id(value): value}
        pending: deque[tuple[str, Any]] = deque([("the model", value)])
        while pending:
            path, parent = pending.popleft()
            for label, child in _children(parent):
                if id(child) in self._originals:
                    return path + label
                if id(child) not in seen:
                    seen[id(child)] = child
                    pending.append((path + label, child))
        return None

    def within(self, value: Any) -> None:
        """Replace the references to originals in a value that belongs to the copy."""
        if id(value) in self._done:
            return
        self._done[id(value)] = value
        if isinstance(value, _KEYED):
            for key, item in list(value.items()):
                self._put(value.__setitem__, key, item)
        elif isinstance(value, _LISTED):
            for index, item in enumerate(list(value)):
                self._put(value.__setitem__, index, item)
        elif isinstance(value, set):
            items = [self.followed(item) for item in value]
            if any(new is not old for new, old in zip(items, value, strict=True)):
                value.clear()
                value.update(items)
        else:
            attributes = _attributes(value)
            for key, item in list(attributes.items()):
                self._put(attributes.__setitem__, key, item)
            for key, item in _slots(value):
                self._put(functools.partial(object.__setattr__, value), key, item)

    def _put(self, put: Any, key: Any, item: Any) -> None:
        replacement = self.followed(item)
        if replacement is not item:
            put(key, replacement)

    def followed(self, value: Any) -> Any:
        """Return the counterpart of a value in the copy: the value itself if it reaches no original."""
        if isinstance(value, _ATOMS) or id(value) in self._none:
            return value
        if id(value) in self._originals:
            return self._memo.get(id(value), value)
        if id(value) in self._made:
            return self._made[id(value)][1]
        if isinstance(value, nn.Module | torch.Tensor) and not self._is_its_own(value):
            return value  # it belongs to another model
        if not self.reaches(value):
            return value
        return self._made.setdefault(id(value), (value, self._rebuilt(value)))[1]

    def _rebuilt(self, value: Any) -> Any:
        """Return an object like ``value`` that refers to copies. Objects of the copy are changed in place."""
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.followed(value.__func__), self.followed(value.__self__))
        if isinstance(value, types.BuiltinMethodType):
            return getattr(self.followed(value.__self__), value.__name__)
        if isinstance(value, functools.partial):
            words = {key: self.followed(item) for key, item in value.keywords.items()}
            return type(value)(self.followed(value.func), *map(self.followed, value.args), **words)
        if isinstance(value, weakref.ReferenceType):
            return weakref.ref(self.followed(value()))
        if isinstance(value, _CACHED):
            function = self.followed(value.__wrapped__)
            return functools.lru_cache(**value.cache_parameters())(function)
        if isinstance(value, types.MappingProxyType):
            return types.MappingProxyType(self.followed(gc.get_referents(value)[0]))
        if isinstance(value, _FIXED):
            items = [self.followed(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if not self._is_its_own(value):
            # The original has it, too. Parts that deepcopy leaves uncopied are refused at the end.
            value = _copied(value, self._memo)
            self._copies.update(
                id(item) for key, item in self._memo.items() if key != id(self._memo)
            )
        if self._is_its_own(value):
            self.within(value)
        return value

    def _is_its_own(self, value: Any) -> bool:
        return self.all_its_own or id(value) in self._copies

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        cells = tuple(types.CellType() for _ in value.__closure__ or ())
        result = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, None, cells or None
        )
        # A recursive function is in its own closure.
        self._made[id(value)] = (value, result)
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            for content in held_in(old):
                cell.cell_contents = self.followed(content)
        result.__defaults__ = self.followed(value.__defaults__)
        result.__kwdefaults__ = _mapped(self.followed, value.__kwdefaults__)
        result.__dict__.update(_mapped(self.followed, value.__dict__) or {})
        result.__qualname__, result.__module__ = value.__qualname__, value.__module__
        result.__doc__, result.__annotations__ = value.__doc__, value.__annotations__
        return result


def _mapped(follow_one: Any, items: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if items is None else {key: follow_one(item) for key, item in items.items()}


def _held(value: Any) -> Iterable[Any]:
    """Return the objects that a value holds, as :func:`_children` does, without labels and faster."""
    if isinstance(value, nn.Module):
        return value.__dict__.values()
    if isinstance(value, _KEYED):
        return (*value, *value.values()) if value else ()
    if isinstance(value, torch.Tensor):
        return _attributes(value).values()
    if isinstance(value, _SEQUENCES):
        return value
    return [child for _, child in _children(value)]


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the objects that a value holds, each with a label for the path to it."""
    for kind, contents in _CHILDREN_BY_CLASS:
        if isinstance(value, kind):
            yield from contents(value)
            return
    for key, item in (*_attributes(value).items(), *_slots(value)):
        yield f".{key}", item


def _of_function(value: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        for content in held_in(cell):
            yield f" -> {value.__qualname__} (its {name})", content
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    for item in (*defaults, *value.__dict__.values()):
        yield f" -> {value.__qualname__} (a default or an attribute)", item


def _of_method(value: types.MethodType) -> Iterator[tuple[str, Any]]:
    yield ".__self__", value.__self__
    yield ".__func__", value.__func__


def _of_builtin(value: types.BuiltinMethodType) -> Iterator[tuple[str, Any]]:
    if isinstance(value.__self__, nn.Module | torch.Tensor):
        yield ".__self__", value.__self__


def _of_partial(value: functools.partial[Any]) -> Iterator[tuple[str, Any]]:
    for item in (value.func, *value.args, *value.keywords.values()):
        yield " (a partial)", item


def _of_mapping(value: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        yield f"[{key!r}]" if isinstance(key, str | int) else "[...]", item
        if not isinstance(key, str):
            yield " (a key)", key


_CHILDREN_BY_CLASS: tuple[tuple[Any, Callable[[Any], Iterable[tuple[str, Any]]]], ...] = (
    (types.FunctionType, _of_function),
    (types.MethodType, _of_method),
    (types.BuiltinMethodType, _of_builtin),
    (functools.partial, _of_partial),
    (weakref.ReferenceType, lambda value: [("()", value())]),
    (_CACHED, lambda value: [(".__wrapped__", value.__wrapped__)]),
    (types.MappingProxyType, lambda value: [("", gc.get_referents(value)[0])]),
    (_KEYED, _of_mapping),
    (_SEQUENCES, lambda value: ((f"[{index}]", item) for index, item in enumerate(value))),
)


def _attributes(value: Any) -> dict[str, Any]:
    """Return the ``__dict__`` of a module, a tensor or an object that may be a part of a model."""
    if not isinstance(value, nn.Module | torch.Tensor) and _is_apart(value):
        return {}
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return attributes if isinstance(attributes, dict) else {}


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module | torch.Tensor) or _is_apart(value):
        return
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and not name.startswith("__"):
                try:
                    yield name, object.__getattribute__(value, name)
                except AttributeError:
                    continue


def _is_apart(value: Any) -> bool:
    if type(value).__name__ == torch_private.HOOK_WRAPPER:  # torch's wrapper around a hook
        return False
    return (type(value).__module__ or "").partition(".")[0] in _APART


_EMPTY = (dict, OrderedDict)
_PLAIN = (bool, int, float, str, type(None))
# Values that deepcopy cannot copy. The copy shares them at first; _Following replaces views of dicts later.
_SHARED = (type(threading.Lock()), type(threading.RLock()), types.MappingProxyType)


def share_copy(
    model: nn.Module, left_out: Iterable[Any] = (), *, sharded: bool = False
) -> nn.Module:
    """Copy a model, sharing its parameters' storage.

    Args:
        model: Any module. It is not touched.
        left_out: Values of modules' attributes. The copied modules do not have these attributes.
        sharded: True to accept a model that FSDP2 shards. The copy then has the same shards, but FSDP2 does
            not manage it.

    Returns:
        A module of the same class, with every parameter frozen. Tied parameters stay tied, and buffers are
        copied. Parameters that ZeRO-3 partitions share their parts with the copy, which has no ZeRO-3 hooks.

    Raises:
        CaptureError: If the model cannot be copied, or the copy would still use parts of the original.
    """
    if not sharded:
        _check_whole(model)
    absent = object()
    left = [value for value in left_out if not isinstance(value, _ATOMS)]
    memo: dict[int, Any] = {id(value): absent for value in left}
    modules = list(model.modules())
    parameters: list[nn.Parameter] = []
    libraries = [format_.layers for format_ in formats()]
    # Tensors that are created in inference mode cannot be used in training.
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            renormalizes = getattr(module, "max_norm", None) is not None
            for parameter in module._parameters.values():
                if parameter is None:
                    continue
                parameters.append(parameter)
                if is_lazy(parameter):
                    continue  # it has no storage to share, and copies itself
                if id(parameter) not in memo:
                    memo[id(parameter)] = _twin(parameter, memo, own=renormalizes)
            for layers in libraries:
                layers.share(module, memo)
            for value in (*module.__dict__.values(), *module._buffers.values()):
                if type(value) in _EMPTY and not value and not getattr(value, "__dict__", None):
                    # Modules have many empty dicts, and deepcopy is slow for them.
                    memo[id(value)] = type(value)()
                elif type(value) not in _PLAIN:
                    _add_uncopyable(value, memo)
        fill = copy_units(model, memo, _copied)
        clean = copy_partitioned(model, memo, _copied)
        result: nn.Module = _copied(model, memo)
        fill()
        clean(result)
    # From Python 3.14 on, deepcopy does not look up functions in the memo, so the memo cannot leave them out.
    _leave_out(result, {id(absent), *map(id, left)})
    _follow(result, memo, (*modules, *parameters))
    _settle(result, libraries)
    return result


def _leave_out(model: nn.Module, absent: Collection[int]) -> None:
    """Delete the attributes of modules whose values have these ids."""
    for module in model.modules():
        for key in [key for key, value in vars(module).items() if id(value) in absent]:
            del vars(module)[key]


def _check_whole(model: nn.Module) -> None:
    """Raise for a model that FSDP2 shards: nothing would gather the shards of a copy."""
    for name, module in model.named_modules():
        if is_unit(module):
            raise CaptureError(
                f"{name or 'the model'} is sharded by FSDP (fully_shard), and a sharded model can be merged, "
                "but neither rewritten nor exported: rewrite it before it is sharded. To export, save the "
                "adapter on every rank (lora_fx.save_adapter), and load it onto a model that is not sharded"
            )


def _settle(model: nn.Module, libraries: Sequence[LibraryLayers]) -> None:
    """Let libraries adjust their layers in a finished copy, and freeze its parameters."""
    for layers in libraries:
        layers.adopt(model)
    for module in model.modules():
        for layers in libraries:
            layers.settle(module)
        for own in module._parameters.values():
            # A module with its own __deepcopy__ may have created new parameters.
            if own is not None:
                own.requires_grad = False


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(value).__name__} cannot be copied ({type(error).__name__}: {error}). "
            "lora_fx never changes its argument, so it needs a model that copy.deepcopy can copy."
        ) from error


def check_model(model: object) -> None:
    """Raise for objects that cannot be captured at all.

    Raises:
        CaptureError: If `model` is no module, is compiled or scripted, or lies on several devices.
    """
    if not isinstance(model, nn.Module):
        loaded = (
            ": load the model first, for example with AutoModelForCausalLM.from_pretrained(folder)"
            if isinstance(model, str | os.PathLike)
            else ""
        )
        raise CaptureError(f"expected a torch.nn.Module, found {type(model).__name__}{loaded}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is a TorchScript module: pass the model that it was made from"
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch._dynamo"):
            raise CaptureError(
                f"{name or 'the model'} is compiled: pass the module that it was made from (its "
                f"{torch_private.ORIGINAL_MODULE}), and compile the result"
            )
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise CaptureError(
            f"the model's parameters are on several devices ({where}): move it to one with "
            "model.to(device)"
        )


def _twin(parameter: nn.Parameter, memo: dict[int, Any], *, own: bool) -> nn.Parameter:
    """Return a frozen parameter over the same memory, or over copied memory if `own` is True."""
    if is_partitioned(parameter):
        return partitioned_twin(parameter, own=own)
    known = format_of(parameter)
    twin = None if known is None else known.twin(parameter, memo)
    return _frozen(parameter, own=own) if twin is None else twin


def _frozen(parameter: nn.Parameter, own: bool = False) -> nn.Parameter:
    shared = parameter.detach().clone() if own else parameter.detach()
    result = (
        shared if isinstance(shared, nn.Parameter) else nn.Parameter(shared, requires_grad=False)
    )
    result.__dict__.update(parameter.__dict__)
    return result


def _add_uncopyable(value: Any, memo: dict[int, Any]) -> None:
    """Put objects that deepcopy cannot copy into the memo: locks, and tensors that autograd has computed."""
    if type(value) in _SHARED:
        memo[id(value)] = value
    elif isinstance(value, torch.Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, dict):
        for item in value.values():
            _add_uncopyable(item, memo)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _add_uncopyable(item, memo)


def holder_of(tensor: torch.Tensor) -> torch.UntypedStorage | torch.Tensor:
    """Return the storage of a tensor, the same object for all of its views while a reference to it exists.

    A sparse or uninitialized tensor has no storage, and is returned itself.
    """
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return tensor
    return _own_part(tensor).untyped_storage()


def storage_of(tensor: torch.Tensor) -> int:
    """Return the id of :func:`holder_of`, which identifies a storage while it is alive."""
    return id(holder_of(tensor))


def memory_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return a key that is equal for tied tensors: storage, offset, shape and strides."""
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return (id(tensor),)
    own = _own_part(tensor)
    return (storage_of(own), own.storage_offset(), tuple(own.shape), own.stride())


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local part of a partitioned or distributed tensor, or the tensor itself."""
    if is_partitioned(tensor):
        tensor = getattr(tensor, "ds_tensor", tensor)
    return torch_private.local_tensor(tensor)
