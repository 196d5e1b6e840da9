"""Find the longest context and the largest batch that fit on a card, by planning some training steps.

The peak of a step grows almost linearly with the number of tokens. So a few plans are enough: a line through
two known plans predicts the length that would fill the card, and this length is planned next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.config import LoraConfig
from lora_fx.files import bytes_in
from lora_fx.ir import Memory
from lora_fx.tools.cluster import (
    Mesh,
    Need,
    Settings,
    plan_step,
    step_inputs,
    tensors_inside,
    without_memory,
)

__all__ = [
    "CONTEXT",
    "FRAGMENTS",
    "MOST_PLANS",
    "Fit",
    "best_format",
    "fits",
    "size_of",
    "stored_bytes",
    "usable",
]

CONTEXT = 500_000_000
"""Bytes of a CUDA context."""

FRAGMENTS = 0.05
"""Share of a card that the allocator loses to fragments."""

_STEP = 256  # tokens
_LONGEST = 1 << 22
MOST_PLANS = 12
"""Largest number of plans for one setting, to find the longest context and the largest batch."""

_CLOSE, _AIM = 0.98, 0.99  # of the card


def size_of(option: str, text: str) -> int:
    """Read the size of a memory: ``24GB`` (10^9 bytes) or ``16GiB`` (2^30 bytes).

    Raises:
        ConfigError: If the text is no size.
    """
    return bytes_in(text, f"--{option}")


def usable(card: int) -> int:
    """Return the bytes of a card's memory that a training step may use.

    The others are for the CUDA context and for fragments of the allocator.
    """
    return max(int((card - CONTEXT) * (1 - FRAGMENTS)), 0)


@dataclass(frozen=True)
class Fit:
    """The longest context and the largest batch with some settings.

    Attributes:
        settings: The settings.
        context: Tokens of the longest sample that fits, in a batch of one; 0 if not even a short one does.
        need: The need of a step with this sample; if none fits, the need of a step with a short sample.
        batch: Number of samples of the requested length that fit in a batch; 0 if none does.
    """

    settings: Settings
    context: int
    need: Need
    batch: int


def fits(
    model: nn.Module,
    config: LoraConfig,
    room: int,
    settings: Settings,
    *,
    memories: Sequence[Memory],
    sequence: int,
    host: float = math.inf,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Fit]:
    """Yield the longest context and the largest batch that fit on a card, for each value of ``memory``.

    Args:
        model: A model of text on any device, which is not changed.
        config: Configuration of the adapter.
        room: Bytes that a step may use; see :func:`usable`.
        settings: The other settings.
        memories: Values of ``memory=`` of :func:`lora_fx.rewrite`.
        sequence: Tokens of a sample in a batch.
        host: Bytes of the host that the inputs of blocks may take.
        tell: Called with a line before each plan.

    Raises:
        ConfigError: If the model takes no text.
        LoraFxError: As :func:`lora_fx.tools.cluster.plan_step`.
    """
    for memory in memories:
        chosen = dataclasses.replace(settings, memory=memory)

        def need_of(samples: int, tokens: int, chosen: Settings = chosen) -> Need:
            tell(f"memory={chosen.memory}: {samples} x {tokens:,} tokens")
            inputs = step_inputs(model, None, batch=samples, sequence=tokens)
            return plan_step(model, config, Mesh(), inputs, chosen)

        rooms = (room, host)
        context, need = _largest(lambda tokens: need_of(1, tokens), rooms, _STEP, _LONGEST)
        # Samples of a batch need what the tokens of one long sample need, or less.
        batch = 0
        if context >= sequence:
            batch, _ = _largest(
                lambda count: need_of(count, sequence), rooms, 1, _LONGEST // sequence
            )
        yield Fit(chosen, context, need, batch)


def _largest(
    need_of: Callable[[int], Need], rooms: tuple[float, float], step: int, limit: int
) -> tuple[int, Need]:
    """Return the largest size whose training step fits, as a multiple of ``step``, and the need of that step.

    Only a few steps are planned.

    Args:
        need_of: Function that plans a training step of a size.
        rooms: Bytes of the card and of the host that a training step may use.
        step: The smallest size.
        limit: The largest size.
    """

    def share(need: Need) -> float:
        """Return the share of the card's or the host's memory that a step uses, whichever is larger."""
        return max(need.peak / max(rooms[0], 1), need.host / max(rooms[1], 1))

    known = {step: need_of(step)}
    if share(known[step]) > 1:
        return 0, known[step]
    size = min(8 * step, limit)
    for _ in range(MOST_PLANS // 2):
        if size in known:
            break
        known[size] = need_of(size)
        shares = {count: share(need) for count, need in sorted(known.items())}
        best = max(count for count, used in shares.items() if used <= 1)
        if shares[best] >= _CLOSE or best >= limit:
            break
        size = min(_next(shares, best) // step * step, limit)
    best = max(count for count, need in known.items() if share(need) <= 1)
    return best, known[best]


def _next(shares: dict[int, float], best: int) -> int:
    """Return the size to plan next: where a line through the best size and its neighbor reaches the limit."""
    above = [count for count in shares if count > best]
    other = min(above) if above else max(count for count in shares if count < best)
    slope = (shares[other] - shares[best]) / (other - best)
    # Some memory does not depend on the length. For short samples, the line may thus be too flat.
    return min(int(best + (_AIM - shares[best]) / slope), 8 * best) if slope > 0 else 2 * best


def stored_bytes(model: nn.Module, name: str) -> int:
    """Return the bytes that the weights of a model would take in a quantized format.

    The model is on the meta device.
    """
    from lora_fx.tools.planned_weights import quantized_without_values

    parameters = quantized_without_values(model, name).parameters()
    return sum(part.nbytes for parameter in parameters for part in tensors_inside(parameter))


def best_format(model: nn.Module, room: int, dtype: torch.dtype | None) -> str | None:
    """Return the quantized format in which a model fits and keeps most bytes, or None if no format fits.

    The formats int8 and nf4 of ``quantize`` come first. If neither fits, try the formats of checkpoints.
    """
    from lora_fx.tools.planned_weights import STORED

    empty = without_memory(model, dtype)
    for names in (("int8", "nf4"), tuple(STORED)):
        sizes = {name: stored_bytes(empty, name) for name in names}
        fitting = [name for name, size in sizes.items() if size <= room]
        if fitting:
            return max(fitting, key=lambda name: sizes[name])
    return None
