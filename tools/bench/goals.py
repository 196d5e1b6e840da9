"""Comparison of the goals in ``goals.toml`` with the results; a function here judges each goal."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_fx.tools.bench import (
    export_peers,
    generation,
    guards,
    learning,
    onnx_latency,
    step_sections,
    verbs,
)
from lora_fx.tools.bench.contenders import (
    AGAIN,
    BALANCED,
    CANONICAL,
    CHUNKED,
    EXPORTED,
    FROZEN,
    KINDS,
    LEAST,
    OTHER_KIND,
    OURS,
    OURS_AGAIN,
    PEFT,
    name_of,
)
from lora_fx.tools.bench.measure import Sample, ratio
from lora_fx.tools.bench.one_linear import Cell
from lora_fx.tools.bench.steps import Measured

__all__ = ["GOALS", "NOT_MEASURED", "Row", "gains", "rows"]

_MIB = 2**20
_LATENCIES = Mapping[tuple[str, str], onnx_latency.Latency]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Result of comparing one goal with its measured figures.

    Attributes:
        measured: The figures.
        excess: Measured minus allowed figure, in the goal's unit. The goal is met if it is not positive.
        unit: Unit of the excess.
        ours: The figure that users gain, for goals that have a text about it.
        peft: The same figure of PEFT, if there is one.
    """

    measured: str
    excess: float
    unit: str = ""
    ours: str = ""
    peft: str = ""

    @property
    def met(self) -> bool:
        """Return True if the goal is reached."""
        return self.excess <= 0

    def __str__(self) -> str:
        return "yes" if self.met else f"no, by {self.excess:.2g}{self.unit}"


NOT_MEASURED = "not measured"
"""Figures of a goal without results."""


class Row(NamedTuple):
    """Row of the page: a goal, and the verdict about it.

    Attributes:
        workload: Measured workload.
        peft: PEFT's figure when the goal was set.
        goal: Text of the goal.
        measured: The figures, or :data:`NOT_MEASURED`.
        met: ``yes``, ``no`` with the excess, or a dash.
        bound: For a missed goal, the section that shows what keeps the figure from getting lower.
    """

    workload: str
    peft: str
    goal: str
    measured: str
    met: str
    bound: str


@dataclasses.dataclass(frozen=True)
class Goal:
    """One goal, a row of ``goals.toml``.

    Attributes:
        workload: Measured workload, as the table shows it.
        goal: Text of the goal.
        section: Section whose results the goal needs.
        bound: Section that shows what keeps the figure from getting lower.
        judge: Name of the function of this module that returns the verdict, or None if results are missing.
        peft: PEFT's figure when the goal was set.
        key: Key of the result within the section, or None for all results.
        arguments: Further arguments of the function.
        gain: The measured figure in the words of a user, if the page begins with it.
    """

    workload: str
    goal: str
    section: str
    bound: str
    judge: str
    gain: str = ""
    peft: str = ""
    key: str | list[Any] | None = None
    arguments: tuple[float, ...] = ()

    def verdict(self, results: Mapping[str, Any]) -> Verdict | None:
        """Return the verdict, or None if the goal's results were not measured."""
        section_results = results.get(self.section)
        if section_results is not None and self.key is not None:
            section_results = section_results.get(
                self.key if isinstance(self.key, str) else tuple(self.key)
            )
        judge: Callable[..., Verdict | None] = globals()[self.judge]
        return None if section_results is None else judge(section_results, *self.arguments)


GOALS = tuple(
    Goal(**row)
    for row in tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))["goal"]
)
"""All goals, in the order of the table."""


def rows(
    results: Mapping[str, Any], reference: Callable[[str], str] = lambda section: section
) -> list[Row]:
    """Return a row of the page for every goal, measured or not.

    Args:
        results: Results by section.
        reference: Formats the page's reference to a section. A missed goal refers to its ``bound`` section.
    """
    table: list[Row] = []
    for goal in GOALS:
        verdict = goal.verdict(results)
        cells = (NOT_MEASURED, "–") if verdict is None else (verdict.measured, str(verdict))
        why = reference(goal.bound) if verdict is not None and not verdict.met else ""
        table.append(Row(goal.workload, goal.peft, goal.goal, *cells, why))
    return table


