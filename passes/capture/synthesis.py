"""Example inputs: normalization, and synthesis for models that describe their inputs.

Example inputs are a tuple of arguments, a dict of keyword arguments, or a single tensor. Models of
transformers describe their inputs in their configuration, models of timm in ``pretrained_cfg``. No library is
imported, because the code that created such a model has imported its library.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.errors import CaptureError
from lora_fx.torch_private import pytree

__all__ = ["CACHE", "describe", "named_inputs", "normalize", "synthesise"]


CACHE = "use_cache"
"""Argument by which a caller of a transformers model asks for a cache in the output."""


def normalize(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as ``(args, kwargs)``.

    Raises:
        CaptureError: If they have another form.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, list):
        return tuple(example_inputs), {}
    if hasattr(example_inputs, "keys"):
        return (), {str(key): example_inputs[key] for key in example_inputs.keys()}  # noqa: SIM118  a BatchEncoding is no dict
    raise CaptureError(
        "example_inputs must be a tuple of arguments, a dict of keyword arguments or a tensor, found "
        f"{type(example_inputs).__name__}"
    )


def named_inputs(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Return the example inputs by argument name, for a capture of the whole model as one graph.

    A transformers model returns a cache by default, which a graph cannot return. So the arguments include
    ``use_cache=False``, unless the example inputs set it.

    Args:
        model: The model.
        example_inputs: Same as for :func:`normalize`.

    Returns:
        The arguments, including those for ``**kwargs``.

    Raises:
        CaptureError: If the inputs do not fit, or contain values that ``torch.export`` does not support.
    """
    args, kwargs = normalize(example_inputs)
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    inputs: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            inputs.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(f"torch.export cannot follow *{name}: pass them by name")
        else:
            inputs[name] = value
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) and any(
            isinstance(x, torch.Tensor) for x in pytree.tree_leaves(value)
        ):
            raise CaptureError(
                f"torch.export cannot follow tensors inside the argument {name!r}: pass tensors"
            )
    if CACHE in signature.parameters and hasattr(model, "config") and inputs.get(CACHE) is None:
        inputs[CACHE] = False
    return inputs


def describe(inputs: Any) -> str:
    """Return names, dtypes and shapes of example inputs in one line."""
    args, kwargs = normalize(inputs)
    named = [("", value) for value in args] + [(f"{key} ", value) for key, value in kwargs.items()]
    return ", ".join(
        f"{name}{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else f"{name}{value!r}"
        for name, value in named
    )


_BATCH = 2  # torch.export would specialize a batch of one
_LENGTH, _DECODER_LENGTH = 12, 7
# Fields of a configuration with the id of the token that stands for an image in the text.
_IMAGE_TOKENS = ("image_token_id", "image_token_index")


@dataclasses.dataclass(frozen=True)
class _Synthesis:
    """Synthesized inputs, or the reason why they are missing.

    Attributes:
        inputs: Keyword arguments or a tensor, on the model's device; None if the inputs are not described.
        words: The source of the inputs, or the reason why they are missing.
    """

    inputs: Any
    words: str


def synthesise(model: nn.Module) -> _Synthesis:
    """Create example inputs of two random samples: integers in range, floats in the model's dtype.

    Args:
        model: Any module.

    Returns:
        The inputs. They do not fit if the model takes other inputs than it describes.
    """
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        synthesis = _of_transformers(model)
    else:
        synthesis = _of_timm(model)
    return dataclasses.replace(synthesis, inputs=_placed(model, synthesis.inputs))


def _of_timm(model: Any) -> _Synthesis:
    settings: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = settings.get("input_size") if isinstance(settings, Mapping) else None
    if not size:
        words = "the model has neither the config of transformers nor the pretrained_cfg of timm"
        return _Synthesis(None, words)
    channels, height, width = size
    # Channels and size may differ from the settings, which are those of the pretrained weights.
    first = str(settings.get("first_conv"))
    modules = {name: module for name, module in model.named_modules() if name}
    channels = getattr(modules.get(first), "in_channels", channels)
    chosen = getattr(modules.get(first.rpartition(".")[0]), "img_size", None)
    height, width = chosen or (height, width)
    return _Synthesis(_random(channels, height, width), "pretrained_cfg['input_size']")


def _of_transformers(model: Any) -> _Synthesis:
    main = model.main_input_name
    takes = inspect.signature(model.forward).parameters
    config = model.config
    words = f"main_input_name ({main}) and config"
    if main == "input_ids":
        inputs = _text(config, takes)
        images = "pixel_values" in takes and not any(hasattr(config, n) for n in _IMAGE_TOKENS)
        inputs |= {"pixel_values": _pixels(config)} if images else {}
    elif main == "pixel_values":
        inputs = {main: _pixels(config)}
    elif main in ("input_features", "input_values"):
        sound = _sound(config)
        if sound is None:
            return _Synthesis(None, f"{words} do not tell the size of {main}")
        inputs = {main: sound}
    else:
        return _Synthesis(
            None, f"main_input_name is {main}, of which config does not tell the size"
        )
    # A classifier derives the decoder's inputs from the text.
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    decodes = "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False)
    if decodes and not classifies:
        inputs["decoder_input_ids"] = _ids(config, _DECODER_LENGTH)
    return _Synthesis(inputs, words)


def _text(config: Any, takes: Mapping[str, Any]) -> dict[str, Any]:
    ids = _ids(config, _LENGTH)
    end = getattr(config, "eos_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and isinstance(end, int):
        ids[:, -1] = end  # a classifier of sequences searches for it
    inputs = {"input_ids": ids}
    if "attention_mask" in takes:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "token_type_ids" in takes and (getattr(config, "type_vocab_size", None) or 0) > 1:
        # As for a pair of texts: the first half has type 0, the second type 1.
        second = torch.arange(ids.shape[1]) >= ids.shape[1] // 2
        inputs["token_type_ids"] = second.to(ids.dtype).expand_as(ids).contiguous()
    return inputs


def _ids(config: Any, length: int) -> torch.Tensor:
    text = config.get_text_config()
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    # The first ids are special tokens: padding, end of text.
    low = min(10, text.vocab_size - 1)
    ids = torch.randint(low, text.vocab_size, (_BATCH, length), generator=_generator())
    for name in _IMAGE_TOKENS:
        ids[ids == getattr(config, name, None)] = 0
    return ids


def _pixels(config: Any) -> torch.Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return _random(getattr(vision, "num_channels", 3), height, width)


def _sound(config: Any) -> torch.Tensor | None:
    """Return a random spectrogram or a short waveform for an audio model; None for other models."""
    bins = getattr(config, "num_mel_bins", None)
    if bins and hasattr(config, "max_source_positions"):  # Whisper
        return _random(bins, 2 * config.max_source_positions)
    if bins and hasattr(config, "max_length"):  # the spectrogram transformer
        return _random(config.max_length, bins)
    if getattr(config, "input_feat_per_channel", None):  # Speech2Text
        return _random(64, config.input_feat_per_channel)
    if getattr(config, "conv_stride", None):  # wav2vec 2.0 and similar models
        return _random(20 * math.prod(config.conv_stride))
    return None


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(_BATCH, *shape, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _placed(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: _placed(model, value) for name, value in inputs.items()}
    if not isinstance(inputs, torch.Tensor):
        return inputs
    parameters = list(model.parameters())
    if parameters:
        inputs = inputs.to(parameters[0].device)
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), inputs.dtype)
    return inputs.to(dtype) if inputs.is_floating_point() else inputs
