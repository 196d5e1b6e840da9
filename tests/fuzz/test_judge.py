"""The fuzzer itself: it sees what is wrong, and takes what is right."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator

import pytest
import torch

import lora_fx
from tests.fuzz.choices import Choices, Repeated, Seeded, shrunk
from tests.fuzz.features import FEATURES, OFF
from tests.fuzz.grammar import write_program
from tests.fuzz.judge import judge
from tests.fuzz.program import Program
from tests.fuzz.worker import worker

SOURCE = """
import torch
from torch import nn

GRAD, LOW = True, False


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.w = nn.Parameter(torch.randn(4, 5))
        self.t = 2.0

    def forward(self, x):
        return self.conv(self.fc(x).mT).mT.tanh() @ self.w * self.t


def build():
    return Net()


def calls():
    return [("forward", (torch.ones(2, 3, 4, dtype=torch.float64).cumsum(1),), {})]


def change(m):
    m.t = 0.5
"""

EVERYTHING = ("merge", "reload", "copy", "pickle", "call", "disable", "call")


def program(source: str = SOURCE, **options: object) -> Program:
    values = {"configs": ({"r": 2, "target_modules": ".*"},), "actions": EVERYTHING, **options}
    return Program(textwrap.dedent(source), **values)


ASKS = """
import torch
from torch import nn

GRAD, LOW = True, False


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.fc = nn.Linear(6, 6)

    def forward(self, ids):
        x = self.emb(ids)
        x = x * 2 if x.requires_grad else x
        return self.fc(x)


def build():
    return Net()


def calls():
    return [("forward", (torch.tensor([[1, 2]]),), {})]


def change(m):
    pass
