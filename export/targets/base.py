"""What a runtime's folder is: where the model file lies in it, and what lies beside."""

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
    """A model file that was written and checked, and is not in its place yet.

    Attributes:
        model: What was exported.
        report: What is known of the file.
        file: The model file.
        folder: Where files to go beside it are made.
        root: The runtime's folder, which may be there already, and not be.
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
        """What users call it."""
        ...

    @property
    def axes(self) -> Mapping[str, str]:
        """The runtime's name for each dynamic axis that it calls otherwise."""
        ...

    def task(self, model: nn.Module) -> TaskName | None:
        """What a model is exported for where the caller names no task."""
        ...

    def check(self, *, task: str | None, adapters: str | None, dtype: str | None) -> None:
        """Refuse what this runtime cannot load.

        Raises:
            ExportError: With the argument and the remedy.
        """
        ...

    def file(self, folder: Path, dtype: str | None) -> Path:
        """Where the model file is to lie."""
        ...

    def data_name(self, file: Path) -> str | None:
        """The name of the file of weights; None where any will do."""
        ...

    def example(self, example: object) -> object:
        """The example call with what the runtime wants of the file.

        Raises:
            ExportError: If the example asks for something else.
        """
        ...

    def adapt(self, model: ir.Model) -> None:
        """Change a finished graph into what the runtime takes, before it is written and compared."""
        ...

    def finish(self, written: Written) -> Mapping[Path, str]:
        """Make the files that go beside the model file.

        Returns:
            Each file, and its place in the runtime's folder.

        Raises:
            ExportError: If the file cannot be run there.
        """
        ...


def write_json(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a JSON file."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def add_tokenizer(tokenizer: Any, folder: Path) -> dict[Path, str]:
    """Write the files of a tokenizer.

    Args:
        tokenizer: An object with ``save_pretrained``, or a folder that has them.
        folder: An empty folder, which is made.

    Returns:
        Each file, and its place in the runtime's folder.

    Raises:
        ExportError: If it is neither.
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
        if not any(one.name.startswith("tokenizer") for one in named):
            raise ExportError(
                f"tokenizer={str(tokenizer)!r} has no files of a tokenizer: give an object with "
                "save_pretrained(), or the folder that it was saved in"
            )
        for one in named:
            shutil.copyfile(one, folder / one.name)
    return {one: one.name for one in sorted(folder.iterdir()) if one.is_file()}
