"""What each operation of traced Python code means: recorded, computed, or refused.

The code of a forward, and of every function that it reaches, is rewritten (:mod:`.instrument`) so that it
calls the methods of a :class:`Frame`. The rule is an allowlist. An operation on a traced value is recorded
where the graph does the same when it runs. An operation on values that are known is computed at once, and
every value that was read to get there is noted as a :class:`~lora_fx.passes.graph.reads.Read`, which guards
the graph. Everything else ends the trace with the reason, and the module keeps its own forward.

Some refusals go on recording (``refuse_softly``): the graph is thrown away, but what was recorded says how
the code cuts up the outputs of its layers (:attr:`lora_fx.ir.graph.Capture.begun`).
"""

from __future__ import annotations

import builtins
import enum
import functools
import inspect
import itertools
import math
import operator
import sys
import types
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import torch_private
from lora_fx.passes.capture.instrument import SourceError
from lora_fx.passes.capture.proxies import TracedValue, attribute_of, holds_traced
from lora_fx.passes.graph import (
    CONTAINERS,
    SIMPLE,
    ModuleRoot,
    ObjectRoot,
    Path,
    Read,
    frozen,
    is_constant,
)
from lora_fx.runtime import ops

if TYPE_CHECKING:
    from lora_fx.passes.capture.symbolic import Recorder

__all__ = ["Frame", "path_in"]

_DEPTH = 40  # calls within calls; a trace that goes deeper does not end
_LIBRARIES = ("torch", "lora_fx")
_RUNTIME = (
    "lora_fx.runtime."  # what is written out calls its functions, and they are not looked into
)
_PLAIN = (
    *SIMPLE,
    *CONTAINERS,
    range,
    slice,
    type(...),
    type(NotImplemented),
    torch.Size,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.finfo,
    torch.iinfo,
)
# What an operation may be done with, besides what is plain.
_OPERANDS: tuple[Any, ...] = (TracedValue, torch.Tensor, enum.Enum, type, tuple, np.generic)
_FUNCTIONS: tuple[Any, ...] = (FunctionType, BuiltinFunctionType)
# What code in C computes with, and nothing of a class of the user's.
_HANDED: tuple[Any, ...] = (
    *_OPERANDS,
    *_FUNCTIONS,
    nn.Module,
    types.ModuleType,
    MethodType,
    functools.partial,
)
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_READERS = frozenset({"get", "items", "keys", "values", "index", "count", "copy", "__getitem__"})
_HOLDERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_CALLED = (FunctionType, BuiltinFunctionType, MethodType, type, types.MethodDescriptorType)
# Their functions are operators, and hand themselves on although nobody lists them.
_OF_OPERATORS = frozenset(
    f"torch._C._{name}" for name in ("fft", "linalg", "nested", "nn", "sparse", "special")
)
_LOOKS = "a decorator of its forward looks at what was passed"
_MISSING, _ABSENT = object(), object()
_ANSWERING = (
    enum.Enum,
    super,
    BuiltinFunctionType,
    FunctionType,
    MethodType,
    types.MethodWrapperType,
    # What is made of a function, which stays what it is.
    types.MappingProxyType,
    inspect.Signature,
    inspect.Parameter,
)
_IN_WORDS: dict[Any, str] = {
    torch.no_grad: "switches gradients on or off, which a graph would lose",
    torch.enable_grad: "switches gradients on or off, which a graph would lose",
    torch.set_grad_enabled: "switches gradients on or off, which a graph would lose",
    torch.inference_mode: "switches gradients on or off, which a graph would lose",
    torch.autocast: "asks PyTorch for autocast, which may be another when the graph runs",
    torch.is_grad_enabled: "asks PyTorch for the grad mode, which may be another when the graph runs",
    torch.is_inference_mode_enabled: "asks PyTorch for the grad mode, which may be another when the graph "
    "runs",
    torch.is_autocast_enabled: "asks PyTorch for autocast, which may be another when the graph runs",
    nn.Module.train: "calls train() or eval()",
    nn.Module.eval: "calls train() or eval()",
}
# Functions that a library puts in place of one of torch's, in the whole process and for good: what they
# compute is the same.
_STANDING_IN: dict[str, Any] = {
    "deepspeed.runtime.zero.linear.zero3_linear_wrap": F.linear,
}
# Answers that do not change between a trace and a call without a compiler.
_ALWAYS_FALSE: tuple[Any, ...] = (vars(torch.jit)["is_scripting"], vars(torch.jit)["is_tracing"])
_PURE = frozenset(
    {
        abs, all, any, bin, callable, chr, divmod, format, hex, len, max, min, oct, ord, pow, repr,
        round, sorted, sum,
        *(one for one in vars(math).values() if isinstance(one, BuiltinFunctionType)),
        *(one for one in vars(operator).values() if isinstance(one, BuiltinFunctionType)),
    }
)  # fmt: skip
_CLASSES = frozenset(
    {
        bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, range, slice, object,
        torch.Size, torch.device, torch.dtype,
    }
)  # fmt: skip


class _PassedValues(tuple[Any, ...]):
    """``*args`` of a decorator: it may hand them on, and ask nothing of them."""


class _PassedKeywords(dict[str, Any]):
    """``**kwargs`` of a decorator: it may ask for a name that was not given, and hand the rest on."""


class _TracedText(str):
    """A text with traced values in it: a message, and nothing that a graph could hold."""


class _FirstOf(list[Any]):
    """``self.parameters()``: the first of them may be asked for."""


