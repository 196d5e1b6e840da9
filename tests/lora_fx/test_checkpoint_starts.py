"""Folders of adapters whose initialization changed the base: for the base as it was, or as PEFT has it."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import peft
import peft.tuners.lora.layer
import pytest
import safetensors.torch
import torch
from torch import nn

import lora_fx
from lora_fx.config.lora_config import LoraConfig
from lora_fx.errors import CheckpointError, ConfigError
from lora_fx.ir.record import record_of
from lora_fx.passes.insert.starts import levels
from tests import zoo
from tests.numerics import assert_close, assert_same_bits, relative_error

SUBTRACTED = ("pissa", "pissa_niter_3", "olora")
MODELS = {
    "llama": (zoo.tiny_llama, ("q_proj", "down_proj")),
    "gpt2": (zoo.tiny_gpt2, ("c_attn", "c_fc")),
}


def values_of(start: str, targets: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    patterns = {"rank_pattern": {targets[1]: 2}, "alpha_pattern": {targets[1]: 5}}
    values = {"r": 4, "lora_alpha": 6, "target_modules": list(targets), "init_lora_weights": start}
    return {**values, **patterns, **changes}


def train(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("start", SUBTRACTED)
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_for_the_base_as_it_was(
    name: str, start: str, use_rslora: bool, tmp_path: Path
) -> None:
    build, targets = MODELS[name]
    model, inputs = build()
    values = values_of(start, targets, use_rslora=use_rslora)
    adapted = train(lora_fx.rewrite(model, LoraConfig(**values)))
    expected = adapted(**inputs).logits
    assert relative_error(expected, model.eval()(**inputs).logits) > 1e-3
    lora_fx.save_adapter(adapted, tmp_path)
    saved = written(tmp_path)
    assert saved["init_lora_weights"] is True
    assert (saved["r"], sorted(saved["rank_pattern"].values())) in [(8, [4, 4]), (4, [8, 8])]
    assert not any(saved[f"{one}_config"] for one in ("loftq", "eva", "corda", "lora_ga"))
    assert_close(lora_fx.load_adapter(model, tmp_path).eval()(**inputs).logits, expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_close(theirs(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("name", "start"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")]
)
def test_a_folder_of_peft_that_was_not_converted(name: str, start: str, tmp_path: Path) -> None:
    build, targets = MODELS[name]
    model, inputs = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**values_of(start, targets)))
    expected = train(theirs)(**inputs).logits
    theirs.save_pretrained(tmp_path)
    loaded = lora_fx.load_adapter(model, tmp_path).eval()
    assert_close(loaded(**inputs).logits, expected)
    assert_close(lora_fx.merge(loaded)(**inputs).logits, expected)
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key])
    # From here to a folder for the base as it was.
    lora_fx.save_adapter(loaded, tmp_path / "converted")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "converted").eval()
    assert_close(again(**inputs).logits, expected)
    # The same onto a model that has another adapter already.
    other = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=list(targets))).eval()
    lora_fx.load_adapter(other, tmp_path, adapter_name="theirs")
    lora_fx.set_adapter(other, "theirs")
    assert_close(other(**inputs).logits, expected)


def test_peft_gives_embeddings_a_plain_start(tmp_path: Path) -> None:
    model, inputs = zoo.tiny_llama()
    values = values_of("pissa", ("q_proj", "embed_tokens"))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**values))
    expected = train(theirs)(**inputs).logits
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_close(lora_fx.load_adapter(model, tmp_path).eval()(**inputs).logits, expected)


def test_an_approximate_start_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = zoo.tiny_llama()
    values = values_of("pissa_niter_3", ("q_proj", "v_proj"))
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**values)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "lora_fx"):
        lora_fx.load_adapter(model, tmp_path)
    assert "approximate and random" in caplog.text


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_base_that_needs_data_is_refused(start: str, tmp_path: Path) -> None:
    model, _ = zoo.tiny_llama()
    lora_fx.save_adapter(
        lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["q_proj"])), tmp_path
    )
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**written(tmp_path), "init_lora_weights": start}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="path_initial_model_for_weight_conversion"):
        lora_fx.load_adapter(model, tmp_path)


def test_olora_of_a_conv1d_is_refused(tmp_path: Path) -> None:
    """PEFT decomposes such a weight without turning it: only square ones survive that."""
    model, _ = zoo.tiny_gpt2()
    values = {"r": 2, "target_modules": ["attn.c_proj"], "init_lora_weights": "olora"}
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**values, fan_in_fan_out=True)
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the other way round"):
        lora_fx.load_adapter(model, tmp_path)
    other = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["c_fc"]))
    with pytest.raises(CheckpointError, match="the other way round"):
        lora_fx.load_adapter(other, tmp_path, adapter_name="theirs")
    assert lora_fx.adapter_names(other) == ("default",)


def test_a_base_that_cannot_be_decomposed_gets_no_adapter(tmp_path: Path) -> None:
    base = zoo.Residual()
    theirs = peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa")
    peft.get_peft_model(copy.deepcopy(base), theirs).save_pretrained(tmp_path)
    with torch.no_grad():
        base.blocks[0].up.weight[0, 0] = torch.nan
    model = lora_fx.rewrite(base, LoraConfig(r=2, target_modules=["down"]))
    with pytest.raises(ConfigError, match="not finite"):
        lora_fx.load_adapter(model, tmp_path, adapter_name="theirs")
    assert lora_fx.adapter_names(model) == ("default",)


@pytest.mark.parametrize("way", ["folder", "state dict", "swap"])
def test_an_adapter_that_waits_for_data_does_not_wait_for_values_any_more(
    way: str, tmp_path: Path
) -> None:
    base = zoo.Residual()
    other = lora_fx.rewrite(base, LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    lora_fx.save_adapter(other, tmp_path)
    waiting = LoraConfig(r=2, target_modules=["up"], init_lora_weights="eva")
    model = lora_fx.rewrite(base, waiting)
    if way == "folder":
        lora_fx.load_adapter(model, tmp_path)
    elif way == "state dict":
        lora_fx.load_adapter_state_dict(model, lora_fx.adapter_state_dict(other))
    else:
        lora_fx.hotswap_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="has its start already"):
        lora_fx.initialize(model, [torch.zeros(1, 4, dtype=torch.long)], progress=False)


@pytest.mark.parametrize(
    ("of_model", "of_folder"), [("pissa", True), (True, "pissa"), ("olora", "pissa")]
)
def test_values_of_another_base_are_refused(
    of_model: bool | str, of_folder: bool | str, tmp_path: Path
) -> None:
    model, _ = zoo.tiny_llama()
    plain = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=of_folder)
    peft.get_peft_model(copy.deepcopy(model), plain).save_pretrained(tmp_path)
    own = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=of_model)
    adapted = lora_fx.rewrite(model, own)
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    with pytest.raises(CheckpointError, match="not of the same base"):
        lora_fx.load_adapter(adapted, tmp_path)
    for key, value in adapted.state_dict().items():
        assert_same_bits(value, before[key])


def test_values_of_the_same_base_are_taken(tmp_path: Path) -> None:
    model, inputs = zoo.tiny_llama()
    values = values_of("pissa", ("q_proj", "v_proj"))
    theirs = train(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**values)))
    theirs.save_pretrained(tmp_path)
    adapted = lora_fx.rewrite(model, LoraConfig(**values)).eval()
    lora_fx.load_adapter(adapted, tmp_path)
    assert_close(adapted(**inputs).logits, theirs(**inputs).logits)


def test_a_grouped_convolution_is_joined_group_by_group(tmp_path: Path) -> None:
    model = zoo.seeded(lambda: nn.Sequential(nn.Conv2d(8, 12, 3, groups=4)))().eval()
    x = zoo.sample(2, 8, 6, 6)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
    adapted = train(lora_fx.rewrite(model, config))
    lora_fx.save_adapter(adapted, tmp_path)
    assert_close(lora_fx.load_adapter(model, tmp_path)(x), adapted(x))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert_close(theirs(x), adapted(x))


def test_experts_are_joined_one_by_one(tmp_path: Path) -> None:
    model, inputs = zoo.tiny_mixtral()
    config = LoraConfig(r=2, target_modules=["gate_up_proj"], init_lora_weights="pissa")
    adapted = train(lora_fx.rewrite(model, config))
    lora_fx.save_adapter(adapted, tmp_path)
    loaded = lora_fx.load_adapter(model, tmp_path).eval()
    assert_close(loaded(**inputs).logits, adapted(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_half_precision_base_loses(dtype: torch.dtype, tmp_path: Path) -> None:
    """The changed weight was rounded: half a unit in its last place, and no more, is the difference."""
    model = zoo.seeded(lambda: nn.Sequential(nn.Linear(16, 16)))().to(dtype)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
    adapted = lora_fx.rewrite(model, config)
    lora_fx.save_adapter(adapted, tmp_path)
    loaded = lora_fx.load_adapter(model, tmp_path)

    def whole(one: nn.Module, scale: float) -> torch.Tensor:
        product = one[0].lora_B.default.double() @ one[0].lora_A.default.double()
        return one.get_parameter("0.weight").double() + scale * product

    stored = adapted.get_parameter("0.weight").double()
    spacing = torch.finfo(dtype).eps * stored.abs().clamp_min(1e-7)
    assert ((whole(loaded, 2) - whole(adapted, 2)).abs() <= 0.51 * spacing + 1e-7).all()


# --- LoftQ ----------------------------------------------------------------------------------------


def reference(
    weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PEFT's procedure with normal floats by the definition, in the place of what needs an accelerator."""
    assert num_bits == 4
    table = levels(4).float()
    exact = weight.detach().float()
    kept = exact
    for _ in range(num_iter):
        blocks = kept.reshape(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        near = (blocks[..., None] / largest[..., None] - table).abs().argmin(-1)
        values = (table[near] * largest).reshape(exact.shape)
        u, s, vh = torch.linalg.svd(exact - values, full_matrices=False)
        a = s[:reduced_rank, None].sqrt() * vh[:reduced_rank]
        b = u[:, :reduced_rank] * s[:reduced_rank].sqrt()
        kept = exact - b @ a
    return values, a, b


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_base_is_quantized_again(
    iterations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft.tuners.lora.layer, "loftq_init", reference)
    model, inputs = zoo.tiny_llama()
    options = {"loftq_bits": 4, "loftq_iter": iterations}
    values = values_of("loftq", ("q_proj", "down_proj"), loftq_config=options)
    adapted = train(lora_fx.rewrite(model, LoraConfig(**values)))
    expected = adapted(**inputs).logits
    lora_fx.save_adapter(adapted, tmp_path)
    saved = written(tmp_path)
    assert saved["init_lora_weights"] == "loftq"
    assert saved["loftq_config"] == options
    loaded = lora_fx.load_adapter(model, tmp_path).eval()
    assert_close(loaded(**inputs).logits, expected)
    assert set(record_of(loaded).adapters["default"].own) == set(
        record_of(adapted).adapters["default"].own
    )
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_close(theirs(**inputs).logits, expected)
    assert_close(lora_fx.merge(loaded)(**inputs).logits, expected)


def test_nothing_is_doubled_that_was_not_subtracted(tmp_path: Path) -> None:
    model, _ = zoo.tiny_llama()
    adapted = lora_fx.rewrite(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="orthogonal")
    )
    lora_fx.save_adapter(adapted, tmp_path)
    shapes = {
        value.shape
        for value in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").values()
    }
    assert {2} == {min(shape) for shape in shapes}
    assert written(tmp_path)["init_lora_weights"] is True


