"""The dense oracle: the original model in fp64 with ``W' = W + s·BA`` written into its parameters.

It reads where an adapter is, and its factors, off the adapted model. What W' is made of them is worked
out here from the definition (Hu et al. 2021, Liu et al. 2024), and not by lora_fx.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lora_fx.ir.plan import PlannedSite
from lora_fx.ir.record import require_record
from lora_fx.ir.site import Site

__all__ = ["Adapter", "Dense", "adapters_of", "randomize"]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter at one place.

    Attributes:
        planned: The place.
        a, b: The factors that the adapted model holds.
        magnitude: The magnitude of DoRA.
        bias: The bias of B.
    """

    planned: PlannedSite
    a: nn.Parameter
    b: nn.Parameter
    magnitude: nn.Parameter | None = None
    bias: nn.Parameter | None = None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What it trains, by name."""
        named = {"A": self.a, "B": self.b, "magnitude": self.magnitude, "bias of B": self.bias}
        return {name: one for name, one in named.items() if one is not None}


def adapters_of(model: nn.Module, name: str) -> list[Adapter]:
    """What an adapter of a rewritten model has at each of its sites."""
    return [_adapter(model, one, name) for one in require_record(model).adapters[name].sites]


def _adapter(model: nn.Module, planned: PlannedSite, name: str) -> Adapter:
    holder = model.get_submodule(planned.site.holder)
    prefix = "lora_embedding_" if planned.site.family == "embedding" else "lora_"
    return Adapter(
        planned,
        getattr(getattr(holder, prefix + "A"), name),
        getattr(getattr(holder, prefix + "B"), name),
        getattr(holder.lora_magnitude_vector, name) if planned.kind == "dora" else None,
        getattr(holder.lora_bias, name) if planned.kind == "lora-bias" else None,
    )


def randomize(adapters: Iterable[Adapter], generator: torch.Generator) -> None:
    """Gives factors values as after some training, so that each adapter changes what its layer gives."""
    with torch.no_grad():
        for adapter in adapters:
            # s·BA of about the size of W: chains of layers then neither grow nor vanish.
            size = 0.4 / adapter.planned.scale**0.5
            for factor in (adapter.a, adapter.b):
                factor.copy_(torch.randn(factor.shape, generator=generator) * size)
            if adapter.magnitude is not None:
                factor = torch.rand(adapter.magnitude.shape, generator=generator)
                adapter.magnitude.mul_((factor + 0.5).to(adapter.magnitude))
            if adapter.bias is not None and _only_bias(adapter.planned.site):
                adapter.bias.copy_(torch.randn(adapter.bias.shape, generator=generator))


def _only_bias(site: Site) -> bool:
    """Whether a bias on B is the same as one on the base's bias, which the oracle has to put it on."""
    return site.bias is not None and all(call.bias for call in site.calls)


