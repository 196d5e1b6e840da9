"""Adapter kinds: the protocol, its registry, and a kind without factors everywhere that factors are known."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
import lora_fx.kinds as _registry
from lora_fx import CheckpointError, ConfigError, ExportError, LoraConfig
from lora_fx.ir import Role, Site
from lora_fx.kinds import (
    RANK,
    AdapterKind,
    Costs,
    Slot,
    chosen_kind,
    kind_of,
    kinds,
    register_adapter_kind,
)
from lora_fx.kinds.lora import Lora

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_kind.py"


def example() -> Any:
    """The module of the example, which registers its kind."""
    spec = importlib.util.spec_from_file_location("custom_kind", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def ia3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_registry", _registry._BUILT_IN)
    example()


class Several(nn.Module):
    """One of each: a lookup, convolutions, with groups and transposed, fused rows, products, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.turned = nn.ConvTranspose1d(8, 8, 3, padding=1, groups=2)
        self.qkv = nn.Linear(8, 24)
        self.plain = nn.Linear(8, 6, bias=False)
        self.matrix = nn.Parameter(torch.randn(6, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        x = self.turned(self.conv(x.mT)).mT + x
        q, k, v = self.qkv(x).chunk(3, -1)
        x = torch.tanh(self.plain(q * k + v)) @ self.matrix
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


NAMES = ["words", "conv", "turned", "qkv", "plain", "matrix", "in_proj_weight", "out_proj", "head"]


def ids() -> torch.Tensor:
    return torch.arange(20).view(4, 5) % 11


def adapted(
    model: nn.Module | None = None, names: Any = NAMES, random: bool = True, **fields: Any
) -> nn.Module:
    torch.manual_seed(0)
    model = Several() if model is None else model
    config = LoraConfig(kind="ia3", target_modules=names, **fields)
    result = lora_fx.rewrite(model, config, (ids(),))
    if random:
        randomize(result)
    return result.eval()


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)


def test_a_planned_site_carries_the_name_of_its_kind() -> None:
    for fields, name in (
        ({}, "lora"),
        ({"use_dora": True}, "dora"),
        ({"lora_bias": True}, "lora-bias"),
    ):
        plan = lora_fx.plan(
            nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], **fields)
        )
        assert [row.kind for row in plan.sites] == [name]
        assert kind_of(plan.sites[0]) is chosen_kind(plan.config)
        assert plan.to_dict()["sites"][0]["kind"] == name


def test_a_kind_without_factors_changes_nothing_before_training() -> None:
    torch.manual_seed(0)
    base = Several().eval()
    # Attention has another kernel in a graph than in its own forward, whatever is adapted.
    model = adapted(base, [name for name in NAMES if "proj" not in name], random=False)
    # A product and then its bias are rounded twice; PyTorch's kernel for both rounds once on some machines.
    torch.testing.assert_close(model(ids()), base(ids()), rtol=1e-6, atol=1e-6)
    assert all("ia3_l" in name for name, p in model.named_parameters() if p.requires_grad)


def test_it_computes_what_the_merged_weights_do() -> None:
    model = adapted()
    assert {row.name for row in model._lora_fx.adapters["default"].sites} >= {
        "words",
        "matrix",
        "qkv",
    }
    merged = lora_fx.merge(model)
    assert type(merged) is Several
    torch.testing.assert_close(merged(ids()), model(ids()))
    assert "relative difference" in str(lora_fx.check(model, (ids(),)))


