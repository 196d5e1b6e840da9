"""Adapter folders, against PEFT in both directions, and everything that can be wrong with one."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import json
import logging
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx.checkpoint.folder import load_adapter, save_adapter
from lora_fx.config.lora_config import LoraConfig
from lora_fx.errors import CheckpointError, ConfigError
from lora_fx.ir.record import record_of
from tests import zoo
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits, relative_error

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Convolutions(nn.Module):
    """One-, two- and three-dimensional convolutions with batch norm between them."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm1d(6)
        self.two = nn.Conv2d(6, 8, (3, 1), padding=(1, 0), groups=groups)
        self.norm2 = nn.BatchNorm2d(8)
        self.three = nn.Conv3d(8, 4, (1, 2, 1), padding=(0, 1, 0), groups=groups, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm1(self.one(x)))
        x = torch.relu(self.norm2(self.two(x.unsqueeze(-1))))
        return self.head(self.three(x.unsqueeze(-1)).flatten(2).mean(2))


class SecondTime(nn.Module):
    """A block that the model holds under two names."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(OrderedDict(mix=nn.Linear(5, 5), bend=nn.Tanh()))
        self.blocks = nn.ModuleList([block, nn.LayerNorm(5), block])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Endings(nn.Module):
    """Names that end in other names."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(5, 5)
        self.block = nn.ModuleDict({"q": nn.Linear(5, 5), "axq": nn.Linear(5, 5)})

    def forward(self, x):
        return self.block["axq"](torch.tanh(self.block["q"](torch.tanh(self.q(x)))))


Built = tuple[nn.Module, Any]


def bare(build: Callable[[], nn.Module], *inputs: torch.Tensor) -> Callable[[], Built]:
    return lambda: (zoo.seeded(build)().eval(), inputs[0])


@dataclass(frozen=True)
class Case:
    """A model and a configuration that means the same to PEFT."""

    name: str
    build: Callable[[], Built]
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


