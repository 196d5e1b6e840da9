"""Dropout under a compiler: its masks are bits of random words, the same in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import LoraConfig
from lora_fx.runtime.kernels.masks import draw, in_planes, kept, masked, unpacked
from lora_fx.tools.bench.counted import saved_bytes
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits

SIGMAS = 6
ROWS, WIDTH = 64, 24
CHECKPOINTS = {"": None, "checkpoint": False, "reentrant": True}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layers(nn.Module):
    """Two layers that read one input, of a width with a rest of eight, and one more."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, 20), nn.Linear(width, 20)
        self.last = nn.Linear(20, 12)
        self.again: bool | None = None

    def inner(self, x):
        return torch.tanh(self.left(x)) * self.right(x)

    def forward(self, x):
        if self.again is None:
            h = self.inner(x)
        else:
            h = checkpoint(self.inner, x, use_reentrant=self.again)
        return self.last(h)


def adapted(again: bool | None = None, dropout: float = 0.25, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    targets = options.pop("target_modules", ["left", "right", "last"])
    config = LoraConfig(r=3, lora_dropout=dropout, target_modules=targets, **options)
    model = lora_fx.rewrite(Layers().double(), config).train()
    randomize(model)
    model.again = again
    return model


def data(rows: int = ROWS) -> Tensor:
    return torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def loss_of(call: Callable[[Tensor], Tensor], x: Tensor, seed: int = 7) -> Tensor:
    torch.manual_seed(seed)
    return call(x).square().sum()


# --- masks -------------------------------------------------------------------------------------


def compiled_mask(shape: tuple[int, ...], dropout: float, seed: int = 0) -> Tensor:
    def mask(x: Tensor) -> Tensor:
        drawn = draw(x, dropout)
        assert in_planes(drawn)
        return masked(x, drawn)

    torch.manual_seed(seed)
    return torch.compile(mask, fullgraph=True, backend="aot_eager")(torch.ones(shape).double())


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("lag", [1, 2, 7, 8, 63, 64, 65, 128, 1024])
def test_elements_are_independent_of_each_other(dropout: float, lag: int) -> None:
    """Neighbors in a row, in a byte (a plane apart), in a word and in the next row."""
    q = kept(dropout) / 256
    centered = compiled_mask((2048, 1024), dropout).flatten() - q
    products = centered[lag:] * centered[:-lag]
    bound = SIGMAS * q * (1 - q) / products.numel() ** 0.5
    assert abs(products.mean().item()) <= bound


@pytest.mark.parametrize("width", [1, 7, 8, 20, 64])
@pytest.mark.parametrize("rows", [(), (1,), (3, 5), (0, 4)])
def test_a_mask_of_any_shape(rows: tuple[int, ...], width: int) -> None:
    shape = (*rows, width)
    found = compiled_mask(shape, 0.5)
    assert found.shape == shape
    assert set(found.unique().tolist()) <= {0.0, 1.0}


def test_each_row_and_each_place_has_the_mean() -> None:
    q = kept(0.25) / 256
    found = compiled_mask((1024, 1000), 0.25)
    for dim in (0, 1):
        means = found.mean(dim)
        deviation = (q * (1 - q) / found.shape[dim]) ** 0.5
        assert (means - q).abs().max() <= SIGMAS * deviation


@pytest.mark.parametrize("width", [40, 37])
def test_all_forms_of_a_mask_are_one(width: int) -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = draw(x, 0.5)
        return masked(x, mask), unpacked(mask, x), mask

    x = torch.ones(9, width, requires_grad=True)
    out, factor, mask = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    out.sum().backward()
    assert_same_bits(out, factor.float())
    assert_same_bits(x.grad, factor.float())
    assert (mask.dtype, mask.shape) == (torch.int8, (9, (width + 7) // 8))


def test_masks_of_sites_and_calls_differ() -> None:
    """A compiler must not take two draws of one size for the same expression."""

    def four(x: Tensor) -> list[Tensor]:
        return [masked(x, draw(x, 0.5)) for _ in range(4)]

    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(four, fullgraph=True, backend=backend)
        found = [*compiled(torch.ones(64, 64)), *compiled(torch.ones(64, 64))]
        for place, one in enumerate(found):
            for other in found[:place]:
                assert not torch.equal(one, other)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_follows_manual_seed(backend: str) -> None:
    model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    first, again, other = (loss_of(compiled, data(), seed) for seed in (7, 7, 8))
    assert_same_bits(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dropout", [0, 1])
def test_nothing_and_everything(dropout: float) -> None:
    def run(x: Tensor) -> Tensor:
        return masked(x, draw(x, dropout))

    x = torch.ones(3, 8)
    assert_same_bits(torch.compile(run, fullgraph=True, backend="aot_eager")(x), x - dropout)


def test_an_exported_program_has_no_operator_of_ours() -> None:
    program = torch.export.export(adapted(), (data(),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("rand" in one for one in targets)
    assert not any("lora_fx" in one for one in targets)


# --- gradients ---------------------------------------------------------------------------------


def check_gradients(
    model: nn.Module, call: Callable[[Tensor], Tensor], factors: bool = True
) -> None:
    """The derivative along a direction is that of two losses with the same masks, in fp64."""
    x = data().requires_grad_()
    leaves = [x, *(lora_fx.trainable_parameters(model) if factors else ())]
    draws = torch.Generator().manual_seed(3)
    along = [torch.randn(one.shape, generator=draws, dtype=torch.float64) for one in leaves]

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            for leaf, one in zip(leaves, along, strict=True):
                leaf.add_(one, alpha=by)
        # Each with a graph, and so by the same compiled code.
        return loss_of(call, x)

    model.zero_grad()
    loss_of(call, x).backward()
    exact = sum((leaf.grad * one).sum() for leaf, one in zip(leaves, along, strict=True))
    step = 1e-5
    before, after = moved(-step).detach(), moved(2 * step).detach()
    assert_close(exact, (after - before) / (2 * step), 1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("again", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_gradients_are_those_of_the_forward_with_its_masks(
    backend: str, again: bool | None
) -> None:
    model = adapted(again)
    # The reentrant kind breaks the graph.
    check_gradients(model, torch.compile(model, fullgraph=not again, backend=backend))


@pytest.mark.parametrize("again", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_around_what_is_compiled(again: bool | None) -> None:
    model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")

    def call(x: Tensor) -> Tensor:
        return compiled(x) if again is None else checkpoint(compiled, x, use_reentrant=again)

    check_gradients(model, call)


def test_dora() -> None:
    model = adapted(use_dora=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_gradients(model, compiled, factors=False)  # its norm is a constant for them


def test_some_of_the_layers() -> None:
    model = adapted(target_modules=["left"])
    check_gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


def test_a_branch_that_stays_plain() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_dropout=0.25, target_modules=["0"])
    model = lora_fx.rewrite(nn.Sequential(nn.Conv1d(ROWS, 6, 3)).double(), config).train()
    randomize(model)
    check_gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


# --- memory, and compilations --------------------------------------------------------------------


def test_a_bit_is_kept_for_each_element() -> None:
    size = 2 * ROWS * (2 * WIDTH + 24)  # 20 elements have three bytes
    found = []
    for dropout in (0.0, 0.25):
        torch._dynamo.reset()
        model = adapted(dropout=dropout)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        x = data().requires_grad_()
        found.append(saved_bytes(model, lambda compiled=compiled, x=x: compiled(x).sum()))
    assert found[1] - found[0] <= size // 8 + 64


def test_steps_adapters_and_sizes_are_compiled_once() -> None:
    model = adapted()
    lora_fx.add_adapter(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["left"]), "b")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)

    def train(rows: int) -> None:
        model.zero_grad()
        loss_of(compiled, data(rows)).backward()

    for name in ("default", "b"):
        lora_fx.set_adapter(model, name)
        train(5)
    seen = counter.frame_count
    for rows in (5, 6, 9, 16, 31):
        for name in ("default", "b", "default"):
            lora_fx.set_adapter(model, name)
            train(rows)
    assert counter.frame_count == seen


def test_the_trio_is_compiled_once() -> None:
    """Dropout, a checkpoint and a compiler, over sizes."""
    model = adapted(again=False)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    loss_of(compiled, data(8)).backward()
    seen = counter.frame_count
    for rows in (9, 17, 32, 8):
        loss_of(compiled, data(rows)).backward()
    assert counter.frame_count == seen
    check_gradients(model, compiled)
