"""Writes a merged model so that what was there before survives a failure."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.errors import ConfigError, MergeError
from lora_fx.files import output_file

__all__ = ["check_out", "dtype_of", "write_merged"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_FILES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".gguf")

# What a folder of transformers holds besides the model, and the merged model needs as much.
_COMPANIONS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
    "*.model",
)


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype that is called so; None stays None.

    Raises:
        ConfigError: If there is none.
    """
    if name is None:
        return None
    if name not in _DTYPES:
        raise ConfigError(f"--dtype {name} is unknown: give one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def check_out(name: str, given: str | Path, *, force: bool) -> Path:
    """Stops before the work is done where the result could not be written.

    Args:
        name: The model's name.
        given: Where to.
        force: Whether something may be there already.

    Returns:
        The path.

    Raises:
        ConfigError: With what to give instead.
    """
    out = Path(given)
    folder = name.startswith("hf:")
    if not folder:
        output_file(given, (".safetensors",), ConfigError)
    elif out.is_file() or out.suffix.lower() in _FILES:
        raise ConfigError(
            f"cannot write {out}: it is a file, or named like one, and {name} is written as a folder"
        )
    used = out.exists() and (not folder or any(out.iterdir()))
    if used and not force:
        raise ConfigError(f"{out} exists: give another name, or --force to write over it")
    if folder and out.exists() and out.resolve() == Path(name[3:]).expanduser().resolve():
        raise ConfigError(f"{out} is the model that is merged: give another folder")
    return out


def write_merged(model: nn.Module, out: Path, *, folder: Path | None = None) -> None:
    """Writes the folder of a transformers model, or else a safetensors state dict.

    Args:
        model: The merged model.
        out: Where to; the folder above it is made.
        folder: The folder of transformers that the model came from.

    Raises:
        MergeError: The files cannot be written. What was there before still is.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
            stage = Path(staging, "model")
            if folder is None:
                _save_weights(model, stage)
                stage.replace(out)
                return
            saveable: Any = model
            saveable.save_pretrained(stage)
            for pattern in _COMPANIONS:
                for path in folder.glob(pattern):
                    if path.is_file() and not (stage / path.name).exists():
                        shutil.copyfile(path, stage / path.name)
            out.mkdir(exist_ok=True)
            for path in sorted(stage.iterdir()):
                path.replace(out / path.name)
    except OSError as error:
        raise MergeError(
            f"{out} cannot be written ({error}): give a place that is writable and has room"
        ) from error


def _save_weights(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    try:
        save_model(model, str(path))  # tied weights once
    except SafetensorError as error:
        raise MergeError(f"the weights cannot be written: {error}") from error
