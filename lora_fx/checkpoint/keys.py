"""PEFT's names for the tensors of an adapter. A slot is a tensor of a rewritten model with such a name.

``P`` is the FQN of a module of the base model (PEFT prefixes it with ``base_model.model.``):

=====================  =========================================================================
linear                 ``P.lora_A.weight`` [r, in], ``P.lora_B.weight`` [out, r]
convolution            the same, A [r, in, *k], B [out, r/g, 1, ...]; A is dense also for g groups
embedding              ``P.lora_embedding_A`` [r, vocabulary], ``P.lora_embedding_B`` [width, r]
parameter              on its module, as for linear; ``P.base_layer.lora_A.weight`` for all but the
                       last of several. With E experts: A [E·r, in], B [out, r·E], expert fastest
attention layer        ``P.lora_A.weight`` [r, in], ``P.lora_B.weight`` [3·width, r], and the same
                       for ``P.base_layer.out_proj``
slot of a kind         ``P.<key>``: ``P.lora_magnitude_vector`` [out] for a magnitude ([1, out, 1, ...]
                       if it is a convolution's), ``P.lora_B.bias`` [out] for the bias of B
``modules_to_save``    ``P.<name>`` for everything in the module's state dict
trained bias, buffer   ``P.base_layer.<name>`` in an adapted module, ``P.<name>`` elsewhere
=====================  =========================================================================

A buffer is saved if training changed it. PEFT does not write buffers, but its loader finds them.

Weights that PEFT cannot adapt are saved under lora_fx's own names, which PEFT ignores. A parameter of the
root module, or one with more dimensions than PEFT reads, is ``P.<name>_lora.lora_A.weight``. The weight of
the root module itself is ``lora_A.weight``. Parts of a weight (``attn.q``) also have such names, until
:mod:`lora_fx.checkpoint.joined` joins them into a single adapter. Earlier versions of lora_fx wrote all of
these names, so they are also read if PEFT has another name.

A :class:`Form` converts a tensor of the model to the tensor that is stored, and back. If that is not
possible, the message of its error is the second half of a sentence that begins with the key: "is dense, ...".
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
    shapes_of,
    tokens_of,
    whole_shape,
)
from lora_fx.passes.patterns import pattern_of
from lora_fx.runtime.kernels import grouped

__all__ = [
    "PLAIN",
    "PREFIX",
    "UNREAD",
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
    """A way to store a tensor. This base class stores it unchanged."""

    def stored(self, shape: _Shape) -> _Shape:
        """Return the stored shape of a tensor that has this shape in the model."""
        return tuple(self.encode(torch.empty(shape, device="meta")).shape)

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """Convert a tensor of the model to the stored tensor, which may be a view of ``value``."""
        return value

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """Convert a stored tensor to the tensor of the model, which may be a view of ``stored``.

        Raises:
            CheckpointError: If the stored values cannot be represented by a tensor of the model's shape. The
                message has the reason.
        """
        return stored


PLAIN = Form()


class Transposed(Form):
    """A transposed tensor: the factors of a head are those of the embedding that it is tied to."""

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
        groups: g. The rows of group i read the channels of group i; the other entries are zero.
    """

    groups: int

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        own = value.reshape(self.groups, -1, *value.shape[1:])
        dense = value.new_zeros(*own.shape[:2], self.groups, *own.shape[2:])
        index = torch.arange(self.groups, device=value.device)
        dense[index, :, index] = own
        return dense.flatten(0, 1).flatten(1, 2)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        divisible = not any(size % self.groups for size in stored.shape[:2])
        own, outside = (
            grouped.between_groups(stored, self.groups) if divisible else (stored, stored)
        )
        if outside.any():
            raise CheckpointError(
                "is dense, as PEFT trains it, and so reads channels that a convolution with "
                f"{self.groups} groups does not: no weight of that shape holds the sum. An adapter with "
                "dense_groups=True holds it (load_adapter onto the original model chooses that)"
            )
        return own


@dataclasses.dataclass(frozen=True, slots=True)
class StackedDown(Form):
    """The factors of several experts that PEFT calls A, [E, r, n], stored as [E·r, n].

    Attributes:
        experts: E.
        transposed: True if the model has [E, n, r]. PEFT decides by the order of the weight's dimensions
            which factor is A. If an operation reads the weight transposed, PEFT's A is the operation's B.
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
    """The factors of several experts that PEFT calls B, [E, n, r], stored as [n, r·E]. Experts vary fastest.

    Attributes:
        experts: E.
        transposed: True if the model has [E, r, n]; see :class:`StackedDown`.
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


UNREAD = ("original_module", "modules_to_save")
"""Attributes of PEFT's wrapper of a saved module.

With ``bias="all"`` PEFT also writes biases under these names. They are not read, because the same values are
stored under the names of the model.
"""

PREFIX = "base_model.model."
"""The prefix that PEFT writes before every key."""


