"""Times of rewrites and merges compared with PEFT's, and the rounding errors of merged weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.api import graphs, merge, rewrite
from lora_fx.config import LoraConfig
from lora_fx.passes.merge import rounded, ulp
from lora_fx.tools.bench.contenders import EXPORTED, OURS, PEFT, shared_copy
from lora_fx.tools.bench.counted import Memory, measure_memory
from lora_fx.tools.bench.measure import Contenders, Placement, Run, Sample, Size, devices, ratio
from lora_fx.tools.bench.section import Chart, Group, Section
from lora_fx.tools.bench.workloads import llama_shape

__all__ = ["BOUND", "OURS_INTO", "PEFT_MERGE", "SECTIONS", "MergeError", "Merged", "Scale"]

_RANK = 16
_AGAIN = f"{OURS} again (A/A)"


def _fields(targets: str | list[str]) -> dict[str, Any]:
    return {"r": _RANK, "lora_alpha": _RANK, "target_modules": targets}


def _on_meta(**shape: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**shape))
    return model


def _rewrites(make: Callable[[], nn.Module], targets: str | list[str]) -> Contenders:
    """Return contenders that rewrite a model, by lora-fx and by PEFT.

    PEFT changes its model, so each run of PEFT gets a new model.
    """
    import peft

    base = make()

    def fresh() -> tuple[nn.Module, Any]:
        # PEFT also writes into its configuration, so each run has a new one.
        return make(), peft.LoraConfig(**_fields(targets))

    def ours(_: Any) -> nn.Module:
        return rewrite(base, LoraConfig(**_fields(targets)))

    # Our rewrite leaves its model unchanged, so all runs share it.
    untimed = (lambda: None, ours)
    theirs = (fresh, lambda arguments: peft.get_peft_model(*arguments))
    return {OURS: untimed, _AGAIN: untimed, PEFT: theirs}


def _by_targets(run: Run) -> dict[str, dict[str, Sample]]:
    layers, few = (1, 1) if run.size is Size.TINY else (32, 4)
    cases: dict[str, tuple[int, str | list[str], bool]] = {
        "q, k, v, o": (layers, ["q_proj", "k_proj", "v_proj", "o_proj"], False),
        "all-linear": (layers, "all-linear", False),
        f"all-linear, {few} layers": (few, "all-linear", True),
    }
    samples = {}
    for title, part in run.each(cases, str):
        count, targets, exported = cases[title]
        make = functools.partial(_on_meta, num_hidden_layers=count)
        contenders = _rewrites(make, targets)
        if exported:
            run_export = functools.partial(_export, targets=targets)
            contenders = {**contenders, EXPORTED: (make, run_export)}
        samples[title] = part.times(contenders, seconds=20.0)
    return samples


def _export(base: nn.Module, targets: str | list[str]) -> nn.Module:
    ids = torch.zeros(1, 64, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids}
    return rewrite(base, LoraConfig(**_fields(targets)), inputs, frontend="export")


def _target_cells(results: Mapping[str, Mapping[str, Sample]]) -> Iterator[list[str]]:
    for title, samples in results.items():
        peft = samples[PEFT].median
        for name, sample in samples.items():
            yield [title, name, str(sample), f"{sample.median / peft:.2f}"]


# hidden, intermediate, layers, heads
_SHAPES = {
    "125M": (768, 2048, 12, 12),
    "350M": (1024, 2816, 24, 16),
    "1.3B": (2048, 5504, 24, 16),
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "34B": (8192, 22016, 48, 64),
    "70B": (8192, 28672, 80, 64),
}
_FEW_HEADS = {"34B": {"num_key_value_heads": 8}, "70B": {"num_key_value_heads": 8}}
_SOME = {Size.FULL: tuple(_SHAPES), Size.QUICK: ("125M", "7B"), Size.TINY: ("125M",)}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Times of rewriting a model of one shape.

    Attributes:
        nodes: Nodes of all graphs of the rewritten model, counting each module's graph.
        samples: Times by contender.
    """

    nodes: int
    samples: dict[str, Sample]

    @property
    def per_thousand(self) -> float:
        """Return lora-fx's seconds per thousand nodes."""
        return 1e3 * self.samples[OURS].median / self.nodes


