"""Several sites that are one adapter to PEFT: attention layers and parts of fused weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.errors import CheckpointError
from lora_fx.ir import record_of
from tests.lora_fx.test_checkpoint import (
    CONFIG,
    WEIGHTS,
    adapted,
    in_peft,
    keys,
    read_by_peft,
    rewrite_file,
)
from tests.lora_fx.test_checkpoint import run as plain_run
from tests.numerics import assert_close, assert_same_bits, relative_error
from tests.zoo import sample, seeded, tiny_gpt2

PREFIX = "base_model.model."


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attn(x, x.flip(1), x * 2, need_weights=False)[0])


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class RawFused(nn.Module):
    """The same with a parameter [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(8, 24) / 3)

    def forward(self, x):
        q, k, v = (x @ self.qkv).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


X = sample(2, 5, 8)
attention = seeded(Attention)
fused = seeded(Fused)
raw_fused = seeded(lambda: nn.Sequential(nn.Linear(8, 8), RawFused()))
encoder = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))


def run(model: nn.Module, inputs: Any) -> torch.Tensor:
    """With an input that wants a gradient: torch's fast paths leave PEFT's adapters out."""
    if inputs is X:
        return model.eval()(inputs.clone().requires_grad_()).detach()
    return plain_run(model, inputs)


def sites(model: nn.Module) -> dict[str, tuple[int, float]]:
    return {row.name: (row.rank, row.scale) for row in record_of(model).adapters["default"].sites}


OURS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "attention": (attention, {"target_modules": ["attn"]}),
    "ranks of its own": (
        attention,
        {
            "target_modules": ["attn", "head"],
            "r": 4,
            "rank_pattern": {"attn.k": 2, "out_proj": 3},
            "alpha_pattern": {"attn.v": 20},
        },
    ),
    "two of four": (attention, {"target_modules": ["attn.q", "attn.v"], "lora_alpha": 3}),
    "the output only": (attention, {"target_modules": ["out_proj"]}),
    "a large output": (attention, {"target_modules": ["q", "out_proj"], "rank_pattern": {"q": 2}}),
    "rank-stabilized": (
        attention,
        {"target_modules": ["attn"], "use_rslora": True, "rank_pattern": {"attn.q": 2}},
    ),
    "biases": (attention, {"target_modules": ["attn"], "bias": "all"}),
    "biases of targets": (attention, {"target_modules": ["attn"], "bias": "lora_only"}),
    "in a layer of torch": (encoder, {"target_modules": ["self_attn", "linear1"], "r": 3}),
    "parts": (fused, {"target_modules": ["qkv.q", "qkv.v", "proj"]}),
    "unequal parts": (
        fused,
        {
            "target_modules": ["qkv.q", "qkv.k", "qkv.v"],
            "rank_pattern": {"qkv.k": 3},
            "alpha_pattern": {"qkv.v": 1},
        },
    ),
    "one part": (fused, {"target_modules": ["qkv.k"], "r": 5}),
    "parts of a parameter": (
        raw_fused,
        {"target_modules": ["qkv.q", "qkv.v", "0"], "rank_pattern": {"qkv.q": 3}},
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_peft_reads_what_we_write_and_so_do_we(name: str, tmp_path: Path) -> None:
    build, config = OURS[name]
    base = build().eval()
    model = adapted(base, **config)
    lora_fx.save_adapter(model, tmp_path / "a")
    assert not any("_lora." in key for key in keys(tmp_path / "a"))
    expected = run(model, X)
    assert relative_error(expected, run(base, X)) > 1e-3
    assert_close(run(read_by_peft(base, tmp_path / "a"), X), expected)
    again = lora_fx.load_adapter(base, tmp_path / "a")
    assert_close(run(again, X), expected)
    assert sites(again) == sites(model)
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    lora_fx.save_adapter(again, tmp_path / "b")
    assert (tmp_path / "a" / CONFIG).read_text() == (tmp_path / "b" / CONFIG).read_text()
    other = lora_fx.rewrite(base, lora_fx.LoraConfig(**config))
    assert lora_fx.load_adapter(other, tmp_path / "a") is other
    assert_close(run(other, X), expected)


def test_parts_of_a_conv1d(tmp_path: Path) -> None:
    base, inputs = tiny_gpt2()
    model = adapted(base, target_modules=["c_attn.q", "c_attn.v", "c_fc"], r=3)
    lora_fx.save_adapter(model, tmp_path)
    assert_close(run(read_by_peft(base, tmp_path), inputs), run(model, inputs))
    assert_close(run(lora_fx.load_adapter(base, tmp_path), inputs), run(model, inputs))


def test_an_adapter_that_is_still_zero_keeps_its_parts(tmp_path: Path) -> None:
    base = fused()
    config = lora_fx.LoraConfig(target_modules=["qkv.q", "qkv.v"], rank_pattern={"qkv.v": 3})
    model = lora_fx.rewrite(base, config)
    again = lora_fx.load_adapter(base, lora_fx.save_adapter(model, tmp_path))
    assert sites(again) == sites(model)
    assert_same_bits(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (attention, {"target_modules": ["attn"], "r": 3, "lora_alpha": 5}),
        (
            attention,
            {"target_modules": ["attn", "head"], "rank_pattern": {"attn": 2}, "bias": "all"},
        ),
        (encoder, {"target_modules": r".*(attn|linear\d)", "use_rslora": True}),
        (attention, {"target_parameters": ["attn.in_proj_weight"], "target_modules": []}),
        (fused, {"target_modules": ["qkv"]}),
    ],
    ids=["attention", "patterns", "a layer of torch", "in_proj as a parameter", "fused"],
)
def test_an_adapter_of_peft(build: Any, config: dict[str, Any], tmp_path: Path) -> None:
    base = build().eval()
    theirs = in_peft(base, config)
    theirs.save_pretrained(tmp_path / "a")
    ours = lora_fx.load_adapter(base, tmp_path / "a")
    assert relative_error(run(ours, X), run(base, X)) > 1e-3
    assert_close(run(ours, X), run(theirs, X))
    # q, k and v share PEFT's A until they are trained: it is not written three times.
    again = keys(lora_fx.save_adapter(ours, tmp_path / "b"))
    for key, value in keys(tmp_path / "a").items():
        assert_close(again.pop(key), value)
    # The weight of in_proj alone has no other name in PEFT than as a parameter.
    assert not any(value.any() for value in again.values())
    merged, expected = lora_fx.merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    for key, value in merged.items():
        assert_close(value, expected[key])


