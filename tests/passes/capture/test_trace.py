"""What a trace says of a forward, and that an adapted module is right whatever its code does."""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import math
import pickle
import random
import sys
import types
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx.ir.graph import Region
from lora_fx.passes.capture.trace import Untraceable, trace
from lora_fx.passes.graph import install, is_region, original_class
from tests.algebra import randomize
from tests.models import builders
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import sample

CONFIG = lora_fx.LoraConfig(r=2, target_modules=["fc", "kernel"])
FACTOR = 2.0
TABLE = {"a": 2.0, "b": {"deep": 3.0}}


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


class Settings:
    def __init__(self):
        self.factor = 2.0
        self.inner = types.SimpleNamespace(factor=3.0)


SETTINGS = Settings()


class Slotted:
    __slots__ = ("factor",)

    def __init__(self):
        self.factor = 2.0


class Delegates:
    def __init__(self):
        self.held = {"factor": 2.0}

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["held"][name]


class Base(nn.Module):
    """A layer that is called, and a kernel whose adapter lies in the module's own graph."""

    kind = 2.0

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.kernel = nn.Parameter(torch.randn(4, 4))
        self.norm = nn.LayerNorm(4)
        self.giver = builders.Giver()
        self.listed = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.keyed = nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()})
        self.empty = nn.ModuleList()
        self.weights = nn.ParameterDict({name: torch.randn(4, 4) for name in "ab"})
        self.factor = 2.0
        self.settings = Settings()
        self.slotted = Slotted()
        self.delegates = Delegates()
        self.table = {"a": 2.0, "deep": {"b": 3.0}}
        self.by_pair = {(1, 2): {"deep": 2.0}}
        self.by_dtype = {torch.float64: [2.0]}
        self.by_kind = {Kind.ONE: 2.0, Kind.TWO: 3.0}
        self.numbers = [2.0, 3.0]
        self.numpy = np.float64(0.5)
        self.array = np.array([2.0])
        self.iterator = iter([1.0, 2.0, 3.0] * 100)  # Python 3.14 copies no itertools.cycle
        self.generator = random.Random(0)
        self.draws = np.random.default_rng(0)
        self.mode = "loud"

    @property
    def doubled(self):
        return self.factor * 2

    @classmethod
    def of_class(cls):
        return cls.kind

    def helped(self, x):
        return x * self.factor


def multiplied(self, x):
    return self.fc(x) * self.inner()


def multiplied_by_kernel(self, x):
    return x @ self.kernel * self.inner()


def build(forward, inner=None):
    """Make a module; ``inner`` is a method, so that ``forward`` needs no variable around it."""
    members = {"forward": forward, "inner": inner, "__module__": __name__}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return type(forward.__name__, (Base,), members)().double()


def adapt(model, *example, **options):
    """Return an adapted copy with random factors, and what merging it gives."""
    adapted = randomize(lora_fx.rewrite(model, CONFIG, *example, **options))
    return adapted, lora_fx.merge(adapted)


def sites(model):
    return {row.name for row in lora_fx.plan(model, CONFIG).sites}


def installed(module: nn.Module, traced: tuple[fx.Graph, str]) -> nn.Module:
    """Return a copy that runs a graph which may run."""
    graph, doubt = traced
    assert not doubt
    module = copy.deepcopy(module)
    install([Region("", module, graph)])
    return module


def read_of(module):
    return module.factor


def adjusted(fn):
    """A decorator with a default of its own."""

    @functools.wraps(fn)
    def wrapper(self, x, scale=3.0):
        return fn(self, x, scale)

    return wrapper


