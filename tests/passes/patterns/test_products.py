"""Products of every rank, through every view, one after the other: each beside the dense weights.

The programs are random, and hypothesis makes those that fail small.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.passes.pipeline import plan_model
from tests import algebra
from tests.algebra import Letters
from tests.numerics import relative_error
from tests.zoo import sample, seeded

HEADS = 2
# The letters of a weight, and its shape for `n` inputs and `m` outputs, by the way in which it is applied.
WAYS: dict[str, tuple[Letters, Any]] = {
    "x @ w": (Letters("io", "o", "i"), lambda n, m: (n, m)),
    "x @ w.T": (Letters("oi", "o", "i"), lambda n, m: (m, n)),
    "x @ w.permute(dims=)": (Letters("oi", "o", "i"), lambda n, m: (m, n)),
    "x @ w.transpose(dim0=, dim1=)": (Letters("oi", "o", "i"), lambda n, m: (m, n)),
    "x @ moveaxis(w)": (Letters("oi", "o", "i"), lambda n, m: (m, n)),
    "matmul(input=, other=)": (Letters("io", "o", "i"), lambda n, m: (n, m)),
    "linear": (Letters("oi", "o", "i"), lambda n, m: (m, n)),
    "linear, flattened": (Letters("oij", "o", "ij"), lambda n, m: (m, HEADS, n // HEADS)),
    "w @ x.mT": (Letters("oi", "o", "i"), lambda n, m: (m, n)),
    "einsum": (Letters("io", "o", "i"), lambda n, m: (n, m)),
    "einsum to heads": (Letters("hid", "hd", "i"), lambda n, m: (HEADS, n, m // HEADS)),
    "einsum from heads": (Letters("hod", "o", "hd"), lambda n, m: (HEADS, m, n // HEADS)),
    "one expert": (Letters("eoi", "o", "i"), lambda n, m: (3, m, n)),
}


def step(way: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # noqa: C901  a table of code
    if way == "x @ w":
        return x @ w
    if way == "x @ w.T":
        return x @ w.T
    if way == "x @ w.permute(dims=)":
        return x @ w.permute(dims=(1, 0))
    if way == "x @ w.transpose(dim0=, dim1=)":
        return torch.matmul(x, w.transpose(dim0=-2, dim1=1))
    if way == "x @ moveaxis(w)":
        return x @ torch.moveaxis(w, 0, destination=-1)
    if way == "matmul(input=, other=)":
        return torch.matmul(input=x, other=w)
    if way == "linear":
        return F.linear(x, w)
    if way == "linear, flattened":
        return F.linear(x, weight=torch.flatten(input=w, start_dim=1))
    if way == "w @ x.mT":
        return (w @ x.mT).mT
    if way == "einsum":
        return torch.einsum("...i,io->...o", x, w)
    if way == "einsum to heads":
        return torch.einsum("...i,hid->...hd", x, w).flatten(-2)
    if way == "einsum from heads":
        return torch.einsum("...hd,hod->...o", x.unflatten(-1, (HEADS, -1)), w)
    return x @ w.select(dim=-3, index=1).mT  # one expert


class Program(nn.Module):
    """Products one after the other; a number says which weight a step has, so that one may come twice."""

    def __init__(self, steps: list[tuple[str, int, bool]], shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s).double() / 2) for s in shapes)
        self.steps = tuple(steps)

    def forward(self, x):
        for way, number, bent in self.steps:
            x = step(way, x, self.weights[number])
            if bent:
                x = torch.tanh(x)
        return x


@dataclasses.dataclass(frozen=True)
class Case:
    steps: list[tuple[str, int, bool]]
    shapes: list[tuple[int, ...]]
    x: tuple[int, ...]

    @property
    def letters(self) -> dict[str, Letters]:
        return {f"weights.{number}": WAYS[way][0] for way, number, _ in self.steps}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    widths = st.sampled_from([2, 4, 6])
    # A vector has no transpose.
    ways = [way for way in WAYS if batch or way != "w @ x.mT"]
    first = width = draw(widths)
    steps: list[tuple[str, int, bool]] = []
    shapes: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(1, 4))):
        again = steps and width == first and draw(st.booleans())
        if again and len(set(shapes)) == 1 and WAYS[steps[0][0]][1](width, width) == shapes[0]:
            way, number = steps[0][0], 0
        else:
            way, number, out = draw(st.sampled_from(ways)), len(shapes), draw(widths)
            shapes.append(WAYS[way][1](width, out))
            width = out
        steps.append((way, number, draw(st.booleans())))
    return Case(steps, shapes, (*batch, first))


OPTIONS = st.sampled_from([{}, {"use_dora": True}, {"lora_dropout": 0.4}, {"optimize": False}])


@given(case=cases(), options=OPTIONS, second=st.booleans())
def test_a_program_of_products_is_that_of_the_dense_weights(
    case: Case, options: dict[str, Any], second: bool
) -> None:
    check(case, options, second)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["", "DoRA"])
def test_every_way_is_one_of_an_exported_graph_too(options: dict[str, Any]) -> None:
    ways = [way for way in WAYS if way != "one expert" or not options]
    steps = [(way, number, number % 3 == 0) for number, way in enumerate(ways)]
    shapes = [WAYS[way][1](4, 4) for way in ways]
    check(Case(steps, shapes, (3, 4)), options, second=not options, frontend="export")


def check(case: Case, options: dict[str, Any], second: bool, **more: Any) -> None:
    model = seeded(Program)(case.steps, case.shapes)
    x = sample(*case.x, dtype=torch.float64)
    if more:
        more["example_inputs"] = (x,)
    kept = dict(options)
    if kept.pop("optimize", True) is False:
        more["optimize"] = False
    if any(way == "one expert" for way, *_ in case.steps):
        kept.pop("use_dora", None)
    targets = list(case.letters)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, **kept)
    adapted = lora_fx.rewrite(model, config, **more)
    if second and "use_dora" not in kept:
        lora_fx.add_adapter(adapted, LoraConfig(r=3, target_modules=targets), "second")
        lora_fx.set_adapter(adapted, ["default", "second"])
    algebra.check_dense(model, algebra.randomize(adapted).eval(), case.letters, x)


class Applied(nn.Module):
    """One operation on a parameter `k`, whatever it is."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.randn(*shape).double() / 2)


