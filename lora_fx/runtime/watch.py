"""The first eager call of each form is watched: who reads an adapted weight past its adapters is found there.

Code that reads ``layer.weight`` gets it with its adapters (:mod:`lora_fx.runtime.effective`). Some ways lead
past that: ``named_parameters()``, ``state_dict()``, ``vars(layer)``, a layer of the original model that a
closure holds. So each way into a rewritten model (:func:`entry`) runs once under a mode below autograd
(:class:`_Watch`), which knows the bytes of the adapted weights and what is computed from them. Where such a
value meets data in code that is not lora-fx's own, the call ends with an error.

A way in is the forward of a module, in training or not, with or without gradients, with arguments of these
classes and sizes (:mod:`lora_fx.runtime.samples`). What has been watched costs a look into a set later on.
Compilers do not see the watch, and what they run stays pending, as does what runs without real values
(:func:`_blind`).
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
from lora_fx.ir import META_KEY, Site, record_of
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
from lora_fx.runtime.effective import CHANGES, assigned, weight_property
from lora_fx.runtime.ops import AdapterModule
from lora_fx.runtime.parts import check_equal
from lora_fx.runtime.samples import IDS, Sizes, refuse_ids
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
"""Attribute of a module: what was watched of it."""

_MADE = "_lora_fx_made_of"
_SCOPED = "_lora_fx_scoped"
_WEIGHTS = "_lora_fx_weights"
_LIBRARIES = frozenset({"torch", "lora_fx", "triton"})
_GENERATED = "<lora_fx "
# What lora-fx computes itself, apart from the modules that run code of the model inside of a call of theirs.
_OPERATIONS = ("lora_fx.runtime.", "lora_fx.passes.effective", "lora_fx.formats.")
_AROUND = frozenset(
    f"lora_fx.runtime.{name}"
    for name in ("chunked", "logits", "recompute", "row_tracking", "samples", "watch")
)

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
_PLACES = 8  # of one weight


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
        root: Gives the model, as long as it lives.
        setting: A number for the adapters that run. Others are watched again.
        checked: The settings under which a call of the whole model was watched to its end.
        read: Takes the names of weights that are applied; None if they are not asked for.
        copied: The weights of which those of this model are copies: code that holds on to a layer by a global
            or a closure computes with them, whatever is copied.
        places: Where code has an adapted weight computed as a whole, by the name of the weight.
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
        made = _Model()
        made.copied = [
            one for one in (*self.copied, *_weights(self, every=True)) if one.alive() is not None
        ]
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _Model, ()

    def choose(self, *setting: Any) -> None:
        """Notes which adapters run: the same ones as before have the number that they had."""
        for number, known in enumerate(self.settings, 1):
            if len(known) == len(setting) and all(map(operator.is_, known, setting)):
                self.setting = number
                return
        self.settings.append(setting)
        self.setting = len(self.settings)


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
    """Have the ways into a rewritten model watched, as far as they have not been with these adapters.

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
    owners = {row.site.owner for name in record.active for row in record.adapters[name].places}
    above = _above(owners)
    for fqn, module in model.named_modules():
        if isinstance(module, AdapterModule | torch.jit.ScriptModule):
            continue
        if fqn not in above and fqn not in owners and GRAPH not in inner_class(module).__dict__:
            continue
        entries = module.__dict__.get(STATE)
        if entries is None or entries.model is not state:
            module.__dict__[STATE] = _Entries(state)
        scoped = not fqn and record.loss == "chunked"
        whole = fqn in above or not _of_torch(module)
        _watch(module, whole=whole, scoped=scoped, weights=tuple(module.__dict__.get(CHANGES, ())))


def _of_torch(module: nn.Module) -> bool:
    cls = inner_class(module)
    home: str = cls.__dict__.get(BASE, cls).__module__
    return home.startswith("torch.nn.")


def note_place(module: nn.Module, weight: str, place: str) -> bool:
    """Keep a place where code has an adapted weight computed; return False for one that is known.

    Args:
        module: The module that has the weight.
        weight: FQN of the weight.
        place: File, line and function.
    """
    known = module.__dict__.get(STATE)
    if known is None:
        return False
    places: list[str] = known.model.places.setdefault(weight, [])
    if place in places or len(places) >= _PLACES:
        return False
    places.append(place)
    return True


