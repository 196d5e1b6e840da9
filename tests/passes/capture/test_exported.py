"""``torch.export`` finds operations, and the modules run their own code."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import threading
import time
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import CaptureError, LoraConfig
from lora_fx.ir.record import require_record
from tests.algebra import randomize
from tests.numerics import assert_close

EVERY = LoraConfig(r=2, target_modules=".*")


def adapt(
    model: nn.Module, inputs: Any, frontend: Any = "export", config: LoraConfig = EVERY
) -> tuple[nn.Module, nn.Module]:
    """Return a dense model with the weights of adapters, and the adapted one."""
    adapted = randomize(lora_fx.rewrite(model, config, inputs, frontend=frontend))
    dense = copy.deepcopy(model)
    merged = dict(lora_fx.merge(adapted).named_parameters())
    dense.load_state_dict(merged, strict=False)
    sites = {planned.site.weight for planned in require_record(adapted).adapters["default"].sites}
    named = dict(model.named_parameters())
    assert sites == {name for name in named if not torch.equal(named[name], merged[name])} != set()
    return dense, adapted


def check_same(
    dense: nn.Module, adapted: nn.Module, x: torch.Tensor, *args: Any, **named: Any
) -> None:
    """Compare the outputs of one call, and the gradients of its input, with the same random numbers."""
    found = []
    for model in (dense, adapted):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        output = model(leaf, *args, **named)
        found.append((output, *torch.autograd.grad(output.square().sum(), leaf)))
    assert_close(found[1], found[0], 1e-5)


# --- what is found


class Ranks(nn.Module):
    """A product in code that no trace gets through."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
        if x.dim() == 2:
            x = x @ self.kernel
        return self.fc(x) * more.get("scale", 1.0)


def test_find_a_product_that_no_trace_reaches() -> None:
    model, x = Ranks(), torch.randn(3, 4)
    assert [row.name for row in lora_fx.plan(model, EVERY, x, frontend="regions")] == ["fc"]
    captured = lora_fx.capture(model, x, frontend="export")
    assert captured.regions[""].not_run == "torch.export only finds operations"
    assert [n.target for n in captured.regions[""].graph.find_nodes(op="placeholder")] == ["x"]
    dense, adapted = adapt(model, x)
    assert [row.site.name for row in require_record(adapted).adapters["default"].sites] == [
        "kernel",
        "fc",
    ]
    for training in (True, False):
        dense.train(training), adapted.train(training)
        check_same(dense, adapted, x)
        check_same(dense, adapted, torch.randn(2, 3, 4))
        check_same(dense, adapted, x, scale=2.0)


def test_inputs_that_only_keywords_take() -> None:
    x = torch.randn(3, 4)
    dense, adapted = adapt(Ranks(), {"x": x, "scale": torch.tensor(2.0)})
    check_same(dense, adapted, x, scale=torch.tensor(3.0))
    check_same(dense, adapted, x)


class Code(nn.Module):
    """Has a child with the name of an attribute of fx.GraphModule."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.code = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self.fc(x))


def test_name_what_cannot_be_exported() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(CaptureError, match=r"do not fit Code\.forward"):
        lora_fx.capture(Code(), {"y": x}, frontend="export")
    with pytest.raises(CaptureError, match="a program of Code that PyTorch makes no module of"):
        lora_fx.rewrite(Code(), EVERY, x, frontend="export")
    check_same(*adapt(Code(), x, "auto"), x)


# --- a model of layers that behave otherwise in training, and can be changed


class Frozen(nn.Module):
    """Everything that export makes a literal of: dropouts, batch norm, attention dropout, a device."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.shared = nn.Linear(8, 8)
        self.alias = self.shared
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        h = self.drop(self.bn(self.fc(x))) * scale
        h = self.alias(torch.relu(self.shared(h)))
        p = 0.3 if self.training else 0.0
        h = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], dropout_p=p)[:, 0]
        return self.head(h) + torch.arange(2, device=x.device)


# The gradients of attention over one key are its rounding errors, times the square of what is compared.
X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    return adapt(Frozen().double(), X)


