"""match="graph": adapters under other names, in other forms, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx import CheckpointError, ConfigError, LoraConfig
from lora_fx.checkpoint import Migration
from lora_fx.checkpoint.matching import Named, match_names
from tests.mixtures import mixtral
from tests.numerics import assert_close


class Split(nn.Module):
    """Attention with a layer for each projection."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.softmax(q @ k.mT, -1) @ v)


class Fused(nn.Module):
    """The same with one layer for all."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        return self.o_proj(torch.softmax(q @ k.mT, -1) @ v)


class Modules(nn.Module):
    """Experts with a module each."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(8, count)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w2": nn.Linear(8, 6, bias=False)}) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> Any:
        share = torch.softmax(self.gate(x), -1)
        return sum(share[..., i, None] * e["w2"](x) for i, e in enumerate(self.experts))


class Stacked(nn.Module):
    """The same experts in one parameter, [E, out, in]."""

    class Experts(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.w2 = nn.Parameter(torch.randn(count, 6, 8))

        def forward(self, x: torch.Tensor) -> Any:
            return torch.bmm(x[None].expand(3, -1, -1), self.w2.mT)

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(8, count)
        self.experts = Stacked.Experts(count)

    def forward(self, x: torch.Tensor) -> Any:
        share = torch.softmax(self.gate(x), -1)
        return (share.T[..., None] * self.experts(x)).sum(0)


def layers(kind: type[nn.Module], name: str = "layers", count: int = 2) -> nn.Module:
    return nn.ModuleDict({name: nn.Sequential(*[kind() for _ in range(count)])})[name]


def fuse(split: Split) -> Fused:
    fused = Fused()
    with torch.no_grad():
        for end in ("weight", "bias"):
            parts = [getattr(getattr(split, f"{part}_proj"), end) for part in "qkv"]
            getattr(fused.qkv_proj, end).copy_(torch.cat(parts))
            getattr(fused.o_proj, end).copy_(getattr(split.o_proj, end))
    return fused


def stack(modules: Modules) -> Stacked:
    stacked = Stacked(len(modules.experts))
    with torch.no_grad():
        stacked.gate.load_state_dict(modules.gate.state_dict())
        stacked.experts.w2.copy_(torch.stack([expert["w2"].weight for expert in modules.experts]))
    return stacked


def trained(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """Return a model with an adapter with random values, which is in the folder, too."""
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **settings)
    adapted = lora_fx.rewrite(model, config)
    lora_fx.save_adapter(adapted, folder)
    return adapted.eval()


def rename(folder: Path, names: Mapping[str, str]) -> None:
    """Give the tensors of a folder other names, by their parts."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    config = (folder / "adapter_config.json").read_text(encoding="utf-8")
    for old, new in names.items():
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
        config = config.replace(old.removesuffix("."), new.removesuffix("."))
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")


def planned(model: nn.Module, folder: Path, **how: Any) -> Migration:
    return lora_fx.plan_migration(model, folder, **how)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
TOKENS = X[None]


@pytest.mark.parametrize(
    "names",
    [
        {"base_model.model.": "base_model.model._orig_mod."},
        {"base_model.model.": "base_model.model.module."},
        {"base_model.model.": "base_model.model.base_model.model."},
        {"base_model.model.": "base_model.model.language_model."},
        {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out"},
        {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"},
    ],
    ids=["compiled", "data parallel", "twice in PEFT", "nested", "diffusers", "words"],
)
def test_other_names_are_found(names: Mapping[str, str], tmp_path: Path) -> None:
    model = nn.ModuleDict({"layers": nn.Sequential(Split(), Split())})["layers"]
    expected = trained(model, tmp_path, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])(
        TOKENS
    )
    rename(tmp_path, names)
    with pytest.raises(CheckpointError, match="of this model under other names"):
        lora_fx.load_adapter(model, tmp_path)
    plan = planned(model, tmp_path)
    assert plan.changed == len(plan.moves) == 8
    assert {move.reason for move in plan.moves} == {"names and shapes"}
    assert 0 < plan.confidence < 1
    assert f"{plan.confidence:.0%}" in str(plan)
    assert_close(lora_fx.load_adapter(model, tmp_path, match="graph")(TOKENS), expected)


def test_projections_are_fused(tmp_path: Path) -> None:
    split = Split()
    expected = trained(split, tmp_path, rank_pattern={"k_proj": 3}, alpha_pattern={"v_proj": 7})(
        TOKENS
    )
    plan = planned(fuse(split), tmp_path)
    assert [move.part for move in plan.moves if move.change == "fused"] == [
        "rows 8:16",
        "rows 0:8",
        "rows 16:24",
    ]
    adapted = lora_fx.load_adapter(fuse(split), tmp_path, match="graph")
    assert_close(adapted(TOKENS), expected)
    # Three matrices with a rank of their own.
    assert plan.tensors["qkv_proj.lora_A.weight"].shape == (7, 8)


def test_a_fused_projection_is_taken_apart_with_the_old_model(tmp_path: Path) -> None:
    split = Split()
    fused = fuse(split)
    expected = trained(fused, tmp_path)(TOKENS)
    problems = planned(split, tmp_path).problems
    assert any(
        "no operation that is not matched yet has the shape [24, 8]" in line for line in problems
    )
    assert any("source=" in line for line in problems)
    with pytest.raises(CheckpointError, match="cannot be moved"):
        lora_fx.load_adapter(split, tmp_path, match="graph")
    adapted = lora_fx.load_adapter(split, tmp_path, match="graph", source=fused.to("meta"))
    assert_close(adapted(TOKENS), expected)


@pytest.mark.parametrize("chosen", [None, ["0.w2", "2.w2"]], ids=["all", "some"])
def test_experts_are_stacked(chosen: list[str] | None, tmp_path: Path) -> None:
    modules = Modules()
    targets = chosen or ["w2"]
    expected = trained(modules, tmp_path, target_modules=targets, alpha_pattern={"0.w2": 7})(X)
    model = stack(modules)
    plan = planned(model, tmp_path)
    assert {move.change for move in plan.moves} == {"moved into a stack"}
    assert [move.new for move in plan.moves] == [
        f"experts.w2[{move.old[8]}]" for move in plan.moves
    ]
    assert_close(lora_fx.load_adapter(model, tmp_path, match="graph")(X), expected)


def test_a_stack_becomes_modules(tmp_path: Path) -> None:
    modules = Modules()
    model = stack(modules)
    expected = trained(model, tmp_path, target_parameters=["experts.w2"])(X)
    assert_close(lora_fx.load_adapter(modules, tmp_path, match="graph")(X), expected)


class Layer(nn.Module):
    """A decoder layer of a Mixtral as transformers 4 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict(
            {f"{name}_proj": nn.Linear(16, 16, bias=False) for name in "qo"}
        )
        self.block_sparse_moe = nn.ModuleDict(
            {
                "experts": nn.ModuleList(
                    nn.ModuleDict(
                        {
                            "w1": nn.Linear(16, 16, bias=False),
                            "w2": nn.Linear(16, 16, bias=False),
                            "w3": nn.Linear(16, 16, bias=False),
                        }
                    )
                    for _ in range(4)
                )
            }
        )


def test_stacks_of_transformers_become_modules_with_the_old_model(tmp_path: Path) -> None:
    source = mixtral()
    adapted = trained(source, tmp_path, target_parameters=["gate_up_proj", "down_proj"])
    old = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})})
    assert planned(old, tmp_path).problems
    plan = planned(old, tmp_path, source=source)
    assert not plan.problems
    merged = dict(lora_fx.merge(adapted).named_parameters())
    base = dict(source.named_parameters())
    for layer in range(2):
        change = {
            name: merged[key] - base[key]
            for name in ("gate_up_proj", "down_proj")
            for key in [f"model.layers.{layer}.mlp.experts.{name}"]
        }
        for expert in range(4):
            gate, up = change["gate_up_proj"][expert].chunk(2)
            for name, exact in (("w1", gate), ("w3", up), ("w2", change["down_proj"][expert])):
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                a, b = (plan.tensors[f"{key}.lora_{end}.weight"] for end in "AB")
                assert_close(1.5 * b @ a, exact, 1e-5)


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", None])
def test_stacks_of_early_releases_of_peft(version: str | None, tmp_path: Path) -> None:
    model = stack(Modules())
    expected = trained(model, tmp_path, target_parameters=["experts.w2"])(X)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    a, b = (tensors[f"base_model.model.experts.lora_{end}.weight"] for end in "AB")
    down, up = a.reshape(3, 2, 8), b.reshape(6, 2, 3).permute(2, 0, 1)
    # They took [E, out, in] for [E, in, out].
    tensors = {
        "base_model.model.experts.lora_A.weight": up.mT.flatten(0, 1).contiguous(),
        "base_model.model.experts.lora_B.weight": down.mT.permute(1, 2, 0).flatten(1).contiguous(),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    del config["lora_ga_config"]
    config |= {} if version is None else {"peft_version": version}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    plan = planned(model, tmp_path)
    assert [move.change for move in plan.moves] == ["A and B swapped"]
    assert_close(lora_fx.load_adapter(model, tmp_path, match="graph")(X), expected)


def test_the_order_of_execution(tmp_path: Path) -> None:
    class Other(Split):
        def __init__(self) -> None:
            super().__init__()
            self.alpha, self.beta, self.gamma, self.delta = (
                self.__dict__["_modules"].pop(name)
                for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            )

        def forward(self, x: torch.Tensor) -> Any:
            a, b, c = self.alpha(x), self.beta(x), self.gamma(x)
            return self.delta(torch.softmax(a @ b.mT, -1) @ c)

    model = Split()
    expected = trained(model, tmp_path)(TOKENS)
    other = Other()
    for new, old in zip(("alpha", "beta", "gamma", "delta"), "qkvo", strict=True):
        getattr(other, new).load_state_dict(getattr(model, f"{old}_proj").state_dict())
    problems = planned(other, tmp_path).problems
    assert any("ambiguous, it may be" in line and "alpha" in line for line in problems)
    plan = planned(other, tmp_path, source=model)
    assert {move.reason for move in plan.moves} == {"order of execution"}
    adapted = lora_fx.load_adapter(other, tmp_path, match="graph", source=model)
    assert_close(adapted(TOKENS), expected)


def test_two_towers_are_ambiguous(tmp_path: Path) -> None:
    trained(nn.ModuleDict({"layers": nn.Sequential(Split(), Split())})["layers"], tmp_path)

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Sequential(Split(), Split())
            self.right = nn.Sequential(Split(), Split())

        def forward(self, x: torch.Tensor) -> Any:
            return self.left(x) + self.right(x)

    problems = planned(Towers(), tmp_path).problems
    assert any("left.*.q_proj" in line and "right.*.q_proj" in line for line in problems)
    with pytest.raises(CheckpointError, match="ambiguous"):
        lora_fx.load_adapter(Towers(), tmp_path, match="graph")


def test_nothing_is_half_loaded(tmp_path: Path) -> None:
    trained(Split(), tmp_path)
    model = trained(Fused(width=12), tmp_path / "own")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="nothing was changed"):
        lora_fx.load_adapter(model, tmp_path, adapter_name="second", match="graph")
    assert lora_fx.adapter_names(model) == ("default",)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_magnitude_cannot_be_fused(tmp_path: Path) -> None:
    split = Split()
    trained(split, tmp_path, use_dora=True)
    problems = planned(fuse(split), tmp_path).problems
    assert any("q_proj" in line and "lora_magnitude_vector" in line for line in problems)


