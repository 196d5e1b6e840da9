"""Weighted combinations of a model's adapters: PEFT's model beside ours, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import ConfigError, LoraConfig
from lora_fx.ir.record import record_of
from tests.numerics import assert_close, assert_same_bits, in_double

IDS = torch.arange(24).reshape(4, 6) % 11


class Net(nn.Module):
    """A table, products and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.conv = nn.Conv2d(1, 6, 3)
        self.down = nn.Linear(240, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.up(self.table(ids)))
        return self.head(self.down(torch.relu(self.conv(x[:, None])).flatten(1)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


EVERYWHERE = ["table", "up", "conv", "down"]
SAME: dict[str, dict[str, Any]] = {
    "one": {"r": 3, "lora_alpha": 5, "target_modules": EVERYWHERE},
    "two": {"r": 3, "lora_alpha": 2, "target_modules": EVERYWHERE},
    "three": {"r": 3, "lora_alpha": 3, "target_modules": EVERYWHERE},
}
MIXED: dict[str, dict[str, Any]] = {
    "one": {"r": 2, "lora_alpha": 5, "target_modules": ["up", "conv"]},
    "two": {"r": 4, "lora_alpha": 2, "target_modules": ["up", "down"], "rank_pattern": {"up": 3}},
    "three": {"r": 1, "lora_alpha": 3, "target_modules": ["table"]},
}


def both(folder: Path, adapters: dict[str, dict[str, Any]]) -> tuple[Any, nn.Module]:
    """The same adapters in PEFT's model and in ours."""
    theirs: Any = None
    torch.manual_seed(1)
    for name, values in adapters.items():
        config = peft.LoraConfig(**values)
        if theirs is None:
            theirs = peft.get_peft_model(net(), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(folder)
    ours = net()
    for name in adapters:
        ours = lora_fx.load_adapter(ours, folder / name, adapter_name=name)
    return theirs, ours


def combined(
    theirs: Any, ours: nn.Module, weights: list[float], kind: str, **options: Any
) -> nn.Module:
    names = list(lora_fx.adapter_names(ours))[: len(weights)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.base_model.add_weighted_adapter(names, weights, "new", kind, **options)
    theirs.set_adapter("new")
    assert lora_fx.add_weighted_adapter(ours, names, weights, "new", kind, **options) is ours
    lora_fx.set_adapter(ours, "new")
    return ours


@pytest.mark.parametrize("weights", [[0.7, -1.3, 0.4], [-1.0, 2.0], [0.6]], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("svd", {}),
        ("svd", {"svd_rank": 5}),
        ("svd", {"svd_clamp": 0.95}),
        ("linear", {}),
        ("cat", {}),
        ("ties", {"density": 0.5}),
        ("ties_svd", {"density": 0.5, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.3}),
        ("magnitude_prune_svd", {"density": 0.3}),
        ("dare_linear", {"density": 1.0}),
    ],
    ids=str,
)
def test_computes_what_pefts_computes(
    kind: str, options: dict[str, Any], weights: list[float], tmp_path: Path
) -> None:
    theirs, ours = both(tmp_path, SAME)
    combined(theirs, ours, weights, kind, **options)
    assert_close(ours(IDS), theirs(IDS))
    assert all(row.scale == 1 for row in record_of(ours).adapters["new"].sites)


@pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd"])
def test_adapters_with_other_sites_and_ranks_as_in_peft(kind: str, tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, MIXED)
    combined(theirs, ours, [0.7, -1.3, 0.4], kind, **({"density": 1.0} if "ties" in kind else {}))
    assert_close(ours(IDS), theirs(IDS))
    ranks = {row.name: row.rank for row in record_of(ours).adapters["new"].sites}
    if kind == "cat":
        assert ranks == {"up": 5, "conv": 2, "down": 4, "table": 1}
    else:
        assert ranks == {"up": 4, "conv": 4, "down": 4, "table": 4}


def test_it_is_saved_and_peft_reads_it(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path / "in", MIXED)
    combined(theirs, ours, [0.7, -1.3, 0.4], "cat")
    lora_fx.save_adapter(ours, tmp_path / "out", "new")
    read = peft.PeftModel.from_pretrained(net(), tmp_path / "out" / "new")
    assert_close(read(IDS), ours(IDS))
    again = lora_fx.load_adapter(net(), tmp_path / "out", adapter_name="new")
    assert_same_bits(again(IDS), ours(IDS))


def test_cat_is_the_sum_in_fp64(tmp_path: Path) -> None:
    _, ours = both(tmp_path, MIXED)
    weights = [0.7, -1.3, 0.4]
    lora_fx.add_weighted_adapter(ours, ["one", "two", "three"], weights, "new", "cat")
    state = {name: p.clone() for name, p in in_double(net()).named_parameters()}
    for name, weight in zip(("one", "two", "three"), weights, strict=True):
        wide = in_double(net())
        lora_fx.merge(ours, adapter_names=name, into=wide)
        for key, value in wide.named_parameters():
            state[key] = state[key] + weight * (value - dict(net().named_parameters())[key])
    exact = in_double(net())
    exact.load_state_dict(state)
    assert_close(lora_fx.merge(ours, adapter_names="new")(IDS), exact(IDS))


def test_a_scale_by_the_root_of_the_rank_is_not_applied_twice(tmp_path: Path) -> None:
    """PEFT's new adapter keeps use_rslora, and is scaled by the root of its rank on top."""
    values = {"r": 4, "lora_alpha": 2, "target_modules": ["up", "down"], "use_rslora": True}
    theirs, ours = both(tmp_path, {"one": values, "two": values})
    combined(theirs, ours, [0.5, 0.5], "svd", svd_rank=6)
    for layer in (theirs.base_model.model.up, theirs.base_model.model.down):
        assert layer.scaling["new"] == pytest.approx(6**0.5)
        layer.scaling["new"] = 1.0
    assert_close(ours(IDS), theirs(IDS))


def test_the_new_adapter_is_not_active_and_can_be_trained(tmp_path: Path) -> None:
    _, ours = both(tmp_path, SAME)
    before = ours(IDS)
    lora_fx.add_weighted_adapter(ours, ["one", "two"], [1, 1], "new", "linear")
    assert lora_fx.active_adapters(ours) == ("one",)
    assert_same_bits(ours(IDS), before)
    lora_fx.set_adapter(ours, "new")
    ours(IDS).square().sum().backward()
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {
        n for n, _ in ours.named_parameters() if n.endswith(".new")
    }


def test_a_module_that_one_adapter_trains_is_taken_over(tmp_path: Path) -> None:
    """PEFT gives the new adapter the base's module instead, or none."""
    saved = {**SAME["two"], "modules_to_save": ["head"]}
    _, ours = both(tmp_path, {"one": SAME["one"], "two": saved})
    lora_fx.set_adapter(ours, "two")
    head = ours.head.weight.detach().clone()
    assert not torch.equal(head, net().head.weight)
    lora_fx.add_weighted_adapter(ours, ["one", "two"], [0.0, 1.0], "new", "cat")
    expected = ours(IDS)
    lora_fx.set_adapter(ours, "new")
    assert_same_bits(ours.head.weight, head)
    assert_close(ours(IDS), expected)
    with torch.no_grad():
        ours.head.weight.zero_()
    lora_fx.set_adapter(ours, "two")
    assert_same_bits(ours.head.weight, head)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


@pytest.mark.parametrize("second", [True, False])
def test_tied_heads_stay_tied_if_they_are_everywhere(second: bool) -> None:
    torch.manual_seed(0)
    ids = torch.arange(9)
    config = LoraConfig(r=2, target_modules=["table"], ensure_weight_tying=True)
    model = lora_fx.rewrite(Tied(), config, adapter_name="one")
    other = dataclasses.replace(config, ensure_weight_tying=second, r=3)
    lora_fx.add_adapter(model, other, "two")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    lora_fx.add_weighted_adapter(model, ["one", "two"], [0.5, -2.0], "new", "cat")
    rows = {row.name: row for row in record_of(model).adapters["new"].sites}
    assert rows["head"].tied == ("table" if second else "")
    base = Tied()
    names = ("table.weight", "head.weight")
    base.load_state_dict({name: model.get_parameter(name) for name in names})
    base.head.weight = nn.Parameter(base.head.weight.detach().clone())
    with torch.no_grad():
        start = base.table.weight.clone()
        for name, weight in (("one", 0.5), ("two", -2.0)):
            a, b = model.table.lora_embedding_A, model.table.lora_embedding_B
            row = next(r for r in record_of(model).adapters[name].sites if r.name == "table")
            change = weight * row.scale * (getattr(b, name) @ getattr(a, name)).T
            base.table.weight += change
            if name == "one" or second:
                base.head.weight += change
        assert not torch.equal(start, base.table.weight)
    lora_fx.set_adapter(model, "new")
    assert_close(model(ids), base(ids))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 5, 6))
        self.fused = nn.Linear(6, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.fused(x).chunk(3, -1)
        return torch.bmm(x, self.experts.mT).sum() + q * k * v


def test_experts_that_peft_refuses() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["experts"], init_lora_weights=False)
    model = lora_fx.rewrite(Experts(), config, adapter_name="one")
    lora_fx.add_adapter(model, dataclasses.replace(config, seed=1), "two")
    x = torch.randn(3, 4, 6)
    lora_fx.set_adapter(model, ["one", "two"])
    expected = model(x)
    lora_fx.add_weighted_adapter(model, ["one", "two"], [1, 1], "new", "svd", svd_rank=4)
    lora_fx.set_adapter(model, "new")
    assert_close(model(x), expected)


# --- refusals -------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, object]:
    return {
        "record": record_of(model),
        "values": {name: (id(p), p._version) for name, p in model.named_parameters()},
        "classes": [type(module) for module in model.modules()],
        "random": torch.random.get_rng_state().tolist(),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": ["one", "four"]}, "there is no adapter 'four': the model has 'one', 'two'"),
        ({"adapters": "one"}, "adapters: found 'one'; give a list"),
        ({"adapters": [], "weights": []}, "adapters: found none"),
        ({"adapters": ["one", "one"]}, "one is named twice"),
        ({"weights": [1.0]}, "weights: found 1 for 2 adapter(s)"),
        ({"weights": [1.0, float("nan")]}, "weights: found nan for 'two'"),
        ({"weights": [1.0, "2"]}, "weights: found '2' for 'two'"),
        ({"adapter_name": "one"}, "there is an adapter 'one' already"),
        ({"adapter_name": "a.b"}, "adapter_name 'a.b' has to be letters"),
        ({"combination_type": "catt"}, "combination_type: found 'catt'; nearest: 'cat'"),
        ({"combination_type": "ties"}, "density: found None"),
        (
            {"combination_type": "linear", "adapters": ["one", "wide"]},
            "up: combination_type='linear'",
        ),
    ],
    ids=str,
)
def test_what_is_refused_changes_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, model = both(tmp_path, {**SAME, "wide": {"r": 5, "target_modules": ["up"]}})
    before = state(model)
    arguments = {
        "adapters": ["one", "two"],
        "weights": [1.0, 1.0],
        "adapter_name": "new",
        **changes,
    }
    with pytest.raises(ConfigError, match=re.escape(message)):
        lora_fx.add_weighted_adapter(model, **arguments)
    assert state(model) == before


