"""The zoo: one job, the counter beside the plan, processes that are lost, and the page."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("typer")

from typer.testing import CliRunner

import lora_fx
from lora_fx.errors import ConfigError
from lora_fx.passes.capture.inputs import normalise
from lora_fx.passes.capture.watch import count_weights
from lora_fx.tools.commands.app import app
from lora_fx.tools.zoo import numbers, registry, report, runner
from lora_fx.tools.zoo.counter import unseen
from lora_fx.tools.zoo.entries import Entry
from lora_fx.tools.zoo.job import run_job
from lora_fx.tools.zoo.row import Row
from tests.zoo import seeded

CONFIG = lora_fx.LoraConfig(r=2)
LEAST = {"plain": 15, "torchvision": 25, "timm": 60, "transformers": 45, "diffusers": 6}


class Uses(nn.Module):
    """Weights on every way to a product, and one that is on none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.stack = nn.Parameter(torch.randn(3, 4, 4))
        self.low = nn.Parameter(torch.randn(4, 4).to(torch.bfloat16))
        self.scaled, self.gain = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4, 1))
        self.parts = nn.Linear(4, 8)
        self.query = nn.Parameter(torch.randn(2, 4))
        self.norm, self.added = nn.LayerNorm(4), nn.Parameter(torch.randn(4))

    def forward(self, tokens):
        x = self.norm(self.embed(tokens) + self.added)
        x = x @ self.stack[tokens[0, 0] % 3]
        x = F.linear(x, self.low.float().contiguous())
        x = F.linear(x, self.scaled * self.gain)
        first, second = self.parts.weight.chunk(2)
        x = F.linear(x, first) + F.linear(x, second)
        return F.linear(self.query, self.low.float()) @ x.mT


@seeded
def uses() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Uses().eval(), (torch.tensor([[1, 2, 5], [3, 3, 0]]),)


class Untouched(nn.Module):
    def forward(self, x):
        return x + 1


def dying(name: str) -> Entry:
    """Entries for processes: in a module, so that another process finds them."""

    def make():
        if name == "dies":
            os._exit(3)
        if name == "hangs":
            time.sleep(60)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.randn(3, 4),)

    return Entry(name, "made up", make)


# --- one job ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["functional", "shared modules", "named tuple", "keyword-only"])
def test_a_job_goes_the_whole_way(name):
    row = run_job(registry.find(f"plain/{name}"), onnx=False)
    assert not row.errors
    assert row.rewritten
    assert row.trained
    assert row.merged
    assert row.adapted == row.found - 1  # the head
    assert row.counted == row.found
    assert not row.unseen
    assert row.stage == ""
    assert not list(report.exceptions([row]))


def test_a_job_exports():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    row = run_job(registry.find("plain/hooks"))
    assert not row.errors
    assert row.torch_onnx
    assert row.exported
    assert row.parity is not None
    assert row.parity < 1e-4


def test_a_weight_that_the_call_does_not_come_to_is_no_fault():
    row = run_job(registry.find("plain/control flow on data"), onnx=False)
    assert row.unreached == ["negative"]
    assert not row.missing
    assert row.trained


def test_a_job_keeps_what_went_wrong():
    def broken():
        raise RuntimeError("no such\n  luck at 0x7f0011223344")

    row = run_job(Entry("broken", "made up", broken))
    assert row.errors == {"build": "RuntimeError: no such luck at 0x..."}
    row = run_job(Entry("bare", "made up", lambda: (Untouched(), (torch.ones(2),))), onnx=False)
    assert set(row.errors) == {"plan", "rewrite"}
    assert row.errors["plan"].startswith("NoMatchError")


def test_a_job_notices_a_changed_argument(monkeypatch):
    from lora_fx.tools.zoo import job

    def careless(model, config, inputs):
        next(model.parameters()).data.add_(1)
        return lora_fx.rewrite(model, config, inputs)

    monkeypatch.setattr(job, "rewrite", careless)
    row = run_job(registry.find("plain/hooks"), onnx=False)
    assert row.argument == "parameter first.weight"
    assert not row.rewritten
    assert any("changed its argument" in line for line in report.exceptions([row]))


