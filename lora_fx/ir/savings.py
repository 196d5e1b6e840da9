"""Parts of a model that keep less for the backward pass with ``memory="least"``."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Saving", "Savings"]


class Saving(NamedTuple):
    """The ways in which a module keeps less.

    Attributes:
        block: Whether it runs again in the backward.
        tiles: Whether it runs a tile of tokens at a time.
    """

    block: bool = False
    tiles: bool = False


@dataclasses.dataclass(frozen=True)
class Savings:
    """The modules that are recomputed or run in tiles.

    Attributes:
        blocks: FQNs of the blocks. Each keeps its input, and runs again in the backward.
        tiles: FQNs of the modules that treat each token on its own. They run a tile of tokens at a time.
        left: FQNs of modules with adapters that run in neither way, each with the reason.
    """

    blocks: tuple[str, ...] = ()
    tiles: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    def of(self, fqn: str) -> Saving:
        """Return how a module keeps less."""
        return Saving(fqn in self.blocks, fqn in self.tiles)

    def lines(self) -> list[str]:
        """Return both kinds of modules in words."""
        blocks = f"run again in the backward (a GPU keeps their inputs on the host): {_counted(self.blocks)}"
        return [blocks, f"a tile of tokens at a time: {_counted(self.tiles)}"]


def _counted(names: Sequence[str]) -> str:
    """Return names in words, those that differ in numbers together."""
    counts = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"
