"""PEFT's names for the tensors of an adapter, and where each of them is in a rewritten model.

With ``P`` for the FQN of a module of the base model (PEFT writes ``base_model.model.`` before it):

=====================  =========================================================================
linear                 ``P.lora_A.weight`` [r, in], ``P.lora_B.weight`` [out, r]
convolution            the same, A [r, in, *k], B [out, r/g, 1, ...]; A is dense also for g groups
embedding              ``P.lora_embedding_A`` [r, vocabulary], ``P.lora_embedding_B`` [width, r]
parameter              on its module, as for linear; ``P.base_layer.lora_A.weight`` for all but the
                       last of several. Of E experts: A [E·r, in], B [out, r·E], expert fastest
attention layer        ``P.lora_A.weight`` [r, in], ``P.lora_B.weight`` [3·width, r], and the same
                       of ``P.base_layer.out_proj``
slot of a kind         ``P.<key>``: of a magnitude ``P.lora_magnitude_vector`` [out], for a convolution
                       [1, out, 1, ...], of the bias of B ``P.lora_B.bias`` [out]
``modules_to_save``    ``P.<name>`` for everything in the module's state dict
trained bias, buffer   ``P.base_layer.<name>`` in an adapted module, ``P.<name>`` elsewhere
=====================  =========================================================================

A buffer is there if training changed it: PEFT does not write those, but its loader finds them.

What PEFT cannot adapt is saved under names of our own, which it ignores: a parameter of the root module, or
one of more dimensions than PEFT reads, ``P.<name>_lora.lora_A.weight``; the weight of the root module itself
``lora_A.weight``. Parts of a weight (``attn.q``) have such names, too, until
:mod:`lora_fx.checkpoint.joined` makes one adapter of them. All of these are read as well where PEFT has
another name: lora_fx wrote them once.

A form is how a tensor is stored where that differs from the model: its stored shape and the conversions both
ways. What is stored in it and does not fit a model is refused in words that follow the name of a key: "is
dense, ...".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from lora_fx.adapters import WRAPPER, Layout
from lora_fx.errors import CheckpointError
from lora_fx.ir import AdapterRecord, PlannedSite, Site, join
from lora_fx.kinds import kind_of
from lora_fx.passes.parameters import (
    SiteFactors,
    factors_of,
    gathered,
    in_adapter,
    own_value,
    parameter_of,
    rows_name,
    tokens_of,
    whole_shape,
)
from lora_fx.passes.patterns import pattern_of

__all__ = [
    "PLAIN",
    "PREFIX",
    "Dense",
    "Form",
    "Slot",
    "StackedDown",
    "StackedUp",
    "Transposed",
    "base_name",
    "slots_of",
]


_Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """One way of storing a tensor: this one as it is."""

    def stored(self, shape: _Shape) -> _Shape:
        """The stored shape of a tensor that has this shape in the model."""
        return tuple(self.encode(torch.empty(shape, device="meta")).shape)

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """What is stored; perhaps a view of ``value``."""
        return value

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """What was stored, as the model has it; perhaps a view.

        Raises:
            CheckpointError: If no tensor of the model's form holds it, with the reason.
        """
        return stored


PLAIN = Form()


class Transposed(Form):
    """The other way round: the factors of a head are those of the embedding that it is tied to."""

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        return value.T

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        return stored.T


@dataclasses.dataclass(frozen=True, slots=True)
class Dense(Form):
    """The A of a grouped convolution, [r, in/g, *k], stored as PEFT trains it: [r, in, *k].

    Attributes:
        groups: g. The rows of group i see the channels of group i; the rest is zero.
    """

    groups: int

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        dense = value.new_zeros(len(value), value.shape[1] * self.groups, *value.shape[2:])
        for rows, channels in self._blocks(dense):
            dense[rows, channels] = value[rows]
        return dense

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        rest = stored.clone()
        parts = []
        for rows, channels in self._blocks(stored):
            parts.append(stored[rows, channels])
            rest[rows, channels] = 0
        if rest.any():
            raise CheckpointError(
                "is dense, as PEFT trains it, and so reads channels that a convolution with "
                f"{self.groups} groups does not: no weight of that shape holds the sum. Train it with "
                "lora_fx, or leave this module out"
            )
        return torch.cat(parts)

    def _blocks(self, dense: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        rows, channels = (size // self.groups for size in dense.shape[:2])
        for group in range(self.groups):
            yield (
                slice(group * rows, (group + 1) * rows),
                slice(group * channels, (group + 1) * channels),
            )


@dataclasses.dataclass(frozen=True, slots=True)
class StackedDown(Form):
    """What comes first of the factors of several experts, [E, r, n], stored as [E·r, n]: PEFT's A.

    Attributes:
        experts: E.
        transposed: Whether the model has [E, n, r]: what is A to PEFT, which goes by the order of the
            weight's dimensions, is B in an operation that reads them the other way round.
    """

    experts: int
    transposed: bool = False

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        return (value.mT if self.transposed else value).flatten(0, 1)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        value = stored.reshape(self.experts, -1, stored.shape[1])
        return value.mT if self.transposed else value


@dataclasses.dataclass(frozen=True, slots=True)
class StackedUp(Form):
    """What comes second, [E, n, r], stored as [n, r·E] with the expert fastest: PEFT's B.

    Attributes:
        experts: E.
        transposed: Whether the model has [E, r, n]; see :class:`StackedDown`.
    """

    experts: int
    transposed: bool = False

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        return (value.mT if self.transposed else value).permute(1, 2, 0).flatten(1, 2)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        value = stored.reshape(len(stored), -1, self.experts).permute(2, 0, 1)
        return value.mT if self.transposed else value


PREFIX = "base_model.model."
"""What PEFT writes before every key."""


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a rewritten model that belongs in a checkpoint.

    Attributes:
        key: PEFT's key, without :data:`PREFIX`.
        name: FQN of the tensor in the model.
        tensor: The parameter or buffer itself.
        form: How it is stored.
        required: Whether a checkpoint without it is incomplete.
        alias: Whether it is another key for what has one already: read, not written.
    """

    key: str
    name: str
    tensor: torch.Tensor
    form: Form = PLAIN
    required: bool = True
    alias: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        return self.form.stored(tuple(whole_shape(self.tensor)))

    def encoded(self) -> torch.Tensor:
        """What is stored: contiguous, on the CPU, with storage of its own.

        Raises:
            CheckpointError: If it is sparse or nested, which no file of this format can hold.
        """
        value = self.form.encode(gathered(self.tensor, self.name))
        if value.layout is not torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else "sparse"
            raise CheckpointError(
                f"{self.name} has other values than at the rewrite, and it is {kind}: safetensors holds no "
                "such tensor. Register it with persistent=False and set it after loading, or set it in the "
                "model before the rewrite"
            )
        return value.to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()


