"""What a merge keeps of the adapters, and roundings that keep more of it."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.formats import CodeGrid, DtypeGrid, Grid, dense, format_of, held, quantization_of
from lora_fx.ir import require_record
from lora_fx.passes.merge import delta_weight
from lora_fx.passes.merge.compensated import compensated, stochastic
from lora_fx.passes.parameters import factors_of
from tests.quantized import SCHEMES, llama, quantized


def correlated_inputs(count: int, width: int, seed: int) -> torch.Tensor:
    """Inputs with a spectrum that falls off, as activations have: [count, width]."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(width, width, generator=torch.Generator().manual_seed(1))
    sizes = torch.linspace(0, -3, width).exp()
    return torch.randn(count, width, generator=generator) @ (sizes[:, None] * basis)


def trained(model: nn.Module, share: float, **options: Any) -> Any:
    """A rewritten model whose adapters change each weight by a share of its norm."""
    if isinstance(model, nn.Sequential):  # its last layer would be taken for an output head
        options.setdefault("target_modules", [name for name, _ in model.named_children()])
        options["target_modules"] = [
            name for name in options["target_modules"] if list(model[int(name)].parameters())
        ]
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=4, **options))
    generator = torch.Generator().manual_seed(3)
    for row in require_record(adapted).adapters["default"].sites:
        pair = factors_of(adapted, row, "default")
        weight = adapted.get_parameter(row.site.weight)
        with torch.no_grad():
            for factor in (pair.a, pair.b):
                factor.copy_(torch.randn(factor.shape, generator=generator))
            size = dense(weight, torch.float64).norm()
            change = delta_weight(adapted, row, "default", torch.float64)
            pair.b.mul_(share * size / change.norm())
    return adapted


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).to(dtype)


# --- the report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1e-3, 1e-2, 0.3])
def test_report_says_what_is_left_of_the_change(share: float) -> None:
    base = network()
    model = trained(base, share)
    merged, report = lora_fx.merge(model, return_report=True)
    exact = lora_fx.merge(model, dtype=torch.float64)
    wanted, reached, moved = [], [], []
    for name in ("0.weight", "2.weight"):
        old = base.get_parameter(name).detach().double()
        wanted.append((exact.get_parameter(name).detach() - old).flatten())
        reached.append((merged.get_parameter(name).detach().double() - old).flatten())
        moved.append(reached[-1] != 0)
    for row, change, result, entries in zip(report.sites, wanted, reached, moved, strict=True):
        assert row.kept == pytest.approx(float(result @ change / (change @ change)), rel=1e-6)
        assert row.moved == pytest.approx(float(entries.double().mean()))
        assert row.change == pytest.approx(float(change.norm()), rel=1e-6)
        assert math.isnan(row.output_error)
    whole, result = torch.cat(wanted), torch.cat(reached)
    assert report.kept == pytest.approx(float(result @ whole / (whole @ whole)), rel=1e-6)
    assert f"{100 * report.kept:.3g} % of the change kept" in str(report)


def test_sample_without_a_report_agrees_with_all_entries(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Linear(512, 1024)).bfloat16(), 1e-3)
    _, report = lora_fx.merge(model, return_report=True)
    caplog.clear()
    lora_fx.merge(model)
    (message,) = (entry.getMessage() for entry in caplog.records)
    sampled = float(message.partition("leaves ")[2].partition(" %")[0])
    assert sampled == pytest.approx(100 * report.kept, abs=5)
    for remedy in ("dtype=torch.float32", "rounding='compensated'", "without a merge"):
        assert remedy in message


def test_merge_that_keeps_the_change_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for model in (trained(network(torch.float32), 1e-3), trained(network(), 0.1)):
        with caplog.at_level(logging.WARNING, "lora_fx"):
            _, report = lora_fx.merge(model, return_report=True)
        assert report.kept == pytest.approx(1, abs=0.01)
    untrained = lora_fx.rewrite(network(), lora_fx.LoraConfig(r=4))
    _, report = lora_fx.merge(untrained, return_report=True)
    assert math.isnan(report.kept)  # nothing was changed
    assert not caplog.records


def test_export_reports_what_its_dtype_keeps(tmp_path: Any) -> None:
    model = trained(network(torch.float32), 1e-3)
    whole = lora_fx.export_onnx(model, tmp_path / "whole.onnx", torch.randn(2, 64))
    half = lora_fx.export_onnx(model, tmp_path / "half.onnx", torch.randn(2, 64), dtype="fp16")
    assert whole.merged is not None
    assert half.merged is not None
    assert whole.merged.kept == pytest.approx(1, abs=1e-3)
    assert half.merged.kept != pytest.approx(1, abs=1e-4)
    assert "of the change kept" in str(half)
    assert '"kept"' in half.to_json()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_plan_predicts_what_a_merge_keeps(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 128)).to(dtype).float()
    config = lora_fx.LoraConfig(r=4, target_modules=["0"])
    planned = lora_fx.plan(base, config, merge_into=name)
    least = planned.sites[0].least_change
    assert least is not None
    assert f"a merge into {name} " in str(planned)
    for share, kept in ((2 * least, True), (least / 2, False)):
        _, report = lora_fx.merge(trained(base, share), dtype=dtype, return_report=True)
        assert (report.kept > 0.9) is kept


