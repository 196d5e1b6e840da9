"""Modules that a symbolic trace gets wrong, or would, if nobody looked.

Every hazard takes one tensor [batch, 4] and holds a linear layer, so that a capture has something to
look at. `HAZARDS` are those whose graph must not run, with what the trace has to say.
"""

from __future__ import annotations

import copy
import random
import threading
import typing
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "FAITHFUL",
    "HAZARDS",
    "Base",
    "Delegating",
    "Pair",
    "Reduced",
    "Registered",
    "Registering",
    "Scaled",
    "ScaledKernel",
    "Stateful",
    "build",
]

SEEN: list[Any] = []
COUNT = 0

Pair = namedtuple("Pair", ["first", "second"])


class Giver(nn.Module):
    def forward(self, x):
        return (x, None) if x.dim() == 2 else (x, x)


class Base(nn.Module):
    """A linear layer, a second one, dropout, a buffer, a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.plain = torch.full((4,), 3.0)
        self.cache: list[Any] = []
        self.table: dict[str, Any] = {}
        self.steps = 0
        self.giver = Giver()
        self.hidden = [nn.Linear(4, 4)]


Forward = Callable[..., Any]
HAZARDS: dict[str, tuple[type[Base], str]] = {}
FAITHFUL: dict[str, type[Base]] = {}


def module(forward: Forward) -> type[Base]:
    """The function as the forward of a class that pickle finds under its name."""
    return type(forward.__name__, (Base,), {"forward": forward, "__module__": __name__})


def hazard(reason: str) -> Callable[[Forward], type[Base]]:
    """No graph of it may run; the trace says `reason` (a regular expression)."""

    def register(forward: Forward) -> type[Base]:
        HAZARDS[forward.__name__] = (module(forward), reason)
        return HAZARDS[forward.__name__][0]

    return register


def faithful(forward: Forward) -> type[Base]:
    """Traces, and computes the same."""
    FAITHFUL[forward.__name__] = module(forward)
    return FAITHFUL[forward.__name__]


def build(cls: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return cls()


# --- questions about a traced value ----------------------------------------------------------------


@hazard("isinstance")
def asks_isinstance(self, x):
    y = self.fc(x)
    return y if isinstance(y, torch.Tensor) else y[0]


@hazard("is_tensor|isinstance")
def asks_is_tensor(self, x):
    return self.fc(x) if torch.is_tensor(x) else x


@hazard("isinstance")
def asks_abstract_class(self, x):
    return self.fc(x[0] if isinstance(x, Sequence) else x)


@hazard("isinstance")
def asks_isinstance_of_an_attribute(self, x):
    return self.fc(x) if isinstance(x.shape, tuple) else x


@hazard("isinstance")
def asks_whether_parameter(self, x):
    return x if isinstance(x, nn.Parameter) else self.fc(x)


@hazard("isinstance|__class__")
def asks_class_attribute(self, x):
    return self.fc(x) if x.__class__ is torch.Tensor else x


@hazard("hasattr")
def asks_hasattr(self, x):
    return self.fc(x.mask) if hasattr(x, "mask") else self.fc(x)


@hazard("hasattr")
def asks_getattr_with_default(self, x):
    return self.fc(x) * getattr(x, "weighting", 2.0)


@hazard("length")
def asks_length(self, x):
    return self.fc(x) / len(x)


@hazard("number")
def turns_into_a_number(self, x):
    return self.fc(x) * float(x.sum())


@hazard("looks for something")
def asks_membership(self, x):
    return self.fc(x) if 3.0 in x else self.other(x)


@hazard("branches on a value")
def branches_on_data(self, x):
    return self.fc(x) if x.sum() > 0 else self.other(x)


@hazard("branches on a value")
def branches_on_a_buffer(self, x):
    return self.fc(x) if self.scale.sum() > 0 else self.other(x)


@hazard("branches on a value")
def branches_inside_try(self, x):
    try:
        flag = bool(x.sum() > 0)
    except Exception:  # noqa: BLE001  the code that is traced may swallow the refusal
        flag = False
    return self.fc(x) if flag else self.other(x)


@hazard("isinstance")
def asks_inside_try(self, x):
    try:
        known = isinstance(x, torch.Tensor)
    except Exception:  # noqa: BLE001  as above
        known = False
    return self.fc(x) if known else self.other(x)


@hazard("iterates")
def iterates(self, x):
    return torch.stack([self.fc(row) for row in x])


@hazard("iterates")
def unpacks_into_a_call(self, x):
    return self.fc(torch.maximum(*x[:2].unsqueeze(1)))


@hazard("branches")
def sorts(self, x):
    return self.fc(max(x, x + 1, key=lambda v: v.sum()))


@hazard("copies a traced value")
def copies(self, x):
    y = copy.copy(x)
    y.add_(1)
    return self.fc(x)


@hazard(r"\btype\b")
def asks_type(self, x):
    return self.fc(x) if type(x) is torch.Tensor else x


@hazard(r"\btype\b")
def asks_type_in(self, x):
    return self.fc(x[0]) if type(x) in (list, tuple) else self.fc(x)


@hazard("identity")
def asks_identity(self, x):
    y = x.view(-1, 4)
    return self.fc(x) if x is y else self.other(y)


@hazard("part of a value is None")
def asks_none_of_a_part(self, x):
    pair = self.giver(x)
    return self.fc(pair[0]) if pair[1] is not None else self.other(pair[0])


@hazard("part of a value is None")
def asks_none_of_an_unpacked_part(self, x):
    first, second = self.giver(x)
    return self.fc(first) if second is not None else self.other(first)


@hazard("part of a value is None")
def keeps_the_answer_to_none(self, x):
    first, second = self.giver(x)
    empty = second is None
    return self.other(first) if empty else self.fc(first)


@faithful
def matches_a_structure(self, x):
    y = self.fc(x)
    match y:
        case [first, *_]:
            return first
        case _:
            return y


@hazard("context manager")
def enters_a_context(self, x):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return self.fc(F.scaled_dot_product_attention(x, x, x))


@hazard("writes to fc.mode, an attribute of a module")
def writes_and_writes_back(self, x):
    self.fc.mode = "loud"
    y = self.fc(x)
    del self.fc.mode
    return y


@hazard("reads COUNT, a global")
def counts_globally(self, x):
    global COUNT  # noqa: PLW0603  what is refused
    COUNT += 1
    return self.fc(x)


# --- modes -----------------------------------------------------------------------------------------


@hazard("branches on self.training")
def branches_on_training(self, x):
    return self.fc(x) if self.training else self.other(x)


@hazard("branches on self.training")
def branches_on_a_childs_training(self, x):
    return self.fc(x) if self.drop.training else self.other(x)


@hazard("writes to drop.training")
def switches_a_child_to_eval(self, x):
    self.drop.eval()
    return self.fc(self.drop(x))


@hazard("no_grad")
def without_gradients(self, x):
    with torch.no_grad():
        y = self.other(x)
    return self.fc(y)


@hazard("switches gradients or autocast")
def without_gradients_by_decorator(self, x):
    return self.fc(_frozen_double(x))


@hazard("set_grad_enabled")
def switches_gradients_by_call(self, x):
    torch.set_grad_enabled(True)
    return self.fc(x)


@hazard("autocast")
def autocast_off(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.fc(x)


@hazard("autocast")
def autocast_by_decorator(self, x):
    return self.fc(_in_full_precision(x))


@hazard("is_grad_enabled")
def asks_the_grad_mode(self, x):
    return self.fc(x) if torch.is_grad_enabled() else self.other(x)


@hazard("autocast")
def asks_the_autocast_mode(self, x):
    return self.fc(x) if torch.is_autocast_enabled() else self.other(x)


@hazard("autograd function")
def own_autograd_function(self, x):
    return self.fc(Twice.apply(x))


# --- constants -------------------------------------------------------------------------------------


@hazard("computes without its input \\(zeros\\)")
def makes_a_tensor(self, x):
    return self.fc(x) + torch.zeros(4)


@hazard(r"computes without its input \(arange\)")
def makes_a_tensor_by_size(self, x):
    return self.fc(x) + torch.arange(4)


@hazard("reads plain, a tensor that is no state")
def computes_with_a_plain_tensor(self, x):
    return self.fc(x) * (self.plain * 2)


@hazard("reads plain, a tensor that is no state")
def reads_the_value_of_a_plain_tensor(self, x):
    return self.fc(x) * float(self.plain[0])


@hazard("reads GLOBAL, a global")
def uses_a_global_tensor(self, x):
    return self.fc(x) + GLOBAL


@hazard("random numbers")
def draws_from_random(self, x):
    return self.fc(x) * random.random()


@hazard("random numbers")
def draws_from_numpy(self, x):
    return self.fc(x) * float(np.random.rand())


@hazard("computes without its input")
def draws_from_torch(self, x):
    return self.fc(x) * torch.rand(1).item()


# --- side effects ----------------------------------------------------------------------------------


@hazard("writes to steps, an attribute of a module")
def counts_calls(self, x):
    self.steps += 1
    return self.fc(x)


@hazard("writes to last, an attribute of a module")
def keeps_a_result(self, x):
    self.last = self.fc(x)
    return self.last


@hazard("writes to fc.last, an attribute of a module")
def keeps_a_result_on_a_child(self, x):
    self.fc.last = x
    return self.fc(x)


@hazard("writes to scale, an attribute of a module")
def rebinds_a_buffer(self, x):
    self.scale = self.scale + 1
    return self.fc(x) * self.scale


@hazard("cache")
def appends_to_its_list(self, x):
    self.cache.append(self.fc(x))
    return self.cache[-1]


@hazard("changes what is in self.cache")
def counts_in_its_list(self, x):
    self.cache.append(len(self.cache))
    return self.fc(x)


@hazard("changes what is in self.table")
def fills_its_table(self, x):
    self.table["calls"] = self.table.get("calls", 0) + 1
    return self.fc(x)


@hazard("reads SEEN, a global")
def appends_to_a_global_list(self, x):
    SEEN.append(self.fc(x))
    return SEEN[-1]


@hazard("default of its argument seen can change")
def mutable_default(self, x, seen=[]):  # noqa: B006  the hazard itself
    seen.append(1)
    return self.fc(x)


@hazard("looks into _modules of a module")
def makes_a_layer_on_the_way(self, x):
    if "late" not in self._modules:
        self.late = nn.ReLU()
    return self.late(self.fc(x))


# --- things that a graph does not rebuild -------------------------------------------------------


@hazard("OrderedDict would become a plain one")
def returns_an_ordered_dict(self, x):
    return OrderedDict(out=self.fc(x))


@hazard("Rows would become a plain one")
def returns_a_list_of_its_own(self, x):
    return Rows([self.fc(x)])


@hazard("argument of type")
def returns_a_set(self, x):
    return {self.fc(x)}


@hazard("reads hidden, a list")
def calls_a_module_in_a_list(self, x):
    return self.fc(self.hidden[0](x))


@hazard("required argument")
def takes_anything(self, *args, **kwargs):
    return self.fc(args[0])


@hazard("argument named torch")
def hides_torch(self, torch):
    return self.fc(torch)


GLOBAL = torch.full((4,), 5.0)


class Rows(list):
    pass


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 7


@torch.no_grad()
def _frozen_double(x):
    return x * 2


@torch.autocast("cpu", enabled=False)
def _in_full_precision(x):
    return x * 2


# --- forms that look dangerous, and are not ---------------------------------------------------------


@faithful
def adds_in_place(self, x):
    y = self.fc(x)
    z = y
    y += x
    return z


@faithful
def adds_to_its_input(self, x):
    x += 1
    return self.fc(x)


@faithful
def counts_in_place(self, x):
    rows = x.shape[0]
    before = rows
    rows += 1
    return self.fc(x) * before + rows


@faithful
def sets_items(self, x):
    y = self.fc(x)
    y[:, 0] = 0.0
    return y


@faithful
def calls_in_place(self, x):
    return self.fc(x).mul_(2).clamp_(min=-1)


@faithful
def counts_in_a_buffer(self, x):
    self.scale.add_(1)
    return self.fc(x) * self.scale


@faithful
def drops_by_mode(self, x):
    return F.dropout(self.fc(x), 0.5, self.training)


@faithful
def drops_by_the_mode_of_a_child(self, x):
    return F.dropout(self.fc(x), 0.5, training=self.drop.training)


@hazard("reads plain, a tensor that is no state")
def reads_a_plain_tensor(self, x):
    return self.fc(x) * self.plain


@faithful
def reads_the_weight_of_a_child(self, x):
    return F.linear(x, self.other.weight, self.fc.bias)


@faithful
def casts_to_the_dtype_of_a_weight(self, x):
    return self.fc(x.to(self.fc.weight.dtype))


@hazard(r"computes without its input \(dtype\)")
def casts_to_the_dtype_of_the_first_parameter(self, x):
    return self.fc(x.to(next(self.parameters()).dtype))


@faithful
def unpacks_the_shape(self, x):
    rows, columns = x.shape
    return self.fc(x).reshape(columns, rows).T.reshape(rows, columns)


@hazard("looks whether there is extra")
def asks_for_a_layer(self, x):
    return self.fc(x) if getattr(self, "extra", None) is None else self.extra(x)


@hazard(r"\btype\b")
def asks_its_own_type(self, x):
    return self.fc(x) if type(self).__name__ else x


@faithful
def loops_over_its_layers(self, x):
    for layer in (self.fc, self.other):
        x = layer(x).relu()
    return x


@faithful
def calls_a_child_by_a_method(self, x):
    return self.fc.forward(x) + self.other(x)


@faithful
def returns_a_tuple(self, x):
    return self.fc(x), None, [x, {"x": x}]


@faithful
def returns_a_named_tuple(self, x):
    return Pair(self.fc(x), second=x)


@faithful
def goes_by_a_closure(self, x):
    def twice(y):
        return y * 2

    return self.fc(twice(x))


@hazard("turns a traced value into a text")
def asserts_a_shape(self, x):
    torch._assert(x.shape[1] == 4, f"expected four columns, found {x.shape}")
    return self.fc(x)


# --- modules with manners of their own -------------------------------------------------------------


class Registering(nn.Module):
    """A class that keeps a list of its subclasses, and wants an argument from each."""

    subclasses: typing.ClassVar[list[str]] = []

    def __init_subclass__(cls, *, label: str) -> None:
        cls.subclasses.append(label)


class Registered(Registering, label="registered"):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x)


class Delegating(nn.Module):
    """Has every attribute: that of its layer, or a function that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return lambda *_: None

    def forward(self, x):
        return self.fc(x)


class Stateful(nn.Module):
    """Leaves a lock out of its pickle and its copies."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.lock = threading.Lock()
        self.copies = 0

    def forward(self, x):
        return self.fc(x)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stateful:
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        result.copies = self.copies + 1
        return result


class Reduced(nn.Module):
    """Is pickled by what it is made from."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return self.fc(x)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reduced, (self.fc.in_features, self.__dict__)


def _reduced(width: int, state: dict[str, Any]) -> Reduced:
    result = Reduced(width)
    result.__dict__.update(state)
    return result


class Scaled(nn.Module):
    """Numbers and switches that go into its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.factor = 2.0
        self.twice = False
        self.extra: nn.Module | None = None

    def forward(self, x):
        x = self.fc(x) * self.factor
        if self.extra is not None:
            x = self.extra(x)
        return self.fc(x) if self.twice else x


class ScaledKernel(nn.Module):
    """A number and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.eye(4))
        self.factor = 2.0

    def forward(self, x):
        return x @ self.kernel * self.factor
