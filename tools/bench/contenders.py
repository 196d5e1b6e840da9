"""What is compared: the same model without adapters, with ours, with PEFT's, with plain ones.

Each builder takes a base that it does not change and gives a model over the same parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.api import plan, rewrite
from lora_fx.config.lora_config import LoraConfig
from lora_fx.tools.bench.contraction import ChosenContraction
from lora_fx.tools.bench.linears import replaced, shared_copy
from lora_fx.tools.bench.peers import FiveOperations, InPlace, LowRank, WeightChange

__all__ = [
    "AGAIN",
    "BUILDERS",
    "CANONICAL",
    "EXPORTED",
    "FROZEN",
    "NO_DROPOUT",
    "OURS",
    "PEERS",
    "PEFT",
    "THIRD",
    "Settings",
    "targets_of",
]

FROZEN = "frozen"
AGAIN = "frozen again (A/A)"
THIRD = "frozen a third time"
OURS = "lora-fx"
CANONICAL = "lora-fx, optimize=False"
EXPORTED = "lora-fx, with example inputs"
PEFT = "PEFT"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The adapter, in PEFT's words.

    Attributes:
        r, lora_alpha, lora_dropout, target_modules, use_dora: The fields of that name.
        example_inputs: For the way in that exports the model.
    """

    r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_dora: bool = False
    example_inputs: Mapping[str, Any] | None = None

    def fields(self) -> dict[str, Any]:
        """What both libraries take."""
        found = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        del found["example_inputs"]
        if isinstance(self.target_modules, tuple):
            found["target_modules"] = list(self.target_modules)
        return found


Builder = Callable[[nn.Module, Settings], nn.Module]


def targets_of(model: nn.Module, settings: Settings) -> tuple[str, ...]:
    """Names of the layers that get adapters."""
    return tuple(one.name for one in plan(model, LoraConfig(**settings.fields())).sites)


def _frozen(base: nn.Module, settings: Settings) -> nn.Module:
    """No adapters, and the gradient is taken down to the embeddings, if the model has some."""
    model = shared_copy(base)
    embeddings = getattr(model, "get_input_embeddings", None)
    if embeddings is not None:
        embeddings().register_forward_hook(_wants_gradient)
    return model


def _wants_gradient(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def _ours(base: nn.Module, settings: Settings) -> nn.Module:
    return rewrite(base, LoraConfig(**settings.fields()))


def _canonical(base: nn.Module, settings: Settings) -> nn.Module:
    return rewrite(base, LoraConfig(**settings.fields()), optimize=False)


def _exported(base: nn.Module, settings: Settings) -> nn.Module:
    config = LoraConfig(**settings.fields())
    return rewrite(base, config, settings.example_inputs, frontend="export")


def _peft(base: nn.Module, settings: Settings) -> nn.Module:
    import peft

    wrapped = peft.get_peft_model(shared_copy(base), peft.LoraConfig(**settings.fields()))
    found: nn.Module = wrapped.get_base_model()
    return found


def _peer(layer: type[LowRank]) -> Builder:
    def build(base: nn.Module, settings: Settings) -> nn.Module:
        r, alpha, dropout = settings.r, settings.lora_alpha, settings.lora_dropout
        with torch.random.fork_rng(devices=[]):
            return replaced(
                base, targets_of(base, settings), lambda one: layer(one, r, alpha, dropout)
            )

    return build


PEERS = (FiveOperations.TITLE, InPlace.TITLE, WeightChange.TITLE, ChosenContraction.TITLE)
"""Adapters that are written out in this folder."""

NO_DROPOUT = (ChosenContraction.TITLE,)
"""Contenders that have none."""

BUILDERS: Mapping[str, Builder] = {
    FROZEN: _frozen,
    AGAIN: _frozen,
    THIRD: _frozen,
    OURS: _ours,
    CANONICAL: _canonical,
    EXPORTED: _exported,
    PEFT: _peft,
    **{
        layer.TITLE: _peer(layer)
        for layer in (FiveOperations, InPlace, WeightChange, ChosenContraction)
    },
}
"""By name."""