def test_models_without_adapters() -> None:
    with pytest.raises(ConfigError, match="this Net has no adapters"):
        lora_fx.add_weighted_adapter(net(), ["one"], [1.0], "new")


def test_modules_in_full_of_two_adapters(tmp_path: Path) -> None:
    saved = {"target_modules": ["up"], "modules_to_save": ["head"]}
    theirs, ours = both(tmp_path, {"one": saved, "two": saved})
    with pytest.raises(ValueError, match="target the same module with modules_to_save"):
        theirs.base_model.add_weighted_adapter(["one", "two"], [1, 1], "new", "cat")
    before = state(ours)
    with pytest.raises(ConfigError, match=r"'one' and 'two' both train head\.\w+ in full"):
        lora_fx.add_weighted_adapter(ours, ["one", "two"], [1, 1], "new", "cat")
    assert state(ours) == before


def test_biases_have_no_weighted_sum(tmp_path: Path) -> None:
    trained = {"target_modules": ["up"], "bias": "all"}
    _, ours = both(tmp_path, {"one": trained, "two": {"target_modules": ["up"]}})
    before = state(ours)
    with pytest.raises(ConfigError, match="adapter 'one' cannot be combined: it trains biases"):
        lora_fx.add_weighted_adapter(ours, ["one", "two"], [1, 1], "new", "cat")
    assert state(ours) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainable_token_indices": {"table": [3]}}, "of trainable_token_indices={'table': (3,)}"),
        ({"use_dora": True}, "of use_dora=True there is no weighted sum"),
        ({"lora_bias": True}, "of lora_bias=True there is no weighted sum"),
        ({"init_lora_weights": "pissa", "r": 2}, "its initialization ('pissa') changed up.weight"),
        ({"init_lora_weights": "eva"}, "waits for data"),
    ],
    ids=str,
)
def test_what_is_more_than_factors_has_none(values: dict[str, Any], message: str) -> None:
    config = LoraConfig(target_modules=["up"], **values)
    model = lora_fx.rewrite(net(), config, adapter_name="one")
    before = state(model)
    with pytest.raises(ConfigError, match=re.escape("adapter 'one' cannot be combined: ")) as found:
        lora_fx.add_weighted_adapter(model, ["one"], [1], "new")
    assert message in str(found.value)
    assert state(model) == before


