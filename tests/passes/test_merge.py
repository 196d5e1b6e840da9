from __future__ import annotations

import copy
import functools
import logging
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraConfig, MergeError
from lora_fx.ir.graph import META_KEY
from lora_fx.ir.record import record_of
from lora_fx.passes.capture.auto import capture as capture_model
from lora_fx.passes.merge.fold import delta_weight
from lora_fx.passes.merge.rounding import rounded
from lora_fx.passes.merge.rounding import ulp as own_ulp
from lora_fx.passes.patterns import pattern_of
from tests import numerics
from tests.algebra import randomize
from tests.golden import check_golden
from tests.numerics import assert_close, assert_same_bits, ulp_error
from tests.zoo import TRANSFORMERS, Lists, Mlp, Residual, Shared, Tied, seeded

IDS = torch.tensor([[1, 2, 3], [4, 5, 10]])


def adapted(model: nn.Module, **options) -> nn.Module:
    return randomize(lora_fx.rewrite(model, LoraConfig(**{"r": 2, **options})))


def exact_weight(model: nn.Module, base: nn.Module, site: str) -> torch.Tensor:
    """W + s·BA of a linear layer in fp64."""
    layer = model.get_submodule(site)
    (row,) = (r for r in record_of(model).adapters["default"].sites if r.name == site)
    a, b = (f.default.detach().double() for f in (layer.lora_A, layer.lora_B))
    return base.get_parameter(f"{site}.weight").detach().double() + row.scale * (b @ a)


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_equals_adapted(dtype: torch.dtype) -> None:
    model = Residual().to(dtype)
    changed = adapted(model, target_modules=["up", "down", "head", "embed"])
    assert_close(lora_fx.merge(changed)(IDS), changed(IDS))


def test_the_result_is_the_users_own() -> None:
    model = Residual(dropout=0.3).train()
    model.blocks[0].eval()
    model.norm.requires_grad_(False)
    changed = adapted(model, lora_dropout=0.1)
    merged = lora_fx.merge(changed, own=True)
    assert merged.state_dict().keys() == model.state_dict().keys()
    for (name, found), (other, own) in zip(
        merged.named_modules(), model.named_modules(), strict=True
    ):
        assert name == other
        assert type(found) is type(own), name
        assert found.training == own.training, name
        assert not [key for key in vars(found) if "lora" in key], name
    for (name, found), (_, own) in zip(
        merged.named_parameters(), model.named_parameters(), strict=True
    ):
        assert found.requires_grad == own.requires_grad, name
    assert record_of(merged) is None
    # What is the user's own again can be rewritten again.
    assert lora_fx.plan(merged, LoraConfig()).sites


def everything_of(model: nn.Module) -> list[object]:
    """All that can be reached from a model's modules and parameters: attributes, hooks, classes."""
    found: list[object] = []
    for module in model.modules():
        found += [type(module), *type(module).__mro__, *vars(module).values()]
        for value in vars(module).values():
            if isinstance(value, dict):
                found += [*value.keys(), *value.values()]
    for tensor in (*model.parameters(), *model.buffers()):
        found += [type(tensor), *vars(tensor).values(), *(tensor._backward_hooks or {}).values()]
    return [getattr(one, "hook", one) for one in found]


@pytest.mark.parametrize("options", [{}, {"own": True}, {"dtype": torch.float64}])
@pytest.mark.parametrize("frontend", ["regions", "symbolic", "export"])
def test_nothing_of_lora_fx_is_left(frontend: str, options) -> None:
    model = Residual()
    config = LoraConfig(
        r=2, bias="all", modules_to_save=["head"], trainable_token_indices={"embed": [1]}
    )
    changed = randomize(lora_fx.rewrite(model, config, (IDS,), frontend=frontend))
    lora_fx.add_adapter(changed, LoraConfig(r=2, use_dora=True), "other")
    changed.norm.requires_grad_(True)
    changed.norm.weight.grad = None
    changed(IDS).sum().backward()

    def ours(one: object) -> bool:
        kind = one if isinstance(one, type) else type(one)
        origin = f"{kind.__module__} {getattr(one, '__module__', '')}"
        return "lora_fx" in origin or (isinstance(one, str) and "lora" in one)

    assert any(map(ours, everything_of(changed)))
    assert not [one for one in everything_of(lora_fx.merge(changed, **options)) if ours(one)]
    target = copy.deepcopy(model)
    lora_fx.merge(changed, into=target)
    assert not [one for one in everything_of(target) if ours(one)]


