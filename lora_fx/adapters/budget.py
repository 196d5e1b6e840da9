"""Ranks for a budget: each site gets the rank that its gradients justify.

A step along the gradient G of a weight, restricted to rank r, decreases the loss in first order by the sum of
the r largest squared singular values of G: no other update of rank r and of this norm decreases it more
(Eckart and Young; LoRA-GA, arXiv:2407.05000, starts from the same directions). So the r-th largest squared
singular value is the gain of the r-th rank, and (in + out) elements are its cost. Within a site, each further
rank gains less. The next rank goes to the site with the most gain for its cost, until nothing fits. GoRA
(arXiv:2502.12171) also distributes ranks by gradients, with another measure.

Every site has at least its smallest rank, because LoRA has to adapt all layers that the user has named. The
scale of each site is that of the configuration.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lora_fx.adapters.initialization import (
    Forward,
    check_has_values,
    gradients,
    running_base,
)
from lora_fx.adapters.manage import adapter_record
from lora_fx.adapters.settings import Target, with_patterns
from lora_fx.config import LoraConfig, parameter_entry, whole_number
from lora_fx.errors import ConfigError, some
from lora_fx.files import bytes_in
from lora_fx.ir import Plan, PlannedSite, Site, Spending
from lora_fx.kinds import chosen_kind
from lora_fx.passes.capture import Frontend
from lora_fx.passes.lowrank import allocate, spectrum
from lora_fx.passes.parameters import (
    adapter_dtype,
    as_matrices,
    base_parameters,
    matrix_shape,
    part_of,
)
from lora_fx.passes.pipeline import RewriteOptions, rewrite_model
from lora_fx.passes.plan import at_rank, start_objection
from lora_fx.progress import Progress

__all__ = ["Allotment", "Unit", "allot_ranks", "budget_of"]

Unit = Literal["bytes", "parameters"]


def budget_of(budget: object) -> tuple[int, Unit]:
    """Return a budget and its unit: ``3000`` and ``"3000"`` are parameters, and ``"20MB"`` is bytes.

    Raises:
        ConfigError: If the budget is neither a number of parameters nor a size in bytes.
    """
    digits = isinstance(budget, str) and budget.strip().isdecimal()
    number = int(budget) if isinstance(budget, str) and digits else whole_number(budget)
    if number is not None and number > 0:
        return number, "parameters"
    if isinstance(budget, str) and not digits:
        try:
            return bytes_in(budget, "budget"), "bytes"
        except ConfigError as error:
            raise ConfigError(
                f"budget {budget!r} is no size and no number of parameters: write 20MB, 16MiB or 3000000"
            ) from error
    raise ConfigError(
        f"budget is {budget!r}: give a number of parameters, or a size of the adapter's tensors such as "
        "'20MB'"
    )


@dataclasses.dataclass(frozen=True)
class Allotment:
    """The ranks of all sites within a budget.

    Attributes:
        config: The configuration with these ranks, and with alphas that keep each site's scale.
        gains: For each site, the share of all squared gradients that its rank keeps, by name.
        spent: The use of the budget.
    """

    config: LoraConfig
    gains: Mapping[str, float]
    spent: Spending

    def onto(self, plan: Plan) -> Plan:
        """Return a copy of a plan of :attr:`config`, with the gain of each site and the use of the budget."""
        rows = (dataclasses.replace(row, gain=self.gains.get(row.name)) for row in plan.sites)
        return dataclasses.replace(plan, sites=tuple(rows), spent=self.spent)


def allot_ranks(
    plan: Plan,
    model: nn.Module,
    budget: object,
    batches: Iterable[Any] | None,
    *,
    example_inputs: Any = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    forward: Forward | None = None,
    frontend: Frontend = "auto",
    progress: Progress = False,
) -> Allotment:
    """Choose the rank of each site of a plan within a budget.

    The gradients of all adapted weights are in host memory at the same time, in fp32.

    Args:
        plan: The plan. Its ranks only matter for the scales.
        model: The user's model. It is not changed.
        budget: As for :func:`lora_fx.plan`: the limit of everything that the adapter trains.
        batches: As for :func:`lora_fx.initialize`.
        example_inputs: As for :func:`lora_fx.capture`.
        loss_fn: As for :func:`lora_fx.initialize`.
        forward: As for :func:`lora_fx.initialize`.
        frontend: As for :func:`lora_fx.capture`.
        progress: As for :func:`lora_fx.initialize`.

    Raises:
        ConfigError: If the budget is not valid, or too small for the smallest rank at every site. If there
            are no batches, or their gradients cannot be computed or are all 0. If the kind or the start of
            the adapter has no rank to choose.
    """
    limit, unit = budget_of(budget)
    _check(plan, model, batches)
    sites = [_Site.of(model, row, plan.config, unit) for row in plan.sites if not row.tied]
    fixed = _fixed_cost(plan, model, unit)
    least = fixed + sum(site.cost_of(site.step) for site in sites)
    if limit < least:
        raise ConfigError(
            f"budget is {limit:,} {unit}, and the smallest rank at each of {len(sites)} sites takes "
            f"{least:,}: give at least that, or name fewer operations in target_modules"
        )
    assert batches is not None
    if isinstance(batches, torch.Tensor) or hasattr(batches, "keys"):
        batches = [batches]
    config = dataclasses.replace(
        plan.config,
        init_lora_weights=True,
        loftq_config=None,
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
    )
    options = RewriteOptions(loaded=True, quiet=True)
    # This copy shares the weights.
    twin = rewrite_model(model, config, example_inputs, options=options, frontend=frontend)
    rows = tuple(row for row in adapter_record(twin, "default").sites if not row.tied)
    with running_base(twin, batches, forward, progress, seed=config.seed or 0) as data:
        seen = gradients(twin, rows, data, loss_fn)
    device = next(model.parameters()).device
    for site in sites:
        site.gains = _gains(site.row.site, seen[site.row.site.weight].to(device))
    if not any(site.gains[-1] for site in sites):
        raise ConfigError(
            "budget: the gradients of all adapted weights are 0, so that no rank is better than another: "
            "give batches and labels whose loss depends on these weights"
        )
    _distribute(sites, limit - fixed)
    return _result(plan.config, sites, limit, fixed, unit)


def _check(plan: Plan, model: nn.Module, batches: object) -> None:
    config = plan.config
    if not chosen_kind(config).low_rank:
        raise ConfigError(
            f"budget: the adapter kind {chosen_kind(config).name!r} has no rank to choose"
        )
    if not plan.sites:
        raise ConfigError("budget: no operation is adapted, so that there is no rank to choose")
    if config.init_lora_weights == "eva":
        raise ConfigError(
            "budget: init_lora_weights='eva' distributes the ranks itself, by the inputs: leave out one of "
            "both"
        )
    if batches is None:
        raise ConfigError(
            "budget needs inputs: a few batches with labels, from whose gradients the ranks are chosen"
        )
    stored = [row.site.weight for row in plan.sites if row.site.quantized is not None]
    if stored:
        raise ConfigError(
            f"budget: {some(stored, 3)} cannot have a gradient, because of quantization: plan over the dense "
            "model, and use the config of that plan for the quantized one"
        )
    check_has_values(model)


@dataclasses.dataclass
class _Site:
    """A site, its costs and its gains while ranks are distributed.

    Attributes:
        row: The row of the site in the plan.
        step: The smallest rank of the site. All its ranks are multiples of this number.
        most: The largest rank of the site.
        start, each: Cost of the smallest rank, and of each further step.
        rank: The current rank.
        gains: Cumulative gains: entry k is the gain of the first k ranks. In a grouped convolution, k is the
            rank of each group, and the gain is that of all groups.
    """

    row: PlannedSite
    step: int
    most: int
    start: int
    each: int
    rank: int
    gains: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, row: PlannedSite, config: LoraConfig, unit: Unit) -> _Site:
        """Create the entry of a site at its smallest rank. Its gains are added later."""
        site = row.site
        _, out, inner = matrix_shape(site)
        limit = min(out, inner) * site.groups
        ranks = [
            rank
            for rank in range(site.groups, limit + 1, site.groups)
            if start_objection(site, rank, config) is None
        ]
        step = ranks[0]
        size = _bytes_each(model, site) if unit == "bytes" else 1
        first, second = (
            at_rank(model, row, rank, row.alpha, config).parameters * size
            for rank in (step, 2 * step)
        )
        most = max(rank for rank in ranks if rank % step == 0)
        return cls(row, step, most, first, second - first, step)

    def cost_of(self, rank: int) -> int:
        """Return the parameters or bytes that the adapter has at the site with a rank."""
        return self.start + (rank // self.step - 1) * self.each

    def gain_of(self, rank: int) -> float:
        """Return the cumulative gain of a rank: the sum of the gains of all ranks up to it."""
        return self.gains[rank // self.row.site.groups]

    @property
    def further_gains(self) -> list[float]:
        """The gain of each step from the current rank to the largest rank of the site."""
        gains = [self.gain_of(rank) for rank in range(self.rank, self.most + 1, self.step)]
        return [after - before for before, after in itertools.pairwise(gains)]


def _bytes_each(model: nn.Module, site: Site) -> int:
    """Return the size in bytes of one element of A and B at a site."""
    return adapter_dtype(base_parameters(model)[site.weight]).itemsize


def _fixed_cost(plan: Plan, model: nn.Module, unit: Unit) -> int:
    """Return the cost of everything that the adapter trains besides the factors, in ``unit``.

    These are biases, whole modules, and rows of embeddings.
    """
    if unit == "parameters":
        return plan.extra_parameters + sum(row.parameters for row in plan.tokens)
    own = base_parameters(model)
    inside = tuple(f"{name}." for name in plan.saved_modules)
    once = {
        id(own[name]): own[name] for name in own if name.startswith(inside) or name in plan.biases
    }
    trained = sum(p.numel() * adapter_dtype(p).itemsize for p in once.values())
    return trained + sum(row.parameters * _bytes_each(model, row.site) for row in plan.tokens)


def _gains(site: Site, gradient: torch.Tensor) -> list[float]:
    """Return the gains of the first 0, 1, 2, … ranks: sums of the largest squared singular values."""
    squares = spectrum(as_matrices(site, part_of(site, gradient)))
    return [0.0, *squares.cumsum(0).tolist()]


def _distribute(sites: Sequence[_Site], room: int) -> None:
    """Increase the ranks of the sites by their gains, as far as the total cost is at most ``room``."""
    room -= sum(site.cost_of(site.rank) for site in sites)
    steps = allocate(
        {site.row.name: site.further_gains for site in sites},
        {site.row.name: site.each for site in sites},
        room,
    )
    for site in sites:
        site.rank += site.step * steps[site.row.name]


def _result(
    config: LoraConfig, sites: Sequence[_Site], limit: int, fixed: int, unit: Unit
) -> Allotment:
    total = sum(site.gains[-1] for site in sites)
    targets = [_target(site, config) for site in sites]
    gains = {site.row.name: site.gain_of(site.rank) / total for site in sites}
    equal = _equal_rank(sites, limit - fixed)
    spent = Spending(
        limit=limit,
        used=fixed + sum(site.cost_of(site.rank) for site in sites),
        unit=unit,
        kept=sum(gains.values()),
        equal_rank=equal,
        equal_kept=sum(site.gain_of(min(equal, site.most)) for site in sites) / total,
    )
    return Allotment(with_patterns(config, targets), gains, spent)


def _target(site: _Site, config: LoraConfig) -> Target:
    """Return the configuration's entry for a site: the name, the rank, and an alpha that keeps the scale."""
    row = site.row
    named = parameter_entry(row.site.weight, config) is not None
    growth = site.rank / row.rank
    alpha = row.alpha * (growth**0.5 if config.use_rslora else growth)
    return Target(row.site.weight if named else row.name, site.rank, alpha, parameter=named)


def _equal_rank(sites: Sequence[_Site], room: int) -> int:
    """Return the largest rank that fits the budget if all sites have the same rank; 0 if none fits.

    A site with a smaller largest rank is counted with that rank. The result is also 0 if the rank of a site
    can only grow by more than 1.
    """

    def cost(rank: int) -> int:
        return sum(site.cost_of(min(rank, site.most)) for site in sites)

    if any(site.step > 1 for site in sites):
        return 0
    low, high = 0, max(site.most for site in sites)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= room else (low, middle - 1)
    return low
