"""Starts from data: against PEFT on the same data, and the model as it was where they are not possible."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from torch import nn

import lora_fx
from lora_fx.adapters import initialization
from lora_fx.config.lora_config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir.record import record_of
from tests import zoo
from tests.numerics import assert_close, assert_same_bits, relative_error

STARTS = ("eva", "corda", "lora_ga")
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (zoo.tiny_llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (
        lambda: zoo.tiny_gpt2(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
        ["c_attn", "c_fc"],
    ),
}


@pytest.fixture(autouse=True)
def attrs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's CorDA takes a decorator from attrs, which it does not depend on."""
    if importlib.util.find_spec("attr") is None:
        monkeypatch.setitem(
            sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass)
        )


@zoo.seeded
def tokens(rows: int, *, vocabulary: int = 32, padded: bool = False, batches: int = 4) -> list[Any]:
    """Batches of a language model."""
    mask = torch.ones(rows, 12, dtype=torch.long)
    if padded:
        mask[:, 9:] = 0
    return [
        {
            "input_ids": torch.randint(0, vocabulary, (rows, 12)),
            "labels": torch.randint(0, vocabulary, (rows, 12)),
            **({"attention_mask": mask} if padded else {}),
        }
        for _ in range(batches)
    ]


def theirs_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name.removeprefix("base_model.model."), module


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def started(model: nn.Module, data: Any, config: LoraConfig, **how: Any) -> nn.Module:
    """The model with an adapter that has its start; the model is as it was."""
    before = states(model)
    result = lora_fx.rewrite(model, config)
    assert lora_fx.initialize(result, data, progress=False, **how) is result
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])
    return result


