"""Embedding weights in which an adapter replaces the rows of the tokens that it has trained.

The tokens and the rows are tensors. So one exported file works with any adapter, and each row of a batch can
have its own adapter. A token of -1 replaces no row. It pads the tokens of adapters that have fewer of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx import torch_private
from lora_fx.runtime.rows import banked
from lora_fx.runtime.rows.row_parameters import ComputedParameter
from lora_fx.runtime.rows.samples import SampleSlots, like_rows, slots_for, unseen

__all__ = ["PatchedWeight"]


class PatchedWeight(ComputedParameter):
    """Embedding weight, [vocabulary, width], with the rows of some tokens replaced.

    Attributes:
        base: The weight, or a :class:`RowParameter` of it.
        tokens: Tokens whose rows are replaced, [n], or [slots, n] for the tokens of all adapters.
        rows: The replacing rows, [n, width], or [slots, n, width].
        slots: The slots of the rows of a batch, as in a :class:`RowParameter`; None for one adapter.
        turned: True for the transposed weight.
    """

    base: Tensor
    tokens: Tensor
    rows: Tensor
    slots: Tensor | SampleSlots | None
    turned: bool

    @staticmethod
    def __new__(
        cls,
        fqn: str,
        base: Tensor,
        tokens: Tensor,
        rows: Tensor,
        slots: Tensor | SampleSlots | None = None,
        turned: bool = False,
    ) -> PatchedWeight:
        """Create a weight."""
        shape = tuple(base.shape)[::-1] if turned else tuple(base.shape)
        weight: PatchedWeight = torch_private.make_wrapper_subclass(
            cls, shape, dtype=base.dtype, device=base.device
        )
        weight.fqn, weight.base, weight.tokens, weight.rows = fqn, base, tokens, rows
        weight.slots, weight.turned = slots, turned
        return weight

    def looked_up(self, x: Tensor) -> Any:
        """Return the row of each token, [..., width], for tokens ``x``, [...]."""
        if self.turned:
            return NotImplemented
        before = F.embedding(x, self.base)
        if self.slots is None:
            hit = x.unsqueeze(-1) == self.tokens
            own = self.rows[hit.to(torch.int64).argmax(-1)]
        else:
            slots = slots_for(self.slots, x, self.fqn)
            each = x.unsqueeze(-1)
            hit = each == banked.banked_vector(self.tokens, slots, each)
            position = hit.to(torch.int64).argmax(-1)
            own = self.rows[banked.slots_of_each(slots, x), position]
        return torch.where(hit.any(-1, keepdim=True), own, before)

    def transposed(self) -> PatchedWeight:
        """Return the transposed weight."""
        parts = self.base, self.tokens, self.rows, self.slots, not self.turned
        return PatchedWeight(self.fqn, *parts)

    def multiplied(self, x: Tensor, bias: Tensor | None, turned: bool) -> Any:
        """Return the logit of each token, [..., vocabulary], for activations [..., width]."""
        if self.turned is turned:
            return NotImplemented
        logits = F.linear(x, self.base, bias)
        if self.slots is None:
            own, tokens = F.linear(x, self.rows), self.tokens
        else:
            slots = slots_for(self.slots, x, self.fqn)
            own = banked.banked_linear(x, self.rows, slots, None, self.fqn, turned=True)
            tokens = banked.banked_vector(self.tokens, slots, own)
        if bias is not None:
            own = own + bias[tokens.clamp(min=0)]
        # An exported file may get one slot for all rows. A trace leaves out an expansion between equal sizes,
        # so that the tokens are expanded by an addition.
        tokens = tokens + torch.zeros_like(own, dtype=tokens.dtype)
        # A follower cannot track indices that depend on values. These are of the last axis, and move no rows.
        return like_rows(unseen(_with_logits, logits, tokens, own), logits)


def _with_logits(logits: Tensor, tokens: Tensor, own: Tensor) -> Tensor:
    """Replace the logits of some tokens, [..., n]. A token of -1 writes to an extra column, which is cut."""
    indices = torch.where(tokens < 0, logits.shape[-1], tokens)
    return F.pad(logits, (0, 1)).scatter(-1, indices, own)[..., :-1]
