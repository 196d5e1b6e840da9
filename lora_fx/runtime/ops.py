"""What a rewritten model runs at training time, and the modules that hold its factors."""

from __future__ import annotations

import dataclasses
import enum
import functools
import keyword
import marshal
import operator
import pickle
import re
import sys
import threading
import types
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.classes import BASE, OVER
from lora_fx.runtime.parts import factor_beside, is_in_parts, note_whole

__all__ = [
    "ANYTHING",
    "OMITTED",
    "AdapterDropout",
    "AdapterDropouts",
    "AdapterFactors",
    "AdapterModule",
    "Again",
    "Callee",
    "HeldTensor",
    "Holder",
    "KeptIndices",
    "KeptTensors",
    "OffloadedFactors",
    "Pickled",
    "Seen",
    "cast_like",
    "check_adapter_name",
    "children_of",
    "class_of",
    "count_batch",
    "differs",
    "entries_of",
    "function_of",
    "given",
    "in_place",
    "inside_of",
    "is_plain",
    "needs_modules",
    "output_padding",
    "pad_features",
    "part_differs",
    "shape_of",
    "spread",
    "tensors_in",
    "tree_differs",
    "wants_cache",
]


# Of modules, and of lora_fx.runtime.samples.SampleRows.
_TAKEN = (
    *(
        "training",
        "thread",
        "threads",
        "inherited",
        "samples",
        "repeats",
        "state",
        "proofs",
        "folded",
    ),
    *("assign", "assigned", "of_blocks", "reassign", "settle", "lay_out"),
)


_HOOK = "_hf_hook"  # where accelerate keeps its hook


class _NoLayer(ConfigError, AttributeError):
    """Says that a module of an adapter is taken for a layer."""


class AdapterModule(nn.Module):
    """A module that lora_fx puts into a model: no part of the base."""

    def __getattr__(self, name: str) -> Any:
        """An attribute. Styles of tensor parallelism ask every module in a layer for its ``weight``."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name != "weight":
                raise
            raise _NoLayer(
                "a module that holds an adapter has no weight, and is no layer: parallelize the model first "
                "(parallelize_module), and rewrite what that gives"
            ) from error


class AdapterFactors(AdapterModule):
    """One factor of a site, for every adapter: ``layer.lora_A.default`` is a parameter.

    It has no forward: the graph reads the parameters. Hooks that accelerate puts on it to load parameters
    before a call never run, so that it then asks them itself.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; with accelerate's hook it becomes one whose factors are somewhere else.

        FSDP2 puts its parts in so.
        """
        if isinstance(value, nn.Parameter):
            note_whole(self, name, value)
        super().__setattr__(name, value)
        if name == _HOOK and type(self) is AdapterFactors:
            object.__setattr__(self, "__class__", OffloadedFactors)

    def register_full_backward_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Registers a hook.

        Raises:
            ConfigError: If it is to compute gradients of single samples: no call of this module would run it.
        """
        library = type(getattr(getattr(hook, "func", hook), "__self__", None)).__module__
        if library.partition(".")[0] == "opacus":
            raise ConfigError(
                "Opacus computes the gradients of single samples by hooks on layers, and the factors of an "
                "adapter are read by the graph of the layer that they adapt: no hook on them runs. Use "
                "grad_sample_mode='ew' with a model of lora_fx.rewrite(..., optimize=False), where linear "
                "layers have LoRA; or grad_sample_mode='no_op', and set grad_sample of the parameters from "
                "torch.func (vmap over grad of functional_call), which any adapter goes with"
            )
        return super().register_full_backward_hook(hook, prepend)

    def add(self, adapter: str, value: torch.Tensor) -> None:
        """Adds an adapter's factor, or puts another one in its place.

        Args:
            adapter: The adapter's name.
            value: A of shape [r, in, ...] or B of shape [out, r, ...]; a parameter is taken as it is.
        """
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        self.register_parameter(adapter, parameter)

    def extra_repr(self) -> str:
        """Names and shapes."""
        shapes = ((name, tuple(p.shape)) for name, p in self.named_parameters())
        return ", ".join(f"{name}={shape}" for name, shape in shapes)