def test_follow_train_and_eval(models: tuple[nn.Module, nn.Module]) -> None:
    dense, adapted = models
    for training in (True, False, True):
        check_same(dense.train(training), adapted.train(training), X)
        assert_close(adapted.bn.running_mean, dense.bn.running_mean, 1e-5)
        assert dense.bn.num_batches_tracked == adapted.bn.num_batches_tracked
    dense.bn.eval(), adapted.bn.eval()
    check_same(dense, adapted, X)


def test_read_settings_of_a_layer_when_it_runs(models: tuple[nn.Module, nn.Module]) -> None:
    for one in models:
        one.drop.p, one.bn.eps, one.bn.momentum = 0.1, 0.5, 0.9
    check_same(*models, X)


def test_take_calls_of_another_form(models: tuple[nn.Module, nn.Module]) -> None:
    dense, adapted = (one.eval() for one in models)
    check_same(dense, adapted, X, 2.0)
    check_same(dense, adapted, X[:1], scale=3.0)
    assert torch.isfinite(adapted.half()(X.half())).all()


def test_take_a_module_with_two_names_for_one_site() -> None:
    plan = lora_fx.plan(Frozen().double(), LoraConfig(r=2), X, frontend="export")
    assert [row.name for row in plan] == ["fc", "shared"]
    adapted = lora_fx.rewrite(Frozen().double(), LoraConfig(r=2), X, frontend="export")
    trained = sum(p.numel() for p in lora_fx.trainable_parameters(adapted))
    assert plan.trainable_parameters == trained
    assert plan.sites[1].site.tied_to == ()


def _to_linears(hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda m, *args: hook(m, *args) if isinstance(m, nn.Linear) else None


_ALL = nn.modules.module
_HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda m, args, out: out * m.weight.norm()),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda m, args: args[0] * 3),
    "backward": lambda m: m.register_full_backward_hook(lambda m, g, out: (g[0] * 3,)),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, g: (g[0] * 3,)),
    "replaced": lambda m: setattr(m, "forward", lambda x: x * m.weight.sum()),
    "forward for all": lambda _: _ALL.register_module_forward_hook(
        _to_linears(lambda m, args, out: out * 3)
    ),
    "forward pre for all": lambda _: _ALL.register_module_forward_pre_hook(
        _to_linears(lambda m, args: args[0] * 3)
    ),
    "backward for all": lambda _: _ALL.register_module_full_backward_hook(
        _to_linears(lambda m, g, out: (g[0] * 3,))
    ),
}


@pytest.mark.parametrize("layer", ["bn", "fc"])
@pytest.mark.parametrize("what", _HOOKS)
def test_let_hooks_take_the_call_of_a_module(
    models: tuple[nn.Module, nn.Module], what: str, layer: str
) -> None:
    dense, adapted = (one.eval() for one in models)
    with torch.no_grad():
        before = adapted(X)
    handles = [_HOOKS[what](getattr(one, layer)) for one in (dense, adapted)]
    try:
        check_same(dense, adapted, X)
        if "backward" not in what and (layer == "fc" or "for all" not in what):
            assert not torch.allclose(adapted(X), before)
    finally:
        for handle in filter(None, handles):
            handle.remove()


@pytest.mark.parametrize("name", ["__call__", "forward"])
@pytest.mark.parametrize("cls", [Frozen, nn.BatchNorm1d])
def test_run_what_replaces_a_method_of_a_class(
    models: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch, cls: type, name: str
) -> None:
    before = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, *a, **named: before(self, *a, **named) * 3)
    check_same(*(one.eval() for one in models), X)


def test_run_a_forward_that_was_set_before() -> None:
    model = Frozen().double().eval()
    model.bn.forward = functools.partial(F.relu, inplace=False)
    model.shared.forward = MethodType(lambda self, x: self.weight.sum() * x, model.shared)
    dense, adapted = adapt(model, X, config=LoraConfig(r=2, target_modules=["fc"]))
    check_same(dense, adapted, X)
    for one in (dense, adapted):
        one.fc.forward = MethodType(lambda self, x: self.weight.sum() * x, one.fc)
    check_same(dense, adapted, X)


