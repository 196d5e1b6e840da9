"""The models of the zoo, from plain PyTorch and from libraries, with weights that make every layer matter.

Libraries start some layers at zero and scale others for widths in the thousands. At a width of 16 their
outputs would hardly depend on the input, and training or merging could not be judged.
"""

from __future__ import annotations

import functools
import importlib
import math
import tomllib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from lora_fx import torch_private

__all__ = ["PLAIN_MODELS", "Built", "Entry", "Inputs", "call", "ids", "images", "library_models"]

Inputs: TypeAlias = "dict[str, Any] | tuple[Any, ...]"
"""Keyword or positional arguments of one call."""

Built: TypeAlias = "tuple[nn.Module, Inputs]"

_SEED = 1234
_SMALL_SCALE = 0.1  # a constant scale (LayerScale) below this hides its branch
_VARIATION = 0.2  # relative variation of the values that replace a constant


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: Unique name, which ``--only`` matches.
        group: The table that lists it.
        make: Makes the model and the arguments of one call, at a small size.
        loss: Loss of the output; by default the distance of every floating-point tensor from fixed random
            numbers.
        targets: Modules to adapt; by default every linear operation but the head.
        note: Expected peculiarity of this model; shown in the table.
        wide: Makes the model twice as wide, so that its attention heads fit the operators of runtimes. None
            keeps the width.
    """

    name: str
    group: str
    make: Callable[[], Built]
    loss: Callable[[Any], torch.Tensor] | None = None
    targets: tuple[str, ...] | None = None
    note: str = ""
    wide: Callable[[], Built] | None = None

    def build(self, *, wide: bool = False) -> Built:
        """Return the model in eval mode and its inputs, with the same numbers every time.

        Args:
            wide: True for twice the width, if the entry supports it.
        """
        make = self.wide if wide and self.wide is not None else self.make
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model, inputs = make()
            _scale_up(wake(model))
            _settle_statistics(model, inputs)
        return model.eval(), inputs


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model with keyword arguments if the inputs are a mapping, or else with positional ones."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def ids(vocabulary: int = 40, length: int = 6, batch: int = 2) -> torch.Tensor:
    """Return token ids [batch, length] without the special ones, which are below 3."""
    return torch.randint(3, vocabulary, (batch, length))


def images(size: int = 32, channels: int = 3) -> torch.Tensor:
    """Return random images [batch, channels, size, size]."""
    return torch.randn(2, channels, size, size)


def wake(model: nn.Module) -> nn.Module:
    """Replace constant or tiny parameters by random values of usual size, in place.

    Layer scales, the last norm of a residual branch, heads and gates start at zero or near it. An adapter
    whose output is multiplied by zero has no effect. If a rewrite dropped a bias of zeros, or a norm's gain
    of ones, no test would notice it.

    Returns:
        The model.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.numel() == 1:
                parameter.copy_(torch.where(parameter == 0.0, 0.5, parameter))
            elif float(parameter.min()) == float(parameter.max()):
                _vary(parameter, name.rpartition(".")[2])
            elif parameter.dim() == 1 and "bias" not in name:
                largest = float(parameter.abs().max())
                parameter.mul_(0.5 / largest if largest < _SMALL_SCALE else 1.0)
    return model


