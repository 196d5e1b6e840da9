"""All errors that lora_fx raises on purpose.

Each class subclasses the builtin that a caller would already catch. Its message has three parts: the problem,
its location (a fully qualified name), and a remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DeliveryError",
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
    """Return a text with the names that look like a wrong name; "" if none do.

    Args:
        name: The wrong name.
        known: The names that exist.
        form: The text, with a placeholder for the names.
        count: The largest number of names.
        cutoff: The minimum similarity, 1 for equal names.
        between: The separator.
    """
    near = difflib.get_close_matches(str(name), list(known), count, cutoff)
    return form.format(between.join(near)) if near else ""


def some(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """Return the first names as text, followed by "and N more" if there are more than ``most``."""
    joint = " " if between == ", " else between
    more = f"{joint}and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


class LoraFxError(Exception):
    """Base class of all errors of this library."""


class ConfigError(LoraFxError, ValueError):
    """A configuration or an argument is not valid."""


class CaptureError(LoraFxError, RuntimeError):
    """A model has no graphs that agree with its forward, or code uses adapted weights in an unknown way."""


class LogitsError(LoraFxError, AttributeError):
    """Logits are read after a training call that computed their loss in chunks, and did not keep them."""


class ProcessError(LoraFxError, RuntimeError):
    """A process that holds parts of a model has ended, or does not answer."""


class NoMatchError(LoraFxError, ValueError):
    """The configuration, or a target that it names, selects nothing that can be adapted.

    Attributes:
        refused: The targets that name only operations that cannot be adapted; empty if the configuration as a
            whole selects nothing.
    """

    def __init__(self, message: str, refused: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.refused = refused


class PartialMatchError(LoraFxError, ValueError):
    """Some of the targets select nothing, with ``strict=True``."""


class CheckpointError(LoraFxError, ValueError):
    """An adapter folder is missing, damaged, unsafe, or belongs to another model."""


class DeliveryError(LoraFxError, RuntimeError):
    """An adapter did not reach a server or session, or it cannot be verified that it did.

    Attributes:
        reason: "no answer" or "refused" (the message has the server's text); "updates off" (vLLM without
            ``VLLM_ALLOW_RUNTIME_LORA_UPDATING``). "not applied" (the message names the version that answers
            instead), or "inconclusive" (the probe cannot tell). "not finite" (the adapter here is broken).
        delivery: The receipt, a :class:`lora_fx.Delivery`, if there is one.
    """

    def __init__(
        self,
        message: str,
        reason: Literal[
            "no answer", "refused", "updates off", "not applied", "inconclusive", "not finite"
        ],
        delivery: Any = None,
    ) -> None:
        super().__init__(message)
        self.reason, self.delivery = reason, delivery

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.reason, self.delivery)


class MergeError(LoraFxError, RuntimeError):
    """Adapters cannot be folded into the weights."""


class ExportError(LoraFxError, RuntimeError):
    """A model could not be exported."""


class OutputPathError(ExportError, ConfigError):
    """A path of a file to write is a folder, has a suffix of another kind of file, or exists."""


class ParityError(ExportError):
    """The outputs of the exported model differ from those of the PyTorch model."""


class ProviderError(ExportError):
    """The requested ONNX Runtime execution provider cannot be used."""


class QuantizationError(LoraFxError, ValueError):
    """A weight cannot be quantized, or not in the requested format."""