"""


def test_the_oracle_is_frozen_where_the_base_is() -> None:
    configs = ({"r": 2, "target_modules": ["fc"]}, {"r": 2, "target_modules": ".*"})
    actions = ("call", "switch second", "call", "switch default,second", "call", "disable", "call")
    outcome = judge(program(ASKS, configs=configs, actions=actions))
    assert outcome.kind == "equal", str(outcome)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}]
)
def test_a_right_program_is_equal(dtype: str, config: dict[str, object]) -> None:
    config = {"r": 2, "target_modules": ".*", **config}
    actions = ("call", "disable") if "lora_bias" in config else EVERYTHING
    outcome = judge(program(configs=(config,), dtype=dtype, actions=actions))
    assert outcome.kind == "equal", str(outcome)
    assert outcome.sites == 3


def test_several_adapters_are_added_up() -> None:
    configs = (
        {"r": 2, "target_modules": ".*"},
        {"r": 4, "use_dora": True, "target_modules": ["fc"]},
    )
    actions = ("call", "switch second", "call", "switch default,second", "call", "merge", "disable")
    outcome = judge(program(configs=configs, actions=actions))
    assert outcome.kind == "equal", str(outcome)


def _spoil_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*args: object, **kwargs: object) -> object:
        model = rewrite(*args, **kwargs)
        model.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-6))
        return model

    rewrite = lora_fx.rewrite
    monkeypatch.setattr(lora_fx, "rewrite", spoiled)


def _spoil_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*args: object, **kwargs: object) -> object:
        merged = merge(*args, **kwargs)
        merged.fc.weight.data *= 1 + 1e-6
        return merged

    merge = lora_fx.merge
    monkeypatch.setattr(lora_fx, "merge", spoiled)


def _spoil_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*args: object, **kwargs: object) -> object:
        model = rewrite(*args, **kwargs)
        model.fc.lora_A.default.register_hook(lambda grad: grad * (1 + 1e-6))
        return model

    rewrite = lora_fx.rewrite
    monkeypatch.setattr(lora_fx, "rewrite", spoiled)


def _spoil_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(model: torch.nn.Module, *args: object, **kwargs: object) -> object:
        adapted = rewrite(model, *args, **kwargs)
        model.t = 3.0
        return adapted

    rewrite = lora_fx.rewrite
    monkeypatch.setattr(lora_fx, "rewrite", spoiled)


@pytest.mark.parametrize(
    ("spoil", "stage"),
    [
        (_spoil_output, "call"),
        (_spoil_merge, "merged"),
        (_spoil_gradient, "backward of call"),
        (_spoil_argument, "purity"),
    ],
)
def test_a_wrong_number_is_seen(monkeypatch: pytest.MonkeyPatch, spoil: object, stage: str) -> None:
    spoil(monkeypatch)  # type: ignore[operator]
    actions = ("merge", "call") if stage == "merged" else ("call",)
    outcome = judge(program(actions=actions))
    assert (outcome.kind, outcome.stage) == ("silent", stage), str(outcome)


def test_rounding_is_no_difference_and_a_lost_adapter_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(program(dtype="bfloat16")).kind == "equal"
    monkeypatch.setattr(lora_fx, "rewrite", _without_adapter(lora_fx.rewrite))
    for dtype in ("float32", "bfloat16"):
        outcome = judge(program(dtype=dtype, actions=("call",)))
        assert (outcome.kind, outcome.stage) == ("silent", "call"), str(outcome)


def test_what_the_rounding_of_fp64_explains_is_unstable_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.fuzz.judge._DOUBLE", 1e-18)
    assert judge(program(actions=("call",))).label == "unstable (call)"
    _spoil_output(monkeypatch)
    assert judge(program(actions=("call",))).label == "silent (call)"


def _without_adapter(rewrite: object) -> object:
    def spoiled(*args: object, **kwargs: object) -> object:
        model = rewrite(*args, **kwargs)  # type: ignore[operator]
        # A copy: the watch would see a read of the weight itself.
        weight = model.fc.weight.detach().clone()
        model.fc.register_forward_hook(
            lambda layer, inputs, output: torch.nn.functional.linear(inputs[0], weight, layer.bias)
        )
        return model

    return spoiled


def test_a_refusal_an_exception_and_a_wrong_program_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = program(configs=({"r": 2, "target_modules": ["nothing"]},))
    assert judge(missing).label == "refused (rewrite)"
    assert judge(program(SOURCE.replace("Linear(4", "Linear(5"))).label == "invalid (original)"
    assert judge(program("this is not Python")).label == "invalid (source)"
    monkeypatch.setattr(lora_fx, "rewrite", lambda *args, **kwargs: 1 / 0)
    assert judge(program()).label == "raw (rewrite)"


def test_a_copy_that_computes_with_layers_of_the_original_is_no_copy() -> None:
    made = "hold = lambda layer: lambda x: layer(x)\n\n\nclass Net"
    held = SOURCE.replace("self.t = 2.0", "self.t = 2.0; self.held = hold(self.fc)")
    held = held.replace("class Net", made).replace("self.fc(x)", "self.held(x)")
    held = held.replace(
        "        return self.conv",
        "        if x.sum() > 1e9:\n            return x\n        return self.conv",
    )
    assert judge(program(held, actions=("copy", "call"))).kind == "equal"


@pytest.fixture(scope="module")
def workers() -> Iterator[object]:
    with worker() as one:
        yield one


def test_a_dead_process_is_an_outcome(workers: object) -> None:
    dying = SOURCE.replace("import torch\n", "import os\nimport torch\n", 1).replace(
        "m.t = 0.5", "os._exit(7)"
    )
    outcome = workers.judge(program(dying, actions=("change",)))  # type: ignore[attr-defined]
    assert outcome.label == "dead (exit 7)"
    assert workers.judge(program(actions=("call",))).kind == "equal"  # type: ignore[attr-defined]


def test_a_program_travels_as_json() -> None:
    one = write_program(Seeded("3:1"))
    assert Program.from_json(one.to_json()) == one


def test_equal_seeds_write_equal_programs_and_choices_repeat_them() -> None:
    choices = Seeded("5:2")
    one = write_program(choices)
    assert write_program(Seeded("5:2")) == one
    assert write_program(Repeated(choices.log)) == one


def test_shrinking_keeps_what_fails() -> None:
    def still(log: list[int]) -> list[int] | None:
        return log if log.count(3) >= 2 else None

    assert shrunk([1, 3, 0, 2, 2, 3, 1, 9], still) == [3, 3]  # type: ignore[arg-type]


def test_every_feature_is_written_by_some_program() -> None:
    reached: set[str] = set()
    for number in range(12000):
        choices = Seeded(f"reach:{number}")
        write_program(choices)
        reached.update(choices.features)
    assert reached == set(FEATURES)


def test_what_is_off_is_not_written() -> None:
    for number in range(300):
        choices: Choices = Seeded(f"off:{number}", OFF | {"move/layer"})
        write_program(choices)
        assert not (OFF | {"move/layer"}) & set(choices.features)


def test_each_feature_that_is_off_says_why() -> None:
    assert {name for name, why in FEATURES.items() if why} == OFF
    assert all(len(FEATURES[name]) > 10 for name in OFF)


def test_the_grammar_writes_programs_that_run() -> None:
    """A grammar whose programs fail by themselves, or adapt nothing, finds nothing."""
    outcomes = []
    for number in range(60):
        one = write_program(Seeded(f"runs:{number}", OFF))
        outcomes.append(judge(dataclasses.replace(one, actions=("call",))))
    assert not [str(one) for one in outcomes if one.kind == "invalid"]
    assert sum(one.sites > 0 for one in outcomes) >= 30
