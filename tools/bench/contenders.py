"""The contenders: a model without adapters, and with adapters of lora-fx, of PEFT, and of plain code.

Each builder takes a base, which it leaves unchanged, and returns a model that shares its parameters.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lora_fx.api import plan, rewrite
from lora_fx.config import LoraConfig
from lora_fx.passes.kept import take_gradient_to_embeddings

__all__ = [
    "AGAIN",
    "BALANCED",
    "BUILDERS",
    "CANONICAL",
    "CHUNKED",
    "EXPORTED",
    "FROZEN",
    "KINDS",
    "LEAST",
    "NO_DROPOUT",
    "OTHER_KIND",
    "OURS",
    "OURS_AGAIN",
    "PEERS",
    "PEFT",
    "PLAIN_KIND",
    "THIRD",
    "Contenders",
    "Settings",
    "built",
    "by_dropout",
    "is_linear",
    "linear_floor",
    "model_floor",
    "name_of",
    "of_kinds",
    "shared_copy",
    "targets_of",
    "variants",
]


def is_linear(module: nn.Module) -> bool:
    """Return True for ``nn.Linear`` and for transformers' ``Conv1D``, which stores its weight transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer or a ``Conv1D`` as a matrix [out, in]."""
    weight = module.get_parameter("weight")
    return weight if isinstance(module, nn.Linear) else weight.T


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model, and share its parameters, which are frozen in the copy."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo).requires_grad_(False)