def test_plan_predicts_for_formats_and_names_what_it_does_not_know() -> None:
    model = llama(1)
    config = lora_fx.LoraConfig(r=2, target_modules=["up_proj", "embed_tokens"])
    planned = lora_fx.plan(model, config, merge_into="int4")
    least = {row.name.rpartition(".")[2]: row.least_change for row in planned.sites}
    assert least["embed_tokens"] is None
    assert 0.05 < least["up_proj"] < 0.5  # type: ignore[operator]
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8))
    unknown = lora_fx.plan(empty, lora_fx.LoraConfig(r=2, target_modules=["0"]), merge_into="bf16")
    assert "not known for any site" in str(unknown)
    with pytest.raises(lora_fx.ConfigError, match="int5"):
        lora_fx.plan(model, config, merge_into="int5")


# --- roundings ----------------------------------------------------------------------------------------


def nearest(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    columns = [grid.nearest(values[:, at].clone(), at) for at in range(values.shape[1])]
    return torch.stack(columns, 1)


def grids(values: torch.Tensor) -> dict[str, Grid]:
    scales = values.reshape(len(values), -1, 32).abs().amax(-1) / 7
    return {
        "bf16": DtypeGrid(torch.bfloat16),
        "fp16": DtypeGrid(torch.float16),
        "int4": CodeGrid.of_blocks(torch.arange(-8, 8), scales, values.shape, 32),
        "zeros": CodeGrid.of_blocks(
            torch.arange(16), scales, values.shape, 32, torch.full_like(scales, 8)
        ),
    }


@pytest.mark.parametrize("name", ["bf16", "fp16", "int4", "zeros"])
def test_compensated_rounding_has_less_error_on_other_inputs(name: str) -> None:
    values = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    grid, inputs = grids(values)[name], correlated_inputs(2000, 128, 5)
    result = compensated(values, grid, inputs.T @ inputs)
    assert torch.equal(nearest(result, grid), result)  # all values are on the grid
    other = correlated_inputs(500, 128, 6)
    error = ((result - values) @ other.T).norm()
    assert error < 0.75 * ((nearest(values, grid) - values) @ other.T).norm()


def test_compensated_rounding_leaves_values_of_the_grid_alone() -> None:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    inputs = correlated_inputs(500, 64, 1)
    assert torch.equal(compensated(values, DtypeGrid(torch.bfloat16), inputs.T @ inputs), values)


@pytest.mark.parametrize("name", ["bf16", "fp16", "int4", "zeros"])
def test_stochastic_rounding_keeps_the_mean(name: str) -> None:
    values = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    grid = grids(values)[name]
    total = torch.zeros_like(values)
    for seed in range(400):
        drawn = stochastic(values, grid, torch.Generator().manual_seed(seed))
        assert torch.equal(nearest(drawn, grid), drawn)
        total += drawn
    step = (nearest(values, grid) - values).abs().max() * 2
    inside = (values.abs() < values.abs().max() * 0.8) if name in ("int4", "zeros") else values > -1
    assert (total / 400 - values)[inside].abs().max() < 0.15 * step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compensated_merge_has_less_error_on_held_out_inputs(dtype: torch.dtype) -> None:
    model = trained(network(dtype), 1e-3)
    batches = [correlated_inputs(64, 64, seed).to(dtype) for seed in range(8)]
    held_out = correlated_inputs(256, 64, 99).double()
    exact = lora_fx.merge(model, dtype=torch.float64)
    errors = {}
    for name in ("nearest", "compensated", "stochastic"):
        merged, report = lora_fx.merge(model, rounding=name, inputs=batches, return_report=True)  # type: ignore[call-overload]
        with torch.no_grad():
            errors[name] = (copy.deepcopy(merged).double()(held_out) - exact(held_out)).norm()
        assert {row.rounding for row in report.sites} == {name}
        assert report.sites[0].output_error > 0
    assert errors["compensated"] < 0.75 * errors["nearest"]
    assert errors["stochastic"] > errors["nearest"]


def test_report_has_the_error_of_outputs_for_inputs() -> None:
    base = nn.Sequential(nn.Linear(64, 96)).bfloat16()
    model = trained(base, 1e-3)
    inputs = correlated_inputs(64, 64, 2).bfloat16()
    merged, report = lora_fx.merge(model, inputs=[inputs], return_report=True)
    old, new = base[0].weight.double(), merged[0].weight.double()
    exact = lora_fx.merge(model, dtype=torch.float64)[0].weight
    x = inputs.double()
    expected = float((x @ (new - exact).T).norm() / (x @ (exact - old).T).norm())
    assert report.sites[0].output_error == pytest.approx(expected, rel=1e-4)
    assert report.output_error == report.sites[0].output_error
    assert "of the adapters' effect" in str(report)


def test_parts_of_a_weight_have_the_inputs_of_their_own() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).bfloat16().eval()
    model = trained(attention, 1e-3)
    x = torch.randn(2, 5, 32).bfloat16()
    batch = {"query": x, "key": 3 * x, "value": x.flip(1)}
    _, report = lora_fx.merge(model, rounding="compensated", inputs=[batch], return_report=True)
    assert all(row.output_error < 1 for row in report.sites)


