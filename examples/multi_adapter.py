"""Train and run several adapters of one model in one batch. Each row of the batch has its adapter.

In the example tasks, the token after t is t + 1 ("up"), t - 1 ("down"), or t ("same"). With your own model::

    python examples/multi_adapter.py --model FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lora_fx

TASKS = {"up": 1, "down": -1, "same": 0}
RANKS = {"up": 4, "down": 8, "same": 2}
TOKENS = 32


def build(folder: str | None) -> nn.Module:
    """Load the model from its folder, or make a tiny one."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, initializer_range=0.2, **sizes, **heads))


def texts(task: str, count: int) -> Tensor:
    """Make rows of 12 tokens, [count, 12], that follow the rule of a task."""
    starts = torch.randint(TOKENS, (count, 1))
    return (starts + TASKS[task] * torch.arange(12)) % TOKENS


def train(model: nn.Module, steps: int) -> list[dict[str, float]]:
    """Train all adapters with each batch. Return the loss of each adapter in every step."""
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=1e-2)
    names = [task for task in TASKS for _ in range(16)]
    history = []
    model.train()
    for _ in range(steps):
        ids = torch.cat([texts(task, 16) for task in TASKS])
        logits = model(input_ids=ids, adapter_ids=names).logits
        # The loss of an adapter is the mean over its rows. The sum of all losses trains each adapter as if it
        # were alone.
        losses = lora_fx.adapter_losses(logits, ids, names)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({task: loss.item() for task, loss in losses.items()})
    model.eval()
    return history


def row_losses(
    model: Callable[..., object], ids: Tensor, names: list[str | None] | None = None
) -> Tensor:
    """Return the mean loss of each row, without its first two tokens, which cannot be predicted."""
    more = {} if names is None else {"adapter_ids": names}
    logits = model(input_ids=ids, **more).logits[:, 1:-1]
    losses = nn.functional.cross_entropy(logits.mT, ids[:, 2:], reduction="none")
    return losses.mean(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description="several adapters in one batch")
    parser.add_argument("--model", metavar="FOLDER", help="a causal language model")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    torch.manual_seed(0)
    # The adapters of a model may have different ranks.
    configs = {task: lora_fx.LoraConfig(r=rank, lora_alpha=16) for task, rank in RANKS.items()}
    first, *others = TASKS
    model = lora_fx.rewrite(build(options.model), configs[first], adapter_name=first)
    for task in others:
        lora_fx.add_adapter(model, configs[task], task)
    lora_fx.set_adapter(model, [*TASKS], per_sample=True)
    history = train(model, options.steps)
    for task in TASKS:
        print(f"{task:5} loss {history[0][task]:.3f} -> {history[-1][task]:.3f}")

    # Each request names its adapter; None is the base. One call answers all of them.
    requests = ["down", "up", None, "same", "up"]
    ids = torch.cat([texts(task or "up", 1) for task in requests])
    with torch.no_grad():
        mixed = row_losses(model, ids, requests)
        for row, task in enumerate(requests):
            lora_fx.set_adapter(model, task or [])
            alone = row_losses(model, ids[row : row + 1])
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    shown = ", ".join(
        f"{task or 'base'} {loss:.3f}" for task, loss in zip(requests, mixed.tolist(), strict=True)
    )
    print(f"one batch, each row as with its adapter alone: {shown}")


if __name__ == "__main__":
    main()
