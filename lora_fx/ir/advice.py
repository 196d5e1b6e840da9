"""Advice on a plan (uncovered operations, forgotten modules, capacity, learning rate), and use of a budget.

The rules are those of "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025,
doi:10.64434/tml.20250929), in short [S], unless another source is named.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from lora_fx.errors import some

__all__ = ["Advice", "Capacity", "Coverage", "LearningRate", "Spending"]

_LOW = 0.5
"""Share of the FLOPs below which a plan warns.

Attention alone learns more slowly than the MLPs alone [S]. In the Llama-3.1-8B of [S], attention has 19 % of
the FLOPs, and the MLPs have 81 %.
"""
_BITS_PER_PARAMETER = 2
"""Bits that a parameter stores in the long run (Allen-Zhu and Li, 2024, arXiv:2404.05405; cited in [S])."""
_BITS_PER_TOKEN = 1
"""Bits of a token at most: the log-loss of a first epoch, about 1 bit a token, bounds what is stored [S]."""
_ALPHA = 32
"""The alpha of all experiments in [S]."""
_TIMES, _TIMES_IN_SHORT, _SHORT = 10, 15, 100
"""LoRA's best learning rate as a multiple of full fine-tuning's: in general, and under 100 steps [S]."""
_LISTED = 4


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The operations that are adapted, by their FLOPs for one token.

    The output head, routers and embeddings do not count.

    Attributes:
        share: Share of the FLOPs of linear operations, in [0, 1].
        uncovered: The operations that are not adapted, equal layers as one, each with its share, the largest
            first.
    """

    share: float
    uncovered: tuple[tuple[str, float], ...]

    def line(self) -> str | None:
        """Return a warning if the share is low, else None."""
        if self.share >= _LOW:
            return None
        listed = [f"{name} {100 * share:.0f} %" for name, share in self.uncovered if share >= 0.005]
        return (
            f"only {100 * self.share:.0f} % of the FLOPs of linear operations are adapted, which may learn "
            f"slowly; the others: {some(listed, _LISTED)}"
        )


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The information that the trainable parameters can store, compared with that in the training data.

    Attributes:
        tokens: Tokens of the data that the loss counts, each once.
        parameters: Trainable elements.
        factors: Trainable elements in tensors that grow with the rank.
    """

    tokens: int
    parameters: int
    factors: int

    @property
    def lacking(self) -> float | None:
        """The factor by which all ranks have to grow; 1 if the capacity is enough, None without factors."""
        missing = self.tokens * _BITS_PER_TOKEN / _BITS_PER_PARAMETER - self.parameters
        if missing <= 0:
            return 1.0
        return 1 + missing / self.factors if self.factors else None

    def line(self) -> str:
        """Return the comparison of parameters and data as a line of text."""
        stored = _bits(self.parameters * _BITS_PER_PARAMETER)
        needed = _bits(self.tokens * _BITS_PER_TOKEN)
        text = (
            f"{self.parameters:,} parameters store about {stored}, {self.tokens:,} tokens hold at most about "
            f"{needed}"
        )
        if self.lacking is None:
            return f"{text}: not enough to store all"
        if self.lacking > 1:
            return f"{text}: to store all, multiply r by {self.lacking:.3g}"
        return f"{text}: enough"


def _bits(count: int) -> str:
    for size, unit in ((10**9, "Gbit"), (10**6, "Mbit"), (10**3, "kbit")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bit"


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """A learning rate to start a sweep with, for Adam.

    Attributes:
        low, high: Its range for language models; None outside of the widths for which it was measured.
        width: Features of a token between layers of a language model; None for any other model.
        alpha: The most frequent ``scale * r`` of the sites, or the median if most sites differ from it.
    """

    low: float | None
    high: float | None
    width: int | None
    alpha: float

    def line(self) -> str:
        """Return the learning rate, with the conditions for it, as a line of text."""
        text = f"start with a learning rate {_TIMES} times that of full fine-tuning"
        if self.low is not None and self.high is not None:
            text += f", for width {self.width:,} about {_rate(self.low)} to {_rate(self.high)}"
        text += f"; {_TIMES_IN_SHORT} times for fewer than {_SHORT} steps"
        if self.alpha != _ALPHA:
            text += f" (measured with alpha {_ALPHA}: with {self.alpha:g}, first steps are {self._steps()})"
        return text

    def _steps(self) -> str:
        """Return in words how much smaller or larger the first steps are than with the measured alpha.

        At the same rate their size is proportional to alpha [S].
        """
        ratio = _ALPHA / self.alpha if self.alpha else float("inf")
        return f"{ratio:.3g} times smaller" if ratio > 1 else f"{1 / ratio:.3g} times larger"


def _rate(value: float) -> str:
    number, _, exponent = f"{value:.1e}".partition("e")
    return f"{number}e{int(exponent)}"


@dataclasses.dataclass(frozen=True)
class Advice:
    """Advice on a plan. Only :meth:`lines` that matter for the model are shown.

    Attributes:
        coverage: The adapted share of the FLOPs; None if nothing is adapted, or the positions of convolutions
            are unknown.
        forgotten: Modules that are usually meant to be trained and are not, in words.
        capacity: The capacity for a number of tokens; None without that number.
        learning_rate: A learning rate to start with; None if it was not asked for and is not known.
    """

    coverage: Coverage | None = None
    forgotten: tuple[str, ...] = ()
    capacity: Capacity | None = None
    learning_rate: LearningRate | None = None

    def lines(self) -> list[str]:
        """Return the advice, one line for each remark."""
        parts = (self.capacity, self.learning_rate)
        warning = None if self.coverage is None else self.coverage.line()
        lines = [] if warning is None else [warning]
        return [*lines, *self.forgotten, *(part.line() for part in parts if part is not None)]


@dataclasses.dataclass(frozen=True)
class Spending:
    """The use of a budget for the ranks of a plan.

    Attributes:
        limit: The budget.
        used: Parameters or bytes of the adapter.
        unit: The unit of both.
        kept: Share of the squared norm of all gradients in the directions that the ranks allow.
        equal_rank: The largest rank that every site could have within the budget; 0 if there is none.
        equal_kept: The value of ``kept`` if every site had that rank.
    """

    limit: int
    used: int
    unit: Literal["bytes", "parameters"]
    kept: float
    equal_rank: int
    equal_kept: float

    def line(self) -> str:
        """Return the use of the budget as a line of text."""
        text = (
            f"budget: {self.used:,} of {self.limit:,} {self.unit}; the ranks hold {100 * self.kept:.3g} % of "
            "the gradients' squared norm"
        )
        if not self.equal_rank:
            return text
        return f"{text}, r={self.equal_rank} everywhere {100 * self.equal_kept:.3g} %"
