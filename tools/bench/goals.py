"""The goals beside what was measured, worked out from the sections' results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_fx.tools.bench import export_peers, guards, onnx_latency, quantized_quality, verbs
from lora_fx.tools.bench.contenders import AGAIN, EXPORTED, FROZEN, OURS, PEFT, name_of
from lora_fx.tools.bench.measure import ratio
from lora_fx.tools.bench.one_linear import Cell, Shape
from lora_fx.tools.bench.step_sections import DORA, LORA
from lora_fx.tools.bench.steps import Measured

__all__ = ["COLUMNS", "rows"]

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a goal stands.

    Attributes:
        measured: The figures.
        excess: What is measured less what is allowed, in the goal's unit: met if it is not positive.
        unit: Of the excess.
    """

    measured: str
    excess: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.excess <= 0

    def __str__(self) -> str:
        return "yes" if self.met else f"no, by {self.excess:.2g}{self.unit}"


COLUMNS = ("workload", "PEFT, when the goal was set", "goal", "measured", "met", "what bounds it")
"""Of the table."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """A goal.

    Attributes:
        workload: What is measured.
        peft: What PEFT took when the goal was set.
        goal: The words of the goal.
        section: Whose results it needs.
        bound: The section that shows what keeps the figure from getting lower.
        key: Of the result that it needs, or None for all of them.
        judge: Gives the verdict on it, or None if what it needs was not measured.
    """

    workload: str
    peft: str
    goal: str
    section: str
    bound: str
    key: Any
    judge: Callable[[Any], Verdict | None]

    def verdict(self, results: Mapping[str, Any]) -> Verdict | None:
        """How it stands, or None if what it needs was not measured."""
        found = results.get(self.section)
        if found is None:
            return None
        if self.key is None:
            return self.judge(found)
        return self.judge(found[self.key]) if self.key in found else None


def rows(
    results: Mapping[str, Any], reference: Callable[[str], str] = lambda section: section
) -> list[tuple[str, ...]]:
    """The table's cells: every goal, measured or not.

    Args:
        results: What was measured, by section.
        reference: How the page refers to a section: a goal that is missed names the one that shows why.
    """
    table: list[tuple[str, ...]] = []
    for goal in GOALS:
        found = goal.verdict(results)
        said = ("not measured", "–") if found is None else (found.measured, str(found))
        why = reference(goal.bound) if found is not None and not found.met else ""
        table.append((goal.workload, goal.peft, goal.goal, *said, why))
    return table


def _overheads(found: Measured, dropout: float) -> tuple[list[float], str]:
    """O of ours, of PEFT's and of ours with example inputs, and what is said of them."""
    ours, peft, shared = medians = [
        found.overhead(name_of(name, dropout)).median for name in (OURS, PEFT, EXPORTED)
    ]
    return medians, f"{ours:.2f}; with example inputs {shared:.2f}; PEFT {peft:.2f}"


def _above_floor(found: Measured) -> Verdict:
    floor = found.floor or 1.0
    (ours, peft, _), text = _overheads(found, 0)
    return Verdict(f"{text}; F {floor:.3f}", ours - floor - (peft - floor) / 2)


def _with_dropout(found: Measured) -> Verdict:
    (ours, *_), text = _overheads(found, 0.05)
    return Verdict(text, ours - 1.20)


def _beyond(found: Measured, *contenders: tuple[str, float]) -> list[float] | None:
    """MiB that these save beyond the frozen step, with each dropout; None if one is not known."""
    sizes = [found.saved_beyond(name_of(*one)) for one in contenders]
    known = [size / _MIB for size in sizes if size is not None]
    return known if len(known) == len(sizes) else None


def _saved(dropout: float, most: float) -> Callable[[Measured], Verdict | None]:
    def judge(found: Measured) -> Verdict | None:
        sizes = _beyond(found, *((name, dropout) for name in (OURS, PEFT, EXPORTED)))
        if sizes is None:
            return None
        ours, peft, shared = sizes
        text = f"{ours:.1f} MiB; with example inputs {shared:.1f}; PEFT {peft:.1f}"
        return Verdict(text, ours - most, " MiB")

    return judge


