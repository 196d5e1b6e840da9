"""The Triton kernels of products under dropout: on a GPU, and in Triton's interpreter on a CPU.

The interpreter is chosen before Triton is imported. So one test runs this file again in a process of its own,
where `PLACES` is the CPU; elsewhere it is the GPU, for `make test-cuda`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.runtime.kernels import masks
from lora_fx.runtime.kernels.fused_lora import lora_linear
from lora_fx.runtime.kernels.masks import draw, kept, unpacked
from tests.fused import (
    SEED,
    Operands,
    assert_close_to_exact,
    canonical,
    errors,
    fused,
    gradients,
    laid_out,
    operands,
    recovered,
    with_gains,
)
from tests.numerics import assert_same_bits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLACES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.cuda)]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where kernels run: they are chosen there, and right there."""
    monkeypatch.setattr(masks, "KERNEL_DEVICES", (request.param,))
    found = torch.empty(0, device=request.param).device
    assert masks.has_kernels(found)
    return found


on_each = pytest.mark.parametrize("device", PLACES, indirect=True)


def on(device: torch.device, given: Operands) -> Operands:
    """Moved, with the mask that is drawn there."""
    moved = replace(given, mask=None).mapped(lambda tensor: tensor.to(device))
    return recovered(moved) if moved.dropout else moved


# --- where they are run and chosen --------------------------------------------------------------------


