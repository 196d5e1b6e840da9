"""Tensor parallelism: adapters follow the weights that PyTorch's styles and transformers' plans cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

import lora_fx
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.features import features_in, shown
from tests.stacks.models import IDS, llama
from tests.stacks.tensor_parallel import (
    CASES,
    FOLDERS,
    alone,
    run_rank,
    sent,
    step,
    whole,
    with_samples,
    with_two,
)

RANKS = 2


def tensor_parallel(name: str) -> str:
    del name
    return "tensor parallel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    llama().double().save_pretrained(folder / "base")
    whole({"biases": True}).save_pretrained(folder / "base with biases")
    for name, case in FOLDERS.items():
        lora_fx.save_adapter(alone(case), folder / f"one process, {name}")
    multiprocessing.spawn(run_rank, (str(folder), RANKS), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"run {RANKS} {rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", shown(CASES, tensor_parallel, features_in))
def test_losses_and_gradients_are_those_of_one_process(
    name: str, found: list[dict[str, Any]]
) -> None:
    model = alone(CASES[name])
    loss, gradients = step(model)
    for rank in found:
        assert_close(rank[name]["loss"], loss, 1e-6)
        assert rank[name]["gradients"].keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert gradient.abs().max() > 0
            assert_close(rank[name]["gradients"][key], gradient, 1e-6)
        assert_close(rank[name]["logits"], model(IDS).logits, 1e-6)
        assert_close(rank[name]["state"], lora_fx.adapter_state_dict(model), 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_forward_sends_what_that_of_the_base_sends(
    name: str, found: list[dict[str, Any]]
) -> None:
    for rank in found:
        before, after = rank[name]["calls"]
        assert sum(before.values()) > 0
        assert after == sent(CASES[name], before)


@pytest.mark.parametrize("name", CASES)
def test_factors_lie_as_their_weights_do(name: str, found: list[dict[str, Any]]) -> None:
    whole = "(Replicate(),)"
    for key, placed in found[0][name]["placements"].items():
        rowwise, b = "o_proj" in key or "down_proj" in key, "lora_A" not in key
        assert placed == (whole if rowwise == b else f"(Shard(dim={0 if b else 1}),)")


@pytest.mark.feature("tensor parallel", "switch")
@pytest.mark.parametrize("name", CASES)
def test_the_base_is_as_it_was(name: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert_same_bits(rank[name]["off"], found[0][name]["off"])
        assert_close(rank[name]["untouched"], whole(CASES[name])(IDS).logits, 1e-6)
        if "pissa" not in name:
            assert_same_bits(rank[name]["off"], rank[name]["untouched"])


@pytest.mark.feature("tensor parallel", "save")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_that_of_one_process(name: str, folder: Path) -> None:
    one = folder / f"one process, {name}"
    for rank in range(RANKS):
        saved = folder / f"{name} {rank}"
        file = "adapter_model.safetensors"
        assert_same_bits(load_file(saved / file), load_file(one / file))
        config = (saved / "adapter_config.json").read_text()
        if FOLDERS[name]["style"] == "torch":
            assert config == (one / "adapter_config.json").read_text()


@pytest.mark.feature("tensor parallel", "merge", "add later")
@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_done_in_parts_is_done_as_in_one_process(
    name: str, found: list[dict[str, Any]]
) -> None:
    case = FOLDERS[name]
    model = alone(case)
    exact = lora_fx.merge(model)
    logits, two = model(IDS).logits, alone(case)
    both = with_two(two, case)
    samples = with_samples(two)
    for rank in found:
        here = rank[f"folders, {name}"]
        assert_close(here["loaded"], logits, 1e-6)
        assert_close(here["merged"], logits, 1e-6)
        assert_close(here["two"], both, 1e-6)
        assert_close(here["samples"], samples, 1e-6)
        assert_close(here["with inputs"], whole(case)(IDS).logits, 1e-6)
        assert "on a model that is whole" in here["check"]
        assert_same_bits(here["weight"], exact.model.layers[0].mlp.up_proj.weight)
        assert here["placements"] == "(Shard(dim=0),)"
        assert here["class"] == "LlamaForCausalLM"


def test_what_cannot_follow_is_refused_in_every_process(found: list[dict[str, Any]]) -> None:
    words = {
        "parallelized afterwards": "parallelize the model first",
        "rowwise, afterwards": "parallelize the model first",
        "another kind": "in_parts",
        "uneven": "its 25 elements there do not divide by 2",
    }
    for rank in found:
        assert rank["refused"].keys() == words.keys()
        for name, said in rank["refused"].items():
            assert said.startswith(("ConfigError: ", "_NoLayer: "))
            assert words[name] in said