def test_modules_trained_in_full_and_tokens(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self, head: str) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.encoder = Split()
            self.add_module(head, nn.Linear(8, 3))
            self.head = head

        def forward(self, ids: torch.Tensor) -> Any:
            return getattr(self, self.head)(self.encoder(self.embed(ids)))

    old, new = Classifier("score_head"), Classifier("head_score")
    new.load_state_dict(
        {name.replace("score_head", "head_score"): v for name, v in old.state_dict().items()}
    )
    ids = torch.tensor([[1, 2, 3]])
    config = LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=["q_proj"],
        modules_to_save=["score_head"],
        trainable_token_indices={"embed": [1, 2]},
    )
    adapted = lora_fx.rewrite(old, config)
    with torch.no_grad():
        for value in lora_fx.trainable_parameters(adapted):
            value.add_(torch.randn_like(value))
    lora_fx.save_adapter(adapted, tmp_path)
    plan = planned(new, tmp_path)
    assert plan.config.modules_to_save == ("head_score",)
    assert_close(
        lora_fx.load_adapter(new, tmp_path, match="graph").eval()(ids), adapted.eval()(ids)
    )


def test_a_receipt_proves_the_outputs(tmp_path: Path) -> None:
    split = Split()
    adapted = trained(split, tmp_path)
    lora_fx.save_adapter(adapted, tmp_path, receipt=TOKENS)
    assert_close(
        lora_fx.load_adapter(fuse(split), tmp_path, match="graph")(TOKENS), adapted(TOKENS)
    )
    other = fuse(split)
    with torch.no_grad():  # k before q
        other.qkv_proj.weight.copy_(other.qkv_proj.weight.roll(8, 0))
    with pytest.raises(CheckpointError, match="not those of the adapter's receipt"):
        lora_fx.load_adapter(other, tmp_path, match="graph")


