"""Parameters with values for each row, or with some rows replaced: functions compute what a loop computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx import ConfigError
from lora_fx.runtime.rows import PatchedWeight, RowParameter

SLOTS = torch.tensor([2, 0, 1, 2])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Scaled(nn.Module):
    """Weights that code computes with, as norms of language models are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (1.0 + self.weight.to(x.dtype)) + self.bias / 2


class Named(nn.Module):
    """Functions with keyword arguments, in-place sums, and the product of transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 3))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(input=x, weight=self.weight.permute(1, 0), bias=self.bias)
        y = torch.add(input=y, other=self.bias)
        y += self.bias
        flat = x.reshape(-1, 6)
        return torch.add(y, other=torch.addmm(self.bias, flat, self.weight).view_as(y))


class Tied(nn.Module):
    """A matrix that is looked up, and whose transpose is multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9, 6))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight) @ self.weight.T


def ids(*shape: int) -> Tensor:
    return torch.randint(9, shape, generator=torch.Generator().manual_seed(0))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 3), drawn(4, 6)),
    "linear of tokens": (lambda: nn.Linear(6, 3), drawn(4, 5, 6)),
    "linear of flattened tokens": (lambda: nn.Linear(6, 3), drawn(20, 6)),
    "linear without bias": (lambda: nn.Linear(6, 3, bias=False), drawn(4, 2, 5, 6)),
    "layer norm": (lambda: nn.LayerNorm(6), drawn(4, 5, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), drawn(4, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), drawn(4, 5, 6)),
    "norm written out": (Scaled, drawn(4, 5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), drawn(4, 6, 5, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(6), drawn(4, 6, 5, 5)),
    "convolution of signals": (lambda: nn.Conv1d(6, 3, 3, padding=1), drawn(4, 6, 5)),
    "convolution of images": (lambda: nn.Conv2d(6, 3, 3, stride=2), drawn(4, 6, 5, 5)),
    "named arguments": (Named, drawn(4, 5, 6)),
    "embedding": (lambda: nn.Embedding(9, 6), ids(4, 5)),
    "tied embedding": (Tied, ids(4, 5)),
    "head": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 3)),
        drawn(4, 6),
    ),
}


def stacked(module: nn.Module) -> dict[str, Tensor]:
    """Random values for three adapters, by parameter, [slots, ...]."""
    return {name: drawn(3, *value.shape) + 1 for name, value in module.named_parameters()}


