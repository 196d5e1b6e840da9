"""check compares with W + s·BA, names what is idle, and finds a branch that is wrong or passed by."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError, ConfigError, MergeError
from lora_fx.passes import oracle
from lora_fx.runtime import watch
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits

CONFIG = lora_fx.LoraConfig(r=2, target_modules=["fc", "out"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.out(torch.tanh(self.fc(x)))


class AsksForGradients(Model):
    """Computes something else where gradients are wanted, as code that saves memory does."""

    def forward(self, x):
        y = torch.tanh(self.fc(x))
        return self.out(2 * y if y.requires_grad and torch.is_grad_enabled() else y)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4)


def build(cls=Model) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def state(model: nn.Module) -> dict:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"use_rslora": True, "lora_alpha": 1},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"lora_dropout": 0.5},
        {"bias": "all"},
        {"modules_to_save": ["out"], "target_modules": ["fc"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_right_model_is_right(options, dtype, x):
    config = lora_fx.LoraConfig(**{"r": 2, "target_modules": ["fc", "out"], **options})
    model = lora_fx.rewrite(build().to(dtype), config)
    before = state(model)
    report = lora_fx.check(model, x.to(dtype))
    assert report.error <= report.tolerance
    assert (report.not_run, report.no_gradient, report.no_effect) == ((), (), ())
    for name, value in state(model).items():
        assert_same_bits(value, before[name])
    assert not lora_fx.status(model).unchecked
    assert model.training


def test_nothing_of_the_run_is_left(x):
    model = lora_fx.rewrite(build(), CONFIG)
    generator = torch.get_rng_state()
    lora_fx.check(model, (x,))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids):
        if ids.sum() > 1e9:
            return ids
        return self.fc(self.embed(ids))


@pytest.mark.parametrize(
    "options", [{"trainable_token_indices": {"embed": [1, 2]}}, {"target_modules": ["embed"]}]
)
def test_embeddings_and_rows_of_them(options, monkeypatch):
    ids = torch.tensor([[1, 2, 3]])
    config = lora_fx.LoraConfig(**{"r": 2, "target_modules": ["fc"], **options})
    model = lora_fx.rewrite(build(Words), config, ids)
    assert lora_fx.check(model, ids).not_run == ()
    # A merge that forgets is seen: what was moved has an effect.
    whole = oracle.merge

    def forgetful(adapted):
        result, report = whole(adapted)
        result.embed.weight = build(Words).embed.weight
        return result, report

    monkeypatch.setattr(oracle, "merge", forgetful)
    monkeypatch.setattr(oracle, "_check_merge", lambda *_: None)
    with pytest.raises(CaptureError, match="embed"):
        lora_fx.check(model, ids)


class Idle(nn.Module):
    """Layers that are never called, detached, thrown away, and behind a gate that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.detached = (nn.Linear(4, 4) for _ in range(3))
        self.thrown, self.cancelled, self.gated = (nn.Linear(4, 4) for _ in range(3))
        self.gate = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        if x.sum() > 1e9:
            return self.unused(x)
        self.thrown(x)
        return (
            self.used(x)
            + self.detached(x).detach()
            + 0.0 * self.cancelled(x)
            + self.gate * self.gated(x)
        )


def test_what_is_idle_is_named(x):
    model = lora_fx.rewrite(build(Idle), lora_fx.LoraConfig(r=2))
    report = lora_fx.check(model, {"x": x})
    assert report.sites == 6
    assert report.not_run == ("unused",)
    assert report.no_gradient == ("detached", "thrown")
    assert report.no_effect == ("cancelled",)
    lines = str(report).splitlines()
    assert lines[1:] == [
        "did not run: unused",
        "got no gradient: detached, thrown",
        "had no effect: cancelled",
    ]
    assert torch.equal(model.gate, torch.zeros(4))


def spoil(model: nn.Module, fqn: str, factor: float) -> None:
    """Has a layer's graph multiply its branch by something else."""
    from lora_fx.passes.graph import graphs_of, install

    module = model.get_submodule(fqn)
    from lora_fx.ir.graph import Region
    from lora_fx.passes.graph import copy_graph

    graph = copy_graph(graphs_of(model)[fqn])
    changed = 0
    for node in graph.nodes:
        if node.op == "call_function" and any(isinstance(a, float) for a in node.args):
            node.args = tuple(a * factor if isinstance(a, float) and a else a for a in node.args)
            changed += 1
    assert changed
    install([Region(fqn, module, graph, fallback=False)])


