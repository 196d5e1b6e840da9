"""The models that tests run on: every form of a linear operation, and tiny models of libraries.

Each builder seeds the generator, so that a model is the same whoever builds it and when.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.tools.zoo.models import wake
from tests.views import EXPERTS, VIEWS

__all__ = [
    "FORMS",
    "TIMM",
    "TORCHVISION",
    "TRANSFORMERS",
    "Block",
    "Form",
    "Lists",
    "LlamaShapes",
    "Mlp",
    "Residual",
    "Shared",
    "Tied",
    "forms",
    "sample",
    "seeded",
    "tiny_classifier",
]

P = ParamSpec("P")
T = TypeVar("T")
Kind = Literal[
    "out_in", "in_out", "conv", "embedding", "conv transposed", "experts", "experts in_out"
]


def seeded(build: Callable[P, T]) -> Callable[P, T]:
    """A builder that draws the same numbers each time, and leaves the generator as it was."""

    @functools.wraps(build)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            return build(*args, **kwargs)

    return wrapped


@seeded
def sample(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, dtype=dtype)


# --- one operation each --------------------------------------------------------------------------


class AffineSubclass(nn.Linear):
    """A subclass with a forward of its own that is affine in the input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  as in nn.Linear
        return F.linear(input, self.weight, self.bias) * 2.0


class Own(nn.Module):
    """Parameters of its own, [rows, columns], and an optional bias."""

    def __init__(self, rows: int, columns: int, bias: int = 0) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(rows, columns) / 4)
        self.shift = nn.Parameter(torch.randn(bias)) if bias else None


class FunctionalLinear(Own):
    def forward(self, x):
        return F.linear(x, self.kernel, self.shift)


class MatmulOperator(Own):
    def forward(self, x):
        return x @ self.kernel


class MatmulTransposed(Own):
    def forward(self, x):
        return x @ self.kernel.T


class MatmulTwiceTransposed(Own):
    def forward(self, x):
        return torch.matmul(x, self.kernel.t().transpose(-1, -2))


class MatmulPermuted(Own):
    def forward(self, x):
        return x.matmul(self.kernel.permute(1, 0))


class WeightOnTheLeft(Own):
    def forward(self, x):
        return self.kernel @ x


class WeightOnTheLeftTransposed(Own):
    def forward(self, x):
        return torch.matmul(self.kernel.mT, x)


class Mm(Own):
    def forward(self, x):
        return torch.mm(x, self.kernel)


class MmByKeyword(Own):
    def forward(self, x):
        return torch.mm(x, mat2=self.kernel)


class MmMethod(Own):
    def forward(self, x):
        return x.mm(self.kernel)


class Addmm(Own):
    def forward(self, x):
        return torch.addmm(self.shift, x, self.kernel)


class AddmmTransposed(Own):
    def forward(self, x):
        return torch.addmm(self.shift, x, self.kernel.t())


class AddmmOnTheLeft(Own):
    def forward(self, x):
        return torch.addmm(x[:1, :1], self.kernel, x)


class Einsum(Own):
    """An equation over `x` and the kernel, in this order or the other."""

    def __init__(self, equation: str, *shape: int, first: bool = False) -> None:
        super().__init__(*shape)
        self.equation, self.first = equation, first

    def forward(self, x):
        operands = (self.kernel, x) if self.first else (x, self.kernel)
        return torch.einsum(self.equation, *operands)


class Lists(nn.Module):
    """Parameters in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(nn.Parameter(torch.randn(5, 5) / 2) for _ in range(2))
        self.named = nn.ParameterDict({"last": nn.Parameter(torch.randn(5, 3) / 2)})

    def forward(self, x):
        for kernel in self.kernels:
            x = torch.tanh(x @ kernel)
        return x @ self.named["last"]


class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, 3) / 4)

    def forward(self, x):
        return F.conv1d(x, self.kernel, padding=1)


class FunctionalEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 6))

    def forward(self, ids):
        return F.embedding(ids, self.table, padding_idx=-1) * 3.0


def hf_conv1d(out_features: int, in_features: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(layer.bias)
    return layer


class Around(nn.Module):
    """An operation with something that is not linear on both sides."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x):
        return torch.tanh(self.op(x))