def slots_of(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    layout: Layout,
    buffers: Iterable[str],
    embeddings: Mapping[str, torch.Tensor],
) -> dict[str, Slot]:
    """Everything of an adapter that a checkpoint can hold, by key.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        layout: What PEFT wraps for it.
        buffers: FQNs of the buffers of the base model to include; never required.
        embeddings: Weights of embeddings and heads to include, by FQN; never required.
    """
    slots: list[Slot] = []
    aliases = _aliases(model)
    for row in record.sites:
        for slot in _factor_slots(model, row, adapter, layout):
            slots += (slot, *_under(slot, row.site.holder, aliases.get(row.site.holder, ())))
    for tokens in record.tokens:
        # A head that is tied to an embedding has no rows of its own.
        if not tokens.tied:
            name = rows_name(tokens, adapter)
            slots.append(Slot(name.rpartition(".")[0], name, tokens_of(model, tokens, adapter)))
    inside = tuple(f"{name}." for name in record.saved_modules)
    for name in record.saved_modules:
        for own, tensor in _saved_values(model, record, adapter, name):
            slots += _base_slots(own, tensor, layout)
    for name in record.biases:
        # PEFT saves what is called "bias". An attention layer's in_proj_bias has a slot all the same.
        required = name.rpartition(".")[2] == "bias"
        value = own_value(model, adapter, name)
        slots += _base_slots(name, value, layout, required=required)
    for name in buffers:
        if not name.startswith(inside):
            slots += _base_slots(name, model.get_buffer(name), layout, required=False)
    for name, end in embeddings.items():
        slots += _base_slots(name, end, layout, required=False)
    found: dict[str, Slot] = {}
    for slot in sorted(slots, key=lambda slot: slot.alias):
        found.setdefault(slot.key, slot)
    return found


