"""PEFT's table of LoRA tests, row by row: every row of ``tests/test_custom_models.py`` with a ``LoraConfig``.

PEFT's folder loads here, and what is saved here loads in PEFT, with the same outputs, gradients and merged
weights, before and after some training. All dropout is off, because masks differ. PEFT draws the noise of
MonteCLoRA ahead of time, so it gets the numbers that lora-fx draws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import LoraConfig, MergeError
from tests.lora_fx.test_checkpoint import read_by_peft
from tests.numerics import assert_close, relative_error
from tests.zoo import sample, seeded

pytestmark = pytest.mark.filterwarnings("ignore")


# --- PEFT's models --------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, x):
        return self.sm(self.lin1(self.drop(self.relu(self.lin0(x)))))


class ParameterLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 3)
        self.bias = nn.Parameter(torch.ones(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class ParameterMLP(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = ParameterLayer(10, 20)
        self.lin1 = ParameterLayer(20, 2)


class Chain(nn.Module):
    """Layers by name, one after the other, and a classifier of all their outputs."""

    def __init__(self, *reshaped: int, features: int, **layers: nn.Module) -> None:
        super().__init__()
        self.reshaped, self.names = reshaped, tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.relu = nn.ReLU()
        self.lin0 = nn.Linear(features, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, x):
        if self.reshaped:
            x = x.reshape(-1, *self.reshaped)
        for name in self.names:
            x = self.get_submodule(name)(x)
        return self.sm(self.lin0(self.relu(x).flatten(1)))


class Groups(nn.Module):
    """PEFT's ``Conv2dGroups``: 8 groups, the default rank."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(90, 288)
        self.conv2d = nn.Conv2d(16, 16, 3, groups=8)
        self.lin1 = nn.Linear(16, 2)

    def forward(self, x):
        x = self.conv2d(self.lin0(x.flatten()).reshape(2, 16, 3, 3))
        return self.lin1(torch.relu(x).flatten(1)).log_softmax(-1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x):
        return self.lin0(self.mha(x, x, x)[0]).log_softmax(-1)


VECTORS = sample(9, 10, dtype=torch.float64)
TOKENS = torch.arange(90).view(9, 10)
VOLUMES = sample(4, 135, dtype=torch.float64)
IMAGES = sample(2, 16, 20, 20, dtype=torch.float64)
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "MLP": (MLP, VECTORS),
    "MlpUsingParameters": (ParameterMLP, VECTORS),
    "EmbConv1D": (
        lambda: Chain(features=10, emb=nn.Embedding(100, 5), conv1d=Conv1D(1, 5)),
        TOKENS,
    ),
    "Conv1d": (lambda: Chain(1, 10, features=9, conv1d=nn.Conv1d(1, 1, 2)), VECTORS),
    "Conv2d": (lambda: Chain(5, 3, 3, features=10, conv2d=nn.Conv2d(5, 10, 3)), VECTORS),
    "Conv2dGroups": (Groups, VECTORS),
    "Conv2dGroups2": (
        lambda: Chain(features=12800, conv2d=nn.Conv2d(16, 32, 3, padding=1, groups=2)),
        IMAGES,
    ),
    "Conv3d": (lambda: Chain(5, 3, 3, 3, features=10, conv3d=nn.Conv3d(5, 10, 3)), VOLUMES),
    "Conv3d1x1": (lambda: Chain(5, 3, 3, 3, features=270, conv3d=nn.Conv3d(5, 10, 1)), VOLUMES),
    "MHA": (Attention, VECTORS),
}


# --- PEFT's rows ----------------------------------------------------------------------------------


def velora(start: str) -> peft.VeloraConfig:
    return peft.VeloraConfig(num_groups=2, init_type=start)


def blocks(**options: Any) -> dict[str, Any]:
    return {"target_modules": ["lin0", "lin1"], "use_bdlora": BdLoraConfig(**options)}


def on(*targets: str, **options: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), **options}


