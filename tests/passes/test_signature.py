"""A generated forward has the original signature, and knows when its graph does not apply."""

from __future__ import annotations

import copy
import enum
import inspect
import math

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.ir.graph import Region
from lora_fx.passes.capture.trace import trace
from lora_fx.passes.graph import install, is_region
from lora_fx.passes.graph.signature import parameters_of
from tests import mixtures
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import sample

MISSING = object()


class Mode(enum.StrEnum):
    LOUD = "loud"
    QUIET = "quiet"


class Level(enum.IntEnum):
    ONE = 1


def plain(self, x):
    return self.fc(x)


def optional(self, x, mask=None):
    return self.fc(x) if mask is None else self.fc(x) * mask


def required_none(self, x, mask):
    return self.fc(x) * 2 if mask is None else self.fc(x) * mask


def keyword_only(self, x, *, factor=2.0, flag=False):
    return self.fc(x) * (factor if flag else 1)


def required_keyword(self, x, *, mask):
    return self.fc(x) * mask


def positional_only(self, x, scale=1, /, shift=0):
    return self.fc(x) * scale + shift


def variadic(self, x, *masks, **extra):
    for mask in masks:
        x = x * mask
    return self.fc(x) + len(extra)


def text(self, x, how="plain"):
    return self.fc(x) * (1 if how == "plain" else 2)


def number(self, x, times: int = 1):
    return self.fc(x) * times


def flag(self, x, on: bool = True):
    return self.fc(x) if on else x


def sentinel(self, x, y=MISSING):
    return self.fc(x) if y is MISSING else self.fc(x) + y


def member(self, x, mode=Mode.LOUD, level=Level.ONE):
    return self.fc(x) * (2 if mode is Mode.LOUD else 1) * level


def infinite(self, x, low=-math.inf, high=float("inf")):
    return self.fc(x).clamp(low, high)


def kind(self, x, dtype=torch.float64, device=None):
    return self.fc(x).to(dtype)


def pair(self, x, size=(2, 2)):
    return self.fc(x) * size[0]


def odd_names(self, input, weight=None, self_=3, def_=4):  # noqa: A002  shadows on purpose
    return self.fc(input) * self_


def module(forward):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

    Model.forward = forward
    torch.manual_seed(0)
    return Model()


def region(original):
    other = module(original.forward.__func__)
    other.load_state_dict(original.state_dict())
    install([Region("", other, trace(other)[0])])
    return other


X, M = sample(2, 4), sample(4)
CALLS = {
    "plain": (plain, [((X,), {}), ((), {"x": X})]),
    "optional": (optional, [((X,), {}), ((X, M), {}), ((X, None), {}), ((X,), {"mask": M})]),
    "required, None": (required_none, [((X, M), {}), ((X, None), {}), ((X,), {"mask": None})]),
    "keyword only": (keyword_only, [((X,), {}), ((X,), {"flag": True, "factor": 3.0})]),
    "required keyword": (required_keyword, [((X,), {"mask": M})]),
    "positional only": (positional_only, [((X,), {}), ((X, 3), {}), ((X, 1), {"shift": 2})]),
    "variadic": (variadic, [((X,), {}), ((X, M, M), {}), ((X,), {"a": 1, "b": 2})]),
    "text": (text, [((X,), {}), ((X, "double"), {}), ((X, "plain"), {})]),
    "number": (number, [((X,), {}), ((X, 2), {}), ((X, True), {}), ((X, 1.0), {}), ((X, M), {})]),
    "flag": (flag, [((X,), {}), ((X, False), {}), ((X, 1), {}), ((X, 0), {})]),
    "sentinel": (sentinel, [((X,), {}), ((X, M), {}), ((X, MISSING), {})]),
    "member": (member, [((X,), {}), ((X, Mode.QUIET), {}), ((X,), {"mode": Mode.LOUD})]),
    "infinite": (infinite, [((X,), {}), ((X, 0.0), {}), ((X,), {"high": 0.0})]),
    "kind": (kind, [((X,), {}), ((X, torch.float16), {}), ((X,), {"dtype": torch.float64})]),
    "pair": (pair, [((X,), {}), ((X, (3, 3)), {})]),
    "odd names": (odd_names, [((X,), {}), ((), {"input": X, "self_": 5})]),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_means_what_it_meant(name):
    forward, calls = CALLS[name]
    original = module(forward)
    other = region(original)
    assert is_region(other)
    for args, kwargs in calls:
        found, expected = other(*args, **kwargs), original(*args, **kwargs)
        assert found.dtype == expected.dtype
        assert_same_bits(found, expected)


@pytest.mark.parametrize("name", CALLS)
def test_the_signature_is_the_original(name):
    forward, _ = CALLS[name]
    original = module(forward)
    other = region(original)
    assert inspect.signature(other.forward) == inspect.signature(original.forward)
    assert inspect.signature(type(other).forward) == inspect.signature(forward)
    # What Python binds, not only what inspect shows.
    names = other.forward.__func__.__code__.co_varnames
    assert names[1] == next(iter(inspect.signature(original.forward).parameters))
    assert other.forward.__doc__ == original.forward.__doc__


def test_a_wrong_call_fails_as_it_did():
    original = module(keyword_only)
    other = region(original)
    for args, kwargs in [((), {}), ((X, 2.0), {}), ((X,), {"factr": 2})]:
        with pytest.raises(TypeError):
            original(*args, **kwargs)
        with pytest.raises(TypeError):
            other(*args, **kwargs)


@pytest.mark.parametrize(
    ("forward", "taken"),
    [(plain, ["x"]), (optional, ["x"]), (variadic, ["x"]), (required_none, ["x", "mask"])],
)
def test_what_has_a_default_is_fixed(forward, taken):
    parameters = parameters_of(forward)
    assert [p.name for p in parameters if p.traced] == taken
    every = parameters_of(forward, fixed=False)
    assert [p.name for p in every if p.traced] == [p.name for p in parameters if not p.variadic]


class OwnWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.eye(4))

    def forward(self, x, mask=None):
        y = x @ self.kernel
        return y if mask is None else y * mask


