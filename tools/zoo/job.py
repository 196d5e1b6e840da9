"""Run all stages of the zoo on one model: plan, count, rewrite, judge, train, merge, export.

To judge a rewritten model is to compare it with the *dense oracle*: a copy of the original whose weights are
``W + s·BA``. Stages fail separately. An error of a stage is stored in the row, and stages that do not need
its result still run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime as dt
import logging
import math
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.api import merge, plan, rewrite, trainable_parameters
from lora_fx.config import LoraConfig
from lora_fx.errors import some
from lora_fx.export.fuse import Level
from lora_fx.ir import Plan, PlannedSite, require_record
from lora_fx.passes.capture import Count, count_weights, normalize, relative_difference
from lora_fx.passes.kept import tensors
from lora_fx.passes.parameters import digest_of, factors_of, part_of, rows_of
from lora_fx.passes.patterns import pattern_of
from lora_fx.tools.zoo.models import Entry, Inputs, call
from lora_fx.tools.zoo.report import MERGE_TOLERANCE, PARTS, Row, RuntimeFile, scrubbed
from lora_fx.torch_private import pytree

__all__ = [
    "Narrowest",
    "Verdict",
    "difference",
    "fingerprint",
    "floats",
    "in_double",
    "judge",
    "run_job",
    "what_changed",
]


def unseen(count: Count, plan: Plan) -> tuple[str, ...]:
    """Return the weights that the counter saw and the plan does not mention, neither adapted nor refused."""
    known: set[str] = set()
    for site in [*(row.site for row in plan.sites), *(row.site for row in plan.skipped)]:
        known |= {site.weight, *site.tied_to}
    refused = {rejection.name for rejection in plan.rejections}

    def mentioned(name: str) -> bool:
        owner = name.rpartition(".")[0]
        holder = name.partition(".parametrizations.")[0]
        return name in known or bool({name, owner, holder} & refused)

    weights = [
        " = ".join(sorted(names)) for names in count.direct if not any(map(mentioned, names))
    ]
    weights += [
        f"computed from {', '.join(sorted(names))}"
        for names in count.computed
        if not any(map(mentioned, names))
    ]
    return tuple(weights)


_RANK = 4
_DRAWN = 0.1  # standard deviation of random factors
_LINE = 300

T = TypeVar("T")


def run_job(
    entry: Entry,
    *,
    onnx: bool = True,
    optimize: Level = "standard",
    begin: Callable[[Row], None] | None = None,
) -> Row:
    """Run every stage on one model.

    Args:
        entry: The model.
        onnx: True to export it, which takes most of the time.
        optimize: Level of fusions in the export. "runtime" only exports with ONNX Runtime's operators, with
            a cache for a model that generates text.
        begin: Called with the row so far when a stage begins.

    Returns:
        The row. Errors of the model or of lora_fx are in the row and are not raised.
    """
    torch.set_num_threads(1)
    row = Row(entry.name, entry.group, entry.note)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        _Job(entry, row, begin or (lambda _: None), optimize).run(onnx=onnx)
    return row


class _Job:
    def __init__(
        self, entry: Entry, row: Row, begin: Callable[[Row], None], optimize: Level
    ) -> None:
        self.entry, self.row, self.begin, self.optimize = entry, row, begin, optimize
        self.config = LoraConfig(r=_RANK, target_modules=entry.targets)

    def stage(self, name: str, work: Callable[[], T]) -> T | None:
        """Time a stage and return its result, or store its error in the row and return None."""
        self.row.stage = name
        self.begin(self.row)
        began = time.perf_counter()
        try:
            return work()
        except Exception as error:  # noqa: BLE001  every error is a finding and goes into the row
            self.row.errors[name] = _one_line(error)
            return None
        finally:
            self.row.seconds[name] = time.perf_counter() - began

    def run(self, *, onnx: bool) -> None:
        """Run every stage, then clear the row's current stage."""
        today = dt.datetime.now(tz=dt.UTC).date().isoformat()
        parts = PARTS[2:] if self.optimize == "runtime" else PARTS[:2] if onnx else PARTS[:1]
        self.row.dates = dict.fromkeys(parts, today)
        if self.optimize == "runtime":
            self.run_runtime()
            self.row.stage = ""
            return
        built = self.stage("build", self.build)
        if built is not None:
            model, reached = built
            before = fingerprint(model)
            self.work_on(model, reached, onnx=onnx)
            self.row.argument = what_changed(before, fingerprint(model))
        self.row.stage = ""

    def build(self) -> tuple[nn.Module, ReferenceCall]:
        model, inputs = self.entry.build()
        self.row.model = type(model).__name__
        self.row.parameters = sum(p.numel() for p in model.parameters())
        return model, ReferenceCall(inputs, _output(model, inputs))

    def work_on(self, model: nn.Module, reached: ReferenceCall, *, onnx: bool) -> None:
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
        # Use a copy, because some models change their state in each call.
        count = count_weights(copy.deepcopy(model), *normalize(inputs))
        self.row.counted = len(count.direct) + len(count.computed)
        self.row.unseen = list(unseen(count, planned))

    def compare(self, model: nn.Module, adapted: nn.Module, reached: ReferenceCall) -> None:
        inputs = reached.inputs
        outputs = _output(adapted.eval(), inputs)
        self.row.output_error = difference(outputs, reached.reference)
        self.row.train_error = _train_error(model, adapted, inputs)
        if self.row.train_error > MERGE_TOLERANCE:
            # Batch norm over two values can amplify rounding errors without limit, so compare in fp64.
            exact = _where_fp64_runs(lambda: _train_error(model, adapted, inputs, double=True))
            self.row.train_error = self.row.train_error if exact is None else exact

    def judge(self, model: nn.Module, reached: ReferenceCall) -> None:
        row = self.row
        verdict, dtype = judge_sites(self.entry, model, reached, self.config)
        row.judged, row.unreached = len(verdict.judged), verdict.unreached
        row.passed_by, row.stray = verdict.passed_by, verdict.stray
        row.oracle_error, row.tolerance = verdict.output_error, verdict.tolerance
        row.gradient_worst = verdict.worst
        row.gradient_error = verdict.errors.get(verdict.worst, 0.0)
        row.dtype = str(dtype).removeprefix("torch.")

    def judge_regions(self, model: nn.Module, reached: ReferenceCall) -> None:
        """Judge the graphs of single layers, which run if a call does not fit the whole model's graph."""
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
            file = Path(folder) / "model.onnx"
            report = export_onnx(merged, file, inputs, optimize=self.optimize)
        self.row.parity = report.max_rel_error
        if report.optimize != self.optimize:
            self.row.fewer_fusions = report.not_fused[f"optimize={self.optimize!r}"]
        return report.verified

    def run_runtime(self) -> None:
        """Export the model with ONNX Runtime's operators; with a cache if the model generates text."""
        built = self.stage("runtime build", lambda: self.entry.build(wide=True))
        if built is None:
            return
        model, inputs = built
        self.row.model = type(model).__name__
        merged = self.stage("runtime rewrite", lambda: self.drawn(model))
        if merged is None:
            return
        task = _task_of(merged, inputs)
        export_inputs = inputs if task is None else _prompt(inputs)
        stage = "runtime" if task is None else f"runtime {task}"
        self.stage(stage, lambda: self.export_for_runtime(merged, export_inputs, task))

    def drawn(self, model: nn.Module) -> nn.Module:
        """Return a merged model whose adapters have random values."""
        adapted = rewrite(model, self.config).eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for parameter in trainable_parameters(adapted):
                parameter.normal_(std=_DRAWN)
        return merge(adapted).eval()

    def export_for_runtime(
        self, merged: nn.Module, inputs: Inputs, task: GenerationTask | None
    ) -> None:
        from lora_fx.export.onnx import check_operators, export_onnx

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            report = export_onnx(merged, file, inputs, task=task, optimize="runtime")
            for written in Path(folder).glob("*.onnx"):
                check_operators(written)
        left = dict(report.not_fused)
        fewer = left.pop("optimize='runtime'", "")
        fused = dict(report.fused)
        self.row.runtime[task or ""] = RuntimeFile(
            report.max_rel_error, report.nodes, fused, left, fewer
        )


