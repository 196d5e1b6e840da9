"""Beam search: several beginnings of a text go on at once, and the best whole texts are kept.

Step by step it is the search of transformers, so that equal models give equal tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fx.export.generation_settings import GenerationSettings, Processor, padding_of

__all__ = ["BeamSearch"]


_NEVER = -1e9
"""The score of what must not be chosen. Not -inf: a sum of two of them still orders."""


@dataclass(frozen=True)
class _Candidates:
    """What running beams may go on to, the best first.

    Attributes:
        scores: Sums of log-probabilities, [batch, candidates].
        texts: [batch, candidates, length].
        beams: The beam that each goes on from, [batch, candidates].
        ended: Which of them are whole, [batch, candidates].
    """

    scores: Tensor
    texts: Tensor
    beams: Tensor
    ended: Tensor


class BeamSearch:
    """The beams of a batch of prompts, and the best whole texts so far.

    Args:
        ids: The prompts, each ``num_beams`` times, [batch · num_beams, sequence].
        length: Tokens that a text has at most.
        settings: How to search.
        ends: From tokens [rows, length] to which rows have ended.
        generator: For the draws of ``do_sample``.
    """

    def __init__(
        self,
        ids: Tensor,
        length: int,
        settings: GenerationSettings,
        ends: Callable[[Tensor], Tensor],
        generator: torch.Generator | None,
    ) -> None:
        self._settings, self._ends, self._generator = settings, ends, generator
        beams = settings.num_beams
        self._prompt = self._now = ids.shape[1]
        self._length = length
        # transformers takes a pad token of 0 for none.
        fill = -1
        if settings.eos_token_id:
            fill = padding_of(settings) or settings.eos_token_id[0]
        batch = len(ids) // beams
        self._running = torch.full((batch, beams, length), fill)
        self._running[:, :, : self._now] = ids.view(batch, beams, -1)
        self._scores = torch.zeros(batch, beams)
        self._scores[:, 1:] = _NEVER  # the beams of a prompt are equal as yet
        self._whole = self._running.clone()
        self._whole_scores = torch.full((batch, beams), _NEVER)
        self._whole_lengths = torch.zeros(batch, beams, dtype=torch.long)
        self._found = torch.zeros(batch, beams, dtype=torch.bool)
        self._may_improve = torch.ones(batch, 1, dtype=torch.bool)
        self._over = False

    @property
    def over(self) -> bool:
        """Whether nothing better can come."""
        return self._over

    @property
    def ids(self) -> Tensor:
        """The running texts, [batch · num_beams, length so far]."""
        return self._running[:, :, : self._now].flatten(0, 1)

    def advance(self, logits: Tensor, chain: Sequence[Processor]) -> Tensor:
        """Go on by a token.

        Args:
            logits: After the running texts, [batch · num_beams, vocabulary].
            chain: What log-probabilities go through.

        Returns:
            The row that each running text has gone on from, [batch · num_beams].
        """
        scores, ids = logits.log_softmax(dim=-1), self.ids
        for process in chain:
            scores = process(ids, scores)
        found = self._candidates(scores)
        running = found.scores + found.ended.float() * _NEVER
        best = running.topk(self._settings.num_beams)[1]
        self._keep_whole(found)
        self._running = _gathered(found.texts, best)
        self._scores = running.gather(1, best)
        self._now += 1
        self._update(found.ended)
        batch, beams = best.shape
        first = torch.arange(batch)[:, None] * beams
        return (found.beams.gather(1, best) + first).flatten()

    def result(self) -> Tensor:
        """The best texts, [batch · num_return_sequences, length of the longest]."""
        count = self._settings.num_return_sequences
        longest = self._prompt + int(self._whole_lengths[:, :count].max())
        return self._whole[:, :count, :longest].flatten(0, 1)

    def _candidates(self, scores: Tensor) -> _Candidates:
        settings, beams = self._settings, self._settings.num_beams
        vocabulary, batch = scores.shape[1], len(self._scores)
        total = (scores.view(batch, beams, -1) + self._scores[:, :, None]).view(batch, -1)
        # Enough to go on with, also if the best all end here.
        count = max(2, 1 + len(settings.eos_token_id)) * beams
        if settings.do_sample:
            shares = total.softmax(dim=-1)
            chosen = torch.multinomial(shares, num_samples=count, generator=self._generator)
            best, order = total.gather(1, chosen).sort(dim=-1, descending=True)
            chosen = chosen.gather(1, order)
        else:
            best, chosen = total.topk(count)
        sources = chosen // vocabulary
        texts = _gathered(self._running, sources)
        texts[:, :, self._now] = chosen % vocabulary
        ended = self._ends(texts[:, :, : self._now + 1].flatten(0, 1)).view(batch, count)
        return _Candidates(best, texts, sources, ended)

    def _keep_whole(self, found: _Candidates) -> None:
        """Keep the best of the whole texts that were there and those that ended just now."""
        settings, beams = self._settings, self._settings.num_beams
        leading = torch.arange(found.scores.shape[1]) < beams
        ended = found.ended & leading
        length = self._now + 1 - self._prompt
        scores = found.scores / length**settings.length_penalty
        full = self._found.all(dim=-1, keepdim=True) & (settings.early_stopping is True)
        scores = scores + full.float() * _NEVER
        scores = scores + (~self._may_improve).float() * _NEVER
        scores = scores + (~ended).float() * _NEVER
        merged = torch.cat([self._whole_scores, scores], dim=1)
        best = merged.topk(beams)[1]
        self._whole_scores = merged.gather(1, best)
        self._whole = _gathered(torch.cat([self._whole, found.texts], dim=1), best)
        lengths = torch.full_like(found.beams, length)
        self._whole_lengths = torch.cat([self._whole_lengths, lengths], dim=1).gather(1, best)
        self._found = torch.cat([self._found, ended], dim=1).gather(1, best)

    def _update(self, ended: Tensor) -> None:
        """Find out whether a running text may still become better than the worst whole one."""
        settings = self._settings
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        length = (self._length if longest else self._now) - self._prompt
        possible = self._scores[:, :1] / length**settings.length_penalty
        worst = torch.where(
            self._found, self._whole_scores.min(dim=1, keepdim=True)[0], torch.tensor(_NEVER)
        )
        self._may_improve &= (possible > worst).any(dim=-1, keepdim=True)
        enough = bool(self._found.all()) and settings.early_stopping is True
        self._over = enough or bool(ended.all()) or not bool(self._may_improve.any())


def _gathered(values: Tensor, indices: Tensor) -> Tensor:
    """The rows ``indices`` [batch, count] of ``values`` [batch, rows, length]."""
    return values.take_along_dim(indices[:, :, None], dim=1)
