"""Settings of text generation, from the model's defaults and the caller's changes."""

from __future__ import annotations

import dataclasses
import json
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_fx.errors import ExportError, hint

__all__ = ["GenerationSettings", "Processor", "next_tokens", "padding_of", "processors"]


# Unsupported settings that change the tokens or the return value, with their values that have no effect:
# the defaults of transformers. None has no effect for any key.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "num_beam_groups": (1,), "constraints": (), "diversity_penalty": (0,),
    "force_words_ids": (), "penalty_alpha": (0,), "dola_layers": (), "guidance_scale": (1,),
    "sequence_bias": (), "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (), "exponential_decay_length_penalty": (),
    "watermarking_config": (), "token_healing": (False,), "max_time": (),
    "renormalize_logits": (False,), "remove_invalid_values": (False,),
    "prompt_lookup_num_tokens": (), "assistant_early_exit": (), "assistant_ensemble_weight": (),
    "speculation_type": (), "use_mtp": (False,), "return_dict_in_generate": (False,),
    "output_attentions": (False,), "output_hidden_states": (False,), "output_scores": (False,),
    "output_logits": (False,), "return_timestamps": (False,),
}  # fmt: skip
_NEUTRAL_IN_SAMPLING: Mapping[str, tuple[object, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}

# Settings of beam search alone. They do nothing without beams, and a model's own configuration may set them.
# A caller who sets them without beams expects an effect.
_OF_BEAMS: Mapping[str, tuple[object, ...]] = {
    "early_stopping": (False,),
    "length_penalty": (1,),
}

# Settings of speed that do not change results: cache, compilation, and assistant models.
_WITHOUT_EFFECT = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config",
    "disable_compile", "continuous_batching_config", "prefill_chunk_size", "low_memory",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "max_matching_ngram_size", "transformers_version",
}  # fmt: skip


def _refuse_unsupported(
    values: Mapping[str, Any], done: Collection[str], model: Mapping[str, Any]
) -> None:
    """Raise for settings that ``generate`` does not support.

    Args:
        values: Settings of a call, without values that are None.
        done: The supported keys.
        model: The model's own ``generation_config``. Its keys that transformers does not know are allowed,
            because ``GenerationMixin.generate`` ignores them, too.

    Raises:
        ExportError: The message names all of them.
    """
    refused = dict(_NEUTRAL)
    if values.get("do_sample"):
        refused.update(_NEUTRAL_IN_SAMPLING)
    if values.get("cache_implementation") == "quantized":
        refused["cache_implementation"] = ()
    unsupported = [name for name in refused if name in values and values[name] not in refused[name]]
    own = _plain(model)
    extra = {name: value for name, value in values.items() if _plain(value) != own.get(name)}
    if values.get("num_beams", 1) == 1:
        unsupported += [
            name for name in _OF_BEAMS if name in extra and extra[name] not in _OF_BEAMS[name]
        ]
    if unsupported:
        without = {name: next(iter({**refused, **_OF_BEAMS}[name]), None) for name in unsupported}
        raise ExportError(
            f"the generation_config (the model's, or the one that was passed) asks for "
            f"{', '.join(f'{name}={values[name]!r}' for name in unsupported)}, which generate does not do: "
            f"what comes back would be other than what model.generate gives. Pass "
            f"generation_config={without} to generate all the same"
        )
    known = {*done, *_NEUTRAL, *_NEUTRAL_IN_SAMPLING, *_OF_BEAMS, *_WITHOUT_EFFECT}
    unknown = [name for name in extra if name not in known and not str(name).startswith("_")]
    if unknown:
        raise ExportError(
            f"the generation_config has {', '.join(_named(name, extra, known) for name in unknown)}, "
            f"which neither generate nor the model's own generation_config knows"
        )


def _named(name: str, values: Mapping[str, Any], known: Collection[str]) -> str:
    return f"{name}={values[name]!r}" + hint(name, known, " (did you mean '{}'?)", count=1)


def _plain(value: Any) -> Any:
    """Return a value as JSON stores it: lists instead of tuples, and keys that are strings."""
    return json.loads(json.dumps(value, default=str))


