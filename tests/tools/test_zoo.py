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
from lora_fx.passes.capture.check import count_weights
from lora_fx.passes.capture.synthesis import normalize
from lora_fx.passes.graph import original_class
from lora_fx.runtime.watch import disarm
from lora_fx.tools.cli.app import app
from lora_fx.tools.zoo import job, report, runner
from lora_fx.tools.zoo.job import in_fp64, run_job, unseen
from lora_fx.tools.zoo.models import Entry, wake
from lora_fx.tools.zoo.report import PARTS, Row, scrubbed
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
    row = run_job(runner.find(f"plain/{name}"), onnx=False)
    assert not row.errors
    assert row.rewritten
    assert row.right
    assert row.trained
    assert row.merged
    assert row.judged == row.adapted
    assert row.adapted == row.found - 1  # the head
    assert row.counted == row.found
    assert not row.unseen
    assert row.stage == ""
    assert not list(report.exceptions([row]))


def test_a_job_exports_with_the_operators_of_onnx_runtime():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("transformers")
    row = run_job(runner.find("transformers/Qwen2"), optimize="runtime")
    assert not row.errors
    assert row.dates.keys() == {"runtime"}
    assert row.runtime.keys() == {"text-generation"}
    file = row.runtime["text-generation"]
    assert file.parity < 1e-4
    # Heads are as wide as the operator takes them.
    assert file.fused["group-query-attention"] == 2
    assert not file.fewer
    lines = report.runtime_table([row])
    assert any(line.startswith("| Qwen2 | text-generation | ") for line in lines)
    (said,) = [line for line in report.summary([row]) if "operators of ONNX Runtime" in line]
    assert said.startswith("1 of 1 files")
    assert not report.exceptions([row])
    file.fewer = "it differs by 1e-2"
    row.errors["runtime text-generation"] = "ParityError: far off"
    found = report.exceptions([row])
    assert "transformers/Qwen2: runtime text-generation: ParityError: far off" in found
    assert any(
        line.endswith("with fewer fusions: text-generation: it differs by 1e-2") for line in found
    )


def test_rows_keep_the_parts_that_are_not_run_again():
    file = report.RuntimeFile(1e-6, 5, {"silu": 1}, {})
    earlier = Row(
        "a/x", "a", losses=(1.0, 0.5), torch_onnx=True, dates={"adaption": "1", "export": "1"}
    )
    earlier.errors = {"merge": "m", "export_onnx": "e"}
    runtime = Row("a/x", "a", runtime={"": file}, dates={"runtime": "2"}, errors={"runtime x": "r"})
    both = runtime.with_others_of(earlier)
    assert both.losses == (1.0, 0.5)
    assert both.torch_onnx
    assert both.runtime == {"": file}
    assert both.errors == {"merge": "m", "export_onnx": "e", "runtime x": "r"}
    assert both.dates == {"adaption": "1", "export": "1", "runtime": "2"}
    assert Row.read(dataclasses.asdict(both)) == both
    again = Row("a/x", "a", dates={"adaption": "3"}).with_others_of(both)
    assert again.losses is None
    assert again.torch_onnx
    assert again.runtime == {"": file}
    assert again.errors == {"export_onnx": "e", "runtime x": "r"}


def test_a_job_exports():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    row = run_job(runner.find("plain/hooks"))
    assert not row.errors
    assert row.torch_onnx
    assert row.exported
    assert row.parity is not None
    assert row.parity < 1e-4


def test_a_weight_that_the_call_does_not_come_to_is_no_fault():
    row = run_job(runner.find("plain/control flow on data"), onnx=False)
    assert row.unreached == ["negative"]
    assert row.judged == 2
    assert row.right
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
    row = run_job(runner.find("plain/hooks"), onnx=False)
    assert row.argument == "parameter first.weight"
    assert not row.rewritten
    assert any("changed its argument" in line for line in report.exceptions([row]))


def test_a_job_notices_an_adapter_that_is_passed_by(monkeypatch):
    from lora_fx.tools.zoo import job

    def careless(model, config, inputs):
        return past(lora_fx.rewrite(model, config, inputs), "first")

    monkeypatch.setattr(job, "rewrite", careless)
    row = run_job(runner.find("plain/hooks"), onnx=False)
    assert row.passed_by == {"first": "no gradient"}
    assert not row.right
    assert "plain/hooks: passed by: first (no gradient)" in report.exceptions([row])


