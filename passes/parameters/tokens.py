"""Where trained rows of an embedding are: beside it, under PEFT's names."""

from __future__ import annotations

import torch
from torch import nn

from lora_fx.ir import PlannedTokens, join
from lora_fx.runtime import AdapterFactors, Holder, KeptIndices

__all__ = ["add_tokens", "indices_name", "put_tokens", "rows_name", "tokens_of"]

_HOLDER = "token_adapter"
_ROWS = "trainable_tokens_delta"
_INDICES = "token_indices"


def rows_name(row: PlannedTokens, adapter: str) -> str:
    """FQN of the trained rows, [n, width]."""
    return join(row.site.holder, _HOLDER, _ROWS, adapter)


def indices_name(row: PlannedTokens, adapter: str) -> str:
    """FQN of what says which rows these are.

    For a lookup it is [vocabulary]: the place of each token among the trained ones, -1 for any other.
    For a product it is [n]: the tokens.
    """
    return join(row.site.holder, _HOLDER, _INDICES, adapter)


def tokens_of(model: nn.Module, row: PlannedTokens, adapter: str) -> nn.Parameter:
    """The trained rows, [n, width]: what stands in the place of those of the weight."""
    return model.get_parameter(rows_name(row, adapter))


def add_tokens(model: nn.Module, row: PlannedTokens, adapter: str, rows: torch.Tensor) -> None:
    """Puts rows, and which ones they are, beside a weight.

    Args:
        model: The pipeline's own.
        row: Which rows of what.
        adapter: The adapter's name.
        rows: [n, width]; a parameter is taken as it is.
    """
    indices = torch.tensor(row.indices, device=rows.device)
    if row.lookup:
        places = torch.full((row.site.in_features,), -1, device=rows.device)
        places[indices] = torch.arange(len(indices), device=rows.device)
        indices = places
    holder = _made(model, join(row.site.holder, _HOLDER), Holder)
    factors = _made(model, rows_name(row, adapter).rpartition(".")[0], AdapterFactors)
    kept = _made(model, indices_name(row, adapter).rpartition(".")[0], KeptIndices)
    assert isinstance(factors, AdapterFactors)
    assert isinstance(kept, KeptIndices)
    factors.add(adapter, rows)
    kept.add(adapter, indices)
    holder.train(model.get_submodule(row.site.owner).training)


def put_tokens(weight: torch.Tensor, row: PlannedTokens, rows: torch.Tensor) -> None:
    """Writes trained rows in their places into a weight, rounded to its dtype."""
    indices = torch.tensor(row.indices, device=weight.device)
    weight.index_copy_(0, indices, rows.detach().to(weight))


def _made(model: nn.Module, fqn: str, kind: type[nn.Module]) -> nn.Module:
    """The module of a name; it is put there, and holders on the way to it, if there is none."""
    parent_name, _, leaf = fqn.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
    except AttributeError:
        parent = _made(model, parent_name, Holder)
    if leaf not in parent._modules:
        parent.add_module(leaf, kind())
    return parent.get_submodule(leaf)