DORA = {"use_dora": True}
BIAS = {"lora_bias": True, "lora_alpha": 32}
Row = tuple[str, str, dict[str, Any]]
TABLE: tuple[Row, ...] = (
    ("Vanilla MLP 1 LoRA", "MLP", {"target_modules": "lin0"}),
    ("Vanilla MLP 2 LoRA", "MLP", on("lin0")),
    ("Vanilla MLP 3 LoRA", "MLP", on("lin1")),
    ("Vanilla MLP 4 LoRA", "MLP", on("lin0", "lin1")),
    ("Vanilla MLP 5 LoRA", "MLP", on("lin0", modules_to_save=["lin1"])),
    ("Vanilla MLP 6 LoRA", "MLP", on("lin0", lora_alpha=4, lora_dropout=0.1)),
    ("Vanilla MLP 7 LoRA with DoRA", "MLP", on("lin0", **DORA)),
    ("Vanilla MLP 8 LoRA with DoRA", "MLP", on("lin0", "lin1", **DORA)),
    ("Vanilla MLP 1 LoRA with KaSA", "MLP", on("lin0", kasa_config=peft.KasaConfig(), r=4)),
    ("Vanilla MLP 1 LoRA with MiCA", "MLP", on("lin0", init_lora_weights="mica", r=4)),
    (
        "Vanilla MLP 9 LoRA with DoRA",
        "MLP",
        {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32},
    ),
    ("Vanilla MLP 10 LoRA with VeLoRA random", "MLP", on("lin0", velora_config=velora("random"))),
    (
        "Vanilla MLP 11 LoRA with VeLoRA batch_average",
        "MLP",
        on("lin0", "lin1", velora_config=velora("batch_average")),
    ),
    (
        "Vanilla MLP 12 LoRA with VeLoRA batch_average_once",
        "MLP",
        on("lin0", velora_config=velora("batch_average_once")),
    ),
    ("Embedding + transformers Conv1D 1 LoRA", "EmbConv1D", on("conv1d")),
    ("Embedding + transformers Conv1D 2 LoRA", "EmbConv1D", on("emb")),
    ("Embedding + transformers Conv1D 3 LoRA", "EmbConv1D", on("emb", "conv1d")),
    ("Embedding + transformers Conv1D 1 DoRA", "EmbConv1D", on("conv1d", **DORA)),
    ("Embedding + transformers Conv1D 2 DoRA", "EmbConv1D", on("emb", **DORA)),
    ("Embedding + transformers Conv1D 3 DoRA", "EmbConv1D", on("emb", "conv1d", **DORA)),
    (
        "Embedding + transformers Conv1D 1 LoRA trainable_tokens",
        "EmbConv1D",
        on("conv1d", trainable_token_indices={"emb": [0, 10]}),
    ),
    ("Conv1d LoRA", "Conv1d", on("conv1d")),
    ("Conv1d LoRA with DoRA", "Conv1d", on("conv1d", **DORA)),
    ("Conv2d 1 LoRA", "Conv2d", on("conv2d")),
    ("Conv2d 2 LoRA", "Conv2d", on("conv2d", "lin0")),
    ("Conv2d 1 LoRA with DoRA", "Conv2d", on("conv2d", **DORA)),
    ("Conv2d 2 LoRA with DoRA", "Conv2d", on("conv2d", "lin0", **DORA)),
    ("Conv2d Groups LoRA", "Conv2dGroups", on("conv2d")),
    ("Conv2d Groups2 LoRA", "Conv2dGroups2", on("conv2d")),
    ("Conv2d Groups LoRA with DoRA", "Conv2dGroups", on("conv2d", **DORA)),
    ("Conv2d Groups2 LoRA with DoRA", "Conv2dGroups2", on("conv2d", **DORA)),
    ("Conv3d 1 LoRA", "Conv3d", on("conv3d")),
    ("Conv3d 2 LoRA", "Conv3d", on("conv3d", "lin0")),
    ("Conv3d 1 LoRA with DoRA", "Conv3d", on("conv3d", **DORA)),
    ("Conv3d 2 LoRA with DoRA", "Conv3d", on("conv3d", "lin0", **DORA)),
    ("Conv3d 1x1 LoRA", "Conv3d1x1", on("conv3d")),
    ("Conv3d 1x1 LoRA with DoRA", "Conv3d1x1", on("conv3d", **DORA)),
    ("Vanilla MLP 1 LoRA with lora_b bias", "MLP", on("lin0", "lin1", **BIAS)),
    ("Conv2d 1 LoRA with lora_b bias", "Conv2d", on("conv2d", **BIAS)),
    ("Conv3d 1 LoRA with lora_b bias", "Conv3d", on("conv3d", **BIAS)),
    ("MHA 1 LoRA", "MHA", on("mha")),
    ("MHA 2 LoRA", "MHA", on("mha", "lin0")),
    (
        "MLP 1 using nn.Parameter LoRA",
        "MlpUsingParameters",
        {"target_parameters": ["lin0.weight"]},
    ),
    ("MLP 2 using nn.Parameter LoRA", "MLP", on("lin0", target_parameters=["lin1.weight"])),
    (
        "Vanilla MLP 1 LoRA with Monteclora",
        "MLP",
        on("lin0", monteclora_config=peft.MontecloraConfig(num_samples=2)),
    ),
    ("BD-LoRA A only", "MLP", blocks(target_modules_bd_a=["lin0"], match_strict=False)),
    ("BD-LoRA B only", "MLP", blocks(target_modules_bd_b=["lin1"], nblocks=2, match_strict=False)),
    (
        "BD-LoRA both A and B",
        "MLP",
        blocks(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2),
    ),
)
rows = pytest.mark.parametrize("row", TABLE, ids=[name for name, _, _ in TABLE])
# The q, k and v of an attention layer have an A each here, and share one in PEFT.
equal_factors = pytest.mark.parametrize(
    "row", [row for row in TABLE if row[1] != "MHA"], ids=[n for n, m, _ in TABLE if m != "MHA"]
)

