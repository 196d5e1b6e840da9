"""Protocol of a runtime's folder: the path of the model file in it, and the files next to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from torch import nn

from lora_fx.errors import ExportError
from lora_fx.export.report import ExportReport

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RuntimeTarget", "TaskName", "Written", "add_tokenizer", "write_json"]


TaskName: TypeAlias = Literal["text-generation", "text2text-generation"]


@dataclass(frozen=True)
class Written:
    """A model file that was written and checked, and is not yet moved to its destination.

    Attributes:
        model: The exported model.
        report: The report on the file.
        file: The model file.
        folder: Folder in which the files that accompany the model file are created.
        root: The runtime's folder, the destination. It may or may not exist.
        tokenizer: An object with ``save_pretrained``, or a folder with its files; None if there is none.
    """

    model: nn.Module
    report: ExportReport
    file: Path
    folder: Path
    root: Path
    tokenizer: Any = None


class RuntimeTarget(Protocol):
    """A runtime that loads a folder."""

    @property
    def name(self) -> str:
        """Name of the target for users."""
        ...

    @property
    def axes(self) -> Mapping[str, str]:
        """Map from lora_fx's name of a dynamic axis to the runtime's, if they differ."""
        ...

    def task(self, model: nn.Module) -> TaskName | None:
        """Return the default task for a model if the caller names none."""
        ...

    def check(self, *, task: str | None, adapters: str | None, dtype: str | None) -> None:
        """Raise if this runtime cannot load a file that is exported with these options.

        Raises:
            ExportError: The message names the argument and the remedy.
        """
        ...

    def file(self, folder: Path, dtype: str | None) -> Path:
        """Return the path of the model file."""
        ...

    def data_name(self, file: Path) -> str | None:
        """Return the name of the file of weights, or None if any name works."""
        ...

    def example(self, example: object) -> object:
        """Return the example call with the arguments that the runtime needs.

        Raises:
            ExportError: The example contradicts these arguments.
        """
        ...

    def adapt(self, model: ir.Model) -> None:
        """Adapt a finished graph to the runtime, before it is written and compared."""
        ...

    def finish(self, written: Written) -> Mapping[Path, str]:
        """Write the files that accompany the model file.

        Returns:
            Map from each file to its path in the runtime's folder.

        Raises:
            ExportError: The runtime cannot run the file.
        """
        ...


def write_json(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a JSON file."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def add_tokenizer(tokenizer: Any, folder: Path) -> dict[Path, str]:
    """Write the files of a tokenizer.

    Args:
        tokenizer: An object with ``save_pretrained``, or a folder with the files; None for no files.
        folder: The folder to create for the files.

    Returns:
        Map from each file to its path in the runtime's folder.

    Raises:
        ExportError: ``tokenizer`` is neither, or the folder has no files of a tokenizer.
    """
    if tokenizer is None:
        return {}
    folder.mkdir()
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        if not isinstance(tokenizer, str | os.PathLike):
            raise ExportError(
                f"tokenizer= is a {type(tokenizer).__name__}: give an object with save_pretrained(), or the "
                "folder that it was saved in"
            )
        source = Path(tokenizer)
        named = [*source.glob("tokenizer*"), *source.glob("special_tokens_map.json")]
        named += [*source.glob("*.jinja"), *source.glob("vocab.*"), *source.glob("merges.txt")]
        if not any(path.name.startswith("tokenizer") for path in named):
            raise ExportError(
                f"tokenizer={str(tokenizer)!r} has no files of a tokenizer: give an object with "
                "save_pretrained(), or the folder that it was saved in"
            )
        for path in named:
            shutil.copyfile(path, folder / path.name)
    return {path: path.name for path in sorted(folder.iterdir()) if path.is_file()}
