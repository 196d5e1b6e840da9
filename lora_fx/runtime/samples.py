"""A batch whose samples have different adapters: which rows of an activation belong to which adapter.

Each adapter's branch computes with its own rows only (Chen et al. 2023, arXiv:2310.18547, call it a segmented
gather): the work is that of one adapter on the whole batch, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import ConfigError
from lora_fx.runtime.call_sizes import Sizes
from lora_fx.runtime.ops import AdapterModule
from lora_fx.runtime.row_tracking import Follower

__all__ = [
    "CLOSED",
    "FOLDED",
    "FOLLOWED",
    "TRUSTED",
    "SampleRows",
    "add_rows",
    "follow",
    "in_backward",
    "put_rows",
    "select_rows",
    "unfollow",
]

CLOSED, TRUSTED, FOLDED, FOLLOWED = range(4)
"""What is known of the call that is running: there is none; one whose sites have the samples as their rows;
one with several rows for each sample, too; one that is followed to find out."""

_followers: list[Follower] = []
"""Those of the calls that are followed at this moment."""


class SampleRows(AdapterModule):
    """Which samples of the batch each adapter has. All sites of a model share one.

    Attributes:
        samples: Number of samples in the batch; 0 while that is not known.
        repeats: How many times in a row the batch may have each sample.
        alike: Whether all samples have the same adapter, so that it does not matter which row is whose.
        state: What is known of the call that is running.
        proofs: The forms of call that were followed and have the samples as their rows.
        folded: Those with several rows for each sample, and the sizes of each.
        call: What is to be told if the call that is running ends otherwise than by a return or an error.
    """

    samples: int
    repeats: int

    def __init__(self, adapters: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.samples, self.repeats, self.alike = 0, 1, True
        self.state = CLOSED
        self.proofs = Sizes()
        self.folded: set[object] = set()
        self.call: Any = None
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
        if self.call is not None:
            self.call.abandon()
            self.call = None
        self.samples, self.repeats = samples, repeats
        self.alike = not rows or any(len(one) == samples for one in rows.values())
        for name, old in self._buffers.items():
            assert old is not None
            self._buffers[name] = rows.get(name, old[:0]).to(old.device)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no call, and may become another model: nothing is known of its calls."""
        unknown = {"proofs": Sizes(), "folded": set()}
        return {**self.__dict__, "state": CLOSED, **unknown, "call": None}


def follow(follower: Follower) -> None:
    """Lets a follower see what the sites of the running call read and add to."""
    _followers.append(follower)


def unfollow() -> None:
    """Ends what :func:`follow` began."""
    _followers.pop()


def select_rows(
    x: Tensor,
    rows: Tensor,
    samples: int,
    repeats: int = 1,
    state: int = FOLDED,
    weight: str = "",
) -> Tensor:
    """The part of an activation that belongs to some samples.

    Args:
        x: [samples, ...], each sample repeated, [samples * repeats, ...], or with the rows of a sample one
            after the other, [samples * t, ...].
        rows: Indices of samples, [n].
        samples: Number of samples in the batch.
        repeats: How many times in a row the batch may have each sample.
        state: What is known of the call.
        weight: Name of the adapted weight in its module.

    Returns:
        [n, ...], [n * repeats, ...] or [n * t, ...].

    Raises:
        ConfigError: If the first dimension is not that of the samples.
    """
    if state == FOLLOWED:
        _followers[-1].check_site(x, weight)
    return x.index_select(0, _expanded(x, rows, samples, repeats, state))


def add_rows(
    total: Tensor,
    rows: Tensor,
    delta: Tensor,
    samples: int,
    repeats: int = 1,
    state: int = FOLDED,
    weight: str = "",
) -> Tensor:
    """Adds to the rows of some samples, in place.

    Args:
        total: [samples, ...], repeated or with several rows, as for :func:`select_rows`.
        rows: Indices of samples, [n].
        delta: What :func:`select_rows` would give of ``total``.
        samples: Number of samples in the batch.
        repeats: How many times in a row the batch may have each sample.
        state: What is known of the call.
        weight: Name of the adapted weight in its module.
    """
    result = total.index_add_(0, _expanded(total, rows, samples, repeats, state), delta)
    if state == FOLLOWED:
        _followers[-1].presume(result, weight)
    return result


def put_rows(
    total: Tensor,
    rows: Tensor,
    values: Tensor,
    samples: int,
    repeats: int = 1,
    state: int = FOLDED,
    weight: str = "",
) -> Tensor:
    """Replaces the rows of some samples, in place; as :func:`add_rows`, with what they are to be."""
    result = total.index_copy_(0, _expanded(total, rows, samples, repeats, state), values)
    if state == FOLLOWED:
        _followers[-1].presume(result, weight)
    return result


def _expanded(x: Tensor, rows: Tensor, samples: int, repeats: int, state: int) -> Tensor:
    if not samples:
        raise ConfigError(
            "the adapters are chosen for each sample, and nobody has said which: call the model inside "
            "`with lora_fx.adapter_ids(model, [...]):`"
        )
    if state == CLOSED and not in_backward():
        raise ConfigError(
            "a part of the model was called by itself, so that nobody has seen which rows of its input are "
            "whose: inside adapter_ids call the model, or one of the modules that it consists of"
        )
    if x.dim() and x.shape[0] == samples:
        return rows
    known = x.dim() and (state != TRUSTED or x.shape[0] == samples * repeats)
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


def in_backward() -> bool:
    """Whether a checkpoint computes a part of a call again, whose rows were known when it ran first."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
