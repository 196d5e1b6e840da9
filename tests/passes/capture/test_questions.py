"""What code asks PyTorch while it is exported: asked again at each call, or the export is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import CaptureError, LoraConfig
from lora_fx.passes.graph import graphs_of

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
Ask = Callable[[Tensor, Tensor], Any]


class Rounded(torch.autograd.Function):
    """Rounds, and lets gradients through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


ROUND = Rounded.apply  # a name that nothing can be put in the place of


class Asks(nn.Module):
    """Asks between two layers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        found = ASKED[self.name](x, h)
        if isinstance(found, Tensor):
            h = found
        elif found:
            h = h * 2
        result: Tensor = self.head(h)
        return result


ARGUMENTS: dict[str, Ask] = {
    "requires_grad": lambda x, h: x.requires_grad,
    "is_leaf": lambda x, h: x.is_leaf,
    "grad_fn": lambda x, h: x.grad_fn is None,
}
STATE: dict[str, Ask] = {
    "get_default_dtype": lambda x, h: torch.get_default_dtype() is torch.float32,
    "is_autocast_enabled": lambda x, h: torch.is_autocast_enabled("cuda"),
    "get_default_device": lambda x, h: torch.get_default_device().type == "meta",
    "tensor": lambda x, h: h * torch.tensor(1 / 3).to(h.dtype),
}
REFUSED: dict[str, Ask] = {
    "asks for requires_grad": lambda x, h: h.requires_grad,
    "asks for is_leaf": lambda x, h: h.is_leaf,
    "asks for _version": lambda x, h: x._version == 0,
    "asks PyTorch for the grad mode": lambda x, h: torch.is_grad_enabled(),
    "requires_grad_ of a tensor": lambda x, h: (x * 1).requires_grad_() + h,
    r"calls an autograd function \(Rounded\)": lambda x, h: ROUND(h),
}
ASKED = {**ARGUMENTS, **STATE, **REFUSED}


def exported(name: str) -> tuple[nn.Module, nn.Module]:
    model = Asks(name).eval()
    return model, lora_fx.rewrite(model, LoraConfig(r=2), X, frontend="export").eval()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_is_asked_of_an_argument_guards_the_graph(name: str) -> None:
    model, adapted = exported(name)
    assert f"x.{name} is not" in graphs_of(adapted)[""].python_code("self").src
    leaf = X.clone().requires_grad_()
    for one in (adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        for x in (X, leaf, leaf * 1):
            torch.testing.assert_close(one(x), model(x))


@pytest.mark.parametrize("name", STATE)
def test_how_pytorch_is_set_guards_the_graph(name: str) -> None:
    model, adapted = exported(name)
    asked = "get_default_dtype" if name == "tensor" else name
    assert f".{asked}(" in graphs_of(adapted)[""].python_code("self").src
    torch.testing.assert_close(adapted(X), model(X))
    model, adapted, x = model.double(), adapted.double(), X.double()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta" if name == "get_default_device" else "cpu"):
            torch.testing.assert_close(adapted(x), model(x), rtol=1e-12, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_guard_knows_is_refused(reason: str) -> None:
    with pytest.raises(CaptureError, match=f"{reason}.*frontend='regions' keeps it"):
        exported(reason)


def test_functions_of_pytorch_are_its_own_again() -> None:
    before = torch.is_grad_enabled, torch.get_default_dtype
    exported("requires_grad")
    with pytest.raises(CaptureError):
        exported("asks for is_leaf")
    assert (torch.is_grad_enabled, torch.get_default_dtype) == before
    assert "__getattribute__" not in vars(type(torch.autograd.Function))


class Checkpoints(nn.Module):
    """Asks for the grad mode as models do that can checkpoint their activations, and catches exceptions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.w = nn.Parameter(torch.randn(4, 4))
        self.checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            scale = 2.0
        except ValueError:
            scale = 1.0
        if torch.is_grad_enabled() and self.checkpointing:
            scale = scale * 3
        return self.head(self.fc(x) @ self.w * scale)


def test_a_grad_mode_that_decides_nothing_costs_no_graph() -> None:
    model = Checkpoints().eval()
    x = torch.randn(3, 4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["w"]), x).eval()
        assert lora_fx.plan(model, LoraConfig(r=2), x).frontend == "export"
        assert torch.equal(adapted(x), model(x))
        with torch.no_grad():
            assert torch.equal(adapted(x), model(x))
        adapted.checkpointing = True
        with pytest.raises(CaptureError, match="checkpointing was False when"):
            adapted(x)
