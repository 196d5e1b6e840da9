"""The part of a session that generates: what its arguments mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lora_fx.errors import ExportError, hint
from lora_fx.export.adapter_store import AdapterChoice
from lora_fx.export.decoder_cache import GENERATION_KEY
from lora_fx.export.generation_settings import (
    GenerationSettings,
    Processor,
    next_tokens,
    processors,
)
from lora_fx.export.ort import Port, inputs_by_name, unwrap

__all__ = ["Generates", "Streamer", "last_logits"]


# Steps of a decoder over a session: the cache of a step is an input of the next.
#
# The cache stays where ONNX Runtime has put it; logits come out, tokens go in.

_PAST, _PRESENT = "past_key_values.", "present."
_CROSS = ".encoder."


class _CachedDecoder:
    """A decoder and where it is in a batch of texts.

    Args:
        session: The decoder's file.
        batch: Number of texts.
        source: What the encoder takes, by name, for an encoder-decoder.
        adapter: What runs with the model.

    Raises:
        ExportError: The file has no cache, the session replays graphs, or ``source`` does not fit
            the encoder.
    """

    def __init__(
        self,
        session: Generates,
        batch: int,
        source: Mapping[str, Tensor],
        adapter: AdapterChoice = None,
    ) -> None:
        if session._replays_graphs:
            raise ExportError(
                "cuda_graph=True is for calls of one shape, and a text grows with each token: open "
                "the session without it to generate"
            )
        self._session = session
        # One for the whole text, also if another is loaded by its name meanwhile.
        self._held = session._hold(adapter)
        self._ports = {port.name: port for port in session.inputs}
        self._outputs = [port.name for port in session.outputs]
        self._kept = [name for name in self._outputs if name.startswith(_PRESENT)]
        cached = [port for port in session.inputs if port.name.startswith(_PAST)]
        if not cached or "logits" not in self._outputs:
            raise ExportError(
                f"{session.path.name} has no key-value cache to generate with: export the model "
                f"with task='text-generation' or task='text2text-generation'"
            )
        own = [port for port in cached if _CROSS not in port.name]
        self._nothing = {port.name: self._session._value(port, _empty(port, batch)) for port in own}
        self._past = self._nothing
        self._fixed: dict[str, Any] = {}
        self._masked = "attention_mask" in self._ports
        if session.encoder is not None:
            self._fixed = self._encoded(session.encoder, source)

    def step(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read more tokens.

        Args:
            ids: The next tokens of each text, [batch, sequence].
            mask: Which of all tokens so far count, [batch, past and sequence].

        Returns:
            Logits after the last of them, [batch, vocabulary], fp32, on the CPU.
        """
        feeds = {**self._fixed, **self._past}
        feeds["input_ids"] = self._session._value(self._ports["input_ids"], ids)
        if self._masked:
            feeds["attention_mask"] = self._session._value(self._ports["attention_mask"], mask)
        results = dict(zip(self._outputs, self._session._run_held(feeds, self._held), strict=True))
        self._past = {_PAST + name.removeprefix(_PRESENT): results[name] for name in self._kept}
        logits: Tensor = unwrap(results["logits"], torch.device("cpu"))
        return logits[:, -1].float()

    def forget(self) -> None:
        """Go back to before the first token: the next step reads the whole text."""
        self._past = self._nothing

    def _encoded(self, encoder: Generates, source: Mapping[str, Tensor]) -> dict[str, Any]:
        names = [port.name for port in encoder.outputs]
        taken = [port.name for port in encoder.inputs]
        given = inputs_by_name(source, taken, encoder.path.name)
        feeds = {port.name: self._session._value(port, given[port.name]) for port in encoder.inputs}
        values = encoder._run_held(feeds, self._held)
        fixed = {
            _PAST + name.removeprefix(_PRESENT): value
            for name, value in zip(names, values, strict=True)
        }
        if "encoder_attention_mask" in self._ports:
            fixed["encoder_attention_mask"] = feeds["attention_mask"]
        return fixed


def _empty(port: Port, batch: int) -> Tensor:
    _, heads, _, width = port.shape
    if not isinstance(heads, int) or not isinstance(width, int):
        raise ExportError(
            f"input {port} is no cache of this library: heads and width are not fixed"
        )
    return torch.zeros(batch, heads, 0, width, dtype=getattr(torch, port.dtype))