def replaced(
    model: nn.Module, names: Iterable[str], layer: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Return a copy of a model that shares its parameters, with some layers replaced.

    Args:
        model: The base.
        names: Names of the layers.
        layer: Makes the new layer from the old one.
    """
    new_model = shared_copy(model)
    for name in names:
        new_model.set_submodule(name, layer(new_model.get_submodule(name)))
    return new_model


class LowRank(nn.Module):
    """A frozen linear layer with factors A [r, in] and B [out, r] in the dtype of its weight.

    Attributes:
        TITLE: Name in the benchmark.
    """

    TITLE: ClassVar[str]

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        weight = matrix(base)
        self.base = base
        self.A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = dropout

    def dropped(self, x: Tensor) -> Tensor:
        """Return the input of the branch, after dropout."""
        if not self.dropout:
            return x
        return F.dropout(x, self.dropout, self.training)


class FiveOperations(LowRank):
    """Layer with dropout, A, B, scale and add as separate operations, as in torchtune's ``LoRALinear``."""

    TITLE = "five operations, as in torchtune"

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        branch = F.linear(F.linear(self.dropped(x), self.A), self.B)
        y: Tensor = self.base(x)
        return y + self.scale * branch


class InPlace(LowRank):
    """Layer whose branch is added to the output in place, as in loralib's ``Linear``."""

    TITLE = "added in place, as in loralib"

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        y: Tensor = self.base(x)
        y += (self.dropped(x) @ self.A.T @ self.B.T) * self.scale
        return y


class WeightChange(LowRank):
    """Layer that builds ΔW = s·BA at every step, as in a first attempt or a parametrization of the weight."""

    TITLE = "naive: builds ΔW"

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        change = self.scale * (self.B @ self.A)
        if not (self.dropout and self.training):
            bias = getattr(self.base, "bias", None)
            return F.linear(x, matrix(self.base) + change, bias)
        y: Tensor = self.base(x)
        return y + F.linear(self.dropped(x), change)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Order of the matrix products in a step of a linear layer with factors.

    Attributes:
        merged_forward: True if y = x (W + s·BA)ᵀ.
        merged_backward: True if the gradient of x is y (W + s·BA).
        outer: True if the factors' gradients come from Z = yᵀx.
    """

    merged_forward: bool
    merged_backward: bool
    outer: bool


def choose(tokens: int, out_features: int, in_features: int, rank: int) -> Contraction:
    """Return the order of products with the fewest FLOPs for a step of a layer of this size.

    Among equals, prefer an order that computes the branch separately.
    """
    options = [Contraction(*flags) for flags in itertools.product((False, True), repeat=3)]
    return min(options, key=lambda option: _flops(option, tokens, out_features, in_features, rank))


def _flops(chosen: Contraction, t: int, d: int, k: int, r: int) -> int:
    """Count the FLOPs that factors add to a step of a linear layer.

    The arguments are the number of tokens, the outputs, the inputs, and the rank.
    """
    down, up = 2 * t * k * r, 2 * t * d * r
    merged = 2 * d * k * r
    total = merged if chosen.merged_forward else down + up
    # The backward builds the merged weight again, because keeping it would cost as much memory as W.
    inner_needed = not chosen.outer or not chosen.merged_backward
    total += up * inner_needed  # yB
    total += merged if chosen.merged_backward else down
    if chosen.outer:
        return total + 2 * t * d * k + 2 * merged
    # xAᵀ exists only if the forward computed it.
    return total + down + up + down * chosen.merged_forward


class ChosenContraction(LowRank):
    """Layer that chooses the order of its products at each call, for the fewest FLOPs."""

    TITLE: ClassVar[str] = "contraction by FLOPs, as in RunLoRA"

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        y: Tensor = _Function.apply(x, matrix(self.base), self.A, self.B, self.scale)  # type: ignore[no-untyped-call]
        bias = getattr(self.base, "bias", None)
        return y if bias is None else y + bias


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = choose(len(flat), weight.shape[0], weight.shape[1], len(a))
        down = None
        if chosen.merged_forward:
            y = flat @ torch.addmm(weight, b, a, alpha=scale).T
        else:
            down = flat @ a.T
            y = (flat @ weight.T).addmm_(down, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, down)
        ctx.scale, ctx.chosen = scale, chosen
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, down = ctx.saved_tensors
        scale, chosen = ctx.scale, ctx.chosen
        grad = grads[0].reshape(-1, len(weight))
        inner: Any = None
        if not chosen.outer or not chosen.merged_backward:
            inner = (grad @ b).mul_(scale)
        if chosen.outer:
            outer = (grad.T @ x).mul_(scale)
            grad_a, grad_b = b.T @ outer, outer @ a.T
        else:
            down = x @ a.T if down is None else down
            grad_a, grad_b = inner.T @ x, (grad.T @ down).mul_(scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if chosen.merged_backward:
                grad_x = grad @ torch.addmm(weight, b, a, alpha=scale)
            else:
                grad_x = (grad @ weight).addmm_(inner, a)
            grad_x = grad_x.view(*grads[0].shape[:-1], weight.shape[1])
        return grad_x, None, grad_a, grad_b, None


def linear_floor(out_features: int, in_features: int, rank: int) -> float:
    """Return F of a linear layer: the FLOPs of a step with an adapter, divided by those without."""
    return 1 + 1.5 * rank * (out_features + in_features) / (out_features * in_features)


def model_floor(
    model: nn.Module, adapted: Iterable[str], rank: int, forward: Callable[[nn.Module], Any]
) -> float:
    """Return F of a model: the linear layers' FLOPs of a step with adapters, divided by those without.

    Args:
        model: Model without adapters.
        adapted: Names of the linear layers that get an adapter.
        rank: Rank of all adapters.
        forward: Runs the model once, to count the tokens of each layer.
    """
    changed = {model.get_submodule(name) for name in adapted}
    base = branches = 0

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal base, branches
        if not is_linear(module):
            return
        out_features, in_features = matrix(module).shape
        tokens = args[0].numel() // in_features
        base += 4 * tokens * out_features * in_features
        if module in changed:
            branches += 6 * tokens * rank * (out_features + in_features)

    hook = register_module_forward_pre_hook(count)
    try:
        with torch.no_grad():
            forward(model)
    finally:
        hook.remove()
    return 1 + branches / base


FROZEN = "frozen"
AGAIN = "frozen again (A/A)"
THIRD = "frozen a third time"
OURS = "lora-fx"
OURS_AGAIN = "lora-fx again (A/A)"
CANONICAL = "lora-fx, optimize=False"
EXPORTED = "lora-fx, with example inputs"
BALANCED = "lora-fx, balanced"
CHUNKED = "lora-fx, loss in chunks"
LEAST = "lora-fx, loss in chunks, balanced"
PEFT = "PEFT"


KINDS: Mapping[str, Mapping[str, Any]] = {"LoRA": {}, "DoRA": {"use_dora": True}}
"""The compared kinds of adapters, plain ones first, each with its fields of the configuration."""

PLAIN_KIND, OTHER_KIND = KINDS


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the adapters in a benchmark, named as in PEFT.

    Attributes:
        r, lora_alpha, lora_dropout, target_modules: PEFT's fields of the same names.
        kind: A key of :data:`KINDS`.
        example_inputs: Inputs for the frontend that exports the model.
        parameters: True if the targets are parameters, for which PEFT has a separate field.
    """

    r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    kind: str = "LoRA"
    example_inputs: Mapping[str, Any] | None = None
    parameters: bool = False

    def fields(self) -> dict[str, Any]:
        """Return the fields of the configuration that both libraries take."""
        targets = self.target_modules
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": list(targets) if isinstance(targets, tuple) else targets,
            **KINDS[self.kind],
        }


Builder = Callable[[nn.Module, Settings], nn.Module]


def targets_of(model: nn.Module, settings: Settings) -> tuple[str, ...]:
    """Return the names of a model's layers that get adapters by these settings."""
    return tuple(site.name for site in plan(model, LoraConfig(**settings.fields())).sites)


