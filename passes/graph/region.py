"""Regions: modules whose ``forward`` is generated from an ``fx.Graph``.

A region's class is a subclass of the module's own class that differs in ``forward`` only. So
``isinstance``, attributes, hooks, ``state_dict`` names, wrapping policies by class and
``torch.compile`` work as before. Equal graphs share one class: one code object, one
compilation. Instances support ``copy.deepcopy`` and ``pickle``, unlike instances of most classes
that are created at run time.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError, ConfigError
from lora_fx.ir import Region, freeze, thaw
from lora_fx.passes.graph.modules import KEPT, is_region, original_class
from lora_fx.passes.graph.python_code import Code, generated
from lora_fx.passes.graph.reads import FORWARD
from lora_fx.passes.graph.signature import (
    FALLBACK,
    forwarding_source,
)
from lora_fx.runtime import CODE, GRAPH, Hooked, disarm, entry
from lora_fx.runtime.modules import (
    BASE,
    AdapterModule,
    Blank,
    around,
    blank,
    give_class,
    held_in,
    subclass,
)

__all__ = ["install", "uninstall", "wraps_own_forward"]


def _refusal(base: type[nn.Module]) -> Callable[..., Any]:
    """Return a fallback that raises, for a class whose own forward cannot read its quantized weight."""

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(
            f"{base.__name__}.forward was captured for other calls than this one, and its own forward does "
            "not know its quantized weight: put back what was changed since, or make that change before"
        )

    return refuse


_FALLBACK = "_lora_fx_fallback"
_RUN = "_lora_fx_run"

_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = (
    weakref.WeakValueDictionary()
)


def install(regions: Iterable[Region], *, kept: bool = False) -> None:
    """Change the class of every region's module, so that it runs its graph.

    Args:
        regions: Modules and their graphs. A graph must not be edited afterwards.
        kept: True if the graph replaces the module's forward permanently, because the module's own code
            cannot read its quantized weights. A later capture then uses this graph.
    """
    known: dict[Any, type[nn.Module]] = {}
    for region in regions:
        module, base = region.module, original_class(region.module)
        wrapped = _wrapped(module)
        key = (base, id(region.graph), region.fallback)
        if key not in known:
            known[key] = _region_class(base, region.graph, region.fallback, kept)
        give_class(module, known[key])
        _keep_wrapped(module, wrapped)


def uninstall(module: nn.Module) -> None:
    """Restore the module's own class, for a region or a watched module."""
    wrapped = _wrapped(module)
    disarm(module)
    if is_region(module):
        give_class(module, original_class(module))
    _keep_wrapped(module, wrapped)


# Packages of transformers whose functions wrap a layer's forward and run collectives before and after it.
_WRAPPERS = ("transformers.distributed.",)


def wraps_own_forward(module: nn.Module) -> bool:
    """Return True if the ``forward`` set on an instance wraps the module's own, with code before and after.

    This holds for layers that transformers parallelizes (``tp_plan``).
    """
    return _wrapped(module) is not None


def _wrapped(module: nn.Module) -> types.CellType | None:
    """Return the closure cell in which a wrapper on the instance has the module's own forward, or None."""
    forward = vars(module).get("forward")
    if not isinstance(forward, types.FunctionType):
        return None
    if not forward.__globals__.get("__name__", "").startswith(_WRAPPERS):
        return None
    own = type(module).forward
    for cell in forward.__closure__ or ():
        for content in held_in(cell):
            if isinstance(content, types.MethodType) and content.__self__ is module:
                inner = (own, getattr(type(module), BASE, type(module)).forward)
                return cell if any(content.__func__ is function for function in inner) else None
    return None


def _keep_wrapped(module: nn.Module, cell: types.CellType | None) -> None:
    """Make a wrapper on an instance call the forward of the class that the module has now."""
    if cell is not None:
        cell.cell_contents = types.MethodType(type(module).forward, module)


def _region_class(
    base: type[nn.Module], graph: fx.Graph, fallback: bool, kept: bool = False
) -> type[nn.Module]:
    """Return the class of a module that runs a graph."""
    code = Code(graph)
    key = (base, base.forward, code.key, fallback, kept)
    known = _classes.get(key)
    if known is not None:
        return known
    original = base.forward
    instead = entry("fallback", base, "forward") if fallback else _refusal(base)
    forward = generated(
        code.source, {**code.namespace, FALLBACK: instead, FORWARD: original}, base.__name__
    )
    forward.__doc__ = original.__doc__
    forward.__signature__ = inspect.signature(original)
    cls = subclass(
        (_Regional, Hooked),
        base,
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "forward": _dispatching(base),
            _RUN: forward,
            GRAPH: graph,
            CODE: forward.__code__,
            BASE: base,
            _FALLBACK: fallback,
            KEPT: kept,
            **({} if _copies_plainly(base) else {"__deepcopy__": _deep_copy}),
        },
    )
    _classes[key] = cls
    return cls


