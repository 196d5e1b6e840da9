"""``lora_fx.inspect_adapter``: figures from the factors alone, compared with the whole ΔW in fp64."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.tools.adapter_folder import AdapterReport, SiteFigures
from tests.mixtures import mixtral


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.conv = nn.Conv1d(8, 6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.conv(x.mT)


def trained(model: nn.Module, config: LoraConfig) -> nn.Module:
    adapted = lora_fx.rewrite(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapted


def deltas(model: nn.Module, adapted: nn.Module) -> dict[str, torch.Tensor]:
    """ΔW of every weight, by the merge."""
    before = {name: p.double() for name, p in model.named_parameters()}
    merged = lora_fx.merge(adapted)
    return {
        name: p.detach().double() - before[name].detach() for name, p in merged.named_parameters()
    }


def test_figures_are_those_of_the_whole_update(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().double()
    targets = ["emb", "conv", "layers.0", "layers.1", "layers.2"]
    adapted = trained(model, LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    report = lora_fx.inspect_adapter(tmp_path / "adapter")
    change = deltas(model, adapted)
    assert {one.name for one in report.sites} == set(targets)
    for one in report.sites:
        wanted = torch.linalg.svdvals(change[f"{one.name}.weight"].flatten(1))[:3]
        assert one.values == pytest.approx(wanted.tolist(), rel=1e-6)
        assert one.norm == pytest.approx(float(wanted.norm()), rel=1e-6)
        shares = wanted / wanted.sum()
        entropy = -(shares * shares.log()).sum()
        assert one.effective_rank == pytest.approx(float(entropy.exp()), rel=1e-6)
        assert (one.rank, one.scale) == (3, pytest.approx(5 / 3))
    layers, modules, values = report.heat()
    assert modules
    assert len(values) == len(layers)
    assert all(len(row) == len(modules) for row in values)


def test_columns_of_the_heat_map_are_told_apart(tmp_path: Path) -> None:
    """By as much of a name as that takes: BERT has three modules called dense in a layer."""
    from rich.console import Console

    from lora_fx.tools.cli.tables import render_heat

    names = [
        f"encoder.layer.{i}.{name}.dense"
        for i in range(2)
        for name in ("attention.output", "intermediate", "output")
    ]
    names += [f"blocks.{i}" for i in range(2)] + ["pooler.dense"]
    figures = [
        SiteFigures(name, 2, 1.0, (4, 4), 1, 1.0 + i, (1.0,), 1.0) for i, name in enumerate(names)
    ]
    report = AdapterReport(tmp_path, LoraConfig(), tuple(figures), {}, 0, 0)
    layers, modules, values = report.heat()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_heat("norm", layers, modules, values, width=120))
    lines = console.export_text().splitlines()
    heading = lines[1].split()
    assert heading == [
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
        "blocks",
        "pooler.dense",
    ]
    assert [line.split()[0] for line in lines[2:]] == [*layers[:4], "(root)"]
    console.print(render_heat("norm", layers, modules, values, width=60))
    narrow = console.export_text()
    assert "(root)" not in narrow
    assert "not shown at this width: " in narrow


def test_experts_are_measured_one_by_one(tmp_path: Path) -> None:
    model = mixtral().double()
    parameters = ["mlp.experts.gate_up_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=parameters)
    adapted = trained(model, config)
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    report = lora_fx.inspect_adapter(tmp_path / "adapter")
    change = {
        name: one for name, one in deltas(model, adapted).items() if name.endswith("gate_up_proj")
    }
    assert len(report.sites) == len(change)
    for one, wanted in zip(report.sites, change.values(), strict=True):
        assert one.experts == len(wanted)
        assert one.rank == 2
        assert one.norm == pytest.approx(float(wanted.norm()), rel=1e-6)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 3))
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.mix @ self.inner.w


def test_sites_have_the_names_and_scales_of_the_plan(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["mix", "inner.w"], alpha_pattern={"mix": 3})
    plan = lora_fx.plan(Bare(), config)
    lora_fx.save_adapter(lora_fx.rewrite(Bare(), config), tmp_path / "adapter")
    report = lora_fx.inspect_adapter(tmp_path / "adapter")
    scales = {site.name: site.scale for site in report.sites}
    assert scales == {row.name: row.scale for row in plan.sites}
    assert set(scales) == {"mix", "inner.w"}


def test_what_is_likely_a_mistake_comes_first(tmp_path: Path) -> None:
    adapted = lora_fx.rewrite(Net(), LoraConfig(r=2, target_modules=["layers.0", "layers.1"]))
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    broken = next(key for key in tensors if "layers.1" in key and "lora_B" in key)
    tensors[broken][0, 0] = math.nan
    save_file(tensors, file)
    report = lora_fx.inspect_adapter(tmp_path / "adapter")
    idle, wrong = report.warnings()
    assert idle == "no update at 1 site(s): layers.0"
    assert wrong == "not finite at 1 site(s): layers.1"
    assert "no update" in str(report)
    assert json.loads(report.to_json())["sites"][1]["norm"] is None
    html = report._repr_html_()
    assert "<table>" in html
    assert "no update" in html


def test_a_folder_of_peft(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["layers.1"], use_dora=True)
    peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    report = lora_fx.inspect_adapter(tmp_path)
    assert [(one.name, one.kind) for one in report.sites] == [("layers.1", "dora")]
    assert len(report.others) == 1
    # The update depends on norms of the base.
    assert any("what dora changes depends on the base" in line for line in report.warnings())


@pytest.mark.parametrize("alone", [True, False])
def test_groups_of_a_convolution_are_blocks_of_one_matrix(tmp_path: Path, alone: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 4, 3, groups=2), nn.Conv1d(4, 3, 1)).double()
    places = ["0"] if alone else ["0", "1"]
    adapted = trained(model, LoraConfig(r=4, lora_alpha=6, target_modules=places))
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    found = lora_fx.inspect_adapter(tmp_path / "adapter").sites[0]
    change = (lora_fx.merge(adapted)[0].weight - model[0].weight).detach()
    whole = torch.block_diag(*change.flatten(1).chunk(2))
    assert found.norm == pytest.approx(float(change.norm()))
    assert found.shape == (4, 18)
    values = torch.linalg.svdvals(whole)
    torch.testing.assert_close(torch.tensor(found.values).double()[:4], values[:4])


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.full((2, 4), math.nan)])
def test_factors_that_are_none_are_drawn(tmp_path: Path, value: torch.Tensor) -> None:
    LoraConfig(r=2, target_modules=["a"]).save_pretrained(tmp_path)
    key = "base_model.model.a.lora_{}.weight"
    tensors = {key.format("A"): value, key.format("B"): value.clone().t()}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    assert lora_fx.visualize(tmp_path, tmp_path / "page.html").is_file()
    if not value.dim():
        with pytest.raises(lora_fx.CheckpointError, match=r"a: lora_A has shape .* no matrices"):
            lora_fx.inspect_adapter(tmp_path)


def test_a_model_whose_training_diverged_is_drawn(tmp_path: Path) -> None:
    adapted = lora_fx.rewrite(Net(), LoraConfig(r=2, target_modules=["layers.0"]))
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_B" in n).fill_(math.nan)
    for name in ("page.html", "graph.json"):
        text = lora_fx.visualize(adapted, tmp_path / name).read_text(encoding="utf-8")
    json.loads(text, parse_constant=pytest.fail)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(lora_fx.CheckpointError, match="is not a folder"):
        lora_fx.inspect_adapter(tmp_path / "nothing")
    adapted = lora_fx.rewrite(Net(), LoraConfig(r=2, target_modules=["layers.0"]))
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({key: value for key, value in whole.items() if "lora_A" in key}, file)
    with pytest.raises(lora_fx.CheckpointError, match="has lora_A and no lora_B"):
        lora_fx.inspect_adapter(tmp_path / "adapter")
    save_file({key: v[:, :1].clone() if "lora_B" in key else v for key, v in whole.items()}, file)
    with pytest.raises(lora_fx.CheckpointError, match="they are no pair"):
        lora_fx.inspect_adapter(tmp_path / "adapter")


def test_names_are_text_in_a_notebook() -> None:
    from lora_fx.tools.adapter_folder import heat_map

    assert "<script" not in heat_map(["<script>x"], ["<b>"], [[1.0]])
