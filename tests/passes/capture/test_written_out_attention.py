"""Every combination of what nn.MultiheadAttention can be and be asked, in fp64 against the layer itself.

The oracle is the user's own layer with `W + s·BA` in the place of its weights, and autograd through that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig

QUERIES, KEYS, BATCH, HEADS, WIDTH = 4, 3, 2, 2, 4
CONFIG = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=r"attn\..*")
SILENT = LoraConfig(r=2, lora_alpha=4, target_modules=r"attn\..*")
LAYERS = [
    {"bias": bias, "add_bias_kv": kv, "add_zero_attn": zero, "batch_first": first, **widths}
    for bias, kv, zero, first, widths in itertools.product(
        [True, False],
        [True, False],
        [True, False],
        [True, False],
        [{}, {"kdim": 3, "vdim": 5}, {"kdim": 6}],
    )
]


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)

    def forward(self, query, key, value, **how):
        return self.attn(query, key, value, **how)


def layer(**options: Any) -> Attends:
    torch.manual_seed(0)
    model = Attends(**options)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return model


def calls(model: Attends) -> Iterator[tuple[tuple[torch.Tensor, ...], dict[str, Any]]]:
    """Every way to call the layer that it does not refuse, with inputs; no query without a key."""
    attn = model.attn
    for batched, mask, padding, weights in itertools.product(
        [True, False],
        [None, "bool", "float", "3d bool", "3d float", "causal"],
        [None, "bool", "float"],
        ["averaged", "each", "none"],
    ):
        sizes = ((QUERIES, WIDTH), (KEYS, attn.kdim), (KEYS, attn.vdim))
        if batched:
            sizes = tuple((BATCH, n, w) if attn.batch_first else (n, BATCH, w) for n, w in sizes)  # type: ignore[assignment]
        inputs = tuple(torch.randn(*size, dtype=torch.float64) for size in sizes)
        heads = HEADS * (BATCH if batched else 1)
        shape = (heads, QUERIES, KEYS) if mask and mask.startswith("3d") else (QUERIES, KEYS)
        hidden = torch.rand(shape) < 0.4
        if mask == "causal":
            hidden = torch.ones(QUERIES, KEYS).triu(1).bool()
        hidden[..., 0] = False
        unread = torch.rand((BATCH, KEYS) if batched else (KEYS,)) < 0.4
        unread[..., 0] = False
        yield (
            inputs,
            {
                "attn_mask": masked(hidden, mask) if mask else None,
                "key_padding_mask": masked(unread, padding) if padding else None,
                "need_weights": weights != "none",
                "average_attn_weights": weights == "averaged",
                "is_causal": mask == "causal",
            },
        )


def masked(hidden: torch.Tensor, kind: str) -> torch.Tensor:
    if "float" not in kind:
        return hidden
    return torch.randn(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)


def weights_of(model: Attends, adapted: nn.Module, leaves: dict[str, torch.Tensor]):
    """The layer's weights with the adapters in them, as functions of the factors."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    (record,) = adapted._lora_fx.adapters.values()
    for row in record.sites:
        site = row.site
        a, b = (leaves[f"{site.holder}.lora_{letter}.default"] for letter in "AB")
        first, last = site.rows or (0, site.weight_shape[0])
        pad = (0, 0, first, site.weight_shape[0] - last)
        found[site.weight] = found[site.weight] + nn.functional.pad(row.scale * b @ a, pad)
    return found


def total(outputs: Any) -> torch.Tensor:
    return sum(t.square().sum() for t in outputs if t is not None)


def same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.*mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("options", LAYERS, ids=lambda o: "-".join(f"{v}"[:1] for v in o.values()))
def test_outputs_and_gradients_of_every_call(options: dict[str, Any]) -> None:
    model = layer(**options)
    silent = lora_fx.rewrite(model, SILENT)
    adapted = lora_fx.rewrite(model, CONFIG)
    assert len(adapted._lora_fx.adapters["default"].sites) == 4
    factors = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in factors.items()}
    merged = lora_fx.merge(adapted)
    count = 0
    for inputs, how in calls(model):
        count += 1
        same(silent(*inputs, **how), model(*inputs, **how))
        inputs = tuple(x.requires_grad_() for x in inputs)
        found = adapted(*inputs, **how)
        weights = weights_of(model, adapted, leaves)
        expected = torch.func.functional_call(model, weights, inputs, how)
        same(found, expected)
        same(merged(*inputs, **how), expected)
        same(
            torch.autograd.grad(total(found), (*factors.values(), *inputs)),
            torch.autograd.grad(total(expected), (*leaves.values(), *inputs)),
        )
    assert count == 108