def test_a_job_notices_a_bypassed_weight(monkeypatch):
    """Adapters on one of two uses of a weight have a gradient, but not the whole one."""
    from lora_fx.tools.zoo import training

    used = training._gradient_error
    monkeypatch.setattr(
        training, "_gradient_error", lambda planned, weight, a, b: used(planned, weight * 2, a, b)
    )
    row = run_job(registry.find("plain/hooks"), onnx=False)
    assert row.gradient_error == pytest.approx(0.5)
    assert not row.trained


# --- the counter -------------------------------------------------------------------------------------


def test_the_counter_sees_weights_however_they_get_there():
    model, inputs = uses()
    count = count_weights(model, *normalise(inputs))
    assert set().union(*count.direct) == {"embed.weight", "stack", "low", "parts.weight"}
    assert count.computed == (frozenset({"scaled", "gain"}),)


def test_the_counter_sees_a_tied_weight_by_all_its_names():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    count = count_weights(model, (torch.tensor([[1, 2]]),), {})
    assert count.direct == (frozenset({"0.weight", "1.weight"}),)


def test_what_a_plan_does_not_mention_is_unseen():
    entry = registry.find("plain/functional")
    model, inputs = entry.build()
    count = count_weights(model, *normalise(inputs))
    plan = lora_fx.plan(model, CONFIG, inputs)
    assert unseen(count, plan) == ()
    without = dataclasses.replace(plan, sites=plan.sites[1:])
    assert unseen(count, without) == (plan.sites[0].site.weight,)
    refused = (lora_fx.types.Rejection(plan.sites[0].site.weight, "because"),)
    assert unseen(count, dataclasses.replace(without, rejections=refused)) == ()


# --- processes -------------------------------------------------------------------------------------


def test_a_crash_and_a_hang_cost_one_row_each():
    options = runner.Options(jobs=2, timeout=120, onnx=False, find=dying, preload=())
    dead, alive = runner.run_jobs([dying("dies"), dying("lives")], options)
    assert dead.errors == {"build": "Crash: the process ended with 3"}
    assert not alive.errors
    assert alive.merged
    (hung,) = runner.run_jobs([dying("hangs")], dataclasses.replace(options, timeout=1))
    assert hung.errors == {"build": "Timeout: more than 1 s"}


# --- the registry and the command --------------------------------------------------------------------


def test_the_zoo_is_as_large_as_it_says():
    names = [entry.name for entry in registry.ENTRIES]
    assert len(set(names)) == len(names)
    for kind, least in LEAST.items():
        assert sum(name.startswith(f"{kind}/") for name in names) >= least


def test_entries_are_selected_by_part_pattern_and_group():
    assert [e.name for e in registry.select("plain/hook*")] == ["plain/hooks"]
    assert len(registry.select("swin")) > 3
    assert {e.group for e in registry.select(group="timm")} == {"timm"}
    with pytest.raises(ConfigError, match="nearest: plain/hooks"):
        registry.select("hoks")
    with pytest.raises(ConfigError, match="no group 'nowhere': plain PyTorch, torchvision"):
        registry.select(group="nowhere")
    with pytest.raises(ConfigError, match="plain/hooks"):
        registry.find("plain/hoks")