def test_a_changed_base_is_combined_once_it_is_saved(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["up"], r=2, init_lora_weights="pissa")
    model = lora_fx.rewrite(net(), config)
    with torch.no_grad():
        model.up.lora_B.default.add_(0.5)
    lora_fx.save_adapter(model, tmp_path)
    again = lora_fx.load_adapter(net(), tmp_path)
    lora_fx.add_weighted_adapter(again, ["default"], [1.0], "new")
    lora_fx.set_adapter(again, "new")
    assert_close(again(IDS), model(IDS))


def test_a_part_and_its_whole_have_none() -> None:
    config = LoraConfig(r=2, target_modules=["fused"])
    model = lora_fx.rewrite(Experts(), config, adapter_name="one")
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=["fused.0_3"]), "two")
    with pytest.raises(ConfigError, match="a part and its whole cannot be combined"):
        lora_fx.add_weighted_adapter(model, ["two", "one"], [1, 1], "new", "cat")


def test_a_failure_at_the_end_takes_the_adapter_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = both(tmp_path, SAME)
    before = state(ours)
    keys = list(ours.state_dict())

    def fails(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("lora_fx.adapters.weighted._fill", fails)
    with pytest.raises(RuntimeError, match="no room"):
        lora_fx.add_weighted_adapter(ours, ["one", "two"], [1, 1], "new")
    assert lora_fx.adapter_names(ours) == ("one", "two", "three")
    assert list(ours.state_dict()) == keys
    assert state(ours)["values"] == before["values"]