# PEFT decomposes weights, and takes roots of variances, in fp32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


def dtype_of(options: dict[str, Any]) -> torch.dtype:
    """PEFT refuses MiCA over fp64."""
    return torch.float32 if options.get("init_lora_weights") == "mica" else torch.float64


def base_of(row: Row) -> tuple[nn.Module, torch.Tensor, float]:
    """The base, an input, and the tolerance."""
    _, model, options = row
    build, x = MODELS[model]
    dtype = dtype_of(options)
    x = x.to(dtype) if x.is_floating_point() else x
    return seeded(build)().to(dtype), x, TOLERANCE[dtype]


def in_peft(base: nn.Module, options: dict[str, Any]) -> Any:
    """PEFT's model with other numbers in everything that it trains."""
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return theirs


def without_dropout(model: Any) -> Any:
    """In training mode. PyTorch's fast path of attention, in evaluation, leaves PEFT's adapters out."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return model


def samplers(theirs: Any) -> Iterator[Any]:
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            yield from getattr(module, "lora_monteclora_sampler", {}).values()


def draw_alike(theirs: Any, seed: int) -> None:
    """Give PEFT's samplers the numbers that our next call draws, and seed the generator for it."""
    torch.manual_seed(seed)
    for sampler in samplers(theirs):
        count, inner, rank = sampler.num_samples, sampler.in_features, sampler.out_features
        noise = torch.randn(count, inner, rank, dtype=torch.float64)
        squares = torch.randn(rank, rank, dtype=torch.float64).square().sum(0)
        normals = torch.randn(count, dtype=torch.float64)
        numbers = {"z_mvn": noise, "z_wishart": squares.diag(), "z_dirichlet": normals}
        sampler.sampler.buffer, sampler.sampler.index, sampler.sampler.buffer_size = [numbers], 0, 1
    torch.manual_seed(seed)


def penalty_of(theirs: Any) -> Any:
    return theirs._get_kasa_loss() + theirs._get_monteclora_loss()


def by_key(model: Any) -> dict[str, torch.Tensor]:
    """The adapter of PEFT's model, or of ours, by PEFT's keys."""
    if isinstance(model, peft.PeftModel):
        return dict(peft.get_peft_model_state_dict(model))
    return lora_fx.adapter_state_dict(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of a model by PEFT's keys; state has none."""
    twin = copy.deepcopy(model) if not any(samplers(model)) else model
    kept = {name: p.detach().clone() for name, p in twin.named_parameters()}
    given = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(given[name] if given[name] is not None else torch.zeros(()))
        result = {
            key: value.clone()
            for key, value in by_key(twin).items()
            if not key.endswith(("embed", "gaussian_var_prior", "expert_weights"))
        }
        for name, parameter in twin.named_parameters():
            parameter.copy_(kept[name])
    return result


def assert_alike(
    found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], tolerance: float = 1e-6
) -> None:
    assert found.keys() == exact.keys()
    for key in found:
        assert_close(found[key], exact[key], tolerance)


# --- replay ---------------------------------------------------------------------------------------


def test_the_table_is_whole() -> None:
    """PEFT's main branch has 44 rows under "LoRA", one of MonteCLoRA and three of BD-LoRA."""
    assert len({name for name, _, _ in TABLE}) == len(TABLE) == 44 + 1 + 3