IDS = torch.tensor([[0, 2, 5, 10], [2, 2, 9, 10]])
PATTERNS = {
    "rank_pattern": {"down": 3, "blocks.1.up": 5},
    "alpha_pattern": {r"blocks\.0\.up": 7, "head": 20},
}
RESIDUAL = bare(zoo.Residual, IDS)
CASES = [
    Case("mlp", bare(zoo.Mlp, zoo.sample(4, 5)), {"target_modules": ["first", "second"]}),
    Case(
        "mlp, biases of the targets",
        bare(zoo.Mlp, zoo.sample(4, 5)),
        {"target_modules": ["first"], "bias": "lora_only"},
    ),
    Case(
        "convolutions",
        bare(Convolutions, zoo.sample(2, 4, 12)),
        {"target_modules": ["one", "two", "three", "head"], "r": 4, "bias": "all"},
    ),
    Case(
        "residual, patterns",
        RESIDUAL,
        {"target_modules": ["embed", "up", "down", "head"], "r": 4, "lora_alpha": 16, **PATTERNS},
    ),
    Case(
        "residual, patterns, rank-stabilized",
        RESIDUAL,
        {"target_modules": r".*\.(up|down)|head", "use_rslora": True, **PATTERNS},
    ),
    Case(
        "residual, all in one",
        RESIDUAL,
        {
            "target_modules": ["embed", "up", "down"],
            "modules_to_save": ["head", "blocks.0.norm"],
            "bias": "all",
        },
    ),
    Case("names that end alike", bare(Endings, zoo.sample(3, 5)), {"target_modules": "q"}),
    Case("block under two names", bare(SecondTime, zoo.sample(3, 5)), {"target_modules": ["mix"]}),
    Case("llama", zoo.tiny_llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    Case(
        "llama, embedding and head",
        zoo.tiny_llama,
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    Case(
        "llama, some layers",
        zoo.tiny_llama,
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    Case("gpt2", zoo.tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    Case(
        "bert, classifier",
        zoo.tiny_bert,
        {
            "target_modules": ["query", "value"],
            "task_type": "SEQ_CLS",
            "modules_to_save": ["pooler"],
            "bias": "all",
        },
    ),
    Case(
        "convolutions, DoRA",
        bare(Convolutions, zoo.sample(2, 4, 12)),
        {"target_modules": ["one", "two", "three", "head"], "r": 4, "use_dora": True},
    ),
    Case(
        "residual, DoRA, patterns",
        RESIDUAL,
        {"target_modules": ["embed", "up", "down", "head"], "use_dora": True, **PATTERNS},
    ),
    Case("llama, DoRA", zoo.tiny_llama, {"target_modules": "all-linear", "use_dora": True}),
    Case(
        "gpt2, DoRA",
        zoo.tiny_gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    Case(
        "block under two names, DoRA",
        bare(SecondTime, zoo.sample(3, 5)),
        {"target_modules": ["mix"], "use_dora": True},
    ),
    Case(
        "convolutions, bias on B",
        bare(Convolutions, zoo.sample(2, 4, 12)),
        {"target_modules": ["one", "two", "three", "head"], "r": 4, "lora_bias": True},
    ),
    Case(
        "gpt2, bias on B",
        zoo.tiny_gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "lora_bias": True},
    ),
    Case("vit", zoo.tiny_vit, {"target_modules": "all-linear", "bias": "lora_only"}),
]


def run(model: nn.Module, inputs: Any) -> Any:
    model.eval()
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output.logits if hasattr(output, "logits") else output


def shaken(model: nn.Module) -> nn.Module:
    """Random numbers into everything that is trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


def adapted(model: nn.Module, **config: Any) -> nn.Module:
    return shaken(lora_fx.rewrite(model, LoraConfig(**config)))


def in_peft(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shaken(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))).eval()


def read_by_peft(model: nn.Module, folder: Path) -> nn.Module:
    """PEFT's own loader, strict: it would only warn."""
    config = peft.PeftConfig.from_pretrained(folder)
    result = peft.get_peft_model(copy.deepcopy(model), config)
    found = result.load_adapter(folder, "default")
    # A module under two names is one for PEFT when it saves, and two when it counts what misses.
    first = {name for name, _ in result.named_parameters()}
    assert not first & set(found.missing_keys)
    assert not found.unexpected_keys
    return result.eval()


def keys(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def rewrite_file(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    values = keys(folder)
    change(values)
    safetensors.torch.save_file(values, folder / WEIGHTS)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peft_reads_what_we_write(case: Case, tmp_path: Path) -> None:
    base, inputs = case.build()
    model = adapted(base, **case.config)
    assert save_adapter(model, tmp_path / "a") == tmp_path / "a"
    theirs = read_by_peft(base, tmp_path / "a")
    expected = run(model, inputs)
    assert relative_error(expected, run(base, inputs)) > 1e-3, "the adapter does nothing"
    assert_close(run(theirs, inputs), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_we_read_what_peft_writes(case: Case, tmp_path: Path) -> None:
    base, inputs = case.build()
    theirs = in_peft(base, case.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    before = copy.deepcopy(base.state_dict())
    model = load_adapter(base, tmp_path)
    assert_close(run(model, inputs), run(theirs, inputs))
    assert_same_bits(base.state_dict(), before)
    assert isinstance(model, type(base))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_we_read_what_we_write(case: Case, tmp_path: Path) -> None:
    base, inputs = case.build()
    model = adapted(base, **case.config)
    save_adapter(model, tmp_path / "a")
    again = load_adapter(base, tmp_path / "a")
    assert_same_bits(run(again, inputs), run(model, inputs))
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(again, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    other = lora_fx.rewrite(base, LoraConfig(**case.config))
    assert load_adapter(other, tmp_path / "a") is other
    assert_same_bits(run(other, inputs), run(model, inputs))


def test_keys_are_the_ones_that_peft_writes(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "residual, all in one")
    base, _ = case.build()
    ours = keys(save_adapter(adapted(base, **case.config), tmp_path / "ours"))
    in_peft(base, case.config).save_pretrained(tmp_path / "theirs")
    theirs = keys(tmp_path / "theirs")
    # PEFT writes biases of modules_to_save a second and a third time, which it never reads.
    twice = {key for key in theirs if ".original_module." in key or ".modules_to_save." in key}
    assert ours.keys() == theirs.keys() - twice
    assert {k: v.shape for k, v in ours.items()} == {k: theirs[k].shape for k in ours}


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_keys_of_variants_are_the_ones_that_peft_writes(variant: str, tmp_path: Path) -> None:
    config = {"target_modules": ["one", "two", "three", "head"], "r": 4, variant: True}
    base = zoo.seeded(Convolutions)()
    ours = keys(save_adapter(adapted(base, **config), tmp_path / "ours"))
    in_peft(base, config).save_pretrained(tmp_path / "theirs")
    theirs = keys(tmp_path / "theirs")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    written = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert written[variant] is True


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_a_folder_without_what_a_variant_trains_is_refused(variant: str, tmp_path: Path) -> None:
    base = zoo.Mlp()
    save_adapter(adapted(base, target_modules=["first"], **{variant: True}), tmp_path)
    key = {"use_dora": "first.lora_magnitude_vector", "lora_bias": "first.lora_B.bias"}[variant]
    rewrite_file(tmp_path, lambda values: values.pop(f"base_model.model.{key}"))
    with pytest.raises(CheckpointError, match=f"missing: {key}"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_variants_of_parts_are_read_back(variant: str, tmp_path: Path) -> None:
    base = zoo.seeded(lambda: nn.MultiheadAttention(6, 2, batch_first=True))()
    x = zoo.sample(2, 3, 6)
    model = adapted(base, target_modules=["q", "v"], **{variant: True})
    again = load_adapter(base, save_adapter(model, tmp_path))
    assert_same_bits(again(x, x, x)[0], model(x, x, x)[0])


def test_the_written_config_is_resolved(tmp_path: Path) -> None:
    base, _ = RESIDUAL()
    config = {"target_modules": r".*\.(up|down)|head", "exclude_modules": [], **PATTERNS}
    folder = save_adapter(adapted(base, **config), tmp_path)
    written = json.loads((folder / CONFIG).read_text())
    names = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("up", "down")] + ["head"]
    assert sorted(written["target_modules"]) == sorted(names)
    assert written["init_lora_weights"] is True
    assert written["inference_mode"] is True
    assert written["peft_type"] == "LORA"
    assert (written["r"], written["lora_alpha"]) == (8, 8)
    assert written["rank_pattern"] == {"blocks.0.down": 3, "blocks.1.down": 3, "blocks.1.up": 5}
    assert written["alpha_pattern"] == {"blocks.0.up": 7, "head": 20}
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_layer_filters_are_resolved(tmp_path: Path) -> None:
    base, _ = zoo.tiny_llama()
    model = adapted(base, target_modules=["q_proj"], layers_to_transform=[1])
    written = json.loads((save_adapter(model, tmp_path) / CONFIG).read_text())
    assert written["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert written["layers_to_transform"] is None


def test_a_pattern_that_would_decide_for_other_names_is_anchored(tmp_path: Path) -> None:
    base = zoo.seeded(Endings)()
    config = {
        "target_modules": r".*q",
        "r": 4,
        "rank_pattern": {"^q": 2},
        "alpha_pattern": {"block.q": 3},
    }
    folder = save_adapter(adapted(base, **config), tmp_path)
    written = LoraConfig.from_pretrained(folder)
    assert written.rank_pattern == {"^q": 2}
    assert record_of(load_adapter(base, folder)).adapters["default"].sites[0].rank == 2


def test_one_rank_for_all_takes_no_pattern(tmp_path: Path) -> None:
    model = adapted(zoo.Mlp(), r=8, rank_pattern={".*": 3}, alpha_pattern={".*": 2.5})
    written = LoraConfig.from_pretrained(save_adapter(model, tmp_path))
    assert (written.r, written.lora_alpha) == (3, 2.5)
    assert not written.rank_pattern
    assert not written.alpha_pattern


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_convolution_is_written_dense(groups: int, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=groups), nn.ReLU())
    x = zoo.sample(2, 8, 5, 5)
    model = adapted(base, r=groups, target_modules=["0"])
    folder = save_adapter(model, tmp_path)
    dense = keys(folder)["base_model.model.0.lora_A.weight"]
    assert dense.shape == (groups, 8, 3, 3)
    assert int((dense != 0).sum()) == dense.numel() // groups
    assert_close(run(read_by_peft(base, folder), x), run(model, x))
    assert_same_bits(run(load_adapter(base, folder), x), run(model, x))


def test_a_grouped_transposed_convolution_comes_back(tmp_path: Path) -> None:
    base = nn.Sequential(nn.ConvTranspose2d(8, 12, 3, 2, groups=4), nn.ReLU())
    x = zoo.sample(2, 8, 5, 5)
    model = adapted(base, r=4, target_modules=["0"])
    folder = save_adapter(model, tmp_path)
    # As that of any other grouped convolution, although PEFT knows no transposed ones.
    assert keys(folder)["base_model.model.0.lora_A.weight"].shape == (4, 8, 3, 3)
    assert_same_bits(run(load_adapter(base, folder), x), run(model, x))


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_in_groups_refuses_a_dense_one(use_dora: bool, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=2))
    options = {"r": 2, "target_modules": ["0"], "use_dora": use_dora}
    in_peft(base, options).save_pretrained(tmp_path)
    model = adapted(base, **options)
    before = lora_fx.adapter_state_dict(model)
    with pytest.raises(CheckpointError, match=r"0\.lora_A\.weight is dense.*2 groups"):
        lora_fx.load_adapter(model, tmp_path)
    assert_close(lora_fx.adapter_state_dict(model), before)


@pytest.mark.parametrize("build", [zoo.Mlp, Convolutions], ids=["mlp", "convolutions"])
def test_batch_norm_statistics_come_back(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    base = zoo.seeded(build)().train()
    x = zoo.sample(6, 5) if build is zoo.Mlp else zoo.sample(6, 4, 12)
    before = copy.deepcopy(base.state_dict())
    model = lora_fx.rewrite(base, LoraConfig(r=2))
    optimizer = torch.optim.SGD(lora_fx.trainable_parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    folder = save_adapter(model, tmp_path)
    expected = run(model, x)
    again = load_adapter(base, folder)
    assert_same_bits(run(again, x), expected)
    assert_same_bits(base.state_dict(), before)
    assert_close(run(read_by_peft(base, folder), x), expected)
    # What was loaded is still what training changed: it is saved again.
    assert keys(save_adapter(again, tmp_path / "again")).keys() == keys(folder).keys()
    assert any(key.endswith("running_mean") for key in keys(folder))


def test_statistics_that_did_not_change_are_not_saved(tmp_path: Path) -> None:
    folder = save_adapter(adapted(zoo.Mlp()), tmp_path)
    assert not any("running" in key for key in keys(folder))


def test_statistics_that_the_folder_lacks_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = zoo.Mlp().train()
    model = adapted(base)
    folder = save_adapter(model, tmp_path)
    model.train()(zoo.sample(6, 5))
    with caplog.at_level(logging.WARNING, "lora_fx"):
        load_adapter(model, folder)
    assert "norm.running_mean" in caplog.text


@pytest.mark.parametrize(
    "form", [f for f in zoo.FORMS if "groups" not in f.name], ids=lambda f: f.name
)
def test_every_form_comes_back(form: zoo.Form, tmp_path: Path) -> None:
    base, x = form.model(), form.x()
    model = adapted(base, r=4, target_modules=[form.site])
    folder = save_adapter(model, tmp_path)
    assert_same_bits(run(load_adapter(base, folder), x), run(model, x))


def test_a_parameter_of_the_root_has_a_key_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, x = zoo.MatmulOperator(5, 7), zoo.sample(3, 5)
    model = adapted(base, target_modules=["kernel"])
    with caplog.at_level(logging.WARNING, "lora_fx"):
        folder = save_adapter(model, tmp_path)
    names = ("kernel_lora.lora_A.weight", "kernel_lora.lora_B.weight")
    assert keys(folder).keys() == {f"base_model.model.{name}" for name in names}
    assert "PEFT cannot load the adapters of kernel" in caplog.text
    assert_same_bits(run(load_adapter(base, folder), x), run(model, x))


def test_a_root_that_is_a_linear_layer(tmp_path: Path) -> None:
    base, x = nn.Linear(5, 3), zoo.sample(2, 5)
    model = adapted(base, r=2, bias="all", target_modules=["weight"])
    folder = save_adapter(model, tmp_path)
    assert set(keys(folder)) == {
        f"base_model.model.{name}" for name in ("lora_A.weight", "lora_B.weight", "bias")
    }
    assert_same_bits(run(load_adapter(base, folder), x), run(model, x))


def test_tensors_are_contiguous_and_apart(tmp_path: Path) -> None:
    base = zoo.Tied()
    model = adapted(base, target_modules=["body"], modules_to_save=["embed", "head"])
    values = keys(save_adapter(model, tmp_path))
    assert all(value.is_contiguous() for value in values.values())
    assert {"base_model.model.embed.weight", "base_model.model.head.weight"} < values.keys()
    assert_same_bits(run(load_adapter(base, tmp_path), IDS), run(model, IDS))


def test_channels_last_factors_are_saved(tmp_path: Path) -> None:
    base = zoo.seeded(Convolutions)()
    model = adapted(base)
    factor = model.two.lora_A.default
    factor.data = factor.data.to(memory_format=torch.channels_last)
    x = zoo.sample(2, 4, 12)
    assert_close(run(load_adapter(base, save_adapter(model, tmp_path)), x), run(model, x))


def test_half_precision_base(tmp_path: Path) -> None:
    base = zoo.seeded(zoo.Residual)().to(torch.bfloat16)
    model = adapted(base, target_modules=["up", "down"], modules_to_save=["head"])
    folder = save_adapter(model, tmp_path)
    assert keys(folder)["base_model.model.blocks.0.up.lora_A.weight"].dtype == torch.float32
    assert keys(folder)["base_model.model.head.weight"].dtype == torch.bfloat16
    assert_same_bits(run(load_adapter(base, folder), IDS), run(model, IDS))


def test_values_are_cast_to_the_dtype_of_their_place(tmp_path: Path) -> None:
    base, _ = RESIDUAL()
    folder = save_adapter(adapted(base), tmp_path)
    rewrite_file(folder, lambda v: v.update({k: x.half() for k, x in v.items()}))
    model = load_adapter(base, folder)
    assert model.blocks[0].up.lora_A.default.dtype == torch.float32


def test_adapters_of_other_names_have_subfolders(tmp_path: Path) -> None:
    base, _ = RESIDUAL()
    config = LoraConfig(target_modules=["up"])
    model = shaken(lora_fx.rewrite(base, config, adapter_name="french"))
    folder = save_adapter(model, tmp_path, "french")
    assert folder == tmp_path / "french"
    for place in (tmp_path, folder):
        again = load_adapter(base, place, adapter_name="french")
        assert_same_bits(run(again, IDS), run(model, IDS))
    assert not any("french" in key for key in keys(folder))
    assert_same_bits(run(load_adapter(base, folder), IDS), run(model, IDS))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="french")
    assert_close(run(theirs, IDS), run(model, IDS))


def test_peft_subfolders(tmp_path: Path) -> None:
    base, _ = RESIDUAL()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["up"]), adapter_name="x"
    )
    shaken(theirs).save_pretrained(tmp_path)
    assert_close(run(load_adapter(base, tmp_path, adapter_name="x"), IDS), run(theirs, IDS))


def test_keys_without_the_prefix(tmp_path: Path) -> None:
    base, _ = RESIDUAL()
    model = adapted(base)
    folder = save_adapter(model, tmp_path)
    bare_keys = {k.removeprefix("base_model.model."): v for k, v in keys(folder).items()}
    safetensors.torch.save_file(bare_keys, folder / WEIGHTS)
    assert_same_bits(run(load_adapter(base, folder), IDS), run(model, IDS))


def test_merging_what_was_loaded(tmp_path: Path) -> None:
    base, inputs = zoo.tiny_llama()
    model = adapted(base, target_modules=["q_proj", "down_proj"])
    again = load_adapter(base, save_adapter(model, tmp_path))
    merged = lora_fx.merge(again)
    assert type(merged) is type(base)
    assert_close(run(merged, inputs), run(model, inputs))


ranks = st.integers(1, 6)


@given(first=ranks, second=ranks, alpha=st.floats(0.5, 40), rslora=st.booleans(), late=ranks)
def test_any_ranks_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    first: int,
    second: int,
    alpha: float,
    rslora: bool,
    late: int,
) -> None:
    base = zoo.seeded(zoo.Mlp)()
    model = adapted(
        base,
        target_modules=["first", "second"],
        r=late,
        lora_alpha=alpha,
        use_rslora=rslora,
        rank_pattern={"first": first, "second": second},
    )
    folder = save_adapter(model, tmp_path_factory.mktemp("ranks"))
    again = load_adapter(base, folder)
    x = zoo.sample(4, 5)
    assert_same_bits(run(again, x), run(model, x))
    assert [row.rank for row in record_of(again).adapters["default"].sites] == [first, second]
    assert_close(run(read_by_peft(base, folder), x), run(model, x))


# --- what does not fit ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of the residual model."""
    return save_adapter(adapted(RESIDUAL()[0], r=4, target_modules=["up", "down"]), tmp_path / "a")


def test_every_misfit_is_listed_at_once(folder: Path) -> None:
    def change(values: dict[str, torch.Tensor]) -> None:
        del values["base_model.model.blocks.0.up.lora_A.weight"]
        values["base_model.model.blocks.1.up.lora_A.weight"] = torch.zeros(4, 7)
        values["base_model.model.blocks.9.up.lora_A.weight"] = torch.zeros(4, 6)
        values["base_model.model.nothing"] = torch.zeros(2)

    rewrite_file(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(RESIDUAL()[0], folder)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "missing: blocks.0.up.lora_A.weight [4, 6]" in lines
    assert (
        "shape: blocks.1.up.lora_A.weight is [4, 7] as it was saved, [4, 6] in the model" in lines
    )
    assert "unexpected: blocks.9.up.lora_A.weight [4, 6]" in lines
    assert "unexpected: nothing [2]" in lines


def test_a_wider_model_shape_by_shape(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_adapter(zoo.Residual(width=8), folder)
    message = str(caught.value)
    assert message.count("shape: ") == 4  # one side of each of the four sites
    assert "blocks.0.up.lora_A.weight is [4, 6] as it was saved, [4, 8] in the model" in message


def test_another_model(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_adapter(zoo.Mlp(), folder)
    message = str(caught.value)
    assert "does not fit this Mlp" in message
    assert message.count("unexpected: blocks.") == 8


def test_a_module_that_is_no_linear_operation_says_why(folder: Path) -> None:
    base, _ = RESIDUAL()
    base.blocks[0].up = nn.Bilinear(6, 6, 10)
    base.blocks[0].forward = functools.partial(nn.Identity.forward, nn.Identity())
    with pytest.raises(CheckpointError, match=r"unexpected: blocks\.0\.up\.lora_A"):
        load_adapter(base, folder)


class WithEmptyLayer(nn.Module):
    """A model with a layer that has no weights, as heads of transformers have in some configurations."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.empty = nn.Linear(4, 4), nn.Linear(4, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.up(x), self.empty(x)], -1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_one_layer_that_cannot_be_adapted_is_the_only_one_that_is_listed(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["up", "empty"])
    peft.get_peft_model(WithEmptyLayer(), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(WithEmptyLayer(), tmp_path)
    message = str(caught.value)
    assert message.count("unexpected: ") == message.count("unexpected: empty.lora_") == 2
    assert "empty cannot be adapted: its weight has no elements" in message


def test_a_failed_load_changes_nothing(folder: Path) -> None:
    model = adapted(RESIDUAL()[0], r=4, target_modules=["up", "down"])
    before = copy.deepcopy(model.state_dict())
    rewrite_file(folder, lambda v: v.pop("base_model.model.blocks.1.down.lora_B.weight"))
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.down\.lora_B\.weight"):
        load_adapter(model, folder)
    assert_same_bits(model.state_dict(), before)


def test_another_scale_in_a_rewritten_model(folder: Path) -> None:
    model = adapted(RESIDUAL()[0], r=4, lora_alpha=16, target_modules=["up", "down"])
    with pytest.raises(CheckpointError, match=r"scale: blocks\.0\.up is scaled by 2 .* by 4 in"):
        load_adapter(model, folder)


def test_an_embedding_of_another_vocabulary_is_the_adapters_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, inputs = zoo.tiny_llama()
    theirs = in_peft(base, {"target_modules": ["embed_tokens"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys(tmp_path)
    with torch.no_grad():
        base.model.embed_tokens.weight[0] += 1
    loaded = load_adapter(base, tmp_path)
    assert "the folder has other values of model.embed_tokens.weight than the model" in caplog.text
    assert_close(run(loaded, inputs), run(theirs, inputs))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.base_layer\.weight is \[40, 16\]"):
        load_adapter(zoo.tiny_llama(vocab_size=48)[0], tmp_path)


def test_a_folder_without_factors(folder: Path) -> None:
    safetensors.torch.save_file({"base_model.model.x": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="holds no LoRA factor; found 1 other"):
        load_adapter(RESIDUAL()[0], folder)


def test_another_method_is_refused_by_name(tmp_path: Path) -> None:
    base, _ = RESIDUAL()
    in_peft(base, {"target_modules": ["up"]}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_qalora": True}))
    with pytest.raises(ConfigError, match=r"adapter_config\.json: .*use_qalora"):
        load_adapter(base, tmp_path)


def test_not_a_lora_adapter(tmp_path: Path) -> None:
    base, _ = RESIDUAL()
    config = peft.IA3Config(target_modules=["up"], feedforward_modules=[])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="peft_type is 'IA3'"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("size", [0, 4, 40, 700])
def test_truncated_weights(folder: Path, size: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is truncated or damaged"):
        load_adapter(RESIDUAL()[0], folder)


def test_missing_files(folder: Path) -> None:
    base, _ = RESIDUAL()
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_adapter(base, folder / "none")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_adapter(base, folder / CONFIG)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"neither {WEIGHTS} nor adapter_model.bin"):
        load_adapter(base, folder)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=f"{CONFIG} does not exist"):
        load_adapter(base, folder)


def test_a_pickle_of_tensors_is_read(folder: Path) -> None:
    base, _ = RESIDUAL()
    expected = run(load_adapter(base, folder), IDS)
    torch.save(keys(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert_same_bits(run(load_adapter(base, folder), IDS), expected)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


def test_a_pickle_of_anything_else_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = RESIDUAL()
    monkeypatch.chdir(folder)
    (folder / WEIGHTS).unlink()
    path = folder / "adapter_model.bin"
    torch.save({"x": Attack()}, path)
    with pytest.raises(CheckpointError, match="weights_only=True"):
        load_adapter(base, folder)
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match="weights_only=True"):
        load_adapter(base, folder)
    assert not (folder / "attacked").exists()
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        load_adapter(base, folder)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="does not hold tensors by name"):
        load_adapter(base, folder)


def test_what_is_no_model_or_not_rewritten(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"Mlp has no adapters\. lora_fx\.rewrite"):
        save_adapter(zoo.Mlp(), tmp_path)
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module, found str"):
        load_adapter("model", folder)
    with pytest.raises(ConfigError, match="adapter_name"):
        load_adapter(zoo.Mlp(), folder, adapter_name="a.b")


def test_the_meta_device_has_no_values(tmp_path: Path) -> None:
    base = zoo.Mlp()
    folder = save_adapter(adapted(base), tmp_path / "a")
    model = lora_fx.rewrite(base.to("meta"), LoraConfig())
    with pytest.raises(CheckpointError, match="on the meta device: there are no values"):
        save_adapter(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(CheckpointError, match="on the meta device"):
        load_adapter(base, folder)


# --- writing --------------------------------------------------------------------------------------


def test_an_adapter_is_replaced_unless_force_is_false(folder: Path) -> None:
    before = contents(folder)
    model = adapted(RESIDUAL()[0], r=2)
    with pytest.raises(CheckpointError, match=r"holds an adapter already.*force=True"):
        save_adapter(model, folder, force=False)
    assert contents(folder) == before
    (folder / "notes.txt").write_text("mine")
    save_adapter(model, folder)
    assert_same_bits(run(load_adapter(RESIDUAL()[0], folder), IDS), run(model, IDS))
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, "notes.txt"}


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(original: Callable[..., Any], call: int) -> Callable[..., Any]:
    """Fails at one call, as a disk that is full for a moment."""
    calls = iter(range(1000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return full_disk() if next(calls) == call else original(*args, **kwargs)

    return wrapped


FAILURES = [
    ("safetensors.torch.save_file", 0),
    ("os.fsync", 0),
    ("os.fsync", 1),
    ("pathlib.Path.mkdir", 0),
    ("pathlib.Path.mkdir", 1),
    ("json.dumps", 0),
    ("pathlib.Path.replace", 0),
    ("pathlib.Path.replace", 1),
    ("pathlib.Path.replace", 2),
    ("tempfile.mkdtemp", 0),
]


@pytest.mark.parametrize(("where", "call"), FAILURES)
@pytest.mark.parametrize("there", [True, False], ids=["over an adapter", "into a new folder"])
def test_a_full_disk_leaves_everything_as_it_was(
    where: str, call: int, there: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(RESIDUAL()[0], r=2)
    target = folder if there else folder / "new" / "one"
    before = contents(folder)
    owner, _, name = where.rpartition(".")
    original = functools.reduce(getattr, owner.split(".")[1:], __import__(owner.split(".")[0]))
    with monkeypatch.context() as patch:
        patch.setattr(original, name, failing(getattr(original, name), call))
        with pytest.raises(CheckpointError, match="No space left") as caught:
            save_adapter(model, target, force=True)
    assert isinstance(caught.value.__cause__, OSError)
    assert str(target) in str(caught.value)
    assert contents(folder) == before
    save_adapter(model, target, force=True)
    assert_same_bits(run(load_adapter(RESIDUAL()[0], target), IDS), run(model, IDS))


def test_the_error_of_safetensors_counts_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    before = contents(folder)
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        save_adapter(adapted(RESIDUAL()[0]), folder, force=True)
    assert contents(folder) == before


def test_without_hard_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", full_disk)
    monkeypatch.setattr(Path, "replace", failing(Path.replace, 2))
    before = contents(folder)
    with pytest.raises(CheckpointError):
        save_adapter(adapted(RESIDUAL()[0], r=2), folder, force=True)
    assert contents(folder) == before


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_adapter(adapted(zoo.Mlp()), target)
    assert contents(tmp_path) == {"file": b"mine"}


def test_saving_does_not_touch_the_model(tmp_path: Path) -> None:
    model = adapted(zoo.Mlp())
    before = copy.deepcopy(model.state_dict())
    record = record_of(model)
    save_adapter(model, tmp_path)
    assert_same_bits(model.state_dict(), before)
    assert record_of(model) is record
    assert dataclasses.asdict(record.adapters["default"].config)["inference_mode"] is False


class Opaque(nn.Module):
    """Has a weight that torch.export alone sees."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.eye(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x @ self.kernel if int(x.shape[-1]) == 4 else x)


@pytest.mark.parametrize("frontend", ["auto", "export"])
def test_an_adapter_of_an_exported_capture_is_loaded_by_the_same(tmp_path, frontend):
    model, x = Opaque(), torch.randn(3, 4)
    config = lora_fx.LoraConfig(r=2, init_lora_weights=False)
    adapted = lora_fx.rewrite(model, config, x, frontend=frontend)
    lora_fx.save_adapter(adapted, tmp_path)
    again = lora_fx.load_adapter(model, tmp_path, example_inputs=x, frontend=frontend)
    assert torch.equal(again(x), adapted(x))
    with pytest.raises(CheckpointError, match="the frontend and the example_inputs"):
        lora_fx.load_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="how to capture one that is not"):
        lora_fx.load_adapter(adapted, tmp_path, example_inputs=x)
    assert torch.equal(lora_fx.load_adapter(adapted, tmp_path)(x), adapted(x))


def failing_at(place: int) -> Any:
    """A write that fails when it is called for the nth time, in the middle of what it writes."""
    from lora_fx.checkpoint import state as _checkpoint_state

    own, calls = _checkpoint_state.write, []

    def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
        calls.append(tensor)
        own(tensor, value)
        if len(calls) == place:
            raise MemoryError("there is no room")

    return write


@pytest.mark.parametrize("place", [1, 3, 6])
def test_a_write_that_fails_leaves_the_adapter_as_it_was(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = RESIDUAL()
    config = LoraConfig(r=2, target_modules=["up", "down"], modules_to_save=["head"])
    saved = lora_fx.rewrite(model, config)
    with torch.no_grad():
        for p in lora_fx.trainable_parameters(saved):
            p.copy_(torch.randn_like(p))
    save_adapter(saved, tmp_path / "folder")
    state = lora_fx.adapter_state_dict(saved)
    monkeypatch.setattr("lora_fx.checkpoint.state.write", failing_at(place))

    # Into an adapter that the model has, from a folder or from a state dict.
    other = lora_fx.rewrite(model, config)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(MemoryError):
        load_adapter(other, tmp_path / "folder")
    assert_same_bits(dict(other.state_dict()), before)
    monkeypatch.setattr("lora_fx.checkpoint.state.write", failing_at(place))
    with pytest.raises(MemoryError):
        lora_fx.load_adapter_state_dict(other, state)
    assert_same_bits(dict(other.state_dict()), before)

    # As one more adapter, which then is not there.
    monkeypatch.setattr("lora_fx.checkpoint.state.write", failing_at(place))
    expected = other(inputs)
    with pytest.raises(MemoryError):
        load_adapter(other, tmp_path / "folder", adapter_name="more")
    assert lora_fx.adapter_names(other) == ("default",)
    assert_same_bits(dict(other.state_dict()), before)
    assert torch.equal(other(inputs), expected)

    # Into the original model, whose tensors the new one shares.
    monkeypatch.setattr("lora_fx.checkpoint.state.write", failing_at(place))
    base = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MemoryError):
        load_adapter(model, tmp_path / "folder")
    assert_same_bits(dict(model.state_dict()), base)


@pytest.mark.filterwarnings("ignore")
def test_the_base_is_found_by_its_class_where_the_task_is_not_known(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 20}
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_hidden_layers=1, **sizes)
    ).save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=2)).eval()
    randomize(model)

    def mapping_in(folder):
        path = folder / "adapter_config.json"
        return json.loads(path.read_text(encoding="utf-8"))["auto_mapping"]

    folder = lora_fx.save_adapter(model, tmp_path / "adapter")
    library = "transformers.models.llama.modeling_llama"
    assert mapping_in(folder) == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": library,
    }
    ids = torch.tensor([[1, 2, 3]])
    found = peft.AutoPeftModel.from_pretrained(folder).eval()
    assert_close(found(ids).logits, model(ids).logits)
    # What a folder says of the base stays so.
    path = folder / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace(library, "transformers"))
    again = lora_fx.load_adapter(base, folder)
    assert mapping_in(lora_fx.save_adapter(again, tmp_path / "again")) == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers",
    }
    typed = lora_fx.rewrite(base, lora_fx.LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert mapping_in(lora_fx.save_adapter(typed, tmp_path / "typed")) is None
    with pytest.raises(ConfigError, match=r"auto_mapping: found .* parent_library"):
        lora_fx.LoraConfig(auto_mapping={"base_model_class": "Net"})