def test_neither_the_adapted_model_nor_the_base_changes() -> None:
    model = Residual().double()
    changed = adapted(model)
    base, state = copy.deepcopy(model.state_dict()), copy.deepcopy(changed.state_dict())
    lora_fx.merge(changed)
    lora_fx.merge(changed, return_report=True)
    assert_same_bits(model.state_dict(), base)
    assert_same_bits(changed.state_dict(), state)


def test_what_is_not_folded_is_shared() -> None:
    model = Residual()
    merged = lora_fx.merge(adapted(model, target_modules=["up"]))
    assert merged.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert merged.blocks[0].up.weight.data_ptr() != model.blocks[0].up.weight.data_ptr()


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()


def test_what_is_shared_is_frozen_and_what_is_not_is_as_it_was() -> None:
    model = Residual()
    model.blocks[0].requires_grad_(False)
    changed = adapted(model, target_modules=["up"], modules_to_save=["head"])
    merged, report = lora_fx.merge(changed, return_report=True)
    own = {"blocks.1.up.weight", "head.weight", "head.bias"}
    assert {name for name, p in merged.named_parameters() if p.requires_grad} == own
    shared = {
        name
        for name, p in merged.named_parameters()
        if p.data_ptr() == model.get_parameter(name).data_ptr()
    }
    assert set(report.shared) == shared
    assert shared == {n for n, _ in model.named_parameters()} - own - {"blocks.0.up.weight"}
    assert f"{len(shared)} parameter(s) shared with the base, and frozen" in str(report)


def test_training_the_merged_model_does_not_train_the_users() -> None:
    model = Residual()
    changed = adapted(model, target_modules=["up"])
    before, running = copy.deepcopy(model.state_dict()), changed(IDS)
    merged = lora_fx.merge(changed)
    train(merged)
    assert not torch.equal(merged(IDS), running)
    assert_same_bits(model.state_dict(), before)
    assert_same_bits(changed(IDS), running)


@pytest.mark.parametrize("build", [seeded(Residual), seeded(Tied), seeded(Shared)])
def test_a_model_of_its_own_shares_nothing_and_is_trained_as_the_original(build) -> None:
    model = build()
    list(model.parameters())[-1].requires_grad_(False)
    changed = adapted(model, target_modules="all-linear")
    before = copy.deepcopy(model.state_dict())
    merged, report = lora_fx.merge(changed, own=True, return_report=True)
    assert not report.shared
    for name, parameter in model.named_parameters():
        found = merged.get_parameter(name)
        assert found.requires_grad == parameter.requires_grad, name
        assert found.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr(), name
    assert_same_bits(merged.state_dict(), lora_fx.merge(changed).state_dict())
    # What is tied and was not folded stays tied.
    places = len(list(merged.named_parameters(remove_duplicate=False)))
    ties = places - len(list(merged.parameters()))
    plain = lora_fx.merge(changed)
    assert ties == places - len(list(plain.parameters()))
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.add_(1.0)
    assert_same_bits(model.state_dict(), before)


