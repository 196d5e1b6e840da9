"""A small model with every kind of operation that takes an adapter, and adapters of every kind on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig

VOCABULARY = 20


class Net(nn.Module):
    """Lookups, a product with a raw parameter, grouped and transposed convolutions, attention, 2-D layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.grouped = nn.Conv1d(width, width, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose1d(width, width, 1)
        self.raw = nn.Parameter(torch.randn(width, 12) / 3)
        self.fc = nn.Linear(12, width)
        self.pool = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.transposed(self.grouped(x.transpose(1, 2)).relu()).transpose(1, 2)
        x = self.fc((x @ self.raw).relu())
        return self.head(self.pool(x.mean(1)).tanh())


def ids(batch: int = 3, length: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> nn.Module:
    """Every adapter with values that change the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                size = 0.3 if "lora_B" in name or "lora_embedding" in name else 0.1
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted() -> nn.Module:
    """A net with three adapters: of several ranks, with rsLoRA; DoRA; with a bias on B."""
    torch.manual_seed(0)
    everywhere = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        lora_dropout=0.5,
        rank_pattern={"fc": 2, "grouped": 6},
        alpha_pattern={"pool": 3},
        target_modules=["embed", "attention", "grouped", "transposed", "raw", "fc", "pool"],
    )
    model = lora_fx.rewrite(Net().eval(), everywhere, adapter_name="plain")
    lora_fx.add_adapter(
        model, LoraConfig(r=2, use_dora=True, target_modules=["fc", "grouped"]), "dora"
    )
    lora_fx.add_adapter(
        model, LoraConfig(r=3, lora_bias=True, target_modules=["pool", "raw"]), "biased"
    )
    return trained(model)
