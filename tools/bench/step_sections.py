"""The sections about training steps: their times, where the time goes, and the tensors that they save."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.adapters import adapter_losses, add_adapter, quantize, set_adapter
from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.formats import quantization_of
from lora_fx.tools.bench.contenders import (
    AGAIN,
    BALANCED,
    CANONICAL,
    CHUNKED,
    EXPORTED,
    FROZEN,
    LEAST,
    OTHER_KIND,
    OURS,
    OURS_AGAIN,
    PEERS,
    PEFT,
    PLAIN_KIND,
    THIRD,
    Contenders,
    Settings,
    built,
    by_dropout,
    name_of,
    of_kinds,
    variants,
)
from lora_fx.tools.bench.contenders import KINDS as ADAPTER_KINDS
from lora_fx.tools.bench.counted import saved_by
from lora_fx.tools.bench.measure import (
    Placement,
    Run,
    Sample,
    Size,
    compiles,
    placements,
    ratio,
    synchronizer,
)
from lora_fx.tools.bench.section import Chart, Group, Section
from lora_fx.tools.bench.steps import (
    COLUMNS,
    Measured,
    Row,
    Steps,
    loss_of,
    mebibytes,
    on_one_thread,
    section_of,
)
from lora_fx.tools.bench.workloads import (
    MODELS,
    RANK,
    STANDARD,
    mixtral,
    nf4_llama,
    small_llama,
    vocabulary_llama,
)

__all__ = [
    "ONE",
    "ONE_AGAIN",
    "SECTIONS",
    "SEPARATE",
    "TOGETHER",
    "available",
    "quantized_base",
]

# --- one adapter ----------------------------------------------------------------------------------


def _slug(where: str) -> str:
    return where.replace(", ", "-")


_HOW = "O, less is better; 1 is the frozen step, the {} F"


def _llama_contenders(size: Size, placement: Placement) -> Contenders:
    if size is Size.QUICK:
        return variants((AGAIN, OURS, EXPORTED, PEFT))
    if placement.dtype is torch.float32:
        return variants((AGAIN, OURS, CANONICAL, EXPORTED, PEFT, *PEERS))
    return variants((AGAIN, OURS, CANONICAL, PEFT, PEERS[0]))


def _llama_charts(results: Mapping[str, Measured]) -> dict[str, Chart]:
    charts: dict[str, Chart] = {}
    for where, measured in results.items():
        times = {name: measured.overhead(name).median for name in measured.steps if name != FROZEN}
        beyond = {name: measured.saved_beyond(name) for name in measured.adapted}
        saved = {name: size / 2**20 for name, size in beyond.items() if size is not None}
        charts[f"llama-step-{_slug(where)}.svg"] = (
            f"Step of a small Llama beside the frozen one ({where})",
            _HOW.format("line"),
            [Group("", times, measured.floor)],
        )
        charts[f"llama-saved-{_slug(where)}.svg"] = (
            f"Saved for backward beyond the frozen step ({where})",
            "MiB, less is better",
            [Group("", saved)],
        )
    return charts


def _model_charts(results: Mapping[str, Measured]) -> dict[str, Chart]:
    charts: dict[str, Chart] = {}
    for where in dict.fromkeys(measured.where for measured in results.values()):
        groups = [
            Group(
                measured.model,
                {name: measured.overhead(name).median for name in measured.adapted},
                measured.floor,
            )
            for measured in results.values()
            if measured.where == where
        ]
        charts[f"model-steps-{_slug(where)}.svg"] = (
            f"Training steps beside the frozen ones ({where})",
            _HOW.format("lines are"),
            groups,
        )
    return charts


_LLAMA = Steps(lambda size: [small_llama(size)], _llama_contenders, seconds=90.0)

_MODELS = Steps(
    # One sequence per model, so that a step stays under some 1.5 s on two cores.
    lambda size: [make(size) for make in MODELS[: 2 if size is Size.QUICK else None]],
    lambda size, _: variants(
        (AGAIN, OURS, EXPORTED, PEFT), (0.05,) if size is Size.QUICK else (0.0, 0.05)
    ),
    # On the CPU only the small Llama is measured in bf16, because all models would take minutes.
    lambda _: [
        placement
        for placement in placements(half=True)
        if placement.dtype is torch.float32 or placement.on_cuda
    ],
    seconds=40.0,
)

COMPILED_BASE, COMPILED_AGAIN = "frozen, compiled", "frozen, compiled again (A/A)"


def _compiled(model: nn.Module) -> nn.Module:
    # All contenders run the same code of transformers. If they share its compilations, each contender pays
    # for the guards of the others, and all count towards the recompile limit. torch 2.9 cannot separate
    # them.
    isolates = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: Any = {"isolate_recompiles": True} if isolates else {}
    return cast(nn.Module, torch.compile(model, **options))


def _compiled_contenders(size: Size, _: Placement) -> Contenders:
    frozen = {FROZEN: (FROZEN, Settings()), COMPILED_BASE: (AGAIN, Settings())}
    if size is not Size.FULL:
        return {**frozen, **variants((OURS,), (0.0,))}
    return {**frozen, COMPILED_AGAIN: (THIRD, Settings()), **variants((OURS, PEFT))}


_COMPILED = Steps(
    lambda size: [small_llama(size if size is Size.FULL else Size.TINY)],
    _compiled_contenders,
    lambda _: [placement for placement in placements(half=False) if compiles(placement.device)],
    floor=False,
    wrap=_compiled,
)


def _of_compiled(row: Row) -> str:
    return f"{ratio(row.step.sample, row.measured.steps[COMPILED_BASE].sample).median:.2f}"


_COMPILED_COLUMNS = {
    "where": COLUMNS["where"],
    "contender": lambda row: row.name + ", compiled" * (not row.name.startswith(FROZEN)),
    "median (quartiles)": COLUMNS["median (quartiles)"],
    "of frozen, eager": lambda row: f"{row.measured.overhead(row.name).median:.2f}",
    "of frozen, compiled": _of_compiled,
}


def _of_lora(row: Row) -> tuple[str, str]:
    """Return the cells of a DoRA contender: its time and saved bytes relative to LoRA of the same library.

    They are empty for other contenders.
    """
    if OTHER_KIND not in row.name:
        return "", ""
    plain = row.measured.steps[row.name.replace(OTHER_KIND, PLAIN_KIND)]
    saved = row.step.saved
    return (
        f"{ratio(row.step.sample, plain.sample).median:.2f}",
        f"{saved / plain.saved:.2f}" if saved and plain.saved else "–",
    )


_KIND_COLUMNS = {
    **COLUMNS,
    "saved MiB": lambda row: mebibytes(row.step.saved),
    "time of LoRA's": lambda row: _of_lora(row)[0],
    "saved of LoRA's": lambda row: _of_lora(row)[1],
}


def _largest(row: Row) -> str:
    return mebibytes(row.step.memory.largest if row.step.memory else None)


def _of_fast(row: Row) -> str:
    """Return the cell of a lora-fx step: its time relative to the step with ``memory="fast"``."""
    name, _, dropout = row.name.partition(", p = ")
    if name not in (OURS_AGAIN, BALANCED):
        return ""
    fast = row.measured.steps[name_of(OURS, float(dropout))]
    return str(ratio(row.step.sample, fast.sample))


_MEMORY = Steps(
    lambda size: [
        make(size) for make in (small_llama, *STANDARD)[: 1 if size is Size.TINY else None]
    ],
    lambda size, _: variants(
        (OURS, OURS_AGAIN, BALANCED, PEFT), (0.0,) if size is Size.QUICK else (0.0, 0.05)
    ),
    lambda _: placements(half=False),
    seconds=60.0,
    floor=False,
    one_thread=True,
)

_MEMORY_COLUMNS = {
    "model": lambda row: row.measured.model,
    "contender": COLUMNS["contender"],
    "median (quartiles)": COLUMNS["median (quartiles)"],
    "O (quartiles)": COLUMNS["O (quartiles)"],
    "of lora-fx": _of_fast,
    "saved MiB": lambda row: mebibytes(row.step.saved),
    "alive MiB": lambda row: mebibytes(row.step.alive),
    "saved beyond frozen, MiB": COLUMNS["saved beyond frozen, MiB"],
}


_EXPERTS = Settings(target_modules=("experts.gate_up_proj", "experts.down_proj"), parameters=True)


def available() -> bool:
    """Return True if bitsandbytes is installed. It is not on every system that lora-fx runs on."""
    return importlib.util.find_spec("bitsandbytes") is not None


def quantized_base(model: nn.Module) -> nn.Module:
    """Return a copy of a model with every linear layer but the head in NF4, as the base of both libraries."""
    base: Any = quantize(model, "nf4").train(model.training)
    # PEFT reads this flag, which transformers sets on models that it has quantized.
    base.is_loaded_in_4bit = True
    result: nn.Module = base
    return result


WEIGHTS = "weights"
"""The kind of a tensor that has the shape of a weight and holds its values."""


class Look(NamedTuple):
    """Bytes of weights, measured in addition to the times for a quantized base.

    Attributes:
        dense: Bytes of dequantized weights that each contender keeps for its backward.
        stored: Bytes of the quantized weights, with their scales.
        plain: Bytes of the same weights before quantization.
    """

    dense: Mapping[str, int]
    stored: int
    plain: int


def _look(
    model: nn.Module, base: nn.Module, models: Mapping[str, nn.Module], losses: Mapping[str, Any]
) -> Look:
    logical = [state.shape for p in base.parameters() if (state := quantization_of(p)) is not None]
    shapes = {*logical, *(shape[::-1] for shape in logical)}

    def kind(tensor: Tensor) -> str:
        wide = tensor.is_floating_point() and tuple(tensor.shape[-2:]) in shapes
        return WEIGHTS if wide else ""

    dense = {
        name: saved_by(contender, losses[name], kind).get(WEIGHTS, 0)
        for name, contender in models.items()
    }
    stored = plain = 0
    for name, parameter in base.named_parameters():
        if quantization_of(parameter) is not None:
            state = parameter.quant_state  # type: ignore[attr-defined]
            scales = (state.absmax, *((state.state2.absmax,) if state.nested else ()))
            stored += parameter.nbytes + sum(scale.nbytes for scale in scales)
            plain += model.get_parameter(name).nbytes
    return Look(dense, stored, plain)


def _nf4_contenders(size: Size, _: Placement) -> Contenders:
    names = (OURS, PEFT) if size is Size.QUICK else (OURS, CANONICAL, PEFT)
    return {**variants((AGAIN,)), **by_dropout(names)}


def _weights(row: Row) -> str:
    look: Look = row.measured.look
    return f"{mebibytes(look.stored)} ({mebibytes(look.plain)})" if row.name == FROZEN else ""


def _contenders(*names: str) -> Contenders:
    """Return the frozen model, LoRA contenders at each dropout, and DoRA of both libraries."""
    return {**by_dropout(names), **of_kinds((OTHER_KIND,), (0.0,))}


_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
_RANDOM = ("bernoulli", "dropout", "random", "uniform", "rand")
_COPIES = ("copy_", "clone", "zero_", "fill_", "cat")
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")

_BASE, _THIN, _ATTENTION, _DRAWN, _COPIED, _ELEMENTS, _OUTSIDE = GROUPS = (
    "base products",
    "thin products",
    "attention",
    "random numbers",
    "copies, fills",
    "element by element",
    "between operations",
)
_TURNS = 5

Profile = dict[str, float]
"""Seconds of one step by group."""


def _profiles(run: Run) -> dict[str, dict[str, Profile]]:
    """Profile a step of each contender, and return median seconds for each group of operations.

    The keys are device and dtype, then the contender.
    """
    workload = small_llama(run.size)

    def work(placement: Placement, part: Run) -> dict[str, Profile]:
        inputs = workload.on(placement)
        base = workload.make().to(placement.device, placement.dtype)
        models = built(_contenders(OURS, PEFT), base)
        turns: dict[str, list[Profile]] = {name: [] for name in models}
        # Contenders take turns, as they do for times. The first turn is a warm-up.
        counted = min(run.repeats, _TURNS)
        for turn in range(counted + 1):
            for done, (name, model) in enumerate(models.items(), 1):
                profile = _profiled(model, loss_of(model, inputs), placement.device)
                if turn:
                    turns[name].append(profile)
                part.tell(turn * len(models) + done, (counted + 1) * len(models), name)
        return {
            name: {group: statistics.median(profile[group] for profile in each) for group in GROUPS}
            for name, each in turns.items()
        }

    return run.at_each(placements(half=run.size is Size.FULL), work)


def _profile_cells(results: Mapping[str, Mapping[str, Profile]]) -> Iterator[list[str]]:
    """Yield rows of the table with the milliseconds of each group of operations in a step."""
    for where, profiles in results.items():
        for name, seconds in profiles.items():
            times = [*(seconds[group] for group in GROUPS), sum(seconds.values())]
            yield [where, name, *(f"{1e3 * value:.1f}" for value in times)]


def group_of(name: str, shapes: list[list[int]], rank: int) -> str:
    """Return the group of operations to which the profile counts an operation.

    Args:
        name: Name in the profiler, ``aten::mm``.
        shapes: Shapes of the tensors that it reads.
        rank: Rank of the adapters.
    """
    plain = name.removeprefix("aten::")
    if plain in _PRODUCTS:
        return _THIN if any(_is_thin(shape, rank) for shape in shapes) else _BASE
    if "attention" in plain:
        return _ATTENTION
    if any(plain.startswith(word) or word in plain for word in _RANDOM):
        return _DRAWN
    if plain in _COPIES:
        return _COPIED
    return _OUTSIDE if plain in _EMPTY or _only_calls(plain) else _ELEMENTS


def _is_thin(shape: Sequence[int], rank: int) -> bool:
    """Return True if a tensor belongs to a branch, because one of its dimensions is the rank.

    The dimension may also be the ranks of up to three layers that share an input.
    """
    return any(length in (rank, 2 * rank, 3 * rank) for length in shape)


@functools.cache
def _only_calls(name: str) -> bool:
    """Return True if an ATen operation computes nothing itself: a view, or one that calls others."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    overloads = [getattr(packet, key) for key in packet.overloads() if not key.endswith("out")]
    # Some overloads exist only in TorchScript; the dispatcher does not know them.
    known = [overload for overload in overloads if torch_private.has_kernel(overload)]
    return bool(known) and all(op.is_view or torch_private.is_composite(op) for op in known)