def _started(name: str, start: str) -> tuple[nn.Module, Any, nn.Module]:
    build, targets = MODELS[name]
    base, inputs = build()
    model = lora_fx.rewrite(base, LoraConfig(**values_of(start, targets)))
    if start in ("corda", "lora_ga"):
        batch = {**inputs, "labels": inputs["input_ids"]}
        lora_fx.initialize(model, [batch], progress=False)
    return base, inputs, model


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "lora_ga", "loftq"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_its_own_values_back(name: str, start: str, tmp_path: Path) -> None:
    _, inputs, model = _started(name, start)
    train(model)
    expected = model(**inputs).logits
    state = lora_fx.adapter_state_dict(model)
    folder = lora_fx.save_adapter(model, tmp_path)
    factors = {key: id(value) for key, value in model.named_parameters()}
    train(model)
    assert relative_error(model(**inputs).logits, expected) > 1e-3
    lora_fx.load_adapter_state_dict(model, state)
    assert_same_bits(model(**inputs).logits, expected)
    train(model)
    lora_fx.load_adapter(model, folder)
    assert_same_bits(model(**inputs).logits, expected)
    assert {key: id(value) for key, value in model.named_parameters()} == factors


@pytest.mark.parametrize("kind", ["grouped", "experts", "attention"])
def test_every_form_takes_its_own_values_back(kind: str) -> None:
    base, config = {
        "grouped": (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), {"target_modules": ["0"]}),
        "experts": (zoo.tiny_mixtral()[0], {"target_modules": ["gate_up_proj"]}),
        "attention": (nn.MultiheadAttention(8, 2), {"target_modules": ["q", "v", "out_proj"]}),
    }[kind]
    model = lora_fx.rewrite(base, LoraConfig(r=2, init_lora_weights="pissa", **config))
    train(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = lora_fx.adapter_state_dict(model)
    train(model)
    lora_fx.load_adapter_state_dict(model, state)
    for key, value in model.state_dict().items():
        assert_close(value, before[key])


def test_values_beside_another_start_are_refused() -> None:
    base, _, model = _started("llama", "pissa")
    state = lora_fx.adapter_state_dict(train(model))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.5)
    other = lora_fx.rewrite(base, LoraConfig(**values_of("pissa", MODELS["llama"][1])))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"start: .*has another start beside it"):
        lora_fx.load_adapter_state_dict(other, state)
    for key, value in other.state_dict().items():
        assert_same_bits(value, before[key])
