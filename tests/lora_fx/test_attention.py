"""The attention between the projections, against nn.MultiheadAttention itself in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.runtime.attention import attend, canonical_mask, causal_hint
from tests.numerics import assert_close

LAYERS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "other widths": {"kdim": 6, "vdim": 6, "batch_first": True},
    "no bias": {"bias": False},
    "extra key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}
QUERIES, KEYS, BATCH, HEADS = 5, 4, 3, 2


def masks(kind: str | None, padding: str | None, batched: bool):
    """An attention mask and a padding mask that leave every query a key."""
    heads = (BATCH if batched else 1) * HEADS
    attention = {
        None: None,
        "bool": torch.rand(QUERIES, KEYS) < 0.3,
        "float": torch.randn(QUERIES, KEYS, dtype=torch.float64),
        "3d": torch.rand(heads, QUERIES, KEYS) < 0.3,
    }[kind]
    pad = None
    if padding is not None:
        pad = torch.rand(*((BATCH, KEYS) if batched else (KEYS,))) < 0.3
        pad[..., 0] = False
    if attention is not None and attention.dtype == torch.bool:
        attention[..., 0] = False
    if pad is not None and kind == "float":
        pad = torch.zeros(pad.shape, dtype=torch.float64).masked_fill_(pad, -torch.inf)
    return attention, pad


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_layers_attention(name: str, batched: bool) -> None:
    layer = nn.MultiheadAttention(8, HEADS, **LAYERS[name]).double()
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)

    def sample(length: int, width: int) -> torch.Tensor:
        lead = (BATCH, length) if layer.batch_first else (length, BATCH)
        return torch.randn(*(lead if batched else (length,)), width, dtype=torch.float64)

    query, key, value = sample(QUERIES, 8), sample(KEYS, layer.kdim), sample(KEYS, layer.vdim)
    weights = layer.in_proj_weight
    parts = (
        weights.chunk(3)
        if weights is not None
        else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    )
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    projected = [
        F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True)
    ]
    for need, average, kind, padding in itertools.product(
        [True, False], [True, False], [None, "bool", "float", "3d"], [None, "padding"]
    ):
        attention, pad = masks(kind, padding, batched)
        expected, expected_weights = layer(
            query,
            key,
            value,
            key_padding_mask=pad,
            need_weights=need,
            attn_mask=attention,
            average_attn_weights=average,
        )
        out, found = attend(
            *projected,
            pad,
            need,
            attention,
            average,
            False,
            heads=HEADS,
            batch_first=layer.batch_first,
            dropout=0.0,
            training=True,
            bias_k=layer.bias_k,
            bias_v=layer.bias_v,
            add_zero_attn=layer.add_zero_attn,
        )
        torch.testing.assert_close(layer.out_proj(out), expected, rtol=0, atol=1e-12)
        assert (found is None) == (expected_weights is None)
        if found is not None:
            torch.testing.assert_close(found, expected_weights, rtol=0, atol=1e-12)


def test_dropout_is_for_training_only() -> None:
    q = torch.randn(2, 6, 8)

    def run(training: bool) -> torch.Tensor:
        return attend(
            q, q, q, None, False, None, True, False,
            heads=2, batch_first=True, dropout=0.5, training=training,
        )[0]  # fmt: skip

    assert torch.equal(run(False), run(False))
    assert not torch.equal(run(True), run(True))


def test_a_hint_without_a_mask_is_refused_as_the_layer_does() -> None:
    q = torch.randn(2, 6, 8)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        attend(
            q, q, q, None, False, None, True, True,
            heads=2, batch_first=True, dropout=0.0, training=False,
        )  # fmt: skip


def test_a_mask_of_integers_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"torch\.int64"):
        canonical_mask(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_causal_mask_is_recognized(batch_first: bool) -> None:
    x = torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    assert causal_hint(x, causal, None, batch_first)
    assert causal_hint(x, causal.isinf(), None, batch_first)
    assert not causal_hint(x, torch.zeros(5, 5), None, batch_first)
    assert not causal_hint(x, causal[:4, :4], None, batch_first)
    assert not causal_hint(x, None, None, batch_first)
    assert causal_hint(x, torch.zeros(5, 5), True, batch_first), "a hint is believed"


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_seed_gives_the_frozen_models_dropout(batch_first: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.3, batch_first=batch_first, norm_first=norm_first
    )
    base = nn.TransformerEncoder(layer, 2).double().train()
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=2))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.manual_seed(1)
    expected = base(x)
    torch.manual_seed(1)
    assert_close(model(x), expected)