@needs_triton
@not_interpreted
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_tritons_interpreter(root: Path, which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [*command, "-k", "cpu", "-m", which, str(Path(__file__).relative_to(root))],
        cwd=root,
        env={**own, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@not_interpreted
@pytest.mark.parametrize(
    ("capability", "dtype", "rank"),
    [(80, torch.bfloat16, 16), (89, torch.float32, 256), (90, torch.float16, 64)],
    ids=str,
)
def test_they_compile_for_a_gpu(
    capability: int,
    dtype: torch.dtype,
    rank: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lora_fx.runtime.kernels import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    pointers = {**dict.fromkeys(("x", "a", "grad", "total", "out"), pointer), "mask": "*i64"}
    tiles = triton_kernels._tiles(rank, dtype)
    options = {name: tiles.pop(name) for name in tuple(tiles) if name.islower()}
    each = {
        triton_kernels._mask_kernel: ({"ROWS": 32, "COLUMNS": 128}, {"out": "*u8"}),
        triton_kernels._product_kernel: (tiles, {}),
        triton_kernels._outer_kernel: (tiles, {}),
        triton_kernels._add_kernel: ({**tiles, "RANK": min(tiles["RANK"], 64)}, {}),
    }
    for kernel, (constants, special) in each.items():
        types = dict.fromkeys(kernel.arg_names, "i32") | pointers | special
        types = {name: types[name] for name in kernel.arg_names}
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={})
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        # What the smallest of these GPUs has for a program.
        assert built.metadata.shared <= 99 * 1024
        assert built.asm["cubin"]


def test_without_a_gpu_a_mask_is_bits() -> None:
    assert draw(torch.empty(128, 128), 0.1).dtype == torch.uint8


@needs_triton
@not_interpreted
def test_where_they_do_not_run_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton compiles nothing for a CPU."""
    monkeypatch.setattr(masks, "KERNEL_DEVICES", ("cpu",))
    masks.has_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "lora_fx"):
            found = [draw(torch.empty(128, 128), 0.1).dtype for _ in range(2)]
    finally:
        masks.has_kernels.cache_clear()
    assert found == [torch.uint8] * 2
    assert [record.getMessage()[:48] for record in caplog.records] == [
        "dropout on cpu does without lora-fx's kernels: R"
    ]


@on_each
def test_kernels_that_are_wrong_on_a_device_are_found(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fx.runtime.kernels import triton_kernels

    check = triton_kernels.check.__wrapped__
    assert check(device) == ""
    monkeypatch.setattr(triton_kernels, "dropped_product", lambda x, a, mask: x @ a.T)
    assert check(device) == "drop(x) Aᵀ is not what PyTorch computes"


@on_each
def test_a_mask_is_one_number_where_they_are_chosen(device: torch.device) -> None:
    for dtype in DTYPES:
        seed = draw(torch.empty(3, 5, dtype=dtype, device=device), 0.05)
        assert (seed.dtype, seed.shape, seed.device) == (torch.int64, (), device)
        assert int(seed) & 255 == 13
        assert int(seed) >= 0


@on_each
def test_what_they_do_not_know_has_a_mask_of_another_form(device: torch.device) -> None:
    x = torch.empty(128, 128, device=device)

    def batch(x: Tensor) -> Tensor:
        return unpacked(draw(x, 0.1), x) * x

    assert draw(x.double(), 0.1).dtype != torch.int64
    assert draw(x[:0], 0.1).dtype != torch.int64
    # Nothing is drawn for these.
    assert not unpacked(draw(x, 1.0), x).any()
    assert torch.func.vmap(batch, randomness="different")(x).shape == x.shape


class Called(TorchDispatchMode):
    """The names of operators of lora_fx that are called in it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lora_fx":
            self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **kwargs or {})


@on_each
@pytest.mark.parametrize(
    ("rank", "dropout", "names"),
    [
        (3, 0.1, {"dropped_product", "dropped_outer", "add_dropped_"}),
        (257, 0.1, {"dropout_mask"}),
        (3, 0.0, set()),
    ],
)
def test_a_step_calls_them(
    device: torch.device, rank: int, dropout: float, names: set[str]
) -> None:
    case = on(device, operands((20,), (24, 6), rank, torch.float32, dropout=dropout))
    with Called() as called:
        fused(case).sum().backward()
    assert called.names == names


# --- the mask -----------------------------------------------------------------------------------------


def philox(seed: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The four words of Philox 4x32-10 of each counter (low, high, 0, 0), uint32 [..., 4]."""
    counter = [low.astype(np.uint64), high.astype(np.uint64)]
    counter += [np.zeros_like(counter[0]) for _ in range(2)]
    key, limit = [seed & 0xFFFFFFFF, seed >> 32], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]),
            second & limit,
            (first >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]),
            first & limit,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, -1).astype(np.uint32)


def test_philox_here_is_that_of_its_authors() -> None:
    """The first known answer of Random123, of zeros."""
    found = philox(0, np.zeros(1), np.zeros(1))[0]
    assert [f"{word:08x}" for word in found] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def expected_mask(seed: int, rows: int, columns: int) -> Tensor:
    groups = (columns + 15) // 16
    words = philox(seed >> 8, *np.meshgrid(np.arange(groups), np.arange(rows)))
    numbers = words.astype("<u4").view(np.uint8).reshape(rows, 16 * groups)[:, :columns]
    return torch.from_numpy(numbers >= (seed & 255))


@on_each
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (40, 150), (33, 129), (2, 5, 7), (9,)], ids=str)
@pytest.mark.parametrize("dropout", [0.05, 0.5, 255 / 256])
def test_a_mask_is_that_of_philox(
    device: torch.device, shape: tuple[int, ...], dropout: float
) -> None:
    x = torch.empty(shape, device=device)
    seed = draw(x, dropout)
    found = unpacked(seed, x).cpu()
    assert found.shape == x.shape
    matrix = found.view(-1, shape[-1])
    assert_same_bits(matrix, expected_mask(int(seed), *matrix.shape))


@on_each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 100), (1, 16), (129, 33)], ids=str)
def test_every_kernel_has_the_same_mask(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Whatever its tiles are: read from products with ones and zeros, bit for bit."""
    rows, columns = shape
    ones = torch.ones(shape, dtype=dtype, device=device)
    seed = draw(ones, 0.3)
    mask = unpacked(seed, ones).to(dtype)
    own = torch.ops.lora_fx
    per_column = torch.eye(columns, dtype=dtype, device=device)
    assert_same_bits(own.dropped_product(ones, per_column, seed), mask)
    per_row = torch.eye(rows, dtype=dtype, device=device)
    assert_same_bits(own.dropped_outer(per_row, ones, seed), mask)
    total = torch.zeros_like(ones)
    own.add_dropped_(total, ones[:, :1], ones[:1], seed)
    assert_same_bits(total, mask)


@on_each
def test_its_mean_is_that_of_bernoulli(device: torch.device) -> None:
    x = torch.empty(256, 512, device=device)
    q = kept(0.05) / 256
    found = unpacked(draw(x, 0.05), x).double().mean().item()
    assert abs(found - q) <= 6 * (q * (1 - q) / x.numel()) ** 0.5


# --- the products -------------------------------------------------------------------------------------


@st.composite
def cases(draw: Any) -> Operands:
    features = draw(st.tuples(st.integers(1, 150), st.integers(1, 20)))
    start = draw(st.integers(0, features[1] - 1))
    dtype = draw(st.sampled_from(DTYPES))
    made = operands(
        draw(st.sampled_from([(), (1,), (0,), (70,), (2, 33), (2, 0, 3), (2, 3, 5)])),
        features,
        draw(st.integers(1, 40)),
        dtype,
        draw(st.sampled_from([dtype, torch.float32])),
        bias=draw(st.booleans()),
        frozen=tuple(draw(st.sets(st.sampled_from(("x", "weight", "bias", "a")), max_size=4))),
        scale=draw(st.sampled_from([1.0, -3.0])),
        rows=draw(st.sampled_from([None, (start, features[1])])),
    )
    layout = draw(st.sampled_from(["plain", "transposed", "every second"]))
    x = laid_out(made.x.detach(), layout).requires_grad_(made.x.requires_grad)
    return replace(made, x=x, dropout=draw(st.sampled_from([0.1, 0.75])))


@on_each
@pytest.mark.slow
def test_they_are_as_close_to_fp64_as_the_plain_operations(device: torch.device) -> None:
    @given_any(cases())
    @settings(max_examples=60)
    def check(case: Operands) -> None:
        assert_close_to_exact(on(device, case))

    check()


@on_each
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 16, 17, 64, 65, 128, 129, 256, 257])
def test_ranks(device: torch.device, dtype: torch.dtype, rank: int) -> None:
    case = operands((45,), (72, 8), rank, dtype, dropout=0.2)
    assert_close_to_exact(on(device, case))


