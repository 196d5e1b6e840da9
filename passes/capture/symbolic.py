"""Traces the ``forward`` of one module with ``torch.fx``, or says why it cannot be traced faithfully.

Child modules stay calls: hooks, wrapping policies and checkpointing go on working, and a child that does
not trace costs only its own graph. ``torch.fx`` is happy to record a graph that means something else than
the code did. So the code does not run as it is: every operation that it executes is recorded, computed or
refused by a rule (:mod:`.interpret`), and whatever it read on the way becomes a guard of the graph
(:mod:`lora_fx.passes.graph.reads`). ``self.training`` becomes a read of the graph itself, so that
``train()`` and ``eval()`` keep their meaning. Nothing outside of the trace is patched, and the module is
not written to.
"""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import re
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from lora_fx import torch_private
from lora_fx.passes.capture.instrument import instrumented
from lora_fx.passes.capture.interpret import Frame, path_in
from lora_fx.passes.capture.proxies import ModeProxy, TracedValue, holds_traced
from lora_fx.passes.graph import (
    Condition,
    GuardedCodeGen,
    Parameter,
    Path,
    Read,
    is_constant,
    is_lazy,
    parameters_of,
    wrapped_forward,
    wraps_own_forward,
)
from lora_fx.runtime import inner_of

__all__ = ["Recorder", "Untraceable", "trace"]


# What generated code calls by these names: a parameter of the same name would hide it.
_TAKEN = frozenset({"torch", "device", "inf", "nan", "NoneType", "pytree", "fx_pytree"})


class Untraceable(Exception):
    """Why a module's forward cannot be captured; the message is a row of the dry run.

    Attributes:
        begun: What was recorded until then.
    """

    begun: fx.Graph | None = None


def trace(
    module: nn.Module,
    fixed: dict[str, Any] | None = None,
    *,
    check_none: bool = True,
    forward: Callable[..., Any] | None = None,
    conditions: tuple[Condition, ...] = (),
) -> fx.Graph:
    """Traces one module's own ``forward``.

    Args:
        module: The module. It is left as it was.
        fixed: Values of parameters that are not inputs of the graph. By default every parameter that
            has a default is fixed to it.
        check_none: See :class:`GuardedCodeGen`.
        forward: What to trace instead of the module's own forward; it has the same signature.
        conditions: What has to be so of ``self`` for the graph to apply.

    Returns:
        A graph with the names of ``module`` and a guarded signature.

    Raises:
        Untraceable: With the reason in words.
    """
    if "forward" in module.__dict__ and not wraps_own_forward(module):
        raise Untraceable("its forward was replaced on the instance")
    own = inner_of(type(module).forward)
    parameters = parameters_of(forward or own, fixed)
    _check_parameters(parameters)
    recorder = Recorder(module, parameters, forward or own, check_none=check_none)
    if forward is None:
        recorder.target = wrapped_forward(own)
    try:
        graph = recorder.record()
    except Exception as error:
        words = str(error) if isinstance(error, Untraceable) else _words(error)
        failure = Untraceable(recorder.refused or words)
        failure.begun = recorder.graph
        raise failure from error
    if recorder.refused:
        failure = Untraceable(recorder.refused)
        failure.begun = graph
        raise failure
    _check_names(parameters, graph)
    reads = tuple(recorder.reads.values())
    if any(p.traced and p.name in recorder.omitted for p in parameters):
        raise Untraceable("a decorator of its forward looks for an argument that the caller gives")
    parameters = tuple(
        dataclasses.replace(p, omitted=True) if p.name in recorder.omitted else p
        for p in parameters
    )
    graph.set_codegen(GuardedCodeGen(parameters, check_none, conditions, reads))
    return graph


def _check_parameters(parameters: tuple[Parameter, ...]) -> None:
    if not any(p.traced for p in parameters):
        raise Untraceable("its forward has no required argument, so that no call stands for all")
    for p in parameters:
        if not p.traced and isinstance(p.default, list | dict | set):
            raise Untraceable(f"the default of its argument {p.name} can change between calls")


