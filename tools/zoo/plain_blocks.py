"""The longer ones of the models written by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Attention",
    "BatchedExperts",
    "Bilinear",
    "Classifier",
    "IndexedExperts",
    "RawAttention",
    "Recurrent",
    "TiedDecoder",
    "UNet",
]


class RawAttention(nn.Module):
    """Attention by einsum, its weights parameters [width, heads, size] and [heads, size, width]."""

    def __init__(self, width: int = 16, heads: int = 4, size: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Parameter(torch.randn(width, heads, size) / 4) for _ in range(3)
        )
        self.o = nn.Parameter(torch.randn(heads, size, width) / 4)
        self.up, self.down = (
            nn.Parameter(torch.randn(width, 2 * width) / 4),
            nn.Parameter(torch.randn(2 * width, width) / 6),
        )

    def forward(self, x: Tensor) -> Any:
        """Applies it."""
        q, k, v = (torch.einsum("btw,whs->bhts", x, w) for w in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bhts,bhus->bhtu", q, k) / 2, -1)
        x = x + torch.einsum("bhts,hsw->btw", weights @ v, self.o)
        return x + torch.einsum(
            "btf,fw->btw", F.gelu(torch.einsum("btw,wf->btf", x, self.up)), self.down
        )


class UNet(nn.Module):
    """Down by strides, up by transposed convolutions, with a connection across."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = _convolutions(3, width)
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.middle = _convolutions(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.last = _convolutions(2 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Any:
        """Applies it."""
        first = self.first(x)
        x = self.up(self.middle(self.down(first)))
        return self.out(self.last(torch.cat([first, x], 1)))


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, groups=2),
        nn.GroupNorm(2, outputs),
        nn.SiLU(),
    )


class TiedDecoder(nn.Module):
    """A causal decoder whose head is its embedding, and that makes its positions as it goes."""

    def __init__(self, vocabulary: int = 40, width: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Any:
        """Applies it."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return F.linear(x, self.tokens.weight)


class BatchedExperts(nn.Module):
    """Every token through every expert at once, mixed by a router."""

    def __init__(self, width: int = 8, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) / 3)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) / 4)

    def forward(self, x: Tensor) -> Any:
        """Applies it."""
        rows = x.flatten(0, 1)
        shares = torch.softmax(self.router(rows), -1)
        each = rows.expand(self.up.shape[0], -1, -1)
        results = torch.bmm(F.silu(torch.bmm(each, self.up)), self.down)
        return torch.einsum("te,etw->tw", shares, results).view_as(x)


class IndexedExperts(nn.Module):
    """A loop over experts, each on the tokens that the router sends to it."""

    def __init__(self, width: int = 8, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Any:
        """Applies it."""
        rows = x.flatten(0, 1)
        share, choice = torch.softmax(self.router(rows), -1).max(-1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            chosen = torch.where(choice == index)[0]
            out = out.index_add(0, chosen, expert(rows[chosen]) * share[chosen, None])
        return (rows + out).view_as(x)


class Attention(nn.Module):
    """nn.MultiheadAttention, on itself and on a context of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(16, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, kdim=12, vdim=10, batch_first=True)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Applies it."""
        x = x + self.own(x, x, x, need_weights=False)[0]
        y, weights = self.cross(x, key, value)
        return x + y, weights


class Classifier(nn.Module):
    """Tokens through torch's own encoder, with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Any:
        """Applies it."""
        padding = tokens == 0
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=padding)[:, 0])


class Recurrent(nn.Module):
    """An LSTM, whose weights are no sites, and a linear head, whose weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(40, 12), nn.LSTM(12, 16, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, tokens: Tensor) -> Any:
        """Applies it."""
        return self.head(self.lstm(self.embed(tokens))[0])


class Bilinear(nn.Module):
    """nn.Bilinear over two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)
        self.both = nn.Bilinear(6, 6, 5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        """Applies it."""
        return self.both(torch.tanh(self.left(x)), torch.tanh(self.right(y)))
