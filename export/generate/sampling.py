"""From logits to the next token, in transformers' order, so that equal seeds give equal tokens.

Everything takes the tokens so far, [batch, length], and scores in fp32, [batch, vocabulary].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lora_fx.export.generate.settings import GenerationSettings

__all__ = ["Processor", "next_tokens", "processors"]

Processor: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From tokens and scores to scores; those of transformers (``LogitsProcessor``) are such."""


def processors(
    settings: GenerationSettings,
    prompt: Tensor,
    mask: Tensor | None,
    length: int,
    own: Sequence[Processor] = (),
) -> list[Processor]:
    """What scores go through, in order.

    Args:
        settings: What to do.
        prompt: The tokens that are there, [batch, length].
        mask: Which of them count, of the same shape; None for all.
        length: Of the sequence when it is full.
        own: The caller's, between those that forbid and those that narrow down a draw.
    """
    found: list[Processor] = []
    if settings.repetition_penalty != 1:
        found.append(_repetition(settings.repetition_penalty, mask))
    if settings.no_repeat_ngram_size:
        found.append(_no_repeat(settings.no_repeat_ngram_size))
    least = settings.min_length
    if settings.min_new_tokens is not None:
        least = prompt.shape[1] + settings.min_new_tokens
    if least and settings.eos_token_id:
        found.append(_at(range(least), _forbid(settings.eos_token_id)))
    if settings.forced_bos_token_id is not None:
        found.append(_at(range(1, 2), _force((settings.forced_bos_token_id,))))
    if settings.forced_eos_token_id:
        found.append(_at(range(length - 1, length), _force(settings.forced_eos_token_id)))
    if settings.suppress_tokens:
        found.append(_forbid(settings.suppress_tokens))
    if settings.begin_suppress_tokens:
        first = prompt.shape[1]
        first += first == 1 and settings.forced_bos_token_id is not None
        found.append(_at(range(first, first + 1), _forbid(settings.begin_suppress_tokens)))
    found += own
    if settings.do_sample:
        found += _warpers(settings)
    return found


def next_tokens(
    scores: Tensor, settings: GenerationSettings, generator: torch.Generator | None
) -> Tensor:
    """One token for each row, [batch]."""
    if not settings.do_sample:
        return scores.argmax(dim=-1)
    drawn = torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=generator)
    return drawn.squeeze(1)


def _warpers(settings: GenerationSettings) -> list[Processor]:
    found: list[Processor] = []
    if settings.temperature != 1:
        found.append(lambda ids, scores: scores / settings.temperature)
    if settings.top_k:
        found.append(_top_k(settings.top_k))
    if settings.top_p < 1:
        found.append(_top_p(settings.top_p))
    if settings.min_p is not None:
        found.append(_min_p(settings.min_p))
    return found


def _at(lengths: range, processor: Processor) -> Processor:
    """Only while the sequence has one of ``lengths``."""
    return lambda ids, scores: processor(ids, scores) if ids.shape[1] in lengths else scores


def _forbid(tokens: Sequence[int]) -> Processor:
    def forbid(ids: Tensor, scores: Tensor) -> Tensor:
        # isin, not indexing: a configuration may name tokens beyond the vocabulary.
        chosen = torch.isin(torch.arange(scores.shape[1]), torch.tensor(tokens))
        return scores.masked_fill(chosen, -torch.inf)

    return forbid


def _force(tokens: Sequence[int]) -> Processor:
    def force(ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, list(tokens)] = 0
        return forced

    return force


def _repetition(penalty: float, mask: Tensor | None) -> Processor:
    """Divides positive and multiplies negative logits of tokens that were there (1909.05858)."""
    padding = None if mask is None else (mask != 0).int().argmax(dim=1)

    def penalize(ids: Tensor, scores: Tensor) -> Tensor:
        vocabulary = scores.shape[1]
        if padding is not None:
            positions = torch.arange(ids.shape[1])
            ids = ids.masked_fill(positions[None] < padding[:, None], vocabulary)
        seen = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool).scatter(1, ids, True)
        changed = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(seen[:, :vocabulary], changed, scores)

    return penalize


def _no_repeat(size: int) -> Processor:
    def forbid(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] + 1 < size:
            return scores
        scores = scores.clone()
        for row, tokens in enumerate(ids.tolist()):
            last = tokens[len(tokens) - size + 1 :]
            runs = (tokens[start : start + size] for start in range(len(tokens) - size + 1))
            scores[row, [run[-1] for run in runs if run[:-1] == last]] = -torch.inf
        return scores

    return forbid


def _top_k(count: int) -> Processor:
    def narrow(ids: Tensor, scores: Tensor) -> Tensor:
        least = scores.topk(min(count, scores.shape[1]))[0][:, -1, None]
        return scores.masked_fill(scores < least, -torch.inf)

    return narrow


def _top_p(share: float) -> Processor:
    """Nucleus sampling (1904.09751)."""

    def narrow(ids: Tensor, scores: Tensor) -> Tensor:
        ascending, order = scores.sort(descending=False)
        out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - share
        out[:, -1] = False  # the likeliest stays
        return scores.masked_fill(out.scatter(1, order, out), -torch.inf)

    return narrow


def _min_p(share: float) -> Processor:
    """Min-p sampling (2407.01082)."""

    def narrow(ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        least = share * probabilities.amax(dim=-1, keepdim=True)
        return scores.masked_fill(probabilities < least, -torch.inf)

    return narrow
