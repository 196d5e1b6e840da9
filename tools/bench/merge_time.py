"""How long a merge takes and what it allocates: 105 million adapted weights, beside PEFT."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.api import merge, rewrite
from lora_fx.config import LoraConfig
from lora_fx.tools.bench.contenders import shared_copy
from lora_fx.tools.bench.counted import Memory, measure_memory
from lora_fx.tools.bench.measure import (
    Place,
    Progress,
    Sample,
    Size,
    at_each,
    devices,
    interleaved,
    synchronizer,
)

__all__ = ["BOUND", "OURS", "OURS_INTO", "PEFT", "TITLE", "Merged", "caption", "rows", "run"]

TITLE = "Merging 105 million weights, rank 16"

OURS = "lora-fx"
OURS_INTO = "lora-fx, into=base"
PEFT = "PEFT merge_and_unload"

BOUND = "addmm_ in the weight's dtype"

_RANK = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Merged:
    """One contender in one dtype.

    Attributes:
        sample: Times.
        memory: What its operations allocate.
        weight: Bytes of one weight.
    """

    sample: Sample
    memory: Memory
    weight: int


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, dict[str, Merged]]:
    """Results by device and dtype, then by contender."""
    # Weights are merged in half types on every machine, however slow its products in them are.
    where = [Place(device, dtype) for device in devices() for dtype in _DTYPES]
    if size is not Size.FULL:
        where = where[:1] if size is Size.TINY else where[:2]

    def work(place: Place, tell: Progress | None) -> dict[str, Merged]:
        return _measured(place, _shape(size), repeats, tell)

    return at_each(where, work, progress)


def rows(
    results: dict[str, dict[str, Merged]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    columns = (
        "where",
        "contender",
        "median (quartiles)",
        "of PEFT's",
        "peak MiB",
        "largest tensor MiB",
    )
    return columns, [
        (
            where,
            name,
            str(one.sample),
            f"{one.sample.median / found[PEFT].sample.median:.2f}",
            f"{one.memory.peak / 2**20:.1f}",
            f"{one.memory.largest / 2**20:.1f}",
        )
        for where, found in results.items()
        for name, one in found.items()
    ]


def caption() -> str:
    """What was measured."""
    layers, width = _shape(Size.FULL)
    return (
        f"{layers} linear layers of {width} × {width}; a weight is {width * width * 4 / 2**20:.0f} MiB in "
        "fp32 and half of that in the half types. `lora-fx` gives a new model and leaves the adapted one "
        "as it is: its peak has the merged weights in it, and the largest tensor is a merged weight. "
        "`into=base` writes over the weights of a model that it is given, as PEFT writes over its own, but "
        "all of it or nothing: what can fail is found before the first write. lora-fx adds up in fp64, slice "
        "by slice, and rounds once. The last row is what bounds any merge: one `addmm_` a weight and nothing "
        "else, with factors in its dtype: no check, no new tensor, no fp64. "
        "Copies that are needed to merge again are not timed."
    )


def _shape(size: Size) -> tuple[int, int]:
    if size is Size.TINY:
        return 2, 32
    return (4, 1024) if size is Size.QUICK else (25, 2048)


def _measured(
    place: Place, shape: tuple[int, int], repeats: int, progress: Progress | None
) -> dict[str, Merged]:
    contenders = _contenders(place, shape)
    weight = shape[1] ** 2 * place.dtype.itemsize
    timed = interleaved(
        contenders,
        repeats=repeats,
        seconds=_SECONDS,
        synchronize=synchronizer(place.device),
        progress=progress,
    )
    return {
        name: Merged(timed[name], measure_memory(functools.partial(work, prepare())), weight)
        for name, (prepare, work) in contenders.items()
    }


def _contenders(
    place: Place, shape: tuple[int, int]
) -> Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    import peft

    layers, width = shape
    names = [str(place) for place in range(layers)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in names))
        base = base.to(place.device, place.dtype)
        fields: dict[str, Any] = {"r": _RANK, "lora_alpha": _RANK, "target_modules": names}
        ours = rewrite(base, LoraConfig(**fields))
        theirs = peft.get_peft_model(shared_copy(base), peft.LoraConfig(**fields))
        with torch.no_grad():
            for model in (ours, theirs):
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(0, 0.02)

    return {
        OURS: (lambda: ours, merge),
        f"{OURS} again (A/A)": (lambda: ours, merge),
        OURS_INTO: (lambda: copy.deepcopy(base), lambda given: merge(ours, into=given)),
        PEFT: (lambda: copy.deepcopy(theirs), lambda given: given.merge_and_unload()),
        f"{PEFT}, safe_merge": (
            lambda: copy.deepcopy(theirs),
            lambda given: given.merge_and_unload(safe_merge=True),
        ),
        BOUND: (lambda: _factors(theirs, names), _added),
    }


def _factors(adapted: nn.Module, names: list[str]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A copy of each weight, with B and A in its dtype."""
    found = []
    for name in names:
        layer: Any = adapted.get_submodule(f"base_model.model.{name}")
        weight = layer.base_layer.weight.detach().clone()
        a, b = (one["default"].weight.detach() for one in (layer.lora_A, layer.lora_B))
        found.append((weight, b.to(weight.dtype), a.to(weight.dtype)))
    return found


def _added(given: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for weight, b, a in given:
        weight.addmm_(b, a)
