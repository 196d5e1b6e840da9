"""Probes: a few inputs that are run before and after a delivery to see which adapter answers.

For a language model, the log-probabilities of the next token are compared, otherwise all outputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_fx.checkpoint import log_probabilities, main_output
from lora_fx.errors import ConfigError, some
from lora_fx.export.decoder import last_logits
from lora_fx.export.decoder_cache import TASK_KEY
from lora_fx.export.session import OnnxSession

__all__ = ["Probe", "ProbeInputs", "read_probe", "run_session"]

Probe: TypeAlias = str | Sequence[str] | Sequence[int] | Tensor | Mapping[str, Tensor]
"""Inputs to compare answers for: texts, token ids, or tensors by argument."""


@dataclasses.dataclass(frozen=True)
class ProbeInputs:
    """The inputs of a probe, both for the model and for the server or session that gets the adapter.

    Attributes:
        calls: Inputs of each call by argument. Texts of different lengths are separate calls.
        prompts: Token ids for a server; None if the inputs are not just token ids.
    """

    calls: tuple[Mapping[str, Tensor], ...]
    prompts: tuple[tuple[int, ...], ...] | None

    @property
    def key(self) -> str:
        """A hash of all inputs. Only answers to probes with the same key can be compared."""
        digest = hashlib.sha256()
        for call in self.calls:
            for name, value in call.items():
                digest.update(f"{name} {value.dtype} {list(value.shape)} {value.tolist()}".encode())
        return digest.hexdigest()

    def read(
        self, outputs: Sequence[Any], *, logits_alone: bool = False
    ) -> tuple[Tensor, torch.dtype, bool]:
        """Return the values to compare from a model's outputs. There is one output for each call.

        Returns:
            Log-probabilities of the next token, [rows, vocabulary], or elements, [calls, elements]; the dtype
            of the outputs; True for log-probabilities.
        """
        rows, dtype, logits = [], torch.float32, False
        for call, output in zip(self.calls, outputs, strict=True):
            value = main_output(output).detach().cpu()
            dtype = value.dtype
            # A session returns the logits after the last token alone, [rows, vocabulary].
            logits = self.prompts is not None and (value.dim() == 3 or logits_alone)
            values = log_probabilities(value, call) if logits else value.double().flatten()[None]
            # NaN stands for values that are unknown, so a NaN of the model is replaced.
            rows.append(values.nan_to_num(float("inf"), float("inf"), float("-inf")))
        return torch.cat(rows), dtype, logits


def read_probe(probe: Any, tokenizer: Any = None) -> ProbeInputs:
    """Return the inputs of a probe.

    Args:
        probe: A :data:`Probe`.
        tokenizer: A tokenizer of transformers, for texts.

    Raises:
        ConfigError: If the probe is not valid, or has texts and there is no tokenizer.
    """
    if isinstance(probe, Mapping):
        if not probe or not all(isinstance(value, Tensor) for value in probe.values()):
            raise ConfigError("probe= is a mapping: give tensors by argument")
        call = {str(name): value.detach().cpu() for name, value in probe.items()}
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        if ids is None or call.keys() - {"input_ids", "attention_mask"} or ids.dim() != 2:
            return ProbeInputs((call,), None)
        masks = torch.ones_like(ids) if mask is None else mask
        return _of_rows([row[kept.bool()] for row, kept in zip(ids, masks, strict=True)])
    if isinstance(probe, Tensor):
        if probe.is_floating_point() or probe.dim() not in (1, 2):
            return ProbeInputs(({"": probe.detach().cpu()},), None)
        return _of_rows(list(probe.detach().cpu().reshape(-1, probe.shape[-1])))
    values = [probe] if isinstance(probe, str) else list(probe)
    if values and all(isinstance(value, str) for value in values):
        if tokenizer is None:
            raise ConfigError(
                f"probe={some([repr(value) for value in values], 1)}: texts need tokenizer="
            )
        return _of_rows([torch.tensor(tokenizer(value)["input_ids"]) for value in values])
    if values and all(isinstance(value, int) for value in values):
        return _of_rows([torch.tensor(values)])
    raise ConfigError(
        "probe= is a text, several texts, token ids, a tensor, or tensors by argument"
    )


def _of_rows(rows: Sequence[Tensor]) -> ProbeInputs:
    if not rows or any(not len(row) for row in rows):
        raise ConfigError("probe= has a text without tokens: there is nothing to compare")
    prompts = tuple(tuple(row.tolist()) for row in rows)
    return ProbeInputs(tuple({"": row[None]} for row in rows), prompts)


def run_session(session: OnnxSession, inputs: Mapping[str, Tensor], adapter: str | None) -> Any:
    """Run a session on inputs of the PyTorch model that was exported.

    Args:
        session: A session. If its file generates text, only the token ids and their mask are used.
        inputs: Inputs by argument, or a single tensor as ``""``.
        adapter: The session's name of an adapter, or None for the base.

    Returns:
        Outputs by name, or the logits after the last token of each row.
    """
    names = [port.name for port in session.inputs]
    if TASK_KEY in session.metadata:
        ids = inputs.get("input_ids", inputs.get(""))
        if ids is None:
            raise ConfigError(
                f"{session.path.name} takes input_ids, and there are {some(list(inputs))}"
            )
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        return last_logits(session, ids, mask, adapter)
    if "" not in inputs:
        return session.run({k: v for k, v in inputs.items() if k in names}, adapter=adapter)
    first = inputs[""]
    if names[1:] == ["attention_mask"]:
        return session.run([first, torch.ones_like(first)], adapter=adapter)
    return session.run(first, adapter=adapter)