def test_weights_of_other_operations_are_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(48, 4)).bfloat16()
    model = trained(base, 1e-3, target_modules=["0", "2"])
    batch = torch.randn(4, 4, 8).bfloat16()
    merged, report = lora_fx.merge(
        model, rounding="compensated", inputs=[batch], return_report=True
    )
    assert [row.rounding for row in report.sites] == ["nearest", "compensated"]
    plain = lora_fx.merge(model)
    assert torch.equal(merged[0].weight, plain[0].weight)
    assert not torch.equal(merged[2].weight, plain[2].weight)


def test_wide_weights_are_merged_as_ever() -> None:
    model = trained(network(torch.float32), 1e-2)
    plain = lora_fx.merge(model)
    for name in ("compensated", "stochastic"):
        other = lora_fx.merge(model, rounding=name)  # type: ignore[call-overload]
        assert torch.equal(other[0].weight, plain[0].weight)


# --- quantized bases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_grid_of_a_format_has_its_values(scheme: str) -> None:
    model = lora_fx.rewrite(quantized(llama(1), scheme), lora_fx.LoraConfig(r=2))
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    known = format_of(weight)
    assert known is not None
    grid = known.grid(held(weight))
    if scheme == "nf4 torchao":  # its scales cannot be kept
        assert grid is None
        return
    assert grid is not None
    values = dense(weight, torch.float32)
    largest = values.abs().max()
    # Some libraries round values to half precision.
    assert (nearest(values, grid) - values).abs().max() <= 4e-3 * largest
    assert torch.equal(dense(known.fill(nearest(values, grid), held(weight))), dense(weight))
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)) * values.std()
    filled = dense(known.fill(nearest(drawn, grid), held(weight)), torch.float32)
    assert (filled - nearest(drawn, grid)).abs().max() <= 4e-3 * largest


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compensated_merge_into_a_format(scheme: str) -> None:
    base = quantized(llama(1), scheme)
    model = trained(base, 0.03, target_modules=["down_proj", "up_proj"])
    ids = [torch.randint(0, 97, (8, 16)) for _ in range(4)]
    errors = {}
    for name in ("nearest", "compensated"):
        merged, report = lora_fx.merge(
            model, requantize=True, rounding=name, inputs=ids, return_report=True
        )
        weight = merged.get_parameter("model.layers.0.mlp.down_proj.weight")
        assert quantization_of(weight) == quantization_of(
            model.get_parameter("model.layers.0.mlp.down_proj.weight")
        )
        errors[name] = report.output_error
    if scheme == "nf4 torchao":
        assert errors["compensated"] == errors["nearest"]
    else:
        assert errors["compensated"] < errors["nearest"]


# --- reports of tied weights, random numbers, autocast, casts -----------------------------------------