class OffloadedFactors(AdapterFactors):
    """Factors that accelerate has offloaded to a disk or to the CPU: each read loads one, to compute with."""

    def __getattr__(self, name: str) -> Any:
        """An attribute; a factor with its values.

        Raises:
            ConfigError: If it would be trained: the gradient of a loaded value reaches nothing.
        """
        value = super().__getattr__(name)
        hook: Any = self.__dict__.get(_HOOK)
        stored = getattr(hook, "weights_map", None)
        if not isinstance(value, nn.Parameter) or not value.is_meta or stored is None:
            return value
        if self.training and torch.is_grad_enabled():
            raise ConfigError(
                f"the factors of adapter {name!r} are offloaded by accelerate, which is for inference: call "
                "model.eval(), or take the hooks off (accelerate.hooks.remove_hook_from_submodules)"
            )
        loaded = stored[name].to(hook.execution_device, value.dtype)
        return nn.Parameter(loaded, requires_grad=False)

    def __delattr__(self, name: str) -> None:
        """Deletes an attribute; without the hook it is as it was."""
        super().__delattr__(name)
        if name == _HOOK:
            object.__setattr__(self, "__class__", AdapterFactors)


class KeptIndices(AdapterFactors):
    """Which rows of a weight an adapter trains: buffers that are no part of the state."""

    def add(self, adapter: str, value: torch.Tensor) -> None:
        """Adds an adapter's indices.

        Args:
            adapter: The adapter's name.
            value: Integers, [n].
        """
        self.register_buffer(adapter, value, persistent=False)


class AdapterDropout(AdapterModule, nn.Dropout):
    """The dropout of an adapter's branch at a site.

    It is an ``nn.Dropout``, so that code that looks for these finds it (``model.eval()``, TRL's
    ``disable_dropout``, a schedule of probabilities). The graph reads ``p`` and ``training`` at each call; it
    never calls the module, whose hooks do not run.
    """


class AdapterDropouts(AdapterModule):
    """The dropouts of a site, by adapter: ``layer.lora_dropout.default.p``, where PEFT has it."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute.

        Raises:
            ConfigError: If another module would take the place of a dropout: the graph would not call it.
        """
        if isinstance(value, nn.Module) and not isinstance(value, AdapterDropout):
            raise ConfigError(
                f"lora_dropout.{name} is the dropout of an adapter, and a {type(value).__name__} in its "
                "place would not be called: set its p instead (p = 0 for no dropout)"
            )
        super().__setattr__(name, value)

    def add(self, adapter: str, p: float) -> None:
        """Adds an adapter's dropout, or puts another one in its place.

        Args:
            adapter: The adapter's name.
            p: The probability that the graph begins with.
        """
        self.add_module(adapter, AdapterDropout(p).train(self.training))


class Holder(AdapterModule):
    """Holds the factors of a weight that no module stands for: it lies beside the weight."""


class KeptTensors(AdapterFactors):
    """What an adapter keeps beside a parameter and does not train: it is no factor."""


def check_adapter_name(name: object) -> None:
    """Refuses names that cannot be an attribute of :class:`AdapterFactors`.

    Raises:
        ConfigError: If the name is empty, has other characters than letters, digits, "_" and "-",
            or is taken by Python or ``nn.Module``.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"adapter_name must be a string that is not empty, found {name!r}")
    if not re.fullmatch(r"[\w-]+", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"adapter_name {name!r} has to be letters, digits, '_' and '-', and no word of Python: "
            "it is part of parameter and folder names"
        )
    if hasattr(AdapterFactors, name) or name in _TAKEN:
        raise ConfigError(f"adapter_name {name!r} is an attribute of nn.Module: choose another")


def cast_like(factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A factor in the dtype of an output, and in parts where that is.

    ``type_as`` would also want the layout of a nested tensor, which a factor cannot have.

    Raises:
        ConfigError: If a layer was parallelized after the rewrite.
    """
    if is_in_parts(factor) or is_in_parts(like):
        factor = factor_beside(factor, like)
    return factor.to(like.dtype)


