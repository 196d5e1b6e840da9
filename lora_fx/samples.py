"""A batch whose samples have different adapters: which rows of an activation belong to which adapter.

Each adapter's branch computes with its own rows only (Chen et al. 2023, arXiv:2310.18547, call it a segmented
gather): the work is that of one adapter on the whole batch, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_fx.errors import ConfigError
from lora_fx.ops import AdapterModule

__all__ = ["SampleRows", "add_rows", "put_rows", "select_rows"]


class SampleRows(AdapterModule):
    """Which samples of the batch each adapter has. All sites of a model share one.

    Attributes:
        samples: Number of samples in the batch; 0 while that is not known.
        repeats: How many times in a row the batch may have each sample.
    """

    samples: int
    repeats: int

    def __init__(self, adapters: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.samples, self.repeats = 0, 1
        for name in adapters:
            empty = torch.empty(0, dtype=torch.long, device=device)
            self.register_buffer(name, empty, persistent=False)

    def assign(self, samples: int, rows: Mapping[str, Tensor], repeats: int = 1) -> None:
        """Says which sample has which adapter.

        Args:
            samples: Number of samples.
            rows: For each adapter the indices of its samples, [n]; none for one that is left out.
            repeats: How many times in a row the batch may have each sample.
        """
        self.samples, self.repeats = samples, repeats
        for name, old in self._buffers.items():
            assert old is not None
            self._buffers[name] = rows.get(name, old[:0]).to(old.device)


def select_rows(x: Tensor, rows: Tensor, samples: int, repeats: int = 1) -> Tensor:
    """The part of an activation that belongs to some samples.

    Args:
        x: [samples, ...], each sample repeated, [samples * repeats, ...], or with the tokens of a sample one
            after the other, [samples * t] or [samples * t, features].
        rows: Indices of samples, [n].
        samples: Number of samples in the batch.
        repeats: How many times in a row the batch may have each sample.

    Returns:
        [n, ...], [n * repeats, ...] or [n * t, ...].

    Raises:
        ConfigError: If the first dimension cannot be that of the samples.
    """
    return x.index_select(0, _expanded(x, rows, samples, repeats))


def add_rows(total: Tensor, rows: Tensor, delta: Tensor, samples: int, repeats: int = 1) -> Tensor:
    """Adds to the rows of some samples, in place.

    Args:
        total: [samples, ...], repeated or flattened, as for :func:`select_rows`.
        rows: Indices of samples, [n].
        delta: What :func:`select_rows` would give of ``total``.
        samples: Number of samples in the batch.
        repeats: How many times in a row the batch may have each sample.
    """
    return total.index_add_(0, _expanded(total, rows, samples, repeats), delta)


def put_rows(total: Tensor, rows: Tensor, values: Tensor, samples: int, repeats: int = 1) -> Tensor:
    """Replaces the rows of some samples, in place; as :func:`add_rows`, with what they are to be."""
    return total.index_copy_(0, _expanded(total, rows, samples, repeats), values)


def _expanded(x: Tensor, rows: Tensor, samples: int, repeats: int) -> Tensor:
    if not samples:
        raise ConfigError(
            "the adapters are chosen for each sample, and nobody has said which: call the model inside "
            "`with lora_fx.adapter_ids(model, [...]):`"
        )
    if x.dim() and x.shape[0] == samples:
        return rows
    known = x.dim() in (1, 2) or (x.dim() and x.shape[0] == samples * repeats)
    if not known or x.shape[0] % samples:
        raise ConfigError(
            f"an activation of shape {tuple(x.shape)} does not begin with the {samples} samples of "
            "adapter_ids: give one adapter for each sample of this batch, or repeats=, where generate() "
            "repeats each sample (num_beams, num_return_sequences). A model whose batch is not its first "
            "dimension takes one adapter at a time"
        )
    tokens = x.shape[0] // samples
    inner = torch.arange(tokens, device=x.device)
    return (rows[:, None] * tokens + inner).flatten()