# --- against PEFT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("name", MODELS)
def test_corda_is_that_of_peft(name: str, method: str) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    build, targets = MODELS[name]
    model, inputs = build()
    data = tokens(1)
    values: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": targets,
        "init_lora_weights": "corda",
    }
    ours = started(model, data, LoraConfig(**values, corda_config={"corda_method": method}))
    config = peft.LoraConfig(**values, corda_config=CordaConfig(corda_method=method))
    other = copy.deepcopy(model)
    preprocess_corda(other, config, run_model=lambda: [other(one["input_ids"]) for one in data])
    for site, theirs in theirs_of(peft.get_peft_model(other, config)):
        own = ours.get_submodule(site)
        product = theirs.lora_B.default.weight @ theirs.lora_A.default.weight
        # Both invert the moments in fp32, which costs the digits of their condition.
        assert_close(own.lora_B.default @ own.lora_A.default, product, 1e-4)
        stored = own.get_parameter("weight")
        assert_close(stored, theirs.base_layer.weight, 1e-4)
        assert relative_error(stored, model.get_submodule(site).weight) > 1e-3
    assert_close(ours.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize(
    ("name", "scale", "direction"),
    [
        *(("llama", "stable", direction) for direction in ("ArBr", "A2rBr", "ArB2r")),
        ("llama", "gd_scale", "ArB2r"),
        ("llama", "unit", "ArB2r"),
        ("gpt2", "unit", "ArBr"),
        ("gpt2", "stable", "ArB2r"),
    ],
)
def test_lora_ga_is_that_of_peft(name: str, scale: str, direction: str) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    build, targets = MODELS[name]
    model, inputs = build()
    data = tokens(2)
    options = {"direction": direction, "scale": scale}
    # At rank 4 the subspace of both is the whole space, and the decomposition exact.
    values: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": targets,
        "init_lora_weights": "lora_ga",
    }
    ours = started(model, data, LoraConfig(**values, lora_ga_config=options))
    config = peft.LoraConfig(**values, lora_ga_config=LoraGAConfig(**options))
    other = copy.deepcopy(model)
    preprocess_loraga(other, config, lambda: [other(**one).loss.backward() for one in data])
    for site, theirs in theirs_of(peft.get_peft_model(other, config)):
        own = ours.get_submodule(site)
        # PEFT takes for the number of outputs of a Conv1D that of its inputs.
        base = model.get_submodule(site).weight
        turned = name == "gpt2" and scale == "stable"
        factor = (base.shape[1] / base.shape[0]) ** 0.25 if turned else 1.0
        # A and B have other singular vectors, each with a sign of its own.
        assert_close(own.lora_A.default.abs(), theirs.lora_A.default.weight.abs(), 1e-4)
        assert_close(own.lora_B.default.abs(), factor * theirs.lora_B.default.weight.abs(), 1e-4)
    assert_close(ours.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_lora_ga_scales_by_the_weights_largest_singular_value() -> None:
    model = zoo.seeded(lambda: nn.Sequential(nn.Linear(8, 6)))()
    config = LoraConfig(
        r=2,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config={"scale": "weight_svd"},
    )
    how = {"loss_fn": lambda output, batch: output.square().mean()}
    layer = started(model, [zoo.sample(5, 8)], config, **how)[0]
    assert_close(
        layer.lora_B.default.norm(dim=0).max(), torch.linalg.matrix_norm(model[0].weight, 2)
    )


def test_lora_ga_draws_its_directions_from_the_seed() -> None:
    model = zoo.seeded(lambda: nn.Sequential(nn.Linear(16, 16)))()
    how = {"loss_fn": lambda output, batch: output.square().mean()}

    def a(seed: int) -> torch.Tensor:
        config = LoraConfig(
            r=4,
            target_modules=["0"],
            init_lora_weights="lora_ga",
            lora_ga_config={"direction": "random", "scale": "unit"},
            seed=seed,
        )
        layer = started(model, [zoo.sample(5, 16)], config, **how)[0]
        # B has the singular triples that A has, scaled by their values: orthogonal columns.
        gram = layer.lora_B.default.T @ layer.lora_B.default
        assert_close(gram, torch.diag(gram.diagonal()), 1e-4)
        return layer.lora_A.default

    state = torch.random.get_rng_state()
    first = a(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert_same_bits(a(0), first)
    assert any(not torch.equal(a(seed), first) for seed in (1, 2, 3))


@pytest.mark.parametrize(
    ("name", "rho", "adjust", "use_rslora"),
    [
        ("llama", 2.0, True, False),
        ("llama", 3.0, True, True),
        ("llama", 3.0, False, True),
        ("llama", 2.0, False, False),
        ("gpt2", 2.0, True, False),
    ],
)
def test_eva_is_that_of_peft(name: str, rho: float, adjust: bool, use_rslora: bool) -> None:
    build, targets = MODELS[name]
    model, inputs = build()
    data = tokens(4, padded=True)
    values: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": targets,
        "init_lora_weights": "eva",
        "use_rslora": use_rslora,
    }
    options = {"rho": rho, "adjust_scaling_factors": adjust}
    ours = started(model, data, LoraConfig(**values, eva_config=options))
    other = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**values, eva_config=EvaConfig(**options))
    )
    peft.initialize_lora_eva_weights(other, data, show_progress_bar=False)
    theirs = dict(theirs_of(other))
    rows = {row.name: row for row in record_of(ours).adapters["default"].sites}
    assert {site: row.rank for site, row in rows.items()} == {
        site: module.r["default"] for site, module in theirs.items()
    }
    assert name == "gpt2" or any(row.rank != 4 for row in rows.values())
    for site, module in theirs.items():
        own = ours.get_submodule(site)
        assert_close(own.lora_A.default, module.lora_A.default.weight, 1e-3)
        assert not own.lora_B.default.any()
        assert rows[site].scale == pytest.approx(module.scaling["default"])
        assert rows[site].parameters == own.lora_A.default.numel() + own.lora_B.default.numel()
    assert_same_bits(ours.eval()(**inputs).logits, model.eval()(**inputs).logits)


