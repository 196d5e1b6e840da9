"""Every section runs on tiny shapes; the goals, the pictures and the command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from typer.testing import CliRunner

from lora_fx.errors import ConfigError
from lora_fx.runtime.kernels import masks
from lora_fx.tools.bench import goals, learning, one_linear, report, step_sections
from lora_fx.tools.bench import measure as hardware
from lora_fx.tools.bench.contenders import (
    AGAIN,
    BALANCED,
    EXPORTED,
    OURS,
    OURS_AGAIN,
    PEFT,
    Settings,
)
from lora_fx.tools.bench.counted import Memory
from lora_fx.tools.bench.measure import (
    Placement,
    Run,
    Sample,
    Size,
    allocator_peak,
    kernel_launches,
    launches,
    placements,
    synchronizer,
)
from lora_fx.tools.bench.section import Group, bars
from lora_fx.tools.bench.step_sections import Look
from lora_fx.tools.bench.steps import Measured, Step
from lora_fx.tools.bench.verbs import BOUND, OURS_INTO, PEFT_MERGE, Merged
from lora_fx.tools.cli.app import ERROR_EXIT, app

SLOW = {
    "compiled_step",
    "dora_step",
    "export_peers",
    "generation",
    "guards",
    "llama_step",
    "memory_step",
    "model_steps",
    "onnx_bank",
    "onnx_latency",
    "peer_runs",
    "quantized_quality",
    "quantized_step",
    "rewrite_time",
    "vocabulary_step",
}
MIB = 2**20


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in report.SECTIONS
    ],
)
def test_every_section_runs_on_tiny_shapes(name: str) -> None:
    section = report.SECTIONS[name]
    told: list[tuple[int, int]] = []
    results = section.run(
        repeats=2, size=Size.TINY, progress=lambda done, total, _: told.append((done, total))
    )
    columns, rows = section.rows(results)
    assert bool(rows) == bool(results)
    assert rows or name == "dropout_kernels"  # which need a GPU
    assert all(
        len(row) == len(columns) and all(isinstance(one, str) for one in row) for row in rows
    )
    assert section.title
    assert section.caption
    assert told
    assert all(done <= total for done, total in told)
    for text in section.charts(results).values():
        ET.fromstring(text)


def test_a_row_of_the_kernels_has_each_contender() -> None:
    """On a CPU, where both contenders of lora-fx are the same."""
    placement = Placement(torch.device("cpu"), torch.float32)
    found = one_linear._with_and_without(placement, 256, 256, 4, Run(2, Size.TINY))
    shape = one_linear.Shape(str(placement), 256, 256)
    ((*cells, ours, without, peft),) = one_linear._kernel_rows({(shape, 4): found})
    assert cells[:4] == ["cpu, float32", "256", "256", "4"]
    assert ours.partition(", ")[2] == without.partition(", ")[2] != peft.partition(", ")[2]
    assert masks.KERNEL_DEVICES == ("cuda",)


def test_the_page_begins_with_gains_and_misses_and_names_what_was_not_measured_once() -> None:
    times = {f"{name}, p = {p}": 1.2 for name in (OURS, EXPORTED, PEFT) for p in ("0", "0.05")}
    results = {"llama_step": measured({"frozen": 1.0, **times}, {}, floor=1.06)}
    rows = goals.rows(results, functools.partial(report.reference, report.SECTIONS))
    text = "\n".join(
        report.opening(rows, goals.gains(results), ["Dropout by Triton kernels"], {"GPU": "no GPU"})
    )
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == [
        "## What you gain",
        "## Missed goals: 1 of 2",
        "## Goals that were met",
        "## How it is measured",
    ]
    assert "with dropout, divided by that of the frozen model | 1.20 | 1.20 |" in text
    (line,) = [
        line for line in text.splitlines() if line.startswith("Not measured on this machine:")
    ]
    assert line.endswith("; Dropout by Triton kernels.")
    assert text.count("O, H100") == text.count("Triton") == 1


def test_sections_are_of_one_form() -> None:
    for section in report.SECTIONS.values():
        parameters = inspect.signature(section.run).parameters
        assert list(parameters) == ["repeats", "size", "progress"]
        assert parameters["size"].default is Size.FULL


def test_a_wrong_section_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ConfigError, match=r"'nonsense'; there are llama_step, .*merge_error"):
        report.select(["merge_time", "nonsense"])
    assert list(report.select(["merge_time", "llama_step"])) == ["llama_step", "merge_time"]
    assert list(report.select(None)) == list(report.SECTIONS)
    result = CliRunner().invoke(app, ["bench", "--only", "nonsense"])
    assert result.exit_code == ERROR_EXIT


def test_the_command_writes_the_page_and_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["bench", "--quick", "--repeats", "2", "--only", "merge_error"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "A quick run" in result.stdout
    # A part is no page of the documentation.
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(app, [*command, "--out", "docs/page.md"])
    assert result.exit_code == 0
    text = Path("docs/page.md").read_text(encoding="utf-8")
    assert "## Goals that were met" in text
    assert "| merge, error in half types |" in text
    assert "| largest error of a merged weight in half precision | 0.500 ulp |" in text
    report.write(Path("docs/page.md"), text, {"a.svg": "<svg/>"})
    assert Path("docs/img/a.svg").read_text(encoding="utf-8") == "<svg/>"


def measured(times: dict[str, float], saved: dict[str, int], floor: float) -> dict[str, Any]:
    steps = {name: Step(Sample((one,) * 5), saved.get(name)) for name, one in times.items()}
    return {"cpu, float32": Measured(floor, steps)}


def test_goals_are_judged_by_what_was_measured() -> None:
    names = ("lora-fx", "PEFT", "lora-fx, with example inputs")
    times = {"frozen": 1.0, **{f"{name}, p = {p}": 1.2 for name in names for p in ("0", "0.05")}}
    times["lora-fx, p = 0"] = 1.10
    times["lora-fx, p = 0.05"] = 1.25
    saved = {"frozen": 10 * MIB, **{name: 30 * MIB for name in times if name != "frozen"}}
    by_name = {
        row[0]: row for row in goals.rows({"llama_step": measured(times, saved, floor=1.06)})
    }
    # PEFT is 0.14 above the floor, and 0.04 is less than half of it.
    assert by_name["O, Llama 4 × 512, p = 0"][-3:] == (
        "1.10; with example inputs 1.20; PEFT 1.20; F 1.060",
        "yes",
        "",
    )
    assert by_name["O, Llama 4 × 512, p = 0.05"][-2:] == ("no, by 0.05", "profile_step")
    assert by_name["saved, Llama 4 × 512, p = 0"][-2:] == ("no, by 2 MiB", "saved_step")
    assert by_name["saved, Llama 4 × 512, p = 0.05"][-2:] == ("yes", "")
    assert by_name["O, experts"][-3:] == ("not measured", "–", "")
    assert len(goals.rows({})) == len(goals.GOALS)
    assert {goal.section for goal in goals.GOALS} <= set(report.SECTIONS)
    assert {goal.bound for goal in goals.GOALS} <= set(report.SECTIONS)


def test_steps_are_judged_beside_the_frozen_one_of_their_own_form() -> None:
    base, again = step_sections.COMPILED_BASE, step_sections.COMPILED_AGAIN
    times = {"frozen": 2.0, base: 1.0, again: 1.01}
    times |= {f"{name}, p = {p}": 1.07 for name in ("lora-fx", "PEFT") for p in ("0", "0.05")}
    found = goals.rows({"compiled_step": measured(times, {}, 1.0)})
    by_name = {row[0]: row[3:5] for row in found}
    plain = by_name["compiled / frozen compiled, p = 0"]
    assert plain[0].startswith("1.07; PEFT 1.07; A/A 1.01")
    assert plain[1] == "no, by 0.01"
    assert by_name["compiled / frozen compiled, p = 0.05"][1] == "yes"
    del times[again]
    found = goals.rows({"compiled_step": measured(times, {}, 1.0)})
    assert {row[4] for row in found} == {"–"}


def test_the_step_that_keeps_least_is_judged_by_its_noise() -> None:
    times = {"frozen": 1.0}
    for p in ("0", "0.05"):
        times |= {f"{name}, p = {p}": 1.1 for name in (OURS, OURS_AGAIN, BALANCED, "PEFT")}
    found = measured(times, {}, 1.0)
    title = 'O, Llama 4 × 512, memory="balanced", p = '
    by_name = {row[0]: row[3:5] for row in goals.rows({"memory_step": found})}
    assert by_name[f"{title}0"][1] == "no, by 0.02"
    assert by_name[f"{title}0.05"][1] == "yes"
    noisy = {**times, f"{OURS_AGAIN}, p = 0": 1.1 * 1.03}
    by_name = {row[0]: row[3:5] for row in goals.rows({"memory_step": measured(noisy, {}, 1.0)})}
    assert by_name[f"{title}0"][1] == "yes"


def test_what_balanced_keeps_and_costs_is_judged_in_every_model() -> None:
    names = (OURS, OURS_AGAIN, BALANCED)
    times = {"frozen": 1.0, **{f"{name}, p = 0": 1.1 for name in names}}
    saved = {"frozen": 10 * MIB, f"{BALANCED}, p = 0": 9 * MIB}
    good = dataclasses.replace(measured(times, saved, 1.0)["cpu, float32"], model="A, 8 tokens")
    slow = {**times, f"{BALANCED}, p = 0": 1.1 * 1.03}
    bad = dataclasses.replace(
        good, model="B", steps=measured(slow, saved, 1.0)["cpu, float32"].steps
    )

    def verdicts(found: dict[str, Any]) -> list[tuple[str, ...]]:
        rows = {row[0]: row for row in goals.rows({"memory_step": found})}
        asked = [goal.workload for goal in goals.GOALS if goal.section == "memory_step"]
        found = [rows[name][-3:-1] for name in asked]
        return [row for row in found if row[0].startswith("A ")]

    assert verdicts({"a": good}) == [
        ("A 9.0 of 10.0 MiB", "yes"),
        ("A 1.000; A/A 1.000", "yes"),
    ]
    assert verdicts({"a": good, "b": bad})[1][1] == "no, by 0.01"


def test_every_goal_has_a_function_that_judges_it() -> None:
    assert all(inspect.isfunction(getattr(goals, goal.judge)) for goal in goals.GOALS)


def test_goals_over_a_quantized_base_are_judged_within_turns_and_by_all_that_is_kept() -> None:
    names = [f"{name}, p = {p}" for name in (OURS, PEFT) for p in ("0", "0.05")]
    frozen = ("frozen", AGAIN)
    times = {**dict.fromkeys(frozen, 1.0), **dict.fromkeys(names, 1.3), f"{OURS}, p = 0": 1.2}
    saved = {**dict.fromkeys(frozen, 10 * MIB), **dict.fromkeys(names, 30 * MIB)}

    def verdicts(**changed: Any) -> dict[str, tuple[str, ...]]:
        inner = measured(changed.get("times", times), changed.get("saved", saved), 1.06)
        dense = {**dict.fromkeys(saved, 0), **changed.get("dense", {})}
        step = dataclasses.replace(inner["cpu, float32"], look=Look(dense, MIB, 7 * MIB))
        right = {
            learning.DENSE: (0.80, 0.82),
            learning.NF4: changed.get("right", (0.80, 0.81)),
            learning.THEIRS: (0.79, 0.80),
        }
        learned = learning.Learned(right, 5, 200)
        found = {
            "quantized_step": {"cpu, float32": step},
            "quantized_quality": {"cpu, float32": learned},
        }
        return {row[0]: row[-3:-1] for row in goals.rows(found) if "NF4" in row[0]}

    found = verdicts()
    assert {name: met for name, (_, met) in found.items()} == dict.fromkeys(
        ["O, NF4 base, p = 0", "O, NF4 base, p = 0.05", "saved, NF4 base", "accuracy, NF4 base"],
        "yes",
    )
    assert found["accuracy, NF4 base"][0] == "80.5 %; over fp32 81.0; PEFT over NF4 79.5"
    assert found["saved, NF4 base"][0] == (
        "20.0 MiB, of weights 0.0; p = 0.05 20.0; PEFT 20.0 and 20.0"
    )
    slow = verdicts(times={**times, f"{OURS}, p = 0.05": 1.43})
    assert slow["O, NF4 base, p = 0.05"] == (
        "1.43; PEFT 1.30; beside it 1.10; A/A 1.00",
        "no, by 0.1",
    )
    noisy = verdicts(times={**times, f"{OURS}, p = 0.05": 1.43, AGAIN: 1.15})
    assert noisy["O, NF4 base, p = 0.05"][1] == "yes"
    heavy = verdicts(dense={f"{OURS}, p = 0": 2 * MIB})
    assert heavy["saved, NF4 base"][1] == "no, by 2 MiB"
    more = verdicts(saved={**saved, f"{OURS}, p = 0.05": 31 * MIB})
    assert more["saved, NF4 base"][1] == "no, by 1 MiB"
    assert verdicts(right=(0.78, 0.80))["accuracy, NF4 base"][1] == "no, by 1 points"
    empty = {"quantized_step": {}, "quantized_quality": {}}
    assert {row[-2] for row in goals.rows(empty)} == {"–"}


def test_a_missed_goal_links_to_the_section_that_shows_why() -> None:
    times = {f"{name}, p = {p}": 1.2 for name in (OURS, EXPORTED, PEFT) for p in ("0", "0.05")}
    results = {"llama_step": measured({"frozen": 1.0, **times}, {}, floor=1.06)}
    on_page = {name: report.SECTIONS[name] for name in ("llama_step", "profile_step")}
    row = goals.rows(results, functools.partial(report.reference, on_page))[0]
    assert row[-1] == "[Where the time of that step goes](#where-the-time-of-that-step-goes)"
    row = goals.rows(results, functools.partial(report.reference, {}))[0]
    assert row[-1] == "Where the time of that step goes"
    link = report.reference(report.SECTIONS, "llama_step")
    assert link.endswith("(#a-training-step-of-a-small-llama-all-linear-rank-16)")


def test_columns_that_say_nothing_are_left_out() -> None:
    columns, rows = report.without_empty(
        ("a", "b", "c"), [("1", "–", ""), ("2", "", "–"), ("", "–", "–")]
    )
    assert (columns, rows) == (["a"], [["1"], ["2"], [""]])


def test_a_merge_with_a_temporary_of_the_size_of_the_weight_misses_its_goal() -> None:
    one = Merged(Sample((0.4,) * 5), Memory(16 * MIB, 4 * MIB), 16 * MIB)
    peft = dataclasses.replace(one, sample=Sample((1.0,) * 5), memory=Memory(0, 16 * MIB))
    found = {OURS: one, OURS_INTO: one, PEFT_MERGE: peft, BOUND: one}

    def verdicts(given: dict[str, Merged]) -> tuple[str, str]:
        table = {row[0]: row[-2] for row in goals.rows({"merge_time": {"cpu, float32": given}})}
        return table["merge, 105M weights, fp32"], table["merge, memory"]

    assert verdicts(found) == ("yes", "yes")
    slow = dataclasses.replace(peft, sample=Sample((1.1,) * 5))
    assert verdicts({**found, OURS: slow}) == ("yes", "yes")
    assert verdicts({**found, OURS_INTO: slow}) == (
        "no, by 0.1 s",
        "no, by 16 MiB",
    )


def test_charts_can_be_read_on_light_and_dark_pages() -> None:
    group = Group("g", {"lora-fx & b": 1.25, "PEFT": 1.5}, 1.1)
    text = bars("A <title>", "note", [group])
    assert text == bars("A <title>", "note", [group])
    tree = ET.fromstring(text)
    space = {"s": "http://www.w3.org/2000/svg"}
    words = {
        "".join(one.itertext()): one.attrib["style"] for one in tree.iterfind(".//s:text", space)
    }
    # The line says what it is.
    assert {"A <title>", "note", "g", "lora-fx & b", "1.25", "F 1.10"} <= words.keys()
    # Nothing lies behind, and text is gray: half way between a light and a dark page.
    assert "#ffffff" not in text
    assert all("#808080" in style for word, style in words.items() if not word.startswith("F "))
    assert "<dc:date>" not in text
    ET.fromstring(bars("empty", "", []))


def test_operations_are_sorted_by_what_they_do() -> None:
    square, thin = [[64, 64], [64, 64]], [[64, 64], [64, 16]]
    assert step_sections.group_of("aten::mm", square, 16) == "base products"
    assert step_sections.group_of("aten::addmm_", thin, 16) == "thin products"
    assert step_sections.group_of("aten::mm", [[64, 100], [100, 48]], 16) == "thin products"
    assert step_sections.group_of("aten::bernoulli_", [], 16) == "random numbers"
    assert step_sections.group_of("aten::native_dropout", [], 16) == "random numbers"
    assert step_sections.group_of("aten::copy_", [], 16) == "copies, fills"
    assert step_sections.group_of("aten::mul", [], 16) == "element by element"
    assert step_sections.group_of("aten::where", [], 16) == "element by element"
    # Views, and operations that only call others, compute nothing.
    for name in ("aten::t", "aten::view", "aten::linear", "aten::matmul", "aten::empty"):
        assert step_sections.group_of(name, square, 16) == "between operations"


def test_what_is_kept_is_sorted_by_shape_and_type() -> None:
    rank = Settings().r
    assert step_sections.kind_of(torch.ones(4, 40)) == step_sections.KINDS[0]
    assert step_sections.kind_of(torch.ones(4, rank)) == step_sections.KINDS[1]
    # q, k and v share one product with their A's.
    assert step_sections.kind_of(torch.ones(5, 3 * rank)) == step_sections.KINDS[1]
    assert step_sections.kind_of(torch.ones(4, 40).bool()) == step_sections.KINDS[2]
    assert step_sections.kind_of(torch.ones(1, 4, 1)) == step_sections.KINDS[3]


def test_kernels_are_counted_without_named_ranges() -> None:
    def event(device: str, named: bool = False) -> Any:
        return types.SimpleNamespace(
            device_type=getattr(DeviceType, device), is_user_annotation=named
        )

    assert launches([event("CUDA"), event("CPU"), event("CUDA", named=True), event("CUDA")]) == 2
    with torch.profiler.profile() as profile:
        torch.ones(2)
    assert launches(profile.events() or ()) == 0


def test_a_section_measures_at_every_place_as_one_piece_of_work() -> None:
    where = [Placement(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)]
    told: list[tuple[int, int, str]] = []

    def work(placement: Placement, run: Run) -> torch.dtype:
        assert run.progress is not None
        run.tell(1, 1, "a")
        return placement.dtype

    run = Run(1, Size.TINY, lambda *given: told.append(given)).part(0, 1, "title")
    found = run.at_each(where, work)
    assert found == {"cpu, float32": torch.float32, "cpu, bfloat16": torch.bfloat16}
    assert told == [(1, 2, "title a"), (2, 2, "title a")]
    assert [one.dtype for one in placements(half=False) if not one.on_cuda] == [torch.float32]
    assert str(placements(half=True)[0]) == "cpu, float32"


def test_what_only_a_gpu_has_is_left_out_without_one() -> None:
    assert kernel_launches(lambda: torch.ones(2), torch.device("cpu")) is None
    assert allocator_peak(lambda: torch.ones(2), torch.device("cpu")) is None


def test_the_allocator_is_asked_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    sizes = {"memory_allocated": 100, "max_memory_allocated": 350}
    for name in ("synchronize", "reset_peak_memory_stats", *sizes):
        monkeypatch.setattr(
            torch.cuda, name, lambda _, name=name: asked.append(name) or sizes.get(name)
        )
    peak = allocator_peak(
        lambda: asked.append("step"), torch.device("cuda"), lambda: asked.append("reset")
    )
    assert peak == 250
    # What the first step leaves is let go of before anything counts.
    before = ["step", "reset", "synchronize", "reset_peak_memory_stats", "memory_allocated"]
    assert asked == [*before, "step", "synchronize", "max_memory_allocated"]


def test_a_gpu_gets_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    hardware.computes_bf16.cache_clear()
    try:
        found = [str(placement) for placement in placements(half=True)]
    finally:
        hardware.computes_bf16.cache_clear()
    assert found[:2] == ["cpu, float32", "cuda, float32"]
    assert found[-1] == "cuda, bfloat16"
    assert synchronizer(torch.device("cpu")) is None
    assert synchronizer(torch.device("cuda", 0)) is not None
    assert isinstance(hardware.compiles(torch.device("cuda", 0)), bool)


@pytest.mark.cuda
def test_launches_and_the_allocator_on_cuda() -> None:
    device = torch.device("cuda")
    x = torch.ones(1024, device=device)
    assert kernel_launches(lambda: x.mul(2).add(1), device) == 2
    assert allocator_peak(lambda: x.mul(2), device) == 4 * 1024