@dataclass(frozen=True)
class Form:
    """One way of writing a linear operation.

    Attributes:
        name: Names the test.
        build: Makes the operation.
        inputs: Makes its input.
        weight: The weight's name in the operation.
        kind: How ΔW = B A lies in the weight.
        pattern: What finds it.
        groups: Of a convolution.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    weight: str
    kind: Kind
    pattern: str
    groups: int = 1

    @property
    def site(self) -> str:
        """The site's name in `model()`."""
        return "op" if self.weight == "weight" else f"op.{self.weight}"

    def model(self) -> nn.Module:
        """A model with the operation as its child `op`."""
        return seeded(lambda: Around(self.build()))()

    def x(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An input."""
        value = seeded(self.inputs)()
        return value.to(dtype) if value.is_floating_point() else value

    def factors(self, model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of the rewritten `model()`."""
        owner = model.op if self.weight == "weight" else getattr(model.op, f"{self.weight}_lora")
        prefix = "lora_embedding_" if self.kind == "embedding" else "lora_"
        a, b = (getattr(owner, prefix + letter).default for letter in "AB")
        return a, b

    def delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """B A in the weight's layout, by the textbook and not by lora_fx."""
        if self.kind == "conv transposed":
            parts = zip(b.chunk(self.groups), a.chunk(self.groups), strict=True)
            return torch.cat(
                [torch.einsum("or,ri...->io...", up.flatten(1), down) for up, down in parts]
            )
        if self.kind.startswith("experts"):
            return torch.einsum("eor,eri->eoi" if self.kind == "experts" else "eor,eri->eio", b, a)
        if self.kind != "conv":
            product = torch.einsum("or,ri->oi", b, a)
            return product if self.kind == "out_in" else product.transpose(0, 1)
        per_group = [
            torch.einsum("or,ri...->oi...", up.flatten(1), down)
            for up, down in zip(b.chunk(self.groups), a.chunk(self.groups), strict=True)
        ]
        return torch.cat(per_group)


def _conv(name: str, build: Callable[[], nn.Module], *shape: int, groups: int = 1) -> Form:
    dims = len(shape) - 2
    inputs = functools.partial(torch.randn, *shape)
    return Form(name, build, inputs, "weight", "conv", f"conv{dims}d", groups)


def _ids() -> torch.Tensor:
    # Index 2 and 10 are padding in some forms: they must occur, and more than once.
    return torch.tensor([[0, 2, 5, 10], [2, 2, 9, 10]])


def _rows(*shape: int) -> Callable[[], torch.Tensor]:
    return functools.partial(torch.randn, *shape)


FORMS: tuple[Form, ...] = (
    Form("nn.Linear", lambda: nn.Linear(5, 7), _rows(2, 3, 5), "weight", "out_in", "linear"),
    Form("vector", lambda: nn.Linear(5, 7), _rows(5), "weight", "out_in", "linear"),
    Form("no bias", lambda: nn.Linear(5, 7, False), _rows(3, 5), "weight", "out_in", "linear"),
    Form(
        "affine subclass", lambda: AffineSubclass(5, 7), _rows(3, 5), "weight", "out_in", "linear"
    ),
    Form("F.linear", lambda: FunctionalLinear(7, 5, 7), _rows(3, 5), "kernel", "out_in", "linear"),
    Form("x @ W", lambda: MatmulOperator(5, 7), _rows(2, 3, 5), "kernel", "in_out", "matmul"),
    Form("x @ W, vector", lambda: MatmulOperator(5, 7), _rows(5), "kernel", "in_out", "matmul"),
    Form("x @ W.T", lambda: MatmulTransposed(7, 5), _rows(3, 5), "kernel", "out_in", "matmul"),
    Form(
        "W.t().mT", lambda: MatmulTwiceTransposed(5, 7), _rows(3, 5), "kernel", "in_out", "matmul"
    ),
    Form("permute", lambda: MatmulPermuted(7, 5), _rows(3, 5), "kernel", "out_in", "matmul"),
    Form("W @ x", lambda: WeightOnTheLeft(7, 5), _rows(2, 5, 3), "kernel", "out_in", "matmul"),
    Form("W @ x, vector", lambda: WeightOnTheLeft(7, 5), _rows(5), "kernel", "out_in", "matmul"),
    Form(
        "W.mT @ x",
        lambda: WeightOnTheLeftTransposed(5, 7),
        _rows(5, 3),
        "kernel",
        "in_out",
        "matmul",
    ),
    Form("mm", lambda: Mm(5, 7), _rows(3, 5), "kernel", "in_out", "matmul"),
    Form("mm by keyword", lambda: MmByKeyword(5, 7), _rows(3, 5), "kernel", "in_out", "matmul"),
    Form("Tensor.mm", lambda: MmMethod(5, 7), _rows(3, 5), "kernel", "in_out", "matmul"),
    Form("addmm", lambda: Addmm(5, 7, 7), _rows(3, 5), "kernel", "in_out", "matmul"),
    Form(
        "addmm, W.t()", lambda: AddmmTransposed(7, 5, 7), _rows(3, 5), "kernel", "out_in", "matmul"
    ),
    Form("addmm, left", lambda: AddmmOnTheLeft(7, 5), _rows(5, 3), "kernel", "out_in", "matmul"),
    Form("HF Conv1D", lambda: hf_conv1d(7, 5), _rows(2, 3, 5), "weight", "in_out", "matmul"),
    *(
        Form(
            f"einsum {equation}",
            lambda equation=equation, shape=shape, first=first: Einsum(
                equation, *shape, first=first
            ),
            _rows(*x),
            "kernel",
            kind,
            "einsum",
        )
        for equation, shape, x, kind, first in (
            ("bsi,oi->bso", (7, 5), (2, 3, 5), "out_in", False),
            ("bi, io -> bo", (5, 7), (3, 5), "in_out", False),
            ("...i,oi->...o", (7, 5), (2, 3, 5), "out_in", False),
            ("oi,bin->bon", (7, 5), (2, 5, 3), "out_in", True),
            ("bins,oi->nobs", (7, 5), (2, 5, 3, 4), "out_in", False),
            ("bi,io", (5, 7), (3, 5), "in_out", False),
        )
    ),
    *(
        Form(name, build, _rows(*x), "kernel", kind, pattern)
        for name, build, x, kind, pattern in EXPERTS
    ),
    *(
        Form(name, build, _rows(*x), "kernel", kind, pattern)
        for name, build, x, kind, pattern in VIEWS
    ),
    _conv("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), 2, 4, 9),
    _conv("conv1d unbatched", lambda: nn.Conv1d(4, 6, 3), 4, 9),
    _conv("conv1d same", lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), 2, 4, 11),
    _conv("conv1d groups", lambda: nn.Conv1d(4, 6, 3, groups=2), 2, 4, 9, groups=2),
    Form("F.conv1d", FunctionalConv, _rows(2, 4, 9), "kernel", "conv", "conv1d"),
    _conv("conv2d", lambda: nn.Conv2d(4, 6, 3), 2, 4, 7, 8),
    _conv("conv2d stride", lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0)), 2, 4, 7, 8),
    _conv("conv2d dilation", lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), 2, 4, 7, 8),
    _conv("conv2d depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), 2, 4, 7, 8, groups=4),
    _conv("conv2d valid", lambda: nn.Conv2d(4, 6, 3, padding="valid"), 2, 4, 7, 8),
    _conv("conv2d same", lambda: nn.Conv2d(4, 6, 3, padding="same"), 2, 4, 7, 8),
    *(
        _conv(f"conv2d {m}", lambda m=m: nn.Conv2d(4, 6, 3, padding=1, padding_mode=m), 2, 4, 7, 8)
        for m in ("circular", "reflect", "replicate")
    ),
    _conv(
        "conv2d same circular groups",
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", groups=2),
        2,
        4,
        7,
        8,
        groups=2,
    ),
    _conv("conv2d 1x1", lambda: nn.Conv2d(4, 6, 1), 2, 4, 5, 5),
    _conv("conv3d", lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), 2, 2, 3, 4, 5),
    _conv(
        "conv3d groups", lambda: nn.Conv3d(4, 4, 2, groups=4, bias=False), 1, 4, 3, 3, 3, groups=4
    ),
    *(
        Form(
            name,
            build,
            _rows(*x),
            "weight",
            "conv transposed",
            f"conv-transpose{len(x) - 2}d",
            groups,
        )
        for name, build, x, groups in (
            ("conv_transpose1d", lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 7), 1),
            (
                "conv_transpose2d",
                lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), 1, (1, 0), dilation=(2, 1)),
                (2, 4, 5, 6),
                1,
            ),
            (
                "conv_transpose3d",
                lambda: nn.ConvTranspose3d(2, 4, 2, bias=False),
                (1, 2, 3, 3, 3),
                1,
            ),
            (
                "conv_transpose1d groups",
                lambda: nn.ConvTranspose1d(4, 6, 3, 2, groups=2),
                (2, 4, 7),
                2,
            ),
            (
                "conv_transpose2d groups",
                lambda: nn.ConvTranspose2d(6, 9, (3, 2), (2, 1), 1, (1, 0), 3, dilation=(2, 1)),
                (2, 6, 5, 6),
                3,
            ),
            (
                "conv_transpose2d depthwise",
                lambda: nn.ConvTranspose2d(4, 8, 3, groups=4, bias=False),
                (2, 4, 5, 6),
                4,
            ),
            (
                "conv_transpose3d groups",
                lambda: nn.ConvTranspose3d(4, 2, 2, 3, 0, (0, 1, 2), 2),
                (1, 4, 2, 3, 3),
                2,
            ),
        )
    ),
    Form("nn.Embedding", lambda: nn.Embedding(11, 6), _ids, "weight", "embedding", "embedding"),
    Form(
        "padding_idx",
        lambda: nn.Embedding(11, 6, padding_idx=2),
        _ids,
        "weight",
        "embedding",
        "embedding",
    ),
    Form(
        "scale_grad_by_freq",
        lambda: nn.Embedding(11, 6, scale_grad_by_freq=True),
        _ids,
        "weight",
        "embedding",
        "embedding",
    ),
    Form("F.embedding", FunctionalEmbedding, _ids, "table", "embedding", "embedding"),
)


