"""Parameter groups and LoRA-FA, compared with PEFT's optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.optimizers import lorafa as peft_lorafa
from torch import nn
from transformers import Trainer, TrainingArguments

import lora_fx
from lora_fx import ConfigError, LoraConfig, correct_gradients, parameter_groups
from lora_fx.ir.plan import PlannedSite
from tests.numerics import assert_close, assert_same_bits


class Net(nn.Module):
    """An embedding, products, a norm with weight and bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.second = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.relu(self.first(self.table(ids))))
        return self.head(self.second(x)).mean(1)


TARGETS = ["first", "second"]
IDS = torch.arange(24).reshape(4, 6) % 11


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def both(folder: Path, **values: Any) -> tuple[Any, nn.Module]:
    """One adapter in PEFT's model and in ours, with the same numbers."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**values))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(folder)
    ours = lora_fx.load_adapter(net(), folder)
    with torch.no_grad():
        assert_close(ours(IDS), theirs(IDS))
    return theirs, ours


def by_name(model: nn.Module, groups: Iterable[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Rate and decay of each parameter by its name in the base model."""
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    found = {n: rates[id(p)] for n, p in model.named_parameters() if id(p) in rates}
    assert len(found) == len(rates)
    for name in ("base_model.model.", ".weight", ".default", ".base_layer", ".modules_to_save"):
        found = {key.replace(name, ""): value for key, value in found.items()}
    return {key.replace("lora_B.bias", "lora_bias"): value for key, value in found.items()}


SETUPS: list[dict[str, Any]] = [
    {"target_modules": TARGETS},
    {"target_modules": [*TARGETS, "table"]},
    {"target_modules": TARGETS, "bias": "all"},
    {"target_modules": ["first"], "modules_to_save": ["head", "norm"], "bias": "lora_only"},
    {"target_modules": ["first"], "modules_to_save": ["table"]},
    {"target_modules": TARGETS, "lora_bias": True},
    {"target_modules": [*TARGETS, "table"], "use_dora": True},
]


@pytest.mark.parametrize("values", SETUPS, ids=str)
@pytest.mark.parametrize("embedding_lr", [None, 2e-5])
def test_rates_are_those_of_pefts_lora_plus(
    values: dict[str, Any], embedding_lr: float | None, tmp_path: Path
) -> None:
    theirs, ours = both(tmp_path, **values)
    rate = {} if embedding_lr is None else {"loraplus_lr_embedding": embedding_lr}
    optimizer = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=3e-4,
        loraplus_lr_ratio=16,
        loraplus_weight_decay=0.1,
        **rate,
    )
    groups = parameter_groups(
        ours, 3e-4, lora_plus_ratio=16, weight_decay=0.1, embedding_lr=embedding_lr
    )
    expected = by_name(theirs, optimizer.param_groups)
    for name, (rate_of, _) in expected.items():
        # A magnitude that decays shrinks the weight: PEFT lets it.
        if "magnitude" in name:
            expected[name] = (rate_of, 0.0)
    assert by_name(ours, groups) == expected


def test_the_groups_by_name() -> None:
    config = LoraConfig(
        r=2, target_modules=[*TARGETS, "table"], modules_to_save=["head"], bias="all"
    )
    model = lora_fx.rewrite(net(), config)
    groups = {group.pop("name"): group for group in parameter_groups(model, 1e-3, weight_decay=0.1)}
    assert {name: (g["lr"], g["weight_decay"], len(g["params"])) for name, g in groups.items()} == {
        "lora_A": (1e-3, 0.1, 2),
        "lora_B": (1e-3, 0.1, 2),
        "embeddings": (1e-3, 0.1, 2),
        "modules": (1e-3, 0.1, 1),
        "vectors": (1e-3, 0.0, 4),
    }
    assert [tuple(p.shape) for p in groups["lora_A"]["params"]] == [(2, 8), (2, 12)]


