"""Training of the demo's model by the fused function, by the plain operations and by PEFT.

A seed gives the starting factors and the order of the batches, so that what differs between two ways of the
same seed is their masks, and rounding.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.runtime.kernels import fused_lora as _fused_branch
from lora_fx.runtime.kernels.masks import recovery
from lora_fx.tools.demo import Batch, SentenceClassifier, batches, collect, tokens

pytestmark = pytest.mark.slow

SEEDS = range(5)
EPOCHS = 2
OPTIONS = {
    "r": 8,
    "lora_alpha": 16,
    # More than the demo's, so that it matters what dropout does.
    "lora_dropout": 0.5,
    "target_modules": ["query", "key", "value", "dense"],
    "modules_to_save": ["head"],
}
# Student's t with four degrees of freedom is beyond it once in a hundred times (two-sided).
LIMIT = 4.60


@dataclass(frozen=True)
class Curves:
    """For each seed the loss of every step, and that of held-out text at the end, in evaluation.

    Shapes: [seeds, steps] and [seeds].
    """

    steps: np.ndarray
    held_out: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """The loss that training ends with, of its last quarter [seeds]."""
        return self.steps[:, -self.steps.shape[1] // 4 :].mean(1)


class Task:
    """Whose documentation is it? Three layers of a pretrained encoder, a new head."""

    def __init__(self) -> None:
        corpus = collect(80, 80, libraries=("networkx", "numpy", "torch"))
        self.base = SentenceClassifier.pretrained(3)
        self.base.encoder.encoder.layer = self.base.encoder.encoder.layer[:3]
        self.ids, self.labels = tokens(corpus.train, 16), corpus.labels(corpus.train)
        labels = corpus.labels(corpus.held_out)
        self.held_out = batches(tokens(corpus.held_out, 16), labels, 60)

    def model(self, way: str, seed: int) -> nn.Module:
        config = lora_fx.LoraConfig(**OPTIONS, seed=seed)
        ours = lora_fx.rewrite(self.base, config, optimize=way == "fused")
        if way != "peft":
            return ours
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(copy.deepcopy(self.base), peft.LoraConfig(**OPTIONS))
            state = lora_fx.adapter_state_dict(ours)
            assert not peft.set_peft_model_state_dict(theirs, state).unexpected_keys
        return theirs

    def parts(self, seed: int) -> Iterator[Batch]:
        shuffle = random.Random(seed)
        for _ in range(EPOCHS):
            yield from batches(self.ids, self.labels, 12, shuffle)

    def train(self, way: str, seed: int) -> tuple[list[float], float]:
        model = self.model(way, seed).train()
        wanted = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(wanted, lr=2e-3)
        loss_of = nn.CrossEntropyLoss()
        torch.manual_seed(seed)
        losses = []
        for part in self.parts(seed):
            loss = loss_of(model(**part.inputs), part.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            outputs = torch.cat([model(**part.inputs) for part in self.held_out])
        labels = torch.cat([part.labels for part in self.held_out])
        return losses, loss_of(outputs, labels).item()

    def curves(self, way: str) -> Curves:
        steps, held_out = zip(*(self.train(way, seed) for seed in SEEDS), strict=True)
        return Curves(np.array(steps), np.array(held_out))


@pytest.fixture(scope="module")
def task() -> Task:
    return Task()


@pytest.fixture(scope="module")
def found(task: Task) -> dict[str, Curves]:
    return {way: task.curves(way) for way in ("fused", "canonical", "peft")}


def differs(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether paired losses differ by more than noise: Student's paired t-test."""
    difference = one - other
    return bool(abs(difference.mean()) > LIMIT * difference.std(ddof=1) / len(difference) ** 0.5)


@pytest.mark.parametrize("pair", [("fused", "canonical"), ("fused", "peft"), ("canonical", "peft")])
def test_curves_agree_within_noise(pair: tuple[str, str], found: dict[str, Curves]) -> None:
    one, other = (found[way] for way in pair)
    for mine, theirs in ((one.last, other.last), (one.held_out, other.held_out)):
        assert not differs(mine, theirs), (mine, theirs)
        spread = np.concatenate([mine - mine.mean(), theirs - theirs.mean()]).std(ddof=2)
        assert abs(mine.mean() - theirs.mean()) < spread, (mine, theirs)


def test_every_way_learns(found: dict[str, Curves]) -> None:
    """Curves of models that do not learn would agree, too."""
    for curves in found.values():
        assert curves.steps[:, 0] == pytest.approx(np.log(3), rel=1e-5)
        assert (curves.last < 0.8 * np.log(3)).all(), curves.last
        assert (curves.held_out < 0.95 * np.log(3)).all(), curves.held_out


def test_a_mask_that_is_not_scaled_is_seen(
    task: Task, found: dict[str, Curves], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison has the power to find such an error."""
    monkeypatch.setattr(_fused_branch, "recovery", lambda _: 1.0)
    assert recovery(0.5) == 2
    wrong = task.curves("fused")
    assert differs(wrong.last, found["canonical"].last) or differs(
        wrong.held_out, found["canonical"].held_out
    )
