"""Receipts: what an adapter does to a few inputs, kept beside it, so that a server can be asked for it.

The commonest complaint about serving adapters is that they are loaded and change nothing. A receipt has
canary inputs, what the base gives for them, and what base and adapter give at several scales. What a runtime
gives for the same inputs lies on the curve from the one to the other, at the scale at which it applies the
adapter, or far off it.

What is compared: of a model that gives logits of tokens, the log-probabilities of the likeliest next tokens
after each input; of any other model, elements of its first output.
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

from lora_fx.adapters import (
    active_adapters,
    adapter_record,
    disable_adapter,
    reference,
    set_adapter,
)
from lora_fx.checkpoint.files import (
    DIFFUSERS_NAME,
    PICKLE_NAME,
    RECEIPT_NAME,
    WEIGHTS_NAME,
    read_file,
    read_tensors,
)
from lora_fx.errors import CheckpointError, ConfigError, LoraFxError
from lora_fx.files import current
from lora_fx.kinds import kind_of
from lora_fx.passes.parameters import factors_of
from lora_fx.torch_private import pytree

__all__ = [
    "Receipt",
    "Verdict",
    "call_with",
    "make_receipt",
    "read_receipt",
]

_KEY: Final = "lora_fx.receipt"
_FORMAT: Final = 1
_SCALES: Final = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_TOKENS: Final = 20  # what servers give log-probabilities of
_ELEMENTS: Final = 4096
# Shares of the adapter's own effect: what rounding in half precision and quantized kernels stay below.
_NEAR: Final = 0.1
_ON_CURVE: Final = 0.2
# A smaller effect drowns in the rounding of half precision. A share, but of log-probabilities.
_LEAST_EFFECT: Final = 1e-2


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether and how a runtime applies an adapter.

    Attributes:
        verdict: "applied", "not applied", "applied with another scale", "another base", or "applied
            otherwise": what came is neither the base nor the adapter at any scale (a factor that is
            turned, a layer that is missing, or another base where the base could not be asked).
        scale: At which scale it is applied, as a multiple of the adapter's own; None where there is none.
        evidence: Distances, each as a share of what the adapter changes.
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
        """Whether it does what the receipt says."""
        return self.verdict == "applied"

    def __str__(self) -> str:
        scale = "" if self.scale is None or self.applied else f" ({self.scale:.2g} times its own)"
        lines = [f"{self.verdict}{scale}"]
        lines += [f"  {name}: {value:.2g}" for name, value in self.evidence.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Receipt:
    """The effect of an adapter on some inputs.

    Attributes:
        inputs: The canary inputs by name; ``""`` for the only one of a model that is called with a tensor.
        chosen: Which tokens of each row, or which elements of the output, are compared.
        answers: What comes at each scale of the adapter: log-probabilities [rows, tokens], or elements.
        tokens: Whether the model gives logits of tokens.
        facts: Version, name of the base, hashes of the adapter and of the base's weights.
    """

    inputs: Mapping[str, Tensor]
    chosen: Tensor
    answers: Mapping[float, Tensor]
    tokens: bool
    facts: Mapping[str, str]

    @property
    def effect(self) -> float:
        """The change by the adapter, root mean square."""
        return _distance(self.answers[1.0], self.answers[0.0])

    def read(self, outputs: Any) -> Tensor:
        """What is compared of a model's outputs: a tensor, or anything with tensors in it.

        Raises:
            CheckpointError: If they are not of the model's shape.
        """
        value = _main(outputs).detach().cpu()
        try:
            if self.tokens:
                rows = _last(value, _mask(self.inputs))
                answer = rows.log_softmax(-1).gather(-1, self.chosen)
            else:
                answer = value.flatten().double()[self.chosen]
            # NaN is what a server does not report. What a model computes counts, whatever it is.
            return answer.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
        except (IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"the receipt is of another model: the output has shape {list(value.shape)}"
            ) from error

    def judge(self, answer: Tensor, base: Tensor | None = None) -> Verdict:
        """Judge a runtime by its answer.

        Args:
            answer: Of :meth:`read`, with the adapter; NaN where it is not known.
            base: Likewise, of the runtime without it, if it could be asked.
        """
        effect = self.effect
        known = ~answer.isnan()

        def far(one: Tensor, other: Tensor) -> float:
            return _distance(one[known], other[known]) / effect

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
        """Write one file of tensors."""
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
        """The scale on the curve through the answers that is nearest, and how far it is."""
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


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt()) if one.numel() else float("inf")


def _main(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    found = [logits] if logits is not None else pytree.tree_leaves(outputs)
    for one in found:
        if isinstance(one, Tensor) and one.is_floating_point():
            return one
    raise ConfigError("the model gives no floating-point tensor: there is nothing to compare")


def _mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Which positions of the logits are tokens: those of the decoder, where there is one."""
    decoder = any(name.startswith("decoder_") for name in inputs)
    return inputs.get("decoder_attention_mask" if decoder else "attention_mask")


