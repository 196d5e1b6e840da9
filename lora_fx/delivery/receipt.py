"""Receipts of deliveries: the check that a server answers with the delivered version of an adapter.

Let ``d`` be the root mean square of a difference of log-probabilities (of elements, as a share of their size,
if a model has no logits). An answer fits a version if ``d`` is at most the tolerance. By the triangle
inequality it cannot fit two versions that are more than twice the tolerance apart. If two versions are
nearer, the probe does not distinguish them, and the delivery is inconclusive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lora_fx.adapters import active_adapters, disable_adapter, reference, set_adapter
from lora_fx.checkpoint import adapter_state_dict, call_with
from lora_fx.delivery.probe import ProbeInputs
from lora_fx.errors import DeliveryError, some

__all__ = ["BEFORE", "Delivery", "LocalAnswers", "answer_here", "judge_answer", "message_of"]

_Verdict: TypeAlias = Literal["applied", "not applied", "inconclusive"]

# The least tolerance by the dtype of the model's outputs. Other kernels change log-probabilities by a few
# units in the last place of logits of size 1 to 10.
_LEAST: Final = {
    torch.float64: 3e-4,
    torch.float32: 3e-4,
    torch.float16: 3e-3,
    torch.bfloat16: 1e-2,
}
# The tolerance as a multiple of the distance between the target's base and the base here, and of the least
# tolerance if that distance is unknown.
_MARGIN: Final = 3.0


@dataclasses.dataclass(frozen=True)
class Delivery:
    """A receipt: which adapter a target was given, and which one answers.

    Attributes:
        target: The address of the server, or the file of the session.
        name: The target's name of the adapter.
        version: The name of the version, such as "step 50".
        verdict: "applied" if the target answers with this version, and no other version answers alike.
            "not applied" if it answers otherwise. "inconclusive" if it answers with this version, but another
            version answers the probe alike.
        answers_as: The versions whose answers the target's answer fits: ``version``, "the base alone", the
            names of earlier versions, or "the previous adapter" for an adapter that was not delivered from
            here. Empty if it fits none.
        distance: The distance between the target's answer and that of this version.
        effect: The distance between the answers of the base and of this version.
        noise: The distance between the answers of the target's base and of the base here; None if the target
            does not show its base.
        tolerance: The largest distance of answers that fit.
        folder: The delivered folder, if there is one.
    """

    target: str
    name: str
    version: str
    verdict: _Verdict
    answers_as: tuple[str, ...]
    distance: float
    effect: float
    noise: float | None
    tolerance: float
    folder: Path | None = None

    @property
    def applied(self) -> bool:
        """True if the target answers with this version and with no other version."""
        return self.verdict == "applied"

    def __str__(self) -> str:
        noise = "unknown" if self.noise is None else f"{self.noise:.2g}"
        return (
            f"{self.target}: adapter {self.name!r} ({self.version}): {self.verdict}; distance "
            f"{self.distance:.2g}, tolerance {self.tolerance:.2g}, effect of the adapter {self.effect:.2g}, "
            f"distance of the bases {noise}"
        )


_BASE: Final = "the base alone"
BEFORE: Final = "the previous adapter"
"""The name in receipts for a target's previous adapter, if this process has not delivered it."""

_BROKEN: Final = "values that are not finite"


def _distance(left: Tensor, right: Tensor) -> float:
    """Return the root mean square of the difference of two answers, over values that are not NaN.

    The distance is infinite if the shapes differ, or no value is known in both answers.
    """
    if left.shape != right.shape:
        return float("inf")
    known = ~(left.isnan() | right.isnan())
    if not known.any():
        return float("inf")
    left, right = left[known], right[known]
    difference = torch.where(left == right, 0.0, left - right)
    value = float(difference.square().mean().sqrt())
    return value if value == value else float("inf")


@dataclasses.dataclass(frozen=True)
class LocalAnswers:
    """The answers of the trained model to a probe, with its adapter and without it.

    Attributes:
        values: The answer of the adapter.
        base: The answer of the base.
        dtype: The dtype of the model's outputs.
        tokens: True for log-probabilities of tokens.
    """

    values: Tensor
    base: Tensor
    dtype: torch.dtype
    tokens: bool

    @property
    def unit(self) -> float:
        """The divisor of distances: 1 for log-probabilities, else the size (RMS) of the base's answer."""
        return 1.0 if self.tokens else float(self.base.square().mean().sqrt()) or 1.0


