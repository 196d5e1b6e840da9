"""The whole job on one model: plan, rewrite, train, merge, count, export. One row comes out.

Stages fail one by one: what a stage raises is a line in the row, and those that do not need its
result go on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime as dt
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lora_fx.api import merge, plan, rewrite, trainable_parameters
from lora_fx.config import LoraConfig
from lora_fx.ir import Plan
from lora_fx.passes.capture import Count, count_weights, normalize
from lora_fx.tools.zoo.entries import Entry, Inputs, call
from lora_fx.tools.zoo.oracle import (
    Narrowest,
    Verdict,
    difference,
    fingerprint,
    floats,
    in_double,
    judge,
    what_changed,
)
from lora_fx.tools.zoo.report import MERGE_TOLERANCE, PARTS, Row, scrubbed

__all__ = ["run_job"]


def unseen(count: Count, plan: Plan) -> tuple[str, ...]:
    """Weights that were counted and that the plan does not mention: neither adapted nor refused."""
    known: set[str] = set()
    for site in [*(row.site for row in plan.sites), *(row.site for row in plan.skipped)]:
        known |= {site.weight, *site.tied_to}
    refused = {rejection.name for rejection in plan.rejections}

    def mentioned(name: str) -> bool:
        owner = name.rpartition(".")[0]
        holder = name.partition(".parametrizations.")[0]
        return name in known or bool({name, owner, holder} & refused)

    found = [" = ".join(sorted(names)) for names in count.direct if not any(map(mentioned, names))]
    found += [
        f"computed from {', '.join(sorted(names))}"
        for names in count.computed
        if not any(map(mentioned, names))
    ]
    return tuple(found)


_RANK = 4
_LINE = 300

T = TypeVar("T")


def run_job(entry: Entry, *, onnx: bool = True, begin: Callable[[Row], None] | None = None) -> Row:
    """Runs every stage on one model.

    Args:
        entry: The model.
        onnx: Whether to export it; that takes most of the time.
        begin: Called with the row so far as each stage begins.

    Returns:
        The row; nothing that a model or lora_fx raises gets out.
    """
    torch.set_num_threads(1)
    row = Row(entry.name, entry.group, entry.note)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        _Job(entry, row, begin or (lambda _: None)).run(onnx=onnx)
    return row


class _Job:
    def __init__(self, entry: Entry, row: Row, begin: Callable[[Row], None]) -> None:
        self.entry, self.row, self.begin = entry, row, begin
        self.config = LoraConfig(r=_RANK, target_modules=entry.targets)

    def stage(self, name: str, work: Callable[[], T]) -> T | None:
        """Times a stage and keeps what it raises; None then."""
        self.row.stage = name
        self.begin(self.row)
        began = time.perf_counter()
        try:
            return work()
        except Exception as error:  # noqa: BLE001  a finding, whatever it is; it goes into the row
            self.row.errors[name] = _one_line(error)
            return None
        finally:
            self.row.seconds[name] = time.perf_counter() - began

    def run(self, *, onnx: bool) -> None:
        """Every stage; the row then says that none is going on."""
        today = dt.datetime.now(tz=dt.UTC).date().isoformat()
        self.row.dates = dict.fromkeys(PARTS if onnx else PARTS[:1], today)
        built = self.stage("build", self.build)
        if built is not None:
            model, reached = built
            before = fingerprint(model)
            self.work_on(model, reached, onnx=onnx)
            self.row.argument = what_changed(before, fingerprint(model))
        self.row.stage = ""

    def build(self) -> tuple[nn.Module, Reached]:
        model, inputs = self.entry.build()
        self.row.model = type(model).__name__
        self.row.parameters = sum(p.numel() for p in model.parameters())
        return model, Reached(inputs, _output(model, inputs))

    def work_on(self, model: nn.Module, reached: Reached, *, onnx: bool) -> None:
        entry, row, inputs = self.entry, self.row, reached.inputs
        planned = self.stage("plan", lambda: self.plan(model, inputs))
        if planned is not None:
            self.stage("counter", lambda: self.count(model, inputs, planned))
        merged = None
        adapted = self.stage("rewrite", lambda: rewrite(model, self.config, inputs))
        if adapted is not None:
            self.stage("outputs", lambda: self.compare(model, adapted, reached))
            self.stage("oracle", lambda: self.judge(model, reached))
            if row.frontend == "export":
                self.stage("regions", lambda: self.judge_regions(model, reached))
            row.losses = self.stage("training", lambda: train(entry, adapted, reached))
            merged = self.stage("merge", lambda: self.merge(model, adapted, inputs))
        if onnx:
            row.torch_onnx = bool(self.stage("torch.onnx", lambda: _by_torch(model, inputs)))
        if onnx and merged is not None:
            row.exported = bool(self.stage("export_onnx", lambda: self.export(merged, inputs)))

    def plan(self, model: nn.Module, inputs: Inputs) -> Plan:
        row, planned = self.row, plan(model, self.config, inputs)
        row.frontend, row.frontend_notes = planned.frontend, list(planned.notes)
        row.adapted = len(planned.sites)
        row.rejected = len(planned.rejections)
        row.found = row.adapted + len(planned.skipped) + row.rejected
        row.reasons = {r.name or "(root)": r.reason for r in planned.rejections}
        return planned

    def count(self, model: nn.Module, inputs: Inputs, planned: Plan) -> None:
        # On a copy: some models count their calls.
        count = count_weights(copy.deepcopy(model), *normalize(inputs))
        self.row.counted = len(count.direct) + len(count.computed)
        self.row.unseen = list(unseen(count, planned))

    def compare(self, model: nn.Module, adapted: nn.Module, reached: Reached) -> None:
        inputs = reached.inputs
        found = _output(adapted.eval(), inputs)
        self.row.output_error = difference(found, reached.reference)
        self.row.train_error = _train_error(model, adapted, inputs)
        if self.row.train_error > MERGE_TOLERANCE:
            # Batch norm over two values makes a rounding as large as it likes: look again in fp64.
            exact = _where_fp64_runs(lambda: _train_error(model, adapted, inputs, double=True))
            self.row.train_error = self.row.train_error if exact is None else exact

    def judge(self, model: nn.Module, reached: Reached) -> None:
        row = self.row
        verdict, dtype = judge_sites(self.entry, model, reached, self.config)
        row.judged, row.unreached = len(verdict.judged), verdict.unreached
        row.passed_by, row.stray = verdict.passed_by, verdict.stray
        row.oracle_error, row.tolerance = verdict.output_error, verdict.tolerance
        row.gradient_worst = verdict.worst
        row.gradient_error = verdict.errors.get(verdict.worst, 0.0)
        row.dtype = str(dtype).removeprefix("torch.")

    def judge_regions(self, model: nn.Module, reached: Reached) -> None:
        """The same for the layers beneath a graph of the whole model, which other calls go to."""
        verdict, _ = judge_sites(self.entry, model, reached, self.config, examples=False)
        self.row.regions_judged = len(verdict.judged) + len(verdict.unreached)
        self.row.regions_passed_by = verdict.passed_by
        if verdict.stray or (verdict.output_error > verdict.tolerance and not verdict.passed_by):
            self.row.regions_passed_by["the outputs"] = f"off by {verdict.output_error:.0e}"

    def merge(self, model: nn.Module, adapted: nn.Module, inputs: Inputs) -> nn.Module:
        row, merged = self.row, merge(adapted.eval()).eval()
        row.merge_error = difference(_output(merged, inputs), _output(adapted, inputs))
        same_classes = [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
        row.own_class = same_classes and merged.state_dict().keys() == model.state_dict().keys()
        if row.merge_error > MERGE_TOLERANCE:
            row.merge_error_fp64 = _where_fp64_runs(lambda: _merge_error_fp64(adapted, inputs))
        return merged

    def export(self, merged: nn.Module, inputs: Inputs) -> bool:
        from lora_fx.export.onnx import export_onnx

        with tempfile.TemporaryDirectory() as folder:
            report = export_onnx(merged, Path(folder) / "model.onnx", inputs)
        self.row.parity = report.max_rel_error
        return report.verified


def _output(model: nn.Module, inputs: Inputs) -> Any:
    """One call without gradients, on the same seed each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return call(model, inputs)


