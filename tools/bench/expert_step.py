"""A training step of a mixture of experts, adapters on the experts, beside PEFT's ``target_parameters``.

The gradient is taken down to the embeddings in all contenders: what is compared is what adapters cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.tools.bench.contenders import AGAIN, FROZEN, OURS, PEFT, shared_copy
from lora_fx.tools.bench.measure import Place, Progress, Size, at_each, places
from lora_fx.tools.bench.steps import COLUMNS, Measured, cells, compare, mebibytes

__all__ = ["TITLE", "caption", "rows", "run"]

TITLE = "A training step with adapters on experts, rank 16"

_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
_TINY = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
_TOKENS = (2, 256)
_TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
_SECONDS = 60.0


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, Measured]:
    """Results by device and dtype."""
    tokens = (1, 32) if size is Size.TINY else _TOKENS

    def work(place: Place, tell: Progress | None) -> Measured:
        base = _mixtral(size).to(place.device, place.dtype)
        models = {name: model.train() for name, model in _models(base).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ids = torch.randint(0, base.config.vocab_size, tokens).to(place.device)
        return compare(
            models,
            {name: _loss(model, ids) for name, model in models.items()},
            floor=None,
            device=place.device,
            repeats=repeats,
            seconds=_SECONDS,
            progress=tell,
        )

    return at_each(places(half=size is Size.FULL), work, progress)


def rows(results: dict[str, Measured]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    return ("where", *COLUMNS, "largest tensor MiB"), [
        (where, *cells(measured, name), mebibytes(step.memory.largest if step.memory else None))
        for where, measured in results.items()
        for name, step in measured.steps.items()
    ]


def caption() -> str:
    """What was measured."""
    width, hidden, experts = (
        _SHAPE[name] for name in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    one = 2 * width * hidden * 4 / 2**20
    return (
        f"Mixtral shapes: {_SHAPE['num_hidden_layers']} layers, {experts} experts of width {width} and "
        f"{hidden}, {_TOKENS[0]} × {_TOKENS[1]} tokens, no dropout, grouped products. gate_up of one expert "
        f"is {one:.1f} MiB in fp32, of all of them {one * experts:.1f} MiB. The gradient is taken down to "
        "the embeddings in all contenders. Largest tensor: of all that an operation of the step makes."
    )


def _models(base: nn.Module) -> dict[str, nn.Module]:
    import peft

    theirs: Any = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": []}
    adapted = peft.LoraConfig(**theirs, target_parameters=_TARGETS)
    return {
        FROZEN: shared_copy(base),
        AGAIN: shared_copy(base),
        OURS: rewrite(base, LoraConfig(r=16, lora_alpha=16, target_modules=_TARGETS)),
        PEFT: peft.get_peft_model(shared_copy(base), adapted).get_base_model(),
    }


def _loss(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """The loss, the embeddings' gradient wanted: the frozen model has no other."""
    embedded = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]

    def loss() -> Tensor:
        found: Tensor = model(inputs_embeds=embedded.detach().requires_grad_(), labels=ids).loss
        return found

    return loss


def _mixtral(size: Size) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = _SHAPE | {"num_key_value_heads": 2} | _TINY if size is Size.TINY else _SHAPE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(**shape)).train()