_dispatchers: weakref.WeakValueDictionary[type[nn.Module], Callable[..., Any]] = (
    weakref.WeakValueDictionary()
)


def _dispatching(base: type[nn.Module]) -> Callable[..., Any]:
    """Return the ``forward`` that all regions of a class share. It runs the graph of the present class.

    Trainers keep a reference to ``module.forward`` and call it from a function that they set on the module.
    Switching adapters changes the module's class. So this ``forward`` looks up the class at each call.
    """
    known = _dispatchers.get(base)
    if known is not None:
        return known
    original = base.forward
    source, namespace = forwarding_source(original, _run_of.__name__)
    forward = generated(source, {**namespace, _run_of.__name__: _run_of}, base.__name__)
    forward.__doc__ = original.__doc__
    forward.__signature__ = inspect.signature(original)
    return _dispatchers.setdefault(base, around(original, forward))


def _run_of(module: nn.Module) -> Any:
    """Return the function that a module runs now. Without a graph it is the module's own forward."""
    cls: Any = type(module)
    return getattr(cls, _RUN, None) or cls.forward


class _Regional(Hooked):
    """Mixin with the methods that a region's class adds to the module's own class, except ``forward``."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Hide the subclass from the module's own class, which may register its subclasses."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter. Refuse a dotted name that is inside an adapter (``lora_A.default``).

        Raises:
            ConfigError: If the name is inside an adapter. PyTorch's tensor parallelism adds such parameters.
        """
        inside = self._modules.get(name.partition(".")[0]) if "." in name else None
        if isinstance(inside, AdapterModule):
            raise ConfigError(
                f"{name} of this {type(self).__name__} is a parameter of an adapter, which follows the "
                "weight that it adapts: parallelize the model first (parallelize_module), and rewrite what "
                "that gives"
            )
        super().register_parameter(name, param)

    def __prepare_scriptable__(self) -> Any:
        """Refuse ``torch.jit.script``, which compiles source and ignores the graph.

        Raises:
            CaptureError: Always.
        """
        raise CaptureError(
            f"torch.jit.script compiles source, and the forward of this {type(self).__name__} is a graph: "
            "script what merge() gives, or record the adapted model with torch.export or torch.jit.trace"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Reduce to the name of the module's own class and the graph. A copy has the same class."""
        cls: Any = type(self)
        base = getattr(cls, BASE)
        if _reduces_plainly(base):
            return blank, (Blank(cls, lambda: (_rebuild, (base, *_kept_of(cls)))),), _state_of(self)
        # The class has its own __reduce__, as fx.GraphModule does.
        plain = object.__new__(base)
        plain.__dict__.update(self.__dict__)
        return _rebuild_over, (plain, *_kept_of(cls))


def _copies_plainly(cls: type) -> bool:
    return _reduces_plainly(cls) and not hasattr(cls, "__deepcopy__")


def _reduces_plainly(cls: type) -> bool:
    ways: tuple[Any, Any] = (cls.__reduce__, cls.__reduce_ex__)
    return ways == (object.__reduce__, object.__reduce_ex__)


def _kept_of(cls: Any) -> tuple[Any, ...]:
    """Return the graph, the fallback flag and the kept flag of a region's class, to rebuild the class."""
    return freeze(getattr(cls, GRAPH)), getattr(cls, _FALLBACK), getattr(cls, KEPT)


def _deep_copy(module: Any, memo: dict[int, Any]) -> Any:
    """Copy a region whose own class customizes copying or pickling.

    Other regions do not get this ``__deepcopy__``. A module around a region may forward attribute lookups
    to it, and would then be copied as that region.
    """
    cls: Any = type(module)
    own = getattr(getattr(cls, BASE), "__deepcopy__", None)
    if own is not None and not isinstance(module, fx.GraphModule):
        result = own(module, memo)
        result.__class__ = cls
        return result
    # Not cls.__new__, which creates a class for each fx.GraphModule.
    result = object.__new__(cls)
    memo[id(module)] = result
    result.__setstate__(copy.deepcopy(_state_of(module), memo))
    return result


def _state_of(module: Any) -> Any:
    state = module.__getstate__()
    # Leave out compiled code of torch.compile, which refers to the original module.
    return (
        {k: v for k, v in state.items() if k != torch_private.COMPILED_CALL}
        if isinstance(state, dict)
        else state
    )


def _rebuild(base: type[nn.Module], frozen: Any, fallback: bool, kept: bool = False) -> nn.Module:
    cls = _region_class(base, thaw(frozen), fallback, kept)
    return cls.__new__(cls)


def _rebuild_over(plain: Any, frozen: Any, fallback: bool, kept: bool = False) -> Any:
    plain.__class__ = _region_class(type(plain), thaw(frozen), fallback, kept)
    return plain
