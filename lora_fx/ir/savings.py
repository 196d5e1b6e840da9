"""Parts of a model that keep less for the backward pass with ``memory="least"``."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lora_fx.ir.graph import join

__all__ = ["Saving", "Savings", "Span"]


class Span(NamedTuple):
    """A part of a layer that treats each token on its own, in the forward of the layer.

    Attributes:
        layer: FQN of the layer.
        modules: Names, inside of the layer, of the modules that the part calls. The first makes tokens
            wider, the last makes them narrower.
    """

    layer: str
    modules: tuple[str, ...]

    @property
    def first(self) -> str:
        """FQN of the first module."""
        return join(self.layer, self.modules[0])

    @property
    def last(self) -> str:
        """FQN of the last module."""
        return join(self.layer, self.modules[-1])


class Saving(NamedTuple):
    """The ways in which one module keeps less for the backward.

    Attributes:
        blocks: 0 unless the module runs again in the backward; then the number of all modules that do.
        tiles: True if the module runs a tile of tokens at a time.
        first, last: True if it is the first, or the last, module of a span.
        spans: For a layer with spans: the names of the modules of each span.
    """

    blocks: int = 0
    tiles: bool = False
    first: bool = False
    last: bool = False
    spans: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Savings:
    """The modules that are recomputed or run in tiles.

    Attributes:
        blocks: FQNs of the blocks. Each keeps its input, and runs again in the backward.
        tiles: FQNs of the modules that treat each token on its own. They run a tile of tokens at a time.
        spans: Parts of other modules that treat each token on its own, and run in the same way.
        left: FQNs of modules with adapters that run in neither way, each with the reason.
    """

    blocks: tuple[str, ...] = ()
    tiles: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    def of(self, fqn: str) -> Saving:
        """Return the ways in which the module of this FQN keeps less for the backward."""
        return Saving(
            len(self.blocks) if fqn in self.blocks else 0,
            fqn in self.tiles,
            any(span.first == fqn for span in self.spans),
            any(span.last == fqn for span in self.spans),
            tuple(span.modules for span in self.spans if span.layer == fqn),
        )

    def lines(self) -> list[str]:
        """Return the recomputed modules, the modules in tiles, and any spans, as lines of text."""
        blocks = f"run again in the backward (a GPU keeps their inputs on the host): {_counted(self.blocks)}"
        lines = [blocks, f"a tile of tokens at a time: {_counted(self.tiles)}"]
        spans = _counted([f"{span.first} to {span.modules[-1]}" for span in self.spans])
        return [*lines, f"also in tiles, inside of layers: {spans}"] if self.spans else lines


def _counted(names: Sequence[str]) -> str:
    """Join names to a line of text. Names that differ only in numbers appear once, with their count."""
    counts = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"
