"""Train a sentence classifier on a small BERT, such as MiniLM, with the Trainer of transformers.

By default the model is tiny and untrained. With your own encoder, in a folder with its tokenizer::

    python examples/minilm_classification.py --model FOLDER
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import lora_fx

SUBJECTS = ["the film", "this book", "our hotel", "the meal", "that song", "the trip"]
WORDS = {
    0: ["awful", "boring", "dirty", "cold", "too long", "a waste of money"],
    1: ["great", "fun", "lovely", "warm", "moving", "worth every cent"],
}


def sentences(count: int) -> list[tuple[str, int]]:
    """Make reviews with labels: 1 for a good review, 0 for a bad one."""
    found = []
    for _ in range(count):
        label = random.randrange(2)
        words = random.sample(WORDS[label], 2)
        found.append((f"{random.choice(SUBJECTS)} was {words[0]} and {words[1]}", label))
    return found


def build(folder: str | None) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """Load an encoder with a classification head, and a tokenizer, from a folder, or make tiny ones."""
    if folder is not None:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        return model, AutoTokenizer.from_pretrained(folder)
    known = sorted({word for text, _ in sentences(500) for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *known])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=len(vocabulary), num_attention_heads=4, num_labels=2, **sizes)
    config.initializer_range = 0.2  # so that an untrained model of this size tells words apart
    return BertForSequenceClassification(config), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA on a sentence encoder")
    parser.add_argument("--model", metavar="FOLDER", help="an encoder and its tokenizer")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    base, tokenizer = build(options.model)
    # The classifier is a new layer, so it is trained in full and saved with the adapter.
    config = lora_fx.LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    model = lora_fx.rewrite(base, config)
    data = [{**tokenizer(text), "labels": label} for text, label in sentences(256)]

    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            save_steps=options.steps,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data[64:],
            eval_dataset=data[:64],
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        checkpoint = Path(folder, f"checkpoint-{options.steps}", "adapter_model.safetensors")
        size = checkpoint.stat().st_size / 1024
    print(f"held-out loss {before:.3f} -> {after:.3f}, the adapter of a checkpoint: {size:.0f} KB")
    if after >= before:
        raise SystemExit("the loss did not fall")

    merged = lora_fx.merge(model).eval()
    batch = tokenizer(["the film was great", "the meal was cold"], return_tensors="pt").to(
        model.device
    )
    torch.testing.assert_close(merged(**batch).logits, model.eval()(**batch).logits)


if __name__ == "__main__":
    main()
