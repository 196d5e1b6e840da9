"""Training results of adapters: over NF4 and over fp32, and with each way to compute a step."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.api import rewrite
from lora_fx.tools import demo
from lora_fx.tools.bench.contenders import (
    BALANCED,
    CANONICAL,
    FROZEN,
    LEAST,
    OURS,
    PEFT,
    Settings,
    built,
    shared_copy,
)
from lora_fx.tools.bench.measure import Run, Size
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.step_sections import available, quantized_base
from lora_fx.tools.bench.workloads import curve_llama

__all__ = ["DENSE", "FUSED", "NF4", "SECTIONS", "THEIRS", "WAYS", "Curves", "Learned"]

# --- over a quantized base ------------------------------------------------------------------------
# The demo's task with the same number of steps, compared with adapters over fp32.


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
    """The accuracy of each contender after training.

    Attributes:
        accuracy: Fraction of the held-out text that each contender classifies correctly, by seed.
        steps: Steps of each training.
        judged: Number of held-out sentences.
    """

    accuracy: Mapping[str, tuple[float, ...]]
    steps: int
    judged: int

    def mean(self, name: str) -> float:
        """Return a contender's accuracy, averaged over the seeds."""
        return statistics.fmean(self.accuracy[name])

    def lost(self, name: str) -> float:
        """Return by how many percentage points a contender's accuracy is below that of adapters over fp32."""
        return 100 * (self.mean(DENSE) - self.mean(name))


def _run(run: Run) -> dict[str, Learned]:
    """Measure the accuracies on the CPU. Return no result without bitsandbytes.

    Repeats are seeds of the factors, the order and the dropout; two at most.
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
    accuracies: dict[str, list[float]] = {
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
        for index, (name, (below, adapt)) in enumerate(makers.items()):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = adapt(below, seed)
                demo.train(model, corpus, dataclasses.replace(settings, seed=seed))
            accuracies.setdefault(name, []).append(_judged(model, held_out))
            run.tell(seed * len(makers) + index + 1, seeds * len(makers), name)
    steps = settings.epochs * -(-len(corpus.train) // settings.batch)
    accuracy = {name: tuple(values) for name, values in accuracies.items()}
    return {"cpu, float32": Learned(accuracy, steps, len(corpus.held_out))}


def _rows(results: Mapping[str, Learned]) -> Iterator[list[str]]:
    for where, learned in results.items():
        for name, each in learned.accuracy.items():
            frozen = name.startswith(FROZEN)
            seeds = ", ".join(f"{100 * accuracy:.1f}" for accuracy in each) if len(each) > 1 else ""
            lost = "" if frozen or name == DENSE else f"{learned.lost(name):+.1f}"
            row = [where, name, "" if frozen else str(learned.steps)]
            yield [*row, f"{100 * learned.mean(name):.1f}", seeds, lost]


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

    names = {name.rpartition(".")[2] for name, module in base.named_modules() if _is_layer(module)}
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


# --- by every way ---------------------------------------------------------------------------------
# The losses of the same training with each way to compute a step.

FUSED = (OURS, BALANCED, LEAST)
WAYS = (CANONICAL, *FUSED, PEFT)
"""Contenders. The first is the plain form (``optimize=False``), to which the others are compared."""

_STEPS = {Size.FULL: 100, Size.QUICK: 40, Size.TINY: 4}
_BATCH, _RATE = 8, 5e-3
_COUNT = 5
_SUCCESSORS = 4


@dataclasses.dataclass(frozen=True)
class Curves:
    """Losses of trainings that compute a LoRA step in different ways, with several seeds.

    Attributes:
        losses: Losses of each step by contender, [seeds, steps].
    """

    losses: Mapping[str, Tensor]

    def last(self, name: str) -> Tensor:
        """Return the final loss of each training, the mean of its last tenth, [seeds]."""
        losses = self.losses[name]
        return losses[:, -math.ceil(losses.shape[1] / 10) :].mean(1)

    def spread(self, name: str) -> float:
        """Return the standard deviation of a contender's final loss between seeds."""
        return float(self.last(name).std())

    def between_seeds(self, name: str) -> float:
        """Return the largest difference of a step's loss between two seeds."""
        losses = self.losses[name]
        return float((losses.amax(0) - losses.amin(0)).max())

    def apart(self, name: str) -> float:
        """Return the largest difference of a step's loss from the plain form with the same seed."""
        return float((self.losses[name] - self.losses[CANONICAL]).abs().max())

    def last_apart(self, name: str) -> float:
        """Return the mean final loss over seeds, minus that of the plain form."""
        return float((self.last(name) - self.last(CANONICAL)).mean())


