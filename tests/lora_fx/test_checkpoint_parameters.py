"""Adapters of parameters, as PEFT's wrappers of parameters have them: experts, and matrices of one's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CheckpointError
from tests import mixtures as models
from tests.lora_fx.test_checkpoint import (
    CONFIG,
    WEIGHTS,
    adapted,
    in_peft,
    keys,
    read_by_peft,
    rewrite_file,
    run,
)
from tests.numerics import assert_close, assert_same_bits, relative_error
from tests.zoo import seeded

transformers = pytest.importorskip("transformers")

PREFIX = "base_model.model."


@seeded
def llama4() -> nn.Module:
    """Experts [E, in, out] without ``is_transposed``: PEFT takes them for [E, out, in]."""
    return models.drawn(
        transformers.Llama4TextConfig(
            **{**models.SIZES, "num_experts_per_tok": 1},
            num_local_experts=4,
            intermediate_size=12,
            intermediate_size_mlp=24,
            head_dim=8,
            moe_layers=[0, 1],
        )
    )


class Raw(nn.Module):
    """Matrices in both orientations and a bank of them, read by the module's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 4))
        self.down = nn.Parameter(torch.randn(6, 5))
        self.bank = nn.Parameter(torch.randn(3, 5, 5))
        self.bias = nn.Parameter(torch.randn(5))
        self.mix = nn.Linear(5, 5)

    def forward(self, x):
        x = torch.tanh(x @ self.up.T) @ self.down
        x = torch.bmm(self.mix(x).expand(3, -1, -1), self.bank).sum(0)
        return x + self.bias


@seeded
def raw() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Raw(), nn.Linear(5, 2))


