"""``target_modules="all-linear"`` selects what PEFT selects, in every model of the zoo."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

import lora_fx
from lora_fx.tools.zoo.models import Entry, library_models
from tests.mixtures import IDS, MODELS, SIZES, drawn
from tests.numerics import assert_close
from tests.zoo import seeded

RANK = 3
LIBRARIES = ("transformers", "timm", "torchvision", "diffusers")
ENTRIES = [entry for library in LIBRARIES for entry in library_models(library)]


def by_peft(base: nn.Module) -> Counter[str]:
    """How many parameters PEFT trains, by the module that has the adapter."""
    config = peft.LoraConfig(r=RANK, target_modules="all-linear")
    found: Counter[str] = Counter()
    for name, parameter in peft.get_peft_model(copy.deepcopy(base), config).named_parameters():
        if ".lora_" in name:
            layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
            found[layer.replace(".base_layer", "")] += parameter.numel()
    return found


def check_same_selection(base: nn.Module) -> None:
    theirs = by_peft(base)
    plan = lora_fx.plan(base, lora_fx.LoraConfig(r=RANK, target_modules="all-linear"))
    ours: Counter[str] = Counter()
    for row in plan.sites:
        ours[row.site.owner] += row.parameters
    # Where PEFT adapts a layer whose weight other code reads, the plan has it among what it refuses.
    refused = {rejection.name for rejection in plan.rejections}
    assert set(theirs) - set(ours) <= refused
    assert ours == Counter({name: count for name, count in theirs.items() if name not in refused})


@seeded
def qwen2_moe() -> nn.Module:
    sizes = {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8}
    return drawn(transformers.Qwen2MoeConfig(**SIZES, **sizes, intermediate_size=24))


@seeded
def granite_moe() -> nn.Module:
    return drawn(transformers.GraniteMoeConfig(**SIZES, num_local_experts=4, intermediate_size=12))


@pytest.mark.parametrize(
    "make", [*MODELS.values(), qwen2_moe, granite_moe], ids=lambda make: make.__name__
)
def test_mixtures(make: object) -> None:
    check_same_selection(make())


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_zoo(entry: Entry) -> None:
    base, _ = entry.make()
    try:
        by_peft(base)
    except (ValueError, peft.NoMatchingPeftModuleError) as error:
        pytest.skip(f"PEFT refuses: {error}")
    check_same_selection(base)


FOLDERS = {**MODELS, "qwen2_moe": qwen2_moe, "granite_moe": granite_moe}


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("name", FOLDERS)
def test_peft_reads_adapters_of_mixtures(name: str, targets: str | None, tmp_path: Path) -> None:
    make = FOLDERS[name]
    config = lora_fx.LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)
    model = lora_fx.rewrite(make(), config)
    lora_fx.save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert_close(loaded(IDS).logits, model(IDS).logits)

    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    read = lora_fx.load_adapter(make(), tmp_path / "theirs")
    assert_close(read(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("name", ["Bamba", "MobileBERT"])
def test_adapters_that_peft_trained_load(name: str, tmp_path: Path) -> None:
    # Both have code that applies the weight of a linear layer without calling the layer.
    entry = next(entry for entry in ENTRIES if entry.name == f"transformers/{name}")
    base, inputs = entry.make()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=RANK, target_modules="all-linear")
    )
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(**inputs).logits.square().mean().backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    loaded = lora_fx.load_adapter(base, tmp_path)
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits
        assert_close(loaded.eval()(**inputs).logits, expected)
        assert not torch.allclose(base.eval()(**inputs).logits, expected, atol=1e-3)
    lora_fx.save_adapter(loaded, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    with torch.no_grad():
        assert_close(again.eval()(**inputs).logits, expected)
