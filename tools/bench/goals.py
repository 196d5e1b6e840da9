"""The goals beside what was measured, worked out from the sections' results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_fx.tools.bench import (
    dora_step,
    export_peers,
    guards,
    merge_time,
    onnx_latency,
    quantized_goals,
)
from lora_fx.tools.bench.contenders import EXPORTED, FROZEN, OURS, PEFT
from lora_fx.tools.bench.measure import ratio
from lora_fx.tools.bench.one_linear import Cell, Shape
from lora_fx.tools.bench.steps import Measured, name_of
from lora_fx.tools.bench.verdict import Verdict

__all__ = [
    "GOALS",
    "Goal",
    "columns",
    "rows",
]


_CPU = "cpu, float32"
_HALF = "cpu, bfloat16"
_CUDA = "cuda, bfloat16"
_MIB = 2**20

columns = ("workload", "PEFT, when the goal was set", "goal", "measured", "met", "what bounds it")
"""Of the table."""

Results = Mapping[str, Any]
"""What sections have found, by their name."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """A goal.

    Attributes:
        workload: What is measured.
        peft: What PEFT took when the goal was set.
        goal: The words of the goal.
        section: Whose results it needs.
        bound: The section that shows what keeps the figure from getting lower.
        judge: Gives the verdict on them, or None if what it needs was not measured.
    """

    workload: str
    peft: str
    goal: str
    section: str
    bound: str
    judge: Callable[[Any], Verdict | None]


def rows(
    results: Results, reference: Callable[[str], str] = lambda section: section
) -> list[tuple[str, ...]]:
    """The table's cells: every goal, measured or not.

    Args:
        results: What was measured.
        reference: How the page refers to a section: a goal that is missed names the one that shows why.
    """
    table: list[tuple[str, ...]] = []
    for goal in GOALS:
        found = goal.judge(results[goal.section]) if goal.section in results else None
        said = ("not measured", "–") if found is None else (found.measured, str(found))
        why = reference(goal.bound) if found is not None and not found.met else ""
        table.append((goal.workload, goal.peft, goal.goal, *said, why))
    return table


def _above_floor(found: Mapping[str, Measured]) -> Verdict:
    measured = found[_CPU]
    floor = measured.floor or 1.0
    ours, peft, shared = (
        measured.overhead(name_of(name, 0)).median for name in (OURS, PEFT, EXPORTED)
    )
    text = f"{ours:.2f}; with example inputs {shared:.2f}; PEFT {peft:.2f}; F {floor:.3f}"
    return Verdict(text, ours - floor - (peft - floor) / 2)


def _with_dropout(found: Mapping[str, Measured]) -> Verdict:
    ours, peft, shared = (
        found[_CPU].overhead(name_of(name, 0.05)).median for name in (OURS, PEFT, EXPORTED)
    )
    text = f"{ours:.2f}; with example inputs {shared:.2f}; PEFT {peft:.2f}"
    return Verdict(text, ours - 1.20)


def _saved(dropout: float, most: float) -> Callable[[Mapping[str, Measured]], Verdict | None]:
    def judge(found: Mapping[str, Measured]) -> Verdict | None:
        ours, peft, shared = (
            found[_CPU].saved_beyond(name_of(name, dropout)) for name in (OURS, PEFT, EXPORTED)
        )
        if ours is None or peft is None or shared is None:
            return None
        text = f"{ours / _MIB:.1f} MiB; with example inputs {shared / _MIB:.1f}; PEFT {peft / _MIB:.1f}"
        return Verdict(text, ours / _MIB - most, " MiB")

    return judge


def _dora_saved(found: Mapping[str, Measured]) -> Verdict | None:
    plain, dropped, peft = (
        found[_CPU].saved_beyond(name_of(f"{library} {dora_step.DORA}", dropout))
        for library, dropout in ((OURS, 0), (OURS, 0.05), (PEFT, 0))
    )
    if plain is None or dropped is None or peft is None:
        return None
    text = f"{plain / _MIB:.1f} MiB; p = 0.05 {dropped / _MIB:.1f}; PEFT {peft / _MIB:.1f}"
    return Verdict(text, plain / _MIB - 25, " MiB")


def _dora_time(found: Mapping[str, Measured]) -> Verdict:
    steps = found[_CPU].steps
    ours, peft = (
        ratio(
            steps[name_of(f"{library} {dora_step.DORA}", 0)].sample,
            steps[name_of(f"{library} {dora_step.LORA}", 0)].sample,
        ).median
        for library in (OURS, PEFT)
    )
    return Verdict(f"{ours:.2f} × LoRA; PEFT {peft:.2f} × LoRA", ours - 1.15)


def _experts(found: Mapping[str, Measured]) -> Verdict:
    ours, peft = (found[_CPU].overhead(name).median for name in (OURS, PEFT))
    return Verdict(f"{ours:.2f}; PEFT {peft:.2f}", ours - 1.25)


def _rewrite(found: Mapping[str, Any]) -> Verdict | None:
    if "7B" not in found:
        return None
    samples = found["7B"].samples
    ours, peft = samples[OURS].median, samples[PEFT].median
    return Verdict(f"{ours:.3f} s; PEFT {peft:.3f} s", ours - 0.15, " s")


def _guards(found: guards.Found) -> Verdict:
    portions = {case.title: case.portion.median for case in found.cases}
    text = "; ".join(f"{title}: {100 * portion:.2f} %" for title, portion in portions.items())
    return Verdict(text, 100 * max(portions.values()) - 1, " %")


def _second_step(found: guards.Found) -> Verdict:
    off = found.steps[guards.OFF]
    second, again = (ratio(found.steps[name], off) for name in (guards.SECOND, guards.AGAIN))
    # What the same step under a second name shows is noise, whichever of the two it is beside.
    return Verdict(f"{second}; A/A {again}", second.median - max(again.high, 1 / again.low))


def _linear_growth(found: Mapping[str, Any]) -> Verdict | None:
    if "7B" not in found or "70B" not in found:
        return None
    small, large = (found[name].per_thousand for name in ("7B", "70B"))
    text = f"{1e3 * small:.1f} ms per thousand nodes at 7B, {1e3 * large:.1f} at 70B"
    return Verdict(text, large / small - 1.25)


def _merge(where: str) -> Callable[[Any], Verdict | None]:
    def judge(found: Any) -> Verdict | None:
        if where not in found:
            return None
        ours, into, peft, bound = (
            found[where][name].sample
            for name in (merge_time.OURS, merge_time.OURS_INTO, merge_time.PEFT, merge_time.BOUND)
        )
        text = (
            f"into=base {into.median:.3f} s; a new model {ours.median:.3f}; PEFT {peft.median:.3f}; "
            f"addmm_ alone {bound.median:.3f}"
        )
        # Like with like: PEFT writes over the model that it is given.
        return Verdict(text, into.median - peft.median / 2, " s")

    return judge


def _temporaries(found: Any) -> Verdict | None:
    if _CPU not in found:
        return None
    ours, peft = (found[_CPU][name] for name in (merge_time.OURS_INTO, merge_time.PEFT))
    text = (
        f"largest tensor {ours.memory.largest / _MIB:.1f} MiB, W {ours.weight / _MIB:.1f}; "
        f"PEFT {peft.memory.largest / _MIB:.1f}"
    )
    # What should not be there at all is missed by all of it.
    too_large = ours.memory.largest if ours.memory.largest >= ours.weight else 0
    return Verdict(text, too_large / _MIB, " MiB")


def _rounding(found: Any) -> Verdict:
    ours = max(by_name[OURS].largest for by_name in found.values())
    peft = max(by_name[PEFT].largest for by_name in found.values())
    return Verdict(f"{ours:.3f} ulp; PEFT {peft:.3f}", ours - 0.5005, " ulp")


def _gpu(found: Mapping[Shape, Any]) -> Verdict | None:
    shape = Shape(_CUDA, 4096, 2048)
    if shape not in found:
        return None
    frozen = found[shape][Cell(FROZEN)][0]
    ours, peft = (
        ratio(found[shape][Cell(name, 16, 0.0)][0], frozen).median for name in (OURS, PEFT)
    )
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
_NO_WEIGHTS = "no dequantised weight, and no more than PEFT's"
_NEAR_FP32 = "within 1 point of fp32"
_ONE_ROUNDING = "one rounding: half a ulp"
_NO_TEMPORARY = "no temporary of the size of W"
_LINEAR = "linear in the number of nodes (time a node ≤ 1.25 times)"

_STEP, _DORA, _SAVED, _PROFILE = "llama_step", "dora_step", "saved_step", "profile_step"
_EXPORT, _RUN, _GUARDS = "export_peers", "onnx_latency", "guards"
_NF4, _LEARNT = "quantized_step", "quantized_quality"
_MERGE, _SCALE, _ERROR, _ONE = "merge_time", "rewrite_scale", "merge_error", "one_linear"

GOALS = (
    Goal(f"O, {_LLAMA}0", "1.14–1.23", _HALF_OF_PEFTS, _STEP, _PROFILE, _above_floor),
    Goal(f"O, {_LLAMA}0.05", "1.53–1.63", "≤ 1.20", _STEP, _PROFILE, _with_dropout),
    Goal(f"saved, {_LLAMA}0", "18.6 MiB", "≤ 18 MiB", _STEP, _SAVED, _saved(0.0, 18)),
    Goal(f"saved, {_LLAMA}0.05", "66.4 MiB", "≤ 24 MiB", _STEP, _SAVED, _saved(0.05, 24)),
    Goal("saved, DoRA", "156 MiB", "≤ 25 MiB", _DORA, _SAVED, _dora_saved),
    Goal("O, DoRA", "1.5 × LoRA", "≤ 1.15 × LoRA", _DORA, _PROFILE, _dora_time),
    Goal("O, experts", "3.4", "≤ 1.25", "expert_step", "expert_step", _experts),
    Goal("O, NF4 base, p = 0", "1.10", _AS_PEFT, _NF4, _NF4, quantized_goals.time(0)),
    Goal("O, NF4 base, p = 0.05", "1.28", _AS_PEFT, _NF4, _NF4, quantized_goals.time(0.05)),
    Goal("saved, NF4 base", "14.0 and 49.8 MiB", _NO_WEIGHTS, _NF4, _NF4, quantized_goals.saved),
    Goal("accuracy, NF4 base", "72.3 %", _NEAR_FP32, _LEARNT, _LEARNT, quantized_goals.quality),
    Goal("rewrite, Llama-7B, all-linear", "0.39 s", "≤ 0.15 s", _SCALE, _SCALE, _rewrite),
    Goal("rewrite, 7B to 70B", "", _LINEAR, _SCALE, _SCALE, _linear_growth),
    Goal("guards of a forward", "", "≤ 1 % of it", _GUARDS, _GUARDS, _guards),
    Goal(
        "second step / a step without a watch",
        "",
        "1.00 within noise",
        _GUARDS,
        _GUARDS,
        _second_step,
    ),
    Goal("merge, 105M weights, fp32", "0.58 s", "≤ half of PEFT's", _MERGE, _MERGE, _merge(_CPU)),
    Goal("merge, 105M weights, bf16", "0.17 s", "≤ half of PEFT's", _MERGE, _MERGE, _merge(_HALF)),
    Goal("merge, memory", "16 MiB", _NO_TEMPORARY, _MERGE, _MERGE, _temporaries),
    Goal("merge, error in half types", "", _ONE_ROUNDING, _ERROR, _ERROR, _rounding),
    Goal("O, H100, bf16, d = 4096, eager", "1.6–2.1 (model)", "≤ 1.15", _ONE, _ONE, _gpu),
    Goal("export, PEFT's folders", "", "every file equal to PyTorch", _EXPORT, _EXPORT, _exported),
    Goal("run, merged / base", "", "1.00 within noise", _RUN, _RUN, _merged_run),
    Goal("run, swappable / merged, r = 16", "", "≤ 1.05", _RUN, _RUN, _swappable_run),
    Goal("switch of adapters", "", "< 1 ms, no session loaded", _RUN, _RUN, _switching),
)
"""In the order of the table."""