GenerationTask: TypeAlias = Literal["text-generation", "text2text-generation"]


def _task_of(model: Any, inputs: Inputs) -> GenerationTask | None:
    """Return the export task of a model with a key-value cache, or None for a model without one."""
    if not isinstance(inputs, Mapping) or "use_cache" not in inputs:
        return None
    if model.config.is_encoder_decoder:
        return "text2text-generation"
    known = {"input_ids", "attention_mask", "use_cache"}
    return "text-generation" if inputs.keys() <= known else None


def _prompt(inputs: Inputs) -> Inputs:
    """Return those inputs of a call that an export with a cache needs. The export makes the others."""
    assert isinstance(inputs, Mapping)
    kept = "decoder_input_ids" in inputs
    return {
        name: value
        for name, value in inputs.items()
        if name != "use_cache" and (kept or name == "input_ids")
    }


def _output(model: nn.Module, inputs: Inputs) -> Any:
    """Return the output of a model, without gradients and with the same seed each time."""
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
    """Return the result of a measurement in fp64, or None if the model has hard-coded fp32 and fails."""
    try:
        return measure()
    except (RuntimeError, TypeError, ValueError):
        return None


def _by_torch(model: nn.Module, inputs: Inputs) -> bool:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    torch.onnx.export(copy.deepcopy(model), args, kwargs=kwargs, dynamo=True, verbose=False)
    return True


