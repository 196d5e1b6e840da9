"""What the benchmarks count."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from torch import nn

from lora_fx.tools.bench.counted import count_operations, measure_memory, saved_by, saved_bytes
from lora_fx.tools.bench.measure import Sample, Size, interleaved, portion, ratio

KIB = 1024
LIBRARIES_AND_KINDS = [f"{who} {kind}" for who in ("lora-fx", "PEFT") for kind in ("LoRA", "DoRA")]


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


def test_a_new_storage_counts_at_the_address_of_one_that_was_there() -> None:
    def peak(rounds: int) -> int:
        given = [torch.ones(KIB) for _ in range(rounds)]

        def step() -> None:
            kept = []
            while given:
                given.pop().add_(1)
                kept.append(torch.ones(KIB))

        return measure_memory(step).peak

    assert peak(50) == 50 * 4 * KIB


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


def test_what_is_let_go_of_before_the_forward_ends_is_not_kept() -> None:
    layer = nn.Linear(8, 256)
    x = torch.ones(4, 8)

    def forward() -> torch.Tensor:
        for _ in range(3):
            constant = layer(x).exp().sum().detach()
        return layer(x) * constant

    # The input, for the gradient of W, and the constant, for that of the first factor.
    assert saved_bytes(layer, forward) == 4 * 8 * 4 + 4
    found = saved_by(layer, forward, lambda tensor: str(tensor.dim()))
    assert found == {"2": 4 * 8 * 4, "0": 4}


def test_what_a_function_keeps_as_an_attribute_is_counted_once() -> None:
    class Behind(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
            ctx.kept = ([x], {"more": torch.ones(KIB)}, weight)
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad * 2, None

    layer = nn.Linear(8, 256)
    x = torch.ones(4, 8, requires_grad=True)
    # x, of which there is one storage, and 4 KiB that no hook sees; the weight is a parameter.
    assert saved_bytes(layer, lambda: Behind.apply(x, layer.weight.detach())) == 4 * 8 * 4 + 4 * KIB


def test_scales_beside_a_quantized_weight_are_part_of_the_model() -> None:
    from lora_fx.tools.bench.step_sections import quantized_base

    model = quantized_base(nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 2)))
    x = torch.ones(4, 64, requires_grad=True)
    # Nothing has a gradient but x: the functions of bitsandbytes hold the packed weights and their scales.
    assert saved_bytes(model.requires_grad_(False), lambda: model(x)) == 0


@pytest.mark.slow
def test_adapters_over_nf4_keep_no_values_of_weights_and_less_than_peft() -> None:
    pytest.importorskip("peft")
    from lora_fx.tools.bench.report import SECTIONS

    found = SECTIONS["quantized_step"].run(repeats=2, size=Size.QUICK)["cpu, float32"]
    assert set(found.look.dense.values()) == {0}
    assert found.look.stored < found.look.plain / 7
    plain, dropped, peft, their_dropped = (
        found.saved_beyond(name) or 0
        for name in ("lora-fx, p = 0", "lora-fx, p = 0.05", "PEFT, p = 0", "PEFT, p = 0.05")
    )
    assert 0 < plain <= peft
    # One bit of a mask for each element of 32.
    assert plain < dropped < 1.1 * plain
    assert their_dropped > 2 * peft


@pytest.mark.slow
def test_adapters_over_nf4_learn_what_those_over_fp32_do() -> None:
    pytest.importorskip("peft")
    from lora_fx.tools.bench import learning

    found = learning.SECTIONS[0].run(repeats=2)["cpu, float32"]
    assert found.lost(learning.NF4) <= 1
    assert found.mean(learning.NF4) > found.mean("frozen, NF4")


def test_curves_of_every_way_are_those_of_the_plain_form() -> None:
    pytest.importorskip("peft")
    from lora_fx.tools.bench import learning
    from lora_fx.tools.bench.contenders import CANONICAL, OURS, PEFT

    section = learning.SECTIONS[1]
    found = section.run(repeats=3, size=Size.TINY)
    plain, dropped = found["0"], found["0.05"]
    assert {losses.shape for losses in plain.losses.values()} == {(3, 4)}
    for name in learning.WAYS:
        # Seeds differ, and a step changes something, in every way by as much but for rounding.
        assert plain.apart(name) < 1e-4 < 1e-2 < plain.between_seeds(name)
        assert (plain.losses[name][:, 0] != plain.losses[name][:, 1]).all()
    # All fused forms have the same masks; the dropout of the plain form and of PEFT draws others.
    assert_close = torch.testing.assert_close
    for name in learning.FUSED:
        assert_close(dropped.losses[name], dropped.losses[OURS], rtol=1e-5, atol=1e-5)
    assert_close(dropped.losses[PEFT], dropped.losses[CANONICAL], rtol=1e-5, atol=1e-5)
    assert dropped.apart(OURS) > 10 * dropped.apart(PEFT)


@pytest.mark.slow
def test_dora_saves_little_more_than_lora_and_peft_much() -> None:
    pytest.importorskip("peft")
    from lora_fx.tools.bench.report import SECTIONS

    steps = SECTIONS["dora_step"].run(repeats=2, size=Size.QUICK)["cpu, float32"].steps
    found = {name: steps[f"{name}, p = 0"].saved or 0 for name in LIBRARIES_AND_KINDS}
    assert 0 < found["lora-fx LoRA"] <= found["PEFT LoRA"]
    balanced = steps["lora-fx, balanced DoRA, p = 0"].saved or 0
    assert 0 < balanced < found["lora-fx LoRA"] < found["lora-fx DoRA"]
    assert found["lora-fx DoRA"] < 0.7 * found["PEFT DoRA"]
    assert found["PEFT DoRA"] > 2 * found["PEFT LoRA"]


@pytest.mark.slow
def test_adapters_on_experts_cost_little_beside_peft() -> None:
    pytest.importorskip("peft")
    from lora_fx.tools.bench.report import SECTIONS

    steps = SECTIONS["expert_step"].run(repeats=2, size=Size.QUICK)["cpu, float32"].steps
    frozen, ours, peft = (steps[name].memory for name in ("frozen", "lora-fx", "PEFT"))
    assert frozen is not None
    assert ours is not None
    assert peft is not None
    # Of the size of an expert's weights is nothing but what the frozen model makes, too.
    assert ours.largest == frozen.largest < peft.largest
    assert ours.peak < 1.5 * frozen.peak
    # Times are not compared here: machines that run tests are shared.


def test_contenders_are_timed_in_turn() -> None:
    ran: list[str] = []
    contenders = {name: (lambda: None, lambda _, name=name: ran.append(name)) for name in "ab"}
    found = interleaved(contenders, repeats=3)
    assert {name: sample.runs for name, sample in found.items()} == {"a": 3, "b": 3}
    assert all({*ran[i : i + 2]} == {"a", "b"} for i in range(0, 8, 2))


def test_a_run_of_many_calls_gives_the_time_of_one() -> None:
    ran: list[int] = []
    found = interleaved(
        {"a": (lambda: None, lambda _: ran.append(1) or time.sleep(0.002))}, repeats=2, calls=5
    )
    assert len(ran) == 3 * 5
    assert 0.002 <= found["a"].median < 0.01


def test_turns_are_whole_and_at_least_five_when_time_is_up() -> None:
    contenders = {name: (lambda: None, lambda _: time.sleep(0.001)) for name in "ab"}
    found = interleaved(contenders, repeats=50, seconds=0.0)
    assert {name: sample.runs for name, sample in found.items()} == {"a": 5, "b": 5}


def test_garbage_is_collected_again_after_a_measurement() -> None:
    def fail(_: None) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        interleaved({"a": (lambda: None, fail)})
    assert gc.get_freeze_count() == 0


def test_ratios_are_taken_within_a_turn() -> None:
    # The machine was ten times slower in the second turn: each turn's ratio is 2 nevertheless.
    base, other = Sample((1.0, 10.0, 1.0)), Sample((2.0, 20.0, 2.0))
    found = ratio(other, base)
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)
    assert Sample((1.0, 2.0)).quartiles == (1.25, 1.75)


def test_pieces_of_work_make_one_bar() -> None:
    told: list[tuple[int, int, str]] = []
    tell = portion(lambda *given: told.append(given), 1, 3, "second")
    assert tell is not None
    tell(5, 10, "a")
    assert told == [(15, 30, "second a")]
    assert portion(None, 0, 1) is None


def test_operations_are_counted_without_views() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    # mul and sum; backward begins with ones_like, and multiplies.
    assert count_operations(lambda: x.mul(2).sum().backward()) == 4
    assert count_operations(lambda: x.view(2, 8).T.mul(2).sum()) == 2
    assert count_operations(lambda: x.detach().T) == 0