def test_every_trainable_parameter_once_also_a_tied_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    config = LoraConfig(r=2, target_modules=["table"], ensure_weight_tying=True)
    model = lora_fx.rewrite(Tied(), config)
    groups = parameter_groups(model, 1e-3, lora_plus_ratio=4, lora_fa=True)
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [("embeddings", 1e-6, 2)]
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in lora_fx.trainable_parameters(model))


def test_rows_of_tokens_are_trained_as_modules() -> None:
    """PEFT gives them the rate of A, and that of an embedding to an embedding's factors alone."""
    config = LoraConfig(target_modules=["first"], trainable_token_indices={"table": [3]})
    model = lora_fx.rewrite(net(), config)
    groups = {g["name"]: g for g in parameter_groups(model, 1e-3, lora_plus_ratio=4)}
    assert [tuple(p.shape) for p in groups["modules"]["params"]] == [(1, 8)]
    assert groups["modules"]["lr"] == 1e-3


def steps(
    model: Any, optimizer: torch.optim.Optimizer, count: int, accumulate: int = 1
) -> dict[str, torch.Tensor]:
    for step in range(count):
        for _ in range(accumulate):
            loss = model((IDS + step) % 11).square().mean() / accumulate
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n or "head" in n}
    for name in ("base_model.model.", ".weight", ".default", ".modules_to_save"):
        trained = {key.replace(name, ""): value for key, value in trained.items()}
    return {key: value for key, value in trained.items() if "original" not in key}


def pefts_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The AdamW inside PEFT's optimizer: by its names it takes no parameter for one of LoRA."""
    for group in groups:
        count, kind = len(group["params"]), group["name"].removeprefix("lora_")
        group |= {"names": [f"{kind}{i}" for i in range(count)], "scaling_factors": [None] * count}
    return peft_lorafa.LoraFAOptimizer(groups, eps=1e-6)


def torchs_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, eps=1e-12)


def lorafa_steps(
    folder: Path, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], **values: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    theirs, ours = both(folder, **values)
    optimizer = create_lorafa_optimizer(
        theirs, r=values["r"], lora_alpha=values["lora_alpha"], lr=1e-3
    )
    own = make(parameter_groups(ours, 1e-3, lora_fa=True))
    # torch adds eps after the correction of the second moment, PEFT before.
    optimizer.param_groups[0]["eps"] = own.defaults["eps"]
    correct_gradients(own, ours)
    return steps(theirs, optimizer, 10), steps(ours, own, 10)


FA: list[dict[str, Any]] = [
    {"target_modules": TARGETS, "r": 4, "lora_alpha": 8},
    {"target_modules": TARGETS, "r": 2, "lora_alpha": 3, "rank_pattern": {"first": 5}},
    {"target_modules": ["first"], "r": 2, "lora_alpha": 3, "modules_to_save": ["head"]},
    {"target_modules": TARGETS, "r": 4, "lora_alpha": 8, "use_rslora": True},
]


@pytest.mark.parametrize("make", [pefts_adamw, torchs_adamw])
@pytest.mark.parametrize("values", FA, ids=str)
def test_ten_steps_of_lora_fa_are_pefts(
    values: dict[str, Any],
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # PEFT rounds the corrected gradient to bf16 where a device can; not what is compared here.
    monkeypatch.setattr(peft_lorafa, "is_bf16_available", lambda: False)
    theirs, ours = lorafa_steps(tmp_path, make, **values)
    assert theirs.keys() == ours.keys()
    before = dict(lora_fx.load_adapter(net(), tmp_path).named_parameters())
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < 1e-5, name
        if name.endswith("lora_A"):
            assert_same_bits(ours[name], before[f"{name}.default"].detach())
        elif name.endswith("lora_B"):
            assert (ours[name] - before[f"{name}.default"]).abs().max() > 1e-3


def test_the_corrected_step_is_the_projection_of_the_full_one(tmp_path: Path) -> None:
    """SGD with rate 1: the change of ``s B A`` is the full gradient on the span of A's rows, in fp64."""
    _, ours = both(tmp_path, target_modules=["first"], r=3, lora_alpha=6)
    ours = ours.double()
    full = copy.deepcopy(lora_fx.merge(ours)).requires_grad_(True)
    full(IDS).square().mean().backward()
    a = ours.first.lora_A.default.detach()
    span = a.T @ torch.linalg.inv(a @ a.T) @ a
    groups = parameter_groups(ours, 1.0, lora_fa=True)
    optimizer = torch.optim.SGD(groups)
    correct_gradients(optimizer, ours)
    before = ours.first.lora_B.default.detach().clone()
    ours(IDS).square().mean().backward()
    optimizer.step()
    change = 2.0 * (ours.first.lora_B.default.detach() - before) @ a
    assert_close(change, -full.first.weight.grad @ span, 1e-6)


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.experts = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.grouped(x).flatten(2).permute(2, 0, 1)[:3], self.experts.mT)


