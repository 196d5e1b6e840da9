"""What an optimizer is given: parameter groups, and the gradient of LoRA-FA.

LoRA+ (Hayou, Ghosh and Yu 2024, arXiv:2402.12354) trains B faster than A. LoRA-FA (Zhang et al. 2023,
arXiv:2308.03303) does not train A: what a layer saves for backward is then of rank r, and the gradient of
B is corrected so that the step of ``B A`` comes closest to that of a full weight.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_fx.errors import ConfigError
from lora_fx.ir import PlannedSite, Record, require_record
from lora_fx.kinds import kind_of
from lora_fx.passes.parameters import (
    adapter_parameters,
    claim_unfrozen,
    factors_of,
    inside,
    own_value,
    without_wrappers,
)

__all__ = ["correct_gradients", "parameter_groups"]

# With LoRA+ the factors of an embedding keep a rate of their own, by default PEFT's and its authors'.
_EMBEDDING_LR = 1e-6
# What keeps A Aᵀ invertible; PEFT's.
_RIDGE = 1e-8


@inside
def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    lora_plus_ratio: float | None = None,
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
    lora_fa: bool = False,
    adapter_name: str | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters in groups, each parameter once: what ``torch.optim`` takes.

    ========== ============================================================== ============== ============
    name       holds                                                          learning rate  weight decay
    ========== ============================================================== ============== ============
    lora_A     A                                                              lr             as given
    lora_B     B                                                              lr · ratio     as given
    embeddings A and B of embeddings, and of heads that are tied to them      embedding_lr   as given
    modules    what else is a matrix: weights of modules_to_save, token rows  lr             as given
    vectors    biases, norms, magnitudes                                      lr · ratio     0
    ========== ============================================================== ============== ============

    A group without parameters is left out. Rates are those of PEFT's ``create_loraplus_optimizer`` (which has
    a magnitude of a convolution among the A), and so is weight decay but for vectors, of which PEFT decays
    those that are not called a bias. Without a ratio all rates are ``lr``: then the groups differ in their
    weight decay alone.

    Args:
        model: A rewritten model.
        lr: The learning rate.
        lora_plus_ratio: LoRA+: how much faster than A the factor B is trained, above 0; 16 in the paper.
        weight_decay: For all but vectors.
        embedding_lr: The rate of the factors of embeddings. By default ``lr``, and with a ratio
            PEFT's 1e-6.
        lora_fa: LoRA-FA: A is frozen here and in no group, except that of an embedding. The optimizer is
            to be given to :func:`correct_gradients`, too.
        adapter_name: Only the parameters of this adapter, for an optimizer or a learning rate of its own; by
            default all that are trained.

    Returns:
        Groups for any optimizer of torch: ``AdamW(parameter_groups(model, 1e-4))``; ``name`` is one more
        key of each, by which a group can be given options of its own.

    Raises:
        ConfigError: If the model has no adapters, not the one that is named, or nothing in it is trained, or
            a number is none that an optimizer can use. Nothing is frozen then.
    """
    record = require_record(model)
    for name, value in (
        ("lr", lr),
        ("weight_decay", weight_decay),
        ("embedding_lr", embedding_lr),
        ("lora_plus_ratio", lora_plus_ratio),
    ):
        _check_number(name, value)
    if lora_plus_ratio == 0:
        raise ConfigError(
            "lora_plus_ratio: found 0; B would never be trained: give a number above 0"
        )
    if embedding_lr is None:
        embedding_lr = lr if lora_plus_ratio is None else _EMBEDDING_LR
    fast = lr * (lora_plus_ratio or 1.0)
    frozen = _first_factors(model, record, adapter_name) if lora_fa else []
    mine = None if adapter_name is None else _of_adapter(model, record, adapter_name)
    left_out = {id(a) for a in frozen}
    kinds = _kinds(model, record)
    members: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if mine is not None and id(parameter) not in mine:
            continue
        if parameter.requires_grad and id(parameter) not in left_out:
            kind = kinds.get(id(parameter), "modules" if parameter.dim() > 1 else "vectors")
            members.setdefault(kind, []).append(parameter)
    if not members:
        raise ConfigError(
            "nothing in the model is trained: no parameter wants a gradient; activate an adapter first"
        )
    for a in frozen:
        a.requires_grad_(False)
    claim_unfrozen(model)
    rates = {
        "lora_A": lr,
        "lora_B": fast,
        "embeddings": embedding_lr,
        "modules": lr,
        "vectors": fast,
    }
    return [
        {
            "name": name,
            "params": members[name],
            "lr": rate,
            "weight_decay": 0.0 if name == "vectors" else weight_decay,
        }
        for name, rate in rates.items()
        if name in members
    ]


