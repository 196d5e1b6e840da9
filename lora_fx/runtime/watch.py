"""Check that no code uses an adapted weight without its adapters, in the first eager call of each form.

Code that reads ``layer.weight`` gets it with its adapters (:mod:`lora_fx.runtime.effective`). Some reads
bypass that: ``named_parameters()``, ``state_dict()``, ``vars(layer)``, or a layer of the original model in a
closure. So each entry point of a rewritten model (:func:`entry`) runs once under a dispatch mode
(:class:`_Watch`). The mode knows the bytes of the adapted weights, and the values that are computed from
them. If code outside of lora-fx combines such a value with data, the call ends with an error. A call under
this mode is "watched".

An entry point is the forward of a module. The form of a call is the training mode, the gradient mode, and the
classes of the arguments. Sizes are compared in :mod:`lora_fx.runtime.modules.call_sizes`. Later calls of a
form cost one set lookup. Compiled calls and calls without real values (:func:`_blind`) cannot be watched. The
next eager call of their form is watched instead.
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
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lora_fx import torch_private
from lora_fx.errors import CaptureError
from lora_fx.formats import formats
from lora_fx.ir import META_KEY, Saving, Site, record_of
from lora_fx.runtime.effective import CHANGES, assigned, weight_property
from lora_fx.runtime.loss import chunked, logits
from lora_fx.runtime.memory import blocks, spans, tiles
from lora_fx.runtime.modules import (
    BASE,
    AdapterModule,
    Blank,
    Sizes,
    around,
    blank,
    check_equal,
    give_class,
    inner_class,
    inner_of,
    members_of,
    subclass,
)
from lora_fx.runtime.rows import IDS, refuse_ids
from lora_fx.torch_private import pytree

__all__ = [
    "BASE",
    "CODE",
    "GRAPH",
    "STATE",
    "Hooked",
    "arm",
    "arm_again",
    "disarm",
    "entry",
    "is_checked",
    "is_scoped",
    "mark_checked",
    "note_place",
    "places_of",
    "reading",
    "root_of",
    "watched_class",
]

_log = logging.getLogger("lora_fx")

GRAPH = "_lora_fx_graph"
"""Attribute of a region's class: its graph."""

CODE = "_lora_fx_code"
"""Attribute of a region's class: the code that runs its graph."""

STATE = "_lora_fx_watch"
"""Attribute of a module: the forms of its calls that were watched."""

# Attributes of a watched class: the class that it was created from, and its _ClassSettings.
_SOURCE = "_lora_fx_source"
_SETTINGS = "_lora_fx_settings"
# PEFT's methods that a rewritten model has, and the functions that they call.
_PEFT_METHODS = {
    "merge_and_unload": "lora_fx.checkpoint:merge_and_unload",
    "print_trainable_parameters": "lora_fx.api:print_trainable_parameters",
    "unload": "lora_fx.checkpoint:unload",
}
_LIBRARIES = frozenset({"torch", "lora_fx", "triton"})
_GENERATED = "<lora_fx "
# Modules of lora-fx's own operations, and those among them that call code of the model.
_OPERATIONS = ("lora_fx.runtime.", "lora_fx.passes.effective", "lora_fx.formats.")
_AROUND = frozenset(
    f"lora_fx.runtime.{name}"
    for name in (
        *("memory.blocks", "memory.replay", "memory.spans", "memory.tiles"),
        *("loss.chunked", "loss.logits", "kernels.recompute"),
        *("rows.row_tracking", "rows.samples", "watch"),
    )
)

# Operators that move values without changing them. Views and their copies are recognized by schema and tag.
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
# Operators among these that look rows up, like an embedding.
_LOOKUPS = frozenset({"_unsafe_index", "gather", "index", "index_select", "take"})
# Operators whose results do not count as values of a weight: they depend on its shape, or summarize it.
_ASKS = frozenset(
    {
        *("_local_scalar_dense", "bernoulli", "count_nonzero", "empty_like", "equal"),
        *("full_like", "histc", "is_same_size", "logsumexp", "new_empty", "new_empty_strided"),
        *("new_full", "new_ones", "new_zeros", "nonzero", "ones_like", "rand_like"),
        *("randint_like", "randn_like", "zeros_like"),
    }
)