def test_a_dtype_of_its_own_shares_nothing() -> None:
    model = Residual()
    merged, report = lora_fx.merge(adapted(model), dtype=torch.float64, return_report=True)
    assert not report.shared
    assert [p.requires_grad for p in merged.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_own_is_what_into_is_already() -> None:
    changed = adapted(Mlp())
    with pytest.raises(MergeError, match="leave out own"):
        lora_fx.merge(changed, into=Mlp(), own=True)


def test_training_on_does_not_reach_the_merged_model() -> None:
    model = Residual()
    changed = adapted(model, bias="all", modules_to_save=["head"])
    merged = lora_fx.merge(changed)
    before = copy.deepcopy(merged.state_dict())
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(changed):
            parameter.add_(1.0)
    assert_same_bits(merged.state_dict(), before)


def test_merging_twice_gives_the_same() -> None:
    changed = adapted(Residual())
    first, second = lora_fx.merge(changed), lora_fx.merge(changed)
    assert_same_bits(first.state_dict(), second.state_dict())


def test_an_adapter_that_is_a_no_op_changes_no_bit() -> None:
    model = Residual().to(torch.bfloat16)
    merged = lora_fx.merge(lora_fx.rewrite(model, LoraConfig()))
    assert_same_bits(merged.state_dict(), model.state_dict())


def test_trained_biases_and_saved_modules_are_kept() -> None:
    model = Mlp().eval()
    changed = adapted(model, bias="all", modules_to_save=["second"])
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(changed):
            parameter.add_(torch.randn_like(parameter))
    merged = lora_fx.merge(changed)
    x = torch.randn(4, 5)
    assert_close(merged(x), changed(x))
    assert type(merged.second) is nn.Linear


@pytest.mark.parametrize(
    "other",
    [
        {"target_modules": ["head"]},
        {"target_modules": ["head"], "use_dora": True},
        {"target_modules": ["head"], "lora_bias": True},
        {"target_modules": ["up"], "trainable_token_indices": {"embed": [2]}},
    ],
)
def test_what_one_adapter_trains_in_full_is_what_another_one_is_folded_into(other) -> None:
    ids = torch.tensor([[0, 2, 5, 10], [2, 2, 9, 10]])
    full = LoraConfig(r=2, target_modules=["down"], modules_to_save=["head", "embed"])
    model = lora_fx.rewrite(Residual().double().eval(), full)
    lora_fx.add_adapter(model, LoraConfig(r=2, **other), "other")
    lora_fx.set_adapter(model, ["default", "other"])
    with torch.no_grad():
        for place, parameter in enumerate(lora_fx.trainable_parameters(model)):
            parameter.add_(torch.linspace(-1, 1 + place, parameter.numel()).view_as(parameter))
    assert_close(lora_fx.merge(model)(ids), model(ids))
    names = lora_fx.active_adapters(model)
    expected = model(ids)
    lora_fx.set_adapter(model, [])
    assert_close(lora_fx.merge(model, adapter_names=names)(ids), expected)


def test_batch_norm_statistics_of_training_are_kept() -> None:
    model = Mlp().train()
    changed = adapted(model)
    for _ in range(3):
        changed(torch.randn(8, 5) * 3 + 1)
    merged = lora_fx.merge(changed).eval()
    x = torch.randn(4, 5)
    assert_close(merged(x), changed.eval()(x))
    assert not torch.equal(merged.norm.running_mean, model.norm.running_mean)


def test_a_shared_layer_is_folded_once() -> None:
    model = Shared().double()
    changed = adapted(model)
    merged = lora_fx.merge(changed)
    assert merged.layer is merged.again
    x = torch.randn(3, 5, dtype=torch.float64)
    assert_close(merged(x), changed(x))


def test_parameters_in_lists_and_dicts_are_folded() -> None:
    model = Lists()
    changed = adapted(model, target_modules=".*")
    names = [row.name for row in record_of(changed).adapters["default"].sites]
    assert names == ["kernels.0", "kernels.1", "named.last"]
    merged = lora_fx.merge(changed)
    assert merged.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(3, 5)
    assert_close(merged(x), changed(x))


# --- tied weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["embed", "head"])
def test_a_tied_weight_is_untied(target: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Tied()
    changed = adapted(model, target_modules=[target])
    caplog.set_level(logging.WARNING, "lora_fx")
    merged, report = lora_fx.merge(changed, return_report=True)
    assert report.untied == (f"{target}.weight",)
    assert f"{target}.weight" in caplog.text
    assert f"untied: {target}.weight" in str(report)
    assert merged.head.weight is not merged.embed.weight
    assert model.head.weight is model.embed.weight
    assert_close(merged(IDS), changed(IDS))


def test_both_sides_of_a_tie_are_adapted_each_for_itself() -> None:
    changed = adapted(Tied(), target_modules=["embed", "head"])
    merged, report = lora_fx.merge(changed, return_report=True)
    assert set(report.untied) == {"embed.weight", "head.weight"}
    assert_close(merged(IDS), changed(IDS))


def test_a_tie_that_is_not_touched_stays() -> None:
    merged, report = lora_fx.merge(adapted(Tied(), target_modules=["body"]), return_report=True)
    assert report.untied == ()
    assert merged.head.weight is merged.embed.weight


@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_a_transformers_model_says_that_it_is_untied(options, tmp_path) -> None:
    model, inputs = TRANSFORMERS["gpt2"]()
    assert model.config.tie_word_embeddings
    changed = adapted(model, **options)
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(changed):
            parameter.add_(0.05 * torch.randn_like(parameter))
    merged = lora_fx.merge(changed)
    assert model.config.tie_word_embeddings
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(again(**inputs).logits, changed(**inputs).logits)


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_within_half_a_unit_of_the_exact_value(dtype: torch.dtype) -> None:
    model = Residual().to(dtype)
    changed = adapted(model)
    merged, report = lora_fx.merge(changed, return_report=True)
    for row in report.sites:
        exact = exact_weight(changed, model, row.name)
        assert ulp_error(merged.get_parameter(f"{row.name}.weight"), exact) <= 0.5
        assert row.max_ulp <= 0.5
    assert report.max_ulp == max(row.max_ulp for row in report.sites)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_also_where_the_change_cancels_the_weight(dtype: torch.dtype) -> None:
    # ΔW = -W + something small: all the leading digits cancel, and what is left counts.
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).to(dtype)
    changed = lora_fx.rewrite(model, LoraConfig(r=16, lora_alpha=16, target_modules=["0"]))
    with torch.no_grad():
        changed[0].lora_A.default.copy_(torch.eye(16))
        rest = 1e-3 * torch.randn(16, 16)
        changed[0].lora_B.default.copy_(-model[0].weight.float() + rest)
    merged = lora_fx.merge(changed)
    assert ulp_error(merged[0].weight, exact_weight(changed, model, "0")) <= 0.5
    assert merged[0].weight.abs().max() < 0.01


@given(
    bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=20),
    change=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_any_weight_and_any_change_round_once(bits, change, dtype) -> None:
    weight = torch.tensor(bits, dtype=torch.uint16).view(dtype)
    weight = torch.where(weight.isfinite() & (weight.abs() < 1e4), weight, torch.ones_like(weight))
    column = torch.tensor(change, dtype=torch.float32)
    size = min(len(weight), len(column))
    model = nn.Sequential(nn.Linear(1, size, bias=False)).to(dtype)
    model[0].weight.data = weight[:size, None].clone()
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    changed = lora_fx.rewrite(model, config)
    with torch.no_grad():
        changed[0].lora_A.default.fill_(0.7)
        changed[0].lora_B.default.copy_(column[:size, None])
    merged = lora_fx.merge(changed)[0].weight
    assert ulp_error(merged, exact_weight(changed, model, "0")) <= 0.5


def test_a_tie_between_two_neighbors_is_not_rounded_twice() -> None:
    # 1 + 2^-8 is half-way between two bfloat16 values; 2^-30 more decides, and is lost in fp32.
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    model[0].weight.data.fill_(1.0)
    changed = lora_fx.rewrite(model, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    with torch.no_grad():
        changed[0].lora_A.default.copy_(torch.tensor([[2.0**-8], [2.0**-30]]))
        changed[0].lora_B.default.fill_(1.0)
    assert lora_fx.merge(changed)[0].weight.item() == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(bits=st.lists(st.integers(0, 2**16 - 2), min_size=1, max_size=9), data=st.data())
def test_what_is_next_to_a_tie_goes_to_its_own_side(dtype: torch.dtype, bits, data) -> None:
    """Between two neighbors of a half type, subnormal ones among them: half-way, and a hair off it."""
    low, high = (
        torch.tensor([b + up for b in bits], dtype=torch.uint16).view(dtype).double()
        for up in (0, 1)
    )
    known = low.isfinite() & high.isfinite() & (low.sign() * high.sign() >= 0)
    low, high = torch.where(known, low, 1.0), torch.where(known, high, 1 + torch.finfo(dtype).eps)
    far = data.draw(st.sampled_from([2.0**-8, 2.0**-18, 2.0**-30, 2.0**-40]))
    middle = (low + high) / 2
    above = middle + far * (high - low)
    assert torch.equal(rounded(above, dtype).double(), high)
    assert torch.equal(rounded(middle - far * (high - low), dtype).double(), low)
    # A tie goes to the even one of the two.
    even = (low.to(dtype).view(torch.int16) & 1) == 0
    assert torch.equal(rounded(middle, dtype).double(), torch.where(even, low, high))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (0, 4), ()])
