"""What the demo is told, and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_fx.errors import ConfigError, LoraFxError
from lora_fx.ir import Plan

__all__ = ["FULL", "QUICK", "DemoReport", "DemoSettings", "Listener", "claim_folder"]

_MARKER = ".lora-fx-demo"


@dataclass(frozen=True)
class DemoSettings:
    """How much of it.

    Attributes:
        train, held_out: Sentences of each library.
        epochs, batch, learning_rate, smoothing: Of the training with AdamW.
        max_length: Tokens of a sentence.
        seed: Of everything.
    """

    train: int = 600
    held_out: int = 150
    epochs: int = 2
    batch: int = 32
    learning_rate: float = 1.5e-3
    smoothing: float = 0.1
    max_length: int = 48
    seed: int = 0


FULL = DemoSettings()
QUICK = DemoSettings(train=150, held_out=100, learning_rate=2e-3)


@dataclass(frozen=True)
class DemoReport:
    """What came out.

    Attributes:
        accuracy: On held-out text: ``frozen``, ``LoRA``, ``LoRA, merged``, and
            ``merged, in ONNX Runtime``.
        sentences: Size of the training and of the held-out part.
        libraries: The classes.
        trainable, parameters: Elements that were trained, and all.
        reload_error: Largest difference of the reloaded adapter's outputs; 0 is every bit.
        merge_ulp: Largest error of a merged weight, in units in the last place.
        merge_error: Largest difference of the merged model's outputs on the held-out text.
        parity_error: The same of ONNX Runtime against the merged model.
        files: What was written, with sizes in bytes.
        seconds: Of each stage.
    """

    accuracy: dict[str, float]
    sentences: tuple[int, int]
    libraries: tuple[str, ...]
    trainable: int
    parameters: int
    reload_error: float
    merge_ulp: float
    merge_error: float
    parity_error: float
    files: dict[str, int]
    seconds: dict[str, float]


class Listener(Protocol):
    """Who is told how the demo goes on."""

    def stage(self, name: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        """A stage, as a context that gives (done, total, detail) to report within."""

    def note(self, text: str) -> None:
        """A result of the stage."""

    def planned(self, made: Plan) -> None:
        """The dry run."""


def claim_folder(folder: Path, *, force: bool = False) -> None:
    """Makes the folder, or takes over that of an earlier demo.

    Raises:
        ConfigError: Something else is there.
        LoraFxError: The folder cannot be made.
    """
    marker = folder / _MARKER
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: give a folder with --out")
    if folder.is_dir() and any(folder.iterdir()) and not marker.exists() and not force:
        raise ConfigError(
            f"{folder} holds files that are not of the demo: give another folder with --out, or "
            "--force to write into it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise LoraFxError(f"{folder} cannot be written: {error}") from error