def _train_error(
    model: nn.Module, adapted: nn.Module, inputs: Inputs, *, double: bool = False
) -> float:
    original, rewritten = copy.deepcopy(model).train(), copy.deepcopy(adapted).train()
    if double:
        original, rewritten = original.double(), rewritten.double()
        inputs = in_double(inputs)
    return difference(_output(rewritten, inputs), _output(original, inputs))


def _merge_error_fp64(adapted: nn.Module, inputs: Inputs) -> float:
    doubled, exact = in_double(inputs), copy.deepcopy(adapted).double()
    return difference(_output(merge(exact).eval(), doubled), _output(exact, doubled))


def _where_fp64_runs(measure: Callable[[], float]) -> float | None:
    """None for a model that has fp32 written into it."""
    try:
        return measure()
    except (RuntimeError, TypeError, ValueError):
        return None


def _by_torch(model: nn.Module, inputs: Inputs) -> bool:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    torch.onnx.export(copy.deepcopy(model), args, kwargs=kwargs, dynamo=True, verbose=False)
    return True


def _one_line(error: BaseException) -> str:
    # torch.onnx says first how far it got, and what stopped it in the error that caused this one.
    while type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", re.sub(r"\s+", " ", text)).strip()
    return f"{type(error).__name__}: {scrubbed(text)}"[:_LINE]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of libraries are not what a row is about."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            yield
    finally:
        logging.disable(before)