def test_rounding_keeps_zeros_what_is_not_finite_and_what_overflows(dtype, shape) -> None:
    for value in (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e39, 1e-60, 1.0):
        values = torch.full(shape, value, dtype=torch.float64)
        found = rounded(values, dtype)
        assert_same_bits(found, values.to(dtype))
        assert torch.equal(found.signbit(), values.signbit()) or value != value
    turned = torch.randn(6, 4, dtype=torch.float64).T
    assert_same_bits(rounded(turned, dtype), turned.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_makes_no_second_weight(dtype: torch.dtype) -> None:
    """All the memory that a merge allocates beside the merged weight is that of a slice."""
    model = nn.Sequential(nn.Linear(1024, 4096, bias=False)).to(dtype)
    changed = adapted(model, target_modules=["0"])
    with torch.profiler.profile(profile_memory=True) as seen:
        merged = lora_fx.merge(changed)
    weight = merged[0].weight
    sizes = [
        event.self_cpu_memory_usage
        for event in seen.events()
        if event.name in ("aten::empty", "aten::empty_strided")
    ]
    large = [size for size in sizes if size >= weight.numel()]
    assert large == [weight.numel() * weight.element_size()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_are_merged_in_the_same_memory(dtype: torch.dtype) -> None:
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(3))).to(dtype)
    changed = adapted(model, target_modules=["0", "1", "2"])
    base = copy.deepcopy(model)
    with torch.profiler.profile(profile_memory=True) as seen:
        lora_fx.merge(changed, into=base)
    wide = 512 * 512 * 8
    sizes = [e.self_cpu_memory_usage for e in seen.events() if e.name == "aten::empty"]
    # The sums in fp64; for a half type, what rounding works in is as large again.
    assert sizes.count(wide) == (1 if dtype is torch.float32 else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pattern_with_a_delta_of_its_own_is_asked(dtype, monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False)).to(dtype)
    changed = adapted(model, target_modules=["0"])
    pattern = pattern_of(record_of(changed).adapters["default"].sites[0].site)
    monkeypatch.setattr(type(pattern), "delta", lambda self, site, a, b: 2 * (b @ a))
    exact = exact_weight(changed, model, "0")
    twice = exact + (exact - model[0].weight.detach().double())
    assert_close(lora_fx.merge(changed)[0].weight, twice)


