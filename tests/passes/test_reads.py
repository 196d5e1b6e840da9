from __future__ import annotations

import functools
import operator
import pickle
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.passes.graph.reads import ObjectRoot


def _without_its_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.enable_grad()(forward)


def _twice_around(forward: Callable[..., Any]) -> Callable[..., Any]:
    def outer(*args: Any) -> Any:
        return _without_its_name(forward)(*args)

    return outer


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @_without_its_name
    def forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.fc(x * (2 if name.startswith("a") else 3))

    @_twice_around
    def other(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_functions_that_decorators_hold_are_pickled_by_way_of_them() -> None:
    outer = Decorated.other
    inner = outer.__closure__[0].cell_contents
    for function in (Decorated.forward, Decorated.forward.__wrapped__, outer, inner):
        assert pickle.loads(pickle.dumps(ObjectRoot(function))).value is function


def test_an_export_of_a_decorated_forward_is_pickled() -> None:
    model, x = Decorated(), torch.randn(3, 4)
    config = LoraConfig(r=2, target_modules="all-linear")
    adapted = lora_fx.rewrite(model, config, (x, "a"), frontend="export")
    nn.init.normal_(adapted.fc.lora_B.default)
    loaded = pickle.loads(pickle.dumps(adapted))
    assert not torch.allclose(adapted(x, "a"), model(x, "a"))
    for name in ("a", "b"):
        torch.testing.assert_close(loaded(x, name), adapted(x, name))


def _doubled(forward: Callable[..., Any]) -> Callable[..., Any]:
    def outer(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * 2

    return outer


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.table = {"a": 0.5}

    @_doubled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if operator.itemgetter("a")(self.table) == 0.5 else x


def test_an_export_whose_decorator_hides_the_forward_is_pickled() -> None:
    model, x = _Around(), torch.randn(3, 4)
    config = LoraConfig(r=2, target_modules="all-linear")
    adapted = lora_fx.rewrite(model, config, (x,), frontend="export")
    nn.init.normal_(adapted.fc.lora_B.default)
    loaded = pickle.loads(pickle.dumps(adapted))
    torch.testing.assert_close(loaded(x), adapted(x))


@functools.singledispatch
def _factor(module: nn.Module) -> float:
    return 2.0


class _Dispatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * _factor(self)


def test_an_export_that_calls_a_dispatched_function_is_pickled() -> None:
    model, x = _Dispatched(), torch.randn(3, 4)
    config = LoraConfig(r=2, target_modules=["fc"])
    adapted = lora_fx.rewrite(model, config, (x,), frontend="export")
    torch.testing.assert_close(pickle.loads(pickle.dumps(adapted))(x), model(x))


class _WithProperty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @property
    def factor(self) -> float:
        return 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.factor


def test_an_export_is_pickled_after_what_it_called_was_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = _WithProperty(), torch.randn(3, 4)
    config = LoraConfig(r=2, target_modules=["fc"])
    adapted = lora_fx.rewrite(model, config, (x,), frontend="export")
    monkeypatch.setattr(_WithProperty, "factor", property(lambda self: 3.0))
    torch.testing.assert_close(pickle.loads(pickle.dumps(adapted))(x), model(x))


class _OfItsClass(nn.Module):
    kept = 2.0

    @classmethod
    def scale(cls) -> float:
        return cls.kept

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.scale()


def test_an_export_that_names_a_class_method_is_pickled() -> None:
    model, x = _OfItsClass(), torch.randn(3, 4)
    config = lora_fx.LoraConfig(r=2, target_modules=["fc"])
    adapted = lora_fx.rewrite(model, config, (x,), frontend="export")
    torch.testing.assert_close(pickle.loads(pickle.dumps(adapted))(x), model(x))


class _NotPickled(Decimal):
    def __reduce__(self) -> Any:
        raise RuntimeError("not to be pickled")


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), Decimal("0.5")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * float(self.scale)


@pytest.mark.parametrize("frontend", ["regions", "export"])
def test_an_object_that_cannot_be_pickled_differs_from_the_one_before(frontend: Any) -> None:
    model, x = _Scaled(), torch.randn(3, 4)
    config = LoraConfig(r=2, target_modules=["fc"])
    adapted = lora_fx.rewrite(model, config, (x,), frontend=frontend)
    torch.testing.assert_close(adapted(x), model(x))
    model.scale = adapted.scale = _NotPickled("3.0")
    torch.testing.assert_close(adapted(x), model(x))


class Turned(nn.Module):
    """Reads a weight in its own graph, in a way that a setting decides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.turned = nn.Parameter(torch.eye(4)), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.T if self.turned else self.weight)


def test_what_has_changed_in_a_pickled_export_is_named() -> None:
    x = torch.randn(2, 4)
    config = LoraConfig(r=2, target_modules=["weight"])
    adapted = lora_fx.rewrite(Turned(), config, (x,), frontend="export")
    loaded = pickle.loads(pickle.dumps(adapted))
    loaded.turned = False
    with pytest.raises(lora_fx.CaptureError, match=r"self\.turned was True .*, found False"):
        loaded(x)
