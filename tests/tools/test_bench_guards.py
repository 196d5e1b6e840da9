"""What the section about guards measures."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from lora_fx.tools.bench import goals, guards
from lora_fx.tools.bench.contenders import BUILDERS, EXPORTED, OURS, Settings
from lora_fx.tools.bench.measure import Sample, Size
from lora_fx.tools.bench.workloads import Workload, resnet, small_llama


@pytest.mark.parametrize(
    ("workload", "way", "targets"),
    [
        pytest.param(small_llama(Size.TINY), OURS, "all-linear", id="regions"),
        pytest.param(resnet(Size.TINY), OURS, ("convolution",), id="convolutions"),
        pytest.param(small_llama(Size.TINY), EXPORTED, "all-linear", id="exported"),
    ],
)
def test_the_guards_are_those_of_the_graphs_that_a_forward_runs(
    workload: Workload, way: str, targets: str | tuple[str, ...]
) -> None:
    settings = Settings(target_modules=targets, example_inputs=workload.inputs)
    model = BUILDERS[way](workload.make(), settings).train()

    def forward() -> torch.Tensor:
        return model(**workload.inputs).loss

    forward()
    found = [one for one in guards.called_graphs(forward) if one[1]]
    asked = [(module, guards.guard_of(tests, names)) for module, tests, names in found]
    assert asked
    # Every graph applies to the call that is timed, and says so if something that it has read changes.
    assert not any(guard(module) for module, guard in asked)
    for module, _ in asked:
        vars(module).update(dict.fromkeys(("bias", "padding_mode", "max_norm"), "another"))
    assert any(guard(module) for module, guard in asked)


def test_goals_of_guards_are_judged_by_the_worst_model_and_by_the_noise() -> None:
    def verdicts(part: float, second: float, again: float) -> list[str]:
        cases = [
            guards.Case(title, 1, 1, Sample((1.0,) * 5), Sample((guard,) * 5))
            for title, guard in (("Llama", 0.001), ("ResNet", part))
        ]
        steps = {guards.OFF: 1.0, guards.SECOND: second, guards.AGAIN: again}
        samples = {name: Sample((time,) * 5) for name, time in steps.items()}
        found = guards.GuardTimes(tuple(cases), samples)
        return [row[-2] for row in goals.rows({"guards": found}) if row[-2] != "–"]

    assert verdicts(0.009, 1.02, 1.03) == ["yes", "yes"]
    assert verdicts(0.009, 1.02, 0.97) == ["yes", "yes"]
    assert verdicts(0.03, 1.02, 1.01) == ["no, by 2 %", "no, by 0.01"]
