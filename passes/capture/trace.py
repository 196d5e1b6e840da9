"""Trace of one module's ``forward`` with ``torch.fx``, to find operations and, if safe, to run the graph.

Calls of child modules stay calls in the graph. So hooks, wrapping policies and checkpointing keep working. If
a child cannot be traced, only its own graph is missing. The forward runs on proxies that record the
operations on them. During the trace, the modules have a recording class (:mod:`.recorded`). Each value that
the code reads from them becomes a guard of the graph. ``self.training`` becomes a read in the graph itself,
so that ``train()`` and ``eval()`` keep their meaning.

Two things can go wrong. A trace *ends* if the code asks a proxy for a value that is known only when the graph
runs. A trace is *in doubt* if the code does something that a graph would not repeat: it reads a global,
disables gradients, or sets an attribute. A graph in doubt shows the operations, but never runs. The module
runs its own forward, which reads its weights with their adapters applied. So doubt costs only speed.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dis
import functools
import gc
import inspect
import itertools
import keyword
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NoReturn, cast

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from lora_fx import torch_private
from lora_fx.passes.capture.proxies import ModeProxy, TracedValue, holds_traced
from lora_fx.passes.capture.recorded import is_used_up, recording
from lora_fx.passes.capture.state import State
from lora_fx.passes.graph import (
    ForwardRead,
    GlobalRead,
    GuardedCodeGen,
    Parameter,
    PresenceRead,
    Read,
    ShapeRead,
    is_constant,
    is_lazy,
    parameters_of,
    wraps_own_forward,
)
from lora_fx.runtime.modules import inner_of

__all__ = ["Recorder", "Untraceable", "trace"]


# Names that generated code uses. A parameter of the same name would hide them.
_TAKEN = frozenset({"torch", "device", "inf", "nan", "NoneType", "pytree", "fx_pytree"})
# Names of functions and attributes whose effect no node of a graph can represent.
_LOST = frozenset(
    {
        *("autocast", "is_autocast_enabled", "custom_fwd", "record_function", "checkpoint"),
        *("no_grad", "enable_grad", "inference_mode", "set_grad_enabled", "is_grad_enabled"),
        *("is_tracing", "is_scripting", "is_tensor", "__dict__", "__class__"),
        *("environ", "getenv", "__defaults__"),
    }
)
_BUILTINS = frozenset(
    {
        *("type", "isinstance", "issubclass", "hasattr", "getattr", "callable", "id", "super"),
        *("vars", "locals", "globals"),
    }
)
# Modules of PyTorch with contexts and decorators that switch modes.
_SWITCHES = ("torch.amp.autocast_mode", "torch.autograd.grad_mode", "torch.utils._contextlib")
# Bytecode that a proxy does not notice, or that enters a context that a graph would not enter.
_UNHEARD = ("IS_OP", "BEFORE_WITH", "LOAD_SPECIAL", "PUSH_EXC_INFO", "CHECK_EXC_MATCH")
# Bytecode that changes something outside of the model.
_WRITING = ("STORE_GLOBAL", "DELETE_GLOBAL")
_LIBRARIES = frozenset({"torch", "numpy", "lora_fx"}) | sys.stdlib_module_names
_one_at_a_time = threading.RLock()


class Untraceable(Exception):
    """Reason why a module's forward cannot be captured. The message is shown in a dry run.

    Attributes:
        begun: The partial graph.
    """

    begun: fx.Graph | None = None


def trace(
    module: nn.Module,
    *,
    fixed: bool = True,
    check_none: bool = True,
    forward: Callable[..., Any] | None = None,
    conditions: tuple[str, ...] = (),
) -> tuple[fx.Graph, str]:
    """Trace one module's own ``forward``.

    Args:
        module: The module. It is not changed.
        fixed: True to fix parameters with a default value to it. They are then no inputs of the graph.
        check_none: See :class:`GuardedCodeGen`.
        forward: Function to trace instead of the module's own forward, with the same signature.
        conditions: Python expressions in ``self`` that are true if the graph does not apply.

    Returns:
        A graph with the names of ``module`` and a guarded signature, and the reason why it must not run
        (empty if it may).

    Raises:
        Untraceable: With the reason in words.
    """
    if forward is None and "forward" in module.__dict__ and not wraps_own_forward(module):
        raise Untraceable("its forward was replaced on the instance")
    own = forward or inner_of(type(module).forward)
    parameters = parameters_of(own, fixed=fixed)
    _check_parameters(parameters)
    recorder = Recorder(module)
    try:
        recorder.record(own, parameters)
    except Exception as error:  # noqa: BLE001  whatever the code raises
        recorder.ended = recorder.ended or (
            str(error) if isinstance(error, Untraceable) else _words(error)
        )
    if recorder.ended:
        failure = Untraceable(recorder.ended)
        failure.begun = recorder.graph
        raise failure
    # Forwards written out by lora-fx, or generated by fx, hold for every call.
    certain = forward is not None or isinstance(module, fx.GraphModule)
    doubt = "" if certain else recorder.doubt
    doubt = doubt or _cannot_generate(parameters, recorder.graph)
    presence = (PresenceRead(path) for path, times in recorder.looked_at.items() if times > 0)
    reads = (*recorder.reads.values(), *presence)
    recorder.graph.set_codegen(GuardedCodeGen(parameters, check_none, conditions, reads))
    return recorder.graph, doubt


def _check_parameters(parameters: tuple[Parameter, ...]) -> None:
    if not any(p.traced for p in parameters):
        raise Untraceable("its forward has no required argument, so that no call stands for all")


def _cannot_generate(parameters: tuple[Parameter, ...], graph: fx.Graph) -> str:
    """Return the reason why generated code cannot run the graph, or an empty string."""
    for p in parameters:
        if not p.traced and isinstance(p.default, list | dict | set):
            return f"the default of its argument {p.name} can change between calls"
    taken = _TAKEN & {p.name for p in parameters}
    source = graph.python_code("self").src if taken else ""
    for name in taken:
        if re.search(rf"\b{name}\b", source):
            return f"its forward has an argument named {name}, as generated code has"
    for target in {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}:
        if any(
            keyword.iskeyword(atom) or set(atom) & {'"', "\\", "\n"} for atom in target.split(".")
        ):
            return f"generated code cannot spell the name {target!r}"
    return ""


class Recorder(fx.Tracer):
    """Tracer that records one module's forward.

    Attributes:
        root: The module.
        ended: Reason why the trace has ended early, or empty. It is stored because the traced code may catch
            the exception.
        doubt: The first reason why the graph must not run; empty if there is no reason.
        reads: Values that the code has read, by path and class of the read.
        names: Name of each module in the tree of the root, by module.
        fixed: Names of the forward's arguments that are not traced.
        code: The code object of the forward.
        looked_at: For each module in the tree, the number of reads minus the number of calls. If it is
            positive, code has read the module without a call, and a guard checks that the module exists.
    """

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.root = module
        self.graph = fx.Graph(tracer_cls=type(self))
        self.ended = self.doubt = ""
        self.before = State(nn.Module())
        self.fixed: frozenset[str] = frozenset()
        self.code: CodeType | None = None
        self.reads: dict[tuple[str, type[Read]], Read] = {}
        self.looked_at: Counter[str] = Counter()
        self.names: dict[nn.Module, str] = {child: name for name, child in module.named_modules()}
        self._modules = {name: child for child, name in self.names.items()}
        # Attributes of fx.Tracer.
        self.submodule_paths = self.names
        self.root_module_name = type(module).__name__
        self.tensor_attrs = {}
        self._modes = _modes()
        named = (*module.named_parameters(), *module.named_buffers())
        self._tensors = {id(tensor): name for name, tensor in named}
        self._known: dict[str, TracedValue] = {}
        self._copies: dict[int, tuple[Any, Any]] = {}

    def end(self, reason: str) -> NoReturn:
        """End the trace.

        Raises:
            Untraceable: Always.
        """
        self.ended = self.ended or reason
        raise Untraceable(reason)

    def doubts(self, reason: str) -> None:
        """Note a reason why the graph must not run, and continue the trace."""
        self.doubt = self.doubt or reason

    # --- the trace

    def record(self, forward: Any, parameters: tuple[Parameter, ...]) -> None:
        """Run a forward on proxies."""
        positional: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        for position, p in enumerate(parameters, start=1):
            if not p.traced:
                continue  # left out, as by a caller who wants the default
            value = self.create_proxy("placeholder", p.name, (), {})
            if p.kind != inspect.Parameter.KEYWORD_ONLY and len(positional) == position:
                positional.append(value)
            else:
                keywords[p.name] = value
        own = inner_of(type(self.root).forward)
        of_library = (own.__module__ or "").partition(".")[0] in ("torch", "lora_fx")
        if not of_library and not isinstance(self.root, fx.GraphModule):
            self.read(ForwardRead())
        self.before = State(self.root, [p.default for p in parameters])
        self.fixed = frozenset(p.name for p in parameters if not p.traced)
        self.code = getattr(inspect.unwrap(forward), "__code__", None)
        if hasattr(forward, "__wrapped__"):
            self.doubts("its forward is decorated")
        try:
            # The trace must not depend on modes of the caller, such as no_grad. If a library has replaced a
            # function of PyTorch, trace the original: generated code looks the function up when it runs.
            with (
                _one_at_a_time,
                torch_private.built_in_functions(),
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.amp.autocast("cpu", enabled=False),
                _wrapped_functions(self),
                recording(self),
                _Eager(self),
                _Followed(self),
            ):
                self._modes = _modes()
                result = forward(*positional, **keywords)
                self.create_node("output", "output", (self.create_arg(result),), {})
        finally:
            changed = self.before.restore()
        if changed:
            self.doubts(changed)

    # --- where values come from

    def read(self, read: Read) -> None:
        """Note a value that the code has read, once for each path and class of the read."""
        self.reads.setdefault((read.path, type(read)), read)

    def copied(self, value: Any) -> Any:
        """Return a copy of an iterator or random number generator, so that a trace does not advance it."""
        if id(value) not in self._copies:
            try:
                self._copies[id(value)] = value, copy.deepcopy(value)
            except Exception:  # noqa: BLE001  a Python generator cannot be copied
                self.end("its forward uses an iterator up")
        return self._copies[id(value)][1]

    def owned(self, tensor: torch.Tensor) -> TracedValue | None:
        """Return the proxy of a parameter or buffer of the module, or None for any other tensor."""
        name = self._tensors.get(id(tensor))
        if name is None:
            return None
        # A buffer is read each time, because it may be replaced.
        if not isinstance(tensor, nn.Parameter):
            return self._attribute(name)
        if name not in self._known:
            self._known[name] = self._attribute(name)
        return self._known[name]

    def _attribute(self, name: str) -> TracedValue:
        return cast("TracedValue", self.create_proxy("get_attr", name, (), {}))

    def mode_of(self, module: nn.Module) -> TracedValue:
        """Return a node for ``module.training``, so that each call of the graph reads the current value."""
        name = self.names[module]
        target = f"{name}.training" if name else "training"
        if target not in self._known:
            self._known[target] = ModeProxy(self, target)
        return self._known[target]

    def known_shape(self, value: fx.Proxy) -> torch.Size | None:
        """Return the shape of a parameter, and note it for a guard. Return None for other traced values."""
        node = value.__dict__.get("node")
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        owner, _, leaf = str(node.target).rpartition(".")
        parameter = self._modules[owner].__dict__["_parameters"].get(leaf)
        if parameter is None or is_lazy(parameter):
            return None
        shape: torch.Size = parameter.shape
        self.read(ShapeRead(str(node.target), tuple(shape)))
        return shape

    # --- nodes

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that ends the trace if the code asks for its value."""
        return TracedValue(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Return False for ``self.training``, as in evaluation mode. End the trace for any other value."""
        if type(obj) is not ModeProxy:
            self.end("its forward branches on a value that is known only when it runs")
        self.doubts("its forward branches on self.training")
        return False

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """End the trace at a loop over a traced value."""
        self.end("its forward iterates over a traced value")

    def keys(self, obj: fx.Proxy) -> Any:
        """End the trace at ``**value``."""
        self.end("its forward iterates over a traced value")

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Create a node without its type annotation, because generated code may not know the type's name."""
        if _modes() != self._modes:
            self.doubts("its forward switches gradients or autocast, which a graph would lose")
        # A child, or a parameter, named "self" would hide the module in generated code.
        return super().create_node(
            kind, target, args, kwargs, name or ("self_" if target == "self" else None)
        )

    def create_arg(self, a: Any) -> Any:
        """Convert a value to an argument of a node. A tensor that the code has created becomes unknown."""
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, torch.Tensor):
            owned = self.owned(a)
            if owned is not None:
                return owned.node
            self.doubts("its forward makes a tensor that does not depend on its input")
            return self.create_node("call_function", _unknown, (), {})
        plain = (list, dict, fx.immutable_collections.immutable_list)
        if isinstance(a, list | dict) and type(a) not in (
            *plain,
            fx.immutable_collections.immutable_dict,
        ):
            self.doubts(f"a {type(a).__name__} would become a plain one")
        return super().create_arg(a)

    def call_child(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Record a call of a child module as one node."""
        if module is self.root:
            self.end("its forward calls the module itself")
        self.looked_at[self.names[module]] -= 1
        return self.create_proxy("call_module", self.names[module], args, kwargs)


def _unknown() -> NoReturn:
    """Raise. A node with this function stands for a tensor that traced code has created.

    A graph with such a node never runs.
    """
    raise NotImplementedError


class _Followed:
    """Context that inspects the code of each function that a trace calls, with ``sys.setprofile``."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._seen: set[CodeType] = set()
        self._before: Any = None
        self._collects = False

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        self._collects = gc.isenabled()
        gc.disable()  # it may run any code, which does not belong to the forward
        sys.setprofile(self._called)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)
        if self._collects:
            gc.enable()

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code in self._seen or _is_import(frame):
            return
        self._seen.add(code)
        home = str(frame.f_globals.get("__name__", ""))
        if home in _SWITCHES:
            self._recorder.doubts("a function that it calls switches gradients or autocast")
        if home.partition(".")[0] in _LIBRARIES or home.startswith("namedtuple_"):
            return
        if code.co_name == "forward" and code.co_varnames[:1]:
            first = frame.f_locals.get(code.co_varnames[0])
            if issubclass(type(first), torch.autograd.function.FunctionCtx):
                self._recorder.doubts("its forward calls an autograd function")
        reason = self._reason(code, frame.f_globals)
        if reason:
            self._recorder.doubts(f"{code.co_qualname} {reason}")

    def _reason(self, code: CodeType, names: Mapping[str, Any]) -> str:
        """Return the reason why a graph cannot replace code that was executed, or an empty string."""
        lost = next((name for name in code.co_names if name in _LOST), None)
        if lost is not None:
            return f"uses {lost}, which a graph would lose"
        named = _globals_of(code)
        if any(instruction.opname in _WRITING for instruction in dis.get_instructions(code)):
            self._recorder.end(f"{code.co_qualname} sets a global")
        if _is_invisible_to_proxies(
            code, self._recorder.fixed if code is self._recorder.code else frozenset()
        ):
            return "compares by identity, enters a context manager or catches an error"
        builtin = next((name for name in named if name in _BUILTINS), None)
        if builtin is not None:
            return f"asks {builtin}(), which a graph would not ask again"
        free = [name for name in code.co_freevars if name != "__class__"]
        if free and not any(code in outer.co_consts for outer in self._seen):
            return f"reads {free[0]}, a variable around it"
        module = sys.modules.get(names.get("__name__", ""))
        home = module if module is not None and vars(module) is names else None
        for name, asked_for in named.items():
            reason = self._reason_of_global(name, names.get(name, torch), home, asked_for)
            if reason:
                return reason
        return ""

    def _reason_of_global(
        self, name: str, value: Any, home: ModuleType | None, has_attribute_read: bool
    ) -> str:
        """Return the reason why a graph cannot replace a read of a global, or an empty string.

        If a guard can compare the global, add the guard.
        """
        package = str(getattr(value, "__module__", None) or "").partition(".")[0]
        if isinstance(value, ModuleType):
            known = value.__name__.partition(".")[0] in _LIBRARIES
            return "" if known else f"looks into {name}, a module of Python"
        if isinstance(value, list | dict | set):
            self._recorder.before.add(name, value)
            return f"reads {name}, a global that can change"
        if isinstance(value, contextvars.ContextVar) or is_used_up(value):
            self._recorder.end(f"its forward reads {name}, which goes on with each call")
        if isinstance(value, BuiltinFunctionType | type | FunctionType) and package in _LIBRARIES:
            return ""
        if (isinstance(value, FunctionType | type) and not has_attribute_read) or is_constant(
            value
        ):
            if home is None:
                return f"reads {name}, a global"
            read = GlobalRead(name, home.__name__, copy.deepcopy(value))
            self._recorder.read(read)
            return ""
        return f"reads {name}, a global"