def _dora_saved(found: Measured) -> Verdict | None:
    ours, theirs = (f"{library} {DORA}" for library in (OURS, PEFT))
    sizes = _beyond(found, (ours, 0), (ours, 0.05), (theirs, 0))
    if sizes is None:
        return None
    plain, dropped, peft = sizes
    return Verdict(f"{plain:.1f} MiB; p = 0.05 {dropped:.1f}; PEFT {peft:.1f}", plain - 25, " MiB")


def _dora_time(found: Measured) -> Verdict:
    ours, peft = (
        ratio(
            *(found.steps[name_of(f"{library} {kind}", 0)].sample for kind in (DORA, LORA))
        ).median
        for library in (OURS, PEFT)
    )
    return Verdict(f"{ours:.2f} × LoRA; PEFT {peft:.2f} × LoRA", ours - 1.15)


def _experts(found: Measured) -> Verdict:
    ours, peft = (found.overhead(name).median for name in (OURS, PEFT))
    return Verdict(f"{ours:.2f}; PEFT {peft:.2f}", ours - 1.25)


def _nf4_time(dropout: float) -> Callable[[Measured], Verdict]:
    """Whether a step takes no longer than PEFT's, but for what the frozen step under two names shows."""

    def judge(found: Measured) -> Verdict:
        names = [name_of(name, dropout) for name in (OURS, PEFT)]
        ours, peft = (found.overhead(name).median for name in names)
        # Within a turn: of two medians each has a slow minute of its own.
        beside = ratio(*(found.steps[name].sample for name in names))
        noise = max(1.0, found.overhead(AGAIN).high)
        text = f"{ours:.2f}; PEFT {peft:.2f}; beside it {beside.median:.2f}; A/A {noise:.2f}"
        return Verdict(text, beside.median - noise)

    return judge


def _nf4_saved(found: Measured) -> Verdict | None:
    """Whether a step keeps no values of weights, and no more than PEFT's."""
    names = [(name, p) for p in (0, 0.05) for name in (OURS, PEFT)]
    sizes = _beyond(found, *names)
    if sizes is None:
        return None
    plain, peft, dropped, their_dropped = sizes
    dense = max(found.look.dense[name_of(*one)] for one in names if one[0] == OURS) / _MIB
    text = (
        f"{plain:.1f} MiB, of weights {dense:.1f}; p = 0.05 {dropped:.1f}; "
        f"PEFT {peft:.1f} and {their_dropped:.1f}"
    )
    return Verdict(text, max(dense, plain - peft, dropped - their_dropped), " MiB")


def _nf4_quality(learned: quantized_quality.Learned) -> Verdict:
    """Whether adapters over NF4 learn what those over fp32 do."""
    names = (quantized_quality.DENSE, quantized_quality.NF4, quantized_quality.THEIRS)
    dense, ours, peft = (100 * learned.mean(name) for name in names)
    text = f"{ours:.1f} %; over fp32 {dense:.1f}; PEFT over NF4 {peft:.1f}"
    return Verdict(text, learned.lost(quantized_quality.NF4) - 1, " points")


def _rewrite(found: verbs.Scale) -> Verdict:
    ours, peft = (found.samples[name].median for name in (OURS, PEFT))
    return Verdict(f"{ours:.3f} s; PEFT {peft:.3f} s", ours - 0.15, " s")


def _linear_growth(found: Mapping[str, verbs.Scale]) -> Verdict | None:
    if not {"7B", "70B"} <= found.keys():
        return None
    small, large = (found[name].per_thousand for name in ("7B", "70B"))
    text = f"{1e3 * small:.1f} ms per thousand nodes at 7B, {1e3 * large:.1f} at 70B"
    return Verdict(text, large / small - 1.25)


def _guards(found: guards.Found) -> Verdict:
    portions = {case.title: case.portion.median for case in found.cases}
    text = "; ".join(f"{title}: {100 * portion:.2f} %" for title, portion in portions.items())
    return Verdict(text, 100 * max(portions.values()) - 1, " %")


def _second_step(found: guards.Found) -> Verdict:
    off = found.steps[guards.OFF]
    second, again = (ratio(found.steps[name], off) for name in (guards.SECOND, guards.AGAIN))
    # What the same step under a second name shows is noise, whichever of the two it is beside.
    return Verdict(f"{second}; A/A {again}", second.median - max(again.high, 1 / again.low))