def places_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the places where code of a rewritten model has adapted weights computed, by weight."""
    known = model.__dict__.get(STATE)
    return {} if known is None else {name: tuple(at) for name, at in known.model.places.items()}


def is_scoped(model: nn.Module) -> bool:
    """Whether the calls of a model are known to a loss that is computed in chunks."""
    return bool(inner_class(model).__dict__.get(_SCOPED))


def disarm(module: nn.Module) -> None:
    """Takes the watch off a module, which keeps its graph if it has one."""
    module.__dict__.pop(STATE, None)
    module.__dict__.pop(CHANGES, None)
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


def _above(owners: set[str]) -> set[str]:
    """Return the FQNs of the modules that others are in; the root is always one."""
    found = {""}
    for owner in owners:
        above = owner.rpartition(".")[0]
        while above not in found:
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
    if any(torch_private.is_flattened(one) for one in root.modules()):
        return True  # FSDP1: parameters are views of memory that comes and goes
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


def watched_class(
    cls: type[nn.Module], whole: bool, scoped: bool = False, weights: tuple[str, ...] = ()
) -> type[nn.Module]:
    """Make a subclass of a module's class whose calls are watched.

    Args:
        cls: The class, a region's or the module's own.
        whole: Whether calls of the module are watched; otherwise only its weights are effective.
        scoped: Whether heads in it may leave their output to a loss (:func:`lora_fx.runtime.logits.scoped`).
        weights: Names of its parameters that may have adapters in them.
    """
    key = (cls, whole, scoped, weights)
    known = _classes.get(key)
    if known is not None:
        return known
    entries: dict[str, Any] = {}
    if whole:
        entries = {name: entry(name, cls) for name in ("__call__", "forward")}
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
            **{name: weight_property(name) for name in weights},
            _MADE: cls,
            "_lora_fx_whole": whole,
            _SCOPED: scoped,
            _WEIGHTS: weights,
        },
    )
    _classes[key] = made
    return made


def _watch(module: nn.Module, *, whole: bool, scoped: bool, weights: tuple[str, ...]) -> None:
    cls: Any = inner_class(module)
    if _MADE in cls.__dict__:
        same = (scoped, weights) == (cls.__dict__[_SCOPED], cls.__dict__[_WEIGHTS])
        if cls._lora_fx_whole >= whole and same:
            return
        cls = cls.__dict__[_MADE]
    if not whole and not weights:
        return
    # They are made by their own means, and torch looks at the parents of their class.
    if cls.__module__ == "torch.nn.utils.parametrize" or isinstance(module, torch.fx.GraphModule):
        return
    if GRAPH not in cls.__dict__ and not _pickles_plainly(cls):
        return
    give_class(module, watched_class(cls, whole, scoped, weights))


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
        super().__setattr__(name, assigned(self, name, value))

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
        how = (cls.__dict__["_lora_fx_whole"], cls.__dict__[_SCOPED], cls.__dict__[_WEIGHTS])
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # of CPython
            again: Any = (_remade, (how, object.__new__, cls.__dict__[_MADE]))
            return blank, (Blank(cls, lambda: again),), *state
        if make is blank:
            inside = made_of[0]
            return blank, (Blank(cls, lambda: (_remade, (how, blank, inside))),), *state
        return (_remade, (how, make, *made_of), *state)


def _remade(
    how: tuple[bool, bool, tuple[str, ...]], make: Callable[..., Any], *made_of: Any
) -> Any:
    module = make(*made_of)
    object.__setattr__(module, "__class__", watched_class(type(module), *how))
    return module


# --- the mode -----------------------------------------------------------------------------------------


class _Weight(NamedTuple):
    """An adapted weight.

    Attributes:
        site: Where it is adapted.
        start, stop: Its bytes.
        alive: Gives its storage, whose address no other has for as long as there is one.
    """

    site: Site
    start: int
    stop: int
    alive: Callable[[], torch.UntypedStorage | None]


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
        if site.tied_to:
            continue  # its bytes are also those of a weight without adapters
        try:
            weight = root.get_parameter(site.weight)
        except AttributeError:
            # Its layer was deleted or replaced. What was computed from it before may be there.
            lost.append(_Weight(site, 0, 0, lambda: None))
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
                found.setdefault((start, stop), _Weight(site, start, stop, alive))
    adapted = {weight.site.weight for weight in found.values()}
    for one in model.copied:
        if one.site.weight in adapted and one.alive() is not None:
            found.setdefault((one.start, one.stop), one)
    return [*lost, *(found[place] for place in sorted(found))]


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
        self._sites = {weight.site.weight: weight.site for weight in weights}
        self._starts = [weight.start for weight in weights]
        self._derived: Any = WeakIdKeyDictionary()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets what is compiled inside of a call run compiled: the mode changes no numbers."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, and look at what it is given."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        given = list(_tensors((*args, *kwargs.values()) if kwargs else args))
        origins = [self._past(tensor) for tensor in given]
        if not any(origins):
            return func(*args, **kwargs)
        kind, names = _kind(func), _NONE.union(*origins)
        meets = self._meets(func, kind, given, origins)
        if meets:
            self._check(func, names)
        result = func(*args, **kwargs)
        if not meets and kind not in ("ask", "reduce"):
            written = [given[0]] if torch_private.schema_of(func).is_mutable and given else []
            for tensor in (*_tensors((result,)), *written):
                self._note(tensor, names)
        return result

    def _note(self, tensor: torch.Tensor, names: frozenset[str]) -> None:
        """Note what a value is made of."""
        # The answer to a comparison is none, and a tensor without elements holds nothing.
        if tensor.dtype not in (torch.bool, torch.int64):
            for part in _parts(tensor):
                if part.numel() and not self._at(part):
                    storage = part.untyped_storage()
                    self._derived[storage] = names | self._derived.get(storage, _NONE)

    def _past(self, tensor: torch.Tensor) -> frozenset[str]:
        """Return the names of the weights whose bytes a tensor has, or of which it was computed."""
        names = _NONE
        for part in _parts(tensor):
            if part.device.type != "meta":
                names |= self._at(part)
                if self._derived:
                    names |= self._derived.get(part.untyped_storage(), _NONE) & self._sites.keys()
        return names

    def _at(self, tensor: torch.Tensor) -> frozenset[str]:
        """Return the names of the weights among whose bytes a tensor begins, or which begin among its own."""
        start = torch_private.data_address(tensor)
        stop = start + _span(tensor)
        place = max(bisect.bisect_right(self._starts, start) - 1, 0)
        names: set[str] = set()
        while place < len(self._starts) and self._starts[place] < stop:
            if start < self._weights[place].stop:
                names.add(self._weights[place].site.weight)
            place += 1
        return frozenset(names)

    def _meets(
        self, func: Any, kind: str, given: list[torch.Tensor], origins: list[frozenset[str]]
    ) -> bool:
        """Say whether an operator brings a weight together with data, or with another weight in a product."""
        others = [
            tensor
            for tensor, origin in zip(given, origins, strict=True)
            # A single number is a gain, unless a product or a lookup takes it: a batch can be that small.
            if not origin
            and (tensor.numel() > 1 or (kind != "pointwise" and not self._of_model(tensor)))
        ]
        if kind == "move":
            names = _NONE.union(*origins)
            lookup = any(self._sites[name].family == "embedding" for name in names)
            return lookup and _name(func) in _LOOKUPS and bool(others) and bool(origins[0])
        if kind in ("ask", "reduce"):
            return False
        if kind == "pointwise":
            return not all(map(self._of_model, others))
        return bool(others) or len({origin for origin in origins if origin}) > 1

    def _check(self, func: Any, names: frozenset[str]) -> None:
        """End the call if code reads an adapted weight past its adapters.

        Raises:
            CaptureError: If it does.
        """
        if torch_private.in_backward():
            return  # a gradient that the forward computes
        # The graph of a head has its branches, whatever runs it.
        place = "" if chunked.is_running() else _foreign(sys._getframe(2))
        if not place:
            if self.model.read is not None:
                self.model.read |= names
            return
        site = self._sites[min(names)]
        self.error = self.error or CaptureError(
            f"{site.name}: its weight {site.weight} is read by {_name(func)} at {place}, without its "
            "adapters. Read the attribute of the layer, which has them, or call the layer (code that holds "
            "on to a layer of the original model has to be given that of the rewritten model), or name "
            f"{site.name!r} in exclude_modules"
        )
        raise self.error

    def _of_model(self, tensor: torch.Tensor) -> bool:
        """Say whether it is a parameter or a buffer: a gain, or a mask."""
        root = self.model.root()
        storages = {torch_private.storage_key(part.untyped_storage()) for part in _parts(tensor)}
        values = (*root.parameters(), *root.buffers()) if root is not None else ()
        return any(
            torch_private.storage_key(part.untyped_storage()) in storages
            for value in values
            for part in _parts(value)
        )


def _foreign(frame: FrameType | None) -> str:
    """Say which code has an operation run, if that is not lora-fx's own, or a graph's; empty if it is."""
    called: CodeType | None = None
    place = ""
    while frame is not None:
        code, name = frame.f_code, str(frame.f_globals.get("__name__", ""))
        root = name.partition(".")[0]
        if code.co_filename.startswith("<eval_with_key>"):
            return ""  # a compiler has made it of code that reads weights with their adapters
        if code.co_filename.startswith(_GENERATED):
            # A function of the user's is one operation of the graph where a pattern says so.
            return "" if not place or _is_node(frame.f_locals.get("self"), called) else place
        if name.startswith(_OPERATIONS) and name not in _AROUND:
            return ""
        if not place and not _is_library(root):
            place = f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"
        if root != "torch" and name not in _AROUND:
            called = code
        frame = frame.f_back
    return place


def _is_node(module: Any, code: CodeType | None) -> bool:
    """Say whether the graph of a module calls a function with this code, or one that decorates it."""
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


def _is_library(root: str) -> bool:
    """Whether code of a package is a part of the operation that calls it."""
    return (
        root in _LIBRARIES
        or root in sys.stdlib_module_names
        or any(root in one.kernel_packages for one in formats())
    )
