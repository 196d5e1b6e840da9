"""Traces the ``forward`` of one module with ``torch.fx``, or says why it cannot be traced faithfully.

Child modules stay calls: hooks, wrapping policies and checkpointing go on working, and a child that does
not trace costs only its own graph. ``torch.fx`` is happy to record a graph that means something else than
the code did. Whatever of that kind can be noticed is refused: questions about a traced value that only a
tensor can answer (:mod:`.proxies`), modes and constants (:mod:`.eager`), and side effects
(:mod:`.state`). ``self.training`` becomes a read, so that ``train()`` and ``eval()`` keep their meaning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import keyword
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import fx, nn

from lora_fx.passes._lazy import is_lazy
from lora_fx.passes._signature import GuardedCodeGen, Parameter, attribute, parameters_of
from lora_fx.passes.capture.eager import Eager, forbidden, user_code
from lora_fx.passes.capture.proxies import ModeProxy, TracedValue
from lora_fx.passes.capture.state import State

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
    conditions: tuple[str, ...] = (),
) -> fx.Graph:
    """Traces one module's own ``forward``.

    Args:
        module: The module. It is left as it was.
        fixed: Values of parameters that are not inputs of the graph. By default every parameter that
            has a default is fixed to it.
        check_none: See :class:`GuardedCodeGen`.
        forward: What to trace instead of the module's own forward; it has the same signature.
        conditions: Expressions over ``self`` that are true where the graph does not apply.

    Returns:
        A graph with the names of ``module`` and a guarded signature.

    Raises:
        Untraceable: With the reason in words.
    """
    if "forward" in module.__dict__:
        raise Untraceable("its forward was replaced on the instance")
    parameters = parameters_of(forward or type(module).forward, fixed)
    _check_parameters(parameters)
    before = State(module, (p.default for p in parameters))
    recorder = Recorder(parameters, forward)
    try:
        graph = recorder.record(module)
    except Exception as error:
        words = str(error) if isinstance(error, Untraceable) else _words(error)
        failure = Untraceable(recorder.refused or words)
        failure.begun = getattr(recorder, "graph", None)
        raise failure from error
    finally:
        changed = before.restore()
    if recorder.refused or changed:
        raise Untraceable(recorder.refused or changed)
    if recorder.values_alive():
        raise Untraceable("its forward keeps a traced value where other code finds it")
    # The forward itself, too, where a wrong answer kept it from recording anything.
    code = getattr(inspect.unwrap(forward or type(module).forward), "__code__", None)
    reason = forbidden(recorder.seen | ({code} if isinstance(code, CodeType) else set()))
    if reason:
        raise Untraceable(reason)
    _check_names(parameters, graph)
    reads = frozenset(name for code in recorder.seen for name in code.co_names)
    sizes = (*conditions, *_sizes(module, graph))
    graph.set_codegen(GuardedCodeGen(parameters, check_none, sizes, reads))
    return graph


def _sizes(module: nn.Module, graph: fx.Graph) -> Iterator[str]:
    """Conditions that are true when something was appended to a container that the graph goes through."""
    targets = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for name in dict.fromkeys(target.rpartition(".")[0] for target in targets):
        container = module.get_submodule(name)
        if isinstance(container, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            yield f"len({attribute(name)}) != {len(container)}"


def _check_parameters(parameters: tuple[Parameter, ...]) -> None:
    if not any(p.traced for p in parameters):
        raise Untraceable("its forward has no required argument: pass example_inputs")
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
        refused: The first reason not to go on. Code that is traced may catch the exception.
        seen: Code that traced operations come from.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, parameters: tuple[Parameter, ...], forward: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.refused: str | None = None
        self.seen: set[CodeType] = set()
        self._parameters = parameters
        self._forward = forward
        self._values: list[weakref.ref[fx.Proxy]] = []
        self._modes = _modes()

    def refuse(self, reason: str) -> NoReturn:
        """Ends the trace.

        Raises:
            Untraceable: Always.
        """
        self.refused = self.refused or reason
        raise Untraceable(reason)

    def record(self, module: nn.Module) -> fx.Graph:
        """The graph of ``module.forward``."""
        with contextlib.ExitStack() as stack:
            # Whatever the caller's modes are, those of the trace have to be known.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.amp.autocast("cpu", enabled=False))
            self._modes = _modes()
            stack.enter_context(self._reading_modes(module))
            stack.enter_context(self._calling_children(module))
            stack.enter_context(Eager(self))
            return self.trace(module)

    def values_alive(self) -> bool:
        """Whether somebody still holds on to a traced value."""
        return any(value() is not None for value in self._values)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child stays a call."""
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """A call of a child."""
        if m is self.root:
            self.refuse("its forward calls the module itself")
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value that notices questions."""
        value = TracedValue(node, self)
        # fx itself keeps the reads of parameters, in a cycle.
        if node.op != "get_attr":
            self._values.append(weakref.ref(value))
        return value

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer becomes a read. A buffer is read anew each time: it may be replaced."""
        buffer = isinstance(attr_val, torch.Tensor) and not isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, {} if buffer else parameter_proxy_cache)

    def known_shape(self, value: fx.Proxy) -> torch.Size | None:
        """The shape of a parameter, which does not depend on the input; None for any other value."""
        node = value.__dict__.get("node")
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        # Not by getattr, which gives traced values during a trace.
        *path, key = str(node.target).split(".")
        owner: nn.Module | None = self.root
        for atom in path:
            owner = owner._modules.get(atom) if owner is not None else None
        found = None if owner is None else owner._parameters.get(key)
        return None if found is None or is_lazy(found) else found.shape

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Control flow on a traced value."""
        what = "self.training"
        if not isinstance(obj, ModeProxy):
            what = "a value that is known only when it runs"
        self.refuse(f"its forward branches on {what}")

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for what is traced, fixed values for the rest."""
        positional: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        for p in self._parameters:
            if p.variadic:
                continue
            value = self.create_proxy("placeholder", p.name, (), {}) if p.traced else p.value
            if p.kind != inspect.Parameter.KEYWORD_ONLY:
                positional.append(value)
            else:
                keywords[p.name] = value

        def run(*args: Any) -> Any:
            return (self._forward or root_fn)(*args, **keywords)

        return run, positional

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
        if _modes() != self._modes:
            self.refuse(
                "its forward switches gradients or autocast on or off, which a graph would lose"
            )
        user_code(sys._getframe(1), Recorder.record.__code__, self.seen)
        # A child, or a parameter, named "self" would take the place of the module in generated code.
        return super().create_node(
            kind, target, args, kwargs, name or ("self_" if target == "self" else None)
        )

    def create_arg(self, a: Any) -> Any:
        """Refuses constants that a graph would hold, and containers that it would not rebuild."""
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and not self._owned(a):
            self.refuse("its forward makes a tensor that does not depend on its input")
        if isinstance(a, list) and type(a) not in (list, fx.immutable_collections.immutable_list):
            self.refuse(f"a {type(a).__name__} would become a plain list")
        if isinstance(a, dict) and type(a) not in (dict, fx.immutable_collections.immutable_dict):
            return self._dict_class(a)
        return super().create_arg(a)

    def _dict_class(self, value: dict[str, Any]) -> fx.Node:
        """A ModelOutput of transformers, or the like, as a call of its class."""
        if not dataclasses.is_dataclass(type(value)):
            self.refuse(f"a {type(value).__name__} would become a plain dict")
        made = {key: self.create_arg(item) for key, item in value.items()}
        return self.create_node("call_function", type(value), (), made)

    def _owned(self, tensor: torch.Tensor) -> bool:
        return tensor in self.tensor_attrs or any(tensor is b for b in self.root.buffers())

    @contextlib.contextmanager
    def _reading_modes(self, module: nn.Module) -> Iterator[None]:
        """Makes ``training`` of the module and of those below it a read."""
        saved: list[tuple[nn.Module, bool, ModeProxy]] = []
        for name, owner in module.named_modules():
            if isinstance(owner.__dict__.get("training"), bool):
                value = ModeProxy(self, f"{name}.training" if name else "training")
                saved.append((owner, owner.training, value))
                owner.__dict__["training"] = value
        try:
            yield
        finally:
            switched = False
            for owner, training, value in saved:
                switched = switched or owner.__dict__.get("training") is not value
                owner.__dict__["training"] = training
        if switched:
            self.refuse("its forward calls train() or eval()")

    @contextlib.contextmanager
    def _calling_children(self, module: nn.Module) -> Iterator[None]:
        """Makes calls of children whose class has a ``__call__`` of its own a call like any other."""
        owners = {
            cls
            for child in module.modules()
            for cls in type(child).__mro__
            if "__call__" in cls.__dict__ and cls is not nn.Module and issubclass(cls, nn.Module)
        }
        saved = {cls: cls.__dict__["__call__"] for cls in owners}

        def call(child: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.call_module(child, child.forward, args, kwargs)

        for cls in owners:
            cls.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            for cls, original in saved.items():
                cls.__call__ = original  # type: ignore[method-assign]


def _modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