def _frozen(base: nn.Module, settings: Settings) -> nn.Module:
    """Return a model without adapters whose step computes gradients down to the embeddings, if any."""
    return take_gradient_to_embeddings(shared_copy(base))


def _ours(base: nn.Module, settings: Settings, **options: Any) -> nn.Module:
    return rewrite(base, LoraConfig(**settings.fields()), **options)


def _exported(base: nn.Module, settings: Settings) -> nn.Module:
    return _ours(base, settings, example_inputs=settings.example_inputs, frontend="export")


def _peft(base: nn.Module, settings: Settings) -> nn.Module:
    import peft

    fields = settings.fields()
    if settings.parameters:
        fields |= {"target_modules": [], "target_parameters": fields["target_modules"]}
    wrapped = peft.get_peft_model(shared_copy(base), peft.LoraConfig(**fields))
    base_model: nn.Module = wrapped.get_base_model()
    return base_model


def _peer(layer: type[LowRank]) -> Builder:
    def build(base: nn.Module, settings: Settings) -> nn.Module:
        r, alpha, dropout = settings.r, settings.lora_alpha, settings.lora_dropout
        with torch.random.fork_rng(devices=[]):
            return replaced(
                base, targets_of(base, settings), lambda module: layer(module, r, alpha, dropout)
            )

    return build


PEERS = (FiveOperations.TITLE, InPlace.TITLE, WeightChange.TITLE, ChosenContraction.TITLE)
"""Adapters that this file implements."""

NO_DROPOUT = (ChosenContraction.TITLE,)
"""Contenders without dropout."""

BUILDERS: Mapping[str, Builder] = {
    FROZEN: _frozen,
    AGAIN: _frozen,
    THIRD: _frozen,
    OURS: _ours,
    OURS_AGAIN: _ours,
    CANONICAL: functools.partial(_ours, optimize=False),
    EXPORTED: _exported,
    BALANCED: functools.partial(_ours, memory="balanced"),
    CHUNKED: functools.partial(_ours, loss="chunked"),
    LEAST: functools.partial(_ours, loss="chunked", memory="balanced"),
    PEFT: _peft,
    **{
        layer.TITLE: _peer(layer)
        for layer in (FiveOperations, InPlace, WeightChange, ChosenContraction)
    },
}
"""Builders by name."""


Contenders = Mapping[str, tuple[str, Settings]]
"""Contenders of a measurement: by title, a key of :data:`BUILDERS` and the adapter's settings."""


def name_of(contender: str, dropout: float) -> str:
    """Return a contender's name with its dropout probability, such as "PEFT, p = 0.05"."""
    return f"{contender}, p = {dropout:g}"


_DROPOUTS = (0.0, 0.05)


def variants(names: Iterable[str], dropouts: Iterable[float] = _DROPOUTS) -> Contenders:
    """Return the model without adapters, and each contender at each dropout probability that it supports.

    Args:
        names: Keys of :data:`BUILDERS`.
        dropouts: Dropout probabilities of the contenders with adapters.
    """
    contenders = {FROZEN: (FROZEN, Settings())}
    for name in names:
        if name.startswith(FROZEN):
            contenders[name] = (name, Settings())
            continue
        for dropout in dropouts:
            if not (dropout and name in NO_DROPOUT):
                contenders[name_of(name, dropout)] = (name, Settings(lora_dropout=dropout))
    return contenders


def by_dropout(names: Iterable[str]) -> Contenders:
    """Return the contenders of :func:`variants`, sorted by dropout probability instead of by name."""
    return {key: contender for p in _DROPOUTS for key, contender in variants(names, (p,)).items()}


def of_kinds(
    kinds: Iterable[str],
    dropouts: Iterable[float] = _DROPOUTS,
    libraries: Iterable[str] = (OURS, PEFT),
) -> Contenders:
    """Return a contender for each library, kind of adapter and dropout, such as "lora-fx LoRA, p = 0"."""
    return {
        name_of(f"{library} {kind}", p): (library, Settings(lora_dropout=p, kind=kind))
        for p in dropouts
        for library in libraries
        for kind in kinds
    }


def built(
    contenders: Contenders, base: nn.Module, inputs: Mapping[str, Any] | None = None
) -> dict[str, nn.Module]:
    """Build the models of contenders, in training mode, over the shared parameters of one base.

    Args:
        contenders: Contenders to build.
        base: The model.
        inputs: Inputs for the frontend that exports the model.
    """
    return {
        title: BUILDERS[name](base, dataclasses.replace(settings, example_inputs=inputs)).train()
        for title, (name, settings) in contenders.items()
    }