def test_its_gradients_are_those_of_the_scaled_weights() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3)).double()
    config = LoraConfig(kind="ia3", target_modules=["0"])
    model = lora_fx.rewrite(base, config)
    randomize(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    scale = model[0].ia3_l.default.detach().clone().requires_grad_()
    (
        nn.functional.linear(x, scale[:, None] * base[0].weight, scale * base[0].bias)
    ).square().sum().backward()
    torch.testing.assert_close(model[0].ia3_l.default.grad, scale.grad)


def test_a_part_of_a_fused_weight_leaves_the_rest() -> None:
    torch.manual_seed(0)
    base = Several().eval()
    model = adapted(base, ["qkv.k"])
    merged = lora_fx.merge(model)
    torch.testing.assert_close(merged(ids()), model(ids()))
    assert torch.equal(merged.qkv.weight[:8], base.qkv.weight[:8])
    assert not torch.equal(merged.qkv.weight[8:16], base.qkv.weight[8:16])
    assert torch.equal(merged.qkv.bias[16:], base.qkv.bias[16:])


def test_several_adapters_add_what_they_change() -> None:
    model = adapted(names=["qkv", "plain", "conv"])
    lora_fx.add_adapter(
        model,
        LoraConfig(r=2, target_modules=["qkv", "plain"], init_lora_weights=False),
        adapter_name="lora",
    )
    lora_fx.add_adapter(
        model, LoraConfig(kind="ia3", target_modules=["qkv", "conv"]), adapter_name="more"
    )
    randomize(model)
    for names in (["default", "more"], ["lora", "default"], ["more", "lora", "default"]):
        lora_fx.set_adapter(model, names)
        merged = lora_fx.merge(model)
        torch.testing.assert_close(merged(ids()), model(ids()), msg=str(names))


def test_each_sample_has_its_adapter() -> None:
    model = adapted(names=["qkv", "plain"])
    lora_fx.add_adapter(
        model,
        LoraConfig(r=2, target_modules=["qkv", "plain"], init_lora_weights=False),
        adapter_name="lora",
    )
    expected = []
    for index, name in enumerate(("default", "lora", None, "default")):
        with lora_fx.disable_adapter(model) if name is None else _only(model, name):
            expected.append(model(ids())[index])
    with lora_fx.adapter_ids(model, ["default", "lora", None, "default"]):
        found = model(ids())
    torch.testing.assert_close(found, torch.stack(expected))


class _only:
    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __enter__(self) -> None:
        lora_fx.set_adapter(self.model, self.name)

    def __exit__(self, *_: object) -> None:
        return None


@pytest.mark.parametrize("names", [NAMES, ["qkv.k", "conv"]], ids=["whole", "part"])
def test_a_folder_brings_it_back(names: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Several().eval()
    model = adapted(base, names)
    lora_fx.save_adapter(model, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["kind"]) == ("LORA_FX_IA3", "ia3")
    again = lora_fx.load_adapter(base, tmp_path)
    assert torch.equal(again(ids()), model(ids()))
    more = lora_fx.rewrite(base, LoraConfig(r=2, target_modules=["qkv"]))
    lora_fx.load_adapter(more, tmp_path, adapter_name="ia3")
    lora_fx.set_adapter(more, "ia3")
    torch.testing.assert_close(more.eval()(ids()), model(ids()))


def test_a_folder_of_a_kind_that_is_not_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora_fx.save_adapter(adapted(), tmp_path)
    monkeypatch.setattr(_registry, "_registry", _registry._BUILT_IN)
    with pytest.raises(ConfigError, match=r"'ia3' is not registered here.*register_adapter_kind"):
        lora_fx.load_adapter(Several(), tmp_path)


def test_plain_adapters_have_no_kind_in_their_folder(tmp_path: Path) -> None:
    LoraConfig(use_dora=True).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "kind" not in stored
    assert stored["peft_type"] == "LORA"
    assert LoraConfig(kind="ia3") == LoraConfig.from_dict(LoraConfig(kind="ia3").to_dict())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**stored, "peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="peft_type is 'IA3'"):
        LoraConfig.from_pretrained(tmp_path)


def test_copies_go_on_and_adapters_go() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids()), model(ids()))
    lora_fx.set_adapter(twin, [])
    lora_fx.delete_adapter(twin, "default")
    assert not [name for name, _ in twin.named_parameters() if "ia3_l" in name]


def test_a_swap_brings_other_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Several().eval()
    lora_fx.save_adapter(adapted(base, ["qkv"]), tmp_path)
    wanted = adapted(base, ["qkv"])(ids())
    model = adapted(base, ["qkv", "plain"])
    lora_fx.hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(model(ids()), wanted)
    with pytest.raises(ConfigError, match="which has no rank"):
        lora_fx.prepare_hotswap(model, 8)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"rank_pattern": {"qkv": 2}}, "rank_pattern"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ],
)
def test_fields_of_factors_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=f"LoraConfig.{match}: .*has no factors A and B"):
        lora_fx.plan(Several(), LoraConfig(kind="ia3", target_modules=NAMES, **fields))


def test_a_kind_has_one_way_to_be_chosen() -> None:
    with pytest.raises(ConfigError, match="use_dora=True chooses it: leave out kind"):
        lora_fx.plan(Several(), LoraConfig(kind="dora", target_modules=NAMES))
    with pytest.raises(ConfigError, match="leave out use_dora or kind"):
        LoraConfig(kind="ia3", use_dora=True)
    with pytest.raises(ConfigError, match="did you mean 'ia3'"):
        lora_fx.plan(Several(), LoraConfig(kind="ia33", target_modules=NAMES))


