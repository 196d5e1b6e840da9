"""Models that the benchmarks train or serve: their shapes and their inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.tools.bench.contenders import is_linear, model_floor
from lora_fx.tools.bench.measure import Placement, Size

__all__ = [
    "MODELS",
    "RANK",
    "STANDARD",
    "Served",
    "Workload",
    "curve_llama",
    "llama_shape",
    "mixtral",
    "nf4_llama",
    "randomize",
    "resnet",
    "served",
    "small_llama",
    "vocabulary_llama",
]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and a batch to train it on.

    Attributes:
        title: Name in the tables.
        make: Returns the model, in training mode, on the CPU, the same each time.
        inputs: Keyword arguments of a call that returns a loss.
    """

    title: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]

    @property
    def short(self) -> str:
        """Return the title of the workload without the size of the batch."""
        return self.title.partition(",")[0]

    def on(self, placement: Placement) -> dict[str, Tensor]:
        """Return the batch on a placement's device, as leaf tensors.

        Floating-point tensors get the dtype of the placement.
        """
        batch = {}
        for name, value in self.inputs.items():
            dtype = placement.dtype if value.is_floating_point() else value.dtype
            moved = value.detach().to(placement.device, dtype)
            batch[name] = moved.requires_grad_(value.requires_grad)
        return batch


def llama_shape(
    hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 512, **more: Any
) -> dict[str, Any]:
    """Return the arguments of a ``LlamaConfig``."""
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
    """Return a workload of a Llama with one sequence, trained to predict the next token."""
    return _of_tokens(title, "LlamaForCausalLM", shape, tokens)


_TINY_LLAMA = ("Llama 1 × 16", llama_shape(16, 32, 1, 2, 32), 8)
_TINY_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def small_llama(size: Size) -> Workload:
    """Return the small Llama on which most sections are measured."""
    if size is Size.TINY:
        return llama(*_TINY_LLAMA)
    return llama("Llama 4 × 512", llama_shape(512, 1376, 4, 8), 512)


def nf4_llama(size: Size) -> Workload:
    """Return the small Llama with fewer tokens than any width, so that no input has a weight's shape."""
    if size is Size.TINY:
        return llama("Llama 1 × 64", llama_shape(64, 128, 1, 2, 32), 8)
    return llama("Llama 4 × 512", llama_shape(512, 1376, 4, 8), 384)


def vocabulary_llama(size: Size) -> Workload:
    """Return the small Llama with the vocabulary of a published Llama."""
    if size is Size.TINY:
        return llama("Llama 1 × 16", llama_shape(16, 32, 1, 2, 4096), 32)
    return llama("Llama 4 × 512, 32,000 tokens", llama_shape(512, 1376, 4, 8, 32_000), 512)


def curve_llama(size: Size) -> Workload:
    """Return a Llama that is small enough to be trained many times."""
    if size is Size.TINY:
        return llama(*_TINY_LLAMA)
    return llama("Llama 2 × 128", llama_shape(128, 344, 2, 4, 256), 32)


def wide_llama(size: Size) -> Workload:
    """Return a larger Llama."""
    if size is Size.TINY:
        return llama(*_TINY_LLAMA)
    return llama("Llama 8 × 1024, 256 tokens", llama_shape(1024, 2816, 8, 16), 256)


def llama_block(size: Size) -> Workload:
    """Return one block of a Llama with 1.3B parameters. Its input requires a gradient, as inside a model."""
    tiny = size is Size.TINY
    tokens, hidden = (8, 16) if tiny else (256, 2048)
    shape = llama_shape(hidden, 32, 1, 2, 32) if tiny else llama_shape(hidden, 5504, 1, 16)
    inputs = {
        "inputs_embeds": _drawn(1, tokens, hidden).requires_grad_(),
        "labels": _ids(shape["vocab_size"], 1, tokens),
    }
    title = f"Llama block, 1 × {hidden}, {tokens} tokens"
    return Workload(title, _maker("LlamaForCausalLM", shape), inputs)


def mixtral(size: Size) -> Workload:
    """Return a mixture of eight experts, two for each token. The embedded tokens require a gradient."""
    tiny = size is Size.TINY
    batch, tokens = (1, 32) if tiny else (2, 256)
    shape = llama_shape(32, 64, 2, 2, 32) if tiny else llama_shape(512, 1024, 2, 8)
    shape |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    inputs = {
        # The scale of its embeddings' initial values.
        "inputs_embeds": (0.02 * _drawn(batch, tokens, shape["hidden_size"])).requires_grad_(),
        "labels": _ids(shape["vocab_size"], batch, tokens),
    }
    return Workload("Mixtral", _maker("MixtralForCausalLM", shape), inputs)


def gpt2(size: Size) -> Workload:
    """Return GPT-2 small, whose layers are ``Conv1D``."""
    tiny = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    return _standard("GPT-2 small", "GPT2LMHeadModel", size, tiny, 50257)


def bert(size: Size) -> Workload:
    """Return BERT-base with its head for masked words."""
    tiny = _TINY_ENCODER | {"vocab_size": 64, "max_position_embeddings": 32}
    return _standard("BERT-base", "BertForMaskedLM", size, tiny, 30522)


