"""Decorators of a forward that ask whether the class has them stay around the graph."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.errors import CaptureError
from lora_fx.runtime.modules.classes import around, inner_of
from tests.algebra import randomize
from tests.numerics import assert_close


def checkpointing(forward):
    """As transformers has it: only the outermost one of a class checkpoints."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        outermost = type(self).forward is wrapper
        if self.gradient_checkpointing and self.training and outermost:
            return checkpoint(
                functools.partial(forward, self, **kwargs), *args, use_reentrant=False
            )
        return forward(self, *args, **kwargs)

    return wrapper


class Layer(nn.Module):
    gradient_checkpointing = False

    def __init_subclass__(cls):
        cls.forward = checkpointing(cls.forward)


class OverLinears(Layer):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return x + self.out(torch.tanh(self.fc(x)))


class ReadsWeights(Layer):
    """No other forward may stand in for its graph."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(32, 8)), nn.Parameter(torch.randn(8, 32))

    def forward(self, x):
        return x + F.linear(torch.tanh(F.linear(x, self.up)), self.down)


class Again(OverLinears):
    """Decorated once more, around the decorator that it has from above."""


class WithoutGraph(OverLinears):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return super().forward(x)


class Model(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.first, self.second = cls(), cls()

    def forward(self, x):
        return self.second(self.first(x))


CONFIG = lora_fx.LoraConfig(r=2, target_modules=r"(first|second).*")
LAYERS = [OverLinears, ReadsWeights, Again, WithoutGraph]


def rewritten(cls) -> nn.Module:
    torch.manual_seed(0)
    return randomize(lora_fx.rewrite(Model(cls), CONFIG), 0.2).train()


def step(model, x):
    """The output, the gradients, and how much is kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor):
        if not any(tensor.untyped_storage()._cdata == p.untyped_storage()._cdata for p in own):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    own = list(model.parameters())
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
        total = sum(kept.values())
        out.square().sum().backward()
    return out, [p.grad for p in lora_fx.trainable_parameters(model)], total


def switch_on(model):
    for layer in (model.first, model.second):
        layer.gradient_checkpointing = True


@pytest.mark.parametrize("cls", LAYERS)
def test_a_layer_that_checkpoints_saves_memory_and_keeps_its_graph(cls):
    x, model = torch.randn(64, 8), rewritten(cls)
    other = copy.deepcopy(model)
    switch_on(other)
    out, grads, kept = step(model, x)
    for _ in range(2):  # the first call is watched, and no other
        again, found, fewer = step(other, x)
        assert_close(again, out)
        assert_close(found, grads)
        assert fewer < kept / 2


@pytest.mark.parametrize("cls", LAYERS)
def test_a_layer_with_a_hook_checkpoints_as_well(cls):
    """Its class is another one: the way into it is watched."""
    torch.manual_seed(0)
    model, x = Model(cls), torch.randn(64, 8)
    calls: list[object] = []
    model.first.register_forward_hook(lambda module, *_: calls.append(module))
    model = randomize(lora_fx.rewrite(model, CONFIG), 0.2).train()
    out, grads, kept = step(model, x)
    switch_on(model)
    for _ in range(2):
        again, found, fewer = step(model, x)
        assert_close(again, out)
        assert_close(found, grads)
        assert fewer < kept / 2
    assert len(calls) == 3, "hooks are outside of the checkpoint"


@pytest.mark.parametrize("cls", LAYERS)
def test_copies_and_pickles_checkpoint_as_well(cls):
    x, model = torch.randn(64, 8), rewritten(cls)
    switch_on(model)
    out, _, kept = step(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again, _, found = step(other, x)
        assert_close(again, out)
        assert found == kept


@pytest.mark.parametrize("cls", LAYERS)
def test_a_compiler_sees_what_an_eager_call_runs(cls):
    x, model = torch.randn(64, 8), rewritten(cls)
    out, grads, _ = step(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=cls is not WithoutGraph)
    model.zero_grad()
    again = compiled(x)
    again.square().sum().backward()
    assert_close(again, out)
    assert_close([p.grad for p in lora_fx.trainable_parameters(model)], grads)


def test_a_forward_that_is_called_by_itself_is_watched():
    model = rewritten(WithoutGraph)
    model.first.fc.forward = functools.partial(bypass, model.first.fc)
    with pytest.raises(CaptureError, match=r"first\.fc: its weight"):
        model.first.forward(torch.randn(2, 8))


def bypass(layer, x):
    return F.linear(x, layer.get_parameter("weight"), layer.bias)


def test_what_is_no_such_decorator_is_left_out():
    def plain(self, x):
        return x

    @functools.wraps(plain)
    def decorated(self, x):
        return plain(self, x)

    def new(self, x):
        return -x

    for function in (plain, decorated):
        assert inner_of(function) is function
        assert around(function, new) is new
    assert inner_of(Again.forward).__name__ == "forward"
    outer = around(Again.forward, new)
    assert inner_of(outer) is new
    assert inspect.unwrap(outer) is new
    assert inspect.unwrap(Again.forward) is not new
