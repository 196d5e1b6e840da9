"""The files of an adapter folder, replaced atomically."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import safetensors
import safetensors.torch
import torch

from lora_fx.adapter_files import DIFFUSERS_NAME, PICKLE_NAME, WEIGHTS_NAME, read_file
from lora_fx.config import CONFIG_NAME, LoraConfig
from lora_fx.errors import CheckpointError
from lora_fx.files import current, flush, replacing_files

if TYPE_CHECKING:
    from lora_fx.checkpoint.receipt import Receipt

__all__ = [
    "RECEIPT_NAME",
    "check_format",
    "check_free",
    "check_parts",
    "has_receipt",
    "write_folder",
]

RECEIPT_NAME: Final = "adapter_receipt.safetensors"


def has_receipt(folder: Path) -> bool:
    """Return True if a folder has the receipt of its adapter."""
    return folder.is_dir() and current(folder / RECEIPT_NAME).is_file()


_OF_DIFFUSERS: Final = (DIFFUSERS_NAME,)
_OF_PEFT: Final = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME)


def check_format(folder: Path, names: Collection[str] = _OF_DIFFUSERS) -> None:
    """Raise if a folder holds an adapter of another format.

    Args:
        folder: The folder to write an adapter to.
        names: Names of the files of other formats.

    Raises:
        CheckpointError: If such a file exists.
    """
    existing = [name for name in names if (folder / name).exists()]
    if existing:
        raise CheckpointError(
            f"{folder} holds an adapter of another format ({', '.join(existing)}), which a reader might take "
            "for this one: give another folder, or delete that adapter"
        )


def check_parts(folder: Path, tensors: Iterable[str]) -> None:
    """Raise if a folder has adapters of other parts of a pipeline, which a new file would lose.

    Args:
        folder: The folder to write an adapter to.
        tensors: Keys of the new file, which begin with the part.

    Raises:
        CheckpointError: If there are such adapters. The message names their parts.
    """
    path = folder / DIFFUSERS_NAME
    if not path.exists():
        return
    present, parts = (
        {key.partition(".")[0] for key in keys} for keys in (read_file(path)[0], tensors)
    )
    if present - parts:
        raise CheckpointError(
            f"{path} has the adapter of {', '.join(sorted(present - parts))}, which would be lost: save all "
            'parts at once, save_adapter({"unet": unet, "text_encoder": encoder}, folder, '
            'format="diffusers"), or give another folder'
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
    """Write the file of tensors and ``adapter_config.json``.

    Both are written into a temporary folder first (inside the target, so that they are on the same file
    system) and then moved. After an error the folder is unchanged. If the process is killed, the folder holds
    either the old adapter or the new one.

    Args:
        folder: The folder; created if it is missing.
        tensors: Contiguous tensors on the CPU, no two of which share storage.
        config: The configuration to write; None to write only the tensors, as diffusers does.
        notes: Additional metadata of the file of tensors.
        receipt: The receipt to write as well.
        force: True to replace an existing adapter.

    Raises:
        CheckpointError: If the folder has an adapter and ``force`` is False, it has an adapter of another
            format, or the files cannot be written.
    """
    name = DIFFUSERS_NAME if config is None else WEIGHTS_NAME
    check_format(folder, _OF_PEFT if config is None else _OF_DIFFUSERS)
    check_free(folder, _OF_DIFFUSERS if config is None else _OF_PEFT, force=force)
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
            # The receipt of an earlier adapter does not describe this one.
            (folder / RECEIPT_NAME).unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError, CheckpointError) as error:
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        raise CheckpointError(
            f"the adapter cannot be written to {folder} ({cause or error}); what was there before "
            "is unchanged. Give a folder that is writable and has room"
        ) from (cause or error)


def check_free(folder: Path, names: Iterable[str] = _OF_PEFT, *, force: bool) -> None:
    """Raise if a folder holds an adapter that may not be replaced.

    Args:
        folder: The folder to write.
        names: The files of an adapter.
        force: True if an adapter may be replaced.

    Raises:
        CheckpointError: If the folder holds an adapter, and ``force`` is False.
    """
    existing = [name for name in names if (folder / name).exists()]
    if existing and not force:
        raise CheckpointError(
            f"{folder} holds an adapter already ({', '.join(existing)}): replace it with force=True, or give "
            "another folder"
        )


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Create a folder and its parents. If the ``with`` block raises, remove the new, empty folders."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