class RightMatmul(Applied):
    def forward(self, x):
        return x @ self.k


class RightTransposed(Applied):
    def forward(self, x):
        return x.matmul(self.k.mT)


class LeftMatmul(Applied):
    def forward(self, x):
        return torch.matmul(self.k, x)


class LeftBmm(Applied):
    def forward(self, x):
        return torch.bmm(input=self.k, mat2=x)


class Mv(Applied):
    def forward(self, x):
        return torch.mv(self.k, vec=x)


class MvMethod(Applied):
    def forward(self, x):
        return self.k.mT.mv(x)


class Linear(Applied):
    def forward(self, x):
        return F.linear(bias=None, weight=self.k, input=x)


class Addmm(Applied):
    def forward(self, x):
        return torch.addmm(x[:1, :1], mat2=self.k, mat1=x)


class Indexed(Applied):
    def forward(self, x):
        chosen = (x.sum() > 0).long().reshape(1).repeat(3)
        return x @ self.k[chosen]


RANKS = [
    *((RightMatmul, shape) for shape in ((4, 4), (3, 4, 4))),
    *((RightTransposed, shape) for shape in ((4, 4), (3, 4, 4))),
    *((LeftMatmul, shape) for shape in ((4, 4), (3, 4, 4))),
    (LeftBmm, (3, 4, 4)),
    (Mv, (4, 4)),
    (MvMethod, (4, 4)),
    (Linear, (4, 4)),
    (Addmm, (4, 4)),
    (Indexed, (3, 4, 4)),
]
INNER_LAST = {LeftMatmul, LeftBmm, Mv, RightTransposed, Linear}


@pytest.mark.parametrize("x", [(4,), (1, 4), (4, 4), (3, 4, 4), (2, 3, 4, 4)], ids=str)
@pytest.mark.parametrize(("build", "shape"), RANKS)
def test_every_rank_of_input_and_weight(
    build: type[Applied], shape: tuple[int, ...], x: tuple[int, ...]
) -> None:
    model, value = seeded(build)(*shape), sample(*x, dtype=torch.float64)
    try:
        model(value)
    except (IndexError, RuntimeError):
        pytest.skip("PyTorch has no such product")
    matrix = "oi" if build in INNER_LAST else "io"
    letters = {"k": Letters(("e" if len(shape) == 3 else "") + matrix, "o", "i")}
    for dora in (False, True)[: 1 if len(shape) == 3 else 2]:
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["k"], use_dora=dora)
        adapted = algebra.randomize(lora_fx.rewrite(model, config))
        algebra.check_dense(model, adapted, letters, value)


def refusal(model: nn.Module) -> str:
    _, plan = plan_model(model, LoraConfig(target_modules=[]))
    assert not plan.sites
    assert not plan.skipped
    (rejection,) = plan.rejections
    assert rejection.name == "k"
    return rejection.reason


class MatmulOut(Applied):
    def forward(self, x, y):
        return torch.matmul(x, self.k, out=y)


class MmOut(Applied):
    def forward(self, x, y):
        return torch.mm(x, self.k, out=y)


class AddmmOut(Applied):
    def forward(self, x, y):
        return torch.addmm(y, x, self.k, out=y)


class BmmOut(Applied):
    def forward(self, x, y):
        return torch.bmm(x, self.k, out=y)


class MmInto(Applied):
    """A third argument: in which dtype the product is."""

    def forward(self, x, y):
        return torch.mm(x, self.k, torch.float64)


class OldAddmm(Applied):
    """The deprecated form, numbers first."""

    def forward(self, x, y):
        return torch.addmm(1, y, 1, x, self.k)


