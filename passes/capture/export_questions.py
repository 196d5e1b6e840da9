"""Notes what the code of a model asks PyTorch while ``torch.export`` runs it.

A question to PyTorch is answered once, and the graph has that answer for good. Where a call can be asked the
same before it runs, the answer becomes a guard: how PyTorch is set, and whether an argument has a gradient.
Whether a result in between has one depends on what is trained then, which no guard knows: the export is
refused. So it is where the code changes what a backward pass does, since a graph has operations and no more.
Training and evaluation have another grad mode: a model that asks for it is exported in both, and has to give
one graph. Only the code of the model is listened to: what PyTorch's own functions ask decides between ways to
compute the same.

Sizes are symbols of PyTorch's: what was asked of them is read off the exported program.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no types
import torch
from torch import fx
from torch.autograd.function import FunctionMeta
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from lora_fx import torch_private
from lora_fx.errors import CaptureError
from lora_fx.passes.graph import (
    IS_PLAIN,
    MATH,
    Condition,
    Flag,
    ModuleRoot,
    Path,
    Read,
    TensorGiven,
)
from lora_fx.runtime import ops

__all__ = [
    "OF_GRAD_MODE",
    "Listener",
    "Questions",
    "answer_of",
    "asked_of_sizes",
    "layout_conditions",
    "of_library",
    "shape_conditions",
]

_LIBRARIES = ("torch", "lora_fx", "numpy")


def of_library(module: str | None) -> bool:
    """Whether a Python module, by name, is no part of a model: of PyTorch, NumPy or this package."""
    return (module or "").partition(".")[0] in _LIBRARIES


_GRAD_MODE = ("is_grad_enabled", "is_inference_mode_enabled")
OF_GRAD_MODE = "asks PyTorch for the grad mode, which may be another when the graph runs"
# Functions that say how PyTorch is set, some of them for a kind of device.
_STATE = (
    "are_deterministic_algorithms_enabled",
    "get_autocast_dtype",
    "get_default_device",
    "get_default_dtype",
    "get_float32_matmul_precision",
    "get_num_threads",
    "is_anomaly_enabled",
    "is_autocast_cache_enabled",
    "is_autocast_enabled",
    "is_deterministic_algorithms_warn_only_enabled",
)
_OF_DEVICES = ("get_autocast_dtype", "is_autocast_enabled")
_OF_ARGUMENTS = ("requires_grad", "is_leaf", "grad_fn")
_OF_TENSORS = (
    *_OF_ARGUMENTS,
    "grad",
    "output_nr",
    "retains_grad",
    *torch_private.AUTOGRAD_QUESTIONS,
)
_ASKING: dict[Any, str] = {
    **{getattr(torch.Tensor, name).__get__: name for name in _OF_TENSORS},
    torch.Tensor.is_inference: "is_inference",
    torch_private.IS_VIEW: torch_private.IS_VIEW.__name__,
}
_CHANGING: dict[Any, str] = {
    torch.Tensor.requires_grad.__set__: "requires_grad",  # type: ignore[attr-defined]  # of C
    **{
        getattr(torch.Tensor, name): name
        for name in (
            "requires_grad_",
            "retain_grad",
            "register_hook",
            "register_post_accumulate_grad_hook",
        )
    },
}
_OF_LAYOUT = frozenset(
    (
        torch.as_strided,
        *(
            getattr(torch.Tensor, name)
            for name in (
                "as_strided",
                "data_ptr",
                "dim_order",
                "is_contiguous",
                "is_set_to",
                "stride",
            )
        ),
        *(getattr(torch.Tensor, name) for name in ("storage_offset", "untyped_storage", "storage")),
    )
)
# What has the default dtype and becomes a constant.
_MAKING = (torch.tensor, torch.as_tensor, torch.scalar_tensor)
_QUESTIONS = {name: getattr(torch, name) for name in (*_STATE, *_GRAD_MODE)}
_NAMES = {id(function): name for name, function in _QUESTIONS.items()}


def answer_of(value: Any) -> Read | None:
    """The answer that a function gives now, if it says how PyTorch is set and takes nothing."""
    name = _NAMES.get(id(value))
    return None if name is None or name in _OF_DEVICES else _answer(name, (), value())


class Listener(TorchFunctionMode):
    """Hears every function of PyTorch that is called while it is entered, and may answer in its stead."""

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Give the result of a call that is not to run; NotImplemented for one that is."""
        return NotImplemented

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Take note of a call that has run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers a call, or runs it and hears its result."""
        kwargs = kwargs or {}
        result = self.answer(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self.hear(func, args, kwargs, result)
        return result


class Questions(Listener):
    """What was asked.

    Attributes:
        conditions: What arguments have to answer.
        refused: What cannot be guarded, in words.
        grad_mode: Whether the grad mode was asked for. Training and evaluation have another one, so that no
            guard may: the graph has to be the same in both.
        layout: Whether code asked how a tensor lies in memory, which follows from how the arguments do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conditions: list[Condition] = []
        self.refused: list[str] = []
        self.grad_mode = False
        self.layout = False
        self._reads: dict[tuple[str, tuple[Any, ...]], Read] = {}
        self._arguments: dict[int, tuple[str, torch.Tensor, dict[str, Any]]] = {}
        self._before: dict[str, Any] = {}
        self._thread = 0

    @property
    def reads(self) -> tuple[Read, ...]:
        """How PyTorch was set, as far as it was asked."""
        return tuple(self._reads.values())

    def forget(self, name: str, *args: str) -> None:
        """Takes a note back: something else guards what a function says.

        Args:
            name: The function.
            args: What it was given.
        """
        self._reads.pop((name, args), None)

    @contextlib.contextmanager
    def listening(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Listens in between, to this thread.

        Args:
            arguments: What the model is called with, by name.
        """
        self._thread = threading.get_ident()
        self._arguments = {
            id(value): (name, value, {one: getattr(value, one) for one in _OF_ARGUMENTS})
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor)
        }
        self._before = {
            name: function() for name, function in _QUESTIONS.items() if name not in _OF_DEVICES
        }
        try:
            for name, function in _QUESTIONS.items():
                setattr(torch, name, self._noted(name, function))
            os._Environ.__getitem__ = self._looked_up()  # type: ignore[method-assign]
            # PyTorch asks a class for this whenever it is applied, by whatever name it is called.
            FunctionMeta.__getattribute__ = self._applied()  # type: ignore[method-assign]
            with self:
                yield
        finally:
            for name, function in _QUESTIONS.items():
                setattr(torch, name, function)
            os._Environ.__getitem__ = _ENVIRONMENT  # type: ignore[method-assign]
            del FunctionMeta.__getattribute__

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note a question, or a change, if the code of the model has called for it."""
        asked, changed = _ASKING.get(func), _CHANGING.get(func)
        made = func in _MAKING and "dtype" not in kwargs
        laid = func in _OF_LAYOUT
        # __torch_function__ calls this, and the one that calls that has asked.
        if (asked or changed or made or laid) and not _asked_by_library(sys._getframe(2)):
            if laid:
                self.layout = True
            elif asked:
                self._note(asked, args[0], result)
            elif changed:
                self.refused.append(
                    f"changes what the backward pass does by {changed} of a tensor, which a graph would lose"
                )
            elif result.is_floating_point() or result.is_complex():
                self._note_state("get_default_dtype", (), self._before["get_default_dtype"])

    def _note(self, name: str, tensor: torch.Tensor, answer: Any) -> None:
        argument, _, before = self._arguments.get(id(tensor), ("", None, {}))
        if name in before and answer is before[name] and answer in (True, False, None):
            condition = Condition(f"{argument}.{name}", "is", repr(answer))
            if condition not in self.conditions:
                self.conditions.append(condition)
            return
        self.refused.append(
            f"asks for {name} of a tensor, which depends on what is trained when the graph runs"
        )

    def _note_state(self, name: str, args: tuple[Any, ...], answer: Any) -> None:
        if name == "is_grad_enabled":
            self.grad_mode = True
            return
        if name in _GRAD_MODE:
            self.refused.append(OF_GRAD_MODE)
            return
        # What it says in between is decided by what it says before, and by the code.
        answer = self._before.get(name, answer)
        self._reads.setdefault((name, args), _answer(name, args, answer))

    def _noted(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def asked(*args: Any, **kwargs: Any) -> Any:
            answer = function(*args, **kwargs)
            if threading.get_ident() == self._thread and not _asked_by_library(sys._getframe(1)):
                self._note_state(name, tuple(map(str, (*args, *kwargs.values()))), answer)
            return answer

        return asked

    def _looked_up(self) -> Any:
        def read(this: Any, name: Any) -> Any:
            asker: Any = sys._getframe(1)
            while asker.f_globals.get("__name__") in ("os", "_collections_abc"):
                asker = asker.f_back
            if threading.get_ident() == self._thread and not _asked_by_library(asker):
                path = Path(ModuleRoot("os")).attribute("environ").attribute("get")
                self._reads.setdefault(
                    ("environ", (name,)), Read(path, "answer", ((name,), _found(this, name)))
                )
            return _ENVIRONMENT(this, name)

        return read

    def _applied(self) -> Any:
        def read(cls: type, name: str) -> Any:
            if (
                name == torch_private.AUTOGRAD_LOOKUP
                and threading.get_ident() == self._thread
                and not of_library(cls.__module__)
            ):
                self.refused.append(f"calls an autograd function ({cls.__qualname__})")
            return type.__getattribute__(cls, name)

        return read


_ENVIRONMENT = os._Environ.__getitem__


def _found(environment: Any, name: Any) -> Any:
    try:
        return _ENVIRONMENT(environment, name)
    except KeyError:
        return None


def _answer(name: str, args: tuple[Any, ...], answer: Any) -> Read:
    return Read(Path(ModuleRoot("torch")).attribute(name), "answer", (args, answer))


def _asked_by_library(frame: Any) -> bool:
    return of_library(str(frame.f_globals.get("__name__")))


def shape_conditions(
    program: ExportedProgram, graph: fx.Graph, names: list[str]
) -> Iterator[Condition]:
    """What tensors have to be that the exported graph was made for.

    Args:
        program: The exported program.
        graph: Its graph, with a placeholder for each tensor.
        names: The tensors' names, in order.

    Raises:
        CaptureError: If a size is tied to another one by a formula.
    """
    seen: dict[Any, str] = {}
    tensors = [
        n.meta["val"]
        for n in graph.nodes
        if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    for name, value in zip(names, tensors, strict=True):
        yield TensorGiven(name)
        yield Condition(f"{name}.dtype", "==", str(value.dtype))
        yield Condition(f"{name}.dim()", "==", str(value.dim()))
        for axis, size in enumerate(value.shape):
            here = f"{name}.shape[{axis}]"
            expression = size.node.expr if isinstance(size, torch.SymInt) else size
            if isinstance(expression, int) or expression.is_Integer:
                yield Condition(here, "==", str(int(expression)))
            elif not expression.is_Symbol:
                raise CaptureError(f"torch.export ties {here} to {expression}: pass dynamic_shapes")
            elif expression in seen:
                other = seen[expression]
                yield Condition(here, "==", other, note=f", as {other}")
            else:
                seen[expression] = here
                allowed = program.range_constraints.get(expression)
                if allowed and allowed.lower.is_Integer and allowed.lower > 0:
                    yield Condition(here, ">=", str(int(allowed.lower)))
                if allowed and allowed.upper.is_Integer:
                    yield Condition(here, "<=", str(int(allowed.upper)))
    yield from _size_conditions(program, seen)


def layout_conditions(inputs: dict[str, Any]) -> Iterator[Condition]:
    """Tensors lie in memory one behind the other, as those of the example do.

    Raises:
        CaptureError: If one of the example does not.
    """
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            if not ops.is_plain(value):
                raise CaptureError(
                    f"its forward asks how a tensor lies in memory, and {name} of the example is not "
                    "contiguous: frontend='regions' keeps it"
                )
            yield Flag(
                f"not {IS_PLAIN}({name})",
                note=f"its forward asks how a tensor lies in memory: pass {name}.clone(memory_format="
                "torch.contiguous_format)",
            )


def asked_of_sizes(
    program: ExportedProgram, counts: Callable[[Any], bool] = lambda guard: True
) -> list[Any]:
    """What code, or an operation, asked of sizes while it was exported: the graph has the way of a yes.

    Args:
        program: The exported program.
        counts: Which guards of its ``ShapeEnv`` are wanted.

    Returns:
        Formulas of sympy over the symbols of the sizes, each once and in order, without what always holds.
    """
    sizes = (
        size
        for node in program.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
        for size in node.meta["val"].shape
    )
    environment = next((s.node.shape_env for s in sizes if isinstance(s, torch.SymInt)), None)
    if environment is None:
        return []
    asked = (environment.simplify(guard.expr) for guard in environment.guards if counts(guard))
    return [one for one in dict.fromkeys(asked) if one != sympy.true]


def _size_conditions(program: ExportedProgram, named: dict[Any, str]) -> Iterator[Condition]:
    """The answers that sizes gave on the way: the graph goes the way of those.

    Args:
        program: The exported program.
        named: The sizes of the arguments, by symbol.

    Raises:
        CaptureError: If it has asked for a size that no argument has.
    """
    printer = torch_private.sympy_printer()()
    for expression in asked_of_sizes(program):
        unknown = expression.free_symbols - named.keys()
        if unknown:
            raise CaptureError(
                f"its forward asks whether {expression} holds, of sizes that depend on the values of a tensor"
            )
        symbols = {one: sympy.Symbol(f"_size_{place}") for place, one in enumerate(named)}
        text = printer.doprint(expression.xreplace(symbols))
        for one, short in symbols.items():
            text = re.sub(rf"\b{short.name}\b", named[one], text)
        text = text.replace("math.", f"{MATH}.")
        yield Flag(
            f"not ({text})", note=f"its sizes are others than those of the example: {text} is false"
        )
