"""Attention and transformer layers of torch.nn: q, k, v and out are sites, and nothing passes them by."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.passes.capture.decompositions import WRITTEN_OUT
from tests.algebra import randomize

RANDOM = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
SILENT = LoraConfig(r=2, lora_alpha=4)
TORCH = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "dtype": torch.float64}


class Attends(nn.Module):
    """Calls an attention layer in the way that is asked for, and returns all of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **options)

    def forward(self, q, k, v, **how):
        return self.attn(q, k, v, **how)


def inputs(**options: Any):
    return (
        torch.randn(3, 5, 8, dtype=torch.float64),
        torch.randn(3, 4, options.get("kdim", 8), dtype=torch.float64),
        torch.randn(3, 4, options.get("vdim", 8), dtype=torch.float64),
    )


def same(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "options", [{}, {"kdim": 6, "vdim": 4}, {"bias": False}, {"add_zero_attn": True}]
)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"key_padding_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()},
        {"attn_mask": torch.ones(5, 4).tril().logical_not()},
    ],
    ids=str,
)
def test_one_graph_holds_for_every_call(options, how) -> None:
    torch.manual_seed(0)
    model, sample = Attends(**options).eval(), inputs(**options)
    same(lora_fx.rewrite(model, SILENT)(*sample, **how), model(*sample, **how))
    adapted = lora_fx.rewrite(model, RANDOM)
    merged = lora_fx.merge(adapted)
    assert type(merged.attn) is nn.MultiheadAttention
    # The layer's own forward, by its fast path and by its slow one.
    same(adapted(*sample, **how), merged(*sample, **how))
    with torch.no_grad():
        same(adapted(*sample, **how), merged(*sample, **how))
    assert not torch.allclose(adapted(*sample, **how)[0], model(*sample, **how)[0])


def test_q_k_v_and_out_are_four_sites() -> None:
    plan = lora_fx.plan(Attends(), SILENT)
    assert [row.name for row in plan] == ["attn.q", "attn.k", "attn.v"]
    assert [skipped.site.name for skipped in plan.skipped] == ["attn.out_proj"], "here the head"
    assert [row.site.rows for row in plan] == [(0, 8), (8, 16), (16, 24)]
    ranks = LoraConfig(target_modules=["attn.q", "attn.v"], rank_pattern={"attn.v": 4}, r=2)
    assert [(row.name, row.rank) for row in lora_fx.plan(Attends(), ranks)] == [
        ("attn.q", 2),
        ("attn.v", 4),
    ]


def test_gradients_are_those_of_the_merged_weight() -> None:
    model, sample = Attends(), inputs()
    adapted = lora_fx.rewrite(model, RANDOM)
    adapted(*sample)[0].square().sum().backward()
    reference = copy.deepcopy(model)
    q = adapted.attn.q_lora
    a = q.lora_A.default.detach().requires_grad_()
    b = q.lora_B.default.detach().requires_grad_()
    merged = lora_fx.merge(adapted)
    rest = merged.attn.in_proj_weight.detach().clone()
    rest[:8] = model.attn.in_proj_weight[:8].detach()
    weight = rest + torch.cat([2.0 * b @ a, torch.zeros(16, 8, dtype=torch.float64)])
    out = torch.func.functional_call(
        reference,
        {"attn.in_proj_weight": weight, "attn.out_proj.weight": merged.attn.out_proj.weight},
        sample,
    )[0]
    out.square().sum().backward()
    torch.testing.assert_close(q.lora_A.default.grad, a.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.lora_B.default.grad, b.grad, rtol=1e-10, atol=1e-12)


STACKS = {
    "layer": lambda: nn.TransformerEncoderLayer(batch_first=True, **TORCH),
    "norm first": lambda: nn.TransformerEncoderLayer(
        norm_first=True, batch_first=True, activation="gelu", **TORCH
    ),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(batch_first=True, **TORCH), 2
    ),
    "decoder": lambda: nn.TransformerDecoder(
        nn.TransformerDecoderLayer(batch_first=True, **TORCH), 2
    ),
    "transformer": lambda: nn.Transformer(
        num_encoder_layers=1, num_decoder_layers=1, batch_first=True, **TORCH
    ),
}