def _merge(found: Mapping[str, verbs.Merged]) -> Verdict:
    names = (OURS, verbs.OURS_INTO, verbs.PEFT_MERGE, verbs.BOUND)
    ours, into, peft, bound = (found[name].sample.median for name in names)
    text = (
        f"into=base {into:.3f} s; a new model {ours:.3f}; PEFT {peft:.3f}; addmm_ alone {bound:.3f}"
    )
    # Like with like: PEFT writes over the model that it is given.
    return Verdict(text, into - peft / 2, " s")


def _temporaries(found: Mapping[str, verbs.Merged]) -> Verdict:
    ours, peft = (found[name] for name in (verbs.OURS_INTO, verbs.PEFT_MERGE))
    text = (
        f"largest tensor {ours.memory.largest / _MIB:.1f} MiB, W {ours.weight / _MIB:.1f}; "
        f"PEFT {peft.memory.largest / _MIB:.1f}"
    )
    # What should not be there at all is missed by all of it.
    too_large = ours.memory.largest if ours.memory.largest >= ours.weight else 0
    return Verdict(text, too_large / _MIB, " MiB")


def _rounding(found: Mapping[str, Mapping[str, verbs.MergeError]]) -> Verdict:
    ours, peft = (max(one[name].largest for one in found.values()) for name in (OURS, PEFT))
    return Verdict(f"{ours:.3f} ulp; PEFT {peft:.3f}", ours - 0.5005, " ulp")


def _gpu(found: Mapping[Cell, Any]) -> Verdict:
    frozen = found[Cell(FROZEN)][0]
    ours, peft = (ratio(found[Cell(name, 16, 0.0)][0], frozen).median for name in (OURS, PEFT))
    return Verdict(f"{ours:.2f}; PEFT {peft:.2f}", ours - 1.15)


def _exported(found: Mapping[tuple[str, str, str], export_peers.Row]) -> Verdict:
    ours = {key: row for key, row in found.items() if key[2].startswith(OURS)}
    errors = [row.parity for row in ours.values() if row.parity is not None]
    text = f"{len(errors)} of {len(ours)} files, largest error {max(errors, default=0):.1e}"
    return Verdict(text, sum(row.outcome != "yes" for row in ours.values()), " files")


def _merged_run(found: Mapping[tuple[str, str], onnx_latency.Latency]) -> Verdict:
    # What the same file under a second name shows is noise.
    excesses = {}
    for latency in found.values():
        for samples in latency.runs.values():
            base = samples[onnx_latency.BASE]
            merged, again = (
                ratio(samples[name], base) for name in (onnx_latency.MERGED, onnx_latency.AGAIN)
            )
            excesses[merged.median - max(1.0, again.high)] = f"{merged.median:.2f}; A/A {again}"
    worst = max(excesses)
    return Verdict(excesses[worst], worst)


def _swappable_run(found: Mapping[tuple[str, str], onnx_latency.Latency]) -> Verdict:
    worst, floor = max(
        (ratio(samples[onnx_latency.ONE], samples[onnx_latency.MERGED]).median, latency.floor)
        for latency in found.values()
        for samples in latency.runs.values()
    )
    return Verdict(f"{worst:.2f} at most; F {floor:.3f}", worst - 1.05)


def _switching(found: Mapping[tuple[str, str], onnx_latency.Latency]) -> Verdict:
    worst = 1e3 * max(map(onnx_latency.switch_time, found.values()))
    return Verdict(f"{worst:.3f} ms at most", worst - 1, " ms")


_LLAMA = "Llama 4 × 512, p = "
_HALF_OF_PEFTS = "at most half of PEFT's overhead above the floor F"
_AS_PEFT = "≤ PEFT's, within noise"
_NO_WEIGHTS = "no dequantized weight, and no more than PEFT's"
_NEAR_FP32 = "within 1 point of fp32"
_ONE_ROUNDING = "one rounding: half a ulp"
_NO_TEMPORARY = "no temporary of the size of W"
_HALF_TIME = "≤ half of PEFT's"
_UNWATCHED = "second step / a step without a watch"
_GPU = "O, H100, bf16, d = 4096, eager"
_EQUAL = "every file equal to PyTorch"
_LINEAR = "linear in the number of nodes (time a node ≤ 1.25 times)"

