"""What an export fixes or refuses comes with the operation, the module and the user's line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.convert import ConversionError
from lora_fx.export.onnx import export_onnx


def line(function: Callable[..., object], text: str) -> str:
    """``test_places.py:12``, the line of ``function`` that holds ``text``."""
    lines, first = inspect.getsourcelines(function)
    (offset,) = [index for index, line in enumerate(lines) if text in line]
    return f"{Path(__file__).name}:{first + offset}"


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 7, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class Fixing(nn.Module):
    """Fixes axes in every way: by a weight, by a buffer, by a view, by a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.positions = Positions()

    def forward(self, image: Tensor, tokens: Tensor, rest: Tensor) -> tuple[Tensor, ...]:
        if rest.shape[1] == 6:
            rest = rest + 1
        return self.conv(image), self.positions(tokens), rest.reshape(2, -1)


@pytest.mark.parametrize("adapters", ["merge", "inputs"])
def test_an_axis_that_stays_fixed_names_what_fixed_it(tmp_path: Path, adapters: Any) -> None:
    example = (torch.randn(2, 3, 10, 12), torch.randn(2, 7, 4), torch.randn(2, 6))
    report = export_onnx(Fixing(), tmp_path / "m.onnx", example, adapters=adapters)
    assert report.inputs["image"] == ("batch", 3, "height", "width")
    forward = Fixing.forward
    assert report.fixed_axes == {
        "image[1]": "the model works with size 3 only: aten.conv2d in 'conv' "
        f"({line(forward, 'self.conv(')})",
        "tokens[1]": "the model works with size 7 only: aten.add in 'positions' "
        f"({line(Positions.forward, 'self.table')})",
        "tokens[2]": "the model works with size 4 only: aten.add in 'positions' "
        f"({line(Positions.forward, 'self.table')})",
        "rest[0]": f"the model works with size 2 only: aten.reshape ({line(forward, 'reshape')})",
        "rest[1]": f"the model works with size 6 only: a condition ({line(forward, '== 6')})",
    }


class Decomposing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.spectrum = nn.Sequential(nn.Identity(), Decomposing())

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.spectrum(x @ x.mT)


@pytest.mark.parametrize("adapters", ["merge", "inputs"])
def test_an_operation_without_translation_comes_with_its_place(
    tmp_path: Path, adapters: Any
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(ConversionError) as caught:
        export_onnx(
            Unsupported(), tmp_path / "m.onnx", torch.randn(2, 4, 4), force=True, adapters=adapters
        )
    message = str(caught.value)
    where = line(Decomposing.forward, "eigvalsh")
    assert f"cannot convert aten._linalg_eigh in 'spectrum.1' ({where})" in message
    assert "No ONNX function found" in message
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Normed()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Adding()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Adding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def traced(model: nn.Module) -> nn.Module:
    return torch.fx.symbolic_trace(model)


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (torch.randn(3, 4),)).module()


@pytest.mark.parametrize(
    ("captured", "build", "message"),
    [
        (traced, Dropping, "random.*Dropout"),
        (exported, Dropping, "random.*Dropout"),
        (exported, Normed, "trains its batch norm.*aten.batch_norm"),
    ],
)
def test_a_graph_captured_in_train_mode_is_refused(
    tmp_path: Path,
    captured: Callable[[nn.Module], nn.Module],
    build: type[nn.Module],
    message: str,
) -> None:
    with pytest.raises(ExportError, match=f"{message}.*captured in train mode"):
        export_onnx(captured(build().train()), tmp_path / "m.onnx", torch.randn(3, 4))
    assert not list(tmp_path.iterdir())
    assert export_onnx(captured(build().eval()), tmp_path / "m.onnx", torch.randn(3, 4)).verified


def test_a_random_operation_comes_with_its_place(tmp_path: Path) -> None:
    where = line(Adding.forward, "randn_like").replace(".", r"\.")
    message = rf"random in eval mode: RandomNormalLike in 'inner' \({where}\)"
    with pytest.raises(ExportError, match=message):
        export_onnx(Noisy(), tmp_path / "m.onnx", torch.randn(2, 4))


def test_batch_norm_without_running_statistics_is_no_train_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))
    dynamic = {"input": {}}
    report = export_onnx(
        model, tmp_path / "m.onnx", torch.randn(3, 4), dynamic_shapes=dynamic, verify=False
    )
    assert report.nodes
