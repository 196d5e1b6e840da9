"""How adapters are combined: PEFT's names and options, checked."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Final, get_args

from lora_fx.errors import ConfigError
from lora_fx.passes.merge.pruning import Election

__all__ = ["COMBINATIONS", "Combination"]

COMBINATIONS: Final = (
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
"""The ways to combine, by PEFT's names."""

_DRIVERS: Final = (None, "gesvd", "gesvdj", "gesvda")


@dataclasses.dataclass(frozen=True)
class Combination:
    """How adapters are combined; the fields are PEFT's, validated on construction.

    Attributes:
        kind: One of :data:`COMBINATIONS`.
        svd_rank: For kinds that end in ``svd``: the rank; by default the largest of the adapters'.
        svd_clamp: For the same: a quantile in (0, 1] beyond which elements of A and B are clamped.
        svd_full_matrices, svd_driver: For the same, as ``torch.linalg.svd`` takes them.
        density: For kinds that prune: which share of the elements is kept, in (0, 1].
        majority_sign_method: For kinds with ``ties``: whether values (``total``) or signs
            (``frequency``) elect.

    Raises:
        ConfigError: If a field cannot mean anything, or a density is needed and missing.
    """

    kind: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: Election = "total"

    def __post_init__(self) -> None:
        if self.kind not in COMBINATIONS:
            near = difflib.get_close_matches(str(self.kind), COMBINATIONS) or COMBINATIONS
            raise _bad("combination_type", self.kind, f"nearest: {', '.join(map(repr, near))}")
        rank = self.svd_rank
        if rank is not None and not _is_rank(rank):
            raise _bad("svd_rank", rank, "a rank is a whole number of at least 1")
        if self.svd_clamp is not None and not _is_share(self.svd_clamp):
            raise _bad("svd_clamp", self.svd_clamp, "it is a quantile: above 0 and at most 1")
        if self.svd_driver not in _DRIVERS:
            raise _bad("svd_driver", self.svd_driver, f"the drivers are {_DRIVERS}")
        if self.majority_sign_method not in get_args(Election):
            remedy = f"the methods are {get_args(Election)}"
            raise _bad("majority_sign_method", self.majority_sign_method, remedy)
        if self.prunes and not _is_share(self.density):
            remedy = f"{self.kind!r} keeps a share of the elements: above 0 and at most 1"
            raise _bad("density", self.density, remedy)

    @property
    def prunes(self) -> bool:
        """Whether elements are dropped before the tensors are added."""
        return self.kind.startswith(("ties", "dare", "magnitude"))

    @property
    def by_product(self) -> bool:
        """Whether it works on ``B A`` and takes it apart again."""
        return self.kind.endswith("svd")

    def among(self, adapters: int) -> Combination:
        """What is done with so many adapters: a single one is only weighted, as in PEFT."""
        return self if adapters > 1 else Combination("linear")

    @property
    def needs_equal_ranks(self) -> bool:
        """Whether it adds factors of different adapters element by element."""
        return self.kind != "cat" and not self.by_product


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_share(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= 1


def _bad(name: str, found: object, remedy: str) -> ConfigError:
    return ConfigError(f"{name}: found {found!r}; {remedy}")
