"""The whole job on one model: plan, rewrite, train, merge, count, export. One row comes out.

Stages fail one by one: what a stage raises is a line in the row, and those that do not need its
result go on.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.api import merge, plan, rewrite
from lora_fx.config import LoraConfig
from lora_fx.tools.zoo import numbers
from lora_fx.tools.zoo.counter import count_weights, unseen
from lora_fx.tools.zoo.entries import Entry, Inputs, call
from lora_fx.tools.zoo.row import MERGE_TOLERANCE, Row
from lora_fx.tools.zoo.training import Reached, check_gradients, train

__all__ = ["run_job"]

CONFIG = LoraConfig(r=4, target_modules=None)
_LINE = 300


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
        self.reference: Any = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage and keeps what it raises."""
        self.row.stage = name
        self.begin(self.row)
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            logging.getLogger("lora_fx").debug("%s: %s", self.entry.name, name, exc_info=error)
            self.row.errors[name] = _one_line(error)
        self.row.seconds[name] = time.perf_counter() - began

    def run(self, *, onnx: bool) -> None:
        """Every stage; the row then says that none is going on."""
        self.run_stages(onnx=onnx)
        self.row.stage = ""

    def run_stages(self, *, onnx: bool) -> None:
        row, built = self.row, None
        with self.stage("build"):
            built = self.entry.build()
            self.reference = self.output(*built)
        if built is None or "build" in row.errors:
            return
        model, inputs = built
        row.model = type(model).__name__
        row.parameters = sum(p.numel() for p in model.parameters())
        before = numbers.fingerprint(model)
        self.plan_and_count(model, inputs)
        adapted = None
        with self.stage("rewrite"):
            adapted = rewrite(model, CONFIG, inputs)
        merged = None
        reached = Reached(inputs, self.reference)
        if adapted is not None:
            with self.stage("outputs"):
                self.compare(model, adapted, inputs)
            with self.stage("gradients"):
                check_gradients(self.entry, model, adapted, reached, row)
            with self.stage("training"):
                row.losses = train(self.entry, adapted, reached)
            with self.stage("merge"):
                merged = merge(adapted.eval()).eval()
                self.compare_merged(model, adapted, merged, inputs)
        if onnx:
            self.export(model, merged, inputs)
        row.argument = numbers.what_changed(before, numbers.fingerprint(model))

    def output(self, model: nn.Module, inputs: Inputs) -> Any:
        """One call without gradients, on the seed of this model."""
        torch.manual_seed(0)
        with torch.no_grad():
            return call(model, inputs)

    def plan_and_count(self, model: nn.Module, inputs: Inputs) -> None:
        row, planned = self.row, None
        with self.stage("plan"):
            planned = plan(model, CONFIG, inputs)
            row.frontend, row.frontend_notes = planned.frontend, list(planned.notes)
            row.adapted = len(planned.sites)
            row.rejected = len(planned.rejections)
            row.found = row.adapted + len(planned.skipped) + row.rejected
            row.reasons = {r.name or "(root)": r.reason for r in planned.rejections}
        if planned is None:
            return
        with self.stage("counter"):
            # On a copy: some models count their calls.
            count = count_weights(copy.deepcopy(model), inputs)
            row.counted = len(count.direct) + len(count.computed)
            row.unseen = list(unseen(count, planned))

    def compare(self, model: nn.Module, adapted: nn.Module, inputs: Inputs) -> None:
        found = self.output(adapted.eval(), inputs)
        self.row.output_error = numbers.difference(found, self.reference)
        self.row.train_error = self.train_error(model, adapted, inputs, torch.float32)
        if self.row.train_error > MERGE_TOLERANCE:
            # Batch norm over two values makes a rounding as large as it likes: look again in fp64.
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                doubled = numbers.in_double(inputs)
                self.row.train_error = self.train_error(model, adapted, doubled, torch.float64)

    def train_error(
        self, model: nn.Module, adapted: nn.Module, inputs: Inputs, dtype: torch.dtype
    ) -> float:
        original, again = copy.deepcopy(model).train(), copy.deepcopy(adapted).train()
        if dtype == torch.float64:
            original, again = original.double(), again.double()
        return numbers.difference(self.output(again, inputs), self.output(original, inputs))

    def compare_merged(
        self, model: nn.Module, adapted: nn.Module, merged: nn.Module, inputs: Inputs
    ) -> None:
        row = self.row
        expected, found = self.output(adapted, inputs), self.output(merged, inputs)
        row.merge_error = numbers.difference(found, expected)
        same_classes = [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
        row.own_class = same_classes and merged.state_dict().keys() == model.state_dict().keys()
        if row.merge_error > MERGE_TOLERANCE:
            row.merge_error_fp64 = self.merge_error_in_double(adapted, inputs)

    def merge_error_in_double(self, adapted: nn.Module, inputs: Inputs) -> float | None:
        """None where the model does not run in fp64."""
        doubled, exact = numbers.in_double(inputs), copy.deepcopy(adapted).double()
        try:
            expected = self.output(exact, doubled)
            return numbers.difference(self.output(merge(exact).eval(), doubled), expected)
        except (RuntimeError, TypeError, ValueError):
            return None

    def export(self, model: nn.Module, merged: nn.Module | None, inputs: Inputs) -> None:
        from lora_fx.export.onnx import export_onnx

        row = self.row
        row.torch_onnx = False
        with self.stage("torch.onnx"):
            args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
            copied = copy.deepcopy(model)
            torch.onnx.export(copied, args, kwargs=kwargs, dynamo=True, verbose=False)
            row.torch_onnx = True
        if merged is None:
            return
        row.exported = False
        with self.stage("export_onnx"), tempfile.TemporaryDirectory() as folder:
            report = export_onnx(merged, Path(folder) / "model.onnx", inputs)
            row.exported, row.parity = report.verified, report.max_rel_error


def _one_line(error: BaseException) -> str:
    # torch.onnx says first how far it got, and what stopped it in the error that caused this one.
    while type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", re.sub(r"\s+", " ", text)).strip()
    return f"{type(error).__name__}: {text}"[:_LINE]


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