class Dense:
    """The original model with the weights of the active adapters, and the gradients that follow.

    Attributes:
        model: The model, in fp64.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.double()
        _untie(model)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        self._base = {id(p): p.detach().clone() for p in model.parameters()}
        self._padding = _without_padding(model)
        self._leaves: dict[Tensor, nn.Parameter] = {}
        self._written: list[tuple[nn.Parameter, Tensor]] = []

    def set_base(self, values: dict[str, Tensor]) -> None:
        """Takes other values for parameters: those that a quantized format holds."""
        with torch.no_grad():
            for name, value in values.items():
                parameter = self.model.get_parameter(name)
                parameter.copy_(value)
                self._base[id(parameter)] = value.double().clone()

    def write(self, active: Iterable[Adapter]) -> None:
        """Puts ``W + Σ ΔW`` of some adapters, of none if there are none, in the place of the weights."""
        changed = {id(p): (p, self._base[id(p)]) for p in self.model.parameters()}
        self._leaves = {}
        self._padded: list[tuple[Tensor, int]] = []
        for adapter in active:
            for owner, delta in self._deltas(adapter):
                parameter, value = changed[id(owner)]
                changed[id(owner)] = parameter, value + delta
        self._written = []
        with torch.no_grad():
            for parameter, value in changed.values():
                parameter.copy_(value)
                parameter.grad = None
                # Frozen as that of the adapted model is: code may ask whether a result has a gradient.
                parameter.requires_grad_(value.requires_grad)
                if value.requires_grad:
                    self._written.append((parameter, value))

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Gradients of what the adapters train, by the chain rule from those of the weights."""
        found: dict[nn.Parameter, Tensor] = {}
        pairs = [(value, p.grad) for p, value in self._written if p.grad is not None]
        leaves = list(self._leaves)
        if pairs:
            values, grads = zip(*pairs, strict=True)
            results = torch.autograd.grad(
                values, leaves, grads, retain_graph=True, allow_unused=True
            )
        else:
            results = (None,) * len(leaves)
        for leaf, result in zip(leaves, results, strict=True):
            found[self._leaves[leaf]] = torch.zeros_like(leaf) if result is None else result
        for leaf, index in self._padded:
            found[self._leaves[leaf]][:, index] = 0.0
        for parameter in self.model.parameters():
            parameter.grad = None
        return found

    def _deltas(self, adapter: Adapter) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What the adapter adds to which parameters, as a function of leaves of its own."""
        site, scale = adapter.planned.site, adapter.planned.scale
        a, b = self._leaf(adapter.a), self._leaf(adapter.b)
        weight = self.model.get_parameter(site.weight)
        if site.family == "embedding" and id(weight) in self._padding:
            self._padded.append((a, self._padding[id(weight)]))
        base = self._base[id(weight)]
        applied = base.reshape(site.view or base.shape)
        axis = 0 if site.layout == "out_in" else 1
        rows = site.rows or (0, applied.shape[axis])
        part = applied if site.experts else applied.narrow(axis, rows[0], rows[1] - rows[0])
        delta = scale * product(site, a, b, part.shape)
        if adapter.magnitude is not None:
            turned = part + delta
            m = self._leaf(adapter.magnitude).flatten()
            # A grouped transposed convolution has the features of each group side by side.
            groups = site.groups if "transpose" in site.pattern else 1
            pairs = zip(turned.chunk(groups), m.chunk(groups), strict=True)
            directed = [_directed(one, size, _feature_axis(site)) for one, size in pairs]
            delta = torch.cat(directed) - part
        if site.rows is not None:
            delta = _within(delta, rows, 0 if site.layout == "out_in" else 1, applied.shape)
        yield weight, delta.reshape(base.shape)
        if adapter.bias is not None and _only_bias(site):
            assert site.bias is not None
            bias = self.model.get_parameter(site.bias)
            shift = scale * self._leaf(adapter.bias)
            yield bias, _within(shift, site.rows or (0, len(shift)), 0, bias.shape)

    def _leaf(self, factor: nn.Parameter) -> Tensor:
        leaf = factor.detach().double().clone().requires_grad_()
        self._leaves[leaf] = factor
        return leaf


def _without_padding(model: nn.Module) -> dict[int, int]:
    """Takes ``padding_idx`` off the embeddings; it by the weight.

    It is no part of the function, but leaves a row out of the gradient. PEFT leaves that row out of A's,
    where it is a column, and not out of B's.
    """
    found = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            found[id(module.weight)] = module.padding_idx
            module.padding_idx = None
    return found


def _untie(model: nn.Module) -> None:
    """Gives each name of a shared parameter one of its own: adapters are a name's, not a storage's."""
    seen: dict[int, tuple[int, str]] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            first = seen.setdefault(id(parameter), (id(module), name))
            if first != (id(module), name):
                module._parameters[name] = nn.Parameter(parameter.detach().clone())


def _directed(turned: Tensor, m: Tensor, axis: int) -> Tensor:
    """``m / ‖turned‖ ∘ turned`` for each entry of an axis; the norm is a constant."""
    others = [dim for dim in range(turned.dim()) if dim != axis]
    norm = turned.detach().square().sum(others, keepdim=True).sqrt()
    return m.view([-1 if dim == axis else 1 for dim in range(turned.dim())]) / norm * turned


def _within(part: Tensor, rows: tuple[int, int], axis: int, shape: torch.Size) -> Tensor:
    """Some rows as all of them, with zeros for the others."""
    padding = [0] * (2 * part.dim())
    place = 2 * (part.dim() - 1 - axis)
    padding[place], padding[place + 1] = rows[0], shape[axis] - rows[1]
    return torch.nn.functional.pad(part, padding)


def product(site: Site, a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """``BA`` as the weight lies: ``shape`` is that of the weight, or of the rows of it that are adapted."""
    if site.family == "embedding":
        return torch.einsum("wr,rv->vw", b, a)
    if site.experts:
        return torch.einsum("eor,eri->eoi" if site.layout == "out_in" else "eor,eri->eio", b, a)
    if site.family == "conv":
        transposed = "transpose" in site.pattern
        equation = "or,ri...->io..." if transposed else "or,ri...->oi..."
        groups = zip(b.flatten(1).chunk(site.groups), a.chunk(site.groups), strict=True)
        return torch.cat([torch.einsum(equation, up, down) for up, down in groups]).reshape(shape)
    return torch.einsum("or,ri->oi" if site.layout == "out_in" else "or,ri->io", b, a)


def _feature_axis(site: Site) -> int:
    """The axis of the weight that has one entry for each magnitude."""
    if site.family == "embedding" or "transpose" in site.pattern:
        return 1
    return 0 if site.layout == "out_in" else 1
