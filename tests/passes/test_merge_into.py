"""Merging over the weights of a model that is given."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraConfig, MergeError
from lora_fx.ir.record import record_of
from lora_fx.passes.merge.fold import cannot_overflow
from lora_fx.passes.merge.placing import unshared
from lora_fx.passes.patterns import pattern_of
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits, ulp_error
from tests.zoo import Mlp, Residual, Tied

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Kinds(nn.Module):
    """Operations whose weights are folded in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.turned = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.raw = nn.Parameter(torch.randn(8, 6))
        self.last = nn.Linear(6, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).mT)
        return self.last(self.turned(x).mT @ self.raw)


def adapted(model: nn.Module, **options) -> nn.Module:
    return randomize(lora_fx.rewrite(model, LoraConfig(**{"r": 2, **options})))


def places(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The object and the memory of each parameter."""
    return {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed", "conv", "turned", "raw", "last"]},
        {"target_modules": ["raw", "last"], "use_dora": True, "bias": "all"},
        {"target_modules": ["last"], "lora_bias": True, "trainable_token_indices": {"embed": [2]}},
        {"target_modules": ["last"], "init_lora_weights": "pissa"},
    ],
)
def test_the_same_values_are_written_over_the_old_ones(options, dtype) -> None:
    model = Kinds().to(dtype)
    changed = adapted(model, **options)
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(changed):
            parameter.add_(0.1 * torch.randn_like(parameter))
    target = copy.deepcopy(model)
    before = places(target)
    lora_fx.merge(changed, into=target)
    assert places(target) == before
    assert_same_bits(target.state_dict(), lora_fx.merge(changed).state_dict())
    assert not all(map(torch.equal, target.parameters(), model.parameters()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_nothing_of_the_size_of_a_weight_is_made(dtype: torch.dtype, options) -> None:
    model = nn.Sequential(nn.Linear(2048, 4096, bias=False)).to(dtype)
    changed = adapted(model, target_modules=["0"], **options)
    target = copy.deepcopy(model)
    with torch.profiler.profile(profile_memory=True) as seen:
        lora_fx.merge(changed, into=target)
    sizes = [event.self_cpu_memory_usage for event in seen.events()]
    assert 0 < max(sizes) < target[0].weight.numel()


def test_what_is_measured_is_what_is_written() -> None:
    model = Residual().to(torch.bfloat16)
    changed = adapted(model)
    target, other = copy.deepcopy(model), copy.deepcopy(model)
    _, found = lora_fx.merge(changed, into=target, return_report=True)
    _, expected = lora_fx.merge(changed, own=True, return_report=True)
    assert found == expected
    lora_fx.merge(changed, into=other)
    assert_same_bits(target.state_dict(), other.state_dict())


# --- what others see is left alone -----------------------------------------------------------------


def test_into_the_model_that_was_rewritten() -> None:
    model = Residual()
    changed = adapted(model)
    ids = torch.tensor([[1, 2, 3]])
    before = changed(ids)
    lora_fx.merge(changed, into=model)
    assert_same_bits(changed(ids), before)
    assert_close(model(ids), before)


def test_a_state_dict_that_somebody_keeps() -> None:
    model = Mlp()
    changed = adapted(model, target_modules=["second"])
    target = copy.deepcopy(model)
    kept = target.state_dict()
    lora_fx.merge(changed, into=target)
    assert_same_bits(kept, model.state_dict())
    assert not torch.equal(target.second.weight, model.second.weight)


def test_which_parameters_can_be_written_over() -> None:
    model = nn.ModuleDict(
        {
            "alone": nn.Linear(2, 3, bias=False),
            "seen": nn.Linear(2, 3, bias=False),
            "turned": nn.Linear(2, 3, bias=False),
            "among": nn.Linear(2, 3, bias=False).share_memory(),
            "tied": Tied(),
        }
    )
    model["again"] = model["alone"]
    view = model["seen"].weight.detach()[0]
    model["turned"].weight = nn.Parameter(torch.randn(2, 3).T)
    with torch.inference_mode():
        model["inferred"] = nn.Linear(2, 3, bias=False)
    expected = {"alone.weight", "again.weight"}
    found = {name for name in unshared(model) if not name.startswith("tied")}
    assert found == expected
    assert not {"tied.embed.weight", "tied.head.weight"} & unshared(model)
    del view
    assert "seen.weight" in unshared(model)


def test_a_weight_that_another_adapter_trains_in_full() -> None:
    model = Residual()
    changed = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["head"]))
    full = LoraConfig(r=2, target_modules=["down"], modules_to_save=["head"])
    lora_fx.add_adapter(changed, full, "full")
    lora_fx.set_adapter(changed, ["default", "full"])
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(changed):
            parameter.add_(0.1 * torch.randn_like(parameter))
    target = copy.deepcopy(model)
    own = {name: p.detach().clone() for name, p in changed.named_parameters()}
    lora_fx.merge(changed, into=target)
    assert_same_bits(target.state_dict(), lora_fx.merge(changed).state_dict())
    assert_same_bits(dict(changed.named_parameters()), own)


# --- all or nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_an_overflow_that_the_factors_do_not_exclude(options) -> None:
    """Factors this large may overflow or not: the weight is gone through before it is written."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).half()
    changed = adapted(model, target_modules=["0", "1"], **options)
    with torch.no_grad():
        changed[1].lora_A.default.fill_(1.0)
        changed[1].lora_B.default.fill_(5e3)
    rows = [(row, "default") for row in record_of(changed).adapters["default"].sites]
    assert [cannot_overflow(changed, [row], torch.float16) for row in rows] == [True, False]
    target = copy.deepcopy(model)
    lora_fx.merge(changed, into=target)
    assert_same_bits(target.state_dict(), lora_fx.merge(changed).state_dict())
    with torch.no_grad():
        if options:
            changed[1].lora_magnitude_vector.default.fill_(1e6)
        changed[1].lora_B.default.fill_(1e5)
    target = copy.deepcopy(model)
    with pytest.raises(MergeError, match=r"1: the merged weight overflows"):
        lora_fx.merge(changed, into=target)
    assert_same_bits(target.state_dict(), model.state_dict())


def test_a_bias_that_has_no_place_is_found_before_anything_is_written() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    changed = adapted(model, target_modules=["0", "1"], lora_bias=True)
    target = copy.deepcopy(model)
    target[1].bias = nn.Parameter(torch.zeros(2))
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(MergeError, match="what they are together is no bias"):
        lora_fx.merge(changed, into=target)
    assert_same_bits(target.state_dict(), before)


def test_weights_that_are_not_finite_stay_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    changed = adapted(model, target_modules=["0"])
    target = copy.deepcopy(model)
    with torch.no_grad():
        target[0].weight[0, 0] = torch.nan
        changed[0].lora_B.default.mul_(1e30)
    lora_fx.merge(changed, into=target)
    assert target[0].weight.isnan().sum() == 1


def test_nothing_is_known_of_a_change_that_a_pattern_defines(monkeypatch) -> None:
    changed = adapted(nn.Sequential(nn.Linear(6, 6, bias=False)), target_modules=["0"])
    row = record_of(changed).adapters["default"].sites[0]
    assert cannot_overflow(changed, [(row, "default")], torch.float32)
    monkeypatch.setattr(type(pattern_of(row.site)), "delta", lambda self, site, a, b: b @ a)
    assert not cannot_overflow(changed, [(row, "default")], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_a_bound_that_holds_for_the_largest_weights(dtype: torch.dtype, data) -> None:
    """What the factors are said not to do they do not do, also beside the largest numbers."""
    largest = torch.finfo(dtype).max
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).to(dtype)
    nn.init.constant_(model[0].weight, largest)
    changed = lora_fx.rewrite(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    size = data.draw(st.floats(-1, 6)) * (1 if dtype is torch.float16 else 20)
    with torch.no_grad():
        changed[0].lora_A.default.fill_(1.0)
        changed[0].lora_B.default.fill_(2.0**size if size < 120 else 2.0**120)
    known = cannot_overflow(
        changed, [(record_of(changed).adapters["default"].sites[0], "default")], dtype
    )
    try:
        merged = lora_fx.merge(changed, into=copy.deepcopy(model))
    except MergeError:
        assert not known
        return
    assert merged[0].weight.isfinite().all()
    delta = 1.5 * 2 * float(changed[0].lora_B.default.detach()[0, 0])
    assert ulp_error(merged[0].weight.detach(), model[0].weight.detach().double() + delta) <= 0.5


# --- again, and back -------------------------------------------------------------------------------


CYCLES = 1000
AGAIN = [
    {"target_modules": ["embed", "conv", "turned", "raw", "last"]},
    {"target_modules": ["raw", "last"], "use_dora": True, "bias": "all"},
    {"target_modules": ["last"], "lora_bias": True, "trainable_token_indices": {"embed": [2]}},
    {"target_modules": ["raw"], "modules_to_save": ["last"]},
]


@pytest.mark.parametrize("options", AGAIN)
@pytest.mark.parametrize("cycles", [3, pytest.param(CYCLES, marks=pytest.mark.slow)])
def test_merges_and_back_end_with_the_same_bits(options, cycles: int) -> None:
    """Every merge is that of a fresh model, whatever was merged before, and none of them is the base."""
    model = Kinds().to(torch.bfloat16)
    changed = adapted(model, **options)
    lora_fx.add_adapter(changed, LoraConfig(r=2, target_modules=["turned", "last"]), "other")
    lora_fx.set_adapter(changed, ["default", "other"])
    randomize(changed)
    before = copy.deepcopy(changed.state_dict())
    names = (["default"], ["other"], ["default", "other"])
    wanted = [lora_fx.merge(changed, adapter_names=each).state_dict() for each in names]
    target = copy.deepcopy(model)
    for cycle in range(cycles):
        each = cycle % len(names)
        lora_fx.merge(changed, adapter_names=names[each], into=target)
        if cycle < 3 or cycle > cycles - 4:
            assert_same_bits(target.state_dict(), wanted[each])
        if cycle % 2:
            lora_fx.merge(changed, adapter_names=[], into=target)
    lora_fx.merge(changed, adapter_names=[], into=target)
    assert_same_bits(target.state_dict(), model.state_dict())
    assert_same_bits(changed.state_dict(), before)


@pytest.mark.parametrize("options", [{}, {"own": True}, {"dtype": torch.float32}])
def test_into_the_result_of_a_merge(options) -> None:
    model = Kinds().to(torch.bfloat16)
    changed = adapted(model, target_modules=["raw", "last"])
    result = lora_fx.merge(changed, **options)
    once = copy.deepcopy(result.state_dict())
    for _ in range(2):
        lora_fx.merge(changed, into=result)
        assert_same_bits(result.state_dict(), once)
    lora_fx.merge(changed, adapter_names=[], into=result)
    expected = {name: value.to(result.raw.dtype) for name, value in model.state_dict().items()}
    assert_same_bits(result.state_dict(), expected)


def test_another_adapter_over_the_same_base() -> None:
    model = Kinds().to(torch.bfloat16)
    target = copy.deepcopy(model)
    for _ in range(3):
        changed = adapted(model, target_modules=["raw", "last"])
        lora_fx.merge(changed, into=target)
        assert_same_bits(target.state_dict(), lora_fx.merge(changed).state_dict())


def test_what_is_loaded_or_trained_since_is_the_models_own() -> None:
    model = Mlp()
    changed, target = adapted(model), copy.deepcopy(model)
    lora_fx.merge(changed, into=target)
    target.load_state_dict(model.state_dict())
    lora_fx.merge(changed, into=target)
    assert_same_bits(target.state_dict(), lora_fx.merge(changed).state_dict())
    other = Mlp()
    for into in (target, fresh := copy.deepcopy(other)):
        with torch.no_grad():
            for parameter, value in zip(into.parameters(), other.parameters(), strict=True):
                parameter.data.copy_(value)
        lora_fx.merge(changed, into=into)
    assert_same_bits(target.state_dict(), fresh.state_dict())


def test_a_second_change_of_another_base_is_refused() -> None:
    changed, other = adapted(Residual()), Residual()
    lora_fx.merge(changed, into=other)
    once = copy.deepcopy(other.state_dict())
    with pytest.raises(MergeError, match=r"adapters of an earlier merge in .*give a fresh model"):
        lora_fx.merge(changed, into=other)
    assert_same_bits(other.state_dict(), once)


def test_a_state_dict_that_is_kept_between_merges() -> None:
    model = Mlp()
    changed, target = adapted(model), copy.deepcopy(model)
    lora_fx.merge(changed, into=target)
    kept = target.state_dict()
    once = copy.deepcopy(kept)
    lora_fx.merge(changed, adapter_names=[], into=target)
    assert_same_bits(kept, once)
    assert_same_bits(target.state_dict(), model.state_dict())