# --- what an initialized adapter is ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "frontend"), [*((start, "auto") for start in STARTS), ("eva", "export")]
)
def test_it_trains_merges_and_is_saved(start: str, frontend: Any, tmp_path: Path) -> None:
    model, inputs = zoo.tiny_llama()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    adapted = lora_fx.rewrite(model, config, inputs, frontend=frontend)
    assert any("lora_fx.initialize" in line for line in lora_fx.plan(model, config).remarks())
    lora_fx.initialize(adapted, tokens(4), progress=False)
    assert_close(adapted.eval()(**inputs).logits, model.eval()(**inputs).logits)
    adapted.train()(**tokens(2)[0]).loss.backward()
    optimizer = torch.optim.SGD(lora_fx.trainable_parameters(adapted), lr=0.5)
    assert all(p.grad is not None for p in lora_fx.trainable_parameters(adapted))
    optimizer.step()
    expected = adapted.eval()(**inputs).logits
    assert relative_error(expected, model(**inputs).logits) > 1e-4
    assert_close(lora_fx.merge(adapted)(**inputs).logits, expected)
    lora_fx.save_adapter(adapted, tmp_path)
    assert_close(lora_fx.load_adapter(model, tmp_path).eval()(**inputs).logits, expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_close(theirs(**inputs).logits, expected)
    copied = copy.deepcopy(adapted)
    assert_same_bits(copied(**inputs).logits, expected)


@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_that_is_not_active(start: str) -> None:
    model, inputs = zoo.tiny_llama()
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    with torch.no_grad():
        adapted.model.layers[0].self_attn.q_proj.lora_B.default.add_(0.1)
    expected = adapted.eval()(**inputs).logits
    lora_fx.add_adapter(
        adapted, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start), "b"
    )
    lora_fx.initialize(adapted, tokens(4), adapter_name="b", progress=False)
    assert_same_bits(adapted(**inputs).logits, expected)
    assert not any(p.requires_grad for n, p in adapted.named_parameters() if n.endswith(".b"))
    lora_fx.set_adapter(adapted, "b")
    assert_close(adapted(**inputs).logits, model.eval()(**inputs).logits)
    # It saw the base, not the other adapter.
    alone = started(
        model,
        tokens(4),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start),
    )
    for layer, own in zip(adapted.model.layers, alone.model.layers, strict=True):
        assert_close(layer.self_attn.v_proj.lora_A.b, own.self_attn.v_proj.lora_A.default)
    lora_fx.set_adapter(adapted, "default")
    assert_same_bits(adapted(**inputs).logits, expected)


@pytest.mark.parametrize("start", STARTS)
def test_sites_without_a_module(start: str) -> None:
    """Rows of one weight, read by a functional call inside a layer that is written out."""
    encoder = zoo.seeded(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2
        )
    )()
    x = zoo.sample(4, 5, 16)
    how = {"loss_fn": lambda output, batch: output.square().mean()} if start == "lora_ga" else {}
    adapted = started(encoder, [x, 2 * x], LoraConfig(r=2, init_lora_weights=start), **how)
    names = {row.name for row in record_of(adapted).adapters["default"].sites}
    assert "layers.0.self_attn.q" in names
    assert_close(adapted.eval()(x), encoder.eval()(x))
    assert_close(lora_fx.merge(adapted).eval()(x), encoder(x))


class LeftProduct(nn.Module):
    """``W x``: the inputs of the weight are columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.right = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight @ x).mT + F.linear(x.mT, self.right)


def test_the_weight_on_the_left_sees_the_same_vectors() -> None:
    model = zoo.seeded(LeftProduct)()
    config = LoraConfig(
        r=2, target_modules=["weight", "right"], init_lora_weights="eva", eva_config={"rho": 1.0}
    )
    adapted = started(model, [zoo.sample(3, 8, 7)], config)
    assert_same_bits(adapted.lora_A.default, adapted.right_lora.lora_A.default)


def test_a_site_without_a_rank_has_no_adapter(tmp_path: Path) -> None:
    """One site reads vectors of sixteen dimensions, the other of four: those explain more each."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few = nn.Linear(16, 4)
            self.many = nn.Linear(16, 4)

        def forward(self, few: torch.Tensor, many: torch.Tensor) -> torch.Tensor:
            return self.few(few) + self.many(many)

    model = zoo.seeded(Two)()
    directions = torch.linalg.qr(zoo.sample(16, 4)).Q.T
    few, many = zoo.sample(200, 4) @ directions, zoo.sample(200, 16)
    config = LoraConfig(
        r=2, target_modules=["few", "many"], init_lora_weights="eva", eva_config={"rho": 2.0}
    )
    adapted = started(model, [(few, many)], config)
    ((site, rank),) = [(r.name, r.rank) for r in record_of(adapted).adapters["default"].sites]
    assert (site, rank) == ("few", 4)
    assert not hasattr(adapted.many, "lora_A")
    assert not any(
        "many" in str(node.meta.get("lora_fx"))
        for g in lora_fx.graphs(adapted).values()
        for node in g.nodes
    )
    with torch.no_grad():
        adapted.few.lora_B.default.add_(0.1)
    lora_fx.save_adapter(adapted, tmp_path)
    assert_close(lora_fx.load_adapter(model, tmp_path)(few, many), adapted(few, many))
    assert_close(lora_fx.merge(adapted)(few, many), adapted(few, many))


