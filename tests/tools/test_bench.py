"""What the benchmarks count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_fx.tools.bench.measure import interleaved
from lora_fx.tools.bench.memory import measure_memory
from lora_fx.tools.bench.saved import saved_bytes

KIB = 1024


def test_memory_is_counted_while_somebody_holds_it() -> None:
    kept = []

    def step() -> None:
        kept.append(torch.ones(KIB))  # 4 KiB that stay
        for _ in range(3):
            torch.ones(2 * KIB)  # 8 KiB, one at a time

    found = measure_memory(step)
    assert found.peak == 12 * KIB
    assert found.largest == 8 * KIB


def test_views_and_what_was_there_before_cost_nothing() -> None:
    before = torch.ones(KIB)
    assert measure_memory(lambda: before.view(2, -1).T[1:].add_(1)).peak == 0


def test_what_is_saved_for_backward_counts_until_it_is_used() -> None:
    layer = nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 8))
    x = torch.ones(128, 8)
    with_gradients = measure_memory(lambda: layer(x).sum().backward())
    with torch.no_grad():
        without = measure_memory(lambda: layer(x))
    assert with_gradients.peak > without.peak
    assert without.largest == 128 * 256 * 4


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    layer = nn.Linear(8, 256)
    x = torch.ones(4, 8)
    # The input, for the gradient of W; W itself would be for that of the input.
    assert saved_bytes(layer, lambda: layer(x)) == 4 * 8 * 4
    # tanh keeps what it gives, and the second layer the same storage.
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(256, 8))
    assert saved_bytes(model, lambda: model(x)) == (4 * 8 + 4 * 256) * 4
    assert saved_bytes(model.requires_grad_(False), lambda: model(x)) == 0


@pytest.mark.slow
def test_dora_saves_little_more_than_lora_and_peft_much() -> None:
    pytest.importorskip("peft")
    from lora_fx.tools.bench import dora_step

    models = dora_step.models(0.0)
    found = {name: saved_bytes(one, dora_step.forward_of(one)) for name, one in models.items()}
    assert found["lora-fx LoRA"] <= found["PEFT LoRA"]
    assert found["lora-fx DoRA"] < 1.1 * found["lora-fx LoRA"]
    assert found["PEFT DoRA"] > 2 * found["PEFT LoRA"]


@pytest.mark.slow
def test_adapters_on_experts_cost_little_beside_peft() -> None:
    pytest.importorskip("peft")
    from lora_fx.tools.bench import expert_step

    found = expert_step.run(repeats=2)
    frozen, ours, peft = (found[name] for name in ("frozen", "lora-fx", "PEFT"))
    # Of the size of an expert's weights is nothing but what the frozen model makes, too.
    assert ours[1].largest == frozen[1].largest < peft[1].largest
    assert ours[1].peak < 1.5 * frozen[1].peak
    # Times are not compared here: machines that run tests are shared.
    assert expert_step.rows(found)[1][0][2] == "1.00"


def test_contenders_are_timed_in_turn() -> None:
    ran: list[str] = []
    contenders = {name: (lambda: None, lambda _, name=name: ran.append(name)) for name in "ab"}
    found = interleaved(contenders, repeats=3)
    assert {name: sample.runs for name, sample in found.items()} == {"a": 3, "b": 3}
    assert all({*ran[i : i + 2]} == {"a", "b"} for i in range(0, 8, 2))