def test_head_that_stays_tied_has_the_row_of_the_stored_weight() -> None:
    torch.manual_seed(0)
    model = llama(1)
    model.lm_head.weight = model.model.embed_tokens.weight
    config = lora_fx.LoraConfig(
        r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    adapted = lora_fx.rewrite(model.bfloat16(), config)
    pair = factors_of(adapted, require_record(adapted).adapters["default"].sites[0], "default")
    with torch.no_grad():
        pair.a.normal_(std=0.01)
        pair.b.normal_(std=0.01)
    merged, report = lora_fx.merge(adapted, rounding="stochastic", return_report=True)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    first, second = report.sites
    assert first.name != second.name
    assert (first.kept, first.rounding) == (second.kept, second.rounding)


def test_random_rounding_differs_between_weights_of_one_shape_and_between_seeds() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    base = nn.Sequential(layer, copy.deepcopy(layer)).bfloat16()
    model = trained(base, 1e-3)
    with torch.no_grad():  # the same change twice
        first, second = (
            factors_of(model, row, "default")
            for row in require_record(model).adapters["default"].sites
        )
        second.a.copy_(first.a)
        second.b.copy_(first.b)
    merged = lora_fx.merge(model, rounding="stochastic")
    assert not torch.equal(merged[0].weight, merged[1].weight)
    again = lora_fx.merge(model, rounding="stochastic")
    assert torch.equal(merged[0].weight, again[0].weight)
    other = lora_fx.merge(model, rounding="stochastic", seed=1)
    assert not torch.equal(merged[0].weight, other[0].weight)


def test_autocast_does_not_change_a_merge() -> None:
    model = trained(network(), 1e-3)
    batches = [correlated_inputs(64, 64, seed).bfloat16() for seed in range(4)]
    plain = lora_fx.merge(model, rounding="compensated", inputs=batches)
    with torch.autocast("cpu", torch.bfloat16):
        again = lora_fx.merge(model, rounding="compensated", inputs=batches)
    assert torch.equal(plain[0].weight, again[0].weight)


def test_cast_keeps_trained_parameters_apart() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(32, 32) for _ in range(12)))
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=2, bias="all", target_modules=["0"]))
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    with torch.no_grad():
        for number, bias in enumerate(biases):
            bias.fill_(number)
    merged = lora_fx.merge(model, dtype=torch.bfloat16)
    assert len({id(layer.bias) for layer in merged}) == 12
    for layer, expected in zip(merged, lora_fx.merge(model), strict=True):
        assert torch.equal(layer.bias.float(), expected.bias)


def test_trained_statistics_do_not_forbid_a_second_merge_into_a_model() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model = trained_with_statistics(base)
    target = copy.deepcopy(base)
    expected = lora_fx.merge(model).state_dict()
    for _ in range(2):
        lora_fx.merge(model, into=target)
        state = target.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def trained_with_statistics(base: nn.Module) -> Any:
    config = lora_fx.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = lora_fx.rewrite(base, config).train()
    for _ in range(3):
        model(torch.randn(16, 8))
    return model.eval()


# --- bad input ----------------------------------------------------------------------------------------


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, both: bool = False) -> torch.Tensor:
        result: torch.Tensor = self.used(x)
        return self.idle(result) if both else result


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([torch.randn(2, 8)], "does not reach idle"),
        ([torch.full((2, 8), math.nan)], "not finite"),
        ([], "empty"),
        ([torch.randn(2, 9)], "does not take it"),
        (5, "a list of batches"),
    ],
)
def test_unfit_inputs_are_refused(batches: Any, reason: str) -> None:
    model = trained(TwoPaths(), 1e-2, target_modules=["used", "idle"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lora_fx.MergeError, match=reason):
        lora_fx.merge(model, dtype=torch.bfloat16, rounding="compensated", inputs=batches)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert lora_fx.merge(model) is not None


def test_tokens_that_are_all_masked_reach_no_site() -> None:
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    model = trained(llama(1).bfloat16(), 1e-3, target_modules=["q_proj"])
    with pytest.raises(lora_fx.MergeError, match="does not reach"):
        lora_fx.merge(model, rounding="compensated", inputs=batch)
    assert lora_fx.merge(model, inputs={"input_ids": batch["input_ids"]}) is not None


def test_unknown_rounding_is_refused() -> None:
    with pytest.raises(lora_fx.MergeError, match=r"seed=1\.5"):
        lora_fx.merge(trained(network(), 1e-2), rounding="stochastic", seed=1.5)  # type: ignore[call-overload]
    with pytest.raises(lora_fx.MergeError, match="'nearest', 'compensated', 'stochastic'"):
        lora_fx.merge(trained(network(), 1e-2), rounding="gptq")  # type: ignore[call-overload]


@pytest.mark.parametrize(("dtype", "kept"), [("fp32", 0.9999), ("fp16", 0.99)])
def test_export_merges_into_the_dtype_of_the_file(tmp_path: Any, dtype: Any, kept: float) -> None:
    model = trained(network(), 1e-3)
    path = tmp_path / "model.onnx"
    report = lora_fx.export_onnx(model, path, torch.randn(2, 64, dtype=torch.bfloat16), dtype=dtype)
    assert report.merged is not None
    assert report.merged.kept > kept  # a merge into bf16 keeps 0.6
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    exact = lora_fx.merge(model, dtype=torch.float64)[0].weight.detach()
    expected = exact.to({"fp32": torch.float32, "fp16": torch.float16}[dtype])
    assert any(
        array.shape in (expected.shape, expected.T.shape)
        and (np.array_equal(array, expected.numpy()) or np.array_equal(array, expected.T.numpy()))
        for array in stored.values()
    )