def _by_shape(run: Run) -> dict[str, Scale]:
    scales = {}
    for name, part in run.each(_SOME[run.size], str):
        shape = llama_shape(*_SHAPES[name], vocabulary=32000) | _FEW_HEADS.get(name, {})
        contenders = _rewrites(functools.partial(_on_meta, **shape), "all-linear")
        samples = part.times(contenders, seconds=20.0)
        module_graphs = graphs(contenders[OURS][1](None))
        scales[name] = Scale(sum(len(graph.nodes) for graph in module_graphs.values()), samples)
    return scales


def _shape_cells(results: Mapping[str, Scale]) -> Iterator[list[str]]:
    for name, scale in results.items():
        ours, again, peft = (scale.samples[key] for key in (OURS, _AGAIN, PEFT))
        row = [name, str(scale.nodes), str(ours), f"{ratio(again, ours).median:.2f}", str(peft)]
        yield [*row, f"{ratio(ours, peft).median:.2f}", f"{1e3 * scale.per_thousand:.1f}"]


def _shape_charts(results: Mapping[str, Scale]) -> dict[str, Chart]:
    groups = [
        Group(
            f"{name}, {scale.nodes} nodes", {key: scale.samples[key].median for key in (OURS, PEFT)}
        )
        for name, scale in results.items()
    ]
    title = "Time to rewrite, all-linear, rank 16, on the meta device"
    return {"rewrite-scale.svg": (title, "seconds, less is better", groups)}


OURS_INTO = "lora-fx, into=base"
PEFT_MERGE = "PEFT merge_and_unload"
BOUND = "addmm_ in the weight's dtype"


@dataclasses.dataclass(frozen=True)
class Merged:
    """Time and memory of merges by one contender in one dtype.

    Attributes:
        sample: Times.
        memory: Memory that its operations allocate.
        weight: Bytes of one weight.
    """

    sample: Sample
    memory: Memory
    weight: int


def _merges(run: Run) -> dict[str, dict[str, Merged]]:
    # Users merge weights in half types on every machine, however slow its products in them are.
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    where = [Placement(device, dtype) for device in devices() for dtype in dtypes]
    count, layers, width = {
        Size.FULL: (len(where), 25, 2048),
        Size.QUICK: (2, 4, 1024),
        Size.TINY: (1, 2, 32),
    }[run.size]

    def work(placement: Placement, part: Run) -> dict[str, Merged]:
        contenders = _merge_contenders(placement, layers, width)
        timed = part.times(contenders, placement.device, seconds=30.0)
        weight = width**2 * placement.dtype.itemsize
        return {
            name: Merged(timed[name], measure_memory(functools.partial(work, prepare())), weight)
            for name, (prepare, work) in contenders.items()
        }

    return run.at_each(where[:count], work)


def _merge_cells(results: Mapping[str, Mapping[str, Merged]]) -> Iterator[list[str]]:
    for where, merges in results.items():
        for name, merged in merges.items():
            times = f"{merged.sample.median / merges[PEFT_MERGE].sample.median:.2f}"
            sizes = (f"{size / 2**20:.1f}" for size in (merged.memory.peak, merged.memory.largest))
            yield [where, name, str(merged.sample), times, *sizes]


def _merge_contenders(placement: Placement, layers: int, width: int) -> Contenders:
    import peft

    names = [str(index) for index in range(layers)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in names))
        base = base.to(placement.device, placement.dtype)
        ours = rewrite(base, LoraConfig(**_fields(names)))
        theirs = peft.get_peft_model(shared_copy(base), peft.LoraConfig(**_fields(names)))
        with torch.no_grad():
            for model in (ours, theirs):
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(0, 0.02)

    fresh = functools.partial(copy.deepcopy, theirs)
    return {
        OURS: (lambda: ours, merge),
        _AGAIN: (lambda: ours, merge),
        OURS_INTO: (lambda: copy.deepcopy(base), lambda target: merge(ours, into=target)),
        PEFT_MERGE: (fresh, methodcaller("merge_and_unload")),
        f"{PEFT_MERGE}, safe_merge": (fresh, methodcaller("merge_and_unload", safe_merge=True)),
        BOUND: (lambda: _factors(theirs, names), _added),
    }


