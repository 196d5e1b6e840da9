"""Receipts: recorded outputs of an adapter for a few inputs, to check a server that loads it.

The most common complaint about serving adapters is that they are loaded and change nothing. A receipt has
canary inputs and the outputs of the base. It also has the outputs of base and adapter together at several
scales. These outputs form a curve. A runtime's outputs for the same inputs lie on it, at the scale at which
the runtime applies the adapter, or far from it.

If the model gives logits of tokens, the log-probabilities of the likeliest next tokens after each input are
compared. For any other model, elements of its first output are compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lora_fx.adapter_files import (
    DIFFUSERS_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    read_file,
    read_tensors,
)
from lora_fx.adapters import (
    active_adapters,
    adapter_record,
    disable_adapter,
    reference,
    set_adapter,
)
from lora_fx.checkpoint.files import RECEIPT_NAME
from lora_fx.digests import add_values
from lora_fx.errors import CheckpointError, ConfigError, LoraFxError
from lora_fx.files import current
from lora_fx.kinds import kind_of
from lora_fx.passes.parameters import factors_of
from lora_fx.torch_private import pytree

__all__ = [
    "Receipt",
    "Verdict",
    "call_with",
    "hash_tensors",
    "judge_model",
    "log_probabilities",
    "main_output",
    "make_receipt",
    "read_receipt",
]

_KEY: Final = "lora_fx.receipt"
_FORMAT: Final = 1
_SCALES: Final = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_TOKENS: Final = 20  # number of log-probabilities that servers report
_ELEMENTS: Final = 4096
# Shares of the adapter's effect. Rounding in half precision and quantized kernels stays below them.
_NEAR: Final = 0.1
_ON_CURVE: Final = 0.2
# A smaller effect is lost in the rounding of half precision. Absolute for log-probabilities, else relative.
_LEAST_EFFECT: Final = 1e-2


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a check: whether and how a runtime applies an adapter.

    Attributes:
        verdict: "applied", "not applied", "applied with another scale", "another base", or "applied
            otherwise". The last means that the answer is neither the base nor the adapter at any scale: a
            transposed factor, a missing layer, or another base if the base could not be asked.
        scale: The scale at which the adapter is applied, as a multiple of the adapter's scale; None if no
            scale fits.
        evidence: Distances, each as a share of the adapter's effect.
    """

    verdict: Literal[
        "applied",
        "not applied",
        "applied with another scale",
        "another base",
        "applied otherwise",
    ]
    scale: float | None
    evidence: Mapping[str, float]

    @property
    def applied(self) -> bool:
        """True if the runtime applies the adapter as the receipt says."""
        return self.verdict == "applied"

    def __str__(self) -> str:
        scale = "" if self.scale is None or self.applied else f" ({self.scale:.2g} times its own)"
        lines = [f"{self.verdict}{scale}"]
        lines += [f"  {name}: {value:.2g}" for name, value in self.evidence.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Receipt:
    """The effect of an adapter on a few inputs, by which copies of the adapter are recognized elsewhere.

    Attributes:
        inputs: The inputs by name; ``""`` if the model is called with a single tensor.
        chosen: Indices of the compared tokens of each row, or of the compared elements of the output.
        answers: The answers by scale of the adapter: log-probabilities [rows, tokens], or elements.
        tokens: True if the model gives logits of tokens.
        facts: Hashes of the adapter and of the base, and the class name of the model.
    """

    inputs: Mapping[str, Tensor]
    chosen: Tensor
    answers: Mapping[float, Tensor]
    tokens: bool
    facts: Mapping[str, str]

    @property
    def effect(self) -> float:
        """The root mean square of the adapter's change."""
        return _distance(self.answers[1.0], self.answers[0.0])

    def read(self, outputs: Any) -> Tensor:
        """Return the compared values from a model's outputs: a tensor, or anything with tensors in it.

        Raises:
            CheckpointError: If the outputs have the wrong shape.
        """
        value = main_output(outputs).detach().cpu()
        try:
            if self.tokens:
                answer = log_probabilities(value, self.inputs).gather(-1, self.chosen)
            else:
                answer = value.flatten().double()[self.chosen]
            # NaN stands for values that a server does not report, so a NaN of the model is replaced.
            return answer.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
        except (IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"the receipt is of another model: the output has shape {list(value.shape)}"
            ) from error

    def judge(self, answer: Tensor, base: Tensor | None = None) -> Verdict:
        """Decide from the answer of a runtime whether and how it applies the adapter.

        Args:
            answer: The values of :meth:`read`, with the adapter; NaN if unknown.
            base: The same for the runtime without the adapter, if available.
        """
        effect = self.effect
        known = ~answer.isnan()

        def far(left: Tensor, right: Tensor) -> float:
            return _distance(left[known], right[known]) / effect

        evidence = {
            "distance to base and adapter": far(answer, self.answers[1.0]),
            "distance to the base": far(answer, self.answers[0.0]),
        }
        if base is not None:
            seen = ~base.isnan()
            evidence["distance of the runtime's base to the base"] = (
                _distance(base[seen], self.answers[0.0][seen]) / effect
            )
            if evidence["distance of the runtime's base to the base"] > _NEAR:
                return Verdict("another base", None, evidence)
        if evidence["distance to base and adapter"] <= _NEAR:
            return Verdict("applied", 1.0, evidence)
        if evidence["distance to the base"] <= _NEAR:
            return Verdict("not applied", 0.0, evidence)
        scale, off = self._nearest(answer, known)
        evidence["distance to the adapter at another scale"] = off / effect
        if off / effect <= _ON_CURVE:
            return Verdict("applied with another scale", scale, evidence)
        return Verdict("applied otherwise", None, evidence)

    def write(self, path: Path) -> None:
        """Write a file of tensors."""
        tensors = {f"input.{name}": value for name, value in self.inputs.items()}
        tensors |= {f"answer.{scale:g}": value for scale, value in self.answers.items()}
        tensors["chosen"] = self.chosen
        values = {"format": _FORMAT, "tokens": self.tokens, "facts": dict(self.facts)}
        safetensors.torch.save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            path,
            metadata={_KEY: json.dumps(values)},
        )

    def _nearest(self, answer: Tensor, known: Tensor) -> tuple[float, float]:
        """Return the scale of the nearest point on the curve through the answers, and its distance."""
        best = (0.0, float("inf"))
        scales = sorted(self.answers)
        for low, high in itertools.pairwise(scales):
            start, step = self.answers[low][known], (self.answers[high] - self.answers[low])[known]
            length = float(step.square().sum())
            along = float(((answer[known] - start) * step).sum()) / length if length else 0.0
            along = min(max(along, 0.0), 1.0)
            off = _distance(answer[known], start + along * step)
            if off < best[1]:
                best = (low + along * (high - low), off)
        return best


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).square().mean().sqrt()) if left.numel() else float("inf")