def test_components_are_whitened_one_by_one() -> None:
    """PEFT divides those of sites that read the same once for each of them."""
    model, _ = zoo.tiny_llama()
    data = tokens(4)

    def start(whiten: bool) -> dict[str, torch.Tensor]:
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights="eva",
            eva_config={"rho": 1.0, "whiten": whiten},
            seed=0,
        )
        adapted = started(model, data, config)
        return {n: p for n, p in adapted.named_parameters() if "lora_A" in n}

    plain, white = start(False), start(True)
    for name, value in white.items():
        assert_close(F.normalize(value), plain[name])
    layer = "model.layers.0.self_attn.{}.lora_A.default"
    assert_same_bits(white[layer.format("q_proj")], white[layer.format("v_proj")])
    assert white[layer.format("q_proj")].norm(dim=1).max() < 1


def test_labels_that_are_ignored_leave_tokens_out() -> None:
    model, _ = zoo.tiny_llama()
    data = tokens(6)
    for one in data:
        one["labels"][:, 6:] = -100
    halves = [
        {"input_ids": one["input_ids"][:, :6], "labels": one["labels"][:, :6]} for one in data
    ]

    def a(batches: Any, **options: Any) -> torch.Tensor:
        config = LoraConfig(
            r=4,
            target_modules=["layers.0.self_attn.q_proj"],
            init_lora_weights="eva",
            eva_config={"rho": 2.0, **options},
        )
        return started(model, batches, config).model.layers[0].self_attn.q_proj.lora_A.default

    assert_close(a(data), a(halves), 1e-4)
    assert relative_error(a(data, use_label_mask=False), a(halves)) > 1e-2


def test_a_search_that_does_not_end_is_noted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(initialization, "_MOST_BATCHES", 8)
    model, _ = zoo.tiny_llama()
    config = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="eva", eva_config={"tau": 1.0}
    )
    with caplog.at_level(logging.WARNING, "lora_fx"):
        started(model, tokens(2), config)
    assert "still moved" in caplog.text
    caplog.clear()
    # An iterator is gone through once.
    with caplog.at_level(logging.WARNING, "lora_fx"):
        started(model, iter(tokens(2)), config)
    assert "still moved" in caplog.text


def test_batch_statistics_and_modes_are_left_alone() -> None:
    model = zoo.seeded(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    )()
    config = LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights="lora_ga")
    adapted = lora_fx.rewrite(model, config)
    adapted[1].eval()
    running = adapted[1].running_mean.clone()
    pairs = [(zoo.sample(6, 8), torch.tensor([0, 1, 2, 3, 0, 1]))] * 2
    lora_fx.initialize(
        adapted,
        pairs,
        forward=lambda one, batch: one(batch[0]),
        loss_fn=lambda output, batch: F.cross_entropy(output, batch[1]),
        progress=False,
    )
    assert_same_bits(adapted[1].running_mean, running)
    assert adapted.training
    assert not adapted[1].training
    assert all(p.grad is None for p in adapted.parameters())


