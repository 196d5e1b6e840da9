"""Models written by hand: what plain PyTorch allows and libraries rarely do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from lora_fx.tools.zoo.entries import Built, Entry, ids, images

__all__ = ["ENTRIES"]


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


_GROUP = "plain PyTorch"


class Functional(nn.Module):
    """No layer at all: parameters and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(24, 12) / 4)
        self.b1 = nn.Parameter(torch.zeros(24))
        self.w2 = nn.Parameter(torch.randn(24, 6) / 5)
        self.kernel = nn.Parameter(torch.randn(12, 12, 3) / 6)

    def forward(self, x: Tensor) -> Any:
        """Applies it."""
        x = F.conv1d(x.transpose(1, 2), self.kernel, padding=1).transpose(1, 2)
        return F.gelu(F.linear(x, self.w1, self.b1)) @ self.w2


class Hooked(nn.Module):
    """A pre-hook and a hook that change what a layer takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.first.register_forward_pre_hook(_halve)
        self.second.register_forward_hook(_shift)

    def forward(self, x: Tensor) -> Any:
        """Applies it."""
        return self.second(F.relu(self.first(x)))


def _halve(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] / 2,)


def _shift(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + 1


class Nested(nn.Module):
    """Containers in containers, and parameters in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2)
                )
                for name in ("left", "right")
            }
        )
        self.mix = nn.ParameterList(nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2))
        self.ends = nn.ParameterDict({"out": nn.Parameter(torch.randn(8, 3) / 3)})

    def forward(self, x: Tensor) -> Any:
        """Applies it."""
        towers: Any = self.towers
        for left, right, mix in zip(towers["left"], towers["right"], self.mix, strict=True):
            x = x + (left(x) + right(x)) @ mix
        return x @ self.ends["out"]


class SharedLayers(nn.Module):
    """One block called three times, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.alias = self.block[0]
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        """Applies it."""
        for _ in range(3):
            x = x + self.block(x)
        return self.head(torch.tanh(self.alias(x)))


class Scores(NamedTuple):
    """Two outputs by name."""

    classes: Tensor
    value: Tensor


class TwoHeads(nn.Module):
    """A NamedTuple as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.classes, self.value = nn.Linear(16, 5), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Scores:
        """Applies it."""
        x = F.silu(self.body(x))
        return Scores(self.classes(x), value=self.value(x))


class KeywordOnly(nn.Module):
    """Arguments that can be given by name only, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.context = nn.Linear(8, 16), nn.Linear(6, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, *, query: Tensor, context: Tensor | None = None) -> Any:
        """Applies it."""
        x = self.query(query)
        if context is not None:
            x = x * torch.sigmoid(self.context(context))
        return self.out(x)


class Branching(nn.Module):
    """Which layer is applied depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.positive, self.negative = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        """Applies it."""
        x = torch.tanh(self.first(x))
        return self.positive(x) if x.sum() > -1e9 else self.negative(x)


def _parametrized() -> nn.Module:
    return nn.Sequential(
        weight_norm(nn.Linear(8, 16)),
        nn.Tanh(),
        nn.Linear(16, 16),
        nn.Tanh(),
        spectral_norm(nn.Linear(16, 16)),
        nn.Tanh(),
        orthogonal(nn.Linear(16, 16)),
        nn.Linear(16, 4),
    )


def _vocoder() -> nn.Module:
    return nn.Sequential(
        weight_norm(nn.Conv1d(4, 12, 7, padding=3)),
        nn.LeakyReLU(0.1),
        weight_norm(nn.ConvTranspose1d(12, 8, 4, 2, 1)),
        nn.LeakyReLU(0.1),
        nn.Conv1d(8, 8, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv1d(8, 1, 7, padding=3),
    )


def _transformer() -> Built:
    model = nn.Transformer(16, 4, 1, 1, 32, batch_first=True)
    return model, (torch.randn(2, 5, 16), torch.randn(2, 4, 16))


def _entry(name: str, model: Any, *inputs: Any, **named: Any) -> Entry:
    def make() -> Built:
        return model(), (named and {k: v() for k, v in named.items()}) or tuple(i() for i in inputs)

    return Entry(f"plain/{name}", _GROUP, make)


def _rows(*shape: int) -> Any:
    return lambda: torch.randn(*shape)


ENTRIES: tuple[Entry, ...] = (
    _entry("functional", Functional, _rows(2, 6, 12)),
    _entry("parametrizations", _parametrized, _rows(4, 8)),
    _entry("vocoder", _vocoder, _rows(2, 4, 12)),
    _entry("hooks", Hooked, _rows(4, 8)),
    _entry("nested containers", Nested, _rows(4, 8)),
    _entry("shared modules", SharedLayers, _rows(4, 8)),
    _entry("named tuple", TwoHeads, _rows(4, 8)),
    _entry("keyword-only", KeywordOnly, query=_rows(4, 8), context=_rows(4, 6)),
    _entry("control flow on data", Branching, _rows(4, 8)),
    _entry("MultiheadAttention", Attention, _rows(2, 5, 16), _rows(2, 4, 12), _rows(2, 4, 10)),
    _entry("TransformerEncoder", Classifier, ids),
    Entry("plain/Transformer", _GROUP, _transformer),
    _entry("einsum attention", RawAttention, _rows(2, 5, 16)),
    _entry("U-Net", UNet, lambda: images(16)),
    _entry("tied decoder", TiedDecoder, ids),
    _entry("experts by bmm", BatchedExperts, _rows(2, 5, 8)),
    _entry("experts by index", IndexedExperts, _rows(2, 5, 8)),
    _entry("LSTM", Recurrent, ids),
    _entry("Bilinear", Bilinear, _rows(3, 8), _rows(3, 8)),
)
