"""Targets without an ONNX file, as far as they go without their runtimes: tests/runtimes has the rest."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import ExportError, LoraConfig
from lora_fx.export.arguments import Arguments
from lora_fx.export.copy import Casts, exportable_twin
from lora_fx.export.factor_model import FactorModel, swappable
from lora_fx.export.targets.programs import direct_products, fed_values
from lora_fx.export.trace import trace
from tests.algebra import randomize
from tests.export import swapping
from tests.numerics import assert_close

RUNTIMES = ["openvino", "executorch"]


def adapted(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    config = LoraConfig(r=3, target_modules=["0", "2"], **options)
    return randomize(lora_fx.rewrite(model, config)).eval()


@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "text-generation"}, "leave task out"),
        ({"adapters": "bank"}, "give adapters='inputs'"),
        ({"dtype": "bf16"}, "has no bf16"),
        ({"opset": 20}, "has no opset"),
        ({"optimize": "runtime"}, "has no optimize"),
        ({"quantize": "int8"}, "has no quantize"),
        ({"adapters": "inputs", "required_inputs": True}, "has no required_inputs"),
        ({"max_rank": 4}, "leave them out"),
        ({"adapters": "inputs", "max_rank": 0}, "max_rank=0"),
    ],
    ids=str,
)
def test_refuse_what_the_runtime_has_no_form_for(
    target: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        lora_fx.export_onnx(
            adapted(), tmp_path / "out", torch.randn(2, 6), target=target, **options
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", RUNTIMES)
def test_a_missing_runtime_has_the_command_that_installs_it(target: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec(target) is not None:
        pytest.skip(f"{target} is installed")
    with pytest.raises(ExportError, match=rf"pip install 'lora-fx\[{target}\]'"):
        lora_fx.export_onnx(adapted(), tmp_path / "out", torch.randn(2, 6), target=target)


def test_fixed_axes_are_those_of_the_example(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the sizes of the example"):
        lora_fx.export_onnx(
            adapted(),
            tmp_path / "out",
            torch.randn(2, 6),
            target="executorch",
            dynamic_shapes={"input": {0: "batch"}},
        )


def flat(model: nn.Module, example: object, rank: int) -> FactorModel:
    made = swappable(model)
    twin = exportable_twin(made.model, None, Casts(lambda tensor: tensor))
    result = FactorModel(made, twin, Arguments.of(twin, example)).eval()
    result.rank = rank
    return result


def test_a_program_of_one_rank_takes_adapters_of_lower_ranks() -> None:
    model = adapted()
    x = torch.randn(2, 6)
    factors = flat(model, x, 5)
    traced = trace(factors, factors.arguments, {})
    assert traced is not None
    sizes = [list(extra.labels) for extra in traced.extras]
    assert sizes == [[6, 5], [5, 8], [8, 5], [5, 4]]
    values = fed_values(factors.manifest, lora_fx.export.adapter_file.values_of_model(model), 5)
    before = traced.program.module()(x, *values.values())
    direct_products(traced.program)
    names = [str(node.target) for node in traced.program.graph.nodes]
    assert names.count("aten.matmul.default") == 4
    assert not [name for name in names if "mT" in name]
    after = traced.program.module()(x, *values.values())
    assert_close([*before, *after], [model(x)] * 2, 1e-6)
    none = fed_values(factors.manifest, {}, 5)
    with lora_fx.disable_adapter(model):
        assert_close([*traced.program.module()(x, *none.values())], [model(x)], 1e-6)


def test_every_place_takes_padded_factors() -> None:
    model = swapping.adapted()
    ids = swapping.ids()
    factors = flat(model, {"ids": ids}, 8)
    for name in ("plain", "dora", "biased"):
        values = lora_fx.export.adapter_file.values_of_model(model, name)
        padded = fed_values(factors.manifest, values, 8)
        lora_fx.set_adapter(model, name)
        with torch.no_grad():
            assert_close(list(factors(ids, *padded.values())), [model(ids)], 1e-5)


@pytest.mark.parametrize("target", RUNTIMES)
def test_an_operation_that_a_runtime_lacks_is_named(target: Any, tmp_path: Path) -> None:
    pytest.importorskip(target)

    class Bessel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match=r"does not take this model \(aten\S*special_bessel_j0"):
        lora_fx.export_onnx(Bessel(), tmp_path / "out", torch.randn(3, 6), target=target)
    assert not (tmp_path / "out").exists()