class Stepped(nn.Module):
    """One matrix of its own, applied in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        first = nn.functional.linear(x, self.both[:4])
        return nn.functional.linear(torch.tanh(first), self.both[4:])


@seeded
def stepped() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Stepped())


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
EXPERTS = {
    "target_parameters": ["experts.gate_up_proj", "down_proj"],
    "target_modules": [],
    "rank_pattern": {"down_proj": 3},
    "r": 2,
}


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    inputs: torch.Tensor
    config: dict[str, Any]

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("mixtral", models.mixtral, models.IDS, EXPERTS),
    Case("qwen3_moe", models.qwen3_moe, models.IDS, {**EXPERTS, "lora_alpha": 5}),
    Case("gpt_oss", models.gpt_oss, models.IDS, {**EXPERTS, "alpha_pattern": {"up_proj": 5}}),
    Case("llama4", llama4, models.IDS, {**EXPERTS, "use_rslora": True}),
    Case(
        "one of two",
        models.mixtral,
        models.IDS,
        {"target_parameters": ["0.mlp.experts.down_proj"], "target_modules": ["q_proj"]},
    ),
    Case("matrices", raw, X, {"target_parameters": ["down", "bank", "up"], "target_modules": []}),
    Case("the last", raw, X, {"target_parameters": ["1.bank"], "target_modules": ["0"]}),
    Case("the first", raw, X, {"target_parameters": ["1.up"], "target_modules": ["2"]}),
    Case(
        "a module inside",
        raw,
        X,
        {"target_parameters": ["1.up"], "target_modules": ["mix"], "r": 3},
    ),
    Case(
        "all biases",
        raw,
        X,
        {"target_parameters": ["1.up"], "target_modules": ["2"], "bias": "all"},
    ),
    Case("weights of layers", raw, X, {"target_parameters": ["0.weight"], "target_modules": ["2"]}),
    Case("one weight in parts", stepped, X, {"target_parameters": ["both"], "target_modules": []}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_adapter_of_peft(case: Case, tmp_path: Path) -> None:
    base = case.build().eval()
    theirs = in_peft(base, case.config)
    theirs.save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(base, tmp_path)
    assert relative_error(run(ours, case.inputs), run(base, case.inputs)) > 1e-3
    assert_close(run(ours, case.inputs), run(theirs, case.inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_adapter_of_ours(case: Case, tmp_path: Path) -> None:
    base = case.build().eval()
    model = adapted(base, **case.config)
    lora_fx.save_adapter(model, tmp_path / "a")
    assert relative_error(run(model, case.inputs), run(base, case.inputs)) > 1e-3
    assert_close(run(read_by_peft(base, tmp_path / "a"), case.inputs), run(model, case.inputs))
    again = lora_fx.load_adapter(base, tmp_path / "a")
    assert_same_bits(run(again, case.inputs), run(model, case.inputs))
    lora_fx.save_adapter(again, tmp_path / "b")
    assert_same_bits(keys(tmp_path / "a"), keys(tmp_path / "b"))
    assert (tmp_path / "a" / CONFIG).read_text() == (tmp_path / "b" / CONFIG).read_text()


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_gradients_and_merged_weights_are_those_of_peft(case: Case, tmp_path: Path) -> None:
    base = case.build().eval()
    if case.inputs.dtype == torch.int64:
        # Small gradients behind a router: fp32 would compare noise.
        base = base.double()
        if case.name == "mixtral":
            base.set_experts_implementation("eager")
    theirs = in_peft(base, case.config)
    theirs.save_pretrained(tmp_path / "a")
    ours = lora_fx.load_adapter(base, tmp_path / "a")
    for model in (ours, theirs):
        output = model(case.inputs)
        output = getattr(output, "logits", output)
        output.square().mean().backward()
    gradients = {
        name.replace("base_model.model.", "").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    stored = keys(lora_fx.save_adapter(ours, tmp_path / "b"))
    assert stored.keys() == {PREFIX + name for name in gradients}
    for name, gradient in gradients.items():
        assert_close(stored[PREFIX + name], gradient)
    merged = lora_fx.merge(lora_fx.load_adapter(base, tmp_path / "a"))
    expected = theirs.merge_and_unload().state_dict()
    assert {n: p.shape for n, p in merged.state_dict().items()} == {
        n: p.shape for n, p in expected.items()
    }
    for name, value in merged.state_dict().items():
        assert_close(value, expected[name])


def test_parameters_that_a_module_target_chose_are_written_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = models.mixtral()
    config = {"target_modules": ["gate_up_proj", "q_proj"], "lora_dropout": 0.5}
    model = adapted(base, **config).eval()
    with caplog.at_level(logging.WARNING, "lora_fx"):
        lora_fx.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["target_parameters"] == [
        f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 1)
    ]
    assert all(name.endswith("q_proj") for name in written["target_modules"])
    assert written["lora_dropout"] == 0
    assert "lora_dropout=0.5 was left out" in caplog.text
    assert_close(run(read_by_peft(base, tmp_path), models.IDS), run(model, models.IDS))


def test_several_parameters_of_a_module_nest_the_first_innermost(tmp_path: Path) -> None:
    model = adapted(raw(), target_modules=["bank", "up", "down"], r=2)
    found = {k: list(v.shape) for k, v in keys(lora_fx.save_adapter(model, tmp_path)).items()}
    assert found == {
        f"{PREFIX}1.base_layer.base_layer.lora_A.weight": [2, 4],
        f"{PREFIX}1.base_layer.base_layer.lora_B.weight": [6, 2],
        f"{PREFIX}1.base_layer.lora_A.weight": [2, 5],
        f"{PREFIX}1.base_layer.lora_B.weight": [6, 2],
        f"{PREFIX}1.lora_A.weight": [6, 5],
        f"{PREFIX}1.lora_B.weight": [5, 6],
    }


@pytest.mark.parametrize("name", ["mixtral", "matrices"])
def test_folders_with_names_of_our_own_are_still_read(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    base = case.build().eval()
    model = adapted(base, **case.config)
    lora_fx.save_adapter(model, tmp_path)
    rows = {row.name: row for row in model._lora_fx.adapters["default"].sites}
    factors = {}
    for row in rows.values():
        holder = model.get_submodule(row.site.holder)
        for letter in "AB":
            value = holder.get_submodule(f"lora_{letter}").get_parameter("default")
            factors[f"{PREFIX}{row.site.holder}.lora_{letter}.weight"] = value.detach().clone()
    safetensors.torch.save_file(factors, tmp_path / WEIGHTS)
    written = json.loads((tmp_path / CONFIG).read_text())
    written |= {"target_modules": sorted(rows), "target_parameters": None}
    (tmp_path / CONFIG).write_text(json.dumps(written))
    assert_same_bits(
        run(lora_fx.load_adapter(base, tmp_path), case.inputs), run(model, case.inputs)
    )
    assert lora_fx.load_adapter(model, tmp_path) is model


def test_a_module_saved_inside_leaves_peft_without_the_parameter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = raw()
    model = adapted(base, target_modules=["up", "2"], modules_to_save=["mix"])
    with caplog.at_level(logging.WARNING, "lora_fx"):
        lora_fx.save_adapter(model, tmp_path)
    assert "PEFT cannot load the adapters of 1.up" in caplog.text
    assert f"{PREFIX}1.up_lora.lora_A.weight" in keys(tmp_path)
    assert_same_bits(run(lora_fx.load_adapter(base, tmp_path), X), run(model, X))


def test_weights_of_modules_by_name_of_the_parameter(tmp_path: Path) -> None:
    """PEFT's forms of an embedding's and a Conv1D's weight differ from those of the modules."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6)
            self.mix = transformers.pytorch_utils.Conv1D(6, 6)

        def forward(self, ids):
            return self.mix(self.embed(ids))

    base, ids = seeded(Words)(), torch.tensor([[1, 3, 8]])
    config = {"target_parameters": ["embed.weight", "mix.weight"], "target_modules": [], "r": 2}
    theirs = in_peft(base, config)
    theirs.save_pretrained(tmp_path / "a")
    ours = lora_fx.load_adapter(base, tmp_path / "a")
    assert_close(run(ours, ids), run(theirs, ids))
    # Modules can have dropout and a tied head, so they are written as modules.
    lora_fx.save_adapter(ours, tmp_path / "b")
    assert f"{PREFIX}embed.lora_embedding_A" in keys(tmp_path / "b")
    assert_close(run(read_by_peft(base, tmp_path / "b"), ids), run(theirs, ids))


