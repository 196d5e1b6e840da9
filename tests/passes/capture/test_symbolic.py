"""A trace is the module's own computation, or it is refused with a reason in words."""

from __future__ import annotations

import copy
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError
from lora_fx.ir.graph import Region
from lora_fx.passes.capture.symbolic import Untraceable, trace
from lora_fx.passes.graph.region import install
from tests.models import builders
from tests.numerics import assert_same_bits
from tests.zoo import sample


def installed(module: nn.Module, graph: torch.fx.Graph) -> nn.Module:
    module = copy.deepcopy(module)
    install([Region("", module, graph)])
    return module


def names(mapping):
    return [pytest.param(*_tuple(value), id=name) for name, value in mapping.items()]


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


# --- hazards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "reason"), names(builders.HAZARDS))
def test_what_is_no_graph_is_refused_in_words(cls, reason):
    module = builders.build(cls)
    with pytest.raises(Untraceable, match=reason):
        trace(module)


@pytest.mark.parametrize(("cls", "reason"), names(builders.HAZARDS))
def test_a_refused_trace_leaves_no_trace(cls, reason):
    module = builders.build(cls)
    state = (dict(module.__dict__), [dict(m.__dict__) for m in module.modules()])
    lists = (list(module.cache), dict(module.table), dict(module._modules), list(builders.SEEN))
    generators = (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist())
    watcher = sys.gettrace()
    with pytest.raises(Untraceable):
        trace(module)
    assert (dict(module.__dict__), [dict(m.__dict__) for m in module.modules()]) == state
    after = (list(module.cache), dict(module.table), dict(module._modules))
    assert after == lists[:3]
    assert generators == (
        random.getstate(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )
    assert sys.gettrace() is watcher
    assert torch.is_grad_enabled()
    builders.SEEN.clear()


@pytest.mark.parametrize(("cls", "reason"), names(builders.HAZARDS))
def test_what_is_no_graph_runs_by_its_own_forward(cls, reason):
    module = builders.build(cls).eval().requires_grad_(False)
    with pytest.raises(CaptureError, match="does not trace symbolically"):
        lora_fx.capture(module, frontend="symbolic")
    captured = lora_fx.capture(module)
    assert captured.frontend == "regions"
    assert "" in captured.opaque
    assert {"fc", "other"} <= captured.regions.keys()
    assert _result(captured.model) == _result(module)
    builders.SEEN.clear()


def _result(module: nn.Module) -> str:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    builders.COUNT = 0
    with torch.enable_grad():
        return repr(module(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 0.0, 0.5]])))


# --- what traces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", names(builders.FAITHFUL))
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


@pytest.mark.parametrize("cls", names(builders.FAITHFUL))
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
    module = builders.build(builders.HAZARDS["without_gradients"][0])
    with torch.no_grad(), pytest.raises(Untraceable, match="gradients on or off"):
        trace(module)
    module = builders.build(builders.HAZARDS["own_autograd_function"][0])
    with torch.no_grad(), pytest.raises(Untraceable):
        trace(module)
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

        def forward(self, x):
            return self.second(self.first(x))

    model = nn.Sequential(Two(True), Two(False), Two(True)).eval()
    captured = lora_fx.capture(model)
    assert_same_bits(captured.model(sample(2, 4)), model(sample(2, 4)))
    assert type(captured.model[0]) is type(captured.model[2])
    assert type(captured.model[0]) is not type(captured.model[1])


def test_a_call_method_of_its_own_is_called():
    class Checked(nn.Module):
        on = False

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def __call__(self, x):
            return super().__call__(x) * (2 if self.on else 1)

        def forward(self, x):
            return self.fc(x)

    model = nn.Sequential(Checked(), nn.Linear(4, 4))
    captured = lora_fx.capture(model, frontend="symbolic").model
    for one in (model, captured):
        one[0].on = True
    assert_same_bits(captured(sample(2, 4)), model(sample(2, 4)))


@pytest.mark.parametrize("decorate", [lambda f: f, torch.no_grad(), torch.compile])
def test_a_decorated_forward(decorate):
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

    Decorated.forward = decorate(lambda self, x: self.fc(x))
    module = Decorated()
    if decorate is torch.compile:
        with pytest.raises(Untraceable):
            trace(module)
    elif isinstance(decorate, torch.no_grad):
        with pytest.raises(Untraceable, match="gradients"):
            trace(module)
    else:
        assert installed(module, trace(module))(sample(2, 4)).shape == (2, 4)


def test_a_forward_of_the_instance_is_refused():
    module = nn.Linear(4, 4)
    module.forward = lambda x: x
    with pytest.raises(Untraceable, match="replaced on the instance"):
        trace(module)


def test_a_module_that_calls_itself_is_not_a_graph():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            depth = DEPTH.pop()
            return self(self.fc(x)) if depth else x

    DEPTH = [1]
    with pytest.raises(
        Untraceable, match=r"changes what is in a variable around .*Recursive\.forward"
    ):
        trace(Recursive())
    DEPTH[:] = [1]
    model = Recursive()
    captured = lora_fx.capture(model)
    assert captured.frontend == "regions"
    results = []
    for one in (captured.model, model):
        DEPTH[:] = [0, 1, 1]
        with torch.no_grad():
            results.append(one(sample(2, 4)))
    assert_same_bits(*results)


def test_a_cached_property_is_a_side_effect():
    import functools

    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        @functools.cached_property
        def factor(self):
            return 3.0

        def forward(self, x):
            return self.fc(x) * self.factor

    model = Lazy()
    with pytest.raises(Untraceable, match=r"writes to self\.factor"):
        trace(model)
    assert "factor" not in model.__dict__


def test_a_value_in_an_outer_variable_is_a_side_effect():
    kept = None

    class Keeps(nn.Module):
        def forward(self, x):
            nonlocal kept
            kept = x
            return x * 2

    with pytest.raises(Untraceable, match="writes to kept, which is not its own"):
        trace(Keeps())
    del kept