_NONE: frozenset[str] = frozenset()
_PLACES = 8  # most code locations to record for a weight


class _Now:
    """State of the whole process.

    Attributes:
        epoch: Counter. After an increase, every form is watched again.
        active: Number of watches that are running.
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


# --- state of models and modules ----------------------------------------------------------------------


class _Model:
    """State that the modules of one model share.

    Attributes:
        root: Weak reference to the model.
        setting: Number of the set of active adapters. Each set is watched on its own.
        settings: The sets of adapters that were active so far, in the order of their numbers.
        checked: Pairs of epoch and setting for which a call of the whole model was watched to its end.
        read: Set that collects the names of the weights that graphs read; None outside of :func:`reading`.
        copied: Adapted weights of the model that this one is a copy of. Code that keeps a layer in a global
            or a closure still computes with them.
        places: Code locations that need the values of a whole adapted weight, by the name of the weight.
    """

    def __init__(self) -> None:
        self.root: Callable[[], nn.Module | None] = lambda: None
        self.setting = 0
        self.settings: list[tuple[Any, ...]] = []
        self.checked: set[tuple[int, int]] = set()
        self.read: set[str] | None = None
        self.copied: list[_Weight] = []
        self.places: dict[str, list[str]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Model:
        clone = _Model()
        clone.copied = [
            weight
            for weight in (*self.copied, *_weights(self, every=True))
            if weight.alive() is not None
        ]
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        return _Model, ()

    def choose(self, *setting: Any) -> None:
        """Set the active adapters. A set that was active before keeps its number."""
        for number, known in enumerate(self.settings, 1):
            if len(known) == len(setting) and all(map(operator.is_, known, setting)):
                self.setting = number
                return
        self.settings.append(setting)
        self.setting = len(self.settings)


class _Entries:
    """Forms of the calls of one module that were watched. A copy starts empty."""

    __slots__ = ("done", "model")

    def __init__(self, model: _Model) -> None:
        self.model = model
        self.done = Sizes()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Entries:
        return _Entries(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Entries, (self.model,)


def arm(model: nn.Module) -> None:
    """Watch the entry points of a rewritten model, except for forms that were watched with these adapters.

    Args:
        model: The root. Modules may get a new class with the same name, module and ancestors.
    """
    record = record_of(model)
    if record is None:
        return
    known = model.__dict__.get(STATE)
    state: _Model = known.model if known is not None else _Model()
    state.root = weakref.ref(model)
    # The sites of an adapter are created once, so that they identify it.
    state.choose(record.per_sample, *(record.adapters[name].sites for name in record.active))
    owners = {row.site.owner for name in record.active for row in record.adapters[name].places}
    if record.per_sample:
        own = (name for adapter in record.active for name in record.adapters[adapter].own)
        owners |= {name.rpartition(".")[0] for name in own}
    above = _above(owners)
    for fqn, module in model.named_modules():
        if isinstance(module, AdapterModule | torch.jit.ScriptModule):
            continue
        saving = Saving() if record.per_sample else record.savings.of(fqn)
        known_graph = GRAPH in inner_class(module).__dict__
        if not (any(saving) or known_graph or fqn in above or fqn in owners):
            continue
        entries = module.__dict__.get(STATE)
        if entries is None or entries.model is not state:
            module.__dict__[STATE] = _Entries(state)
        scoped = not fqn and record.loss == "chunked"
        whole = any(saving) or fqn in above or not _of_torch(module)
        weights = tuple(module.__dict__.get(CHANGES, ()))
        _watch(module, _ClassSettings(whole, scoped, weights, saving))


def _of_torch(module: nn.Module) -> bool:
    cls = inner_class(module)
    home: str = cls.__dict__.get(BASE, cls).__module__
    return home.startswith("torch.nn.")


def note_place(module: nn.Module, weight: str, location: str) -> bool:
    """Record a code location that needs the values of an adapted weight. Return True if it was added.

    Args:
        module: The module that has the weight.
        weight: FQN of the weight.
        location: File, line and function.
    """
    known = module.__dict__.get(STATE)
    if known is None:
        return False
    locations: list[str] = known.model.places.setdefault(weight, [])
    if location in locations or len(locations) >= _PLACES:
        return False
    locations.append(location)
    return True


def places_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the code locations that need the values of adapted weights of a model, by weight."""
    known = model.__dict__.get(STATE)
    return {} if known is None else {name: tuple(at) for name, at in known.model.places.items()}


