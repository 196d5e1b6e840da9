"""A whole-model graph over the regions: what export freezes is read again, or the call goes past it."""

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

CONFIG = LoraConfig(r=2)


def wrapped(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        return function(*args, **kwargs)

    return run


def twice_wrapped(function):
    return wrapped(wrapped(function))


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


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    x = torch.randn(6, 8)
    model = Frozen()
    return model, lora_fx.rewrite(model, CONFIG, x, frontend="export"), x


def same(model: nn.Module, adapted: nn.Module, *args: object) -> None:
    torch.manual_seed(3)
    expected = model(*args)
    torch.manual_seed(3)
    torch.testing.assert_close(adapted(*args), expected, rtol=1e-6, atol=1e-6)


def test_modes_follow_train_and_eval(models) -> None:
    model, adapted, x = models
    model = copy.deepcopy(model)
    for training in (True, False, True):
        same(model.train(training), adapted.train(training), x)
        assert torch.equal(model.bn.running_mean, adapted.bn.running_mean)
        assert model.bn.num_batches_tracked == adapted.bn.num_batches_tracked
    model.bn.eval(), adapted.bn.eval()
    same(model, adapted, x)


def test_settings_of_a_layer_are_read_when_it_runs(models) -> None:
    model, adapted, x = models
    for one in (model, adapted):
        one.drop.p, one.bn.eps, one.bn.momentum = 0.1, 0.5, 0.9
    same(copy.deepcopy(model).train(), adapted.train(), x)


def test_a_hook_that_waits_for_a_module_gets_its_call(models) -> None:
    model, adapted, x = models
    for one in (model, adapted):
        one.bn.register_forward_hook(lambda module, args, out: out * 3)
    same(model.eval(), adapted.eval(), x)


_GLOBAL = nn.modules.module
_TAKEN: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda bn: bn.register_forward_hook(lambda module, args, out: out * 3),
    "forward pre-hook": lambda bn: bn.register_forward_pre_hook(lambda module, args: args[0] * 3),
    "backward hook": lambda bn: bn.register_full_backward_hook(lambda m, grad, out: (grad[0] * 3,)),
    "backward pre-hook": lambda bn: bn.register_full_backward_pre_hook(
        lambda m, out: (out[0] * 3,)
    ),
    "forward": lambda bn: setattr(bn, "forward", lambda x: x * 3),
    "forward hook for all": lambda bn: _GLOBAL.register_module_forward_hook(
        lambda module, args, out: out * 3 if isinstance(module, nn.BatchNorm1d) else None
    ),
    "forward pre-hook for all": lambda bn: _GLOBAL.register_module_forward_pre_hook(
        lambda module, args: args[0] * 3 if isinstance(module, nn.BatchNorm1d) else None
    ),
    "backward hook for all": lambda bn: _GLOBAL.register_module_full_backward_hook(
        lambda module, grad, out: (grad[0] * 3,) if isinstance(module, nn.BatchNorm1d) else None
    ),
}


@pytest.mark.parametrize("what", _TAKEN)
def test_what_takes_the_call_of_a_module_gets_it(models, what: str) -> None:
    model, adapted, x = models
    handles = [_TAKEN[what](one.eval().bn) for one in (model, adapted)]
    try:
        gradients = []
        for one in (model, adapted):
            leaf = x.clone().requires_grad_()
            one(leaf).square().sum().backward()
            gradients.append(leaf.grad)
        same(model, adapted, x)
        torch.testing.assert_close(*gradients)
    finally:
        for handle in filter(None, handles):
            handle.remove()


@pytest.mark.parametrize("name", ["__call__", "forward"])
@pytest.mark.parametrize("cls", [Frozen, nn.BatchNorm1d])
def test_a_call_that_is_replaced_in_a_class_is_not_that_of_the_graph(
    models, monkeypatch: pytest.MonkeyPatch, cls: type, name: str
) -> None:
    model, adapted, x = models
    before = getattr(cls, name)
    model.eval(), adapted.eval()
    monkeypatch.setattr(cls, name, lambda self, *a, **named: before(self, *a, **named) * 3)
    expected = model(x)
    torch.testing.assert_close(adapted(x), expected)