def test_a_wrong_branch_is_found_and_named(x):
    model = lora_fx.rewrite(build(), CONFIG)
    spoil(model, "out", 1.5)
    with pytest.raises(CaptureError, match=r"dense weights .* with an adapter on out: relative"):
        lora_fx.check(model, x)
    assert lora_fx.status(model).unchecked


class Hidden(Model):
    """A wrong layer behind a gate of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return x + self.gate * super().forward(x)


def test_a_wrong_branch_behind_zeros_is_found(x):
    model = lora_fx.rewrite(build(Hidden), CONFIG)
    spoil(model, "fc", 1.5)
    with pytest.raises(CaptureError, match="with an adapter on fc: relative"):
        lora_fx.check(model, x)


def weight_of(layer):
    return layer.weight


class Reads(Model):
    """Reads the weight of its layer, which has its adapters."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.out(F.linear(x, weight_of(self.fc)))


def test_code_that_reads_a_weight_computes_with_its_adapters(x):
    base = build(Reads)
    model = lora_fx.rewrite(base, CONFIG, x)
    report = lora_fx.check(model, x)
    assert report.error <= report.tolerance
    assert (report.not_run, report.no_gradient, report.no_effect) == ((), (), ())
    randomize(model)
    weights = {
        row.site.weight: base.get_parameter(row.site.weight)
        + row.scale * product_of(model, row.name)
        for row in model._lora_fx.adapters["default"].sites
    }
    exact = torch.func.functional_call(base, weights, (x,))
    assert_close(model(x), exact)
    assert not torch.allclose(exact, base(x))


def product_of(model: nn.Module, fqn: str) -> torch.Tensor:
    layer = model.get_submodule(fqn)
    return layer.lora_B.default @ layer.lora_A.default


class Raw(Model):
    """Reads the weight past the attribute of its layer, without its adapters."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.out(F.linear(x, dict(self.named_parameters())["fc.weight"]))


def test_rewrite_with_inputs_checks_at_once(x):
    with pytest.raises(CaptureError, match=r"fc: its weight fc\.weight is read by mm"):
        lora_fx.rewrite(build(Raw), CONFIG, x)
    model = lora_fx.rewrite(build(), CONFIG, x)
    assert not lora_fx.status(model).unchecked


class Stale(Model):
    """Reads a table that its own train() makes of the weight without adapters, past PyTorch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.table = None

    def train(self, mode=True):
        super().train(mode)
        self.table = self.fc.get_parameter("weight").detach().numpy().copy()
        return self

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.out(self.fc(x) + x @ torch.from_numpy(self.table).T)


def test_a_reader_that_no_operator_shows_is_found_by_comparison(x):
    with pytest.raises(CaptureError, match="dense weights"):
        lora_fx.rewrite(build(Stale), CONFIG, x)


class Router(nn.Module):
    """The best two of four experts, two of which are as good as equal."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.gate = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        with torch.no_grad():
            self.gate.weight[1] = self.gate.weight[0] * (1 + 2e-7)
            self.gate.weight[2:] -= 5

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        values, chosen = self.gate(self.pre(x).abs()).topk(1)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        return values * every[torch.arange(len(x)), chosen[:, 0]]


def test_ties_of_a_router_do_not_flip(x):
    model = lora_fx.rewrite(
        build(Router), lora_fx.LoraConfig(r=2, target_modules=["pre", r"0", "1"])
    )
    report = lora_fx.check(model, torch.randn(256, 4))
    assert report.error <= report.tolerance


@pytest.mark.parametrize("name", ["topk", "sort", "max", "argmax", "argsort"])
def test_choices_are_replayed(name):
    choices = oracle._Choices()
    first, second = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]])

    def choose(values):
        found = values.topk(2) if name == "topk" else getattr(values, name)(-1)
        return tuple(found) if isinstance(found, tuple) else (found,)

    with choices:
        wanted = choose(first)
    with choices.replayed():
        found = choose(second)
    assert torch.equal(found[-1], wanted[-1])
    if len(found) == 2:
        indices = found[1] if found[1].dim() == 2 else found[1].unsqueeze(-1)
        assert torch.equal(found[0].reshape(-1), second.gather(-1, indices).reshape(-1))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_mixtures_of_transformers(name):
    builders = {"mixtral": transformers.MixtralConfig, "qwen3_moe": transformers.Qwen3MoeConfig}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 30}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    many = (
        {"num_local_experts": 4}
        if name == "mixtral"
        else {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(builders[name](**sizes, **heads, **many))
    report = lora_fx.check(
        lora_fx.rewrite(model, lora_fx.LoraConfig(r=2)), torch.arange(20).view(2, 10)
    )
    assert report.error <= report.tolerance
    assert not report.not_run


class Once(Model):
    """Gives other numbers at each call."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x) * self.calls


