"""Regions: modules whose ``forward`` is generated from an ``fx.Graph``, and which keep their class.

A region's class is a subclass of the module's own class that differs in ``forward`` alone. So
``isinstance``, attributes, hooks, ``state_dict`` names, wrapping policies that go by class and
``torch.compile`` see the module that they know. Equal graphs share one class: one code object, one
compilation. Instances survive ``copy.deepcopy`` and ``pickle``, which a class made at run time does
not do by itself.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import linecache
import logging
import sys
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError, ConfigError, LoraFxError, some
from lora_fx.ir import META_KEY, Region, freeze, thaw
from lora_fx.passes.graph.copies import share_copy
from lora_fx.passes.graph.reads import Path, Read, conditions_of
from lora_fx.passes.graph.signature import (
    FALLBACK,
    GuardedCodeGen,
    forwarding_source,
    shown,
)
from lora_fx.runtime import (
    BASE,
    CODES,
    GRAPH,
    AdapterModule,
    Blank,
    Hooked,
    around,
    blank,
    disarm,
    entry,
    give_class,
    held_in,
    inner_class,
    ops,
    subclass,
)

__all__ = [
    "CONSTANT",
    "copy_graph",
    "copy_without_trainers",
    "generated",
    "graphs_of",
    "install",
    "instance_forwards",
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


def _refusal(
    base: type[nn.Module], forms: Sequence[_Form], *, quantized: bool = False
) -> Callable[..., Any]:
    """A stand-in for ``base.forward`` that says which condition a call fails.

    Args:
        base: The module's own class.
        forms: The graphs.
        quantized: Whether the graph is there for a quantized weight, not for an adapter.
    """
    left, remedy = (
        ("does not know its quantized weight", "name it in exclude of lora_fx.quantize")
        if quantized
        else (
            "would leave its adapter out",
            "pass example_inputs that look like this call to rewrite(), with frontend='export'",
        )
    )

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(base.forward).bind(self, *args, **kwargs)
        bound.apply_defaults()
        names = {**bound.arguments, "self": self}
        reasons = [_reasons(self, names, form) for form in forms]
        # What the graph that comes closest asks for.
        closest = min((found for found in reasons if found), key=len, default=[])
        reason, changed = closest[0] if closest else ("it is another call", False)
        if changed:
            raise CaptureError(
                f"the graph of this {base.__name__} holds for what its code has read when it was captured, "
                f"and its own forward {left}: {reason}. Put it back, or make that change before rewrite()"
            )
        raise CaptureError(
            f"{base.__name__}.forward was captured for other calls than this one, and its own "
            f"forward {left}: {reason}. If the model is to be called so, {remedy}"
        )

    return refuse


def _reasons(module: nn.Module, names: dict[str, Any], form: _Form) -> list[tuple[str, bool]]:
    """Why a graph does not apply, each with whether something has changed since the capture."""
    found: list[tuple[str, bool]] = []

    def value(expression: str) -> Any:
        return eval(expression, known, given)

    known, given = dict(form.namespace), dict(names)
    try:
        # In the order of the guard: what a condition names, those before it have set.
        failed = (one.failure(value) for one in form.conditions if value(one.test))
        found.extend((reason, False) for reason in failed)
    except (AttributeError, LookupError, TypeError):
        # A condition that only makes sense where those before it hold: the guard does not come to it.
        return found
    return [
        *found,
        *((reason, True) for reason in _changed(form.reads, dict(form.namespace), module)),
    ]


def _changed(reads: tuple[Read, ...], known: dict[str, Any], module: nn.Module) -> Iterator[str]:
    for read, condition in conditions_of(reads):
        try:
            changed = eval(condition, known, {"self": module})
        except (AttributeError, LookupError, TypeError):
            yield read.words("nothing")
            continue
        for one in read.changes(module) if changed else ():
            try:
                found = shown(one.found(module))
            except (AttributeError, LookupError, TypeError):
                found = "nothing"
            yield one.words(found)


CONSTANT = "_lora_fx_constant_"
"""Prefix of buffers that a graph needs and the model does not have."""

_GRAPH, _BASE = GRAPH, BASE
_FORMS = "_lora_fx_forms"
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
    """The graphs of all regions of a captured or rewritten model, by key (``""`` is the root)."""
    return {
        Region(name, module, graph, form=form).key: graph
        for name, module in _regions_of(model)
        for form, graph in getattr(type(module), _FORMS).items()
    }


def kept_graph(module: nn.Module) -> tuple[Mapping[str, fx.Graph], bool] | None:
    """The graphs that a module has instead of its forward for good, and whether that may stand in for them.

    By the form of the call. None for any other module, and for one that was captured or rewritten.
    """
    cls: Any = inner_class(module)
    return (getattr(cls, _FORMS), getattr(cls, _FALLBACK)) if cls.__dict__.get(_KEPT) else None


def install(regions: Iterable[Region], *, kept: bool = False) -> None:
    """Turns the module of every region into one that runs its graph.

    Args:
        regions: Modules and their graphs. A graph must not be edited afterwards.
        kept: Whether the graph is what the module computes from now on, so that a capture takes it over:
            the module's own code does not know how its weights are stored.
    """
    known: dict[Any, type[nn.Module]] = {}
    modules: dict[nn.Module, list[Region]] = {}
    for region in regions:
        modules.setdefault(region.module, []).append(region)
    for module, forms in modules.items():
        wrapped = _wrapped(module)
        base = original_class(module)
        fallback = all(region.fallback for region in forms)
        key = (base, *((region.form, id(region.graph)) for region in forms), fallback)
        if key not in known:
            graphs = {region.form: region.graph for region in forms}
            known[key] = _region_class(base, graphs, fallback, kept)
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
    base: type[nn.Module], graphs: Mapping[str, fx.Graph], fallback: bool, kept: bool = False
) -> type[nn.Module]:
    """The class of a module that runs graphs: one for each form of a call, the first that applies."""
    forms = [_Form(graph) for graph in graphs.values()]
    key = (base, *(form.key for form in forms), *graphs, fallback, kept)
    known = _classes.get(key)
    if known is not None:
        return known
    forward: Any = entry("fallback", base, "forward")
    if not fallback:
        forward = _refusal(base, forms, quantized=kept)
    original = base.forward
    codes: dict[types.CodeType, fx.Graph] = {}
    for form, graph in reversed([*zip(forms, graphs.values(), strict=True)]):
        # A call that a graph does not apply to goes on to the next one.
        namespace = {**form.namespace, FALLBACK: forward}
        forward = generated(form.source, namespace, base.__name__)
        forward.__doc__ = original.__doc__
        forward.__signature__ = inspect.signature(original)
        codes[forward.__code__] = graph
    cls = subclass(
        (_Regional, Hooked),
        base,
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "forward": _dispatching(base),
            _RUN: forward,
            _GRAPH: next(iter(graphs.values())),
            CODES: codes,
            _FORMS: types.MappingProxyType(dict(graphs)),
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


class _Form:
    """What a graph becomes in a class: source, globals, and what tells it from others."""

    def __init__(self, graph: fx.Graph) -> None:
        code = graph.python_code(root_module="self")
        codegen = torch_private.codegen_of(graph)
        guard = codegen if isinstance(codegen, GuardedCodeGen) else None
        # Who traces the module sees one node in each of these functions.
        whole = [name for name, value in code.globals.items() if _is_ours(value)]
        # Libraries replace functions of torch.nn.functional, as context parallelism does its attention.
        source = torch_private.by_public_names(code.src)
        self.source = "".join(f"{_WRAP}({name!r})\n" for name in whole) + source
        self.namespace = {**code.globals, **(guard.constants() if guard else {}), _WRAP: fx.wrap}
        self.conditions = guard.conditions() if guard else []
        self.reads = guard.reads if guard else ()
        tags = tuple((n.name, n.meta[META_KEY]) for n in graph.nodes if META_KEY in n.meta)
        names = tuple(sorted((name, id(value)) for name, value in self.namespace.items()))
        self.key = (source, names, tags, guard is not None)


class _Regional(Hooked):
    """What a region's class adds to the module's own class, besides ``forward``."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Keeps from the module's own class that it has a subclass: it may register them."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; refuses at once what the next call would refuse."""
        cls: Any = type(self)
        for read in () if getattr(cls, _FALLBACK) else _reads_of(cls, name):
            if read.kind in ("value", "contents") and ops.differs(value, read.expected):
                inside = (
                    "its quantized weight is known to that graph alone: set it before quantize()"
                    if getattr(cls, _KEPT)
                    else "its adapter is part of that graph: set it before rewrite()"
                )
                raise CaptureError(
                    f"{name} of this {cls.__name__} was {read.expected!r} when its forward was captured, "
                    f"and {inside}"
                )
        super().__setattr__(name, value)

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
    frozen = {form: freeze(graph) for form, graph in getattr(cls, _FORMS).items()}
    return frozen, getattr(cls, _FALLBACK), getattr(cls, _KEPT)


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


def _reads_of(cls: Any, name: str) -> Iterator[Read]:
    """What the graph of a region took for granted about an attribute."""
    path = Path().attribute(name)
    for graph in getattr(cls, _FORMS).values():
        yield from (
            one for one in getattr(torch_private.codegen_of(graph), "reads", ()) if one.path == path
        )


def _rebuild(
    base: type[nn.Module], frozen: Mapping[str, Any], fallback: bool, kept: bool = False
) -> nn.Module:
    cls = _region_class(base, _thawed(frozen), fallback, kept)
    return cls.__new__(cls)


def _rebuild_over(plain: Any, frozen: Mapping[str, Any], fallback: bool, kept: bool = False) -> Any:
    plain.__class__ = _region_class(type(plain), _thawed(frozen), fallback, kept)
    return plain


def _thawed(frozen: Mapping[str, Any]) -> dict[str, fx.Graph]:
    return {form: thaw(graph) for form, graph in frozen.items()}


# --- what trainers leave on a model ---------------------------------------------------------------
# What trainers leave on a model: a ``forward`` that they set on the instance, around the module's
# own.
#
# accelerate runs it under autocast and casts the outputs, or moves weights before and after it;
# torch.compile may be given the method in place of the module; TRL fuses the head with the
# loss. It belongs to training, so that a merged or an exported model has to be without it. What
# other code has set is a part of the model.


_log = logging.getLogger("lora_fx")

_TRAINERS = frozenset(
    {
        *("accelerate", "deepspeed", "lightning", "lightning_fabric", "pytorch_lightning"),
        *("ray", "torch", "transformers", "trl"),
    }
)
_NEUTRAL = sys.stdlib_module_names | {"lora_fx"}
_OLD = ("_old_forward", "_original_forward")  # where accelerate keeps what was there
_BESIDE = (*_OLD, "_hf_hook")


def instance_forwards(model: nn.Module) -> frozenset[str]:
    """FQNs of the modules whose ``forward`` is set on the instance."""
    return frozenset(name for name, module in model.named_modules() if "forward" in vars(module))


def copy_without_trainers(
    model: nn.Module, before: Collection[str], error: type[LoraFxError]
) -> nn.Module:
    """Copy a rewritten model as :func:`share_copy` does, without what trainers have set since the rewrite.

    Args:
        model: The model; it is not touched.
        before: :func:`instance_forwards` at the rewrite: what was there is a part of the model.
        error: What is raised where that cannot be told from what other code has set.

    Raises:
        LoraFxError: If a trainer's function runs one that is not a trainer's, or the other way round.
        CaptureError: As :func:`share_copy`.
    """
    restored: dict[str, str] = {}
    dropped: dict[str, tuple[str, ...]] = {}
    left_out: list[Any] = []
    for name, module in model.named_modules():
        held = vars(module)
        if name in before or "forward" not in held:
            continue
        trainers = _trainers(name, module, held["forward"], error)
        if not trainers:
            continue
        dropped[name or "the model"] = trainers
        # accelerate's hooks hold on to a forward that other code has set before.
        old = next((key for key in _OLD if key in held), None)
        somebody = old is not None and _packages(module, held[old])
        if old is not None and somebody and not _trainers(name, module, held[old], error):
            restored[name] = old
        left_out += [
            held[key] for key in ("forward", *_BESIDE) if key in held and restored.get(name) != key
        ]
    if dropped:
        _log.warning(
            "the forward that %s has set for training is left out: %s",
            ", ".join(sorted({one for trainers in dropped.values() for one in trainers})),
            some(list(dropped)),
        )
    result = share_copy(model, left_out, sharded=True)
    for name, old in restored.items():
        held = vars(result.get_submodule(name))
        held["forward"] = held.pop(old)
    return result


def _trainers(
    name: str, module: nn.Module, forward: Any, error: type[LoraFxError]
) -> tuple[str, ...]:
    """The trainers that have set a forward; none if other code has."""
    packages = _packages(module, forward)
    trainers, others = sorted(packages & _TRAINERS), sorted(packages - _TRAINERS)
    if trainers and others:
        raise error(
            f"{name or 'the model'}: its forward was set on the instance by {', '.join(trainers)} and by "
            f"{', '.join(others)}, and what belongs to training alone cannot be told from the rest: take it "
            "off first (del module.forward), or set the forward before rewrite()"
        )
    return tuple(trainers)


def _packages(module: nn.Module, forward: Any) -> set[str]:
    """The packages whose functions run from an instance's forward down to the module's own."""
    own = {one.__code__ for one in _functions(original_class(module).forward)}
    return {_package(one) for one in _path(forward, own)} - _NEUTRAL


def _path(value: Any, own: Collection[types.CodeType]) -> list[types.FunctionType]:
    """The first function that runs, and those between it and the module's own forward, without that."""
    found = [one for one in _functions(value) if not _is_own(one, own)]
    return [
        one
        for place, one in enumerate(found)
        if not place or any(_is_own(inner, own) for inner in _functions(one))
    ]


def _is_own(function: types.FunctionType, own: Collection[types.CodeType]) -> bool:
    code = function.__code__
    return code in own or code.co_filename.startswith("<lora_fx ")


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions that a callable is made of, from the outside to the inside."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        one = pending.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, types.FunctionType):
            yield one
            cells = [held for cell in one.__closure__ or () for held in held_in(cell)]
            pending += [*cells, vars(one).get("__wrapped__")]
        elif isinstance(one, types.MethodType):
            pending.append(one.__func__)
        elif isinstance(one, functools.partial):
            pending.append(one.func)
        elif type(one).__module__.partition(".")[0] in _TRAINERS and not isinstance(
            one, nn.Module | type
        ):
            # An object with __call__, as accelerate has around a forward.
            pending += [item for item in getattr(one, "__dict__", {}).values() if callable(item)]


def _package(function: types.FunctionType) -> str:
    # Not its __module__, which functools.wraps takes from what is inside.
    name: str = function.__globals__.get("__name__", "")
    return "lora_fx" if not name else name.partition(".")[0]
