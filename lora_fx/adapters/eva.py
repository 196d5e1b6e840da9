"""EVA (Paischer et al. 2024, arXiv:2410.07170): A starts as the principal components of the inputs.

The data is gone through until the components of every site stand still. The rank of all sites together goes
to the components that explain most of the variance, whichever site they are of: a site gets up to ``rho``
times its rank, or none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.adapters.statistics import (
    Forward,
    Report,
    called,
    counted,
    device_of,
    on_device,
    show_inputs,
    tokens_seen,
)
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir import PlannedSite, Record
from lora_fx.passes.insert import low_rank_svd, signs, site_generator

__all__ = [
    "Components",
    "Found",
    "components",
    "shared_out",
]


_ITERATIONS = 4


class Components:
    """The leading components of all vectors that were seen.

    Attributes:
        directions: The components [n, in], of length 1, in order; None before the first batch.
        values: Their singular values.
        shares: Which share of the variance each one explains.
        steady: Which of them the last batch has hardly turned.
    """

    def __init__(self, count: int, threshold: float, generator: torch.Generator) -> None:
        self._count = count
        self._threshold = threshold
        self._generator = generator
        self._seen = 0
        self._mean = torch.zeros(0)
        self._spread = torch.zeros(0)  # the variance, times how many were seen
        self.directions: torch.Tensor | None = None
        self.values = torch.zeros(0)
        self.shares = torch.zeros(0)
        self.steady = torch.zeros(count, dtype=torch.bool)

    def add(self, batch: torch.Tensor) -> bool:
        """Takes a batch in, [k, in].

        Returns:
            False if it has fewer vectors than there are components: it is left out then.
        """
        if len(batch) < self._count:
            return False
        batch = batch.to(torch.float32)
        mean, before = batch.mean(0), self.directions
        total = self._seen + len(batch)
        rows = batch - mean
        spread = rows.square().sum(0)
        if before is not None:
            between = (self._seen * len(batch) / total) ** 0.5 * (self._mean - mean)
            rows = torch.cat([self.values[:, None] * before, rows, between[None]])
            spread = spread + self._spread + between.square()
            mean = (self._mean * self._seen + mean * len(batch)) / total
        _, values, directions = low_rank_svd(
            rows[None], 2 * self._count, _ITERATIONS, self._generator
        )
        self._seen, self._mean, self._spread = total, mean, spread
        self.values = values[0, : self._count]
        directions = directions[0, : self._count]
        self.directions = directions * signs(directions)[:, None]
        self.shares = self.values.square() / spread.sum()
        if before is not None:
            turned = F.cosine_similarity(self.directions, before)
            self.steady = (turned >= self._threshold).cpu()
        return True


_log = logging.getLogger("lora_fx")
_MOST_BATCHES = 1000


@dataclasses.dataclass(frozen=True)
class Found:
    """What a site gets.

    Attributes:
        rank: Its rank; 0 for no adapter.
        a: A, [rank, in].
    """

    rank: int
    a: torch.Tensor


def components(
    model: nn.Module,
    record: Record,
    rows: tuple[PlannedSite, ...],
    config: LoraConfig,
    batches: Iterable[Any],
    forward: Forward | None,
    report: Report,
) -> dict[str, Found]:
    """Ranks and components, by site.

    Args:
        model: A rewritten model with no active adapter. Its graphs are other ones afterwards.
        record: Its record.
        rows: The sites.
        config: Its options are ``eva_config``.
        batches: The data; it may be gone through several times.
        forward: How to call the model.
        report: Is told of every batch.

    Raises:
        ConfigError: If an input is not finite, a site is not run, or no batch has as many vectors as a site
            has components.
    """
    search = _Search(rows, config)
    show_inputs(model, record, rows, search.see)
    with torch.no_grad():
        for number, batch in _again_and_again(batches, search):
            if search.done:
                break
            steady = sum(search.steady(row.name) for row in rows)
            report(number, f"{steady} of {len(rows)} sites stand still")
            search.mask = tokens_seen(batch, search.ignored_label)
            batch = on_device(batch, device_of(model))
            if number == 0:
                search.begin()
                called(model.eval(), batch, number, forward)
                search.compare()
            called(model.eval(), batch, number, forward)
            search.share()
    return search.result()


def _again_and_again(batches: Iterable[Any], search: _Search) -> Iterator[tuple[int, Any]]:
    """The batches, from the first one again after the last one, up to a limit."""
    number = 0
    while number == 0 or (number < _MOST_BATCHES and not search.lacking):
        start = number
        try:
            for _, batch in counted(batches):
                yield number, batch
                number += 1
        except ConfigError:
            if start == 0:
                raise
            return  # an iterator, which can be gone through once


class _Search:
    """The state of the search."""

    def __init__(self, rows: tuple[PlannedSite, ...], config: LoraConfig) -> None:
        options: Any = config.eva_config
        self._config = config
        self._options = options
        self._ranks = {row.name: row.rank for row in rows}
        self._wanted = {
            row.name: min(round(row.rank * options["rho"]), row.site.in_features) for row in rows
        }
        self._inputs: dict[str, str] | None = {}
        self._same: dict[str, str] = {}
        self._found: dict[str, Components] = {}
        self._given: dict[str, int] = {}
        self.mask: torch.Tensor | None = None

    @property
    def ignored_label(self) -> int | None:
        """Tokens of this label do not count."""
        return self._options["label_mask_value"] if self._options["use_label_mask"] else None

    @property
    def done(self) -> bool:
        """Whether nothing moves any more."""
        return bool(self._given) and all(self.steady(name) for name in self._ranks)

    @property
    def lacking(self) -> list[str]:
        """Sites that no batch was large enough for."""
        return [name for name, found in self._found.items() if found.directions is None]

    def steady(self, name: str) -> bool:
        """Whether the components that a site gets stand still."""
        if not self._given:
            return False
        found = self._found[self._same[name]]
        return bool(found.steady[: self._given[self._same[name]]].all())

    def begin(self) -> None:
        """The next call of the model shows which sites read the same."""
        self._inputs = {}

    def compare(self) -> None:
        """Sites that read the same share their components."""
        assert self._inputs is not None
        idle = [name for name in self._ranks if name not in self._inputs]
        if idle:
            raise ConfigError(
                f"the data does not reach {', '.join(idle[:5])}: give batches that do, or leave it out "
                "with exclude_modules"
            )
        first: dict[str, str] = {}
        for name in self._ranks:
            self._same[name] = first.setdefault(self._inputs[name], name)
        for name, source in self._same.items():
            self._wanted[source] = max(self._wanted[source], self._wanted[name])
        for name, source in self._same.items():
            self._wanted[name] = self._wanted[source]
            if name == source:
                self._found[name] = Components(
                    self._wanted[name], self._options["tau"], site_generator(name, self._config)
                )
        self._given = dict(self._wanted)
        self._inputs = None

    def see(self, row: PlannedSite, x: torch.Tensor) -> None:
        """What a site reads."""
        if self.mask is not None and len(self.mask) == len(x):
            x = x[self.mask.to(x.device)]
        if not torch.isfinite(x).all():
            raise ConfigError(f"{row.name}: the model gives it inputs that are not finite")
        if self._inputs is not None:
            self._inputs.setdefault(row.name, _fingerprint(x))
        elif row.name in self._found and not self.steady(row.name):
            self._found[row.name].add(x)

    def share(self) -> None:
        """Gives the rank of all sites to the components that explain most."""
        if not self.lacking:
            shares = {name: found.shares for name, found in self._found.items()}
            self._given = shared_out(shares, self._same, self._ranks)

    def result(self) -> dict[str, Found]:
        """What the search has come to."""
        for name in self.lacking:
            raise ConfigError(
                f"{name}: no batch has the {self._wanted[name]} vectors that its components need "
                "(rank times eva_config['rho']): give larger batches"
            )
        moving = [name for name in self._ranks if not self.steady(name)]
        if moving:
            _log.warning(
                "init_lora_weights='eva': the components of %s still moved when the data ended",
                ", ".join(moving),
            )
        return {name: self._of(name) for name in self._ranks}

    def _of(self, name: str) -> Found:
        found, rank = self._found[self._same[name]], self._given[name]
        assert found.directions is not None
        a = found.directions[:rank]
        if self._options["whiten"]:
            a = a / found.values[:rank, None].sqrt()
        return Found(rank, a)


def shared_out(
    shares: Mapping[str, torch.Tensor], same: Mapping[str, str], ranks: Mapping[str, int]
) -> dict[str, int]:
    """How many components each site gets, of as many as the ranks are together.

    Args:
        shares: Which share of the variance each component explains, by site that has some of its own.
        same: For every site the one whose components it has.
        ranks: The ranks to give away. Among sites of the same components the one that owns them gets most.
    """
    order = [*shares, *(name for name, source in same.items() if name != source)]
    owners = [name for name in order for _ in shares[same[name]]]
    every = torch.cat([shares[same[name]].cpu() for name in order])
    best = every.argsort(descending=True, stable=True)[: sum(ranks.values())]
    counts = Counter(owners[index] for index in best.tolist())
    given = {name: counts.get(name, 0) for name in ranks}
    for name, source in same.items():
        if given[source] < given[name]:
            given[source], given[name] = given[name], given[source]
    return given


def _fingerprint(x: torch.Tensor) -> str:
    data = x.to("cpu").contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(x.shape)}:{hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()}"