def test_the_note_is_not_needed(tmp_path: Path) -> None:
    """A tool that copies tensors only leaves an adapter of the whole, with the same outputs."""
    base = fused()
    model = adapted(base, target_modules=["qkv.q", "qkv.v"], rank_pattern={"qkv.v": 3})
    lora_fx.save_adapter(model, tmp_path)
    safetensors.torch.save_file(keys(tmp_path), tmp_path / WEIGHTS)
    again = lora_fx.load_adapter(base, tmp_path)
    assert sites(again) == {"qkv": (11, 8 / 3)}
    assert_close(run(again, X), run(model, X))


def test_attention_without_the_note_has_the_whole_rank_in_each_projection(tmp_path: Path) -> None:
    base = attention()
    model = adapted(base, target_modules=["attn"], r=2)
    lora_fx.save_adapter(model, tmp_path)
    safetensors.torch.save_file(keys(tmp_path), tmp_path / WEIGHTS)
    again = lora_fx.load_adapter(base, tmp_path)
    assert {rank for rank, _ in sites(again).values()} == {6}
    assert_close(run(again, X), run(model, X))


def test_peft_adds_the_product_of_out_proj_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When this fails, PEFT adds it once, and so has to be what is read and written."""
    base = attention().eval()
    theirs = in_peft(base, {"target_modules": ["attn"]})
    layer = theirs.base_model.model.attn.base_layer.out_proj
    delta = layer.get_delta_weight("default").detach().clone()
    with torch.no_grad():
        merged = theirs.merge_and_unload()
    assert_close(merged.attn.out_proj.weight - base.attn.out_proj.weight, 2 * delta)
    with caplog.at_level("WARNING", "lora_fx"):
        lora_fx.save_adapter(adapted(base, target_modules=["attn"]), tmp_path)
        lora_fx.load_adapter(base, tmp_path)
    assert caplog.text.count("adds the product of out_proj twice") == 2


def test_a_damaged_note_is_refused(tmp_path: Path) -> None:
    base = fused()
    lora_fx.save_adapter(adapted(base, target_modules=["qkv.q"]), tmp_path)
    safetensors.torch.save_file(keys(tmp_path), tmp_path / WEIGHTS, {"lora_fx.parts": "[1]"})
    with pytest.raises(CheckpointError, match=r"lora_fx\.parts.*damaged"):
        lora_fx.load_adapter(base, tmp_path)


def test_folders_with_names_of_our_own_are_still_read(tmp_path: Path) -> None:
    base = attention()
    config = {"target_modules": ["attn.q", "attn.out_proj"], "rank_pattern": {"attn.q": 2}}
    model = adapted(base, **config)
    lora_fx.save_adapter(model, tmp_path)
    factors = {
        f"{PREFIX}{holder}.lora_{letter}.weight": model.get_parameter(
            f"{holder}.lora_{letter}.default"
        ).detach()
        for holder in ("attn.q_lora", "attn.out_proj")
        for letter in "AB"
    }
    safetensors.torch.save_file(factors, tmp_path / WEIGHTS)
    lora_fx.LoraConfig(**config).save_pretrained(tmp_path)
    assert_same_bits(run(lora_fx.load_adapter(base, tmp_path), X), run(model, X))
    assert lora_fx.load_adapter(model, tmp_path) is model


def test_unequal_widths_are_parameters(tmp_path: Path) -> None:
    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)

        def forward(self, x):
            return self.attn(x, x[..., :4], x[..., :6], need_weights=False)[0]

    base = seeded(Unequal)()
    model = adapted(base, target_modules=["attn.q_proj_weight", "attn.v_proj_weight"])
    lora_fx.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["target_parameters"] == ["attn.q_proj_weight", "attn.v_proj_weight"]
    assert_close(run(read_by_peft(base, tmp_path), X), run(model, X))
    assert_same_bits(run(lora_fx.load_adapter(base, tmp_path), X), run(model, X))


def test_every_misfit_is_listed(tmp_path: Path) -> None:
    base = attention()
    lora_fx.save_adapter(adapted(base, target_modules=["attn"], r=2), tmp_path)

    def change(values: dict[str, torch.Tensor]) -> None:
        del values[f"{PREFIX}attn.base_layer.out_proj.lora_A.weight"]
        values[f"{PREFIX}attn.lora_B.weight"] = torch.zeros(24, 5)
        values[f"{PREFIX}attn.lora_C.weight"] = torch.zeros(1)

    rewrite_file(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        lora_fx.load_adapter(base, tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert [line for line in lines if line.startswith(("missing", "shape", "unexpected"))] == [
        "missing: attn.base_layer.out_proj.lora_A.weight [18, 8]",
        "shape: attn.lora_B.weight is [24, 5] as it was saved, [24, 6] in the model",
        "unexpected: attn.lora_C.weight [1]",
    ]


def test_what_the_model_has_no_adapter_for_is_refused(tmp_path: Path) -> None:
    base = fused()
    in_peft(base, {"target_modules": ["qkv"], "r": 4}).save_pretrained(tmp_path)
    model = adapted(base, target_modules=["qkv.q", "qkv.v"], r=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"qkv\.lora_B\.weight changes more .*qkv\.q, qkv\.v"):
        lora_fx.load_adapter(model, tmp_path)
    assert_same_bits(model.state_dict(), before)
    whole = adapted(base, target_modules=["qkv.q", "qkv.k", "qkv.v"], r=4)
    lora_fx.load_adapter(whole, tmp_path)
    assert_close(run(whole, X), run(read_by_peft(base, tmp_path), X))