def test_the_command_refuses_what_selects_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["zoo", "--only", "no such model"])
    assert result.exit_code == 2
    assert "no model of the zoo is called 'no such model'" in result.output
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_page_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = Row("plain/hooks", "plain PyTorch", found=2, adapted=1, output_error=0.0)
    ran = []

    def run(entries, options, progress, finished):
        ran.append([entry.name for entry in entries])
        for _ in entries:
            finished(row)

    monkeypatch.setattr(runner, "run_jobs", run)
    arguments = ["zoo", "--only", "plain/hooks"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "| hooks |" in result.output
    assert not list(tmp_path.iterdir())
    page = Path("page.md")
    result = CliRunner().invoke(app, [*arguments, "--out", str(page), "--results", "rows.json"])
    assert result.exit_code == 0, result.output
    assert "## plain PyTorch (1)" in page.read_text(encoding="utf-8")
    assert Path("rows.json").is_file()
    result = CliRunner().invoke(app, [*arguments, "--results", "rows.json", "--resume"])
    assert "| hooks |" in result.output
    assert ran == [["plain/hooks"], ["plain/hooks"], []]
    Path("rows.json").write_text('[{"nonsense": 1}]', encoding="utf-8")
    result = CliRunner().invoke(app, [*arguments, "--results", "rows.json", "--resume"])
    assert result.exit_code == 2
    assert "does not hold rows" in result.output
    result = CliRunner().invoke(app, [*arguments, "--resume"])
    assert result.exit_code == 2
    assert "name it with --results" in result.output


# --- the page ----------------------------------------------------------------------------------------


def test_the_page_says_what_went_wrong():
    good = Row("a/good", "a", found=3, adapted=2, counted=3, output_error=0.0, losses=(1.0, 0.5))
    good = dataclasses.replace(good, own_class=True, merge_error=1e-7, torch_onnx=True)
    good = dataclasses.replace(good, exported=True, parity=1e-6)
    bad = Row("b/bad", "b", output_error=0.1, losses=(1.0, 2.0), missing=["x"], unseen=["y"])
    bad = dataclasses.replace(bad, merge_error=1.0, own_class=True, torch_onnx=True)
    bad.errors["export_onnx"] = "ParityError: a | b"
    unable = Row("b/unable", "b", torch_onnx=False, reasons={"w": "too odd"})
    unable.errors["torch.onnx"] = "Nope: no"
    page = report.page([good, bad, unable])
    assert "- 1 of 3 rewritten" in page
    assert "- 1 of 3 merged" in page
    assert "- 1 of 2 that torch.onnx exports" in page
    assert "- b/bad: export_onnx: ParityError: a \\| b" in page
    assert "- b/bad: outputs differ by 1.0e-01" in page
    assert "- b/bad: no gradient, though the original has one: x" in page
    assert "- b/bad: unseen by the plan: y" in page
    assert "- b/bad: the loss did not fall: 1 to 2" in page
    assert "- b/unable: Nope: no; not rewritten" in page
    assert "- too odd (b/unable)" in page
    assert "a/good:" not in page
    assert (
        "| good | none | 3 | 2 | 0 | same bits |  | ok | 1.00 to 0.50 | 1e-07 | yes | 1e-06 |"
        in page
    )


def test_differences_of_outputs():
    x = torch.tensor([1.0, -2.0, float("inf")])
    assert numbers.difference({"a": x}, {"a": x.clone()}) == 0.0
    assert numbers.difference((x * 1.5,), (x,)) == pytest.approx(0.5)
    assert numbers.difference(x, x.double()) == float("inf")
    assert numbers.difference(x, torch.tensor([1.0, -2.0, 0.0])) == float("inf")


# --- a sample of the real ones -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "torchvision/swin",
        "timm/convnext",
        "timm/beit",
        "transformers/GPT-2",
        "transformers/Mixtral",
        "transformers/BART",
        "transformers/Wav2Vec2",
        "transformers/CLIP",
        "transformers/Mamba",
        "diffusers/UNet2DConditionModel",
    ],
)
def test_a_sample_goes_the_whole_way(name):
    pytest.importorskip(name.partition("/")[0])
    row = run_job(registry.find(name), onnx=False)
    assert not report.exceptions([row])
    assert row.rewritten
    assert row.trained
    assert row.merged


def test_the_page_names_no_folder_of_the_machine() -> None:
    row = Row("plain/x", "plain PyTorch", "", torch_onnx=True)
    row.errors["merge"] = (
        'Load /tmp/a1/.m.onnx/model.onnx failed: in (_export/x.py:3) File "/home/u'
    )
    (line,) = [one for one in report.exceptions([row]) if "merge" in one]
    assert line == "plain/x: merge: Load model.onnx failed: in (_export/x.py:3)"
