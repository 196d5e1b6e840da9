"""Tasks of an export: the files, the calls that are traced, and the calls that check them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError, hint
from lora_fx.export.arguments import Case, Cases, Checked
from lora_fx.export.decoder_cache import (
    TASK_KEY,
    CacheLayout,
    Past,
    cache_argument,
    cache_of,
    filled_cache,
    generation_metadata,
    position_limit,
    read_cache,
)

__all__ = ["Part", "Task", "find_task"]


@dataclass(frozen=True)
class Part:
    """One file of a task.

    Attributes:
        name: "" for the file that a session opens, else the name of the part ("encoder").
        call: Function that calls the model: ``call(model, **inputs)``.
        inputs: The example call; its nested mappings become names with dots.
        dynamic_shapes: Dynamic axes by input name; None to find the axes that can be dynamic.
        cases: Calls to check, or None to draw them by axis.
        metadata: Metadata entries of the file.
    """

    name: str
    call: Callable[..., object]
    inputs: Mapping[str, Any]
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None
    cases: Cases | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


# ``task="text-generation"``: a decoder with its key-value cache as inputs and outputs.
#
# One file runs both kinds of step. A prefill has a past of length 0, and a decoding step has a sequence of
# length 1. The attention mask covers past and sequence.

_TEXT_GENERATION = "text-generation"
_TAKEN = ("input_ids", "attention_mask", "logits_to_keep")
_PAST = 5  # positions of the past in the traced call; any number from 2 works


def _text_generation(model: nn.Module, example: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return the file of a decoder.

    Args:
        model: The model in eval mode.
        example: ``input_ids`` of shape [batch, sequence] and any other inputs of the user.

    Raises:
        ExportError: The model is no decoder of transformers with a cache of keys and values, or
            ``example`` has other inputs.
    """
    owner = type(model).__name__
    ids = _prompt(model, example, owner)
    layout = _decoder_layout(model, ids, owner)
    keep = example.get("logits_to_keep", 1)
    if keep not in (0, 1):
        raise ExportError(
            f"logits_to_keep is {keep!r}: give 1 for the logits of the last position, 0 for all"
        )
    batch, sequence = ids.shape
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": ids.new_ones(batch, _PAST + sequence),
        "past_key_values": layout.zeros(batch, _PAST),
    }
    shapes = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total_length"},
    }
    for index in layout.layers:
        for kind in ("key", "value"):
            shapes[f"past_key_values.{index}.{kind}"] = {0: "batch", 2: "past_length"}
    return (
        Part(
            name="",
            call=functools.partial(_decode, keep=keep),
            inputs=inputs,
            dynamic_shapes=shapes,
            cases=functools.partial(_decoder_cases, layout=layout, keep=keep),
            metadata=generation_metadata(model, _TEXT_GENERATION),
        ),
    )


def _prompt(model: nn.Module, example: Mapping[str, Any], owner: str) -> Tensor:
    config: Any = getattr(model, "config", None)
    if config is None or cache_argument(model) is None:
        raise ExportError(
            f"{owner} takes no key-value cache, so it is no decoder to generate text with: "
            f"export it without task="
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(f"{owner} is an encoder-decoder: use task='text2text-generation'")
    unknown = [name for name in example if name not in _TAKEN]
    ids = example.get("input_ids")
    if unknown or not isinstance(ids, Tensor):
        names = ", ".join(example) or "nothing"
        raise ExportError(
            f"task='text-generation' takes example_inputs with input_ids (and logits_to_keep, a "
            f"number), and makes the mask and the cache by itself: {names} were given"
        )
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ExportError(
            f"input_ids is {ids.dtype} of shape {list(ids.shape)}: give whole numbers of shape "
            f"[batch, sequence]"
        )
    # Sizes of 1 cannot become dynamic.
    ids = ids.long()
    return ids.repeat(1 if len(ids) > 1 else 2, 1 if ids.shape[1] > 1 else 2)


def _decoder_layout(model: nn.Module, ids: Tensor, owner: str) -> CacheLayout:
    try:
        with torch.no_grad():
            outputs = model(input_ids=ids[:, :2], use_cache=True)
    except Exception as error:
        raise ExportError(f"{owner} does not run on input_ids alone: {error}") from error
    if cache_of(outputs) is None:
        raise ExportError(
            f"{owner} gives no key-value cache back: is it a decoder (config.is_decoder)?"
        )
    return CacheLayout.of(read_cache(cache_of(outputs), owner))


def _decode(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, past_key_values: Past, *, keep: int
) -> dict[str, object]:
    """Run a decoder for one step. Return ``logits`` of the last ``keep`` positions (0: all) and the cache."""
    first = next(iter(past_key_values.values()))["key"]
    steps = torch.arange(input_ids.shape[1], device=input_ids.device) + first.shape[2]
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=True,
        **{str(cache_argument(model)): filled_cache(past_key_values)},
        **_positions(model, attention_mask, steps),
        **_logits_kept(model, keep),
    )
    present = read_cache(cache_of(outputs), type(model).__name__)
    return {"logits": outputs.logits[:, -keep:], "present": present}