# --- programs that do more than a graph of operations says


class Net(nn.Module):
    """A product, and two layers with something between them."""

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor], **kept: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between
        for name, value in kept.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.between(self, self.fc(x @ self.w)))


class Draws(nn.Module):
    """Multiplies with random numbers in training, and adds some always."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.weight = 0.4, nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + torch.rand_like(x)) * self.weight
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1)).bernoulli_(1 - self.rate).div_(1 - self.rate)


class Slotted:
    __slots__ = ("k",)

    def __init__(self) -> None:
        self.k = 2.0

    def value(self) -> float:
        return self.k


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t, self.own = 1.5, Slotted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.t * self.own.k


def _two_names() -> Net:
    model = Net(lambda self, x: self.again(self.first(x)), first=Scaled())
    model.again = model.first
    return model


def _scale(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * self.scale


CELL, GLOBAL = [2.0], SimpleNamespace(factor=2.0, tensor=torch.tensor(2.0))


def _reset_globals() -> None:
    CELL[0], GLOBAL.factor = 2.0, 2.0
    GLOBAL.tensor = torch.tensor(2.0)


class Derived(Net):
    """Has a setting that is computed, and a method of its base."""

    @property
    def scale(self) -> float:
        return self.factor * 3

    def more(self) -> float:
        return 2.0


class Below(Derived):
    def more(self) -> float:
        return super().more() + 1


def _times(of: Callable[[Any], Any], **kept: Any) -> Net:
    return Net(lambda self, x: x * of(self), **kept)


# What makes a model, and how it is changed afterwards.
SETTINGS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "slots": (lambda: _times(lambda m: m.k.k, k=Slotted()), lambda m: setattr(m.k, "k", 3.0)),
    "two names": (_two_names, lambda m: setattr(m.first, "t", 3.0)),
    "an object under two names": (_two_names, lambda m: setattr(m.again.own, "k", 5.0)),
    "a function": (
        lambda: Net(lambda self, x: self.f(x), f=torch.relu),
        lambda m: setattr(m, "f", torch.tanh),
    ),
    "a partial": (
        lambda: Net(lambda self, x: self.f(x), f=functools.partial(torch.mul, other=2.0)),
        lambda m: setattr(m, "f", functools.partial(torch.mul, other=3.0)),
    ),
    "a method": (
        lambda: _times(lambda m: m.f(), f=(kept := Slotted()).value, kept=kept),
        lambda m: setattr(m.kept, "k", 3.0),
    ),
    "a closure": (
        lambda: (lambda cell: _times(lambda _: cell[0]))(CELL),
        lambda _: CELL.__setitem__(0, 3.0),
    ),
    "a global": (
        lambda: _times(lambda _: globals()["GLOBAL"].factor),
        lambda _: setattr(GLOBAL, "factor", 3.0),
    ),
    "a global tensor": (lambda: _times(lambda _: GLOBAL.tensor), lambda _: GLOBAL.tensor.fill_(3)),
    "a tensor": (
        lambda: _times(lambda m: m.t, t=torch.tensor(2.0)),
        lambda m: setattr(m, "t", torch.tensor(3.0)),
    ),
    "a tensor's number": (
        lambda: _times(lambda m: m.t.item(), t=torch.tensor(2.0)),
        lambda m: m.t.fill_(3.0),
    ),
    "a tensor in a list": (
        lambda: _times(lambda m: m.t[0], t=[torch.tensor(2.0)]),
        lambda m: m.t.__setitem__(0, torch.tensor(3.0)),
    ),
    "a property": (
        lambda: Derived(_scale, factor=0.5),
        lambda m: setattr(m, "factor", 2.0),
    ),
    "random numbers": (
        lambda: Net(lambda self, x: self.draws(x), draws=Draws()),
        lambda m: setattr(m.draws, "rate", 0.1),
    ),
    "random numbers, in evaluation": (
        lambda: Net(lambda self, x: self.draws(self.draws(x)), draws=Draws()),
        lambda m: m.draws.eval(),
    ),
}


@pytest.mark.parametrize("frontend", ["export", "auto"])
@pytest.mark.parametrize("what", SETTINGS)
def test_see_what_is_changed_later(what: str, frontend: str) -> None:
    make, change = SETTINGS[what]
    x = torch.randn(3, 4)
    _reset_globals()
    dense, adapted = adapt(make(), x, frontend)
    copied = copy.deepcopy(adapted)
    for training in (True, False):
        check_same(dense.train(training), adapted.train(training), x)
    torch.manual_seed(3)
    before = adapted.train()(x)
    for one in (dense.train(), adapted, copied.train()):
        change(one)
    check_same(dense, adapted, x)
    check_same(dense, copied, x)
    torch.manual_seed(3)
    assert not torch.allclose(adapted(x), before)


@pytest.mark.parametrize("frontend", ["export", "auto"])
@pytest.mark.parametrize(("cls", "name"), [(Below, "more"), (Derived, "more"), (Net, "forward")])
def test_run_a_method_that_is_replaced_in_a_base(
    cls: type[nn.Module], name: str, frontend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 4)
    dense, adapted = adapt(Below(lambda self, x: x * self.more()), x, frontend)
    check_same(dense, adapted, x)
    monkeypatch.setattr(
        cls, name, lambda self, x=None: 7.0 if x is None else self.fc(x) @ self.w, raising=False
    )
    check_same(dense, adapted, x)


def _count(kept: dict[str, float]) -> float:
    kept["n"] = kept.get("n", 0.0) + 1.0
    return kept["n"]


def _append(kept: list[float]) -> float:
    kept.append(1.0)
    return float(len(kept))


def _raise(kept: Any) -> float:
    kept.n += 1.0
    return float(kept.n)


def _from_the_third_on(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.stage = {"a": "b", "b": "c", "c": "c"}[model.stage]
    return x * 2 if model.stage == "c" else x


def _replace_buffer(model: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * model.n
    model.n = model.n + 1
    return x


def _write_buffer(model: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * model.n.clone()
    model.n += 1
    return x


def _register(model: Any, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(model, "places"):
        model.register_buffer("places", torch.arange(4.0), persistent=False)
    return x + model.places


def _with_buffer(between: Callable[[Any, torch.Tensor], torch.Tensor]) -> Net:
    model = Net(between)
    model.register_buffer("n", torch.ones(()))
    return model


def _keeps(kept: Any, then: Callable[[Any], float]) -> Net:
    return _times(lambda m: m.then(m.kept), kept=kept, then=then)


CHANGING: dict[str, Callable[[], nn.Module]] = {
    "a dict": lambda: _keeps({}, _count),
    "an object": lambda: _keeps(SimpleNamespace(n=0), _raise),
    "an attribute": lambda: Net(_from_the_third_on, stage="a"),
    "a buffer": lambda: _with_buffer(_replace_buffer),
    "a buffer in place": lambda: _with_buffer(_write_buffer),
    "a buffer that is registered": lambda: Net(_register),
    "a list in a dict": lambda: _keeps({"below": [1.0]}, lambda kept: _append(kept["below"])),
    "an iterator": lambda: _keeps(iter([float(n) for n in range(1, 20)]), next),
    "a generator of Python": lambda: _keeps(random.Random(0), lambda kept: kept.random()),
    "a generator of NumPy": lambda: _keeps(np.random.default_rng(0), lambda kept: kept.random()),
    "random numbers of Python": lambda: _keeps(None, lambda _: random.random()),
    "random numbers of NumPy": lambda: _keeps(None, lambda _: np.random.random()),
}


@pytest.mark.parametrize("frontend", ["export", "auto"])
@pytest.mark.parametrize("what", CHANGING)
def test_go_on_with_what_a_call_leaves_to_the_next_one(what: str, frontend: str) -> None:
    model, x = CHANGING[what]().eval(), torch.randn(3, 4)
    given = x.clone()
    dense, adapted = adapt(model, given, frontend)
    assert torch.equal(given, x)
    for _ in range(4):
        check_same(dense, adapted, x)


@pytest.mark.parametrize("inputs", [None, torch.randn(3, 4)])
def test_use_no_iterator_up(inputs: torch.Tensor | None) -> None:
    model = _keeps(iter([1.0, 2.0, 3.0]), next)
    captured = lora_fx.capture(model, inputs).model
    assert list(model.kept) == [1.0, 2.0, 3.0]
    assert list(captured.kept) == [1.0, 2.0, 3.0]


def test_leave_what_a_forward_changes_as_it_was() -> None:
    model = nn.Sequential(_keeps(SimpleNamespace(n=0), _raise), Net(_from_the_third_on, stage="a"))
    captured = lora_fx.capture(model, torch.randn(2, 4), frontend="export").model
    for one in (model, captured):
        assert (one[0].kept.n, one[1].stage) == (0, "a")


def test_give_gradients_through_a_buffer_that_is_written() -> None:
    x = torch.randn(3, 4)
    dense, adapted = adapt(_with_buffer(_write_buffer), x)
    for calls in (2.0, 3.0):
        check_same(dense, adapted, x)
        assert float(adapted.n) == calls
    before = adapted.fc.lora_B.default.grad
    adapted(x).sum().backward()
    assert before is None
    assert adapted.fc.lora_B.default.grad.any()


# --- decorators, other ways to a weight, and what travels


def _by_name(function: Any) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * (2 if kwargs else 3)

    return run


class Decorated(nn.Module):
    """Tells names from places, and reads the weight of its layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    @_by_name
    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            x = F.linear(x, self.fc.weight, self.fc.bias)
        return self.out(self.fc(x))


