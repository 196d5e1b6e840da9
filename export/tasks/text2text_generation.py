"""``task="text2text-generation"``: an encoder-decoder as two files.

The encoder's file gives the keys and values that the decoder's cross-attention reads, so that they
are computed once. The decoder's file has them among its inputs, beside the cache of its own
attention; decoding steps neither return nor copy them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.tasks.part import (
    TASK_KEY,
    CacheLayout,
    Part,
    Past,
    cache_argument,
    cache_of,
    filled_cache,
    generation_metadata,
    position_limit,
    read_cache,
)
from lora_fx.export.trace import Case, Checked

__all__ = ["TEXT2TEXT_GENERATION", "text2text_generation"]

TEXT2TEXT_GENERATION = "text2text-generation"
_PAST = 5  # positions of the past in the call that is traced; any number from 2 does


@dataclass(frozen=True)
class _Example:
    """What an export is made from.

    Attributes:
        source: The inputs of the encoder, by name.
        masked: Whether they have an attention mask.
        start: Token that the decoder begins with.
        own: The cache of the decoder's attention to itself.
        cross: That of its attention to the encoder.
        width: Size of a hidden state of the encoder.
    """

    source: Mapping[str, Tensor]
    masked: bool
    start: int
    own: CacheLayout
    cross: CacheLayout
    width: int


def text2text_generation(model: nn.Module, example: Mapping[str, Any]) -> tuple[Part, ...]:
    """The files of an encoder-decoder, the decoder's last.

    Args:
        model: In eval mode.
        example: What the encoder takes: ``input_ids`` (and ``attention_mask``), ``input_features``.

    Raises:
        ExportError: The model is no encoder-decoder of transformers with a cache of keys and
            values, or does not run on ``example``.
    """
    found = _example(model, example)
    states = _crossed(model, **found.source)["present"]
    batch = len(next(iter(found.source.values())))
    own = found.own.zeros(batch, _PAST)
    past = {index: {"decoder": own[index], **states[index]} for index in own}
    shapes: dict[str, dict[int, str]] = {"input_ids": {0: "batch", 1: "sequence"}}
    ids = torch.full((batch, 3), found.start, dtype=torch.int64, device=found.own.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if found.masked:
        inputs["encoder_attention_mask"] = found.source["attention_mask"]
        shapes["encoder_attention_mask"] = {0: "batch", 1: "encoder_sequence"}
    inputs["past_key_values"] = past
    for index in past:
        for kind in ("key", "value"):
            name = f"past_key_values.{index}"
            shapes[f"{name}.decoder.{kind}"] = {0: "batch", 2: "past_length"}
            shapes[f"{name}.encoder.{kind}"] = {0: "batch", 2: "encoder_sequence"}
    return (
        Part("encoder", _crossed, found.source, metadata={TASK_KEY: TEXT2TEXT_GENERATION}),
        Part(
            name="",
            call=functools.partial(_call, width=found.width),
            inputs=inputs,
            dynamic_shapes=shapes,
            cases=functools.partial(_cases, found=found),
            metadata=generation_metadata(model, TEXT2TEXT_GENERATION),
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
    start = _start(model)
    try:
        with torch.no_grad():
            outputs = _first(model, source)
    except Exception as error:
        raise ExportError(f"{owner} does not run on {', '.join(source)}: {error}") from error
    cache = cache_of(outputs)
    if cache is None or not hasattr(cache, "cross_attention_cache"):
        raise ExportError(f"{owner} gives no cache of its attention to the encoder back")
    return _Example(
        source=source,
        masked="input_ids" in source,
        start=start,
        own=CacheLayout.of(read_cache(cache.self_attention_cache, owner)),
        cross=CacheLayout.of(read_cache(cache.cross_attention_cache, owner)),
        width=outputs.encoder_last_hidden_state.shape[-1],
    )


def _start(model: nn.Module) -> int:
    for config in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                return token
    raise ExportError(
        f"{type(model).__name__} does not say which token its decoder begins with: set "
        f"generation_config.decoder_start_token_id"
    )


def _first(model: nn.Module, source: Mapping[str, Tensor]) -> Any:
    """The whole model with one token for the decoder."""
    value = next(iter(source.values()))
    token = torch.full((value.shape[0], 1), _start(model), dtype=torch.int64, device=value.device)
    return model(**source, decoder_input_ids=token, use_cache=True)


def _crossed(model: nn.Module, **source: Tensor) -> dict[str, dict[int, dict[str, Any]]]:
    """The encoder: ``present.N.encoder.key`` and ``.value`` of each layer N of the decoder."""
    # The decoder runs along, since only it knows its projections; what nothing reads of it is not
    # in the file.
    cache = cache_of(_first(model, source)).cross_attention_cache
    states = read_cache(cache, type(model).__name__)
    return {"present": {index: {"encoder": layer} for index, layer in states.items()}}


def _call(
    model: nn.Module,
    input_ids: Tensor,
    past_key_values: Mapping[int, Mapping[str, Mapping[str, Tensor]]],
    encoder_attention_mask: Tensor | None = None,
    *,
    width: int,
) -> dict[str, object]:
    """One step: ``logits`` of the last position, and the ``present`` cache of the decoder."""
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    own: Past = {index: layer["decoder"] for index, layer in past_key_values.items()}
    cross: Past = {index: layer["encoder"] for index, layer in past_key_values.items()}
    cache = EncoderDecoderCache(filled_cache(own), filled_cache(cross))
    cache.is_updated = dict.fromkeys(own, True)
    key = next(iter(cross.values()))["key"]
    # Nothing reads its values: what they would give is in the cache.
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
def _cases(model: Checked, *, found: _Example) -> Iterator[Case]:
    """The first token, two more, and single ones, for several batches.

    The logits that are expected are those of the whole model without a cache, so that what the cache
    and the encoder's file do is checked along with this one.
    """
    whole = model.model
    limit = position_limit(whole) or 32
    generator = torch.Generator().manual_seed(0)
    for batch, lengths in ((2, (1, 2, 1, 1)), (1, (3, 1)), (3, (1, 1))):
        if sum(lengths) > limit:
            continue
        source = {name: _rows(value, batch) for name, value in found.source.items()}
        if found.masked and batch > 1:
            mask = source["attention_mask"].clone()
            mask[-1, mask.shape[1] // 2 + 1 :] = 0
            source["attention_mask"] = mask
        present = model.run(_crossed, **source)["present"]
        states = found.cross.taken({index: layer["encoder"] for index, layer in present.items()})
        ids = _drawn(whole, (batch, sum(lengths)), generator).to(found.own.device)
        ids[:, 0] = found.start
        own = found.own.zeros(batch, 0)
        done = 0
        for length in lengths:
            total = done + length
            inputs = [ids[:, done:total].contiguous()]
            if found.masked:
                inputs.append(source["attention_mask"])
            for index, layer in own.items():
                inputs += [layer["key"], layer["value"], *states[index].values()]
            outputs = dict(model.named(inputs))
            begun = {"decoder_input_ids": ids[:, :total], "use_cache": False}
            plain = model.run(nn.Module.__call__, **source, **begun)
            outputs["logits"] = plain.logits[:, -1:]
            yield Case(inputs, list(outputs.items()))
            given = {
                index: {kind: outputs[f"present.{index}.decoder.{kind}"] for kind in layer}
                for index, layer in own.items()
            }
            own = found.own.taken(given)
            done = total


def _rows(value: Tensor, batch: int) -> Tensor:
    return value.repeat(-(-batch // len(value)), *[1] * (value.ndim - 1))[:batch].contiguous()


def _drawn(model: nn.Module, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return torch.randint(0, len(head.weight), shape, generator=generator)