def is_scoped(model: nn.Module) -> bool:
    """Return True if the calls of this model are wrapped for ``loss="chunked"``."""
    settings: _ClassSettings | None = inner_class(model).__dict__.get(_SETTINGS)
    return settings is not None and settings.scoped


def disarm(module: nn.Module) -> None:
    """Stop watching a module, whose weights are read without adapters then. A region keeps its graph."""
    module.__dict__.pop(STATE, None)
    module.__dict__.pop(CHANGES, None)
    made_of = inner_class(module).__dict__.get(_SOURCE)
    if made_of is not None:
        give_class(module, made_of)


def arm_again() -> None:
    """Watch every form again, because a forward was replaced or a hook added."""
    with _lock:
        _now.epoch += 1


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[set[str]]:
    """Yield a set that collects the names of weights that graphs read together with their branches.

    Args:
        model: A rewritten model, of which no call has been watched yet.
    """
    names: set[str] = set()
    state: _Model = model.__dict__[STATE].model
    state.read = names
    try:
        yield names
    finally:
        state.read = None


def is_checked(model: nn.Module) -> bool:
    """Return True if a call of a rewritten model with its current adapters was watched to the end."""
    record, known = record_of(model), model.__dict__.get(STATE)
    if record is not None and not record.active:
        return True
    return known is not None and (_now.epoch, known.model.setting) in known.model.checked


def root_of(module: nn.Module) -> nn.Module | None:
    """Return the rewritten model that a watched module belongs to, or None if it is unknown."""
    known = module.__dict__.get(STATE)
    return None if known is None else known.model.root()


def mark_checked(model: nn.Module) -> None:
    """Mark a model as checked: its outputs were compared with those of the dense model."""
    known = model.__dict__.get(STATE)
    if known is not None:
        known.model.checked.add((_now.epoch, known.model.setting))


def _above(owners: set[str]) -> set[str]:
    """Return the FQNs of the ancestors of some modules, including the root."""
    fqns = {""}
    for owner in owners:
        above = owner.rpartition(".")[0]
        while above not in fqns:
            fqns.add(above)
            above = above.rpartition(".")[0]
    return fqns


# --- entry points -------------------------------------------------------------------------------------


def entry(name: str, cls: type, method: str = "") -> Callable[..., Any]:
    """Return a method whose first call of each form is watched.

    Args:
        name: Key that distinguishes the method from others of the module.
        cls: The class with the method. The method is looked up again at each call.
        method: Name of the method; by default ``name``.
    """
    method = method or name
    known = getattr(cls, method)
    own = inner_of(known) if method == "forward" else known

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = getattr(cls, method)
        function = own if now is known else now
        # This condition is constant to a compiler, which then ignores the code below.
        if torch.compiler.is_compiling():
            return function(self, *args, **kwargs)
        entries = self.__dict__.get(STATE)
        if entries is None:
            return function(self, *args, **kwargs)
        values = (*args, *kwargs.values()) if kwargs else args
        key = (
            (
                name,
                self.training,
                torch.is_grad_enabled(),
                _now.epoch,
                entries.model.setting,
                *kwargs,
                *[value if value.__class__ is bool else value.__class__ for value in values],
            ),
            tuple([v.shape for v in values if v.__class__ is torch.Tensor and not v.is_nested]),
        )
        if _now.active or key not in entries.done.known:
            return _run_new_form(self, entries, key, function, args, kwargs)
        return function(self, *args, **kwargs)

    # A compiler limits recompilations per code object, so each class gets its own.
    watched.__code__ = watched.__code__.replace(co_name=method)
    return functools.wraps(own)(watched)


