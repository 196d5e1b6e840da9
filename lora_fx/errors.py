"""Every error that lora_fx raises on purpose.

Each one subclasses the builtin that a caller would already be catching, and its message says three
things: what was found, where (a fully qualified name), and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "LogitsError",
    "LoraFxError",
    "MergeError",
    "NoMatchError",
    "OutputPathError",
    "ParityError",
    "PartialMatchError",
    "ProcessError",
    "ProviderError",
    "QuantizationError",
    "hint",
    "some",
]


def hint(
    name: object,
    known: Iterable[str],
    form: str = "; nearest: {}",
    *,
    count: int = 3,
    cutoff: float = 0.6,
    between: str = ", ",
) -> str:
    """Name for an error what looks like a wrong name; "" if nothing does.

    Args:
        name: The wrong one.
        known: The names that exist.
        form: The text, with a placeholder for the names.
        count: How many are named at most.
        cutoff: The least similarity, 1 for equal names.
        between: The separator.
    """
    near = difflib.get_close_matches(str(name), list(known), count, cutoff)
    return form.format(between.join(near)) if near else ""


def some(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """The first names for an error, and how many more there are."""
    joint = " " if between == ", " else between
    more = f"{joint}and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


class LoraFxError(Exception):
    """Base class of all errors of this library."""


class ConfigError(LoraFxError, ValueError):
    """A configuration or an argument is not valid."""


class CaptureError(LoraFxError, RuntimeError):
    """A model could not be captured as graphs, or the captured graphs compute something else."""


class LogitsError(LoraFxError, AttributeError):
    """Logits are read that a training call did not keep, since it computed their loss in chunks."""


class ProcessError(LoraFxError, RuntimeError):
    """A process that holds parts of a model has ended, or does not answer."""


class NoMatchError(LoraFxError, ValueError):
    """The configuration, or a target that it names, selects nothing that can be adapted."""


class PartialMatchError(LoraFxError, ValueError):
    """With ``strict=True``: some of the targets select nothing."""


class CheckpointError(LoraFxError, ValueError):
    """An adapter folder is missing, damaged, unsafe, or belongs to another model."""


class MergeError(LoraFxError, RuntimeError):
    """Adapters cannot be folded into the weights."""


class ExportError(LoraFxError, RuntimeError):
    """A model could not be exported."""


class OutputPathError(ExportError, ValueError):
    """A path to write to names a folder, or a file of another kind."""


class ParityError(ExportError):
    """The exported model does not compute what the PyTorch model computes."""


class ProviderError(ExportError):
    """The requested ONNX Runtime execution provider cannot be used."""


class QuantizationError(LoraFxError, ValueError):
    """A weight cannot be quantized, or not in the format that was asked for."""