def pad_features(part: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Zeros for the output features that a part of an operation does not have.

    Args:
        part: [..., n].
        before: How many come before it.
        after: How many come after it.
    """
    if not part.is_nested:
        return F.pad(part, (before, after))
    # What is nested cannot be padded, and can be multiplied.
    own = torch.eye(part.size(-1), dtype=part.dtype, device=part.device)
    return F.linear(part, F.pad(own, (0, 0, before, after)))


def count_batch(counter: torch.Tensor, training: bool) -> torch.Tensor:
    """Counts a batch, in training only: what ``nn.BatchNorm`` does before it normalizes.

    Args:
        counter: ``num_batches_tracked``, a scalar; counted up in place.
        training: The layer's mode.
    """
    return counter.add_(1) if training else counter


_CHECKPOINTS = "gradient_checkpointing"


def needs_modules(model: nn.Module, replaced: int = 0) -> bool:
    """Whether a call has to go through the modules, since a graph of the whole model has none.

    That is so where something waits for a module to be called: a hook, a ``forward`` that was set on it, or
    a block that checkpoints its activations (the switch is the attribute that transformers sets on its
    layers).

    Args:
        model: The model.
        replaced: How many modules had a ``forward`` of their own when the graph was made.
    """
    if torch_private.has_global_hooks():
        return True
    for module in model.modules():
        own = module.__dict__  # Module.__getattr__ is slow for what is not there
        if "forward" in own:
            replaced -= 1
        if module is not model and any(own[hooks] for hooks in torch_private.MODULE_HOOKS):
            return True
        if model.training and own.get(_CHECKPOINTS, getattr(type(module), _CHECKPOINTS, False)):
            return True
    return replaced != 0


def wants_cache(model: nn.Module, use_cache: bool | None) -> bool:
    """Whether a call of a transformers model wants a cache back, which a graph does not return.

    The argument says so. Where it says nothing, the model's configuration does, in evaluation only: a
    cache of a training step is never read, and keeps its activations alive.

    Args:
        model: A model with a ``config``.
        use_cache: The argument of its forward.
    """
    if use_cache is not None:
        return bool(use_cache)
    if model.training:
        return False
    config: Any = model.config
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    return any(getattr(one, "use_cache", False) for one in (config, *parts))


def is_plain(x: torch.Tensor) -> bool:
    """Whether a tensor lies in memory as a new one of its shape would: no gaps, its last axis first, from 0.

    Args:
        x: The tensor; any shape.
    """
    if x.layout is not torch.strided or x.storage_offset() != 0:
        return False
    step = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if stride != step:
            return False
        step *= max(size, 1)
    return True


def in_place(operation: str, left: Any, right: Any) -> Any:
    """``left += right`` and the like: changes a tensor in place, and gives a new number.

    Args:
        operation: A name in :mod:`operator`, such as ``iadd``.
        left: What stands on the left.
        right: What stands on the right.
    """
    return getattr(operator, operation)(left, right)


class _Omitted(enum.Enum):
    """The default of an argument that tells whether it was given."""

    OMITTED = "omitted"


OMITTED = _Omitted.OMITTED
"""What an argument is that was not given, where a decorator looks whether it was."""


def given(**named: Any) -> dict[str, Any]:
    """The arguments that were given.

    Args:
        named: Arguments by name.
    """
    return {name: value for name, value in named.items() if value is not OMITTED}


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """What a trace saw of an object, and of those below it.

    Attributes:
        cls: Its class.
        attributes: Names and values of what was read. An object is what was seen of it in turn, or
            :class:`Again`.
        missing: Names of attributes that it did not have.
        parameters: The names of a module's own parameters and buffers, each with :func:`shape_of` it.
        inside: The names of the modules in a container, in their order; None for what is no container.
        items: What :func:`entries_of` gave; None if it was not called.
        number: Which one it was, counted from 0 in the order in which they are compared.
    """

    cls: type
    attributes: tuple[tuple[str, Any], ...] = ()
    missing: tuple[str, ...] = ()
    parameters: tuple[tuple[str, tuple[tuple[int, ...], torch.dtype] | None], ...] = ()
    inside: tuple[str, ...] | None = None
    items: tuple[tuple[Any, Any], ...] | None = None
    number: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """With the class by its name in :mod:`types`, if it has one there: where it says, it is not found."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return _seen_again, (_NAMES_OF_TYPES.get(self.cls, self.cls), *values[1:])


_NAMES_OF_TYPES: dict[Any, str] = {
    one: name for name, one in vars(types).items() if isinstance(one, type)
}


def _seen_again(cls: Any, *values: Any) -> Seen:
    return Seen(getattr(types, cls) if isinstance(cls, str) else cls, *values)


@dataclasses.dataclass(frozen=True, slots=True)
class Again:
    """An object that a trace has met before, in another place.

    Attributes:
        number: That of the :class:`Seen`.
    """

    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Callee:
    """What tells a function, a partial or a bound method from others, and is the same in a copy.

    Attributes:
        code: The code, or what has none.
        held: Simple values around it, as text: defaults, variables of the closure, arguments of a partial,
            attributes of the owner of a method. Also what containers and plain objects among them hold.
        inner: The function of a partial or a method, and functions around it.
    """

    code: Any
    held: tuple[str, ...] = ()
    inner: tuple[Callee, ...] = ()

    @classmethod
    def of(cls, value: object, depth: int = 4) -> Callee:
        """What tells a value from others; anything but a function by its class.

        Args:
            value: The value.
            depth: How many functions inside of each other are looked at.
        """
        if isinstance(value, functools.partial):
            given: tuple[Any, ...] = (value.func, *value.args, *value.keywords.values())
            return cls._over(tuple(value.keywords), given, depth)
        if isinstance(value, MethodType):
            return cls._over(class_of(value.__self__), (value.__func__, value.__self__), depth)
        if isinstance(value, FunctionType):
            around = tuple(map(_content, value.__closure__ or ()))
            words = (value.__kwdefaults__ or {}).values()
            return cls._over(value.__code__, (*around, *(value.__defaults__ or ()), *words), depth)
        if isinstance(value, BuiltinFunctionType):
            return cls((value.__module__, value.__qualname__))
        if isinstance(value, ModuleType):
            return cls(("module", value.__name__))
        if isinstance(value, type):
            return cls(value)
        kind, name = class_of(value), getattr(value, "__name__", None)
        return cls(kind if name is None else (kind, name))

    @classmethod
    def _over(cls, code: Any, around: tuple[Any, ...], depth: int) -> Callee:
        # As text, which tells 1 from True, and 0.0 from -0.0.
        simple = tuple(_text(one) for one in around)
        functions = [one for one in around if isinstance(one, _FUNCTIONS)] if depth else []
        return cls(code, simple, tuple(cls.of(one, depth - 1) for one in functions))

    def __repr__(self) -> str:
        name: str = getattr(self.code, "co_qualname", None) or repr(self.code)
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        """Code travels as ``marshal`` has it."""
        code = self.code
        if isinstance(code, CodeType):
            return _marshalled, (marshal.dumps(code), self.held, self.inner)
        return Callee, (code, self.held, self.inner)


def _marshalled(code: bytes, held: tuple[str, ...], inner: tuple[Callee, ...]) -> Callee:
    return Callee(marshal.loads(code), held, inner)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the name has no value yet
        return None


_SIMPLE = (bool, int, float, complex, str, bytes)
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)
_LEADING = (nn.Module, torch.Tensor, torch.Generator, ModuleType, type, *_FUNCTIONS)
_LISTED = (list, tuple, set, frozenset, dict, deque, OrderedDict)
_APART = sys.stdlib_module_names - {"argparse", "types"}
_MOST = 256


