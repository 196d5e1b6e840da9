"""Every section runs on tiny shapes; the goals, the pictures and the command."""

from __future__ import annotations

import dataclasses
import inspect
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from typer.testing import CliRunner

from lora_fx.errors import ConfigError
from lora_fx.tools.bench import goals, profile_step, report
from lora_fx.tools.bench.chart import Bar, Group, bars
from lora_fx.tools.bench.hardware import allocator_peak, kernel_launches
from lora_fx.tools.bench.measure import Sample
from lora_fx.tools.bench.memory import Memory
from lora_fx.tools.bench.merge_time import Merged
from lora_fx.tools.bench.sizes import Size
from lora_fx.tools.bench.steps import Measured, Step
from lora_fx.tools.commands.app import ERROR_EXIT, app

SLOW = {"compiled_step", "model_steps"}
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
    assert rows
    assert all(
        len(row) == len(columns) and all(isinstance(one, str) for one in row) for row in rows
    )
    assert section.TITLE
    assert section.caption()
    assert told
    assert all(done <= total for done, total in told)
    for text in getattr(section, "charts", lambda _: {})(results).values():
        ET.fromstring(text)


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
    assert "## Goals" in text
    assert "| merge, error in half types |" in text
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
    assert by_name["O, Llama 4 × 512, p = 0"][-2:] == (
        "1.10; with example inputs 1.20; PEFT 1.20; F 1.060",
        "yes",
    )
    assert by_name["O, Llama 4 × 512, p = 0.05"][-1] == "no, by 0.05"
    assert by_name["saved, Llama 4 × 512, p = 0"][-1] == "no, by 2 MiB"
    assert by_name["saved, Llama 4 × 512, p = 0.05"][-1] == "yes"
    assert by_name["O, experts"][-2:] == ("not measured", "–")
    assert len(goals.rows({})) == len(goals.GOALS)
    assert {goal.section for goal in goals.GOALS} <= set(report.SECTIONS)


def test_a_merge_with_a_temporary_of_the_size_of_the_weight_misses_its_goal() -> None:
    one = Merged(Sample((0.4,) * 5), Memory(16 * MIB, 4 * MIB), 16 * MIB)
    peft = dataclasses.replace(one, sample=Sample((1.0,) * 5), memory=Memory(0, 16 * MIB))
    found = {"lora-fx": one, "lora-fx, into=base": one, "PEFT merge_and_unload": peft}

    def verdicts(given: dict[str, Merged]) -> tuple[str, str]:
        table = {row[0]: row[-1] for row in goals.rows({"merge_time": {"cpu, float32": given}})}
        return table["merge, 105M weights, fp32"], table["merge, memory"]

    assert verdicts(found) == ("yes", "yes")
    slow = dataclasses.replace(peft, sample=Sample((0.6,) * 5))
    assert verdicts({**found, "lora-fx": slow, "lora-fx, into=base": peft}) == (
        "no, by 0.1 s",
        "no, by 16 MiB",
    )


def test_charts_can_be_read_on_light_and_dark_pages() -> None:
    text = bars("A <title>", "note", [Group("g", [Bar("a & b", 1.25, "ours")], 1.1)])
    tree = ET.fromstring(text)
    space = {"s": "http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in text
    assert [one.text for one in tree.findall("s:title", space)] == ["A <title>"]
    assert {"a & b", "1.25", "g"} <= {one.text for one in tree.findall("s:text", space)}
    box = [float(one) for one in tree.attrib["viewBox"].split()]
    for one in tree.findall("s:rect", space):
        assert float(one.get("x", 0)) + float(one.attrib["width"]) <= box[2]
    assert len(tree.findall("s:line[@class='line']", space)) == 1
    ET.fromstring(bars("empty", "", []))


def test_operations_are_sorted_by_what_they_do() -> None:
    square, thin = [[64, 64], [64, 64]], [[64, 64], [64, 16]]
    assert profile_step.group_of("aten::mm", square, 16) == "base products"
    assert profile_step.group_of("aten::addmm_", thin, 16) == "thin products"
    assert profile_step.group_of("aten::bernoulli_", [], 16) == "random numbers"
    assert profile_step.group_of("aten::native_dropout", [], 16) == "random numbers"
    assert profile_step.group_of("aten::copy_", [], 16) == "copies, fills"
    assert profile_step.group_of("aten::mul", [], 16) == "element by element"


def test_what_only_a_gpu_has_is_left_out_without_one() -> None:
    assert kernel_launches(lambda: torch.ones(2), torch.device("cpu")) is None
    assert allocator_peak(lambda: torch.ones(2), torch.device("cpu")) is None


@pytest.mark.cuda
def test_launches_and_the_allocator_on_cuda() -> None:
    device = torch.device("cuda")
    x = torch.ones(1024, device=device)
    assert kernel_launches(lambda: x.mul(2).add(1), device) == 2
    assert allocator_peak(lambda: x.mul(2), device) == 4 * 1024