@dataclass(frozen=True)
class GenerationSettings:
    """Settings with the names, meanings and defaults of transformers' ``GenerationConfig``.

    Attributes:
        max_new_tokens: Largest number of tokens to generate, without the prompt.
        max_length: The same with the prompt; used if ``max_new_tokens`` is None.
        min_new_tokens: Number of tokens before the first possible end-of-sequence token.
        min_length: The same with the prompt.
        do_sample: True to draw the next token, False to take the likeliest.
        temperature: Divisor of the logits.
        top_k: Number of likeliest tokens to draw from; 0 for all.
        top_p: Draw from the likeliest tokens that have this probability together.
        min_p: Draw from tokens with at least this share of the highest probability.
        repetition_penalty: Divisor of the logits of tokens that are already in the text.
        no_repeat_ngram_size: Length of sequences that may not repeat; 0 for no limit.
        eos_token_id: Tokens that end a sequence.
        pad_token_id: Token that fills rows that end before others.
        bos_token_id: First token of a text.
        decoder_start_token_id: First token of the decoder of an encoder-decoder.
        forced_bos_token_id: Token after the first one.
        forced_eos_token_id: Last token of a sequence that reaches its largest length.
        suppress_tokens: Tokens that are never generated.
        begin_suppress_tokens: Tokens that are never generated first.
        num_beams: Number of beams of beam search; 1 for no beam search.
        early_stopping: True to end beam search at ``num_beams`` complete texts; "never" to go on as long
            as a better text is possible.
        length_penalty: Exponent of the length in the divisor of a beam's score.
        num_return_sequences: Number of texts for each prompt.
        stop_strings: Texts that end a sequence.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    num_beams: int = 1
    early_stopping: bool | str = False
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    stop_strings: Any = None

    def __post_init__(self) -> None:
        counts = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
        for name, least in (*((name, 1) for name in counts), ("top_k", 0)):
            value = getattr(self, name)
            if value is not None and (not _whole(value) or value < least):
                raise ExportError(f"{name}={value!r}: give a whole number from {least}")
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if not _real(value) or not value > 0:
                raise ExportError(
                    f"{name}={getattr(self, name)!r}: give a number above 0 (the likeliest tokens "
                    f"are what do_sample=False takes)"
                )
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not (_real(value) and 0 <= value <= 1):
                raise ExportError(f"{name}={value!r}: give a probability, from 0 to 1")
        if self.early_stopping not in (True, False, "never"):
            raise ExportError(
                f"early_stopping={self.early_stopping!r}: give True, False or 'never'"
            )
        if not _real(self.length_penalty):
            raise ExportError(f"length_penalty={self.length_penalty!r}: give a number")
        self._check_sequences()

    def _check_sequences(self) -> None:
        count, beams = self.num_return_sequences, self.num_beams
        if count > 1 and beams == 1 and not self.do_sample:
            raise ExportError(
                f"num_return_sequences={count}: the likeliest tokens are one text. "
                "Pass do_sample=True, or num_beams"
            )
        if count > beams > 1:
            raise ExportError(
                f"num_return_sequences={count} is more than num_beams={beams}: beam search has no more texts"
            )

    @property
    def copies(self) -> int:
        """Number of rows that continue one prompt."""
        return max(self.num_beams, self.num_return_sequences)

    @classmethod
    def of(
        cls, defaults: Mapping[str, Any], changes: Mapping[str, Any], model: Mapping[str, Any]
    ) -> GenerationSettings:
        """Return the settings of one call.

        Args:
            defaults: Fields of a ``GenerationConfig``, also those of beam search, output and the like.
                None switches a setting off.
            changes: Settings of the caller; None leaves the default.
            model: The model's own ``GenerationConfig``, as it is stored in the file.

        Raises:
            ExportError: A value is not valid, or ``defaults`` has an unsupported setting or an unknown key.
        """
        values = {**defaults, **{k: v for k, v in changes.items() if v is not None}}
        if "top_k" in values and values["top_k"] is None:
            values["top_k"] = 0  # the only setting that is on by default
        values = {name: value for name, value in values.items() if value is not None}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        _refuse_unsupported(values, fields, model)
        own = {name: value for name, value in values.items() if name in fields}
        for name, field in fields.items():
            if name in own and "tuple" in str(field.type):
                own[name] = _tokens(name, own[name])
        return cls(**own)

    def new_tokens(self, prompt: int, limit: int | None) -> int:
        """Return the largest number of tokens to generate after a prompt.

        Args:
            prompt: Number of tokens of the prompt.
            limit: Number of positions of the model; None for no limit.

        Raises:
            ExportError: The model has too few positions, or ``max_length`` leaves no room.
        """
        if limit is not None and prompt > limit:
            raise ExportError(
                f"the prompt has {prompt} tokens, and the model has {limit} positions: shorten it"
            )
        if self.max_new_tokens is not None:
            wanted = self.max_new_tokens
        elif self.max_length is not None:
            wanted = self.max_length - prompt
        else:
            wanted = 20 if limit is None else min(20, limit - prompt)
        if wanted < 1:
            of = f"max_length={self.max_length}" if self.max_length else f"{limit} positions"
            raise ExportError(
                f"the prompt has {prompt} tokens, so {of} leave no room for a new one"
            )
        if limit is not None and prompt + wanted > limit:
            raise ExportError(
                f"a prompt of {prompt} tokens and {wanted} new ones are more than the {limit} "
                f"positions of the model: pass max_new_tokens={limit - prompt} or less"
            )
        return wanted


def padding_of(settings: GenerationSettings) -> int:
    """Return the token that fills ended rows. There must be a pad or end-of-sequence token."""
    pad = settings.pad_token_id
    return settings.eos_token_id[0] if pad is None else pad


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    tokens = (
        tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    )
    if not all(map(_whole, tokens)):
        raise ExportError(f"{name}={value!r}: give the number of a token, or a list of them")
    return tuple(map(int, tokens))


def _whole(value: Any) -> bool:
    """Return True for an integer of Python or NumPy, but not for a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# Processing of logits to the next token, in the order of transformers, so that equal seeds give equal tokens.