def test_a_conv1d_beside_parameters_is_one_of_them(tmp_path: Path) -> None:
    """PEFT sets fan_in_fan_out for the one, and refuses it for the others."""
    base = seeded(lambda: nn.Sequential(transformers.pytorch_utils.Conv1D(4, 4), Raw()))()
    model = adapted(base, target_modules=["0", "up"])
    lora_fx.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["target_parameters"] == ["0.weight", "1.up"]
    assert_close(run(read_by_peft(base, tmp_path), X), run(model, X))
    assert_same_bits(run(lora_fx.load_adapter(base, tmp_path), X), run(model, X))


def test_every_misfit_of_stacked_factors_is_listed(tmp_path: Path) -> None:
    base = models.mixtral()
    lora_fx.save_adapter(adapted(base, **EXPERTS), tmp_path)
    layer = f"{PREFIX}model.layers.0.mlp.experts"

    def change(values: dict[str, torch.Tensor]) -> None:
        del values[f"{layer}.lora_A.weight"]
        values[f"{layer}.base_layer.lora_B.weight"] = torch.zeros(32, 7)
        values[f"{layer}.base_layer.base_layer.lora_A.weight"] = torch.zeros(2, 2)

    rewrite_file(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        lora_fx.load_adapter(base, tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    experts = "model.layers.0.mlp.experts"
    assert f"missing: {experts}.lora_A.weight [12, 16]" in lines
    assert f"unexpected: {experts}.base_layer.base_layer.lora_A.weight [2, 2]" in lines
    assert (
        f"shape: {experts}.base_layer.lora_B.weight is [32, 7] as it was saved, [32, 8] in the model"
    ) in lines