def test_a_forward_that_was_set_before_is_part_of_the_graph() -> None:
    model, x = Frozen().eval(), torch.randn(6, 8)
    model.bn.forward = functools.partial(F.relu, inplace=False)
    model.shared.forward = MethodType(lambda self, x: self.weight.sum() * x, model.shared)
    adapted = lora_fx.rewrite(model, CONFIG, x, frontend="export")
    same(model, adapted, x)
    model.shared.forward = MethodType(lambda self, x: self.bias.sum() * x, model.shared)
    adapted.shared.forward = MethodType(lambda self, x: self.bias.sum() * x, adapted.shared)
    same(model, adapted, x)


def test_a_call_of_another_form_goes_through_the_modules(models) -> None:
    model, adapted, x = models
    model.eval(), adapted.eval()
    same(model, adapted, x, 2.0)
    same(model, adapted, x[:1])
    assert torch.isfinite(adapted.half()(x.half())).all()


def test_a_module_under_two_names_is_one_site(models) -> None:
    model, adapted, x = models
    plan = lora_fx.plan(model, CONFIG, x, frontend="export")
    assert [row.name for row in plan] == ["fc", "shared"]
    assert plan.trainable_parameters == sum(
        p.numel() for p in lora_fx.trainable_parameters(adapted)
    )
    assert plan.sites[1].site.tied_to == ()


def test_random_numbers_without_a_mode_are_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) + torch.rand_like(x)

    with pytest.raises(CaptureError, match="draws random numbers"):
        lora_fx.capture(Noisy(), torch.randn(2, 4), frontend="export")


def test_inputs_that_do_not_fit_are_named() -> None:
    with pytest.raises(CaptureError, match=r"do not fit Frozen\.forward"):
        lora_fx.capture(Frozen(), {"y": torch.randn(2, 8)}, frontend="export")


class Branches(nn.Module):
    """Export takes one branch of the mode for both; the regions do not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = x @ self.weight
        if self.training:
            h = h + 100
        return self.head(self.fc(h))


def test_auto_goes_back_to_the_regions_where_export_computes_something_else() -> None:
    x = torch.randn(3, 4)
    model = Branches().eval()
    adapted = lora_fx.rewrite(model, CONFIG, x)
    plan = lora_fx.plan(model, CONFIG, x)
    assert plan.frontend == lora_fx.capture(model, x).frontend == "regions", "the dry run says so"
    assert plan.notes[-1].startswith("not export: the captured model (export) computes")
    for training in (False, True):
        same(model.train(training), adapted.train(training), x)
    with pytest.raises(CaptureError, match="computes something else"):
        lora_fx.rewrite(model, CONFIG, x, frontend="export")


class Cached(nn.Module):
    """Has no graph, and reads the weight of its layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)

    @twice_wrapped
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = F.linear(x, self.fc.weight, self.fc.bias)
        return self.out(x)


def test_a_weight_that_code_reads_is_adapted_in_the_graph_alone() -> None:
    """A layer has it, but whoever goes past the graph does not call the layer."""
    x = torch.randn(2, 4)
    every = LoraConfig(r=2, target_modules=["fc", "out"])
    with pytest.raises(
        lora_fx.NoMatchError, match=r"fc: its weight is also read|also read by Cached"
    ):
        lora_fx.plan(Cached(), every, frontend="regions")  # it is read under two decorators
    adapted = lora_fx.rewrite(
        Cached(), LoraConfig(r=2, target_modules=["fc"]), x, frontend="export"
    )
    adapted(x)
    with pytest.raises(CaptureError, match=r"expected x.dim\(\) == 2, found 1"):
        adapted(x[0])


def test_what_a_forward_leaves_behind_is_put_back() -> None:
    class Settles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.config = SimpleNamespace(kind=None)

        def forward(self, x):
            if self.config.kind is None:
                self.config.kind = x.dtype
            return self.fc(x)

    captured = lora_fx.capture(Settles(), torch.randn(2, 4), frontend="export")
    assert captured.model.config.kind is None


