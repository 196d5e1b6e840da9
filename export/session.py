"""Running an exported file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.export.generation import Streamer, generate
from lora_fx.export.loading import load
from lora_fx.export.ports import Port, feed, port_of, unwrap
from lora_fx.export.providers import import_onnxruntime
from lora_fx.export.running import execute
from lora_fx.export.sampling import Processor
from lora_fx.export.tasks.defaults import ENCODER_KEY

__all__ = ["OnnxSession", "Port"]


class OnnxSession:
    """An exported model, loaded and ready to run.

    Args:
        path: The ``.onnx`` file; its external data, and the encoder of an encoder-decoder, have to
            lie beside it.
        provider: "cuda" or "cpu". What runs is this provider or nothing.
        provider_options: Options of ONNX Runtime's provider. On CUDA, TF32 is off unless they
            say otherwise: PyTorch's own matrix products do not use it by default either.

    Attributes:
        inputs: What ``run`` takes.
        outputs: What it gives.
        metadata: What the file remembers of its export.
        encoder: The session of the encoder, for the decoder of an encoder-decoder, else None.

    Raises:
        ProviderError: The provider is unknown, not installed, lacks libraries or a device, or has
            no kernel for an operation of the file.
        ExportError: The file is missing, damaged or no ONNX model.
    """

    def __init__(
        self,
        path: str | Path,
        provider: Literal["cuda", "cpu"] = "cuda",
        *,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._runtime = import_onnxruntime()
        self._session = load(self._runtime, self.path, provider, provider_options or {})
        self.provider: Literal["cuda", "cpu"] = provider
        self.inputs = tuple(port_of(value) for value in self._session.get_inputs())
        self.outputs = tuple(port_of(value) for value in self._session.get_outputs())
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.encoder: OnnxSession | None = None
        if ENCODER_KEY in self.metadata:
            beside = self.path.with_name(self.metadata[ENCODER_KEY])
            self.encoder = OnnxSession(beside, provider, provider_options=provider_options)

    def __repr__(self) -> str:
        return f"OnnxSession({str(self.path)!r}, provider={self.provider!r})"

    def run(
        self, inputs: Mapping[str, Any] | Sequence[Any] | Tensor | np.ndarray[Any, Any]
    ) -> dict[str, Any]:
        """Run the model once.

        Args:
            inputs: Arrays or tensors by name, or in the order of ``self.inputs``.

        Returns:
            Outputs by name: tensors, on the device of the first one given, if any of the inputs is
            a tensor, else numpy arrays.

        Raises:
            ExportError: Names, dtypes, ranks or fixed sizes do not fit, or the model fails.
        """
        given = self._by_name(inputs)
        feeds = {port.name: feed(self._runtime, port, given[port.name]) for port in self.inputs}
        results = self._execute(feeds)
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else None
        pairs = zip(self.outputs, results, strict=True)
        return {port.name: unwrap(result, device) for port, result in pairs}

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generation_config: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        logits_processor: Sequence[Processor] = (),
        stopping_criteria: Sequence[Callable[[Tensor, Tensor], Any]] = (),
        streamer: Streamer | None = None,
        **inputs: Any,
    ) -> Any:
        """Continue texts: token for token what ``model.generate`` of transformers gives.

        For files of ``export_onnx(..., task=...)``. What is not given is as in the model's
        ``generation_config``, which the file remembers, and else as in transformers.

        Args:
            input_ids: The prompts, whole numbers of shape [batch, sequence], padded on the left; for
                an encoder-decoder the texts that its encoder reads.
            attention_mask: Of the same shape, 0 for padding. Without it pad tokens are padding.
            max_new_tokens: Tokens to generate at most; 20 if nothing says otherwise.
            do_sample: Draw each token, else take the likeliest.
            temperature: What logits are divided by before a draw.
            top_k: Draw from so many tokens only; 0 for all.
            top_p: Draw from the likeliest tokens that have this probability together.
            min_p: Draw from tokens that have this share of the likeliest one's probability.
            repetition_penalty: What the logits of tokens that were there are divided by.
            eos_token_id: The token or tokens that end a text; an empty list for none.
            pad_token_id: What follows in rows that end before others.
            generation_config: Fields of a ``GenerationConfig`` in place of those in the file.
            generator: For the draws. Without it they come from torch's own, as in transformers.
            logits_processor: Functions from tokens [batch, length] and scores [batch, vocabulary] to
                scores; those of transformers are such.
            stopping_criteria: Functions from tokens and scores to True where a text has ended.
            streamer: Told of the prompt, each token, and the end, as transformers' are.
            **inputs: ``input_features`` and the like, what an encoder takes instead of ids, and
                ``decoder_input_ids``, with which its decoder begins.

        Returns:
            The prompts and what follows, [batch, length]: a tensor, or an array if all that was given
            are arrays. For an encoder-decoder what its decoder says.

        Raises:
            ExportError: The file is not for generation; inputs, settings or lengths do not fit; the
                default settings ask for what is not done here, such as beams.
        """
        changes = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        return generate(
            self,
            {"input_ids": input_ids, "attention_mask": attention_mask, **inputs},
            changes,
            generation_config=generation_config,
            generator=generator,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
        )

    def _execute(self, feeds: Mapping[str, Any], *, kept: Collection[str] = ()) -> list[Any]:
        """From values of ONNX Runtime, by name, to values in the order of the outputs.

        Args:
            feeds: The inputs.
            kept: Outputs that stay on the device of the provider; the others are on the CPU.
        """
        device = self.provider if kept else "cpu"
        names = [port.name for port in self.outputs]
        return execute(self._session, feeds, names, kept, device)

    def _by_name(self, inputs: Any) -> dict[str, Any]:
        names = [port.name for port in self.inputs]
        if isinstance(inputs, (Tensor, np.ndarray)):
            inputs = (inputs,)
        if not isinstance(inputs, Mapping):
            if not isinstance(inputs, Sequence):
                raise ExportError(
                    f"inputs are a {type(inputs).__name__}: give arrays or tensors, by name "
                    f"({', '.join(names)}) or in this order"
                )
            if len(inputs) != len(names):
                raise ExportError(
                    f"{self.path.name} takes {len(names)} inputs ({', '.join(names)}), "
                    f"{len(inputs)} were given"
                )
            inputs = dict(zip(names, inputs, strict=True))
        missing = [name for name in names if name not in inputs]
        unknown = [name for name in inputs if name not in names]
        if missing or unknown:
            raise ExportError(_names_message(self.path.name, names, missing, unknown))
        return {name: inputs[name] for name in names}


def _names_message(file: str, names: list[str], missing: list[str], unknown: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"lacks {', '.join(missing)}")
    for name in unknown:
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        parts.append(f"has '{name}', which is no input{hint}")
    return f"the call of {file} {' and '.join(parts)}: its inputs are {', '.join(names)}"