#
# All functions take the tokens so far, [batch, length], and scores in fp32, [batch, vocabulary].

Processor: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Function of tokens and scores that returns scores, such as a ``LogitsProcessor`` of transformers."""


def processors(
    settings: GenerationSettings,
    prompt: Tensor,
    mask: Tensor | None,
    length: int,
    own: Sequence[Processor] = (),
) -> list[Processor]:
    """Return the processors of scores in order.

    Args:
        settings: The settings of generation.
        prompt: Tokens of the prompts, [batch, length].
        mask: Mask of the prompts, of the same shape; None if all tokens count.
        length: The largest length of a sequence.
        own: The caller's processors. They run after processors that forbid tokens and before sampling.
    """
    chain: list[Processor] = []
    if settings.repetition_penalty != 1:
        chain.append(_repetition(settings.repetition_penalty, mask))
    if settings.no_repeat_ngram_size:
        chain.append(_no_repeat(settings.no_repeat_ngram_size))
    least = settings.min_length
    if settings.min_new_tokens is not None:
        least = prompt.shape[1] + settings.min_new_tokens
    if least and settings.eos_token_id:
        chain.append(_at(range(least), _forbid(settings.eos_token_id)))
    if settings.forced_bos_token_id is not None:
        chain.append(_at(range(1, 2), _force((settings.forced_bos_token_id,))))
    if settings.forced_eos_token_id:
        chain.append(_at(range(length - 1, length), _force(settings.forced_eos_token_id)))
    if settings.suppress_tokens:
        chain.append(_forbid(settings.suppress_tokens))
    if settings.begin_suppress_tokens:
        first = prompt.shape[1]
        first += first == 1 and settings.forced_bos_token_id is not None
        chain.append(_at(range(first, first + 1), _forbid(settings.begin_suppress_tokens)))
    chain += own
    if settings.do_sample:
        chain += _warpers(settings)
    return chain


def next_tokens(
    scores: Tensor, settings: GenerationSettings, generator: torch.Generator | None
) -> Tensor:
    """Return one token for each row, [batch]."""
    if not settings.do_sample:
        return scores.argmax(dim=-1)
    drawn = torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=generator)
    return drawn.squeeze(1)


def _warpers(settings: GenerationSettings) -> list[Processor]:
    # As in transformers: if all end tokens are kept, one more is needed to continue the beam.
    least = 1 if settings.num_beams == 1 else max(2, len(settings.eos_token_id) + 1)
    warpers: list[Processor] = []
    if settings.temperature != 1:
        warpers.append(lambda ids, scores: scores / settings.temperature)
    if settings.top_k:
        warpers.append(_top_k(max(settings.top_k, least)))
    if settings.top_p < 1:
        warpers.append(_top_p(settings.top_p, least))
    if settings.min_p is not None:
        warpers.append(_min_p(settings.min_p, least))
    return warpers


def _at(lengths: range, processor: Processor) -> Processor:
    """Return a processor that runs only while the length of the sequence is in ``lengths``."""
    return lambda ids, scores: processor(ids, scores) if ids.shape[1] in lengths else scores


def _forbid(tokens: Sequence[int]) -> Processor:
    def forbid(ids: Tensor, scores: Tensor) -> Tensor:
        # isin instead of indexing, because a configuration may name tokens beyond the vocabulary.
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
    """Return a processor for the repetition penalty (arXiv 1909.05858).

    It divides positive and multiplies negative logits of earlier tokens.
    """
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


def _top_p(share: float, least: int) -> Processor:
    """Return a processor for nucleus sampling (arXiv 1904.09751)."""

    def narrow(ids: Tensor, scores: Tensor) -> Tensor:
        ascending, order = scores.sort(descending=False)
        out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - share
        out[:, -least:] = False  # the likeliest stay
        return scores.masked_fill(out.scatter(1, order, out), -torch.inf)

    return narrow


def _min_p(share: float, least: int) -> Processor:
    """Return a processor for min-p sampling (arXiv 2407.01082)."""

    def narrow(ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        out = probabilities < share * probabilities.amax(dim=-1, keepdim=True)
        kept = probabilities.topk(min(least, scores.shape[1]))[1]
        return scores.masked_fill(out.scatter(1, kept, False), -torch.inf)

    return narrow