def test_a_job_looks_beneath_a_graph_of_the_whole_model(monkeypatch):
    from lora_fx.tools.zoo import job

    asked = []

    def judge_sites(entry, model, reached, config, *, examples=True):
        asked.append(examples)
        return job.Verdict(1e-8, ["a"], [], {} if examples else {"b": "no gradient"}), "fp64"

    entry = runner.find("plain/hooks")
    monkeypatch.setattr(job, "judge_sites", judge_sites)
    assert run_job(entry, onnx=False).right
    assert asked == [True]
    real = job.plan
    monkeypatch.setattr(
        job, "plan", lambda *given: dataclasses.replace(real(*given), frontend="export")
    )
    row = run_job(entry, onnx=False)
    assert asked == [True, True, False]
    assert not row.right
    assert row.regions_passed_by == {"b": "no gradient"}
    lines = report.exceptions([row])
    assert "plain/hooks: passed by without example inputs: b (no gradient)" in lines


# --- the dense oracle -----------------------------------------------------------------------------------


def past(adapted: nn.Module, name: str) -> nn.Module:
    """The model with one layer whose own code runs instead of its graph: the adapter is passed by.

    Nothing is watched any more, because the first call would be refused.
    """
    for module in adapted.modules():
        disarm(module)
    layer = adapted.get_submodule(name)
    layer.__class__ = original_class(layer)
    return adapted


class Twice(nn.Module):
    """A layer that is called, and whose weight is read once more or not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


class Once(Twice):
    def forward(self, x):
        weight = self.fc.get_parameter("weight")
        return self.last(torch.tanh(F.linear(torch.tanh(self.fc(x)), weight, self.fc.bias)))


class TiedUse(nn.Module):
    """One weight under two names, of which one is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Rounds(nn.Module):
    """Computes in fp32 whatever it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.layer_norm(self.fc(x).float(), (4,)).to(x.dtype)


class Blocks(nn.Module):
    """Insists on fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) @ torch.eye(4)


EVERYTHING = lora_fx.LoraConfig(r=2, target_modules="all-linear")


@seeded
def verdict_on(cls, change=lambda adapted: adapted, config=EVERYTHING, dtype=torch.float64):
    model, x = cls().to(dtype).eval(), torch.randn(5, 4, dtype=dtype)
    adapted = change(lora_fx.rewrite(model, config))

    def run(either):
        output = either(x)
        return output, output.square().sum()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    verdict = job.judge(model, adapted, run, dtype)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return verdict


def test_a_right_model_is_judged_as_right():
    verdict = verdict_on(Twice)
    assert verdict.right
    assert verdict.judged == ["fc", "last"]
    assert verdict.output_error < 1e-14
    assert all(0 <= error < 1e-12 for error in verdict.errors.values())


def test_an_adapter_that_one_of_two_uses_passes_by_has_another_gradient():
    def careless(adapted):
        adapted.__class__ = Once
        return adapted

    verdict = verdict_on(Twice, careless)
    assert not verdict.right
    assert verdict.passed_by.keys() == {"fc"}
    assert verdict.passed_by["fc"].startswith("another gradient")
    assert verdict.followers == 1
    assert verdict.output_error > 1e-3


def test_an_adapter_that_is_passed_by_is_told_from_those_behind_it():
    verdict = verdict_on(Twice, lambda adapted: past(adapted, "last"))
    assert verdict.passed_by == {"last": "no gradient"}
    assert verdict.followers == 1


def test_a_wrong_scale_is_another_gradient():
    def careless(adapted):
        adapted.fc.register_forward_hook(lambda layer, given, output: output * 1.001)
        return adapted

    verdict = verdict_on(Twice, careless)
    assert not verdict.right
    assert verdict.output_error > verdict.tolerance


def test_a_parameter_that_is_trained_besides_is_stray():
    def careless(adapted):
        adapted.fc.bias.requires_grad_()
        return adapted

    verdict = verdict_on(Twice, careless)
    assert verdict.stray == ["fc.bias"]
    assert not verdict.passed_by
    assert not verdict.right


def test_an_adapter_on_one_use_of_a_tied_weight_leaves_the_other():
    config = lora_fx.LoraConfig(r=2, target_modules=["second"])
    assert verdict_on(TiedUse, config=config).right


def test_fp32_within_fp64_counts_as_fp32():
    x = torch.randn(3, 4)
    model, doubled, narrowest = in_fp64(Rounds(), (x,))
    assert model.fc.weight.dtype == doubled[0].dtype == torch.float64
    assert narrowest == torch.float32
    assert in_fp64(Twice(), (x,))[2] == torch.float64
    assert in_fp64(Blocks(), (x,)) is None
    assert torch.equal(Overflows()(x).isfinite(), torch.ones(3, 4, dtype=torch.bool))
    assert in_fp64(Overflows(), (x,)) is None
    assert job.tolerance_of(torch.float64) == pytest.approx(1.5e-8, rel=0.01)


