"""Factors that make up for what quantizing lost, against singular values in fp64, and beside PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_fx
from lora_fx.formats import dense
from tests.quantized import IDS, SCHEMES, llama, quantized

TARGETS = ["q_proj", "down_proj"]
SITES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


def adapted(scheme: str = "nf4", **fields: Any) -> Any:
    fields = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS} | fields
    return lora_fx.rewrite(quantized(llama(1), scheme), lora_fx.LoraConfig(**fields)).train()


def product(model: nn.Module, name: str) -> torch.Tensor:
    layer: Any = model.get_submodule(name)
    a, b = (f.default.detach().double() for f in (layer.lora_A, layer.lora_B))
    return b @ a


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.train()(IDS).logits
    return result


@pytest.mark.parametrize("scheme", SCHEMES)
def test_factors_are_the_leading_singular_triples(scheme: str) -> None:
    original = llama(1)
    model = adapted(scheme)
    before = outputs(model)
    rows = lora_fx.replace_lora_weights_loftq(model, original)
    assert [row.name for row in rows] == SITES
    for row in rows:
        weight = original.get_submodule(row.name).weight.detach().double()
        lost = weight - dense(model.get_submodule(row.name).weight).double()
        u, s, vh = torch.linalg.svd(lost)
        best = (u[:, :8] * s[:8]) @ vh[:8]
        # In fp32; what is lost is noise, whose singular values lie close together.
        assert float((2.0 * product(model, row.name) - best).norm() / best.norm()) < 1e-4
        assert row.before == pytest.approx(float(lost.norm() / weight.norm()), rel=1e-3)
        left = float(s[8:].norm() / weight.norm())
        assert row.after == pytest.approx(left, rel=1e-3)
        assert row.after < row.before
        assert row.kept
    # What is left of the error in the outputs, over the layers that have an adapter.
    wanted = quantized(llama(1), scheme)
    for name in SITES:
        owner, _, leaf = name.rpartition(".")
        setattr(wanted.get_submodule(owner), leaf, original.get_submodule(name))
    expected = outputs(wanted)
    assert (outputs(model) - expected).norm() < 0.9 * (before - expected).norm()


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4 torchao"])
def test_outputs_come_nearer_to_the_dense_model(scheme: str) -> None:
    model = adapted(scheme, r=16, target_modules=None)
    expected, before = outputs(llama(1)), outputs(model)
    lora_fx.replace_lora_weights_loftq(model, llama(1))
    assert (outputs(model) - expected).norm() < 0.8 * (before - expected).norm()


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("shards", [True, False])
def test_files_are_read_tensor_by_tensor(tmp_path: Path, shards: bool, prefix: bool) -> None:
    original = llama(2)
    inner = original if prefix else original.model
    inner.save_pretrained(tmp_path, max_shard_size="60KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards
    config = lora_fx.LoraConfig(r=8, target_modules=TARGETS)
    models = [lora_fx.rewrite(quantized(llama(2), "nf4"), config) for _ in range(2)]
    names: list[str] = []
    lora_fx.replace_lora_weights_loftq(models[0], original)
    lora_fx.replace_lora_weights_loftq(
        models[1],
        tmp_path,
        progress=lambda done, total, name: names.append(f"{done}/{total} {name}"),
    )
    assert torch.equal(outputs(models[0]), outputs(models[1]))
    assert names[-1] == "3/4 model.layers.1.mlp.down_proj"


def test_pefts_decomposition_is_the_same_where_the_scale_is_one() -> None:
    # Its own function moves every weight to a GPU, whatever there is.
    model, original = adapted(lora_alpha=8), llama(1)
    lora_fx.replace_lora_weights_loftq(model, original)
    for name in SITES:
        stored = dense(model.get_submodule(name).weight)
        lost = original.get_submodule(name).weight.detach() - stored
        found = _low_rank_decomposition(lost, reduced_rank=8)
        theirs = (found["L"] @ found["R"]).double()
        error = (theirs - product(model, name)).norm() / theirs.norm()
        assert float(error) < 1e-4


def test_a_fast_decomposition_is_close() -> None:
    exact, fast = adapted(), adapted()
    best = lora_fx.replace_lora_weights_loftq(exact, llama(1))
    rows = lora_fx.replace_lora_weights_loftq(fast, llama(1), iterations=16)
    for row, exactly in zip(rows, best, strict=True):
        assert exactly.after <= row.after < 1.01 * exactly.after


def test_a_magnitude_is_the_norm_of_what_is_there_now() -> None:
    model = adapted(use_dora=True, lora_bias=False)
    lora_fx.replace_lora_weights_loftq(model, llama(1))
    for name in SITES:
        layer: Any = model.get_submodule(name)
        norm = (dense(layer.weight).double() + 2.0 * product(model, name)).norm(dim=1)
        m = layer.lora_magnitude_vector.default.detach().double()
        torch.testing.assert_close(m, norm, atol=1e-6, rtol=1e-5)
    plain = adapted()
    lora_fx.replace_lora_weights_loftq(plain, llama(1))
    torch.testing.assert_close(outputs(model), outputs(plain), atol=1e-5, rtol=0)


def test_factors_are_written_in_place_and_go_on_training() -> None:
    model = adapted()
    parameters = list(lora_fx.trainable_parameters(model))
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    lora_fx.replace_lora_weights_loftq(model, llama(1))
    assert [id(p) for p in lora_fx.trainable_parameters(model)] == [id(p) for p in parameters]
    before = outputs(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(outputs(model), before)


def test_a_callback_declines_what_does_not_help() -> None:
    model = adapted()
    expected = outputs(llama(1))
    best = float((outputs(model) - expected).norm())
    untouched = {name: product(model, name) for name in SITES}

    def better(one: nn.Module, name: str) -> bool:
        nonlocal best
        error = float((outputs(one) - expected).norm())
        if name == SITES[0] or error >= best:
            return False
        best = error
        return True

    rows = lora_fx.replace_lora_weights_loftq(model, llama(1), callback=better)
    assert [row.kept for row in rows] == [False, True]
    assert torch.equal(product(model, SITES[0]), untouched[SITES[0]])
    assert not torch.equal(product(model, SITES[1]), untouched[SITES[1]])
    assert float((outputs(model) - expected).norm()) == pytest.approx(best)


def test_an_error_in_a_callback_takes_the_factors_back() -> None:
    model = adapted()
    before = outputs(model)

    def broken(one: nn.Module, name: str) -> bool:
        raise KeyError(name)

    with pytest.raises(KeyError, match="q_proj"):
        lora_fx.replace_lora_weights_loftq(model, llama(1), callback=broken)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_parts_of_a_weight_that_is_stored_in_out(kind: str) -> None:
    torch.manual_seed(0)
    original = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=97)).eval()
    base = lora_fx.quantize(original, kind)
    config = lora_fx.LoraConfig(r=4, lora_alpha=4, target_modules=["c_attn.v", "mlp.c_fc"])
    model = lora_fx.rewrite(base, config).eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}
    rows = lora_fx.replace_lora_weights_loftq(model, original)
    assert [row.name for row in rows] == [
        "transformer.h.0.attn.c_attn.v",
        "transformer.h.0.mlp.c_fc",
    ]
    merged = lora_fx.merge(model)
    for row in rows:
        place, kept = (
            row.name.removesuffix(".v"),
            slice(128, None) if "attn" in row.name else slice(None),
        )
        weights = [
            dense(m.get_submodule(place).weight.detach()).double()[:, kept]
            for m in (original, merged, lora_fx.merge(lora_fx.rewrite(base, config)))
        ]
        errors = [float((weights[0] - w).norm() / weights[0].norm()) for w in weights[1:]]
        assert errors == [pytest.approx(row.after, rel=1e-3), pytest.approx(row.before, rel=1e-3)]
    assert any(not torch.equal(model.get_parameter(n), p) for n, p in before.items())


def test_a_folder_keeps_the_factors(tmp_path: Path) -> None:
    model = adapted()
    lora_fx.replace_lora_weights_loftq(model, llama(1))
    lora_fx.save_adapter(model, tmp_path)
    again = lora_fx.load_adapter(quantized(llama(1), "nf4"), tmp_path)
    assert torch.equal(outputs(again), outputs(model))


def broken_original() -> nn.Module:
    model = llama(1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("original", "message"),
    [
        (lambda: nn.Linear(2, 2), r"original has no model.layers.0.self_attn.q_proj.weight"),
        (lambda: quantized(llama(1), "nf4"), r"q_proj.weight of the original is stored as nf4"),
        (lambda: quantized(llama(1), "int8 torchao"), r"stored as int8"),
        (lambda: llama(1).to("meta"), r"on the meta device"),
        (broken_original, r"down_proj.weight of the original has values that are not finite"),
    ],
)
def test_an_original_that_is_none(original: Any, message: str) -> None:
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lora_fx.ConfigError, match=message):
        lora_fx.replace_lora_weights_loftq(model, original())
    # All of it or nothing: the first site was fine with the last of them.
    after = model.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in after if ".lora_" in n)


def test_what_is_refused(tmp_path: Path) -> None:
    dense_model = lora_fx.rewrite(llama(1), lora_fx.LoraConfig(r=4))
    with pytest.raises(lora_fx.ConfigError, match="nothing was lost"):
        lora_fx.replace_lora_weights_loftq(dense_model, llama(1))
    with pytest.raises(lora_fx.CheckpointError, match="does not exist"):
        lora_fx.replace_lora_weights_loftq(adapted(), tmp_path / "nowhere")
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=97)).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        lora_fx.CheckpointError, match=r"has no model.layers.0.self_attn.q_proj.weight"
    ):
        lora_fx.replace_lora_weights_loftq(adapted(), tmp_path)
    with pytest.raises(lora_fx.ConfigError, match=r"rank 100 is more than.*rank_pattern"):
        lora_fx.replace_lora_weights_loftq(adapted(r=100), llama(1))
    with pytest.raises(lora_fx.ConfigError, match="iterations=0"):
        lora_fx.replace_lora_weights_loftq(adapted(), llama(1), iterations=0)