@pytest.mark.parametrize("start", [0, 0.0])
def test_a_counter_in_python_is_refused(start) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.steps = start
            self.ready = False

        def forward(self, x):
            self.ready = True  # once and for all: no counter
            self.steps += 1
            return self.fc(x) * self.steps

    model = nn.Sequential(Counts(), nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=r"changes self\.0\.steps \(0.* became 1.*'regions'"):
        lora_fx.capture(model, torch.randn(2, 4), frontend="export")
    assert model[0].steps == start
    assert not model[0].ready
    captured = lora_fx.capture(model, torch.randn(2, 4)).model
    captured(torch.randn(2, 4))
    assert captured[0].steps == 1


def drop_depth(x, rate, training):
    if not training:
        return x
    return x * x.new_empty((x.shape[0], 1)).bernoulli_(1 - rate).div_(1 - rate)


class Depth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.4

    def forward(self, x):
        return drop_depth(x, self.rate, self.training)


class Deep(nn.Module):
    """Stochastic depth, of one module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.depth = Depth()

    def forward(self, x):
        x = x + self.depth(self.first(x))
        return x + self.depth(self.second(x))


def test_stochastic_depth_follows_its_module() -> None:
    model, x = Deep(), torch.randn(6, 8)
    adapted = lora_fx.rewrite(model, CONFIG, x, frontend="export")
    targets = [
        node.target for node in lora_fx.graphs(adapted)[""].nodes if node.op == "call_module"
    ]
    assert targets == ["depth", "depth"]
    for training in (True, False, True):
        same(model.train(training), adapted.train(training), x)
    for one in (model, adapted):
        one.depth.rate = 0.1
    same(model, adapted, x)
    model.depth.eval(), adapted.depth.eval()
    same(model, adapted, x)
    same(model, copy.deepcopy(adapted), x)


@pytest.mark.parametrize("name", ["shape", "weight", "two"])
def test_a_draw_that_is_not_the_whole_of_a_module_is_refused(name) -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8)) if name == "weight" else None

        def forward(self, x, y=None):
            noise = torch.rand_like(x)
            if name == "shape":
                return (x + noise)[:, :4]
            return (x + noise, noise) if name == "two" else (x + noise) * self.weight

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.draws = Draws()

        def forward(self, x):
            return self.draws(self.fc(x))

    with pytest.raises(CaptureError, match="draws draws random numbers"):
        lora_fx.capture(Holds(), torch.randn(6, 8), frontend="export")


class _Keeps(nn.Module):
    """Multiplies with something that is other at each call."""

    def __init__(self, kept: Any, then: Callable[[Any], float]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.kept, self.then = kept, then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.then(self.kept)


class _WithWeight(_Keeps):
    """Has a product that only an export sees."""

    def __init__(self, kept: Any, then: Callable[[Any], float]) -> None:
        super().__init__(kept, then)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ self.weight


def _count(kept: dict[str, float]) -> float:
    kept["n"] = kept.get("n", 0.0) + 1.0
    return kept["n"]


def _append(kept: list[float]) -> float:
    kept.append(1.0)
    return float(len(kept))


def _set(kept: SimpleNamespace) -> float:
    kept.n += 1.0
    return float(kept.n)


@pytest.mark.parametrize(
    ("make", "then"),
    [
        (dict, _count),
        (lambda: {"n": 1.0}, _count),
        (lambda: {"below": [1.0]}, lambda kept: _append(kept["below"])),
        (lambda: SimpleNamespace(n=1.0), _set),
        (lambda: iter([1.0, 2.0, 3.0, 4.0, 5.0]), next),
        (lambda: random.Random(0), lambda kept: kept.random()),
        (lambda: np.random.default_rng(0), lambda kept: float(kept.random())),
        (lambda: None, lambda _: random.random()),
    ],
)
def test_what_a_forward_keeps_between_calls_is_refused(
    make: Callable[[], Any], then: Callable[[Any], float]
) -> None:
    model, x = _Keeps(make(), then).eval(), torch.randn(3, 4)
    with pytest.raises(CaptureError, match="which a graph would not: frontend='regions'"):
        lora_fx.rewrite(model, LoraConfig(r=2, target_modules="all-linear"), x, frontend="export")


@pytest.mark.parametrize(
    ("make", "then"),
    [
        (dict, _count),
        (lambda: {"below": [1.0]}, lambda kept: _append(kept["below"])),
        (lambda: SimpleNamespace(n=1.0), _set),
        (lambda: random.Random(0), lambda kept: kept.random()),
        (lambda: np.random.default_rng(0), lambda kept: float(kept.random())),
    ],
)
def test_an_export_that_is_given_up_leaves_no_state_behind(
    make: Callable[[], Any], then: Callable[[Any], float]
) -> None:
    model, x = _WithWeight(make(), then).eval(), torch.randn(3, 4)
    config = LoraConfig(r=2, target_modules="all-linear")
    adapted = lora_fx.rewrite(model, config, x)
    assert any("which a graph would not" in note for note in require_record(adapted).base.notes)
    for _ in range(2):
        torch.testing.assert_close(adapted(x), model(x))


def test_a_buffer_that_is_written_into_can_be_differentiated_through() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            return self.fc(x * self.steps)

    model, x = Steps(), torch.randn(3, 4)
    config = LoraConfig(r=2, target_modules="all-linear")
    adapted = lora_fx.rewrite(model, config, x, frontend="export")
    for calls in (1, 2):
        adapted(x).sum().backward()
        torch.testing.assert_close(adapted.steps, torch.tensor(float(calls)))
    # B is zero at first: its gradient is the only one.
    inner = x @ adapted.fc.lora_A.default.T
    wanted = (1 + 2) * inner.sum(0).expand(4, 2) * (config.lora_alpha / config.r)
    torch.testing.assert_close(adapted.fc.lora_B.default.grad, wanted)


def test_an_iterator_is_not_used_up_by_a_trace() -> None:
    model = _Keeps(iter([1.0, 2.0, 3.0]), next)
    captured = lora_fx.capture(model).model
    assert list(captured.kept) == list(model.kept) == [1.0, 2.0, 3.0]


def test_one_export_at_a_time(monkeypatch, tmp_path):
    """PyTorch keeps what it exports in global state, and so does what takes notes meanwhile."""
    own, inside, most = torch.export.export, [], []

    def export(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.2)
        try:
            return own(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(torch.export, "export", export)
    before = nn.Module.__getattribute__, nn.Module.__getattr__
    failures: list[BaseException] = []

    def run(work):
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # for the test's own thread
            failures.append(error)

    def capture():
        lora_fx.capture(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), frontend="export")

    def to_onnx():
        lora_fx.export_onnx(nn.Linear(4, 4), tmp_path / "a.onnx", torch.randn(2, 4), verify=False)

    threads = [threading.Thread(target=run, args=(work,)) for work in (capture, to_onnx, capture)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not failures
    assert len(most) >= 3
    assert set(most) == {1}
    assert (nn.Module.__getattribute__, nn.Module.__getattr__) == before


SHIFT = torch.tensor(2.0)


class Held(nn.Module):
    """Tensors that are no parameters and no buffers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.way = way
        self.one, self.several = torch.tensor(2.0), [torch.tensor(2.0)]
        self.named = {"a": torch.tensor(2.0)}

    def forward(self, x):
        x = self.fc(x)
        if self.way == "attribute":
            return x * self.one
        if self.way == "number":
            return x * self.one.item()
        if self.way == "list":
            return x * self.several[0]
        if self.way == "dict":
            return x * self.named["a"]
        return x * SHIFT

    def hold(self, tensor: torch.Tensor) -> None:
        self.one, self.several, self.named["a"] = tensor, [tensor], tensor


