# ruff: noqa: PLW0108  a function around a layer is what is tested
"""Functions, partials and objects that hold a layer hold the copy's in a copy, or the copy is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError
from lora_fx.passes.graph.copies import share_copy
from tests.algebra import randomize, scale_of
from tests.numerics import assert_close, assert_same_bits

CONFIG = lora_fx.LoraConfig(r=2, target_modules=["fc"])


class Holding(nn.Module):
    """A model whose forward goes through what ``setup`` has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.setup()

    def setup(self) -> None:
        raise NotImplementedError

    def kept(self) -> Any:
        raise NotImplementedError

    def forward(self, x):
        return self.out(self.kept()(x))


@dataclasses.dataclass
class Table:
    layers: list
    function: Any


class Slotted:
    __slots__ = ("function",)

    def __init__(self, function) -> None:
        self.function = function


def recursive(owner):
    def call(x, depth=2):
        return call(x, depth - 1) if depth else owner.fc(x)

    return call


def with_default(layer):
    def call(x, layer=layer):
        return layer(x)

    return call


def with_keyword_default(layer):
    def call(x, *, layer=layer):
        return layer(x)

    return call


def with_attribute(layer):
    def call(x):
        return call.layer(x)

    call.layer = layer
    return call


HOLDERS = {
    "a function in a dict": (lambda m: {"a": lambda x: m.fc(x)}, lambda h: h["a"]),
    "a bound method in a list": (lambda m: [m.fc.forward], lambda h: h[0]),
    "a partial in a tuple": (lambda m: (functools.partial(m.fc),), lambda h: h[0]),
    "a partial of a function": (
        lambda m: {"k": [functools.partial(lambda f, x: m.fc(x), 1)]},
        lambda h: h["k"][0],
    ),
    "a default": (lambda m: with_default(m.fc), lambda h: h),
    "a keyword's default": (lambda m: deque([with_keyword_default(m.fc)]), lambda h: h[0]),
    "a function's attribute": (lambda m: [with_attribute(m.fc)], lambda h: h[0]),
    "a dataclass": (lambda m: Table([m.fc], lambda x: m.fc(x)), lambda h: h.function),
    "layers in a dataclass": (lambda m: Table([m.fc], None), lambda h: h.layers[0]),
    "slots": (lambda m: Slotted(lambda x: m.fc(x)), lambda h: h.function),
    "a weak reference": (lambda m: [weakref.ref(m.fc)], lambda h: h[0]()),
    "a function that calls itself": (lambda m: [recursive(m)], lambda h: h[0]),
    "a cached function": (lambda m: functools.lru_cache(lambda n: m.fc), lambda h: h(1)),
    "a function over a list": (
        lambda m: (lambda held: lambda x: held[0](x))([m.fc]),
        lambda h: h,
    ),
    "a set": (lambda m: {m.fc}, lambda h: next(iter(h))),
}


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4)


def holding(setup, kept) -> Holding:
    class Here(Holding):
        def setup(self):
            self.held = setup(self)

        def kept(self):
            return kept(self.held)

    torch.manual_seed(0)
    return Here()


def dense(model: nn.Module, adapted: nn.Module) -> nn.Module:
    """The original with W + s·BA; it is changed."""
    b, a = adapted.fc.lora_B.default, adapted.fc.lora_A.default
    with torch.no_grad():
        model.fc.weight = nn.Parameter(model.fc.weight + scale_of(adapted) * b @ a)
    return model


@pytest.mark.parametrize("name", HOLDERS)
def test_what_holds_a_layer_holds_that_of_the_copy(name, x):
    model = holding(*HOLDERS[name])
    before = model(x)
    adapted = randomize(lora_fx.rewrite(model, CONFIG))
    found = adapted(x)
    assert_same_bits(model(x), before)
    assert not torch.allclose(found, before)
    assert_close(found, dense(model, adapted)(x))


@pytest.mark.parametrize("name", HOLDERS)
def test_the_merged_model_holds_its_own_layers(name, x):
    adapted = randomize(lora_fx.rewrite(holding(*HOLDERS[name]), CONFIG))
    assert_close(lora_fx.merge(adapted)(x), adapted(x))


def test_a_weight_in_a_closure_is_refused(x):
    def setup(model):
        weight = model.fc.weight
        return lambda x: F.linear(x, weight)

    model = holding(setup, lambda held: held)
    adapted = randomize(lora_fx.rewrite(model, CONFIG))
    with pytest.raises(lora_fx.CaptureError, match=r"fc: its weight fc\.weight is read by"):
        adapted(x)


def test_two_closures_over_one_variable_share_it_in_the_copy():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            layers = [self.fc]

            def add():
                layers.append(self.fc)

            self.add, self.count = add, lambda: len(layers)

    model = Counts()
    result = share_copy(model)
    result.add()
    assert (result.count(), model.count()) == (2, 1)


def test_what_holds_no_layer_is_the_same_object():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.activation = {"relu": lambda x: x.relu()}

    model = Plain()
    assert share_copy(model).activation["relu"] is model.activation["relu"]


class Shared:
    """An object that is not copied, as a registry that is there once."""

    def __init__(self, layer) -> None:
        self.layer = layer

    def __deepcopy__(self, memo):
        return self


def test_what_cannot_be_followed_is_refused():
    model = holding(lambda m: {"a": Shared(m.fc)}, lambda h: h["a"].layer)
    with pytest.raises(CaptureError, match=r"the model\.held\['a'\]\.layer holds a module"):
        lora_fx.rewrite(model, CONFIG)


def test_an_object_that_reaches_no_layer_may_be_shared():
    model = holding(lambda m: {"a": Shared(None), "f": lambda x: m.fc(x)}, lambda h: h["f"])
    shared = model.held["a"]
    assert share_copy(model).held["a"] is shared


def test_the_model_is_not_changed(x):
    model = holding(*HOLDERS["a dataclass"])
    held = model.held
    before = copy.copy(held)
    share_copy(model)
    assert model.held is held
    assert held.function is before.function
    assert held.layers == [model.fc]


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.factors = nn.Linear(4, 4), [2.0]
        factors = self.factors
        self.scale = lambda: factors[0]

    def forward(self, x):
        return self.fc(x) * self.scale()


def test_a_function_reads_the_settings_of_the_copy_that_it_is_in() -> None:
    model, x = _Scaled(), torch.randn(3, 4)
    adapted = lora_fx.rewrite(model, CONFIG)
    before = model(x)
    adapted.factors[0] = 3.0
    assert_close(adapted(x), before * 1.5)
    assert_same_bits(model(x), before)
