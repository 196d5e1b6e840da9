"""How the demo's task is learned: one loop for the demo itself and for whoever compares with it."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

from lora_fx.tools.demo.data import Corpus
from lora_fx.tools.demo.model import batches, tokens
from lora_fx.tools.demo.report import DemoSettings

__all__ = ["train"]


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
