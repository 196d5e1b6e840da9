"""Every kind of layer against every field of the configuration, PEFT to lora_fx and back.

For each row: what PEFT saves with random numbers loads here and gives PEFT's output, gradients of the factors
and merged weights; what is saved here loads in PEFT with no key missing or unexpected, and gives the same
output. What PEFT computes wrongly is compared with the exact sum instead (``WRONG``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from tests.lora_fx.test_checkpoint import adapted, in_peft, read_by_peft
from tests.lora_fx.test_checkpoint_joined import Fused
from tests.numerics import assert_close, relative_error
from tests.zoo import sample, seeded

PREFIX = "base_model.model."


class Layers(nn.Module):
    """Two layers under a list, so that indices and filters have something to select."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(build()), Layer(build())])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    """``one`` is the layer of the kind, ``two`` a linear one."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.sub = nn.ModuleDict({"one": one, "two": nn.Linear(6, 6)})

    def forward(self, x):
        return self.sub["two"](torch.tanh(self.sub["one"](x))) + x


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.layers = nn.ModuleList([Layer(nn.Linear(6, 6)), Layer(nn.Linear(6, 6))])

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Convolved(nn.Module):
    """A convolution over [batch, 6, ...] as a layer over [batch, 6]."""

    def __init__(self, dims: int, **options: Any) -> None:
        super().__init__()
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv = cls(6, 6, 3, padding=1, **options)
        self.dims = dims

    def forward(self, x):
        wide = torch.stack([x, x * x, -x], -1)[(...,) + (None,) * (self.dims - 1)]
        return self.conv(wide).flatten(2).mean(-1)


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = x[None]
        return self.attn(x, x.flip(1), x, need_weights=False)[0][0]


class Matrix(nn.Module):
    """Parameters [out, in] and [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(8, 6) / 3)
        self.down = nn.Parameter(torch.randn(8, 6) / 3)

    def forward(self, x):
        return torch.tanh(x @ self.up.T) @ self.down


class Bank(nn.Module):
    """Experts, all of which see everything."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(3, 6, 6) / 3)

    def forward(self, x):
        return torch.bmm(x.expand(3, -1, -1), self.bank.mT).sum(0)


Kind = tuple[Callable[[], nn.Module], torch.Tensor, dict[str, Any]]
X = sample(5, 6)
IDS = torch.tensor([[0, 3, 8], [3, 3, 1]])
KINDS: dict[str, Kind] = {
    "linear": (lambda: Layers(lambda: nn.Linear(6, 6)), X, {"target_modules": ["one", "two"]}),
    "conv1d": (lambda: Layers(lambda: Convolved(1)), X, {"target_modules": ["conv", "two"]}),
    "conv2d": (lambda: Layers(lambda: Convolved(2)), X, {"target_modules": ["conv", "two"]}),
    "conv3d": (lambda: Layers(lambda: Convolved(3)), X, {"target_modules": ["conv", "two"]}),
    "embedding": (Words, IDS, {"target_modules": ["table", "one", "two"]}),
    "Conv1D": (
        lambda: Layers(lambda: Conv1D(6, 6)),
        X,
        {"target_modules": ["one"], "fan_in_fan_out": True},
    ),
    "attention": (lambda: Layers(Attended), X, {"target_modules": ["attn", "two"]}),
    "parameters": (
        lambda: Layers(Matrix),
        X,
        {"target_modules": ["two"], "target_parameters": ["one.up", "one.down"]},
    ),
    "experts": (
        lambda: Layers(Bank),
        X,
        {"target_modules": ["two"], "target_parameters": ["one.bank"]},
    ),
}
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank": {"r": 3},
    "alpha": {"r": 2, "lora_alpha": 5},
    "rank-stabilized": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "rank_pattern": {r"layers\.1\..*": 2, "two": 5},
        "alpha_pattern": {r"0\.sub\.two": 3, r"layers\.1\..*": 7},
    },
    "biases of targets": {"bias": "lora_only", "r": 2},
    "all biases": {"bias": "all", "r": 2},
    "excluded": {"exclude_modules": r".*layers\.0\.sub\.two"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": ["layers"]},
}
# Fields that PEFT has for some kinds only.
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "dora": (("linear", "conv1d", "conv2d", "conv3d", "embedding"), {"use_dora": True, "r": 2}),
    "bias of B": (("linear", "Conv1D"), {"lora_bias": True, "r": 2}),
}
ROWS = [(kind, field) for kind in KINDS for field in FIELDS]
ROWS += [(kind, variant) for variant, (kinds, _) in VARIANTS.items() for kind in kinds]

# What PEFT 0.21.2 computes wrongly: its result is compared with nothing, ours with the exact sum.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "circular": ({"padding_mode": "circular"}, "the branch of a convolution pads with zeros"),
    "reflect": ({"padding_mode": "reflect"}, "the branch of a convolution pads with zeros"),
    "dilated": ({"dilation": 2}, "the branch of a convolution is not dilated"),
    "grouped": ({"groups": 2}, "a grouped convolution has no merge"),
    # The product of out_proj counts twice, and once for the gradient: output and merge are compared with
    # PEFT's (a folder is read as PEFT computes it), the gradient beside out_proj is not.
    "attention": ({}, "the product of out_proj is added twice"),
}


def built(kind: str) -> tuple[nn.Module, torch.Tensor]:
    build, inputs, _ = KINDS[kind]
    return seeded(build)().eval(), inputs


def settings(kind: str, field: str) -> dict[str, Any]:
    more = FIELDS[field] if field in FIELDS else VARIANTS[field][1]
    return {**KINDS[kind][2], **more}


