"""Adapter folders that are resized and combined without a model, against dense changes and PEFT's sums."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import CheckpointError, ConfigError, LoraConfig
from lora_fx.adapters import Combination
from lora_fx.folders import combine_folders
from tests.algebra import randomize
from tests.methods.test_peft_folders import IDS, IMAGES, MODELS, base_of, output, peft
from tests.mixtures import mixtral
from tests.numerics import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("words", {"r": 4, "lora_alpha": 6, "target_modules": ["up", "mid", "down"]}),
    "patterns": (
        "words",
        {
            "r": 4,
            "target_modules": ["up", "mid"],
            "rank_pattern": {"up": 6},
            "alpha_pattern": {"mid": 3},
            "use_rslora": True,
        },
    ),
    "embedding": ("words", {"r": 4, "target_modules": ["emb", "head"]}),
    "convolutions": (
        "images",
        {"r": 4, "lora_alpha": 6, "target_modules": ["wide", "point", "line"]},
    ),
    "conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn"]}),
    "dora": ("words", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["up"]}),
    "bias": ("words", {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["up"]}),
    "modules": (
        "words",
        {"r": 4, "target_modules": ["up"], "modules_to_save": ["norm"]},
    ),
    "biases": ("words", {"r": 4, "target_modules": ["up"], "bias": "lora_only"}),
}


def saved(case: str, folder: Path, seed: int = 0, **more: Any) -> nn.Module:
    name, options = CONFIGS[case]
    model = lora_fx.rewrite(base_of(name), LoraConfig(**options, **more)).eval()
    torch.manual_seed(seed)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += torch.randn_like(parameter)
    lora_fx.save_adapter(model, folder)
    return model


def changes(case: str, folder: Path) -> dict[str, Tensor]:
    """The dense change of each weight."""
    base = base_of(CONFIGS[case][0])
    merged = lora_fx.merge(lora_fx.load_adapter(base, folder))
    return {
        name: merged.get_parameter(name).double() - value.double()
        for name, value in base.named_parameters()
        if not torch.equal(merged.get_parameter(name), value)
    }


@pytest.mark.parametrize("case", CONFIGS)
def test_all_singular_values_give_the_same_outputs(case: str, tmp_path: Path) -> None:
    model = saved(case, tmp_path / "old")
    report = lora_fx.resize_adapter(tmp_path / "old", tmp_path / "new", energy=1.0)
    assert report.kept > 1 - 1e-9
    base, inputs = base_of(CONFIGS[case][0]), MODELS[CONFIGS[case][0]][1]
    assert_close(
        output(lora_fx.load_adapter(base, tmp_path / "new").eval(), inputs), output(model, inputs)
    )
    theirs = peft.PeftModel.from_pretrained(base_of(CONFIGS[case][0]), tmp_path / "new").eval()
    assert_close(output(theirs, inputs), output(model, inputs), 2e-5)


@pytest.mark.parametrize("case", ["linear", "patterns", "embedding", "convolutions", "conv1d"])
def test_a_smaller_rank_is_the_closest_one(case: str, tmp_path: Path) -> None:
    saved(case, tmp_path / "old")
    report = lora_fx.resize_adapter(tmp_path / "old", tmp_path / "new", rank=2)
    before, after = changes(case, tmp_path / "old"), changes(case, tmp_path / "new")
    errors = {layer.name: layer.error for layer in report.layers}
    assert all(layer.rank == 2 for layer in report.layers)
    for name, change in before.items():
        squares = torch.linalg.svdvals(change.flatten(1)).square()
        best = float((squares[2:].sum() / squares.sum()).sqrt())
        assert_close((change - after[name]).norm() / change.norm(), torch.tensor(best), 1e-3)
        assert errors[name.removesuffix(".weight")] == pytest.approx(best, rel=1e-4)


def test_energy_chooses_the_rank_of_each_layer(tmp_path: Path) -> None:
    saved("linear", tmp_path / "old")
    report = lora_fx.resize_adapter(tmp_path / "old", tmp_path / "new", energy=0.9)
    for layer in report.layers:
        assert layer.error**2 <= 0.1
        assert 1 <= layer.rank < layer.old_rank
    assert str(report).count("\n") == 3


def test_larger_ranks_keep_the_factors_bit_for_bit(tmp_path: Path) -> None:
    saved("linear", tmp_path / "old")
    lora_fx.resize_adapter(tmp_path / "old", tmp_path / "new", rank=64)
    old, new = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("old", "new")
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_grouped_convolutions_are_resized_in_their_groups(tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["grouped"]}
    model = lora_fx.rewrite(base_of("images"), LoraConfig(**options)).eval()
    randomize(model)
    lora_fx.save_adapter(model, tmp_path / "old")
    lora_fx.resize_adapter(tmp_path / "old", tmp_path / "all", energy=1.0)
    loaded = lora_fx.load_adapter(base_of("images"), tmp_path / "all").eval()
    assert_close(output(loaded, IMAGES), output(model, IMAGES))
    lora_fx.resize_adapter(tmp_path / "old", tmp_path / "two", rank=2)
    (a,) = (
        value
        for key, value in safetensors.torch.load_file(
            tmp_path / "two" / "adapter_model.safetensors"
        ).items()
        if "lora_A" in key
    )
    assert len(a) == 2
    lora_fx.load_adapter(base_of("images"), tmp_path / "two")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cat", {}),
        ("svd", {"svd_rank": 3}),
        ("linear", {}),
        ("ties", {"density": 0.5}),
        ("magnitude_prune_svd", {"density": 0.5}),
    ],
)
@pytest.mark.parametrize("case", ["linear", "embedding", "convolutions", "conv1d"])
def test_sums_are_those_of_a_model(
    case: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = saved(case, tmp_path / "a", 0)
    saved(case, tmp_path / "b", 1)
    lora_fx.load_adapter(model, tmp_path / "b", adapter_name="b")
    lora_fx.add_weighted_adapter(model, ["default", "b"], [0.7, -0.3], "sum", kind, **options)
    lora_fx.set_adapter(model, "sum")
    combine_folders(
        *([tmp_path / "a", tmp_path / "b"], [0.7, -0.3]),
        *(tmp_path / "out", Combination(kind, **options)),
    )
    name = CONFIGS[case][0]
    loaded = lora_fx.load_adapter(base_of(name), tmp_path / "out").eval()
    inputs = MODELS[name][1]
    assert_close(output(loaded, inputs), output(model, inputs), 2e-5)


def test_layers_of_only_one_adapter_are_kept_and_modules_copied(tmp_path: Path) -> None:
    saved("modules", tmp_path / "a")
    saved("embedding", tmp_path / "b", 1)
    how = Combination("cat")
    combine_folders([tmp_path / "a", tmp_path / "b"], [1.0, 2.0], tmp_path / "out", how)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["norm"]
    base = base_of("words")
    base.up_head = nn.Linear(2, 2)
    loaded = lora_fx.load_adapter(base, tmp_path / "out")
    merged = lora_fx.merge(loaded)
    first, second = changes("modules", tmp_path / "a"), changes("embedding", tmp_path / "b")
    for name, change in {**first, **{k: 2 * v for k, v in second.items()}}.items():
        difference = merged.get_parameter(name).double() - base_of("words").get_parameter(name)
        assert_close(difference, change, 1e-4)
    theirs = peft.PeftModel.from_pretrained(base_of("words"), tmp_path / "out").eval()
    assert_close(output(theirs, IDS), output(loaded.eval(), IDS), 2e-5)


def test_stacks_of_experts_are_resized_and_combined(tmp_path: Path) -> None:
    base = mixtral().eval()
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters)
    model = lora_fx.rewrite(base, config).eval()
    for name in ("a", "b"):
        randomize(model)
        lora_fx.save_adapter(model, tmp_path / name)
    expected = output(model, IDS)
    lora_fx.resize_adapter(tmp_path / "b", tmp_path / "same", rank=4)
    assert_close(output(lora_fx.load_adapter(base, tmp_path / "same").eval(), IDS), expected)
    lora_fx.resize_adapter(tmp_path / "b", tmp_path / "two", rank=2)
    two = lora_fx.load_adapter(base, tmp_path / "two").eval()
    wanted = lora_fx.load_adapter(base, tmp_path / "b").eval()
    lora_fx.load_adapter(wanted, tmp_path / "a", adapter_name="a")
    lora_fx.add_weighted_adapter(wanted, ["default", "a"], [1.0, 0.0], "two", "svd", svd_rank=2)
    lora_fx.set_adapter(wanted, "two")
    assert_close(output(two, IDS), output(wanted, IDS), 1e-4)
    combine_folders(
        [tmp_path / "a", tmp_path / "b"], [0.5, 2.0], tmp_path / "sum", Combination("cat")
    )
    lora_fx.add_weighted_adapter(wanted, ["a", "default"], [0.5, 2.0], "sum", "cat")
    lora_fx.set_adapter(wanted, "sum")
    summed = lora_fx.load_adapter(base, tmp_path / "sum").eval()
    assert_close(output(summed, IDS), output(wanted, IDS), 1e-4)


def test_damaged_and_unfit_folders_are_refused(tmp_path: Path) -> None:
    saved("linear", tmp_path / "a")
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"is the adapter that is resized"):
        lora_fx.resize_adapter(tmp_path / "a", tmp_path / "a")
    with pytest.raises(ConfigError, match=r"found 1 for 2 adapter\(s\)"):
        combine_folders([tmp_path / "a", tmp_path / "b"], [1.0], out, Combination())
    saved("dora", tmp_path / "dora")
    with pytest.raises(ConfigError, match=r"of use_dora there is no weighted sum"):
        combine_folders([tmp_path / "a", tmp_path / "dora"], [1.0, 1.0], out, Combination())
    saved("biases", tmp_path / "biases")
    with pytest.raises(ConfigError, match=r"trains biases of the base"):
        combine_folders([tmp_path / "a", tmp_path / "biases"], [1.0, 1.0], out, Combination())
    saved("modules", tmp_path / "first")
    saved("modules", tmp_path / "second", 1)
    with pytest.raises(ConfigError, match=r"several adapters have .* in full"):
        combine_folders([tmp_path / "first", tmp_path / "second"], [1.0, 1.0], out, Combination())
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    key = "base_model.model.up.lora_A.weight"
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(CheckpointError, match=r"up.lora_B.weight has no other factor"):
        lora_fx.resize_adapter(tmp_path / "a", out)
    safetensors.torch.save_file(tensors | {key: tensors[key][:3]}, path)
    with pytest.raises(CheckpointError, match=r"up.lora_A.weight is \[3, 8\]"):
        lora_fx.resize_adapter(tmp_path / "a", out)
    config = peft.LoHaConfig(r=2, target_modules=["up"])
    peft.get_peft_model(base_of("words"), config).save_pretrained(tmp_path / "loha")
    with pytest.raises(CheckpointError, match=r"peft_type is 'LOHA'"):
        lora_fx.resize_adapter(tmp_path / "loha", out)
    assert not out.exists()


class Attending(nn.Module):
    """An attention layer of PyTorch, and a layer whose name is that of a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out_proj = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out_proj(self.attn(x, x, x)[0])
        return output