def _factors(adapted: nn.Module, names: list[str]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return for each layer a copy of its weight, and B and A in the weight's dtype."""
    factors = []
    for name in names:
        layer: Any = adapted.get_submodule(f"base_model.model.{name}")
        weight = layer.base_layer.weight.detach().clone()
        a, b = (
            projection["default"].weight.detach() for projection in (layer.lora_A, layer.lora_B)
        )
        factors.append((weight, b.to(weight.dtype), a.to(weight.dtype)))
    return factors


def _added(factors: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for weight, b, a in factors:
        weight.addmm_(b, a)


@dataclasses.dataclass(frozen=True)
class MergeError:
    """The rounding error of one merge.

    Attributes:
        largest: Largest error of all weights, in units in the last place.
        wrong: Fraction of the weights that are not the number nearest to the exact weight.
    """

    largest: float
    wrong: float


def _errors(run: Run) -> dict[str, dict[str, MergeError]]:
    """Measure the rounding errors of merges, by dtype, then by contender.

    Nothing is timed, so one run suffices.
    """
    results = {}
    for done, dtype in enumerate((torch.bfloat16, torch.float16)):
        run.tell(done, 2, str(dtype))
        errors = _errors_in(dtype, 32 if run.size is Size.TINY else 512)
        results[str(dtype).removeprefix("torch.")] = errors
    return results


def _error_cells(results: Mapping[str, Mapping[str, MergeError]]) -> Iterator[list[str]]:
    for dtype, contenders in results.items():
        for name, error in contenders.items():
            yield [dtype, name, f"{error.largest:.3f}", f"{100 * error.wrong:.2f} %"]


def _errors_in(dtype: torch.dtype, width: int) -> dict[str, MergeError]:
    """Return the errors of merges in one dtype.

    The exact weight is ``W + s · B A`` in fp64, from factors that both libraries share.
    """
    import peft

    torch.manual_seed(0)
    names = [str(index) for index in range(4)]
    base = nn.Sequential(*(nn.Linear(width, width) for _ in names)).to(dtype)
    fields = _fields(names) | {"lora_alpha": 8}
    ours = rewrite(base, LoraConfig(**fields))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    exact = []
    with torch.no_grad():
        for name in names:
            mine, layer = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
            a, b = (mine.get_submodule(f"lora_{x}").get_parameter("default") for x in "AB")
            a.normal_(0, 0.04)
            b.normal_(0, 0.04)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
            weight = base.get_submodule(name).get_parameter("weight")
            exact.append(weight.double() + 8 / _RANK * (b.double() @ a.double()))
    merged = {
        OURS: merge(ours),
        PEFT: copy.deepcopy(theirs).merge_and_unload(),
        f"{PEFT}, safe_merge": theirs.merge_and_unload(safe_merge=True),
    }
    return {name: _error(model, names, exact, dtype) for name, model in merged.items()}


def _error(
    model: nn.Module, names: list[str], exact: list[Tensor], dtype: torch.dtype
) -> MergeError:
    largest, wrong, count = 0.0, 0, 0
    for name, value in zip(names, exact, strict=True):
        merged = model.get_submodule(name).get_parameter("weight").detach()
        largest = max(largest, float(((merged.double() - value).abs() / ulp(value, dtype)).max()))
        wrong += int((merged != rounded(value, dtype)).sum())
        count += merged.numel()
    return MergeError(largest, wrong / count)


_MEDIAN = "median (quartiles)"

SECTIONS = (
    Section(
        "rewrite_time", ("targets", "contender", _MEDIAN, "of PEFT's"), _by_targets, _target_cells
    ),
    Section(
        "rewrite_scale",
        ("shape", "nodes", OURS, "A/A", PEFT, "of PEFT's", "lora-fx, ms per thousand nodes"),
        _by_shape,
        _shape_cells,
        _shape_charts,
    ),
    Section(
        "merge_time",
        ("where", "contender", _MEDIAN, "of PEFT's", "peak MiB", "largest tensor MiB"),
        _merges,
        _merge_cells,
    ),
    Section(
        "merge_error",
        ("dtype", "contender", "largest error in ulp", "weights rounded wrongly"),
        _errors,
        _error_cells,
    ),
)
