"""What adapters over an NF4 base learn: the demo's task, equal steps, compared with adapters over fp32."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_fx.api import rewrite
from lora_fx.tools import demo
from lora_fx.tools.bench.contenders import FROZEN, OURS, PEFT, shared_copy
from lora_fx.tools.bench.measure import Run, Size
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.step_sections import available, quantized_base

__all__ = ["DENSE", "NF4", "SECTION", "THEIRS", "Learned"]

DENSE = f"{OURS} over fp32"
NF4 = f"{OURS} over NF4"
THEIRS = f"{PEFT} over NF4"

_SIZES = {
    Size.FULL: demo.DemoSettings(train=200, held_out=150, epochs=1, learning_rate=2e-3),
    Size.QUICK: demo.DemoSettings(train=60, held_out=60, epochs=1, learning_rate=2e-3),
    Size.TINY: demo.DemoSettings(train=8, held_out=8, epochs=1, batch=8),
}
_SEEDS = 2


@dataclasses.dataclass(frozen=True)
class Learned:
    """The results.

    Attributes:
        accuracy: Share of held-out text that each contender gets right, one for each seed.
        steps: Of each training.
        judged: Sentences of the held-out text.
    """

    accuracy: Mapping[str, tuple[float, ...]]
    steps: int
    judged: int

    def mean(self, name: str) -> float:
        """Over the seeds."""
        return statistics.fmean(self.accuracy[name])

    def lost(self, name: str) -> float:
        """Percentage points less than over fp32."""
        return 100 * (self.mean(DENSE) - self.mean(name))


def _run(run: Run) -> dict[str, Learned]:
    """The result on the CPU; none without bitsandbytes.

    Repeats are seeds: of the factors, the order and the dropout; two at most.
    """
    if not available():
        return {}
    settings = _SIZES[run.size]
    libraries = demo.LIBRARIES[:3] if run.size is Size.TINY else demo.LIBRARIES
    corpus = demo.collect(settings.train, settings.held_out, libraries=libraries)
    held_out = _batches(corpus.held_out, corpus, settings)
    base = demo.SentenceClassifier.pretrained(len(libraries))
    demo.fit_head(base, _batches(corpus.train, corpus, settings), iter(()))
    quantized = quantized_base(base).eval()
    found: dict[str, list[float]] = {
        FROZEN: [_judged(base, held_out)],
        f"{FROZEN}, NF4": [_judged(quantized, held_out)],
    }
    makers: dict[str, tuple[nn.Module, Callable[[nn.Module, int], nn.Module]]] = {
        DENSE: (base, _ours),
        NF4: (quantized, _ours),
        THEIRS: (quantized, _theirs),
    }
    seeds = min(run.repeats, _SEEDS)
    for seed in range(seeds):
        for place, (name, (below, adapt)) in enumerate(makers.items()):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = adapt(below, seed)
                demo.train(model, corpus, dataclasses.replace(settings, seed=seed))
            found.setdefault(name, []).append(_judged(model, held_out))
            run.tell(seed * len(makers) + place + 1, seeds * len(makers), name)
    steps = settings.epochs * -(-len(corpus.train) // settings.batch)
    accuracy = {name: tuple(one) for name, one in found.items()}
    return {"cpu, float32": Learned(accuracy, steps, len(corpus.held_out))}


def _rows(results: Mapping[str, Learned]) -> Iterator[list[str]]:
    for where, found in results.items():
        for name, each in found.accuracy.items():
            frozen = name.startswith(FROZEN)
            seeds = ", ".join(f"{100 * one:.1f}" for one in each) if len(each) > 1 else ""
            lost = "" if frozen or name == DENSE else f"{found.lost(name):+.1f}"
            row = [where, name, "" if frozen else str(found.steps)]
            yield [*row, f"{100 * found.mean(name):.1f}", seeds, lost]


def _batches(
    sentences: Sequence[Any], corpus: demo.Corpus, settings: demo.DemoSettings
) -> list[demo.Batch]:
    ids = demo.tokens(sentences, settings.max_length)
    return demo.batches(ids, corpus.labels(sentences), 2 * settings.batch)


def _judged(model: nn.Module, held_out: Sequence[demo.Batch]) -> float:
    guesses = demo.logits(lambda inputs: model(**inputs), held_out).argmax(-1)
    return float((guesses == torch.cat([part.labels for part in held_out])).double().mean())


def _ours(base: nn.Module, seed: int) -> nn.Module:
    return rewrite(base, dataclasses.replace(demo.CONFIG, seed=seed))


def _theirs(base: nn.Module, seed: int) -> nn.Module:
    import peft

    names = {name.rpartition(".")[2] for name, one in base.named_modules() if _is_layer(one)}
    config = peft.LoraConfig(
        r=demo.CONFIG.r,
        lora_alpha=demo.CONFIG.lora_alpha,
        lora_dropout=demo.CONFIG.lora_dropout,
        target_modules=sorted(names),
        exclude_modules=["head"],
        modules_to_save=["head"],
    )
    result: nn.Module = peft.get_peft_model(shared_copy(base), config).get_base_model()
    return result


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module) is not nn.Linear


SECTION = Section(
    "quantized_quality",
    ("where", "contender", "steps", "held-out text right, %", "by seed", "points lost"),
    _run,
    _rows,
)