ROWS = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))


def attending(folder: Path, **options: Any) -> tuple[nn.Module, Tensor]:
    """Return a base and the outputs of an adapter of PEFT that is saved in a folder."""
    torch.manual_seed(0)
    base = Attending().eval()
    config = peft.LoraConfig(
        r=8, target_modules="attn|out_proj", init_lora_weights=False, **options
    )
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    adapted.save_pretrained(folder)
    return base, adapted(ROWS)


def check_outputs(base: nn.Module, folder: Path, expected: Tensor | None = None) -> None:
    """Check that PEFT and lora_fx compute the same outputs with a folder."""
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(ROWS)
    ours = lora_fx.load_adapter(copy.deepcopy(base), folder).eval()(ROWS)
    assert_close(ours, theirs, 2e-5)
    if expected is not None:
        assert_close(ours, expected, 2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {"attn": 32}},
        {"rank_pattern": {"attn": 4}},
        {"rank_pattern": {"out_proj": 4}, "use_rslora": True},
    ],
    ids=["alpha", "rank", "rslora"],
)
def test_an_attention_layer_has_the_rank_and_scale_of_its_name(
    options: dict[str, Any], tmp_path: Path
) -> None:
    base, expected = attending(tmp_path / "a", **options)
    lora_fx.resize_adapter(tmp_path / "a", tmp_path / "resized", rank=100)
    check_outputs(base, tmp_path / "resized", expected)
    combine_folders([tmp_path / "a"], [1.0], tmp_path / "sum", Combination("cat"))
    check_outputs(base, tmp_path / "sum", expected)


