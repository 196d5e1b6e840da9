"""Models of transformers from a local folder."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.errors import ConfigError

__all__ = ["load_folder", "quiet_transformers"]

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")


def load_folder(folder: Path, *, weights: bool = True) -> nn.Module:
    """Loads the architecture that ``config.json`` names, else what AutoModel makes of it.

    Args:
        folder: With ``config.json``, and weights.
        weights: False to build it on the meta device, where names and shapes are enough. A folder
            without weights gives an untrained model otherwise.

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
                return _build(architecture, config)
        if any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
            model: nn.Module = architecture.from_pretrained(folder, local_files_only=True)
            return model
        torch.manual_seed(0)
        return _build(architecture, config)
    except Exception as error:
        # Whatever transformers raises for a folder that it cannot read, of many types.
        raise ConfigError(
            f"hf:{folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def quiet_transformers() -> None:
    """Keeps the network out, and the bars and the reports of transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


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