def _positions(model: nn.Module, attention_mask: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """Return ``position_ids`` of the tokens ``steps`` as in transformers: the first real token has 0."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    positions = attention_mask.cumsum(-1) - 1
    positions = positions.masked_fill(attention_mask == 0, 0)
    return {"position_ids": positions.index_select(1, steps)}


def _logits_kept(model: nn.Module, keep: int) -> dict[str, int]:
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": keep} if known else {}


@torch.no_grad()
def _decoder_cases(model: Checked, *, layout: CacheLayout, keep: int) -> Iterator[Case]:
    """Yield the calls that check a decoder's file: prompts, some padded on the left, and then more tokens.

    The expected logits come from a forward over the whole text without a cache. So the cache is checked
    along with the file.
    """
    decoder: Any = model.model
    embedding = decoder.get_input_embeddings()
    limit = position_limit(decoder) or 32
    generator = torch.Generator().manual_seed(0)
    for batch, prompt, more in ((3, 6, (2, 1, 1)), (1, 4, (1,)), (2, 1, (1,))):
        lengths = (prompt, *more)
        if sum(lengths) > limit:
            continue
        ids = _drawn(decoder, embedding, (batch, sum(lengths)), generator, layout.device)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, : min(row + 1, prompt - 1)] = 0
        past: Past = layout.zeros(batch, 0)
        done = 0
        for length in lengths:
            total = done + length
            seen = mask[:, :total]
            inputs = [ids[:, done:total].contiguous(), seen.contiguous()]
            inputs += [layer[kind] for layer in past.values() for kind in ("key", "value")]
            outputs = dict(model.named(inputs))
            outputs["logits"] = model.run(_without_cache, ids[:, :total], seen)[:, done:][:, -keep:]
            valid = {name: seen[:, None, :, None] for name in outputs if name != "logits"}
            valid["logits"] = seen[:, done:][:, -keep:, None]
            yield Case(inputs, list(outputs.items()), valid)
            past = layout.cast(
                {
                    index: {kind: outputs[f"present.{index}.{kind}"] for kind in layer}
                    for index, layer in layout.layers.items()
                }
            )
            done = total


def _without_cache(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    steps = torch.arange(ids.shape[1], device=ids.device)
    outputs = model(
        input_ids=ids, attention_mask=mask, use_cache=False, **_positions(model, mask, steps)
    )
    logits: Tensor = outputs.logits
    return logits


def _drawn(
    model: Any, embedding: Any, shape: tuple[int, int], generator: torch.Generator, device: Any
) -> Tensor:
    """Draw tokens of a text, without the pad token, because some models give it no position."""
    known = len(embedding.weight)
    ids = torch.randint(0, known, shape, generator=generator)
    pad = getattr(model.config, "pad_token_id", None)
    ids = ids if pad is None else torch.where(ids == pad, (ids + 1) % known, ids)
    return ids.to(device)


# ``task="text2text-generation"``: an encoder-decoder as two files.
#
# The encoder's file returns the keys and values for the decoder's cross-attention, so that they are computed
# once. They are inputs of the decoder's file, together with the cache of its self-attention. Decoding steps
# neither return nor copy them.

_TEXT2TEXT_GENERATION = "text2text-generation"


@dataclass(frozen=True)
class _Example:
    """Example inputs and cache layouts of an encoder-decoder.

    Attributes:
        source: The inputs of the encoder, by name.
        start: Token that the decoder begins with.
        own: Cache layout of the decoder's self-attention.
        cross: Cache layout of the decoder's cross-attention.
        width: Size of a hidden state of the encoder.
    """

    source: Mapping[str, Tensor]
    start: int
    own: CacheLayout
    cross: CacheLayout
    width: int

    @property
    def masked(self) -> bool:
        """True if the inputs have an attention mask."""
        return "input_ids" in self.source


def _text2text_generation(model: nn.Module, example: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return the files of an encoder-decoder, the decoder's last.

    Args:
        model: The model in eval mode.
        example: Inputs of the encoder: ``input_ids`` (and ``attention_mask``), ``input_features``.

    Raises:
        ExportError: The model is no encoder-decoder of transformers with a cache of keys and
            values, or does not run on ``example``.
    """
    setup = _example(model, example)
    states = _encode(model, **setup.source)["present"]
    batch = len(next(iter(setup.source.values())))
    own = setup.own.zeros(batch, _PAST)
    past = {index: {"decoder": own[index], **states[index]} for index in own}
    shapes: dict[str, dict[int, str]] = {"input_ids": {0: "batch", 1: "sequence"}}
    ids = torch.full((batch, 3), setup.start, dtype=torch.int64, device=setup.own.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if setup.masked:
        inputs["encoder_attention_mask"] = setup.source["attention_mask"]
        shapes["encoder_attention_mask"] = {0: "batch", 1: "encoder_sequence"}
    inputs["past_key_values"] = past
    for index in past:
        for kind in ("key", "value"):
            name = f"past_key_values.{index}"
            shapes[f"{name}.decoder.{kind}"] = {0: "batch", 2: "past_length"}
            shapes[f"{name}.encoder.{kind}"] = {0: "batch", 2: "encoder_sequence"}
    return (
        Part("encoder", _encode, setup.source, metadata={TASK_KEY: _TEXT2TEXT_GENERATION}),
        Part(
            name="",
            call=functools.partial(_decode_encoded, width=setup.width),
            inputs=inputs,
            dynamic_shapes=shapes,
            cases=functools.partial(_encoded_cases, example=setup),
            metadata=generation_metadata(model, _TEXT2TEXT_GENERATION),
        ),
    )


def _example(model: nn.Module, example: Mapping[str, Any]) -> _Example:
    owner = type(model).__name__
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or cache_argument(model) is None:
        raise ExportError(
            f"{owner} is no encoder-decoder with a key-value cache: a decoder is exported with "
            f"task='text-generation', and other models without task="
        )
    source = {
        name: value
        for name, value in example.items()
        if isinstance(value, Tensor) and not name.startswith("decoder_")
    }
    if not source or set(example) - set(source) - {"decoder_input_ids"}:
        raise ExportError(
            f"task='text2text-generation' takes the inputs of the encoder as example_inputs, and "
            f"makes those of the decoder by itself: {', '.join(example)} were given"
        )
    # Sizes of 1 cannot become dynamic.
    if any(len(value) == 1 for value in source.values()):
        source = {name: torch.cat([value, value]) for name, value in source.items()}
    if "input_ids" in source:
        if source["input_ids"].shape[1] == 1:
            source = {name: torch.cat([value, value], dim=1) for name, value in source.items()}
        source.setdefault("attention_mask", torch.ones_like(source["input_ids"]))
    start = _start_token(model)
    try:
        with torch.no_grad():
            outputs = _run_first(model, source)
    except Exception as error:
        raise ExportError(f"{owner} does not run on {', '.join(source)}: {error}") from error
    cache = cache_of(outputs)
    if cache is None or not hasattr(cache, "cross_attention_cache"):
        raise ExportError(f"{owner} gives no cache of its attention to the encoder back")
    return _Example(
        source=source,
        start=start,
        own=CacheLayout.of(read_cache(cache.self_attention_cache, owner)),
        cross=CacheLayout.of(read_cache(cache.cross_attention_cache, owner)),
        width=outputs.encoder_last_hidden_state.shape[-1],
    )


def _start_token(model: nn.Module) -> int:
    for config in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                return token
    raise ExportError(
        f"{type(model).__name__} does not say which token its decoder begins with: set "
        f"generation_config.decoder_start_token_id"
    )


def _run_first(model: nn.Module, source: Mapping[str, Tensor]) -> Any:
    """Run an encoder-decoder on ``source`` and the decoder's start token, and return all outputs."""
    value = next(iter(source.values()))
    token = torch.full(
        (value.shape[0], 1), _start_token(model), dtype=torch.int64, device=value.device
    )
    return model(**source, decoder_input_ids=token, use_cache=True)


def _encode(model: nn.Module, **source: Tensor) -> dict[str, dict[int, dict[str, Any]]]:
    """Run the encoder. Return keys and values for cross-attention: ``present.N.encoder.key`` of layer N."""
    # The decoder runs, too, because it has the projections. Its unused operations are not in the file.
    cache = cache_of(_run_first(model, source)).cross_attention_cache
    states = read_cache(cache, type(model).__name__)
    return {"present": {index: {"encoder": layer} for index, layer in states.items()}}


def _decode_encoded(
    model: nn.Module,
    input_ids: Tensor,
    past_key_values: Mapping[int, Mapping[str, Mapping[str, Tensor]]],
    encoder_attention_mask: Tensor | None = None,
    *,
    width: int,
) -> dict[str, object]:
    """Run the decoder for one step on encoded texts. Return ``logits`` of the last position and the cache."""
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    own: Past = {index: layer["decoder"] for index, layer in past_key_values.items()}
    cross: Past = {index: layer["encoder"] for index, layer in past_key_values.items()}
    cache = EncoderDecoderCache(filled_cache(own), filled_cache(cross))
    cache.is_updated = dict.fromkeys(own, True)
    key = next(iter(cross.values()))["key"]
    # The values of the states are never read, because the cache already has the keys and values from them.
    states = key.new_zeros(key.shape[0], key.shape[2], width)
    outputs = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=encoder_attention_mask,
        decoder_input_ids=input_ids,
        use_cache=True,
        **{str(cache_argument(model)): cache},
    )
    present = read_cache(cache_of(outputs).self_attention_cache, type(model).__name__)
    named = {index: {"decoder": layer} for index, layer in present.items()}
    return {"logits": outputs.logits[:, -1:], "present": named}


@torch.no_grad()
def _encoded_cases(model: Checked, *, example: _Example) -> Iterator[Case]:
    """Yield the calls that check a decoder's file with encoded texts: steps of one or several tokens.

    The expected logits come from the whole model without a cache. So the cache and the encoder's file are
    checked along with the decoder's file.
    """
    whole: Any = model.model
    head = whole.get_output_embeddings()
    limit = position_limit(whole) or 32
    generator = torch.Generator().manual_seed(0)
    for batch, lengths in ((2, (1, 2, 1, 1)), (1, (3, 1)), (3, (1, 1))):
        if sum(lengths) > limit:
            continue
        source = {name: _rows(value, batch) for name, value in example.source.items()}
        if example.masked and batch > 1:
            mask = source["attention_mask"].clone()
            mask[-1, mask.shape[1] // 2 + 1 :] = 0
            source["attention_mask"] = mask
        present = model.run(_encode, **source)["present"]
        states = example.cross.cast({index: layer["encoder"] for index, layer in present.items()})
        ids = _drawn(whole, head, (batch, sum(lengths)), generator, example.own.device)
        ids[:, 0] = example.start
        own = example.own.zeros(batch, 0)
        done = 0
        for length in lengths:
            total = done + length
            inputs = [ids[:, done:total].contiguous()]
            if example.masked:
                inputs.append(source["attention_mask"])
            for index, layer in own.items():
                inputs += [layer["key"], layer["value"], *states[index].values()]
            outputs = dict(model.named(inputs))
            decoder_inputs = {"decoder_input_ids": ids[:, :total], "use_cache": False}
            plain = model.run(nn.Module.__call__, **source, **decoder_inputs)
            outputs["logits"] = plain.logits[:, -1:]
            yield Case(inputs, list(outputs.items()))
            cache = {
                index: {kind: outputs[f"present.{index}.decoder.{kind}"] for kind in layer}
                for index, layer in own.items()
            }
            own = example.own.cast(cache)
            done = total


def _rows(value: Tensor, batch: int) -> Tensor:
    return value.repeat(-(-batch // len(value)), *[1] * (value.ndim - 1))[:batch].contiguous()


Task: TypeAlias = Callable[[nn.Module, Mapping[str, Any]], tuple[Part, ...]]
"""Function of a model in eval mode and example inputs by name that returns the files.

The last file is the one that a session opens.
"""

_TASKS: Mapping[str, Task] = {
    _TEXT_GENERATION: _text_generation,
    _TEXT2TEXT_GENERATION: _text2text_generation,
}


def find_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ExportError: There is no such task. The message has the nearest name.
    """
    if name in _TASKS:
        return _TASKS[name]
    like = str(name).lower().replace("_", "-")
    raise ExportError(
        f"task={name!r} is unknown: the tasks are {', '.join(map(repr, _TASKS))}, and without one "
        f"the model is exported as it is called."
        + hint(like, _TASKS, " Did you mean '{}'?", count=1, cutoff=0.4)
    )
