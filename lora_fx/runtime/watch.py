"""The first eager call of each path is watched: who reads an adapted weight past its adapter is found there.

An adapter lies in the graph that applies its weight. Other code may read the weight as well: a helper that
takes the layer, a hook, a method beside ``forward``, a closure over the original layer. No analysis of code
sees them all, a run does. So each way into a rewritten model (:func:`entry`) runs once under a mode below
autograd (:class:`_Watch`), which knows the bytes of the adapted weights and what is computed from them. Where
such a value meets data outside of the graph that holds the weight's branch, the call ends with an error.

A way in is a method of a module, in training or not, with or without gradients, with arguments of these
classes and sizes (:mod:`lora_fx.runtime.samples`). What has been watched costs a look into a set from
then on. Compilers do not see the watch, and what they run stays pending, as does what runs without real
values (:func:`_blind`).
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import copyreg
import functools
import inspect
import logging
import operator
import pkgutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lora_fx import torch_private
from lora_fx.errors import CaptureError
from lora_fx.formats import formats
from lora_fx.ir import META_KEY, Site, Tag, module_of, record_of
from lora_fx.runtime import chunked, logits
from lora_fx.runtime.classes import (
    BASE,
    Blank,
    around,
    blank,
    give_class,
    inner_class,
    inner_of,
    members_of,
    subclass,
)
from lora_fx.runtime.ops import AdapterModule
from lora_fx.runtime.parts import check_equal
from lora_fx.runtime.samples import IDS, Sizes, refuse_ids
from lora_fx.torch_private import pytree

__all__ = [
    "BASE",
    "CODES",
    "GRAPH",
    "STATE",
    "Hooked",
    "arm",
    "arm_again",
    "computed_from_adapted",
    "disarm",
    "entry",
    "is_checked",
    "is_scoped",
    "mark_checked",
    "reading",
    "refuse_flat",
    "root_of",
    "watched_class",
]

_log = logging.getLogger("lora_fx")

GRAPH = "_lora_fx_graph"
"""Attribute of a region's class: its graph."""

CODES = "_lora_fx_codes"
"""Where a region's class keeps its graphs by the code that runs them."""

STATE = "_lora_fx_watch"
"""Attribute of a module: what was watched of it."""

_MADE = "_lora_fx_made_of"
_SCOPED = "_lora_fx_scoped"
_LIBRARIES = frozenset({"torch", "lora_fx", "triton"})
_GENERATED = "<lora_fx "
_CALLS = ("__call__", "forward", "fallback")

# Values as they were, in other places. Views, and what PyTorch tags as a copy of one, are known by that.
_MOVES = frozenset(
    {
        *("_reshape_copy", "_to_copy", "_unsafe_index", "_unsafe_view", "as_strided_scatter"),
        *("cat", "clone", "constant_pad_nd", "contiguous", "copy", "diagonal_scatter", "flip"),
        *("gather", "index", "index_put", "index_select", "lift_fresh", "masked_scatter"),
        *("masked_select", "native_dropout", "pin_memory", "repeat", "roll", "rot90"),
        *("scatter", "select_scatter", "set", "slice_scatter", "sort", "stack", "take", "tril"),
        "triu",
    }
)
# Of these, those that look rows up: what an embedding does.
_LOOKUPS = frozenset({"_unsafe_index", "gather", "index", "index_select", "take"})
# Their results depend on the form of what they are given, or are a number that stands for all of it.
_ASKS = frozenset(
    {
        *("_local_scalar_dense", "bernoulli", "count_nonzero", "empty_like", "equal"),
        *("full_like", "histc", "is_same_size", "logsumexp", "new_empty", "new_empty_strided"),
        *("new_full", "new_ones", "new_zeros", "nonzero", "ones_like", "rand_like"),
        *("randint_like", "randn_like", "zeros_like"),
    }
)


_NONE: frozenset[str] = frozenset()


class _Now:
    """What is so in the whole process.

    Attributes:
        epoch: Counted up when everything is to be watched again.
        active: Number of watches that run.
    """

    __slots__ = ("active", "epoch")

    def __init__(self) -> None:
        self.epoch = 0
        self.active = 0


_now = _Now()
_lock = threading.Lock()
_local = threading.local()
_public: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_classes: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


# --- what was watched ---------------------------------------------------------------------------------