def forms(*patterns: str) -> list[Any]:
    """The forms that these patterns find, as parameters of a test."""
    import pytest

    return [pytest.param(form, id=form.name) for form in FORMS if form.pattern in patterns]


# --- several operations ---------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of two linear layers with dropout."""

    def __init__(self, width: int = 6, hidden: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(self.dropout(F.gelu(self.up(self.norm(x)))))


class Residual(nn.Module):
    """Embedding, blocks, head: the shape of most models."""

    def __init__(self, blocks: int = 2, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width, dropout=dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Mlp(nn.Module):
    """Two linear layers and batch norm between them."""

    def __init__(self, sizes: tuple[int, int, int] = (5, 8, 3)) -> None:
        super().__init__()
        self.first = nn.Linear(sizes[0], sizes[1])
        self.norm = nn.BatchNorm1d(sizes[1])
        self.second = nn.Linear(sizes[1], sizes[2])

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


class Shared(nn.Module):
    """One layer called twice, and under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.again = self.layer
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.layer(x)))))


class Tied(nn.Module):
    """An embedding and a head over one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))


class LlamaShapes(nn.Module):
    """The linear layers of Llama-7B, on the meta device: 32 blocks of width 4096."""

    def __init__(self, blocks: int = 32, width: int = 4096, hidden: int = 11008) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(_llama_block(width, hidden) for _ in range(blocks))
            self.lm_head = nn.Linear(width, 32000, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer["down"](
                layer["gate"](layer["o"](layer["q"](x) + layer["k"](x) + layer["v"](x)))
            )
        return self.lm_head(x)


def _llama_block(width: int, hidden: int) -> nn.ModuleDict:
    layers = {name: nn.Linear(width, width, bias=False) for name in "qkvo"}
    layers["gate"] = nn.Linear(width, hidden, bias=False)
    layers["down"] = nn.Linear(hidden, width, bias=False)
    return nn.ModuleDict(layers)


# --- models of libraries --------------------------------------------------------------------------

Inputs = dict[str, torch.Tensor]


def _ids_of(vocabulary: int, length: int = 6) -> torch.Tensor:
    return torch.randint(3, vocabulary, (2, length))


@seeded
def tiny_llama(**changes: Any) -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            **changes,
        }
    )
    return wake(LlamaForCausalLM(config)).eval(), {"input_ids": _ids_of(40)}