@pytest.mark.parametrize(
    ("build", "passed"),
    [
        (MatmulOut, "out"),
        (MmOut, "out"),
        (AddmmOut, "out"),
        (BmmOut, "out"),
        (MmInto, "#3"),
        (OldAddmm, "#4, #5"),
    ],
)
def test_an_argument_that_nobody_knows_refuses_the_operation(
    build: type[Applied], passed: str
) -> None:
    model = build(*((3, 4, 4) if build is BmmOut else (4, 4)))
    assert f"is called with {passed}, and nothing says what that does" in refusal(model)


class OutOfNone(Applied):
    def forward(self, x):
        return torch.matmul(x, self.k, out=None)


def test_none_is_what_an_argument_is_by_default() -> None:
    model, x = seeded(OutOfNone)(4, 4), sample(3, 4, dtype=torch.float64)
    adapted = algebra.randomize(lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["k"])))
    algebra.check_dense(model, adapted, {"k": Letters("io", "o", "i")}, x)


class Bilinear(Applied):
    def forward(self, x):
        return F.bilinear(x, x, self.k)


class CastToNumbers(Applied):
    def forward(self, x):
        return x @ self.k.to(torch.int64).double()


class ReadAsBytes(Applied):
    def forward(self, x):
        return x @ self.k.view(torch.int64)


class PermutedOutOfRange(Applied):
    def forward(self, x):
        return x @ self.k.permute(dims=(1, 0, 2))


class TransposedByTheInput(Applied):
    def forward(self, x):
        return x @ self.k.transpose(x.dim() - 2, 0)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Bilinear, "its only use is by bilinear"),
        (CastToNumbers, "the weight is computed from it"),
        (ReadAsBytes, "the weight is computed from it"),
        (PermutedOutOfRange, "the weight is computed from it (permute)"),
        (TransposedByTheInput, "its only use is by"),
    ],
)
def test_a_view_that_is_no_matrix_of_the_weight_is_refused(
    build: type[Applied], reason: str
) -> None:
    assert reason in refusal(build(*((4, 4, 4) if build is Bilinear else (4, 4))))


class Rows(Applied):
    def forward(self, x):
        return F.linear(x, self.k.narrow(dim=-2, start=-2, length=2))


class Halves(Applied):
    def forward(self, x):
        first, second = torch.split(tensor=self.k, split_size_or_sections=2, dim=-2)
        return F.linear(x, first) * F.linear(x, second)


@pytest.mark.parametrize("build", [Rows, Halves])
def test_rows_are_cut_by_keyword_and_counted_from_the_end(build: type[Applied]) -> None:
    model, x = seeded(build)(4, 5), sample(3, 5, dtype=torch.float64)
    config = LoraConfig(r=2, target_modules=["k", "k.0_2", "k.2_4"])
    adapted = algebra.randomize(lora_fx.rewrite(model, config))
    merged = lora_fx.merge(adapted)
    assert relative_error(merged(x), model(x)) > 0.01
    assert relative_error(adapted(x), merged(x)) < 1e-12
    untouched = 4 - sum(row.site.out_features for row in adapted._lora_fx.adapters["default"].sites)
    assert torch.equal(merged.k[:untouched], model.k[:untouched])


class Mm(Applied):
    def forward(self, x):
        return torch.mm(x, self.k)


class SparseMm(Applied):
    def forward(self, x):
        return torch.sparse.mm(x, self.k)


SPARSE_OPTIONS = [{}, {"use_dora": True}, {"lora_dropout": 0.5}, {"optimize": False}]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("options", SPARSE_OPTIONS, ids=str)
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("build", [Linear, Mm, SparseMm])
def test_a_sparse_input(build: type[Applied], layout: Any, options: dict[str, Any]) -> None:
    model = seeded(build)(5, 5)
    x = F.relu(sample(4, 5, dtype=torch.float64)).to_sparse(layout=layout)
    optimize = options.get("optimize", True)
    kept = {name: value for name, value in options.items() if name != "optimize"}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["k"], **kept)
    adapted = algebra.randomize(lora_fx.rewrite(model, config, optimize=optimize))
    letters = {"k": Letters("oi" if build is Linear else "io", "o", "i")}
    weights = algebra.dense_weights(model, adapted, letters)
    exact = torch.func.functional_call(model, weights, (x,))
    adapted.eval()
    assert relative_error(adapted(x), exact) < 1e-12
    assert relative_error(lora_fx.merge(adapted)(x), exact) < 1e-12
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(adapted(x).sum(), trained)
    assert relative_error(found, torch.autograd.grad(exact.sum(), trained)) < 1e-12
    if "lora_dropout" in options:
        adapted.train()
        several = torch.stack([adapted(x) for _ in range(3000)]).mean(0)
        assert not torch.equal(adapted(x), adapted(x))
        assert relative_error(several, exact) < 0.1


def test_a_sparse_weight_is_refused() -> None:
    model = RightMatmul(4, 4)
    model.k = nn.Parameter(model.k.detach().to_sparse(), requires_grad=False)
    assert "its weight is sparse (sparse_coo)" in refusal(model)