def _saved_values(
    model: nn.Module, record: AdapterRecord, adapter: str, module: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The state of a module that is trained in full, as the adapter has it."""
    for key, value in model.get_submodule(module).state_dict(keep_vars=True).items():
        name = join(module, key)
        if name in record.own:
            yield name, own_value(model, adapter, name)
        elif isinstance(value, torch.Tensor) and not in_adapter(model, name):
            yield name, value


def base_name(key: str, model: nn.Module) -> str | None:
    """FQN of the parameter of the base model that a key names, wrapped by PEFT or not; or None."""
    bare = join(*(atom for atom in key.split(".") if atom != WRAPPER))
    return next((name for name in (key, bare) if parameter_of(model, name) is not None), None)


def _base_slots(
    name: str, tensor: torch.Tensor, layout: Layout, *, required: bool = True
) -> Iterator[Slot]:
    """Of a tensor of the base model: its name in PEFT, and its own, where nothing was wrapped."""
    key = layout.inside(name)
    yield Slot(key, name, tensor, required=required)
    if key != name:
        yield Slot(name, name, tensor, required=required, alias=True)


def _under(slot: Slot, holder: str, names: Iterable[str]) -> Iterator[Slot]:
    """The same slot under other names of the module that holds it."""
    if slot.key.startswith(f"{holder}."):
        for name in names:
            key = name + slot.key.removeprefix(holder)
            yield dataclasses.replace(slot, key=key, required=False, alias=True)


def _factor_slots(
    model: nn.Module, row: PlannedSite, adapter: str, layout: Layout
) -> Iterator[Slot]:
    site, factors = row.site, factors_of(model, row, adapter)
    yield from _kind_slots(row, factors, adapter, layout)
    if not kind_of(row).low_rank:
        return
    shapes = pattern_of(site).factors(site, row.rank)
    pair, attributes = factors.pair, factors.names.pair
    names = [join(site.holder, attribute, adapter) for attribute in attributes]
    if row.tied:
        for key, name, tensor in zip((shapes.name_a, shapes.name_b), names, pair, strict=True):
            where = join(layout.inside(site.holder), key, "weight")
            yield Slot(where, name, tensor, Transposed())
        return
    parameter = site.rows is None and site.weight in layout.weights
    if parameter:
        yield from _parameter_slots(site, names, pair, layout)
        if site.holder == site.owner:
            return
    wrapped = site.holder == site.owner and not layout.joins(site)
    for attribute, name, tensor in zip(attributes, names, pair, strict=True):
        # PEFT holds those of an embedding in parameters, all others in modules.
        leaf = attribute if attribute.startswith("lora_embedding") else join(attribute, "weight")
        form = Dense(site.groups) if tensor is pair[0] and site.groups > 1 else PLAIN
        holder = layout.inside(site.holder) if wrapped else site.holder
        yield Slot(join(holder, leaf), name, tensor, form, alias=parameter)
        if holder != site.holder:
            yield Slot(join(site.holder, leaf), name, tensor, form, alias=True)


def _parameter_slots(
    site: Site, names: Sequence[str], pair: tuple[torch.Tensor, torch.Tensor], layout: Layout
) -> Iterator[Slot]:
    """A and B as PEFT has those of a parameter: by the order of its dimensions, whatever reads it."""
    prefix = layout.prefix(site.weight)
    crossed = layout.crossed(site)
    first, last = zip(names, pair, strict=True)
    if crossed:
        first, last = last, first
    down: Form
    up: Form
    if site.experts:
        down, up = StackedDown(site.experts, crossed), StackedUp(site.experts, crossed)
    else:
        down = up = Transposed() if crossed else PLAIN
    yield Slot(join(prefix, "lora_A", "weight"), *first, down)
    yield Slot(join(prefix, "lora_B", "weight"), *last, up)


def _kind_slots(
    row: PlannedSite, factors: SiteFactors, adapter: str, layout: Layout
) -> Iterator[Slot]:
    """What the kind trains beside A and B: PEFT writes the magnitude without ``.weight``."""
    holder = row.site.holder
    inside = layout.inside(holder) if holder == row.site.owner else holder
    for slot in kind_of(row).slots(row.site):
        name, tensor = join(holder, slot.name, adapter), factors.values[slot.name]
        yield Slot(join(inside, slot.key), name, tensor)
        if inside != holder:
            yield Slot(join(holder, slot.key), name, tensor, alias=True)


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Other names of a module in a block that the model holds several times.

    PEFT now writes the first and once wrote them all. Of a module that its parent itself holds
    twice it adapts only the first.
    """
    names: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)

    def place(name: str) -> tuple[int, str]:
        parent, _, leaf = name.rpartition(".")
        return id(modules[parent]), leaf

    return {
        first: tuple(name for name in rest if place(name) == place(first))
        for first, *rest in names.values()
        if rest
    }