class Overflows(Rounds):
    """Masks with the least number of its dtype, twice: fp32 is wide enough for that, as fp64 is not."""

    def forward(self, x):
        least = torch.finfo(x.dtype).min
        return self.fc(x) + (torch.full_like(x, least, dtype=torch.float64) * 2 * 0).to(x.dtype)


class Unused(Rounds):
    """Drops what its layer computes."""

    def forward(self, x):
        return x + 0 * self.fc(x).detach().sum()


class Breaks(Rounds):
    """Has a finite output and no finite gradient."""

    def forward(self, x):
        return self.fc(x * 0 + 1).sub(self.fc(x * 0 + 1)).abs().sqrt()


def test_what_is_not_finite_is_no_agreement():
    with pytest.raises(ValueError, match="gradient at fc is not finite"):
        verdict_on(Breaks)


def test_nothing_judged_is_not_right():
    verdict = verdict_on(Unused)
    assert (verdict.judged, verdict.unreached) == ([], ["fc"])
    row = Row("a", "a", judged=0, oracle_error=0.0, tolerance=1e-8)
    assert not row.right
    assert "a: none of its sites has an effect, so that nothing was judged" in report.exceptions(
        [row]
    )


@pytest.mark.parametrize(
    "name",
    [
        "vocoder",
        "MultiheadAttention",
        "einsum attention",
        "experts by bmm",
        "experts by index",
        "tied decoder",
        "shared modules",
        "U-Net",
        "nested containers",
    ],
)
def test_every_layout_is_judged(name):
    """Convolutions, transposed ones, experts, parts of a weight: none is left out."""
    row = run_job(runner.find(f"plain/{name}"), onnx=False)
    assert row.right
    assert row.judged == row.adapted > 0
    assert row.dtype == "float64"
    assert row.gradient_error < 1e-10