def _profiled(model: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> Profile:
    wait: Callable[[], Any] = synchronizer(device) or (lambda: None)
    on_cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_cuda else []
    model.zero_grad()
    wait()
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        began = time.perf_counter()
        torch.autograd.backward(loss())
        wait()
        whole = time.perf_counter() - began
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in profile.key_averages(group_by_input_shape=True):
        taken = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if event.key.startswith("aten::"):
            seconds[group_of(event.key, event.input_shapes, Settings().r)] += taken / 1e6
    computed = sum(taken for group, taken in seconds.items() if group != _OUTSIDE)
    return seconds | {_OUTSIDE: max(0.0, whole - computed)}


_WIDE, _NARROW, _MASKS, _OTHER = KINDS = (
    "T × width",
    "T × r, r × width",
    "bits and whole numbers",
    "vectors, T × 1",
)
"""Kinds of saved tensors, in the order of the table."""


def _kept(run: Run) -> dict[str, Mapping[str, int]]:
    """Measure the bytes that a step saves, by contender, then by kind of tensor.

    Nothing is timed, and a CPU saves the same tensors as a GPU.
    """
    workload, placement = small_llama(run.size), Placement(torch.device("cpu"), torch.float32)
    inputs = workload.on(placement)
    models = built(_contenders(OURS, EXPORTED, PEFT), workload.make(), inputs)
    kept: dict[str, Mapping[str, int]] = {}
    for done, (name, model) in enumerate(models.items(), 1):
        kept[name] = saved_by(model, loss_of(model, inputs), kind_of)
        run.tell(done, len(models), name)
    return kept


def _kept_cells(results: Mapping[str, Mapping[str, int]]) -> Iterator[list[str]]:
    """Yield rows of the table with the saved MiB of each kind of tensor, beyond those of the frozen step.

    The frozen step's row shows all of its MiB.
    """
    for name, kept in results.items():
        base: Mapping[str, int] = {} if name == FROZEN else results[FROZEN]
        sizes = [kept.get(kind, 0) - base.get(kind, 0) for kind in KINDS]
        yield [name, *(f"{size / 2**20:z.2f}" for size in sizes), mebibytes(sum(sizes))]


def kind_of(tensor: Tensor) -> str:
    """Return the kind of a saved tensor for the table: a mask, narrow as the rank, wide, or other."""
    if not tensor.is_floating_point():
        return _MASKS
    if _is_thin(tensor.shape, Settings().r):
        return _NARROW
    return _OTHER if sum(length > 1 for length in tensor.shape) < 2 else _WIDE


# --- eight adapters by one batch ------------------------------------------------------------------
# Time of a step that trains eight adapters by one batch, compared with steps of one adapter.


_RANKS = (4, 8, 8, 16, 16, 32, 32, 64)
_ROWS = len(_RANKS)
ONE = f"one adapter of rank {RANK}, {_ROWS} rows"
ONE_AGAIN = f"{ONE}, again (A/A)"
TOGETHER = f"{_ROWS} adapters, {_ROWS} rows"
_BRANCHES = f"{TOGETHER}, a branch for each"
SEPARATE = f"{_ROWS} steps of one row"
_SECONDS = 60.0


def _measured(run: Run) -> dict[str, dict[str, Sample]]:
    """Measure steps of several adapters in one batch, by a title with the length of rows and the dropout."""
    cases = {"8 tokens": (8, 0.0), "16 tokens": (16, 0.0), "64 tokens": (64, 0.0)}
    cases["64 tokens, p = 0.05"] = (64, 0.05)
    if run.size is not Size.FULL:
        cases = {"8 tokens": (8, 0.0)}
    samples = {}
    with on_one_thread():
        for (title, (tokens, dropout)), part in run.each(cases.items(), lambda case: case[0]):
            samples[title] = part.times(
                _joint_contenders(run.size, tokens, dropout),
                seconds=_SECONDS,
                clock=time.thread_time,
            )
    return samples


def _joint_contenders(
    size: Size, tokens: int, dropout: float
) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    base = small_llama(size).make()
    vocabulary = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(vocabulary, (_ROWS, tokens), generator=torch.Generator().manual_seed(0))
    names = [f"adapter{index}" for index in range(_ROWS)]

    def config(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)

    def joint(optimize: bool) -> nn.Module:
        model = rewrite(base, config(_RANKS[0]), adapter_name=names[0], optimize=optimize)
        for name, rank in zip(names[1:], _RANKS[1:], strict=True):
            add_adapter(model, config(rank), name)
        set_adapter(model, names, per_sample=True)
        return model

    def together(model: nn.Module) -> None:
        logits = model(input_ids=ids, adapter_ids=names).logits
        torch.autograd.backward([*adapter_losses(logits, ids, names).values()])

    def separate(models: nn.Module) -> None:
        for row, model in enumerate(models.children()):
            _step(ids[row : row + 1], model)

    single = rewrite(base, config(RANK))
    alone = nn.ModuleList([rewrite(base, config(rank)) for rank in _RANKS])
    work: dict[str, tuple[nn.Module, Callable[[Any], Any]]] = {
        ONE: (single, functools.partial(_step, ids)),
        ONE_AGAIN: (single, functools.partial(_step, ids)),
        TOGETHER: (joint(optimize=True), together),
        _BRANCHES: (joint(optimize=False), together),
        SEPARATE: (alone, separate),
    }
    return {name: (functools.partial(_reset, model), run) for name, (model, run) in work.items()}


def _step(ids: Tensor, model: nn.Module) -> None:
    torch.autograd.backward(model(input_ids=ids, labels=ids).loss)


def _reset(model: nn.Module) -> nn.Module:
    model.zero_grad()
    return model


def _cells(results: Mapping[str, Mapping[str, Sample]]) -> Iterator[list[str]]:
    for title, samples in results.items():
        for name, sample in samples.items():
            beside = (ratio(sample, samples[other]) for other in (ONE, SEPARATE))
            yield [title, name, str(sample), *map(str, beside)]


_TOGETHER_SECTION = Section(
    "together_step",
    ("a row", "contender", "median (quartiles)", "of one adapter", f"of {_ROWS} steps"),
    _measured,
    _cells,
)

SECTIONS = (
    section_of("llama_step", _LLAMA, pictures=_llama_charts),
    section_of("compiled_step", _COMPILED, _COMPILED_COLUMNS),
    section_of(
        "model_steps",
        _MODELS,
        {
            "model": lambda row: row.measured.model,
            "where": COLUMNS["where"],
            "F": lambda row: f"{row.measured.floor:.3f}",
            **COLUMNS,
        },
        _model_charts,
    ),
    section_of(
        f"{OTHER_KIND.lower()}_step",
        Steps(
            lambda size: [small_llama(size)],
            lambda *_: {
                **variants((AGAIN,)),
                **of_kinds(ADAPTER_KINDS, libraries=(OURS, BALANCED, PEFT)),
            },
            floor=False,
            one_thread=True,
        ),
        _KIND_COLUMNS,
    ),
    section_of(
        "expert_step",
        Steps(
            lambda size: [mixtral(size)],
            lambda *_: {**variants((AGAIN,)), OURS: (OURS, _EXPERTS), PEFT: (PEFT, _EXPERTS)},
            floor=False,
        ),
        {
            **COLUMNS,
            "largest tensor MiB": _largest,
        },
    ),
    section_of(
        "vocabulary_step",
        Steps(
            lambda size: [vocabulary_llama(size)],
            lambda *_: variants((AGAIN, OURS, CHUNKED, LEAST, PEFT), (0.0,)),
            floor=False,
        ),
        {**COLUMNS, "largest tensor MiB": _largest},
    ),
    section_of(
        "quantized_step",
        Steps(
            lambda size: [nf4_llama(size)],
            _nf4_contenders,
            lambda size: placements(half=size is Size.FULL) if available() else (),
            seconds=40.0,
            base=quantized_base,
            look=_look,
        ),
        {
            **COLUMNS,
            "of it weights, MiB": lambda row: mebibytes(row.measured.look.dense[row.name]),
            "base weights, MiB (before)": _weights,
        },
    ),
    Section("profile_step", ("where", "contender", *GROUPS, "sum"), _profiles, _profile_cells),
    section_of("memory_step", _MEMORY, _MEMORY_COLUMNS),
    Section(
        "saved_step",
        ("contender", *(f"{kind}, MiB" for kind in KINDS), "sum, MiB"),
        _kept,
        _kept_cells,
    ),
    _TOGETHER_SECTION,
)