def inserting(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        kwargs.setdefault("scale", 3.0)
        return fn(*args, **kwargs)

    return wrapper


def counting(fn):
    @functools.wraps(fn)
    def wrapper(self, *args, **kwargs):
        return fn(self, *args, **kwargs) * len(args)

    return wrapper


def handing_on(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)

    return wrapper


# --- what is read, and may be another value at the next call ------------------------------------------


def _closure():
    cell = [2.0]

    def read():
        return cell[0]

    def change(_):
        cell[0] = 5.0

    return read, change


READ_CLOSURE, CHANGE_CLOSURE = _closure()


def _global(_):
    global FACTOR  # noqa: PLW0603  what is to be noticed
    FACTOR = 5.0


def reset():
    global FACTOR  # noqa: PLW0603  see above
    FACTOR = 2.0
    TABLE.update(a=2.0, b={"deep": 3.0})
    Base.kind = 2.0
    READ_CLOSURE.__closure__[0].cell_contents[0] = 2.0


def beside(holder):
    holder.another = 5.0


def by_another_name(self):
    table = self.table
    return table["a"]


READS = {
    "attribute": (lambda self: self.factor, lambda m: setattr(m, "factor", 5.0)),
    "getattr": (lambda self: getattr(self, "factor", 1.0), lambda m: setattr(m, "factor", 5.0)),
    "getattr without": (lambda self: getattr(self, "no", 2.0), lambda m: setattr(m, "no", 5.0)),
    "getattr, deleted": (
        lambda self: getattr(self, "factor", 5.0),
        lambda m: delattr(m, "factor"),
    ),
    "hasattr, deleted": (
        lambda self: self.factor if hasattr(self, "factor") else 3.0,
        lambda m: delattr(m, "factor"),
    ),
    "get, deleted": (lambda self: self.table.get("a", 5.0), lambda m: m.table.pop("a")),
    "in, deleted": (
        lambda self: self.table["a"] * 2 if "a" in self.table else 5.0,
        lambda m: m.table.pop("a"),
    ),
    "own dict, deleted": (
        lambda self: self.settings.__dict__.get("factor", 5.0),
        lambda m: delattr(m.settings, "factor"),
    ),
    "hasattr": (lambda self: 2.0 if hasattr(self, "no") else 3.0, lambda m: setattr(m, "no", 1)),
    "property": (lambda self: self.doubled, lambda m: setattr(m, "factor", 5.0)),
    "object": (lambda self: self.settings.factor, lambda m: setattr(m.settings, "factor", 5.0)),
    "inner object": (
        lambda self: self.settings.inner.factor,
        lambda m: setattr(m.settings.inner, "factor", 5.0),
    ),
    "slots": (lambda self: self.slotted.factor, lambda m: setattr(m.slotted, "factor", 5.0)),
    "delegated": (lambda self: self.delegates.factor, lambda m: m.delegates.held.update(factor=5)),
    "dict": (lambda self: self.table["a"], lambda m: m.table.update(a=5.0)),
    "get": (lambda self: self.table.get("a"), lambda m: m.table.update(a=5.0)),
    "get without": (lambda self: self.table.get("z", 2.0), lambda m: m.table.update(z=5.0)),
    "in": (lambda self: 2.0 if "z" in self.table else 3.0, lambda m: m.table.update(z=5.0)),
    "nested dict": (lambda self: self.table["deep"]["b"], lambda m: m.table["deep"].update(b=5)),
    "own dict": (
        lambda self: self.settings.__dict__["factor"],
        lambda m: setattr(m.settings, "factor", 5.0),
    ),
    "own dict, get": (
        lambda self: vars(self.settings).get("no", 2.0),
        lambda m: setattr(m.settings, "no", 5.0),
    ),
    "own dict, in": (
        lambda self: 2.0 if "no" in self.settings.__dict__ else 3.0,
        lambda m: setattr(m.settings, "no", 5.0),
    ),
    "own dict, copied": (
        lambda self: copy.copy(self.settings).factor,
        lambda m: setattr(m.settings, "factor", 5.0),
    ),
    "own dict, spread": (
        lambda self: dict(**self.settings.__dict__)["factor"],
        lambda m: setattr(m.settings, "factor", 5.0),
    ),
    "own dict, all": (
        lambda self: float(len([*self.settings.__dict__.items()])) / 2,
        lambda m: delattr(m.settings, "factor"),
    ),
    "own dict of the module": (
        lambda self: self.__dict__["factor"],
        lambda m: setattr(m, "factor", 5.0),
    ),
    "a tuple as a key": (
        lambda self: self.by_pair[1, 2]["deep"],
        lambda m: m.by_pair[1, 2].update(deep=5.0),
    ),
    "a dtype as a key": (
        lambda self: self.by_dtype[torch.float64][0],
        lambda m: m.by_dtype[torch.float64].__setitem__(0, 5.0),
    ),
    "an enum as a key": (
        lambda self: self.by_kind[Kind.ONE],
        lambda m: m.by_kind.update({Kind.ONE: 5.0}),
    ),
    "a dict by another name": (by_another_name, lambda m: m.table.update(a=5.0)),
    "list": (lambda self: self.numbers[0], lambda m: m.numbers.__setitem__(0, 5.0)),
    "length": (lambda self: len(self.numbers), lambda m: m.numbers.append(5.0)),
    "sum": (lambda self: sum(self.numbers), lambda m: m.numbers.append(5.0)),
    "loop": (lambda self: math.prod(n for n in self.numbers), lambda m: m.numbers.append(5.0)),
    "global": (lambda self: FACTOR, _global),
    "global dict": (lambda self: TABLE["b"]["deep"], lambda m: TABLE["b"].update(deep=5.0)),
    "class": (lambda self: self.kind, lambda m: setattr(Base, "kind", 5.0)),
    "class method": (lambda self: self.of_class(), lambda m: setattr(Base, "kind", 5.0)),
    "closure": (lambda self: READ_CLOSURE(), CHANGE_CLOSURE),
    "function": (read_of, lambda m: setattr(m, "factor", 5.0)),
    "child": (lambda self: self.norm.eps * 1e5, lambda m: setattr(m.norm, "eps", 5.0)),
    "string": (lambda self: 2.0 if self.mode == "loud" else 3.0, lambda m: setattr(m, "mode", "")),
    "text": (lambda self: float(f"{len(self.mode)}"), lambda m: setattr(m, "mode", "")),
    "number of numpy": (lambda self: self.numpy, lambda m: setattr(m, "numpy", np.float64(5))),
    "array": (lambda self: float(self.array[0]), lambda m: m.array.fill(5.0)),
    "type": (
        lambda self: 2.0 if type(self.norm) is nn.LayerNorm else 3.0,
        lambda m: setattr(m, "norm", nn.Identity()),
    ),
    "isinstance": (
        lambda self: 2.0 if isinstance(self.norm, nn.LayerNorm) else 3.0,
        lambda m: setattr(m, "norm", nn.Identity()),
    ),
    "parameter is there": (
        lambda self: 2.0 if self.fc.bias is not None else 3.0,
        lambda m: setattr(m.fc, "bias", None),
    ),
    "child is there": (
        lambda self: 2.0 if self.norm is not None else 3.0,
        lambda m: setattr(m, "norm", None),
    ),
    "truth of a child": (
        lambda self: 2.0 if self.norm else 3.0,
        lambda m: setattr(m, "norm", None),
    ),
    "getattr of a child": (
        lambda self: 2.0 if getattr(self, "norm", None) is not None else 3.0,
        lambda m: delattr(m, "norm"),
    ),
    "hasattr of a child": (
        lambda self: 2.0 if hasattr(self, "norm") else 3.0,
        lambda m: delattr(m, "norm"),
    ),
    "hasattr of a parameter": (
        lambda self: 2.0 if hasattr(self.norm, "weight") else 3.0,
        lambda m: delattr(m.norm, "weight"),
    ),
    "child in a tuple": (
        lambda self: 2.0 if self.norm not in (None, 0) else 3.0,
        lambda m: setattr(m, "norm", None),
    ),
    "None among children": (
        lambda self: 2.0 if None not in [self.norm, self.fc] else 3.0,
        lambda m: setattr(m, "norm", None),
    ),
    "key of a child": (
        lambda self: 2.0 if "a" in self.keyed else 3.0,
        lambda m: (m.keyed.pop("a"), m.keyed.update({"c": nn.Identity()})),
    ),
    "keys of children": (
        lambda self: 2.0 if next(iter(self.keyed)) == "a" else 3.0,
        lambda m: m.keyed.update({"a": m.keyed.pop("a")}),
    ),
    "keys of parameters": (
        lambda self: 2.0 if next(iter(self.weights)) == "a" else 3.0,
        lambda m: m.weights.__setitem__("a", m.weights.pop("a")),
    ),
    "children in a list": (
        lambda self: 2.0 + sum(1 for _ in self.listed),
        lambda m: m.listed.append(nn.Identity()),
    ),
    "no children in a list": (
        lambda self: 2.0 + sum(1 for _ in self.empty),
        lambda m: m.empty.append(nn.Identity()),
    ),
    "shape": (
        lambda self: self.norm.weight.shape[0],
        lambda m: setattr(m.norm, "weight", nn.Parameter(torch.ones(2, 4))),
    ),
}


@pytest.mark.parametrize("frontend", ["regions", "export"])
@pytest.mark.parametrize("forward", [multiplied, multiplied_by_kernel])
@pytest.mark.parametrize("name", READS)
def test_what_was_read_is_read_again(name, forward, frontend):
    """Merged and adapted model get the same change: their results agree."""
    read, change = READS[name]
    model, x = build(forward, read), sample(3, 4).double()
    adapted, merged = adapt(model, x, frontend=frontend)
    before = merged(x)
    assert_close(adapted(x), before, 1e-12)
    assert not torch.equal(before, model(x))
    try:
        change(merged)
        change(adapted)
        expected = merged(x)
        assert_close(adapted(x), expected, 1e-12)
        assert not torch.equal(before, expected), "the change does nothing"
    finally:
        reset()


# What is looked up, and a change of something beside it.
BESIDE = {
    "dict": (lambda self: self.table["a"], lambda m: m.table.update(b=5.0)),
    "get": (lambda self: self.table.get("a"), lambda m: m.table.pop("deep")),
    "in": (lambda self: 2.0 if "z" in self.table else 3.0, lambda m: m.table.update(a=5.0)),
    "nested dict": (lambda self: self.table["deep"]["b"], lambda m: m.table["deep"].update(c=5)),
    "global dict": (lambda self: TABLE["b"]["deep"], lambda m: TABLE.update(a=5.0)),
    "own dict": (lambda self: self.settings.__dict__["factor"], lambda m: beside(m.settings)),
    "own dict, get": (
        lambda self: vars(self.settings).get("no", 2.0),
        lambda m: beside(m.settings),
    ),
    "own dict, in": (
        lambda self: 2.0 if "no" in self.settings.__dict__ else 3.0,
        lambda m: beside(m.settings),
    ),
    "own dict of the module": (lambda self: self.__dict__["factor"], beside),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_change_of_something_beside_it_changes_nothing(name):
    read, change = BESIDE[name]
    adapted, merged = adapt(build(multiplied_by_kernel, read))
    x = sample(3, 4).double()
    assert_close(adapted(x), merged(x), 1e-12)
    before = adapted(x)
    try:
        change(adapted)
        assert_close(adapted(x), before, 1e-12)
    finally:
        reset()


def writes_to_settings(self):
    own = self.settings.__dict__
    own["factor"] = 3.0
    own.update(more=own.pop("factor") + 1.0)
    own.setdefault("most", 2.0)
    found = (self.settings.more, own["more"], sorted(own), "factor" in own, self.settings.most)
    assert found == (4.0, 4.0, ["inner", "more", "most"], False, 2.0)
    return self.settings.more


@pytest.mark.parametrize("frontend", ["regions", "export"])
@pytest.mark.parametrize("forward", [multiplied, multiplied_by_kernel])
def test_what_is_written_to_the_dict_of_an_object_is_written_by_each_call(forward, frontend):
    model, x = build(forward, writes_to_settings), sample(3, 4).double()
    adapted, merged = adapt(model, x, frontend=frontend)
    assert vars(model.settings).keys() == {"factor", "inner"}
    del adapted.settings.inner.factor
    adapted.settings.factor = adapted.settings.inner.factor = 1.0
    assert_close(adapted(x), merged(x), 1e-12)
    assert vars(adapted.settings).keys() == {"inner", "more", "most"}


# --- questions that only a value can answer -----------------------------------------------------------


QUESTIONS = {
    "get": lambda self, x, mode: self.fc(x) * {"a": 2.0}.get(mode, 3.0),
    "index": lambda self, x, mode: self.fc(x) * {"a": 2.0, "b": 3.0}[mode],
    "format": lambda self, x, mode: self.fc(x) * (2.0 if f"{mode}" == "a" else 3.0),
    "str": lambda self, x, mode: self.fc(x) * (2.0 if str(mode) == "a" else 3.0),
    "repr": lambda self, x, mode: self.fc(x) * len(repr(mode)),
    "percent": lambda self, x, mode: self.fc(x) * len("%s" % mode * (1 + (mode == "a"))),  # noqa: UP031
    "hash": lambda self, x, mode: self.fc(x) * (2.0 if hash(mode) == hash("a") else 3.0),
    "is": lambda self, x, mode: self.fc(x) * (2.0 if mode is Kind.ONE else 3.0),
    "is True": lambda self, x, mode: self.fc(x) * (2.0 if mode is True else 3.0),
    "equal": lambda self, x, mode: self.fc(x) * (2.0 if mode == "a" else 3.0),
    "in": lambda self, x, mode: self.fc(x) * (2.0 if mode in ("a", "c") else 3.0),
    "in a dict": lambda self, x, mode: self.fc(x) * (2.0 if mode in {"a": 1} else 3.0),
    "equal lists": lambda self, x, mode: self.fc(x) * (2.0 if [mode] == ["a"] else 3.0),
    "type": lambda self, x, mode: self.fc(x) * (2.0 if type(mode) is str else 3.0),
    "isinstance": lambda self, x, mode: self.fc(x) * (2.0 if isinstance(mode, str) else 3.0),
    "callable": lambda self, x, mode: self.fc(x) * (2.0 if callable(mode) else 3.0),
    "truth": lambda self, x, mode: self.fc(x) if mode else x,
    "not": lambda self, x, mode: self.fc(x) if not mode else x,
    "or": lambda self, x, mode: self.fc(x) * len(mode or "long"),
    "len": lambda self, x, mode: self.fc(x) * len(mode),
    "attribute by name": lambda self, x, mode: self.fc(x) * getattr(self, f"no_{mode}", 2.0),
    "max": lambda self, x, mode: self.fc(x) * (2.0 if max([mode, "a"]) == "a" else 3.0),
    "sorted": lambda self, x, mode: self.fc(x) * sorted(["a", "b"]).index(mode),
    "any": lambda self, x, mode: self.fc(x) * (2.0 if any([mode == "a"]) else 3.0),
}


def tries(self, x, mode):
    try:
        factor = {"a": 2.0}[mode]
    except KeyError:
        factor = 3.0
    return self.fc(x) * factor


def matches(self, x, mode):
    match mode:
        case "a":
            return self.fc(x) * 2.0
        case _:
            return self.fc(x) * 3.0


QUESTIONS |= {"try": tries, "match": matches}
ANSWERS = ["a", "b", True, False, Kind.ONE]


def asks(self, x, mode):
    return self.inner(x, mode)


def asks_with_default(self, x, mode="a"):
    return self.inner(x, mode)


def asks_before_its_own_weight(self, x, mode):
    return self.inner(x @ self.kernel, mode)


def asks_with_default_before_its_own_weight(self, x, mode="a"):
    return self.inner(x @ self.kernel, mode)


ASKING = [
    asks,
    asks_with_default,
    asks_before_its_own_weight,
    asks_with_default_before_its_own_weight,
]


@pytest.mark.parametrize("forward", ASKING)
@pytest.mark.parametrize("name", QUESTIONS)
def test_an_argument_that_is_no_tensor_means_what_it_meant(name, forward):
    """What multi-task models have."""
    adapted, merged = adapt(build(forward, QUESTIONS[name]))
    x = sample(3, 4).double()
    for mode in ANSWERS:
        try:
            expected = merged(x, mode)
        except (TypeError, KeyError, ValueError) as error:
            with pytest.raises(type(error)):
                adapted(x, mode)
            continue
        assert_close(adapted(x, mode), expected, 1e-12)
        assert_close(adapted(x, mode=mode), expected, 1e-12)


def scaled(self, x, scale=1.0):
    return self.fc(x) * scale


def scaled_by_kernel(self, x, scale=1.0):
    return x @ self.kernel * scale


@pytest.mark.parametrize("decorate", [adjusted, inserting, counting, handing_on])
@pytest.mark.parametrize("forward", [scaled, scaled_by_kernel])
def test_decorators_that_look_at_what_was_passed(decorate, forward):
    adapted, merged = adapt(build(decorate(forward)))
    x = sample(3, 4).double()
    for args, kwargs in [((x,), {}), ((x, 1.0), {}), ((x,), {"scale": 1.0}), ((x, 5.0), {})]:
        try:
            expected = merged(*args, **kwargs)
        except TypeError:
            with pytest.raises(TypeError):
                adapted(*args, **kwargs)
            continue
        assert_close(adapted(*args, **kwargs), expected, 1e-12)


# --- objects with a state -----------------------------------------------------------------------------


STATES = {
    "iterator": lambda self: next(self.iterator),
    "random generator": lambda self: self.generator.random(),
    "generator of numpy": lambda self: float(self.draws.random()),
    "loop over an iterator": lambda self: sum(itertools.islice(self.iterator, 2)),
    "pop": lambda self: self.numbers.pop(),
    "counter in an object": lambda self: _count(self.settings),
    "counter in a dict": lambda self: _count_in(self.table),
}


def _count(settings):
    settings.factor += 1
    return settings.factor


def _count_in(table):
    table["calls"] = table.get("calls", 0) + 1
    return table["calls"]


@pytest.mark.parametrize("forward", [multiplied, multiplied_by_kernel])
@pytest.mark.parametrize("name", STATES)
def test_what_changes_from_call_to_call_is_no_constant(name, forward):
    model, x = build(forward, STATES[name]), sample(3, 4).double()
    first = [model(x) for model in [copy.deepcopy(model)] for _ in range(2)]
    rewritten = lora_fx.rewrite(model, CONFIG)
    assert_close([rewritten(x) for _ in range(2)], first, 1e-12)
    adapted, merged = adapt(model)
    results = [adapted(x) for _ in range(2)]
    assert_close(results, [merged(x) for _ in range(2)], 1e-12)
    assert not torch.equal(*results)
    assert_close([model(x) for _ in range(2)], first, 1e-12)


class MadeOnDemand(OrderedDict):
    """A table of classes that gives instances, as that of activations in transformers does."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


def test_a_table_that_makes_what_it_gives_stays_as_it_is():
    class Active(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.fc, self.table = nn.Linear(4, 4), table

        def forward(self, x):
            return self.table["relu"](self.fc(x))

    table = MadeOnDemand(relu=nn.ReLU)
    model, x = Active(table), sample(3, 4)
    adapted, merged = adapt(model)
    assert_close(adapted(x.float()), merged(x.float()))
    assert list(table.items()) == [("relu", nn.ReLU)]


# --- what is executed counts, and nothing else --------------------------------------------------------


def counts_elsewhere(self, x):
    if self.mode == "quiet":
        self.factor += 1
    return self.fc(x)


@pytest.mark.parametrize("forward", [counts_elsewhere])
def test_code_that_is_not_executed_costs_nothing(forward):
    assert not trace(build(forward))[1]


# --- code in every form that Python has --------------------------------------------------------------


def unpacks(self, x):
    (a, b), *rest = (x, x + 1), x + 2, x + 3
    first, *middle, last = [a, b, *rest]
    return self.fc(first + last * 2 + sum(middle) * 3)


def chains(self, x):
    if 1 < self.factor <= 2 < 3:
        return self.fc(x)
    return x


def comprehends(self, x):
    found = {name: value * 1 for name, value in zip("ab", (x, x + 1), strict=True)}
    parts = [y * n for y in found.values() for n in (1, 2) if n != 1]
    return self.fc(sum(y for y in parts))


def walrus(self, x):
    if (factor := self.factor) > 1 and (other := factor + 1):
        return self.fc(x) * factor * other
    return x


def inner_functions(self, x):
    def scale(y, by=self.factor):
        def twice(z):
            return z * 2 * by

        return twice(y)

    return self.fc((lambda y: scale(y) + 1)(x))


def writes_in_place(self, x):
    y = self.fc(x)
    y[..., 0] += 1
    y[:, 1:3] *= 2
    parts = [y, y + 1]
    parts[0] = parts[1] * 2
    parts += [y]
    return sum(parts)


def conditional(self, x):
    y = self.fc(x) if self.factor == 2.0 else x
    while self.factor is None:
        y = x
    torch._assert(y.shape[1] == 4, f"four columns, found {y.shape}")
    return y if not self.numbers[5:] else -y


def generators(self, x):
    def parts():
        yield x
        yield from (x + 1, x + 2)

    return self.fc(sum(parts()))


def partials(self, x):
    return self.fc(functools.reduce(lambda a, b: a + b, map(functools.partial(F.relu), [x, x + 1])))


def by_the_class(self, x):
    return nn.Linear.forward(self.fc, x) + super(type(self), self).helped(x)


def matches_settings(self, x):
    match self.mode:
        case "quiet" | "silent":
            return x
        case "loud" if self.factor:
            return self.fc(x)
    return x


def goes_through_parameters(self, x):
    for name in self.weights:
        x = (x @ self.weights[name]).relu()
    return self.fc(x)


FORMS = [
    goes_through_parameters,
    unpacks,
    chains,
    comprehends,
    walrus,
    inner_functions,
    writes_in_place,
    conditional,
    generators,
    partials,
    by_the_class,
    matches_settings,
]


def its_own_weight_first(self, x):
    return self.inner(x @ self.kernel)


@pytest.mark.parametrize("forward", FORMS)
def test_code_of_every_form_is_right(forward):
    x = sample(3, 4).double()
    for model in (build(forward), build(its_own_weight_first, forward)):
        adapted, merged = adapt(model)
        assert_close(adapted(x), merged(x), 1e-12)
        assert not torch.equal(adapted(x), model(x))


class Backwards(nn.ModuleList):
    def __iter__(self):
        return reversed(list(self._modules.values()))


class InAnOrderOfItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = Backwards([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = x @ self.kernel
        for block in self.blocks:
            x = block(x).relu()
        return x


def test_a_container_with_an_order_of_its_own_keeps_it():
    model = InAnOrderOfItsOwn().double()
    adapted, merged = adapt(model)
    assert_close(adapted(sample(3, 4).double()), merged(sample(3, 4).double()), 1e-12)


def test_a_private_name_is_that_of_the_class():
    class Private(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.kernel = nn.Parameter(torch.randn(4, 4))
            self.__factor = 3.0

        def forward(self, x):
            return self.fc(x @ self.kernel) * self.__factor

    adapted, merged = adapt(Private().double())
    x = sample(2, 4).double()
    for change in (2.0, 3.0):
        adapted._Private__factor = merged._Private__factor = change
        assert_close(adapted(x), merged(x), 1e-12)


# --- code without a source --------------------------------------------------------------------------

MADE = """
class Made(Base):
    def forward(self, x):
        return self.fc(x @ self.kernel) * self.factor
"""


def test_code_that_was_made_by_exec_is_adapted():
    names = {"Base": Base, "__name__": "made by exec"}
    exec(MADE, names)
    torch.manual_seed(0)
    model = names["Made"]().double()
    assert sites(model) == {"fc", "kernel"}
    assert not trace(model)[1]
    adapted, merged = adapt(model)
    assert is_region(adapted)
    x = sample(3, 4).double()
    assert_close(adapted(x), merged(x), 1e-12)
    assert not torch.equal(adapted(x), model(x))
    adapted.factor = merged.factor = 5.0
    assert_close(adapted(x), merged(x), 1e-12)
    for name in ("kernel", "fc.weight"):
        base, effective = adapted.get_parameter(name), merged.get_parameter(name)
        assert torch.equal(base, model.get_parameter(name))
        assert not torch.equal(base, effective)
    assert_close(adapted.kernel + 0, merged.kernel, 1e-12)


def test_a_lambda_is_adapted():
    model = build(lambda self, x: self.fc(x @ self.kernel) * self.factor)
    adapted, merged = adapt(model)
    assert is_region(adapted)
    assert_close(adapted(sample(3, 4).double()), merged(sample(3, 4).double()), 1e-12)


# --- graphs in doubt --------------------------------------------------------------------------------


class Halved(torch.autograd.Function):
    """Its gradient is not that of its code."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def keeps_the_same_layout(self, x):
    y = x.contiguous()
    return self.fc(x @ self.kernel) * (1 if y is x else 3)


def adds_a_part_that_may_be_none(self, x):
    first, second = self.giver(x)
    y = self.fc(first @ self.kernel)
    return y if second is None else y + second


def draws_in_a_context(self, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = torch.randn_like(x)
    return self.fc((x + noise) @ self.kernel)


@pytest.mark.parametrize(
    "forward", [keeps_the_same_layout, adds_a_part_that_may_be_none, draws_in_a_context]
)
def test_what_no_stand_in_hears_of_is_right(forward):
    adapted, merged = adapt(build(forward))
    x = sample(3, 4).double()
    assert_close(adapted(x), merged(x), 1e-12)


def branches_on_training(self, x):
    x = x @ self.kernel
    return self.fc(x) if self.training else self.fc(x).tanh() * 3


def switches_gradients_off(self, x):
    with torch.no_grad():
        base = x @ self.kernel
    return self.fc(x) + base + x @ self.kernel


def reads_a_global(self, x):
    return self.fc(x @ self.kernel) * SETTINGS.factor


def applies_an_autograd_function(self, x):
    return self.fc(Halved.apply(x @ self.kernel))


def appends_to_a_list(self, x):
    self.numbers.append(1.0)
    return self.fc(x @ self.kernel) * len(self.numbers)


DOUBTFUL = {
    branches_on_training: "branches on self.training",
    switches_gradients_off: "uses no_grad",
    reads_a_global: "reads SETTINGS, a global",
    applies_an_autograd_function: "Halved",
    appends_to_a_list: "changes what is in self.numbers",
}


@pytest.mark.parametrize("forward", DOUBTFUL)
def test_a_graph_in_doubt_finds_operations_and_never_runs(forward):
    model = build(forward)
    assert sites(model) == {"fc", "kernel"}
    assert DOUBTFUL[forward] in lora_fx.capture(model).regions[""].not_run
    adapted, merged = adapt(model)
    assert not is_region(adapted)
    assert is_region(adapted.fc)
    dense = copy.deepcopy(merged).requires_grad_(True)
    x, y = (sample(3, 4).double().requires_grad_() for _ in range(2))
    for training in (False, True, False):
        found, expected = adapted.train(training)(x), dense.train(training)(y)
        assert_close(found, expected, 1e-12)
        x.grad = y.grad = None
        adapted.zero_grad()
        dense.zero_grad()
        found.square().sum().backward()
        expected.square().sum().backward()
        assert_close(x.grad, y.grad, 1e-12)
        # dL/dB = s · dL/dW · Aᵀ, where x @ W takes the kernel as it is stored.
        for site, name in ((adapted.fc, "fc.weight"), (adapted.kernel_lora, "kernel")):
            a, b = site.lora_A.default, site.lora_B.default
            grad = dense.get_parameter(name).grad
            grad = grad if name == "fc.weight" else grad.mT
            assert_close(b.grad, 4.0 * grad @ a.mT, 1e-12)
            assert_close(a.grad, 4.0 * b.mT @ grad, 1e-12)


def test_a_module_that_no_pass_changed_keeps_its_class():
    class Block(Base):
        def forward(self, x):
            return self.norm(self.fc(x))

    model = nn.Sequential(Block(), nn.ReLU(), nn.Sequential(Block(), nn.Linear(4, 4)))
    config = lora_fx.LoraConfig(r=2, target_modules=["fc"])
    adapted = lora_fx.rewrite(model, config)
    changed = {name for name, module in adapted.named_modules() if is_region(module)}
    assert changed == {"0.fc", "2.0.fc"}
    above = {"", "0", "2", "2.0"}  # their calls are watched
    for name, module in model.named_modules():
        found = adapted.get_submodule(name)
        if name in above:
            assert original_class(found) is type(module)
        elif name not in changed:
            assert type(found) is type(module)


# --- containers of modules ---------------------------------------------------------------------------


class Entries(nn.Module):
    """Goes through its children by name, and reads a weight itself."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
        self.layers["d"] = None
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        if self.way == "items":
            for name, layer in self.layers.items():
                x = layer(x) * 2 if name == "b" else layer(x) if layer is not None else x
        elif self.way == "values":
            for layer in self.layers.values():
                x = layer(x) if layer is not None else x
        elif self.way == "keys":
            for name in self.layers.keys():  # noqa: SIM118
                x = self.layers[name](x) if self.layers[name] is not None else x
        else:
            for name, layer in self.layers.named_children():
                x = layer(x) * 2 if name == "b" else layer(x)
        return x @ self.w


def turn(model: nn.Module) -> None:
    model.layers["a"] = model.layers.pop("a")


def fill(model: nn.Module) -> None:
    model.layers["d"] = nn.Linear(4, 4, bias=False)
    nn.init.constant_(model.layers["d"].weight, 0.5)


@pytest.mark.parametrize("change", [turn, fill])
@pytest.mark.parametrize("way", ["items", "values", "keys", "named_children"])
def test_children_by_name_may_change(way: str, change: Any) -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["w"])
    adapted = randomize(lora_fx.rewrite(Entries(way), config))
    merged = lora_fx.merge(adapted)
    x = sample(3, 4)
    before = merged(x)
    assert_close(adapted(x), before)
    change(adapted)
    change(merged)
    assert_close(adapted(x), merged(x))
    assert not torch.equal(merged(x), before)


class _Float(float):
    pass


class _Int(int):
    pass


class _Counts:
    """An object that Python's own functions compute with, by its methods."""

    def __init__(self, value):
        self.value = value

    def __abs__(self):
        return self.value

    def __round__(self, digits=0):
        return self.value

    def __index__(self):
        return self.value

    def __radd__(self, other):
        return other + self.value

    def __pow__(self, other):
        return self.value**other

    def __float__(self):
        return float(self.value)

    def __hash__(self):
        return hash(self.value)

    def __eq__(self, other):
        return self.value == other

    def __lt__(self, other):
        return self.value < other

    def __gt__(self, other):
        return self.value > other


_COMPUTED = {
    "abs": abs,
    "round": round,
    "max": lambda k: float(max(k, 1)),
    "max of a list": lambda k: float(max([k, 1])),
    "sum": lambda k: sum([k, 1]),
    "prod": lambda k: math.prod([float(k), 2]),
    "pow": lambda k: pow(k, 2),
    "floor": lambda k: math.floor(float(k)) + 1,
    "copysign": lambda k: math.copysign(k, 1),
    "fsum": lambda k: math.fsum([k, 2]),
    "hex": lambda k: int(hex(k), 16),
    "index": lambda k: [1, 2, 3, 4][k],
    "slice": lambda k: len([1, 2, 3][:k]),
    "key": lambda k: {1: 5, 2: 7}.get(k, 9),
    "in": lambda k: 2.0 if k in (1, 0.5) else 3.0,
    "sorted": lambda k: float(sorted([k, 9], reverse=True)[1]),
}


class Computes(Base):
    def forward(self, x):
        return self.fc(x) @ self.kernel * self.use(self.number)


@pytest.mark.parametrize("use", _COMPUTED)
@pytest.mark.parametrize(
    ("kind", "values"), [(_Float, (0.5, 2.0)), (_Int, (1, 2)), (_Counts, (1, 2))]
)
def test_numbers_of_a_class_of_its_own_are_read_each_time(kind, values, use):
    """What code in C computes with such a number is noted by nothing."""
    cls = type("Computes", (Computes,), {"use": staticmethod(_COMPUTED[use])})
    model, x = cls().double(), sample(2, 4).double()
    model.number = kind(values[0])
    try:
        model(x)
    except TypeError:
        pytest.skip("Python does not compute that with a number of this kind")
    adapted, merged = adapt(model)
    for value in (*values, values[0]):
        merged.number, adapted.number = kind(value), kind(value)
        assert_close(adapted(x), merged(x), 1e-12)


# --- hazards --------------------------------------------------------------------------------------


def hazards():
    return [pytest.param(*value, id=name) for name, value in builders.HAZARDS.items()]


def faithful():
    return [pytest.param(cls, id=name) for name, cls in builders.FAITHFUL.items()]


def reason_against(module: nn.Module) -> str:
    try:
        return trace(module)[1]
    except Untraceable as ended:
        return str(ended)


def before_its_own_weight(cls: type[nn.Module]) -> nn.Module:
    class Multiplies(cls):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return super().forward((x @ self.kernel).float())

    return builders.build(Multiplies)


@pytest.mark.parametrize(("cls", "reason"), hazards())
def test_a_trace_says_why_its_graph_must_not_run(cls, reason):
    assert reason_against(builders.build(cls)), reason
    builders.SEEN.clear()


class Draws(Base):
    """Draws from generators of its own, and asks methods that its class makes anew at each read."""

    def __init__(self):
        super().__init__()
        self.generators = torch.Generator().manual_seed(0)
        self.numpy_generator = np.random.default_rng(0)
        self.python_generator = random.Random(0)

    @classmethod
    def scale(cls):
        return 2.0

    def power(self, base, exponent):
        return base**exponent

    square = functools.partialmethod(power, exponent=2)

    def forward(self, x):
        drawn = torch.rand((), generator=self.generators)
        scale = float(self.numpy_generator.random()) + self.python_generator.random()
        return self.fc(x) * drawn * scale * self.scale() * self.square(3.0)


def test_generators_of_the_model_are_left_where_they_were():
    def start():
        torch.manual_seed(0)
        return Draws()

    model, x = start(), torch.randn(2, 4)
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, target_modules=["fc"]))
    for copied in (model, pickle.loads(pickle.dumps(adapted)), adapted):
        assert_close(copied(x), start()(x))


class Scaled(Base):
    def strength(self):
        return 2.0

    def forward(self, x):
        return (x @ self.kernel) * self.strength()


def test_a_model_whose_method_was_replaced_can_be_pickled(monkeypatch):
    adapted = lora_fx.rewrite(Scaled(), lora_fx.LoraConfig(r=2, target_modules=["kernel"]))
    x, before = torch.randn(2, 4), Scaled.strength
    expected = adapted(x)
    monkeypatch.setattr(Scaled, "strength", lambda self: 3.0)
    other = pickle.loads(pickle.dumps(adapted))
    assert_close(other(x), 1.5 * expected)
    monkeypatch.setattr(Scaled, "strength", before)
    assert_close(other(x), expected)


@pytest.mark.parametrize(("cls", "reason"), hazards())
def test_a_trace_leaves_everything_as_it_was(cls, reason):
    module = builders.build(cls)
    classes = [type(m) for m in module.modules()]
    state = (dict(module.__dict__), [dict(m.__dict__) for m in module.modules()])
    lists = (list(module.cache), dict(module.table), dict(module._modules))
    generators = (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist())
    profile = sys.getprofile()
    reason_against(module)
    assert [type(m) for m in module.modules()] == classes
    assert (dict(module.__dict__), [dict(m.__dict__) for m in module.modules()]) == state
    assert (list(module.cache), dict(module.table), dict(module._modules)) == lists
    after = (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist())
    assert after == generators
    assert sys.getprofile() is profile
    assert torch.is_grad_enabled()
    builders.SEEN.clear()


def run(module: nn.Module, autocast: bool) -> Any:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    builders.COUNT = 0
    builders.SEEN.clear()
    with torch.autocast("cpu", enabled=autocast):
        found = module(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 0.0, 0.5]]))
    done = {"counted": builders.COUNT, "kept": len(builders.SEEN), "steps": module.steps}
    builders.SEEN.clear()
    return found, done


