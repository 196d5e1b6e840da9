"""What a library's own layers ask of those who copy, trace, merge and export a model that has them.

A format whose weights lie in ``nn.Linear`` and in anybody's code needs none of it: the class says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_fx.ir import Site

if TYPE_CHECKING:
    from lora_fx.formats.base import Storage

__all__ = ["LibraryLayers"]


class LibraryLayers:
    """The layers of a library that has none of its own; subclass it for one that has.

    Attributes:
        attributes: Names of what the library keeps in a layer beside its parameters.
    """

    attributes: tuple[str, ...] = ()

    def owns(self, cls: type[nn.Module]) -> bool:
        """Whether a class is the library's."""
        return False

    def forward(self, cls: type[nn.Module]) -> Callable[..., Any] | None:
        """What to trace in the place of a layer's ``forward``, with ``quantized_linear``; None for its own.

        Args:
            cls: Of the layer. A subclass may compute something else: it has its own forward.
        """
        return None

    def setup(self, layer: nn.Module) -> tuple[Any, ...]:
        """All that the graph of a layer depends on, which :meth:`forward` is traced for."""
        return ()

    def plain(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        """The class of PyTorch that a layer is with a dense weight in it; None if it is not the library's."""
        return None

    def become(self, layer: nn.Module, how: Storage) -> None:
        """Make an ``nn.Linear`` one of the library's, over the weight that was just packed for it.

        It stays the same object, with its hooks and bias.
        """

    def unfinished(self, layer: nn.Module, named: str) -> str | None:
        """Say what a layer of the library lacks whose weight is not in few bits; None if it lacks nothing.

        Args:
            layer: The layer.
            named: Its class, as it is called.
        """
        return None

    def owns_hook(self, hook: object) -> bool:
        """Whether the library has put a hook on a layer, which a dense weight does not need."""
        return False

    def share(self, layer: nn.Module, memo: dict[int, Any]) -> None:
        """Have a copy of a layer keep objects of its own over the same tensors.

        Args:
            layer: Any module of the model that is copied; its parameters are in ``memo``.
            memo: For ``copy.deepcopy``.
        """

    def settle(self, layer: nn.Module) -> None:
        """Put right what a module of a copy, any of them, or one just made may not have."""

    def renew(self, layer: nn.Module) -> None:
        """Have a layer use the scales of another weight of the format, which was put into it."""

    def release(self, layer: nn.Module) -> None:
        """Drop what a module, any of a copy that is exported, remembers of its weight beside it."""

    def describe_model(
        self, model: nn.Module, how: Storage, sites: Sequence[Site], dtype: torch.dtype
    ) -> None:
        """Set what others ask before they take a model for a quantized one.

        Args:
            model: A quantized model that nobody else has, its configuration neither.
            how: The format.
            sites: The operations whose weights are stored so.
            dtype: Of the first one's values.
        """
