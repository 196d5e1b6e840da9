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
from torch import nn

from lora_fx.adapters.batches import Forward, called, counted, on_device, tokens_seen
from lora_fx.adapters.pca import Components
from lora_fx.adapters.statistics import Report, device_of, show_inputs
from lora_fx.config.lora_config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir.record import Record
from lora_fx.ir.values import PlannedSite
from lora_fx.passes.insert.seeds import site_generator

__all__ = ["Found", "components", "shared_out"]

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