def test_projections_of_an_attention_layer_get_one_rank(tmp_path: Path) -> None:
    base, _ = attending(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    key = "base_model.model.attn.base_layer.out_proj.lora_B.weight"
    # Alone, this projection would need rank 1.
    tensors[key][:, 1:] *= 1e-3
    safetensors.torch.save_file(tensors, path)
    report = lora_fx.resize_adapter(tmp_path / "a", tmp_path / "out", energy=0.6)
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert ranks["attn"] == ranks["attn.base_layer.out_proj"] > 1
    assert ranks["out_proj"] < 8
    check_outputs(base, tmp_path / "out")


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "corda", "lora_ga"])
def test_adapters_of_a_changed_base_are_refused(start: str, tmp_path: Path) -> None:
    saved("linear", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"init_lora_weights": start}
    path.write_text(json.dumps(settings))
    out = tmp_path / "out"
    error = CheckpointError if start in ("corda", "lora_ga") else ConfigError
    with pytest.raises(error, match=rf"'{start}',? (which changed|changes) the base"):
        lora_fx.resize_adapter(tmp_path / "a", out, rank=2)
    with pytest.raises(error, match=rf"'{start}',? (which changed|changes) the base"):
        combine_folders([tmp_path / "a"], [0.5], out, Combination("cat"))
    assert not out.exists()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_remedy_for_a_changed_base_keeps_the_outputs(start: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["up"], init_lora_weights=start)
    adapted = peft.get_peft_model(base_of("words"), config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "a")
    loaded = lora_fx.load_adapter(base_of("words"), tmp_path / "a")
    lora_fx.save_adapter(loaded, tmp_path / "converted")
    lora_fx.resize_adapter(tmp_path / "converted", tmp_path / "out", rank=100)
    again = lora_fx.load_adapter(base_of("words"), tmp_path / "out").eval()
    assert_close(output(again, IDS), output(adapted, IDS), 2e-5)


def test_lora_on_a_module_that_another_adapter_has_in_full_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
    peft.get_peft_model(base_of("words"), config).save_pretrained(tmp_path / "a")
    saved("embedding", tmp_path / "b")
    with pytest.raises(ConfigError, match=r"head: an adapter has LoRA there, and another one"):
        combine_folders(
            *([tmp_path / "a", tmp_path / "b"], [1.0, 1.0]),
            *(tmp_path / "out", Combination("cat")),
        )
    assert not (tmp_path / "out").exists()


def test_a_weight_does_not_apply_to_modules_in_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved("modules", tmp_path / "a")
    with caplog.at_level(logging.WARNING, "lora_fx"):
        combine_folders([tmp_path / "a"], [1.0], tmp_path / "all", Combination("cat"))
        assert "in full" not in caplog.text
        combine_folders([tmp_path / "a"], [0.5], tmp_path / "half", Combination("cat"))
    assert "norm.weight in full (modules_to_save), which is copied" in caplog.text
    assert "the weight 0.5 does not apply" in caplog.text
