"""Train on preferences with DPO after fine-tuning. The reference needs memory for its adapter only.

The reference model of DPO is the model after fine-tuning, with its adapter. ``lora_fx.reference`` returns it.
If TRL is installed, its DPOTrainer runs DPO (``--loop`` for the plain loop). By default the model is tiny and
untrained. With your own, in a folder with its tokenizer::

    python examples/dpo.py --model FOLDER
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

WORDS = ["please", "tell", "me", "about", "cats", "ships", "bread", "snow", "they", "are"]
KINDS = ["chosen", "rejected"]
GOOD, BAD = ["nice", "warm", "fine"], ["awful", "cold", "poor"]
Row = dict[str, str]


def build(folder: str | None) -> tuple[nn.Module, Any]:
    """Load a language model and a tokenizer from a folder, or make tiny ones."""
    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(folder), tokenizer
    words = ["[PAD]", "[END]", *WORDS, *GOOD, *BAD]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", eos_token="[END]"
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(words), initializer_range=0.1, **sizes, **heads)
    return LlamaForCausalLM(config), tokenizer


def preferences(count: int) -> list[Row]:
    """Make prompts with two answers each. The friendly answer is the chosen one."""
    rows = []
    for _ in range(count):
        topic = random.choice(WORDS[4:8])
        prompt, answer = f"please tell me about {topic}", f" {topic} they are "
        good, bad = random.choice(GOOD), random.choice(BAD)
        rows.append({"prompt": prompt, "chosen": answer + good, "rejected": answer + bad})
    return rows


def encode(model: nn.Module, tokenizer: Any, rows: list[Row], kinds: list[str]) -> Any:
    """Return a batch of prompts, each with its chosen or its rejected answer."""
    texts = [row["prompt"] + row[kind] for row, kind in zip(rows, kinds, strict=True)]
    options = {"padding": True, "padding_side": "right", "return_token_type_ids": False}
    return tokenizer(texts, return_tensors="pt", **options).to(model.device)


def fine_tune(model: nn.Module, tokenizer: Any, steps: int) -> None:
    """Fine-tune on both kinds of answers, so that DPO can prefer one of them."""
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=5e-3)
    for _ in range(steps):
        rows = preferences(16)
        batch = encode(model, tokenizer, rows, [random.choice(KINDS) for _ in rows])
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def log_probabilities(model: nn.Module, tokenizer: Any, rows: list[Row], kind: str) -> Tensor:
    """Return the log-probability of each row's answer, given its prompt."""
    batch = encode(model, tokenizer, rows, [kind] * len(rows))
    logs = model(**batch).logits[:, :-1].log_softmax(-1)
    logs = logs.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    starts = [len(tokenizer(row["prompt"]).input_ids) for row in rows]
    places = torch.arange(1, logs.shape[1] + 1, device=logs.device)
    answer = places >= torch.tensor(starts, device=logs.device)[:, None]
    return (logs * (answer & batch.attention_mask[:, 1:].bool())).sum(-1)


def margins(model: nn.Module, tokenizer: Any, rows: list[Row]) -> Tensor:
    """Return the log-probability of each chosen answer minus that of the rejected one."""
    chosen, rejected = (log_probabilities(model, tokenizer, rows, kind) for kind in KINDS)
    return chosen - rejected


def prefer(model: nn.Module, reference: nn.Module, tokenizer: Any, steps: int) -> None:
    """Train with the loss of DPO: -log σ(β (margin - margin of the reference)), with β = 0.1."""
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=1e-3)
    for _ in range(steps):
        rows = preferences(16)
        with torch.no_grad():
            before = margins(reference, tokenizer, rows)
        gain = 0.1 * (margins(model, tokenizer, rows) - before)
        (-nn.functional.logsigmoid(gain)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def prefer_by_trl(model: nn.Module, reference: nn.Module, tokenizer: Any, steps: int) -> None:
    """Train with DPO in TRL's trainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    with TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            beta=0.1,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_list(preferences(128))
        DPOTrainer(
            model, reference, arguments, train_dataset=data, processing_class=tokenizer
        ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description="DPO with a free reference")
    parser.add_argument("--model", metavar="FOLDER", help="a causal language model, its tokenizer")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--loop", action="store_true", help="without TRL, installed or not")
    options = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    base, tokenizer = build(options.model)
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=8, lora_alpha=16)).train()
    fine_tune(model, tokenizer, options.steps)

    reference = lora_fx.reference(model)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    own = sum(p.numel() for p in reference.parameters() if p.data_ptr() not in shared)
    whole = sum(p.numel() for p in reference.parameters())

    by_trl = not options.loop and importlib.util.find_spec("trl") is not None
    (prefer_by_trl if by_trl else prefer)(model, reference, tokenizer, options.steps)
    rows = preferences(64)
    with torch.no_grad():
        before = margins(reference, tokenizer, rows).mean().item()
        after = margins(model.eval(), tokenizer, rows).mean().item()
    print(
        f"{'TRL' if by_trl else 'loop'}: margin of the chosen answers {before:.2f} -> {after:.2f}"
    )
    print(f"the reference takes memory for {own:,} of {whole:,} parameters")
    if after <= before:
        raise SystemExit("the margin did not grow")


if __name__ == "__main__":
    main()
