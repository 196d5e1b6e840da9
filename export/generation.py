"""Text generation of a session: reading the arguments, and the loop over tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lora_fx.errors import ExportError, hint
from lora_fx.export.adapter_store import AdapterChoice
from lora_fx.export.decoder import Decoder, Decodes
from lora_fx.export.decoder_cache import GENERATION_KEY
from lora_fx.export.generation_settings import (
    GenerationSettings,
    Processor,
    next_tokens,
    padding_of,
    processors,
)
from lora_fx.extras import load_optional

__all__ = ["BeamSearch", "Criterion", "Generates", "Streamer"]


class Streamer(Protocol):
    """Receiver of tokens as they are generated, such as a streamer of transformers."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, [batch, length], then each new token, [batch]."""

    def end(self) -> None:
        """Finish: no more tokens come."""


def _fields(config: Any) -> dict[str, Any]:
    """Return the fields that are set in a ``GenerationConfig`` of transformers, or in a dict of its fields.

    As in transformers, None in an object means not set, but None in a dict counts as a value.
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


def _remembered(session: Decodes) -> dict[str, Any]:
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
    near = hint(name, _CHANGES, "; did you mean {}", cutoff=0.6)
    raise ExportError(
        f"{name!r} is of the type {type(value).__name__}, and inputs are numpy arrays or tensors{near}. A "
        "setting that generate has no argument for goes into generation_config={...}"
    )


def _tokens(name: str, value: Tensor) -> Tensor:
    if value.ndim != 2 or value.is_floating_point() or value.numel() == 0:
        raise ExportError(
            f"'{name}' is {str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}: "
            f"give whole numbers of shape [batch, sequence], at least one of them"
        )
    if int(value.min()) < 0:
        # ONNX would index from the end, without an error.
        raise ExportError(
            f"'{name}' holds {int(value.min())}, which is no token: are those the labels (-100)?"
        )
    return value.long()


def _prompt(
    inputs: Mapping[str, Tensor], settings: GenerationSettings, file: str
) -> tuple[Tensor, Tensor]:
    _refuse_unknown(inputs, ["input_ids", "attention_mask"], file)
    if "input_ids" not in inputs:
        raise ExportError(f"{file} takes input_ids: there are none")
    ids = _tokens("input_ids", inputs["input_ids"])
    mask = inputs.get("attention_mask")
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
    """Return the mask of prompts that came without one: pad tokens get 0, unless they also end sequences."""
    pad = settings.pad_token_id
    if pad is None or pad in settings.eos_token_id:
        return torch.ones_like(ids)
    return (ids != pad).long()


def _source(
    inputs: Mapping[str, Tensor], settings: GenerationSettings, session: Decodes, prepends: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    assert session.encoder is not None
    names = [port.name for port in session.encoder.inputs]
    _refuse_unknown(inputs, [*names, "decoder_input_ids"], session.path.name)
    source = {name: value for name, value in inputs.items() if name in names}
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
    prompt = inputs.get("decoder_input_ids")
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


def _refuse_unknown(inputs: Mapping[str, Tensor], names: list[str], file: str) -> None:
    for name in inputs:
        if name not in names:
            near = hint(name, names, " (did you mean '{}'?)", count=1)
            raise ExportError(f"{file} takes {', '.join(names)}, not '{name}'{near}")


Criterion: TypeAlias = Callable[[Tensor, Any], Any]
"""Function of tokens [batch, length] and scores that returns True for texts that have ended.