def test_a_tied_weights_other_use_has_no_part_in_its_gradient() -> None:
    model = zoo.seeded(zoo.Tied)()
    ids = torch.arange(8).view(2, 4)
    config = LoraConfig(
        r=2, target_modules=["head"], init_lora_weights="lora_ga", lora_ga_config={"scale": "unit"}
    )
    how = {"loss_fn": lambda output, batch: output.square().mean()}
    adapted = started(model, [ids], config, **how)
    hidden = torch.tanh(model.body(model.embed(ids))).detach().flatten(0, 1)
    weight = model.head.weight.detach().clone().requires_grad_()
    (hidden @ weight.T).square().mean().backward()
    values = torch.linalg.svdvals(weight.grad)[2:4]
    assert_close(adapted.head.lora_B.default.norm(dim=0), values, 1e-4)


# --- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_progress_is_told(start: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = zoo.tiny_llama()
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    told: list[tuple[int, int, str]] = []
    adapted = lora_fx.rewrite(model, config)
    lora_fx.initialize(adapted, tokens(2), progress=lambda *args: told.append(args))
    assert [one[0] for one in told][:4] == [0, 1, 2, 3]
    assert {one[1] for one in told} == {4}
    assert any(one[2].startswith("starting model.layers.1") for one in told)
    assert capsys.readouterr() == ("", "")
    if importlib.util.find_spec("tqdm") is not None:
        lora_fx.initialize(lora_fx.rewrite(model, config), tokens(2))
        assert "batch" in capsys.readouterr().err


# --- errors ---------------------------------------------------------------------------------------


def check_refused(
    reason: str, data: Any, config: LoraConfig, model: nn.Module | None = None, **how: Any
) -> None:
    """It raises, and the rewritten model is what it was."""
    adapted = lora_fx.rewrite(zoo.tiny_llama()[0] if model is None else model, config)
    before, record, code = states(adapted), record_of(adapted), dict(lora_fx.graphs(adapted))
    wanted = {name: p.requires_grad for name, p in adapted.named_parameters()}
    modes = [module.training for module in adapted.modules()]
    with pytest.raises(ConfigError, match=reason):
        lora_fx.initialize(adapted, data, progress=False, **how)
    after = adapted.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == wanted
    assert all(p.grad is None for p in adapted.parameters())
    assert record_of(adapted).adapters == record.adapters
    assert {n: str(g) for n, g in lora_fx.graphs(adapted).items()} == {
        n: str(g) for n, g in code.items()
    }
    assert [module.training for module in adapted.modules()] == modes


def plain_config(start: bool | str, **changes: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": start, **changes}
    )


@pytest.mark.parametrize("start", STARTS)
def test_data_that_is_no_use(start: str) -> None:
    config = plain_config(start)
    check_refused("dataloader is empty", [], config)
    check_refused(
        "batch 0, a dict: the model does not take it", [{"inputs": torch.ones(2)}], config
    )
    check_refused("batch 0, a tuple", [(1, 2, 3)], config)
    broken = zoo.tiny_llama()[0]
    broken.model.embed_tokens.weight.data[:] = torch.inf
    check_refused("not finite|is nan", tokens(4), config, broken)


@pytest.mark.parametrize("start", STARTS)
def test_a_site_that_no_batch_reaches(start: str) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(8, 8)
            self.idle = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
            return self.idle(self.used(x)) if twice else self.used(x)

    config = LoraConfig(r=2, target_modules=["used", "idle"], init_lora_weights=start)
    how = {"loss_fn": lambda output, batch: output.square().mean()} if start == "lora_ga" else {}
    check_refused("does not reach idle", [zoo.sample(6, 8)], config, Skips(), **how)


def test_a_model_without_a_loss() -> None:
    data = [{"input_ids": one["input_ids"]} for one in tokens(2)]
    check_refused("has no loss: give labels", data, plain_config("lora_ga"))
    how = {"loss_fn": lambda output, batch: output.logits.sum() * torch.nan}
    check_refused("loss of a batch is nan", data, plain_config("lora_ga"), **how)


def test_batches_that_are_too_small_for_components() -> None:
    config = plain_config("eva", eva_config={"rho": 4.0})
    check_refused("no batch has the 16 vectors", tokens(1), config)


def test_inputs_that_are_all_zero() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    config = plain_config("corda", target_modules=["0"])
    check_refused("cannot be inverted", [torch.zeros(4, 8)], config, model)


