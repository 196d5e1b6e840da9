"""Several adapters of a site in one: PEFT's results, and fp64 where PEFT has none."""

from __future__ import annotations

import re
import warnings
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_fx.adapters.weighted import COMBINATIONS, Combination, Term, combine
from lora_fx.errors import ConfigError
from lora_fx.ir.site import Layout
from tests.numerics import assert_close, assert_same_bits

PRUNING = [kind for kind in COMBINATIONS if Combination(kind, density=0.5).prunes]
WEIGHTS = [0.7, -1.3, 0.4]
RANKS = {"one": 3, "two": 3, "three": 3}
ALPHAS = {"one": 5, "two": 3, "three": 1}


class Layers(nn.Module):
    """One layer of every kind that PEFT combines; what it computes is of no interest."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 7)
        self.turned = Conv1D(7, 10)
        self.table = nn.Embedding(12, 6)
        self.conv = nn.Conv2d(4, 6, 3)
        self.pointwise = nn.Conv2d(6, 5, 1)
        self.line = nn.Conv1d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


NAMES = ["linear", "turned", "table", "conv", "pointwise"]


def peft_model(ranks: dict[str, int] = RANKS, targets: dict[str, list[str]] | None = None) -> Any:
    torch.manual_seed(0)
    model: Any = None
    for name, rank in ranks.items():
        own = (targets or {}).get(name, [*NAMES, "line"])
        config = peft.LoraConfig(r=rank, lora_alpha=ALPHAS[name], target_modules=own)
        if model is None:
            model = peft.get_peft_model(Layers(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.5)
    return model.base_model


def factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    if adapter in layer.lora_embedding_A:
        pair = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        pair = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return pair[0].detach(), pair[1].detach()


def terms_of(layer: Any, weights: list[float]) -> list[Term]:
    return [
        Term(*factors(layer, name), layer.scaling[name], weight)
        for name, weight in zip(RANKS, weights, strict=False)
        if name in layer.scaling
    ]


def product(a: torch.Tensor, b: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """``B A`` as [groups, out, in ...]."""
    return b.reshape(groups, b.shape[0] // groups, -1) @ a.reshape(groups, a.shape[0] // groups, -1)


def weighted_by_peft(model: Any, weights: list[float], **options: Any) -> None:
    """PEFT's, drawing from a generator of its own: else it draws a start for the new adapter first."""
    generator = torch.Generator().manual_seed(7)
    draw = torch.bernoulli

    def bernoulli(values: torch.Tensor) -> torch.Tensor:
        return draw(values, generator=generator)

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        # "The density is greater than or equal to 1".
        warnings.simplefilter("ignore")
        patch.setattr(torch, "bernoulli", bernoulli)
        model.add_weighted_adapter([*RANKS][: len(weights)], weights, "new", **options)


def options_of(kind: str, **more: Any) -> dict[str, Any]:
    density = {"density": 0.6} if kind in PRUNING else {}
    return {"combination_type": kind, **density, **more}