@pytest.mark.parametrize(("cls", "reason"), hazards())
def test_a_capture_of_a_hazard_runs_its_own_forward(cls, reason):
    module = builders.build(cls).eval().requires_grad_(False)
    captured = lora_fx.capture(module)
    assert {"fc", "other"} <= captured.regions.keys()
    autocast = "autocast" in cls.__name__
    assert repr(run(captured.model, autocast)) == repr(run(module, autocast))


@pytest.mark.parametrize(("cls", "reason"), hazards())
def test_an_adapted_hazard_is_right(cls, reason):
    """Also where its own weight is adapted, so that its graph would be worth running."""
    config = lora_fx.LoraConfig(r=2, target_modules=["fc", "other", "kernel"])
    model = before_its_own_weight(cls).eval()
    adapted = randomize(lora_fx.rewrite(model, config)).eval()
    merged = lora_fx.merge(adapted)
    autocast = "autocast" in cls.__name__
    (found, done), (expected, as_before) = run(adapted, autocast), run(merged, autocast)
    assert done == as_before
    assert type(found) is type(expected)
    if isinstance(found, set | list):
        found, expected = [*found], [*expected]
    # Under autocast, branches are rounded to bfloat16.
    assert_close(found, expected, 3e-2 if autocast else 1e-5)