def test_an_adapter_that_needs_no_data() -> None:
    check_refused("needs no data", tokens(2), plain_config(True))
    check_refused("needs no data", tokens(2), plain_config("pissa"))
    check_refused("leave out loss_fn", tokens(2), plain_config("eva"), loss_fn=lambda o, b: o.loss)
    adapted = started(zoo.tiny_llama()[0], tokens(4), plain_config("corda"))
    with pytest.raises(ConfigError, match="has its start already"):
        lora_fx.initialize(adapted, tokens(4), progress=False)
    with pytest.raises(ConfigError, match="there is no adapter 'other'"):
        lora_fx.initialize(adapted, tokens(4), adapter_name="other")
    with pytest.raises(ConfigError, match="has no adapters"):
        lora_fx.initialize(nn.Linear(2, 2), tokens(4))


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_what_has_been_trained_is_not_lost(start: str) -> None:
    model = lora_fx.rewrite(
        nn.Sequential(nn.Linear(4, 4)),
        LoraConfig(r=2, target_modules=["0"], init_lora_weights=start),
    )
    with torch.no_grad():
        model[0].lora_B.default.fill_(0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="has been trained"):
        lora_fx.initialize(model, [torch.randn(8, 4)])
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key])


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    adapted = lora_fx.rewrite(model, plain_config("eva", target_modules=["0"]))
    with pytest.raises(ConfigError, match="meta device"):
        lora_fx.initialize(adapted, [torch.ones(4, 8)])


# --- batches --------------------------------------------------------------------------------------


def test_batches_of_every_kind_are_the_same_data() -> None:
    from transformers import BatchEncoding

    model, _ = zoo.tiny_llama()
    ids = [one["input_ids"] for one in tokens(1)]

    def a(batches: Any, **how: Any) -> torch.Tensor:
        adapted = started(model, batches, plain_config("corda"), **how)
        return adapted.model.layers[1].self_attn.q_proj.lora_A.default

    first = a(ids)
    assert_same_bits(a([(one,) for one in ids]), first)
    assert_same_bits(a([[one] for one in ids]), first)
    assert_same_bits(a([{"input_ids": one} for one in ids]), first)
    assert_same_bits(a([BatchEncoding({"input_ids": one}) for one in ids]), first)
    assert_same_bits(a(torch.utils.data.DataLoader(torch.cat(ids), batch_size=1)), first)
    assert_same_bits(a(iter(ids)), first)
    assert_same_bits(a([{"x": one} for one in ids], forward=lambda m, b: m(b["x"])), first)


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": False}, {"use_dora": True}])
def test_without_data_the_start_of_a_rewrite_is_written_again(options: dict[str, Any]) -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["0"], **options)
    model = lora_fx.rewrite(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
    before = lora_fx.adapter_state_dict(model)
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.fill_(torch.nan)
    held = [id(parameter) for parameter in model.parameters()]
    assert lora_fx.initialize(model) is model
    after = lora_fx.adapter_state_dict(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [id(parameter) for parameter in model.parameters()] == held


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, "rewrite the model when it has its weights"),
        ({"bias": "all"}, "rewrite the model when it has its weights"),
        ({"init_lora_weights": "eva"}, "give initialize.. a dataloader"),
    ],
)
def test_without_data_a_start_that_reads_some_or_the_base_is_refused(
    options: dict[str, Any], words: str
) -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["0"], **options)
    model = lora_fx.rewrite(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
    with pytest.raises(lora_fx.ConfigError, match=words):
        lora_fx.initialize(model)


@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_waits_for_data_is_no_secret(
    start: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = lora_fx.rewrite(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        LoraConfig(r=2, init_lora_weights=start, target_modules=["0"]),
    )
    assert "waits for data (lora_fx.initialize)" in str(lora_fx.status(model))
    x = torch.randn(3, 4)
    with caplog.at_level("WARNING", "lora_fx"):
        model.eval()(x)
        assert not caplog.records
        for _ in range(2):
            model.train()(x).sum().backward()
    (record,) = caplog.records
    assert f"'default' is trained, and init_lora_weights={start!r} waits for data" in record.message
    with pytest.raises(ConfigError, match=rf"init_lora_weights='{start}' waits for data"):
        lora_fx.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