@pytest.mark.parametrize("way", ["attribute", "number", "list", "dict", "global"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_tensor_that_is_held_somewhere_may_change(way, copied, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "SHIFT", torch.tensor(2.0))
    x, base = torch.randn(2, 8), Held(way)
    config = LoraConfig(r=2, target_modules=["fc"])
    model = lora_fx.rewrite(base, config, frontend="export", example_inputs=(x,))
    with torch.no_grad():
        model.fc.lora_B.default.normal_()
    model = copy.deepcopy(model) if copied else model
    wanted = model.fc(x)
    torch.testing.assert_close(model(x), 2 * wanted)
    monkeypatch.setitem(globals(), "SHIFT", torch.tensor(3.0))
    model.hold(SHIFT)
    torch.testing.assert_close(model(x), 3 * wanted)
    SHIFT.fill_(4.0)
    torch.testing.assert_close(model(x), 4 * wanted)
    SHIFT.fill_(2.0)
    torch.testing.assert_close(model(x), 2 * wanted)


class _Slotted:
    __slots__ = ("k",)

    def __init__(self) -> None:
        self.k = 2


class _Settled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.setting = nn.Linear(8, 8), _Slotted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if self.setting.k == 3 else torch.tanh(x)


class _TwoNames(nn.Module):
    """torch.export hands out stand-ins for the modules of such a model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), _Settled()
        self.alias = self.block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.alias(self.block(self.first(x)))


def test_settings_of_a_module_with_two_names_are_noted() -> None:
    model, x = _TwoNames(), torch.randn(3, 8)
    adapted = lora_fx.rewrite(model, CONFIG, (x,), frontend="export")
    torch.testing.assert_close(adapted(x), model(x))
    adapted.block.setting.k = model.block.setting.k = 3
    torch.testing.assert_close(adapted(x), model(x))


def _more_for_names(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        return function(*args, **kwargs) * (2 if kwargs else 3)

    return run


class _ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @_more_for_names
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@pytest.mark.parametrize("named", [False, True])
def test_a_decorator_that_tells_names_from_places_has_no_graph(named: bool) -> None:
    x = torch.randn(3, 8)
    with pytest.raises(CaptureError, match="computes something else than the original"):
        lora_fx.rewrite(_ByName(), CONFIG, {"x": x} if named else (x,), frontend="export")


def _scaled(x: torch.Tensor, k: float) -> torch.Tensor:
    return x * k


class _Calls:
    def __init__(self, k: float) -> None:
        self.k = k

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.k


def _around(k: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * k


class _Holds(nn.Module):
    """Calls what it holds."""

    def __init__(self, held: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.held = nn.Linear(8, 8), held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.held(self.fc(x))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.relu, torch.tanh),
        (functools.partial(_scaled, k=2.0), functools.partial(_scaled, k=3.0)),
        (_around(2.0), _around(3.0)),
        (lambda x, k=2.0: x * k, lambda x, k=3.0: x * k),
        (_Calls(2.0), _Calls(3.0)),
        (_Calls(2.0).__call__, _scaled.__get__(torch.ones(8))),
    ],
)
def test_a_function_that_a_module_holds_is_noted(first, second) -> None:
    model, x = _Holds(first), torch.randn(3, 8)
    captured = lora_fx.capture(model, (x,), frontend="export").model
    torch.testing.assert_close(captured(x), first(model.fc(x)))
    captured.held = second
    torch.testing.assert_close(captured(x), second(model.fc(x)))


def test_a_function_that_a_module_holds_travels() -> None:
    model, x = _Holds(functools.partial(_scaled, k=2.0)), torch.randn(3, 8)
    config = LoraConfig(r=2, target_modules=["fc"])
    captured = lora_fx.rewrite(model, config, (x,), frontend="export")
    for twin in (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        torch.testing.assert_close(twin(x), captured(x))
        twin.held = functools.partial(_scaled, k=3.0)
        torch.testing.assert_close(twin(x), captured(x) * 1.5)


class _Leaves(nn.Module):
    """Leaves something behind that its next call reads."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.fc, self.what = nn.Linear(8, 8), what
        self.register_buffer("n", torch.ones(()))
        self.flag, self.name = False, "a"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        if self.what == "buffer":
            x = x * self.n
            self.n = self.n + 1
        if self.what == "flag":
            x = x if self.flag else x * 2
            self.flag = True
        if self.what == "string":
            x = x * len(self.name)
            self.name = self.name + "a"
        if self.what == "buffer in place":
            x = x * self.n.clone()
            self.n += 1
        if self.what == "written first":
            self.flag = True
            x = x * 3 if self.flag else x
        return x


@pytest.mark.parametrize("what", ["buffer", "flag", "string"])
def test_what_a_call_leaves_to_the_next_one_has_no_graph(what: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), _Leaves(what)), torch.randn(3, 8)
    with pytest.raises(CaptureError, match=r"in a second call \(its forward"):
        lora_fx.rewrite(model, CONFIG, (x,), frontend="export")
    _check_calls(model, x, "auto")


@pytest.mark.parametrize("what", ["buffer in place", "written first"])
def test_what_a_graph_leaves_itself_has_one(what: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), _Leaves(what)), torch.randn(3, 8)
    _check_calls(model, x, "export")