def _text(value: Any, depth: int = 3) -> str:
    """A simple value as text, or what is simple in a container or a plain object; empty for any other."""
    cls = type(value)
    if value is None or cls in _SIMPLE or isinstance(value, enum.Enum | torch.dtype | torch.device):
        return repr(value)
    held: Any = value
    if cls not in _LISTED:
        if isinstance(value, _LEADING) or cls.__module__.partition(".")[0] in _APART:
            return ""
        held = getattr(value, "__dict__", {})
    if not depth or len(held) > _MOST:
        return cls.__name__
    if isinstance(held, dict):
        parts = [f"{_text(key)}: {_text(one, depth - 1)}" for key, one in held.items()]
    else:
        parts = [_text(one, depth - 1) for one in held]
    if cls in (set, frozenset):
        parts.sort()
    return f"{cls.__name__}({', '.join(parts)})"


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Go through the tensors in arguments or results, in containers and objects, too, but not in modules."""
    seen: set[int] = set()

    def visit(one: Any, depth: int) -> Iterator[torch.Tensor]:
        if isinstance(one, torch.Tensor):
            yield one
        elif depth and id(one) not in seen and not isinstance(one, (*_SIMPLE, nn.Module, type)):
            seen.add(id(one))
            if isinstance(one, Mapping):
                one = one.values()
            elif not isinstance(one, list | tuple | set):
                one = getattr(one, "__dict__", {}).values()
            for item in one:
                yield from visit(item, depth - 1)

    return visit(value, 8)


class _Anything(enum.Enum):
    """What is not compared."""

    ANYTHING = "anything"


ANYTHING = _Anything.ANYTHING
"""Stands for a value that something else compares: a parameter, which the graph reads itself."""


def tree_differs(value: Any, seen: Seen, met: dict[int, Any] | None = None) -> bool:
    """Whether an object is not as a trace saw it.

    Args:
        value: The object.
        seen: What the trace saw.
        met: The objects that were compared already, by their numbers.
    """
    if class_of(value) is not seen.cls:
        return True
    met = {} if met is None else met
    met[seen.number] = value
    for name, expected in seen.attributes:
        if part_differs(getattr(value, name, _NEVER), expected, met):
            return True
    for name in seen.missing:
        if hasattr(value, name):
            return True
    for name, shape in seen.parameters:
        if shape_of(_tensor_of(value, name)) != shape:
            return True
    if inside_of(value) != seen.inside:
        return True
    if seen.items is None:
        return False
    entries = entries_of(value)
    return (
        entries is None
        or len(entries) != len(seen.items)
        or any(
            differs(key, known) or part_differs(one, expected, met)
            for (key, one), (known, expected) in zip(entries, seen.items, strict=True)
        )
    )


def part_differs(found: Any, expected: Any, met: dict[int, Any]) -> bool:
    """Whether something in an object is not as a trace saw it.

    Args:
        found: What is there now.
        expected: What was there, or what was seen of it.
        met: The objects that were compared already, by their numbers.
    """
    if type(expected) is Seen:
        return tree_differs(found, expected, met)
    if expected is ANYTHING:
        return False
    if type(expected) is Again:
        return met.get(expected.number, _NEVER) is not found
    return differs(found, expected)


_NEVER = object()
_CONTENTS: tuple[tuple[Any, Callable[[Any], list[tuple[Any, Any]]]], ...] = (
    (dict, lambda value: list(dict.items(value))),
    (MappingProxyType, lambda value: list(value.items())),
    ((list, tuple, deque), lambda value: list(enumerate(value))),
    ((set, frozenset), lambda value: [("all", frozenset(value))]),
    ((bytearray, memoryview, array), lambda value: [("all", bytes(value))]),
    (weakref.ref, lambda value: [("call", value())]),
    (ContextVar, lambda value: [("get", value.get(_NEVER))]),
    (threading.local, lambda value: list(vars(value).items())),
)


def entries_of(value: object) -> list[tuple[Any, Any]] | None:
    """What an object of C holds that is no attribute, each with a key; None for what holds nothing.

    Args:
        value: A container, bytes that can be changed, a weak reference, or a variable of a context or thread.
    """
    for kind, entries in _CONTENTS:
        if isinstance(value, kind):
            return entries(value)
    return None


def inside_of(value: Any) -> tuple[str, ...] | None:
    """The names of the user's modules in a container of PyTorch's; None for any other object."""
    if not isinstance(value, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return None
    return tuple(children_of(value))


def children_of(module: nn.Module) -> list[str]:
    """The names of the modules in a module, in order, without those that hold its adapters."""
    return [name for name, one in module._modules.items() if not isinstance(one, AdapterModule)]


def shape_of(tensor: torch.Tensor | None) -> tuple[tuple[int, ...], torch.dtype] | None:
    """What a trace takes for granted of a parameter or buffer: shape and dtype; None for one that is None."""
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


def _tensor_of(module: Any, name: str) -> Any:
    tensor = module._parameters.get(name)
    return module._buffers.get(name) if tensor is None else tensor


def class_of(value: object) -> type:
    """The class of an object; of a module that runs a graph its own class.

    Args:
        value: Any object.
    """
    cls: Any = type(value)
    found: type = getattr(cls, BASE, None) or getattr(cls, OVER, cls)
    return found


def function_of(value: object) -> Any:
    """The function of a property, or of a method that is bound to a class; anything else as it is.

    Args:
        value: What a class gives for a name.
    """
    if isinstance(value, property):
        return value.fget
    return getattr(value, "__func__", value)


@dataclasses.dataclass(frozen=True, slots=True)
class Pickled:
    """An object of C that holds values, as it is pickled.

    Attributes:
        text: What ``pickle`` made of it.
    """

    text: bytes

    @classmethod
    def of(cls, value: object) -> Pickled:
        """An object as it is now.

        Raises:
            Exception: If it cannot be pickled.
        """
        return cls(pickle.dumps(value))

    def holds(self, value: object) -> bool:
        """Whether an object is pickled like this one; one that cannot be pickled is not."""
        try:
            return Pickled.of(value) == self
        except Exception:  # noqa: BLE001  # whatever the object's own code raises
            return False


class HeldTensor:
    """A tensor that a trace found in an attribute, a container or a global: it may be replaced or written to.

    Values are compared once for each tensor that is found, and again when it has been written to.
    """

    __slots__ = ("_copy", "_count", "_known")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._known, self._copy = tensor, tensor.detach().clone()
        self._count = _version(tensor)

    def differs(self, found: object) -> bool:
        """Whether something else is there now."""
        # A compiler has a guard for each tensor that it finds in a graph, and these are in none.
        if torch.compiler.is_compiling():
            return False
        if found is self._known and _version(self._known) == self._count >= 0:
            return False
        if not isinstance(found, torch.Tensor) or found.layout is not self._copy.layout:
            return True
        if (found.dtype, found.device) != (self._copy.dtype, self._copy.device):
            return True
        if not torch.equal(found, self._copy):
            return True
        self._known, self._count = found, _version(found)
        return False


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; -1 if that is not counted."""
    return -1 if tensor.is_inference() else torch_private.version_counter(tensor)