class Twice(OwnWeight):
    def forward(self, x, mask=None, shift=None):
        y = super().forward(x, mask)
        return y if shift is None else y + shift @ self.kernel


class Kernel(OwnWeight):
    def forward(self, x, mask="no", *more, scale=1.0, **extra):
        return super().forward(x, None if mask == "no" else mask) * scale + len(more) + len(extra)


@pytest.mark.parametrize(
    ("cls", "args", "kwargs"),
    [
        (Twice, (X,), {}),
        (Twice, (X,), {"mask": M}),
        (Twice, (X,), {"shift": M}),
        (Twice, (X, M, M), {}),
        (Kernel, (X,), {}),
        (Kernel, (X, M), {}),
        (Kernel, (X,), {"scale": 2.0}),
        (Kernel, (X,), {"scale": 1}),
        (Kernel, (X, "no", 3), {}),
        (Kernel, (X,), {"b": 1, "a": 1}),
    ],
)
def test_a_call_of_another_kind_has_the_adapter_of_the_modules_own_weight(cls, args, kwargs):
    """Its own forward, which such a call falls back to, reads the weight with its adapter."""
    original = cls()
    config = lora_fx.LoraConfig(r=2, target_modules=["kernel"])
    model = randomize(lora_fx.rewrite(original, config))
    found = model(*args, **kwargs)
    assert not torch.equal(found, original(*args, **kwargs))
    assert_close(found, lora_fx.merge(model)(*args, **kwargs))
    assert_same_bits(copy.deepcopy(model)(*args, **kwargs), found)
    found.square().sum().backward()
    assert model.kernel_lora.lora_B.default.grad.abs().sum() > 0


def test_what_is_wrong_for_the_modules_own_forward_is_its_own_error():
    model = lora_fx.rewrite(OwnWeight(), lora_fx.LoraConfig(r=2, target_modules=["kernel"]))
    with pytest.raises(TypeError, match="NoneType"):
        model(None)


class Exported(OwnWeight):
    def forward(self, x, mask=None, **extra):
        y = super().forward(x, mask)
        for value in extra.values():
            y = y + value
        return y


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"x": X[0]},
        {"mask": M[None]},
        {"mask": sample(2)[:, None]},
        {"mask": None},
        {"other": 1},
    ],
)
def test_a_model_that_was_exported_takes_other_calls(changes):
    inputs = {"x": X, "mask": M, "bonus": sample(4)}
    config = lora_fx.LoraConfig(r=2, target_modules=["kernel"])
    model = randomize(lora_fx.rewrite(Exported(), config, inputs, frontend="export"))
    merged = lora_fx.merge(model)
    call = {**inputs, **changes}
    assert_close(model(**call), merged(**call))
    with torch.autocast("cpu"):
        assert_close(model(**call), merged(**call), 3e-2)


def test_a_call_of_another_kind_keeps_the_adapters_below():
    original = nn.Sequential(module(optional), nn.Linear(4, 4))
    model = lora_fx.rewrite(original, lora_fx.LoraConfig(r=2))
    torch.nn.init.ones_(model[0].fc.lora_B.default)
    expected = model[0].fc(X) * M
    assert_same_bits(model[0](X, M), expected)
    with torch.no_grad():
        assert not torch.equal(model[0](X, M), original[0](X, M))


def test_a_mutable_default_is_no_constant():
    def forward(self, x, seen=[]):  # noqa: B006  what is tested
        seen.append(1)
        return self.fc(x) * len(seen)

    model = module(forward)
    assert trace(model)[1]
    forward.__defaults__[0].clear()
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, target_modules=["fc"]))
    forward.__defaults__[0].clear()
    assert_same_bits([adapted(X), adapted(X)], [model.fc(X) * 1, model.fc(X) * 2])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_decorator_gets_the_arguments_by_position_as_from_its_caller(implementation: str) -> None:
    """The functions to which the experts of transformers dispatch have other names for arguments."""
    base = mixtures.gpt_oss()
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = lora_fx.LoraConfig(r=2, target_modules=[], target_parameters=parameters)
    model = lora_fx.rewrite(base, config)
    assert_same_bits(model(mixtures.IDS).logits, base(mixtures.IDS).logits)
    for mixture in (base, model):
        mixture.set_experts_implementation(implementation)
    assert_close(model(mixtures.IDS).logits, base(mixtures.IDS).logits, 1e-6)