STEPS = 20
_RATES = (5e-3, 5e-4, 5e-5)


@dataclass(frozen=True)
class Reached:
    """One call of a model.

    Attributes:
        inputs: Its arguments.
        reference: What the original returns.
    """

    inputs: Inputs
    reference: Any


def judge_sites(
    entry: Entry, model: nn.Module, reached: Reached, config: LoraConfig, *, examples: bool = True
) -> tuple[Verdict, torch.dtype]:
    """Compares every site with the dense oracle, in fp64 where the model runs in it.

    In eval mode, so that no layer is left out by chance. The model is rewritten once more, since a graph of
    the whole model is one for the dtype that it was made with.

    Args:
        entry: The model's entry.
        model: The original; it is copied.
        reached: The call and the original's result.
        config: What it is rewritten with.
        examples: Whether ``rewrite`` gets the inputs of the call, too.

    Returns:
        What differs, and the dtype in which it was looked at.
    """
    exact = in_fp64(model, reached.inputs)
    dtype = torch.float32 if exact is None else torch.float64
    original, inputs, narrowest = exact or (model, reached.inputs, dtype)
    adapted = rewrite(original, config, inputs if examples else None).eval()
    here = dataclasses.replace(reached, inputs=inputs)
    verdict = judge(original, adapted, lambda m: _output_and_loss(entry, m, here), narrowest)
    return verdict, dtype


def in_fp64(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs, torch.dtype] | None:
    """A copy of a model and of its inputs in fp64, and the narrowest dtype that it computes in.

    None for a model that has fp32 written into it in such a way that it does not run, or that gives what
    is not finite: a mask that is the least number of fp32 is another one in fp64.
    """
    exact, doubled = copy.deepcopy(model).double(), in_double(inputs)
    try:
        torch.manual_seed(0)
        with torch.no_grad(), Narrowest() as seen:
            output = call(exact, doubled)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not all(bool(found.isfinite().all()) for found in floats(output)):
        return None
    return exact, doubled, seen.dtype


def train(entry: Entry, adapted: nn.Module, built: Reached) -> tuple[float, float]:
    """Twenty steps of AdamW on one batch, in eval mode.

    A model of random weights may be as steep as it likes: where the loss rises, the steps are taken
    again from the start, smaller.

    Args:
        entry: The model's entry.
        adapted: The rewritten model; it is trained.
        built: The call and the original's result.

    Returns:
        The loss before the first step and after the last.
    """
    adapted.eval()
    parameters = list(trainable_parameters(adapted))
    start = [parameter.detach().clone() for parameter in parameters]
    losses: list[float] = []
    for rate in _RATES:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        losses = []
        for step in range(STEPS + 1):
            optimizer.zero_grad()
            loss = _loss(entry, adapted, built)
            losses.append(float(loss))
            if step < STEPS:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        if losses[-1] < losses[0]:
            break
    return losses[0], losses[-1]


def _loss(entry: Entry, model: nn.Module, built: Reached) -> torch.Tensor:
    return _output_and_loss(entry, model, built)[1]


def _output_and_loss(entry: Entry, model: nn.Module, built: Reached) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    output = call(model, built.inputs)
    if entry.loss is not None:
        return output, entry.loss(output)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for found, start in zip(floats(output), floats(built.reference), strict=True):
        noise = torch.randn(start.shape, generator=generator)
        if not found.requires_grad or not bool(start.isfinite().all()):
            continue
        # Away from where the model starts, by as much as its outputs vary.
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        start = start.to(found)
        spread = (start.std() if start.numel() > 1 else start.abs()).clamp_min(1e-3)
        total = total + ((found - start) / spread - noise).square().mean()
    return output, total