def _run_new_form(
    module: Any,
    entries: _Entries,
    key: tuple[tuple[Any, ...], tuple[Any, ...]],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a call whose form may be new. Watch it if it is new and can be watched."""
    if torch.compiler.is_compiling():  # the compiler gave up on the caller, and starts a graph here
        return function(module, *args, **kwargs)
    if IDS in kwargs and key[0][0] == "forward":
        root = entries.model.root()
        if root is not None and module is root:
            refuse_ids(root)
    running: _Watch | None = getattr(_local, "watch", None)
    if running is not None and running.model is entries.model:
        # This call is part of a watched call. Its operators are skipped if its form was watched before.
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
        check_equal(root)
        if module.training and torch.is_grad_enabled():
            _warn_of_waiting(root)
    weights = _weights(entries.model)
    if not weights:
        return function(module, *args, **kwargs)
    result = _watched(_Watch(entries.model, weights), function, module, args, kwargs)
    entries.done.add(*key)
    if module is entries.model.root():
        entries.model.checked.add((_now.epoch, entries.model.setting))
    return result


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_of_waiting(model: nn.Module) -> None:
    """Warn, once per model, if an active adapter trains before its data-driven initialization has run."""
    record = record_of(model)
    if record is None or model in _warned:
        return
    for name in record.active:
        if not record.adapters[name].initialized:
            _warned.add(model)
            start = record.adapters[name].config.init_lora_weights
            _log.warning(
                "adapter %r is trained, and init_lora_weights=%r waits for data: call "
                "lora_fx.initialize(model, batches) first",
                name,
                start,
            )


def _watched(
    watch: _Watch,
    function: Callable[..., Any],
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a call under a watch, and raise the error of the watch if code bypassed an adapter."""
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
    if watch.error is not None:  # code of the model has caught the exception
        raise watch.error
    return result


def _leave_to(watch: _Watch) -> None:
    """Exit the dispatch modes that a call has left active on top of its watch.

    An interrupt skips the hooks that would exit them.
    """
    while (mode := torch_private.dispatch_mode()) is not None and mode is not watch:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # of torch


def _blind(module: nn.Module, model: _Model, inputs: Any) -> bool:
    """Return True if a call cannot be watched now, such as a traced or compiled call."""
    if model.root() is None and record_of(module) is not None:
        model.root = weakref.ref(module)  # the model is a copy, or was unpickled
    root = model.root()
    # A replica of DataParallel has copies of the weights of the model.
    if root is None or not any(module is child for child in root.modules()):
        return True
    if torch_private.in_jit_trace() or torch_private.in_functorch():
        return True
    if torch_private.in_backward():
        return True  # a checkpoint recomputes the call
    if any(mode.is_infra_mode() for mode in torch_private.dispatch_modes()):
        return True
    if any(not _plain(leaf) for leaf in pytree.tree_leaves(inputs)):
        return True
    if "torch._dynamo" in sys.modules:
        if torch_private.in_dynamo():
            return True
        wrapper = torch_private.compiled_module_class()
        compiled = (
            isinstance(child, wrapper) or torch_private.COMPILED_CALL in child.__dict__
            for child in root.modules()
        )
        return any(compiled)
    return False


def _plain(value: Any) -> bool:
    """Return True unless a value stands for a tensor: a proxy, or a meta, fake or distributed tensor."""
    if isinstance(value, torch.fx.Proxy):
        return False
    if not isinstance(value, torch.Tensor):
        return True
    name = type(value).__name__
    return value.device.type != "meta" and name not in ("FakeTensor", "FunctionalTensor", "DTensor")


# --- classes ------------------------------------------------------------------------------------------


class _ClassSettings(NamedTuple):
    """Settings of the class of a watched module.

    Attributes:
        whole: True to watch calls of the module. Otherwise it only gets properties for effective weights.
        scoped: True if heads in the module may return lazy logits for a loss in chunks
            (:func:`lora_fx.runtime.loss.logits.scoped`).
        weights: Names of the parameters that are read with their adapters, as attributes of the module.
        saving: The ways in which calls of the module save memory for the backward.
    """

    whole: bool
    scoped: bool = False
    weights: tuple[str, ...] = ()
    saving: Saving = Saving()


def watched_class(cls: type[nn.Module], settings: _ClassSettings) -> type[nn.Module]:
    """Create a subclass of a module's class whose calls are watched.

    Args:
        cls: The class of the module, or of its region.
        settings: The settings of the new class.
    """
    key = (cls, settings)
    known = _classes.get(key)
    if known is not None:
        return known
    entries: dict[str, Any] = {}
    if settings.whole:
        entries = {name: entry(name, cls) for name in ("__call__", "forward")}
        inner = logits.scoped(entries["forward"]) if settings.scoped else entries["forward"]
        if settings.saving.tiles:
            inner = tiles.tiled(inner)
        inner = spans.opened(inner) if settings.saving.first else inner
        inner = spans.closed(inner) if settings.saving.last else inner
        inner = spans.spanned(inner, settings.saving.spans) if settings.saving.spans else inner
        forward = around(cls.forward, inner)
        # Outside of the decorator by which layers of transformers checkpoint themselves.
        entries["forward"] = (
            blocks.recomputed(forward, settings.saving.blocks)
            if settings.saving.blocks
            else forward
        )
    watched_cls = subclass(
        (_Watched, Hooked),
        cls,
        {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            BASE: cls,
            **{name: value for name, value in cls.__dict__.items() if name.startswith("_lora_fx_")},
            **entries,
            **(members_of(cls) if settings.whole else {}),
            # A method of the same name that the user's class has stays.
            **{name: _PeftMethod(name) for name in _PEFT_METHODS if not hasattr(cls, name)},
            **{name: weight_property(name) for name in settings.weights},
            _SOURCE: cls,
            _SETTINGS: settings,
        },
    )
    _classes[key] = watched_cls
    return watched_cls


class _PeftMethod:
    """Method of PEFT's models, for users who call it on a rewritten model.

    An attribute, parameter, buffer or submodule of the model with that name comes first.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, model: nn.Module | None, owner: type) -> Any:
        if model is None:
            return self
        parts = (model._parameters, model._buffers, model._modules)
        if record_of(model) is None or any(self._name in names for names in parts):
            raise AttributeError(self._name)  # Python goes on with __getattr__
        return functools.partial(pkgutil.resolve_name(_PEFT_METHODS[self._name]), model)


def _watch(module: nn.Module, settings: _ClassSettings) -> None:
    """Give a module a watched class, unless it has such a class already or cannot have one."""
    cls: Any = inner_class(module)
    if _SOURCE in cls.__dict__:
        known: _ClassSettings = cls.__dict__[_SETTINGS]
        if known.whole >= settings.whole and known[1:] == settings[1:]:
            return
        cls = cls.__dict__[_SOURCE]
    if not settings.whole and not settings.weights:
        return
    # These modules create their classes themselves, and torch inspects the bases of the class.
    if cls.__module__ == "torch.nn.utils.parametrize" or isinstance(module, torch.fx.GraphModule):
        return
    if GRAPH not in cls.__dict__ and not _pickles_plainly(cls):
        return
    give_class(module, watched_class(cls, settings))


def _pickles_plainly(cls: type) -> bool:
    """Return True if a class does not define its own way of copying and pickling."""
    made_by_itself = hasattr(cls, "__deepcopy__") or hasattr(cls, "__getnewargs__")
    ways: tuple[Any, Any] = (cls.__reduce__, cls.__reduce_ex__)
    return not made_by_itself and ways == (object.__reduce__, object.__reduce_ex__)


class Hooked(nn.Module):
    """Mixin that watches a model again after a hook is registered or a submodule replaced.

    It derives from ``nn.Module`` and has no ``__slots__``. With another layout, Python would refuse to assign
    ``__class__`` of a module.
    """

    @property
    def peft_config(self) -> Any:
        """Configurations of the adapters for PEFT, which reads them before it adapts a model again."""
        if "peft_config" in self.__dict__:
            return self.__dict__["peft_config"]  # set by the user
        if record_of(self) is None:
            raise AttributeError("peft_config")  # Python goes on with __getattr__
        return pkgutil.resolve_name("lora_fx.checkpoint:peft_configs")(self)

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        self.__dict__["peft_config"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. If the value replaces a submodule, watch all forms of calls again."""
        if isinstance(value, nn.Module) and name in self.__dict__.get("_modules", ()):
            arm_again()
        super().__setattr__(name, assigned(self, name, value))

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Register a hook, and watch all forms of calls again, because the hook may read weights."""
        arm_again()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Register a hook, and watch all forms of calls again, because the hook may read weights."""
        arm_again()
        return super().register_forward_pre_hook(*args, **kwargs)


class _Watched(Hooked):
    """Mixin of the classes of watched modules, for pickling and subclassing."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Hide the subclass from the module's own class, which may register its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Reduce to the original class, and to its conversion into a watched class at unpickling."""
        cls: Any = type(self)
        reduced: Any = super().__reduce_ex__(protocol)
        make, made_of, *state = reduced
        settings = tuple(cls.__dict__[_SETTINGS])
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # of CPython
            again: Any = (_remade, (settings, object.__new__, cls.__dict__[_SOURCE]))
            return blank, (Blank(cls, lambda: again),), *state
        if make is blank:
            inside = made_of[0]
            return blank, (Blank(cls, lambda: (_remade, (settings, blank, inside))),), *state
        return (_remade, (settings, make, *made_of), *state)


def _remade(settings: tuple[Any, ...], make: Callable[..., Any], *made_of: Any) -> Any:
    module = make(*made_of)
    object.__setattr__(module, "__class__", watched_class(type(module), _ClassSettings(*settings)))
    return module


# --- the mode -----------------------------------------------------------------------------------------


class _Weight(NamedTuple):
    """Bytes of an adapted weight.

    Attributes:
        site: The site that adapts it.
        start, stop: Addresses of its first byte and past its last one.
        alive: Weak reference to its storage. The addresses are valid while the storage lives.
    """

    site: Site
    start: int
    stop: int
    alive: Callable[[], torch.UntypedStorage | None]


def _weights(model: _Model, every: bool = False) -> list[_Weight]:
    """Return the weights that adapters adapt, sorted by address.

    The result is empty if this process does not have the values of all these weights.

    Args:
        model: State of the model.
        every: True for the weights of all adapters, not only of the active ones.
    """
    root = model.root()
    record = record_of(root)
    if root is None or record is None:
        return []
    by_address: dict[tuple[int, int], _Weight] = {}
    lost: list[_Weight] = []
    names = record.adapters if every else record.active
    for row in (row for name in names for row in record.adapters[name].places):
        site = row.site
        if site.tied_to:
            continue  # its bytes are also those of a weight without adapters
        try:
            weight = root.get_parameter(site.weight)
        except AttributeError:
            # The layer was deleted or replaced. Values that were computed from its weight may still exist.
            lost.append(_Weight(site, 0, 0, lambda: None))
            continue
        for tensor in (weight, record.originals.get(site.weight)):
            if not _plain(tensor) or torch_private.is_flat(tensor):
                return []  # this process has only a part of it
            for part in _parts(tensor):
                if not _plain(part):
                    return []
                start = torch_private.data_address(part)
                if not start and part.numel():
                    return []  # its memory is not in this process
                stop, alive = start + _span(part), weakref.ref(part.untyped_storage())
                by_address.setdefault((start, stop), _Weight(site, start, stop, alive))
    adapted = {weight.site.weight for weight in by_address.values()}
    for original in model.copied:
        if original.site.weight in adapted and original.alive() is not None:
            by_address.setdefault((original.start, original.stop), original)
    return [*lost, *(by_address[key] for key in sorted(by_address))]


def _parts(value: Any) -> Iterator[torch.Tensor]:
    """Yield the strided tensors inside a tensor. A wrapper subclass may contain several."""
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
    """Dispatch mode that checks every operator of a call for values of adapted weights.

    It keeps no tensor alive. Values that are computed from a weight are identified by their storage, which is
    one Python object for as long as anything references it.

    Attributes:
        model: State of the model.
        paused: True to skip operators, because the form of the innermost running call was watched before.
        error: The first error.
    """

    def __init__(self, model: _Model, weights: list[_Weight]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.model = model
        self.paused = False
        self.error: CaptureError | None = None
        self._weights = weights
        self._sites = {weight.site.weight: weight.site for weight in weights}
        self._starts = [weight.start for weight in weights]
        self._derived: Any = WeakIdKeyDictionary()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let functions that are compiled inside a call run compiled: the mode does not change values."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, and check its inputs."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        inputs = list(_tensors((*args, *kwargs.values()) if kwargs else args))
        origins = [self._origins(tensor) for tensor in inputs]
        if not any(origins):
            return func(*args, **kwargs)
        kind, names = _kind(func), _NONE.union(*origins)
        meets = self._meets(func, kind, inputs, origins)
        if meets:
            self._check(func, names)
        result = func(*args, **kwargs)
        if not meets and kind not in ("ask", "reduce"):
            written = [inputs[0]] if torch_private.schema_of(func).is_mutable and inputs else []
            for tensor in (*_tensors((result,)), *written):
                self._note(tensor, names)
        return result

    def _note(self, tensor: torch.Tensor, names: frozenset[str]) -> None:
        """Record that a value was computed from these weights, to check later operators on the value."""
        # Results of comparisons, indices and empty tensors carry no values of a weight.
        if tensor.dtype not in (torch.bool, torch.int64):
            for part in _parts(tensor):
                if part.numel() and not self._overlapping(part):
                    storage = part.untyped_storage()
                    self._derived[storage] = names | self._derived.get(storage, _NONE)

    def _origins(self, tensor: torch.Tensor) -> frozenset[str]:
        """Return the names of the weights whose bytes a tensor shares, or that it was computed from."""
        names = _NONE
        for part in _parts(tensor):
            if part.device.type != "meta":
                names |= self._overlapping(part)
                if self._derived:
                    names |= self._derived.get(part.untyped_storage(), _NONE) & self._sites.keys()
        return names

    def _overlapping(self, tensor: torch.Tensor) -> frozenset[str]:
        """Return the names of the weights whose memory overlaps that of a tensor."""
        start = torch_private.data_address(tensor)
        stop = start + _span(tensor)
        index = max(bisect.bisect_right(self._starts, start) - 1, 0)
        names: set[str] = set()
        while index < len(self._starts) and self._starts[index] < stop:
            if start < self._weights[index].stop:
                names.add(self._weights[index].site.weight)
            index += 1
        return frozenset(names)

    def _meets(
        self, func: Any, kind: str, inputs: list[torch.Tensor], origins: list[frozenset[str]]
    ) -> bool:
        """Return True if an operator combines a weight with data, or with another weight in a product."""
        data = [
            tensor
            for tensor, origin in zip(inputs, origins, strict=True)
            # A single number scales the weight. In a product or a lookup it may be a batch of one element.
            if not origin
            and (tensor.numel() > 1 or (kind != "pointwise" and not self._of_model(tensor)))
        ]
        if kind == "move":
            names = _NONE.union(*origins)
            lookup = any(self._sites[name].family == "embedding" for name in names)
            return lookup and _name(func) in _LOOKUPS and bool(data) and bool(origins[0])
        if kind in ("ask", "reduce"):
            return False
        if kind == "pointwise":
            return not all(map(self._of_model, data))
        return bool(data) or len({origin for origin in origins if origin}) > 1

    def _check(self, func: Any, names: frozenset[str]) -> None:
        """Raise if code of the model or the user runs this operator on a weight without its adapters.

        Raises:
            CaptureError: If such code runs it.
        """
        if torch_private.in_backward():
            return  # a backward inside the forward
        # The graph of a head contains its branches, also if a chunked loss runs it.
        location = "" if chunked.is_running() else _foreign(sys._getframe(2))
        if not location:
            if self.model.read is not None:
                self.model.read |= names
            return
        site = self._sites[min(names)]
        self.error = self.error or CaptureError(
            f"{site.name}: its weight {site.weight} is read by {_name(func)} at {location}, without its "
            "adapters. Read the attribute of the layer, which has them, or call the layer (code that holds "
            "on to a layer of the original model has to be given that of the rewritten model), or name "
            f"{site.name!r} in exclude_modules"
        )
        raise self.error

    def _of_model(self, tensor: torch.Tensor) -> bool:
        """Return True if a tensor is a parameter or a buffer of the model, such as a gain or a mask."""
        root = self.model.root()
        storages = {torch_private.storage_key(part.untyped_storage()) for part in _parts(tensor)}
        values = (*root.parameters(), *root.buffers()) if root is not None else ()
        return any(
            torch_private.storage_key(part.untyped_storage()) in storages
            for value in values
            for part in _parts(value)
        )


def _foreign(frame: FrameType | None) -> str:
    """Return the code location that runs an operation, or "" for a graph and for lora-fx's own code."""
    called: CodeType | None = None
    location = ""
    while frame is not None:
        code, name = frame.f_code, str(frame.f_globals.get("__name__", ""))
        root = name.partition(".")[0]
        if code.co_filename.startswith("<eval_with_key>"):
            return ""  # compiled from code that reads weights with their adapters
        if code.co_filename.startswith(_GENERATED):
            # A pattern may turn a function of the user into one node of the graph.
            return "" if not location or _is_node(frame.f_locals.get("self"), called) else location
        if name.startswith(_OPERATIONS) and name not in _AROUND:
            return ""
        if not location and not _is_library(root):
            location = f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"
        if root != "torch" and name not in _AROUND:
            called = code
        frame = frame.f_back
    return location


def _is_node(module: Any, code: CodeType | None) -> bool:
    """Return True if the graph of a module calls a function with this code, decorated or not.

    Such a function runs as a part of the graph, and is no foreign code.
    """
    graph = getattr(type(module), GRAPH, None)
    return graph is not None and any(
        getattr(function, "__code__", None) is code
        for node in graph.nodes
        if node.op == "call_function" and META_KEY in node.meta
        for function in (node.target, inspect.unwrap(node.target))
    )


def _name(func: Any) -> str:
    return str(torch_private.schema_of(func).name.partition("::")[2]).rstrip("_")


@functools.lru_cache(maxsize=4096)
def _kind(func: Any) -> str:
    """Classify an operator on a weight: ``move``, ``pointwise``, ``reduce``, ``ask`` or ``product``.

    A ``move`` only copies or views values. An ``ask`` reads a shape or a fact about the values. Operators
    that PyTorch tags as neither pointwise nor reduction are products.
    """
    namespace, name = func.namespace, _name(func)
    if namespace in ("c10d", "_c10d_functional", "fsdp"):
        return "move"
    if namespace not in ("aten", "prim", "prims"):
        return "product"
    if name in _ASKS or name.startswith("_foreach"):
        return "ask"
    views = any(
        output.alias_info is not None and not output.alias_info.is_write
        for output in torch_private.schema_of(func).returns
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


def _is_library(root: str) -> bool:
    """Return True if code of a package is not user code, but part of the operation that calls it."""
    return (
        root in _LIBRARIES
        or root in sys.stdlib_module_names
        or any(root in format_.kernel_packages for format_ in formats())
    )