@seeded
def tiny_gpt2(**changes: Any) -> tuple[nn.Module, Inputs]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **{
            "vocab_size": 40,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    return wake(GPT2LMHeadModel(config)).eval(), {"input_ids": _ids_of(40)}


@seeded
def tiny_bert(**changes: Any) -> tuple[nn.Module, Inputs]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "num_labels": 3,
            **changes,
        }
    )
    ids = _ids_of(40)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return wake(BertForSequenceClassification(config)).eval(), {
        "input_ids": ids,
        "attention_mask": mask,
    }


@seeded
def tiny_classifier() -> Any:
    """A RoBERTa whose head is a module of several layers, with three classes."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    return RobertaForSequenceClassification(config).eval()


@seeded
def tiny_t5(**changes: Any) -> tuple[nn.Module, Inputs]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        **{
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            **changes,
        }
    )
    inputs = {"input_ids": _ids_of(40), "decoder_input_ids": _ids_of(40, 4)}
    return wake(T5ForConditionalGeneration(config)).eval(), inputs


@seeded
def tiny_whisper(**changes: Any) -> tuple[nn.Module, Inputs]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **{
            "vocab_size": 40,
            "num_mel_bins": 8,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_source_positions": 10,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
            **changes,
        }
    )
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": _ids_of(40, 4)}
    return wake(WhisperForConditionalGeneration(config)).eval(), inputs


@seeded
def tiny_vit(**changes: Any) -> tuple[nn.Module, Inputs]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        **{
            "image_size": 16,
            "patch_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "num_labels": 3,
            **changes,
        }
    )
    return wake(ViTForImageClassification(config)).eval(), {
        "pixel_values": torch.randn(2, 3, 16, 16)
    }


@seeded
def tiny_clip() -> tuple[nn.Module, Inputs]:
    from transformers import CLIPConfig, CLIPModel

    sides = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    text = {**sides, **ends, "vocab_size": 40, "max_position_embeddings": 16}
    vision = {**sides, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    inputs = {"input_ids": _ids_of(40), "pixel_values": torch.randn(2, 3, 16, 16)}
    return wake(CLIPModel(config)).eval(), inputs


@seeded
def tiny_mixtral(**changes: Any) -> tuple[nn.Module, Inputs]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "max_position_embeddings": 32,
            **changes,
        }
    )
    return wake(MixtralForCausalLM(config)).eval(), {"input_ids": _ids_of(40)}


TRANSFORMERS: Mapping[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "t5": tiny_t5,
    "whisper": tiny_whisper,
    "vit": tiny_vit,
    "clip": tiny_clip,
    "mixtral": tiny_mixtral,
}


@seeded
def timm_model(name: str, size: int = 64, **options: Any) -> tuple[nn.Module, torch.Tensor]:
    import timm

    model = wake(timm.create_model(name, pretrained=False, num_classes=5, **options))
    return model.eval(), torch.randn(2, 3, size, size)


@seeded
def torchvision_model(name: str, size: int = 64, **options: Any) -> tuple[nn.Module, torch.Tensor]:
    import torchvision

    model = wake(torchvision.models.get_model(name, weights=None, num_classes=5, **options))
    return model.eval(), torch.randn(2, 3, size, size)


@seeded
def torchvision_swin(
    version: int = 1, size: int = 48, **options: Any
) -> tuple[nn.Module, torch.Tensor]:
    """A small Swin transformer: shifted windows, padding, and biases that are not zero."""
    from torchvision.models import swin_transformer as swin

    parts = (swin.SwinTransformerBlock, swin.PatchMerging)
    if version == 2:
        parts = (swin.SwinTransformerBlockV2, swin.PatchMergingV2)
    model = swin.SwinTransformer(
        **{
            "patch_size": [4, 4],
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": [5, 3],
            "num_classes": 5,
            "block": parts[0],
            "downsample_layer": parts[1],
            **options,
        }
    )
    return wake(model).eval(), torch.randn(2, 3, size, size)


@seeded
def torchvision_swin3d(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    model = SwinTransformer3d(
        **{
            "patch_size": [2, 4, 4],
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": [4, 3, 3],
            "num_classes": 5,
            **options,
        }
    )
    return wake(model).eval(), torch.randn(1, 3, 10, 32, 32)


TIMM: Mapping[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "resnet": functools.partial(timm_model, "resnet18"),
    "vit": functools.partial(
        timm_model, "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=2
    ),
    "convnext": functools.partial(timm_model, "convnext_atto", depths=(1, 1, 1, 1)),
    "efficientnet": functools.partial(timm_model, "efficientnet_lite0"),
    "mixer": functools.partial(timm_model, "mixer_s32_224", img_size=64),
    "swin": functools.partial(
        timm_model,
        "swin_tiny_patch4_window7_224",
        56,
        img_size=56,
        depths=(2, 1),  # the second layer of a stage shifts its windows
        num_heads=(2, 4),
        embed_dim=16,
    ),
}

TORCHVISION: Mapping[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "resnet18": functools.partial(torchvision_model, "resnet18"),
    "vit_b_16": functools.partial(torchvision_model, "vit_b_16", 32, image_size=32),
    "swin": torchvision_swin,
    "swin_v2": functools.partial(torchvision_swin, 2, stochastic_depth_prob=0.0),
    "swin3d": torchvision_swin3d,
}