@pytest.mark.parametrize("frontend", ["export", "auto", "regions"])
@pytest.mark.parametrize("given", ["place", "name", "more names"])
def test_run_a_decorator_that_tells_names_from_places(given: str, frontend: str) -> None:
    x = torch.randn(3, 4)
    inputs = {"place": (x,), "name": {"x": x}, "more names": {"x": x, "scale": 2.0}}[given]
    dense, adapted = adapt(Decorated(), inputs, frontend)
    for rows in (x, x[0]):
        check_same(dense, adapted, rows)
        check_same(dense, adapted, rows, scale=2.0)
        assert_close(adapted(x=rows), dense(x=rows), 1e-5)


PAST: list[nn.Module] = []


def test_refuse_to_call_a_module_past_the_model() -> None:
    """It has no adapter, and shares the weight of one that has."""
    model, x = Net(lambda _, x: PAST[0](x)), torch.randn(3, 4)
    PAST[:] = [model.fc]
    try:
        with pytest.raises(CaptureError, match=r"fc\.weight is read by addmm .* without its adapt"):
            adapt(model, x)
    finally:
        PAST.clear()


def test_pickle_a_model_with_functions_and_properties() -> None:
    x = torch.randn(3, 4)
    dense, adapted = adapt(Derived(_scale, factor=0.5), x)
    again = pickle.loads(pickle.dumps(adapted))
    check_same(adapted, again, x)
    dense.factor = again.factor = 2.0
    check_same(dense, again, x)


def test_run_one_export_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """PyTorch keeps what it exports in global state."""
    own, inside, most = torch.export.export, [], []

    def export(*args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.2)
        try:
            return own(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(torch.export, "export", export)
    failures: list[BaseException] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # for the test's own thread
            failures.append(error)

    def capture() -> None:
        lora_fx.capture(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), frontend="export")

    def to_onnx() -> None:
        lora_fx.export_onnx(nn.Linear(4, 4), tmp_path / "a.onnx", torch.randn(2, 4), verify=False)

    threads = [threading.Thread(target=run, args=(work,)) for work in (capture, to_onnx, capture)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not failures
    assert len(most) >= 3
    assert set(most) == {1}