@on_each
@pytest.mark.slow
@pytest.mark.parametrize("tokens", [20, 600])
def test_long_sums_are_cut(device: torch.device, tokens: int) -> None:
    case = operands((tokens,), (20 if tokens > 100 else 1000, 8), 4, torch.float32, dropout=0.2)
    assert_close_to_exact(on(device, case))


@on_each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype(device: torch.device, dtype: torch.dtype) -> None:
    assert_close_to_exact(on(device, operands((2, 20), (40, 24), 3, dtype, dropout=0.2)))


@on_each
@pytest.mark.parametrize("again", [True, False])
def test_dora(device: torch.device, again: bool) -> None:
    case = with_gains(operands((2, 20), (40, 24), 3, torch.float32, dropout=0.2), again)
    assert_close_to_exact(on(device, case))


@on_each
def test_autocast(device: torch.device) -> None:
    case = on(device, operands((33,), (40, 24), 3, torch.float32, dropout=0.2))

    def under(function: Callable[[Operands], Tensor]) -> Callable[[Operands], Tensor]:
        def run(given: Operands) -> Tensor:
            with torch.autocast(given.x.device.type, torch.bfloat16):
                return function(given)

        return run

    found = errors(under(fused), case, computed=torch.bfloat16)
    plain = errors(under(canonical), case, computed=torch.bfloat16)
    for name, error in found.items():
        assert error <= max(1.5 * plain[name], 2.0), f"{name}: {error} against {plain[name]}"