def test_what_has_no_meaning_without_factors_is_refused(tmp_path: Path) -> None:
    model = adapted(names=["qkv", "plain"])
    with pytest.raises(ConfigError, match="of kind='ia3' there is no weighted sum"):
        lora_fx.add_weighted_adapter(model, ["default"], [1.0], "sum")
    with pytest.raises(CheckpointError, match="qkv has a scale"):
        lora_fx.save_adapter(model, tmp_path / "vllm", vllm=True)
    with pytest.raises(ExportError, match="the kind 'ia3', which no file takes as inputs"):
        lora_fx.save_onnx_adapter(model, tmp_path / "a.onnx_adapter")
    groups = lora_fx.parameter_groups(model, 1e-3, lora_fa=False)
    assert [group["name"] for group in groups] == ["vectors"]


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_a_quantized_base_is_scaled_as_a_dense_one(fmt: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    base = lora_fx.quantize(dense, fmt)
    config = LoraConfig(kind="ia3", target_modules=["0", "2"])
    model = lora_fx.rewrite(base, config).eval()
    x = torch.randn(3, 64)
    assert torch.equal(model(x), base.eval()(x))
    randomize(model)
    merged = lora_fx.merge(model)
    torch.testing.assert_close(merged(x), model(x), rtol=2e-2, atol=2e-2)
    with pytest.raises(ConfigError, match="has no factors that could make up"):
        lora_fx.replace_lora_weights_loftq(model, dense)


def test_a_bias_that_is_no_parameter_is_refused() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight, self.bias * 2)

    plan = lora_fx.plan(Computed(), LoraConfig(target_modules=["weight"]))
    assert plan.sites
    with pytest.raises(ConfigError, match="what the operation adds, and that is no parameter"):
        lora_fx.plan(Computed(), LoraConfig(kind="ia3", target_modules=["weight"]))


def test_a_kind_says_what_it_needs_to() -> None:
    class Nameless(AdapterKind):
        low_rank = False

    class Idle(Nameless):
        name = "idle"

    class Keyless(Idle):
        transforms = True

    class Other(AdapterKind):
        name = "ia3"

    for kind, match in (
        (Nameless(), "no adapter kind with a name"),
        (Idle(), "would train nothing"),
        (Keyless(), "says no keys"),
        (Other(), "registered already"),
    ):
        with pytest.raises(ConfigError, match=match):
            register_adapter_kind(kind)
    with pytest.raises(ConfigError, match="no adapter kind"):
        register_adapter_kind(object())  # type: ignore[arg-type]
    before = kinds()
    example()
    assert [one.name for one in kinds()] == [one.name for one in before]


