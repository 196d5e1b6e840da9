"""Models of transformers from a local folder, and inputs that fit them."""

from __future__ import annotations

import difflib
import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.errors import ConfigError

__all__ = ["example_inputs", "load_folder", "quiet_transformers"]

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")


def load_folder(folder: Path, *, weights: bool = True) -> tuple[nn.Module, dict[str, Any] | None]:
    """Loads the architecture that ``config.json`` names, else what AutoModel makes of it.

    Args:
        folder: With ``config.json``, and weights.
        weights: False to build it on the meta device, where names and shapes are enough. A folder
            without weights gives an untrained model otherwise.

    Returns:
        The model and example inputs, None where nothing is known about them.

    Raises:
        ConfigError: The folder is not there, holds no model, or transformers cannot make it.
    """
    if not folder.is_dir():
        raise ConfigError(f"hf:{folder}: there is no such folder{_nearest(folder)}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"hf:{folder}: there is no config.json in it: give the folder of a model")
    quiet_transformers()
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        architecture = _architecture(transformers, config)
        if not weights:
            with torch.device("meta"):
                model = _build(architecture, config)
        elif any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
            model = architecture.from_pretrained(folder, local_files_only=True)
        else:
            torch.manual_seed(0)
            model = _build(architecture, config)
    except Exception as error:
        # Whatever transformers raises for a folder that it cannot read, of many types.
        raise ConfigError(
            f"hf:{folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return model, example_inputs(model) if weights else None


def quiet_transformers() -> None:
    """Keeps the network out, and the bars and the reports of transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def example_inputs(model: Any) -> dict[str, Any] | None:
    """Two random inputs of the kind that the model's class names as its main input."""
    main = getattr(model, "main_input_name", "input_ids")
    takes = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any]
    if "pixel_values" in takes and "input_ids" in takes and main == "input_ids":
        inputs = {**_text(config, takes, generator), **_pixels(config, generator)}
    elif main == "input_ids":
        inputs = _text(config, takes, generator)
    elif main == "pixel_values":
        inputs = _pixels(config, generator)
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs = {main: torch.randn(2, config.num_mel_bins, frames, generator=generator)}
    else:
        return None
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(config, generator, 7)
    return inputs


def _text(config: Any, takes: Any, generator: torch.Generator) -> dict[str, Any]:
    inputs = {"input_ids": _ids(config, generator, 12)}
    if "attention_mask" in takes:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def _ids(config: Any, generator: torch.Generator, length: int) -> torch.Tensor:
    text = config.get_text_config()
    # The first ids are padding, end of text and their kind.
    low = min(10, text.vocab_size - 1)
    return torch.randint(low, text.vocab_size, (2, length), generator=generator)


def _pixels(config: Any, generator: torch.Generator) -> dict[str, Any]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    return {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}


def _architecture(transformers: Any, config: Any) -> Any:
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def _build(architecture: Any, config: Any) -> nn.Module:
    # An Auto class makes models by from_config, a class of its own by a call.
    make = getattr(architecture, "_from_config", None) or architecture.from_config
    model: nn.Module = make(config)
    return model


def _nearest(folder: Path) -> str:
    try:
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(folder.name, siblings, 3, cutoff=0.6)
    return f"; nearest: {', '.join(str(folder.parent / name) for name in near)}" if near else ""