def _one_line(error: BaseException) -> str:
    # torch.onnx's own errors report progress; their cause is the actual error.
    while type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", re.sub(r"\s+", " ", text)).strip()
    return f"{type(error).__name__}: {scrubbed(text)}"[:_LINE]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' logs and output, which are not results of a row."""
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
class ReferenceCall:
    """Inputs of one call of a model, and the original model's output.

    Attributes:
        inputs: Arguments of the call.
        reference: Output of the original model.
    """

    inputs: Inputs
    reference: Any


def judge_sites(
    entry: Entry,
    model: nn.Module,
    reached: ReferenceCall,
    config: LoraConfig,
    *,
    examples: bool = True,
) -> tuple[Verdict, torch.dtype]:
    """Compare every site with the dense oracle, in fp64 if the model can run in fp64.

    The models are in eval mode, so that no layer is skipped at random. The model is rewritten again, because
    a graph of the whole model is specific to the dtype in which it was traced.

    Args:
        entry: The model's entry.
        model: The original; it is copied.
        reached: The call and the output of the original model.
        config: Configuration of the rewrite.
        examples: True to pass the inputs of the call to ``rewrite``.

    Returns:
        The verdict, and the dtype of the comparison.
    """
    exact = in_fp64(model, reached.inputs)
    dtype = torch.float32 if exact is None else torch.float64
    original, inputs, narrowest = exact or (model, reached.inputs, dtype)
    adapted = rewrite(original, config, inputs if examples else None).eval()
    judged_call = dataclasses.replace(reached, inputs=inputs)
    verdict = judge(original, adapted, lambda m: _output_and_loss(entry, m, judged_call), narrowest)
    return verdict, dtype


def in_fp64(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs, torch.dtype] | None:
    """Return copies of a model and its inputs in fp64, and the narrowest dtype that it computes in.

    Return None for a model that does not run in fp64, or whose outputs are not finite in fp64. A cause is
    hard-coded fp32. For example, a mask with the least number of fp32 has another effect in fp64.
    """
    exact, doubled = copy.deepcopy(model).double(), in_double(inputs)
    try:
        torch.manual_seed(0)
        with torch.no_grad(), Narrowest() as seen:
            output = call(exact, doubled)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not all(bool(tensor.isfinite().all()) for tensor in floats(output)):
        return None
    return exact, doubled, seen.dtype