def output(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """With an input that wants a gradient: torch's fast path of attention leaves PEFT's adapters out."""
    if inputs.is_floating_point():
        inputs = inputs.clone().requires_grad_()
    return model.eval()(inputs)


def gradients(model: nn.Module, inputs: torch.Tensor) -> None:
    model.zero_grad()
    output(model, inputs).square().mean().backward()


def by_peft(model: Any) -> dict[str, torch.Tensor]:
    """PEFT's gradients by the keys of its checkpoint."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for one, other in zip(holder.parameters(), model.parameters(), strict=True):
            if other.grad is not None:
                one.copy_(other.grad)
    found: Mapping[str, torch.Tensor] = peft.get_peft_model_state_dict(holder)
    return {key: value for key, value in found.items() if "lora_" in key}


def by_us(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of a model by the names of its factors, joined ones as PEFT's sum over what it shares."""
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "lora_" in n}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "field"), ROWS, ids=[f"{k}-{f}" for k, f in ROWS])
def test_what_peft_saves(kind: str, field: str, tmp_path: Path) -> None:
    base, inputs = built(kind)
    theirs = in_peft(base, settings(kind, field))
    theirs.save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(base, tmp_path)
    expected = output(theirs, inputs)
    assert relative_error(expected, output(base, inputs)) > 1e-3, "the adapter does nothing"
    assert_close(output(ours, inputs), expected)

    gradients(theirs, inputs)
    gradients(ours, inputs)
    _compare_gradients(kind, ours, by_peft(theirs))

    merged, reference = lora_fx.merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == reference.keys()
    for name, value in merged.items():
        assert_close(value, reference[name])


def _compare_gradients(kind: str, ours: nn.Module, theirs: Mapping[str, torch.Tensor]) -> None:
    if kind == "attention":
        # q, k and v have an A each here; PEFT's one has the sum of their gradients.
        for name in ("layers.0.sub.one.attn", "layers.1.sub.one.attn"):
            if f"{PREFIX}{name}.lora_A.weight" not in theirs:
                continue
            own = by_us(ours)
            three = [own[f"{name}.{letter}_lora.lora_A.default"] for letter in "qkv"]
            assert_close(sum(three), theirs[f"{PREFIX}{name}.lora_A.weight"])
            rows = [own[f"{name}.{letter}_lora.lora_B.default"] for letter in "qkv"]
            assert_close(torch.cat(rows), theirs[f"{PREFIX}{name}.lora_B.weight"])
        return
    with torch.no_grad():
        kept = {n: p.detach().clone() for n, p in ours.named_parameters()}
        for parameter in ours.parameters():
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
        found = lora_fx.adapter_state_dict(ours)
        for name, parameter in ours.named_parameters():
            parameter.copy_(kept[name])
    for key, value in theirs.items():
        assert_close(found[key], value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "field"), ROWS, ids=[f"{k}-{f}" for k, f in ROWS])
def test_what_we_save(kind: str, field: str, tmp_path: Path) -> None:
    base, inputs = built(kind)
    model = adapted(base, **settings(kind, field))
    lora_fx.save_adapter(model, tmp_path)
    expected = output(model, inputs)
    assert relative_error(expected, output(base, inputs)) > 1e-3, "the adapter does nothing"
    assert_close(output(read_by_peft(base, tmp_path), inputs), expected)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_close(output(loaded, inputs), expected)
    assert_close(output(lora_fx.load_adapter(base, tmp_path), inputs), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, (options, _) in WRONG.items() if options])
@pytest.mark.parametrize("dims", [1, 2])
def test_what_peft_computes_wrongly(name: str, dims: int, tmp_path: Path) -> None:
    """A folder means the convolution with ``W + s·BA``, here in fp64."""
    options = WRONG[name][0]
    cls = (nn.Conv1d, nn.Conv2d)[dims - 1]
    base = seeded(lambda: nn.Sequential(cls(4, 6, 3, padding=2, **options)))()
    x = sample(2, 4, *(7,) * dims)
    model = adapted(base, target_modules=["0"], r=4)
    lora_fx.save_adapter(model, tmp_path)
    values = lora_fx.adapter_state_dict(model)
    a, b = (values[f"{PREFIX}0.lora_{letter}.weight"].double() for letter in "AB")
    exact = copy.deepcopy(base).double()
    groups = options.get("groups", 1)
    with torch.no_grad():
        delta = torch.einsum("or,ri...->oi...", _dense(b, groups), a) * 2
        exact[0].weight += _blocks(delta, groups)
    again = lora_fx.load_adapter(base, tmp_path)
    assert_close(output(again, x), exact(x.double()))
    assert_close(lora_fx.merge(again)(x), exact(x.double()))


def _dense(b: torch.Tensor, groups: int) -> torch.Tensor:
    """B [out, r/g] of a grouped 1x1 convolution as a matrix [out, r]."""
    parts = b.flatten(1).chunk(groups)
    return torch.block_diag(*parts)


def _blocks(delta: torch.Tensor, groups: int) -> torch.Tensor:
    """Of a dense ΔW [out, in, ...] the blocks that a grouped weight has."""
    rows = delta.chunk(groups)
    return torch.cat([part.chunk(groups, 1)[i] for i, part in enumerate(rows)])


@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_fused_weight(tmp_path: Path) -> None:
    """PEFT has no parts: it reads one adapter of the whole."""
    base, x = seeded(Fused)().eval(), sample(2, 5, 8)
    model = adapted(base, target_modules=["qkv.q", "qkv.v"], rank_pattern={"qkv.v": 2})
    lora_fx.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(output(loaded, x), output(model, x))