# --- what traces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", faithful())
@pytest.mark.parametrize("training", [False, True])
def test_a_graph_computes_what_the_code_does(cls, training):
    module = builders.build(cls).train(training)
    other = installed(module, trace(module))
    for _ in range(2):
        mine, theirs = sample(3, 4), sample(3, 4)
        torch.manual_seed(3)
        expected = module(mine)
        torch.manual_seed(3)
        found = other(theirs)
        assert type(found) is type(expected)
        assert_same_bits(found, expected)
        # In-place changes of an input and of buffers are part of what it does.
        assert_same_bits(theirs, mine)
        assert_same_bits(list(other.buffers()), list(module.buffers()))


@pytest.mark.parametrize("cls", faithful())
def test_gradients_are_those_of_the_code(cls):
    if cls is builders.FAITHFUL["adds_to_its_input"]:
        pytest.skip("changes its input, which may then not be a leaf that wants a gradient")
    module = builders.build(cls).eval()
    other = installed(module, trace(module))
    grads = []
    for one in (module, other):
        x = sample(3, 4).requires_grad_()
        leaves = [t for t in torch.utils._pytree.tree_leaves(one(x)) if isinstance(t, torch.Tensor)]
        sum(t.square().sum() for t in leaves).backward()
        grads.append([x.grad, *(p.grad for p in one.parameters() if p.grad is not None)])
    assert_same_bits(*grads)