def _last(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The logits after each row's last token, [rows, vocabulary]."""
    logits = logits.double()
    if logits.dim() == 2:
        return logits
    if mask is None or mask.shape != logits.shape[:2]:
        return logits[:, -1]
    last = (mask.bool() * torch.arange(mask.shape[1])).amax(1)
    return logits[torch.arange(len(logits)), last]


def make_receipt(
    model: nn.Module, adapter_name: str, inputs: Any, tensors: Mapping[str, Tensor]
) -> Receipt:
    """Runs a model on some inputs, with an adapter at several scales.

    Args:
        model: A rewritten model.
        adapter_name: Its adapter.
        inputs: A tensor, or tensors by argument: token ids of a few texts, a batch of pictures.
        tensors: The adapter as it is saved.

    Raises:
        ConfigError: If the inputs are no tensors, the model cannot be called with them, or the adapter
            changes nothing for them.
    """
    named = {"": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(named, Mapping) or not all(
        isinstance(name, str) and isinstance(one, Tensor) and (name or named is not inputs)
        for name, one in named.items()
    ):
        raise ConfigError("receipt= is a tensor, or a mapping of argument names to tensors")
    twin = reference(model)
    if active_adapters(twin) != (adapter_name,):
        set_adapter(twin, adapter_name)
    scales = _SCALES if _scalable(twin, adapter_name) else (0.0, 1.0)
    outputs = {}
    for scale in scales:
        with torch.no_grad(), _at_scale(twin, adapter_name, scale):
            outputs[scale] = _main(call_with(twin, named)).detach().cpu()
    tokens = outputs[1.0].dim() == 3 and any(
        not one.is_floating_point() and one.dim() == 2 for one in named.values()
    )
    kept = {name: value.detach().cpu().clone() for name, value in named.items()}
    chosen = _likeliest(outputs, kept) if tokens else _spread_over(outputs[1.0])
    facts = {
        "adapter": _hash(tensors),
        "base": _hash_of_base(model),
        "model": type(model).__name__,
    }
    receipt = Receipt(kept, chosen, {}, tokens, facts)
    answers = {scale: receipt.read(value) for scale, value in outputs.items()}
    receipt = dataclasses.replace(receipt, answers=answers)
    _check_effect(receipt, adapter_name)
    return receipt


def _likeliest(outputs: Mapping[float, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """The tokens that a server reports when it applies the adapter, and when it does not: [rows, 2 n]."""
    ends = [_last(outputs[one], _mask(inputs)) for one in (0.0, 1.0)]
    count = min(_TOKENS, ends[0].shape[-1])
    return torch.cat([one.topk(count).indices for one in ends], 1)


def _spread_over(output: Tensor) -> Tensor:
    """Places all over an output that is flattened."""
    size = output.numel()
    return torch.linspace(0, size - 1, min(size, _ELEMENTS)).round().long()


def _check_effect(receipt: Receipt, adapter_name: str) -> None:
    """Refuses a receipt whose answers say nothing.

    Raises:
        ConfigError: If they are not finite, or those with the adapter are those without.
    """
    answers, tokens = receipt.answers, receipt.tokens
    compared = answers[0.0], answers[1.0]
    if not all(one.isfinite().all() for one in compared):
        raise ConfigError(
            f"receipt=: what comes for these inputs is not finite, with adapter {adapter_name!r} or without: "
            "give inputs like those that it was trained on"
        )
    # Rounding moves log-probabilities by about as much as logits, and other outputs in proportion to them.
    typical = 1.0 if tokens else max(float(one.square().mean().sqrt()) for one in compared)
    least = _LEAST_EFFECT * typical
    if not receipt.effect >= least or not receipt.effect:
        raise ConfigError(
            f"receipt=: adapter {adapter_name!r} changes what is compared by {receipt.effect:.1e} for these "
            f"inputs, and rounding in half precision may change it by {least:.0e}: give inputs "
            "like those that it was trained on"
        )


def call_with(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """Calls a model with the inputs of a receipt.

    Raises:
        ConfigError: If it cannot be called so.
    """
    try:
        return model(inputs[""]) if "" in inputs else model(**inputs)
    except LoraFxError:
        raise
    except Exception as error:
        found = ", ".join(f"{key or 'a tensor'} {list(one.shape)}" for key, one in inputs.items())
        raise ConfigError(
            f"this {type(model).__name__} cannot be called with the inputs of the receipt "
            f"({found or 'none'}): {type(error).__name__}: {error}"
        ) from error


def _scalable(model: nn.Module, adapter_name: str) -> bool:
    return all(kind_of(row).low_rank for row in adapter_record(model, adapter_name).sites)


@contextmanager
def _at_scale(twin: nn.Module, adapter_name: str, scale: float) -> Iterator[None]:
    """A copy with its adapter's B multiplied by a number; with 0 the base."""
    if scale == 0.0:
        with disable_adapter(twin):
            yield
        return
    rows = [row for row in adapter_record(twin, adapter_name).sites if not row.tied]
    kept = [factors_of(twin, row, adapter_name).b for row in rows] if scale != 1.0 else []
    values = [one.data for one in kept]
    try:
        for parameter, value in zip(kept, values, strict=True):
            # Other storage: that of the model stays as it is.
            parameter.data = value * scale
        yield
    finally:
        for parameter, value in zip(kept, values, strict=True):
            parameter.data = value


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hash_of_base(model: nn.Module) -> str:
    """Of names and shapes, and of the first values of each: a base of many gigabytes is not read."""
    firsts = {}
    for name, value in model.named_parameters():
        if "lora_" not in name and type(value.data) is Tensor and not value.is_meta:
            firsts[f"{name} {list(value.shape)}"] = value.detach().flatten()[:8].float()
    return _hash(firsts)


def read_receipt(directory: Path) -> Receipt:
    """Reads the receipt of an adapter's folder.

    Raises:
        CheckpointError: If there is none, it is damaged, of another adapter than the folder's, or of a newer
            lora_fx.
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
    if tensors is not None and _hash(tensors) != receipt.facts.get("adapter"):
        raise CheckpointError(
            f"{path} is of another adapter than the one in {path.parent}: save the adapter again with "
            "receipt="
        )
    return receipt


def _parse(path: Path) -> tuple[Receipt | None, Any]:
    """A receipt, None if its format is not known; and the format."""
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
    if any(current(folder / one).is_file() for one in (WEIGHTS_NAME, PICKLE_NAME)):
        return read_tensors(folder)[0]
    alone = current(folder / DIFFUSERS_NAME)
    return read_file(alone)[0] if alone.is_file() else None