def differs(found: object, expected: object) -> bool:
    """Whether two values are told apart: by type, by value, and for containers by what is in them.

    ``0.0`` differs from ``-0.0``, ``1`` from ``True`` and from ``1.0``; ``nan`` is like itself.

    Args:
        found: What is there now.
        expected: What was there before.
    """
    if found is expected:
        return False
    if isinstance(expected, HeldTensor):
        return expected.differs(found)
    if type(expected) is Callee:
        return Callee.of(found) != expected
    if type(expected) is Pickled:
        return not expected.holds(found)
    if type(found) is not type(expected):
        return True
    if isinstance(expected, float):
        return repr(found) != repr(expected)
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        return found.shape != expected.shape or found.tobytes() != expected.tobytes()
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        return list(found) != list(expected) or any(
            differs(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list | tuple):
        assert isinstance(found, list | tuple)
        return len(found) != len(expected) or any(map(differs, found, expected))
    return bool(found != expected)


def output_padding(
    x: torch.Tensor,
    output_size: Sequence[int] | None,
    default: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
) -> Sequence[int]:
    """What a transposed convolution adds to its output, so that it has the size that a call asks for.

    Args:
        x: The input.
        output_size: The size, with or without the dimensions before the spatial ones; or None.
        default: What the layer adds if no size is asked for.
        stride: Of the layer; what follows, too.
        padding: Likewise.
        kernel_size: Likewise.
        dilation: Likewise.

    Raises:
        ValueError: PyTorch's own, for a size that the layer cannot give.
    """
    if output_size is None:
        return default
    layer: Any = SimpleNamespace(output_padding=default)
    geometry: tuple[Any, ...] = (stride, padding, kernel_size, len(kernel_size), dilation)
    size: Any = output_size
    found: Sequence[int] = torch_private.OUTPUT_PADDING(layer, x, size, *geometry)
    return found


def spread(
    vector: torch.Tensor, like: torch.Tensor, axes: Sequence[int], sizes: Sequence[int]
) -> torch.Tensor:
    """A vector of the output features in the shape in which it meets an output.

    Args:
        vector: [out].
        like: The output. A matrix times a vector has its features where a product has its rows.
        axes: Where the features lie in an output, counted from its end.
        sizes: Their sizes, where they are several dimensions.

    Returns:
        A view with 1 for every other dimension behind the first of the axes.
    """
    if like.dim() < -min(axes):
        return vector
    if len(axes) > 1:
        order = sorted(range(len(axes)), key=lambda place: axes[place])
        vector = vector.view(tuple(sizes)).permute(order)
    kept = iter(vector.shape)
    first = min(axes)
    return vector.reshape([next(kept) if axis in axes else 1 for axis in range(first, 0)])