def correct_gradients(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """LoRA-FA: before each step, ``g ← g (A Aᵀ)⁻¹ / s²`` for the gradient ``g`` of every B.

    With A fixed, a step of B by this changes ``s B A`` by the projection of the full weight's gradient on
    what A spans (arXiv:2308.03303, section 3). The gradients are replaced when ``optimizer.step()`` begins,
    after they were accumulated, reduced, unscaled and clipped; they belong to that step.

    Args:
        optimizer: Of any kind, over the groups of ``parameter_groups(..., lora_fa=True)``.
        model: The model of those groups.

    Returns:
        A handle; ``remove()`` ends it.

    Raises:
        ConfigError: If the model has no adapters, the optimizer trains an A, or it trains no B of the model
            whose A is fixed. Later, if a step is given a closure, which makes its gradients after this.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    pairs = []
    with without_wrappers(model) as inner:
        rows = [(*one, factors_of(inner, *one).pair) for one in _rows(require_record(inner))]
    for row, adapter, (a, b) in rows:
        if id(a) in trained:
            raise ConfigError(
                f"{row.name}: the optimizer trains A of adapter {adapter!r}; make its groups with "
                "parameter_groups(model, lr, lora_fa=True)"
            )
        if id(b) in trained:
            pairs.append((row, a, b))
    if not pairs:
        raise ConfigError("the optimizer trains no B of this model; give the model of its groups")

    def before(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first argument is the optimizer itself.
        if any(one is not None for one in (*args[1:], kwargs.get("closure"))):
            raise ConfigError(
                "optimizer.step was given a closure, whose gradients LoRA-FA cannot correct; "
                "call backward() first, then step()"
            )
        for row, a, b in pairs:
            # At scale 0 the gradient is 0, and stays so.
            if b.grad is not None and row.scale:
                b.grad = _corrected(row, a.detach(), b.grad)

    return optimizer.register_step_pre_hook(before)


def _corrected(row: PlannedSite, a: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """``g (A Aᵀ + ε)⁻¹ / s²`` for each expert or group, or for all at once."""
    count = row.site.experts or row.site.groups
    rank = row.rank if row.site.experts else row.rank // row.site.groups
    # No half type can be solved in, and their squares would lose what the ridge adds.
    wide = torch.promote_types(a.dtype, torch.float32)
    a = a.to(wide).reshape(count, rank, -1)
    gram = a @ a.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    flat = gradient.to(wide).reshape(count, -1, rank)
    solved: torch.Tensor = torch.linalg.solve(gram, flat, left=False) / row.scale**2
    return solved.reshape(gradient.shape).to(gradient.dtype)


def _rows(record: Record) -> Iterator[tuple[PlannedSite, str]]:
    """Sites with factors of their own in a product: not lookups, of which no input is saved."""
    for adapter, one in record.adapters.items():
        for row in one.sites:
            factors = kind_of(row).low_rank and not row.tied
            if factors and row.site.family != "embedding":
                yield row, adapter


def _kinds(model: nn.Module, record: Record) -> dict[int, str]:
    kinds: dict[int, str] = {}
    for adapter, one in record.adapters.items():
        for row in one.sites:
            table = row.tied or row.site.family == "embedding"
            found = factors_of(model, row, adapter)
            # The magnitude of a convolution has four dimensions, of which three are 1.
            kinds |= {id(one): "vectors" for one in found.present}
            if not kind_of(row).low_rank:
                continue
            kinds |= {
                id(found.a): "embeddings" if table else "lora_A",
                id(found.b): "embeddings" if table else "lora_B",
            }
    return kinds


def _first_factors(
    model: nn.Module, record: Record, adapter_name: str | None
) -> list[nn.Parameter]:
    rows = [one for one in _rows(record) if adapter_name in (None, one[1])]
    return [factors_of(model, row, adapter).a for row, adapter in rows]


def _of_adapter(model: nn.Module, record: Record, adapter_name: str) -> set[int]:
    """What an adapter trains, and has in the place of the base's parameters."""
    if adapter_name not in record.adapters:
        has = ", ".join(map(repr, record.adapters))
        raise ConfigError(f"there is no adapter {adapter_name!r}: the model has {has}")
    own = [own_value(model, adapter_name, name) for name in record.adapters[adapter_name].own]
    return {id(one) for one in (*adapter_parameters(model, adapter_name), *own)}


def _check_number(name: str, value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name}: found {value!r}; give a finite number of at least 0")