def test_costs_are_those_of_the_site_whatever_led_to_its_rank() -> None:
    """A rank that was planned and one that was given later cost the same."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    for fields in ({}, {"use_dora": True}, {"lora_bias": True}):
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["0", "1"], **fields)
        adapted = lora_fx.rewrite(model, config)
        lora_fx.prepare_hotswap(adapted, 4)
        planned = lora_fx.plan(model, dataclasses.replace(config, r=4, lora_alpha=4))
        assert adapted._lora_fx.adapters["default"].sites == planned.sites


class Core(AdapterKind):
    """``W/2 + s · B M A``: a trained matrix over the rank, a count of the calls, and another base."""

    name = "core"

    def slots(self, site: Any) -> tuple[Slot, ...]:
        """M, [r, r], and the number of training calls, which no folder has."""
        core = Slot("core_m", "core_m", (RANK, RANK), "a core", over_outputs=False)
        return core, Slot("core_calls", "", (1,), "a count", over_outputs=False, trained=False)

    def costs(self, site: Any, rank: int) -> Costs:
        return Costs(parameters=rank**2)

    def start(self, slot: Slot, starting: Any) -> torch.Tensor:
        return torch.eye(starting.row.rank) if slot.name == "core_m" else torch.zeros(1)

    def start_base(self, row: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2

    def penalty(self, row: Any, factors: Any, *, sites: int, training: bool) -> torch.Tensor:
        assert (sites, training) == (2, True)
        assert factors["a"].shape == (row.rank, row.site.in_features)
        return factors["core_m"].square().sum() + factors["core_calls"].sum()

    def factor(self, build: Any, letter: str, stored: Any) -> Any:
        if letter == "b":
            return stored
        slots = map(build.read_slot, ("core_m", "core_calls"))
        return build.call(Role.FACTOR, multiplied, stored, *slots, build.training)

    def joined(self, build: Any, up: Any) -> Any:
        scaled = build.call(Role.SCALE, operator.mul, up, build.scale)
        return build.call(Role.ADD, operator.add, build.total, build.padded(scaled))

    def merged_factors(
        self, site: Any, a: torch.Tensor, b: torch.Tensor, values: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return a, b @ values["core_m"]


def multiplied(
    a: torch.Tensor, core: torch.Tensor, calls: torch.Tensor, training: bool
) -> torch.Tensor:
    """M A; counts the calls in training mode."""
    if training:
        with torch.no_grad():
            calls.add_(1)
    return core @ a


class Louder(AdapterKind):
    """``g · (W + s · BA)`` with one number g for the whole weight."""

    name = "louder"
    transforms = True

    def slots(self, site: Any) -> tuple[Slot, ...]:
        return (Slot("louder_g", "louder_g", (1,), "a gain", neutral=1.0, over_outputs=False),)

    def costs(self, site: Any, rank: int) -> Costs:
        return Costs(parameters=1)

    def joined(self, build: Any, up: Any) -> Any:
        scaled = build.call(Role.SCALE, operator.mul, up, build.scale)
        total = build.call(Role.SCALE, operator.add, build.total, scaled)
        return build.call(Role.ADD, operator.mul, total, build.cast_slot("louder_g"))

    def transformed(self, weight: torch.Tensor, site: Any, values: Any) -> torch.Tensor:
        assert values["louder_g"].shape == (1,)
        return weight * values["louder_g"]


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_slots_over_the_rank_state_and_another_base(tmp_path: Path) -> None:
    register_adapter_kind(Core())
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    config = LoraConfig(kind="core", r=2, target_modules=["0", "2"])
    x = torch.randn(4, 6, dtype=torch.float64)
    model = shaken(lora_fx.rewrite(base, config, (x,))).train()
    assert sum(row.parameters for row in lora_fx.plan(base, config).sites) == sum(
        parameter.numel() for parameter in lora_fx.trainable_parameters(model)
    )
    model(x).square().sum().backward()
    model(x)
    layer = model[0]
    factors = [layer.get_submodule(f"{name}").default for name in ("lora_B", "core_m", "lora_A")]
    exact = base[0].weight / 2 + 4 * torch.linalg.multi_dot([f.detach() for f in factors])
    torch.testing.assert_close(lora_fx.merge(model)[0].weight, exact)
    torch.testing.assert_close(model[0].weight, exact)  # as code reads it
    assert all(parameter.grad is not None for parameter in lora_fx.trainable_parameters(model))

    calls = [value for name, value in model.named_buffers() if "core_calls" in name]
    assert [float(value) for value in calls] == [2, 2]
    squares = sum(model.get_submodule(name).core_m.default.square().sum() for name in ("0", "2"))
    torch.testing.assert_close(lora_fx.adapter_penalty(model), squares + 4)

    lora_fx.save_adapter(model, tmp_path)
    assert not [key for key in lora_fx.adapter_state_dict(model) if "calls" in key]
    again = lora_fx.load_adapter(base, tmp_path)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))
    assert lora_fx.check(again, (x,)).error < 1e-10
    with lora_fx.disable_adapter(again):
        torch.testing.assert_close(again(x), base(x))


def test_a_slot_that_is_no_vector_is_whole_in_every_slice_of_a_merge() -> None:
    register_adapter_kind(Louder())
    base = nn.Sequential(
        nn.Linear(512, 1200)
    )  # more than the elements that a merge widens at a time
    model = shaken(lora_fx.rewrite(base, LoraConfig(kind="louder", r=2, target_modules=["0"])))
    layer = model[0]
    gain, a, b = (
        layer.get_submodule(name).default.detach().double()
        for name in ("louder_g", "lora_A", "lora_B")
    )
    exact = gain * (base[0].weight.double() + 4 * b @ a)
    torch.testing.assert_close(lora_fx.merge(model)[0].weight.double(), exact, rtol=1e-6, atol=0)


def test_a_slot_that_no_merge_knows_is_refused() -> None:
    """A kind that multiplies by its slot in a graph alone would be merged without it."""

    class Silent(Lora):
        def __init__(self) -> None:
            super().__init__()
            self.name, self.trains = "silent", "a gain"

        def slots(self, site: Site) -> tuple[Slot, ...]:
            return (Slot("gain", "lora_gain", (1,), "a gain", 1.0, over_outputs=False),)

        def factor(self, build: Any, letter: str, stored: Any) -> Any:
            gain = build.read_slot("gain")
            return build.call(Role.FACTOR, operator.mul, stored, gain) if letter == "b" else stored

    lora_fx.register_adapter_kind(Silent())
    config = lora_fx.LoraConfig(kind="silent", r=2, target_modules=["0"])
    with pytest.raises(ConfigError, match=r"trains gain at 0, .*override merged_factors"):
        lora_fx.rewrite(nn.Sequential(nn.Linear(4, 4)), config)
