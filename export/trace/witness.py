"""Which operation fixed an axis that was offered as dynamic.

torch.export gives every axis a symbol and puts a number in its place when the model turns out to
need one. It keeps the number, and a guard whose location is mostly a line of its own. So the moment
is watched: the place in the model is on the stack then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lora_fx.export.trace.source import Place, fault_of, here

__all__ = ["Witness", "watched"]


class Witness:
    """What became of the symbols while a model was traced."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._places: dict[str, Place] = {}
        self._equal: dict[str, str] = {}
        self._symbols: dict[str, str] = {}

    def place(self, dim: Any) -> Place | None:
        """Where an axis became a number; None if that is not known.

        Args:
            dim: Its size in the shape of a traced input.
        """
        return self._found(str(getattr(getattr(dim, "node", None), "_expr", "")))

    def place_of(self, source: str) -> Place | None:
        """The same for an axis as torch.export calls it."""
        return self._found(self._symbols.get(source, ""))

    def fault(self, error: BaseException) -> Place:
        """Where in the model an error was raised."""
        return fault_of(error, self._modules)

    def _found(self, symbol: str) -> Place | None:
        seen: set[str] = set()
        while symbol not in self._places and symbol in self._equal and symbol not in seen:
            seen.add(symbol)
            symbol = self._equal[symbol]
        return self._places.get(symbol)

    def note(self, symbol: object, value: Any, sources: Iterable[Any] = ()) -> None:
        """A symbol, of the axes ``sources``, is replaced by a number or by another symbol."""
        self._symbols.update((source.name, str(symbol)) for source in sources)
        if getattr(value, "is_Integer", False):
            self._places.setdefault(str(symbol), here(self._modules))
        elif getattr(value, "is_Symbol", False):
            self._equal.setdefault(str(symbol), str(value))


@contextmanager
def watched(model: nn.Module) -> Iterator[Witness]:
    """Watch the traces that begin inside the block."""
    witness = Witness(model)
    original = ShapeEnv._set_replacement

    def replace(env: ShapeEnv, symbol: Any, value: Any, message: str) -> None:
        witness.note(symbol, value, env.var_to_sources.get(symbol, ()))
        original(env, symbol, value, message)

    ShapeEnv._set_replacement = replace  # type: ignore[assignment, method-assign]
    try:
        yield witness
    finally:
        ShapeEnv._set_replacement = original  # type: ignore[method-assign]
