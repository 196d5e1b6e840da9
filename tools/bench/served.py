"""Models that are served: exported with adapters on them, and run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.tools.bench.contenders import is_linear, model_floor
from lora_fx.tools.bench.measure import Size

__all__ = ["RANK", "Served", "randomize", "served"]

RANK = 16

_BATCH, _TOKENS = 2, 16


@dataclasses.dataclass(frozen=True)
class Served:
    """A model of transformers with random weights.

    Attributes:
        title: What the tables call it.
        task: What exporters of others call its task.
        architecture: Its class.
        config: The class of its configuration, and its arguments.
        head: The suffix of the linear layer that gets no adapter, or "".
    """

    title: str
    task: str
    architecture: str
    config: tuple[str, Mapping[str, Any]]
    head: str = ""

    def make(self) -> nn.Module:
        """The model in eval mode, without a cache: the same one each time."""
        import transformers

        name, arguments = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(transformers, name)(**arguments, use_cache=False)
            model: nn.Module = getattr(transformers, self.architecture)(config)
        return model.eval()

    def inputs(
        self, batch: int = _BATCH, tokens: int = _TOKENS, seed: int = 0
    ) -> dict[str, Tensor]:
        """Token ids and a mask of ones, [batch, tokens]."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.config[1]["vocab_size"], (batch, tokens), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def layers(self, model: nn.Module) -> list[str]:
        """The linear layers of the model that get an adapter."""
        return [
            name
            for name, module in model.named_modules()
            if is_linear(module) and (not self.head or not name.endswith(self.head))
        ]

    def floor(self, rank: int = RANK) -> float:
        """F of a run: 1 + Σ r·(d + k) / Σ d·k, the head in the second sum only.

        Of three products of a training step and its two, a run has one of each: a third of 6 by a half of 4.
        """
        model, inputs = self.make(), self.inputs()
        step = model_floor(model, self.layers(model), rank, lambda one: one(**inputs))
        return 1 + (step - 1) / 1.5


def served(size: Size) -> tuple[Served, ...]:
    """An encoder in the shapes of MiniLM and the small Llama of the training steps."""
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
    bert = Served(
        f"BERT {layers} × {width}", "feature-extraction", "BertModel", ("BertConfig", encoder)
    )
    if tiny:
        return (bert,)
    decoder: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    config = ("LlamaConfig", decoder)
    llama = Served("Llama 4 × 512", "text-generation", "LlamaForCausalLM", config, "lm_head")
    return bert, llama


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Factors as after a long training: ΔW about as large as W. The model itself is given back."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model