_OTHER_TOKENS = (
    ". Rewrite the base with the trainable_token_indices of the adapter, or let load_adapter do so. If the "
    "widths differ, the adapter is of another model"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a rewritten model that belongs in a checkpoint.

    Attributes:
        key: PEFT's key, without :data:`PREFIX`.
        name: FQN of the tensor in the model.
        tensor: The parameter or buffer itself.
        form: The form in which the tensor is stored.
        required: True if a checkpoint without it is incomplete.
        alias: True if the key is an additional name of a tensor. Such keys are read, but not written.
        remedy: The end of the message if a checkpoint has a tensor of another shape: what to do.
    """

    key: str
    name: str
    tensor: torch.Tensor
    form: Form = PLAIN
    required: bool = True
    alias: bool = False
    remedy: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return self.form.stored(tuple(whole_shape(self.tensor)))

    def encoded(self) -> torch.Tensor:
        """Return the stored tensor: contiguous, on the CPU, with its own storage.

        Raises:
            CheckpointError: If the tensor is sparse or nested, which safetensors cannot hold.
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
    """Return everything of an adapter that a checkpoint can hold, by key.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        layout: PEFT's wrappers for the adapter.
        buffers: FQNs of the buffers of the base model to include; never required.
        embeddings: Weights of embeddings and heads to include, by FQN; never required.
    """
    slots: list[Slot] = []
    aliases = _aliases(model)
    for row in record.sites:
        for slot in _factor_slots(model, row, adapter, layout):
            slots += (slot, *_under(slot, row.site.holder, aliases.get(row.site.holder, ())))
    for tokens in record.tokens:
        # A head that is tied to an embedding uses the rows of the embedding.
        if not tokens.tied:
            name = rows_name(tokens, adapter)
            rows = tokens_of(model, tokens, adapter)
            slots.append(Slot(name.rpartition(".")[0], name, rows, remedy=_OTHER_TOKENS))
    inside = tuple(f"{name}." for name in record.saved_modules)
    for name in record.saved_modules:
        for own, tensor in _saved_values(model, record, adapter, name):
            slots += _base_slots(own, tensor, layout)
    for name in record.biases:
        # PEFT saves only names that end in "bias". An attention layer's in_proj_bias has a slot as well.
        required = name.rpartition(".")[2] == "bias"
        value = own_value(model, adapter, name)
        slots += _base_slots(name, value, layout, required=required)
    for name in buffers:
        if not name.startswith(inside):
            slots += _base_slots(name, model.get_buffer(name), layout, required=False)
    for name, end in embeddings.items():
        slots += _base_slots(name, end, layout, required=False)
    slots_by_key: dict[str, Slot] = {}
    for slot in sorted(slots, key=lambda slot: slot.alias):
        slots_by_key.setdefault(slot.key, slot)
    return slots_by_key


def _saved_values(
    model: nn.Module, record: AdapterRecord, adapter: str, module: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the state of a module that is trained in full, with the adapter's values."""
    for key, value in model.get_submodule(module).state_dict(keep_vars=True).items():
        name = join(module, key)
        if name in record.own:
            yield name, own_value(model, adapter, name)
        elif isinstance(value, torch.Tensor) and not in_adapter(model, name):
            yield name, value


def base_name(key: str, model: nn.Module) -> str | None:
    """Return the FQN of the base parameter that a key names, with or without PEFT's wrappers, or None."""
    bare = join(*(atom for atom in key.split(".") if atom != WRAPPER))
    return next((name for name in (key, bare) if parameter_of(model, name) is not None), None)


def _base_slots(
    name: str, tensor: torch.Tensor, layout: Layout, *, required: bool = True
) -> Iterator[Slot]:
    """Yield the slots of a base tensor, which a checkpoint may store under one of two keys.

    The first key is the tensor's name in PEFT. If its name in the model differs, that is a second slot, which
    is an alias.
    """
    key = layout.inside(name)
    yield Slot(key, name, tensor, required=required)
    if key != name:
        yield Slot(name, name, tensor, required=required, alias=True)


def _under(slot: Slot, holder: str, names: Iterable[str]) -> Iterator[Slot]:
    """Yield a slot again for other names of the module ``holder``; nothing if the slot is elsewhere."""
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
        # PEFT keeps the factors of an embedding in parameters, all others in modules.
        leaf = attribute if attribute.startswith("lora_embedding") else join(attribute, "weight")
        dense = tensor is pair[0] and site.groups > 1 and shapes.a == shapes_of(row).a
        form = Dense(site.groups) if dense else PLAIN
        holder = layout.inside(site.holder) if wrapped else site.holder
        yield Slot(join(holder, leaf), name, tensor, form, alias=parameter)
        if holder != site.holder:
            yield Slot(join(site.holder, leaf), name, tensor, form, alias=True)


def _parameter_slots(
    site: Site, names: Sequence[str], pair: tuple[torch.Tensor, torch.Tensor], layout: Layout
) -> Iterator[Slot]:
    """Yield the slots of A and B for a parameter. PEFT decides which is A by the order of the dimensions."""
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
    """Yield the slots of the kind's tensors other than A and B, if folders store them.

    PEFT writes the magnitude without ``.weight``.
    """
    holder = row.site.holder
    inside = layout.inside(holder) if holder == row.site.owner else holder
    for slot in kind_of(row).slots(row.site):
        if not slot.key:
            continue
        name, tensor = join(holder, slot.name, adapter), factors.values[slot.name]
        yield Slot(join(inside, slot.key), name, tensor)
        if inside != holder:
            yield Slot(join(holder, slot.key), name, tensor, alias=True)


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map the first name of a module to its other names, if a parent module has several names.

    Current PEFT writes only the first name; older versions wrote all of them. If a parent holds a module
    twice, PEFT adapts only the first.
    """
    names: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)

    def place(name: str) -> tuple[int, str]:
        parent, _, leaf = name.rpartition(".")
        return id(modules[parent]), leaf

    return {
        first: tuple(name for name in duplicates if place(name) == place(first))
        for first, *duplicates in names.values()
        if duplicates
    }
