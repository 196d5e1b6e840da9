"""The tensors of an adapter's files, loaded without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Final

import safetensors
import safetensors.torch
import torch

from lora_fx.errors import CheckpointError
from lora_fx.files import current

__all__ = [
    "DIFFUSERS_NAME",
    "PICKLE_NAME",
    "WEIGHTS_NAME",
    "read_file",
    "read_tensors",
]

WEIGHTS_NAME: Final = "adapter_model.safetensors"
DIFFUSERS_NAME: Final = "pytorch_lora_weights.safetensors"
PICKLE_NAME: Final = "adapter_model.bin"


def read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors of an adapter. A pickle is loaded with ``weights_only=True``, so it runs no code.

    Returns:
        Tensors on the CPU by the keys in the file, and the file's metadata.

    Raises:
        CheckpointError: If there is no file, the file is damaged, or it is a pickle that could run code.
    """
    path = current(folder / WEIGHTS_NAME)
    if path.is_file():
        return read_file(path)
    if (folder / PICKLE_NAME).is_file():
        return read_file(folder / PICKLE_NAME)
    raise CheckpointError(
        f"{folder} has neither {WEIGHTS_NAME} nor {PICKLE_NAME}; save the adapter again"
    )


def read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a single file of tensors, as :func:`read_tensors` does."""
    if path.suffix != ".safetensors":
        return _read_pickle(path), {}
    try:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            return tensors, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); copy or save the adapter again"
        ) from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is refused: it does not load with torch.load(weights_only=True), so it is "
            "damaged, or a pickle that can run any code. Get the adapter as "
            f"{WEIGHTS_NAME} from where it was made"
        ) from error
    if not isinstance(values, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in values.items()
    ):
        raise CheckpointError(f"{path} does not hold tensors by name; save the adapter again")
    return values
