"""How exact a merge is, in units in the last place of the merged weight, beside PEFT's.

The exact weight is ``W + s · B A`` in fp64 from the factors that both have. A weight that is rounded once is
within half a unit; one that is not the nearest number to the exact weight is counted as wrong.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from lora_fx.api import merge, rewrite
from lora_fx.config import LoraConfig
from lora_fx.passes.merge import rounded, ulp
from lora_fx.tools.bench.contenders import OURS, PEFT
from lora_fx.tools.bench.measure import Progress, Size

__all__ = ["TITLE", "MergeError", "caption", "rows", "run"]

TITLE = "Errors of merged weights in half precision"

_LAYERS, _WIDTH, _RANK = 4, 512, 16


@dataclasses.dataclass(frozen=True)
class MergeError:
    """The error of one merge.

    Attributes:
        largest: Of all weights, in units in the last place.
        wrong: Share of the weights that are not the nearest number to the exact one.
    """

    largest: float
    wrong: float


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, dict[str, MergeError]]:
    """Errors by dtype, then by contender. Nothing is timed: one run says all."""
    results = {}
    for done, dtype in enumerate((torch.bfloat16, torch.float16)):
        if progress is not None:
            progress(done, 2, str(dtype))
        results[str(dtype).removeprefix("torch.")] = _errors(
            dtype, 32 if size is Size.TINY else _WIDTH
        )
    return results


def rows(
    results: dict[str, dict[str, MergeError]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    columns = ("dtype", "contender", "largest error in ulp", "weights rounded wrongly")
    table: list[tuple[str, ...]] = []
    for dtype, contenders in results.items():
        for name, error in contenders.items():
            table.append((dtype, name, f"{error.largest:.3f}", f"{100 * error.wrong:.2f} %"))
    return columns, table


def caption() -> str:
    """What was merged."""
    return (
        f"{_LAYERS} linear layers of {_WIDTH} × {_WIDTH}, rank {_RANK}, random factors that change weights "
        "by about a tenth; the exact weight is computed in fp64."
    )


def _errors(dtype: torch.dtype, width: int) -> dict[str, MergeError]:
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(width, width) for _ in range(_LAYERS))).to(dtype)
    names = [str(place) for place in range(_LAYERS)]
    ours = rewrite(base, LoraConfig(r=_RANK, target_modules=names))
    settings: Any = {"r": _RANK, "lora_alpha": 8, "target_modules": names}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
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
    model: nn.Module, names: list[str], exact: list[torch.Tensor], dtype: torch.dtype
) -> MergeError:
    largest, wrong, count = 0.0, 0, 0
    for name, value in zip(names, exact, strict=True):
        found = model.get_submodule(name).get_parameter("weight").detach()
        largest = max(largest, float(((found.double() - value).abs() / ulp(value, dtype)).max()))
        wrong += int((found != rounded(value, dtype)).sum())
        count += found.numel()
    return MergeError(largest, wrong / count)