_CPU = "cpu, float32"
_HALF = "cpu, bfloat16"
_H100 = Shape("cuda, bfloat16", 4096, 2048)

_STEP, _DORA, _SAVED, _PROFILE = "llama_step", "dora_step", "saved_step", "profile_step"
_EXPORT, _RUN, _GUARDS, _EXPERT = "export_peers", "onnx_latency", "guards", "expert_step"
_NF4, _LEARNT = "quantized_step", "quantized_quality"
_MERGE, _SCALE, _ERROR, _ONE = "merge_time", "rewrite_scale", "merge_error", "one_linear"

_ROWS: tuple[tuple[str, str, str, str, str, Any, Callable[[Any], Verdict | None]], ...] = (
    (f"O, {_LLAMA}0", "1.14–1.23", _HALF_OF_PEFTS, _STEP, _PROFILE, _CPU, _above_floor),
    (f"O, {_LLAMA}0.05", "1.53–1.63", "≤ 1.20", _STEP, _PROFILE, _CPU, _with_dropout),
    (f"saved, {_LLAMA}0", "18.6 MiB", "≤ 18 MiB", _STEP, _SAVED, _CPU, _saved(0.0, 18)),
    (f"saved, {_LLAMA}0.05", "66.4 MiB", "≤ 24 MiB", _STEP, _SAVED, _CPU, _saved(0.05, 24)),
    ("saved, DoRA", "156 MiB", "≤ 25 MiB", _DORA, _SAVED, _CPU, _dora_saved),
    ("O, DoRA", "1.5 × LoRA", "≤ 1.15 × LoRA", _DORA, _PROFILE, _CPU, _dora_time),
    ("O, experts", "3.4", "≤ 1.25", _EXPERT, _EXPERT, _CPU, _experts),
    ("O, NF4 base, p = 0", "1.10", _AS_PEFT, _NF4, _NF4, _CPU, _nf4_time(0)),
    ("O, NF4 base, p = 0.05", "1.28", _AS_PEFT, _NF4, _NF4, _CPU, _nf4_time(0.05)),
    ("saved, NF4 base", "14.0 and 49.8 MiB", _NO_WEIGHTS, _NF4, _NF4, _CPU, _nf4_saved),
    ("accuracy, NF4 base", "72.3 %", _NEAR_FP32, _LEARNT, _LEARNT, _CPU, _nf4_quality),
    ("rewrite, Llama-7B, all-linear", "0.39 s", "≤ 0.15 s", _SCALE, _SCALE, "7B", _rewrite),
    ("rewrite, 7B to 70B", "", _LINEAR, _SCALE, _SCALE, None, _linear_growth),
    ("guards of a forward", "", "≤ 1 % of it", _GUARDS, _GUARDS, None, _guards),
    (_UNWATCHED, "", "1.00 within noise", _GUARDS, _GUARDS, None, _second_step),
    ("merge, 105M weights, fp32", "0.58 s", _HALF_TIME, _MERGE, _MERGE, _CPU, _merge),
    ("merge, 105M weights, bf16", "0.17 s", _HALF_TIME, _MERGE, _MERGE, _HALF, _merge),
    ("merge, memory", "16 MiB", _NO_TEMPORARY, _MERGE, _MERGE, _CPU, _temporaries),
    ("merge, error in half types", "", _ONE_ROUNDING, _ERROR, _ERROR, None, _rounding),
    (_GPU, "1.6–2.1 (model)", "≤ 1.15", _ONE, _ONE, _H100, _gpu),
    ("export, PEFT's folders", "", _EQUAL, _EXPORT, _EXPORT, None, _exported),
    ("run, merged / base", "", "1.00 within noise", _RUN, _RUN, None, _merged_run),
    ("run, swappable / merged, r = 16", "", "≤ 1.05", _RUN, _RUN, None, _swappable_run),
    ("switch of adapters", "", "< 1 ms, no session loaded", _RUN, _RUN, None, _switching),
)
GOALS = tuple(Goal(*row) for row in _ROWS)
"""In the order of the table."""
