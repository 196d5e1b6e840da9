"""PEFT's names for the tensors of an adapter, and where each of them is in a rewritten model.

With ``P`` for the FQN of a module of the base model (PEFT writes ``base_model.model.`` before it):

=====================  =========================================================================
linear                 ``P.lora_A.weight`` [r, in], ``P.lora_B.weight`` [out, r]
convolution            the same, A [r, in, *k], B [out, r/g, 1, ...]; A is dense also for g groups
embedding              ``P.lora_embedding_A`` [r, vocabulary], ``P.lora_embedding_B`` [width, r]
magnitude of DoRA      ``P.lora_magnitude_vector`` [out], for a convolution [1, out, 1, ...]
bias of B              ``P.lora_B.bias`` [out]
``modules_to_save``    ``P.<name>`` for everything in the module's state dict
trained bias, buffer   ``P.base_layer.<name>`` in an adapted module, ``P.<name>`` elsewhere
=====================  =========================================================================

A buffer is there if training changed it: PEFT does not write those, but its loader finds them.

Two kinds of site have no name in PEFT, which adapts modules inside a model. They are saved under
names of our own, which PEFT ignores: a raw parameter ``P.<name>`` that no module stands for, and a
part ``P.<name>`` of a fused weight (``attn.q``), have ``P.<name>_lora.lora_A.weight`` and
``P.<name>_lora.lora_B.weight``; the weight of the root module itself has ``lora_A.weight`` and
``lora_B.weight``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from lora_fx._checkpoint_forms import PLAIN, Dense, Form, Transposed
from lora_fx._checkpoint_tensors import for_file, gathered
from lora_fx.passes._factors import FactorNames, SiteFactors, factor_names, factors_of
from lora_fx.passes._own import base_modules, in_adapter, own_value
from lora_fx.passes._tokens import rows_name, tokens_of
from lora_fx.passes.patterns import pattern_of
from lora_fx.record import AdapterRecord
from lora_fx.types import PlannedSite, join

__all__ = ["PREFIX", "Slot", "base_name", "peft_sees", "site_names", "slots_of"]

PREFIX = "base_model.model."
"""What PEFT writes before every key."""

_FACTOR = re.compile(r"(?:(?P<holder>.+)\.)?lora_(?:[AB]\.weight|embedding_[AB])")


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
        return self.form.stored(tuple(self.tensor.shape))

    def encoded(self) -> torch.Tensor:
        """What is stored: contiguous, on the CPU, with storage of its own."""
        return for_file(self.form.encode(gathered(self.tensor)))


def slots_of(
    model: nn.Module, record: AdapterRecord, adapter: str, buffers: Iterable[str]
) -> dict[str, Slot]:
    """Everything of an adapter that a checkpoint can hold, by key.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        buffers: FQNs of the buffers of the base model to include; never required.
    """
    slots: list[Slot] = []
    aliases = _aliases(model)
    for row in record.sites:
        slots += _factor_slots(model, row, adapter, aliases)
    for tokens in record.tokens:
        # A head that is tied to an embedding has no rows of its own.
        if not tokens.tied:
            name = rows_name(tokens, adapter)
            slots.append(Slot(name.rpartition(".")[0], name, tokens_of(model, tokens, adapter)))
    inside = tuple(f"{name}." for name in record.saved_modules)
    for name in record.saved_modules:
        slots += [
            Slot(own, own, tensor) for own, tensor in _saved_values(model, record, adapter, name)
        ]
    wrapped = {row.site.holder for row in record.sites if peft_sees(row)}
    for name in record.biases:
        # With bias="all" PEFT trains what has "bias" in its name and saves what ends in ".bias".
        required = name.rpartition(".")[2] == "bias"
        value = own_value(model, adapter, name)
        slots.append(Slot(_base_key(name, wrapped), name, value, required=required))
    for name in buffers:
        if not name.startswith(inside):
            key = _base_key(name, wrapped)
            slots.append(Slot(key, name, model.get_buffer(name), required=False))
    return {slot.key: slot for slot in slots}


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


def peft_sees(row: PlannedSite) -> bool:
    """Whether PEFT has a name for the site: it adapts modules, and not the root."""
    return row.site.holder == row.name


def site_names(model: nn.Module, keys: Iterable[str]) -> tuple[str, ...]:
    """Names of the sites whose factors are among the keys, in their order."""
    modules = {name for name, _ in base_modules(model, every_name=True)}
    names: dict[str, None] = {}
    for key in keys:
        found = _FACTOR.fullmatch(key)
        if found is None:
            continue
        holder = found["holder"] or ""
        own = holder.endswith("_lora") and holder not in modules
        names[holder.removesuffix("_lora") if own else holder or "weight"] = None
    return tuple(names)


def base_name(key: str, model: nn.Module) -> str | None:
    """FQN of the parameter of the base model that a key names, wrapped by PEFT or not; or None."""
    owner, _, leaf = key.rpartition(".")
    for name in (key, join(owner.removesuffix("base_layer").removesuffix("."), leaf)):
        try:
            model.get_parameter(name)
        except AttributeError:
            continue
        return name
    return None


def _base_key(name: str, wrapped: set[str]) -> str:
    owner, _, leaf = name.rpartition(".")
    return join(owner, "base_layer", leaf) if owner in wrapped else name


def _factor_slots(
    model: nn.Module, row: PlannedSite, adapter: str, aliases: Mapping[str, tuple[str, ...]]
) -> Iterator[Slot]:
    site = row.site
    shapes = pattern_of(site).factors(site, row.rank)
    factors, own = factors_of(model, row, adapter), factor_names(row)
    a, b = factors.a, factors.b
    yield from _variant_slots(row, factors, own, adapter, aliases)
    for attribute, key, tensor in zip(
        (own.a, own.b), (shapes.name_a, shapes.name_b), (a, b), strict=True
    ):
        name = join(site.holder, attribute, adapter)
        if row.tied:
            yield Slot(join(site.holder, key, "weight"), name, tensor, Transposed())
            continue
        # PEFT holds those of an embedding in parameters, all others in modules.
        suffix = "" if attribute.startswith("lora_embedding") else "weight"
        form = Dense(site.groups) if tensor is a and site.groups > 1 else PLAIN
        yield Slot(join(site.holder, attribute, suffix), name, tensor, form)
        for alias in aliases.get(site.holder, ()):
            yield Slot(
                join(alias, attribute, suffix), name, tensor, form, required=False, alias=True
            )


def _variant_slots(
    row: PlannedSite,
    factors: SiteFactors,
    own: FactorNames,
    adapter: str,
    aliases: Mapping[str, tuple[str, ...]],
) -> Iterator[Slot]:
    """The magnitude of DoRA, which PEFT writes without ``.weight``, and the bias of B."""
    holder = row.site.holder
    for attribute, key, tensor in (
        (own.magnitude, "lora_magnitude_vector", factors.magnitude),
        (own.bias, "lora_B.bias", factors.bias),
    ):
        if tensor is None:
            continue
        name = join(holder, attribute, adapter)
        yield Slot(join(holder, key), name, tensor)
        for alias in aliases.get(holder, ()):
            yield Slot(join(alias, key), name, tensor, required=False, alias=True)


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
