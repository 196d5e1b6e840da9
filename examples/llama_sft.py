"""Fine-tune a Llama on texts, with TRL's SFTTrainer if it is installed, or else with transformers' Trainer.

The checkpoints of both are adapters, and both can resume from them. By default the model is tiny and
untrained. With your own, in a folder with its tokenizer, and a file with one text in each line::

    python examples/llama_sft.py --model FOLDER --data texts.txt --out out/sft
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import lora_fx

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write_tiny(folder: Path) -> None:
    """Save an untrained model and a tokenizer of whole words."""
    words = ["[PAD]", "[END]", "count", "from", "to", *NUMBERS]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", eos_token="[END]"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(words), initializer_range=0.1, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)


def texts(path: str | None) -> list[str]:
    """Read the lines of a file, or make some: "count from two to five two three four five"."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8").splitlines()
    found = []
    for _ in range(256):
        first, last = sorted(random.sample(range(10), 2))
        counted = " ".join(NUMBERS[first : last + 1])
        found.append(f"count from {NUMBERS[first]} to {NUMBERS[last]} {counted}")
    return found


def trainer(model: nn.Module, tokenizer: Any, lines: list[str], options: dict[str, Any]) -> Trainer:
    """Return the trainer of TRL if it is installed, or else the one of transformers."""
    held_out = len(lines) // 8
    if importlib.util.find_spec("trl") is not None:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_dict({"text": lines})
        return SFTTrainer(
            model,
            SFTConfig(**options, bf16=False),
            train_dataset=data.select(range(held_out, len(lines))),
            eval_dataset=data.select(range(held_out)),
            processing_class=tokenizer,
        )
    rows = [{"input_ids": tokenizer(line + tokenizer.eos_token).input_ids} for line in lines]
    return Trainer(
        model,
        TrainingArguments(**options),
        train_dataset=rows[held_out:],
        eval_dataset=rows[:held_out],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="supervised fine-tuning")
    parser.add_argument(
        "--model", metavar="FOLDER", help="a causal language model and its tokenizer"
    )
    parser.add_argument("--data", metavar="FILE", help="one text in each line")
    parser.add_argument("--out", metavar="FOLDER", help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    with TemporaryDirectory() as temporary:
        source = options.model
        if source is None:
            source = str(Path(temporary, "base"))
            write_tiny(Path(source))
        base = AutoModelForCausalLM.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05))
        out = Path(options.out or Path(temporary, "out"))
        settings = {
            "output_dir": str(out),
            "max_steps": options.steps,
            "save_steps": options.steps,
            "per_device_train_batch_size": 16,
            "learning_rate": 5e-3,
            "report_to": [],
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        run = trainer(model, tokenizer, texts(options.data), settings)
        before = run.evaluate()["eval_loss"]
        run.train()
        after = run.evaluate()["eval_loss"]
        print(f"{type(run).__name__}: held-out loss {before:.3f} -> {after:.3f}")
        if after >= before:
            raise SystemExit("the loss did not fall")

        # A checkpoint is an adapter folder, which load_adapter, from_pretrained and PEFT can load.
        checkpoint = out / f"checkpoint-{options.steps}"
        loaded = lora_fx.load_adapter(AutoModelForCausalLM.from_pretrained(source), checkpoint)
        prompt = tokenizer(texts(options.data)[0], return_tensors="pt").input_ids
        with torch.no_grad():
            wanted = model.eval()(prompt.to(model.device)).logits.cpu()
            torch.testing.assert_close(loaded.eval()(prompt).logits, wanted, rtol=1e-3, atol=1e-3)
        size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1024
        print(f"the checkpoint computes the same; its weights take {size:.0f} KB")


if __name__ == "__main__":
    main()