class Frame:
    """One function whose rewritten code runs; its methods are what the code calls."""

    def __init__(self, recorder: Recorder, function: FunctionType, path: Path | None) -> None:
        """Prepares.

        Args:
            recorder: Where nodes, reads and refusals go.
            function: The function, as it is.
            path: Where it was read; None for one that was made on the way.
        """
        self.recorder = recorder
        self.function = function
        self.place = path or Path(ObjectRoot(function))
        module = function.__globals__.get("__name__", "")
        self.library = module.partition(".")[0] in _LIBRARIES
        self._traced_text = False

    # --- names --------------------------------------------------------------------------------------

    def global_(self, name: str, value: Any, lookup: bool = False) -> Any:
        """A read of a global or builtin name.

        Args:
            name: The name.
            value: What it stands for.
            lookup: Whether one key is looked up in it, and nothing else is done with it; below, too.
        """
        names = self.function.__globals__
        if name not in names:
            return value
        if self.recorder.wraps(names, name):
            self.recorder.leaves.add(value)
            return value
        module = names.get("__name__", "")
        known = sys.modules.get(module)
        if known is not None and vars(known) is names:
            path = Path(ModuleRoot(module)).attribute(name)
        else:
            path = Path(ObjectRoot(names)).item(name)
        return self.noted(value, path, trusted=self.library, lookup=lookup)

    def free(self, name: str, value: Any, lookup: bool = False) -> Any:
        """A read of a variable of an outer function."""
        if self.library:
            return value
        place = self.function.__code__.co_freevars.index(name)
        # By way of the function: a cell cannot be pickled.
        path = self.place.attribute("__closure__").item(place).attribute("cell_contents")
        # What a decorator wraps is found there, and stays.
        trusted = isinstance(value, FunctionType | type)
        return self.noted(value, path, trusted=trusted, lookup=lookup)

    def write(self, name: str, value: Any) -> None:
        """A write to a name of another scope."""
        self.refuse_here(f"writes to {name}, which is not its own")

    def variadic(self, value: Any) -> Any:
        """``*args`` or ``**kwargs`` as a function gets them."""
        if not self.recorder.entering:
            return value
        return _PassedKeywords(value) if isinstance(value, dict) else _PassedValues(value)

    def super_(self, cls: type, instance: Any) -> Any:
        """``super()``."""
        return super(cls, instance)

    # --- attributes and items -----------------------------------------------------------------------

    def attribute(self, value: Any, name: str, lookup: bool = False) -> Any:
        """``value.name``."""
        recorder = self.recorder
        value = recorder.seen(value)
        if isinstance(value, TracedValue):
            return attribute_of(value, name)
        if isinstance(value, _PassedValues | _PassedKeywords):
            if isinstance(value, _PassedKeywords) and name in ("get", "pop"):
                return functools.partial(self._asked, value)
            recorder.refuse_softly(_LOOKS)
            return getattr(value, name)
        if isinstance(value, nn.Module):
            return self._of_module(value, name, lookup)
        if isinstance(value, FunctionType) and name in vars(value) and name != "__wrapped__":
            path = recorder.path_of(value) or Path(ObjectRoot(value))
            return self.noted(vars(value)[name], path.attribute(name), lookup=lookup)
        if isinstance(value, torch.Tensor) or _answers(value):
            return getattr(value, name)
        if isinstance(value, (_FirstOf, *_VIEWS)):
            return self.refuse_here("goes through its parameters")
        if isinstance(value, types.ModuleType):
            known = sys.modules.get(value.__name__) is value
            here = Path(ModuleRoot(value.__name__)) if known else recorder.path_of(value)
            path = (here or Path(ObjectRoot(value))).attribute(name)
            root = value.__name__.partition(".")[0]
            trusted = self.library or root in _LIBRARIES or root in sys.stdlib_module_names
            return self.noted(getattr(value, name), path, trusted=trusted, lookup=lookup)
        if isinstance(value, type):
            path = _path_of_class(recorder, value).attribute(name)
            return self._of_class(value, name, path, lookup)
        return self._of_object(value, name, lookup)

    def _of_module(self, module: nn.Module, name: str, lookup: bool) -> Any:
        recorder = self.recorder
        path = recorder.path_of(module)
        if name == "training":
            return recorder.mode_of(module)
        if name == "__class__":
            self._note_class(module)
            return type(module)
        own = vars(module)
        if name in ("__dict__", "_parameters", "_buffers", "_modules"):
            self.refuse_softly(f"looks at what {name} of a module holds")
            return own if name == "__dict__" else own[name]
        for kind in ("_parameters", "_buffers"):
            if name in own[kind]:
                tensor = own[kind][name]
                if tensor is None:
                    return self._noted_at(None, path, name)
                return recorder.seen(tensor)
        if name in own["_modules"]:
            child = own["_modules"][name]
            return self._noted_at(None, path, name) if child is None else child
        return self._looked_up(module, name, path, nn.Module, lookup=lookup)

    def _of_object(self, value: Any, name: str, lookup: bool) -> Any:
        path = self.recorder.path_of(value)
        if path is None:
            what = type(value).__name__
            self.refuse_softly(
                f"reads {name} of a {what} that is made on the way or comes from elsewhere"
            )
        return self._looked_up(value, name, path, object, lookup=lookup)

    def _looked_up(
        self,
        value: Any,
        name: str,
        path: Path | None,
        base: type,
        *,
        generic: bool = False,
        lookup: bool = False,
    ) -> Any:
        """An attribute as Python looks it up, its own hooks in Python included."""
        cls = type(value)
        hook = _in_mro(cls, "__getattribute__", base)
        if isinstance(hook, FunctionType) and not generic:
            return self._invoke(hook, path_in(cls, "__getattribute__"), (value, name), {})
        static = _in_mro(cls, name, None)
        if isinstance(static, property):
            if static.fget is None:
                return getattr(value, name)
            self._note_method_of(cls, name, static)
            return self._invoke(static.fget, None, (value,), {})
        own = getattr(value, "__dict__", {})
        if isinstance(static, functools.cached_property) and name not in own:
            return self.refuse_here(f"writes to self.{name}")
        if isinstance(static, types.MemberDescriptorType | types.GetSetDescriptorType):
            return self._noted_at(getattr(value, name), path, name, lookup)
        if static is not _MISSING and hasattr(type(static), "__set__"):
            return self.refuse_here(f"reads {name}, which a {type(static).__name__} computes")
        if name in own:
            return self._noted_at(own[name], path, name, lookup)
        if isinstance(static, FunctionType):
            self.recorder.remember(static, path_in(cls, name))
            self._note_method_of(cls, name, static)
            return MethodType(static, value)
        if static is not _MISSING:
            found = getattr(value, name)
            if isinstance(static, staticmethod | classmethod):
                self._note_method_of(cls, name, found)
                return found
            return self._noted_at(found, path, name, lookup)
        hook = _in_mro(cls, "__getattr__", base)
        if isinstance(hook, FunctionType):
            self._note_absent(value, cls, name, path)
            return self._invoke(hook, path_in(cls, "__getattr__"), (value, name), {})
        raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")

    def _of_class(self, cls: Any, name: str, path: Path, lookup: bool) -> Any:
        found = getattr(cls, name)
        static = _in_mro(cls, name, None)
        if isinstance(static, property | classmethod | staticmethod | FunctionType):
            self._note_method_of(cls, name, found)
            self.recorder.remember(found, path)
            return found
        meta = _in_mro(type(cls), name, None)
        if static is _MISSING and isinstance(meta, property) and meta.fget is not None:
            self._note_method_of(type(cls), name, meta)
            return self._invoke(meta.fget, None, (cls,), {})
        library = cls.__module__.partition(".")[0] in _LIBRARIES
        return self.noted(found, path, trusted=library, lookup=lookup)

    def _note_method_of(self, cls: type, name: str, value: Any) -> None:
        """Notes which function a class has under a name; those of libraries stay what they are."""
        function = ops.function_of(value)
        if isinstance(function, FunctionType) and not _of_library(function):
            kind = "identity" if function is value else "function"
            self.recorder.read(Read(path_in(cls, name), kind, function))

    def _note_absent(self, value: Any, cls: type, name: str, path: Path | None) -> None:
        """Notes that a name is found by a hook alone."""
        places = [Path(ObjectRoot(one)) for one in cls.__mro__ if not _of_library(one)]
        if path is not None and hasattr(value, "__dict__"):
            places.append(path)
        for place in places:
            self.recorder.read(Read(place.attribute("__dict__"), "holds", (name, False)))

    def _noted_at(self, value: Any, path: Path | None, name: str, lookup: bool = False) -> Any:
        return value if path is None else self.noted(value, path.attribute(name), lookup=lookup)

    def item(self, value: Any, key: Any, lookup: bool = False) -> Any:
        """``value[key]``."""
        recorder = self.recorder
        self._check_passed(value)
        if isinstance(value, TracedValue):
            return value[key]
        if holds_traced(key):
            self.refuse_here("looks something up by a traced value")
        self.handed(key)
        if isinstance(value, nn.Module) and _holds(value):
            return self._item_of_holder(value, key)
        if isinstance(value, torch.Tensor):
            return recorder.seen(value)[key]
        if type(value) in _PLAIN or isinstance(value, tuple | type):
            found = value[key]
            path = recorder.path_of(value)
            if path is None or isinstance(key, slice):
                return found
            if isinstance(value, dict) and not _has_literal(key):
                self._note_container(value, path)
                if id(value) not in recorder.settled or type(found) in (list, dict, set):
                    self.refuse_softly(f"looks into {path}, a dict of objects")
                return found
            return self.noted(found, path.item(key), lookup=lookup)
        method = _in_mro(type(value), "__getitem__", None)
        if isinstance(method, FunctionType):
            return self._invoke(method, path_in(type(value), "__getitem__"), (value, key), {})
        if isinstance(value, dict | list):
            path = recorder.path_of(value)
            if path is not None:
                return self.noted(value[key], path.item(key))
        return self.refuse_here(f"reads an item of a {type(value).__name__}")

    def _item_of_holder(self, holder: Any, key: Any) -> Any:
        self._note_length(holder)
        if isinstance(holder, nn.ModuleDict):
            return holder._modules[key]
        if isinstance(holder, nn.ParameterList | nn.ParameterDict):
            return self.attribute(
                holder, str(range(len(holder))[key]) if isinstance(key, int) else key
            )
        children = list(holder._modules.values())
        return children[key]

    def slice(self, start: Any, stop: Any, step: Any) -> slice:
        """``start:stop:step``."""
        return slice(*map(self.handed, (start, stop, step)))

    def set_attribute(self, value: Any, name: str, new: Any) -> None:
        """``value.name = new``."""
        if isinstance(value, nn.Module):
            at = self.recorder.path_of(value)
            place = f"{at}.{name}" if at is not None else name
            self.refuse_here(f"writes to {place}, an attribute of a module ({name})")
        self.refuse_here(f"writes to an attribute ({name})")

    def set_item(self, value: Any, key: Any, new: Any) -> None:
        """``value[key] = new``."""
        value = self.recorder.seen(value)
        if isinstance(value, TracedValue):
            value[key] = new
            return
        self._check_own(value)
        if holds_traced(key):
            self.refuse_here("looks something up by a traced value")
        value[key] = new

    def _check_own(self, value: Any) -> None:
        """Refuses to change a container that was there before."""
        path = self.recorder.path_of(value)
        if path is not None or type(value) not in (list, dict, set):
            where = f"changes what is in {path}" if path is not None else "changes an object"
            self.refuse_here(where)

    # --- reads --------------------------------------------------------------------------------------

    def noted(self, value: Any, path: Path, *, trusted: bool = False, lookup: bool = False) -> Any:
        """What a read gives: noted with where it comes from.

        Args:
            value: What was read.
            path: Where.
            trusted: Whether functions and classes found there stay what they are.
            lookup: Whether one key is looked up in it, and nothing else is done with it. Of a dict that entry
                is noted then, and not what else it holds.
        """
        recorder = self.recorder
        if isinstance(value, types.ModuleType):
            recorder.remember(value, path)
        if isinstance(value, TracedValue | nn.Module | types.ModuleType):
            return value
        if isinstance(value, torch.Tensor):
            return recorder.seen(value)
        kind = _compared_by(value)
        if kind is not None:
            recorder.read(Read(path, kind, value))
        elif lookup and type(value) is dict:
            recorder.remember(value, path)
        elif type(value) in CONTAINERS or type(value) is torch.Size:
            self._note_container(value, path)
        elif isinstance(value, _CALLED):
            self._note_called(value, path, trusted)
        else:
            self._note_object(value, path, trusted)
        return value

    def _note_called(self, value: Any, path: Path, trusted: bool) -> None:
        if isinstance(value, MethodType) and isinstance(value.__self__, type):
            return
        if isinstance(value, MethodType) or _random(value):
            if not trusted or _random(value):
                self._note_method(value, path)
            return
        self.recorder.remember(value, path)
        if not trusted:
            self.recorder.read(Read(path, "identity", value))

    def _note_object(self, value: Any, path: Path, trusted: bool) -> None:
        recorder = self.recorder
        if isinstance(value, SIMPLE) and not isinstance(value, enum.Enum):
            recorder.read(Read(path, "contents", value))  # a number or text of a class of its own
        if isinstance(value, np.ndarray | np.generic):
            self.refuse_softly(f"reads {path}, a NumPy array that may change")
        elif type(value) in (range, slice, object):
            recorder.read(Read(path, "identity", value))
        elif type(value).__module__ == "builtins" or isinstance(value, Iterator):
            what = f"reads {path}, a {type(value).__name__} that may change"
            if isinstance(value, Iterator):
                self.refuse_here(what)  # going on would use it up
            self.refuse_softly(what)
        elif not (trusted and callable(value)):
            recorder.remember(value, path)
            known = recorder.path_of(value)
            if known is not None and known != path:
                recorder.read(Read(path, "same", known))  # what is read of it is noted there
            recorder.read(Read(path, "class", type(value)))

    def _note_method(self, value: Any, path: Path) -> None:
        if "random" in type(value.__self__).__module__:
            self.refuse_here("draws random numbers that the graph would keep")
        if (
            not isinstance(value.__self__, nn.Module)
            or self.recorder.path_of(value.__self__) is None
        ):
            self.refuse_softly(f"reads {path}, a method of another object")

    def _note_container(self, value: Any, path: Path) -> None:
        recorder = self.recorder
        recorder.remember(value, path)
        if is_constant(value):
            recorder.read(Read(path, "contents", frozen(value)))
            self._settle(value, path)
        elif type(value) in (set, frozenset):
            self.refuse_softly(f"reads {path}, a set of objects")
        else:
            recorder.read(Read(path, "length", len(value)))

    def _note_class(self, module: nn.Module) -> None:
        path = self.recorder.path_of(module)
        if path is not None and path.steps:
            self.recorder.read(Read(path, "class", type(module)))

    def _note_present(self, module: nn.Module) -> None:
        path = self.recorder.path_of(module)
        if path is not None and path.steps:
            self.recorder.read(Read(path, "present", None))

    def _note_length(self, holder: nn.Module) -> None:
        path = self.recorder.path_of(holder)
        if path is None:
            return
        if isinstance(holder, nn.ParameterDict):
            self.recorder.read(Read(path, "keys", list(holder)))
        elif isinstance(holder, nn.ParameterList):
            # Their names are numbers, in order.
            self.recorder.read(Read(path, "length", len(holder)))
        elif isinstance(holder, nn.ModuleList):
            self.recorder.read(Read(path, "modules", len(ops.children_of(holder))))
        else:
            self.note_children(holder)

    def _settle(self, value: Any, path: Path) -> None:
        """Says that all that is in a container is noted, and in those inside."""
        self.recorder.settled.add(id(value))
        for key, one in value.items() if type(value) is dict else enumerate(value):
            if type(one) in CONTAINERS:
                self.recorder.remember(one, path.item(key))
                self._settle(one, path.item(key))

    def note_children(self, module: nn.Module) -> None:
        """Notes which children a module has, and their order."""
        path = self.recorder.path_of(module)
        if path is not None:
            self.recorder.read(Read(path, "children", ops.children_of(module)))
            for name, child in module._modules.items():
                if child is None:
                    self._noted_at(None, path, name)

    # --- operators ----------------------------------------------------------------------------------

    def binary(self, name: str, left: Any, right: Any) -> Any:
        """An operator of two operands."""
        left, right = self._operand(left), self._operand(right)
        if name == "mod" and isinstance(left, str | bytes):
            self.text(right)
        return getattr(operator, name)(left, right)

    def unary(self, name: str, value: Any) -> Any:
        """An operator of one operand."""
        return getattr(operator, name)(self._operand(value))

    def in_place(self, name: str, left: Any, right: Any) -> Any:
        """``left += right`` and the like."""
        left, right = self._operand(left), self._operand(right)
        if not isinstance(left, TracedValue) and type(left) in (list, dict, set):
            self._check_own(left)
            right = self.iterate(right) if name == "iadd" else right
        return getattr(operator, name)(left, right)

    def _operand(self, value: Any) -> Any:
        self._check_passed(value)
        value = self.recorder.seen(value)
        if type(value) not in _PLAIN and not isinstance(value, _OPERANDS):
            self.refuse_softly(f"computes with a {type(value).__name__}")
        return value

    def handed(self, value: Any) -> Any:
        """A value that code in C computes with, and what is in it.

        An object of a class of its own computes by methods that nothing has looked into, or is a number that
        nothing has noted.
        """
        if type(value) in CONTAINERS or isinstance(value, tuple):
            for one in value.values() if isinstance(value, dict) else value:
                self.handed(one)
        elif isinstance(value, Iterator):
            return map(self.handed, value)
        elif type(value) not in _PLAIN and not isinstance(value, _HANDED):
            self.refuse_softly(f"computes with a {type(value).__name__}")
        return value

    def compare(self, name: str, left: Any, right: Any) -> Any:
        """A comparison of two values."""
        if name not in ("in", "not in"):
            self._check_passed(left, right)
        if name in ("is", "is not"):
            same = self._same(left, right)
            return same if name == "is" else not same
        if name in ("in", "not in"):
            if isinstance(right, _PassedKeywords) and isinstance(left, str):
                return self._asked(right, left, name == "not in")
            self._check_passed(left, right)
            found = self._contains(right, self.handed(left))
            return found if name == "in" else not found
        if any(holds_traced(one) and not isinstance(one, TracedValue) for one in (left, right)):
            self.refuse_here("compares containers of traced values")
        if not isinstance(left, TracedValue) and not isinstance(right, TracedValue):
            left, right = self._comparable(left), self._comparable(right)
        return getattr(operator, name)(left, right)

    def _comparable(self, value: Any) -> Any:
        value = self.recorder.seen(value)
        if type(value) not in _PLAIN and not isinstance(value, (*_OPERANDS, *_FUNCTIONS)):
            self.refuse_softly(f"compares a {type(value).__name__}")
        return value

    def _same(self, left: Any, right: Any) -> bool:
        recorder = self.recorder
        for value, other in ((left, right), (right, left)):
            if isinstance(value, TracedValue):
                if other is None:
                    return recorder.is_none(value)
                return self.refuse_here("asks for the type or the identity of a traced value (is)")
        for value, other in ((left, right), (right, left)):
            if isinstance(value, nn.Module) and other is None:
                self._note_present(value)
        for value in (left, right):
            if isinstance(
                value, enum.Enum | type | FunctionType | BuiltinFunctionType | torch.dtype
            ):
                return left is right
            if value is None or isinstance(value, bool) or value in (..., NotImplemented):
                return left is right
        for value in (left, right):
            path = recorder.path_of(value)
            if type(value) is object or recorder.is_fixed(value):
                continue  # the guard compares it by identity anyway
            if isinstance(value, nn.Module) or path is None:
                self.refuse_softly("compares objects by identity")
            else:
                recorder.read(Read(path, "identity", value))
        return left is right

    def _contains(self, container: Any, value: Any) -> Any:
        if isinstance(container, TracedValue):
            return value in container
        if holds_traced(value) or holds_traced(container):
            self.refuse_here("looks for something by a traced value (in)")
        self._refuse_identity(container, value)
        if isinstance(container, nn.Module) and _holds(container):
            self._note_length(container)
            return value in container  # type: ignore[operator]
        method = _in_mro(type(container), "__contains__", None)
        if isinstance(method, FunctionType):
            return self._invoke(method, None, (container, value), {})
        if type(container) not in _PLAIN and not isinstance(container, (*_VIEWS, tuple)):
            self.refuse_softly(f"looks into a {type(container).__name__}")
        if type(container) is str or self._settled(container):
            return value in container
        if isinstance(container, dict):
            return self._holds_key(container, value)
        self.iterate(container)
        return value in container

    def _refuse_identity(self, container: Any, value: Any) -> None:
        """Gives up where code asks whether a module is one of several: it may be replaced by another."""
        several = type(container) in CONTAINERS or isinstance(
            container, nn.ModuleList | nn.Sequential
        )
        if isinstance(value, nn.Module) or (
            several and any(isinstance(one, nn.Module) for one in container)
        ):
            self.refuse_softly("compares objects by identity")

    def _holds_key(self, holder: dict[Any, Any], key: Any) -> bool:
        """Whether a dict that was there before has a key."""
        path = self.recorder.path_of(holder)
        assert path is not None
        if not _has_literal(key):
            self._note_container(holder, path)
            if id(holder) in self.recorder.settled:
                return key in holder
            self.refuse_softly(f"looks into {path}, a dict of objects")
        self.recorder.read(Read(path, "holds", (key, key in holder)))
        return key in holder

    def _entries(self, holder: dict[Any, Any], path: Path) -> dict[Any, Any]:
        """What a dict holds that was there before, all of it noted."""
        keys = list(holder)
        if not is_constant(keys):
            self.refuse_softly(f"goes through {path}, a dict of objects")
            return holder
        self.recorder.read(Read(path, "keys", keys))
        return {key: self.noted(value, path.item(key)) for key, value in holder.items()}

    def _settled(self, container: Any) -> bool:
        return self.recorder.path_of(container) is None or id(container) in self.recorder.settled

    def truth(self, value: Any) -> Any:
        """A value whose truth decides: Python asks it next."""
        recorder = self.recorder
        self._check_passed(value)
        value = recorder.seen(value)
        if isinstance(value, TracedValue):
            return recorder.to_bool(value)
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, nn.Module):
            self._note_present(value)
            if _holds(value):
                self._note_length(value)
            elif _in_mro(type(value), "__len__", nn.Module) is not _MISSING:
                self.refuse_softly("asks for the truth of a module")
            return value
        known = type(value) in _PLAIN or isinstance(value, enum.Enum | type | FunctionType | tuple)
        if not known and not isinstance(value, MethodType | BuiltinFunctionType | np.generic):
            for name in ("__bool__", "__len__"):
                if _in_mro(type(value), name, None) is not _MISSING:
                    self.refuse_softly(f"asks for the truth of a {type(value).__name__}")
        return value

    def text(self, value: Any) -> Any:
        """A value that becomes part of a text."""
        self._check_passed(value)
        if holds_traced(value) or isinstance(value, _TracedText):
            self.refuse_here("turns a traced value into a text")
        if not (is_constant(value, 10**6) or isinstance(value, type | FunctionType)):
            self.refuse_softly(f"turns a {type(value).__name__} into a text")
        return value

    def part(self, value: Any) -> Any:
        """A value in an f-string."""
        if holds_traced(value) or isinstance(value, _TracedText):
            self._traced_text = True
            return "..."
        return self.text(value)

    def joined(self, text: str) -> str:
        """An f-string."""
        traced, self._traced_text = self._traced_text, False
        return _TracedText(text) if traced else text

    def key(self, value: Any) -> Any:
        """A key of a dict that is made."""
        if holds_traced(value):
            self.refuse_here("makes a key of a traced value")
        return value

    def subject(self, value: Any) -> Any:
        """What a ``match`` statement compares with literals."""
        if holds_traced(value) or not is_constant(value):
            self.refuse_here("matches the structure of a value")
        return value

    def enter(self, value: Any) -> Any:
        """A context manager."""
        reason = _IN_WORDS.get(type(value)) or "enters a context manager, which a graph would lose"
        self.refuse_softly(reason)

    def caught(self) -> None:
        """A ``try`` that is entered."""
        self.refuse_softly(
            "catches exceptions (try), and a trace does not know which there will be"
        )

    def refuse_here(self, what: str) -> NoReturn:
        """Code that is not known to be recorded."""
        self.recorder.refuse(f"its forward {what}")

    def refuse_softly(self, what: str) -> None:
        """As :meth:`refuse_here`, and goes on."""
        self.recorder.refuse_softly(f"its forward {what}")

    # --- iteration ----------------------------------------------------------------------------------

    def iterate(self, value: Any) -> Any:
        """Something to iterate over."""
        recorder = self.recorder
        self._check_passed(value)
        value = recorder.seen(value)
        if isinstance(value, TracedValue | torch.Tensor):
            return iter(value)
        if isinstance(value, _FirstOf):
            return self.refuse_here("goes through its parameters")
        if isinstance(value, nn.Module) and _holds(value):
            self._note_length(value)
            if isinstance(value, nn.ParameterList):
                return [self.attribute(value, str(i)) for i in range(len(value))]
            if isinstance(value, nn.ModuleDict | nn.ParameterDict):
                return list(value)
            return list(value._modules.values())
        path = recorder.path_of(value)
        if path is not None and type(value) in CONTAINERS and id(value) not in recorder.settled:
            if isinstance(value, dict):
                return self._entries(value, path)
            return [self.noted(one, path.item(place)) for place, one in enumerate(value)]
        method = _in_mro(type(value), "__iter__", None)
        if isinstance(method, FunctionType):
            return self._invoke(method, path_in(type(value), "__iter__"), (value,), {})
        if path is not None and type(value) not in CONTAINERS and not isinstance(value, tuple):
            self.refuse_softly(f"goes through {path}, a {type(value).__name__}")
        return value

    def spread(self, value: Any) -> Any:
        """What ``*`` or ``**`` spreads into a call."""
        if isinstance(value, _PassedValues | _PassedKeywords):
            return value
        if isinstance(value, dict):
            path = self.recorder.path_of(value)
            if path is None or id(value) in self.recorder.settled:
                return value
            return self._entries(value, path)
        return self.iterate(value)

    def unpack(self, value: Any, count: int, star: int | None) -> Any:
        """``a, b = value``, with a starred target or without."""
        self._check_passed(value)
        if isinstance(value, TracedValue) and star is None:
            return tuple(value[place] for place in range(count))
        items = list(self.iterate(value))
        if star is None:
            if len(items) != count:
                raise ValueError(f"cannot unpack {len(items)} values into {count}")
            return tuple(items)
        behind = count - star - 1
        if len(items) < count - 1:
            raise ValueError(f"cannot unpack {len(items)} values into {count - 1} and more")
        end = len(items) - behind
        return (*items[:star], items[star:end], *items[end:])

    def _asked(self, passed: _PassedKeywords, name: str, default: Any = None) -> Any:
        """What a decorator finds under a name in its ``**kwargs``: nothing, as long as nothing is given."""
        if name in passed:
            self.recorder.refuse_softly(_LOOKS)
            return passed.pop(name, default)
        self.recorder.omitted.add(name)
        return default

    def _check_passed(self, *values: Any) -> None:
        if any(isinstance(value, _PassedValues | _PassedKeywords) for value in values):
            self.recorder.refuse_softly(_LOOKS)

    # --- calls --------------------------------------------------------------------------------------

    def call(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``."""
        self._check_passed(function, *args, *kwargs.values())
        if function is torch_private.TRACED_ASSERT:
            return self.recorder.create_proxy(
                "call_function", function, (args[0], str(args[1])), {}
            )
        if torch_private.is_apply(function):
            self.refuse_here(f"calls an autograd function ({_name(function.__self__)})")
        message = isinstance(function, type) and issubclass(function, BaseException)
        if not message and any(isinstance(one, _TracedText) for one in (*args, *kwargs.values())):
            self.refuse_here("turns a traced value into a text")
        reason = _IN_WORDS.get(function) if _hashable(function) else None
        if reason is not None and not isinstance(function, type):
            self.refuse_here(reason)
        for kinds, handle in _CALLS:
            if isinstance(function, kinds):
                return handle(self, function, args, kwargs)
        return self._call_other(function, args, kwargs)

    def _call_traced(self, function: Any, args: Any, kwargs: Any) -> Any:
        if "_name" not in function.__dict__:
            self.refuse_here("calls a traced value")
        return function(*args, **kwargs)

    def _call_child(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.recorder.call_child(module, args, kwargs)

    def _call_bound(self, method: MethodType, args: Any, kwargs: Any) -> Any:
        function, owner = method.__func__, method.__self__
        if function in _MODULE_METHODS and isinstance(owner, nn.Module):
            return _MODULE_METHODS[function](self, owner, *args, **kwargs)
        return self.call(function, owner, *args, **kwargs)

    def _call_partial(self, function: Any, args: Any, kwargs: Any) -> Any:
        if getattr(function.func, "__func__", None) is Frame._asked:
            return function(*args, **kwargs)
        path = self.recorder.path_of(function)
        for name in ("func", "args", "keywords") if path is not None else ():
            assert path is not None
            self.noted(getattr(function, name), path.attribute(name))
        return self.call(function.func, *function.args, *args, **{**function.keywords, **kwargs})

    def _call_cached(self, function: Any, args: Any, kwargs: Any) -> Any:
        return self.call(function.__wrapped__, *args, **kwargs)

    def _call_operator(self, function: Any, args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def _call_other(self, function: Any, args: Any, kwargs: Any) -> Any:
        # Those that make tensors of nothing are not overridable, and refused by the mode.
        if _of_torch(function) or _makes_tensors(function):
            # Parameters that code got hold of in some other way than by their names are reads, too.
            args = tuple(map(self.recorder.seen, args))
            if _is_function(function) and (holds_traced(args) or holds_traced(kwargs)):
                # Not by a call: that would want to see numbers where the graph has traced ones.
                return self.recorder.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)
        special = _BUILTINS.get(function) if _hashable(function) else None
        if special is not None:
            return special(self, *args, **kwargs)
        if isinstance(function, BuiltinFunctionType | types.MethodWrapperType):
            return self._call_builtin(function, args, kwargs)
        method = _in_mro(type(function), "__call__", None)
        if isinstance(method, FunctionType) and not isinstance(function, torch.jit.ScriptFunction):
            path = path_in(type(function), "__call__")
            return self._invoke(method, path, (function, *args), kwargs)
        return self.refuse_here(f"calls {_name(function)}, which cannot be looked into")

    def _call_function(self, function: FunctionType, args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        if function.__code__ in recorder.codes:
            return function(*args, **kwargs)  # made by rewritten code, and so rewritten itself
        if function in recorder.leaves or (function.__module__ or "").startswith(_RUNTIME):
            return recorder.call_leaf(function, args, kwargs)
        if function in _ALWAYS_FALSE:
            return False
        if function in _BUILTINS:
            return _BUILTINS[function](self, *args, **kwargs)
        if (
            standing := _STANDING_IN.get(f"{function.__module__}.{function.__qualname__}")
        ) is not None:
            return self.call(standing, *args, **kwargs)
        if _is_leaf(function):
            return function(*map(recorder.seen, args), **kwargs)
        return self._invoke(function, recorder.path_of(function), args, kwargs)

    def _invoke(self, function: Any, path: Path | None, args: Any, kwargs: Any) -> Any:
        """Runs a Python function, rewritten."""
        recorder = self.recorder
        if not isinstance(function, FunctionType):
            return self.call(function, *args, **kwargs)
        recorder.enter(function, args, kwargs)
        self._note_defaults(function)
        if recorder.depth >= _DEPTH:
            self.refuse_here("calls functions within functions without an end")
        try:
            made = recorder.rewritten(function, path)
        except SourceError as error:
            return self.refuse_here(f"cannot be read: {function.__qualname__} {error}")
        recorder.depth += 1
        try:
            return made(*args, **kwargs)
        finally:
            recorder.depth -= 1

    def _note_defaults(self, function: FunctionType) -> None:
        if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
            return
        for name in ("__defaults__", "__kwdefaults__"):
            value = getattr(function, name)
            if value and function is not self.recorder.target:
                place = self.recorder.path_of(function) or Path(ObjectRoot(function))
                self.noted(value, place.attribute(name))

    def _call_class(self, cls: type, args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        special = _BUILTINS.get(cls)
        if special is not None:
            return special(self, *args, **kwargs)
        if cls in (torch.finfo, torch.iinfo) and holds_traced(args):
            return recorder.create_proxy("call_function", cls, args, kwargs)
        if cls in _CLASSES or cls in (torch.finfo, torch.iinfo):
            if cls in (tuple, list, set, frozenset) and args:
                args = (self.iterate(args[0]), *args[1:])
            elif cls is dict and args:
                args = (self.spread(args[0]), *args[1:])
            elif cls in (str, bytes):
                self.text(args)
            else:
                args = tuple(map(self._operand, args))
            return cls(*args, **kwargs)
        if issubclass(cls, BaseException) or _is_context(cls) or cls is functools.partial:
            return cls(*args, **kwargs)
        if issubclass(cls, tuple) and hasattr(cls, "_fields"):
            return cls(*args, **kwargs)
        if "__dataclass_fields__" in vars(cls) and not issubclass(cls, nn.Module):
            return recorder.create_proxy("call_function", cls, args, kwargs)
        own = (_in_mro(cls, name, None) for name in ("__init__", "__new__"))
        if issubclass(cls, list | dict) and not any(isinstance(one, FunctionType) for one in own):
            return cls(*args, **kwargs)
        return self.refuse_here(f"makes an object ({cls.__qualname__})")

    def _call_builtin(self, function: Any, args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        owner = getattr(function, "__self__", None)
        name = function.__name__
        if isinstance(function, types.MethodWrapperType):
            if name == "__getattribute__" and len(args) == 1:
                base = nn.Module if isinstance(owner, nn.Module) else object
                return self._looked_up(owner, args[0], recorder.path_of(owner), base, generic=True)
            return self.refuse_here(f"calls {name}, which cannot be looked into")
        if owner is None or isinstance(owner, types.ModuleType):
            if function in _PURE:
                if function in (callable, format, repr):
                    self.text(args)
                if holds_traced(args) and function.__module__ == "math":
                    return recorder.create_proxy("call_function", function, args, kwargs)
                given = args if function is callable else tuple(map(self.handed, args))
                return function(*given, **kwargs)
            return self.refuse_here(f"calls {_name(function)}, which cannot be looked into")
        if type(owner) is str or isinstance(owner, str):
            self.text(args)
            return function(*args, **kwargs)
        if isinstance(owner, types.MappingProxyType):
            return function(*args, **kwargs)
        if type(owner) in (list, dict, set, tuple, frozenset, torch.Size, range):
            return self._call_method_of_container(function, owner, name, args, kwargs)
        if type(owner) in _PLAIN:
            return function(*args, **kwargs)
        drawn = "random" in f"{type(owner).__module__}.{type(owner).__name__}".lower()
        what = (
            "draws random numbers that the graph would keep"
            if drawn
            else f"calls {_name(function)}"
        )
        return self.refuse_here(what)

    def _call_method_of_container(
        self, function: Any, owner: Any, name: str, args: Any, kwargs: Any
    ) -> Any:
        path = self.recorder.path_of(owner)
        if name not in _READERS and path is not None:
            where = f"changes what is in {path}"
            if holds_traced(args):
                where += ", and keeps a traced value where other code finds it"
            self.refuse_here(where)
        if isinstance(owner, dict) and args and holds_traced(args[0]):
            self.refuse_here("looks something up by a traced value")
        if isinstance(owner, dict | set | frozenset) or name in ("index", "count", "remove"):
            self.handed(args[:1])
        if name in ("index", "count", "remove") and (holds_traced(args) or holds_traced(owner)):
            self.refuse_here("looks for something by a traced value")
        if name == "extend" and args:
            args = (self.iterate(args[0]),)
        if path is None or id(owner) in self.recorder.settled:
            return function(*args, **kwargs)
        if isinstance(owner, dict) and name == "get":
            if self._holds_key(owner, args[0]):
                return self.item(owner, args[0])
            return function(*args, **kwargs)
        if name in ("index", "count", "copy"):
            self.iterate(owner)
        if name in ("items", "values", "keys"):
            return getattr(self._entries(owner, path), name)()
        return function(*args, **kwargs)


_CALLS: tuple[tuple[Any, Callable[..., Any]], ...] = (
    (TracedValue, Frame._call_traced),
    (nn.Module, Frame._call_child),
    (MethodType, Frame._call_bound),
    (FunctionType, Frame._call_function),
    (type, Frame._call_class),
    (functools.partial, Frame._call_partial),
    (functools._lru_cache_wrapper, Frame._call_cached),
    ((torch_private.OpOverload, torch_private.OpOverloadPacket), Frame._call_operator),
)


def _answers(value: Any) -> bool:
    """Whether what an object says of itself is the same each time, or nothing comes of it."""
    # A context manager was made on the way, and does nothing before it is entered.
    return type(value) in _PLAIN or isinstance(value, _ANSWERING) or _is_context(type(value))


def _compared_by(value: Any) -> str | None:
    """How a simple value is compared; None for any other."""
    if type(value) in SIMPLE or isinstance(value, torch.device):
        return "value"
    by_identity = enum.Enum | torch.dtype | torch.layout | torch.memory_format
    constants = (type(...), type(NotImplemented))
    return "identity" if isinstance(value, by_identity) or type(value) in constants else None


def _has_literal(key: Any) -> bool:
    """Whether a key can be spelled in generated code."""
    if type(key) is tuple:
        return all(map(_has_literal, key))
    if type(key) is float:
        return math.isfinite(key)
    return type(key) in (str, bytes, int, bool, type(None), torch.dtype)


def _path_of_class(recorder: Recorder, cls: type) -> Path:
    return recorder.path_of(cls) or Path(ObjectRoot(cls))


def _of_library(value: Any) -> bool:
    """Whether a function or class is of a library that stays what it is."""
    root = (value.__module__ or "").partition(".")[0]
    return root in _LIBRARIES or root in sys.stdlib_module_names


def path_in(cls: type, name: str) -> Path:
    """Where a class keeps a function, or a class above it."""
    return Path(ObjectRoot(cls)).attribute(name)


def _in_mro(cls: type, name: str, base: type | None) -> Any:
    """What a class, or one above it and below ``base``, has under a name."""
    for one in cls.__mro__:
        if one is base:
            break
        if name in one.__dict__:
            return one.__dict__[name]
    return _MISSING


def _holds(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's containers, as far as its items go."""
    own: Any = type(module)
    return any(
        isinstance(module, one)
        and all(
            getattr(own, name, None) is getattr(one, name, None)
            for name in ("__getitem__", "__iter__", "__len__", "__contains__", "__bool__")
        )
        for one in _HOLDERS
    )


def _random(function: Any) -> bool:
    """Whether a function is a method of a random generator."""
    return "random" in type(getattr(function, "__self__", None)).__module__


def _is_context(cls: type) -> bool:
    """Whether objects of a class only wait to be entered, which is refused then."""
    return cls.__module__ == "contextlib" or issubclass(cls, torch_private.DecoratorContextManager)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _name(function: Any) -> str:
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", None) or type(function).__name__
    return f"{module}.{name}" if module not in ("", "builtins") else str(name)


@functools.cache
def _overridable() -> frozenset[Any]:
    return frozenset(torch.overrides.get_testing_overrides())


def _of_torch(function: Any) -> bool:
    """Whether a function of C hands itself to stand-ins that it is called with."""
    if isinstance(function, type) or not _hashable(function):
        return False
    return function in _overridable() or getattr(function, "__module__", "") in _OF_OPERATORS


def _makes_tensors(function: Any) -> bool:
    """Whether a function of C is one of PyTorch's by name, as ``torch.zeros``."""
    name = getattr(function, "__name__", "")
    return isinstance(function, BuiltinFunctionType) and torch_private.is_torch_function(
        name, function
    )


def _is_function(function: Any) -> bool:
    """Whether a function of C that is overridable is no method or property of a tensor."""
    return _of_torch(function) and not torch.overrides.is_tensor_method_or_property(function)


@functools.lru_cache(maxsize=4096)
def _is_leaf(function: FunctionType) -> bool:
    """Whether a Python function of PyTorch hands itself to stand-ins that it is called with."""
    if (function.__module__ or "").partition(".")[0] != "torch":
        return False
    return function in _overridable() or "handle_torch_function" in function.__code__.co_names


# --- builtins that have a meaning of their own ------------------------------------------------------


def _isinstance(frame: Frame, value: Any, kinds: Any) -> bool:
    frame._check_passed(value)
    if isinstance(value, TracedValue):
        frame.refuse_softly("asks for the type of a traced value with isinstance")
        return True
    if isinstance(value, nn.Module):
        frame._note_class(value)
    return builtins.isinstance(value, kinds)


def _getattr(frame: Frame, value: Any, name: str, default: Any = _MISSING) -> Any:
    if isinstance(value, TracedValue) and default is not _MISSING:
        frame.refuse_here(
            f"looks for an attribute of a traced value ({name}) with hasattr or getattr"
        )
    if default is _MISSING:
        return frame.attribute(value, name)
    _note_there(frame, value, name)
    try:
        return frame.attribute(value, name)
    except AttributeError:
        _note_missing(frame, value, name)
        return default


def _hasattr(frame: Frame, value: Any, name: str) -> bool:
    """``hasattr``."""
    return _getattr(frame, value, name, _ABSENT) is not _ABSENT


def _note_there(frame: Frame, value: Any, name: str) -> None:
    """Notes that an object has an attribute of its own: the code has a way to go where it is deleted."""
    path = _path_asked(frame, value)
    own = [getattr(value, "__dict__", {})]
    if isinstance(value, nn.Module):
        own += [value._modules, value._parameters, value._buffers]
    if path is not None and any(name in one for one in own):
        frame.recorder.read(Read(path.attribute(name), "there", None))


def _path_asked(frame: Frame, value: Any) -> Path | None:
    if isinstance(value, type):
        return _path_of_class(frame.recorder, value)
    return frame.recorder.path_of(value)


def _note_missing(frame: Frame, value: Any, name: str) -> None:
    path = _path_asked(frame, value)
    if path is not None:
        frame.recorder.read(Read(path.attribute(name), "missing", None))


def _type(frame: Frame, value: Any) -> type:
    if isinstance(value, TracedValue):
        frame.refuse_here("asks for the type or the identity of a traced value (type)")
    if isinstance(value, nn.Module):
        frame._note_class(value)
    return builtins.type(value)


def _len(frame: Frame, value: Any) -> int:
    if isinstance(value, nn.Module) and _holds(value):
        frame._note_length(value)
        return len(value)  # type: ignore[arg-type]
    value = frame.recorder.seen(value)
    if isinstance(value, TracedValue | torch.Tensor):
        return len(value)
    method = _in_mro(type(value), "__len__", None)
    if isinstance(method, FunctionType):
        return int(frame._invoke(method, None, (value,), {}))
    return len(value)


def _next(frame: Frame, iterator: Any, *default: Any) -> Any:
    if isinstance(iterator, _FirstOf):
        if not iterator:
            return next(iter(()), *default)
        return frame.recorder.seen(iterator[0])
    if frame.recorder.path_of(iterator) is not None:
        frame.refuse_here("uses up an iterator")
    return next(iterator, *default)


def _map(frame: Frame, function: Any, *values: Any) -> Any:
    return (frame.call(function, *one) for one in zip(*map(frame.iterate, values), strict=False))


def _filter(frame: Frame, function: Any, values: Any) -> Any:
    keep: Any = functools.partial(frame.call, function) if function else lambda one: one
    return (one for one in frame.iterate(values) if frame.truth(keep(one)))


def _reduce(frame: Frame, function: Any, values: Any, *first: Any) -> Any:
    return functools.reduce(functools.partial(frame.call, function), frame.iterate(values), *first)


def _ordered(which: Callable[..., Any]) -> Callable[..., Any]:
    def run(frame: Frame, *values: Any, key: Any = None, **options: Any) -> Any:
        given = values if len(values) > 1 else (frame.iterate(values[0]),)
        if key is None:
            return which(*map(frame.handed, given), **options)
        return which(*given, key=lambda one: frame.handed(frame.call(key, one)), **options)

    return run


def _over_iterable(which: Callable[..., Any]) -> Callable[..., Any]:
    def run(frame: Frame, values: Any, *rest: Any, **options: Any) -> Any:
        return which(frame.iterate(values), *rest, **options)

    return run


def _summed(which: Callable[..., Any]) -> Callable[..., Any]:
    def run(frame: Frame, values: Any, *rest: Any, **options: Any) -> Any:
        return which(frame.handed(iter(frame.iterate(values))), *rest, **options)

    return run


def _asked_each(which: Callable[..., Any]) -> Callable[..., Any]:
    def run(frame: Frame, values: Any) -> Any:
        return which(frame.truth(one) for one in frame.iterate(values))

    return run


def _refused(what: str) -> Callable[..., Any]:
    def run(frame: Frame, *_: Any, **__: Any) -> Any:
        return frame.refuse_here(what)

    return run


def _first_of(which: Callable[..., Any]) -> Callable[..., Any]:
    def run(frame: Frame, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _FirstOf(which(module, *args, **kwargs))

    return run


def _children(which: Callable[..., Any]) -> Callable[..., Any]:
    def run(frame: Frame, module: nn.Module) -> Any:
        frame.note_children(module)
        return list(which(module))

    return run


def _get_tensor(frame: Frame, module: nn.Module, name: str) -> Any:
    owner, _, key = name.rpartition(".")
    return frame.attribute(module.get_submodule(owner), key)


_BUILTINS: dict[Any, Callable[..., Any]] = {
    isinstance: _isinstance,
    getattr: _getattr,
    hasattr: _hasattr,
    setattr: lambda frame, value, name, new: frame.set_attribute(value, name, new),
    type: _type,
    len: _len,
    next: _next,
    iter: lambda frame, value: (
        value if isinstance(value, _FirstOf) else builtins.iter(frame.iterate(value))
    ),
    enumerate: lambda frame, value, start=0: enumerate(frame.iterate(value), start),
    zip: lambda frame, *values, strict=False: zip(*map(frame.iterate, values), strict=strict),
    reversed: lambda frame, value: reversed(list(frame.iterate(value))),
    map: _map,
    filter: _filter,
    functools.reduce: _reduce,
    sorted: _ordered(sorted),
    min: _ordered(min),
    max: _ordered(max),
    sum: _summed(sum),
    all: _asked_each(all),
    any: _asked_each(any),
    itertools.chain: lambda frame, *values: itertools.chain(*map(frame.iterate, values)),
    itertools.islice: _over_iterable(itertools.islice),
    itertools.pairwise: _over_iterable(itertools.pairwise),
    itertools.product: lambda frame, *values, repeat=1: itertools.product(
        *map(frame.iterate, values), repeat=repeat
    ),
    itertools.repeat: lambda frame, *values: itertools.repeat(*values),
    super: lambda frame, *args: builtins.super(*args),
    id: _refused("asks for the type or the identity of a value (id)"),
    hash: _refused("asks for the identity of a value (hash)"),
    vars: _refused("looks at all attributes of an object (vars)"),
    dir: _refused("looks at all attributes of an object (dir)"),
    globals: _refused("looks at all globals (globals)"),
    locals: _refused("looks at all variables (locals)"),
    print: _refused("prints"),
    issubclass: lambda frame, cls, kinds: issubclass(cls, kinds),
    math.prod: _summed(math.prod),
    inspect.signature: lambda frame, function, **options: inspect.signature(function, **options),
}
_MODULE_METHODS: dict[Any, Callable[..., Any]] = {
    nn.Module.parameters: _first_of(nn.Module.parameters),
    nn.Module.named_parameters: _first_of(nn.Module.named_parameters),
    nn.Module.buffers: _first_of(nn.Module.buffers),
    nn.Module.named_buffers: _first_of(nn.Module.named_buffers),
    nn.Module.children: _children(nn.Module.children),
    nn.Module.named_children: _children(nn.Module.named_children),
    nn.ModuleDict.keys: _children(nn.ModuleDict.keys),
    nn.ModuleDict.values: _children(nn.ModuleDict.values),
    nn.ModuleDict.items: _children(nn.ModuleDict.items),
    nn.Module.get_submodule: lambda frame, module, name: module.get_submodule(name),
    nn.Module.get_parameter: _get_tensor,
    nn.Module.get_buffer: _get_tensor,
    nn.Module.state_dict: _refused("goes through its parameters (state_dict)"),
    nn.Module.modules: _refused("goes through its modules"),
    nn.Module.named_modules: _refused("goes through its modules"),
}
