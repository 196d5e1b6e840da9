"""The verdicts on what was measured over an NF4 base."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_fx.tools.bench import quantized_quality, quantized_step
from lora_fx.tools.bench.contenders import AGAIN, OURS, PEFT
from lora_fx.tools.bench.measure import ratio
from lora_fx.tools.bench.steps import name_of
from lora_fx.tools.bench.verdict import Verdict

__all__ = ["quality", "saved", "time"]

_CPU = "cpu, float32"
_MIB = 2**20


def time(dropout: float) -> Callable[[Mapping[str, quantized_step.Found]], Verdict | None]:
    """Whether a step takes no longer than PEFT's, but for what the frozen step under two names shows."""

    def judge(found: Mapping[str, quantized_step.Found]) -> Verdict | None:
        if _CPU not in found:
            return None
        measured = found[_CPU].measured
        names = [name_of(name, dropout) for name in (OURS, PEFT)]
        ours, peft = (measured.overhead(name).median for name in names)
        # Within a turn: of two medians each has a slow minute of its own.
        beside = ratio(*(measured.steps[name].sample for name in names))
        noise = max(1.0, measured.overhead(AGAIN).high)
        text = f"{ours:.2f}; PEFT {peft:.2f}; beside it {beside.median:.2f}; A/A {noise:.2f}"
        return Verdict(text, beside.median - noise)

    return judge


def saved(found: Mapping[str, quantized_step.Found]) -> Verdict | None:
    """Whether a step keeps no values of weights, and no more than PEFT's."""
    if _CPU not in found:
        return None
    names = [name_of(name, p) for p in (0, 0.05) for name in (OURS, PEFT)]
    sizes = [found[_CPU].measured.saved_beyond(name) for name in names]
    plain, peft, dropped, their_dropped = sizes
    if plain is None or peft is None or dropped is None or their_dropped is None:
        return None
    dense = max(found[_CPU].dense[name] for name in names if name.startswith(OURS))
    text = (
        f"{plain / _MIB:.1f} MiB, of weights {dense / _MIB:.1f}; p = 0.05 {dropped / _MIB:.1f}; "
        f"PEFT {peft / _MIB:.1f} and {their_dropped / _MIB:.1f}"
    )
    excess = max(dense, plain - peft, dropped - their_dropped)
    return Verdict(text, excess / _MIB, " MiB")


def quality(found: Mapping[str, quantized_quality.Learnt]) -> Verdict | None:
    """Whether adapters over NF4 learn what those over fp32 do."""
    if _CPU not in found:
        return None
    learnt = found[_CPU]
    dense, ours, peft = (
        100 * learnt.mean(name)
        for name in (quantized_quality.DENSE, quantized_quality.NF4, quantized_quality.THEIRS)
    )
    text = f"{ours:.1f} %; over fp32 {dense:.1f}; PEFT over NF4 {peft:.1f}"
    return Verdict(text, learnt.lost(quantized_quality.NF4) - 1, " points")
