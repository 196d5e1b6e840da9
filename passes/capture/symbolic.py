"""Traces the ``forward`` of one module with ``torch.fx``, or says why it cannot be traced faithfully.

Child modules stay calls: hooks, wrapping policies and checkpointing go on working, and a child that does
not trace costs only its own graph. ``torch.fx`` is happy to record a graph that means something else than
the code did. Everything of that kind that can be noticed is refused here: a test of a traced value's
type, tensors or random numbers made while tracing, writes to attributes, and grad or autocast modes that
the graph would lose. ``self.training`` becomes a read, so that ``train()`` and ``eval()`` keep their meaning.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from lora_fx.passes._signature import GuardedCodeGen, Parameter, parameters_of

__all__ = ["Untraceable", "trace"]

_LIBRARY = ("lora_fx", "torch", "abc", "typing", "collections", "_weakrefset")


class Untraceable(Exception):
    """Why a module's forward cannot be captured; the message is a row of the dry run."""


def trace(
    module: nn.Module, fixed: dict[str, Any] | None = None, *, check_none: bool = True
) -> fx.Graph:
    """Traces one module's own ``forward``.

    Args:
        module: The module. It is left as it was.
        fixed: Values of parameters that are not inputs of the graph. By default every parameter that
            has a default is fixed to it.
        check_none: See :class:`GuardedCodeGen`.

    Returns:
        A graph with the names of ``module`` and a guarded signature.

    Raises:
        Untraceable: With the reason in words.
    """
    if "forward" in module.__dict__:
        raise Untraceable("its forward was replaced on the instance")
    parameters = parameters_of(type(module).forward, fixed)
    if not any(p.traced for p in parameters):
        raise Untraceable("its forward has no required argument: pass example_inputs")
    before = _state(module)
    tracer = _Tracer(parameters)
    try:
        with tracer.reading_modes(module):
            graph = tracer.trace(module)
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(_words(error)) from error
    finally:
        changed = _restore(module, before)
    if changed:
        raise Untraceable(f"its forward {changed}")
    graph.set_codegen(GuardedCodeGen(parameters, check_none))
    return graph


class _Proxy(fx.Proxy):
    """A traced value that does not answer questions about its type: the answer would be ``Proxy``."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        depth = 1
        while (name := sys._getframe(depth).f_globals.get("__name__", "").partition(".")[0]) in (
            "abc",
            "typing",
        ):
            depth += 1
        if name in _LIBRARY:
            return type(self)
        raise Untraceable("its forward asks for the type of a traced value with isinstance")


class _Mode(_Proxy):
    """``module.training``, read when the graph runs. The node is made when somebody asks."""

    def __init__(self, tracer: _Tracer, target: str) -> None:
        self.__dict__.update(tracer=tracer, _target=target, _made=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        made = self.__dict__["_made"]
        if made is None:
            tracer = self.__dict__["tracer"]
            made = tracer.create_node("get_attr", self.__dict__["_target"], (), {})
            self.__dict__["_made"] = made
        found: fx.Node = made
        return found


@dataclasses.dataclass
class _Modes:
    tracer: _Tracer
    module: nn.Module
    saved: list[tuple[nn.Module, bool]] = dataclasses.field(default_factory=list)

    def __enter__(self) -> None:
        owners = [("", self.module), *self.module.named_children()]
        for name, owner in owners:
            if isinstance(owner.training, bool):
                self.saved.append((owner, owner.training))
                owner.__dict__["training"] = _Mode(
                    self.tracer, f"{name}.training" if name else "training"
                )

    def __exit__(self, *_: object) -> None:
        for owner, training in self.saved:
            owner.__dict__["training"] = training


class _Tracer(fx.Tracer):  # type: ignore[misc]
    proxy_buffer_attributes = True

    def __init__(self, parameters: tuple[Parameter, ...]) -> None:
        super().__init__()
        self._parameters = parameters
        self._grad = torch.is_grad_enabled()
        self._autocast = _autocast()

    def reading_modes(self, module: nn.Module) -> _Modes:
        return _Modes(self, module)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        positional: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        for p in self._parameters:
            if p.variadic:
                continue
            value = self.create_proxy("placeholder", p.name, (), {}) if p.traced else p.value
            if p.kind in (0, 1):
                positional.append(value)
            else:
                keywords[p.name] = value

        def run(*args: Any) -> Any:
            return root_fn(*args, **keywords)

        return run, positional

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> fx.Node:
        if torch.is_grad_enabled() != self._grad:
            raise Untraceable("its forward switches gradients on or off, which a graph would lose")
        if _autocast() != self._autocast:
            raise Untraceable("its forward switches autocast on or off, which a graph would lose")
        return super().create_node(kind, target, args, kwargs, *rest, **named)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and not self._owned(a):
            raise Untraceable("its forward makes a tensor that does not depend on its input")
        if isinstance(a, dict) and type(a) not in (dict, fx.immutable_collections.immutable_dict):
            if not dataclasses.is_dataclass(a):
                raise Untraceable(f"a {type(a).__name__} would become a plain dict")
            made = {key: self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), made)
        return super().create_arg(a)

    def _owned(self, tensor: torch.Tensor) -> bool:
        return tensor in self.tensor_attrs or any(tensor is b for b in self.root.buffers())


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (
        text[0]
        if text and isinstance(error, fx.proxy.TraceError)
        else f"{type(error).__name__}: {text[0] if text else ''}"
    )


_State = tuple[dict[str, Any], dict[str, Any], Any, torch.Tensor]


def _state(module: nn.Module) -> _State:
    return dict(module.__dict__), dict(module._buffers), random.getstate(), torch.get_rng_state()


def _restore(module: nn.Module, state: _State) -> str:
    """Puts back what a trace changed and says what that was."""
    attributes, buffers, python, torch_rng = state
    changed = ""
    now = module.__dict__
    written = [
        name
        for name in {**attributes, **now}
        if now.get(name, now) is not attributes.get(name, attributes)
    ]
    rebound = [
        name
        for name in {**buffers, **module._buffers}
        if module._buffers.get(name) is not buffers.get(name)
    ]
    if written or rebound:
        now.clear()
        now.update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)
        changed = f"writes to self.{(written + rebound)[0]}"
    if random.getstate() != python or not torch.equal(torch.get_rng_state(), torch_rng):
        random.setstate(python)
        torch.set_rng_state(torch_rng)
        changed = changed or "draws random numbers that the graph would keep"
    return changed