def _scale_up(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point() and parameter.numel() > 1:
                wanted, spread = _usual_spread(parameter), float(parameter.std())
                parameter.mul_(wanted / spread if 0.0 < spread < wanted / 2 else 1.0)


def _usual_spread(parameter: nn.Parameter) -> float:
    return 1 / math.sqrt(max(1, parameter.numel() // parameter.shape[0]))


def _vary(parameter: nn.Parameter, name: str) -> None:
    """Draw values for a constant parameter: matrices and biases around zero, scales around their value."""
    value = float(parameter.flatten()[0])
    if value == 0.0 and "bias" in name:
        parameter.normal_(0.0, _VARIATION / 2)
    elif value == 0.0 and parameter.dim() > 1:
        parameter.normal_(0.0, _usual_spread(parameter))
    else:
        parameter.fill_(value if abs(value) >= _SMALL_SCALE else 0.5)
        parameter.mul_(1 + _VARIATION * torch.randn_like(parameter).clamp(-2, 2))


def _settle_statistics(model: nn.Module, inputs: Inputs) -> None:
    """Set the statistics of batch norm to the mean of their initial values and the statistics of the inputs.

    Two images of one pixel have almost no variance. Dividing by this variance alone would amplify rounding
    errors.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, torch_private.BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.5
    with torch.no_grad():
        call(model.train(), inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


# --- models of plain PyTorch ----------------------------------------------------------------------


class RawAttention(nn.Module):
    """Attention by einsum, with weights as parameters [width, heads, size] and [heads, size, width]."""

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
        """Run the model."""
        q, k, v = (torch.einsum("btw,whs->bhts", x, w) for w in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bhts,bhus->bhtu", q, k) / 2, -1)
        x = x + torch.einsum("bhts,hsw->btw", weights @ v, self.o)
        return x + torch.einsum(
            "btf,fw->btw", F.gelu(torch.einsum("btw,wf->btf", x, self.up)), self.down
        )


class UNet(nn.Module):
    """U-Net with strides down, transposed convolutions up, and a skip connection."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = _convolutions(3, width)
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.middle = _convolutions(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.last = _convolutions(2 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Any:
        """Run the model."""
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
    """A causal decoder with a tied head, which computes its positions in the forward."""

    def __init__(self, vocabulary: int = 40, width: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Any:
        """Run the model."""
        indices = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(indices)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return F.linear(x, self.tokens.weight)


class BatchedExperts(nn.Module):
    """Experts that all compute every token at once, mixed by a router."""

    def __init__(self, width: int = 8, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) / 3)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) / 4)

    def forward(self, x: Tensor) -> Any:
        """Run the model."""
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
        """Run the model."""
        rows = x.flatten(0, 1)
        share, choice = torch.softmax(self.router(rows), -1).max(-1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            chosen = torch.where(choice == index)[0]
            out = out.index_add(0, chosen, expert(rows[chosen]) * share[chosen, None])
        return (rows + out).view_as(x)


class Attention(nn.Module):
    """``nn.MultiheadAttention``, as self-attention and as cross-attention over another width."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(16, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, kdim=12, vdim=10, batch_first=True)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model."""
        x = x + self.own(x, x, x, need_weights=False)[0]
        y, weights = self.cross(x, key, value)
        return x + y, weights


class Classifier(nn.Module):
    """Classifier of tokens with torch's own encoder and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Any:
        """Run the model."""
        padding = tokens == 0
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=padding)[:, 0])


class Recurrent(nn.Module):
    """An LSTM, whose weights cannot be adapted, and a head of linear layers, which can."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(40, 12), nn.LSTM(12, 16, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, tokens: Tensor) -> Any:
        """Run the model."""
        return self.head(self.lstm(self.embed(tokens))[0])


class Bilinear(nn.Module):
    """``nn.Bilinear`` over two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)
        self.both = nn.Bilinear(6, 6, 5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        """Run the model."""
        return self.both(torch.tanh(self.left(x)), torch.tanh(self.right(y)))


_GROUP = "plain PyTorch"


class Functional(nn.Module):
    """Parameters and functions without any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(24, 12) / 4)
        self.b1 = nn.Parameter(torch.zeros(24))
        self.w2 = nn.Parameter(torch.randn(24, 6) / 5)
        self.kernel = nn.Parameter(torch.randn(12, 12, 3) / 6)

    def forward(self, x: Tensor) -> Any:
        """Run the model."""
        x = F.conv1d(x.transpose(1, 2), self.kernel, padding=1).transpose(1, 2)
        return F.gelu(F.linear(x, self.w1, self.b1)) @ self.w2


class Hooked(nn.Module):
    """Layers with a pre-hook that changes an input and a hook that changes an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.first.register_forward_pre_hook(_halve)
        self.second.register_forward_hook(_shift)

    def forward(self, x: Tensor) -> Any:
        """Run the model."""
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
        """Run the model."""
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
        """Run the model."""
        for _ in range(3):
            x = x + self.block(x)
        return self.head(torch.tanh(self.alias(x)))


class Scores(NamedTuple):
    """The two outputs of :class:`TwoHeads`, by name."""

    classes: Tensor
    value: Tensor


class TwoHeads(nn.Module):
    """Model that returns a NamedTuple of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.classes, self.value = nn.Linear(16, 5), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Scores:
        """Run the model."""
        x = F.silu(self.body(x))
        return Scores(self.classes(x), value=self.value(x))


class KeywordOnly(nn.Module):
    """Model with keyword-only arguments, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.context = nn.Linear(8, 16), nn.Linear(6, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, *, query: Tensor, context: Tensor | None = None) -> Any:
        """Run the model."""
        x = self.query(query)
        if context is not None:
            x = x * torch.sigmoid(self.context(context))
        return self.out(x)


class Branching(nn.Module):
    """Model that chooses its layer by the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.positive, self.negative = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        """Run the model."""
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


PLAIN_MODELS: tuple[Entry, ...] = (
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


# --- models of libraries --------------------------------------------------------------------------


Maker = Callable[[str, str, dict[str, Any]], Built]
"""Function of the name, the inputs and the options."""


def library_models(library: str) -> tuple[Entry, ...]:
    """Return the entries of a library, in the order of its file."""
    text = Path(__file__).with_name(f"{library}.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    shared, entries = tables.pop("options", {}), []
    for group, rows in tables.items():
        inputs = rows.pop("inputs")
        for name, row in rows.items():
            title, targets = f"{library}/{name}", row.pop("targets", None)
            fields = {"note": row.pop("note", ""), "targets": targets and tuple(targets)}
            if row:
                arguments = (row.pop("make"), row.pop("inputs", inputs))
                make: Callable[[], Built] = functools.partial(
                    _make, library, *arguments, row, shared
                )
                if library == "transformers":
                    fields["wide"] = functools.partial(_make, library, *arguments, row, shared, 2)
            else:
                make = ASSEMBLED[title]
            entries.append(Entry(title, group, make, **fields))
    return tuple(entries)


def _make(
    library: str, name: str, inputs: str, row: Any, shared: Mapping[str, Any], times: int = 1
) -> Built:
    return _MAKERS[library](name, inputs, _widened(_options(row, shared, library), times))


_WIDTHS = {
    *("hidden_size", "d_model", "dim", "head_dim", "d_head", "d_kv", "embed_dim", "embedding_dim"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank"),
    *("d_latents", "qk_channels", "v_channels", "lru_width", "attention_hidden_size"),
    *(
        "encoder_hidden_size",
        "cross_attention_hidden_size",
        "word_embed_proj_dim",
        "out_hidden_size",
    ),
    *("mamba_d_head", "linear_key_head_dim", "linear_value_head_dim", "mrope_section"),
    *("projection_dim", "rotary_dim", "embedding_size", "codebook_dim"),
}
"""Options that grow with the width of a model while its number of heads stays the same."""


def _widened(options: Any, times: int, name: str = "") -> Any:
    if isinstance(options, dict):
        return {key: _widened(value, times, key) for key, value in options.items()}
    if isinstance(options, list):
        return [_widened(value, times, name) for value in options]
    return options * times if type(options) is int and name in _WIDTHS else options


def _named(text: str) -> Any:
    """Import an object by a text ``module:name``."""
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


def _options(row: Any, shared: Mapping[str, Any], library: str) -> Any:
    """Turn the options of a model in a library's TOML file into Python values.

    Options that are shared by several models are inserted.
    """
    if isinstance(row, dict):
        options: dict[str, Any] = {}
        for name in row.get("with", ()):
            options |= _options(shared[name], shared, library)
        own = {name: value for name, value in row.items() if name != "with"}
        options |= {name: _options(value, shared, library) for name, value in own.items()}
        return options.pop("make")(**options) if "make" in options else options
    if isinstance(row, list):
        # timm and diffusers need tuples, the other libraries need lists.
        kind = tuple if library in ("timm", "diffusers") else list
        return kind(_options(value, shared, library) for value in row)
    if isinstance(row, str) and ":" in row:
        return _named(row)
    return None if row == "None" else row


def _of_transformers(name: str, inputs: str, options: dict[str, Any]) -> Built:
    kind = getattr(importlib.import_module("transformers"), name)
    config = kind.config_class(**options)
    # The inputs are drawn before the weights.
    arguments = inputs_of(inputs)
    return kind(config), arguments


def _of_diffusers(name: str, inputs: str, options: dict[str, Any]) -> Built:
    arguments: Any = inputs_of(inputs)
    model = getattr(importlib.import_module("diffusers"), name)(**options)
    return model, {**arguments, "return_dict": False}


def _of_timm(name: str, inputs: str, options: dict[str, Any]) -> Built:
    timm = importlib.import_module("timm")
    module, _, class_name = name.partition(".")
    if class_name:
        kind = getattr(importlib.import_module(f"timm.models.{module}"), class_name)
        return kind(num_classes=5, **options), inputs_of(inputs)
    return timm.create_model(name, pretrained=False, num_classes=5, **options), inputs_of(inputs)


def _of_torchvision(name: str, inputs: str, options: dict[str, Any]) -> Built:
    if ":" in name:
        return _named(name)(**options), inputs_of(inputs)
    models = importlib.import_module("torchvision.models")
    options = {"num_classes": 5, **options}
    if name in vars(models) and isinstance(getattr(models, name), type):
        return getattr(models, name)(**options), inputs_of(inputs)
    return models.get_model(name, weights=None, **options), inputs_of(inputs)


_MAKERS: Mapping[str, Maker] = {
    "transformers": _of_transformers,
    "diffusers": _of_diffusers,
    "timm": _of_timm,
    "torchvision": _of_torchvision,
}


_PATCH = 5  # the token of a patch


def inputs_of(words: str) -> Inputs:
    """Build the inputs of a model from a short description.

    Args:
        words: The description: a name, and sizes after it. The name is an entry in ``inputs.toml``, or a kind
            of inputs or of tensor in this module.
    """
    name, _, numbers = words.partition(" ")
    if name in _ASSEMBLED_INPUTS:
        return _ASSEMBLED_INPUTS[name](*map(int, numbers.split()))
    table = _inputs()
    return _drawn(table[name], numbers) if name in table else (_drawn(words, ""),)


@functools.cache
def _inputs() -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_name("inputs.toml").read_text(encoding="utf-8"))


def _drawn(value: Any, numbers: str) -> Any:
    if isinstance(value, dict):
        return {name: _drawn(entry, numbers) for name, entry in value.items()}
    if isinstance(value, list):
        return torch.tensor(value)
    if not isinstance(value, str):
        return value
    name, *shape = value.format(numbers).split()
    return None if name == "None" else _TENSORS[name](*map(int, shape))


_TENSORS: Mapping[str, Callable[..., torch.Tensor]] = {
    "ids": lambda length: ids(length=length),
    "bytes": lambda length: torch.randint(0, 40, (2, length)),
    "images": images,
    "random": lambda *shape: torch.randn(2, *shape),
    "places": lambda *shape: torch.randint(0, 4, shape).float(),
    "zeros": torch.zeros,
}


def _text() -> dict[str, Any]:
    """Return token ids and a mask, in which the second row is padded."""
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _image_tokens(patches: int) -> dict[str, Any]:
    tokens = ids(length=8) + 1
    tokens = torch.where(tokens == _PATCH, _PATCH + 4, tokens).clamp(max=39)
    tokens[:, 1 : 1 + patches] = _PATCH
    mask = torch.ones_like(tokens)
    arguments = {"input_ids": tokens, "attention_mask": mask, "pixel_values": images(16)}
    return {**arguments, "use_cache": False}


def _prompted_image() -> dict[str, Any]:
    # As the processor of the model sets them: 0 for the prompt, 1 for the expected answer. Without them and
    # without padding, the attention of the model under SDPA differs (docs/internals/export.md, Parity).
    kinds = (torch.arange(8) > 5).long().expand(2, 8).contiguous()
    return {**_image_tokens(4), "token_type_ids": kinds}


def _listed_image() -> dict[str, Any]:
    arguments = _image_tokens(1)
    return {**arguments, "pixel_values": arguments["pixel_values"][:, None]}


def _image_grid() -> dict[str, Any]:
    arguments = _image_tokens(4)
    del arguments["pixel_values"]
    arguments["input_ids"][:, 0] = 6
    arguments["input_ids"][:, 1:5] = _PATCH
    arguments["mm_token_type_ids"] = (arguments["input_ids"] == _PATCH).int()
    # Two images of 4 x 4 patches, each patch 3 colors x 2 frames x 4 x 4 pixels.
    arguments["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4)
    arguments["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return arguments


_ASSEMBLED_INPUTS: Mapping[str, Callable[..., Inputs]] = {
    "text": _text,
    "tokens": lambda: {**_text(), "use_cache": False},
    "image_tokens": _image_tokens,
    "prompted_image": _prompted_image,
    "listed_image": _listed_image,
    "image_grid": _image_grid,
}


def _vgg() -> Built:
    from torchvision.models.vgg import VGG, make_layers

    layers = make_layers([16, "M", 32, "M", 64, 64, "M", 512, "M"], batch_norm=True)
    model = VGG(layers, num_classes=5, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0] = nn.Linear(512, 4096)
    return model, (images(32),)


def _s3d() -> Built:
    from torchvision.models.video import s3d

    model = s3d(num_classes=5)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # its own pooling needs 224 pixels
    return model, (torch.randn(2, 3, 16, 32, 32),)


def _mvit() -> Built:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def block(channels: int, outputs: int, heads: int, stride: int) -> MSBlockConfig:
        q, kv = [1, stride, stride], [1, 2, 2]
        return MSBlockConfig(heads, channels, outputs, [3, 3, 3], [3, 3, 3], q, kv)

    model = MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=[block(16, 16, 1, 1), block(16, 32, 2, 2)],
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=5,
    )
    return model, (torch.randn(2, 3, 4, 32, 32),)


def _retina_head() -> Built:
    from torchvision.models.detection.retinanet import RetinaNetHead

    class OnFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = RetinaNetHead(16, 3, 4)

        def forward(self, large: torch.Tensor, small: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs: dict[str, torch.Tensor] = self.head([large, small])
            return OrderedDict(outputs)

    return OnFeatures(), (images(8, 16), images(4, 16))


ASSEMBLED: Mapping[str, Callable[[], Built]] = {
    "torchvision/vgg": _vgg,
    "torchvision/s3d": _s3d,
    "torchvision/mvit": _mvit,
    "torchvision/RetinaNet head": _retina_head,
}
"""Builders of models that a table cannot describe, by the name of the entry."""
