"""Models with random weights, built from configurations, and a batch for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.tools.bench.places import Place
from lora_fx.tools.bench.sizes import Size

__all__ = ["Workload", "bert", "gpt2", "llama", "llama_block", "llama_shape", "resnet", "vit"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and a batch.

    Attributes:
        title: What the tables call it.
        make: Gives the model, in training mode, on the CPU, the same each time.
        inputs: Keyword arguments of a call that gives a loss.
    """

    title: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]

    def on(self, place: Place) -> dict[str, Tensor]:
        """The batch at a place: numbers that are not whole have its dtype. They are leaves."""
        found = {}
        for name, value in self.inputs.items():
            dtype = place.dtype if value.is_floating_point() else value.dtype
            moved = value.detach().to(place.device, dtype)
            found[name] = moved.requires_grad_(value.requires_grad)
        return found


def llama_shape(
    hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 512, **more: Any
) -> dict[str, Any]:
    """Arguments of a ``LlamaConfig``."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        **more,
    }


def llama(title: str, shape: Mapping[str, Any], tokens: int) -> Workload:
    """A Llama on one sequence; the loss is that of the next token."""
    ids = _ids(shape["vocab_size"], tokens)
    make = functools.partial(_make, "LlamaConfig", "LlamaForCausalLM", dict(shape))
    return Workload(title, make, {"input_ids": ids, "labels": ids})


def llama_block(size: Size) -> Workload:
    """One block of a Llama of 1.3B parameters, as in the middle of it: its input wants a gradient."""
    tokens, hidden = (8, 16) if size is Size.TINY else (256, 2048)
    if size is Size.TINY:
        shape = llama_shape(hidden, 32, 1, 2, 32)
    else:
        shape = llama_shape(hidden, 5504, 1, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(1, tokens, hidden).requires_grad_()
    make = functools.partial(_make, "LlamaConfig", "LlamaForCausalLM", shape)
    inputs = {"inputs_embeds": x, "labels": _ids(shape["vocab_size"], tokens)}
    return Workload(f"Llama block, 1 × {hidden}, {tokens} tokens", make, inputs)


def gpt2(size: Size) -> Workload:
    """GPT-2 small; its layers are ``Conv1D``."""
    shape: dict[str, Any] = {}
    if size is Size.TINY:
        shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    tokens = 8 if size is Size.TINY else 128
    ids = _ids(shape.get("vocab_size", 50257), tokens)
    make = functools.partial(_make, "GPT2Config", "GPT2LMHeadModel", shape)
    return Workload(f"GPT-2 small, {tokens} tokens", make, {"input_ids": ids, "labels": ids})


def bert(size: Size) -> Workload:
    """BERT-base with its head for masked words."""
    shape: dict[str, Any] = {}
    if size is Size.TINY:
        shape = _tiny_encoder() | {"vocab_size": 64, "max_position_embeddings": 32}
    tokens = 8 if size is Size.TINY else 128
    ids = _ids(shape.get("vocab_size", 30522), tokens)
    make = functools.partial(_make, "BertConfig", "BertForMaskedLM", shape)
    return Workload(f"BERT-base, {tokens} tokens", make, {"input_ids": ids, "labels": ids})


def vit(size: Size) -> Workload:
    """ViT-B/16 with ten classes on one picture."""
    shape: dict[str, Any] = {"num_labels": 10}
    if size is Size.TINY:
        shape |= _tiny_encoder() | {"image_size": 32}
    edge = shape.get("image_size", 224)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pixels = torch.randn(1, 3, edge, edge)
    make = functools.partial(_make, "ViTConfig", "ViTForImageClassification", shape)
    tokens = (edge // 16) ** 2 + 1
    inputs = {"pixel_values": pixels, "labels": torch.tensor([3])}
    return Workload(f"ViT-B/16, {tokens} tokens", make, inputs)


def resnet(size: Size) -> Workload:
    """ResNet-50 with ten classes on two pictures."""
    # A loss that finds its kind by itself writes it into the settings, which a graph has seen without.
    shape: dict[str, Any] = {"num_labels": 10, "problem_type": "single_label_classification"}
    if size is Size.TINY:
        shape |= {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    edge = 32 if size is Size.TINY else 224
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # In training a batch norm wants two values of each channel.
        pixels = torch.randn(2, 3, edge, edge)
    make = functools.partial(_make, "ResNetConfig", "ResNetForImageClassification", shape)
    inputs = {"pixel_values": pixels, "labels": torch.tensor([3, 4])}
    return Workload(f"ResNet-50, 2 × {edge} × {edge}", make, inputs)


def _tiny_encoder() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }


def _make(config: str, model: str, shape: dict[str, Any]) -> nn.Module:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**shape))
    return made.train()


def _ids(vocabulary: int, tokens: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randint(0, vocabulary, (1, tokens))