def replaced(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Any:
    return torch.func.functional_call(module, values, (x,))


@pytest.mark.parametrize("case", CASES)
def test_each_row_has_its_own_values(case: str) -> None:
    make, x = CASES[case]
    module = make().double().eval()
    banks = stacked(module)
    rows = {name: RowParameter(name, bank, SLOTS) for name, bank in banks.items()}
    got = replaced(module, dict(rows), x)
    alone = [
        replaced(module, {name: bank[slot] for name, bank in banks.items()}, part)
        for slot, part in zip(SLOTS, x.chunk(len(SLOTS)), strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(alone), **EXACT)


@pytest.mark.parametrize("own", ["weight", "bias"])
@pytest.mark.parametrize("case", ["linear", "layer norm", "convolution of images", "group norm"])
def test_the_other_parameter_may_be_shared(case: str, own: str) -> None:
    make, x = CASES[case]
    module = make().double().eval()
    bank = stacked(module)[own]
    got = replaced(module, {own: RowParameter(own, bank, SLOTS)}, x)
    alone = [
        replaced(module, {own: bank[slot]}, part)
        for slot, part in zip(SLOTS, x.chunk(len(SLOTS)), strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(alone), **EXACT)


def test_gradients_reach_the_bank() -> None:
    module = nn.Linear(6, 3).double()
    bank = drawn(3, 3, 6).requires_grad_()
    replaced(
        module, {"weight": RowParameter("weight", bank, SLOTS[1:])}, drawn(3, 6)
    ).sum().backward()
    assert bank.grad is not None
    assert bool((bank.grad != 0).any((1, 2)).all())


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, w: torch.einsum("bi,oi->bo", x, w),
        lambda x, w: w.sum(),
        lambda x, w: w[0],
        lambda x, w: x * w.norm(),
        lambda x, w: F.linear(w, w),
        lambda x, w: torch.stack([w, w]),
        lambda x, w: F.embedding(x.long(), w, max_norm=1.0),
    ],
    ids=["einsum", "sum", "item", "norm", "on both sides", "stack", "max_norm"],
)
def test_a_function_without_a_form_is_named(compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight = RowParameter("head.weight", drawn(3, 6, 6), SLOTS)
    with pytest.raises(ConfigError, match=r"head\.weight has no values for each row in \w+\(\)"):
        compute(drawn(4, 6), weight)


def test_it_looks_like_the_parameter() -> None:
    weight = RowParameter("head.weight", drawn(3, 2, 6), SLOTS)
    assert (weight.shape, weight.dtype, weight.dim()) == ((2, 6), torch.float64, 2)
    assert weight.device == torch.device("cpu")
    assert not weight.requires_grad
    assert repr(weight) == "RowParameter(head.weight, shape=(2, 6), dtype=torch.float64)"


INDICES = torch.tensor([[-1, -1], [7, 2], [4, 4]])
"""Of three adapters: none, two tokens, and one that is named twice."""


class Ends(nn.Module):
    """An embedding and a head over one weight, with and without a bias."""

    def __init__(self, *, turned: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9, 6))
        self.bias = nn.Parameter(torch.ones(9))
        self.turned = turned

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.weight)
        return x @ self.weight.T if self.turned else F.linear(x, self.weight, self.bias)


def patched(weight: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    return weight.index_copy(0, indices[indices >= 0], rows[indices >= 0])


@pytest.mark.parametrize("shape", [(4, 5), (4,), (4, 2, 3), (20,)], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["linear", "transposed"])
def test_rows_of_tokens_are_replaced(shape: tuple[int, ...], turned: bool) -> None:
    module = Ends(turned=turned).double()
    x, weight, bias = ids(*shape), drawn(9, 6), drawn(9)
    rows = drawn(3, 2, 6) + 5
    rows[2, 1] = rows[2, 0]
    fixed = {"bias": bias}
    together = PatchedWeight("weight", weight, INDICES, rows, SLOTS)
    got = replaced(module, {**fixed, "weight": together}, x)
    alone = [
        replaced(module, {**fixed, "weight": patched(weight, INDICES[slot], rows[slot])}, part)
        for slot, part in zip(SLOTS, x.chunk(len(SLOTS)), strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(alone), **EXACT)
    for slot in range(3):
        single = PatchedWeight("weight", weight, INDICES[slot], rows[slot])
        want = replaced(module, {**fixed, "weight": patched(weight, INDICES[slot], rows[slot])}, x)
        torch.testing.assert_close(replaced(module, {**fixed, "weight": single}, x), want, **EXACT)


def test_replaced_rows_have_no_other_functions() -> None:
    weight = PatchedWeight("embed.weight", drawn(9, 6), INDICES[0], drawn(2, 6))
    assert weight.shape == (9, 6)
    assert weight.T.shape == (6, 9)
    with pytest.raises(ConfigError, match=r"embed\.weight has no values for each row in sum\(\)"):
        weight.sum()
    x = drawn(4, 6)
    for read in (
        lambda: F.layer_norm(weight, (6,)),
        lambda: F.rms_norm(weight, (6,)),
        lambda: F.group_norm(weight, 2),
        lambda: F.batch_norm(weight, torch.zeros(6), torch.ones(6)),
        lambda: F.linear(x, drawn(9, 6), weight),
    ):
        with pytest.raises(ConfigError, match=r"embed\.weight has no values for each row"):
            read()