def _is_import(frame: FrameType | None) -> bool:
    """Return True if a function runs because of an import or the lazy loading of a Python module."""
    first = frame.f_code.co_varnames[:1] if frame is not None else ()
    if first and frame is not None and isinstance(frame.f_locals.get(first[0]), ModuleType):
        return True
    while frame is not None and frame.f_code is not Recorder.record.__code__:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


@functools.lru_cache(maxsize=4096)
def _globals_of(code: CodeType) -> dict[str, bool]:
    """Return the globals and builtins that code reads, each with True if an attribute of it is read."""
    names: dict[str, bool] = {}
    instructions = list(dis.get_instructions(code))
    for instruction, following in itertools.pairwise(instructions):
        if instruction.opname == "LOAD_GLOBAL":
            has_attribute_read = following.opname in ("LOAD_ATTR", "LOAD_METHOD")
            names[instruction.argval] = names.get(instruction.argval, False) or has_attribute_read
    return names


@functools.lru_cache(maxsize=4096)
def _is_invisible_to_proxies(code: CodeType, known: frozenset[str]) -> bool:
    """Return True if code does something that proxies cannot see, such as a comparison with ``is``.

    Args:
        code: The code.
        known: Names of arguments that are not traced, which the code may compare with None.
    """
    before: dis.Instruction | None = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in _UNHEARD:
            return True
        if instruction.opname.endswith("_NONE") and not (
            before is not None and (before.argval in known or before.opname == "LOAD_ATTR")
        ):
            return True
        if instruction.opname == "STORE_FAST" and instruction.argval in known:
            return True
        before = instruction
    return False


