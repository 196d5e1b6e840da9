"""Train sentence embeddings with a contrastive loss: rewrite, train, save and load a SentenceTransformer.

By default the encoder is tiny and untrained. With your own::

    python examples/sentence_transformers_embedding.py --model FOLDER
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import lora_fx

TOPICS = {
    "cats": ["cat", "kitten", "purr", "whiskers"],
    "ships": ["ship", "harbor", "sail", "anchor"],
    "bread": ["bread", "oven", "flour", "crust"],
    "snow": ["snow", "ice", "frost", "sled"],
}


def write_tiny(folder: Path) -> None:
    """Save an untrained encoder and a tokenizer of whole words."""
    about = [word for words in TOPICS.values() for word in words]
    words = ["[PAD]", "[UNK]", "a", "and", "the", *about]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=len(words), num_attention_heads=4, **sizes)
    BertModel(config).save_pretrained(folder)


def pairs(topics: list[str]) -> tuple[list[str], list[str]]:
    """Make two sentences about each topic. Return the first sentences and the second ones."""
    said = [random.sample(TOPICS[topic], 4) for topic in topics]
    return [f"a {w[0]} and the {w[1]}" for w in said], [f"the {w[2]} and a {w[3]}" for w in said]


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA on a sentence-transformers model")
    parser.add_argument("--model", metavar="FOLDER", help="a model of sentence-transformers")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        source = options.model
        if source is None:
            source = str(Path(folder, "encoder"))
            write_tiny(Path(source))
            encoder = Transformer(source)
            pooling = Pooling(encoder.get_embedding_dimension())
            SentenceTransformer(modules=[encoder, pooling], device="cpu").save(source)
        base = SentenceTransformer(source, device="cpu")
        config = lora_fx.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
        model = lora_fx.rewrite(base, config)

        contrast = MultipleNegativesRankingLoss(model)
        optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=1e-2)
        found = []
        model.train()
        for _ in range(options.steps):
            features = [model.preprocess(side) for side in pairs(list(TOPICS))]
            loss = contrast(features, labels=None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        model.eval()
        print(f"contrastive loss {found[0]:.3f} -> {found[-1]:.3f}")
        if found[-1] >= found[0]:
            raise SystemExit("the loss did not fall")

        # The folder has the adapter and the name of the base. The library loads both.
        model.save_pretrained(str(Path(folder, "out")))
        again = SentenceTransformer(str(Path(folder, "out")), device="cpu")
        first, second = pairs(list(TOPICS))
        wanted = model.encode(first, convert_to_tensor=True)
        torch.testing.assert_close(
            again.encode(first, convert_to_tensor=True), wanted, rtol=1e-4, atol=1e-4
        )
        best = model.similarity(wanted, model.encode(second, convert_to_tensor=True)).argmax(-1)
        right = (best == torch.arange(len(TOPICS))).float().mean().item()
        print(f"the nearest sentence is of the same topic: {right:.0%}; loaded again, it is equal")


if __name__ == "__main__":
    main()