def test_the_mode_is_read_when_the_graph_runs():
    module = builders.build(builders.FAITHFUL["drops_by_mode"])
    graph = trace(module.eval())
    other = installed(module, graph).train()
    zeros = (other(torch.ones(64, 4)) == 0).float().mean()
    assert 0.3 < zeros < 0.7
    assert (other.eval()(torch.ones(64, 4)) != 0).all()


def test_a_mode_deep_down_is_read_too():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = nn.Sequential(nn.Sequential(nn.Dropout(0.5)), nn.Linear(4, 4))

        def forward(self, x):
            return F.dropout(x, 0.5, self.outer[0][0].training)

    module = Deep().eval()
    other = installed(module, trace(module))
    other.outer[0][0].train()
    assert (other(torch.ones(64, 4)) == 0).any()


def test_traced_without_gradients_is_the_same_graph():
    for name in ("without_gradients", "own_autograd_function"):
        with torch.no_grad():
            assert trace(builders.build(builders.HAZARDS[name][0]))[1]
    module = builders.build(builders.FAITHFUL["adds_in_place"])
    with torch.inference_mode():
        graph = trace(module)
    assert installed(module, graph)(sample(2, 4)).requires_grad


def test_a_buffer_is_read_each_time():
    class Replaces(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + 1
            return x

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Replaces()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            before = self.child.seen * 1
            x = self.child(x)
            return self.fc(x) + before * 100 + self.child.seen

    module = Reads()
    other = installed(module, trace(module))
    x = sample(2, 4)
    for _ in range(2):
        assert_same_bits(other(x), module(x))


def test_one_layer_under_two_names_is_told_from_two_layers():
    """Blocks that look alike share a graph only if they repeat the same things."""

    class Two(nn.Module):
        def __init__(self, same):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first if same else nn.Linear(4, 4)
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return self.second(self.first(x @ self.kernel))

    model = nn.Sequential(Two(True), Two(False), Two(True)).double()
    config = lora_fx.LoraConfig(r=2, target_modules=["first", "second", "kernel"])
    adapted = randomize(lora_fx.rewrite(model, config))
    assert type(adapted[0]) is type(adapted[2])
    assert type(adapted[0]) is not type(adapted[1])
    x = sample(2, 4).double()
    assert_close(adapted(x), lora_fx.merge(adapted)(x), 1e-12)


class Checked(Base):
    on = False

    def __call__(self, x):
        return super().__call__(x) * (2 if self.on else 1)

    def forward(self, x):
        return self.fc(x @ self.kernel)


def test_a_call_method_of_its_own_is_called():
    adapted, merged = adapt(nn.Sequential(Checked(), nn.Linear(4, 4)).double())
    x = sample(2, 4).double()
    for on in (False, True):
        adapted[0].on = merged[0].on = on
        assert_close(adapted(x), merged(x), 1e-12)


def in_full_precision(self, x):
    return self.fc(x.float() @ self.kernel)


SWITCHES = {
    "no_grad": torch.no_grad(),
    "enable_grad": torch.enable_grad(),
    "autocast off": torch.autocast("cpu", enabled=False),
    "autocast on": torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_decorator_that_switches_modes_switches_them_at_each_call(name, grad, autocast):
    model = build(SWITCHES[name](in_full_precision)).float()
    adapted, merged = adapt(model)
    merged.requires_grad_(True)
    x = sample(2, 4)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
        found, expected = adapted(x), merged(x)
    assert found.dtype == expected.dtype
    assert found.requires_grad == expected.requires_grad
    assert_close(found, expected)


def test_a_compiled_forward_is_right():
    model = build(torch.compile(in_full_precision, backend="eager")).float()
    adapted, merged = adapt(model)
    x = sample(2, 4)
    assert_close(adapted(x), merged(x))


def test_a_forward_of_the_instance_is_refused():
    module = nn.Linear(4, 4)
    module.forward = lambda x: x
    with pytest.raises(Untraceable, match="replaced on the instance"):
        trace(module)


class Recursive(Base):
    def forward(self, x):
        return self(x @ self.kernel) if self.numbers.pop() else self.fc(x)


def test_a_module_that_calls_itself_is_right():
    model = Recursive().double()
    with pytest.raises(Untraceable, match="calls the module itself"):
        trace(model)
    adapted, merged = adapt(model)
    x = sample(2, 4).double()
    results = []
    for one in (adapted, merged):
        one.numbers[:] = [0, 1, 1]
        results.append(one(x))
    assert_close(*results, 1e-12)


class Caches(Base):
    @functools.cached_property
    def computed(self):
        return self.factor + 1

    def forward(self, x):
        return self.fc(x @ self.kernel) * self.computed


def test_a_cached_property_is_computed_by_the_first_call():
    model = Caches().double()
    assert trace(model)[1]
    adapted, merged = adapt(model)
    assert "computed" not in model.__dict__
    x = sample(2, 4).double()
    for factor in (3.0, 4.0):
        adapted.factor = merged.factor = factor
        assert_close(adapted(x), merged(x), 1e-12)
        assert adapted.computed == 4.0


def test_a_value_in_an_outer_variable_is_kept_by_each_call():
    kept = None

    def keeps(self, x):
        nonlocal kept
        kept = self.fc(x @ self.kernel)
        return kept * 2

    model = build(keeps)
    assert "kept, a variable around it" in trace(model)[1]
    adapted, _ = adapt(model)
    found = adapted(sample(2, 4).double())
    assert_same_bits(kept * 2, found)