def _trained(run: Run) -> dict[str, Curves]:
    """Train with each contender, and return the curves of losses by dropout probability.

    Repeats are seeds, five at most.
    """
    curves = {}
    for dropout, part in run.each((0.0, 0.05), lambda probability: f"p = {probability:g}"):
        curves[f"{dropout:g}"] = _curves(dropout, part)
    return curves


def _curves(dropout: float, run: Run) -> Curves:
    workload = curve_llama(run.size)
    settings, base = Settings(lora_dropout=dropout), workload.make()
    models = built({name: (name, settings) for name in WAYS}, base)
    seeds, steps = min(run.repeats, _COUNT), _STEPS[run.size]
    length = workload.inputs["input_ids"].shape[-1]
    words = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
    losses = {name: torch.zeros(seeds, steps, dtype=torch.float64) for name in WAYS}
    for seed in range(seeds):
        batches = _sentences(words, length, steps, seed)
        for index, (name, model) in enumerate(models.items()):
            _restart(model, seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                losses[name][seed] = torch.tensor([*_steps_of(model, batches)])
            run.tell(seed * len(WAYS) + index + 1, seeds * len(WAYS), name)
    return Curves(losses)


def _sentences(words: int, length: int, steps: int, seed: int) -> Tensor:
    """Draw batches from a Markov chain with a few successors for each word, [steps, batch, length]."""
    rule, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    following = torch.randint(words, (words, _SUCCESSORS), generator=rule)
    ids = torch.randint(words, (steps, _BATCH, length), generator=drawn)
    # The square makes the first successors more likely than the last.
    choices = torch.rand(ids.shape, generator=drawn).square().mul(_SUCCESSORS).long()
    for index in range(1, length):
        ids[..., index] = following[ids[..., index - 1], choices[..., index]]
    return ids


def _restart(model: nn.Module, seed: int) -> None:
    """Set the initial values of a model's factors: A as PEFT draws it, B zeros.

    The names of factors are the same in both libraries.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_A" in name:
                bound = 1 / math.sqrt(factor.shape[-1])
                factor.uniform_(-bound, bound, generator=draw)
            elif "lora_B" in name:
                factor.zero_()


def _steps_of(model: nn.Module, batches: Tensor) -> Iterator[float]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=_RATE)
    for ids in batches:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        yield loss.item()


def _curve_rows(results: Mapping[str, Curves]) -> Iterator[list[str]]:
    for dropout, curves in results.items():
        for name, losses in curves.losses.items():
            plain = name == CANONICAL
            yield [
                dropout,
                name,
                str(losses.shape[1]),
                f"{float(losses[:, 0].mean()):.4f}",
                f"{float(curves.last(name).mean()):.4f}",
                f"{curves.spread(name):.4f}",
                f"{curves.between_seeds(name):.3f}",
                "" if plain else f"{curves.last_apart(name):+.1e}",
                "" if plain else f"{curves.apart(name):.1e}",
            ]


SECTIONS = (
    Section(
        "quantized_quality",
        ("where", "contender", "steps", "held-out text right, %", "by seed", "points lost"),
        _run,
        _rows,
    ),
    Section(
        "training_curves",
        (
            "p",
            "contender",
            "steps",
            "first loss",
            "last loss",
            "its spread between seeds",
            "largest difference between seeds",
            "last loss less the plain form's",
            "largest difference from the plain form, same seed",
        ),
        _trained,
        _curve_rows,
    ),
)