def ours(
    layer: Any,
    weights: list[float],
    generator: torch.Generator | None = None,
    *,
    combination_type: str,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    how = Combination(combination_type, **options)
    turned = isinstance(layer.get_base_layer(), nn.Embedding | Conv1D)
    layout: Layout = "in_out" if turned else "out_in"
    return combine(terms_of(layer, weights), how, layout=layout, generator=generator)


CASES = [
    *(options_of(kind) for kind in COMBINATIONS),
    *(options_of(kind, density=1.0) for kind in PRUNING),
    *(options_of(k, majority_sign_method="frequency") for k in COMBINATIONS if "ties" in k),
    *(options_of(k, svd_rank=rank) for k in COMBINATIONS if "svd" in k for rank in (1, 4, 5)),
    *(options_of(k, svd_clamp=0.9) for k in COMBINATIONS if "svd" in k),
    *(options_of(k, svd_full_matrices=False) for k in COMBINATIONS if "svd" in k),
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("weights", [WEIGHTS, [0.5, 0.5], [-1.0, -2.0]], ids=str)
def test_gives_what_peft_gives(options: dict[str, Any], weights: list[float]) -> None:
    model = peft_model()
    del model.model.line
    weighted_by_peft(model, weights, **options)
    generator = torch.Generator().manual_seed(7)
    for name in NAMES:
        layer = model.model.get_submodule(name)
        a, b = ours(layer, weights, generator, **options)
        theirs = factors(layer, "new")
        assert layer.scaling["new"] == 1
        assert_close(product(a, b), product(*theirs), 1e-5)
        if "svd" not in options["combination_type"]:
            assert_close((a, b), theirs, 1e-6)
        elif options["combination_type"] != "svd":
            # The same decomposition of the same matrix, and so the same signs.
            assert_close((a, b), theirs, 1e-4)


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune", "dare_ties", "cat"])
def test_convolutions_of_one_dimension(kind: str) -> None:
    """PEFT takes each channel of their change apart by itself in an SVD: those are compared in fp64."""
    model = peft_model()
    options = options_of(kind)
    del model.model.conv, model.model.pointwise, model.model.table, model.model.linear
    del model.model.turned
    weighted_by_peft(model, WEIGHTS, **options)
    generator = torch.Generator().manual_seed(7)
    assert_close(
        ours(model.model.line, WEIGHTS, generator, **options),
        factors(model.model.line, "new"),
        1e-6,
    )


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_adapters_of_different_ranks_as_in_peft(kind: str) -> None:
    model = peft_model({"one": 2, "two": 3, "three": 1})
    del model.model.line
    weighted_by_peft(model, WEIGHTS, combination_type=kind)
    for name in NAMES:
        layer = model.model.get_submodule(name)
        a, b = ours(layer, WEIGHTS, combination_type=kind)
        assert a.shape[0] == (6 if kind == "cat" else 3)
        assert_close(product(a, b), product(*factors(layer, "new")), 1e-5)


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties_svd"])
def test_a_site_that_only_some_have_as_in_peft(kind: str) -> None:
    targets = {"one": ["linear", "conv"], "two": ["linear"], "three": ["conv", "table"]}
    model = peft_model(targets=targets)
    options = options_of(kind)
    weighted_by_peft(model, WEIGHTS, **options)
    for name in ("linear", "conv", "table"):
        layer = model.model.get_submodule(name)
        found = ours(layer, WEIGHTS, **options)
        assert_close(product(*found), product(*factors(layer, "new")), 1e-5)


@pytest.mark.parametrize("kind", ["svd", "linear", "dare_ties_svd"])
def test_a_single_adapter_is_weighted_as_in_peft(kind: str) -> None:
    model = peft_model()
    options = options_of(kind)
    weighted_by_peft(model, [-1.3], **options)
    how = Combination(options.pop("combination_type"), **options).among(1)
    for name in NAMES:
        layer = model.model.get_submodule(name)
        assert_close(combine(terms_of(layer, [-1.3]), how), factors(layer, "new"), 1e-6)


def grouped(rank: int, groups: int, seed: int) -> Term:
    torch.manual_seed(seed)
    a, b = torch.randn(rank, 2, 3, 3), torch.randn(8, rank // groups, 1, 1)
    return Term(a, b, 0.5 + seed, 0.8 - seed)


def delta(term: Term, groups: int = 1) -> torch.Tensor:
    return product(term.a.double(), term.b.double(), groups) * term.scale * term.weight


def test_grouped_convolutions_group_by_group() -> None:
    terms = [grouped(4, 2, 0), grouped(8, 2, 1)]
    exact = sum(delta(term, 2) for term in terms)
    a, b = combine(terms, Combination("cat"), groups=2)
    assert (a.shape, b.shape) == ((12, 2, 3, 3), (8, 6, 1, 1))
    assert_close(product(a, b, 2), exact, 1e-5)
    a, b = combine(terms, Combination("svd", svd_rank=4), groups=2)
    assert (a.shape, b.shape) == ((4, 2, 3, 3), (8, 2, 1, 1))
    u, s, vh = torch.linalg.svd(torch.as_tensor(exact), full_matrices=False)
    assert_close(product(a, b, 2), (u[..., :2] * s[:, None, :2]) @ vh[:, :2], 1e-5)
    with pytest.raises(ConfigError, match="2 groups needs a rank that they divide, not 3"):
        combine(terms, Combination("svd", svd_rank=3), groups=2)


@pytest.mark.parametrize("kind", ["cat", "svd", "magnitude_prune_svd"])
def test_experts_one_by_one(kind: str) -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(4, 2, 5), torch.randn(4, 6, 2)) for _ in range(2)]
    terms = [Term(a, b, 2.0, w) for (a, b), w in zip(pairs, (0.5, -1.0), strict=True)]
    how = Combination(kind, svd_rank=4, density=1.0)
    a, b = combine(terms, how, experts=True)
    assert (a.shape, b.shape) == ((4, 4, 5), (4, 6, 4))
    assert_close(b @ a, sum(t.b.double() @ t.a.double() * t.scale * t.weight for t in terms), 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, 6) for _ in range(2))),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    target=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_svd_is_the_closest_of_its_rank(
    sizes: tuple[int, int], ranks: list[int], target: int, seed: int
) -> None:
    """Eckart and Young, by the short way and, above the sum of the ranks, by the long one."""
    torch.manual_seed(seed)
    columns, rows = sizes
    terms = [
        Term(torch.randn(r, columns).double(), torch.randn(rows, r).double(), 1.5, (-0.5) ** i)
        for i, r in enumerate(ranks)
    ]
    a, b = combine(terms, Combination("svd", svd_rank=target))
    exact = sum(delta(term) for term in terms)
    rank = min(target, columns, rows)
    assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
    lost = torch.linalg.svdvals(torch.as_tensor(exact)[0])[rank:].square().sum()
    assert (product(a, b) - exact).square().sum() == pytest.approx(float(lost), rel=1e-9, abs=1e-18)


