"""How the time of a rewrite grows with the model: Llama shapes from 125M to 70B on the meta device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from lora_fx.api import graphs, rewrite
from lora_fx.config import LoraConfig
from lora_fx.tools.bench.chart import Bar, Group, bars
from lora_fx.tools.bench.contenders import OURS, PEFT
from lora_fx.tools.bench.measure import Progress, Sample, Size, interleaved, portion, ratio
from lora_fx.tools.bench.steps import llama_shape

__all__ = ["TITLE", "Scale", "caption", "charts", "rows", "run"]

TITLE = "Rewriting models of 125M to 70B parameters, all-linear, rank 16"

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
_WHAT = "all-linear, rank 16, on the meta device"
_AGAIN = f"{OURS} again (A/A)"
_FEW_HEADS = ("34B", "70B")
_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Scale:
    """One shape.

    Attributes:
        nodes: Of all graphs of the rewritten model, each module's counted.
        samples: Times by contender.
    """

    nodes: int
    samples: dict[str, Sample]

    @property
    def per_thousand(self) -> float:
        """Seconds of lora-fx for a thousand nodes."""
        return 1e3 * self.samples[OURS].median / self.nodes


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, Scale]:
    """Results by shape."""
    names = list(_SHAPES)
    if size is not Size.FULL:
        names = ["125M", "7B"] if size is Size.QUICK else ["125M"]
    return {
        name: _measured(name, repeats, portion(progress, index, len(names), name))
        for index, name in enumerate(names)
    }


def rows(results: dict[str, Scale]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    columns = (
        "shape",
        "nodes",
        OURS,
        "A/A",
        PEFT,
        "of PEFT's",
        "lora-fx, ms per thousand nodes",
    )
    table: list[tuple[str, ...]] = []
    for name, scale in results.items():
        ours, again, peft = (scale.samples[one] for one in (OURS, _AGAIN, PEFT))
        row = (name, str(scale.nodes), str(ours), f"{ratio(again, ours).median:.2f}")
        beside = (str(peft), f"{ratio(ours, peft).median:.2f}")
        table.append((*row, *beside, f"{1e3 * scale.per_thousand:.1f}"))
    return columns, table


def caption() -> str:
    """What was measured."""
    return (
        "Llama shapes without values, rewritten without inputs. PEFT gets a fresh model for each run, which "
        "is not timed. A/A is the same rewrite under a second name, beside the first. Nodes are those of the "
        "graphs of all modules after the rewrite. Time that is linear in them has the same last column in "
        "every row; what is done once shows in small ones."
    )


def charts(results: dict[str, Scale]) -> dict[str, str]:
    """One picture: seconds by shape."""
    groups = [
        Group(
            f"{name}, {scale.nodes} nodes",
            [
                Bar(who, scale.samples[who].median, kind)
                for who, kind in ((OURS, "ours"), (PEFT, "theirs"))
            ],
        )
        for name, scale in results.items()
    ]
    return {
        "rewrite-scale.svg": bars(f"Time to rewrite, {_WHAT}", "seconds, less is better", groups)
    }


def _measured(name: str, repeats: int, progress: Progress | None) -> Scale:
    import peft

    base = _llama(name)
    ours = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")

    def fresh() -> tuple[nn.Module, Any]:
        theirs = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
        return _llama(name), theirs

    samples = interleaved(
        {
            OURS: (_nothing, lambda _: rewrite(base, ours)),
            _AGAIN: (_nothing, lambda _: rewrite(base, ours)),
            PEFT: (fresh, lambda given: peft.get_peft_model(*given)),
        },
        repeats=repeats,
        seconds=_SECONDS,
        progress=progress,
    )
    nodes = sum(len(graph.nodes) for graph in graphs(rewrite(base, ours)).values())
    return Scale(nodes, samples)


def _nothing() -> None:
    """Ours needs no fresh model: the one that it is given stays as it is."""


def _llama(name: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = llama_shape(*_SHAPES[name], vocabulary=32000)
    if name in _FEW_HEADS:
        shape["num_key_value_heads"] = 8
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**shape))
    return model