def _check_calls(model: nn.Module, x: torch.Tensor, frontend: Any) -> None:
    adapted = lora_fx.rewrite(model, CONFIG, (x,), frontend=frontend)
    for _ in range(3):
        found = adapted(x)
        found.sum().backward()
        torch.testing.assert_close(found, model(x))


_PAST: list[nn.Module] = []


class _GoesPast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        _PAST[:] = [self.fc]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(_PAST[0](self.fc(x)))


def test_a_weight_that_code_gets_to_past_the_model_is_no_constant() -> None:
    try:
        with pytest.raises(CaptureError, match=r"its code gets to fc\.weight past the model"):
            lora_fx.capture(_GoesPast(), torch.randn(3, 8), frontend="export")
    finally:
        _PAST.clear()


def kept_in(values: list[float], owner: SimpleNamespace) -> Callable[[], float]:
    def kept() -> float:
        return values[0] * owner.k

    return kept


class Scale:
    """What a method belongs to that a module holds."""

    def __init__(self, k: float) -> None:
        self.k = k

    def value(self) -> float:
        return self.k


class Roundabout(nn.Module):
    """Numbers that its code comes to by way of functions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.cell = [2.0]
        self.owner = SimpleNamespace(k=3.0)
        self.kept = kept_in(self.cell, self.owner)
        self.scale = Scale(2.0)
        self.method = self.scale.value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(x) * self.kept() * self.method())


def _scale(model: Roundabout) -> None:
    model.scale.k = 5.0


def _cell(model: Roundabout) -> None:
    model.cell[0] = 5.0


def _owner(model: Roundabout) -> None:
    model.owner.k = 5.0


@pytest.mark.parametrize("change", [_scale, _cell, _owner])
def test_what_functions_of_a_module_hold_is_compared(change: Callable[[Roundabout], None]) -> None:
    model, x = Roundabout(), torch.randn(3, 4)
    adapted = lora_fx.rewrite(model, CONFIG, x, frontend="export")
    same(model, adapted, x)
    change(model)
    change(adapted)
    same(model, adapted, x)


CALLS = [0]
TIMES = 0


class Late(nn.Module):
    """What it does in the first two calls says nothing about the third."""

    def __init__(self, way: Callable[[Any], bool]) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.way, self.stage, self.warm, self.calls = way, "a", False, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        if self.way(self):
            h = h * 2
        return self.head(h)


def _stages(model: Any) -> bool:
    model.stage = {"a": "b", "b": "c", "c": "c"}[model.stage]
    return bool(model.stage == "c" and model.warm)


def _from_the_second_on(model: Any) -> bool:
    if model.warm:
        model.calls += 1
    model.warm = True
    return bool(model.calls > 2)


def _in_a_list(model: Any) -> bool:
    CALLS[0] += 1
    return CALLS[0] > 100


def _in_a_global(model: Any) -> bool:
    global TIMES  # noqa: PLW0603  # what is tested
    TIMES += 1
    return TIMES > 100


@pytest.mark.parametrize("way", [_stages, _from_the_second_on, _in_a_list, _in_a_global])
def test_what_matters_from_the_third_call_on_is_refused(way: Callable[[Any], bool]) -> None:
    with pytest.raises(CaptureError, match="which a graph would not"):
        lora_fx.rewrite(Late(way).eval(), CONFIG, torch.randn(3, 4), frontend="export")


class Derived(nn.Module):
    """Has a setting that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.factor = 0.5

    @property
    def scale(self) -> float:
        return self.factor

    def forward(self, x):
        return self.fc(x) * self.scale


