"""Steps of a decoder over a session: the cache of a step is an input of the next.

The cache stays where ONNX Runtime has put it; logits come out, tokens go in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.export.adapters import AdapterChoice
from lora_fx.export.ort import Port, inputs_by_name, unwrap

__all__ = ["CachedDecoder", "DecoderFile"]

_PAST, _PRESENT = "past_key_values.", "present."
_CROSS = ".encoder."


class DecoderFile(Protocol):
    """An open file as generation sees it; a session makes one of itself."""

    @property
    def path(self) -> Path:
        """Where the file is."""

    @property
    def inputs(self) -> tuple[Port, ...]:
        """What it takes."""

    @property
    def outputs(self) -> tuple[Port, ...]:
        """What it gives."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file remembers of its export."""

    @property
    def encoder(self) -> DecoderFile | None:
        """The encoder of an encoder-decoder."""

    @property
    def replays_graphs(self) -> bool:
        """Whether every call has to have one shape."""

    def hold(self, adapter: AdapterChoice) -> Any:
        """Return an adapter as every file of the model has it at this moment."""

    def value(self, port: Port, value: Tensor) -> Any:
        """Put a tensor where the file runs, as what an input takes."""

    def run(self, feeds: Mapping[str, Any], held: Any) -> list[Any]:
        """Run the file. Logits come out on the CPU, all else where the file runs."""


class CachedDecoder:
    """A decoder and where it is in a batch of texts.

    Args:
        session: The decoder's file.
        batch: Number of texts.
        source: What the encoder takes, by name, for an encoder-decoder.
        adapter: What runs with the model.

    Raises:
        ExportError: The file has no cache, the session replays graphs, or ``source`` does not fit
            the encoder.
    """

    def __init__(
        self,
        session: DecoderFile,
        batch: int,
        source: Mapping[str, Tensor],
        adapter: AdapterChoice = None,
    ) -> None:
        if session.replays_graphs:
            raise ExportError(
                "cuda_graph=True is for calls of one shape, and a text grows with each token: open "
                "the session without it to generate"
            )
        self._session = session
        # One for the whole text, also if another is loaded by its name meanwhile.
        self._held = session.hold(adapter)
        self._ports = {port.name: port for port in session.inputs}
        self._outputs = [port.name for port in session.outputs]
        self._kept = [name for name in self._outputs if name.startswith(_PRESENT)]
        cached = [port for port in session.inputs if port.name.startswith(_PAST)]
        if not cached or "logits" not in self._outputs:
            raise ExportError(
                f"{session.path.name} has no key-value cache to generate with: export the model "
                f"with task='text-generation' or task='text2text-generation'"
            )
        own = [port for port in cached if _CROSS not in port.name]
        self._nothing = {port.name: self._session.value(port, _empty(port, batch)) for port in own}
        self._past = self._nothing
        self._fixed: dict[str, Any] = {}
        self._masked = "attention_mask" in self._ports
        if session.encoder is not None:
            self._fixed = self._encoded(session.encoder, source)

    def step(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read more tokens.

        Args:
            ids: The next tokens of each text, [batch, sequence].
            mask: Which of all tokens so far count, [batch, past and sequence].

        Returns:
            Logits after the last of them, [batch, vocabulary], fp32, on the CPU.
        """
        feeds = {**self._fixed, **self._past}
        feeds["input_ids"] = self._session.value(self._ports["input_ids"], ids)
        if self._masked:
            feeds["attention_mask"] = self._session.value(self._ports["attention_mask"], mask)
        results = dict(zip(self._outputs, self._session.run(feeds, self._held), strict=True))
        self._past = {_PAST + name.removeprefix(_PRESENT): results[name] for name in self._kept}
        logits: Tensor = unwrap(results["logits"], torch.device("cpu"))
        return logits[:, -1].float()

    def forget(self) -> None:
        """Go back to before the first token: the next step reads the whole text."""
        self._past = self._nothing

    def _encoded(self, encoder: DecoderFile, source: Mapping[str, Tensor]) -> dict[str, Any]:
        names = [port.name for port in encoder.outputs]
        taken = [port.name for port in encoder.inputs]
        given = inputs_by_name(source, taken, encoder.path.name)
        feeds = {port.name: self._session.value(port, given[port.name]) for port in encoder.inputs}
        values = encoder.run(feeds, self._held)
        fixed = {
            _PAST + name.removeprefix(_PRESENT): value
            for name, value in zip(names, values, strict=True)
        }
        if "encoder_attention_mask" in self._ports:
            fixed["encoder_attention_mask"] = feeds["attention_mask"]
        return fixed


def _empty(port: Port, batch: int) -> Tensor:
    _, heads, _, width = port.shape
    if not isinstance(heads, int) or not isinstance(width, int):
        raise ExportError(
            f"input {port} is no cache of this library: heads and width are not fixed"
        )
    return torch.zeros(batch, heads, 0, width, dtype=getattr(torch, port.dtype))
