"""Adapter kinds: the protocol (what one trains at a site, computes, changes and costs), and the registry."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError, hint
from lora_fx.ir import OutputBuilder, PlannedSite, Site

__all__ = [
    "AdapterKind",
    "Costs",
    "Slot",
    "Starting",
    "along",
    "chosen_kind",
    "is_plain",
    "kind_objection",
    "kind_of",
    "kind_with",
    "kinds",
    "register_adapter_kind",
    "union_of",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """What a kind costs at a site, beside A and B.

    Attributes:
        parameters: Trainable elements.
        flops: Forward FLOPs for one token; what does not depend on the number of tokens is not in it.
        saved: Elements saved for backward for one token, if the next operation does not keep them anyway.
    """

    parameters: int = 0
    flops: int = 0
    saved: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A vector of the output features that a kind trains beside A and B, or without them.

    Attributes:
        name: The attribute of the site's holder that has it for every adapter.
        key: Its key in an adapter folder, below the name of the module.
        shape: As it is stored: the output features, and any axes of size 1.
        what: What it is, in words that go on after "has": "a magnitude".
        neutral: The value with which it changes nothing; None if that depends on the weight.
        scaled: Whether the scale of the branch multiplies it.
        multiplies: Whether it multiplies: otherwise it is added.
        role: What it is in a file that takes adapters as inputs: "bias" or "gain"; empty if it cannot be one.
        normed: Whether it is compared with the norm of the weight.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    what: str
    neutral: float | None = 0.0
    scaled: bool = False
    multiplies: bool = False
    role: str = ""
    normed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Starting:
    """What a slot may start from.

    Attributes:
        row: The site.
        weight: Its weight, as it is stored. It is not written.
        a, b: The factors as they are stored; None without factors.
        config: The configuration.
        generator: Gives a generator of random numbers of its own for a name.
    """

    row: PlannedSite
    weight: Tensor
    a: Tensor | None
    b: Tensor | None
    config: LoraConfig
    generator: Callable[[str], torch.Generator]


class AdapterKind:
    """What is trained at a site. Subclass it, and register an object of it.

    A kind is **additive**, as LoRA is: its change is ``s · B A``, the product of two factors whose shapes
    the pattern of the operation says (:attr:`low_rank`). Or it is **multiplicative**: it makes another weight
    of the one that is there (:attr:`transforms`), with or without factors. What it trains beside A and B, or
    without them, are slots, vectors of the output features.

    At the least a kind has a name, :meth:`slots`, :meth:`costs` and what it computes: :meth:`joined` in a
    graph, and the same in a merge, :meth:`transformed` and :meth:`bias_terms`. ``examples/custom_kind.py``
    has one.

    Attributes:
        name: Unique, kebab-case.
        low_rank: Whether it has the factors A and B. Without them it has no rank, no scale and no dropout.
        transforms: Whether it makes another weight of the one that is there: :meth:`transformed`.
        scales_bias: Whether it changes what the operation adds, too: that has to be a parameter then.
        trains: What it trains beside A and B, in words for the dry run; empty for nothing.
        keys: The keys of its slots in an adapter folder: of a kind without factors they say where it is.
        field: The field of PEFT's configuration that chooses it; empty for one that
            ``LoraConfig(kind=name)`` chooses.
        does: What it does to each output feature, in words that go on so: "a bias on B adds to".
        depends: Why no values can be made for a file that takes adapters as inputs without the base
            weights, in words; empty if one can.
        constants: Functions of parameters alone, in its graphs, whose values a file is to have in their
            place.
        handed: Functions whose first argument comes ready in a file that takes adapters as inputs.
        in_parts: Whether its branch is right over a weight that processes hold in parts (tensor parallelism).
    """

    name: str = ""
    low_rank: bool = True
    transforms: bool = False
    scales_bias: bool = False
    trains: str = ""
    keys: tuple[str, ...] = ()
    field: str = ""
    does: str = ""
    depends: str = ""
    constants: tuple[Any, ...] = ()
    handed: tuple[Any, ...] = ()
    in_parts: bool = False

    # --- what there is ----------------------------------------------------------------------------

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """What it trains at a site beside A and B."""
        return ()

    def costs(self, site: Site) -> Costs:
        """What the slots cost at a site."""
        return Costs()

    def check(self, config: LoraConfig) -> None:
        """Refuses a configuration that asks for what this kind does not have.

        Raises:
            ConfigError: With the field, and what to do.
        """
        if self.low_rank:
            return
        for name, off in _OF_FACTORS.items():
            if (value := getattr(config, name)) != off:
                raise ConfigError(
                    f"LoraConfig.{name}: found {value!r}; the kind {self.name!r} has no factors A and B, of "
                    f"which this says something: leave it out"
                )

    def objection(self, site: Site) -> str | None:
        """Why a site cannot have it, and what would help; None if it can."""
        remedy = f"set {self.field}=False" if self.field else "choose another kind"
        for slot in self.slots(site):
            what = slot.what.removeprefix("a ")
            if site.experts:
                return (
                    f"a weight with a matrix for each expert has no {what} (as in PEFT): leave it out, or "
                    f"{remedy}"
                )
            if not all(call.axes for call in site.calls):
                return (
                    f"{self.does or f'the kind {self.name!r} changes'} each output feature, and nothing "
                    "says where they are (an ellipsis in the equation comes after them): write the "
                    f"dimensions out, or {remedy}"
                )
        if self.scales_bias and site.bias is None and any(call.bias for call in site.calls):
            return (
                f"the kind {self.name!r} changes what the operation adds, and that is no parameter, so that "
                f"no merge could: make it one, or {remedy}"
            )
        return None

    def start(self, slot: Slot, given: Starting) -> Tensor:
        """The values with which a slot starts, the output features in any shape and dtype.

        Args:
            slot: One of :meth:`slots`.
            given: What they may depend on.
        """
        if slot.neutral is None:
            raise NotImplementedError(f"the kind {self.name!r} does not say how {slot.name} starts")
        return torch.full(slot.shape, slot.neutral)

    # --- graphs -----------------------------------------------------------------------------------

    def factor_b(self, build: OutputBuilder) -> fx.Node:
        """Writes B as the product with it takes it, and returns its node."""
        return build.cast_factor("b")

    def branch_bias(self, build: OutputBuilder) -> fx.Node | None:
        """Writes what the operation that applies B takes for its bias, [out]; None for nothing."""
        return None

    def without_bias(self) -> AdapterKind:
        """Return the kind of a product that code computes with a layer's weight, but without its bias."""
        return self

    def joined(self, build: OutputBuilder, up: fx.Node | None) -> fx.Node:
        """Writes what the operation gives with the adapter, and returns its node.

        The node has the role ``ADD`` and ``build.total`` for its first argument. Where that is not
        ``build.base``, other adapters are in it, and what this one changes is added to it. A kind names its
        fused function here (:meth:`lora_fx.ir.OutputBuilder.fuse_by`).

        Args:
            build: Writes nodes.
            up: What the pattern has written, ``B A x``; None without factors.
        """
        raise NotImplementedError(f"the kind {self.name!r} does not say what it computes (joined)")

    # --- merges -----------------------------------------------------------------------------------

    def transformed(self, weight: Tensor, site: Site, values: Mapping[str, Tensor]) -> Tensor:
        """The adapted weight, a new tensor of the same shape.

        It is called for slices along the output features (:attr:`lora_fx.ir.Site.axis`).

        Args:
            weight: A part of ``W + s·BA``, or of W without factors, in the dtype in which it is computed.
            site: The site.
            values: The slots by name, flat, of the output features of that part.
        """
        raise NotImplementedError(f"the kind {self.name!r} does not say what weight it makes")

    def bound(self, values: Mapping[str, Tensor]) -> float | None:
        """What no element of :meth:`transformed` exceeds, whatever the weight is; None if nothing is known.

        Args:
            values: The slots by name.
        """
        return None

    def bias_terms(
        self, bias: Tensor | None, values: Mapping[str, Tensor], scale: float
    ) -> Sequence[tuple[Tensor, float]]:
        """What a merge adds to the bias of the operation: vectors, each with a factor.

        Args:
            bias: That of these output features; None if there is none.
            values: The slots by name, in its dtype.
            scale: The factor of the branch.

        Returns:
            Nothing for a kind that has no use for a bias. With terms and no bias to take them a merge is
            refused.
        """
        return ()

    # --- files that take adapters as inputs -------------------------------------------------------

    def inputs(
        self,
        row: PlannedSite,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        values: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """What a file takes in the places of B and of the slots, by role.

        Args:
            row: The site.
            weight: The base's weight.
            a: A.
            b: B.
            values: The slots by name, flat.
        """
        found = {"B": b.double() * row.scale}
        for slot in self.slots(row.site):
            value = values[slot.name].double()
            found[slot.role] = value * row.scale if slot.scaled else value
        return found

    def from_inputs(
        self, site: Site, weight: Tensor, given: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """B and the slots at a scale of 1, by role, for which :meth:`inputs` gives these.

        Args:
            site: The site.
            weight: The base's weight.
            given: What a file takes, by role, with A.
        """
        return {}


_OF_FACTORS: Mapping[str, Any] = {
    "lora_dropout": 0.0,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "ensure_weight_tying": False,
    "init_lora_weights": True,
}


def along(vector: Tensor, weight: Tensor, site: Site) -> Tensor:
    """A vector of the output features in a shape in which it multiplies a weight of the site.

    Args:
        vector: [out].
        weight: The weight, or some of its output features.
        site: The site.
    """
    rest = [1] * (weight.dim() - 2)
    if site.layout == "out_in":
        return vector.reshape(-1, 1, *rest)
    each = vector.reshape(site.groups, 1, -1, *rest)
    return each.expand(-1, weight.shape[0] // site.groups, *each.shape[2:]).flatten(0, 1)


def _built_in() -> tuple[AdapterKind, ...]:
    """The kinds of every file of this package: its ``KINDS``, those first that only add to the operation."""
    files = pkgutil.iter_modules([str(Path(__file__).parent)])
    modules = (importlib.import_module(f"{__name__}.{file.name}") for file in files)
    found = (kind for module in modules for kind in getattr(module, "KINDS", ()))
    return tuple(sorted(found, key=lambda kind: bool(kind.transforms)))


_BUILT_IN = _built_in()
_PLAIN = next(kind for kind in _BUILT_IN if kind.name == "lora")
_registry: tuple[AdapterKind, ...] = _BUILT_IN


def kinds() -> tuple[AdapterKind, ...]:
    """All kinds, in the order in which they were registered."""
    return _registry


def register_adapter_kind(kind: AdapterKind) -> None:
    """Adds an adapter kind of your own: what is trained at a site, beside or instead of A and B.

    A configuration chooses it by its name, ``LoraConfig(kind="ia3", target_modules=[...])``. All of PEFT's
    fields keep their meaning: they say which operations are adapted and what is trained beside the adapters,
    and fields that say something of A and B are refused by a kind that has none. PEFT's own variants have no
    ``kind``: there their fields choose (``lora_bias`` and the like), so that PEFT reads what is saved.
    An adapter folder has the name in ``adapter_config.json``, with a ``peft_type`` that PEFT does not take
    for LoRA; it can be loaded where the kind is registered.

    Args:
        kind: An object of a subclass of :class:`lora_fx.kinds.AdapterKind`. Its options are attributes of it.

    Raises:
        ConfigError: If its name is empty or taken by another kind, or it says nothing of the weight it makes.
    """
    global _registry  # noqa: PLW0603  # one list for the process
    given: object = kind
    if not isinstance(given, AdapterKind) or not given.name:
        raise ConfigError(
            f"{given!r} is no adapter kind with a name: subclass lora_fx.kinds.AdapterKind"
        )
    # A cell of a notebook that is run again defines its class again.
    if any(one.name == kind.name and _place(one) != _place(kind) for one in _registry):
        raise ConfigError(f"the kind {kind.name!r} is registered already: give it another name")
    if not kind.low_rank and not kind.transforms:
        raise ConfigError(
            f"the kind {kind.name!r} has no factors (low_rank) and makes no other weight (transforms): it "
            "would train nothing that a merge knows"
        )
    if not kind.low_rank and not kind.keys:
        raise ConfigError(
            f"the kind {kind.name!r} has no factors and says no keys, by which a folder could be read"
        )
    _registry = (*(one for one in _registry if one.name != kind.name), kind)


def _place(kind: AdapterKind) -> tuple[str, str]:
    return type(kind).__module__, type(kind).__qualname__


class _Kinded(Protocol):
    @property
    def kind(self) -> str: ...


def kind_of(row: _Kinded) -> AdapterKind:
    """The kind of a planned site.

    Raises:
        ConfigError: If it was registered in another process and is not here.
    """
    return _named(row.kind)


def _named(name: str) -> AdapterKind:
    for kind in _registry:
        if kind.name == name:
            return kind
    names = [kind.name for kind in _registry if kind not in _BUILT_IN]
    near = hint(name, names, "did you mean '{}'? ", count=1)
    raise ConfigError(
        f"the adapter kind {name!r} is not registered here: {near}call lora_fx.register_adapter_kind with it "
        "first"
    )


def chosen_kind(config: LoraConfig) -> AdapterKind:
    """The kind that a configuration chooses.

    Raises:
        ConfigError: If it is not registered, is one that other fields choose, or lacks what they ask for.
    """
    if config.kind is None:
        asked = (kind for kind in _BUILT_IN if kind.field and getattr(config, kind.field))
        return next(asked, _PLAIN)
    kind = _named(config.kind)
    if kind in _BUILT_IN:
        how = f"{kind.field}=True chooses it" if kind.field else "it is not chosen by name"
        raise ConfigError(f"LoraConfig.kind: found {kind.name!r}; {how}: leave out kind")
    kind.check(config)
    return kind


def is_plain(config: LoraConfig) -> bool:
    """Whether a configuration chooses A and B and nothing else: ``W' = W + s · B A``."""
    return chosen_kind(config) is _PLAIN


def kind_objection(site: Site, config: LoraConfig) -> str | None:
    """Why a selected site cannot have the configuration's kind; None if it can.

    Raises:
        ConfigError: If it cannot, and the configuration names it in a list: then it is what was asked for.
    """
    reason = chosen_kind(config).objection(site)
    if reason is not None and _is_named(site.name, config):
        raise ConfigError(f"{site.name}: {reason}")
    return reason


def _is_named(name: str, config: LoraConfig) -> bool:
    targets = config.target_modules
    if not isinstance(targets, tuple):
        return False
    return any(name == target or name.endswith(f".{target}") for target in targets)


def union_of(names: Iterable[str], site: Site) -> str:
    """The kind that trains at a site whatever any of these does.

    Raises:
        ConfigError: If there is none.
    """
    several = [_named(name) for name in dict.fromkeys(names)]
    return kind_with({slot.name for kind in several for slot in kind.slots(site)}, site)


def kind_with(slots: Collection[str], site: Site) -> str:
    """The kind that trains A, B and these slots at a site.

    Raises:
        ConfigError: If there is none.
    """
    for kind in _registry:
        if kind.low_rank and {slot.name for slot in kind.slots(site)} == set(slots):
            return kind.name
    raise ConfigError(
        f"{site.name}: no registered kind has A, B and {', '.join(slots) or 'nothing else'}"
    )
