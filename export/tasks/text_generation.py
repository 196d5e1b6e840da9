"""``task="text-generation"``: a decoder with its key-value cache as inputs and outputs.

One file does both kinds of step. A prefill has a past of length 0, a decoding step a sequence of
length 1; the attention mask covers past and sequence.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.tasks.part import (
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

__all__ = ["TEXT_GENERATION", "text_generation"]

TEXT_GENERATION = "text-generation"
_TAKEN = ("input_ids", "attention_mask", "logits_to_keep")
_PAST = 5  # positions of the past in the call that is traced; any number from 2 does


def text_generation(model: nn.Module, example: Mapping[str, Any]) -> tuple[Part, ...]:
    """The file of a decoder.

    Args:
        model: In eval mode.
        example: ``input_ids`` of shape [batch, sequence] and what else a user gave.

    Raises:
        ExportError: The model is no decoder of transformers with a cache of keys and values, or
            ``example`` has other inputs.
    """
    owner = type(model).__name__
    ids = _ids(model, example, owner)
    layout = _layout(model, ids, owner)
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
    for index in layout.keys:
        for kind in ("key", "value"):
            shapes[f"past_key_values.{index}.{kind}"] = {0: "batch", 2: "past_length"}
    return (
        Part(
            name="",
            call=functools.partial(_call, keep=keep),
            inputs=inputs,
            dynamic_shapes=shapes,
            cases=functools.partial(_cases, layout=layout, keep=keep),
            metadata=generation_metadata(model, TEXT_GENERATION),
        ),
    )


def _ids(model: nn.Module, example: Mapping[str, Any], owner: str) -> Tensor:
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
        given = ", ".join(example) or "nothing"
        raise ExportError(
            f"task='text-generation' takes example_inputs with input_ids (and logits_to_keep, a "
            f"number), and makes the mask and the cache by itself: {given} were given"
        )
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ExportError(
            f"input_ids is {ids.dtype} of shape {list(ids.shape)}: give whole numbers of shape "
            f"[batch, sequence]"
        )
    # Sizes of 1 cannot become dynamic.
    ids = ids.long()
    return ids.repeat(1 if len(ids) > 1 else 2, 1 if ids.shape[1] > 1 else 2)


def _layout(model: nn.Module, ids: Tensor, owner: str) -> CacheLayout:
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


def _call(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    past_key_values: Past,
    *,
    keep: int,
) -> dict[str, object]:
    """One step: ``logits`` of the last ``keep`` positions (0: of all), and the ``present`` cache."""
    first = next(iter(past_key_values.values()))["key"]
    steps = torch.arange(input_ids.shape[1], device=input_ids.device) + first.shape[2]
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=True,
        **{str(cache_argument(model)): filled_cache(past_key_values)},
        **_positions(model, attention_mask, steps),
        **_kept(model, keep),
    )
    present = read_cache(cache_of(outputs), type(model).__name__)
    return {"logits": outputs.logits[:, -keep:], "present": present}


def _positions(model: nn.Module, attention_mask: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """As transformers counts: padding has no position, the first token that counts has 0."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    positions = attention_mask.cumsum(-1) - 1
    positions = positions.masked_fill(attention_mask == 0, 0)
    return {"position_ids": positions.index_select(1, steps)}


def _kept(model: nn.Module, keep: int) -> dict[str, int]:
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": keep} if known else {}


@torch.no_grad()
def _cases(model: Checked, *, layout: CacheLayout, keep: int) -> Iterator[Case]:
    """A prompt with padding on the left, two tokens more, then single ones; and a lone prompt.

    The logits that are expected are those of a forward over the whole text without a cache, so that
    what the cache does is checked along with the file.
    """
    decoder = model.model
    limit = position_limit(decoder) or 32
    generator = torch.Generator().manual_seed(0)
    for batch, prompt, more in ((3, 6, (2, 1, 1)), (1, 4, (1,)), (2, 1, (1,))):
        lengths = (prompt, *more)
        if sum(lengths) > limit:
            continue
        ids = _drawn(decoder, (batch, sum(lengths)), generator, layout.device)
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
            found = dict(model.named(inputs))
            found["logits"] = model.run(_plain, ids[:, :total], seen)[:, done:][:, -keep:]
            valid = {name: seen[:, None, :, None] for name in found if name != "logits"}
            valid["logits"] = seen[:, done:][:, -keep:, None]
            yield Case(inputs, list(found.items()), valid)
            past = layout.taken({index: _present(found, index) for index in layout.keys})
            done = total


def _present(outputs: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {kind: outputs[f"present.{index}.{kind}"] for kind in ("key", "value")}


def _plain(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    steps = torch.arange(ids.shape[1], device=ids.device)
    outputs = model(
        input_ids=ids, attention_mask=mask, use_cache=False, **_positions(model, mask, steps)
    )
    logits: Tensor = outputs.logits
    return logits


def _drawn(
    model: nn.Module, shape: tuple[int, int], generator: torch.Generator, device: torch.device
) -> Tensor:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return torch.randint(0, len(embedding.weight), shape, generator=generator).to(device)