def vit(size: Size) -> Workload:
    """Return ViT-B/16 with ten classes on one picture."""
    shape: dict[str, Any] = {"num_labels": 10}
    if size is Size.TINY:
        shape |= _TINY_ENCODER | {"image_size": 32}
    edge = shape.get("image_size", 224)
    inputs = {"pixel_values": _drawn(1, 3, edge, edge), "labels": torch.tensor([3])}
    title = f"ViT-B/16, {(edge // 16) ** 2 + 1} tokens"
    return Workload(title, _maker("ViTForImageClassification", shape), inputs)


def resnet(size: Size) -> Workload:
    """Return ResNet-50 with ten classes on two pictures, since a batch norm needs two values per channel."""
    # Otherwise the loss infers its type and writes it into the config after the graph was traced.
    shape: dict[str, Any] = {"num_labels": 10, "problem_type": "single_label_classification"}
    if size is Size.TINY:
        shape |= {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    edge = 32 if size is Size.TINY else 224
    inputs = {"pixel_values": _drawn(2, 3, edge, edge), "labels": torch.tensor([3, 4])}
    title = f"ResNet-50, 2 × {edge} × {edge}"
    return Workload(title, _maker("ResNetForImageClassification", shape), inputs)


STANDARD = (vit, bert, gpt2)
"""Models of their published sizes that a CPU can train for a few steps."""

MODELS = (llama_block, *STANDARD, wide_llama)
"""Models of the section that compares models."""


def _standard(
    title: str, model: str, size: Size, tiny: Mapping[str, Any], vocabulary: int
) -> Workload:
    """Return a language model in the default shape of its configuration, or in a tiny shape for tests."""
    if size is Size.TINY:
        return _of_tokens(f"{title}, 8 tokens", model, tiny, 8)
    return _of_tokens(f"{title}, 128 tokens", model, {}, 128, vocabulary)


def _of_tokens(
    title: str, model: str, shape: Mapping[str, Any], tokens: int, vocabulary: int = 0
) -> Workload:
    ids = _ids(vocabulary or shape["vocab_size"], 1, tokens)
    return Workload(title, _maker(model, shape), {"input_ids": ids, "labels": ids})


def _maker(model: str, shape: Mapping[str, Any]) -> Callable[[], nn.Module]:
    return functools.partial(_make, model, shape)


def _make(model: str, shape: Mapping[str, Any]) -> nn.Module:
    import transformers

    kind = getattr(transformers, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: nn.Module = kind(kind.config_class(**shape))
    return module.train()


def _drawn(*shape: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randn(shape)


def _ids(vocabulary: int, *shape: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randint(0, vocabulary, shape)


RANK = 16

_BATCH, _TOKENS = 2, 16


@dataclasses.dataclass(frozen=True)
class Served:
    """A model of transformers with random weights, which is exported and run.

    Attributes:
        title: Name in the tables.
        task: Name of its task in other exporters.
        architecture: Name of its class.
        shape: Arguments of its configuration.
        head: The suffix of the linear layer that gets no adapter, or "".
    """

    title: str
    task: str
    architecture: str
    shape: Mapping[str, Any]
    head: str = ""

    def make(self) -> nn.Module:
        """Return the model in eval mode, without a cache, the same each time."""
        return _make(self.architecture, {**self.shape, "use_cache": False}).eval()

    def inputs(
        self, batch: int = _BATCH, tokens: int = _TOKENS, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return token ids and a mask of ones, [batch, tokens]."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.shape["vocab_size"], (batch, tokens), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def layers(self, model: nn.Module) -> list[str]:
        """Return the names of the model's linear layers that get an adapter."""
        return [
            name
            for name, module in model.named_modules()
            if is_linear(module) and (not self.head or not name.endswith(self.head))
        ]

    def floor(self, rank: int = RANK) -> float:
        """Return F of a run: 1 + Σ r·(d + k) / Σ d·k, with the head in the second sum only.

        Per token, a training step takes 6 FLOPs per factor element and 4 per weight; a run takes 2 and 2.
        """
        model, inputs = self.make(), self.inputs()
        step = model_floor(model, self.layers(model), rank, lambda module: module(**inputs))
        return 1 + (step - 1) / 1.5


def served(size: Size) -> tuple[Served, ...]:
    """Return an encoder in the shape of MiniLM and the small Llama of the training steps."""
    tiny = size is Size.TINY
    width, layers, heads = (16, 1, 2) if tiny else (384, 6, 12)
    vocabulary = 64 if tiny else 1000
    encoder: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 512,
    }
    bert = Served(f"BERT {layers} × {width}", "feature-extraction", "BertModel", encoder)
    if tiny:
        return (bert,)
    decoder = llama_shape(512, 1376, 4, 8, vocabulary)
    llama = Served("Llama 4 × 512", "text-generation", "LlamaForCausalLM", decoder, "lm_head")
    return bert, llama


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set factors to values as after long training, with ΔW about as large as W. Return the same model."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model