def test_arguments_are_checked(tmp_path: Path) -> None:
    model: Any = Split()
    with pytest.raises(ConfigError, match="'name' or 'graph'"):
        lora_fx.load_adapter(model, tmp_path, match="names")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give match='graph'"):
        lora_fx.load_adapter(model, tmp_path, source=model)


def test_the_table_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = Split()
    trained(split, tmp_path)
    with caplog.at_level(logging.INFO, "lora_fx"):
        lora_fx.load_adapter(fuse(split), tmp_path, match="graph")
    assert "q_proj -> qkv_proj" in caplog.text
    assert "rows 16:24" in caplog.text


def test_names_are_matched_as_families() -> None:
    def named(*names: str) -> list[Named]:
        return [Named(name, (4, 4)) for name in names]

    old = named("model.layers.0.mlp.fc1", "model.layers.1.mlp.fc1")
    both = named("text.layers.0.mlp.fc1", "text.layers.1.mlp.fc1", "image.layers.0.mlp.fc1")
    found = match_names(old, both)
    assert found.names["model.layers.1.mlp.fc1"][0] == "text.layers.1.mlp.fc1"
    # One layer of each tower fits, and nothing tells which is meant.
    found = match_names(old[:1], both)
    assert not found.names
    assert "image.layers.*.mlp.fc1" in found.problems["model.layers.0.mlp.fc1"]