def test_a_model_that_cannot_run_twice_stays_unchecked(x, caplog):
    model = lora_fx.rewrite(build(Once), CONFIG)
    with pytest.raises(CaptureError, match="cannot be checked: two runs"):
        lora_fx.check(model, x)
    assert lora_fx.status(model).unchecked


def test_an_adapter_that_cannot_be_merged(x, caplog):
    class NoBias(Model):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6, bias=False)

    config = lora_fx.LoraConfig(r=2, target_modules=["fc"], lora_bias=True)
    with caplog.at_level(logging.INFO, "lora_fx"):
        model = lora_fx.rewrite(build(NoBias), config, x)
    assert "not compared with the dense model: fc" in caplog.text
    with pytest.raises(MergeError, match="bias on B"):
        lora_fx.check(model, x)


def test_what_cannot_be_asked(x):
    with pytest.raises(ConfigError, match="no adapters"):
        lora_fx.check(build(), x)
    model = lora_fx.rewrite(build(), CONFIG)
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        lora_fx.check(model, torch.randn(3, 5))
    lora_fx.set_adapter(model, [])
    with pytest.raises(ConfigError, match="active"):
        lora_fx.check(model, x)


def test_several_adapters_and_a_copy(x):
    model = lora_fx.rewrite(build(), CONFIG)
    lora_fx.add_adapter(
        model, lora_fx.LoraConfig(r=3, target_modules=["fc"], use_dora=True), "other"
    )
    lora_fx.set_adapter(model, ["default", "other"])
    report = lora_fx.check(copy.deepcopy(model), x)
    assert report.sites == 3
    assert report.error <= report.tolerance


def test_large_models_are_not_made_dense_by_a_rewrite(x, monkeypatch):
    monkeypatch.setattr(oracle, "_LIMIT", 10)
    monkeypatch.setattr(oracle, "merge", None)
    model = lora_fx.rewrite(build(), CONFIG, x)
    assert lora_fx.status(model).unchecked
    with pytest.raises(CaptureError, match=r"read by mm"):
        lora_fx.rewrite(build(Raw), CONFIG, x)
    assert watch.is_checked(model) is False


def test_a_forward_that_asks_for_gradients_is_compared_with_them(x) -> None:
    adapted = lora_fx.rewrite(build(AsksForGradients), CONFIG, (x,))
    assert lora_fx.check(adapted, (x,)).error < 1e-6


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 1), nn.Linear(1, 1)

    def forward(self, x):
        return self.out(self.fc(x))


def test_a_change_that_almost_undoes_the_weight_is_no_error() -> None:
    adapted = lora_fx.rewrite(build(One), CONFIG)
    weight = adapted.get_parameter("out.weight")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.startswith("out.lora_A"):
                parameter.fill_(1.0)
            if name.startswith("out.lora_B"):
                parameter.fill_(float(-weight * (1 - 1e-6)) / 2 / (8 / 2))
    rows = [(row, "default") for row in adapted_rows(adapted)]
    oracle._check_merge(adapted, lora_fx.merge(adapted), rows, oracle.require_record(adapted))


def adapted_rows(adapted: nn.Module) -> list:
    return list(oracle.require_record(adapted).adapters["default"].sites)
