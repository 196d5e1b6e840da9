"""Compares every adapter of a model with the dense oracle in one backward pass.

The oracle is the *original* model with ``W' = W + s·BA`` in it. It knows of lora_fx only what BA means
in the layout of a weight (:meth:`lora_fx.ir.site.Pattern.delta`), nothing of graphs, branches or merges.
One forward and backward pass of each decides about all sites: outputs have to be equal, and gradients
of A and B those that the chain rule makes of the gradient of W'. An adapter that a call passes by has
none, or another one.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fx.errors import some
from lora_fx.ir import PlannedSite, Site, require_record
from lora_fx.passes.capture import relative_difference
from lora_fx.passes.parameters import factors_of
from lora_fx.passes.patterns import pattern_of
from lora_fx.tools.bench.counted import tensors

__all__ = [
    "Narrowest",
    "Verdict",
    "difference",
    "fingerprint",
    "floats",
    "in_double",
    "judge",
    "what_changed",
]


Run: TypeAlias = "Callable[[nn.Module], tuple[Any, torch.Tensor]]"
"""Calls a model: its output, and a loss of it. It makes the same random draws each time."""

_SHARE = 0.05  # of a weight's spread: enough to be seen, too little to send a token elsewhere
_ROUNDINGS = 64  # of the largest gradient: what may be left of terms that cancel each other
_FAINT = 1e-6  # what changes no other gradient


@dataclass
class Verdict:
    """The result of the comparison.

    Attributes:
        judged: Sites whose weight has a gradient in the oracle.
        unreached: Sites whose weight has none there: the call does not come to them, or drops what they
            compute.
        passed_by: Sites whose adapter has no gradient or another one, each with what is wrong.
        followers: How many others differ only because those do.
        stray: Parameters that have a gradient and belong to no adapter.
        errors: For every site the largest difference of its gradients from the oracle's, relative.
        output_error: Largest difference of an output from the oracle's, relative.
        tolerance: What either may be.
    """

    tolerance: float
    judged: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    passed_by: dict[str, str] = field(default_factory=dict)
    followers: int = 0
    stray: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    output_error: float = 0.0

    @property
    def worst(self) -> str:
        """The site whose gradients differ most; empty if there are no sites."""
        return max(self.errors, key=self.errors.__getitem__, default="")

    @property
    def right(self) -> bool:
        """Whether the rewritten model is the oracle, at every site and nowhere else."""
        return not self.passed_by and not self.stray and self.output_error <= self.tolerance


class Narrowest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Sees in which floating-point type a model computes at its narrowest.

    A model in fp64 may have fp32 written into it: what it rounds to is no mistake of an adapter.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.dtype = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and looks at what it returns."""
        result = func(*args, **(kwargs or {}))
        for made in tensors(result):
            if made.is_floating_point() and _eps(made.dtype) > _eps(self.dtype):
                self.dtype = made.dtype
        return result


def tolerance_of(dtype: torch.dtype) -> float:
    """What a result may differ by, relative: half of the digits that the dtype has."""
    return math.sqrt(_eps(dtype))


def judge(original: nn.Module, adapted: nn.Module, run: Run, dtype: torch.dtype) -> Verdict:
    """Compares a rewritten model with the oracle, at random A and B.

    Args:
        original: The model that was rewritten; it is copied.
        adapted: The rewritten model; its factors get new random values.
        run: Calls either.
        dtype: The narrowest in which it computes.

    Returns:
        What differs.

    Raises:
        ValueError: The oracle's gradients are not finite: nothing can be said.
    """
    verdict = _verdict(original, adapted, run, dtype, _SHARE)
    if verdict.passed_by:
        # An adapter that is passed by makes the gradients of others another's, too, in proportion to ΔW.
        near = _verdict(original, adapted, run, dtype, _FAINT)
        causes = {n: how for n, how in near.passed_by.items() if near.errors[n] > math.sqrt(_FAINT)}
        verdict.followers = len(verdict.passed_by.keys() - causes.keys()) if causes else 0
        verdict.passed_by = causes or verdict.passed_by
    return verdict


def _verdict(
    original: nn.Module, adapted: nn.Module, run: Run, dtype: torch.dtype, share: float
) -> Verdict:
    stir(adapted, share)
    oracle = dense(original, adapted)
    expected, loss = run(oracle)
    _backward(loss)
    adapted.zero_grad()
    found, loss = run(adapted)
    _backward(loss)
    verdict = Verdict(tolerance_of(dtype), output_error=difference(found, expected))
    factors = {id(p) for place in _places(adapted) for p in place.pair}
    verdict.stray = [
        name
        for name, parameter in adapted.named_parameters()
        if id(parameter) not in factors and (parameter.requires_grad or parameter.grad is not None)
    ]
    _compare(adapted, _chain_rule(oracle, adapted), verdict, _eps(dtype))
    adapted.zero_grad()
    return verdict


def stir(adapted: nn.Module, share: float = _SHARE) -> None:
    """Gives all factors new random values: neither A nor B is zero, and ΔW is a small part of each weight.

    Args:
        adapted: The rewritten model.
        share: The spread of ΔW, relative to that of the weight.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for place in _places(adapted):
            for factor in place.pair:
                drawn = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                factor.copy_(drawn)
            weight = adapted.get_parameter(place.row.site.weight).double()
            spread = float(weight.std()) if weight.numel() > 1 else 0.0
            change = float(place.change(*place.pair).double().square().mean().sqrt())
            place.pair[1].mul_(share * (spread or 1.0) / max(change, 1e-12))


def dense(original: nn.Module, adapted: nn.Module) -> nn.Module:
    """A copy of the original with ``W' = W + s·BA``, which only these weights want a gradient of."""
    oracle = copy.deepcopy(original)
    for parameter in oracle.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for place in _places(adapted):
            site = place.row.site
            weight = oracle.get_parameter(site.weight)
            total = site.applied(weight).clone()
            _part(total, site).add_(place.change(*place.pair).to(total))
            if site.tied_to:
                # The adapter is on this use of a tied weight, and on no other.
                weight = nn.Parameter(weight.detach().clone())
                setattr(oracle.get_submodule(site.owner), site.parameter, weight)
            weight.copy_(site.stored(total))
    for place in _places(adapted):
        oracle.get_parameter(place.row.site.weight).requires_grad_()
    return oracle