def last_logits(
    session: Generates, ids: Tensor, mask: Tensor, adapter: AdapterChoice = None
) -> Tensor:
    """The logits after the last token of each text, [batch, vocabulary], fp32, on the CPU.

    Texts may be padded on the right, by the mask: each is read by itself.
    """
    rows = []
    for tokens, counts in zip(ids, mask, strict=True):
        text = tokens[counts.bool()][None]
        rows.append(_CachedDecoder(session, 1, {}, adapter).step(text, torch.ones_like(text)))
    return torch.cat(rows)


class Streamer(Protocol):
    """Told of tokens as they come; transformers' streamers are such."""

    def put(self, value: Tensor) -> None:
        """Takes the prompt, [batch, length], then each new token, [batch]."""

    def end(self) -> None:
        """There will be no more."""


def _fields(config: Any) -> dict[str, Any]:
    """What a ``GenerationConfig`` of transformers, or a dict of its fields, changes.

    As in transformers: what an object leaves None was not set, and what a caller gives by name counts
    with None as well.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if not hasattr(config, "to_dict"):
        raise ExportError(
            f"generation_config is a {type(config).__name__}: give a GenerationConfig or a dict of its fields"
        )
    return {name: value for name, value in config.to_dict().items() if value is not None}


def _remembered(session: Generates) -> dict[str, Any]:
    text = session.metadata.get(GENERATION_KEY)
    if text is None:
        raise ExportError(
            f"{session.path.name} was not exported for text generation: export the model with "
            f"task='text-generation', or task='text2text-generation' if it has an encoder"
        )
    remembered: dict[str, Any] = json.loads(text)
    return remembered


def _tensor(name: str, value: object) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, Tensor):
        return value.detach().cpu()
    raise ExportError(
        f"'{name}' is a {type(value).__name__}, and inputs are numpy arrays or tensors. If it is a setting: "
        "those that generate has no argument for go into generation_config={...}"
    )


def _tokens(name: str, value: Tensor) -> Tensor:
    if value.ndim != 2 or value.is_floating_point() or value.numel() == 0:
        raise ExportError(
            f"'{name}' is {str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}: "
            f"give whole numbers of shape [batch, sequence], at least one of them"
        )
    if int(value.min()) < 0:
        # ONNX counts them from the end, and would answer.
        raise ExportError(
            f"'{name}' holds {int(value.min())}, which is no token: are those the labels (-100)?"
        )
    return value.long()


def _prompt(
    given: Mapping[str, Tensor], settings: GenerationSettings, file: str
) -> tuple[Tensor, Tensor]:
    _refuse_unknown(given, ["input_ids", "attention_mask"], file)
    if "input_ids" not in given:
        raise ExportError(f"{file} takes input_ids: there are none")
    ids = _tokens("input_ids", given["input_ids"])
    mask = given.get("attention_mask")
    if mask is None:
        return ids, _inferred_mask(ids, settings)
    if mask.shape != ids.shape:
        raise ExportError(
            f"'attention_mask' has shape {list(mask.shape)}, 'input_ids' has {list(ids.shape)}"
        )
    mask = (mask != 0).long()
    if not bool(mask[:, -1].all()):
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise ExportError(
            f"row {row} of 'attention_mask' ends with padding, after which no text goes on: pad on "
            f"the left (padding_side='left')"
        )
    return ids, mask


def _inferred_mask(ids: Tensor, settings: GenerationSettings) -> Tensor:
    """As transformers does: pad tokens are padding if they are no end-of-sequence tokens too."""
    pad = settings.pad_token_id
    if pad is None or pad in settings.eos_token_id:
        return torch.ones_like(ids)
    return (ids != pad).long()


def _source(
    given: Mapping[str, Tensor], settings: GenerationSettings, session: Generates, prepends: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    assert session.encoder is not None
    names = [port.name for port in session.encoder.inputs]
    _refuse_unknown(given, [*names, "decoder_input_ids"], session.path.name)
    source = {name: value for name, value in given.items() if name in names}
    if "input_ids" in source:
        source["input_ids"] = _tokens("input_ids", source["input_ids"])
        if "attention_mask" in names:
            mask = source.get("attention_mask", torch.ones_like(source["input_ids"]))
            source["attention_mask"] = mask.long()
    if not source:
        raise ExportError(f"{session.path.name} takes {', '.join(names)}: there are none")
    batch = next(iter(source.values())).shape[0]
    start = settings.decoder_start_token_id
    start = settings.bos_token_id if start is None else start
    prompt = given.get("decoder_input_ids")
    if prompt is not None:
        prompt = _tokens("decoder_input_ids", prompt)
        if len(prompt) != batch:
            raise ExportError(
                f"'decoder_input_ids' has {len(prompt)} rows, '{next(iter(source))}' has {batch}"
            )
        if not prepends or start is None or bool((prompt[:, 0] == start).any()):
            return prompt, source
    if start is None:
        raise ExportError(
            "nothing says which token the decoder begins with: pass decoder_input_ids"
        )
    first = torch.full((batch, 1), start)
    return first if prompt is None else torch.cat([first, prompt], dim=1), source


def _padding(settings: GenerationSettings) -> int:
    pad = settings.pad_token_id
    return settings.eos_token_id[0] if pad is None else pad


def _refuse_unknown(given: Mapping[str, Tensor], names: list[str], file: str) -> None:
    for name in given:
        if name not in names:
            near = hint(name, names, " (did you mean '{}'?)", count=1)
            raise ExportError(f"{file} takes {', '.join(names)}, not '{name}'{near}")


class Generates:
    """A session, if the file is for generation.

    Attributes:
        path: Where the file is.
        inputs: What it takes.
        outputs: What it gives.
        metadata: What the file remembers of its export.
        encoder: The session of the encoder, of an encoder-decoder.
    """

    path: Path
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    metadata: Mapping[str, str]
    encoder: Generates | None
    _replays_graphs: bool

    def _hold(self, adapter: AdapterChoice) -> Any:
        """Return an adapter as every file of the model has it at this moment."""
        raise NotImplementedError

    def _value(self, port: Port, value: Tensor) -> Any:
        """Put a tensor where the file runs, as what an input takes."""
        raise NotImplementedError

    def _run_held(self, feeds: Mapping[str, Any], held: Any) -> list[Any]:
        """Run the file. Logits come out on the CPU, all else where the file runs."""
        raise NotImplementedError

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
                asks for is done or refused: a field that is not supported and not at its default is an
                error that names it, and so is an unknown one.
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
                settings, the model's or the caller's, ask for what is not supported, such as beams.
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
        remembered = _remembered(self)
        own = remembered["defaults"]
        settings = GenerationSettings.of(own | _fields(generation_config), changes, own)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        given = {name: value for name, value in inputs.items() if value is not None}
        arrays = given and all(isinstance(value, np.ndarray) for value in given.values())
        tensors = {name: _tensor(name, value) for name, value in given.items()}
        device = next(
            (v.device for v in given.values() if isinstance(v, Tensor)), torch.device("cpu")
        )

        if self.encoder is None:
            source: dict[str, Tensor] = {}
            ids, mask = _prompt(tensors, settings, self.path.name)
            counted = mask
        else:
            ids, source = _source(tensors, settings, self, remembered.get("prepends_start", False))
            mask, counted = torch.ones_like(ids), None
        length = ids.shape[1] + settings.new_tokens(ids.shape[1], remembered["limit"])
        chain = processors(settings, ids, counted, length, logits_processor)
        decoder = _CachedDecoder(self, len(ids), source, adapter)
        anew_after = remembered.get("reads_anew_after")

        if streamer is not None:
            streamer.put(ids)
        unread, unfinished = ids, torch.ones(len(ids), dtype=torch.bool)
        while bool(unfinished.any()) and ids.shape[1] < length:
            past = ids.shape[1] - unread.shape[1]
            if past and anew_after is not None and past <= anew_after < ids.shape[1]:
                decoder.forget()
                unread = ids
            scores = decoder.step(unread, mask)
            for process in chain:
                scores = process(ids, scores)
            unread = next_tokens(scores, settings, generator)
            if settings.eos_token_id:
                unread = torch.where(unfinished, unread, _padding(settings))
                unfinished = unfinished & ~torch.isin(unread, torch.tensor(settings.eos_token_id))
            if streamer is not None:
                streamer.put(unread)
            unread = unread[:, None]
            ids = torch.cat([ids, unread], dim=1)
            mask = torch.cat([mask, torch.ones_like(unread)], dim=1)
            for criterion in stopping_criteria:
                unfinished = unfinished & ~torch.as_tensor(criterion(ids, scores)).bool()
        if streamer is not None:
            streamer.end()
        return ids.numpy() if arrays else ids.to(device)