def test_an_export_that_reads_properties_can_be_pickled() -> None:
    x = torch.randn(2, 4)
    config = LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    model = lora_fx.rewrite(Derived(), config, x, frontend="export")
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


class Counted:
    """What a block has beside its parameters."""

    def __init__(self) -> None:
        self.k = 2.0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t, self.own = 1.0, Counted()

    def forward(self, x):
        return x * self.t * self.own.k


class TwoNames(nn.Module):
    """A module under two names: torch.export hands out stand-ins for all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Scaled()
        self.again = self.first
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.again(self.first(x)))


@pytest.mark.parametrize(
    "change", [lambda m: setattr(m.first, "t", 3.0), lambda m: setattr(m.again.own, "k", 5.0)]
)
def test_what_a_module_under_two_names_has_is_guarded(change) -> None:
    x = torch.randn(2, 3, 4)
    model = TwoNames()
    config = lora_fx.LoraConfig(r=2, target_modules=["fc"])
    adapted = lora_fx.rewrite(model, config, frontend="export", example_inputs=(x,))
    assert torch.allclose(adapted(x), model(x))
    change(model)
    change(adapted)
    assert torch.allclose(adapted(x), model(x))


def doubled(forward):
    @functools.wraps(forward)
    def inner(*args, **kwargs):
        return forward(*args, **kwargs) * (2 if kwargs else 3)

    return inner


class TellsKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

    @doubled
    def forward(self, x, **more):
        return self.out(self.fc(x))


def test_a_decorator_that_asks_for_keywords_is_seen_beside_other_keywords() -> None:
    model, x = TellsKeywords(), torch.randn(2, 3, 6)
    config = LoraConfig(r=2, target_modules=["fc"])
    given = {"x": x, "scale": 2.0}
    with pytest.raises(CaptureError):
        lora_fx.rewrite(model, config, given, frontend="export")


TABLE_OF_GLOBALS = SimpleNamespace(factor=2.0)


def test_a_global_that_an_inner_function_looks_up_by_its_name_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (lambda t: t * globals()["TABLE_OF_GLOBALS"].factor)(self.fc(x))

    model, x = Looks(), torch.randn(2, 4)
    config = LoraConfig(r=2, target_modules=["fc"])
    adapted = lora_fx.rewrite(model, config, x, frontend="export")
    torch.testing.assert_close(adapted(x), model(x))
    monkeypatch.setattr(TABLE_OF_GLOBALS, "factor", 3.0)
    torch.testing.assert_close(adapted(x), model(x))


class Code(nn.Module):
    """Has a child with the name of an attribute of fx.GraphModule."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.code = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.code(self.fc(x))