def test_groups_and_experts_are_corrected_one_by_one() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["grouped", "experts"])
    model = lora_fx.rewrite(Convs(), config).double()
    optimizer = torch.optim.SGD(parameter_groups(model, 1.0, lora_fa=True))
    handle = correct_gradients(optimizer, model)
    model(torch.randn(2, 4, 5, 5).double()).square().sum().backward()
    rows: dict[str, PlannedSite] = {
        row.name: row for row in model._lora_fx.adapters["default"].sites
    }
    expected = {}
    for name, holder in (("grouped", model.grouped), ("experts", model.experts_lora)):
        a, b = holder.lora_A.default.detach(), holder.lora_B.default
        assert b.grad is not None
        if name == "grouped":
            blocks = zip(a.chunk(2), b.grad.chunk(2), strict=True)
        else:
            blocks = zip(a, b.grad, strict=True)
        parts = []
        for a_i, g_i in blocks:
            flat, gradient = a_i.reshape(a_i.shape[0], -1), g_i.reshape(g_i.shape[0], -1)
            inverse = torch.linalg.inv(flat @ flat.T) / rows[name].scale ** 2
            parts.append((gradient @ inverse).reshape(g_i.shape))
        exact = torch.cat(parts) if name == "grouped" else torch.stack(parts)
        expected[b] = b.detach() - exact
    assert sorted(rows) == ["experts", "grouped"]
    optimizer.step()
    for b, value in expected.items():
        assert_close(b.detach(), value, 1e-5)
    handle.remove()
    old = {b: (b.detach().clone(), b.grad.clone()) for b in expected}
    optimizer.step()
    for b, (value, gradient) in old.items():
        assert_close(b.detach(), value - gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_factors_are_corrected_in_fp32(dtype: torch.dtype) -> None:
    model = lora_fx.rewrite(Net(), LoraConfig(r=3, target_modules=["first"])).to(dtype)
    optimizer = torch.optim.SGD(parameter_groups(model, 1.0, lora_fa=True))
    correct_gradients(optimizer, model)
    a, b = (factor.default for factor in (model.first.lora_A, model.first.lora_B))
    b.grad = torch.ones_like(b)
    exact = a.double()
    expected = -b.grad.double() @ torch.linalg.inv(exact @ exact.T) / (8 / 3) ** 2
    optimizer.step()
    assert b.dtype == dtype
    assert_close(b.detach().double(), expected, 2 * torch.finfo(dtype).eps)


def test_a_scale_of_zero_has_no_gradient_to_correct() -> None:
    model = lora_fx.rewrite(Net(), LoraConfig(lora_alpha=0, target_modules=["first"]))
    optimizer = torch.optim.SGD(parameter_groups(model, 1.0, lora_fa=True))
    correct_gradients(optimizer, model)
    model(IDS).sum().backward()
    optimizer.step()
    assert_same_bits(model.first.lora_B.default, torch.zeros(12, 8))


def test_accumulated_gradients_are_corrected_once(tmp_path: Path) -> None:
    results = []
    for accumulate in (1, 3):
        _, ours = both(tmp_path, target_modules=TARGETS, r=2, lora_alpha=4)
        optimizer = torch.optim.AdamW(parameter_groups(ours, 1e-3, lora_fa=True))
        correct_gradients(optimizer, ours)
        results.append(steps(ours, optimizer, 4, accumulate))
    for name, value in results[0].items():
        assert_close(results[1][name], value)


def test_embeddings_are_trained_as_ever_by_lora_fa() -> None:
    """PEFT takes their A, which starts as zeros, for one that is fixed, and so trains nothing of them."""
    model = lora_fx.rewrite(net(), LoraConfig(r=2, target_modules=["first", "table"]))
    groups = {
        group["name"]: group["params"] for group in parameter_groups(model, 1e-2, lora_fa=True)
    }
    assert {name: len(params) for name, params in groups.items()} == {"lora_B": 1, "embeddings": 2}
    assert not model.first.lora_A.default.requires_grad
    assert model.table.lora_embedding_A.default.requires_grad


def test_trains_with_trainer(tmp_path: Path) -> None:
    class ForTrainer(Net):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = super().forward(ids)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model = lora_fx.rewrite(ForTrainer(), LoraConfig(r=2, target_modules=TARGETS))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, lora_plus_ratio=4, lora_fa=True))
    correct_gradients(optimizer, model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, save_steps=2, max_grad_norm=0.5,
    )  # fmt: skip
    data = [{"ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(IDS)]
    Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert changed == {"first.lora_B.default", "second.lora_B.default"}
    # The state that was saved has the groups by their names, and numbers of parameters only.
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert [group["name"] for group in saved["param_groups"]] == ["lora_B"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_plus_ratio": 0}, "lora_plus_ratio: found 0"),
        ({"lora_plus_ratio": -2}, "lora_plus_ratio: found -2"),
        ({"lora_plus_ratio": float("nan")}, "lora_plus_ratio: found nan"),
        ({"lora_plus_ratio": True}, "lora_plus_ratio: found True"),
        ({"lr": -1.0}, "lr: found -1.0"),
        ({"lr": "1e-3"}, "lr: found '1e-3'"),
        ({"weight_decay": float("inf")}, "weight_decay: found inf"),
        ({"embedding_lr": -1}, "embedding_lr: found -1"),
    ],
)
def test_numbers_that_no_optimizer_can_use(options: dict[str, Any], message: str) -> None:
    model = lora_fx.rewrite(net(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match=message):
        parameter_groups(model, **{"lr": 1e-3, "lora_fa": True, **options})
    assert model.first.lora_A.default.requires_grad


def test_models_without_anything_to_train() -> None:
    with pytest.raises(ConfigError, match="this Net has no adapters"):
        parameter_groups(net(), 1e-3)
    model = lora_fx.rewrite(net(), LoraConfig(target_modules=TARGETS))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing in the model is trained"):
        parameter_groups(model, 1e-3)


def test_optimizers_that_cannot_be_corrected() -> None:
    model = lora_fx.rewrite(net(), LoraConfig(target_modules=TARGETS))
    other = lora_fx.rewrite(net(), LoraConfig(target_modules=TARGETS))
    whole = torch.optim.SGD(parameter_groups(model, 1e-3))
    with pytest.raises(ConfigError, match="first: the optimizer trains A of adapter 'default'"):
        correct_gradients(whole, model)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-3, lora_fa=True))
    with pytest.raises(ConfigError, match="trains no B of this model"):
        correct_gradients(optimizer, other)
    with pytest.raises(ConfigError, match="this Net has no adapters"):
        correct_gradients(optimizer, net())
    correct_gradients(optimizer, model)
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_a_group_can_have_options_of_its_own() -> None:
    """As 8-bit optimizers want for embeddings: more bits of state."""
    model = lora_fx.rewrite(net(), LoraConfig(target_modules=["first", "table"]))
    groups = parameter_groups(model, 1e-3)
    for group in groups:
        if group["name"] == "embeddings":
            group["optim_bits"] = 32
    optimizer = torch.optim.AdamW(groups)
    assert [g.get("optim_bits") for g in optimizer.param_groups] == [None, None, 32]