def test_a_large_table_needs_no_matrix_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    svd = torch.linalg.svd

    def noted(matrix: torch.Tensor, **options: Any) -> Any:
        sizes.append(tuple(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", noted)
    terms = [Term(torch.randn(4, 50_000), torch.randn(64, 4), 1.0, 1.0) for _ in range(2)]
    a, b = combine(terms, Combination("svd"))
    assert (a.shape, b.shape) == ((4, 50_000), (64, 4))
    assert sizes == [(1, 8, 8)]


def test_the_result_is_new_and_the_terms_stay() -> None:
    for kind in COMBINATIONS:
        terms = [Term(torch.randn(2, 5), torch.randn(4, 2), 1.0, 1.0) for _ in range(2)]
        before = [(t.a.clone(), t.b.clone()) for t in terms]
        a, b = combine(terms, Combination(kind, density=1.0))
        a.zero_()
        b.zero_()
        for term, old in zip(terms, before, strict=True):
            assert_same_bits((term.a, term.b), old)


def test_the_default_generator_is_torchs_own() -> None:
    terms = [Term(torch.randn(2, 5), torch.randn(4, 2), 1.0, 1.0) for _ in range(2)]
    how = Combination("dare_linear", density=0.5)
    torch.manual_seed(3)
    first = combine(terms, how)
    assert_same_bits(combine(terms, how, generator=torch.Generator().manual_seed(3)), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tie"}, "combination_type: found 'tie'; nearest: 'ties'"),
        ({"kind": None}, "combination_type: found None; nearest: 'svd', 'linear'"),
        ({"kind": "ties"}, "density: found None; 'ties' keeps a share"),
        ({"kind": "dare_linear", "density": 0}, "density: found 0"),
        ({"kind": "dare_linear", "density": 1.01}, "density: found 1.01"),
        ({"kind": "ties", "density": True}, "density: found True"),
        ({"kind": "ties", "density": float("nan")}, "density: found nan"),
        ({"svd_rank": 0}, "svd_rank: found 0"),
        ({"svd_rank": 1.5}, "svd_rank: found 1.5"),
        ({"svd_clamp": 2}, "svd_clamp: found 2"),
        ({"svd_driver": "qr"}, "svd_driver: found 'qr'"),
        ({"majority_sign_method": "vote"}, "majority_sign_method: found 'vote'"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Combination(**options)


def term(a: tuple[int, ...], b: tuple[int, ...], weight: float = 1.0) -> Term:
    return Term(torch.ones(a), torch.ones(b), 1.0, weight)


@pytest.mark.parametrize(
    ("terms", "kind", "message"),
    [
        ([], "svd", "fc: there is no adapter to combine"),
        ([term((2, 3), (4, 2), float("inf"))], "svd", "found a weight of inf"),
        ([term((2, 3), (4, 2), float("nan"))], "linear", "found a weight of nan"),
        ([Term(torch.full((2, 3), torch.nan), torch.ones(4, 2), 1.0, 1.0)], "svd", "not finite"),
        ([term((2, 3), (4, 2)), term((2, 5), (4, 2))], "cat", "A [3], B [4]; A [5], B [4]"),
        ([term((2, 3), (4, 2)), term((2, 3), (5, 2))], "svd", "A [3], B [4]; A [3], B [5]"),
        (
            [term((2, 3), (4, 2)), term((1, 3), (4, 1))],
            "linear",
            "factors of one rank, found [2, 1]",
        ),
    ],
)
def test_terms_that_do_not_go_together(terms: list[Term], kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        combine(terms, Combination(kind), where="fc")


def test_a_driver_of_cuda_without_cuda() -> None:
    with pytest.raises(ConfigError, match="svd_driver='gesvd' is one of cuSOLVER's"):
        combine([term((2, 3), (4, 2))], Combination(svd_driver="gesvd"))