@rows
def test_what_peft_saves(row: Row, tmp_path: Path) -> None:
    """The output, the merged weights, and the output in PEFT of what is saved here."""
    base, x, tolerance = base_of(row)
    theirs = in_peft(base, row[2])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora_fx.load_adapter(base, tmp_path / "theirs")
    draw_alike(theirs, 0)
    expected = without_dropout(theirs)(x).detach()
    assert relative_error(expected, without_dropout(base)(x)) > 1e-3, "the adapter does nothing"
    assert_close(without_dropout(ours)(x), expected, tolerance)

    lora_fx.save_adapter(ours, tmp_path / "ours")
    again = without_dropout(read_by_peft(base, tmp_path / "ours"))
    draw_alike(again, 0)
    assert_close(again(x), expected, tolerance)
    if row[1].startswith("Conv2dGroups"):
        with pytest.raises(NotImplementedError, match="groups > 1"):
            theirs.merge_and_unload()
        with pytest.raises(MergeError, match="A reads channels"):
            lora_fx.merge(ours)
        return
    merged = lora_fx.merge(ours)
    if row[1] == "Conv3d1x1":  # PEFT 0.21 fails to merge it, and later versions do
        assert_close(merged.eval()(x), expected, tolerance)
        return
    reference = theirs.eval().merge_and_unload()
    assert merged.state_dict().keys() == reference.state_dict().keys()
    for name, value in reference.state_dict().items():
        assert_close(merged.state_dict()[name], value, tolerance)


@equal_factors
def test_training_goes_as_in_peft(row: Row, tmp_path: Path) -> None:
    """Gradients of each step with the penalty, and everything that a folder has after the steps."""
    base, x, tolerance = base_of(row)
    theirs = in_peft(base, row[2])
    theirs.save_pretrained(tmp_path)
    models = (without_dropout(theirs), without_dropout(lora_fx.load_adapter(base, tmp_path)))
    trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
    assert sum(p.numel() for p in trained[0]) == sum(p.numel() for p in trained[1])
    optimizers = [torch.optim.SGD(parameters, lr=0.01) for parameters in trained]
    for number in range(3):
        draw_alike(theirs, number)
        losses = [model(x).square().mean() for model in models]
        penalties = penalty_of(theirs), lora_fx.adapter_penalty(models[1])
        for optimizer, loss, penalty in zip(optimizers, losses, penalties, strict=True):
            optimizer.zero_grad()
            (loss + penalty).backward()
        assert_alike(gradients(models[1]), gradients(theirs), tolerance)
        for optimizer in optimizers:
            optimizer.step()
    assert_alike(by_key(models[1]), by_key(theirs), tolerance)


@pytest.mark.parametrize("row", [r for r in TABLE if r[1] == "MHA"], ids=["MHA 1", "MHA 2"])
def test_gradients_of_attention(row: Row, tmp_path: Path) -> None:
    """PEFT's A has the sum of those of q, k and v. It counts the product of out_proj twice."""
    base, x, tolerance = base_of(row)
    theirs = without_dropout(in_peft(base, row[2]))
    theirs.save_pretrained(tmp_path)
    ours = without_dropout(lora_fx.load_adapter(base, tmp_path))
    for model in (theirs, ours):
        model(x).square().mean().backward()
    own = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    layer = theirs.base_model.model.mha
    down = sum(own[f"mha.{letter}_lora.lora_A.default"] for letter in "qkv")
    up = torch.cat([own[f"mha.{letter}_lora.lora_B.default"] for letter in "qkv"])
    assert_close(down, layer.lora_A.default.weight.grad, tolerance)
    assert_close(up, layer.lora_B.default.weight.grad, tolerance)


@equal_factors
def test_what_a_rewrite_starts_with(row: Row) -> None:
    """The same tensors as in PEFT, with no effect at first except that of a start or of another base."""
    base, x, tolerance = base_of(row)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**row[2]))
    options = dict(row[2])
    if row[1].startswith("Conv2dGroups"):
        options["dense_groups"] = True
    config = LoraConfig(**options)
    ours = lora_fx.rewrite(base, config)
    shapes = [{key: value.shape for key, value in by_key(m).items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert_close(ours.eval()(x), theirs.eval()(x), tolerance)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    plan = lora_fx.plan(base, config)
    assert counts[0] == counts[1] == plan.trainable_parameters
