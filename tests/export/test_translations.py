"""Operations that torch.onnx does not translate by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lora_fx
from tests.numerics import assert_close


class Attention(nn.Module):
    """Of any number of axes."""

    def __init__(self, causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.causal, self.scale = causal, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal, scale=self.scale
        )


@pytest.mark.parametrize("leading", [(2,), (2, 3, 2)], ids=["3 axes", "5 axes"])
@pytest.mark.parametrize("kind", ["plain", "causal", "boolean", "added"])
def test_attention(leading: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    q, k, v = (torch.randn(*leading, size, 4) for size in (5, 6, 6))
    masks = {"boolean": torch.rand(5, 6) > 0.3, "added": torch.randn(*leading, 5, 6)}
    if kind == "boolean":
        masks[kind][:, 0] = True  # no row without a position: its softmax is arbitrary
    given = (q, k, v, masks[kind]) if kind in masks else (q, k, v)
    model = Attention(kind == "causal", 0.3 if kind == "added" else None)
    path = tmp_path / "m.onnx"
    lora_fx.export_onnx(model, path, given, verify=False)

    (got,) = lora_fx.OnnxSession(path, "cpu").run(given).values()

    assert_close(got, model(*given), 1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_rotary_embedding_with_complex_numbers(batch: int, tmp_path: Path) -> None:
    class Rotary(nn.Module):
        """As in Llama 4: angles as complex numbers, with an axis put in."""

        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(-2).unsqueeze(0)
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns).flatten(3)

    x, angles = torch.randn(2, 5, 3, 8), torch.randn(5, 4)
    path = tmp_path / "m.onnx"
    report = lora_fx.export_onnx(Rotary(), path, (x, angles))

    assert report.verified
    given = (torch.randn(batch, 5, 3, 8), angles)
    (got,) = lora_fx.OnnxSession(path, "cpu").run(given).values()
    assert_close(got, Rotary()(*given), 1e-6)


class Masked(nn.Module):
    """Older models compute with ``1.0 - attention_mask``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.fc(x) * (1.0 - mask)[..., None]


@pytest.mark.parametrize("dtype", [torch.long, torch.uint8])
def test_a_number_minus_a_mask_of_whole_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    mask = torch.tensor([0, 1, 2], dtype=dtype)
    report = lora_fx.export_onnx(Masked().eval(), tmp_path / "m.onnx", (torch.randn(3, 4), mask))
    assert report.verified


class Pooled(nn.Module):
    """Zeros around an image win over its negative values, or lose (-inf)."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pad = nn.ConstantPad2d(1, value)
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.pad(self.conv(x) - 3))


@pytest.mark.parametrize("value", [0.0, -100.0])
@pytest.mark.parametrize("optimize", ["none", "standard", "runtime"])
def test_zeros_before_a_maximum(value: float, optimize: Any, tmp_path: Path) -> None:
    model, x = Pooled(value).eval(), torch.randn(2, 3, 9, 9)
    assert lora_fx.export_onnx(model, tmp_path / "m.onnx", x, optimize=optimize).verified
    stock = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (got,) = stock.run(None, {stock.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(got), model(x), 1e-5)


class Squeezed(nn.Module):
    """PyTorch squeezes an axis of another size than 1 into itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(1) * 2 + x.unsqueeze(1).squeeze(1)


class SqueezedTwice(nn.Module):
    """As above, for several axes, and as an output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.squeeze(1), x.squeeze((1, 2)) + x.unsqueeze(1).squeeze((1, 2))


@pytest.mark.parametrize("model", [Squeezed(), SqueezedTwice()])
def test_axes_that_cannot_be_squeezed(model: nn.Module, tmp_path: Path) -> None:
    report = lora_fx.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 5, 3))
    assert report.verified


@pytest.mark.parametrize("value", [True, False])
def test_sums_over_truth(value: bool, tmp_path: Path) -> None:
    class Truth(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ops.aten._is_all_true(x), torch.ops.aten._is_any_true(x)

    path = tmp_path / "m.onnx"
    lora_fx.export_onnx(Truth(), path, torch.tensor([[True, False], [True, True]]))

    mixed = torch.tensor([[True, False], [False, True]])
    whole = torch.full((2, 2), value)
    session = lora_fx.OnnxSession(path, "cpu")
    assert [bool(one) for one in session.run([mixed]).values()] == [False, True]
    assert [bool(one) for one in session.run([whole]).values()] == [value, value]


class Halved(nn.Module):
    """One weight that is computed from another, and one that is adapted in the same graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        parametrizations.orthogonal(self, "a")
        self.norm = parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x):
        return self.norm((x @ self.a).tanh() @ self.b)


@pytest.mark.parametrize("adapters", [None, "inputs"])
def test_weights_that_are_computed_beside_an_adapter(adapters: str | None, tmp_path: Path) -> None:
    base, x = Halved(), torch.randn(3, 6)
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=2, target_modules=["b"])).eval()
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.normal_()
    lora_fx.export_onnx(model, tmp_path / "m.onnx", x, adapters=adapters)
    session = lora_fx.OnnxSession(tmp_path / "m.onnx", "cpu")
    if adapters:
        session.load_adapter("a", model)
    found = session.run(x, adapter="a" if adapters else None)["output"]
    assert not torch.allclose(model(x), base(x), rtol=1e-2)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)


def test_parametrized_weights_are_constants_and_the_model_keeps_its_own(tmp_path: Path) -> None:
    model = nn.Sequential(
        parametrizations.orthogonal(nn.Linear(6, 6)),
        parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.Linear(8, 4),
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model]

    path = tmp_path / "m.onnx"
    report = lora_fx.export_onnx(model, path, torch.randn(3, 6))

    assert report.verified
    assert report.nodes == 3
    assert [type(module) for module in model] == classes
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model(torch.randn(3, 6)).sum().backward()
    assert model[0].parametrizations.weight.original.grad is not None
