"""The part of a session that generates: what its arguments mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fx.export.adapters.store import AdapterChoice
from lora_fx.export.generate.generation import Streamer, generate
from lora_fx.export.generate.sampling import Processor

__all__ = ["Generates"]


class Generates:
    """A session, if the file is for generation."""

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generation_config: Any = None,
        generator: torch.Generator | None = None,
        logits_processor: Sequence[Processor] = (),
        stopping_criteria: Sequence[Callable[[Tensor, Tensor], Any]] = (),
        streamer: Streamer | None = None,
        adapter: AdapterChoice = None,
        **inputs: Any,
    ) -> Any:
        """Continue texts: token for token what ``model.generate`` of transformers gives.

        For files of ``export_onnx(..., task=...)``. What is not given is as in the model's
        ``generation_config``, which the file remembers, and else as in transformers.

        Args:
            input_ids: The prompts, whole numbers of shape [batch, sequence], padded on the left; for
                an encoder-decoder the texts that its encoder reads.
            attention_mask: Of the same shape, 0 for padding. Without it pad tokens are padding.
            max_new_tokens: Tokens to generate at most; 20 if nothing says otherwise.
            do_sample: Draw each token, else take the likeliest.
            temperature: What logits are divided by before a draw.
            top_k: Draw from so many tokens only; 0 for all.
            top_p: Draw from the likeliest tokens that have this probability together.
            min_p: Draw from tokens that have this share of the likeliest one's probability.
            repetition_penalty: What the logits of tokens that were there are divided by.
            eos_token_id: The token or tokens that end a text; an empty list for none.
            pad_token_id: What follows in rows that end before others.
            generation_config: A ``GenerationConfig``, or a dict of its fields. What an object leaves None,
                or a dict leaves out, is as in the file; None in a dict switches a setting off, as it does
                among the arguments of ``model.generate``. The arguments here come before it. What it
                asks for is done or refused: a field that is not done here, and is not at its default,
                is an error that names it, and so is one that nobody knows.
            generator: For the draws. Without it they come from torch's own, as in transformers.
            logits_processor: Functions from tokens [batch, length] and scores [batch, vocabulary] to
                scores; those of transformers are such.
            stopping_criteria: Functions from tokens and scores to True where a text has ended.
            streamer: Told of the prompt, each token, and the end, as transformers' are.
            adapter: As for :meth:`run`.
            **inputs: ``input_features`` and the like, what an encoder takes instead of ids, and
                ``decoder_input_ids``, with which its decoder begins.

        Returns:
            The prompts and what follows, [batch, length]: a tensor, or an array if all that was given
            are arrays. For an encoder-decoder what its decoder says.

        Raises:
            ExportError: The file is not for generation; inputs, settings or lengths do not fit; the
                settings, the model's or the caller's, ask for what is not done here, such as beams.
        """
        changes = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        session: Any = self
        return generate(
            session,
            {"input_ids": input_ids, "attention_mask": attention_mask, **inputs},
            changes,
            generation_config=generation_config,
            generator=generator,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            adapter=adapter,
        )