class Asleep(nn.Module):
    """Everything that starts at a value that hides what is behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))
        self.faint = nn.Parameter(torch.full((4,), 1e-5))
        self.gate = nn.Parameter(torch.zeros(()))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 4)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.kept = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.count = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)


@seeded
def test_nothing_stays_asleep():
    model = Asleep()
    wake(model)
    values = dict(model.named_parameters())
    assert values.pop("kept").tolist() == [1.0, 2.0]
    assert not values.pop("count").any()
    assert values.pop("gate").item() == 0.5
    for name, value in values.items():
        assert value.std() > 1e-2, name
    for name in ("scale", "faint", "norm.weight"):
        assert values[name].min() > 0.2, name


# --- the counter -------------------------------------------------------------------------------------


def test_the_counter_sees_weights_however_they_get_there():
    model, inputs = uses()
    count = count_weights(model, *normalize(inputs))
    assert set().union(*count.direct) == {"embed.weight", "stack", "low", "parts.weight"}
    assert count.computed == (frozenset({"scaled", "gain"}),)


def test_the_counter_sees_a_tied_weight_by_all_its_names():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    count = count_weights(model, (torch.tensor([[1, 2]]),), {})
    assert count.direct == (frozenset({"0.weight", "1.weight"}),)


def test_what_a_plan_does_not_mention_is_unseen():
    entry = runner.find("plain/functional")
    model, inputs = entry.build()
    count = count_weights(model, *normalize(inputs))
    plan = lora_fx.plan(model, CONFIG, inputs)
    assert unseen(count, plan) == ()
    without = dataclasses.replace(plan, sites=plan.sites[1:])
    assert unseen(count, without) == (plan.sites[0].site.weight,)
    refused = (lora_fx.ir.site.Rejection(plan.sites[0].site.weight, "because"),)
    assert unseen(count, dataclasses.replace(without, rejections=refused)) == ()


# --- processes -------------------------------------------------------------------------------------


def test_a_crash_and_a_hang_cost_one_row_each():
    options = runner.Options(jobs=2, timeout=120, onnx=False, find=dying, preload=())
    dead, alive = runner.run_jobs([dying("dies"), dying("lives")], options)
    assert dead.errors == {"build": "Crash: the process ended with 3"}
    assert dead.dates.keys() == alive.dates.keys() == {"adaption"}
    assert not alive.errors
    assert alive.merged
    (hung,) = runner.run_jobs([dying("hangs")], dataclasses.replace(options, timeout=1))
    assert hung.errors == {"build": "Timeout: more than 1 s"}


# --- the registry and the command --------------------------------------------------------------------


def test_the_zoo_is_as_large_as_it_says():
    names = [entry.name for entry in runner.ENTRIES]
    assert len(set(names)) == len(names)
    for kind, least in LEAST.items():
        assert sum(name.startswith(f"{kind}/") for name in names) >= least


def test_entries_are_selected_by_part_pattern_and_group():
    assert [e.name for e in runner.select("plain/hook*")] == ["plain/hooks"]
    assert len(runner.select("swin")) > 3
    assert {e.group for e in runner.select(group="timm")} == {"timm"}
    with pytest.raises(ConfigError, match="nearest: plain/hooks"):
        runner.select("hoks")
    with pytest.raises(ConfigError, match="no group 'nowhere': plain PyTorch, torchvision"):
        runner.select(group="nowhere")
    with pytest.raises(ConfigError, match="plain/hooks"):
        runner.find("plain/hoks")


def test_the_command_refuses_what_selects_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["zoo", "--only", "no such model"])
    assert result.exit_code == 2
    assert "no model of the zoo is called 'no such model'" in result.output
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_page_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = Row("plain/hooks", "plain PyTorch", found=2, adapted=1, output_error=0.0)
    row.dates = dict.fromkeys(PARTS, "2026-11-02")
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
    result = CliRunner().invoke(app, [*arguments, "--out", str(page), "--rows", "rows.json"])
    assert result.exit_code == 0, result.output
    assert "## plain PyTorch (1)" in page.read_text(encoding="utf-8")
    assert Path("rows.json").is_file()
    result = CliRunner().invoke(app, [*arguments, "--rows", "rows.json", "--resume"])
    assert "| hooks |" in result.output
    assert ran == [["plain/hooks"], ["plain/hooks"], []]
    Path("rows.json").write_text('[{"nonsense": 1}]', encoding="utf-8")
    result = CliRunner().invoke(app, [*arguments, "--rows", "rows.json", "--resume"])
    assert result.exit_code == 2
    assert "does not hold rows" in result.output
    result = CliRunner().invoke(app, [*arguments, "--resume"])
    assert result.exit_code == 2
    assert "name it with --rows" in result.output
    result = CliRunner().invoke(app, [*arguments, "--optimize", "fast"])
    assert result.exit_code == 2
    assert "give standard, runtime, none" in result.output


def test_the_zoo_is_run_in_parts(tmp_path, monkeypatch):
    """Exports of an earlier day stay beside what is run today; the page says what is of which day."""
    monkeypatch.chdir(tmp_path)
    today, ran = "2026-11-02", []

    def run(entries, options, progress, finished):
        ran.append([entry.name for entry in entries])
        for entry in entries:
            row = Row(entry.name, entry.group, found=2, adapted=len(ran), losses=(1.0, 0.5))
            row.dates = {"adaption": today, **({"export": today} if options.onnx else {})}
            row.seconds = {"oracle": 1.0, **({"export_onnx": 9.0} if options.onnx else {})}
            if options.onnx:
                row.torch_onnx, row.exported, row.parity = True, False, None
                row.errors["export_onnx"] = "ParityError: far off"
            finished(row)

    monkeypatch.setattr(runner, "run_jobs", run)

    def invoke(*arguments):
        result = CliRunner().invoke(app, ["zoo", "--out", "docs/page.md", *arguments])
        assert result.exit_code == 0, result.output
        return Path("docs/page.md").read_text(encoding="utf-8")

    page = invoke("--only", "plain/h*")
    assert "- exports: 2026-11-02" in page
    today = "2026-11-05"
    page = invoke("--only", "plain/*", "--no-onnx")
    assert "- all columns but those of exports: 2026-11-05" in page
    (others,) = [line for line in page.splitlines() if line.startswith("- exports: ")]
    assert others == f"- exports: 2026-11-02 ({len(ran[1]) - 1} models not run)"
    assert "| hooks | none | 2 | 2 |" in page
    assert "- plain/hooks: export_onnx: ParityError: far off" in page
    assert "1.00 to 0.50 |  | yes | no |" in page
    assert Path("docs/page.json").is_file()
    # What has all that is asked is left out, or what has it of that day.
    invoke("--only", "plain/*", "--no-onnx", "--resume")
    invoke("--only", "plain/*", "--resume")
    assert ran[2:] == [[], [name for name in ran[1] if name != "plain/hooks"]]
    today = "2026-11-07"
    page = invoke("--only", "plain/*", "--resume", "--since", "2026-11-05")
    assert ran[4] == ["plain/hooks"]
    assert "- exports: 2026-11-05 to 2026-11-07" in page


# --- the page ----------------------------------------------------------------------------------------


def test_the_page_says_what_went_wrong():
    good = Row("a/good", "a", found=3, adapted=2, counted=3, output_error=0.0, losses=(1.0, 0.5))
    good = dataclasses.replace(good, own_class=True, merge_error=1e-7, torch_onnx=True)
    good = dataclasses.replace(good, exported=True, parity=1e-6)
    good = dataclasses.replace(good, judged=1, unreached=["w"], oracle_error=1e-15, tolerance=1e-8)
    bad = Row("b/bad", "b", output_error=0.1, losses=(1.0, 2.0), unseen=["y"], judged=2)
    bad = dataclasses.replace(bad, merge_error=1.0, own_class=True, torch_onnx=True)
    bad = dataclasses.replace(bad, oracle_error=1e-3, tolerance=1e-8, stray=["z"])
    bad.passed_by["x"] = "no gradient"
    bad.errors["export_onnx"] = "ParityError: a | b"
    unable = Row("b/unable", "b", torch_onnx=False, reasons={"w": "too odd"})
    unable.errors["torch.onnx"] = "Nope: no"
    page = report.page([good, bad, unable])
    assert "- 1 of 3 rewritten" in page
    assert "- 1 of 3 judged as right" in page
    assert "- 3 sites judged, 1 without effect in the original itself, 1 passed by" in page
    assert "- 1 of 3 merged" in page
    assert "- 1 of 2 that torch.onnx exports" in page
    assert "- b/bad: export_onnx: ParityError: a \\| b" in page
    assert "- b/bad: outputs differ by 1.0e-01" in page
    assert "- b/bad: outputs differ from the dense oracle's by 1.0e-03" in page
    assert "- b/bad: passed by: x (no gradient)" in page
    assert "- b/bad: a gradient where there should be none: z" in page
    assert "- b/bad: unseen by the plan: y" in page
    assert "- b/bad: the loss did not fall: 1 to 2" in page
    assert "- b/unable: Nope: no; not rewritten" in page
    assert "- too odd (b/unable)" in page
    assert "a/good:" not in page
    cells = "3 | 2 | 0 | same bits |  | 1 | 1 | 0 | 1.00 to 0.50 | 1e-07 | yes | 1e-06 |"
    assert f"| good | none | {cells}" in page


def test_differences_of_outputs():
    x = torch.tensor([1.0, -2.0, float("inf")])
    assert job.difference({"a": x}, {"a": x.clone()}) == 0.0
    assert job.difference((x * 1.5,), (x,)) == pytest.approx(0.5)
    assert job.difference(x, x.double()) == float("inf")
    assert job.difference(x, torch.tensor([1.0, -2.0, 0.0])) == float("inf")


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
    row = run_job(runner.find(name), onnx=False)
    assert not report.exceptions([row])
    assert row.rewritten
    assert row.right
    assert row.trained
    assert row.merged


def test_the_page_names_no_folder_of_the_machine() -> None:
    row = Row("plain/x", "plain PyTorch", "", torch_onnx=True)
    row.errors["merge"] = (
        'Load /tmp/a1/.m.onnx/model.onnx failed: in (_export/x.py:3) File "/home/u'
    )
    (line,) = [one for one in report.exceptions([row]) if "merge" in one]
    assert line == "plain/x: merge: Load model.onnx failed: in (_export/x.py:3)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'Original traceback: File "/wo; exported by export_onnx',
            "Original traceback:; exported by export_onnx",
        ),
        ('File "/srv/x/lib/torch/nn.py", line 3', 'File "nn.py", line 3'),
        ("cannot open /srv/x/.m/model.onnx", "cannot open model.onnx"),
        (
            "in (_export/utils.py:12 in f), a/b/c, 1 / 2",
            "in (_export/utils.py:12 in f), a/b/c, 1 / 2",
        ),
    ],
)
def test_folders_of_the_machine_are_left_out(text: str, expected: str) -> None:
    assert scrubbed(text) == expected
    assert scrubbed(expected) == expected


def test_an_error_is_neither_a_link_nor_code_in_the_page() -> None:
    row = Row(
        "plain/net", "plain", errors={"plan": "ValueError: view_4[target=view](args = *x, `y`)"}
    )
    (line,) = report.exceptions([row])
    assert r"view_4\[target=view\](args = \*x, \`y\`)" in line