def _modes() -> tuple[bool, ...]:
    """Return the states of gradient mode, inference mode and autocast."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


@contextlib.contextmanager
def _wrapped_functions(recorder: Recorder) -> Iterator[None]:
    """Record calls of functions registered with ``fx.wrap`` as one node each."""

    def recorded(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not (holds_traced(args) or holds_traced(kwargs)):
                return function(*args, **kwargs)
            result = recorder.create_proxy("call_function", function, args, kwargs)
            result.node.meta["is_wrapped"] = True
            return result

        return call

    functions = [
        (names, name, names[name])
        for (_, name), names in torch_private.wrapped_functions().items()
        if name in names and "__name__" in names
    ]
    try:
        for names, name, function in functions:
            names[name] = recorded(function)
        yield
    finally:
        for names, name, function in functions:
            names[name] = function


# Functions whose results for a parameter do not change between a trace and a call.
_FIXED = frozenset({"shape", "size", "dim", "ndim", "numel", "nelement", "is_floating_point"})


class _Eager(TorchFunctionMode):
    """Mode that notes computations without traced values, whose results would be constants of the graph."""

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
        if name not in _FIXED and func is not torch_private.SET_GRAD_ENABLED:
            self._recorder.doubts(f"its forward computes without its input ({name})")
        return func(*args, **kwargs)
