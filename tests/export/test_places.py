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
from lora_fx.export import onnx as exporting
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


def test_an_axis_that_was_asked_for_and_is_fixed_names_what_fixed_it(tmp_path: Path) -> None:
    example = (torch.randn(2, 3, 10, 12), torch.randn(2, 7, 4), torch.randn(2, 6))
    place = line(Fixing.forward, "self.conv(")
    message = (
        r"the given dynamic_shapes: axis 1 of 'image' is fixed, the model works with size 3 only: "
        rf"aten\.conv2d in 'conv' \({place}\)"
    )
    with pytest.raises(ExportError, match=message):
        export_onnx(Fixing(), tmp_path / "m.onnx", example, dynamic_shapes={"image": {1: "colors"}})


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_branch_on_values_is_named_once_and_no_graph_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    place = rf"a condition in '1' \({line(Branching.forward, 'x.sum()')}\) is data-dependent"
    with pytest.raises(
        ExportError, match=rf"every axis dynamic, .*with fixed axes: {place}"
    ) as caught:
        export_onnx(
            nn.Sequential(nn.Linear(4, 4), Branching()), tmp_path / "m.onnx", torch.randn(2, 4)
        )
    assert str(caught.value).count("data-dependent") == 1
    assert "def forward" not in capfd.readouterr().err
    assert not [one for one in caplog.records if one.levelname == "WARNING"]


class OnlySmall(nn.Module):
    """Takes neither a dynamic second axis, nor, at the conversion, a dynamic first one."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() and not isinstance(x.shape[1], int):
            raise ValueError("no dynamic second axis")
        return x + 1


def test_a_way_that_failed_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = exporting.convert
    calls = []

    def late(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise ConversionError("not with a dynamic batch")
        return convert(*args)

    monkeypatch.setattr(exporting, "convert", late)
    report = export_onnx(OnlySmall(), tmp_path / "m.onnx", torch.randn(2, 4))
    assert report.inputs == {"x": (2, 4)}
    said = "\n".join(one.getMessage() for one in caplog.records if one.levelname == "WARNING")
    assert said.count("no dynamic second axis") == 1
    assert said.count("not with a dynamic batch") == 1
    assert line(OnlySmall.forward, "raise") in said


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
