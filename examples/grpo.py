"""Train on a reward with GRPO. The base model is the reference: it shares its weights with the rewritten one.

A group of answers is sampled for each prompt. Answers with a reward above the mean of their group become more
likely. If TRL is installed, its GRPOTrainer runs GRPO (``--loop`` for the plain loop). By default the model
is tiny and untrained, and the reward counts even tokens. With your own, in a folder with its tokenizer::

    python examples/grpo.py --model FOLDER

A vLLM server of that model gets the adapter every five steps with ``--deliver http://127.0.0.1:8000``.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lora_fx

WORDS = [f"w{number}" for number in range(30)]
GROUP, LENGTH = 8, 8


def build(folder: str | None) -> tuple[nn.Module, Any]:
    """Load a language model and a tokenizer from a folder, or make tiny ones."""
    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(folder), tokenizer
    words = {word: number for number, word in enumerate(["[PAD]", "[END]", *WORDS])}
    plain = Tokenizer(models.WordLevel(words))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", eos_token="[END]", padding_side="left"
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = LlamaConfig(vocab_size=len(words), initializer_range=0.1, **sizes, **heads, **ends)
    return LlamaForCausalLM(config), tokenizer


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return the share of even tokens in each answer. TRL calls rewards with these arguments."""
    return [sum(one % 2 == 0 for one in ids) / LENGTH for ids in completion_ids]


def prompts(count: int) -> list[str]:
    """Make random prompts of equal length."""
    return [" ".join(random.choices(WORDS, k=4)) for _ in range(count)]


def sample(model: nn.Module, tokenizer: Any, asked: list[str]) -> tuple[Any, Tensor]:
    """Sample a group of answers to each prompt.

    Return the batch of prompts, each repeated for its group, and prompts with answers [rows, length].
    """
    rows = [prompt for prompt in asked for _ in range(GROUP)]
    batch = tokenizer(rows, return_tensors="pt", padding=True, return_token_type_ids=False)
    batch = batch.to(model.device)
    limits = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
    with torch.no_grad():
        return batch, model.generate(**batch, do_sample=True, top_k=0, **limits)


def log_probabilities(model: nn.Module, batch: Any, ids: Tensor) -> Tensor:
    """Return the log-probability of each token of the sampled answers, [rows, LENGTH]."""
    start = batch.input_ids.shape[1]
    mask = torch.cat([batch.attention_mask, torch.ones_like(ids[:, start:])], 1)
    logs = model(input_ids=ids, attention_mask=mask).logits[:, start - 1 : -1].log_softmax(-1)
    return logs.gather(-1, ids[:, start:, None]).squeeze(-1)


def learn(model: nn.Module, reference: nn.Module, tokenizer: Any, steps: int) -> None:
    """Train with GRPO: one update for each batch, and 0.02 times the divergence from the reference."""
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=5e-3)
    for _ in range(steps):
        batch, ids = sample(model, tokenizer, prompts(8))
        found = torch.tensor(reward(ids[:, -LENGTH:].tolist()), device=ids.device).view(-1, GROUP)
        spread = found.std(1, keepdim=True) + 1e-4
        advantage = ((found - found.mean(1, keepdim=True)) / spread).view(-1, 1)
        logs = log_probabilities(model, batch, ids)
        with torch.no_grad():
            less = log_probabilities(reference, batch, ids) - logs
        divergence = (less + logs.detach() - logs).exp() - (less + logs.detach() - logs) - 1
        ratio = (logs - logs.detach()).exp()
        (0.02 * divergence - ratio * advantage).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def learn_by_trl(model: nn.Module, tokenizer: Any, steps: int, server: str | None) -> None:
    """Train with GRPO in TRL's trainer. It needs no reference, because beta is 0."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8 * GROUP,
            num_generations=GROUP,
            max_completion_length=LENGTH,
            learning_rate=5e-3,
            beta=0.0,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"prompt": prompts(256)})
        callbacks = []
        if server is not None:
            callbacks = [lora_fx.sync_callback(server, every=5, probe=prompts(4), name="policy")]
        GRPOTrainer(
            model,
            reward,
            arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=callbacks,
        ).train()
        for callback in callbacks:
            print(*callback.deliveries, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO with a free reference")
    parser.add_argument(
        "--model", metavar="FOLDER", help="a causal language model and its tokenizer"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--deliver", metavar="URL", help="a vLLM server of the model; needs TRL")
    parser.add_argument("--loop", action="store_true", help="without TRL, installed or not")
    options = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    base, tokenizer = build(options.model)
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=8, lora_alpha=16)).eval()

    def mean_reward() -> float:
        _, ids = sample(model, tokenizer, prompts(16))
        found = reward(ids[:, -LENGTH:].tolist())
        return sum(found) / len(found)

    before = mean_reward()
    if options.deliver and (options.loop or importlib.util.find_spec("trl") is None):
        parser.error("--deliver needs TRL")
    by_trl = not options.loop and importlib.util.find_spec("trl") is not None
    if by_trl:
        learn_by_trl(model, tokenizer, options.steps, options.deliver)
    else:
        learn(model, base.eval(), tokenizer, options.steps)  # the base shares its weights
    after = mean_reward()
    print(f"{'TRL' if by_trl else 'loop'}: mean reward {before:.2f} -> {after:.2f}")
    if after <= before:
        raise SystemExit("the reward did not grow")


if __name__ == "__main__":
    main()