def train(entry: Entry, adapted: nn.Module, built: ReferenceCall) -> tuple[float, float]:
    """Train twenty steps of AdamW on one batch, in eval mode.

    The loss of a model with random weights may be arbitrarily steep. If the loss rises, training restarts
    with a smaller learning rate.

    Args:
        entry: The model's entry.
        adapted: The rewritten model, which is trained.
        built: The call and the output of the original model.

    Returns:
        The loss before the first step and after the last step.
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
            loss = _output_and_loss(entry, adapted, built)[1]
            losses.append(float(loss))
            if step < STEPS:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        if losses[-1] < losses[0]:
            break
    return losses[0], losses[-1]


def _output_and_loss(
    entry: Entry, model: nn.Module, built: ReferenceCall
) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    output = call(model, built.inputs)
    if entry.loss is not None:
        return output, entry.loss(output)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for tensor, start in zip(floats(output), floats(built.reference), strict=True):
        noise = torch.randn(start.shape, generator=generator)
        if not tensor.requires_grad or not bool(start.isfinite().all()):
            continue
        # The target differs from the initial output by as much as the outputs vary.
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        start = start.to(tensor)
        spread = (start.std() if start.numel() > 1 else start.abs()).clamp_min(1e-3)
        total = total + ((tensor - start) / spread - noise).square().mean()
    return output, total


# --- the comparison with the dense oracle ---------------------------------------------------------


Run: TypeAlias = "Callable[[nn.Module], tuple[Any, torch.Tensor]]"
"""Function that calls a model and returns its output and a loss, with the same random numbers each time."""

_SHARE = (
    0.05  # of a weight's spread: enough to be seen, too little to route a token to another expert
)
_ROUNDINGS = 64  # times eps of the largest gradient: possible remainder of terms that cancel
_FAINT = 1e-6  # share of a weight's spread that changes no other gradient


@dataclass
class Verdict:
    """The result of the comparison of a rewritten model with the dense oracle.

    Attributes:
        judged: Sites whose weight has a gradient in the oracle.
        unreached: Sites whose weight has no gradient in the oracle, because the call does not run them or
            drops their result.
        passed_by: Sites whose adapter has no gradient or a wrong one, each with a description.
        followers: Number of other sites that differ only because of the sites in `passed_by`.
        stray: Parameters that have a gradient and belong to no adapter.
        errors: Largest relative difference of each site's gradients from the oracle's.
        output_error: Largest relative difference of an output from the oracle's.
        tolerance: Largest allowed value of `errors` and of `output_error`.
    """

    tolerance: float
    judged: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    passed_by: dict[str, str] = field(default_factory=dict)
    followers: int = 0
    stray: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    output_error: float = 0.0

    @property
    def worst(self) -> str:
        """Return the site whose gradients differ most, or an empty string without sites."""
        return max(self.errors, key=self.errors.__getitem__, default="")

    @property
    def right(self) -> bool:
        """Return True if the rewritten model equals the oracle, at every site and nowhere else."""
        return not self.passed_by and not self.stray and self.output_error <= self.tolerance


class Narrowest(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Dispatch mode that records the narrowest floating-point type that a model computes in.

    A model in fp64 may contain hard-coded fp32, whose rounding is not an error of an adapter.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.dtype = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record the dtypes of its results."""
        result = func(*args, **(kwargs or {}))
        for output in tensors(result):
            if output.is_floating_point() and _eps(output.dtype) > _eps(self.dtype):
                self.dtype = output.dtype
        return result


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the allowed relative difference for a dtype: half of the dtype's digits may differ."""
    return math.sqrt(_eps(dtype))