@pytest.mark.parametrize("options", LAYERS[::5], ids=str)
def test_the_fast_path_of_the_merged_layer_agrees(options: dict[str, Any]) -> None:
    model = layer(**options).eval()
    adapted = lora_fx.rewrite(model, CONFIG)
    merged = lora_fx.merge(adapted)
    for inputs, how in calls(model):
        if how["key_padding_mask"] is None and how["attn_mask"] is None:
            with torch.no_grad():
                same(adapted(*inputs, **how), merged(*inputs, **how))


@pytest.mark.parametrize("options", LAYERS[::17], ids=str)
def test_it_compiles_whole(options: dict[str, Any]) -> None:
    model = layer(**options)
    adapted = lora_fx.rewrite(model, CONFIG)
    for inputs, how in itertools.islice(calls(model), 5, None, 60):
        torch.compiler.reset()
        compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
        found = compiled(*inputs, **how)
        same(found, adapted(*inputs, **how))
        total(found).backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


STACK = {"dim_feedforward": 6, "dropout": 0.0, "dtype": torch.float64}


def stack(kind: str, *, norm_first: bool, first: bool, activation: Any, norm: bool) -> nn.Module:
    options = {**STACK, "norm_first": norm_first, "batch_first": first, "activation": activation}
    final = nn.LayerNorm(WIDTH, dtype=torch.float64) if norm else None
    torch.manual_seed(0)
    if kind == "transformer":
        return nn.Transformer(
            WIDTH, HEADS, num_encoder_layers=2, num_decoder_layers=2, **options
        ).train()
    if kind == "encoder":
        one = nn.TransformerEncoderLayer(WIDTH, HEADS, **options)
        return nn.TransformerEncoder(one, 2, final, enable_nested_tensor=first and not norm_first)
    if kind == "decoder":
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, **options), 2, final)
    cls = nn.TransformerEncoderLayer if kind == "encoder layer" else nn.TransformerDecoderLayer
    return cls(WIDTH, HEADS, **options)


def stack_calls(
    kind: str, first: bool
) -> Iterator[tuple[tuple[torch.Tensor, ...], dict[str, Any]]]:
    def sample(length: int) -> torch.Tensor:
        shape = (BATCH, length) if first else (length, BATCH)
        return torch.randn(*shape, WIDTH, dtype=torch.float64)

    source, target = sample(KEYS), sample(QUERIES)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    causal = nn.Transformer.generate_square_subsequent_mask(KEYS, dtype=torch.float64)
    own = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    if kind.startswith("encoder"):
        name = "src_mask" if kind == "encoder layer" else "mask"
        yield (source,), {}
        yield (source,), {"src_key_padding_mask": padding}
        yield (source,), {name: causal, "is_causal": True}
        yield (source,), {name: causal, "src_key_padding_mask": padding.double() * -9.0}
        return
    inputs = (source, target) if kind == "transformer" else (target, source)
    yield inputs, {}
    yield inputs, {"tgt_mask": own}
    yield inputs, {"tgt_mask": own, "tgt_is_causal": True, "memory_key_padding_mask": padding}
    yield inputs, {"memory_mask": torch.ones(QUERIES, KEYS).triu(2).bool()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "kind", ["encoder layer", "encoder", "decoder layer", "decoder", "transformer"]
)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_outputs_and_gradients_of_stacks(kind: str, norm_first: bool, first: bool) -> None:
    for activation, norm in [("relu", True), ("gelu", False), (torch.tanh, True)]:
        model = stack(kind, norm_first=norm_first, first=first, activation=activation, norm=norm)
        silent = lora_fx.rewrite(model, LoraConfig(r=2))
        adapted = lora_fx.rewrite(model, LoraConfig(r=2, init_lora_weights=False))
        merged = lora_fx.merge(adapted)
        for inputs, how in stack_calls(kind, first):
            same([silent(*inputs, **how)], [model(*inputs, **how)])
            inputs = tuple(x.requires_grad_() for x in inputs)
            found, expected = adapted(*inputs, **how), merged(*inputs, **how)
            same([found], [expected])
            assert (found - model(*inputs, **how)).abs().max() > 1e-6
            same(
                torch.autograd.grad(found.square().sum(), inputs),
                torch.autograd.grad(expected.square().sum(), inputs),
            )


def test_the_fast_path_is_off_only_where_an_adapter_is(monkeypatch) -> None:
    """Layers without an adapter still take the call in C++, after the rewrite as before."""
    taken = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: taken.append(1) or fast(*a)
    )
    model = nn.ModuleList(
        stack("encoder layer", norm_first=False, first=True, activation="relu", norm=False)
        for _ in range(2)
    ).eval()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        model[0](x)
        before = len(taken)
        adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=r"0\..*")).eval()
        adapted[0](x)
        assert len(taken) == before == 1
        adapted[1](x)
    assert len(taken) == 2