def main_output(outputs: Any) -> Tensor:
    """Return the logits among a model's outputs, or the first floating-point tensor.

    Raises:
        ConfigError: If there is no such tensor.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    leaves = [logits] if logits is not None else pytree.tree_leaves(outputs)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise ConfigError("the model gives no floating-point tensor: there is nothing to compare")


def _mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the attention mask for the tokens of the logits: the decoder's, if there is a decoder."""
    decoder = any(name.startswith("decoder_") for name in inputs)
    return inputs.get("decoder_attention_mask" if decoder else "attention_mask")


def _last(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logits after each row's last token, [rows, vocabulary]."""
    logits = logits.double()
    if logits.dim() == 2:
        return logits
    if mask is None or mask.shape != logits.shape[:2]:
        return logits[:, -1]
    last = (mask.bool() * torch.arange(mask.shape[1])).amax(1)
    return logits[torch.arange(len(logits)), last]


def log_probabilities(logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the log-probabilities of the next token after each row, [rows, vocabulary], in fp64.

    Args:
        logits: [rows, length, vocabulary], or [rows, vocabulary].
        inputs: The inputs by argument, of which the mask is used.
    """
    return _last(logits, _mask(inputs)).log_softmax(-1)


def make_receipt(
    model: nn.Module, adapter_name: str, inputs: Any, tensors: Mapping[str, Tensor]
) -> Receipt:
    """Run a model on some inputs, with an adapter at several scales.

    Args:
        model: A rewritten model.
        adapter_name: An adapter of the model.
        inputs: A tensor, or tensors by argument: token ids of a few texts, a batch of images.
        tensors: The saved tensors of the adapter.

    Raises:
        ConfigError: If the inputs are no tensors, the model cannot be called with them, or the adapter
            changes nothing for them.
    """
    named = {"": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(named, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and (name or named is not inputs)
        for name, tensor in named.items()
    ):
        raise ConfigError("receipt= is a tensor, or a mapping of argument names to tensors")
    twin = reference(model)
    if active_adapters(twin) != (adapter_name,):
        set_adapter(twin, adapter_name)
    scales = _SCALES if _scalable(twin, adapter_name) else (0.0, 1.0)
    outputs = {}
    for scale in scales:
        with torch.no_grad(), _at_scale(twin, adapter_name, scale):
            outputs[scale] = main_output(call_with(twin, named)).detach().cpu()
    tokens = outputs[1.0].dim() == 3 and any(
        not tensor.is_floating_point() and tensor.dim() == 2 for tensor in named.values()
    )
    kept = {name: value.detach().cpu().clone() for name, value in named.items()}
    chosen = _likeliest(outputs, kept) if tokens else _spread_over(outputs[1.0])
    facts = {
        "adapter": hash_tensors(tensors),
        "base": _hash_of_base(model),
        "model": type(model).__name__,
    }
    receipt = Receipt(kept, chosen, {}, tokens, facts)
    answers = {scale: receipt.read(value) for scale, value in outputs.items()}
    receipt = dataclasses.replace(receipt, answers=answers)
    _check_effect(receipt, adapter_name)
    return receipt


def judge_model(model: nn.Module, adapter_name: str, receipt: Receipt) -> Verdict:
    """Compare an adapter of a rewritten model with a receipt, which may be of an earlier form of the model.

    Args:
        model: A rewritten model with weights.
        adapter_name: One of its adapters.
        receipt: The receipt.

    Raises:
        ConfigError: If the model cannot be called with the inputs of the receipt.
        CheckpointError: If the output has another shape.
    """
    twin = reference(model)
    if active_adapters(twin) != (adapter_name,):
        set_adapter(twin, adapter_name)
    with torch.no_grad():
        answer = receipt.read(call_with(twin, receipt.inputs))
        with disable_adapter(twin):
            base = receipt.read(call_with(twin, receipt.inputs))
    return receipt.judge(answer, base)


def _likeliest(outputs: Mapping[float, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the n likeliest next tokens with and without the adapter, as servers report: [rows, 2 n]."""
    ends = [_last(outputs[scale], _mask(inputs)) for scale in (0.0, 1.0)]
    count = min(_TOKENS, ends[0].shape[-1])
    return torch.cat([logits.topk(count).indices for logits in ends], 1)


def _spread_over(output: Tensor) -> Tensor:
    """Return evenly spaced indices into a flattened output."""
    size = output.numel()
    return torch.linspace(0, size - 1, min(size, _ELEMENTS)).round().long()


def _check_effect(receipt: Receipt, adapter_name: str) -> None:
    """Raise if the answers of a new receipt cannot tell the adapter from the base.

    Raises:
        ConfigError: If the answers are not finite, or the adapter hardly changes them.
    """
    answers, tokens = receipt.answers, receipt.tokens
    compared = answers[0.0], answers[1.0]
    if not all(answer.isfinite().all() for answer in compared):
        raise ConfigError(
            f"receipt=: what comes for these inputs is not finite, with adapter {adapter_name!r} or without: "
            "give inputs like those that it was trained on"
        )
    # Rounding changes log-probabilities as much as logits, and other outputs in proportion to their size.
    typical = 1.0 if tokens else max(float(answer.square().mean().sqrt()) for answer in compared)
    least = _LEAST_EFFECT * typical
    if not receipt.effect >= least or not receipt.effect:
        raise ConfigError(
            f"receipt=: adapter {adapter_name!r} changes what is compared by {receipt.effect:.1e} for these "
            f"inputs, and rounding in half precision may change it by {least:.0e}: give inputs "
            "like those that it was trained on"
        )


def call_with(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """Call a model with the inputs of a receipt.

    Raises:
        ConfigError: If the call fails.
    """
    try:
        return model(inputs[""]) if "" in inputs else model(**inputs)
    except LoraFxError:
        raise
    except Exception as error:
        shapes = ", ".join(
            f"{key or 'a tensor'} {list(value.shape)}" for key, value in inputs.items()
        )
        raise ConfigError(
            f"this {type(model).__name__} cannot be called with the inputs of the receipt "
            f"({shapes or 'none'}): {type(error).__name__}: {error}"
        ) from error


def _scalable(model: nn.Module, adapter_name: str) -> bool:
    return all(kind_of(row).low_rank for row in adapter_record(model, adapter_name).sites)


@contextmanager
def _at_scale(twin: nn.Module, adapter_name: str, scale: float) -> Iterator[None]:
    """Run a model with the adapter's B multiplied by a number within the context; with 0, run the base."""
    if scale == 0.0:
        with disable_adapter(twin):
            yield
        return
    rows = [row for row in adapter_record(twin, adapter_name).sites if not row.tied]
    kept = [factors_of(twin, row, adapter_name).b for row in rows] if scale != 1.0 else []
    values = [factor.data for factor in kept]
    try:
        for parameter, value in zip(kept, values, strict=True):
            # New storage, so that the model's values stay unchanged.
            parameter.data = value * scale
        yield
    finally:
        for parameter, value in zip(kept, values, strict=True):
            parameter.data = value


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the names, dtypes, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        add_values(digest, value)
    return digest.hexdigest()


def _hash_of_base(model: nn.Module) -> str:
    """Return a hash of names, shapes, and the first values of each parameter.

    Reading a large base in full would take too long.
    """
    firsts = {}
    for name, value in model.named_parameters():
        if "lora_" not in name and type(value.data) is Tensor and not value.is_meta:
            firsts[f"{name} {list(value.shape)}"] = value.detach().flatten()[:8].float()
    return hash_tensors(firsts)


def read_receipt(directory: Path) -> Receipt:
    """Read the receipt of an adapter's folder.

    Raises:
        CheckpointError: If there is no receipt, or it is damaged, belongs to another adapter than the
            folder's, or is from a newer lora_fx.
    """
    path = directory if directory.is_file() else current(directory / RECEIPT_NAME)
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {RECEIPT_NAME}: save the adapter with receipt=inputs, a few inputs on "
            "which it changes something"
        )
    try:
        receipt, written = _parse(path)
    except (
        safetensors.SafetensorError,
        AttributeError,
        LookupError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"{path} is damaged: save the adapter again") from error
    if receipt is None:
        raise CheckpointError(f"{path} was written in format {written}: update lora_fx")
    tensors = _adapter_beside(path)
    if tensors is not None and hash_tensors(tensors) != receipt.facts.get("adapter"):
        raise CheckpointError(
            f"{path} is of another adapter than the one in {path.parent}: save the adapter again with "
            "receipt="
        )
    return receipt


def _parse(path: Path) -> tuple[Receipt | None, Any]:
    """Read a receipt, and the number of its file format. The receipt is None if the format is not known."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        values: dict[str, Any] = json.loads((file.metadata() or {})[_KEY])
    if values["format"] != _FORMAT:
        return None, values["format"]
    named = {
        start: {
            name.removeprefix(start): value
            for name, value in tensors.items()
            if name.startswith(start)
        }
        for start in ("input.", "answer.")
    }
    answers = {float(scale): value for scale, value in named["answer."].items()}
    if not {0.0, 1.0} <= answers.keys():
        raise ValueError("no answers of the base and of the adapter")
    facts = {**values["facts"]}
    receipt = Receipt(named["input."], tensors["chosen"], answers, bool(values["tokens"]), facts)
    return receipt, _FORMAT


def _adapter_beside(path: Path) -> Mapping[str, Tensor] | None:
    folder = path.parent
    if any(current(folder / name).is_file() for name in (WEIGHTS_NAME, PICKLE_NAME)):
        return read_tensors(folder)[0]
    alone = current(folder / DIFFUSERS_NAME)
    return read_file(alone)[0] if alone.is_file() else None