def judge(original: nn.Module, adapted: nn.Module, run: Run, dtype: torch.dtype) -> Verdict:
    """Compare a rewritten model with the oracle, at random A and B.

    Args:
        original: The model that was rewritten; it is copied.
        adapted: The rewritten model; its factors get new random values.
        run: Function that calls a model and returns its output and a loss.
        dtype: The narrowest dtype that the model computes in.

    Returns:
        The verdict.

    Raises:
        ValueError: If the oracle's gradients are not finite, so that they cannot be compared.
    """
    verdict = _verdict(original, adapted, run, dtype, _SHARE)
    if verdict.passed_by:
        # An adapter without effect also changes the gradients of other adapters, in proportion to ΔW. With a
        # tiny ΔW, only the sites that are wrong themselves still differ.
        near = _verdict(original, adapted, run, dtype, _FAINT)
        causes = {n: how for n, how in near.passed_by.items() if near.errors[n] > math.sqrt(_FAINT)}
        verdict.followers = len(verdict.passed_by.keys() - causes.keys()) if causes else 0
        verdict.passed_by = causes or verdict.passed_by
    return verdict


def _verdict(
    original: nn.Module, adapted: nn.Module, run: Run, dtype: torch.dtype, share: float
) -> Verdict:
    stir(adapted, share)
    oracle = dense(original, adapted)
    expected, loss = run(oracle)
    _backward(loss)
    adapted.zero_grad()
    output, loss = run(adapted)
    _backward(loss)
    verdict = Verdict(tolerance_of(dtype), output_error=difference(output, expected))
    factors = {id(p) for branch in _places(adapted) for p in branch.pair}
    verdict.stray = [
        name
        for name, parameter in adapted.named_parameters()
        if id(parameter) not in factors and (parameter.requires_grad or parameter.grad is not None)
    ]
    _compare(adapted, _chain_rule(oracle, adapted), verdict, _eps(dtype))
    adapted.zero_grad()
    return verdict


def stir(adapted: nn.Module, share: float = _SHARE) -> None:
    """Set all factors to new random values: neither A nor B is zero, and ΔW is small relative to each weight.

    Args:
        adapted: The rewritten model.
        share: Spread of ΔW relative to that of the weight.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for branch in _places(adapted):
            for factor in branch.pair:
                drawn = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                factor.copy_(drawn)
            weight = adapted.get_parameter(branch.row.site.weight).double()
            spread = float(weight.std()) if weight.numel() > 1 else 0.0
            change = float(branch.change(*branch.pair).double().square().mean().sqrt())
            branch.pair[1].mul_(share * (spread or 1.0) / max(change, 1e-12))


def dense(original: nn.Module, adapted: nn.Module) -> nn.Module:
    """Return a copy of the original with ``W' = W + s·BA``, in which only these weights require gradients."""
    oracle = copy.deepcopy(original)
    for parameter in oracle.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for branch in _places(adapted):
            site = branch.row.site
            weight = oracle.get_parameter(site.weight)
            total = site.applied(weight).clone()
            rows_of(site, total).add_(branch.change(*branch.pair).to(total))
            if site.tied_to:
                # The adapter applies only to this use of a tied weight, so untie it.
                weight = nn.Parameter(weight.detach().clone())
                setattr(oracle.get_submodule(site.owner), site.parameter, weight)
            weight.copy_(site.stored(total))
    for branch in _places(adapted):
        oracle.get_parameter(branch.row.site.weight).requires_grad_()
    return oracle


