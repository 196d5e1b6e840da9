"""What trained rows make of the weights that they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from lora_fx.errors import MergeError
from lora_fx.ir import PlannedTokens, Record
from lora_fx.passes.parameters import put_tokens, tokens_of

__all__ = ["TokenFold", "TokenWeight", "tied_tokens", "token_weights"]

TokenWeight = list[tuple[PlannedTokens, str]]
"""Rows of one weight that are trained, and whose they are."""


@dataclasses.dataclass(frozen=True)
class TokenFold:
    """All rows that are trained of one weight, used as :class:`lora_fx.passes.merge.fold.Fold` is.

    Attributes:
        model: The rewritten model.
        rows: The rows, each with the name of its adapter.
    """

    model: nn.Module
    rows: tuple[tuple[PlannedTokens, str], ...]

    @property
    def name(self) -> str:
        """FQN of the first site."""
        return self.rows[0][0].name

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapter of every site."""
        return tuple(adapter for _, adapter in self.rows)

    def check(self, old: torch.Tensor) -> None:
        """Nothing can fail: :func:`token_weights` has looked at the values."""

    def folded(self, old: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy of the weight with the rows in it, in another dtype if one is given."""
        merged = old.to(dtype or old.dtype, copy=True)
        self.fold_into(merged)
        return merged

    def fold_into(self, out: torch.Tensor) -> None:
        """Writes the rows into the weight."""
        for row, adapter in self.rows:
            put_tokens(out, row, tokens_of(self.model, row, adapter))

    def exact(self, old: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The merged weight in fp64, in whatever dtype it is stored."""
        return self.folded(old.double())


def token_weights(model: nn.Module, record: Record, names: Sequence[str]) -> dict[str, TokenWeight]:
    """The trained rows by weight.

    Args:
        model: A rewritten model.
        record: What it knows of itself.
        names: The adapters to merge.

    Raises:
        MergeError: If two of the adapters have the same row, one has rows of a weight that another one
            adapts, or a row is not finite.
    """
    found: dict[str, TokenWeight] = {}
    for name in names:
        for row in record.adapters[name].tokens:
            found.setdefault(row.site.weight, []).append((row, name))
            if not torch.isfinite(tokens_of(model, row, name)).all():
                raise MergeError(
                    f"{row.name}: adapter {name!r} has rows that are not finite; nothing was merged"
                )
    for weight, several in found.items():
        indices = [index for row, _ in several for index in row.indices]
        if len(set(indices)) < len(indices):
            raise MergeError(
                f"several of the adapters have their own value of a row of {weight} "
                "(trainable_token_indices): merge one"
            )
    for name, place in _adapted(record, names):
        if place in found:
            raise MergeError(
                f"{found[place][0][1]!r} has rows of its own in {place} (trainable_token_indices), and "
                f"{name!r} adapts it: merge one"
            )
    return found


def tied_tokens(tokens: Mapping[str, TokenWeight]) -> dict[str, str]:
    """Heads whose rows are those of an embedding, with the weight of that."""
    weights = {row.name: weight for weight, rows in tokens.items() for row, _ in rows}
    return {
        weight: weights[rows[0][0].tied]
        for weight, rows in tokens.items()
        if all(row.tied for row, _ in rows) and len(rows) == len(tokens[weights[rows[0][0].tied]])
    }


def _adapted(record: Record, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        for row in record.adapters[name].sites:
            yield name, row.site.weight