def test_parameters_trained_by_hand_are_renamed(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layers": nn.Sequential(Split(), Split())})["layers"]
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    )
    trained_by_hand = adapted.get_parameter("1.o_proj.bias")
    trained_by_hand.requires_grad_(True)
    with torch.no_grad():
        trained_by_hand.add_(1.0)
    lora_fx.save_adapter(adapted, tmp_path)
    expected = adapted.eval()(TOKENS)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"layers": nn.Sequential(Split(), Split())})["layers"]

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x)

    outer = Outer()
    outer.inner.load_state_dict(model.state_dict())
    assert_close(lora_fx.load_adapter(outer, tmp_path, match="graph").eval()(TOKENS), expected)


def test_a_longer_name_is_not_farther() -> None:
    def named(*names: str) -> list[Named]:
        return [Named(name, (4, 4)) for name in names]

    old = named("layers.0.attn.q_proj")
    both = named("text.layers.0.attn.q_proj", "image.encoder.layers.0.attn.q_proj")
    assert not match_names(old, both).names
    # The tower that has the other operations is the one that is meant.
    old += named("layers.0.mlp.gate_proj")
    both += named("image.encoder.layers.0.mlp.gate_proj")
    found = match_names(old, both)
    assert found.names["layers.0.attn.q_proj"][0] == "image.encoder.layers.0.attn.q_proj"