@pytest.mark.parametrize("mode", ["train", "eval", "no grad"])
@pytest.mark.parametrize("name", STACKS)
def test_layers_and_stacks_of_them(name: str, mode: str) -> None:
    torch.manual_seed(0)
    model = STACKS[name]().train(mode == "train")
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    sample = (x,) if name in ("layer", "norm first", "encoder") else (x, torch.randn_like(x))
    with torch.set_grad_enabled(mode != "no grad"):
        same([lora_fx.rewrite(model, SILENT)(*sample)], [model(*sample)])
        adapted = lora_fx.rewrite(model, RANDOM)
        same([adapted(*sample)], [lora_fx.merge(adapted)(*sample)], 1e-11)
    layers = sum(
        type(m) in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer) for m in model.modules()
    )
    crossed = sum(type(m) is nn.TransformerDecoderLayer for m in model.modules())
    assert len(lora_fx.plan(model, SILENT)) == 6 * layers + 4 * crossed


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "padding"])
def test_masks_reach_the_attention_of_a_stack(causal: bool) -> None:
    torch.manual_seed(0)
    model = STACKS["encoder"]().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    how = {"mask": mask} if causal else {"src_key_padding_mask": padding}
    adapted = lora_fx.rewrite(model, RANDOM)
    with torch.no_grad():
        merged = lora_fx.merge(adapted)(x, **how)
        torch.testing.assert_close(adapted(x, **how), merged, rtol=0, atol=1e-12)
    assert not torch.allclose(adapted(x, **how), adapted(x))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_padding_is_zero_where_it_is_zero_in_pytorch(left, gradients, training, norm) -> None:
    """It depends on modes, gradients and the side of the padding: PyTorch's nested tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    final = nn.LayerNorm(8) if norm else None
    model = nn.TransformerEncoder(layer, 2, norm=final).double().train(training)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, slice(0, 2) if left else slice(3, 5)] = True
    adapted = lora_fx.rewrite(model, SILENT).train(training)
    with torch.set_grad_enabled(gradients):
        found = adapted(x, src_key_padding_mask=padding)
        expected = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_fast_path_cannot_pass_an_adapter_by() -> None:
    model = STACKS["encoder"]().eval()
    adapted = lora_fx.rewrite(model, RANDOM).eval()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(adapted(x), model(x))
    assert torch.backends.mha.get_fastpath_enabled(), "switched off nowhere else"


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_it_compiles_and_exports_whole(name: str) -> None:
    torch.manual_seed(0)
    model = STACKS[name]().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    sample = (x,) if name == "encoder" else (x, torch.randn_like(x))
    exported = lora_fx.rewrite(model, SILENT, sample, frontend="export")
    same([exported(*sample)], [model(*sample)], 1e-12)
    assert len(lora_fx.plan(model, SILENT, sample, frontend="export")) == len(
        lora_fx.plan(model, SILENT)
    )
    randomize(exported)
    same([exported(*sample)], [lora_fx.merge(exported)(*sample)], 1e-11)


def test_a_saved_adapter_comes_back(tmp_path) -> None:
    model = STACKS["transformer"]()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    adapted = lora_fx.rewrite(model, RANDOM)
    lora_fx.save_adapter(adapted, tmp_path)
    assert torch.equal(lora_fx.load_adapter(model, tmp_path)(x, x), adapted(x, x))


def test_a_subclass_is_not_taken_for_what_it_may_not_be() -> None:
    class Twice(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)[0] * 2

    assert Twice not in WRITTEN_OUT
    model = nn.ModuleDict({"attn": Twice(8, 2), "fc": nn.Linear(8, 8)})
    plan = lora_fx.plan(model, LoraConfig(target_modules=["fc"]))
    assert [row.name for row in plan] == ["fc"]


class UpTo(nn.ConvTranspose2d):
    """A subclass that changes nothing."""


class UpSampled(nn.Module):
    """Comes back to the size that it began with, as decoders do."""

    def __init__(self, layer: type[nn.Module], spatial: bool, groups: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 4, 3, 2, 1)
        self.up = layer(4, 6, 3, 2, 1, groups=groups)
        self.spatial = spatial

    def forward(self, x):
        size = x.size()[2:] if self.spatial else x.shape
        return self.up(self.down(x), output_size=size)


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize(("layer", "groups"), [(nn.ConvTranspose2d, 1), (UpTo, 2)])
def test_a_transposed_convolution_gives_the_size_that_it_is_asked_for(
    layer, groups, spatial, dora
) -> None:
    model = UpSampled(layer, spatial, groups).double()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["up"], use_dora=dora)
    adapted = randomize(lora_fx.rewrite(model, config))
    a, b = (adapted.up.get_submodule(f"lora_{letter}").default for letter in "AB")
    parts = zip(b.chunk(groups), a.chunk(groups), strict=True)
    delta = torch.cat([torch.einsum("or,ri...->io...", up.flatten(1), down) for up, down in parts])
    weight = model.up.weight + 1.5 * delta
    if dora:
        norm = weight.unflatten(0, (groups, -1)).square().sum((1, 3, 4)).sqrt()
        gain = adapted.up.lora_magnitude_vector.default.view(groups, -1) / norm
        weight = weight * gain[:, :, None, None].repeat_interleave(4 // groups, 0)
    for size in ((8, 8), (7, 8), (9, 6)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        exact = torch.func.functional_call(model, {"up.weight": weight}, (x,))
        assert exact.shape[2:] == size
        same([adapted(x), lora_fx.merge(adapted)(x)], [exact, exact], 1e-11)
    # Without a size, as always, and with one that it cannot give: PyTorch's own error.
    y = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    same([adapted.up(y)], [lora_fx.merge(adapted).up(y)], 1e-11)
    with pytest.raises(ValueError, match="requested an output size of"):
        adapted.up(y, output_size=(30, 30))


def test_a_transposed_convolution_of_its_own_is_not_written_out() -> None:
    class Padded(nn.ConvTranspose2d):
        def _output_padding(self, *args, **kwargs):
            return [1, 1]

    model = nn.Sequential(Padded(4, 6, 3, 2)).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    adapted = randomize(lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["0"])))
    assert adapted(x).shape == model(x).shape
    same([adapted(x)], [lora_fx.merge(adapted)(x)], 1e-11)