@torch.no_grad()
def answer_here(model: nn.Module, adapter_name: str, probe: ProbeInputs) -> LocalAnswers:
    """Return the answers of a model to a probe, with an adapter and without.

    A copy runs, so that neither modes nor active adapters of the model change.

    Raises:
        DeliveryError: If the adapter or its answer has values that are not finite.
    """
    twin = reference(model)
    if active_adapters(twin) != (adapter_name,):
        set_adapter(twin, adapter_name)
    device = next((parameter.device for parameter in twin.parameters()), torch.device("cpu"))
    calls = [{name: value.to(device) for name, value in call.items()} for call in probe.calls]
    values, dtype, tokens = probe.read([call_with(twin, call) for call in calls])
    with disable_adapter(twin):
        base, _, _ = probe.read([call_with(twin, call) for call in calls])
    state = adapter_state_dict(model, adapter_name)
    # Check the tensors as well, because a kernel may hide such a value in the answer.
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken or values.isposinf().any():
        raise DeliveryError(
            f"adapter {adapter_name!r} was not delivered: {some(broken, 3) or 'its answer to the probe'} is "
            "not finite: its training has diverged, or the probe is none of its inputs",
            "not finite",
        )
    return LocalAnswers(values, base, dtype, tokens)


def judge_answer(
    identity: tuple[str, str, str, Path | None],
    local: LocalAnswers,
    answer: Tensor,
    base: Tensor | None,
    versions: Mapping[str, Tensor],
    tolerance: float | None,
) -> Delivery:
    """Compare a target's answer with the answers of known versions, and return the receipt.

    Args:
        identity: The target, the name of the adapter there, the name of the version, and its folder.
        local: The answers of the model.
        answer: The answer of the target with the adapter; NaN for values that it leaves out.
        base: The answer of the target's base, if the target shows it.
        versions: The answers of other versions by their names.
        tolerance: The largest distance between answers that are the same; None to derive it.
    """
    unit = local.unit
    noise = None if base is None else _distance(base, local.base) / unit
    # Versions are compared on the values that the target shows.
    shown = torch.where(answer.isnan(), answer, local.values)
    effect = _distance(shown, local.base) / unit
    if tolerance is None:
        least = _LEAST.get(local.dtype, 3e-4)
        tolerance = _MARGIN * least if noise is None else max(least, _MARGIN * noise)
        tolerance *= max(1.0, effect) if local.tokens else 1.0
    rivals = {_BASE: local.base if base is None else base, **versions}
    distance = _distance(answer, local.values) / unit
    fits = _within(tolerance * unit, answer, rivals)
    alike = _within(2 * tolerance * unit, shown, rivals)
    target, name, version, folder = identity
    verdict: _Verdict = "not applied"
    if answer.isinf().any() and distance == float("inf"):
        fits = [_BROKEN]
    elif distance <= tolerance and alike:
        verdict, fits = "inconclusive", [version, *alike]
    elif distance <= tolerance:
        verdict, fits = "applied", [version]
    return Delivery(
        target, name, version, verdict, tuple(fits), distance, effect, noise, tolerance, folder
    )


def _within(most: float, answer: Tensor, rivals: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the versions whose answers are at most ``most`` away from an answer.

    :data:`BEFORE`, the target's previous adapter, is only returned if no other version is near.
    """
    labels = [label for label, values in rivals.items() if _distance(answer, values) <= most]
    return [label for label in labels if label != BEFORE or len(labels) == 1]


def message_of(receipt: Delivery) -> str:
    """Return a message that says which adapter a target answers with, and what to do."""
    start = f"{receipt.target}: adapter {receipt.name!r} ({receipt.version})"
    figures = str(receipt).partition("; ")[2]
    if receipt.verdict == "inconclusive":
        return (
            f"{start} cannot be told from {some(receipt.answers_as[1:])} by this probe ({figures}): give a "
            "probe like the inputs that it is trained on, or more of them, or deliver it less often"
        )
    has = " or ".join(receipt.answers_as) or (
        "neither the base alone nor a version that was delivered from here: another adapter, another scale, "
        "or another base. If the server computes in lower precision, give tolerance="
    )
    return (
        f"{start} is not applied. The answer is that of {has} ({figures}). The model here is unchanged: "
        "deliver it again, or restart the target"
    )