def test_a_program_that_pytorch_makes_no_module_of_is_named() -> None:
    model, config, x = Code(), LoraConfig(r=2, target_modules=["fc", "code"]), torch.randn(2, 3, 4)
    with pytest.raises(CaptureError, match="a program of Code that PyTorch makes no module of"):
        lora_fx.rewrite(model, config, (x,), frontend="export")
    torch.testing.assert_close(lora_fx.rewrite(model, config, (x,))(x), model(x))


class Registers(nn.Module):
    """Registers a buffer in its forward: the program of torch.export writes it into x."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if not hasattr(self, "places"):
            places = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            self.register_buffer("places", places, persistent=False)
        return self.fc(x + self.places)


def test_a_program_that_writes_into_what_it_is_given() -> None:
    model, config, x = Registers(), LoraConfig(r=2, target_modules=["fc"]), torch.randn(2, 3, 4)
    with pytest.raises(CaptureError, match="computes something else than the original"):
        lora_fx.rewrite(model, config, (x,), frontend="export")
    before = x.clone()
    lora_fx.rewrite(model, config, (x,))(x)
    assert torch.equal(x, before)


class _Above(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def factor(self) -> float:
        return 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.factor()


class _Below(_Above):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below, self.w = _Below(), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.below(x @ self.w)


@pytest.mark.parametrize(
    ("cls", "name"), [(_Below, "factor"), (_Above, "factor"), (_Above, "forward")]
)
def test_what_code_gets_to_by_super_is_read(
    cls: type[nn.Module], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, x = LoraConfig(r=2, target_modules=["fc", "w"]), torch.randn(3, 4)
    adapted = lora_fx.rewrite(_Around(), config, (x,), frontend="export")
    adapted(x)
    monkeypatch.setattr(
        cls, name, lambda self, *args: self.fc(*args) if args else 3.0, raising=False
    )
    with pytest.raises(CaptureError, match="Put it back"):
        adapted(x)