class _Place(NamedTuple):
    """A site with its A and B."""

    row: PlannedSite
    pair: tuple[nn.Parameter, nn.Parameter]

    def change(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``s·BA``, in the shape of what it is added to."""
        site = self.row.site
        a, b = (a.mT, b.mT) if self.row.tied else (a, b)
        shape = list(site.applied_shape)
        if site.rows is not None:
            shape[site.axis] = site.rows[1] - site.rows[0]
        return self.row.scale * pattern_of(site).delta(site, a, b).reshape(shape)


def _places(adapted: nn.Module) -> Iterator[_Place]:
    record = require_record(adapted)
    for name in record.active:
        for row in record.adapters[name].sites:
            yield _Place(row, factors_of(adapted, row, name).pair)


def _part(whole: torch.Tensor, site: Site) -> torch.Tensor:
    """The rows of a weight, in the shape in which it is applied, that are a site."""
    if site.rows is None:
        return whole
    return whole.narrow(site.axis, site.rows[0], site.rows[1] - site.rows[0])


def _chain_rule(oracle: nn.Module, adapted: nn.Module) -> dict[int, torch.Tensor]:
    """What the gradient of every factor has to be, by its id: one backward pass through all ΔW."""
    leaves: dict[int, torch.Tensor] = {}
    changes, gradients = [], []
    for place in _places(adapted):
        site = place.row.site
        gradient = oracle.get_parameter(site.weight).grad
        if gradient is None:
            continue
        a, b = (leaves.setdefault(id(p), p.detach().clone().requires_grad_()) for p in place.pair)
        changes.append(place.change(a, b))
        applied = _part(site.applied(gradient), site)
        gradients.append(applied.to(changes[-1]))
    if changes:
        torch.autograd.backward(changes, gradients)
    return {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def _compare(
    adapted: nn.Module, expected: dict[int, torch.Tensor], verdict: Verdict, eps: float
) -> None:
    places = list(_places(adapted))
    # Of A and of B apart: B is small, so that A has a small gradient.
    largest = [
        max((_largest(expected.get(id(place.pair[side]))) for place in places), default=0.0)
        for side in (0, 1)
    ]
    for place in places:
        name, reached, worst, silent = place.row.name, False, 0.0, True
        for factor, most in zip(place.pair, largest, strict=True):
            wanted = expected.get(id(factor))
            size = _largest(wanted)
            if not math.isfinite(size):
                raise ValueError(f"the oracle's gradient at {name} is not finite")
            reached = reached or size > _ROUNDINGS * eps * most
            silent = silent and _largest(factor.grad) == 0.0
            wanted = torch.zeros_like(factor) if wanted is None else wanted
            found = torch.zeros_like(factor) if factor.grad is None else factor.grad
            # What is left where large terms cancel each other is rounding, and compared as such.
            scale = max(
                size, _ROUNDINGS * verdict.tolerance * most, torch.finfo(torch.float64).tiny
            )
            worst = max(worst, _largest(found.double() - wanted.double()) / scale)
        (verdict.judged if reached else verdict.unreached).append(name)
        verdict.errors[name] = worst
        if worst > verdict.tolerance:
            how = "no gradient" if silent else f"another gradient, off by {worst:.0e}"
            verdict.passed_by[name] = how


def _largest(values: torch.Tensor | None) -> float:
    """The largest absolute value; infinity for what is not a number."""
    if values is None or not values.numel():
        return 0.0
    return float(values.detach().abs().max().double().nan_to_num(math.inf, math.inf))


def _backward(loss: torch.Tensor) -> None:
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def floats(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors in an output that hold anything."""
    return [t for t in tensors(value) if t.is_floating_point() and t.numel()]


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two outputs, relative to the largest value of each tensor.

    Returns:
        0 where no bit differs; infinity where shapes or types do, or only one is finite.
    """
    left, right = list(tensors(found)), list(tensors(expected))
    if [t.dtype for t in left] != [t.dtype for t in right]:
        return math.inf
    return relative_difference(left, right)


def in_double(value: Any) -> Any:
    """The inputs with every floating tensor in fp64."""

    def doubled(one: Any) -> Any:
        floating = isinstance(one, torch.Tensor) and one.is_floating_point()
        return one.double() if floating else one

    return pytree.tree_map(doubled, value)


def fingerprint(model: nn.Module) -> dict[str, str]:
    """What must not change: values, modes, gradients, modules and their classes."""
    found = {
        f"class of {name or 'root'}": type(module).__qualname__
        for name, module in model.named_modules()
    }
    found |= {f"mode of {n or 'root'}": str(m.training) for n, m in model.named_modules()}
    for name, parameter in model.named_parameters():
        gradient = "no gradient" if parameter.grad is None else "a gradient"
        found[f"parameter {name}"] = f"{_digest(parameter)} {parameter.requires_grad} {gradient}"
    found |= {f"buffer {name}": _digest(buffer) for name, buffer in model.named_buffers()}
    return found


def what_changed(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """The first few differences of two fingerprints; empty if there are none."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return some(keys, 3)


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
