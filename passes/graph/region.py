"""Regions: modules whose ``forward`` is generated from an ``fx.Graph``, and which keep their class.

A region's class is a subclass of the module's own class that differs in ``forward`` alone. So
``isinstance``, attributes, hooks, ``state_dict`` names, wrapping policies that go by class and
``torch.compile`` see the module that they know. Equal graphs share one class: one code object, one
compilation. Instances survive ``copy.deepcopy`` and ``pickle``, which a class made at run time does
not do by itself.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
import re
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx, nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError, ConfigError
from lora_fx.ir import BASE_READ, META_KEY, Region, freeze, record_of, thaw
from lora_fx.passes.graph.reads import BASE_OF, FORWARD
from lora_fx.passes.graph.signature import (
    FALLBACK,
    GuardedCodeGen,
    forwarding_source,
)
from lora_fx.runtime import (
    BASE,
    CODE,
    GRAPH,
    AdapterModule,
    Blank,
    Hooked,
    around,
    base_parameter,
    blank,
    disarm,
    entry,
    give_class,
    held_in,
    inner_class,
    subclass,
)

__all__ = [
    "CONSTANT",
    "Code",
    "class_name",
    "copy_graph",
    "generated",
    "graphs_of",
    "install",
    "is_built_in",
    "is_conv1d",
    "is_region",
    "kept_graph",
    "original_class",
    "uninstall",
    "wraps_own_forward",
]

_counter = itertools.count()


def generated(source: str, namespace: dict[str, Any], name: str) -> Any:
    """The ``forward`` that a source defines.

    Args:
        source: What ``fx`` has written.
        namespace: The globals of the function; it is written.
        name: Of the class that it is for, as tracebacks show it.
    """
    # Registered with linecache so that a traceback through generated code shows it.
    filename = f"<lora_fx {name} {next(_counter)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)
    # fx remembers the globals of code that calls functions which it is not to look into, for good, and
    # goes through all of them at each trace.
    forward = namespace.pop("forward")
    # The text lives as long as the code that it explains.
    weakref.finalize(forward, _forget, filename, id(namespace))
    return forward


def _forget(filename: str, namespace: int) -> None:
    linecache.cache.pop(filename, None)
    wrapped = torch_private.wrapped_functions()
    for key in [key for key in wrapped if key[0] == namespace]:
        del wrapped[key]


def _refusal(base: type[nn.Module]) -> Callable[..., Any]:
    """Make what stands in for the forward of a class that does not know how a weight is stored."""

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(
            f"{base.__name__}.forward was captured for other calls than this one, and its own forward does "
            "not know its quantized weight: put back what was changed since, or make that change before"
        )

    return refuse


CONSTANT = "_lora_fx_constant_"
"""Prefix of buffers that a graph needs and the model does not have."""

_GRAPH, _BASE = GRAPH, BASE
_FALLBACK = "_lora_fx_fallback"
_KEPT = "_lora_fx_kept"
_RUN = "_lora_fx_run"

_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = (
    weakref.WeakValueDictionary()
)


def is_region(module: nn.Module) -> bool:
    """Whether the module's forward is generated from a graph."""
    return _GRAPH in inner_class(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, also where it is a region, or watched."""
    cls = inner_class(module)
    found: type[nn.Module] = cls.__dict__.get(_BASE, cls)
    return found


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's own class."""
    cls = original_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def is_conv1d(module: nn.Module) -> bool:
    """Return True for a Conv1D of transformers, a linear layer whose weight is stored [in, out]."""
    return any(
        (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
        for cls in original_class(module).__mro__
    )


def is_built_in(module: nn.Module) -> bool:
    """Whether the module is a layer of PyTorch, also one whose weight is reparametrized."""
    cls: type = original_class(module)
    if cls.__module__ == "torch.nn.utils.parametrize":
        cls = cls.__mro__[1]
    return cls.__module__.startswith(("torch.nn.modules.", "torch.nn.utils.", "torch.ao.nn."))


def _regions_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The regions of a model by FQN, parents first."""
    return ((name, module) for name, module in model.named_modules() if is_region(module))


def graphs_of(model: nn.Module) -> dict[str, fx.Graph]:
    """Return the graphs of a captured or rewritten model by FQN (``""`` is the root), parents first.

    Of a module that runs its own forward, it is what was captured.
    """
    running = {name: getattr(type(module), _GRAPH) for name, module in _regions_of(model)}
    record = record_of(model)
    captured = {} if record is None else record.base.graphs
    there = dict(model.named_modules())
    return {
        **{name: running.get(name, graph) for name, graph in captured.items() if name in there},
        **running,
    }


def kept_graph(module: nn.Module) -> fx.Graph | None:
    """Return the graph that a module has instead of its forward for good; None for any other module."""
    cls: Any = inner_class(module)
    return getattr(cls, _GRAPH) if cls.__dict__.get(_KEPT) else None


def install(regions: Iterable[Region], *, kept: bool = False) -> None:
    """Turns the module of every region into one that runs its graph.

    Args:
        regions: Modules and their graphs. A graph must not be edited afterwards.
        kept: Whether the graph is what the module computes from now on, so that a capture takes it over:
            the module's own code does not know how its weights are stored.
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
    """Gives a region its own class back, and any module that is watched."""
    wrapped = _wrapped(module)
    disarm(module)
    if is_region(module):
        give_class(module, original_class(module))
    _keep_wrapped(module, wrapped)


# Where transformers keeps what runs between the collectives of a parallel layer.
_WRAPPERS = ("transformers.distributed.",)


def wraps_own_forward(module: nn.Module) -> bool:
    """Whether the ``forward`` of an instance calls the module's own, and only adds to it before and after.

    That is so for what transformers parallelizes (``tp_plan``): the layer computes in between as any other.
    """
    return _wrapped(module) is not None


def _wrapped(module: nn.Module) -> types.CellType | None:
    """What holds the module's own forward in one that was set on the instance."""
    forward = vars(module).get("forward")
    if not isinstance(forward, types.FunctionType):
        return None
    if not forward.__globals__.get("__name__", "").startswith(_WRAPPERS):
        return None
    own = type(module).forward
    for cell in forward.__closure__ or ():
        for held in held_in(cell):
            if isinstance(held, types.MethodType) and held.__self__ is module:
                inner = (own, getattr(type(module), _BASE, type(module)).forward)
                return cell if any(held.__func__ is one for one in inner) else None
    return None


def _keep_wrapped(module: nn.Module, cell: types.CellType | None) -> None:
    """Has a wrapper call what the module runs now."""
    if cell is not None:
        cell.cell_contents = types.MethodType(type(module).forward, module)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy to edit: same node names, same tags, same code generation."""
    result = fx.Graph(tracer_cls=torch_private.tracer_class(graph))
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = result.node_copy(node, lambda n: mapping[n])
    # Shared: defaults are compared by identity.
    result.set_codegen(torch_private.codegen_of(graph))
    return result


def _region_class(
    base: type[nn.Module], graph: fx.Graph, fallback: bool, kept: bool = False
) -> type[nn.Module]:
    """Make the class of a module that runs a graph."""
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
            _GRAPH: graph,
            CODE: forward.__code__,
            _BASE: base,
            _FALLBACK: fallback,
            _KEPT: kept,
            **({} if _copies_plainly(base) else {"__deepcopy__": _deep_copy}),
        },
    )
    _classes[key] = cls
    return cls


_dispatchers: weakref.WeakValueDictionary[type[nn.Module], Callable[..., Any]] = (
    weakref.WeakValueDictionary()
)


def _dispatching(base: type[nn.Module]) -> Callable[..., Any]:
    """The ``forward`` of all regions of a class: it runs what the module's class has to run now.

    Trainers keep ``module.forward`` and call it from a function that they set on the module. Adapters are
    switched by another class, so the function that they keep looks at the class of each call.
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
    """What a module runs now; without a graph (the adapter is off, or merged) its own forward."""
    cls: Any = type(module)
    return getattr(cls, _RUN, None) or cls.forward


_WRAP = "_lora_fx_wrap"


def _is_ours(value: Any) -> bool:
    """Whether a value is a function that is in graphs as one node, and that fx does not know."""
    return isinstance(value, types.FunctionType) and value.__module__.startswith("lora_fx.runtime.")


class Code:
    """What a graph becomes in a class: source, globals, and what tells it from others."""

    def __init__(self, graph: fx.Graph) -> None:
        code = graph.python_code(root_module="self")
        codegen = torch_private.codegen_of(graph)
        guard = codegen if isinstance(codegen, GuardedCodeGen) else None
        # Who traces the module sees one node in each of these functions.
        whole = [name for name, value in code.globals.items() if _is_ours(value)]
        # Libraries replace functions of torch.nn.functional, as context parallelism does its attention.
        source = torch_private.by_public_names(code.src)
        for node in graph.nodes:
            if node.op == "get_attr" and BASE_READ in node.meta:
                source = _reading_base(source, node)
        self.source = "".join(f"{_WRAP}({name!r})\n" for name in whole) + source
        constants = guard.constants() if guard else {}
        self.namespace = {**code.globals, **constants, _WRAP: fx.wrap, BASE_OF: base_parameter}
        tags = tuple((n.name, n.meta[META_KEY]) for n in graph.nodes if META_KEY in n.meta)
        names = tuple(sorted((name, id(value)) for name, value in self.namespace.items()))
        self.key = (source, names, tags, guard is not None)


def _reading_base(source: str, node: fx.Node) -> str:
    """Have the line of a node read the base's parameter, not the attribute, which has its adapters."""
    name = str(node.target).rpartition(".")[2]
    leaf = re.escape(name)
    line = re.compile(
        rf"^(\s*{node.name} = )(?:(.+)\.{leaf}|getattr\((.+), ['\"]{leaf}['\"]\))(?=\s*(?:;|#|$))",
        re.MULTILINE,
    )
    return line.sub(lambda found: f"{found[1]}{BASE_OF}({found[2] or found[3]}, {name!r})", source)


class _Regional(Hooked):
    """What a region's class adds to the module's own class, besides ``forward``."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Keeps from the module's own class that it has a subclass: it may register them."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds a parameter; refuses what would be one of an adapter (``lora_A.default``) by another name.

        Raises:
            ConfigError: As where PyTorch's styles of tensor parallelism cut a layer with its adapter.
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
        """Refuses ``torch.jit.script``, which compiles source and knows no graph.

        Raises:
            CaptureError: Always.
        """
        raise CaptureError(
            f"torch.jit.script compiles source, and the forward of this {type(self).__name__} is a graph: "
            "script what merge() gives, or record the adapted model with torch.export or torch.jit.trace"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The module's own class by name, and the graph beside it; a copy is of the same class."""
        cls: Any = type(self)
        base = getattr(cls, _BASE)
        if _reduces_plainly(base):
            return blank, (Blank(cls, lambda: (_rebuild, (base, *_kept_of(cls)))),), _state_of(self)
        # It has a way of its own, as fx.GraphModule does.
        plain = object.__new__(base)
        plain.__dict__.update(self.__dict__)
        return _rebuild_over, (plain, *_kept_of(cls))


def _copies_plainly(cls: type) -> bool:
    return _reduces_plainly(cls) and not hasattr(cls, "__deepcopy__")


def _reduces_plainly(cls: type) -> bool:
    ways: tuple[Any, Any] = (cls.__reduce__, cls.__reduce_ex__)
    return ways == (object.__reduce__, object.__reduce_ex__)


def _kept_of(cls: Any) -> tuple[Any, ...]:
    """What a region's class is made of again, besides the module's own class."""
    return freeze(getattr(cls, _GRAPH)), getattr(cls, _FALLBACK), getattr(cls, _KEPT)


def _deep_copy(module: Any, memo: dict[int, Any]) -> Any:
    """``__deepcopy__`` of a region whose own class has a way of its own to be copied, or to be pickled.

    No other region has this method: a module that holds one may look up in it what it does not have itself,
    and would be copied as the module that it holds.
    """
    cls: Any = type(module)
    own = getattr(getattr(cls, _BASE), "__deepcopy__", None)
    if own is not None and not isinstance(module, fx.GraphModule):
        result = own(module, memo)
        result.__class__ = cls
        return result
    # Not cls.__new__, which makes a class for each fx.GraphModule.
    result = object.__new__(cls)
    memo[id(module)] = result
    result.__setstate__(copy.deepcopy(_state_of(module), memo))
    return result


def _state_of(module: Any) -> Any:
    state = module.__getstate__()
    # A graph of PyTorch's own compiler over the module that this one was copied from.
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