def test_units_in_the_last_place() -> None:
    values = torch.tensor([1.0, 1.5, 2.0, -3.0, 1e-3, 65504.0, 1e-30, 0.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        normal = values.abs() >= torch.finfo(dtype).tiny
        expected = numerics.ulp(values, dtype)
        assert torch.equal(own_ulp(values, dtype)[normal], expected[normal])
    assert own_ulp(torch.tensor([1.0], dtype=torch.float64), torch.float32).item() == 2.0**-23


def test_large_weights_are_merged_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(33, 47), nn.Embedding(29, 31), nn.Conv2d(8, 8, 3, groups=2))
    changed = adapted(model, target_modules=["0", "1", "2"])
    whole = lora_fx.merge(changed)
    monkeypatch.setattr("lora_fx.passes.merge.fold._CHUNK", 100)
    sliced = lora_fx.merge(changed)
    assert_close(sliced.state_dict(), whole.state_dict(), 1e-7)


def test_the_delta_of_a_site() -> None:
    model = Residual()
    changed = adapted(model)
    row = record_of(changed).adapters["default"].sites[0]
    layer = changed.get_submodule(row.name)
    expected = row.scale * layer.lora_B.default @ layer.lora_A.default
    assert_close(delta_weight(changed, row, "default"), expected)
    assert delta_weight(changed, row, "default", torch.float64).dtype == torch.float64


# --- into -----------------------------------------------------------------------------------------


def test_into_folds_into_that_model() -> None:
    model = Mlp().eval()
    changed = adapted(model, bias="all", modules_to_save=["second"]).train()
    changed(torch.randn(8, 5) * 2 + 1)
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(changed):
            parameter.add_(torch.randn_like(parameter))
    target = copy.deepcopy(model)
    assert lora_fx.merge(changed, into=target) is target
    x = torch.randn(4, 5)
    assert_close(target.eval()(x), changed.eval()(x))
    assert all(p.requires_grad for p in target.parameters())


def test_into_another_base_adds_the_change_to_that_base() -> None:
    model, other = Residual(), Residual()
    changed = adapted(model, target_modules=["up"])
    before = copy.deepcopy(other)
    _, report = lora_fx.merge(changed, into=other, return_report=True)
    row = record_of(changed).adapters["default"].sites[0]
    expected = before.get_parameter("blocks.0.up.weight") + delta_weight(changed, row, "default")
    assert_close(other.get_parameter("blocks.0.up.weight"), expected)
    assert report.max_ulp <= 0.5


def test_into_leaves_what_shares_its_storage_alone() -> None:
    model = Mlp()
    changed = adapted(model, bias="all", modules_to_save=["second"])
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(changed):
            parameter.add_(1.0)
    before = copy.deepcopy(model.state_dict())
    shares = capture_model(model, frontend="regions").model
    lora_fx.merge(changed, into=shares)
    assert_same_bits(model.state_dict(), before)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lora_fx.rewrite(Residual(), LoraConfig()), "rewritten model"),
        (Mlp, "into is a Mlp, the adapters belong to a Residual"),
        (lambda: Residual(1), "into has no blocks.1.up.weight"),
        (lambda: Residual(2, width=8), "of shape"),
    ],
)
def test_into_a_model_that_does_not_fit_is_refused(build, message: str) -> None:
    changed, target = adapted(Residual()), build()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(MergeError, match=message):
        lora_fx.merge(changed, into=target)
    assert_same_bits(target.state_dict(), before)


