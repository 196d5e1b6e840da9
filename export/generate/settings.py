"""How to generate: the model's own defaults, and what a caller changes."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_fx.errors import ExportError
from lora_fx.export.generate.generation_keys import refuse_unsupported

__all__ = ["GenerationSettings"]


@dataclass(frozen=True)
class GenerationSettings:
    """Names and meaning are those of transformers' ``GenerationConfig``; so are the defaults.

    Attributes:
        max_new_tokens: Tokens to generate at most, without the prompt.
        max_length: The same with the prompt; counts where ``max_new_tokens`` is None.
        min_new_tokens: Tokens before which no end-of-sequence token comes.
        min_length: The same with the prompt.
        do_sample: Draw the next token, else take the likeliest.
        temperature: What logits are divided by.
        top_k: Draw from so many tokens only; 0 for all.
        top_p: Draw from the likeliest tokens that have this probability together.
        min_p: Draw from tokens that have this share of the likeliest one's probability.
        repetition_penalty: What the logits of tokens that were there are divided by.
        no_repeat_ngram_size: Length of the sequences that do not come twice; 0 for none.
        eos_token_id: Tokens that end a sequence.
        pad_token_id: What follows in rows that have ended before others.
        bos_token_id: First token of a text.
        decoder_start_token_id: First token of the decoder of an encoder-decoder.
        forced_bos_token_id: Token after the first one.
        forced_eos_token_id: Last token where the length ends the sequence.
        suppress_tokens: Tokens that never come.
        begin_suppress_tokens: Tokens that do not come first.
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

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("max_length", 1), ("top_k", 0)):
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

    @classmethod
    def of(
        cls, defaults: Mapping[str, Any], changes: Mapping[str, Any], model: Mapping[str, Any]
    ) -> GenerationSettings:
        """The settings of one call.

        Args:
            defaults: Fields of a ``GenerationConfig``, those of beam search, output and the like
                among them; None is for a setting that is off.
            changes: What the caller gives; None leaves the default.
            model: The model's own ``GenerationConfig``, as its file remembers it.

        Raises:
            ExportError: A value means nothing, or ``defaults`` asks for what is not done here or has a
                key that nobody knows.
        """
        values = {**defaults, **{k: v for k, v in changes.items() if v is not None}}
        if "top_k" in values and values["top_k"] is None:
            values["top_k"] = 0  # the one setting that is on by itself
        values = {name: value for name, value in values.items() if value is not None}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        refuse_unsupported(values, fields, model)
        own = {name: value for name, value in values.items() if name in fields}
        for name, field in fields.items():
            if name in own and "tuple" in str(field.type):
                own[name] = _tokens(name, own[name])
        return cls(**own)

    def new_tokens(self, prompt: int, limit: int | None) -> int:
        """How many tokens to generate at most after ``prompt`` of them.

        Args:
            prompt: Tokens that are there.
            limit: Positions that the model has.

        Raises:
            ExportError: The model has not so many positions, or ``max_length`` leaves no room.
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


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    tokens = (
        tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    )
    if not all(map(_whole, tokens)):
        raise ExportError(f"{name}={value!r}: give the number of a token, or a list of them")
    return tuple(map(int, tokens))


def _whole(value: Any) -> bool:
    """Whether something is a whole number, of NumPy too."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