@on_each
def test_a_second_derivative_has_the_same_mask(device: torch.device) -> None:
    case = on(device, operands((20,), (24, 6), 3, torch.float32, dropout=0.5))

    def twice(function: Callable[[Operands], Tensor]) -> tuple[Tensor, ...]:
        wanted = list(case.wanted.values())
        first = torch.autograd.grad(function(case).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), wanted)

    for found, expected in zip(twice(fused), twice(canonical), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


# --- a seed, and what is kept ---------------------------------------------------------------------------


@on_each
def test_a_seed_repeats_a_step_bit_for_bit(device: torch.device) -> None:
    case = on(device, operands((100,), (100, 40), 5, torch.bfloat16, dropout=0.2))
    cotangent = torch.ones(100, 40, device=device)
    first, second = (gradients(fused, case, cotangent) for _ in range(2))
    for name, found in first.items():
        assert_same_bits(found, second[name])

    def of_another_seed(given: Operands) -> Tensor:
        torch.manual_seed(SEED + 1)
        tensors = (given.x, given.weight, given.bias, given.a, given.b)
        return lora_linear(*tensors, given.scale, given.dropout, True)

    other = gradients(of_another_seed, case, cotangent)
    assert all((other[name] != first[name]).any() for name in ("out", "x", "a", "b"))


@on_each
def test_without_dropout_nothing_is_drawn(device: torch.device) -> None:
    case = on(device, operands((33,), (40, 24), 3, torch.float32))
    before = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    tensors = (case.x, case.weight, case.bias, case.a, case.b)
    found = [
        lora_linear(*tensors, case.scale, dropout, training)
        for dropout, training in ((0.0, True), (0.5, False))
    ]
    after = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    assert_same_bits(before, after)
    assert_same_bits(found[0], found[1])


@on_each
def test_a_mask_costs_eight_bytes(device: torch.device) -> None:
    case = on(device, operands((64,), (80, 24), 3, torch.float32, dropout=0.1))
    kept_tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept_tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        fused(case)
    given = {tensor.untyped_storage().data_ptr() for tensor in case.tensors.values()}
    extra = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept_tensors
    }
    beyond = sorted(size for place, size in extra.items() if place not in given)
    assert beyond == [8, 64 * 3 * 4], "the seed, and the product with A"


@on_each
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_has_the_same_mask(device: torch.device, reentrant: bool) -> None:
    case = on(device, operands((33,), (40, 24), 3, torch.float32, dropout=0.3))

    def checkpointed(given: Operands) -> Tensor:
        torch.manual_seed(SEED)

        def run(*tensors: Tensor) -> Tensor:
            return lora_linear(*tensors, given.scale, given.dropout, True)

        tensors = (given.x, given.weight, given.bias, given.a, given.b)
        found: Tensor = checkpoint(run, *tensors, use_reentrant=reentrant)
        return found

    def backward(function: Callable[[Operands], Tensor]) -> dict[str, Tensor]:
        function(case).square().sum().backward()
        found = {name: tensor.grad for name, tensor in case.wanted.items()}
        for tensor in case.wanted.values():
            tensor.grad = None
        return found

    plain = backward(fused)
    for name, found in backward(checkpointed).items():
        assert_same_bits(found, plain[name])


# --- whole models ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


@pytest.fixture
def net(device: torch.device) -> Net:
    return Net().to(device)


def three_steps(net: Net, **options: Any) -> list[Tensor]:
    """The losses and what is trained, of three steps of Adam."""
    device = net.up.weight.device
    config = lora_fx.LoraConfig(
        seed=0, r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["up", "down"], **options
    )
    model = lora_fx.rewrite(net, config).train()
    values = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 17, 24, generator=values).to(device) for _ in range(2))
    optimizer = torch.optim.Adam(lora_fx.trainable_parameters(model), lr=0.01)
    torch.manual_seed(SEED)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(one.detach() for one in lora_fx.trainable_parameters(model))]


@on_each
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_three_steps_are_those_of_the_plain_products(
    device: torch.device, net: Net, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = three_steps(net, **options)
    # The same masks, laid out.
    monkeypatch.setattr(masks, "KERNEL_RANKS", 0)
    for mine, plain in zip(found, three_steps(net, **options), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4)
    assert found[2] < found[0]


@on_each
def test_rows_of_several_adapters(device: torch.device, net: Net) -> None:
    config = lora_fx.LoraConfig(r=4, seed=0, lora_dropout=0.3, target_modules=["up", "down"])
    model = lora_fx.rewrite(net, config, adapter_name="one").train()
    lora_fx.add_adapter(model, config, "two")
    lora_fx.set_adapter(model, ["one", "two"], per_sample=True)
    x = torch.randn(4, 9, 24, generator=torch.Generator().manual_seed(1)).to(device)
    names = ["one", "two", "two", "one"]
    found = []
    for _ in range(2):
        torch.manual_seed(SEED)
        out = model(x, adapter_ids=names)
        wanted = [one for one in model.parameters() if one.requires_grad]
        found.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for first, second in zip(*found, strict=True):
        assert first.isfinite().all()
        assert_same_bits(first, second)