# --- refusals -------------------------------------------------------------------------------------


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(MergeError, match=r"Residual has no adapters\. lora_fx\.rewrite"):
        lora_fx.merge(Residual())


def test_an_unknown_adapter_is_refused_with_those_that_exist() -> None:
    changed = lora_fx.rewrite(Residual(), LoraConfig(), adapter_name="mine")
    with pytest.raises(MergeError, match="no adapter 'yours': the model has 'mine'"):
        lora_fx.merge(changed, adapter_names=["yours"])


def test_no_adapter_names_gives_the_base() -> None:
    model = Residual()
    assert_same_bits(lora_fx.merge(adapted(model), adapter_names=[])(IDS), model(IDS))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_factors_that_are_not_finite_are_refused_before_anything_changes(factor, value) -> None:
    model = Residual()
    changed = adapted(model)
    target = copy.deepcopy(model)
    with torch.no_grad():
        # The last site: those before it would be merged already.
        getattr(changed.blocks[1].down, factor).default[0, 0] = value
    with pytest.raises(MergeError, match=r"blocks\.1\.down.*not finite"):
        lora_fx.merge(changed, into=target)
    assert_same_bits(target.state_dict(), model.state_dict())


def test_an_overflow_is_refused_before_anything_changes() -> None:
    model = Residual().half()
    changed = adapted(model)
    target = copy.deepcopy(model)
    with torch.no_grad():
        changed.blocks[1].down.lora_B.default.fill_(1e5)
    with pytest.raises(MergeError, match=r"blocks\.1\.down.*overflows torch.float16.*wider dtype"):
        lora_fx.merge(changed, into=target)
    assert_same_bits(target.state_dict(), model.state_dict())


# --- the rest -------------------------------------------------------------------------------------


def test_progress_is_told_before_each_weight() -> None:
    seen: list[tuple[int, int, str]] = []
    lora_fx.merge(adapted(Residual(1)), progress=lambda *step: seen.append(step))
    assert seen == [(0, 2, "blocks.0.up"), (1, 2, "blocks.0.down")]


