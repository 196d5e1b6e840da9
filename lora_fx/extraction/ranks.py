"""The rule for the ranks of an extracted adapter."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Final

from lora_fx.adapters import budget_of
from lora_fx.config import whole_number
from lora_fx.errors import ConfigError

__all__ = ["DEFAULT_RANK", "RankChoice"]

DEFAULT_RANK: Final = 16


@dataclasses.dataclass(frozen=True)
class RankChoice:
    """The rule for the rank of each site. At most one of the three attributes is set.

    Attributes:
        rank: The same rank for all sites, or less for a matrix that is too small.
        energy: Each site gets the smallest rank that keeps this share of ``‖ΔW‖²``, in (0, 1].
        budget: The number of elements of the whole adapter. Ranks go to the sites where they keep most of
            ``‖ΔW‖²`` for their size.
    """

    rank: int | None = DEFAULT_RANK
    energy: float | None = None
    budget: int | None = None

    @classmethod
    def of(
        cls, rank: int | None = None, energy: float | None = None, budget: int | str | None = None
    ) -> RankChoice:
        """Create the rule from the arguments of a public function. Without any, the rank is 16.

        Args:
            rank: A rank.
            energy: A share.
            budget: A number of parameters, or a size such as "20MB" for parameters of 4 bytes.

        Raises:
            ConfigError: If several arguments are set, or a value is out of range.
        """
        named = {"rank": rank, "energy": energy, "budget": budget}
        chosen = [name for name, value in named.items() if value is not None]
        if len(chosen) > 1:
            raise ConfigError(
                f"{' and '.join(chosen)} are given: the ranks follow from one of rank, energy and budget"
            )
        number = whole_number(rank)
        if rank is not None and (number is None or number < 1):
            raise ConfigError(f"rank: found {rank!r}; a whole number of at least 1 is needed")
        if energy is not None and not (_is_number(energy) and 0 < energy <= 1):
            raise ConfigError(
                f"energy: found {energy!r}; it is the share of ‖ΔW‖² to keep, above 0 and at most 1"
            )
        return cls(
            rank=DEFAULT_RANK if not chosen else number,
            energy=None if energy is None else float(energy),
            budget=None if budget is None else _parameters(budget),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _parameters(budget: int | str) -> int:
    """Convert a budget to a number of parameters. A size such as "20MB" is divided by 4 bytes each."""
    limit, unit = budget_of(budget)
    return limit // 4 if unit == "bytes" else limit