def _check_names(parameters: tuple[Parameter, ...], graph: fx.Graph) -> None:
    taken = _TAKEN & {p.name for p in parameters}
    source = graph.python_code("self").src if taken else ""
    for name in taken:
        if re.search(rf"\b{name}\b", source):
            raise Untraceable(f"its forward has an argument named {name}, as generated code has")
    for target in {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}:
        if any(
            keyword.iskeyword(atom) or set(atom) & {'"', "\\", "\n"} for atom in target.split(".")
        ):
            raise Untraceable(f"generated code cannot spell the name {target!r}")


class Recorder(fx.Tracer):
    """Records one module's forward.

    Attributes:
        refused: The first reason why the graph does not stand for the code. Code that is traced may catch
            the exception.
        reads: What the code has read, by where and how it is compared.
        codes: Code that was rewritten.
        leaves: Functions that are recorded as one node.
        settled: Containers of which all that is in them is in ``reads``.
        target: The function that has the parameters, if decorators call it.
        omitted: Names that a decorator has looked for among the arguments, and not found.
        entering: Whether the code that runs is still that of decorators of the forward.
        depth: How many functions run within functions.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        module: nn.Module,
        parameters: tuple[Parameter, ...],
        forward: Callable[..., Any],
        *,
        check_none: bool = True,
    ) -> None:
        super().__init__()
        self.root = module
        self.graph = fx.Graph(tracer_cls=type(self))
        self.refused: str | None = None
        self.reads: dict[tuple[Path, str, Any], Read] = {}
        self.codes: set[CodeType] = set()
        self.leaves: set[Any] = set()
        self.settled: set[int] = set()
        self.omitted: set[str] = set()
        self.target: Any = forward
        self.entering = False
        self.depth = 0
        self._forward = forward
        self._parameters = parameters
        self._check_none = check_none
        self.submodule_paths: dict[nn.Module, str] = {
            one: name for name, one in module.named_modules()
        }
        self.root_module_name = type(module).__name__
        self.tensor_attrs: Any = {
            value: f"{name}.{key}" if name else key
            for one, name in self.submodule_paths.items()
            for key, value in one.__dict__.items()
            if isinstance(value, torch.Tensor)
        }
        self._paths: dict[int, tuple[Any, Path | None]] = {}
        self._rewritten: dict[FunctionType, FunctionType] = {}
        self._tensors: dict[int, str] | None = None
        self._known: dict[str, TracedValue] = {}
        self._passed: tuple[Any, dict[str, Any]] = ((), {})

    # --- refusals

    def refuse(self, reason: str) -> NoReturn:
        """Ends the trace.

        Raises:
            Untraceable: Always.
        """
        self.refused = self.refused or reason
        raise Untraceable(reason)

    def refuse_softly(self, reason: str) -> None:
        """Gives the graph up, and goes on: what is recorded still says what the code does."""
        self.refused = self.refused or reason

    # --- the trace

    def record(self) -> fx.Graph:
        """The graph of the module's forward."""
        positional: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        self.entering = self.target is not self._forward
        for place, p in enumerate(self._parameters, start=1):
            if p.variadic or (self.entering and not p.traced and p.value is p.default):
                continue  # a decorator may look for it: a caller who wants the default gives nothing
            value = self.create_proxy("placeholder", p.name, (), {}) if p.traced else p.value
            if p.kind != inspect.Parameter.KEYWORD_ONLY and len(positional) == place:
                positional.append(value)
            else:
                keywords[p.name] = value
        self._passed = (tuple(positional), keywords)
        here = _path_of_forward(type(self.root))
        self.remember(self._forward, here)
        own = inner_of(type(self.root).forward)
        of_library = (own.__module__ or "").partition(".")[0] in ("torch", "lora_fx")
        if not of_library and not isinstance(self.root, fx.GraphModule):
            self.read(Read(here, "identity", own))
            if own.__defaults__ and is_constant(own.__defaults__):
                self.read(Read(here.attribute("__defaults__"), "contents", own.__defaults__))
        outermost: Any = _outermost
        frame = Frame(self, outermost, None)
        # Whatever the caller's modes are, those of the trace have to be known.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.amp.autocast("cpu", enabled=False),
            _Eager(self),
        ):
            result = frame.call(self._forward, *positional, **keywords)
            if self.entering:
                self.refuse("a decorator of its forward calls something else")
            self.create_node("output", "output", (self.create_arg(result),), {})
        return self.graph

    def enter(self, function: FunctionType, args: Any, kwargs: Any) -> None:
        """Notes that a function is called: decorators end where the forward itself begins."""
        if not self.entering or function is not self.target:
            return
        same = len(args) == len(self._passed[0]) and kwargs.keys() == self._passed[1].keys()
        if not (
            same
            and all(a is b for a, b in zip(args, self._passed[0], strict=True))
            and all(kwargs[name] is value for name, value in self._passed[1].items())
        ):
            self.refuse("a decorator of its forward changes what was passed")
        self.entering = False

    def rewritten(self, function: FunctionType, path: Path | None) -> FunctionType:
        """A function whose operations are recorded.

        Raises:
            SourceError: If its source is not known.
        """
        if function not in self._rewritten:
            frame = Frame(self, function, path)
            self._rewritten[function] = instrumented(function, frame, self.codes)
        return self._rewritten[function]

    # --- where values come from

    def remember(self, value: Any, path: Path | None) -> None:
        """Keeps where an object was read first."""
        if path is not None:
            self._paths.setdefault(id(value), (value, path))

    def path_of(self, value: Any) -> Path | None:
        """Where an object was read; None if that is not known."""
        if isinstance(value, nn.Module):
            name = self.submodule_paths.get(value)
            return None if name is None else Path.to(name)
        found = self._paths.get(id(value))
        return None if found is None else found[1]

    def is_fixed(self, value: Any) -> bool:
        """Whether a value is that of a parameter which is no input of the graph."""
        return any(not p.traced and p.value is value for p in self._parameters)

    def read(self, read: Read) -> None:
        """Notes what was read."""
        key = read.expected[0] if read.kind == "holds" else None
        self.reads.setdefault((read.path, read.kind, key), read)

    def owned(self, tensor: torch.Tensor) -> TracedValue | None:
        """The read of a parameter or buffer of the module; None for any other tensor."""
        if self._tensors is None:
            named = (*self.root.named_parameters(), *self.root.named_buffers())
            self._tensors = {id(one): name for name, one in named}
        name = self._tensors.get(id(tensor))
        if name is None:
            return None
        # A buffer is read each time: it may be replaced.
        if not isinstance(tensor, nn.Parameter):
            return self.create_proxy("get_attr", name, (), {})  # type: ignore[return-value]
        if name not in self._known:
            self._known[name] = self.create_proxy("get_attr", name, (), {})  # type: ignore[assignment]
        return self._known[name]

    def seen(self, value: Any) -> Any:
        """A tensor of the model as a traced value; anything else as it is."""
        owned = self.owned(value) if isinstance(value, torch.Tensor) else None
        return value if owned is None else owned

    def mode_of(self, module: nn.Module) -> TracedValue:
        """``module.training``, which the graph reads itself."""
        name = self.submodule_paths.get(module)
        if name is None:
            self.refuse("its forward asks for the mode of a module that is no part of it")
        target = f"{name}.training" if name else "training"
        if target not in self._known:
            self._known[target] = ModeProxy(self, target)
        return self._known[target]

    def known_shape(self, value: fx.Proxy) -> torch.Size | None:
        """The shape of a parameter, which does not depend on the input; None for any other value."""
        node = value.__dict__.get("node")
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        path = Path.to(str(node.target))
        owner: nn.Module | None = self.root
        *above, (_, key) = path.steps
        for _, atom in above:
            owner = owner._modules.get(atom) if owner is not None else None
        found = None if owner is None else owner._parameters.get(key)
        if found is None or is_lazy(found):
            return None
        self.read(Read(path, "shape", tuple(found.shape)))
        return found.shape

    def is_none(self, value: TracedValue) -> bool:
        """Whether a traced value is None, where that can be said: the guard of the graph sees to it."""
        node = value.__dict__.get("node")
        if isinstance(node, fx.Node):
            if node.op == "placeholder" and self._check_none:
                return False
            if node.op == "get_attr":
                self.read(Read(Path.to(str(node.target)), "present", None))
                return False
            module = getattr(node.target, "__module__", None) or ""
            computed = module.partition(".")[0] in ("torch", "_operator", "lora_fx", "")
            if node.op == "call_function" and computed and not _is_part(node.target):
                return False
        return self.refuse("its forward asks whether a part of a value is None")

    def wraps(self, names: dict[str, Any], name: str) -> bool:
        """Whether ``fx.wrap`` was told that a function is one node."""
        return (id(names), name) in torch_private.wrapped_functions()

    # --- nodes

    def call_leaf(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A call of a function that is one node."""
        if not (holds_traced(args) or holds_traced(kwargs)):
            return function(*args, **kwargs)
        result = self.create_proxy("call_function", function, args, kwargs)
        result.node.meta["is_wrapped"] = True
        return result

    def call_child(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A call of a child."""
        if module is self.root:
            self.refuse("its forward calls the module itself")
        return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value that refuses questions."""
        return TracedValue(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Control flow on a traced value."""
        what = "self.training"
        if not isinstance(obj, ModeProxy):
            what = "a value that is known only when it runs"
        self.refuse(f"its forward branches on {what}")

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """A node, without type annotation: generated code does not need to know the name."""
        # A child, or a parameter, named "self" would hide the module in generated code.
        return super().create_node(
            kind, target, args, kwargs, name or ("self_" if target == "self" else None)
        )

    def create_arg(self, a: Any) -> Any:
        """Refuses constants that a graph would hold, and containers that it would not rebuild."""
        if isinstance(a, torch.Tensor):
            owned = self.owned(a)
            if owned is not None:
                return owned.node
            if a not in self.tensor_attrs:
                self.refuse("its forward makes a tensor that does not depend on its input")
        if isinstance(a, list) and type(a) not in (list, fx.immutable_collections.immutable_list):
            self.refuse(f"a {type(a).__name__} would become a plain list")
        if isinstance(a, dict) and type(a) not in (dict, fx.immutable_collections.immutable_dict):
            self.refuse(f"a {type(a).__name__} would become a plain dict")
        return super().create_arg(a)


def _outermost() -> None:
    """Stands for the caller of the forward."""


def _path_of_forward(cls: Any) -> Path:
    """Where the forward of a class lies, within the decorators that stay around it."""
    path, outer = path_in(cls, "forward"), cls.forward
    while outer is not inner_of(outer):
        path, outer = path.attribute("__wrapped__"), outer.__wrapped__
    return path


def _is_part(target: Any) -> bool:
    """Whether a function takes something out of a value, which may be None."""
    return target is getattr or getattr(target, "__name__", "") in ("getitem", "getattr")


def _words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


# What does not depend on anything that may change between a trace and a call.
_FIXED = frozenset({"shape", "size", "dim", "ndim", "numel", "nelement", "is_floating_point"})


class _Eager(TorchFunctionMode):
    """A function mode that lets calls with traced values through, and no others."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if holds_traced(args) or holds_traced(kwargs):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        if func is torch_private.SET_GRAD_ENABLED:
            self._recorder.refuse(
                "its forward switches gradients on or off, which a graph would lose"
            )
        if name not in _FIXED:
            self._recorder.refuse(f"its forward computes without its input ({name})")
        return func(*args, **kwargs)