def test_golden() -> None:
    model = seeded(Tied)()
    merged, report = lora_fx.merge(
        adapted(model, target_modules=["embed", "body"]), return_report=True
    )
    tags = [
        node
        for graph in lora_fx.graphs(merged).values()
        for node in graph.nodes
        if META_KEY in node.meta
    ]
    assert not tags
    check_golden(
        "merge_tied",
        "\n".join(
            [
                str(merged),
                *(f"{name} {tuple(p.shape)}" for name, p in merged.named_parameters()),
                *(f"{row.name}: {row.adapters}" for row in report.sites),
                f"untied: {report.untied}",
                "",
            ]
        ),
    )


class _Holder:
    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight


class _HoldsWeights(nn.Module):
    """Reads its weights out of a list, a default, a partial and an object."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcd":
            self.add_module(name, nn.Linear(4, 4, bias=False, dtype=torch.float64))
        self.listed = [self.a.weight]
        self.function = lambda x, weight=self.b.weight: x @ weight.T
        self.partial = functools.partial(torch.nn.functional.linear, weight=self.c.weight)
        self.holder = _Holder(self.d.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.d(self.c(self.b(self.a(x)))) @ self.listed[0].T
        return self.partial(self.function(x)) @ self.holder.weight.T


@pytest.mark.parametrize("own", [False, True])
def test_what_holds_a_weight_beside_its_layer_holds_the_merged_one(own: bool) -> None:
    model, x = _HoldsWeights(), torch.randn(3, 4, dtype=torch.float64)
    before = model(x)
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=".*"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    merged = lora_fx.merge(adapted, own=own)
    dense = _HoldsWeights()
    dense.load_state_dict(merged.state_dict())
    expected = dense(x)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(merged(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_a_weight_that_becomes_two_is_refused_where_something_beside_holds_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
            self.head.weight = self.table.weight
            self.listed = [self.head.weight]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(x))

    adapted = lora_fx.rewrite(Tied(), LoraConfig(r=2, target_modules=["head"]))
    with pytest.raises(MergeError, match=r"table\.weight: several layers had this weight"):
        lora_fx.merge(adapted)


_REGISTRY: list[nn.Module] = []


class _Entered(nn.Module):
    """Calls a layer that it finds past its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.own = nn.Linear(4, 4), nn.Linear(4, 4)
        _REGISTRY[:] = [self.fc]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(_REGISTRY[0](self.fc(x)))


@pytest.fixture
def emptied():
    yield
    _REGISTRY.clear()


def test_a_layer_past_the_model_that_nobody_adapts_is_no_matter(emptied) -> None:
    model, x = _Entered(), torch.randn(3, 4)
    changed = adapted(model, target_modules=["own"])
    assert_close(lora_fx.merge(changed)(x), changed(x))


def test_a_registry_that_no_code_of_the_model_names_is_no_matter(emptied) -> None:
    model, x = Mlp(), torch.randn(2, 5)
    _REGISTRY[:] = [model]
    changed = adapted(model)
    assert_close(lora_fx.merge(changed)(x), changed(x))


def test_what_has_no_values_is_not_merged_or_checked() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to("meta")
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(lora_fx.MergeError, match=r"0: adapter 'default' is on the meta device"):
        lora_fx.merge(adapted)
    with pytest.raises(lora_fx.CaptureError, match=r"0\.weight is on the meta device"):
        lora_fx.check(adapted, torch.empty(2, 4, device="meta"))


def test_a_hook_of_the_model_holds_no_tied_weight() -> None:
    """Mamba registers a method of its own for what is loaded into its embedding."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes, tie_word_embeddings=True)).eval()
    config = lora_fx.LoraConfig(r=2, target_modules=["lm_head"])
    adapted, ids = randomize(lora_fx.rewrite(model, config)), torch.arange(6)[None]
    assert_close(lora_fx.merge(adapted)(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_weight_that_a_hook_computes_since_is_refused_with_the_way_out(name: str) -> None:
    adapted = lora_fx.rewrite(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        getattr(nn.utils, name)(adapted[0])
    with pytest.raises(MergeError, match=f"torch.nn.utils.remove_{name}"):
        lora_fx.merge(adapted)
    getattr(nn.utils, f"remove_{name}")(adapted[0])
    lora_fx.merge(adapted)