class _Model:
    """What the modules of one model share.

    Attributes:
        setting: A number for the adapters that run. Others are watched again.
        checked: The settings under which a call of the whole model was watched to its end.
        derived: The names of the adapted weights that values are computed from, by storage, for as long as
            something else holds that.
        read: Takes the names of weights that are read past their branch; None if they are not asked for.
        copied: The weights of which those of this model are copies: code that holds on to a layer by a global
            or a closure computes with them, whatever is copied.
        noted: Of a copy that nothing was watched of: what ``derived`` was, by the names of parameters.
    """

    def __init__(self) -> None:
        self.root: Callable[[], nn.Module | None] = lambda: None
        self.setting = 0
        self.settings: list[tuple[Any, ...]] = []
        self.checked: set[tuple[int, int]] = set()
        self.derived: Any = WeakIdKeyDictionary()
        self.read: set[str] | None = None
        self.copied: list[_Weight] = []
        self.noted: dict[str, frozenset[str]] = {}

    def held(self) -> dict[str, frozenset[str]]:
        """The parameters and buffers that are computed from adapted weights, and the names of those."""
        root = self.root()
        if root is None or not self.derived:
            return dict(self.noted)
        return {
            name: found
            for name, tensor in _values_of(root)
            if (found := self._sources(tensor) | self.noted.get(name, _NONE))
        }

    def _sources(self, tensor: torch.Tensor) -> frozenset[str]:
        parts = (part for part in _parts(tensor) if _plain(part))
        return _NONE.union(*(self.derived.get(part.untyped_storage(), _NONE) for part in parts))

    def settle(self) -> None:
        """Finds what was noted by name in the model, which is there by now."""
        root = self.root()
        if root is None or not self.noted:
            return
        for name, tensor in _values_of(root):
            for part in _parts(tensor) if name in self.noted else ():
                storage = part.untyped_storage()
                self.derived[storage] = self.noted[name] | self.derived.get(storage, _NONE)
        self.noted = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Model:
        made = _Model()
        made.copied = [
            one for one in (*self.copied, *_weights(self, every=True)) if one.alive() is not None
        ]
        made.noted = self.held()
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _Model, (), {"noted": self.held()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.noted = state["noted"]

    def choose(self, *setting: Any) -> None:
        """Notes which adapters run: the same ones as before have the number that they had."""
        for number, known in enumerate(self.settings, 1):
            if len(known) == len(setting) and all(map(operator.is_, known, setting)):
                self.setting = number
                return
        self.settings.append(setting)
        self.setting = len(self.settings)


def _values_of(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


def computed_from_adapted(model: nn.Module) -> dict[str, frozenset[str]]:
    """The parameters and buffers that code of a rewritten model has computed from adapted weights.

    The adapters of those are no part of them.

    Returns:
        The names of the weights, by the name of the parameter or buffer.
    """
    known = model.__dict__.get(STATE)
    return known.model.held() if known is not None else {}


class _Entries:
    """What has been watched of one module. A copy starts from nothing."""

    __slots__ = ("done", "model")

    def __init__(self, model: _Model) -> None:
        self.model = model
        self.done = Sizes()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Entries:
        return _Entries(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Entries, (self.model,)


def arm(model: nn.Module) -> None:
    """Has the ways into a rewritten model watched, as far as they have not been with these adapters.

    Args:
        model: The root. Classes of modules may change; they keep name, module and ancestors.
    """
    record = record_of(model)
    if record is None:
        return
    known = model.__dict__.get(STATE)
    state: _Model = known.model if known is not None else _Model()
    state.root = weakref.ref(model)
    # The sites of an adapter are made once, and stand for it.
    state.choose(record.per_sample, *(record.adapters[name].sites for name in record.active))
    places = (row for name in record.active for row in record.adapters[name].places)
    held = _at_or_above({row.site.owner for row in places})
    for fqn, module in model.named_modules():
        region = GRAPH in inner_class(module).__dict__
        if isinstance(module, AdapterModule | torch.jit.ScriptModule):
            continue
        if fqn and fqn not in held and not region:
            continue
        entries = module.__dict__.get(STATE)
        if entries is None or entries.model is not state:
            module.__dict__[STATE] = _Entries(state)
        scoped = not fqn and record.loss == "chunked"
        _watch(module, whole=not (fqn and region) or _has_hooks(module), scoped=scoped)


def is_scoped(model: nn.Module) -> bool:
    """Whether the calls of a model are known to a loss that is computed in chunks."""
    return bool(inner_class(model).__dict__.get(_SCOPED))


def disarm(module: nn.Module) -> None:
    """Takes the watch off a module, which keeps its graph if it has one."""
    module.__dict__.pop(STATE, None)
    made_of = inner_class(module).__dict__.get(_MADE)
    if made_of is not None:
        give_class(module, made_of)


def arm_again() -> None:
    """Has everything watched again: a module has another forward now, or a hook."""
    with _lock:
        _now.epoch += 1


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[set[str]]:
    """Gives the names of the weights that are read in the graphs that hold their branches, as it happens.

    Args:
        model: A rewritten model, of which nothing has been watched yet.
    """
    found: set[str] = set()
    state: _Model = model.__dict__[STATE].model
    state.read = found
    try:
        yield found
    finally:
        state.read = None


def is_checked(model: nn.Module) -> bool:
    """Whether a call of a rewritten model, with the adapters that it has now, was watched to its end."""
    record, known = record_of(model), model.__dict__.get(STATE)
    if record is not None and not record.active:
        return True
    return known is not None and (_now.epoch, known.model.setting) in known.model.checked


def root_of(module: nn.Module) -> nn.Module | None:
    """The rewritten model that a watched module is in, as far as that is known."""
    known = module.__dict__.get(STATE)
    return None if known is None else known.model.root()


def mark_checked(model: nn.Module) -> None:
    """Notes that a model was compared with the dense one."""
    known = model.__dict__.get(STATE)
    if known is not None:
        known.model.checked.add((_now.epoch, known.model.setting))


def _at_or_above(owners: set[str]) -> set[str]:
    """FQNs of modules, and of those that they are in."""
    found = set(owners)
    for owner in owners:
        above = owner.rpartition(".")[0]
        while above and above not in found:
            found.add(above)
            above = above.rpartition(".")[0]
    return found


# --- the ways in --------------------------------------------------------------------------------------


def entry(name: str, cls: type, method: str = "") -> Callable[..., Any]:
    """A method whose first call of each form is watched.

    Args:
        name: What tells it from other methods of the module.
        cls: The class that has the method. What it has at a call is run.
        method: The method's name; by default ``name``.
    """
    method = method or name
    known = getattr(cls, method)
    own = inner_of(known) if method == "forward" else known

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = getattr(cls, method)
        function = own if now is known else now
        # The first of these is a constant to a compiler, which then sees nothing of the rest.
        if torch.compiler.is_compiling():
            return function(self, *args, **kwargs)
        entries = self.__dict__.get(STATE)
        if entries is None:
            return function(self, *args, **kwargs)
        given = (*args, *kwargs.values()) if kwargs else args
        key = (
            (
                name,
                self.training,
                torch.is_grad_enabled(),
                _now.epoch,
                entries.model.setting,
                *kwargs,
                *[value if value.__class__ is bool else value.__class__ for value in given],
            ),
            tuple([v.shape for v in given if v.__class__ is torch.Tensor and not v.is_nested]),
        )
        if _now.active or key not in entries.done.known:
            return _first(self, entries, key, function, args, kwargs)
        return function(self, *args, **kwargs)

    # A compiler counts recompilations, and gives up, by code: each class counts by itself.
    watched.__code__ = watched.__code__.replace(co_name=method)
    return functools.wraps(own)(watched)


def _first(
    module: Any,
    entries: _Entries,
    key: tuple[tuple[Any, ...], tuple[Any, ...]],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if torch.compiler.is_compiling():  # it has given up on the caller, and begins here
        return function(module, *args, **kwargs)
    if IDS in kwargs and key[0][0] == "forward":
        root = entries.model.root()
        if root is not None and module is root:
            refuse_ids(root)
    running: _Watch | None = getattr(_local, "watch", None)
    if running is not None and running.model is entries.model:
        # It is a part of what is watched, or was watched before: then it need not be again.
        done = entries.done.knows(*key)
        before, running.paused = running.paused, done
        try:
            result = function(module, *args, **kwargs)
        finally:
            running.paused = before
        if running.error is None:
            entries.done.add(*key)
        return result
    if entries.done.knows(*key) or _blind(module, entries.model, (args, kwargs)):
        return function(module, *args, **kwargs)
    root = entries.model.root()
    if root is not None:
        refuse_flat(root)
        check_equal(root)
        if module.training and torch.is_grad_enabled():
            _warn_of_waiting(root)
    weights = _weights(entries.model)
    if not weights:
        return function(module, *args, **kwargs)
    derived = len(entries.model.derived)
    result = _watched(_Watch(entries.model, weights), function, module, args, kwargs)
    if key[0][0] not in _CALLS and len(entries.model.derived) > derived:
        arm_again()  # it has put weights together (fuse, switch_to_deploy), which calls may use from now on
    entries.done.add(*key)
    if module is entries.model.root():
        entries.model.checked.add((_now.epoch, entries.model.setting))
    return result


_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_of_waiting(model: nn.Module) -> None:
    """Warns, once a model, of an active adapter that is trained before it has the start that it names."""
    record = record_of(model)
    if record is None or model in _told:
        return
    for name in record.active:
        if not record.adapters[name].initialized:
            _told.add(model)
            start = record.adapters[name].config.init_lora_weights
            _log.warning(
                "adapter %r is trained, and init_lora_weights=%r waits for data: call "
                "lora_fx.initialize(model, batches) first",
                name,
                start,
            )


def refuse_flat(model: nn.Module) -> None:
    """Refuses a model whose parameters FSDP1 has put into flat ones: they are views that come and go.

    Raises:
        CaptureError: If there is such a parameter.
    """
    for fqn, module in model.named_modules():
        if not torch_private.is_flattened(module):
            continue
        for leaf, parameter in module._parameters.items():
            # In a call a view lies before it.
            view = isinstance(vars(module).get(leaf), torch.Tensor)
            if not view and not torch_private.is_flat(parameter):
                continue
            name = f"{fqn}.{leaf}" if fqn else leaf
            raise CaptureError(
                f"{name} is a part of a flat parameter of FSDP1 (FullyShardedDataParallel), in which an "
                "adapter cannot be told from its base: shard the rewritten model with FSDP2, "
                "torch.distributed.fsdp.fully_shard (in accelerate and Trainer: fsdp_version 2)"
            )


def _watched(
    watch: _Watch,
    function: Callable[..., Any],
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    outer = getattr(_local, "watch", None)
    _local.watch = watch
    with _lock:
        _now.active += 1
    try:
        with watch:
            try:
                result = function(module, *args, **kwargs)
            finally:
                _leave_to(watch)
    finally:
        with _lock:
            _now.active -= 1
        _local.watch = outer
        watch.forget()
    if watch.error is not None:  # code of the model has caught it
        raise watch.error
    return result


def _leave_to(watch: _Watch) -> None:
    """Ends modes that a call has begun and not ended: an interrupt passes hooks by that would do so."""
    while (mode := torch_private.dispatch_mode()) is not None and mode is not watch:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # of torch


def _blind(module: nn.Module, model: _Model, inputs: Any) -> bool:
    """Whether a call cannot be watched now: something records it, or it runs without values."""
    if model.root() is None and record_of(module) is not None:
        model.root = weakref.ref(module)  # a copy, or one that was read from a file
    root = model.root()
    # A replica of DataParallel has weights of its own, which are not those of the model.
    if root is None or not any(module is one for one in root.modules()):
        return True
    if torch_private.in_jit_trace() or torch_private.in_functorch():
        return True
    if torch_private.in_backward():
        return True  # a checkpoint makes it again in a backward pass
    if any(mode.is_infra_mode() for mode in torch_private.dispatch_modes()):
        return True
    if any(not _plain(leaf) for leaf in pytree.tree_leaves(inputs)):
        return True
    if "torch._dynamo" in sys.modules:
        if torch_private.in_dynamo():
            return True
        wrapper = torch_private.compiled_module_class()
        compiled = (
            isinstance(one, wrapper) or torch_private.COMPILED_CALL in one.__dict__
            for one in root.modules()
        )
        return any(compiled)
    return False


def _plain(value: Any) -> bool:
    """Whether a value is no stand-in for a tensor."""
    if isinstance(value, torch.fx.Proxy):
        return False
    if not isinstance(value, torch.Tensor):
        return True
    name = type(value).__name__
    return value.device.type != "meta" and name not in ("FakeTensor", "FunctionalTensor", "DTensor")


# --- classes ------------------------------------------------------------------------------------------


def watched_class(cls: type[nn.Module], whole: bool, scoped: bool = False) -> type[nn.Module]:
    """A subclass of a module's class whose methods are entries, but for those that nn.Module has for itself.

    Args:
        cls: The class, a region's or the module's own.
        whole: Whether calls of the module and its forward are entries, too.
        scoped: Whether heads in it may leave their output to a loss (:func:`lora_fx.runtime.logits.scoped`).
    """
    key = (cls, whole, scoped)
    known = _classes.get(key)
    if known is not None:
        return known
    methods = [*_methods(cls), *(("__call__", "forward") if whole else ())]
    entries: dict[str, Any] = {name: entry(name, cls) for name in methods}
    if whole:
        inner = logits.scoped(entries["forward"]) if scoped else entries["forward"]
        entries["forward"] = around(cls.forward, inner)
    made = subclass(
        (_Watched, Hooked),
        cls,
        {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            BASE: cls,
            **{name: value for name, value in cls.__dict__.items() if name.startswith("_lora_fx_")},
            **entries,
            **(members_of(cls) if whole else {}),
            _MADE: cls,
            "_lora_fx_whole": whole,
            _SCOPED: scoped,
        },
    )
    _classes[key] = made
    return made


def _watch(module: nn.Module, *, whole: bool, scoped: bool) -> None:
    cls: Any = inner_class(module)
    if _MADE in cls.__dict__:
        if cls._lora_fx_whole >= whole and cls.__dict__[_SCOPED] == scoped:
            return
        cls = cls.__dict__[_MADE]
    if not whole and not _methods(cls):
        return
    # They are made by their own means, and torch looks at the parents of their class.
    if cls.__module__ == "torch.nn.utils.parametrize" or isinstance(module, torch.fx.GraphModule):
        return
    if GRAPH not in cls.__dict__ and not _pickles_plainly(cls):
        return
    give_class(module, watched_class(cls, whole, scoped))


def _pickles_plainly(cls: type) -> bool:
    made_by_itself = hasattr(cls, "__deepcopy__") or hasattr(cls, "__getnewargs__")
    ways: tuple[Any, Any] = (cls.__reduce__, cls.__reduce_ex__)
    return not made_by_itself and ways == (object.__reduce__, object.__reduce_ex__)


class Hooked(nn.Module):
    """Has hooks watched that are registered later, and modules that replace others.

    It is a module, and has no ``__slots__``: Python sees another layout otherwise, and refuses to change the
    class of a module that has it.
    """

    @property
    def peft_config(self) -> Any:
        """Configurations of the adapters as PEFT's, which asks for them before it adapts a model again."""
        if "peft_config" in self.__dict__:
            return self.__dict__["peft_config"]  # the user's own
        if record_of(self) is None:
            raise AttributeError("peft_config")  # Python goes on with __getattr__
        return pkgutil.resolve_name("lora_fx.checkpoint:peft_configs")(self)

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        self.__dict__["peft_config"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute. A call that was watched is watched again with another module in it."""
        if isinstance(value, nn.Module) and name in self.__dict__.get("_modules", ()):
            arm_again()
        super().__setattr__(name, value)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Registers a hook, which is watched when it first runs."""
        arm_again()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Registers a hook, which is watched when it first runs."""
        arm_again()
        return super().register_forward_pre_hook(*args, **kwargs)


class _Watched(Hooked):
    """What the class of a watched module adds to the one that it is made of, besides entries."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Keeps from the module's own class that it has a subclass: it may register them."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As the class that it is made of, and watched again."""
        cls: Any = type(self)
        made: Any = super().__reduce_ex__(protocol)
        make, made_of, *state = made
        how = (cls.__dict__["_lora_fx_whole"], cls.__dict__[_SCOPED])
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # of CPython
            again: Any = (_remade, (how, object.__new__, cls.__dict__[_MADE]))
            return blank, (Blank(cls, lambda: again),), *state
        if make is blank:
            inside = made_of[0]
            return blank, (Blank(cls, lambda: (_remade, (how, blank, inside))),), *state
        return (_remade, (how, make, *made_of), *state)


def _remade(how: tuple[bool, bool], make: Callable[..., Any], *made_of: Any) -> Any:
    module = make(*made_of)
    object.__setattr__(module, "__class__", watched_class(type(module), *how))
    return module


def _methods(cls: type) -> frozenset[str]:
    """Methods of a class that nn.Module does not have, or public ones that are overridden on it."""
    known = _public.get(cls)
    if known is not None:
        return known
    found: set[str] = set()
    for one in cls.__mro__:
        if one is nn.Module:
            break
        if one.__module__.startswith(("torch.nn.modules.", "lora_fx.")) or GRAPH in one.__dict__:
            continue
        for name, value in one.__dict__.items():
            own = not name.startswith("_") or not (
                name.startswith("__") or hasattr(nn.Module, name)
            )
            plain = own and isinstance(value, FunctionType)
            if (
                plain
                and not inspect.isgeneratorfunction(value)
                and not inspect.iscoroutinefunction(value)
            ):
                found.add(name)
    return _public.setdefault(cls, frozenset(found - {"forward"}))


def _has_hooks(module: nn.Module) -> bool:
    return any(module.__dict__.get(name) for name in torch_private.FORWARD_HOOKS)


# --- the mode -----------------------------------------------------------------------------------------


class _Weight(NamedTuple):
    """An adapted weight.

    Attributes:
        site: Where it is adapted.
        start, stop: Its bytes.
        alive: Gives its storage, whose address no other has for as long as there is one.
        tied: The names of other parameters that are known to be the same.
    """

    site: Site
    start: int
    stop: int
    alive: Callable[[], torch.UntypedStorage | None]
    tied: tuple[str, ...]


def _weights(model: _Model, every: bool = False) -> list[_Weight]:
    """The weights that are adapted now, or ever, by address; none where there are no values to watch."""
    root = model.root()
    record = record_of(root)
    if root is None or record is None:
        return []
    found: dict[tuple[int, int], _Weight] = {}
    lost: list[_Weight] = []
    names = record.adapters if every else record.active
    for row in (row for name in names for row in record.adapters[name].places):
        site = row.site
        try:
            weight = root.get_parameter(site.weight)
        except AttributeError:
            # Its layer was deleted or replaced. What was computed from it before may be there.
            lost.append(_Weight(site, 0, 0, lambda: None, site.tied_to))
            continue
        for tensor in (weight, record.originals.get(site.weight)):
            if not _plain(tensor):
                return []  # a part of it is here, and it is put together somewhere else
            for part in _parts(tensor):
                if not _plain(part):
                    return []
                start = torch_private.data_address(part)
                if not start and part.numel():
                    return []  # it is somewhere else
                stop, alive = start + _span(part), weakref.ref(part.untyped_storage())
                found.setdefault((start, stop), _Weight(site, start, stop, alive, site.tied_to))
    adapted = {weight.site.weight for weight in found.values()}
    for one in model.copied:
        if one.site.weight in adapted and one.alive() is not None:
            found.setdefault((one.start, one.stop), one)
    return [*lost, *(found[place] for place in sorted(found))]


def _without_graph(root: nn.Module | None, site: Site) -> str | None:
    """Which module has no graph any more, where none of those that a site's branch lies in has one."""
    names = dict.fromkeys(module_of(call.region) for call in site.calls)
    modules = dict(root.named_modules(remove_duplicate=False)) if root is not None else {}
    found = {name: modules[name] for name in names if name in modules}
    if not found or any(GRAPH in inner_class(module).__dict__ for module in found.values()):
        return None
    name, module = next(iter(found.items()))
    return f"{name or 'the model'} (a {type(module).__qualname__})"


def _parts(value: Any) -> Iterator[torch.Tensor]:
    """The strided tensors of which a tensor is made: those inside a subclass that wraps some."""
    if not isinstance(value, torch.Tensor):
        return
    value = torch_private.unwrap_functorch(value)
    flatten = getattr(type(value), "__tensor_flatten__", None)
    if flatten is None:
        if value.layout is torch.strided and not value.is_nested:
            yield value
        return
    for name in flatten(value)[0]:
        yield from _parts(getattr(value, name))


def _span(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size()


class _Watch(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Looks at every operation of a call for values of adapted weights.

    It holds nothing alive: a value that is computed from a weight is known by its storage, which is one
    object in Python for as long as anything holds it.

    Attributes:
        model: Of which model.
        paused: Whether what runs now has been watched before.
        error: What was found first.
    """

    def __init__(self, model: _Model, weights: list[_Weight]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.model = model
        self.paused = False
        self.error: CaptureError | None = None
        self._weights = weights
        self._named: dict[str, list[_Weight]] = {}
        for weight in weights:
            self._named.setdefault(weight.site.weight, []).append(weight)
        self._starts = [weight.start for weight in weights]
        model.settle()
        self._derived = model.derived
        self._clean: Any = WeakIdKeyDictionary()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets what is compiled inside of a call run compiled: the mode changes no numbers."""
        return True

    def forget(self) -> None:
        """Keeps of what it has learned what outlives the call."""
        self._clean.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operator, and looks at what it is given."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        given = list(_tensors((*args, *kwargs.values()) if kwargs else args))
        origins = [self._origin(tensor) for tensor in given]
        if not any(origins):
            result = func(*args, **kwargs)
            if all(self._is_clean(tensor) for tensor in given):
                self._note_clean(result)
            elif self._clean or self._derived:
                self._becomes_data(func, given)
            return result
        return self._read(func, args, kwargs, given, origins)

    def _read(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
        origins: list[frozenset[str]],
    ) -> Any:
        kind = _kind(func)
        found = frozenset().union(*origins)
        if kind != "ask" and self._meets(func, kind, given, origins, found):
            self._check(func, found)
            return func(
                *args, **kwargs
            )  # it holds the branch, or is on the way to it: data from now on
        result = func(*args, **kwargs)
        written = [given[0]] if torch_private.schema_of(func).is_mutable and given else []
        for tensor in (*_tensors((result,)), *written):
            if kind in ("ask", "reduce") or not _has_values(tensor):
                self._note_clean(tensor)
            else:
                self._note_derived(tensor, found)
        return result

    def _meets(
        self,
        func: Any,
        kind: str,
        given: list[torch.Tensor],
        origins: list[frozenset[str]],
        found: frozenset[str],
    ) -> bool:
        """Whether an operator brings a weight together with anything else."""
        # A single number is a gain, unless a product or a lookup takes it: a batch can be that small.
        others = [
            tensor
            for tensor, origin in zip(given, origins, strict=True)
            if not origin
            and (
                tensor.numel() > 1
                or (
                    kind != "pointwise"
                    and not self._is_clean(tensor)
                    and not self._of_model(tensor)
                )
            )
        ]
        if kind == "move":
            lookup = any(self._named[name][0].site.family == "embedding" for name in found)
            return lookup and _name(func) in _LOOKUPS and bool(others) and bool(origins[0])
        if kind == "reduce":
            return False
        if kind == "pointwise":
            return any(not self._is_clean(other) and not self._of_model(other) for other in others)
        several = len({origin for origin in origins if origin}) > 1
        return bool(others) or several

    def _check(self, func: Any, found: frozenset[str]) -> None:
        """Ends the call if an adapted weight is read outside of the graph that holds its branch.

        Raises:
            CaptureError: If it is.
        """
        if torch_private.in_backward():
            return  # a gradient that the forward computes
        # Also the graph of a head has its branches, whatever runs it.
        of_head = chunked.is_running()
        reader = _reader(sys._getframe(2))
        for name in sorted(found):
            if of_head or any(reader.holds(weight) for weight in self._named[name]):
                if self.model.read is not None:
                    self.model.read.add(name)
                continue
            weight, where = self._named[name][0], reader.words()
            lost = _without_graph(self.model.root(), weight.site)
            words = (
                f"its weight {weight.site.weight} is read by {_name(func)} {where}, outside of the graph "
                "that holds its adapter, which would be left out there. Call the layer instead of reading "
                "its weight (code that holds on to a layer of the original model has to be given that of the "
                f"rewritten model), or name {weight.site.name!r} in exclude_modules"
                if lost is None
                else f"{lost} has no graph with its adapter any more: it was replaced since the rewrite, "
                "or an attribute was set that the graph was made for. Put back what was there, or make the "
                "change in the original model and rewrite that"
            )
            self.error = self.error or CaptureError(f"{weight.site.name}: {words}")
            raise self.error

    # --- where values are from --------------------------------------------------------------------

    def _origin(self, tensor: torch.Tensor) -> frozenset[str]:
        """The weights that a tensor holds values of, or of which it is computed."""
        found: frozenset[str] = frozenset()
        for part in _parts(tensor):
            if part.device.type == "meta":
                continue
            start = torch_private.data_address(part)
            place = bisect.bisect_right(self._starts, start) - 1
            if place >= 0 and start < self._weights[place].stop:
                found |= {self._weights[place].site.weight}
            stop, place = start + _span(part), place + 1
            while place < len(self._starts) and self._starts[place] < stop:
                found |= {self._weights[place].site.weight}
                place += 1
            if self._derived:
                found |= self._derived.get(part.untyped_storage(), _NONE) & self._named.keys()
        return found

    def _note_derived(self, tensor: torch.Tensor, found: frozenset[str]) -> None:
        for part in _parts(tensor):
            # A tensor without elements holds nothing of a weight.
            if part.numel() and not self._inside(part):
                storage = part.untyped_storage()
                self._clean.pop(storage, None)
                self._derived[storage] = found | self._derived.get(storage, _NONE)

    def _inside(self, tensor: torch.Tensor) -> bool:
        start = torch_private.data_address(tensor)
        place = bisect.bisect_right(self._starts, start) - 1
        return place >= 0 and start < self._weights[place].stop

    def _note_clean(self, result: Any) -> None:
        for tensor in _tensors((result,)):
            for part in _parts(tensor):
                self._clean[part.untyped_storage()] = True

    def _becomes_data(self, func: Any, given: list[torch.Tensor]) -> None:
        """What data are written into is data."""
        if torch_private.schema_of(func).is_mutable:
            for part in _parts(given[0]) if given else ():
                self._clean.pop(part.untyped_storage(), None)

    def _is_clean(self, tensor: torch.Tensor) -> bool:
        """Whether a value was made in this call of no data."""
        return any(part.untyped_storage() in self._clean for part in _parts(tensor))

    def _of_model(self, tensor: torch.Tensor) -> bool:
        """Whether it is a parameter or a buffer: a gain, or a mask."""
        root = self.model.root()
        storages = {torch_private.storage_key(part.untyped_storage()) for part in _parts(tensor)}
        values = (*root.parameters(), *root.buffers()) if root is not None else ()
        return any(
            torch_private.storage_key(part.untyped_storage()) in storages
            for value in values
            for part in _parts(value)
        )


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether something computed from a weight can be used as one: not the answer to a comparison."""
    return tensor.dtype is not torch.bool and tensor.dtype is not torch.int64


def _name(func: Any) -> str:
    return str(torch_private.schema_of(func).name.partition("::")[2]).rstrip("_")


@functools.lru_cache(maxsize=4096)
def _kind(func: Any) -> str:
    """What an operator does with a weight: ``move``, ``pointwise``, ``reduce``, ``ask``, or ``product``."""
    namespace, name = func.namespace, _name(func)
    if namespace in ("c10d", "_c10d_functional", "fsdp"):
        return "move"
    if namespace not in ("aten", "prim", "prims"):
        return "product"
    if name in _ASKS or name.startswith("_foreach"):
        return "ask"
    views = any(
        one.alias_info is not None and not one.alias_info.is_write
        for one in torch_private.schema_of(func).returns
    )
    if name in _MOVES or views or torch.Tag.view_copy in func.tags:
        return "move"
    if torch.Tag.reduction in func.tags:
        return "reduce"
    return "pointwise" if torch.Tag.pointwise in func.tags else "product"


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


# --- who reads ----------------------------------------------------------------------------------------


class _Reader(NamedTuple):
    """The code that has an operation run: the innermost that is no library's.

    Attributes:
        frame: Where it is.
        between: Codes of libraries that it has called.
        owners: Modules of libraries whose methods are among those.
        caller: The graph that it is called by, or is.
        called: What that graph has called, if it is no library's.
    """

    frame: FrameType | None
    between: frozenset[CodeType]
    owners: tuple[nn.Module, ...]
    caller: FrameType | None
    called: CodeType | None

    def words(self) -> str:
        """Where it is, for an error."""
        frame = self.frame
        if frame is None:
            return "somewhere"
        code = frame.f_code
        if code.co_filename.startswith(_GENERATED):
            return f"in the graph of {type(frame.f_locals.get('self')).__name__}"
        return f"at {code.co_filename}:{frame.f_lineno} in {code.co_qualname}"

    def holds(self, weight: _Weight) -> bool:
        """Whether it is a graph with the weight's branch, or reads the weight by another name of its own."""
        module, graph = self._graph()
        if module is not None and graph is not None:
            tags = [(node, node.meta[META_KEY]) for node in graph.nodes if META_KEY in node.meta]
            adapted = {_whole(tag) for _, tag in tags if tag.adapter}
            if self.called is not None:
                # A function of the user's is one operation of the graph where a pattern says so.
                applied = {_whole(tag) for node, tag in tags if _runs(node, self.called)}
                return any(_is_at(module, name, weight) for name in adapted & applied)
            if any(_is_at(module, name, weight) for name in adapted):
                return True
            named = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
            if weight.tied and any(_is_at(module, name, weight) for name in named - adapted):
                return True
        return bool(weight.tied) and any(
            _is_at(owner, name, weight) for owner in self.owners for name in owner._parameters
        )

    def _graph(self) -> tuple[nn.Module | None, torch.fx.Graph | None]:
        """The module whose graph it is, and the graph."""
        frame = self.caller
        if frame is None:
            return None, None
        module = frame.f_locals.get("self")
        for cls in type(module).__mro__:
            if GRAPH not in cls.__dict__ or _MADE in cls.__dict__:
                continue
            own = inspect.unwrap(cls.__dict__[BASE].forward)
            graph = cls.__dict__[CODES].get(frame.f_code)
            if graph is None:
                return None, None
            # The graph was left for the module's own forward, which has no branch.
            left = getattr(own, "__code__", None) in self.between
            return (None, None) if left else (module, graph)
        return None, None


def _whole(tag: Tag) -> str:
    """The name of the weight of a tag, which may be of some of its rows."""
    return tag.weight.partition("[")[0]


def _runs(node: torch.fx.Node, code: CodeType) -> bool:
    """Whether what a node calls is a function with this code, or decorates one."""
    target = node.target
    return node.op == "call_function" and any(
        getattr(function, "__code__", None) is code
        for function in (target, inspect.unwrap(target))  # type: ignore[arg-type]
    )


def _is_at(module: nn.Module, name: str, weight: _Weight) -> bool:
    value: Any = module
    for atom in name.split("."):
        value = getattr(value, atom, None)
    return any(
        torch_private.data_address(part) < weight.stop
        and weight.start < torch_private.data_address(part) + _span(part)
        for part in _parts(value)
    )


def _is_library(root: str) -> bool:
    """Whether code of a package is a part of the operation that calls it."""
    return (
        root in _LIBRARIES
        or root in sys.stdlib_module_names
        or any(root in one.kernel_packages for one in formats())
    )


def _reader(frame: FrameType | None) -> _Reader:
    between: set[CodeType] = set()
    owners: list[nn.Module] = []
    code: FrameType | None = None
    called: CodeType | None = None
    root = ""
    while frame is not None and not frame.f_code.co_filename.startswith(_GENERATED):
        name = str(frame.f_globals.get("__name__", ""))
        # The wrappers of methods are as good as not there.
        root = name.partition(".")[0] if name != __name__ else "torch"
        if code is None and not _is_library(root):
            code = frame
        called = frame.f_code
        between.add(called)
        owner = frame.f_locals.get("self")
        if code is None and isinstance(owner, nn.Module) and frame.f_code.co_name == "forward":
            owners.append(owner)
        frame = frame.f_back
    # What a function of lora_fx calls, which a graph calls, is a part of that operation.
    if code is None or (frame is not None and root == "lora_fx"):
        code, called = frame, None
    return _Reader(code, frozenset(between), tuple(owners), frame, called)