The stopping criteria of transformers have this form.
"""


@dataclass
class _Call:
    """State of one call of ``generate`` or ``stream``, with checked arguments.

    Attributes:
        ids: The prompts, each repeated for every continuation of it, [rows, sequence].
        length: The largest number of tokens of a text.
        settings: The settings of generation.
        chain: Processors of scores, in order.
        criteria: Stopping criteria besides end-of-sequence tokens and the length.
        generator: Generator of the random numbers for sampling; None for torch's.
        decoder: The decoder of the file, before its first step.
        anew_after: The length beyond which the cache cannot be used any more.
        arrays: True if the inputs are arrays, so that the result is one, too.
        device: Device of the input tensors.
    """

    ids: Tensor
    length: int
    settings: GenerationSettings
    chain: Sequence[Processor]
    criteria: Sequence[Criterion]
    generator: torch.Generator | None
    decoder: Decoder
    anew_after: int | None
    arrays: bool
    device: torch.device

    def __post_init__(self) -> None:
        self._read = 0  # tokens that the decoder has read
        self._ends = torch.tensor(self.settings.eos_token_id, dtype=torch.long)

    def scores(self, ids: Tensor) -> Tensor:
        """Return the logits after ``ids``. The decoder reads only the tokens that it has not read yet."""
        total = ids.shape[1]
        if self.anew_after is not None and 0 < self._read <= self.anew_after < total:
            self.decoder.forget()
            self._read = 0
        unread = ids[:, self._read :]
        self._read = total
        return self.decoder.step(unread)

    def ended(self, tokens: Tensor) -> Tensor:
        """Return a mask of the newest tokens, [rows], that are end-of-sequence tokens."""
        return (tokens[:, None] == self._ends).any(dim=1)

    def sampled(self) -> Iterator[Tensor]:
        """Yield the next token of each text, [rows], until all texts end, and append it to ``ids``."""
        settings = self.settings
        count = self.ids.shape[1]
        whole = torch.empty(len(self.ids), self.length, dtype=torch.long)
        whole[:, :count] = self.ids
        ids, unfinished = self.ids, torch.ones(len(self.ids), dtype=torch.bool)
        over = False
        while count < self.length and not over:
            scores = self.scores(ids)
            for process in self.chain:
                scores = process(ids, scores)
            tokens = next_tokens(scores, settings, self.generator)
            if settings.eos_token_id:
                tokens = torch.where(unfinished, tokens, padding_of(settings))
                unfinished = unfinished & ~self.ended(tokens)
                over = not unfinished.any()
            whole[:, count] = tokens
            count += 1
            # A caller's functions may need contiguous tensors. A single row is contiguous without a copy.
            self.ids = ids = whole[:, :count].contiguous()
            yield tokens
            for criterion in self.criteria:
                unfinished = unfinished & ~torch.as_tensor(criterion(ids, scores)).bool()
                over = not unfinished.any()

    def searched(self) -> Tensor:
        """Run beam search, and return the texts, [batch · num_return_sequences, length]."""

        def ends(ids: Tensor) -> Tensor:
            ended = torch.full((len(ids),), ids.shape[1] >= self.length)
            if self.settings.eos_token_id:
                ended = ended | self.ended(ids[:, -1])
            for criterion in self.criteria:
                ended = ended | torch.as_tensor(criterion(ids, None)).bool()
            return ended

        search = BeamSearch(self.ids, self.length, self.settings, ends, self.generator)
        while not search.over:
            rows = search.advance(self.scores(search.ids), self.chain)
            self.decoder.reorder(rows)
        return search.result()

    def run(self, streamer: Streamer | None) -> Any:
        """Generate all tokens, and return the texts.

        Raises:
            ExportError: A streamer is given for beams.
        """
        if self.settings.num_beams > 1:
            if streamer is not None:
                raise ExportError(
                    f"streamer and num_beams={self.settings.num_beams}: beam search does not know its tokens "
                    "before it ends. Pass num_beams=1, or no streamer"
                )
            return self.given_back(self.searched())
        if streamer is not None:
            streamer.put(self.ids)
        for tokens in self.sampled():
            if streamer is not None:
                streamer.put(tokens)
        if streamer is not None:
            streamer.end()
        return self.given_back(self.ids)

    def given_back(self, ids: Tensor) -> Any:
        """Return ``ids`` in the form of the inputs: as an array, or as a tensor on their device."""
        return ids.numpy() if self.arrays else ids.to(self.device)


def _stop_criteria(settings: GenerationSettings, tokenizer: Any) -> list[Criterion]:
    """Return the criterion of transformers that ends texts at ``stop_strings``, if there are any."""
    strings = settings.stop_strings
    if strings is None:
        return []
    texts = [strings] if isinstance(strings, str) else strings
    if not isinstance(texts, Sequence) or not texts or not all(map(_is_text, texts)):
        raise ExportError(f"stop_strings={strings!r}: give a text, or a list of them")
    if tokenizer is None:
        raise ExportError(
            f"stop_strings={strings!r} needs tokenizer=, the model's tokenizer, which says what tokens spell"
        )
    _check_tokenizer(tokenizer)
    transformers = _transformers("stop_strings=")
    return [transformers.StopStringCriteria(tokenizer=tokenizer, stop_strings=list(texts))]


def _transformers(purpose: str) -> Any:
    return load_optional("transformers", purpose, "lora-fx[hf]", error=ExportError)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _check_tokenizer(tokenizer: object) -> None:
    if not hasattr(tokenizer, "get_vocab") or not hasattr(tokenizer, "decode"):
        raise ExportError(
            f"tokenizer is a {type(tokenizer).__name__}: give one of transformers "
            "(AutoTokenizer.from_pretrained)"
        )


def _pieces(call: _Call, tokenizer: Any, decode: Mapping[str, Any]) -> Iterator[str]:
    """Yield pieces of text that later tokens cannot change, as transformers' streamers do."""
    _transformers("a stream of text")
    from transformers import TextStreamer

    pieces: list[str] = []

    class Collecting(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    streamer = Collecting(tokenizer, **decode)
    for tokens in call.sampled():
        streamer.put(tokens)
        yield from filter(None, pieces)
        pieces.clear()
    streamer.end()
    yield from filter(None, pieces)


@dataclass(frozen=True)
class _Changes:
    """Settings that are arguments of ``generate``, such as ``top_k``. None keeps the model's setting."""

    max_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    num_beams: int | None
    num_return_sequences: int | None
    stop_strings: str | Sequence[str] | None


_CHANGES = tuple(field.name for field in fields(_Changes))


@dataclass(frozen=True)
class _Control:
    """Arguments of a call that are neither inputs nor settings; see :meth:`Generates.generate`."""

    tokenizer: Any
    generation_config: Any
    generator: torch.Generator | None
    logits_processor: Sequence[Processor]
    stopping_criteria: Sequence[Criterion]
    adapter: AdapterChoice


class Generates(Decodes):
    """The part of a session that generates text, for files that were exported with a task."""

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
        num_beams: int | None = None,
        num_return_sequences: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        generation_config: Any = None,
        generator: torch.Generator | None = None,
        logits_processor: Sequence[Processor] = (),
        stopping_criteria: Sequence[Criterion] = (),
        streamer: Streamer | None = None,
        adapter: AdapterChoice = None,
        **inputs: Any,
    ) -> Any:
        """Continue texts. The tokens are the same as from ``model.generate`` of transformers.

        For files of ``export_onnx(..., task=...)``. Defaults come from the model's ``generation_config``,
        which is stored in the file, or else from transformers.

        Args:
            input_ids: The prompts, integers of shape [batch, sequence], padded on the left. For an
                encoder-decoder they are the texts that its encoder reads.
            attention_mask: Mask of the same shape, 0 for padding. Without it pad tokens are padding.
            max_new_tokens: The largest number of tokens to generate; 20 if no configuration sets it.
            do_sample: True to draw each token, False to take the likeliest.
            temperature: Divisor of the logits before a draw.
            top_k: Number of likeliest tokens to draw from; 0 for all.
            top_p: Draw from the likeliest tokens that have this probability together.
            min_p: Draw from tokens with at least this share of the highest probability.
            repetition_penalty: Divisor of the logits of tokens that are already in the text.
            eos_token_id: The token or tokens that end a text; an empty list for none.
            pad_token_id: Token that fills rows that end before others.
            num_beams: Number of beams of beam search; 1 for no beam search.
            num_return_sequences: Number of texts for each prompt, from draws or from the beams.
            stop_strings: Texts that end a row, which keeps them. They need ``tokenizer``.
            tokenizer: The model's tokenizer, of transformers, for ``stop_strings``.
            generation_config: A ``GenerationConfig``, or a dict of its fields. A field that is None in an
                object or missing in a dict is as in the file. None in a dict switches a setting off, as in
                the arguments of ``model.generate``. The arguments here take precedence. A field that is
                unknown, or unsupported and not at its default, is an error that names it.
            generator: Random numbers of the draws. The default is torch's generator, as in transformers.
            logits_processor: Functions from tokens [batch, length] and scores [batch, vocabulary] to scores,
                as in transformers. The tensors are on the CPU.
            stopping_criteria: Functions of tokens and scores that return True for texts that have ended. In
                beam search the scores are None.
            streamer: Receiver of the prompt, each token, and the end, as in transformers; not for beams.
            adapter: As for :meth:`run`.
            **inputs: ``input_features`` and the like, which an encoder takes instead of ids, and
                ``decoder_input_ids``, with which its decoder begins.

        Returns:
            The prompts with their continuations, [batch · num_return_sequences, length]: a tensor, or an
            array if all inputs are arrays. For an encoder-decoder, the texts of its decoder.

        Raises:
            ExportError: The file is not for generation; inputs, settings or lengths do not fit or
                contradict each other; a setting of the model or the caller is not supported.
        """
        changes = _Changes(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
            stop_strings=stop_strings,
        )
        call = self._call(
            {"input_ids": input_ids, "attention_mask": attention_mask, **inputs},
            changes,
            _Control(
                tokenizer,
                generation_config,
                generator,
                logits_processor,
                stopping_criteria,
                adapter,
            ),
        )
        return call.run(streamer)

    def stream(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        tokenizer: Any = None,
        text: bool | None = None,
        decode: Mapping[str, Any] | None = None,
        generation_config: Any = None,
        generator: torch.Generator | None = None,
        logits_processor: Sequence[Processor] = (),
        stopping_criteria: Sequence[Criterion] = (),
        adapter: AdapterChoice = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Continue one text and yield each token when it is generated: ``for token in session.stream(ids)``.

        Arguments are checked at the call, before the first token. To stop early, leave the loop.

        Args:
            input_ids: As for :meth:`generate`, with one row.
            attention_mask: As for :meth:`generate`.
            tokenizer: The model's tokenizer, of transformers. With it, the iterator yields pieces of text
                instead of tokens, as ``TextIteratorStreamer(tokenizer, skip_prompt=True)`` does.
            text: False to get tokens although there is a tokenizer, for ``stop_strings``.
            decode: Arguments of ``tokenizer.decode``, such as ``{"skip_special_tokens": True}``.
            generation_config: As for :meth:`generate`.
            generator: As for :meth:`generate`.
            logits_processor: As for :meth:`generate`.
            stopping_criteria: As for :meth:`generate`.
            adapter: As for :meth:`generate`.
            **options: Other settings and inputs of :meth:`generate`.

        Returns:
            An iterator of tokens as ints, the end-of-sequence token included, or of pieces of text.

        Raises:
            ExportError: As for :meth:`generate`, and for several rows, beams, or a streamer.
        """
        if "streamer" in options:
            raise ExportError("stream takes no streamer: it gives tokens itself, or use generate")
        as_text = tokenizer is not None if text is None else text
        if as_text and tokenizer is None:
            raise ExportError("text=True needs tokenizer=, the model's tokenizer")
        if as_text:
            _check_tokenizer(tokenizer)
        changes = _Changes(**{name: options.pop(name, None) for name in _CHANGES})
        call = self._call(
            {"input_ids": input_ids, "attention_mask": attention_mask, **options},
            changes,
            _Control(
                tokenizer,
                generation_config,
                generator,
                logits_processor,
                stopping_criteria,
                adapter,
            ),
            alone=True,
        )
        if as_text:
            return _pieces(call, tokenizer, decode or {})
        return (int(tokens) for tokens in call.sampled())

    def _call(
        self,
        inputs: Mapping[str, Any],
        changes: _Changes,
        control: _Control,
        *,
        alone: bool = False,
    ) -> _Call:
        """Check the arguments of a call of ``generate``, and prepare it. ``alone`` allows only one text."""
        remembered = _remembered(self)
        own = remembered["defaults"]
        defaults = own | _fields(control.generation_config)
        settings = GenerationSettings.of(defaults, vars(changes), own)
        criteria = [*_stop_criteria(settings, control.tokenizer), *control.stopping_criteria]
        present = {name: value for name, value in inputs.items() if value is not None}
        arrays = bool(present) and all(isinstance(value, np.ndarray) for value in present.values())
        tensors = {name: _tensor(name, value) for name, value in present.items()}
        device = next(
            (v.device for v in present.values() if isinstance(v, Tensor)), torch.device("cpu")
        )
        source: dict[str, Tensor] = {}
        if self.encoder is None:
            ids, mask = _prompt(tensors, settings, self.path.name)
        else:
            ids, source = _source(tensors, settings, self, remembered.get("prepends_start", False))
            mask = torch.ones_like(ids)
        if alone:
            _check_alone(len(ids), settings)
        copies = settings.copies
        ids, mask = (tensor.repeat_interleave(copies, dim=0) for tensor in (ids, mask))
        chosen: Any = control.adapter
        if isinstance(chosen, (list, tuple)) and copies > 1:
            # Each row has its own adapter, so the rows of the encoder are repeated, too.
            chosen = [name for name in chosen for _ in range(copies)]
            source = {name: v.repeat_interleave(copies, dim=0) for name, v in source.items()}
            copies = 1
        length = ids.shape[1] + settings.new_tokens(ids.shape[1], remembered["limit"])
        counted = mask if self.encoder is None else None
        return _Call(
            ids,
            length,
            settings,
            processors(settings, ids, counted, length, control.logits_processor),
            criteria,
            control.generator,
            Decoder(self, mask, source, chosen, length=length, copies=copies),
            remembered.get("reads_anew_after"),
            arrays,
            device,
        )


def _check_alone(rows: int, settings: GenerationSettings) -> None:
    counts = {
        "rows": rows,
        "num_beams": settings.num_beams,
        "num_return_sequences": settings.num_return_sequences,
    }
    several = [f"{name}={count}" for name, count in counts.items() if count > 1]
    if several:
        raise ExportError(
            f"stream continues one text, and {', '.join(several)} are several: stream each by itself, in "
            "threads if need be, or use generate"
        )


# --- beam search ----------------------------------------------------------------------------------


_NEVER = -1e9
"""Score of a candidate that must not be chosen. It is finite, so that sums of scores still have an order."""


@dataclass(frozen=True)
class _Candidates:
    """Candidates for the next step of beam search: beams with one more token, the best first.

    Attributes:
        scores: Sums of log-probabilities, [batch, candidates].
        texts: Tokens, [batch, candidates, length].
        beams: The beam that each candidate continues, [batch, candidates].
        ended: Mask of the complete candidates, [batch, candidates].
    """

    scores: Tensor
    texts: Tensor
    beams: Tensor
    ended: Tensor


class BeamSearch:
    """Beams of a batch of prompts, and the best complete texts so far.

    Args:
        ids: The prompts, each ``num_beams`` times, [batch · num_beams, sequence].
        length: The largest number of tokens of a text.
        settings: The settings of the search.
        ends: Function of tokens [rows, length] that returns a mask of the rows that have ended.
        generator: Random numbers of ``do_sample``.
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
        # transformers treats a pad token of 0 as no pad token.
        fill = -1
        if settings.eos_token_id:
            fill = padding_of(settings) or settings.eos_token_id[0]
        batch = len(ids) // beams
        self._running = torch.full((batch, beams, length), fill)
        self._running[:, :, : self._now] = ids.view(batch, beams, -1)
        self._scores = torch.zeros(batch, beams)
        self._scores[:, 1:] = _NEVER  # the beams of a prompt are still equal
        self._whole = self._running.clone()
        self._whole_scores = torch.full((batch, beams), _NEVER)
        self._whole_lengths = torch.zeros(batch, beams, dtype=torch.long)
        self._found = torch.zeros(batch, beams, dtype=torch.bool)
        self._may_improve = torch.ones(batch, 1, dtype=torch.bool)
        self._over = False

    @property
    def over(self) -> bool:
        """True once no running text can become better than the complete texts."""
        return self._over

    @property
    def ids(self) -> Tensor:
        """Tokens of the running texts, [batch · num_beams, length so far]."""
        return self._running[:, :, : self._now].flatten(0, 1)

    def advance(self, logits: Tensor, chain: Sequence[Processor]) -> Tensor:
        """Extend the running texts by one token.

        Args:
            logits: Logits after the running texts, [batch · num_beams, vocabulary].
            chain: Processors of the log-probabilities, in order.

        Returns:
            The previous row that each running text continues, [batch · num_beams].
        """
        scores, ids = logits.log_softmax(dim=-1), self.ids
        for process in chain:
            scores = process(ids, scores)
        candidates = self._candidates(scores)
        running = candidates.scores + candidates.ended.float() * _NEVER
        best = running.topk(self._settings.num_beams)[1]
        self._keep_whole(candidates)
        self._running = _gathered(candidates.texts, best)
        self._scores = running.gather(1, best)
        self._now += 1
        self._update(candidates.ended)
        batch, beams = best.shape
        first = torch.arange(batch)[:, None] * beams
        return (candidates.beams.gather(1, best) + first).flatten()

    def result(self) -> Tensor:
        """Return the best texts, [batch · num_return_sequences, length of the longest]."""
        count = self._settings.num_return_sequences
        longest = self._prompt + int(self._whole_lengths[:, :count].max())
        return self._whole[:, :count, :longest].flatten(0, 1)

    def _candidates(self, scores: Tensor) -> _Candidates:
        settings, beams = self._settings, self._settings.num_beams
        vocabulary, batch = scores.shape[1], len(self._scores)
        total = (scores.view(batch, beams, -1) + self._scores[:, :, None]).view(batch, -1)
        # Enough candidates to continue, even if the best of them all end here.
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

    def _keep_whole(self, candidates: _Candidates) -> None:
        """Keep the best complete texts, out of the previous ones and the candidates that ended now."""
        settings, beams = self._settings, self._settings.num_beams
        leading = torch.arange(candidates.scores.shape[1]) < beams
        ended = candidates.ended & leading
        length = self._now + 1 - self._prompt
        scores = candidates.scores / length**settings.length_penalty
        full = self._found.all(dim=-1, keepdim=True) & (settings.early_stopping is True)
        scores = scores + full.float() * _NEVER
        scores = scores + (~self._may_improve).float() * _NEVER
        scores = scores + (~ended).float() * _NEVER
        merged = torch.cat([self._whole_scores, scores], dim=1)
        best = merged.topk(beams)[1]
        self._whole_scores = merged.gather(1, best)
        self._whole = _gathered(torch.cat([self._whole, candidates.texts], dim=1), best)
        lengths = torch.full_like(candidates.beams, length)
        self._whole_lengths = torch.cat([self._whole_lengths, lengths], dim=1).gather(1, best)
        self._found = torch.cat([self._found, ended], dim=1).gather(1, best)

    def _update(self, ended: Tensor) -> None:
        """End the search if no running text can become better than the worst complete text."""
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
    """Return the rows ``indices`` [batch, count] of ``values`` [batch, rows, length]."""
    return values.take_along_dim(indices[:, :, None], dim=1)
