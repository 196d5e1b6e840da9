"""Merging where a graph alone knows that a weight is quantized: functional code, [in, out], attention."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.formats import dense, quantization_of
from tests.numerics import assert_close
from tests.quantized import IDS

FORMATS = ("nf4", "int8", "int4")


class Functional(nn.Module):
    """Weights of both layouts that no layer holds, a layer, and torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(64, 32) / 6)
        self.v = nn.Parameter(torch.randn(64, 64) / 8)
        self.fc = nn.Linear(64, 64)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 32] to [n, 64]."""
        x = F.linear(x, self.w)
        x = x + torch.relu(x @ self.v)
        result: Tensor = self.layer(self.fc(x).unsqueeze(0)).squeeze(0)
        return result


X = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
TARGETS = ["v", "fc", "linear1"]


def adapted(scheme: str) -> nn.Module:
    base = lora_fx.quantize(Functional(), scheme).train()
    config = lora_fx.LoraConfig(r=4, init_lora_weights=False, target_modules=TARGETS)
    return lora_fx.rewrite(base, config).train()


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_dense_merge_is_the_users_own_code_again(scheme: str) -> None:
    model = adapted(scheme)
    merged = lora_fx.merge(model)
    assert type(merged) is Functional
    assert [type(m) for m in merged.modules()] == [type(m) for m in Functional().modules()]
    assert merged.v.shape == (64, 64)
    with torch.no_grad():
        torch.testing.assert_close(merged(X), model(X), atol=1e-5, rtol=0)
    a, b = model.v_lora.lora_A.default, model.v_lora.lora_B.default
    # Stored [out, in], and [in, out] as the code reads it.
    exact = dense(model.v).double().T + 2.0 * (b.double() @ a.double()).T
    assert model.v_lora.lora_A.default.shape == (4, 64)
    torch.testing.assert_close(merged.v.double(), exact, atol=1e-6, rtol=1e-7)
    plain = Functional()
    plain.load_state_dict(merged.state_dict())
    for module in merged.modules():
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks
        assert not [name for name in vars(module) if name.startswith("_lora_fx")]


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_requantized_model_runs_its_graphs_again(scheme: str) -> None:
    model = adapted(scheme)
    merged, report = lora_fx.merge(model, requantize=True, example_inputs=X, return_report=True)
    stored = {n for n, p in model.named_parameters() if quantization_of(p)}
    assert {n for n, p in merged.named_parameters() if quantization_of(p)} == stored
    assert stored >= {"w", "v", "fc.weight"}
    again = {row.name for row in report.sites if row.requantized}
    assert again == {"v", "fc", "layer.linear1"}
    with torch.no_grad():
        error = float((merged(X) - model(X)).norm() / model(X).norm())
        assert error == pytest.approx(report.outputs.relative_error, rel=0.01)
        assert torch.equal(pickle.loads(pickle.dumps(merged))(X), merged(X))
        once_more = lora_fx.rewrite(merged, lora_fx.LoraConfig(r=2, target_modules=TARGETS))
        assert torch.equal(once_more(X), merged(X))
        torch.testing.assert_close(lora_fx.merge(once_more)(X), merged(X), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheme", FORMATS)
def test_convolutions_of_gpt2_go_back_into_their_layout(scheme: str) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=97, resid_pdrop=0, attn_pdrop=0)
    base = lora_fx.quantize(GPT2LMHeadModel(config), scheme).eval()
    model = lora_fx.rewrite(
        base,
        lora_fx.LoraConfig(r=4, init_lora_weights=False, target_modules=["c_attn.q", "c_fc"]),
    ).eval()
    merged = lora_fx.merge(model)
    fc = merged.transformer.h[0].mlp.c_fc
    assert type(fc) is Conv1D
    assert fc.weight.shape == (64, 256)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
        again = lora_fx.merge(model, requantize=True)
        error = (again(IDS).logits - model(IDS).logits).norm() / model(IDS).logits.norm()
        assert 0 < float(error) < 0.2


@pytest.mark.parametrize("name", ["EmbeddingNF4", "EmbeddingFP4", "Embedding8bit"])
def test_quantized_embeddings_become_dense_ones(name: str) -> None:
    import bitsandbytes as bnb

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            plain = nn.Embedding(97, 64)
            self.table = getattr(bnb.nn, name)(97, 64)
            self.table.load_state_dict(plain.state_dict())
            self.fc = nn.Linear(64, 64)

        def forward(self, ids: Tensor) -> Tensor:
            """[n, t] to [n, t, 64]."""
            result: Tensor = self.fc(self.table(ids))
            return result

    base = Lookup().to("cpu")
    config = lora_fx.LoraConfig(r=4, init_lora_weights=False, target_modules=["fc"])
    model = lora_fx.rewrite(base, config)
    merged = lora_fx.merge(model)
    assert type(merged.table) is nn.Embedding
    assert type(lora_fx.merge(model, requantize=True).table) is type(base.table)
    with torch.no_grad():
        # Of the largest output, which is 1.4: sums of 64 products are rounded in the order of the machine.
        assert_close(merged(IDS), model(IDS), 1e-6)


class Listed(nn.Module):
    """A layer that is applied twice, a list that has its weight, too, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(32, 32)
        self.held = [self.fc.weight]
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 32] to [n, 2]."""
        x = F.linear(self.fc(x), self.fc.weight)
        result: Tensor = self.head(x)
        return result


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_list_of_the_model_holds_what_its_layer_does(scheme: str) -> None:
    base = lora_fx.quantize(Listed(), scheme)
    assert base.held[0] is base.fc.weight
    config = lora_fx.LoraConfig(r=4, init_lora_weights=False)
    model = lora_fx.rewrite(base, config).eval()
    merged = lora_fx.merge(model)
    assert type(merged) is Listed
    assert merged.held[0] is merged.fc.weight
    with torch.no_grad():
        torch.testing.assert_close(merged(X), model(X), atol=1e-3, rtol=1e-4)