class _Place(NamedTuple):
    """A site with the parameters A and B of its adapter."""

    row: PlannedSite
    pair: tuple[nn.Parameter, nn.Parameter]

    def change(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``s·BA``, in the shape of the weight to which it is added."""
        site = self.row.site
        a, b = (a.mT, b.mT) if self.row.tied else (a, b)
        shape = list(site.applied_shape)
        if site.rows is not None:
            shape[site.axis] = site.rows[1] - site.rows[0]
        return self.row.scale * pattern_of(site).delta(site, a, b).reshape(shape)


def _places(adapted: nn.Module) -> Iterator[_Place]:
    record = require_record(adapted)
    for name in record.active:
        for row in record.adapters[name].sites:
            yield _Place(row, factors_of(adapted, row, name).pair)


def _chain_rule(oracle: nn.Module, adapted: nn.Module) -> dict[int, torch.Tensor]:
    """Return the gradient that each factor should have, by the factor's id.

    It is computed from the gradients of the oracle's weights, by one backward pass through all ΔW.
    """
    leaves: dict[int, torch.Tensor] = {}
    changes, gradients = [], []
    for branch in _places(adapted):
        site = branch.row.site
        gradient = oracle.get_parameter(site.weight).grad
        if gradient is None:
            continue
        a, b = (leaves.setdefault(id(p), p.detach().clone().requires_grad_()) for p in branch.pair)
        changes.append(branch.change(a, b))
        applied = part_of(site, gradient)
        gradients.append(applied.to(changes[-1]))
    if changes:
        torch.autograd.backward(changes, gradients)
    return {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def _compare(
    adapted: nn.Module, expected: dict[int, torch.Tensor], verdict: Verdict, eps: float
) -> None:
    branches = list(_places(adapted))
    # The largest gradients of A and of B are separate, because B is small, so that A has small gradients.
    largest = [
        max((_largest(expected.get(id(branch.pair[side]))) for branch in branches), default=0.0)
        for side in (0, 1)
    ]
    for branch in branches:
        name, reached, worst, silent = branch.row.name, False, 0.0, True
        for factor, most in zip(branch.pair, largest, strict=True):
            wanted = expected.get(id(factor))
            size = _largest(wanted)
            if not math.isfinite(size):
                raise ValueError(f"the oracle's gradient at {name} is not finite")
            reached = reached or size > _ROUNDINGS * eps * most
            silent = silent and _largest(factor.grad) == 0.0
            wanted = torch.zeros_like(factor) if wanted is None else wanted
            gradient = torch.zeros_like(factor) if factor.grad is None else factor.grad
            # If large terms of a gradient cancel, rounding errors remain. So small gradients are compared
            # relative to the largest gradient.
            scale = max(
                size, _ROUNDINGS * verdict.tolerance * most, torch.finfo(torch.float64).tiny
            )
            worst = max(worst, _largest(gradient.double() - wanted.double()) / scale)
        (verdict.judged if reached else verdict.unreached).append(name)
        verdict.errors[name] = worst
        if worst > verdict.tolerance:
            how = "no gradient" if silent else f"another gradient, off by {worst:.0e}"
            verdict.passed_by[name] = how


def _largest(values: torch.Tensor | None) -> float:
    """Return the largest absolute value, or infinity for NaN."""
    if values is None or not values.numel():
        return 0.0
    return float(values.detach().abs().max().double().nan_to_num(math.inf, math.inf))


def _backward(loss: torch.Tensor) -> None:
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def floats(value: Any) -> list[torch.Tensor]:
    """Return the nonempty floating-point tensors in a nested output of a model."""
    return [t for t in tensors(value) if t.is_floating_point() and t.numel()]


def difference(actual: Any, expected: Any) -> float:
    """Return the largest difference of two outputs, relative to the largest value of each tensor.

    Returns:
        0 if no bit differs, and infinity if shapes or types differ or only one output is finite.
    """
    left, right = list(tensors(actual)), list(tensors(expected))
    if [t.dtype for t in left] != [t.dtype for t in right]:
        return math.inf
    return relative_difference(left, right)


def in_double(value: Any) -> Any:
    """Return a nested value with every floating-point tensor in fp64."""

    def doubled(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.double() if floating else leaf

    return pytree.tree_map(doubled, value)


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Return a text for each part of a model that a rewrite must not change.

    The parts are values, modes, gradients, modules and classes.
    """
    prints = {
        f"class of {name or 'root'}": type(module).__qualname__
        for name, module in model.named_modules()
    }
    prints |= {f"mode of {n or 'root'}": str(m.training) for n, m in model.named_modules()}
    for name, parameter in model.named_parameters():
        gradient = "no gradient" if parameter.grad is None else "a gradient"
        prints[f"parameter {name}"] = f"{digest_of(parameter)} {parameter.requires_grad} {gradient}"
    prints |= {f"buffer {name}": digest_of(buffer) for name, buffer in model.named_buffers()}
    return prints


def what_changed(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Return the first few differences of two fingerprints, or an empty string."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return some(keys, 3)
