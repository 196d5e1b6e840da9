"""The files of an adapter folder: read without running anything, written whole or not at all."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import safetensors
import safetensors.torch
import torch

from lora_fx.config import CONFIG_NAME, LoraConfig
from lora_fx.errors import CheckpointError
from lora_fx.files import current, flush, replacing_files

if TYPE_CHECKING:
    from lora_fx.checkpoint.receipt import Receipt

__all__ = [
    "DIFFUSERS_NAME",
    "PICKLE_NAME",
    "RECEIPT_NAME",
    "WEIGHTS_NAME",
    "check_format",
    "read_file",
    "read_tensors",
    "write_folder",
]

WEIGHTS_NAME: Final = "adapter_model.safetensors"
DIFFUSERS_NAME: Final = "pytorch_lora_weights.safetensors"
PICKLE_NAME: Final = "adapter_model.bin"
RECEIPT_NAME: Final = "adapter_receipt.safetensors"


def read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads the tensors of an adapter, from a pickle only if it can hold nothing else.

    Returns:
        Tensors on the CPU by key, as they are in the file, and the file's metadata.

    Raises:
        CheckpointError: If there is no file, it is damaged, or a pickle that could run code.
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
    """Reads one file of tensors, as :func:`read_tensors` does."""
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


_OF_DIFFUSERS: Final = (DIFFUSERS_NAME,)
_OF_PEFT: Final = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME)


def check_format(folder: Path, others: Collection[str] = _OF_DIFFUSERS) -> None:
    """Refuse a folder that holds an adapter of another format.

    Args:
        folder: Where an adapter is to be written.
        others: Names of the files of other formats.

    Raises:
        CheckpointError: If one of them is there.
    """
    found = [name for name in others if (folder / name).exists()]
    if found:
        raise CheckpointError(
            f"{folder} holds an adapter of another format ({', '.join(found)}), which a reader might take "
            "for this one: give another folder, or delete that adapter"
        )


def write_folder(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig | None,
    *,
    notes: Mapping[str, str] | None = None,
    receipt: Receipt | None = None,
    force: bool,
) -> None:
    """Writes the file of tensors and ``adapter_config.json``.

    Both are written into a temporary folder first (inside the target, so that they are on its file
    system) and then moved. After an error the folder is as it was before, and where the process is killed it
    holds the adapter that was there, or the new one.

    Args:
        folder: Made if it is not there.
        tensors: Contiguous, on the CPU, none sharing storage with another.
        config: What to write as the configuration; None to write the tensors alone, as diffusers does.
        notes: Further metadata of the file of tensors.
        receipt: What the adapter does, to be written beside it.
        force: Whether an adapter that is there already may be replaced.

    Raises:
        CheckpointError: If an adapter is there and ``force`` is False, one of another format is there, or
            the files cannot be written.
    """
    name = DIFFUSERS_NAME if config is None else WEIGHTS_NAME
    names = _OF_DIFFUSERS if config is None else _OF_PEFT
    check_format(folder, _OF_PEFT if config is None else _OF_DIFFUSERS)
    there = [one for one in names if (folder / one).exists()]
    if there and not force:
        raise CheckpointError(
            f"{folder} holds an adapter already ({', '.join(there)}); give another folder, or "
            "force=True to replace it"
        )
    try:
        with _made(folder), replacing_files(folder) as staged:
            safetensors.torch.save_file(
                dict(tensors), staged / name, metadata={"format": "pt", **(notes or {})}
            )
            flush(staged / name)
            if config is not None:
                config.save_pretrained(staged)
            if receipt is not None:
                receipt.write(staged / RECEIPT_NAME)
        if receipt is None:
            # That of an adapter that was here before says nothing of this one.
            (folder / RECEIPT_NAME).unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError, CheckpointError) as error:
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        raise CheckpointError(
            f"the adapter cannot be written to {folder} ({cause or error}); what was there before "
            "is unchanged. Give a folder that is writable and has room"
        ) from (cause or error)


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


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents; takes away again what it made if the body fails."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for one in missing:
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()
        raise