def gains(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what users gain: a text, the figure of lora-fx, and that of PEFT or an empty string."""
    verdicts = [(goal.gain, goal.verdict(results)) for goal in GOALS if goal.gain]
    return [(gain, verdict.ours, verdict.peft) for gain, verdict in verdicts if verdict is not None]


def _overheads(measured: Measured, dropout: float) -> tuple[list[float], str]:
    """Return the overheads of lora-fx, of PEFT, and of lora-fx with example inputs, and a text with all."""
    ours, peft, shared = medians = [
        measured.overhead(name_of(name, dropout)).median for name in (OURS, PEFT, EXPORTED)
    ]
    return medians, f"{ours:.2f}; with example inputs {shared:.2f}; PEFT {peft:.2f}"


def _beyond(measured: Measured, *contenders: tuple[str, float]) -> list[float] | None:
    """Return the MiB that each contender saves for the backward beyond the frozen model's step.

    Return None if a size is unknown.
    """
    sizes = [measured.saved_beyond(name_of(*contender)) for contender in contenders]
    known = [size / _MIB for size in sizes if size is not None]
    return known if len(known) == len(sizes) else None


def above_floor(results: Measured) -> Verdict:
    """Judge if lora-fx's overhead is above F by at most half as much as PEFT's."""
    floor = results.floor or 1.0
    (ours, peft, _), text = _overheads(results, 0)
    return Verdict(f"{text}; F {floor:.3f}", ours - floor - (peft - floor) / 2)


def with_dropout(results: Measured) -> Verdict:
    """Judge the overhead of lora-fx with dropout."""
    (ours, peft, _), text = _overheads(results, 0.05)
    return Verdict(text, ours - 1.20, ours=f"{ours:.2f}", peft=f"{peft:.2f}")


def step_time(
    results: Measured, dropout: float, most: float, base: str = FROZEN, again: str = AGAIN
) -> Verdict | None:
    """Judge if a step of lora-fx takes at most ``most`` times as long as a step of ``base``.

    ``again`` names a second run of the base, which shows the noise.
    """
    names = (name_of(OURS, dropout), name_of(PEFT, dropout), again)
    if not results.steps.keys() >= {base, *names}:
        return None
    ours, peft, noise = (
        ratio(results.steps[name].sample, results.steps[base].sample) for name in names
    )
    text = f"{ours.median:.2f}; PEFT {peft.median:.2f}; A/A {noise}"
    return Verdict(text, ours.median - most - max(0.0, noise.high - 1))


def compiled_time(results: Measured, dropout: float, most: float) -> Verdict | None:
    """Judge if a compiled step takes at most ``most`` times as long as the compiled step without adapters."""
    return step_time(
        results, dropout, most, step_sections.COMPILED_BASE, step_sections.COMPILED_AGAIN
    )


def balanced_overhead(
    results: Mapping[str, Measured], dropout: float, most: float
) -> Verdict | None:
    """Judge the overhead of the small Llama's step with ``memory="balanced"``."""
    measured = next(iter(results.values()))
    names = [name_of(name, dropout) for name in (BALANCED, PEFT, OURS, OURS_AGAIN)]
    if not measured.steps.keys() >= set(names):
        return None
    ours, peft = (measured.overhead(name).median for name in names[:2])
    again = ratio(measured.steps[names[3]].sample, measured.steps[names[2]].sample)
    text = f"{ours:.2f}; PEFT {peft:.2f}; A/A {again}"
    return Verdict(text, ours - most - max(0.0, again.high - 1))


def saved(results: Measured, dropout: float, most: float) -> Verdict | None:
    """Judge if a step saves at most ``most`` MiB more for the backward than a step without adapters."""
    sizes = _beyond(results, *((name, dropout) for name in (OURS, PEFT, EXPORTED)))
    if sizes is None:
        return None
    ours, peft, shared = sizes
    text = f"{ours:.1f} MiB; with example inputs {shared:.1f}; PEFT {peft:.1f}"
    return Verdict(text, ours - most, " MiB", f"{ours:.1f} MiB", f"{peft:.1f} MiB")


def decomposed_saved(results: Measured) -> Verdict | None:
    """Judge the bytes that a step with DoRA saves beyond the step without adapters."""
    ours, least, theirs = (f"{library} {OTHER_KIND}" for library in (OURS, BALANCED, PEFT))
    sizes = _beyond(results, (least, 0), (least, 0.05), (ours, 0), (theirs, 0))
    if sizes is None:
        return None
    plain, dropped, fast, peft = sizes
    text = (
        f"{plain:.1f} MiB; p = 0.05 {dropped:.1f}; with memory='fast' {fast:.1f}; PEFT {peft:.1f}"
    )
    return Verdict(text, plain - 25, " MiB", f"{plain:.1f} MiB", f"{peft:.1f} MiB")


def kept_in_all(results: Mapping[str, Measured]) -> Verdict | None:
    """Judge if a step with ``memory="balanced"`` saves less than a step without adapters, in every model."""
    figures, excesses = [], []
    for measured in results.values():
        own, frozen = measured.steps[name_of(BALANCED, 0)].saved, measured.steps[FROZEN].saved
        if own is None or frozen is None:
            return None
        figures.append(f"{_short(measured)} {own / _MIB:.1f} of {frozen / _MIB:.1f}")
        excesses.append((own - frozen) / _MIB)
    return Verdict(", ".join(figures) + " MiB", max(excesses), " MiB")


def time_of_balanced(results: Mapping[str, Measured]) -> Verdict:
    """Judge the time of a step with ``memory="balanced"`` relative to one with ``memory="fast"``.

    The step with ``memory="fast"`` is measured twice, which shows the noise.
    """
    figures, excesses = [], []
    for measured in results.values():
        fast = measured.steps[name_of(OURS, 0)].sample
        again, own = (
            ratio(measured.steps[name_of(name, 0)].sample, fast) for name in (OURS_AGAIN, BALANCED)
        )
        figures.append(f"{_short(measured)} {own.median:.3f}; A/A {again.median:.3f}")
        excesses.append(own.median - 1.02 - (again.high - again.low) / 2)
    return Verdict(", ".join(figures), max(excesses))


def _short(measured: Measured) -> str:
    return measured.model.partition(",")[0]


def vocabulary_peak(results: Measured) -> Verdict | None:
    """Judge if a step without all logits allocates at most a third of the memory of one with all logits."""
    names = (LEAST, CHUNKED, OURS, PEFT)
    memories = [results.steps[name_of(name, 0)].memory for name in names]
    known = [memory for memory in memories if memory is not None]
    if len(known) < len(memories):
        return None
    ours, chunked, whole, peft = (memory.peak / _MIB for memory in known)
    text = (
        f"{ours:.1f} MiB, largest tensor {known[0].largest / _MIB:.1f}; with memory='fast' {chunked:.1f}; "
        f"with all logits {whole:.1f}; PEFT {peft:.1f}"
    )
    return Verdict(text, ours - whole / 3, " MiB", f"{ours:.1f} MiB", f"{peft:.1f} MiB")


def decomposed_time(results: Measured) -> Verdict:
    """Judge the time of a step with DoRA relative to LoRA of the same library."""
    names = [[name_of(f"{library} {kind}", 0) for kind in KINDS] for library in (OURS, PEFT)]
    ours, peft = (
        ratio(results.steps[other].sample, results.steps[plain].sample).median
        for plain, other in names
    )
    noise = max(1.0, results.overhead(AGAIN).high)
    text = f"{ours:.2f} × LoRA; PEFT {peft:.2f} × LoRA; A/A {noise:.2f}"
    return Verdict(text, ours - 1.08 - (noise - 1))


def experts(results: Measured) -> Verdict:
    """Judge the overhead of adapters on the weights of experts."""
    ours, peft = (results.overhead(name).median for name in (OURS, PEFT))
    figures = f"{ours:.2f}", f"{peft:.2f}"
    return Verdict("; PEFT ".join(figures), ours - 1.25, "", *figures)


def nf4_time(results: Measured, dropout: float) -> Verdict:
    """Judge if a step over NF4 weights takes no longer than PEFT's.

    The frozen step under two names shows the noise.
    """
    names = [name_of(name, dropout) for name in (OURS, PEFT)]
    ours, peft = (results.overhead(name).median for name in names)
    # Compare within each turn, because a slow minute of the machine may hit only one of two medians.
    beside = ratio(*(results.steps[name].sample for name in names))
    noise = max(1.0, results.overhead(AGAIN).high)
    text = f"{ours:.2f}; PEFT {peft:.2f}; beside it {beside.median:.2f}; A/A {noise:.2f}"
    return Verdict(text, beside.median - noise, "", f"{ours:.2f}", f"{peft:.2f}")


def nf4_saved(results: Measured) -> Verdict | None:
    """Judge if a step over NF4 keeps no dequantized weights, and saves no more than PEFT's step."""
    names = [(name, p) for p in (0, 0.05) for name in (OURS, PEFT)]
    sizes = _beyond(results, *names)
    if sizes is None:
        return None
    plain, peft, dropped, their_dropped = sizes
    dense = (
        max(results.look.dense[name_of(*contender)] for contender in names if contender[0] == OURS)
        / _MIB
    )
    text = (
        f"{plain:.1f} MiB, of weights {dense:.1f}; p = 0.05 {dropped:.1f}; "
        f"PEFT {peft:.1f} and {their_dropped:.1f}"
    )
    return Verdict(text, max(dense, plain - peft, dropped - their_dropped), " MiB")


def nf4_quality(learned: learning.Learned) -> Verdict:
    """Judge if adapters over NF4 classify as well as adapters over fp32, up to one percentage point."""
    names = (learning.DENSE, learning.NF4, learning.THEIRS)
    dense, ours, peft = (100 * learned.mean(name) for name in names)
    text = f"{ours:.1f} %; over fp32 {dense:.1f}; PEFT over NF4 {peft:.1f}"
    return Verdict(text, learned.lost(learning.NF4) - 1, " points")


def rewrite(results: verbs.Scale) -> Verdict:
    """Judge the time of a rewrite."""
    ours, peft = (results.samples[name].median for name in (OURS, PEFT))
    figures = f"{ours:.3f} s", f"{peft:.3f} s"
    return Verdict("; PEFT ".join(figures), ours - 0.15, " s", *figures)


def curves(results: learning.Curves) -> Verdict:
    """Judge if the losses of lora-fx's trainings equal those of the plain form of LoRA.

    Their difference is compared with the difference between seeds.
    """
    parts = {name: results.apart(name) / results.between_seeds(name) for name in learning.FUSED}
    worst = max(parts, key=parts.__getitem__)
    text = (
        f"{100 * parts[worst]:.2g} % ({worst}); PEFT "
        f"{100 * results.apart(PEFT) / results.between_seeds(PEFT):.2g} %"
    )
    return Verdict(text, 100 * parts[worst] - 1, " %")


def dropped_curves(results: learning.Curves) -> Verdict:
    """Judge if trainings with other dropout masks end at the same loss as the plain form of LoRA."""
    parts = {name: abs(results.last_apart(name)) for name in learning.FUSED}
    worst = max(parts, key=parts.__getitem__)
    spread = results.spread(CANONICAL)
    peft = abs(results.last_apart(PEFT))
    text = f"{parts[worst]:.4f} apart ({worst}), spread {spread:.4f}; PEFT {peft:.4f}"
    return Verdict(text, parts[worst] - spread)


def linear_growth(results: Mapping[str, verbs.Scale]) -> Verdict | None:
    """Judge if a rewrite takes as long for each node in a large model as in a small one."""
    if not {"7B", "70B"} <= results.keys():
        return None
    small, large = (results[name].per_thousand for name in ("7B", "70B"))
    text = f"{1e3 * small:.1f} ms per thousand nodes at 7B, {1e3 * large:.1f} at 70B"
    return Verdict(text, large / small - 1.25)


def guards_of_a_forward(results: guards.GuardTimes) -> Verdict:
    """Judge the share of a forward that the guards of the graphs take, in the worst model."""
    portions = {case.title: case.portion.median for case in results.cases}
    text = "; ".join(f"{title}: {100 * portion:.2f} %" for title, portion in portions.items())
    return Verdict(text, 100 * max(portions.values()) - 1, " %")


def second_step(results: guards.GuardTimes) -> Verdict:
    """Judge if the second step of a model is as fast as a step without the watch."""
    off = results.steps[guards.OFF]
    second, again = (ratio(results.steps[name], off) for name in (guards.SECOND, guards.AGAIN))
    # The same step under a second name shows the noise, no matter which of the two is slower.
    return Verdict(f"{second}; A/A {again}", second.median - max(again.high, 1 / again.low))


def merge(results: Mapping[str, verbs.Merged], part: float) -> Verdict:
    """Judge the time of a merge into the base model, as PEFT does it.

    Args:
        results: Merges by contender.
        part: Allowed fraction of PEFT's time.
    """
    names = (OURS, verbs.OURS_INTO, verbs.PEFT_MERGE, verbs.BOUND)
    ours, into, peft, bound = (results[name].sample.median for name in names)
    text = (
        f"into=base {into:.3f} s; a new model {ours:.3f}; PEFT {peft:.3f}; addmm_ alone {bound:.3f}"
    )
    return Verdict(text, into - part * peft, " s", f"{into:.3f} s", f"{peft:.3f} s")


def temporaries(results: Mapping[str, verbs.Merged]) -> Verdict:
    """Judge if a merge makes no tensor as large as a weight. If it does, the excess is that tensor's size."""
    ours, peft = (results[name] for name in (verbs.OURS_INTO, verbs.PEFT_MERGE))
    text = (
        f"largest tensor {ours.memory.largest / _MIB:.1f} MiB, W {ours.weight / _MIB:.1f}; "
        f"PEFT {peft.memory.largest / _MIB:.1f}"
    )
    too_large = ours.memory.largest if ours.memory.largest >= ours.weight else 0
    return Verdict(text, too_large / _MIB, " MiB")


def rounding(results: Mapping[str, Mapping[str, verbs.MergeError]]) -> Verdict:
    """Judge if merged weights are rounded only once: an error of at most half a unit in the last place."""
    ours, peft = (max(errors[name].largest for errors in results.values()) for name in (OURS, PEFT))
    text = f"{ours:.3f} ulp; PEFT {peft:.3f}"
    return Verdict(text, ours - 0.5005, " ulp", f"{ours:.3f} ulp", f"{peft:.3f} ulp")


def gpu(results: Mapping[Cell, Any]) -> Verdict:
    """Judge the overhead of an adapter on one linear layer on a GPU."""
    frozen = results[Cell(FROZEN)][0]
    ours, peft = (ratio(results[Cell(name, 16, 0.0)][0], frozen).median for name in (OURS, PEFT))
    return Verdict(f"{ours:.2f}; PEFT {peft:.2f}", ours - 1.15)


def exported(results: Mapping[tuple[str, str, str], export_peers.Row]) -> Verdict:
    """Judge if every exported file computes the same as PyTorch."""
    ours = {key: row for key, row in results.items() if key[2].startswith(OURS)}
    errors = [row.parity for row in ours.values() if row.parity is not None]
    text = f"{len(errors)} of {len(ours)} files, largest error {max(errors, default=0):.1e}"
    failed = sum(row.outcome != "yes" for row in ours.values())
    return Verdict(text, failed, " files", f"{len(ours) - failed} of {len(ours)} files")


def bank_run(results: Mapping[tuple[str, str], Mapping[str, Sample]]) -> Verdict | None:
    """Judge a decoding step with a bank (an adapter for each row) relative to a run for each row."""
    steps = {step: samples for (_, step), samples in results.items() if step.startswith("decode")}
    if not steps:
        return None
    excesses = {}
    for step, samples in steps.items():
        whole, again = (
            ratio(samples[name], samples[onnx_latency.SEPARATE])
            for name in (onnx_latency.BANK, onnx_latency.SEPARATE_AGAIN)
        )
        spread = (again.high - again.low) / 2
        excesses[whole.median - 0.5 - spread] = f"{whole.median:.2f} ({step}); A/A {again}"
    worst = max(excesses)
    return Verdict(excesses[worst], worst)


def together(results: Mapping[str, Mapping[str, Sample]], reference: str, most: float) -> Verdict:
    """Judge a step of several adapters in one batch relative to the steps of ``reference``.

    The figure is that of the worst length of rows.

    Args:
        results: Times by length, then by contender.
        reference: Contender to compare with.
        most: Largest ratio that is allowed.
    """
    excesses = []
    figures = []
    for length, samples in results.items():
        whole = ratio(samples[step_sections.TOGETHER], samples[reference])
        noise = ratio(samples[step_sections.ONE_AGAIN], samples[step_sections.ONE])
        excesses.append(whole.median - most - (noise.high - noise.low) / 2)
        figures.append(f"{whole.median:.2f} ({length})")
    return Verdict(", ".join(figures), max(excesses))


def together_beside_one(results: Mapping[str, Mapping[str, Sample]]) -> Verdict:
    """Judge a step of eight adapters relative to a step of one adapter with as many rows."""
    return together(results, step_sections.ONE, 1.3)


def together_beside_separate(results: Mapping[str, Mapping[str, Sample]]) -> Verdict:
    """Judge a step of eight adapters relative to eight steps with one adapter and one row each."""
    # A step of one adapter with as many rows is the lower bound of a step that trains several.
    least = [
        ratio(samples[step_sections.ONE], samples[step_sections.SEPARATE])
        for samples in results.values()
    ]
    verdict = together(results, step_sections.SEPARATE, 0.5)
    bounds = ", ".join(f"{bound.median:.2f}" for bound in least)
    return dataclasses.replace(verdict, measured=f"{verdict.measured}; one adapter alone {bounds}")


def merged_run(results: _LATENCIES) -> Verdict:
    """Judge if a merged ONNX file runs as fast as the file of the base.

    The base under a second name shows the noise.
    """
    excesses = {}
    for latency in results.values():
        for samples in latency.runs.values():
            names = (onnx_latency.MERGED, onnx_latency.AGAIN)
            merged, again = (ratio(samples[name], samples[onnx_latency.BASE]) for name in names)
            excesses[merged.median - max(1.0, again.high)] = f"{merged.median:.2f}; A/A {again}"
    worst = max(excesses)
    return Verdict(excesses[worst], worst)


def swappable_run(results: _LATENCIES) -> Verdict:
    """Judge the time of an ONNX file that takes its adapter as inputs, relative to a merged file.

    The FLOPs of the adapter are allowed for.
    """
    excesses = {}
    for latency in results.values():
        for samples in latency.runs.values():
            whole = ratio(samples[onnx_latency.ONE], samples[onnx_latency.MERGED])
            again = ratio(samples[onnx_latency.AGAIN], samples[onnx_latency.BASE])
            excess = whole.median - 0.05 - latency.floor - max(0.0, again.high - 1)
            excesses[excess] = f"{whole.median:.2f}; F {latency.floor:.3f}; A/A {again}"
    worst = max(excesses)
    return Verdict(excesses[worst], worst)


def beside_peer(results: generation.Runs, steps: str, most: float) -> Verdict | None:
    """Judge a run of a merged file relative to the fastest file of other exporters.

    The same file twice shows the noise.

    Args:
        results: Results of the section.
        steps: Prefix of the names of the steps.
        most: Largest ratio that is allowed in each step.
    """
    excesses, figures = [], []
    for (_, step), samples in results.samples.items():
        files = [samples[name] for name in generation.FILES if name in samples]
        if not step.startswith(steps) or not files:
            continue
        fastest = min(files, key=lambda sample: sample.median)
        ours = ratio(samples[generation.MERGED], fastest).median
        again = ratio(samples[generation.AGAIN], files[0])
        excesses.append(ours - most - max(0.0, again.high - 1))
        figures.append(f"{ours:.2f} ({step}; A/A {again})")
    return Verdict(", ".join(figures), max(excesses)) if figures else None


def swapped_step(results: generation.Runs, most: float) -> Verdict | None:
    """Judge a decoding step of a file with an adapter relative to the same file without an adapter."""
    excesses, figures = [], []
    for (model, step), samples in results.samples.items():
        if step.startswith("decode"):
            swapped = ratio(samples[generation.ADAPTED], samples[generation.ALONE])
            excesses.append(swapped.median - most)
            figures.append(f"{swapped.median:.2f} ({step}; F {results.floors[model]:.3f})")
    return Verdict(", ".join(figures), max(excesses)) if figures else None


def generated(results: generation.Generated, adapted: float, most: float) -> Verdict | None:
    """Judge the time of a generated token relative to onnxruntime-genai.

    onnxruntime-genai runs in two processes. The ratio of their times is the noise, which a miss has to
    exceed.
    """
    if generation.PEER not in results.samples:
        return None
    name = generation.ADAPTED if adapted else generation.MERGED
    base = results.samples[generation.PEER]
    ours, again = ratio(results.samples[name], base), ratio(results.samples[generation.AGAIN], base)
    noise = max(0.0, again.high - 1)
    return Verdict(f"{ours.median:.2f}; A/A {again}", ours.median - most - noise)


def switching(results: _LATENCIES) -> Verdict:
    """Judge the time that a switch to another adapter adds to a run."""
    worst = 1e3 * max(map(onnx_latency.switch_time, results.values()))
    return Verdict(f"{worst:.3f} ms at most", worst - 1, " ms", f"{worst:.3f} ms")
